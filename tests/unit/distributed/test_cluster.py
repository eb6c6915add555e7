"""TF_CONFIG: every one that is refused, what is made of a scheduler's variables, and the Slurm script around it."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_partial.distributed.cluster import read_tf_config, tf_config
from dist_partial.errors import UserError
from tests import ROOT
from tests.helpers.workers import free_ports

TWO = ["a:2222", "b:2222"]


def config(cluster=None, task=None) -> str:
    cluster = {"worker": TWO} if cluster is None else cluster
    return json.dumps({"cluster": cluster, "task": {"type": "worker", "index": 0} if task is None else task})


@pytest.mark.parametrize("text", ["", " ", "{}", '{"cluster": {}}', '{"task": {"type": "worker", "index": 0}}'])
def test_no_cluster(text):
    assert read_tf_config(text) is None


@pytest.mark.parametrize(
    ("cluster", "task"),
    [
        ({"worker": TWO}, {"type": "worker", "index": 0}),
        ({"worker": TWO}, {"type": "worker", "index": 1}),
        ({"chief": ["c:1"], "worker": TWO}, {"type": "chief", "index": 0}),
        ({"chief": ["c:1"], "worker": TWO}, {"type": "worker", "index": 0}),
        ({"worker": ["[::1]:2222", "10.0.0.2:65535"]}, {"type": "worker", "index": 0}),
    ],
)
def test_a_cluster(cluster, task):
    assert read_tf_config(config(cluster, task)) == {"cluster": cluster, "task": task}


MALFORMED = {
    "not JSON": ("{'cluster': 1}", "not JSON"),
    "cut off": (config()[:-2], "not JSON"),
    "a list": ("[1]", "a JSON list"),
    "a string": ('"worker"', "a JSON str"),
    "cluster is a list": (config(cluster=TWO), "cluster is"),
    "unknown type": (config(cluster={"workers": TWO}), "'workers'"),
    "ps": (config(cluster={"worker": TWO, "ps": ["c:1"]}), "'ps'"),
    "evaluator": (config(cluster={"worker": TWO, "evaluator": ["c:1"]}), "'evaluator'"),
    "addresses are a string": (config(cluster={"worker": "a:2222"}), "'a:2222'"),
    "no port": (config(cluster={"worker": ["a", "b:1"]}), "'host:port'"),
    "no host": (config(cluster={"worker": [":2222"]}), "':2222'"),
    "port is a word": (config(cluster={"worker": ["a:http"]}), "'a:http'"),
    "port is not a plain digit": (config(cluster={"worker": ["a:\u00b2"]}), "'host:port'"),
    "port is 0": (config(cluster={"worker": ["a:0"]}), "'a:0'"),
    "port too large": (config(cluster={"worker": ["a:65536"]}), "'a:65536'"),
    "address is a number": (config(cluster={"worker": [2222]}), "2222"),
    "no address": (config(cluster={"worker": []}), "has 0"),
    "duplicate": (config(cluster={"worker": ["a:1", "b:1", "a:1"]}), "a:1 twice"),
    "duplicate over types": (config(cluster={"worker": ["a:1"], "chief": ["a:1"]}), "a:1 twice"),
    "no task": (json.dumps({"cluster": {"worker": TWO}}), "task is None"),
    "task is a list": (config(task=["worker", 0]), "task is"),
    "task without type": (config(task={"index": 0}), "type (worker)"),
    "task without index": (config(task={"type": "worker"}), "index"),
    "task of another type": (config(task={"type": "chief", "index": 0}), "type (worker)"),
    "task type is a list": (config(task={"type": ["worker"], "index": 0}), "type (worker)"),
    "index is a string": (config(task={"type": "worker", "index": "0"}), "'0'"),
    "index is a bool": (config(task={"type": "worker", "index": True}), "True"),
    "index too large": (config(task={"type": "worker", "index": 2}), "index is 2, but the cluster has 2"),
    "index negative": (config(task={"type": "worker", "index": -1}), "index is -1"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_tf_config(name):
    text, words = MALFORMED[name]
    with pytest.raises(UserError) as raised:
        read_tf_config(text)
    message = str(raised.value)
    assert message.startswith("TF_CONFIG") and words in message and "\n" not in message, message


# What srun of Slurm 23.11 sets for the last of four tasks on one node without a GPU, as far as it says where tasks are.
ONE_NODE = {
    "SLURM_CLUSTER_NAME": "cluster",
    "SLURM_CPUS_ON_NODE": "16",
    "SLURM_CPUS_PER_TASK": "4",
    "SLURM_DISTRIBUTION": "block",
    "SLURM_GTIDS": "0,1,2,3",
    "SLURM_JOB_CPUS_PER_NODE": "16",
    "SLURM_JOB_ID": "48213",
    "SLURM_JOBID": "48213",
    "SLURM_JOB_NAME": "dist_partial",
    "SLURM_JOB_NODELIST": "cpu017",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_JOB_PARTITION": "main",
    "SLURM_LAUNCH_NODE_IPADDR": "10.1.0.17",
    "SLURM_LOCALID": "3",
    "SLURM_NNODES": "1",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "cpu017",
    "SLURM_NPROCS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_PROCID": "3",
    "SLURM_SRUN_COMM_HOST": "10.1.0.17",
    "SLURM_SRUN_COMM_PORT": "42817",
    "SLURM_STEP_ID": "0",
    "SLURM_STEPID": "0",
    "SLURM_STEP_LAUNCHER_PORT": "42817",
    "SLURM_STEP_NODELIST": "cpu017",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "4",
    "SLURM_SUBMIT_DIR": "/home/user",
    "SLURM_TASK_PID": "31337",
    "SLURM_TASKS_PER_NODE": "4",
    "SLURM_TOPOLOGY_ADDR": "cpu017",
    "SLURM_TOPOLOGY_ADDR_PATTERN": "node",
    "SLURMD_NODENAME": "cpu017",
}


def test_slurm_without_a_gpu():
    before = dict(os.environ)
    assert tf_config("slurm", ONE_NODE) == {
        "cluster": {"worker": ["cpu017:31824", "cpu017:31825", "cpu017:31826", "cpu017:31827"]},
        "task": {"type": "worker", "index": 3},
    }
    assert dict(os.environ) == before


# Nodes and tasks as srun writes them; where each rank is, as (node, task of that node); the workers, by node and task.
LAYOUTS = {
    "3 nodes x 1": (
        "node[01-03]",
        "1(x3)",
        [("node01", 0), ("node02", 0), ("node03", 0)],
        ["node01+0", "node02+0", "node03+0"],
    ),
    "names of two kinds": (
        "node[01-03,07],gpu5",
        "1(x5)",
        [("node01", 0), ("node02", 0), ("node03", 0), ("node07", 0), ("gpu5", 0)],
        ["gpu5+0", "node01+0", "node02+0", "node03+0", "node07+0"],
    ),
    "uneven": (
        "node[01-02,07],gpu5",
        "2(x3),1",
        [("node01", 0), ("node01", 1), ("node02", 0), ("node02", 1), ("node07", 0), ("node07", 1), ("gpu5", 0)],
        ["gpu5+0", "node01+0", "node01+1", "node02+0", "node02+1", "node07+0", "node07+1"],
    ),
    "sorted by number": (
        "n[9-10]",
        "2(x2)",
        [("n9", 0), ("n9", 1), ("n10", 0), ("n10", 1)],
        ["n10+0", "n10+1", "n9+0", "n9+1"],
    ),
    "cyclic": (
        "n[1-2]",
        "2(x2)",
        [("n1", 0), ("n2", 0), ("n1", 1), ("n2", 1)],
        ["n1+0", "n1+1", "n2+0", "n2+1"],
    ),
    "one": ("n1", "1", [("n1", 0)], ["n1+0"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_slurm_task_is_at_its_own_address(name, monkeypatch):
    nodes, tasks_per_node, ranks, workers = LAYOUTS[name]
    monkeypatch.setenv("SLURM_STEP_NODELIST", "wrong")  # the given environment counts
    addresses = [re.sub(r"\+(\d)", lambda match: f":{20000 + int(match[1])}", worker) for worker in workers]
    for rank, (node, local) in enumerate(ranks):
        made = tf_config(
            "slurm",
            {
                "SLURM_JOB_ID": "7",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(local),
                "SLURM_STEP_NODELIST": nodes,
                "SLURM_STEP_NUM_TASKS": str(len(ranks)),
                "SLURM_STEP_TASKS_PER_NODE": tasks_per_node,
                "SLURMD_NODENAME": node,
                "DIST_PARTIAL_PORT": "20000",
            },
        )
        assert made["cluster"]["worker"] == addresses
        assert addresses[made["task"]["index"]] == f"{node}:{20000 + local}"
        assert read_tf_config(json.dumps(made)) == made


def test_gpus_stay_as_srun_deals_them_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    tf_config("slurm", {**ONE_NODE, "CUDA_VISIBLE_DEVICES": "3", "SLURM_GPUS_ON_NODE": "4"})
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_jobs_in_a_row_have_other_ports():
    def ports(job: int) -> set[int]:
        workers = tf_config("slurm", {**ONE_NODE, "SLURM_JOB_ID": str(job)})["cluster"]["worker"]
        return {int(worker.split(":")[1]) for worker in workers}

    seen = [ports(job) for job in range(1000, 1352)]
    assert len(set.union(*seen)) == 352 * 4
    assert min(map(min, seen)) >= 1024 and max(map(max, seen)) < 32768


SLURM_MISTAKES = {
    **{
        f"no {name}": ({name: None}, f"{name} is not set: start the workers by srun")
        for name in (
            "SLURM_JOB_ID",
            "SLURM_PROCID",
            "SLURM_LOCALID",
            "SLURM_STEP_NUM_TASKS",
            "SLURM_STEP_NODELIST",
            "SLURM_STEP_TASKS_PER_NODE",
            "SLURMD_NODENAME",
        )
    },
    "rank": ({"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x', not a whole number: start"),
    "negative": ({"SLURM_LOCALID": "-1"}, "SLURM_LOCALID is '-1', not a whole number: start"),
    "empty": ({"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST is not set: start"),
    "node list": ({"SLURM_STEP_NODELIST": "cpu[1-"}, "SLURM_STEP_NODELIST='cpu[1-' and"),
    "tasks": ({"SLURM_STEP_TASKS_PER_NODE": "4(y2)"}, "SLURM_STEP_TASKS_PER_NODE='4(y2)' and"),
    "too many tasks": ({"SLURM_STEP_TASKS_PER_NODE": "5"}, "SLURM_STEP_NUM_TASKS=4 do not fit together"),
    "too few tasks": ({"SLURM_STEP_TASKS_PER_NODE": "3"}, "SLURM_STEP_NUM_TASKS=4 do not fit together"),
    "another node": ({"SLURMD_NODENAME": "cpu018"}, "SLURMD_NODENAME='cpu018' and SLURM_LOCALID=3 are no task of"),
    "another task": ({"SLURM_LOCALID": "4"}, "SLURMD_NODENAME='cpu017' and SLURM_LOCALID=4 are no task of"),
    "port is a word": (
        {"DIST_PARTIAL_PORT": "http"},
        "DIST_PARTIAL_PORT is 'http', not a whole number: write the port",
    ),
    "port is too large": ({"DIST_PARTIAL_PORT": "65533"}, "DIST_PARTIAL_PORT=65533 make no valid TF_CONFIG"),
}


@pytest.mark.parametrize("name", SLURM_MISTAKES)
def test_slurm_mistakes(name):
    changes, words = SLURM_MISTAKES[name]
    environ = {name: value for name, value in {**ONE_NODE, **changes}.items() if value is not None}
    with pytest.raises(UserError) as raised:
        tf_config("slurm", environ)
    assert words in str(raised.value) and "\n" not in str(raised.value), raised.value


@pytest.mark.parametrize(
    ("hosts", "workers"),
    [
        ("job-0.job:2222,job-1.job:2222", ["job-0.job:2222", "job-1.job:2222"]),
        ("job-0.job, job-1.job:99", ["job-0.job:2222", "job-1.job:99"]),
        ("[fd00::1],[fd00::2]:99", ["[fd00::1]:2222", "[fd00::2]:99"]),
    ],
)
def test_kubernetes(hosts, workers):
    environ = {"JOB_COMPLETION_INDEX": "1", "DIST_PARTIAL_HOSTS": hosts}
    made = tf_config("kubernetes", environ)
    assert made == {"cluster": {"worker": workers}, "task": {"type": "worker", "index": 1}}
    assert read_tf_config(json.dumps(made)) == made


@pytest.mark.parametrize(
    ("index", "hosts", "words"),
    [
        (None, "a,b", "JOB_COMPLETION_INDEX is not set: give the Job completionMode: Indexed"),
        ("one", "a,b", "JOB_COMPLETION_INDEX is 'one'"),
        ("-1", "a,b", "JOB_COMPLETION_INDEX is '-1'"),
        (
            "2",
            "a,b",
            "JOB_COMPLETION_INDEX=2 and DIST_PARTIAL_HOSTS='a,b' make no valid TF_CONFIG: TF_CONFIG's task index",
        ),
        ("0", None, "DIST_PARTIAL_HOSTS is not set: list a 'host' or 'host:port'"),
        ("0", " ", "DIST_PARTIAL_HOSTS is not set"),
        ("0", "a,,b", "DIST_PARTIAL_HOSTS='a,,b' make no valid TF_CONFIG"),
        ("0", "a,b,", "DIST_PARTIAL_HOSTS='a,b,' make no valid TF_CONFIG"),
        ("0", "a:http,b", "DIST_PARTIAL_HOSTS='a:http,b' make no valid TF_CONFIG"),
        ("0", "a,a:2222", "a:2222 twice"),
    ],
)
def test_kubernetes_mistakes(index, hosts, words):
    given = {"JOB_COMPLETION_INDEX": index, "DIST_PARTIAL_HOSTS": hosts}
    with pytest.raises(UserError) as raised:
        tf_config("kubernetes", {name: value for name, value in given.items() if value is not None})
    assert words in str(raised.value) and "\n" not in str(raised.value), raised.value


def test_an_unknown_scheduler():
    with pytest.raises(UserError, match="'slurm' or 'kubernetes'"):
        tf_config("pbs", {})


BATCH = ROOT / "launch" / "slurm.sbatch"

# Replacements of Slurm's commands. At SIGTERM the real srun kills all tasks: the exit code 137 here. What scancel sends
# reaches the tasks, and not srun.
RECORD = """#!/bin/bash
{ printf '%s' "${0##*/}"; printf ' %q' "$@"; echo; } >> "$SLURM_TEST/calls"
"""
SRUN = f"""{RECORD}
echo "$DIST_PARTIAL_SECRET" >> "$SLURM_TEST/secrets"
eval "${{SLURM_TEST_TRAINS:-}}"
[ "$SLURM_TEST_CODE" = sleeping ] || exit "$SLURM_TEST_CODE"
trap 'exit 137' TERM
trap 'exit 75' USR1
echo $$ > "$SLURM_TEST/written"
mv "$SLURM_TEST/written" "$SLURM_TEST/srun.pid"
while :; do sleep 0.05; done
"""
SCANCEL = f"""{RECORD}
kill -USR1 "$(cat "$SLURM_TEST/srun.pid")"
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The folder in which replacements of Slurm's commands note how they were called."""
    for name, text in {"srun": SRUN, "scancel": SCANCEL, "scontrol": RECORD}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_TEST", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("PYTHON", sys.executable)
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_RESTART_COUNT", "DIST_PARTIAL_RESTARTS", "DIST_PARTIAL_SECRET"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def calls(folder: Path, command: str) -> list[str]:
    lines = (folder / "calls").read_text().splitlines()
    return [line.removeprefix(f"{command} ") for line in lines if line.split()[0] == command]


