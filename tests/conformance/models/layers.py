"""Kinds of layers and of models: own layers, shared ones, constraints, regularizers, graphs, models in models."""

import keras
import numpy as np
from keras import layers, ops

from tests.conformance import toy_data
from tests.conformance.case import ROWS, WITHOUT_KEY_BIAS, Case

WIDTH = 6


def regression(seed=0, columns=1):
    def make():
        x = toy_data.features(seed, WIDTH)
        return x, toy_data.targets(x, columns)

    return make


def labelled(seed=1):
    def make():
        x = toy_data.features(seed, WIDTH)
        return x, toy_data.classes(x, 3)

    return make


def regularized():
    """Penalties of kernels, of biases and of what layers put out."""
    return keras.Sequential(
        [
            keras.Input((WIDTH,)),
            layers.Dense(8, activation="relu", kernel_regularizer=keras.regularizers.L2(0.01), name="l2"),
            layers.Dense(8, kernel_regularizer="l1", bias_regularizer=keras.regularizers.L1L2(0.01, 0.01), name="l1"),
            layers.Dense(3, kernel_regularizer="l1l2", name="head"),
        ],
        name="regularized",
    )


def activity_regularized():
    x = keras.Input((WIDTH,), name="x")
    y = layers.Dense(8, activation="relu", activity_regularizer=keras.regularizers.L1(0.001), name="sparse")(x)
    y = layers.ActivityRegularization(l2=0.001, name="small")(layers.Dense(4, name="narrow")(y))
    return keras.Model(x, layers.Dense(1, name="head")(y), name="activity_regularized")


def constrained():
    return keras.Sequential(
        [
            keras.Input((WIDTH,)),
            layers.Dense(8, activation="tanh", kernel_constraint=keras.constraints.MaxNorm(0.8), name="max_norm"),
            layers.Dense(6, kernel_constraint="unit_norm", bias_constraint="non_neg", name="unit_norm"),
            layers.Dense(1, kernel_constraint=keras.constraints.MinMaxNorm(0.2, 1.0), name="head"),
        ],
        name="constrained",
    )


class RandomFeatures(layers.Layer):
    """Sines of fixed frequencies, which are a weight that is not trained, times learned scales."""

    def __init__(self, units, **arguments):
        super().__init__(**arguments)
        self.units = units

    def build(self, shape):
        normal = keras.initializers.RandomNormal(0, 1, seed=3)
        self.frequencies = self.add_weight(
            shape=(shape[-1], self.units), initializer=normal, trainable=False, name="frequencies"
        )
        self.scales = self.add_weight(shape=(self.units,), initializer="ones", name="scales")

    def call(self, x):
        return self.scales * ops.sin(ops.matmul(x, self.frequencies))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def own_layer():
    x = keras.Input((WIDTH,), name="x")
    return keras.Model(x, layers.Dense(1, name="head")(RandomFeatures(10, name="features")(x)), name="own_layer")


def lambda_layer():
    return keras.Sequential(
        [
            keras.Input((WIDTH,)),
            layers.Lambda(
                lambda x: ops.concatenate([x, ops.square(x)], axis=-1), output_shape=(2 * WIDTH,), name="squares"
            ),
            layers.Dense(1, name="head"),
        ],
        name="lambda_layer",
    )


class TiedAutoencoder(keras.Model):
    """The decoder's kernel is the encoder's, transposed."""

    def __init__(self):
        super().__init__(name="tied_autoencoder")
        self.encoder = layers.Dense(4, activation="tanh", name="encoder")

    def build(self, shape):
        self.encoder.build(shape)
        self.shift = self.add_weight(shape=(shape[-1],), initializer="zeros", name="shift")
        self.built = True

    def call(self, x):
        return ops.matmul(self.encoder(x), ops.transpose(self.encoder.kernel)) + self.shift


def itself():
    x = np.tanh(toy_data.features(2, WIDTH))
    return x, x


def spectral():
    return keras.Sequential(
        [
            keras.Input((WIDTH,)),
            layers.SpectralNormalization(
                layers.Dense(8, activation="relu", name="dense"), power_iterations=2, name="spectral"
            ),
            layers.Dense(1, name="head"),
        ],
        name="spectral",
    )


def shared():
    """A layer that is called three times, once on what it made itself."""
    dense = layers.Dense(WIDTH, activation="tanh", name="dense")
    left, right = keras.Input((WIDTH,), name="left"), keras.Input((WIDTH,), name="right")
    x = layers.Average(name="mean")([dense(dense(left)), dense(right)])
    return keras.Model([left, right], layers.Dense(1, name="head")(x), name="shared")


def shared_data():
    left, right = toy_data.features(3, WIDTH), toy_data.features(4, WIDTH)
    return [left, right], toy_data.targets(left - right)


