"""Series of numbers: recurrent and convolutional layers, masks of padded steps, encoder and decoder, CTC."""

import keras
import numpy as np
from keras import layers, ops

from tests.conformance import toy_data
from tests.conformance.case import ROWS, WITHOUT_KEY_BIAS, Case

STEPS = 6


def waves(seed=0, steps=STEPS):
    """float64 [ROWS, steps, 2]: two waves with noise, and which of two frequencies the first has."""
    draw = toy_data.rng(seed)
    fast = (np.arange(ROWS) % 2).astype(np.int32)
    time = np.arange(steps)[None] + draw.random((ROWS, 1)) * 3
    first, second = np.sin(time * np.where(fast, 1.7, 0.6)[:, None]), np.cos(time * 0.9)
    return np.stack([first, second], axis=2) + 0.05 * draw.normal(size=(ROWS, steps, 2)), fast


def next_steps(seed=1):
    x, _ = waves(seed, STEPS + 1)
    return x[:, :-1], x[:, 1:]


def padded_waves():
    x, _ = waves(2, STEPS + 1)
    count = toy_data.lengths(3, STEPS)
    return toy_data.padded(x[:, :-1], count), toy_data.padded(x[:, 1:, :1], count)


def padded_classes():
    x, fast = waves(4)
    return toy_data.padded(x, toy_data.lengths(5, STEPS, least=3), -9.0), fast


def gru_classifier():
    return keras.Sequential(
        [keras.Input((STEPS, 2)), layers.GRU(6, name="gru"), layers.Dense(2, name="head")], name="gru_classifier"
    )


def stacked_lstm():
    return keras.Sequential(
        [
            keras.Input((STEPS, 2)),
            layers.LSTM(6, return_sequences=True, name="lstm1"),
            layers.LSTM(5, return_sequences=True, name="lstm2"),
            layers.Dense(2, name="next"),
        ],
        name="stacked_lstm",
    )


def bidirectional():
    return keras.Sequential(
        [
            keras.Input((STEPS, 2)),
            layers.Bidirectional(layers.LSTM(4, return_sequences=True, name="lstm"), name="both_ways"),
            layers.Bidirectional(layers.GRU(4, name="gru"), merge_mode="sum", name="both_ends"),
            layers.Dense(1, activation="sigmoid", name="head"),
        ],
        name="bidirectional",
    )


def waves_with_column():
    x, fast = waves(6)
    return x, fast[:, None].astype(np.float64)


def conv_lstm():
    return keras.Sequential(
        [
            keras.Input((3, 8, 1)),
            layers.ConvLSTM1D(4, 3, padding="same", name="conv_lstm"),
            layers.Flatten(name="flatten"),
            layers.Dense(2, activation="softmax", name="head"),
        ],
        name="conv_lstm",
    )


def conv_lstm_data():
    x, fast = waves(7, 24)
    return x[:, :, :1].reshape(ROWS, 3, 8, 1), fast


def time_distributed():
    series = keras.Input((STEPS, 2), name="series")
    x = layers.TimeDistributed(layers.Dense(6, activation="relu", name="step"), name="steps")(series)
    x = layers.SimpleRNN(6, return_sequences=True, name="rnn")(x)
    return keras.Model(
        series, layers.TimeDistributed(layers.Dense(2, name="out"), name="outs")(x), name="time_distributed"
    )


def masked_forecast():
    """The mask goes through the layers, and to the loss of each step."""
    return keras.Sequential(
        [
            keras.Input((STEPS, 2)),
            layers.Masking(0.0, name="masking"),
            layers.LSTM(6, return_sequences=True, name="lstm"),
            layers.Dense(1, name="next"),
        ],
        name="masked_forecast",
    )


def masked_classifier():
    series = keras.Input((STEPS, 2), name="series")
    x = layers.Masking(-9.0, name="masking")(series)
    x = layers.Bidirectional(layers.GRU(4, name="gru"), name="both_ways")(x)
    return keras.Model(series, layers.Dense(2, name="head")(x), name="masked_classifier")


def step_weights():
    x, y = next_steps(8)
    return x, y, toy_data.rng(9).random((ROWS, STEPS))


def dilated_causal():
    series = keras.Input((8, 2), name="series")
    x = layers.Conv1D(6, 1, name="stem")(series)
    for number, rate in enumerate((1, 2, 4)):
        y = layers.Conv1D(6, 2, dilation_rate=rate, padding="causal", name=f"causal{number}")(x)
        gate = layers.Conv1D(6, 2, dilation_rate=rate, padding="causal", activation="sigmoid", name=f"gate{number}")(x)
        x = layers.Add(name=f"add{number}")([x, layers.Multiply(name=f"gated{number}")([ops.tanh(y), gate])])
    return keras.Model(series, layers.Dense(2, name="next")(x), name="dilated_causal")


def eight_steps():
    x, _ = waves(10, 9)
    return x[:, :-1], x[:, 1:]


def attention_forecast():
    """An encoder, a decoder that begins with its state, and additive attention between them, both masked."""
    past, future = keras.Input((STEPS, 2), name="past"), keras.Input((3, 2), name="future")
    encoded, state = layers.GRU(6, return_sequences=True, return_state=True, name="encoder")(
        layers.Masking(0.0, name="past_mask")(past)
    )
    decoded = layers.GRU(6, return_sequences=True, name="decoder")(
        layers.Masking(0.0, name="future_mask")(future), initial_state=state
    )
    context = layers.AdditiveAttention(name="attention")([decoded, encoded])
    x = layers.Concatenate(name="both")([decoded, context])
    return keras.Model([past, future], layers.Dense(1, name="out")(x), name="attention_forecast")


