"""Workers that differ, are missing, are killed, stopped or asked to end: real processes on loopback."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dist_partial import train
from dist_partial.distributed import rendezvous
from dist_partial.launch import restarts
from tests import ROOT, strangers
from tests.helpers.cases import assert_equal
from tests.helpers.files import assert_same_state, rows, state
from tests.helpers.shared import once
from tests.helpers.workers import loopback, run_workers, small_disk, sockets, tf_config

pytestmark = pytest.mark.slow

TIMEOUT = 90.0  # seconds for whatever a test waits for, on a machine that does much else

# What a user brings along. Environment variables make what no binding shows: other data, slow steps, a death.
USER_MODULE = """
import os, signal, time
import keras, numpy as np
from dist_partial.distributed import replicas, tcp_backend
from dist_partial.data import ArraySource, Dataset, fingerprint

if "DIE" in os.environ:  # as soon as the workers have met
    replicas.TCPBackend = lambda *args: os.kill(os.getpid(), signal.SIGKILL)

if "LATE" in os.environ:  # TensorFlow hears of a loss before the backend does
    class _Late(tcp_backend.Connections):
        def _lose(self, *args):
            time.sleep(0.5)
            super()._lose(*args)

    tcp_backend.Connections = _Late

if "LINGER" in os.environ:  # the others have long closed their connections, and ended
    class _Linger(replicas.TCPBackend):
        def close(self, *args):
            time.sleep(float(os.environ["LINGER"]))
            super().close(*args)

    replicas.TCPBackend = _Linger

class Source(ArraySource):
    def fetch(self, indices):
        time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
        return super().fetch(indices)

def points():
    rng = np.random.default_rng(int(os.environ.get("DATA_SEED", "0")))
    x, y = rng.normal(size=(48, 6)).astype(np.float32), rng.integers(0, 4, 48).astype(np.int32)
    return Dataset("points", Source(x, y), ArraySource(x, y), fingerprint(x, y))

def small():
    time.sleep(float(os.environ.get("BUILD_SECONDS", "0")))
    layers = [keras.Input((6,)), keras.layers.Dense(8, "tanh", name="body"), keras.layers.Dense(4, name="head")]
    return keras.Sequential(layers, name="small")

def seedless():
    model = small()
    model.layers[0].kernel.assign(np.random.default_rng().normal(size=(6, 8)))
    return model

def two_parts():
    # Two models side by side: what becomes of one is nothing to the other.
    x = keras.Input((6,))
    parts = []
    for name, units in (("whole", 8), ("some", 64)):
        hidden = keras.layers.Dense(units, "tanh", name=f"{name}_body")(x)
        parts.append(keras.layers.Dense(4, name=f"{name}_head")(hidden))
    return keras.Model(x, keras.layers.Concatenate()(parts), name="parts")

def two_losses():
    from keras.losses import sparse_categorical_crossentropy as loss
    return lambda y, out: loss(y, out[:, :4], from_logits=True) + loss(y, out[:, 4:], from_logits=True)
