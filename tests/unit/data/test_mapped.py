"""Functions of the user's on the examples: what they give, the random numbers that they draw, and what fails."""

import functools
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial.data import (
    ArraySource,
    Dataset,
    Mapped,
    evaluation_batches,
    fetch,
    train_batches,
    train_indices,
)
from dist_partial.errors import Raised, UserError
from dist_partial.training.failures import explained
from tests.unit.data.test_batches import contexts, elements

X = np.random.default_rng(0).normal(size=(29, 3)).astype(np.float32)
Y = np.arange(29, dtype=np.int32)
SOURCE = ArraySource(X, Y)


def halved(x, y):
    return x / 2, y


def noisy(x, y, seed):
    return x + tf.random.stateless_normal([3], seed), y


def noisy_numpy(x, y, rng):
    return x + rng.normal(size=3).astype(np.float32), y


def data(source=SOURCE):
    return Dataset("numbers", source, source, "1")


def batches(source, context=None, first_step=0, seed=3):
    context = context or contexts(1, 1)[0]
    return train_batches(source, first_step=first_step, global_batch=12, seed=seed, context=context)


def steps(source, workers, count, **options):
    """x of `count` global batches, from all workers."""
    read = [elements(batches(source, context, **options), count) for context in contexts(workers, workers)]
    return np.stack([np.concatenate([worker[step][0] for worker in read]) for step in range(count)])


CHAINS = {
    "tensorflow": [(noisy, False)],
    "numpy": [(noisy_numpy, True)],
    "twice": [(noisy, False), (noisy, False)],
    "both": [(noisy_numpy, True), (halved, False), (noisy, False)],
    "numpy_last": [(noisy, False), (noisy_numpy, True)],
}


def chain(name):
    found = data()
    for function, numpy in CHAINS[name]:
        found = found.map(function, numpy=numpy)
    return found.train


@pytest.mark.parametrize("numpy", [False, True])
def test_batches_are_those_of_the_source_through_the_function(numpy):
    """Against NumPy on the indices that a run reads, and with the shapes that a step is compiled for."""
    found = batches(data().map(halved, numpy=numpy).train)
    assert found.cardinality() == tf.data.INFINITE_CARDINALITY
    assert [spec.shape.as_list() for spec in found.element_spec] == [[12, 3], [12]]
    indices = train_indices(29, first_step=0, global_batch=12, seed=3, context=contexts(1, 1)[0])
    for (x, y), some in zip(elements(found, 6), indices.take(6).as_numpy_iterator(), strict=True):
        np.testing.assert_array_equal(x, X[some] / 2)
        np.testing.assert_array_equal(y, Y[some])


@pytest.mark.parametrize("name", CHAINS)
def test_random_numbers_are_the_same_on_any_number_of_workers_and_after_a_resume(name):
    source = chain(name)
    alone = steps(source, 1, 7)
    for workers in (2, 3):
        np.testing.assert_array_equal(steps(source, workers, 7), alone)
    np.testing.assert_array_equal(steps(source, 2, 3, first_step=4), alone[4:])


@pytest.mark.parametrize("name", CHAINS)
def test_random_numbers_differ_between_epochs_examples_seeds_and_functions(name):
    noise = []
    for seed in (3, 4):
        for x, y in elements(batches(chain(name), seed=seed), 12):  # five epochs
            noise += (x - X[y] / (2 if name == "both" else 1)).tolist()
    assert len(np.unique(np.round(noise, 4), axis=0)) > 0.99 * len(noise)
    expected = {"both": 1.25, "numpy_last": 2.0, "twice": 2.0}.get(name, 1.0)  # variances of what is independent add up
    assert abs(np.var(noise) / expected - 1) < 0.25


def test_an_example_draws_the_same_whatever_comes_beside_it():
    one, all_of_them = (fetch(chain("both"), np.array(indices))[0] for indices in ([5], range(29)))
    np.testing.assert_array_equal(one[0], all_of_them[5])