def model_in_model():
    inner_x = keras.Input((WIDTH,), name="inner_x")
    inner = keras.Model(inner_x, layers.Dense(5, activation="relu", name="inner_dense")(inner_x), name="inner")
    tail = keras.Sequential(
        [layers.Dense(4, activation="relu", name="tail1"), layers.Dense(3, name="tail2")], name="tail"
    )
    x = keras.Input((WIDTH,), name="x")
    return keras.Model(x, tail(inner(x)), name="model_in_model")


class Residual(layers.Layer):
    """A block that holds layers, one of them a list's."""

    def __init__(self, width, depth, **arguments):
        super().__init__(**arguments)
        self.parts = [layers.Dense(width, activation="relu", name=f"part{k}") for k in range(depth)]
        self.norm = layers.LayerNormalization(name="norm")

    def call(self, x):
        y = self.norm(x)
        for part in self.parts:
            y = part(y)
        return x + y


class Subclassed(keras.Model):
    """Several layers; clips its activations in training alone."""

    def __init__(self):
        super().__init__(name="subclassed")
        self.stem = layers.Dense(8, name="stem")
        self.blocks = [Residual(8, 2, name=f"block{k}") for k in range(2)]
        self.head = layers.Dense(3, name="head")

    def call(self, x, training=False):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, training=training)
        if training:
            x = ops.clip(x, -3.0, 3.0)
        return self.head(x)


def frozen_base():
    """A base of which the rules train the last layer, and a head."""
    base = keras.Sequential(
        [
            keras.Input((WIDTH,)),
            layers.Dense(8, activation="relu", name="base1"),
            layers.LayerNormalization(name="base_norm"),
            layers.Dense(8, activation="relu", name="base2"),
        ],
        name="base",
    )
    x = keras.Input((WIDTH,), name="x")
    return keras.Model(x, layers.Dense(3, name="head")(base(x)), name="frozen_base")


def frozen_by_code():
    """The first layer is not trainable, as people write it for transfer learning."""
    first = layers.Dense(8, activation="relu", trainable=False, name="first")
    x = keras.Input((WIDTH,), name="x")
    return keras.Model(x, layers.Dense(3, name="head")(first(x)), name="frozen_by_code")


class GraphConvolution(layers.Layer):
    """Means over neighbours, by a dense adjacency, and a kernel."""

    def __init__(self, units, **arguments):
        super().__init__(**arguments)
        self.dense = layers.Dense(units, activation="relu", name="dense")

    def call(self, inputs):
        nodes, adjacency = inputs
        degree = ops.maximum(ops.sum(adjacency, axis=-1, keepdims=True), 1.0)
        return self.dense(ops.matmul(adjacency, nodes) / degree)


def graph_inputs():
    return keras.Input((5, 3), name="nodes"), keras.Input((5, 5), name="adjacency")


def graph_convolution():
    nodes, adjacency = graph_inputs()
    x = GraphConvolution(6, name="graph1")([nodes, adjacency])
    x = GraphConvolution(6, name="graph2")([x, adjacency])
    x = layers.GlobalAveragePooling1D(name="pool")(x)
    return keras.Model(
        {"nodes": nodes, "adjacency": adjacency}, layers.Dense(1, name="head")(x), name="graph_convolution"
    )


def graph_attention():
    """Attention between neighbours, and a class for each node."""
    nodes, adjacency = graph_inputs()
    x = layers.Dense(8, name="stem")(nodes)
    y = layers.MultiHeadAttention(2, 4, name="attention")(x, x, attention_mask=ops.cast(adjacency, "bool"))
    x = layers.LayerNormalization(name="norm")(layers.Add(name="add")([x, y]))
    return keras.Model([nodes, adjacency], layers.Dense(2, name="head")(x), name="graph_attention")


def graphs():
    nodes = toy_data.features(5, 5, 3)
    links = toy_data.rng(6).random((ROWS, 5, 5)) < 0.4
    return nodes, np.maximum(links | links.transpose(0, 2, 1), np.eye(5)).astype(np.float64)


def graph_targets():
    nodes, adjacency = graphs()
    return {"nodes": nodes, "adjacency": adjacency}, np.tanh((adjacency @ nodes)[:, :, 0].mean(1, keepdims=True))


def node_labels():
    nodes, adjacency = graphs()
    return [nodes, adjacency], ((adjacency @ nodes)[:, :, 0] > 0).astype(np.int32)


def mixed_activations():
    return keras.Sequential(
        [
            keras.Input((WIDTH,)),
            layers.Dense(8, name="dense1"),
            layers.PReLU(name="prelu"),
            layers.Dense(8, name="dense2"),
            layers.LeakyReLU(0.1, name="leaky"),
            layers.UnitNormalization(name="unit"),
            layers.Dense(8, activation="selu", kernel_initializer="lecun_normal", name="dense3"),
            layers.RMSNormalization(name="rms"),
            layers.Dense(1, activation=keras.activations.hard_sigmoid, name="head"),
        ],
        name="mixed_activations",
    )


