"""Two MultiWorker processes on loopback end where one device ends, with the same bits on both."""

import numpy as np
import pytest

from tests import cases
from tests.workers import run_workers


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10)])
def test_two_workers_equal_one_device(dtype, tolerance, tmp_path):
    results = run_workers(["-m", "tests.worker_train", str(tmp_path), dtype], workers=2, timeout=240)
    for code, output in results:
        assert code == 0, output[-3000:]
    cases.set_precision(dtype)
    for name, case in cases.CASES.items():
        first, second = (dict(np.load(tmp_path / f"{name}-{index}.npz")) for index in (0, 1))
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert value.tobytes() == second[key].tobytes(), (name, key)
        expected = cases.reference(case, "adam", cases.OPTIONS["clip"], dtype)
        cases.assert_equal({key: first[key] for key in expected}, expected, tolerance)
