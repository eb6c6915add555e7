"""`model.fit` on several workers, each on its own part of the data, against plain Keras on one device."""

import subprocess
import sys

import numpy as np
import pytest

from tests import ROOT
from tests.helpers.fit_workers import SCENARIOS
from tests.helpers.workers import run_workers

pytestmark = pytest.mark.slow
MODULE = ["-m", "tests.helpers.fit_workers"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Where plain Keras ends on one device, by scenario."""
    folder = tmp_path_factory.mktemp("one")
    command = [sys.executable, *MODULE, str(folder), "1", *SCENARIOS]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    return {name: dict(np.load(folder / f"{name}-1-0.npz")) for name in SCENARIOS}


@pytest.fixture(scope="module", params=[2, 3])
def several(request, tmp_path_factory):
    """Where workers end, by scenario: of each."""
    folder, count = tmp_path_factory.mktemp("several"), request.param
    for code, output in run_workers([*MODULE, str(folder), "1", *SCENARIOS], workers=count, timeout=400):
        assert code == 0, output[-3000:]
    return {name: [dict(np.load(folder / f"{name}-{count}-{rank}.npz")) for rank in range(count)] for name in SCENARIOS}


@pytest.mark.parametrize("name", SCENARIOS)
def test_workers_end_where_one_device_does(one, several, name):
    """The weights, and what every metric and callback has read."""
    for rank, found in enumerate(several[name]):
        assert found.keys() >= {key for key in one[name] if not key.startswith("saved_")} - {"learning_rate"}
        for key, value in found.items():
            if key in one[name]:
                np.testing.assert_allclose(value, one[name][key], rtol=1e-9, atol=1e-9, err_msg=f"{key} of {rank}")
            assert value.tobytes() == several[name][0][key].tobytes(), f"{key} of {rank}"


def test_one_worker_saves(several):
    assert [any(key.startswith("saved_") for key in found) for found in several["everything"]] == [True] + [False] * (
        len(several["everything"]) - 1
    )
