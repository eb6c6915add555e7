"""What a user brings along: a model, data in memory and losses, bound by gin without decorators."""

import keras
import numpy as np
import tensorflow as tf

from dist_partial.data import ArraySource, Dataset, fingerprint

EXAMPLES = 16


def model(units: int = 4, outputs: int = 2) -> keras.Model:
    layers = [keras.Input((3,)), keras.layers.Dense(units, name="body"), keras.layers.Dense(outputs, name="head")]
    return keras.Sequential(layers, name="tiny")


class Twins(keras.Model):
    """Two layers of one name, which Keras allows in a subclassed model."""

    def __init__(self) -> None:
        super().__init__(name="twins")
        self.first = keras.layers.Dense(2, name="same")
        self.second = keras.layers.Dense(2, name="same")

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        return self.second(self.first(x))


def data(seed: int = 0, spoilt: int | None = None, classes: int = 2, lowest: int = 0, labels: str = "int32") -> Dataset:
    """Labelled points; the features of example `spoilt` are NaN; `labels` is a dtype, or 'fraction'."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(EXAMPLES, 3)).astype(np.float32)
    y = (x.sum(axis=1) > 0).astype(np.int32)
    if (lowest, classes) != (0, 2):
        y = np.maximum(y, lowest)
        y[:2] = lowest, classes - 1
    y = y / np.float32(2) if labels == "fraction" else y.astype(labels)
    whole = ArraySource(x.copy(), y)
    if spoilt is not None:
        x[spoilt] = np.nan
    return Dataset("points", ArraySource(x, y), whole, fingerprint(x, y))


class OnDisk:
    """A source that is read by index alone; every label is `label`, but 0 where a look falls if it is to be rare."""

    spec = (tf.TensorSpec([3], tf.float32), tf.TensorSpec([], tf.int32))

    def __init__(self, label: int, rare: bool) -> None:
        self.label, self.rare = label, rare

    def __len__(self) -> int:
        return 64 * 63 + 1  # of which every 64th is looked at

    def fetch(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        marked = indices % 64 != 0 if self.rare else indices >= 0
        return np.ones([len(indices), 3], np.float32), np.where(marked, self.label, 0).astype(np.int32)


def on_disk(label: int = 1, rare: bool = False) -> Dataset:
    return Dataset("on_disk", OnDisk(label, rare), OnDisk(label, rare), fingerprint(label))


class TwoInputs(keras.Model):
    def call(self, x: tf.Tensor, mode: str) -> tf.Tensor:
        return x


def two_inputs() -> keras.Model:
    return TwoInputs()


def needy(units: int) -> keras.Model:
    return model(units)


def own_loss() -> keras.losses.Loss:
    """Of any integer targets."""
    return lambda y, outputs: tf.reduce_sum(outputs, axis=1) * tf.cast(y, tf.float32)


class FromOne(keras.losses.SparseCategoricalCrossentropy):
    """Of classes that are numbered from 1."""

    def __init__(self) -> None:
        super().__init__(from_logits=True)

    def call(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        return super().call(y - 1, outputs)


class Whole(keras.losses.Loss):
    """Calculates with targets that are int32, which Keras gives to it as floats."""

    def call(self, y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        return tf.square(y / 2 - outputs[:, 0])


class OwnStep(keras.Sequential):
    """Trains itself."""

    def train_step(self, data: tuple) -> dict:
        return super().train_step(data)


def own_step() -> keras.Model:
    return OwnStep([keras.Input((3,)), keras.layers.Dense(2, name="head")])


class Largest(keras.metrics.Metric):
    """Keeps a maximum, which no sum over replicas gives."""

    def __init__(self) -> None:
        super().__init__(name="largest")
        self.value = self.add_weight(name="value", initializer="zeros")

    def update_state(self, y: tf.Tensor, outputs: tf.Tensor, sample_weight: tf.Tensor | None = None) -> None:
        self.value.assign(tf.maximum(self.value, tf.reduce_max(tf.abs(outputs))))

    def result(self) -> tf.Tensor:
        return self.value


def contrastive() -> keras.losses.Loss:
    """Compares each example with the others of its batch."""
    return lambda y, outputs: tf.reduce_logsumexp(outputs @ tf.transpose(outputs), axis=1)


def boxes() -> Dataset:
    """Targets of several numbers."""
    x, y = np.ones((EXAMPLES, 3), np.float32), np.zeros((EXAMPLES, 2, 2), np.int32)
    return Dataset("boxes", ArraySource(x, y), ArraySource(x, y), fingerprint(x, y))


def positive() -> keras.losses.Loss:
    """Checks the values of its targets."""

    def loss(y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        with tf.control_dependencies([tf.debugging.assert_non_negative(y)]):
            return tf.reduce_sum(outputs, axis=1)

    return loss


def pairs() -> keras.losses.Loss:
    """Takes a batch that divides into two."""
    return lambda y, outputs: tf.concat([tf.reduce_sum(part, axis=1) for part in tf.split(outputs, 2)], axis=0)


def never_finite() -> keras.losses.Loss:
    return lambda y, outputs: tf.reduce_sum(outputs, axis=1) * np.nan


def nothing() -> None:
    """A factory that forgets to return what it makes."""


def spoilt_rules(kind: str = "") -> list[tuple[str, str]]:
    return [("train", {}[kind])]
