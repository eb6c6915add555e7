"""The door for data: each thing that people have becomes a source, and a part of it is held out."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial.config.settings import Settings
from dist_partial.data import (
    ArraySource,
    Part,
    adapt,
    dataset,
    fetch,
    hold_out,
    looks,
    some_targets,
    source_of,
    train_batches,
)
from dist_partial.distributed.replicas import create
from dist_partial.errors import Raised, UserError
from dist_partial.training.build import build
from tests.helpers.orders import read

X = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
Y = np.arange(50, dtype=np.int32)


def everything(source):
    return tf.nest.flatten(source.fetch(np.arange(len(source))))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (X, [X]),
        ((X,), [X]),
        ((X, Y), [X, Y]),
        ((X, Y, X[:, 0]), [X, Y, X[:, 0]]),
        ((X, None), [X]),
        ({"a": X, "b": Y}, [X, Y]),
        (((X, {"b": Y}), [Y, Y]), [X, Y, Y, Y]),
        ((tf.constant(X), Y.tolist()), [X, Y.astype(np.int64)]),
        ((X.tolist(), Y), [X, Y]),
        (([f"{i}" for i in range(50)], Y), [[f"{i}" for i in range(50)], Y]),
        (list(zip(X, Y, strict=True)), [X, Y]),
        ([(x, int(y)) for x, y in zip(X, Y, strict=True)], [X, Y.astype(np.int64)]),
        (lambda: (X, Y), [X, Y]),
        (ArraySource(X, Y), [X, Y]),
    ],
)
def test_each_form_gives_its_arrays(given, wanted):
    data = dataset(given, given)
    for source in (data.train, data.evaluation):
        for found, array in zip(everything(source), wanted, strict=True):
            np.testing.assert_array_equal(found, array)
            assert found.dtype == getattr(array, "dtype", object)
        fetch(source, np.arange(3))  # which compares it with the spec


def test_keras_own_data_sets_fit_as_they_are_loaded():
    data = dataset(*((X[:40], Y[:40]), (X[40:], Y[40:])))
    assert (len(data.train), len(data.evaluation)) == (40, 10)


def test_frames_of_pandas_are_columns():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": X[:, 0], "city": ["Rome", "Oslo"] * 25, "y": Y}, index=Y[::-1])
    source = source_of((dict(frame[["a", "city"]]), frame["y"]))
    x, y = source.fetch(np.array([3, 0]))
    assert (x["a"].tolist(), x["city"].tolist(), y.tolist()) == (X[[3, 0], 0].tolist(), ["Oslo", "Rome"], [3, 0])
    np.testing.assert_array_equal(source_of((frame[["a", "y"]], frame["y"])).x[:, 1], Y)  # as `Model.fit` takes them
    with pytest.raises(UserError, match=r"data is a DataFrame: give x and y of it, such as \(dict\("):
        source_of(frame)


@pytest.mark.parametrize(
    ("count", "share", "held"), [(50, 0.1, 5), (50, 0.5, 25), (2, 0.1, 1), (3, 0.99, 2), (10**7, 0.01, 10**5)]
)
def test_parts_share_all_examples_and_none_twice(count, share, held):
    class Numbers:
        spec = (tf.TensorSpec([], tf.int64),)

        def __len__(self):
            return count

        def fetch(self, indices):
            return (indices,)

    train, evaluation = hold_out(Numbers(), share)
    assert (len(train), len(evaluation)) == (count - held, held)
    if count < 100:
        found = np.concatenate([everything(train)[0], everything(evaluation)[0]])
        np.testing.assert_array_equal(np.sort(found), np.arange(count))
    else:
        sample = evaluation.fetch(np.arange(held))[0]
        assert abs(sample.mean() / count - 0.5) < 0.01 and len(set(sample.tolist())) == held


def test_what_is_held_out_is_the_same_in_each_run_and_from_all_over():
    first, again = (dataset((X, Y)).evaluation.fetch(np.arange(5))[1] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.tolist() == [25, 14, 24, 31, 10]  # another version must not train on what was held out
    classes = np.repeat(np.arange(4), 25)  # sorted, as from a folder for each class
    assert len(set(dataset((np.zeros(100), classes), held_out=0.2).evaluation.fetch(np.arange(20))[1])) == 4


def test_all_labels_are_checked_through_a_part():
    labels = np.arange(1000)
    assert sorted(some_targets(dataset((labels, labels)).train).tolist()) == labels.tolist()


def test_fingerprints_tell_contents_apart():
    other = X.copy()
    other[17, 1] += 1
    rows = list(zip(X, Y, strict=True))
    same = [dataset((X, Y)), dataset((X.copy(), Y.copy()))]
    unlike = [
        dataset((other, Y)),
        dataset((X, Y), held_out=0.2),
        dataset((X, Y), (X, Y)),
        dataset(rows),
        dataset(rows[1:]),
    ]
    assert same[0].fingerprint == same[1].fingerprint
    assert len({data.fingerprint for data in (same[0], *unlike)}) == 6
    assert dataset(rows).fingerprint == dataset(list(rows)).fingerprint


def test_of_large_arrays_some_examples_count(monkeypatch):
    monkeypatch.setattr(adapt, "ALL_OF", X.nbytes)
    large = np.zeros([100, 3], np.float32)
    looked_at, other = large.copy(), large.copy()
    looked_at[99] += 1
    other[next(i for i in range(100) if i not in looks(ArraySource(large)))] += 1
    assert dataset(large).fingerprint == dataset(other).fingerprint != dataset(looked_at).fingerprint


def test_examples_that_are_random_count_by_their_types():
    class Noisy(list):
        def __getitem__(self, index):
            return np.random.default_rng().normal(size=3), index

    first, again, longer = (dataset(Noisy(range(count))).fingerprint for count in (50, 50, 51))
    assert first == again != longer


def test_names_and_codecs_are_kept():
    codec = object()
    data = dataset((X, Y), name="mine", codec=codec)
    assert (data.name, data.codec) == ("mine", codec)
    assert dataset(data) is data and dataset(lambda: data) is data


class Loader:
    dataset, batch_size = [1, 2], 2

    def __iter__(self):
        return iter([])

    def __len__(self):
        return 1


class Frames(dict):
    """A dict of splits, as Hugging Face's DatasetDict is."""


