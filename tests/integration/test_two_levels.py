"""Workers of several replicas: summed inside in every step, and between the workers by a reduction of its own."""

import numpy as np
import pytest

from tests.helpers.shared import once
from tests.helpers.snippets import page_module
from tests.helpers.worker_levels import BATCH, FIRST, MOMENTUM, RATE, REDUCTIONS, STEPS, X, Y
from tests.helpers.workers import assert_all_end, run_workers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What 2 workers end with, by replicas of each, reduction and worker."""
    ends = {}
    for cpu in (1, 2):

        def make(folder, cpu=cpu):
            command = ["-m", "tests.helpers.worker_levels", str(cpu), str(folder)]
            assert_all_end(run_workers(command, workers=2, timeout=300))

        folder = once(tmp_path_factory, f"levels-{cpu}", make)
        for name in REDUCTIONS:
            for worker in (0, 1):
                ends[cpu, name, worker] = dict(np.load(folder / f"{name}-{worker}.npz"))
    return ends


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_worker_of_two_replicas_is_as_one_of_one(found, name):
    """The same training and the same bytes, whatever the replicas that a worker's batch is divided among."""
    for worker in (0, 1):
        one, two = found[1, name, worker], found[2, name, worker]
        assert one.keys() == two.keys()
        for key, value in two.items():
            assert value.shape == one[key].shape, key
            np.testing.assert_allclose(value, one[key], rtol=1e-9, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_both_workers_end_alike(found, name):
    for key, value in found[2, name, 0].items():
        assert value.tobytes() == found[2, name, 1][key].tobytes(), key


@pytest.mark.parametrize("cpu", [1, 2])
def test_what_a_rule_names_counts_for_it(found, cpu):
    """And not what the run has for the others."""
    for worker in (0, 1):
        for key, value in found[cpu, "quantized", worker].items():
            assert value.tobytes() == found[cpu, "of_a_rule", worker][key].tobytes(), key


def test_a_backend_of_ones_own(found, tmp_path):
    """That of the documentation ends with the bits of the connections."""
    page_module("explanation/collectives.md", "shared_folder", tmp_path)
    command = ["-m", "tests.helpers.worker_levels", "2", str(tmp_path), "shared_folder"]
    assert_all_end(run_workers(command, workers=2, timeout=300, pythonpath=tmp_path))
    for name in REDUCTIONS:
        for worker in (0, 1):
            ends = dict(np.load(tmp_path / f"{name}-{worker}.npz"))
            assert ends.keys() == found[2, name, worker].keys()
            for key, value in found[2, name, worker].items():
                assert value.tobytes() == ends[key].tobytes(), (name, key)


def descended(kernel, rows):
    """One step of SGD by the mean squared error of some rows, in NumPy."""
    x, y = X[rows], Y[rows]
    return kernel - RATE * 2 * x.T @ (x @ kernel - y) / y.size


def test_every_step_on_both_levels_is_one_device(found):
    kernel = FIRST
    for step in range(STEPS):
        kernel = descended(kernel, slice(step * BATCH, (step + 1) * BATCH))
    np.testing.assert_allclose(found[2, "all_reduce", 0]["variables/head/kernel"], kernel, rtol=1e-10)


def test_local_sgd_between_the_workers(found):
    anchor = FIRST
    own = [FIRST, FIRST]
    for step in range(STEPS):
        for worker in (0, 1):
            first = step * BATCH + worker * BATCH // 2
            own[worker] = descended(own[worker], slice(first, first + BATCH // 2))
        if (step + 1) % 3 == 0:
            anchor = np.mean(own, axis=0)
            own = [anchor, anchor]
    np.testing.assert_allclose(found[2, "local_sgd", 1]["variables/head/kernel"], anchor, rtol=1e-10)
    np.testing.assert_allclose(found[2, "local_sgd", 1]["own/head/kernel"], own, rtol=1e-10)


def test_each_worker_trains_a_layer_of_its_own(found):
    """The first worker's replicas together train the first layer, and those of the second the last."""
    kernels, own, velocity = [FIRST, np.eye(3)], [FIRST, np.eye(3)], [0.0, 0.0]
    for step in range(STEPS):
        for worker in (0, 1):
            first = step * BATCH + worker * BATCH // 2
            x, y = (values[first : first + BATCH // 2] for values in (X, Y))
            head, tail = (own[k] if k == worker else kernels[k] for k in (0, 1))
            error = 2 * (x @ head @ tail - y) / y.size
            gradient = x.T @ error @ tail.T if worker == 0 else (x @ head).T @ error
            velocity[worker] = MOMENTUM * velocity[worker] - RATE * gradient
            own[worker] = own[worker] + velocity[worker]
        if (step + 1) % 3 == 0:
            kernels = list(own)
    for cpu in (1, 2):
        for k, layer in enumerate(("head", "tail")):
            ends = found[cpu, "block_parallel", 1]
            np.testing.assert_allclose(ends[f"variables/{layer}/kernel"], kernels[k], rtol=1e-10)
            np.testing.assert_allclose(ends[f"own/{layer}/kernel"][k], own[k], rtol=1e-10)
            np.testing.assert_allclose(ends[f"slots/{layer}/kernel/momentum"], velocity[k], rtol=1e-7)


def test_bytes_between_the_workers(found):
    """Of a sum a worker hands over one total, and of what is gathered one payload, whatever its replicas."""
    kernel = FIRST.size * 8
    assert found[2, "all_reduce", 0]["sent"] == kernel
    assert found[2, "bfloat16", 0]["sent"] == kernel / 4
    assert found[2, "quantized", 0]["sent"] < kernel / 4
    assert found[2, "local_sgd", 0]["sent"] == 0 and found[2, "local_sgd", 0]["exchanged"] == kernel
