"""Distances between examples: twins, triplets, proxies, two towers, teachers."""

import keras
import numpy as np
from keras import layers, ops

from tests.conformance import toy_data
from tests.conformance.case import ROWS, Case

WIDTH = 6


def tower(name="tower", units=4):
    return keras.Sequential(
        [
            keras.Input((WIDTH,)),
            layers.Dense(8, activation="tanh", name="hidden"),
            layers.Dense(units, use_bias=False, name="vector"),
        ],
        name=name,
    )


def groups(seed):
    """Points around one of three centres: (float64 [ROWS, WIDTH], int32 [ROWS])."""
    label = toy_data.ids(seed, 3)
    return toy_data.rng(1).normal(size=(3, WIDTH))[label] + 0.3 * toy_data.features(seed + 10, WIDTH), label


def contrastive_loss(y_true, y_pred):
    """Brings like pairs together and others one apart: [n]."""
    distance = ops.reshape(y_pred, (-1,))
    like = ops.cast(ops.reshape(y_true, (-1,)), distance.dtype)
    return like * ops.square(distance) + (1 - like) * ops.square(ops.relu(1 - distance))


def siamese():
    """One tower for both inputs, and the distance between its outputs."""
    shared = tower()
    left, right = keras.Input((WIDTH,), name="left"), keras.Input((WIDTH,), name="right")
    distance = layers.Lambda(
        lambda both: ops.sqrt(ops.sum(ops.square(both[0] - both[1]), axis=1, keepdims=True) + 1e-6),
        output_shape=(1,),
        name="distance",
    )([shared(left), shared(right)])
    return keras.Model([left, right], distance, name="siamese")


def pairs():
    (left, a), (right, b) = groups(2), groups(3)
    return (left, right), (a == b).astype(np.int32)


def cosine_siamese():
    shared = tower()
    left, right = keras.Input((WIDTH,), name="left"), keras.Input((WIDTH,), name="right")
    closeness = layers.Dot(axes=1, normalize=True, name="cosine")([shared(left), shared(right)])
    return keras.Model(
        {"left": left, "right": right},
        layers.Dense(1, activation="sigmoid", name="alike")(closeness),
        name="cosine_siamese",
    )


def named_pairs():
    (left, right), y = pairs()
    return {"left": left, "right": right}, y[:, None].astype(np.float64)


class Triplets(keras.Model):
    """An anchor is to be nearer to its like than to another, by a margin."""

    def __init__(self):
        super().__init__(name="triplets")
        self.tower = tower()
        self.right = keras.metrics.Mean(name="right")

    def call(self, inputs):
        anchor, like, other = (self.tower(x) for x in inputs)
        return ops.sum(ops.square(anchor - like), axis=-1), ops.sum(ops.square(anchor - other), axis=-1)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        near, far = y_pred
        self.right.update_state(ops.cast(near < far, near.dtype))
        return ops.mean(ops.relu(near - far + 0.5))


def triplets():
    points, label = groups(4)
    rows = np.arange(ROWS)
    like = np.array([np.flatnonzero((label == label[row]) & (rows != row))[0] for row in rows])
    other = np.array([np.flatnonzero(label != label[row])[row % 5] for row in rows])
    return ((points, points[like], points[other]),)


class Proxies(layers.Layer):
    """Scores a vector by its cosine to a trained vector of each class."""

    def __init__(self, classes, scale=4.0, **arguments):
        super().__init__(**arguments)
        self.classes, self.scale = classes, scale

    def build(self, shape):
        self.proxies = self.add_weight(shape=(self.classes, shape[-1]), initializer="orthogonal", name="proxies")

    def call(self, x):
        cosine = ops.matmul(ops.normalize(x, axis=-1), ops.transpose(ops.normalize(self.proxies, axis=-1)))
        return self.scale * cosine


def proxy_classifier():
    x = keras.Input((WIDTH,), name="x")
    return keras.Model(x, Proxies(3, name="proxies")(tower()(x)), name="proxy_classifier")


class Angular(keras.losses.Loss):
    """Softmax over cosines with a margin at the right class."""

    def __init__(self, margin=0.2, name="angular", **arguments):
        super().__init__(name=name, **arguments)
        self.margin = margin

    def call(self, y_true, y_pred):
        label = ops.one_hot(ops.cast(ops.reshape(y_true, (-1,)), "int32"), y_pred.shape[-1], dtype=y_pred.dtype)
        return keras.losses.categorical_crossentropy(label, y_pred - self.margin * label, from_logits=True)


class TwoTowers(keras.Model):
    """Scores the item that a user chose and two that it did not, for a softmax over the three."""

    def __init__(self):
        super().__init__(name="two_towers")
        self.users = layers.Embedding(10, 4, name="users")
        self.items = layers.Embedding(15, 4, name="items")
        self.user_tower = layers.Dense(4, activation="tanh", name="user_tower")
        self.item_tower = layers.Dense(4, activation="tanh", name="item_tower")

    def call(self, inputs):
        user = self.user_tower(self.users(inputs["user"]))
        items = self.item_tower(self.items(inputs["items"]))
        return ops.einsum("bd,bkd->bk", user, items)