"""

GIN = """
import faults_module
run.rules = [('train', r'.*')]
run.model = @faults_module.small
run.data = @faults_module.points
Adam.learning_rate = 0.01
run.steps = 40
run.global_batch = 12
run.save_every = 10
run.keep = 3
"""

ENDLESS = ("run.steps = 1000000", "run.save_every = None")


class Bench:
    """A folder with a gin file, and the command that trains with it on several workers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.gin_file = folder / "faults.gin"
        self.gin_file.write_text(GIN)
        (folder / "faults_module.py").write_text(USER_MODULE)

    def arguments(self, *params: str, run_dir: Path | None = None) -> list[str]:
        """Those of dist_partial.train."""
        flags = [f"--gin_file={self.gin_file}", f"--run_dir={run_dir or self.run_dir}"]
        return [*flags, *[f"--gin_param={param}" for param in params]]

    def run(self, *params: str, count: int = 2, timeout: float = TIMEOUT, **more) -> list[tuple[int, str]]:
        """Runs it on `count` workers; `more` goes to `run_workers`."""
        command = ["-m", "dist_partial.train", *self.arguments(*params)]
        return run_workers(command, count, timeout, pythonpath=self.folder, **more)

    def steps(self) -> int:
        """How many steps the run's metrics have by now."""
        with contextlib.suppress(FileNotFoundError):
            return (self.run_dir / "metrics.jsonl").read_text().count('"split": "train"')
        return 0

    def wait_for_step(self, step: int, processes: Sequence[subprocess.Popen]) -> None:
        until = time.monotonic() + TIMEOUT
        while self.steps() < step and time.monotonic() < until and all(p.poll() is None for p in processes):
            time.sleep(0.02)
        assert self.steps() >= step, "does not train"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("DIST_PARTIAL_SECRET", "faults")  # another test's workers on the same ports are strangers
    return Bench(tmp_path)


def error(result: tuple[int, str], code: int) -> str:
    """The one line that a worker ends with."""
    assert result[0] == code, result
    assert "Traceback" not in result[1], result[1]
    found = [line for line in result[1].splitlines() if line.startswith("error:")]
    assert len(found) == 1, result[1]
    return found[0]


def checkpoint_steps(run_dir: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (run_dir / "checkpoints").glob("*.safetensors"))


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows(run_dir / "metrics.jsonl") if row["split"] == "train"]


# Workers that differ.


def test_another_gin_file(bench):
    other = bench.folder / "other.gin"
    other.write_text(GIN.replace("run.steps = 40", "run.steps = 41"))
    results = bench.run(arguments={1: [f"--gin_file={other}"]})
    for result in results:
        line = error(result, 2)
        assert "worker 1 (127.0.0.1:" in line and "run.steps: '41' against '40'" in line
    assert not bench.run_dir.exists()


def test_another_version_of_the_package(bench):
    copy = bench.folder / "copy"
    shutil.copytree(ROOT / "dist_partial", copy / "dist_partial", ignore=shutil.ignore_patterns("__pycache__"))
    with open(copy / "dist_partial" / "step" / "losses.py", "a") as file:
        file.write("# changed\n")
    # PYTHONSAFEPATH, or the working directory's package would come first.
    path = os.pathsep.join(map(str, (bench.folder, copy, ROOT)))
    results = bench.run(environments={1: {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}})
    for result in results:
        line = error(result, 2)
        assert "worker 1 (127.0.0.1:" in line and "versions.dist_partial's source differs" in line
    assert not bench.run_dir.exists()


# Loaded by each Python when it starts, as if the package had never been installed.
NOT_INSTALLED = """
import importlib.metadata

def from_name(name, find=importlib.metadata.Distribution.from_name):
    if name.replace("-", "_") == "dist_partial":
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)

importlib.metadata.Distribution.from_name = from_name
"""


def test_a_checkout_that_is_not_installed(bench):
    copy = bench.folder / "copy"
    shutil.copytree(ROOT / "dist_partial", copy / "dist_partial", ignore=shutil.ignore_patterns("__pycache__"))
    (bench.folder / "sitecustomize.py").write_text(NOT_INSTALLED)
    # PYTHONSAFEPATH, or the working directory's package would come first.
    environment = {"PYTHONPATH": f"{bench.folder}{os.pathsep}{copy}", "PYTHONSAFEPATH": "1"}
    results = bench.run("run.steps = 2", environments=dict.fromkeys(range(2), environment))
    assert [code for code, _ in results] == [0, 0], results
    assert [step for step, _ in losses(bench.run_dir)] == [1, 2]


def test_other_data_under_the_same_bindings(bench):
    results = bench.run(environments={1: {"DATA_SEED": "1"}})
    for result in results:
        line = error(result, 2)
        assert "worker 1 (127.0.0.1:" in line and "data.fingerprint differs" in line
        assert "bindings" not in line and "initial values" not in line
    assert not bench.run_dir.exists()