def run_batch(*arguments: str) -> subprocess.CompletedProcess:
    """Runs the script as one attempt of a job, on the run folder `run` beside the replacements."""
    flags = ["--gin_file=a b.gin", f"--run_dir={os.environ['SLURM_TEST']}/run", *arguments]
    return subprocess.run(["bash", BATCH, *flags], capture_output=True, text=True, timeout=60)


REQUEUE = ["requeue Incomplete 4711"]


@pytest.mark.parametrize(
    ("code", "requeued"),
    [("0", []), ("2", []), ("126", []), ("127", []), ("130", []), ("1", []), ("75", REQUEUE), ("137", REQUEUE)],
)
def test_batch_exit_codes(code, requeued, slurm, monkeypatch):
    monkeypatch.setenv("SLURM_TEST_CODE", code)
    done = run_batch("--gin_param=run.seed = 1")
    assert done.returncode == int(code)
    assert calls(slurm, "scontrol") == requeued
    assert bool(done.stderr) == (code not in ("0", "2", "126", "127", "130"))
    (srun,) = calls(slurm, "srun")
    arguments = rf"--gin_file=a\ b.gin --run_dir={slurm}/run --gin_param=run.seed\ =\ 1"
    assert srun.endswith(f" -m dist_partial.launch slurm -- {arguments}")
    assert "--kill-on-bad-exit=0" in srun  # or else the others could not end by themselves