def attention_forecast_data():
    x, _ = waves(11, STEPS + 4)
    past = toy_data.padded(x[:, :STEPS], toy_data.lengths(12, STEPS))
    future = toy_data.padded(x[:, STEPS : STEPS + 3], toy_data.lengths(13, 3, least=1))
    return [past, future], x[:, STEPS + 1 :, :1]


class MinimalCell(layers.Layer):
    """A recurrent cell with one gate, for `keras.layers.RNN`."""

    def __init__(self, units, **arguments):
        super().__init__(**arguments)
        self.units = self.state_size = self.output_size = units
        self.gate = layers.Dense(units, activation="sigmoid", name="gate")
        self.candidate = layers.Dense(units, activation="tanh", name="candidate")

    def build(self, shape):
        self.gate.build((shape[0], shape[-1] + self.units))
        self.candidate.build((shape[0], shape[-1]))

    def call(self, inputs, states):
        keep = self.gate(ops.concatenate([inputs, states[0]], axis=-1))
        state = keep * states[0] + (1 - keep) * self.candidate(inputs)
        return state, [state]


def custom_cell():
    series = keras.Input((STEPS, 2), name="series")
    x = layers.RNN(MinimalCell(6, name="cell"), name="rnn")(series)
    return keras.Model(series, layers.Dense(2, name="head")(x), name="custom_cell")


def recurrent_dropout():
    return keras.Sequential(
        [
            keras.Input((STEPS, 2)),
            layers.LSTM(6, dropout=0.2, recurrent_dropout=0.2, seed=5, name="lstm"),
            layers.Dense(2, name="head"),
        ],
        name="recurrent_dropout",
    )


def series_transformer():
    series = keras.Input((STEPS, 2), name="series")
    x = layers.Dense(8, name="stem")(series)
    y = layers.LayerNormalization(name="norm_a")(x)
    x = x + layers.MultiHeadAttention(2, 4, name="attention")(y, y, use_causal_mask=True)
    y = layers.LayerNormalization(name="norm_b")(x)
    x = x + layers.Conv1D(8, 1, name="narrow")(layers.Conv1D(12, 1, activation="relu", name="wide")(y))
    return keras.Model(series, layers.Dense(2, name="next")(x), name="series_transformer")


def transcriber():
    frames = keras.Input((8, 3), name="frames")
    x = layers.Conv1D(6, 3, padding="same", activation="relu", name="conv")(frames)
    x = layers.Bidirectional(layers.GRU(4, return_sequences=True, name="gru"), name="both_ways")(x)
    return keras.Model(frames, layers.Dense(5, name="letters")(x), name="transcriber")  # class 0 is the blank


def transcripts():
    letters = toy_data.padded(toy_data.ids(14, 5, 3, least=1), toy_data.lengths(15, 3, least=1))
    frames = toy_data.rng(16).normal(size=(5, 3))[np.repeat(letters, [3, 3, 2], axis=1)]
    return frames + 0.1 * toy_data.features(17, 8, 3), letters


SPARSE = lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True)  # noqa: E731
MAE = lambda: ["mae"]  # noqa: E731
ACCURACY = lambda: ["accuracy"]  # noqa: E731

CASES = [
    Case("gru_classifier", gru_classifier, waves, SPARSE, metrics=ACCURACY),
    Case("stacked_lstm", stacked_lstm, next_steps, lambda: "mse", metrics=MAE),
    Case(
        "bidirectional",
        bidirectional,
        waves_with_column,
        lambda: "binary_crossentropy",
        metrics=lambda: [
            "accuracy",
            keras.metrics.TruePositives(name="hits"),
            keras.metrics.FalseNegatives(name="misses"),
        ],
    ),
    Case("conv_lstm", conv_lstm, conv_lstm_data, lambda: "sparse_categorical_crossentropy", metrics=ACCURACY),
    Case(
        "time_distributed",
        time_distributed,
        next_steps,
        lambda: keras.losses.MeanAbsoluteError(),
        metrics=lambda: [keras.metrics.CosineSimilarity(name="cosine")],
    ),
    Case("masked_forecast", masked_forecast, padded_waves, lambda: "mse", metrics=MAE, weighted_metrics=MAE),
    Case("masked_classifier", masked_classifier, padded_classes, SPARSE, metrics=ACCURACY),
    Case("step_weights", stacked_lstm, step_weights, lambda: "mse", metrics=MAE, weighted_metrics=MAE),
    Case("dilated_causal", dilated_causal, eight_steps, lambda: keras.losses.Huber(0.5), metrics=MAE),
    Case("attention_forecast", attention_forecast, attention_forecast_data, lambda: "mse", metrics=MAE),
    Case("custom_recurrent_cell", custom_cell, waves, SPARSE, metrics=ACCURACY),
    Case(
        "recurrent_dropout", recurrent_dropout, waves, SPARSE, metrics=ACCURACY, random="dropout of inputs and states"
    ),
    Case("series_transformer", series_transformer, next_steps, lambda: "mse", metrics=MAE, rules=WITHOUT_KEY_BIAS),
    Case("ctc_transcriber", transcriber, transcripts, lambda: keras.losses.CTC()),
]
