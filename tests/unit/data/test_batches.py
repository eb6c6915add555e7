"""The order of examples: over steps, epochs, replicas and workers."""

import contextlib
import re

import numpy as np
import pytest
import tensorflow as tf

from dist_partial.data import ArraySource, ClassWeighted, check_source, evaluation_batches, fetch, train_batches
from dist_partial.data.readers import Readers
from dist_partial.errors import UserError


def numbered(count, weight=None):
    """Examples that carry their own index: x = [i, 2i], y = i."""
    index = np.arange(count, dtype=np.int32)
    return ArraySource(np.stack([index, 2 * index], 1), index, weight)


def contexts(workers, replicas):
    """The input contexts of all workers, `replicas` in all."""
    return [tf.distribute.InputContext(workers, worker, replicas) for worker in range(workers)]


def elements(batches, count):
    """The first `count` elements, as tuples of arrays; no thread reads after them, also where one fails."""
    with contextlib.closing(Readers()) as readers:
        return [tf.nest.map_structure(np.asarray, one) for one in readers.start(batches.take(count))]


def steps(make, workers, replicas, count):
    """y of `count` global batches, [count, global_batch], from all workers in the order of replicas."""
    read = [elements(make(context), count) for context in contexts(workers, replicas)]
    return np.concatenate([worker[step][1] for step in range(count) for worker in read]).reshape(count, -1)


def train(source, global_batch, first_step=0, seed=3):
    return lambda context: train_batches(
        source, first_step=first_step, global_batch=global_batch, seed=seed, context=context
    )


def evaluate(source, global_batch, examples):
    return lambda context: evaluation_batches(source, examples=examples, global_batch=global_batch, context=context)


