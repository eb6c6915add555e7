"""One small model for each loss: Keras's own and written ones, reductions, regression, labels, distributions."""

import keras
import numpy as np
from keras import layers, ops

from tests.conformance import toy_data
from tests.conformance.case import ROWS, Case

WIDTH = 5


def small(outputs, activation=None):
    def make():
        return keras.Sequential(
            [
                keras.Input((WIDTH,)),
                layers.Dense(8, activation="tanh", name="hidden"),
                layers.Dense(outputs, activation=activation, name="head"),
            ],
            name="small",
        )

    return make


def pixels():
    """An output for each of 4 x 4 pixels."""
    return keras.Sequential(
        [
            keras.Input((WIDTH,)),
            layers.Dense(8, activation="tanh", name="hidden"),
            layers.Dense(16, activation="sigmoid", name="head"),
            layers.Reshape((4, 4, 1), name="pixels"),
        ],
        name="pixels",
    )


def x():
    return toy_data.features(0, WIDTH)


def real(columns=1):
    return lambda: (x(), toy_data.targets(x(), columns))


def positive():
    return x(), np.exp(toy_data.targets(x()))


def counts():
    return x(), np.floor(4 * np.exp(toy_data.targets(x())))


def labels():
    return x(), toy_data.classes(x(), 3)


def labels_one_hot():
    return x(), toy_data.one_hot(toy_data.classes(x(), 3), 3)


def distributions():
    scores = 2 * toy_data.targets(x(), 3)
    return x(), np.exp(scores) / np.exp(scores).sum(1, keepdims=True)


def binary():
    return x(), (toy_data.targets(x()) > 0).astype(np.float64)


def signs():
    return x(), np.sign(toy_data.targets(x()))


def masks():
    return x(), (toy_data.targets(x(), 16) > 0).astype(np.float64).reshape(ROWS, 4, 4, 1)


def labels_weighted():
    return *labels(), toy_data.rng(1).random(ROWS)


def real_weighted():
    return *real(3)(), toy_data.rng(2).integers(0, 3, (ROWS, 1)).astype(np.float64)


def sparse(reduction):
    return lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)


def focal(y_true, y_pred):
    """Cross entropy that looks away from what is easy, written out: [n]."""
    label = ops.one_hot(ops.cast(ops.reshape(y_true, (-1,)), "int32"), y_pred.shape[-1], dtype=y_pred.dtype)
    chance = ops.sum(label * ops.softmax(y_pred), axis=-1)
    return -ops.square(1 - chance) * ops.log(chance + 1e-9)


def mean_of_the_batch(y_true, y_pred):
    """A scalar: the mean over all examples."""
    return ops.mean(ops.square(y_true - y_pred))


def per_element(y_true, y_pred):
    """Not averaged over the last axis: [n, columns]."""
    return ops.abs(y_true - y_pred) ** 1.5


class Gaussian(keras.losses.Loss):
    """Negative log likelihood of a mean and a log of a deviation, which are the two columns of the output."""

    def call(self, y_true, y_pred):
        mean, log_deviation = y_pred[:, :1], y_pred[:, 1:]
        return ops.mean(log_deviation + 0.5 * ops.square((y_true - mean) * ops.exp(-log_deviation)), axis=-1)


class MixtureDensity(keras.losses.Loss):
    """Negative log likelihood of a mixture of three normal distributions of one width."""

    def __init__(self, components=3, **arguments):
        super().__init__(name="mixture_density", **arguments)
        self.components = components

    def call(self, y_true, y_pred):
        logits, means = ops.split(y_pred, 2, axis=-1)
        each = ops.log_softmax(logits) - 2.0 * ops.square(y_true - means)
        return -ops.logsumexp(each, axis=-1)


class Hazards(keras.losses.Loss):
    """Survival by intervals: y has the interval of the event and whether it was seen."""

    def call(self, y_true, y_pred):
        hazard = ops.sigmoid(y_pred)
        interval, seen = ops.cast(y_true[:, 0], "int32"), ops.cast(y_true[:, 1], y_pred.dtype)
        at = ops.one_hot(interval, y_pred.shape[-1], dtype=y_pred.dtype)
        before = ops.cast(ops.arange(y_pred.shape[-1], dtype="int32")[None] < interval[:, None], y_pred.dtype)
        event = ops.sum(at * (seen[:, None] * ops.log(hazard) + (1 - seen[:, None]) * ops.log(1 - hazard)), axis=-1)
        return -event - ops.sum(before * ops.log(1 - hazard), axis=-1)


def survival():
    interval = np.digitize(toy_data.targets(x())[:, 0], [-0.4, 0.0, 0.4])
    return x(), np.stack([interval, toy_data.rng(3).random(ROWS) < 0.7], axis=1).astype(np.int32)


