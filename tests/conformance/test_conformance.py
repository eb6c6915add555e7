"""What the loop trains on two replicas is what Keras's `fit` trains on one device: weights, losses, evaluations."""

import keras
import numpy as np
import pytest

from dist_partial.errors import UserError
from tests.conformance import table
from tests.conformance.comparison import check_trained, difference, keras_of, trained
from tests.conformance.known import EXACT, KNOWN, PARTS, known
from tests.conformance.models import CASES
from tests.conformance.results import COLUMNS, KINDS, as_known, load
from tests.helpers.marks import in_turns, quick
from tests.helpers.strategies import in_process

NAMED = {case.name: case for case in CASES}
EXACTLY = [case for case in CASES if not case.random]
RANDOM = [case for case in CASES if case.random]
QUICK = [
    NAMED[name]
    for name in (
        "nested_outputs",
        "class_weights",
        "reduction_by_weights",
        "text_averaged_embedding",
        "added_loss_alone",
        "frozen_base",
    )
]


@pytest.fixture(autouse=True)
def forgets():
    yield
    keras.utils.clear_session()  # else the graphs of all cases stay


def needed(case):
    if case.needs:
        pytest.importorskip(case.needs)


@pytest.mark.parametrize("case", in_turns(quick(EXACTLY, *QUICK)), ids=repr)
def test_equals_keras(case, replicas=2):
    needed(case)
    different = known(case.name, replicas)
    if different and different.refused:
        with pytest.raises(UserError, match=different.refused):
            trained(case, lambda: in_process(replicas))
        check_trained(keras_of(case))
        return
    reference = keras_of(case)
    check_trained(reference)
    far = difference(trained(case, lambda: in_process(replicas)), reference)
    differs = different.differs if different else ()
    for part in PARTS:
        assert getattr(far, part) <= (different.within if part in differs else EXACT), (part, far)
    if different:
        assert max(getattr(far, part) for part in differs) > EXACT, f"no longer so: {different.reason}"


def test_held_out_rows_that_do_not_divide():
    """Three replicas read 4, 4 and 2 of 10; a metric of one number a batch counts them by these."""
    case = NAMED["outputs_dict"]
    far = difference(trained(case, lambda: in_process(3)), keras_of(case))
    assert max(far.weights, far.losses, far.evaluations) <= EXACT, far


@pytest.mark.slow
@pytest.mark.parametrize("case", RANDOM, ids=repr)
def test_random_numbers_are_the_same_again(case):
    needed(case)
    first, second = (trained(case, lambda: in_process(2)) for _ in range(2))
    assert first.weights.keys() == second.weights.keys()
    for path, weight in first.weights.items():
        assert weight.tobytes() == second.weights[path].tobytes(), path
    assert first.losses == second.losses
    assert {name: np.asarray(value).tobytes() for name, value in first.evaluation.items()} == {
        name: np.asarray(value).tobytes() for name, value in second.evaluation.items()
    }


@pytest.mark.slow
def test_workers():
    asked = [(name, "2 workers") for name in ("optimizer_adam_accumulates", "outputs_dict", "tagger_masked")]
    results = list(table.run(2, asked, seconds=120))
    assert [pair for *pair, _ in results] == [list(pair) for pair in asked]
    for name, column, row in results:
        assert as_known(name, column, row), (name, row)


def test_results_are_as_they_are_known():
    found = load()
    assert found.keys() == {case.name for case in EXACTLY}, "run python -m tests.conformance.table"
    for name, case in found.items():
        assert case["kind"] in KINDS and case["results"].keys() == COLUMNS.keys()
        for column, row in case["results"].items():
            assert as_known(name, column, row), (name, column, row)


def test_what_is_known_are_cases():
    assert KNOWN.keys() <= {case.name for case in EXACTLY}