def save(step: int) -> str:
    """What a run does that saves, as a line for a shell."""
    folder = "$SLURM_TEST/run/checkpoints"
    return f"mkdir -p {folder}; touch {folder}/step-{step:010d}.safetensors"


def train(step: int) -> str:
    """A step."""
    row = json.dumps({"step": step, "split": "train"})
    return f"mkdir -p $SLURM_TEST/run; echo '{row}' >> $SLURM_TEST/run/metrics.jsonl"


# Attempts of a job that may start again twice: what the workers do, their exit code, and whether the job is requeued.
JOBS = {
    "no progress": [("", 75, True), ("", 137, True), ("", 75, False)],
    "some progress": [*((save(n), 75, True) for n in (1, 2, 3)), ("", 75, True), ("", 75, False)],
    "no time for a step": [("", 143, True), ("", 143, True), ("", 143, False)],
    "an exception": [(train(5), 1, True), (train(5), 1, False)],
    "an exception before the first step": [(train(5), 75, True), ("", 1, False)],
}


@pytest.mark.parametrize("name", JOBS)
def test_batch_restarts_without_progress_are_bounded(name, slurm, monkeypatch):
    monkeypatch.setenv("DIST_PARTIAL_RESTARTS", "2")
    for attempt, (trains, code, requeued) in enumerate(JOBS[name]):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(attempt))
        monkeypatch.setenv("SLURM_TEST_TRAINS", trains)
        monkeypatch.setenv("SLURM_TEST_CODE", str(code))
        done = run_batch()
        assert done.returncode == code
        assert ("not again: " not in done.stderr) == requeued, done.stderr
        assert ("stopped before the first step: a job's --time must be longer" in done.stderr) == (code == 143)
    assert calls(slurm, "scontrol") == REQUEUE * sum(requeued for _, _, requeued in JOBS[name])
    # Another job counts for itself.
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    monkeypatch.setenv("SLURM_TEST_CODE", "75")
    assert "restart 1 of 2" in run_batch().stderr


