"""What a user brings along: a model, data in memory and losses, bound by gin without decorators."""

import keras
import numpy as np
import tensorflow as tf

from dist_partial.data import ArraySource, Dataset, fingerprint

EXAMPLES = 16


def model(units: int = 4) -> keras.Model:
    layers = [keras.Input((3,)), keras.layers.Dense(units, name="body"), keras.layers.Dense(2, name="head")]
    return keras.Sequential(layers, name="tiny")


class Twins(keras.Model):
    """Two layers of one name, which Keras allows in a subclassed model."""

    def __init__(self) -> None:
        super().__init__(name="twins")
        self.first = keras.layers.Dense(2, name="same")
        self.second = keras.layers.Dense(2, name="same")

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        return self.second(self.first(x))


def data(seed: int = 0, spoilt: int | None = None) -> Dataset:
    """Labelled points; the features of example `spoilt` are NaN."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(EXAMPLES, 3)).astype(np.float32)
    y = (x.sum(axis=1) > 0).astype(np.int32)
    whole = ArraySource(x.copy(), y)
    if spoilt is not None:
        x[spoilt] = np.nan
    return Dataset("points", ArraySource(x, y), whole, fingerprint(x, y))


def never_finite() -> keras.losses.Loss:
    return lambda y, outputs: tf.reduce_sum(outputs, axis=1) * np.nan


def nothing() -> None:
    """A factory that forgets to return what it makes."""