def test_other_initial_weights(bench):
    results = bench.run("run.model = @faults_module.seedless")
    for result in results:
        line = error(result, 2)
        assert "worker 1 (127.0.0.1:" in line and "initial values.body/kernel differs" in line
        assert "head" not in line  # whose values are the same
    assert not bench.run_dir.exists()


@pytest.mark.parametrize("transport", ["sockets", "tensorflow"])
def test_a_mistake_on_one_worker_alone(bench, transport):
    match_nothing = "--gin_param=run.rules = [('train', r'bodi/.*'), ('train', r'.*')]"
    first, second = bench.run(f"replicas.transport = '{transport}'", arguments={1: [match_nothing]})
    line = error(second, 2).removeprefix("error: ")
    assert "bodi/.*" in line and "worker" not in line
    assert re.fullmatch(rf"error: worker 1 \(127\.0\.0\.1:\d+\): {re.escape(line)}", error(first, 2))
    assert not bench.run_dir.exists()


# Workers that do not meet.


def test_tf_config_that_is_broken(bench):
    """Three workers say what is wrong with theirs; the one that waits for them says which are missing."""
    where = loopback(4)
    twice = [where[0], where[1], where[1], where[3]]
    results = bench.run(
        "replicas.start_seconds = 5",
        count=4,
        addresses=where,
        environments={
            1: {"TF_CONFIG": tf_config(where, 1)[:-2]},
            2: {"TF_CONFIG": tf_config(where, 4)},
            3: {"TF_CONFIG": tf_config(twice, 3)},
        },
    )
    waiting = error(results[0], 75)
    assert "missing after 5 s" in waiting and all(f"worker {k} ({where[k]}" in waiting for k in (1, 2, 3))
    assert "TF_CONFIG is not JSON" in error(results[1], 2)
    assert "task index is 4, but the cluster has 4" in error(results[2], 2)
    assert f"TF_CONFIG names {where[1]} twice" in error(results[3], 2)
    assert not bench.run_dir.exists()


def test_one_index_twice(bench):
    """The address is taken by one of the two, and nobody is the other worker."""
    where = loopback(2)
    results = bench.run(
        "replicas.start_seconds = 5", addresses=where, environments={1: {"TF_CONFIG": tf_config(where, 0)}}
    )
    missing, taken = f"missing after 5 s: worker 1 ({where[1]}", f"worker 0 cannot listen on {where[0]}: "
    lines = [error(result, 75) for result in results]
    # The second may come when the first has left; then it finds nobody, either.
    assert any(missing in line for line in lines) and all(missing in line or taken in line for line in lines), lines


def test_other_lists_of_workers(bench):
    where = loopback(3)
    results = bench.run(addresses=where[:2], environments={1: {"TF_CONFIG": tf_config(where, 1)}})
    for result in results:
        line = error(result, 2)
        assert "TF_CONFIG" in line and where[2] in line
    assert not bench.run_dir.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_that_never_starts(bench):
    """It is named, and meanwhile nobody can reach the one that waits but at the address that it was given."""
    where = loopback(2)
    seen = set()

    def look(processes):
        while processes[0].poll() is None:
            seen.update(sockets(processes[0].pid))
            time.sleep(0.05)

    (result,) = bench.run("replicas.start_seconds = 3", count=1, addresses=where, meanwhile=look)
    assert f"missing after 3 s: worker 1 ({where[1]})" in error(result, 75)
    assert seen == {where[0]}
    assert not bench.run_dir.exists()