@pytest.mark.parametrize(
    ("restarts", "limit", "requeued"),
    [
        (None, None, True),
        ("19", None, True),
        ("20", None, False),
        ("2", "3", True),
        ("3", "3", False),
        (None, "0", False),
    ],
)
def test_batch_restarts_are_bounded_on_a_full_disk(restarts, limit, requeued, slurm, monkeypatch):
    """By Slurm's own count, where there can be no other."""
    (slurm / "run.logs").touch()
    monkeypatch.setenv("SLURM_TEST_CODE", "75")
    for name, value in (("SLURM_RESTART_COUNT", restarts), ("DIST_PARTIAL_RESTARTS", limit)):
        if value is not None:
            monkeypatch.setenv(name, value)
    done = run_batch()
    assert done.returncode == 75
    assert ("not again: " not in done.stderr) == requeued, done.stderr


def test_batch_mistakes_reach_no_node(slurm, monkeypatch):
    monkeypatch.setenv("PYTHON", "/no/such/python")
    assert run_batch().returncode == 127
    monkeypatch.setenv("PYTHON", sys.executable)
    done = subprocess.run(["bash", BATCH], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: no --gin_file")
    assert not (slurm / "calls").exists()


def test_batch_draws_a_secret_that_no_command_line_shows(slurm, monkeypatch):
    monkeypatch.setenv("SLURM_TEST_CODE", "0")
    monkeypatch.setenv("DIST_PARTIAL_SECRET", "of another run")
    run_batch()
    run_batch()
    secrets = (slurm / "secrets").read_text().splitlines()
    assert len(set(secrets)) == 2
    for secret in secrets:
        assert re.fullmatch("[0-9a-f]{64}", secret)
        assert secret not in (slurm / "calls").read_text()


@pytest.mark.parametrize("times", [1, 2])
def test_batch_hands_sigterm_to_the_workers_and_not_to_srun(times, slurm, monkeypatch):
    monkeypatch.setenv("SLURM_TEST_CODE", "sleeping")
    flags = ["--gin_file=F", f"--run_dir={slurm}/run"]
    process = subprocess.Popen(["bash", BATCH, *flags], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (slurm / "srun.pid").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        for _ in range(times):
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, errors
    assert set(calls(slurm, "scancel")) == {"--signal=TERM 4711"}
    assert calls(slurm, "scontrol") == REQUEUE


def test_batch_options_come_before_its_commands():
    lines = BATCH.read_text().splitlines()
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    commands = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
    assert lines[0] == "#!/bin/bash" and max(options) < min(commands)
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", lines[i]) for i in options)
    assert "#SBATCH --signal=TERM@90" in lines  # to the workers; with B: it would go to the script


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    done = subprocess.run([shellcheck, BATCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# srun on one node: two tasks with the variables that it gives them.
SRUN_TWO_TASKS = """#!{python}
import os, subprocess, sys

command = sys.argv[1:]
while command[0].startswith("--"):
    del command[0]
node = {{
    "SLURM_STEP_NODELIST": "127.0.0.1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURMD_NODENAME": "127.0.0.1",
}}
tasks = []
for task in ("0", "1"):
    environment = {{**os.environ, **node, "SLURM_PROCID": task, "SLURM_LOCALID": task}}
    tasks.append(subprocess.Popen(command, env=environment))
sys.exit(max(task.wait() for task in tasks))
"""


def first_of_two_free_ports() -> int:
    while True:
        (first,) = free_ports(1)
        with contextlib.suppress(OSError, OverflowError), socket.create_server(("127.0.0.1", first + 1)):
            return first


@pytest.mark.slow
@pytest.mark.parametrize(("parameter", "code", "words"), [("run.steps=3", 0, ""), ("run.stepz=3", 2, "run.stepz")])
def test_batch_trains_with_two_tasks(parameter, code, words, slurm, monkeypatch):
    (slurm / "srun").write_text(SRUN_TWO_TASKS.format(python=sys.executable))
    for name, value in {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "DIST_PARTIAL_PORT": str(first_of_two_free_ports()),
        "CUDA_VISIBLE_DEVICES": "-1",
    }.items():
        monkeypatch.setenv(name, value)
    quick = ["run.steps_per_loop=3", "run.eval_examples=256", "run.global_batch=32"]
    done = subprocess.run(
        [
            "bash",
            BATCH,
            f"--gin_file={ROOT / 'gin_configs' / 'two_dense.gin'}",
            *[f"--gin_param={binding}" for binding in (*quick, parameter)],
            f"--run_dir={slurm / 'run'}",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stderr
    if code == 0:
        assert "2 workers with 2 simulated on the CPU each, this is worker 0" in done.stdout
        rows = map(json.loads, (slurm / "run" / "metrics.jsonl").read_text().splitlines())
        assert [row["split"] for row in rows] == ["train", "train", "train", "workers", "eval"]
    assert not (slurm / "calls").exists()  # no scontrol
