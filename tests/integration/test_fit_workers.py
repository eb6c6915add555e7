"""`model.fit` on several workers, each on its own part of the data, against plain Keras on one device."""

import functools
import subprocess
import sys

import numpy as np
import pytest

from tests import ROOT
from tests.helpers.fit_common import BATCH, X
from tests.helpers.fit_inputs import MOMENTUM
from tests.helpers.fit_workers import LEVELS, SCENARIOS
from tests.helpers.shared import once
from tests.helpers.workers import assert_all_end, run_workers

pytestmark = pytest.mark.slow
MODULE = ["-m", "tests.helpers.fit_workers"]
# Of scenarios in float64 it is 1e-9; Keras has LoRA's factors in float32.
TOLERANCES = {"lora": 1e-6, "half": 1e-2}
# What depends on how many workers there are runs on three of them, too.
NAMES = {2: [*SCENARIOS], 3: ["everything", "selection", "split", "batch_norm", "dropout"]}
COUNTS = pytest.mark.parametrize("count", NAMES)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Where plain Keras ends on one device, by scenario."""
    names = [*SCENARIOS, "all_reduce"]

    def make(folder):
        command = [sys.executable, *MODULE, str(folder), "1", *names]
        subprocess.run(command, cwd=ROOT, check=True, timeout=300)

    folder = once(tmp_path_factory, "fit-one", make)
    return {name: dict(np.load(folder / f"{name}-1-0.npz")) for name in names}


def of_workers(factory, count, replicas, names):
    """Where workers end, by scenario: of each."""

    def make(folder):
        assert_all_end(run_workers([*MODULE, str(folder), str(replicas), *names], workers=count, timeout=400))

    folder = once(factory, f"fit-{count}-{replicas}", make)
    return {name: [dict(np.load(folder / f"{name}-{count}-{rank}.npz")) for rank in range(count)] for name in names}


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Where workers of one replica each end; one start serves all scenarios."""
    runs = {2: [*NAMES[2], *LEVELS], 3: NAMES[3]}

    @functools.cache
    def run(count):
        try:
            return of_workers(tmp_path_factory, count, 1, runs[count])
        except AssertionError as error:  # which no other test is to wait for again
            return error

    def found(count):
        if isinstance(run(count), AssertionError):
            raise run(count)
        return run(count)

    return found


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    """Where two workers of two replicas each end."""
    return of_workers(tmp_path_factory, 2, 2, LEVELS)


@pytest.mark.parametrize(("count", "name"), [(count, name) for count, names in NAMES.items() for name in names])
def test_workers_end_where_one_device_does(one, several, count, name):
    """The weights, and what every metric and callback has read."""
    tolerance, ends = TOLERANCES.get(name, 1e-9), several(count)[name]
    for rank, found in enumerate(ends):
        assert found.keys() >= {key for key in one[name] if not key.startswith("saved_")}
        for key, value in found.items():
            where = f"{key} of {rank}"
            if key in one[name]:
                np.testing.assert_allclose(value, one[name][key], rtol=tolerance, atol=tolerance, err_msg=where)
            assert key.startswith("own_") or value.tobytes() == ends[0][key].tobytes(), where


@COUNTS
def test_one_worker_saves(several, count):
    """Though each has given its callbacks a file of its own."""
    files = [found["own_files"].tolist() for found in several(count)["everything"]]
    assert files == [[True, True]] + [[False, False]] * (count - 1)


def test_a_step_that_overflows_on_one_worker_is_skipped_by_all(several):
    for found in several(2)["half"]:
        assert (found["scale_1"], found["scale_2"]) == (2.0**13, 2)  # two of four steps


def test_the_state_of_the_optimizer_is_the_first_workers(several):
    for found in several(2)["restored"]:
        assert (found["scale"], found["at"]) == (16, 1)
        assert not found["sums"].any()  # which no worker has saved


@COUNTS
def test_random_seeds_stay_each_workers_own(several, count):
    states = [found["own_seed"].tobytes() for found in several(count)["dropout"]]
    assert len(set(states)) == len(states)


@COUNTS
def test_an_epoch_waits_for_few_messages(several, count):
    """With validation, several metrics and BatchNorm."""
    assert several(count)["batch_norm"][0]["messages"].tolist() == [10, 10]


@COUNTS
def test_what_batch_norm_keeps_is_the_mean_of_what_each_worker_would_keep(several, count):
    kept = []
    for rank in range(count):
        mean, variance = np.zeros(6), np.ones(6)
        own = X[rank::count]
        for _ in range(3):
            for start in range(0, len(own), BATCH // count):
                batch = own[start : start + BATCH // count]
                mean = MOMENTUM * mean + (1 - MOMENTUM) * batch.mean(0)
                variance = MOMENTUM * variance + (1 - MOMENTUM) * batch.var(0)
        kept.append([mean, variance])
    found = several(count)["batch_norm"][0]
    np.testing.assert_allclose([found["weight_2"], found["weight_3"]], np.mean(kept, axis=0), rtol=1e-9)


def test_two_levels_end_where_one_device_does(one, levels):
    for found in levels["all_reduce"]:
        for key, value in found.items():
            np.testing.assert_allclose(value, one["all_reduce"][key], rtol=1e-10, atol=1e-10, err_msg=key)


@pytest.mark.parametrize("name", LEVELS)
def test_between_hosts_a_worker_of_two_replicas_is_as_one_of_one(several, levels, name):
    for found in levels[name]:
        for key, value in found.items():
            np.testing.assert_allclose(value, several(2)[name][0][key], rtol=1e-9, atol=1e-9, err_msg=key)
            assert value.tobytes() == levels[name][0][key].tobytes(), key


@pytest.mark.parametrize("name", sorted(LEVELS.keys() - {"all_reduce"}))
def test_fewer_bits_reach_the_weights(levels, name):
    assert any((levels[name][0][key] != value).any() for key, value in levels["all_reduce"][0].items())
