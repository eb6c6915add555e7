"""Data as a run reads it: through functions, in shares, from tf.data, slower than its steps, and very large."""

import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial.config.settings import Settings
from dist_partial.data import ArraySource, Dataset, Stream, dataset, mix, train_batches
from dist_partial.errors import Raised, UserError
from dist_partial.training import loop
from tests.helpers.files import rows
from tests.helpers.strategies import in_process

X = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
Y = (X.sum(axis=1) > 0).astype(np.int32)
RULES = [("train", "head/.*"), ("freeze", ".*")]


def model():
    return keras.Sequential([keras.Input([3]), keras.layers.Dense(4, name="body"), keras.layers.Dense(2, name="head")])


def arrays(count=40):
    return Dataset("numbers", ArraySource(X[:count], Y[:count]), ArraySource(X[:16], Y[:16]), "1")


def noisy(x, y, seed):
    return x + tf.random.stateless_normal([3], seed), y


def mixed():
    return mix([(arrays(), 3), (arrays(7).map(lambda x, y: (-x, y)), 1)]).map(noisy)


def streamed():
    def make():
        return tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(40, seed=1)

    return Dataset("stream", Stream(make), Stream(make), "1").map(noisy)


def losses(folder, data, steps, **settings):
    loop.run(Settings(RULES, model, data, steps=steps, global_batch=12, **settings), folder)
    return [row["loss"] for row in rows(folder / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("data", [lambda: arrays().map(noisy), mixed, streamed])
def test_a_run_goes_on_as_if_it_had_not_stopped_and_replicas_train_on_the_same(data, tmp_path):
    whole = losses(tmp_path / "whole", data, 9, class_weight={1: 3.0})
    losses(tmp_path / "parts", data, 5, class_weight={1: 3.0})
    parts = losses(tmp_path / "parts", data, 9, class_weight={1: 3.0})
    assert [loss for loss in parts if loss in whole] == whole  # beside the evaluation of the first part
    both = losses(tmp_path / "both", data, 9, class_weight={1: 3.0}, replicas=lambda: in_process(2))
    np.testing.assert_allclose(both, whole, rtol=1e-5)


def shuffled():
    """Shuffles without a seed, each epoch by itself; what is held out, too."""

    def make():
        return tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(40, reshuffle_each_iteration=True)

    return dataset(make, lambda: make().batch(7))


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_shuffle_of_tf_data_goes_on_bit_for_bit(replicas, tmp_path, capsys):
    """Evaluations of a part of the examples, whose last batch is short, too; whatever seeds the process had."""

    def trained(folder, steps):
        settings = {"eval_every": 2, "eval_examples": 29, "replicas": lambda: in_process(replicas)}
        return losses(tmp_path / folder, shuffled, steps, **settings)

    tf.random.set_seed(5)
    whole = trained("whole", 9)
    trained("parts", 5)
    parts = trained("parts", 9)
    evaluated = rows(tmp_path / "parts" / "metrics.jsonl")[7]  # at the end of the first part
    assert (evaluated["split"], evaluated["step"]) == ("eval", 5)
    assert parts[:7] + parts[8:] == whole
    assert "other examples each time" not in capsys.readouterr().out


class Slow(ArraySource):
    def fetch(self, indices):
        time.sleep(0.1)
        return super().fetch(indices)


def test_data_that_is_slower_than_the_steps_is_said(tmp_path, capsys):
    losses(tmp_path / "run", lambda: Dataset("slow", Slow(X, Y), ArraySource(X, Y), "1"), 20)
    said = [line for line in capsys.readouterr().out.splitlines() if "data: steps waited" in line]
    assert len(said) == 1 and "s for examples (" in said[0] and "bind run.reader_processes" in said[0]
    losses(tmp_path / "quick", lambda: arrays(), 20)
    assert "data: steps waited" not in capsys.readouterr().out


def failing(x, y):
    tf.debugging.assert_none_equal(tf.reduce_sum(x), float(X[17].sum()), message="no such colour")
    return x, y


def test_a_function_that_fails_in_a_run_names_the_example(tmp_path):
    words = r"^failing of run\.data raised InvalidArgumentError: .*no such colour.*; it is example 17$"
    data = arrays()
    data = Dataset("some", data.train, ArraySource(X[20:], Y[20:]), "1").map(failing)
    with pytest.raises(Raised, match=words) as caught:
        losses(tmp_path / "run", lambda: data, 20)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"), [(mixed, "would keep one draw"), (lambda: arrays().in_order(), "an order of its own: unbind it")]
)
def test_no_activations_are_kept_of_what_changes(data, words, tmp_path):
    with pytest.raises(UserError, match=rf"^run\.activation_cache .*{words}"):
        losses(tmp_path / "run", data, 2, activation_cache="memory")


class Large(ArraySource):
    """Has ten million examples, and counts those that are read."""

    def __len__(self):
        return 10**7

    def fetch(self, indices):
        self.__dict__["read"] = self.__dict__.get("read", 0) + len(indices)
        return super().fetch(indices % 40)


def test_ten_million_examples_start_at_once(tmp_path):
    source = Large(X, Y)
    data = Dataset("large", source, ArraySource(X, Y), "1").map(noisy)
    losses(tmp_path / "run", lambda: data, 2)
    assert source.read < 1000
    began = time.perf_counter()
    batches = train_batches(
        data.train, first_step=10**6, global_batch=128, seed=0, context=tf.distribute.InputContext()
    )
    x, _ = next(iter(batches))
    assert x.shape == (128, 3) and time.perf_counter() - began < 2