class Rows:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"a": index}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (5, "a int: give arrays (x, y) or (x, y, weight), an object with __len__"),
        ("data/train.csv", "'data/train.csv': for files, take csv_dataset, parquet_dataset"),
        ((each for each in "ab"), "a generator, which is read from its beginning only: give an object with"),
        ([X, Y], "a list of 2 arrays: give a tuple (x, y)"),
        ((X, Y, Y, Y), "a tuple of 4: write (x,), (x, y) or (x, y, weight)"),
        (Loader(), "a Loader, which makes batches: give its .dataset"),
        (Frames(train=Rows(), test=Rows()), "a Frames that holds a Rows: give the parts, as in dataset(train, eval"),
        ((Rows(), Rows()), "a tuple that holds a Rows: give the parts"),
        ({"train": tf.data.Dataset.range(3)}, "a dict that holds a _RangeDataset: give the parts"),
        (([[1], [2, 3]], Y), "run.data: x is a list of several lengths: pad"),
        (({"a": [None, 1]}, Y), "x['a'] has no value (None)"),
        ((np.array(["2020-01-01"], "datetime64[D]"), Y[:1]), "has the type datetime64[D]: make a number or a text"),
        ((X, Y[:-1]), "axis 0 counts the examples"),
        (Rows(), "Rows[0] is a dict of 'a': say which of them are x and y, as in MapSource(data, x="),
        ([], "list is empty"),
        (ArraySource(X[:1]), "one example alone cannot be divided"),
        (ArraySource(X[:0]), "run.data has no examples: give some"),
    ],
)
def test_mistakes_are_named_in_one_line(given, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        dataset(given)
    assert "\n" not in str(caught.value)


def test_mistakes_between_arguments():
    with pytest.raises(UserError, match=r"the evaluation of run.data: x is float64.* both must have the same x and y"):
        dataset((X, Y), (X.astype(np.float64), Y))
    with pytest.raises(UserError, match=r"^the evaluation of run\.data has no examples: give some"):
        dataset((X, Y), (X[:0], Y[:0]))
    with pytest.raises(UserError, match=r"^run\.data has no examples: give some"):
        dataset((X[:0], Y[:0]), (X, Y))
    with pytest.raises(UserError, match="leave evaluation out"):
        dataset(dataset((X, Y)), (X, Y))
    with pytest.raises(UserError, match=r"dataset.held_out is 1.5: it must be a number above 0 and below 1"):
        dataset((X, Y), held_out=1.5)
    with pytest.raises(Raised, match=r"^broken of run\.data raised ZeroDivisionError: .*test_adapt.py, line \d+\)"):

        def broken():
            return 1 / 0

        dataset(broken)


def test_parts_say_where_an_example_is():
    rows = [(x, y) for x, y in zip(X, Y, strict=True)]
    part = Part(source_of(rows), 0, 40)
    index = int(part.fetch(np.array([7]))[1][0])
    assert part.place(7) == f"list[{index}]"
    assert Part(ArraySource(X), 0, 50).place(7).startswith("example ")


def test_what_a_factory_of_a_run_returns_passes_the_door():
    """run.data may return arrays; the run names the data after the factory."""

    def points():
        return X, Y % 2

    def model():
        return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="head")])

    trainer = build(Settings([("train", ".*")], model, points), create("default"))
    assert (trainer.data.name, len(trainer.data.evaluation)) == ("points", 5)
    with pytest.raises(UserError, match=r"run.data is a NoneType: give arrays"):
        build(Settings([("train", ".*")], model, lambda: None), create("default"))


@pytest.mark.parametrize("seed", [3, None])
def test_a_tf_data_set_keeps_its_order(seed):
    """And its own shuffle, where a function makes it, which is called three times; what is held out is given."""
    called = []

    def shuffled():
        called.append(1)
        return tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(50, seed=seed)

    held_out = tf.data.Dataset.from_tensor_slices((X, Y)).take(5)
    data = dataset(shuffled, held_out)
    next(iter(train_batches(data.train, first_step=0, global_batch=2, seed=3, context=tf.distribute.InputContext())))
    assert len(called) == 3
    tf.random.set_seed(7)  # as another run may have left it
    assert dataset(shuffled, held_out).fingerprint == data.fingerprint
    found = np.concatenate([y for _, y in read(data.train, (0, 7))])
    tf.random.set_seed(3)  # the seed of the run
    wanted = [y for _, y in shuffled().repeat().take(len(found)).as_numpy_iterator()]
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(UserError, match=r"tf\.data\.Dataset, whose order may change .* evaluation="):
        dataset(shuffled())


@pytest.mark.parametrize("index", [-1, 90, 500])
def test_an_index_beyond_a_part_is_refused(index):
    data = dataset((np.arange(100), np.arange(100)), held_out=0.1)
    with pytest.raises(UserError, match=rf"^there is no example {index} here: the 90 count from 0"):
        fetch(data.train, np.array([0, index]))
