"""What is given by output has the names of the model's outputs; a mistake is one line with the name."""

import keras
import numpy as np
import pytest

import dist_partial
from dist_partial.errors import UserError

X = np.random.default_rng(0).normal(size=(24, 2)).astype(np.float32)
Y = (np.arange(24) % 2).astype(np.float32)
ONES = np.ones(24, np.float32)
BOTH = {"buy": Y, "kind": Y}


def named(form=dict) -> keras.Model:
    x = keras.Input([2])
    outputs = {name: keras.layers.Dense(1, name=name)(x) for name in ("buy", "kind")}
    return keras.Model(x, outputs if form is dict else list(outputs.values()))


def listed() -> keras.Model:
    return named(list)


def single() -> keras.Model:
    return keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])


def run(folder, model, y, weight=None, **settings):
    data = (X, y) if weight is None else (X, y, weight)
    settings = {"loss": {"buy": "mse", "kind": "mse"}} | settings
    return dist_partial.train(model, data, rules=[("train", ".*")], steps=1, folder=folder / "run", **settings)


MISTAKES = {
    "target": (named, {"buy": Y, "knd": Y}, {}, "data's targets have no 'kind'; nearest: 'knd'; give"),
    "target of a list": (listed, {"buy": Y, "knd": Y}, {}, "data's targets have no 'kind'; nearest: 'knd'; give"),
    "no target": (named, {"buy": Y}, {}, "data's targets have no 'kind'; give"),
    "another target": (named, {**BOTH, "more": Y}, {}, "data's targets have 'more', which is none; leave"),
    "one target": (named, Y, {}, "data's targets have 1 without a name: give them as {'buy': ..., 'kind': ...}"),
    "weight": (named, BOTH, {"weight": {"buy": ONES, "knd": ONES}}, "data's weights have no 'kind'; nearest: 'knd'"),
    "no weight": (named, BOTH, {"weight": {"buy": ONES}}, "data's weights have no 'kind'; give each"),
    "loss": (named, BOTH, {"loss": {"buy": "mse", "knd": "mse"}}, "loss has 'knd', which is none; nearest: 'kind'"),
    "no loss": (listed, BOTH, {"loss": {"buy": "mse"}}, "loss has no 'kind': give each output one, or None"),
    "too few losses": (listed, (Y, Y), {"loss": ["mse"]}, "loss has 1 loss, and model 2 outputs: give each output one"),
    "loss weight": (
        named,
        BOTH,
        {"loss_weights": {"byu": 1.0}},
        "loss_weights has 'byu', which is none; nearest: 'buy'",
    ),
    "no loss weight": (named, BOTH, {"loss_weights": {"buy": 1.0}}, "loss_weights has no 'kind': give each"),
    "metric": (named, BOTH, {"metrics": {"buyy": ["mae"]}}, "metrics has 'buyy', which is none; nearest: 'buy'"),
    "one list of metrics": (named, BOTH, {"metrics": ["mae"]}, "metrics is one list: say which are of which output"),
    "dict for one": (single, {"a": Y}, {"loss": "mse"}, "model has one output, and data's targets have 'a': give one"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_name_is_one_line(tmp_path, mistake):
    model, y, given, words = MISTAKES[mistake]
    with pytest.raises(UserError) as found:
        run(tmp_path, model, y, **given)
    assert words in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("model", "y", "given"),
    [
        (named, {"kind": Y}, {"loss": {"kind": "mse"}}),
        (listed, BOTH, {"loss": {"buy": "mse", "kind": None}, "metrics": {"buy": ["mae"]}}),
        (listed, (Y, Y), {}),
        (listed, (Y, Y), {"loss": "mse", "metrics": [["mae"], ["mse"]]}),
    ],
    ids=["one of two", "one loss", "by loss", "lists"],
)
def test_what_keras_takes_is_taken(tmp_path, model, y, given):
    assert np.isfinite(run(tmp_path, model, y, **given).history[-1]["loss"])
