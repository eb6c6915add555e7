"""Workers that are left stay where another is lost, and go on from the same step: real trainings by the launcher."""

import contextlib
import csv
import json
import os
import random
import re
import signal
import sys
import time
from itertools import pairwise

import pytest

from dist_partial import checkpoints
from tests import faults

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found by way of /proc"),
]

STEPS = 200
PARAMS = (f"run.steps = {STEPS}", "run.eval_every = 50", "replicas.patience_seconds = 3")


@contextlib.contextmanager
def launched(folder, *params, **options):
    launch = faults.Launch(folder, params=[*PARAMS, *params], **options)
    try:
        yield launch
    finally:
        launch.kill()


def undisturbed(folder, *params, **options):
    folder.mkdir()
    with launched(folder, *params, **options) as launch:
        return launch.end(STEPS)


def reach(launch, step):
    launch.wait(lambda: launch.progress()[1] >= step and len(launch.members()) == launch.workers, f"for step {step}")


def faults_of(launch):
    rows = [json.loads(line) for line in (launch.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "fault"]


# Slots come and go, and what is trained now is in no gradient of before.
SCHEDULE = (
    "run.schedule = @block_rotation()",
    "block_rotation.every = 40",
    "run.leave = 'reset'",
    "run.steps_per_loop = 1",
)


def test_a_run_that_loses_workers_ends_with_the_same_bits(tmp_path):
    expected = undisturbed(tmp_path / "whole", *SCHEDULE)
    with launched(tmp_path, *SCHEDULE, way="spare") as launch:
        reach(launch, 20)
        os.kill(launch.chief(), signal.SIGKILL)  # while the spare is not there yet
        launch.wait(lambda: launch.log.read_text().count("all go on from step") == 1, "for the first")
        launch.crawl.touch()  # a spare takes longer to start than the run takes
        launch.wait(launch.ready, "for a spare")
        launch.crawl.unlink()
        reach(launch, launch.progress()[1] + 10)
        stopped = random.Random(0).choice(launch.members())
        os.kill(stopped, signal.SIGSTOP)
        launch.wait(lambda: launch.log.read_text().count("all go on from step") == 2, "for the second")
        faults.compare(expected, launch.end(STEPS))
        text = launch.log.read_text()
        assert "restart 1 of" not in text and "does not answer: it is stopped, or cut off" in text
        first, second = faults_of(launch)
    assert first["workers"] == [0] and second["seconds"] > 3
    assert [first["step"], second["step"]] == [int(step) for step in re.findall(r"all go on from step (\d+)", text)]


TOP_K = ("run.reduction = @top_k()", "top_k.density = 0.1")


@pytest.mark.parametrize("buddy", [False, True])
def test_what_a_lost_worker_alone_had(tmp_path, buddy):
    """Residuals of the lost one start from zero, and a line says so; or the next worker has a copy of them."""
    params = [*TOP_K, f"replicas.buddy = {buddy}"]
    expected = undisturbed(tmp_path / "whole", *TOP_K, workers=2) if buddy else {}
    with launched(tmp_path, *params, workers=2) as launch:
        reach(launch, 20)
        os.kill(next(pid for pid in launch.members() if pid != launch.chief()), signal.SIGKILL)
        computed = launch.end(STEPS)
        lines = launch.log.read_text().splitlines()
        copied = json.loads((launch.run_dir / "traffic.json").read_text())["copied_bytes"]
    said = "[0] worker 1 is another: its residuals, what it had not sent yet, start from zero"
    assert (said in lines) == (not buddy)
    assert any(line.startswith("[0] goodput: ") and "1 interruption" in line for line in lines)
    if buddy:
        faults.compare(expected, computed)
        assert copied % (4 * 71_936) == 0 and copied > 0  # float32 of all that is trained, each call
    assert [step for split, step, _ in computed["metrics"] if split == "train"] == list(range(1, STEPS + 1))


def test_ctrl_c_while_workers_wait_for_another(tmp_path):
    with launched(tmp_path, workers=2) as launch:
        reach(launch, 20)
        os.kill(launch.members()[1], signal.SIGKILL)
        launch.wait(lambda: "another starts" in launch.log.read_text(), "for the loss")
        time.sleep(0.5)
        launch.process.send_signal(signal.SIGINT)
        assert launch.process.wait(30) == 130, launch.tail()
        assert not launch.processes()


def test_others_go_on_with_fewer_and_take_one_that_comes_later(tmp_path):
    """As a run does that is stopped twice, and goes on with other numbers of workers."""
    folder = tmp_path / "apart"
    folder.mkdir()
    writers = (
        "run.callbacks = [@CSVLogger(), @ModelCheckpoint()]",
        f"CSVLogger.filename = '{folder}/log.csv'",
        f"ModelCheckpoint.filepath = '{folder}/best.weights.h5'",
        "ModelCheckpoint.save_best_only = True",
        "ModelCheckpoint.save_weights_only = True",
    )
    with launched(folder, "replicas.rejoin_seconds = 3", *writers) as launch:
        launch.hold.touch()
        reach(launch, 60)
        os.kill(launch.chief(), signal.SIGKILL)
        launch.wait(lambda: launch.log.read_text().count("all go on from step") == 1, "for two of three")
        launch.crawl.touch()  # one that comes takes longer to start than the run takes
        launch.hold.unlink()
        launch.wait(lambda: "came: all meet" in launch.log.read_text(), "for the third")
        os.kill(launch.trainers()[0][0], signal.SIGKILL)
        launch.wait(lambda: faults_of(launch) and faults_of(launch)[-1].get("now") == 3, "for another third")
        launch.crawl.unlink()
        computed = launch.end(STEPS)
        text, faults_ = launch.log.read_text(), faults_of(launch)
        held_out = [loss for split, _, loss in computed["metrics"] if split == "eval"]
        judged = checkpoints.newest(launch.run_dir / "checkpoints", print).metadata["judged"]
    # Another worker has become the first, and does what the first would have done.
    assert [float(row["val_loss"]) for row in csv.DictReader((folder / "log.csv").open())] == held_out
    (_, checkpoint) = judged["callbacks"]
    assert len(held_out) == 4 and checkpoint[1]["best"] == pytest.approx(min(held_out))
    assert "restart 1 of" not in text
    assert "nobody has come in place of worker 0: the others go on, 2 of 3" in text
    assert "worker 0 came: all meet, 3 of 3" in text
    steps = [int(step) for step in re.findall(r"all go on from step (\d+)", text)]
    assert [row["step"] for row in faults_] == steps and faults_[0]["workers"] == [0]
    # Where three have not met before one of them is lost, the two have nothing to build again.
    counts = [3, *(row.get("now", 2) for row in faults_)]
    assert counts in ([3, 2, 2, 3], [3, 2, 3])
    expected = {}
    for count, (begin, end) in zip(counts, pairwise([0, *steps, STEPS]), strict=True):
        if begin < end:
            with launched(tmp_path, f"run.steps = {end}", workers=count) as launch:
                expected = launch.end(end)
    # Those that were stopped have evaluated at their ends as well.
    for each in (expected, computed):
        each["metrics"] = [row for row in each["metrics"] if row[0] == "train"]
    faults.compare(expected, computed)
