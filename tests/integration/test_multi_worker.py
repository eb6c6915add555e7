"""Two MultiWorker processes on loopback end where one device ends, with the same bits on both."""

import numpy as np
import pytest

from tests.helpers import cases
from tests.helpers.shared import once
from tests.helpers.workers import assert_all_end, run_workers

pytestmark = pytest.mark.slow


def references(factory, dtype):
    """Where one device ends, by case: the same for all transports."""

    def make(folder):
        cases.set_precision(dtype)
        for name, optimizer, option in cases.ROTATION:
            found = cases.reference(cases.CASES[name], optimizer, cases.OPTIONS[option], dtype)
            np.savez(folder / f"{name}.npz", **found)

    folder = once(factory, f"multi-worker-{dtype}", make)
    return {name: dict(np.load(folder / f"{name}.npz")) for name, *_ in cases.ROTATION}


@pytest.mark.parametrize(
    ("transport", "cpu", "dtypes"),
    [
        ("sockets", 1, ["float64", "float32"]),
        ("sockets", 2, ["float64"]),
        ("tensorflow", 1, ["float64"]),
        ("tensorflow", 2, ["float64"]),
    ],
)
def test_two_workers_equal_one_device(transport, cpu, dtypes, tmp_path, tmp_path_factory):
    command = ["-m", "tests.helpers.worker_train", transport, str(cpu), str(tmp_path), *dtypes]
    assert_all_end(run_workers(command, workers=2, timeout=400))
    for dtype in dtypes:
        tolerance = {"float64": 1e-10, "float32": 1e-5}[dtype]
        for name, expected in references(tmp_path_factory, dtype).items():
            first, second = (dict(np.load(tmp_path / f"{dtype}-{name}-{index}.npz")) for index in (0, 1))
            assert first.keys() == second.keys()
            for key, value in first.items():
                assert value.tobytes() == second[key].tobytes(), (name, key)
            cases.assert_equal({key: first[key] for key in expected}, expected, tolerance)
