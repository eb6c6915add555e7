"""What a failed run leaves behind, and says."""

import traceback

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_partial
from dist_partial.data import ArraySource, Dataset, fingerprint
from dist_partial.errors import Raised, UserError
from dist_partial.training import failures, loop
from tests.helpers import against_fit


def test_the_exception_of_a_run_holds_none_of_its_iterators(tmp_path):
    """One that is destroyed while Python shuts down could wait for ever."""

    class Broken(keras.optimizers.SGD):
        def update_step(self, *args):
            raise RuntimeError("no update")

    features = against_fit.features
    settings = against_fit.settings(
        against_fit.one_output,
        (features(7), features(1)),
        keras.losses.MeanSquaredError,
        replicas=1,
        optimizer=lambda: Broken(0.1),
    )
    with pytest.raises(Raised, match="no update") as caught:
        loop.run(settings, tmp_path)
    frames = {frame.f_code: frame for frame, _ in traceback.walk_tb(caught.tb)}
    assert "runner" in loop.run.__wrapped__.__code__.co_varnames
    assert not frames[loop.run.__wrapped__.__code__].f_locals


def test_what_xla_cannot_compile_is_one_line():
    lengths = tf.function(tf.strings.length, jit_compile=True)
    said = pytest.raises(UserError, match=r"^run\.jit_compile: XLA cannot compile .*: leave out run\.jit_compile$")
    with said, failures.explained():
        lengths(tf.constant(["one", "three"]))


def ids() -> keras.Model:
    layers = [keras.layers.Embedding(20, 4, name="item"), keras.layers.Flatten(), keras.layers.Dense(1)]
    return keras.Sequential([keras.Input([1], dtype="int32"), *layers])


def by_name() -> keras.Model:
    item, age = keras.Input([1], dtype="int32", name="id"), keras.Input([1], name="age")
    found = keras.layers.Flatten()(keras.layers.Embedding(20, 4, name="item")(item))
    return keras.Model([item, age], keras.layers.Dense(1)(keras.layers.Concatenate()([found, age])))


@pytest.mark.parametrize(("model", "which"), [(ids, "x"), (by_name, "'id'")], ids=["alone", "by name"])
@pytest.mark.parametrize("bad", [77, -1])
def test_an_id_that_no_embedding_has_is_named_before_the_first_step(tmp_path, capfd, model, which, bad):
    x = np.arange(260)[:, np.newaxis] % 20
    x[131] = bad
    data = x if model is ids else {"id": x, "age": np.ones([260, 1], np.float32)}
    said = rf"^{which} of data has the id {bad} \(example 131\), and layer 'item' of model has 20 of them"
    with pytest.raises(UserError, match=said):
        dist_partial.train(
            model, (data, np.ones(260)), rules=[("train", ".*")], loss="mse", steps=1, folder=tmp_path / "r"
        )
    assert "OP_REQUIRES" not in capfd.readouterr().err


def arrays(bad: float, part: str) -> ArraySource:
    x, y = np.ones([24, 2], np.float32), np.ones(24, np.float32)
    (x if part == "x" else y)[17] = bad
    return ArraySource(x, y)


@pytest.mark.parametrize(("part", "bad"), [("x", np.nan), ("y", np.inf)])
@pytest.mark.parametrize("mapped", [False, True], ids=["arrays", "mapped"])
def test_a_number_of_an_example_that_is_not_finite_is_named(tmp_path, part, bad, mapped):
    """And not the learning rate blamed for it; whichever step of the first epoch the example comes in."""
    source = arrays(bad, part)
    data = Dataset("d", source, ArraySource(np.ones([4, 2], np.float32), np.ones(4, np.float32)), fingerprint(1))
    if mapped:
        data = data.map(lambda x, y: (x * 2, y))
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    said = rf"^the loss is not finite at step \d .*, and {part} of example 17 is {bad}; .*leave out that example$"
    with pytest.raises(UserError, match=said):
        dist_partial.train(
            model, data, rules=[("train", ".*")], loss="mse", steps=3, global_batch=8, folder=tmp_path / "run"
        )


def test_a_learning_rate_that_is_too_high_is_still_what_is_blamed(tmp_path):
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    with pytest.raises(UserError, match=r"lower the learning rate or give clip_norm$"):
        dist_partial.train(
            model,
            (np.ones([24, 2], np.float32), np.ones(24, np.float32)),
            rules=[("train", ".*")],
            loss="mse",
            optimizer=keras.optimizers.SGD(1e30),
            steps=5,
            folder=tmp_path / "run",
        )
