"""Sources with an order of their own: grain and keras.utils.PyDataset, position by position."""

import pickle
import re
import threading
import time

import keras
import numpy as np
import pytest

from dist_partial.data import MapSource, PyDatasetSource, dataset, fetch, source_of
from dist_partial.errors import Raised, UserError
from tests.helpers.orders import read
from tests.helpers.threads import at_once

COUNT = 29
POSITIONS = np.arange(8 * 12)


@pytest.fixture
def grain():
    return pytest.importorskip("grain")


def test_grain_keeps_its_order_over_epochs(grain):
    """With all its shuffling and its random numbers from epoch to epoch."""
    items = grain.MapDataset.source(np.arange(COUNT)).seed(7).shuffle()
    items = items.random_map(lambda x, rng: (np.float32(x + rng.uniform()), x))
    wanted = [items[int(position)] for position in POSITIONS]
    assert len({y for _, y in wanted[:COUNT]}) == COUNT
    assert [y for _, y in wanted[:COUNT]] != [y for _, y in wanted[COUNT : 2 * COUNT]]
    data = dataset(items, grain.MapDataset.source([(np.float32(i), i) for i in range(5)]))
    found = read(data.train, (0, 7))
    np.testing.assert_array_equal(np.concatenate([x for x, _ in found]), np.array([x for x, _ in wanted]))
    np.testing.assert_array_equal(np.concatenate([y for _, y in found]), [y for _, y in wanted])


def test_rows_of_grain_have_columns(grain):
    rows = grain.MapDataset.source([{"a": i, "b": [0.5, i]} for i in range(9)])
    x, y = fetch(MapSource(rows, ["b"], "a"), np.array([12, 2]))
    assert (x["b"].tolist(), y.tolist()) == ([[0.5, 3], [0.5, 2]], [3, 2])


