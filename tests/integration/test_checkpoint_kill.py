"""Checkpoints outlive the process that writes them, whenever it is killed."""

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dist_partial import checkpoints
from dist_partial.files import write_text
from tests import ROOT
from tests.helpers.files import durable

KILLS = 50
KEEP = 2
BASE = np.random.default_rng(0).integers(0, 2**30, 6 * 10**6).astype(np.int32)  # 24 MB


def content(step: int) -> dict[str, np.ndarray]:
    """Arrays of which every element says which step it is of."""
    return {"variables/a": BASE + step, "variables/b": np.array([step / 3]), "slots/a/m": BASE[: 10**6] - step}


def check(found: checkpoints.Checkpoint) -> None:
    """Whether it holds exactly what was saved at its step."""
    expected = content(found.step)
    assert found.arrays.keys() == expected.keys(), found.arrays.keys()
    for name, array in expected.items():
        assert found.arrays[name].dtype == array.dtype and np.array_equal(found.arrays[name], array), name
    assert found.metadata == {"step": found.step, "tag": f"of {found.step}"}


def save_on(folder: Path, report: int) -> None:
    """Saves the steps after the newest one, for ever; writes that it begins, and each that is saved, to `report`."""
    found = checkpoints.newest(folder, print)
    step = found.step if found else 0
    os.write(report, b"\n")
    while True:
        step += 1
        checkpoints.save(folder, step, content(step), {"tag": f"of {step}"}, KEEP)
        left = list(folder.glob(".partial-*"))
        os.write(report, f"{step} {len(left)} {len(list(folder.iterdir()))}\n".encode())


def kill_one(folder: Path, seconds: float) -> tuple[list[list[int]], bool]:
    """Has a new process save, and kills it so many seconds after it has begun.

    Returns:
        What it has reported: step, and how many leftovers and files there were after it was saved; and whether it was
        killed in the middle of a write.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            save_on(folder, writing)
        finally:
            os._exit(1)
    os.close(writing)
    assert os.read(reading, 1) == b"\n"
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it has ended by itself"
    text = b""
    while select.select([reading], [], [], 0)[0] and (data := os.read(reading, 2**16)):
        text += data
    os.close(reading)
    in_a_write = any(f"-{child}-" in path.name for path in folder.glob(".partial-*"))
    return [[int(word) for word in line.split()] for line in text.decode().splitlines()], in_a_write


def main(folder: Path, seed: int) -> dict[str, int]:
    """Kills as many processes as `KILLS`, and checks what each has left."""
    generator = random.Random(seed)
    for step in (1, 2):
        start = time.monotonic()
        checkpoints.save(folder, step, content(step), {"tag": f"of {step}"}, KEEP)
        one = time.monotonic() - start  # seconds
    saved, in_a_write, later, damaged = 2, 0, 0, []
    for _ in range(KILLS):
        reports, cut = kill_one(folder, generator.uniform(0, 3) * one)  # in one of its first checkpoints
        in_a_write += cut
        for step, leftovers, files in reports:
            assert step == saved + 1, f"step {step} follows {saved}"
            assert leftovers == 0 and files <= KEEP, "what a killed write has left stays"
            saved = step
        found = checkpoints.newest(folder, damaged.append)
        assert found is not None and not damaged, damaged
        check(found)
        # It may have been killed between the last byte and its report.
        assert saved <= found.step <= saved + 1, f"newest is {found.step}, but {saved} was saved"
        later += found.step > saved
        saved = found.step
    return {"in a write": in_a_write, "saved and not reported": later, "steps": saved}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_run_that_is_killed_while_it_saves_always_goes_on(tmp_path):
    # In a process of its own, whose children are forks of one that has imported everything and has no threads.
    command = [sys.executable, "-m", "tests.integration.test_checkpoint_kill", str(tmp_path / "checkpoints"), "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["in a write"] >= KILLS // 5 and counts["steps"] >= KILLS // 3, counts


def test_what_a_name_leads_to_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """Or a host that loses its power could keep the name, and nothing behind it."""
    calls = durable(monkeypatch)
    write_text(tmp_path / "name.json", "content")
    assert calls == [
        ("fsync", f".partial-{os.getpid()}-name.json", b"content"),
        ("replace", "name.json", b""),
        ("fsync", tmp_path.name, b""),
    ]


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 5, 10])
def test_as_many_are_kept_as_were_asked_for(keep, tmp_path):
    for step in range(1, 14):
        checkpoints.save(tmp_path, step, {"a": np.zeros(2)}, {}, keep)
        kept = sorted(int(path.stem[5:]) for path in tmp_path.iterdir())
        assert kept == list(range(1, 14))[max(0, step - keep) : step]


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
