"""The command that tries what a training needs on the machine at hand."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from dist_partial import selfcheck
from tests import ROOT


def command(*arguments):
    ended = subprocess.run(
        [sys.executable, "-m", "dist_partial.selfcheck", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 3])
def test_all_passes_here(tmp_path, replicas):
    code, out, error = command(f"--replicas={replicas}", f"--output={tmp_path / 'found.json'}")
    assert (code, error) == (0, ""), (out, error)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["outcome"] for row in found["checks"]] == ["passed"] * 14
    assert out.splitlines()[-1] == "14 of 14 passed" and f"{replicas} simulated on the CPU" in out
    assert found["devices"] == ["CPU"] and found["versions"]["keras"].startswith("3.")


def test_what_is_wrong_fails(monkeypatch):
    """Each comparison notices a difference."""
    on = selfcheck.devices(1)
    right = selfcheck.trained

    def wrong(on, **settings):
        found = right(on, **settings)
        steps = settings.get("steps", selfcheck.STEPS)
        found.model.set_weights([np.asarray(each) + 1e-9 * steps for each in found.model.get_weights()])
        return found

    monkeypatch.setattr(selfcheck, "trained", wrong)
    row = selfcheck.tried("equal to NumPy", lambda: selfcheck.equal_to_numpy(on))
    assert row["outcome"] == "failed" and row["detail"].startswith("weights differ by ")
    calls = []

    def other(on, **settings):
        calls.append(settings)
        return right(on, **settings | ({"seed": 5, "optimizer": "adam"} if len(calls) == 1 else {}))

    monkeypatch.setattr(selfcheck, "trained", other)
    row = selfcheck.tried("going on", lambda: selfcheck.going_on(on))
    assert (row["outcome"], row["detail"]) == ("failed", "a run that was stopped ends with other weights")


def test_batches_on_the_gpu_are_compared_where_there_is_one(monkeypatch):
    """A CPU device is in place of it."""
    assert "prefetch to the GPU" not in selfcheck.checks(selfcheck.devices(1))
    check = selfcheck.checks(selfcheck.Devices({"kind": "mirrored"}, 2, "2 logical GPUs of one"))["prefetch to the GPU"]
    assert selfcheck.tried("prefetch", check)["outcome"] == "failed"
    devices = tf.config.list_logical_devices
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: devices("CPU" if kind == "GPU" else kind))
    row = selfcheck.tried("prefetch", check)
    assert (row["outcome"], row["detail"]) == ("passed", "the same bits as without")


def test_mistakes_of_the_user(capsys):
    assert selfcheck.main(["--replicas=0"]) == 2
    assert "--replicas=0" in capsys.readouterr().err
