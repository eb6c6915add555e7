"""Small models of KerasHub with random weights, as its tasks put them together; all need `keras_hub`."""

import keras
import numpy as np
from keras import layers

from tests.conformance import toy_data
from tests.conformance.case import ROWS, WITHOUT_KEY_BIAS, Case

VOCABULARY, STEPS = 20, 6
SIZES = {"vocabulary_size": VOCABULARY, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 12}
TEXT = {**SIZES, "dropout": 0.0, "max_sequence_length": 8}
NO_POOLER = ("freeze", "pooled_dense/.*")  # the loss of hidden words does not reach it


def tokens_and_masks():
    length = toy_data.lengths(0, STEPS, least=3)
    tokens = toy_data.padded(toy_data.ids(1, VOCABULARY, STEPS, least=1), length)
    return tokens, (tokens > 0).astype(np.int32)


def sentiment():
    tokens, mask = tokens_and_masks()
    x = {"token_ids": tokens, "padding_mask": mask, "segment_ids": np.zeros_like(tokens)}
    return x, (tokens.sum(1) % 3).astype(np.int32)


def sentiment_without_segments():
    x, y = sentiment()
    return {name: x[name] for name in ("token_ids", "padding_mask")}, y


def bert_classifier():
    import keras_hub

    backbone = keras_hub.models.BertBackbone(**TEXT)
    return keras_hub.models.BertTextClassifier(backbone, num_classes=3, dropout=0.0, name="bert_classifier")


def distilled_classifier():
    import keras_hub

    backbone = keras_hub.models.DistilBertBackbone(**TEXT)
    return keras_hub.models.DistilBertTextClassifier(
        backbone, num_classes=3, hidden_dim=8, dropout=0.0, name="distilled_classifier"
    )


def next_tokens():
    """As the preprocessors make it: the padding has no weight."""
    tokens, mask = tokens_and_masks()
    y = np.concatenate([tokens[:, 1:], np.zeros((ROWS, 1), np.int32)], axis=1)
    return {"token_ids": tokens, "padding_mask": mask}, y, (y > 0).astype(np.float64)


def gpt2():
    import keras_hub

    return keras_hub.models.GPT2CausalLM(keras_hub.models.GPT2Backbone(**TEXT), name="gpt2")


LLAMA = {
    **{"vocabulary_size": VOCABULARY, "num_layers": 1, "num_query_heads": 2, "num_key_value_heads": 1},
    **{"hidden_dim": 8, "intermediate_dim": 12},
}


def llama():
    import keras_hub

    return keras_hub.models.Llama3CausalLM(keras_hub.models.Llama3Backbone(**LLAMA), name="llama")


def gemma():
    import keras_hub

    return keras_hub.models.GemmaCausalLM(keras_hub.models.GemmaBackbone(**LLAMA, head_dim=4), name="gemma")


def hidden_tokens():
    """Two hidden tokens a sentence, and where they are."""
    tokens, mask = tokens_and_masks()
    where = np.sort(np.argsort(toy_data.rng(2).random((ROWS, 3)), axis=1)[:, :2], axis=1).astype(np.int32)
    y = np.take_along_axis(tokens, where, axis=1)
    hidden = tokens.copy()
    np.put_along_axis(hidden, where, VOCABULARY - 1, axis=1)
    x = {"token_ids": hidden, "padding_mask": mask, "mask_positions": where, "segment_ids": np.zeros_like(tokens)}
    return x, y, toy_data.rng(3).integers(0, 2, (ROWS, 2)).astype(np.float64)


def bert_masked():
    import keras_hub

    return keras_hub.models.BertMaskedLM(keras_hub.models.BertBackbone(**TEXT), name="bert_masked")


def sequences_to_sequences():
    tokens, mask = tokens_and_masks()
    target = np.concatenate([np.ones((ROWS, 1), np.int32), tokens[:, ::-1][:, : STEPS - 1]], axis=1)
    y = np.concatenate([target[:, 1:], np.zeros((ROWS, 1), np.int32)], axis=1)
    x = {
        "encoder_token_ids": tokens,
        "encoder_padding_mask": mask,
        "decoder_token_ids": target,
        "decoder_padding_mask": np.ones_like(mask),
    }
    return x, y, (y > 0).astype(np.float64)


def bart():
    import keras_hub

    return keras_hub.models.BartSeq2SeqLM(keras_hub.models.BartBackbone(**TEXT), name="bart")


def labelled_images():
    x = toy_data.images(4, 16, 3)
    return x, toy_data.quadrants(x)


def vit():
    import keras_hub

    backbone = keras_hub.models.ViTBackbone((16, 16, 3), 8, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=12)
    return keras_hub.models.ViTImageClassifier(backbone, num_classes=4, pooling="token", name="vit")


def encoder_of_blocks():
    """KerasHub's own layers in a model: embeddings with positions, an encoder and a decoder."""
    import keras_hub

    tokens = keras.Input((STEPS,), dtype="int32", name="tokens")
    x = keras_hub.layers.TokenAndPositionEmbedding(VOCABULARY, STEPS, 8, mask_zero=True, name="embedding")(tokens)
    x = keras_hub.layers.TransformerEncoder(12, 2, name="encoder")(x)
    x = keras_hub.layers.TransformerDecoder(12, 2, name="decoder")(x)
    return keras.Model(tokens, layers.Dense(VOCABULARY, name="logits")(x), name="encoder_of_blocks")


def tokens_themselves():
    tokens, _ = tokens_and_masks()
    return tokens, tokens


def lora_classifier():
    """The backbone's queries and values by factors of rank 2, and the head; all else is frozen by KerasHub."""
    model = bert_classifier()
    model.backbone.enable_lora(2)
    return model


SPARSE = lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True)  # noqa: E731
ACCURACY = lambda: ["accuracy"]  # noqa: E731
HUB = {"rules": WITHOUT_KEY_BIAS, "needs": "keras_hub"}
WITHOUT_BIASES = {"needs": "keras_hub"}

CASES = [
    Case("hub_bert_classifier", bert_classifier, sentiment, SPARSE, metrics=ACCURACY, **HUB),
    Case(
        "hub_bert_lora",
        lora_classifier,
        sentiment,
        SPARSE,
        metrics=ACCURACY,
        single="Keras makes the factors of LoRA in float32",
        **HUB,
    ),
    Case(
        "hub_distilbert_classifier", distilled_classifier, sentiment_without_segments, SPARSE, metrics=ACCURACY, **HUB
    ),
    Case("hub_gpt2", gpt2, next_tokens, SPARSE, weighted_metrics=ACCURACY, **HUB),
    Case(
        "hub_llama3",
        llama,
        next_tokens,
        SPARSE,
        weighted_metrics=lambda: [keras.metrics.SparseCategoricalAccuracy(name="right")],
        **WITHOUT_BIASES,
    ),
    Case("hub_gemma", gemma, next_tokens, SPARSE, weighted_metrics=ACCURACY, **WITHOUT_BIASES),
    Case(
        "hub_bert_masked_words",
        bert_masked,
        hidden_tokens,
        SPARSE,
        weighted_metrics=ACCURACY,
        needs="keras_hub",
        rules=(NO_POOLER, *WITHOUT_KEY_BIAS),
    ),
    Case("hub_bart", bart, sequences_to_sequences, SPARSE, weighted_metrics=ACCURACY, **HUB),
    Case("hub_vit", vit, labelled_images, SPARSE, metrics=ACCURACY, **HUB),
    Case("hub_encoder_decoder", encoder_of_blocks, tokens_themselves, SPARSE, metrics=ACCURACY, **HUB),
]