def test_a_worker_that_ends_while_others_are_awaited_may_start_again(monkeypatch):
    """As on clusters that start each worker again by itself."""
    where = loopback(3)
    found = {}

    def connect(rank):
        try:
            found[rank] = rendezvous.connect(rank, where, 5)
        except Exception as reason:
            found[rank] = reason

    threads = [threading.Thread(target=connect, args=(rank,), daemon=True) for rank in range(3)]
    threads[0].start()
    early = strangers.await_call(where[0])
    assert strangers.greet(early, 1, 0, where, b"")[0] == 1
    time.sleep(0.3)  # worker 0 has taken it in
    early.close()  # what the system does for a process that is killed
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(isinstance(found[rank], dict) for rank in range(3)), found
    for links in found.values():
        for link in links.values():
            link.socket.close()


LABEL = b"dist_partial handshake 1"


@pytest.mark.parametrize(
    "greeting",
    [
        b"",
        b'\x14\0\0\0{"rank": 1e999, "workers": NaN}',
        b"[" * 10**5,
        b"\xff" * 1000,
        LABEL + b"C" + b"\xff" * 121,
        LABEL + b"L" + b"\xff" * 122,
        LABEL + b"L" + bytes(200) + b"\1" + bytes(100),
        LABEL[:-1] + b"9" + b"C" + bytes(200),
    ],
)
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_strangers_that_greet_in_another_way(greeting):
    """Whatever is at a worker's address, or calls it, is passed over until the worker itself is there."""
    where = loopback(2)
    found = {}

    def connect(rank):
        try:
            found[rank] = rendezvous.connect(rank, where, 5)
        except Exception as reason:
            found[rank] = reason

    stranger = socket.create_server(rendezvous.split(where[0]))
    threads = [threading.Thread(target=connect, args=(rank,), daemon=True) for rank in range(2)]
    threads[1].start()
    called, _ = stranger.accept()
    with contextlib.suppress(OSError):
        called.sendall(greeting)
    time.sleep(0.5)
    called.close()
    stranger.close()
    threads[0].start()
    calling = strangers.await_call(where[0])
    with contextlib.suppress(OSError):
        calling.sendall(greeting)
    for thread in threads:
        thread.join(20)
    calling.close()
    assert all(isinstance(found[rank], dict) for rank in range(2)), found
    for links in found.values():
        for link in links.values():
            link.socket.close()


# Workers that end well.


def test_a_worker_that_has_ended_well_is_not_lost(bench):
    """Of a run, and of one that finds nothing to do: TensorFlow has nothing to say, whichever worker is the last."""
    for last in (1, 0):  # the first coordinates the others
        errors = {rank: {"TF_CPP_MIN_LOG_LEVEL": "2", "LINGER": "2" if rank == last else "0"} for rank in range(2)}
        results = bench.run("replicas.transport = 'tensorflow'", "run.steps = 2", environments=errors)
        assert [code for code, _ in results] == [0, 0], results
        for _, output in results:
            assert not re.search("is gone|Abort|coordination|UNAVAILABLE", output), output
    assert "finished: " in results[0][1]


# Workers that are lost.


def lose(bench: Bench, number: signal.Signals, lost: int, seconds: float, *params: str, **more) -> str:
    """Sends a signal to one of two workers in the middle of a run; returns the line with which the other one ends."""
    took = []

    def signal_one(processes):
        bench.wait_for_step(3, processes)
        processes[lost].send_signal(number)
        start = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            processes[1 - lost].wait(seconds + 20)  # it ends, if late: then it can be said how late
        took.append(time.monotonic() - start)

    results = bench.run(*ENDLESS, *params, meanwhile=signal_one, timeout=0.0, **more)  # what still runs is killed
    assert results[lost][0] == -signal.SIGKILL
    line = error(results[1 - lost], 75)
    assert f"worker {lost} (127.0.0.1:" in line
    assert took[0] < seconds, (took, line)
    return line