def operator_network():
    """Two networks, of a function's values and of places, and their product (DeepONet)."""
    function, place = keras.Input((WIDTH,), name="function"), keras.Input((1,), name="place")
    branch = layers.Dense(5, name="branch2")(layers.Dense(8, activation="tanh", name="branch1")(function))
    trunk = layers.Dense(5, activation="tanh", name="trunk2")(layers.Dense(8, activation="tanh", name="trunk1")(place))
    return keras.Model((function, place), layers.Dot(axes=1, name="product")([branch, trunk]), name="operator_network")


def operator_data():
    function, place = toy_data.features(7, WIDTH), toy_data.rng(8).random((ROWS, 1))
    return (function, place), np.tanh(function[:, :1] * place + function[:, 1:2])


def dropout():
    return keras.Sequential(
        [
            keras.Input((WIDTH,)),
            layers.Dense(8, activation="relu", name="dense"),
            layers.Dropout(0.3, seed=6, name="dropout"),
            layers.AlphaDropout(0.1, seed=7, name="alpha"),
            layers.Dense(3, name="head"),
        ],
        name="dropout",
    )


class RunningCenter(layers.Layer):
    """Takes away the running mean of what it has seen in training, which it keeps in a weight that is not trained."""

    def build(self, shape):
        self.mean = self.add_weight(shape=(shape[-1],), initializer="zeros", trainable=False, name="mean")
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x, training=False):
        before = 1.0 * self.mean  # a value of now: TensorFlow reads a mirrored variable when it is used
        if training:
            self.mean.assign(0.9 * before + 0.1 * ops.mean(x, axis=0))
        return self.scale * (x - before)


def running_center():
    x = keras.Input((WIDTH,), name="x")
    y = RunningCenter(name="center")(layers.Dense(8, activation="relu", name="hidden")(x))
    return keras.Model(x, layers.Dense(3, name="head")(y), name="running_center")


def grouped_attention():
    x = keras.Input((4, 8), name="x")
    y = layers.GroupQueryAttention(4, 4, 2, name="attention")(x, x)
    y = layers.Flatten(name="flatten")(layers.RMSNormalization(name="norm")(layers.Add(name="add")([x, y])))
    return keras.Model(x, layers.Dense(1, name="head")(y), name="grouped_attention")


def tokens():
    x = toy_data.features(9, 4, 8)
    return x, toy_data.targets(x)


SPARSE = lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True)  # noqa: E731
ACCURACY = lambda: ["accuracy"]  # noqa: E731
MAE = lambda: ["mae"]  # noqa: E731

CASES = [
    Case("regularized_kernels", regularized, labelled(), SPARSE, metrics=ACCURACY),
    Case("regularized_activity", activity_regularized, regression(), lambda: "mse", metrics=MAE),
    Case("constrained_kernels", constrained, regression(), lambda: "mse", metrics=MAE),
    Case("own_layer", own_layer, regression(), lambda: "mse", metrics=lambda: [keras.metrics.R2Score(name="r2")]),
    Case("lambda_layer", lambda_layer, regression(), lambda: "mae", metrics=lambda: ["mse"]),
    Case("tied_autoencoder", TiedAutoencoder, itself, lambda: "mse", metrics=MAE),
    Case("spectral_normalization", spectral, regression(), lambda: "mse", metrics=MAE),
    Case("shared_layer", shared, shared_data, lambda: "mse", metrics=MAE),
    Case("model_in_model", model_in_model, labelled(), SPARSE, metrics=ACCURACY),
    Case("subclassed_with_training", Subclassed, labelled(), SPARSE, metrics=ACCURACY),
    Case(
        "frozen_base",
        frozen_base,
        labelled(),
        SPARSE,
        metrics=ACCURACY,
        rules=(("train", "head/.*"), ("train", "(.*/)?base2/.*"), ("freeze", ".*")),
    ),
    Case("frozen_by_code", frozen_by_code, labelled(), SPARSE, metrics=ACCURACY),
    Case(
        "biases_and_norms_only",
        frozen_base,
        labelled(),
        SPARSE,
        metrics=ACCURACY,
        rules=(("train", ".*/(bias|beta|gamma)"), ("freeze", ".*")),
    ),
    Case("graph_convolution", graph_convolution, graph_targets, lambda: "mse", metrics=MAE),
    Case("graph_attention", graph_attention, node_labels, SPARSE, metrics=ACCURACY, rules=WITHOUT_KEY_BIAS),
    Case("mixed_activations", mixed_activations, regression(), lambda: "mse", metrics=MAE),
    Case("operator_network", operator_network, operator_data, lambda: "mse", metrics=MAE),
    Case("dropout", dropout, labelled(), SPARSE, metrics=ACCURACY, random="dropout"),
    Case("running_center", running_center, labelled(), SPARSE, metrics=ACCURACY),
    Case("grouped_attention", grouped_attention, tokens, lambda: "mse", metrics=MAE, rules=WITHOUT_KEY_BIAS),
]