def evaluated(make, global_batch, examples, workers, replicas):
    """y of a pass, as replicas take it: each has room for its share of a batch, rounded up."""
    read = [list(make(context).as_numpy_iterator()) for context in contexts(workers, replicas)]
    found = []
    for batch, parts in enumerate(zip(*read, strict=True)):
        count = min(global_batch, examples - batch * global_batch)
        room = -(-count // replicas) * (replicas // workers)
        assert all(len(part[1]) == global_batch // workers for part in parts)
        found += np.concatenate([part[1][:room] for part in parts])[:count].tolist()
        # What is read beyond costs no reading: the last example of a worker again.
        assert all(set(part[1][room:]) <= {part[1][room - 1]} for part in parts)
    return found


@pytest.mark.parametrize("count", [1, 2, 5, 37, 64])
def test_every_epoch_visits_every_example_once(count):
    order = steps(train(numbered(count), 12), 1, 1, 3 * count).reshape(-1)  # 36 epochs of `count`
    for epoch in order.reshape(-1, count):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(count))


def test_x_and_y_stay_together():
    for x, y in elements(train(numbered(37), 8)(contexts(1, 1)[0]), 10):
        np.testing.assert_array_equal(x, np.stack([y, 2 * y], 1))


def test_epochs_and_seeds_have_orders_of_their_own():
    epochs = steps(train(numbered(50), 50), 1, 1, 20)
    assert len({tuple(epoch) for epoch in epochs}) == 20
    assert not np.array_equal(epochs, steps(train(numbered(50), 50, seed=4), 1, 1, 20))


@pytest.mark.slow
def test_order_is_uniform():
    """Over many epochs every example comes first equally often, and neighbours are not correlated."""
    count = 8
    epochs = steps(train(numbered(count), count * 400), 1, 1, 10).reshape(-1, count)
    expected = len(epochs) / count
    for position in (0, 1, count - 1):
        seen = np.bincount(epochs[:, position], minlength=count)
        assert np.sum((seen - expected) ** 2 / expected) < 40  # chi-squared, 7 degrees of freedom: p ~ 1e-6
    order = steps(train(numbered(20_000), 20_000), 1, 1, 1)[0].astype(float)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 5 / np.sqrt(20_000)


@pytest.mark.parametrize(("workers", "replicas"), [(1, 2), (1, 3), (1, 4), (2, 2), (2, 4)])
def test_replicas_and_workers_share_one_order(workers, replicas):
    make = train(numbered(29), 12)
    np.testing.assert_array_equal(steps(make, workers, replicas, 8), steps(make, 1, 1, 8))


@pytest.mark.parametrize("step", [2, 1000])  # 29 / 12: every third step straddles two epochs
def test_resuming_equals_never_stopping(step):
    whole = elements(train(numbered(29), 12)(contexts(2, 2)[0]), step + 4)
    resumed = elements(train(numbered(29), 12, first_step=step)(contexts(2, 2)[0]), 4)
    for (x, y), (x_whole, y_whole) in zip(resumed, whole[step:], strict=True):
        np.testing.assert_array_equal(x, x_whole)
        np.testing.assert_array_equal(y, y_whole)


def test_resuming_with_other_workers_continues_the_order():
    whole = steps(train(numbered(29), 12), 2, 2, 9)
    np.testing.assert_array_equal(steps(train(numbered(29), 12, first_step=5), 1, 3, 4), whole[5:])


@pytest.mark.parametrize(
    ("examples", "workers", "replicas"), [(24, 1, 1), (25, 1, 4), (19, 2, 2), (1, 2, 4), (33, 3, 6)]
)
def test_an_evaluation_reads_each_once(examples, workers, replicas):
    make = evaluate(numbered(40), 12, examples)
    assert evaluated(make, 12, examples, workers, replicas) == list(range(examples))


def test_evaluation_is_in_order():
    np.testing.assert_array_equal(steps(evaluate(numbered(40), 12, 36), 2, 4, 3).reshape(-1), np.arange(36))


@pytest.mark.parametrize("shape", [(10,), (10, 3)])
def test_weights_of_the_source_are_kept(shape):
    weight = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
    source = ArraySource(np.zeros((10, 3), np.int32), np.zeros((10, 3), np.int32), weight)
    context = contexts(1, 1)[0]
    found = elements(evaluate(source, 4, 10)(context), 3)
    weights = np.concatenate([weight for _, _, weight in found])
    np.testing.assert_array_equal(weights, weight[[*range(10), 9, 9]])
    assert len(elements(train(source, 4)(context), 1)[0]) == 3


def test_training_has_no_end_an_evaluation_has_and_shapes_are_static():
    context = contexts(4, 4)[0]
    for batches, count in (
        (train(numbered(29), 12)(context), tf.data.INFINITE_CARDINALITY),
        (evaluate(numbered(29), 12, 13)(context), 2),
    ):
        assert batches.cardinality() == count
        assert [tuple(spec.shape) for spec in batches.element_spec[:2]] == [(3, 2), (3,)]
        assert all(spec.shape.is_fully_defined() for spec in batches.element_spec)


class Liar(ArraySource):
    """Says float32 and gives float64."""

    def fetch(self, indices):
        x, y = super().fetch(indices)
        return x.astype(np.float64), y


class Bare(ArraySource):
    """Has a spec that is no tuple."""

    def __init__(self):
        super().__init__(np.zeros(3))

    spec = tf.TensorSpec([], tf.float64)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: train(numbered(9), 10)(contexts(1, 4)[0]), "run.global_batch=10 .* 4 replicas: .* 8 or 12"),
        (lambda: train(numbered(9), 0)(contexts(1, 4)[0]), "run.global_batch=0 .* 4 or 8"),
        (lambda: train(numbered(0), 4)(contexts(1, 1)[0]), "empty"),
        (
            lambda: train(Liar(np.zeros((3, 2), np.float32), np.zeros(3)), 4)(contexts(1, 1)[0]),
            r"gives \[float64 \(1, 2\), .* says \[float32 \(1, 2\),",
        ),
        (lambda: evaluate(numbered(9), 4, 10)(contexts(1, 1)[0]), "10 examples: ask for 1 to 9"),
        (lambda: evaluate(numbered(9), 4, 0)(contexts(1, 1)[0]), "0 examples: ask for 1 to 9"),
        (lambda: ArraySource(np.zeros(3), np.zeros(4)), "axis 0"),
        (lambda: ArraySource(np.zeros(3), np.zeros((3, 5)), np.zeros((3, 4))), "weight"),
        (lambda: ArraySource({"a": np.zeros(3), "b": np.zeros(4)}), "axis 0"),
        (lambda: ArraySource({"a": [1, 2, 3]}, np.zeros(3)), "got a int in x"),
        (lambda: ArraySource(np.zeros(3), weight=np.zeros(3)), "a weight and no y"),
        (lambda: ClassWeighted(ArraySource(np.zeros(3)), {0: 2.0}), "run.class_weight .* None"),
        (lambda: ClassWeighted(ArraySource(np.zeros(3), {"a": np.zeros(3)}), {0: 2.0}), "run.class_weight"),
        (lambda: ClassWeighted(ArraySource(np.zeros(3), np.zeros((3, 2, 2))), {0: 2.0}), r"of \[2, 2\]"),
        (lambda: check_source("train", Bare()), r"a spec of .*: write a tuple \(x, y\)"),
    ],
)
def test_mistakes_are_named_in_one_line(make, words):
    with pytest.raises(UserError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("gives", "words"),
    [
        (lambda x, y: None, "NoneType"),
        (lambda x, y: x, "float32 (2, 3)"),
        (lambda x, y: {"x": x, "y": y}, "{'x': float32 (2, 3), 'y': int64 (2,)}"),
        (lambda x, y: (each for each in (x, y)), "generator"),
        (lambda x, y: (x.tolist(), y), "[list, int64 (2,)]"),
        (lambda x, y: ({"a": x}, y), "[{'a': float32 (2, 3)}, int64 (2,)]"),
        (lambda x, y: (x, y.astype("datetime64[s]")), "[float32 (2, 3), ndarray]"),
    ],
)
def test_what_is_no_array_is_named(gives, words):
    class Other(ArraySource):
        def fetch(self, indices):
            return gives(*super().fetch(indices))

    source = Other(np.zeros((5, 3), np.float32), np.zeros(5, np.int64))
    with pytest.raises(UserError, match=re.escape(f"Other.fetch gives {words} for the examples 1, 4, and its spec ")):
        fetch(source, np.array([1, 4]))