@pytest.mark.parametrize(("transport", "lost"), [("sockets", 1), ("tensorflow", 1), ("tensorflow", 0)])
def test_a_worker_that_is_killed(bench, transport, lost):
    late = {1 - lost: {"LATE": "1"}} if transport == "tensorflow" else {}
    line = lose(bench, signal.SIGKILL, lost, 15.0, f"replicas.transport = '{transport}'", environments=late)
    assert "is gone" in line


@pytest.mark.parametrize("transport", ["sockets", "tensorflow"])
def test_a_worker_that_is_stopped(bench, transport):
    params = (f"replicas.transport = '{transport}'", "replicas.patience_seconds = 3")
    assert "has been silent for 3 s" in lose(bench, signal.SIGSTOP, 1, 20.0, *params)


def test_a_worker_that_is_killed_when_they_have_just_met(bench):
    """Before TensorFlow has connected them, too, which waits for all, handles no signal and lets no Python run."""
    params = ("replicas.transport = 'tensorflow'", "replicas.patience_seconds = 4")
    results = bench.run(*params, environments={1: {"DIE": "1"}}, timeout=40.0)
    assert results[1][0] == -signal.SIGKILL
    code, output = results[0]
    assert code == -signal.SIGALRM and "Timeout (0:00:04)!" in output  # not 1: launchers start all again


def test_a_worker_that_has_nothing_to_say_is_not_silent(bench):
    """It builds a model for longer than the others' patience."""
    results = bench.run("run.steps = 2", "replicas.patience_seconds = 2", environments={1: {"BUILD_SECONDS": "4"}})
    assert [code for code, _ in results] == [0, 0], results


# Workers that stop and go on.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 40 steps on two workers, with checkpoints after 20, 30 and 40."""

    def make(folder):
        bench = Bench(folder)
        for result in bench.run():
            assert result[0] == 0, result
        assert checkpoint_steps(bench.run_dir) == [20, 30, 40]

    return once(tmp_path_factory, "faults-whole", make) / "run"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sigterm_to_one_of_two(bench, whole):
    """Both stop after one step, saved; going on from there ends with the bits of a run that was never stopped."""
    listened = []

    def terminate(processes):
        bench.wait_for_step(3, processes)
        listened.extend(address for process in processes for address in sockets(process.pid))
        processes[1].send_signal(signal.SIGTERM)

    slow = {rank: {"STEP_SECONDS": "0.1"} for rank in range(2)}
    results = bench.run(meanwhile=terminate, environments=slow)
    assert listened == []
    stops = {re.search(r"stopped at step (\d+) of 40, saved in", output)[1] for _, output in results}
    assert [code for code, _ in results] == [75, 75] and len(stops) == 1, results
    step = int(stops.pop())
    assert 3 <= step < 40 and max(checkpoint_steps(bench.run_dir)) == step
    assert losses(bench.run_dir) == losses(whole)[:step]
    where = loopback(2)
    results = bench.run(addresses=where)
    assert [code for code, _ in results] == [0, 0], results
    assert f"going on from step {step} " in results[0][1]
    assert_same_state(bench.run_dir, whole, 40)
    assert losses(bench.run_dir) == losses(whole)
    for address in where:  # nobody listens any more
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(rendezvous.split(address))