def choices():
    user, items = toy_data.ids(5, 10), toy_data.ids(6, 15, 3)
    return {"user": user, "items": items}, np.argmin((items - user[:, None]) % 5, axis=1).astype(np.int32)


class Distillation(keras.Model):
    """A student learns the labels and what a frozen teacher says."""

    def __init__(self):
        super().__init__(name="distillation")
        self.teacher = tower("teacher", 3)
        self.student = layers.Dense(3, name="student")

    def call(self, x, training=False):
        return {"student": self.student(x), "teacher": ops.stop_gradient(self.teacher(x, training=False))}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        hard = keras.losses.sparse_categorical_crossentropy(y, y_pred["student"], from_logits=True)
        soft = keras.losses.kl_divergence(ops.softmax(y_pred["teacher"] / 2), ops.softmax(y_pred["student"] / 2))
        return ops.mean(0.5 * hard + 2.0 * soft)


class Bootstrapped(keras.Model):
    """Predicts the vector of one view of an example from the other's, without its gradient."""

    def __init__(self):
        super().__init__(name="bootstrapped")
        self.encoder = tower("encoder")
        self.predictor = layers.Dense(4, name="predictor")

    def call(self, inputs):
        one, two = self.encoder(inputs[0]), self.encoder(inputs[1])
        return [self.predictor(one), self.predictor(two), ops.stop_gradient(two), ops.stop_gradient(one)]

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        a, b, c, d = (ops.normalize(each, axis=-1) for each in y_pred)
        return -ops.mean(ops.sum(a * c, axis=-1) + ops.sum(b * d, axis=-1))


def two_views():
    x, _ = groups(7)
    return ([x, x + 0.2 * toy_data.features(8, WIDTH)],)


def pair_accuracy(y_true, y_pred):
    return ops.cast((ops.reshape(y_pred, (-1,)) < 0.5) == ops.cast(ops.reshape(y_true, (-1,)), "bool"), y_pred.dtype)


def embedding():
    """Vectors of length one."""
    tower_ = tower()
    return keras.Sequential([keras.Input((WIDTH,)), tower_, layers.UnitNormalization(name="length")], name="embedding")


def view_pairs():
    """Two vectors of an example, from two views of it, side by side: [n, 2, 4]."""
    shared = tower()
    views = keras.Input((2, WIDTH), name="views")
    vectors = [layers.UnitNormalization()(shared(views[:, view])) for view in range(2)]
    return keras.Model(views, layers.Lambda(lambda two: ops.stack(two, axis=1), output_shape=(2, 4))(vectors))


class NormalizedTemperature(keras.losses.Loss):
    """Finds the second view of an example among those of its batch (Chen et al. 2020, "A simple framework for
    contrastive learning of visual representations"; of one direction)."""

    def call(self, y_true, y_pred):
        scores = ops.matmul(y_pred[:, 0], ops.transpose(y_pred[:, 1])) / 0.5
        return ops.logsumexp(scores, axis=1) - ops.diagonal(scores) + 0.0 * ops.reshape(y_true, (-1,))


class HardestTriplets(keras.losses.Loss):
    """The farthest of an example's class against the nearest of another, within the batch (Hermans et al. 2017, "In
    defense of the triplet loss for person re-identification")."""

    def call(self, y_true, y_pred):
        label = ops.reshape(y_true, (-1,))
        same = ops.cast(ops.equal(label[:, None], label[None]), y_pred.dtype)
        distance = ops.sqrt(ops.sum(ops.square(y_pred[:, None] - y_pred[None]), axis=-1) + 1e-6)
        farthest = ops.max(distance * same, axis=1)
        nearest = ops.min(distance + 10.0 * same, axis=1)
        return ops.relu(farthest - nearest + 0.3)


def weighted_views():
    (one, two), weight = two_views()[0], toy_data.rng(4).uniform(0.5, 2.0, ROWS)
    return np.stack([one, two], axis=1), np.zeros(ROWS), weight


SPARSE = lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True)  # noqa: E731

CASES = [
    Case("siamese_contrastive", siamese, pairs, lambda: contrastive_loss, metrics=lambda: [pair_accuracy]),
    Case("siamese_cosine", cosine_siamese, named_pairs, lambda: "binary_crossentropy", metrics=lambda: ["accuracy"]),
    Case("triplets", Triplets, triplets),
    Case("proxies", proxy_classifier, lambda: groups(9), SPARSE, metrics=lambda: ["accuracy"]),
    Case("proxies_angular_margin", proxy_classifier, lambda: groups(9), Angular, metrics=lambda: ["accuracy"]),
    Case("two_towers", TwoTowers, choices, SPARSE, metrics=lambda: ["accuracy"]),
    Case("distillation", Distillation, lambda: groups(10), rules=(("freeze", "teacher/.*"), ("train", ".*"))),
    Case("bootstrapped_views", Bootstrapped, two_views),
    Case("circle", embedding, lambda: groups(11), keras.losses.Circle),
    Case("contrastive_views", view_pairs, weighted_views, NormalizedTemperature),
    Case("hardest_triplets", embedding, lambda: groups(12), HardestTriplets),
]
