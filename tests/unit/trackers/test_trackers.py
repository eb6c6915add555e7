"""Each tracker is read back by its own library."""

import contextlib
import math
import os
import pathlib
import struct
import subprocess
import sys
import time
import urllib.request

import pytest

from dist_partial.errors import UserError
from dist_partial.trackers import Following, MLflow, Prometheus, Row, Trackio, WandB, base
from tests.helpers.mlflow_store import store

ROWS = [
    Row(1, {"train/loss": 2.5, "train/gradient_norm": 1.0}),
    Row(2, {"train/loss": math.inf}),
    Row(2, {"eval/loss": 2.0}),
]


def told(tracker, folder, rows=ROWS):
    said = []
    folder.mkdir(exist_ok=True)
    with Following([tracker], folder, said.append, seconds=90) as following:
        following.log(rows)
        following.text("plan.txt", "a <plan>", 0)
        following.text("sample_0.txt", "def f", 2)
    assert said == []


@pytest.mark.slow
def test_mlflow(tmp_path):
    uri, client = store(tmp_path, "tests")
    tracker = MLflow(uri, "tests")
    told(tracker, tmp_path / "mine")
    told(MLflow(uri, "tests"), tmp_path / "mine", [Row(3, {"train/loss": 1.5})])  # goes on
    [run] = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert run.info.run_name == "mine" and run.info.status == "FINISHED"
    history = [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "train/loss")]
    assert history[0] == (1, 2.5) and history[1][1] > 1e300 and history[2] == (3, 1.5)
    assert [each.value for each in client.get_metric_history(run.info.run_id, "eval/loss")] == [2.0]
    assert {each.path for each in client.list_artifacts(run.info.run_id)} == {"plan.txt", "step_2"}


def records(file):
    """Of wandb's file: a header of 7 bytes, then LevelDB's log, blocks of 32 KiB of pieces of records."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (rest := 2**15 - place % 2**15) < 7:  # the end of a block is filled
            place += rest
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # all of it, or its last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def written_to_the_end(file):
    """The records, once wandb's own process has written how the run ended: `finish` does not always wait for it."""
    from google.protobuf.message import DecodeError

    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(DecodeError):  # of half a record
            found = list(records(file))
            if any(record.WhichOneof("record_type") == "exit" for record in found):
                return found
        time.sleep(0.1)
    raise AssertionError("wandb does not write the end")


@pytest.mark.slow
def test_wandb(tmp_path):
    told(WandB("tests"), tmp_path / "mine")
    [file] = (tmp_path / "mine" / "wandb").glob("offline-run-*/*.wandb")
    found = written_to_the_end(file)
    history = [
        {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item} for record in found
    ]
    losses = [(row["step"], row["train/loss"]) for row in history if "train/loss" in row]
    assert [step for step, _ in losses] == ["1", "2"] and losses[0][1] == "2.5" and "Inf" in losses[1][1]
    assert [float(row["eval/loss"]) for row in history if "eval/loss" in row] == [2.0]
    assert {name.split(".")[0] for row in history for name in row} >= {"texts/plan", "texts/sample_0"}
    [run] = [record.run for record in found if record.run.run_id]
    assert (run.project, run.display_name) == ("tests", "mine")
    assert [record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"] == [0]


@pytest.mark.slow
def test_trackio(tmp_path):
    """In a process of its own: the folder of its store is chosen at import."""
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(pathlib.Path(__file__).parents[3])!r})
from tests.unit.trackers.test_trackers import told
from dist_partial.trackers import Row, Trackio
folder = pathlib.Path({str(tmp_path / "mine")!r})
told(Trackio("tests"), folder)
told(Trackio("tests"), folder, [Row(3, {{"train/loss": 1.5}})])
from trackio.sqlite_storage import SQLiteStorage
assert SQLiteStorage.get_runs("tests") == ["mine"], SQLiteStorage.get_runs("tests")
print([(row["step"], row["train/loss"]) for row in SQLiteStorage.get_logs("tests", "mine") if "train/loss" in row])
"""
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "store"), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[(1, 2.5), (2, inf), (3, 1.5)]"


def test_prometheus(tmp_path):
    tracker = Prometheus(port=0)
    served = []

    class Reading(Prometheus):
        def end(self, outcome):
            with urllib.request.urlopen(f"http://127.0.0.1:{self.served}/metrics", timeout=10) as answer:
                served.append(answer.read().decode())
            super().end(outcome)

    told(Reading(port=0), tmp_path / "mine")
    lines = served[0].splitlines()
    assert "dist_partial_train_loss +Inf" in lines and "dist_partial_eval_loss 2.0" in lines
    assert "dist_partial_step 2.0" in lines
    with pytest.raises(UserError, match=r"Prometheus\.port is 70000"):
        Prometheus(port=70000)
    assert tracker.address == "127.0.0.1"


def test_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    for kind, extra in [(MLflow, "mlflow"), (WandB, "wandb"), (Trackio, "trackio"), (Prometheus, "prometheus")]:
        with pytest.raises(UserError, match=rf"not installed: pip install 'dist_partial\[{extra}\]'"):
            kind()


def test_a_mistake_of_mode():
    with pytest.raises(UserError, match=r"WandB\.mode is 'ofline': write 'offline' or 'online'"):
        WandB(mode="ofline")
