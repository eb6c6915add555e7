"""A few examples, and a model of named layers for them, as tests of the Python door train."""

import keras
import numpy as np

X = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
Y = X.sum(1, keepdims=True)
HEAD = [("train", "head/.*"), ("freeze", ".*")]


def person() -> keras.Model:
    hidden = keras.layers.Dense(4, activation="tanh", name="hidden")
    return keras.Sequential([keras.Input([3]), hidden, keras.layers.Dense(1, name="head")], name="person")
