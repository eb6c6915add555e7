"""Functions that give something else each time: which are noticed, and that nothing else is."""

import random
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial.data import ArraySource, Dataset
from dist_partial.data.repeats import notes_on_repeats
from dist_partial.errors import UserError

X = np.random.default_rng(0).normal(size=(29, 3)).astype(np.float32)
OWN = np.random.default_rng(1)
OWN_TENSORFLOW = tf.random.Generator.from_seed(1)


def data():
    source = ArraySource(X, np.arange(29))
    return Dataset("numbers", source, source, "1")


def seeds_itself(x, y):
    np.random.seed(int(y))
    random.seed(int(y))
    return x + np.float32(np.random.normal() + random.random()), y


def from_python(x, y):
    return tf.ensure_shape(tf.numpy_function(lambda x: x + np.float32(random.random()), [x], tf.float32), [3]), y


def wasteful(x, y):
    np.random.normal()
    return x, y


VARYING = {
    "np.random": lambda x, y: (x + np.float32(np.random.normal()), y),
    "random": lambda x, y: (x + np.float32(random.random()), y),
    "a coin": lambda x, y: (x if random.random() < 0.5 else -x, y),
    "rarely": lambda x, y: (x if np.random.uniform() < 0.95 else -x, y),
    "a generator of its own": lambda x, y: (x + np.float32(OWN.normal()), y),
    "text": lambda x, y: (str(random.random()), y),
}
STEADY = {
    "rng": lambda x, y, rng: (x + np.float32(rng.normal()), y),
    "seeds itself": seeds_itself,
    "not a number": lambda x, y: (x * np.float32("nan"), y),
    "text": lambda x, y: ({"a": str(y)}, y),
    "wasteful": wasteful,
}


@pytest.mark.parametrize("name", VARYING)
def test_a_function_of_numpy_that_varies_is_noticed(name):
    [line] = notes_on_repeats(data().map(VARYING[name], numpy=True))
    assert line.startswith("<lambda> of run.data gives something else each time") and "parameter rng" in line


@pytest.mark.parametrize("name", STEADY)
def test_a_function_that_gives_the_same_is_not(name):
    assert notes_on_repeats(data().map(STEADY[name], numpy=True)) == []


def test_what_follows_on_one_that_varies_is_not_blamed_and_held_out_examples_count():
    made = data().map(VARYING["random"], evaluation=wasteful, numpy=True).map(wasteful, numpy=True)
    assert [line.split()[0] for line in notes_on_repeats(made)] == ["<lambda>"]
    made = data().map(wasteful, evaluation=VARYING["random"], numpy=True)
    assert [line.split()[0] for line in notes_on_repeats(made)] == ["<lambda>"]


def test_python_that_tensorflow_calls_is_tried():
    [line] = notes_on_repeats(data().map(from_python))
    assert line.startswith("from_python of run.data") and line.endswith("from a parameter seed")


def test_the_global_generators_go_on_as_if_nothing_had_been_tried():
    made = data().map(VARYING["np.random"], numpy=True)
    drawn = []
    for tried in (False, True):
        random.seed(5)
        np.random.seed(5)
        if tried:
            assert notes_on_repeats(made)
        drawn.append((random.random(), np.random.normal()))
    assert drawn[0] == drawn[1]


def test_a_slow_function_does_not_delay_the_start():
    def slow(x, y):
        calls.append(time.sleep(0.6))
        return x, y

    calls = []
    made = data().map(slow, numpy=True)
    calls.clear()
    assert notes_on_repeats(made) == [] and len(calls) <= 4


STATEFUL = {
    "uniform": lambda: tf.random.uniform([3]),
    "integers": lambda: tf.cast(tf.random.uniform([3], maxval=9, dtype=tf.int32), tf.float32),
    "normal": lambda: tf.random.normal([3]),
    "truncated": lambda: tf.random.truncated_normal([3]),
    "shuffle": lambda: tf.random.shuffle([1.0, 2.0, 3.0]),
    "categorical": lambda: tf.cast(tf.random.categorical([[0.0, 0.0]], 3)[0], tf.float32),
    "gamma": lambda: tf.random.gamma([3], 1.0),
    "poisson": lambda: tf.random.poisson([3], 1.0),
    "generator": lambda: OWN_TENSORFLOW.normal([3]),
    "dropout": lambda: tf.nn.dropout(tf.ones([3]), 0.5),
    "crop": lambda: tf.image.random_crop(tf.range(5.0), [3]),
    "candidates": lambda: tf.cast(tf.random.uniform_candidate_sampler([[1]], 1, 3, True, 9)[0], tf.float32),
    "clock": lambda: tf.fill([3], tf.cast(tf.timestamp(), tf.float32)),
    "in a loop": lambda: tf.map_fn(lambda one: one + tf.random.uniform([]), tf.zeros([3])),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_an_operation_of_tensorflow_that_varies_is_refused(name):
    def function(x, y):
        return x + STATEFUL[name](), y

    with pytest.raises(UserError, match=r"function of run\.data draws random numbers or changes a variable \(\w+\)"):
        data().map(function)


STATELESS = {
    "uniform": lambda seed: tf.random.stateless_uniform([3], seed),
    "truncated": lambda seed: tf.random.stateless_truncated_normal([3], seed),
    "shuffle": lambda seed: tf.random.experimental.stateless_shuffle(tf.range(3.0), seed),
    "index": lambda seed: tf.cast(tf.raw_ops.RandomIndexShuffle(index=1, seed=[1, 2, 3], max_index=9), tf.float32),
    "keras": lambda seed: keras.random.normal([3], seed=3),
}


@pytest.mark.parametrize("name", STATELESS)
def test_an_operation_that_has_a_seed_is_not(name):
    made = data().map(lambda x, y, seed: (x + STATELESS[name](seed), y), evaluation=lambda x, y: (x, y))
    assert notes_on_repeats(made) == []