def test_a_disk_that_is_full_for_a_while(bench, whole, monkeypatch):
    """The launcher, whose logs are there, too, starts the workers again until there is space: the same bits."""
    monkeypatch.setenv("STEP_SECONDS", "0.1")
    monkeypatch.setenv("PYTHONPATH", f"{bench.folder}{os.pathsep}{ROOT}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.delenv("TF_CONFIG", raising=False)
    said = bench.folder / "said"
    with small_disk(bench.folder / "disk", "size=8m", "nr_inodes=100") as disk:
        bench.run_dir = disk / "run"
        arguments = bench.arguments("replicas.rejoin_seconds = 0")  # all start again
        command = [sys.executable, "-m", "dist_partial.launch", "local", "--workers=2", "--", *arguments]
        with open(said, "wb") as out:
            launcher = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
        try:
            bench.wait_for_step(12, [launcher])
            fill(disk)
            wait_for_words(said, "restart 2 of 10", launcher)
            shutil.rmtree(disk / "filled")
            assert launcher.wait(TIMEOUT) == 0, said.read_text()
        finally:
            launcher.kill()  # its workers end with it
            launcher.wait()
        assert "No space left on device" in said.read_text()
        assert "this attempt has no logs" in said.read_text()
        assert restarts.look(bench.run_dir)[:2] == (40, 40)
        assert_same_state(bench.run_dir, whole, 40)
        assert losses(bench.run_dir) == losses(whole)


def fill(disk: Path) -> None:
    """Leaves neither a byte nor a name on it."""
    (disk / "filled").mkdir()
    with contextlib.suppress(OSError), open(disk / "filled" / "bytes", "wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    with contextlib.suppress(OSError):
        for i in range(10**6):
            (disk / "filled" / str(i)).touch()


def wait_for_words(path: Path, words: str, process: subprocess.Popen) -> None:
    until = time.monotonic() + TIMEOUT
    while words not in path.read_text(errors="replace"):
        assert process.poll() is None and time.monotonic() < until, path.read_text(errors="replace")
        time.sleep(0.05)


def test_a_worker_without_the_checkpoint(bench, whole):
    shutil.copytree(whole, bench.run_dir)
    own = bench.folder / "own"
    for result in bench.run("run.steps = 50", arguments={1: [f"--run_dir={own}"]}):
        line = error(result, 2)
        assert "worker 1 (127.0.0.1:" in line and "step 40" in line and "share" in line
    assert not own.exists() and checkpoint_steps(bench.run_dir) == [20, 30, 40]


def test_a_worker_whose_newest_checkpoint_is_damaged(bench, whole):
    """Both go on from the one before it."""
    own = bench.folder / "own"
    for folder in (bench.run_dir, own):
        shutil.copytree(whole, folder)
    damaged = own / "checkpoints" / "step-0000000040.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    results = bench.run(arguments={1: [f"--run_dir={own}"]})
    assert [code for code, _ in results] == [0, 0], results
    assert "going on from step 30 " in results[0][1]
    assert_same_state(bench.run_dir, whole, 40)
    assert losses(bench.run_dir) == losses(whole)


PARTS = (
    "run.model = @faults_module.two_parts",
    "run.loss = @faults_module.two_losses",
    "run.rules = [@some/Rule(), ('train', r'.*')]",
    "some/Rule.match = r'some_body/kernel'",
    "some/Rule.reduction = @top_k()",
    "top_k.density = 0.0625",
    "run.save_every = None",
)


def test_the_number_of_workers_may_change(bench, monkeypatch):
    """4, 2 and 3 workers, one of whose variables is sent in part, against one replica for all steps.

    The variables beside that one are of a model of their own, and are those of the one replica.
    """
    for count, steps in ((4, 6), (2, 12), (3, 18)):
        for result in bench.run(*PARTS, f"run.steps = {steps}", count=count):
            assert result[0] == 0, result
        assert state(bench.run_dir, steps)["reductions/some_body/kernel/residual"].shape[0] == count
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.syspath_prepend(bench.folder)
    single = bench.folder / "single"
    assert train.main(bench.arguments(*PARTS, "run.steps = 18", "replicas.kind = 'default'", run_dir=single)) == 0
    sys.modules.pop("faults_module")
    left, right = state(bench.run_dir, 18), state(single, 18)
    beside = [name for name in right if "whole_" in name and name.startswith(("variables/", "slots/"))]
    assert len(beside) == 4 + 8
    assert_equal({name: left[name] for name in beside}, {name: right[name] for name in beside}, 1e-5)
    assert not np.array_equal(left["variables/some_body/kernel"], right["variables/some_body/kernel"])
    assert [step for step, _ in losses(bench.run_dir)] == list(range(1, 19))