def test_held_out_examples_draw_nothing():
    plain = evaluation_batches(SOURCE, examples=29, global_batch=12, context=contexts(1, 1)[0])
    for made, scale in ((data().map(noisy), 1), (data().map(noisy, evaluation=halved), 2), (data().map(halved), 2)):
        found = evaluation_batches(made.evaluation, examples=29, global_batch=12, context=contexts(1, 1)[0])
        for (x, _), (wanted, _) in zip(elements(found, 3), elements(plain, 3), strict=True):
            np.testing.assert_array_equal(x, wanted / scale)


@pytest.mark.parametrize(("function", "numpy"), [(noisy, False), (noisy_numpy, True)])
def test_held_out_examples_draw_from_the_seed_the_same_in_each_pass(function, numpy):
    source = data().map(halved, evaluation=function, numpy=numpy).evaluation
    options = {"examples": 29, "global_batch": 12, "context": contexts(1, 1)[0]}
    found = {}
    for seed in (0, 3, 3):
        first, second = (
            np.stack([x for x, _ in elements(evaluation_batches(source, seed=seed, **options), 3)]) for _ in range(2)
        )
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(found.setdefault(seed, first), first)
    assert (found[0] != found[3]).all()


@pytest.mark.parametrize("numpy", [False, True])
def test_nests_texts_and_weights(numpy):
    """A function may take a nest apart and make another one, with a weight, of other types."""
    text = np.array([f"n{i}" for i in range(29)])
    source = ArraySource({"x": X, "name": text}, Y)

    def function(x, y):
        return {"double": x["x"] * 2, "name": x["name"]}, [y, x["x"]], (x["x"][0], x["x"][1])

    for x, y, weight in elements(batches(data(source).map(function, numpy=numpy).train), 3):
        np.testing.assert_array_equal(x["double"], 2 * X[y[0]])
        assert x["name"].tolist() == [f"n{i}".encode() for i in y[0]]
        np.testing.assert_array_equal(y[1], X[y[0]])
        np.testing.assert_array_equal(weight[1], X[y[0], 1])


def test_images_are_decoded_and_cropped():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 6, 6, 3)).astype(np.uint8)
    source = ArraySource(np.array([tf.io.encode_png(each).numpy() for each in pixels]), np.arange(9))

    def decoded(x, y):
        return tf.ensure_shape(tf.io.decode_png(x, channels=3), [6, 6, 3]), y

    def cropped(x, y, seed):
        return tf.image.stateless_random_crop(x, [4, 4, 3], seed), y

    made = data(source).map(decoded).map(cropped, evaluation=lambda x, y: (x[1:5, 1:5], y))
    for x, y in elements(batches(made.train), 2):
        for image, i in zip(x, y, strict=True):
            assert any((image == pixels[i, a : a + 4, b : b + 4]).all() for a in range(3) for b in range(3))
    np.testing.assert_array_equal(fetch(made.evaluation, np.arange(9))[0], pixels[:, 1:5, 1:5])


def test_random_layers_of_keras_draw_for_each_example():
    flip, shift = keras.layers.RandomFlip("horizontal"), keras.layers.RandomTranslation(0.3, 0.3, seed=1)
    images = np.random.default_rng(0).normal(size=(29, 6, 6, 1)).astype(np.float32)

    def augmented(x, y):
        return shift(flip(x)), flip(x)

    held_out = ArraySource(images, images)
    made = Dataset("pictures", ArraySource(images, images), held_out, "1").map(augmented)
    assert made.train.random and made.evaluation is held_out
    alone = steps(made.train, 1, 7)
    np.testing.assert_array_equal(steps(made.train, 2, 7), alone)
    np.testing.assert_array_equal(steps(made.train, 1, 2, first_step=5), alone[5:])
    assert len(np.unique(alone.reshape(84, -1), axis=0)) > 80
    _, flipped = fetch(made.train, np.arange(29))
    turned = [(image == pixels[:, ::-1]).all() for image, pixels in zip(flipped, images, strict=True)]
    assert all(t or (image == pixels).all() for t, image, pixels in zip(turned, flipped, images, strict=True))
    assert 5 < sum(turned) < 24


class Placed(ArraySource):
    def place(self, index):
        return f"part-{index // 10}.csv, row {index % 10}"


