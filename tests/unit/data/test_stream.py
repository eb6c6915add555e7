"""A tf.data.Dataset in its own order: which examples come on any number of workers, and after a resume."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from dist_partial.data import (
    ArraySource,
    Dataset,
    Mapped,
    Stream,
    class_weighted,
    looks,
    reading,
    started,
    stream,
    train_batches,
)
from dist_partial.errors import Raised, UserError
from dist_partial.training.failures import explained
from tests.unit.data.test_batches import contexts, elements, evaluate, evaluated, steps

COUNT = 29


def numbers(count=COUNT):
    """Examples that carry their own number: x = [i, i], y = i."""
    return tf.data.Dataset.range(count, output_type=tf.int32).map(lambda i: (tf.stack([i, i]), i))


def train(source, global_batch=12, first_step=0, seed=3):
    return lambda context: train_batches(
        source, first_step=first_step, global_batch=global_batch, seed=seed, context=context
    )


MADE = {
    "examples": numbers,
    "batches": lambda: numbers().batch(4).prefetch(2),
    "unknown": lambda: numbers(2 * COUNT).filter(lambda x, y: y < COUNT),
    "in_threads": lambda: tf.data.Dataset.range(COUNT).interleave(
        lambda i: numbers().skip(i).take(1), cycle_length=2, num_parallel_calls=2, deterministic=True
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_position_p_is_the_pth_example_on_any_number_of_workers_and_after_a_resume(name, capsys):
    source = Stream(MADE[name]())
    epoch = np.concatenate([np.atleast_1d(y) for _, y in MADE[name]().as_numpy_iterator()])
    wanted = epoch[np.arange(7 * 12) % COUNT].reshape(7, 12)
    assert len(source) == COUNT
    for workers, replicas in ((1, 1), (2, 4), (3, 3)):
        np.testing.assert_array_equal(steps(train(source), workers, replicas, 7), wanted)
    capsys.readouterr()
    np.testing.assert_array_equal(steps(train(source, first_step=5), 2, 2, 2), wanted[5:])
    out = capsys.readouterr().out
    begun, ended = out.splitlines()
    assert begun == "run.data: skipping 60 examples, which a tf.data.Dataset reads again to go on..."
    assert ended.startswith("run.data: skipped 60 examples in ")


def test_a_shuffled_data_set_goes_on_where_it_was():
    def source():
        return Stream(lambda: numbers().shuffle(COUNT, seed=1))

    whole = steps(train(source()), 1, 1, 9)
    assert len(np.unique(whole.reshape(-1)[:COUNT])) == COUNT
    np.testing.assert_array_equal(steps(train(source(), first_step=6), 2, 2, 3), whole[6:])


def test_training_has_no_end_and_shapes_are_static():
    for batches, count in (
        (train(Stream(numbers()))(contexts(2, 2)[0]), tf.data.INFINITE_CARDINALITY),
        (train(Stream(numbers()), first_step=3)(contexts(2, 2)[0]), tf.data.INFINITE_CARDINALITY),
        (evaluate(Stream(numbers()), 12, 13)(contexts(2, 2)[0]), 2),
    ):
        assert batches.cardinality() == count
        assert [tuple(spec.shape) for spec in batches.element_spec] == [(6, 2), (6,)]


@pytest.mark.parametrize(("examples", "workers", "replicas"), [(24, 1, 1), (20, 2, 4), (1, 4, 4), (19, 3, 3)])
def test_an_evaluation_is_one_reading_of_each_example(examples, workers, replicas):
    """Also of one that shuffles, which a second reading would find in another order."""
    read = []

    def made():
        def note(i):
            read.append(int(i))
            return i

        noted = tf.data.Dataset.range(40).map(lambda i: tf.ensure_shape(tf.numpy_function(note, [i], tf.int64), []))
        return noted.shuffle(40, seed=1).map(lambda i: (tf.stack([i, i]), i))

    source = Stream(made)
    make = evaluate(source, 12, examples)
    first, second = (evaluated(make, 12, examples, workers, replicas) for _ in range(2))
    tf.random.set_seed(0)
    assert first == second == [int(y) for _, y in made().take(examples)]
    source.fetch(np.arange(1))
    read.clear()
    list(make(contexts(workers, replicas)[0]))
    assert sorted(read) == list(range(40))


def test_functions_draw_by_position_and_classes_weigh():
    data = Dataset("numbers", Stream(numbers()), ArraySource(np.zeros([3, 2], np.int32), np.zeros(3, np.int32)), "1")

    def noisy(x, y, seed):
        return x, tf.random.stateless_uniform([], seed, 0, 10**6, tf.int32)

    source = data.map(noisy).train
    alone = steps(train(source), 1, 1, 6)
    assert len(np.unique(alone)) > 70
    for workers in (2, 3):
        np.testing.assert_array_equal(steps(train(source), workers, workers, 6), alone)
    np.testing.assert_array_equal(steps(train(source, first_step=4), 1, 1, 2), alone[4:])
    for _, y, weight in elements(train(class_weighted(Stream(numbers()), {3: 2.5}))(contexts(1, 1)[0]), 3):
        np.testing.assert_array_equal(weight, np.where(y == 3, 2.5, 1))


def test_an_endless_one_is_trained_on():
    source = Stream(numbers().repeat())
    np.testing.assert_array_equal(steps(train(source), 1, 1, 7).reshape(-1), np.arange(7 * 12) % COUNT)
    assert len(source) > 10**15 and looks(source).tolist() == list(range(64))
    with pytest.raises(UserError, match=r"held out have no end: bind run\.eval_examples"):
        evaluate(source, 12, len(source))(contexts(1, 1)[0])


def test_one_tensor_is_x():
    (batch,) = elements(train(Stream(tf.data.Dataset.range(9)))(contexts(1, 1)[0]), 1)
    assert batch[0].tolist() == [*range(9), 0, 1, 2]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Stream([1, 2]), r"got \[1, 2\]: give a tf.data.Dataset"),
        (lambda: Stream(tf.data.Dataset.range(3).map(lambda i: tf.range(i))), r"shape=\(None,\).* tf.ensure_shape"),
        (lambda: Stream(numbers(), batched=True), r"no batches: give Stream\(dataset, batched=False\)"),
        (lambda: train(Stream(numbers(0)))(contexts(1, 1)[0]), "is empty"),
        (lambda: train(Stream(numbers()))(contexts(1, 5)[0]), "run.global_batch=12 .* 5 replicas"),
        (
            lambda: Dataset("n", Stream(numbers()), Stream(numbers()), "1").map(lambda x, y: (x, y), numpy=True),
            "<lambda> is to map a tf.data.Dataset with numpy=True",
        ),
    ],
)
def test_mistakes_are_named_in_one_line(make, words):
    with pytest.raises(UserError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def coloured(i):
    if i % COUNT == 17:
        raise ValueError("no such colour")
    return i


def failing():
    def example(i):
        i = tf.ensure_shape(tf.numpy_function(coloured, [i], tf.int64), [])
        return tf.stack([i, i]), i

    return tf.data.Dataset.range(COUNT).map(example, num_parallel_calls=2)


def changing():
    rows = (([i] * (3 if i == 17 else 2), i) for i in range(COUNT))
    spec = tf.TensorSpec([2], tf.int64), tf.TensorSpec([], tf.int64)
    return tf.data.Dataset.from_generator(lambda: rows, output_signature=spec)


def checked(x, y):
    tf.debugging.assert_none_equal(y, tf.constant(17, y.dtype), message="no such colour")
    return x, y


COLOUR = r"^run\.data raised InvalidArgumentError: ValueError: no such colour \(.*test_stream.py, line \d+\); "


@pytest.mark.parametrize(("workers", "worker", "places"), [(1, 0, "12 to 23"), (2, 0, "6 to 17"), (2, 1, "12 to 23")])
@pytest.mark.parametrize(
    ("source", "words"),
    [
        (lambda: Stream(failing), COLOUR),
        (lambda: Stream(lambda: failing().batch(4)), COLOUR),
        (lambda: Stream(changing), r"yielded an element of shape \(3,\) where an element of shape \(2,\) was expected"),
        (lambda: Mapped(Stream(numbers), checked), r"InvalidArgumentError: assertion failed: \[no such colour\] "),
    ],
    ids=["map", "batches", "generator", "function"],
)
def test_an_error_in_it_says_among_which_examples(source, words, workers, worker, places, monkeypatch):
    monkeypatch.setattr(stream, "_FIRST", 8)  # or it would fail when they are looked at
    made = source()
    if isinstance(made, Mapped) and worker:
        return  # the example is another worker's
    with pytest.raises(Raised, match=words) as caught, reading(), explained():
        list(itertools.islice(started(train(made)(contexts(workers, workers)[worker])), 3))
    # In the batch of 4 of the user's that begins there, those that come first have not been given either.
    assert str(caught.value).endswith(f"; it is among the examples {places} of the tf.data.Dataset")
    assert "\n" not in str(caught.value)


def test_an_error_in_an_evaluation_or_in_what_is_skipped_says_so(monkeypatch):
    monkeypatch.setattr(stream, "_FIRST", 8)
    source = Stream(failing)
    for make, places in ((evaluate(source, 12, 20), "12 to 19"), (train(source, first_step=2), "0 to 35")):
        with pytest.raises(Raised, match=rf"among the examples {places} of") as caught, reading(), explained():
            list(itertools.islice(started(make(contexts(1, 1)[0])), 2))
        assert "\n" not in str(caught.value)


def test_an_error_before_a_run_says_after_which_example():
    with pytest.raises(Raised, match=COLOUR + "it comes after 17 examples of the tf.data.Dataset$"):
        Stream(failing).fetch(np.arange(3))
    with pytest.raises(Raised, match=COLOUR + "it is among the examples 0 to 4,095 of the tf.data.Dataset$"):
        len(Stream(lambda: failing().filter(lambda x, y: True)))


def test_bytes_keep_the_zeros_at_their_end():
    records = [b"a\0", b"bc\0\0", b""]
    stream = Stream(tf.data.Dataset.from_tensor_slices(records))
    assert stream.fetch(np.arange(3))[0].tolist() == records
    numpy = Mapped(ArraySource(np.array(records, object)), lambda record: record, numpy=True)
    assert numpy.fetch(np.arange(3))[0].tolist() == records
