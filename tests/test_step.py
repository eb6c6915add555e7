"""The step ends where a plain Keras loop on one device ends, on any number of replicas, and moves nothing else."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial import optimizers, reduction, selection, step
from dist_partial.loss_scale import FIRST_SCALE, LossScale
from tests import cases
from tests.cases import CASES, OPTIMIZERS, OPTIONS, STEPS

reference = functools.cache(
    lambda case, name, options, dtype: cases.reference(CASES[case], name, OPTIONS[options], dtype)
)

# Every pair of (optimizer, option), (replicas, optimizer) and (replicas, option) comes up.
COVERING = [
    (replicas, list(OPTIMIZERS)[(i + replicas) % 3], option)
    for replicas in (1, 2, 3, 4)
    for i, option in enumerate(OPTIONS)
]


def _check(trained: cases.Trained, case: cases.Case) -> None:
    cases.assert_replicas_agree(trained)
    cases.assert_nothing_else_moved(trained)
    many = trained.strategy.num_replicas_in_sync > 1
    itemsize = np.dtype(keras.config.floatx()).itemsize
    assert trained.bytes_per_step == (trained.plan.wire_bytes + case.statistics_bytes(itemsize) if many else 0)
    assert all(c.in_loop for c in trained.collectives)


@pytest.mark.parametrize(("replicas", "optimizer", "option"), COVERING)
def test_two_dense_equals_one_device(replicas, optimizer, option, mirrored):
    cases.set_precision("float64")
    case = CASES["two_dense"]
    trained = cases.train(mirrored(replicas), case, optimizer, OPTIONS[option])
    cases.assert_equal(trained.after, reference("two_dense", optimizer, option, "float64"), 1e-10)
    _check(trained, case)


@pytest.mark.parametrize("name", [name for name in CASES if name != "two_dense"])
@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_models_equal_one_device(name, replicas, mirrored):
    cases.set_precision("float64")
    case = CASES[name]
    # Batch statistics of a part of a batch are not those of the whole.
    option = "clip" if name == "batch_norm_synchronised" else ["all", "plain", "clip", "accumulate"][replicas - 1]
    optimizer = list(OPTIMIZERS)[replicas % 3]
    trained = cases.train(mirrored(replicas), case, optimizer, OPTIONS[option])
    cases.assert_equal(trained.after, reference(name, optimizer, option, "float64"), 1e-10)
    _check(trained, case)


@pytest.mark.parametrize("name", CASES)
def test_float32(name, mirrored):
    cases.set_precision("float32")
    case = CASES[name]
    trained = cases.train(mirrored(2), case, "momentum", OPTIONS["clip"], dtype="float32")
    cases.assert_equal(trained.after, reference(name, "momentum", "clip", "float32"), 1e-5)
    _check(trained, case)