def failing_numpy(x, y):
    if y == 17:
        raise ValueError("no such colour")
    return x, y


def failing(x, y):
    tf.debugging.assert_none_equal(y, 17, message="no such colour")
    return x, y


def failing_python(x, y):
    return tf.ensure_shape(tf.py_function(lambda x, y: failing_numpy(x, y)[0], [x, y], tf.float32), [3]), y


@pytest.mark.parametrize("function", [failing, failing_numpy, failing_python])
@pytest.mark.parametrize("kind", [ArraySource, Placed])
def test_a_function_that_fails_names_the_example(function, kind):
    source = data(kind(X, Y)).map(function, numpy=function is failing_numpy).map(noisy).train
    with pytest.raises(Raised) as found, explained():
        elements(batches(source), 10)
    words = r"part-1\.csv, row 7" if kind is Placed else "example 17"
    assert re.fullmatch(
        rf"{function.__name__} of run\.data raised \w+: .*no such colour.* \({__file__}, line \d+\); it is {words}",
        str(found.value),
    )


def odd_shape(x, y):
    return x if y != 17 else x[:2], y


def odd_type(x, y):
    return x if y != 17 else x.astype(np.float64), y


@pytest.mark.parametrize("function", [odd_shape, odd_type])
def test_an_example_unlike_the_others_is_named(function):
    source = data(Placed(X, Y)).map(function, numpy=True).train
    words = r"x is float\d\d \[\d\], and was float32 \[3\] for the first example: give all one shape and type"
    who = rf"{function.__name__} of run\.data \({__file__}, line \d+\)"
    with pytest.raises(UserError, match=rf"^{who}: {words}; it is part-1\.csv, row 7$"):
        fetch(source, np.arange(29))


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (lambda x: x, {}, r"<lambda>\(x\) does not take an example of run.data, \(x, y\)"),
        (lambda x, y, rng: (x, y), {}, "or say numpy=True to have an rng"),
        (lambda x, y: (x + tf.random.uniform([3]), y), {}, r"RandomUniform.*: write a parameter seed"),
        (lambda x, y: (x[: tf.cast(y, tf.int32)], y), {}, r"gives float32 \(None,\), .* tf.ensure_shape"),
        (lambda x, y: None, {}, "gives None: return x"),
        (lambda x, y: (x, y, x, y), {}, "return x, "),
        (lambda x, y: (x, y, x, y), {"numpy": True}, "return x, "),
        (lambda x, y, seed: (x[:2], y), {}, r"x is float32 \[2\], and was float32 \[3\] before it, .*evaluation="),
        (lambda x, y, seed: x, {}, r"\(.*py, line \d+\): it has x, and had x, y before it, .*return all parts"),
        (
            lambda x, y, rng: (x.astype(np.float64), y),
            {"numpy": True},
            r"x is float64 \[3\], and was float32 \[3\] before it",
        ),
        (
            lambda x, y, seed: (x[:2], y),
            {"evaluation": lambda x, y: (x[:1], y)},
            r"x is float32 \[2\], and was float32 \[1\] in the examples held out: give .* that makes them alike",
        ),
        (3, {}, "Dataset.map got 3: give a function"),
    ],
)
def test_mistakes_are_named_in_one_line(function, options, words):
    with pytest.raises(UserError, match=words) as caught:
        data().map(function, **options)
    assert "\n" not in str(caught.value)


def test_a_function_that_cannot_be_traced_names_its_line():
    def wrong(x, y):
        return x["a"], y

    with pytest.raises(Raised, match=rf"^wrong of run.data raised TypeError: .* \({__file__}, line \d+\)$"):
        data().map(wrong)


def test_another_function_is_another_data_set():
    names = {made.fingerprint for made in (data(), data().map(halved), data().map(noisy))}
    assert len(names) == 3
    partial = functools.partial(lambda factor, x, y: (x * factor, y), 3)
    np.testing.assert_array_equal(fetch(Mapped(SOURCE, partial), np.arange(2))[0], X[:2] * np.float32(3))
    assert Mapped(SOURCE, keras.layers.Lambda(lambda x: x)).name == "Lambda"