def test_nests_of_arrays_and_texts_stay_together():
    """As `Model.fit` takes them: named inputs, of which one is text, two targets, and a weight for each."""
    index = np.arange(9)
    x = {"number": index.astype(np.float32), "name": np.array([f"n{i}" for i in index])}
    y = (index.astype(np.int32), np.stack([index, index], 1))
    weight = (index.astype(np.float32) / 2, index.astype(np.float32) / 4)
    for make in (train(ArraySource(x, y, weight), 4), evaluate(ArraySource(x, y, weight), 4, 9)):
        for found_x, found_y, found_weight in elements(make(contexts(1, 1)[0]), 3):
            i = found_y[0]
            assert found_x["name"].tolist() == [f"n{k}".encode() for k in i]
            for found, wanted in (
                (found_x["number"], i),
                (found_y[1], np.stack([i, i], 1)),
                (found_weight[0], i / 2),
                (found_weight[1], i / 4),
            ):
                np.testing.assert_array_equal(found, wanted)


def test_inputs_alone_are_batches_of_one():
    (batch,) = elements(train(ArraySource(np.arange(8)), 4)(contexts(1, 1)[0]), 1)
    assert isinstance(batch, tuple) and len(batch) == 1 and batch[0].shape == (4,)


@pytest.mark.parametrize("y", [np.array([0, 2, 1, 2]), np.array([[0], [2], [1], [2]]), np.eye(3)[[0, 2, 1, 2]]])
@pytest.mark.parametrize("weight", [None, np.array([1.0, 2.0, 3.0, 4.0]), np.arange(4.0)[:, None]])
def test_classes_weigh_as_in_fit(y, weight):
    """Ids, a column of them, or one-hot; times the weights that are there, which keep their shape and type."""
    source = ClassWeighted(ArraySource(np.zeros(4), y, weight), {0: 3.0, 2: 0.5})
    by_class = np.array([3.0, 0.5, 1.0, 0.5])
    wanted = by_class if weight is None else weight * by_class.reshape(-1, *[1] * (weight.ndim - 1))
    found = fetch(source, np.arange(4))[2]
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == (np.float32 if weight is None else weight.dtype)