def test_mistakes_with_grain_are_named(grain):
    items = grain.MapDataset.source(np.arange(COUNT)).seed(7).shuffle()
    for make, words in (
        (
            lambda: dataset(items),
            "run.data is a ShuffleMapDataset, whose order may change from",
        ),
        (lambda: source_of(items.to_iter_dataset()), "which is read in order only: give the MapDataset that"),
        (lambda: source_of(items.repeat()), "repeats without end: leave repeat() out"),
        (
            lambda: fetch(source_of(items.filter(lambda x: x > 3)), np.arange(COUNT)),
            "is left out by a filter",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(words)) as caught:
            make()
        assert "\n" not in str(caught.value)


class Batches(keras.utils.PyDataset):
    """Examples that carry their own index, in batches of 4; `change` makes another batch of one."""

    def __init__(self, count=COUNT, change=lambda index, batch: batch, **options):
        super().__init__(**options)
        self.count, self.change, self.made = count, change, []

    def __len__(self):
        return -(-self.count // 4)

    def __getitem__(self, index):
        self.made.append(index)
        i = np.arange(4 * index, min(4 * index + 4, self.count))
        return self.change(index, ({"a": np.stack([i, 2 * i], 1)}, i.astype(np.float32)))


@pytest.mark.parametrize("count", [COUNT, 28, 3])
def test_batches_are_taken_apart(count):
    data = dataset(Batches(count), Batches(5))
    assert (len(data.train), len(data.evaluation)) == (count, 5)
    found = read(data.train, (0, 7))
    wanted = POSITIONS % count
    np.testing.assert_array_equal(np.concatenate([y for _, y in found]), wanted)
    np.testing.assert_array_equal(np.concatenate([x for x, _ in found]), np.stack([wanted, 2 * wanted], 1))


def test_the_last_are_held_out():
    data = dataset(Batches(), held_out=0.25)
    np.testing.assert_array_equal(data.evaluation.fetch(np.arange(7))[1], np.arange(22, 29))
    found = read(data.train, (0, 7))
    np.testing.assert_array_equal(np.concatenate([y for _, y in found]), POSITIONS % 22)


def test_a_batch_is_made_once_for_the_examples_in_order():
    batches = Batches(4 * 100)
    source = PyDatasetSource(batches)
    batches.made.clear()
    for first in range(0, 400, 6):
        source.fetch(np.arange(first, min(first + 6, 400)))
    assert sorted(batches.made) == list(range(100))


@pytest.mark.parametrize("workers", [1, 3])
def test_several_readers_make_each_batch_once_and_no_more_at_a_time_than_workers(workers):
    running, most, lock = [], [], threading.Lock()

    def slow(index, batch):
        with lock:
            running.append(index)
            most.append(len(running))
        time.sleep(0.02)
        with lock:
            running.remove(index)
        return batch

    batches = Batches(4 * 8, slow, workers=workers)
    source = PyDatasetSource(batches)
    at_once([lambda: np.testing.assert_array_equal(source.fetch(np.arange(24))[1], np.arange(24))] * 6)
    assert len(batches.made) == len({*batches.made}) + 1 and max(most) <= workers  # of the first, the form was read


def test_a_batch_that_failed_is_tried_again():
    failures = [OSError("not mounted yet")]

    def flaky(index, batch):
        if index == 3 and failures:
            raise failures.pop()
        return batch

    source = PyDatasetSource(Batches(COUNT, flaky))
    with pytest.raises(Raised, match=r"Batches\[3\] raised OSError: not mounted yet \(.*test_own_orders.py, line"):
        source.fetch(np.array([12]))
    assert source.fetch(np.array([12]))[1].tolist() == [12]


def test_another_process_gets_the_batches():
    source = pickle.loads(pickle.dumps(PyDatasetSource(Batches(COUNT, _same))))
    assert source.fetch(np.array([12]))[1].tolist() == [12]


def _same(index, batch):
    return batch


def at(where, batch):
    return lambda index, usual: batch(usual) if index == where else usual


def short(batch):
    return {"a": batch[0]["a"][:3]}, batch[1][:3]


class Endless(Batches):
    num_batches = None


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        (Batches(COUNT, at(3, short)), "Batches[3] has 3 examples, and the first batch has 4: give all one size"),
        (Batches(COUNT, at(3, lambda b: (b[0], b[1].astype(int)))), "Batches[3]: y is int64 [], and was float32 [] in"),
        (Batches(COUNT, at(3, lambda b: (b[0], b[1][:2]))), "Batches[3] has shapes (4, 2), (2,): axis 0 counts"),
        (Batches(COUNT, at(0, lambda b: (b[0], 5))), "Batches[0] has shapes (4, 2), (): axis 0 counts"),
        (Batches(COUNT, at(3, lambda b: b * 2)), "Batches[3] is a tuple of 4: give (x,), (x, y) or (x, y, weight)"),
        (Batches(COUNT, at(7, lambda b: ({"a": np.zeros([9, 2])}, np.zeros(9)))), "Batches[7]: x['a'] is float64 [2]"),
        (Batches(0), "Batches is empty"),
        (Endless(), "Endless has no end, for its num_batches is None"),
    ],
)
def test_batches_unlike_the_others_are_named(batches, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        fetch(source_of(batches), np.arange(COUNT))
    assert "\n" not in str(caught.value)


def test_what_is_not_called_is_said(capsys):
    class Shuffled(Batches):
        def on_epoch_end(self):
            raise AssertionError("called")

    source_of(Shuffled())
    said = "run.data: Shuffled.on_epoch_end is not called: each epoch has the same batches, in the same order\n"
    assert capsys.readouterr().out == said
    source_of(Batches())
    assert capsys.readouterr().out == ""


def test_batches_as_keras_takes_them():
    """Lists for tuples, x alone, tensors."""
    for change, parts in (
        (lambda index, batch: list(batch), 2),
        (lambda index, batch: batch[0], 1),
        (lambda index, batch: keras.ops.convert_to_tensor(batch[1]), 1),
    ):
        assert len(fetch(source_of(Batches(COUNT, change)), np.array([28, 1]))) == parts
