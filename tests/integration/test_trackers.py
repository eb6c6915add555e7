"""Trackers of a whole run."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_partial.errors import AGAIN
from tests import ROOT
from tests.helpers.files import rows
from tests.helpers.letters import start
from tests.helpers.mlflow_store import store


@pytest.mark.slow
def test_mlflow_has_what_the_folder_has_and_goes_on(letters, tmp_path):
    folder, (uri, client) = tmp_path / "mine", store(tmp_path)
    params = ["run.trackers = [@MLflow()]", f"MLflow.uri = {uri!r}"]
    assert start(letters, folder, *params, "run.steps = 6") == 0
    assert start(letters, folder, *params) == 0
    [run] = client.search_runs([client.get_experiment_by_name("dist_partial").experiment_id])
    assert json.loads((folder / "trackers.json").read_text()) == {"MLflow": run.info.run_id}
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    for split in ("train", "eval"):
        history = [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, f"{split}/loss")]
        assert sorted(history) == [
            (r["step"], r["loss"]) for r in rows(folder / "metrics.jsonl") if r["split"] == split
        ]
    found = {each.path for each in client.list_artifacts(run.info.run_id)}
    assert found == {"operative_config.gin", "plan.txt", "step_6", "step_12"}
    plan = client.download_artifacts(run.info.run_id, "plan.txt", str(tmp_path))
    assert Path(plan).read_text() == (folder / "plan.txt").read_text()


@pytest.mark.slow
def test_a_tracker_costs_the_run_nothing(letters, tmp_path, capsys):
    """Of one that fails, one that calls sys.exit and one that hangs: the same bits as without."""
    module = tmp_path / "odd_trackers.py"
    module.write_text(
        "import sys, time\n"
        "from dist_partial.trackers import Tracker\n"
        "class Failing(Tracker):\n    def log(self, rows): raise ConnectionError('no route to host')\n"
        "class Leaving(Tracker):\n    def begin(self, folder, known): sys.exit('bye')\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        gin = tmp_path / "odd.gin"
        gin.write_text(f"include {str(letters)!r}\nimport odd_trackers\n")
        params = ["run.trackers = [@odd_trackers.Failing(), @odd_trackers.Leaving()]"]
        assert start(gin, tmp_path / "with", *params) == 0
    finally:
        sys.path.remove(str(tmp_path))
    said = capsys.readouterr().out
    assert "Failing gets nothing more: ConnectionError: no route to host" in said
    assert "Leaving gets nothing more: SystemExit: bye" in said
    assert start(letters, tmp_path / "without") == 0
    assert rows(tmp_path / "with" / "metrics.jsonl") == rows(tmp_path / "without" / "metrics.jsonl")


@pytest.mark.slow
def test_a_run_that_is_stopped_is_stopped_there_too(letters, tmp_path):
    folder, (uri, client) = tmp_path / "mine", store(tmp_path)
    command = [sys.executable, "-m", "dist_partial.train", f"--gin_file={letters}", f"--run_dir={folder}"]
    params = ["run.trackers = [@MLflow()]", f"MLflow.uri = {uri!r}", "run.steps = 1000000", "run.save_every = None"]
    params += ["run.eval_every = None"]
    running = subprocess.Popen([*command, *(f"--gin_param={each}" for each in params)], cwd=ROOT, text=True)
    try:
        until = time.monotonic() + 120
        while not (folder / "trackers.json").exists() and time.monotonic() < until:
            time.sleep(0.2)
        time.sleep(3)
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=60) == AGAIN
    finally:
        running.kill()
    [run] = client.search_runs([client.get_experiment_by_name("dist_partial").experiment_id])
    assert run.info.status == "KILLED"


def test_what_is_no_tracker(letters, tmp_path, capsys):
    assert start(letters, tmp_path / "run", "run.trackers = ['mlflow']") == 2
    assert "run.trackers is ['mlflow']: give a list of trackers, such as [@MLflow()]" in capsys.readouterr().err
