"""The cases of the suite, as plain Keras trains them: finite, to other weights, and twice to the same."""

import importlib

import keras
import numpy as np
import pytest

from tests.conformance import toy_data
from tests.conformance.case import BATCH, HELD_OUT_ROWS, ROWS, STEPS, TRAIN_ROWS, Case, batches_of
from tests.conformance.comparison import check_trained
from tests.conformance.models import CASES, tabular, text
from tests.conformance.reference import Reference, reference_of
from tests.helpers.marks import quick

SAME = 1e-12
DTYPES = {"float64", "int32", "object", "uint8"}
SMOKE = next(case for case in CASES if case.name == "outputs_dict")


def train(case: Case) -> Reference:
    if case.needs:
        pytest.importorskip(case.needs)
    return reference_of(case)


# All others are the references of test_conformance.py.
@pytest.mark.parametrize("case", quick([SMOKE, *(case for case in CASES if case.random)], SMOKE), ids=repr)
def test_keras_trains(case):
    first, second = train(case), train(case)
    check_trained(first)
    assert first.trained == second.trained
    for path, weight in first.weights.items():  # what draws random numbers has its seeds
        np.testing.assert_allclose(weight.astype(np.float64), second.weights[path], rtol=0, atol=SAME, err_msg=path)
    for size, logs in first.evaluations.items():
        assert logs == pytest.approx(second.evaluations[size], abs=SAME)


@pytest.mark.parametrize("case", quick(CASES, SMOKE), ids=repr)
def test_data(case):
    data = case.data()
    assert isinstance(data, tuple) and len(data) in (1, 2, 3)
    for array in keras.tree.flatten(data):
        assert len(array) == ROWS and array.dtype.name in DTYPES
    again = keras.tree.flatten(case.data())
    assert all(np.array_equal(one, two) for one, two in zip(keras.tree.flatten(data), again, strict=True))


def test_batches():
    batches, held_out = batches_of(SMOKE)
    x, _ = SMOKE.data()
    assert len(batches) == STEPS and {len(batch[0][1]) for batch in batches} == {BATCH}
    a_pass = np.concatenate([batch[0][1] for batch in batches[: TRAIN_ROWS // BATCH]])
    assert np.array_equal(np.sort(a_pass, axis=0), np.sort(x[1][:TRAIN_ROWS], axis=0))
    assert np.array_equal(held_out[0][1], x[1][-HELD_OUT_ROWS:])


def test_every_kind_is_there():
    assert len(CASES) > 45
    assert [case.name for case in CASES if case.random], "some draw random numbers"
    for module in ("vision", "tabular", "sequence", "text", "generative", "metric_learning", "losses", "layers", "hub"):
        assert importlib.import_module(f"tests.conformance.models.{module}").CASES


def more_targets():
    return tabular.houses(lambda price, sold: {"price": price, "sold": sold, "garden": price})


def row_weights_beside_steps():
    x, y = text.tags()
    return x, y, toy_data.rng(0).random(ROWS)


def weights_twice():
    x, y = tabular.rare_class_data()
    return x, y, toy_data.rng(1).random(ROWS)


REFUSED = [
    (
        Case(
            "class_weights_and_sample_weights",
            tabular.mlp("classifier", 6, 2),
            weights_twice,
            text.SPARSE,
            class_weight={0: 1.0, 1: 3.0},
        ),
        "at the same time",
    ),
    (
        Case("more_targets_than_outputs", tabular.outputs_dict, more_targets, tabular.HOUSE_LOSSES),
        "different structures",
    ),
    (
        Case("row_weights", text.unmasked_tagger, row_weights_beside_steps, lambda: "sparse_categorical_crossentropy"),
        "shapes",
    ),
    (Case("row_weights_and_mask", text.lstm_tagger, row_weights_beside_steps, text.SPARSE), "shapes"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "words"), REFUSED, ids=[case.name for case, _ in REFUSED])
def test_keras_refuses(case, words):
    with pytest.raises(Exception, match=words):
        reference_of(case)
