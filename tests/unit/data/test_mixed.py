"""Data sets in their own order, joined, and mixed in shares: which examples come, how often, and where they are."""

import numpy as np
import pytest
import tensorflow as tf

from dist_partial.data import (
    ArraySource,
    Dataset,
    InOrder,
    Joined,
    Mixed,
    evaluation_batches,
    fetch,
    mix,
    train_batches,
)
from dist_partial.data.draws import draws
from dist_partial.data.forks import stages
from dist_partial.data.order import places
from dist_partial.errors import Ending, UserError
from dist_partial.training.failures import explained
from tests.unit.data.test_batches import contexts, elements, steps


def numbers(first, count):
    """Examples that carry their own number: x = [i, i], y = i."""
    index = np.arange(first, first + count, dtype=np.int32)
    return ArraySource(np.stack([index, index], 1), index)


SIZES = (5, 40, 13)
SETS = [Dataset(f"{size}", numbers(100 * i, size), numbers(1000 * i, 3), f"{size}") for i, size in enumerate(SIZES)]


def train(source, global_batch=12, first_step=0, seed=3):
    return lambda context: train_batches(
        source, first_step=first_step, global_batch=global_batch, seed=seed, context=context
    )


def test_an_order_of_their_own_goes_on_beyond_the_first_epoch():
    source = numbers(0, 29)
    data = Dataset("numbers", source, source, "1").in_order()
    assert fetch(data.train, np.array([3, 29, 60]))[1].tolist() == [3, 0, 2]
    assert data.fingerprint != "1" and data.evaluation is source


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 5, 2), (0.01, 3, 0.2)])
def test_each_set_has_its_share_and_is_read_through_again_and_again(weights):
    mixed = mix(list(zip(SETS, weights, strict=True))).train
    order = steps(train(mixed, global_batch=240), 1, 1, 30).reshape(-1)
    share = np.array(weights) / sum(weights)
    for i, size in enumerate(SIZES):
        where = np.flatnonzero(order // 100 == i)
        for count in (1, 10, 777, len(order)):  # of any first positions, too
            assert abs((where < count).sum() - share[i] * count) < len(SIZES)
        own = order[where] - 100 * i
        for epoch in own[: len(own) // size * size].reshape(-1, size):
            np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
    needed = max(np.flatnonzero(order // 100 == i)[size - 1] for i, size in enumerate(SIZES) if i or weights[0] > 0.1)
    assert weights[0] < 0.1 or mixed.epoch == needed + 1


def test_a_mix_is_the_same_on_any_number_of_workers_and_after_a_resume():
    noisy = SETS[1].map(lambda x, y, rng: (x + rng.integers(0, 9, 2).astype(np.int32), y), numpy=True)
    noisy = noisy.map(lambda x, y, seed: (x + tf.random.stateless_uniform([2], seed, 0, 9, tf.int32), y))
    plain = SETS[0].map(lambda x, y: (x, y))
    mixed = mix([(plain, 1), (noisy, 2), (SETS[2].in_order(), 1)]).map(lambda x, y: (x, x[0])).train
    alone = steps(train(mixed), 1, 1, 9)
    for workers in (2, 3):
        np.testing.assert_array_equal(steps(train(mixed), workers, workers, 9), alone)
    np.testing.assert_array_equal(steps(train(mixed, first_step=6), 2, 4, 3), alone[6:])
    from_third = [i - 200 for i in alone.reshape(-1) if i >= 200]
    np.testing.assert_array_equal(from_third, np.arange(len(from_third)) % 13)


def noisy(x, y, seed):
    return x + tf.random.stateless_uniform([2], seed, 0, 99, tf.int32), y


def chained():
    """Of four sets: texts that are parsed, two functions that draw, none, and one of NumPy before one of TensorFlow."""

    def parsed(x, y):
        return tf.stack([tf.strings.to_number(x, tf.int32)] * 2), y

    def noisy_numpy(x, y, rng):
        return x + rng.integers(0, 99, 2).astype(np.int32), y

    texts = ArraySource(np.array([f"{i}" for i in range(300, 309)]), np.arange(300, 309, dtype=np.int32))
    texts = Dataset("texts", texts, texts, "texts").map(parsed)
    both = SETS[2].map(noisy_numpy, numpy=True).map(noisy)
    return mix([(texts, 1), (SETS[1].map(noisy).map(noisy), 2), (SETS[0], 1), (both, 1)]).map(noisy)


def ordered():
    return SETS[1].map(noisy).map(noisy).in_order()


@pytest.mark.parametrize("made", [chained, ordered])
def test_functions_that_tf_data_calls_give_what_they_give_in_fetch(made):
    """To the last bit, where sets are mixed or in their order."""
    source = made().train
    assert len(stages(source)[1]) == 2
    for step, (x, y) in enumerate(elements(train(source)(contexts(1, 1)[0]), 12)):
        indices, epochs = (each.numpy() for each in places(source, 12 * step + tf.range(12, dtype=tf.int64), 3))
        wanted = source.fetch_with(indices, draws(3, epochs, indices))
        assert (x.tolist(), y.tolist()) == (wanted[0].tolist(), wanted[1].tolist())
    held_out = made().evaluation
    count = len(held_out)
    found = elements(evaluation_batches(held_out, examples=count, global_batch=count, context=contexts(1, 1)[0]), 1)
    np.testing.assert_array_equal(found[0][0], held_out.fetch(np.arange(count))[0])


@pytest.mark.parametrize("where", ["read", "function"])
def test_a_mistake_in_one_of_several_sets_names_the_example(where):
    class Placed(ArraySource):
        def place(self, index):
            return f"row {index}"

        def fetch(self, indices):
            if where == "read" and len(self) == 29 and 17 in indices:
                raise ValueError("no such colour")
            return super().fetch(indices)

    def failing(x, y):
        if where == "function":
            tf.debugging.assert_none_equal(y, 17, message="no such colour")
        return x, y

    source = Placed(np.zeros([29, 2], np.int32), np.arange(29, dtype=np.int32))
    data = Dataset("placed", source, source, "1").map(failing)
    mixed = mix([(SETS[1], 1), (data, 1)]).train
    with (
        pytest.raises(Ending, match=r"raised \w+: .*no such colour.*; it is .*row 17.* of data set 'placed'$"),
        explained(),
    ):
        elements(train(mixed)(contexts(1, 1)[0]), 12)


def test_sets_of_one_size_are_shuffled_apart():
    twice = Mixed(Joined([numbers(0, 40), numbers(100, 40)]), [1, 1])
    order = steps(train(twice, global_batch=80), 1, 1, 1).reshape(-1)
    assert not np.array_equal(order[order < 100], order[order >= 100] - 100)


def test_all_held_out_examples_come_once():
    made = mix([(SETS[0], 1), (SETS[1], 9)])
    found = evaluation_batches(made.evaluation, examples=6, global_batch=6, context=contexts(1, 1)[0])
    assert elements(found, 1)[0][1].tolist() == [0, 1, 2, 1000, 1001, 1002]


def test_places_of_examples():
    assert InOrder(numbers(0, 5)).place(7) == "example 2"

    class Placed(ArraySource):
        def place(self, index):
            return f"row {index}"

    joined = Joined([Placed(np.arange(3)), ArraySource(np.arange(4))])
    assert [joined.place(i) for i in (0, 2, 3, 6)] == [
        "row 0 of data set 1",
        "row 2 of data set 1",
        "example 0 of data set 2",
        "example 3 of data set 2",
    ]
    assert mix([(SETS[0], 1), (SETS[1], 2)]).evaluation.place(0).endswith(f" of data set {SETS[0].name!r}")
    some = np.array([6, 0, 3, 3, 2])
    np.testing.assert_array_equal(fetch(joined, some)[0], np.array([0, 1, 2, 0, 1, 2, 3])[some])


def test_nothing_of_the_size_of_the_sets_is_made():
    class Large(ArraySource):
        def __len__(self):
            return 10**12

        def fetch(self, indices):
            return (indices,)

    mixed = Mixed(Joined([Large(np.arange(3)), Large(np.arange(3))]), [1, 1e-4])
    (batch,) = elements(train(mixed, first_step=10**9)(contexts(1, 1)[0]), 1)
    assert batch[0].shape == (12,) and mixed.epoch > 10**15


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([], "give a list of data sets with weights"),
        ([(SETS[0], 1), SETS[1]], r"as entry 2 Dataset.* without a weight: give \(data, 1\)$"),
        ([(SETS[0], 1), 3], r"as entry 2 3: give a pair \(Dataset, weight\)"),
        ([(np.zeros(3), 1)], r"as entry 1 a ndarray with a weight: make a Dataset of it by dist_partial"),
        ([(SETS[0], 1), (SETS[1], 0)], rf"as entry 2 data set '{SETS[1].name}' with weight 0: give a number above 0"),
        ([(SETS[0], 1), (SETS[1], 1e-6)], "the least is less than one in 65,536"),
        (
            [(SETS[0], 1), (SETS[1].map(lambda x, y: (x[:1], y)), 1)],
            rf"'{SETS[1].name}': x is \w+ \[1\], and was \w+ \[.\] in data set '{SETS[0].name}': map them to one form",
        ),
        ([(SETS[0], 1), (Dataset("none", numbers(0, 0), numbers(0, 1), "0"), 1)], "data set 'none' is empty"),
    ],
)
def test_mistakes_are_named_in_one_line(parts, words):
    with pytest.raises(UserError, match=words) as caught:
        mix(parts)
    assert "\n" not in str(caught.value)
