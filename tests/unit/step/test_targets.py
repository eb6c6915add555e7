"""Targets that a loss cannot take are one line, before the first step."""

import keras
import numpy as np
import pytest

import dist_partial
from dist_partial.errors import UserError
from dist_partial.step import losses
from dist_partial.step.targets import check_targets

X = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
Y = np.arange(40) % 2


@pytest.mark.parametrize(
    "loss", [keras.losses.SparseCategoricalCrossentropy(), losses.made("sparse_categorical_crossentropy").inner]
)
def test_class_ids_end_below_the_number_of_classes(loss):
    check_targets(loss, "d", np.array([0, 2]), np.zeros([2, 3]))
    with pytest.raises(UserError, match=r"d has targets up to 3 .* classes 0 to 2: bind a model of at least 4 classes"):
        check_targets(loss, "d", np.array([0, 3]), np.zeros([2, 3]))


@pytest.mark.parametrize("name", ["binary_crossentropy", "binary_focal_crossentropy", "dice"])
def test_labels_of_a_binary_loss_are_from_0_to_1(name):
    loss = losses.made(name).inner
    check_targets(loss, "d", np.array([0, 1, 0.5]), np.zeros([3, 1]))
    for beyond in (2, -1):
        with pytest.raises(UserError, match=rf"^d has the target {beyond}, and run\.loss \({name}\) takes .* 0 to 1"):
            check_targets(loss, "d", np.array([0, beyond]), np.zeros([2, 1]))


def binary() -> keras.Model:
    return keras.Sequential([keras.Input([2]), keras.layers.Dense(1, activation="sigmoid")])


def two() -> keras.Model:
    x = keras.Input([2])
    buy = keras.layers.Dense(1, activation="sigmoid", name="buy")(x)
    return keras.Model(x, {"buy": buy, "kind": keras.layers.Dense(3, name="kind")(x)})


LOSSES = {"buy": "binary_crossentropy", "kind": "sparse_categorical_crossentropy"}
WORDS = np.where(Y, "cow", "dog")


@pytest.mark.parametrize(
    ("model", "data", "loss", "words"),
    [
        (
            binary,
            (X, Y),
            None,
            "^data has the labels 0 and 1, and model one output .*'binary_crossentropy', or without",
        ),
        (two, (X, {"buy": Y, "kind": Y}), None, "^target 'buy' of data has the labels 0 and 1"),
        (binary, (X, Y * 2), "binary_crossentropy", "^data has the target 2, and loss"),
        (two, (X, {"buy": Y - 3, "kind": Y}), LOSSES, "^target 'buy' of data has the target -[23], and loss"),
        (
            two,
            (X, {"buy": Y, "kind": WORDS}),
            LOSSES,
            r"^target 'kind' of data has texts \('(cow|dog)', \.\.\.\): make",
        ),
        (binary, (X, Y, WORDS), "mse", "^data has texts for weights: give numbers"),
        (binary, (np.where(X > 0, "a", "b"), Y), "mse", "^x of data's examples is text, and model takes float32 there"),
    ],
    ids=["binary", "binary of two", "labels 0 and 2", "labels of two", "texts", "weights", "inputs"],
)
def test_targets_that_no_loss_takes_are_one_line_and_nothing_else(tmp_path, capfd, recwarn, model, data, loss, words):
    with pytest.raises(UserError, match=words) as found:
        dist_partial.train(model, data, rules=[("train", ".*")], loss=loss, steps=1, folder=tmp_path / "run")
    assert "\n" not in str(found.value)
    assert "OP_REQUIRES" not in capfd.readouterr().err
    assert not [each for each in recwarn if "from_logits" in str(each.message)]