def within_one(y_true, y_pred):
    return ops.cast(ops.abs(y_true - y_pred[:, :1]) < 1, y_pred.dtype)


ACCURACY = lambda: ["accuracy"]  # noqa: E731
MAE = lambda: ["mae"]  # noqa: E731

CASES = [
    Case(
        "reduction_sum", small(3), labels, sparse("sum"), metrics=ACCURACY, optimizer=lambda: keras.optimizers.SGD(1e-2)
    ),
    Case("reduction_mean", small(3), labels, sparse("mean"), metrics=ACCURACY),
    Case("reduction_sum_weighted", small(3), labels_weighted, sparse("sum"), weighted_metrics=ACCURACY),
    Case("reduction_mean_weighted", small(3), labels_weighted, sparse("mean"), weighted_metrics=ACCURACY),
    Case(
        "reduction_by_weights",
        small(3),
        labels_weighted,
        sparse("mean_with_sample_weight"),
        metrics=ACCURACY,
        weighted_metrics=ACCURACY,
    ),
    Case(
        "reduction_by_zero_weights",
        small(3),
        real_weighted,
        lambda: keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"),
        weighted_metrics=MAE,
    ),
    Case(
        "reduction_none",
        small(3),
        labels,
        sparse("none"),
        metrics=ACCURACY,
        optimizer=lambda: keras.optimizers.SGD(1e-2),
    ),
    Case("reduction_none_by_none", small(3), labels, sparse(None), optimizer=lambda: keras.optimizers.SGD(1e-2)),
    Case("focal_function", small(3), labels, lambda: focal, metrics=ACCURACY),
    Case(
        "binary_focal",
        small(1, "sigmoid"),
        binary,
        lambda: keras.losses.BinaryFocalCrossentropy(apply_class_balancing=True, label_smoothing=0.05),
        metrics=lambda: ["accuracy", keras.metrics.PrecisionAtRecall(0.5, name="precision")],
    ),
    Case(
        "categorical_focal",
        small(3, "softmax"),
        labels_one_hot,
        lambda: keras.losses.CategoricalFocalCrossentropy(),
        metrics=lambda: [keras.metrics.CategoricalAccuracy(name="right"), keras.metrics.F1Score("macro", name="f1")],
    ),
    Case(
        "dice",
        pixels,
        masks,
        lambda: keras.losses.Dice(axis=(1, 2, 3)),
        metrics=lambda: [keras.metrics.BinaryIoU(target_class_ids=[1], name="iou")],
    ),
    Case("tversky", pixels, masks, lambda: keras.losses.Tversky(alpha=0.3, beta=0.7, axis=(1, 2, 3)), metrics=ACCURACY),
    Case(
        "kl_divergence",
        small(3, "softmax"),
        distributions,
        lambda: keras.losses.KLDivergence(),
        metrics=lambda: [keras.metrics.KLDivergence(name="nats")],
    ),
    Case(
        "poisson",
        small(1, "softplus"),
        counts,
        lambda: "poisson",
        metrics=lambda: [keras.metrics.Poisson(name="deviance"), "mae"],
    ),
    Case(
        "cosine_similarity",
        small(4),
        real(4),
        lambda: keras.losses.CosineSimilarity(),
        metrics=lambda: [keras.metrics.CosineSimilarity(name="cosine")],
    ),
    Case(
        "categorical_hinge",
        small(3),
        labels_one_hot,
        lambda: "categorical_hinge",
        metrics=lambda: [keras.metrics.CategoricalHinge()],
    ),
    Case(
        "squared_hinge",
        small(1, "tanh"),
        signs,
        lambda: keras.losses.SquaredHinge(),
        metrics=lambda: [keras.metrics.Hinge(name="hinge")],
    ),
    Case(
        "percentage_error",
        small(1, "softplus"),
        positive,
        lambda: "mape",
        metrics=lambda: [keras.metrics.MeanSquaredLogarithmicError(name="msle")],
    ),
    Case("logarithmic_error", small(1, "softplus"), positive, lambda: "msle", metrics=lambda: ["mape"]),
    Case(
        "label_smoothing_binary",
        small(1),
        binary,
        lambda: keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.1),
        metrics=lambda: [keras.metrics.BinaryAccuracy(threshold=0.0)],
    ),
    Case("scalar_function", small(3), real(3), lambda: mean_of_the_batch, metrics=MAE),
    Case("function_per_element", small(3), real(3), lambda: per_element, metrics=MAE, weighted_metrics=MAE),
    Case("gaussian_likelihood", small(2), real(), lambda: Gaussian(name="gaussian"), metrics=lambda: [within_one]),
    Case("mixture_density", small(6), real(), lambda: MixtureDensity()),
    Case("survival_hazards", small(4), survival, lambda: Hazards(name="hazards")),
]
