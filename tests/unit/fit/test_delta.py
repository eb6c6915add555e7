"""Deltas of models that `model.fit` has trained with `partial`, applied to fresh ones."""

import keras
import numpy as np
import pytest

import dist_partial
from dist_partial import UserError, delta, fit, partial
from dist_partial.schedules import Phases
from dist_partial.selection import Rule
from tests.helpers import cases
from tests.helpers.files import same_bits

RULES = [Rule("words/embeddings", rows=(2, 5)), ("train", "(norm|head)/.*"), ("freeze", ".*")]


def build():
    keras.utils.set_random_seed(3)
    layers = [
        keras.layers.Embedding(7, 4, name="words"),
        keras.layers.Flatten(),
        keras.layers.BatchNormalization(name="asleep"),
        keras.layers.Dense(5, name="body"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Dropout(0.1),
        keras.layers.Dense(2, name="head"),
    ]
    return keras.Sequential([keras.Input((3,), dtype="int32"), *layers], name="small")


def fitted(model, **options):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 7, (24, 3)), rng.normal(size=(24, 2))
    model.fit(x, y, batch_size=8, verbose=0, **options)
    return cases.weights(model)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_a_fresh_model_takes_what_fit_has_trained(policy, tmp_path):
    """From the model itself, and from one that was saved, loaded and trained on, bit for bit."""
    keras.config.set_dtype_policy(policy)
    model, fresh = build(), build()
    before = cases.weights(fresh)
    model.compile(partial("adam", RULES, model), loss="mse")
    after = fitted(model, epochs=3)
    step = int(model.optimizer.iterations.numpy())  # without those that overflow
    delta.write(tmp_path / "mine.safetensors", delta.of(model))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    later = fitted(loaded)

    base = dist_partial.Base(fresh)
    mine = delta.read(tmp_path / "mine.safetensors")
    statistics = {"norm/moving_mean", "norm/moving_variance"}
    assert mine.arrays.keys() == {
        "words/embeddings[2:5]", "norm/gamma", "norm/beta", "head/kernel", "head/bias", *statistics
    }  # fmt: skip
    assert mine.rules == ("train words/embeddings rows 2:5", "train (norm|head)/.*", "freeze .*")
    assert 0 < mine.step == step
    for each, expected in ((mine, after), (delta.of(loaded), later), (None, before)):
        base.use(each)
        assert all(same_bits(pair) for pair in zip(cases.weights(fresh).values(), expected.values(), strict=True))
    assert "array" not in repr(mine) and len(repr(mine)) < 200


def test_of_a_schedule_it_is_all_that_was_ever_trained():
    model, schedule = build(), Phases([(0, "head/.*"), (1, "norm/.*")])
    model.compile(partial("adam", [("train", "(norm|head)/.*"), ("freeze", ".*")], model, schedule=schedule), "mse")
    fitted(model, callbacks=[fit.SelectionScheduler(schedule)])
    found = delta.of(model)
    assert {key for key in found.arrays if "moving" not in key} == {
        "norm/gamma",
        "norm/beta",
        "head/kernel",
        "head/bias",
    }
    assert found.rules == ("train (norm|head)/.*", "freeze .*")


def test_another_model_is_refused_and_a_model_of_another_training_too():
    model = build()
    model.compile(partial("adam", RULES, model), loss="mse")
    fitted(model)
    with pytest.raises(UserError, match="the delta is of another base: 'words/embeddings', 'norm/gamma'"):
        dist_partial.Base(model).use(delta.of(model))
    model.compile("adam", "mse")
    with pytest.raises(UserError, match=r"'small' is not compiled with an optimizer from dist_partial\.partial"):
        delta.of(model)
