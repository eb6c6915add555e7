"""Words and tokens: classification, tagging, language models, translation, spans of answers."""

import keras
import numpy as np
from keras import layers, ops

from tests.conformance import toy_data
from tests.conformance.case import ROWS, WITHOUT_KEY_BIAS, Case

VOCABULARY, STEPS, WIDTH = 20, 8, 8
WORDS = ["good", "bad", "film", "plot", "very", "not", "long"]


def sentences(seed=0, least=3):
    """int32 [ROWS, STEPS], 0 behind the end of each."""
    return toy_data.padded(toy_data.ids(seed, VOCABULARY, STEPS, least=1), toy_data.lengths(seed + 100, STEPS, least))


def sentiment():
    x = sentences()
    return x, ((x > VOCABULARY // 2).sum(1) > (x > 0).sum(1) / 2).astype(np.int32)


def sentiment_lists():
    """Sentences of several lengths, as lists of ids, padded by Keras's function."""
    tokens, y = sentiment()
    ragged = [[int(each) for each in row if each] for row in tokens]
    return keras.utils.pad_sequences(ragged, STEPS, padding="post"), y[:, None].astype(np.float64)


def tags():
    """Whether each token is even, larger, or neither; 0 at padded steps."""
    x = sentences(1)
    return x, np.where(x == 0, 0, x % 3).astype(np.int32)


def weighted_tags():
    x, y = tags()
    return x, y, np.where(x == 0, 0.0, 0.5 + toy_data.rng(2).random(x.shape))


def row_weighted_tags():
    """A weight of each sentence, [ROWS, 1]: Keras refuses [ROWS] beside a loss of each step."""
    x, y = tags()
    return x, y, toy_data.rng(3).random((ROWS, 1))


def story():
    """Tokens that follow one another by a rule, and those one later."""
    x = toy_data.ids(4, VOCABULARY - 1, STEPS + 1)
    for step in range(1, STEPS + 1):
        x[:, step] = np.where(x[:, step] % 4, (x[:, step - 1] * 3 + 1) % (VOCABULARY - 1), x[:, step])
    return x[:, :-1] + 1, x[:, 1:] + 1


def padded_story():
    x, y = story()
    count = toy_data.lengths(5, STEPS, least=3)
    return toy_data.padded(x, count), toy_data.padded(y, count)


def hidden_words():
    """Tokens of which some are hidden (token 19), and those tokens; -1 where none is hidden."""
    x, _ = story()
    hidden = toy_data.rng(6).random(x.shape) < 0.25
    return np.where(hidden, 19, x).astype(np.int32), np.where(hidden, x, -1).astype(np.int32)


def hidden_words_with_weights():
    x, y = hidden_words()
    return x, np.maximum(y, 0), (y >= 0).astype(np.float64)


class Positions(layers.Layer):
    """Embeds tokens and where they are; passes on the mask of the tokens."""

    def __init__(self, vocabulary, steps, width, mask_zero=True, **arguments):
        super().__init__(**arguments)
        self.supports_masking = True
        self.tokens = layers.Embedding(vocabulary, width, mask_zero=mask_zero, name="tokens")
        self.positions = layers.Embedding(steps, width, name="positions")

    def build(self, shape):
        self.tokens.build(shape)
        self.positions.build(shape)

    def compute_mask(self, inputs, mask=None):
        return self.tokens.compute_mask(inputs)

    def call(self, inputs):
        return self.tokens(inputs) + self.positions(ops.arange(inputs.shape[-1]))


class Block(layers.Layer):
    """Attention and two dense layers with norms after them, as the first transformers had; keeps the mask."""

    def __init__(self, width, heads=2, causal=False, **arguments):
        super().__init__(**arguments)
        self.supports_masking = True
        self.causal = causal
        self.attention = layers.MultiHeadAttention(heads, width // heads, name="attention")
        self.norm1 = layers.LayerNormalization(name="norm1")
        self.wide = layers.Dense(2 * width, activation="relu", name="wide")
        self.narrow = layers.Dense(width, name="narrow")
        self.norm2 = layers.LayerNormalization(name="norm2")

    def call(self, x):
        x = self.norm1(x + self.attention(x, x, use_causal_mask=self.causal))
        return self.norm2(x + self.narrow(self.wide(x)))


class CrossBlock(layers.Layer):
    """Causal attention to the own tokens, then attention to what an encoder made."""

    def __init__(self, width, **arguments):
        super().__init__(**arguments)
        self.supports_masking = True
        self.own = layers.MultiHeadAttention(2, width // 2, name="own")
        self.other = layers.MultiHeadAttention(2, width // 2, name="other")
        self.norm1 = layers.LayerNormalization(name="norm1")
        self.norm2 = layers.LayerNormalization(name="norm2")
        self.dense = layers.Dense(width, activation="gelu", name="dense")

    def compute_mask(self, inputs, mask=None):
        return None if mask is None else mask[0]

    def call(self, inputs):
        target, source = inputs
        target = self.norm1(target + self.own(target, target, use_causal_mask=True))
        return self.dense(self.norm2(target + self.other(target, source)))


def averaged_embedding():
    tokens = keras.Input((STEPS,), dtype="int32", name="tokens")
    x = layers.Embedding(VOCABULARY, WIDTH, mask_zero=True, name="embedding")(tokens)
    x = layers.GlobalAveragePooling1D(name="pool")(x)
    return keras.Model(tokens, layers.Dense(1, activation="sigmoid", name="head")(x), name="averaged_embedding")


def conv_text():
    return keras.Sequential(
        [
            keras.Input((STEPS,), dtype="int32"),
            layers.Embedding(VOCABULARY, WIDTH, name="embedding"),
            layers.Conv1D(8, 3, activation="relu", name="conv"),
            layers.GlobalMaxPooling1D(name="pool"),
            layers.Dense(2, name="head"),
        ],
        name="conv_text",
    )


def lstm_tagger():
    return keras.Sequential(
        [
            keras.Input((STEPS,), dtype="int32"),
            layers.Embedding(VOCABULARY, WIDTH, mask_zero=True, name="embedding"),
            layers.Bidirectional(layers.LSTM(4, return_sequences=True, name="lstm"), name="both_ways"),
            layers.Dense(3, name="tags"),
        ],
        name="lstm_tagger",
    )


def unmasked_tagger():
    tokens = keras.Input((STEPS,), dtype="int32", name="tokens")
    x = layers.GRU(6, return_sequences=True, name="gru")(layers.Embedding(VOCABULARY, WIDTH, name="embedding")(tokens))
    return keras.Model(tokens, layers.Dense(3, activation="softmax", name="tags")(x), name="unmasked_tagger")


def raw_text():
    """Sentences as strings: the model splits them and looks the words up."""
    text = keras.Input((), dtype="string", name="text")
    x = layers.TextVectorization(vocabulary=WORDS, output_sequence_length=5, name="vectorize")(text)
    x = layers.Embedding(len(WORDS) + 2, 6, mask_zero=True, name="embedding")(x)
    return keras.Model(text, layers.Dense(1, name="head")(layers.GRU(6, name="gru")(x)), name="raw_text")


def reviews():
    count = toy_data.lengths(7, 5, least=1)
    words = toy_data.words(8, [*WORDS, "zebra"], 5)
    text = np.array([" ".join(row[:many]) for row, many in zip(words, count, strict=True)], dtype=object)
    return text, np.array([float("good" in each or "very" in each) for each in text])


def bag_of_words():
    text = keras.Input((1,), dtype="string", name="text")
    x = layers.TextVectorization(vocabulary=WORDS, output_mode="multi_hot", name="bag")(text)
    x = layers.Dense(6, activation="relu", name="hidden")(x)
    return keras.Model(text, layers.Dense(1, activation="sigmoid", name="head")(x), name="bag_of_words")


def reviews_in_a_column():
    text, y = reviews()
    return text[:, None], y[:, None]


def transformer_classifier():
    """Padded tokens are masked in attention and in the mean."""
    tokens = keras.Input((STEPS,), dtype="int32", name="tokens")
    x = Positions(VOCABULARY, STEPS, WIDTH, name="embedding")(tokens)
    x = layers.GlobalAveragePooling1D(name="pool")(Block(WIDTH, name="block")(x))
    return keras.Model(tokens, layers.Dense(2, name="head")(x), name="transformer_classifier")


def explicit_padding_mask():
    """The tokenizer gives the mask as an input of its own."""
    tokens = keras.Input((STEPS,), dtype="int32", name="token_ids")
    padding = keras.Input((STEPS,), dtype="int32", name="padding_mask")
    x = Positions(VOCABULARY, STEPS, WIDTH, mask_zero=False, name="embedding")(tokens)
    between = ops.expand_dims(ops.cast(padding, "bool"), 1)
    x = layers.LayerNormalization(name="norm")(
        x + layers.MultiHeadAttention(2, 4, name="attention")(x, x, attention_mask=between)
    )
    x = layers.Dense(2, name="head")(x[:, 0])
    return keras.Model({"token_ids": tokens, "padding_mask": padding}, x, name="explicit_padding_mask")


def sentiment_with_masks():
    x, y = sentiment()
    return {"token_ids": x, "padding_mask": (x > 0).astype(np.int32)}, y


def causal_decoder():
    tokens = keras.Input((STEPS,), dtype="int32", name="tokens")
    x = Positions(VOCABULARY, STEPS, WIDTH, mask_zero=False, name="embedding")(tokens)
    for number in range(2):
        x = Block(WIDTH, causal=True, name=f"block{number}")(x)
    return keras.Model(tokens, layers.Dense(VOCABULARY, name="logits")(x), name="causal_decoder")


def masked_causal_decoder():
    """Padded steps have no loss, by the mask of the embedding."""
    tokens = keras.Input((STEPS,), dtype="int32", name="tokens")
    x = Positions(VOCABULARY, STEPS, WIDTH, name="embedding")(tokens)
    x = Block(WIDTH, causal=True, name="block")(x)
    return keras.Model(tokens, layers.Dense(VOCABULARY, name="logits")(x), name="masked_causal_decoder")


def masked_language_model():
    tokens = keras.Input((STEPS,), dtype="int32", name="tokens")
    x = Positions(VOCABULARY, STEPS, WIDTH, mask_zero=False, name="embedding")(tokens)
    x = Block(WIDTH, name="block")(x)
    return keras.Model(tokens, layers.Dense(VOCABULARY, name="logits")(x), name="masked_language_model")


class TiedLanguageModel(keras.Model):
    """The embedding is the last layer's kernel, too."""

    def __init__(self):
        super().__init__(name="tied_language_model")
        self.embedding = layers.Embedding(VOCABULARY, WIDTH, name="embedding")
        self.gru = layers.GRU(WIDTH, return_sequences=True, name="gru")

    def call(self, tokens):
        return ops.matmul(self.gru(self.embedding(tokens)), ops.transpose(self.embedding.embeddings))


def perplexity(y_true, y_pred):
    """The exponential of each sentence's mean cross entropy: [n]."""
    return ops.exp(ops.mean(keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True), axis=-1))


def recurrent_translator():
    """Two embeddings with masks, dot-product attention, and the mask of the target at the loss."""
    source = keras.Input((STEPS,), dtype="int32", name="source")
    target = keras.Input((5,), dtype="int32", name="target")
    encoded, *state = layers.LSTM(WIDTH, return_sequences=True, return_state=True, name="encoder")(
        layers.Embedding(VOCABULARY, WIDTH, mask_zero=True, name="source_embedding")(source)
    )
    decoded = layers.LSTM(WIDTH, return_sequences=True, name="decoder")(
        layers.Embedding(VOCABULARY, WIDTH, mask_zero=True, name="target_embedding")(target), initial_state=state
    )
    x = layers.Concatenate(name="both")([decoded, layers.Attention(name="attention")([decoded, encoded])])
    return keras.Model(
        {"source": source, "target": target}, layers.Dense(VOCABULARY, name="logits")(x), name="translator"
    )


def transformer_translator():
    source = keras.Input((STEPS,), dtype="int32", name="source")
    target = keras.Input((5,), dtype="int32", name="target")
    encoded = Block(WIDTH, name="encoder")(Positions(VOCABULARY, STEPS, WIDTH, name="source_embedding")(source))
    x = Positions(VOCABULARY, 5, WIDTH, name="target_embedding")(target)
    x = CrossBlock(WIDTH, name="decoder")([x, encoded])
    x = layers.Dense(VOCABULARY, activation="softmax", name="words")(x)
    return keras.Model([source, target], x, name="transformer_translator")


def translations():
    """The target is the source backwards; the decoder gets it one step late, behind the token 1."""
    source = sentences(9, least=5)
    output = toy_data.padded(source[:, 4::-1], toy_data.lengths(10, 5))
    return (
        source,
        toy_data.padded(np.concatenate([np.ones((ROWS, 1), np.int32), output[:, :-1]], 1), (output > 0).sum(1)),
        output,
    )


def translations_dict():
    source, target, output = translations()
    return {"source": source, "target": target}, output


def translations_list():
    source, target, output = translations()
    return [source, target], output


def answer_span():
    """Two outputs, the scores of where an answer begins and ends."""
    tokens = keras.Input((STEPS,), dtype="int32", name="tokens")
    x = Positions(VOCABULARY, STEPS, WIDTH, mask_zero=False, name="embedding")(tokens)
    x = layers.Bidirectional(layers.GRU(4, return_sequences=True, name="gru"), name="both_ways")(x)
    first = layers.Flatten(name="first")(layers.Dense(1, use_bias=False, name="first_score")(x))
    last = layers.Flatten(name="last")(layers.Dense(1, use_bias=False, name="last_score")(x))
    return keras.Model(tokens, [first, last], name="answer_span")


def answers():
    x = toy_data.ids(11, VOCABULARY, STEPS)
    first = np.argmax(x[:, : STEPS // 2], axis=1).astype(np.int32)
    return x, (first, first + 2)


SPARSE = lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True)  # noqa: E731
ACCURACY = lambda: ["accuracy"]  # noqa: E731

CASES = [
    Case(
        "text_averaged_embedding",
        averaged_embedding,
        sentiment_lists,
        lambda: "binary_crossentropy",
        metrics=lambda: ["accuracy", keras.metrics.AUC(name="auc")],
    ),
    Case("text_conv", conv_text, sentiment, SPARSE, metrics=ACCURACY),
    Case(
        "text_raw_strings",
        raw_text,
        reviews,
        lambda: keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=lambda: [keras.metrics.BinaryAccuracy(threshold=0.0)],
    ),
    Case("text_bag_of_words", bag_of_words, reviews_in_a_column, lambda: "binary_crossentropy", metrics=ACCURACY),
    Case("tagger_masked", lstm_tagger, tags, SPARSE, metrics=ACCURACY, weighted_metrics=ACCURACY),
    Case("tagger_masked_step_weights", lstm_tagger, weighted_tags, SPARSE, weighted_metrics=ACCURACY),
    Case("tagger_masked_row_weights", lstm_tagger, row_weighted_tags, SPARSE, metrics=ACCURACY),
    Case(
        "tagger_row_weights",
        unmasked_tagger,
        row_weighted_tags,
        lambda: "sparse_categorical_crossentropy",
        metrics=ACCURACY,
    ),
    Case(
        "tagger_step_weights",
        unmasked_tagger,
        weighted_tags,
        lambda: "sparse_categorical_crossentropy",
        metrics=ACCURACY,
        weighted_metrics=ACCURACY,
    ),
    Case("transformer_classifier", transformer_classifier, sentiment, SPARSE, metrics=ACCURACY, rules=WITHOUT_KEY_BIAS),
    Case(
        "explicit_padding_mask",
        explicit_padding_mask,
        sentiment_with_masks,
        SPARSE,
        metrics=ACCURACY,
        rules=WITHOUT_KEY_BIAS,
    ),
    Case(
        "causal_decoder",
        causal_decoder,
        story,
        SPARSE,
        metrics=lambda: ["accuracy", perplexity],
        rules=WITHOUT_KEY_BIAS,
    ),
    Case(
        "masked_causal_decoder",
        masked_causal_decoder,
        padded_story,
        SPARSE,
        metrics=ACCURACY,
        weighted_metrics=ACCURACY,
        rules=WITHOUT_KEY_BIAS,
    ),
    Case(
        "masked_words_ignored_class",
        masked_language_model,
        hidden_words,
        lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1),
        metrics=ACCURACY,
        rules=WITHOUT_KEY_BIAS,
    ),
    Case(
        "masked_words_weights",
        masked_language_model,
        hidden_words_with_weights,
        SPARSE,
        weighted_metrics=ACCURACY,
        rules=WITHOUT_KEY_BIAS,
    ),
    Case("tied_language_model", TiedLanguageModel, story, SPARSE, metrics=ACCURACY),
    Case("recurrent_translator", recurrent_translator, translations_dict, SPARSE, metrics=ACCURACY),
    Case(
        "transformer_translator",
        transformer_translator,
        translations_list,
        lambda: "sparse_categorical_crossentropy",
        metrics=ACCURACY,
        rules=WITHOUT_KEY_BIAS,
    ),
    Case(
        "answer_span", answer_span, answers, lambda: [SPARSE(), SPARSE()], metrics=lambda: [["accuracy"], ["accuracy"]]
    ),
]
