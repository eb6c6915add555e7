"""Faults in real trainings of several workers under the launchers, which have to recover by themselves.

    python -m tests.faults [--rounds=10] [--seed=0] [--faults=kill,stop,disk,port,port_again,network] [--minutes=15]
                           [--workers=3,4] [--spares=1] [--ways=spare,process,restart]
    python -m tests.faults --every=15 [--minutes=5] [--workers=4]

Every run must end with exit code 0, with the weights, steps and losses of a run without faults to the last bit, and
leave no process and no listening port behind. A run suffers several faults, one after the other, at random moments of
random workers. A lost worker is replaced by a spare, by a process that is started then, or, as before there were these,
all start again; the ways take turns. `port_again` and `network`, which take long, come only --slow_rounds times. Needs
Linux; `network` makes hosts of network namespaces, which needs root.

With --every a worker is killed every so many seconds, and the steps are compared with those of a run without faults.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from tests import ROOT
from tests.benchmarks import tables
from tests.helpers import hosts
from tests.helpers.workers import CONNECTED, sockets

COMMAND = "python -m tests.faults"
RESULTS = Path(__file__).parent / "benchmarks" / "results" / "faults.json"
STEPS, SAVE_EVERY, EVAL_EVERY, LOOP = 800, 10, 25, 5
WAYS = ("spare", "process", "restart")  # by which a lost worker is replaced
FAULTS_A_RUN = 8
CUT_SECONDS = 60.0
WAIT_SECONDS = 240.0  # for a run to go on after a fault, or to end
FILE_BYTES = 500_000  # more than the metrics and events of a run, less than a checkpoint

MODULE = """
import os, time
import keras, numpy as np
from dist_partial.data import ArraySource, Dataset, fingerprint

class Slow(ArraySource):
    def fetch(self, indices):
        time.sleep(0.5 if os.path.exists(os.environ["FAULTS_CRAWL"]) else 0.02)
        return super().fetch(indices)

def points():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(500, 16)).astype(np.float32), rng.integers(0, 8, 500).astype(np.int32)
    return Dataset("points", Slow(x, y), ArraySource(x[:120], y[:120]), fingerprint(x, y))

def model():
    while "DIST_PARTIAL_JOINS" in os.environ and os.path.exists(os.environ["FAULTS_HOLD"]):
        time.sleep(0.05)
    layers = [keras.Input((16,)), keras.layers.Dense(256, "tanh"), keras.layers.Dense(256, "tanh")]
    return keras.Sequential([*layers, keras.layers.Dropout(0.1), keras.layers.Dense(8)], name="model")
"""

GIN = f"""
import faults_training
run.rules = [('train', r'dense_1/.*'), ('train', r'.*/kernel'), ('freeze', r'.*')]
run.model = @faults_training.model
run.data = @faults_training.points
run.steps = {STEPS}
run.global_batch = 12
run.save_every = {SAVE_EVERY}
run.eval_every = {EVAL_EVERY}
run.steps_per_loop = {LOOP}
replicas.patience_seconds = 8
replicas.start_seconds = 20
"""


class Broken(Exception):
    """A run did not do what it must."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a fault has cost.

    Attributes:
        fault: its name.
        way: one of `WAYS`.
        workers: how many there were.
        seconds: from the fault to the first step after it.
        delay_seconds: of these, what the launcher waited before restarts.
        recomputed: steps that were made twice.
        restarts: how many it took.
    """

    fault: str
    way: str
    workers: int
    seconds: float
    delay_seconds: float
    recomputed: int
    restarts: int


class Launch:
    """A launcher and its run, in a folder of their own."""

    def __init__(
        self, folder: Path, workers: int = 3, way: str = "process", on_hosts: bool = False, params: Sequence[str] = ()
    ) -> None:
        self.run_dir, self.workers, self.way, self.on_hosts = folder / "run", workers, way, on_hosts
        self.log, self.crawl, self.hold = folder / "launch.log", folder / "crawl", folder / "hold"
        self.addresses: set[str] = set()
        self.held: list[socket.socket] = []
        self._mark = f"FAULTS_RUN={uuid.uuid4().hex}"  # in the environment of all processes of this run
        (folder / "faults_training.py").write_text(MODULE)
        (folder / "faults.gin").write_text(GIN)
        if on_hosts:
            wrapper = folder / "ssh"
            # What ssh would do: its arguments are a host and a command line for a shell there.
            wrapper.write_text(f'#!/bin/sh\nexec ip netns exec "{hosts.PREFIX}${{1##*.}}" sh -c "$2"\n')
            wrapper.chmod(0o755)
            names = ",".join(hosts.address(host) for host in range(1, workers + 1))
            where = ["hosts", f"--hosts={names}", f"--ssh={wrapper}", f"--python={sys.executable}"]
        else:
            where = ["local", f"--workers={workers}", f"--spares={int(way == 'spare')}"]
        flags = [f"--gin_file={folder}/faults.gin", f"--run_dir={self.run_dir}"]
        flags += [f"--gin_param={param}" for param in params]
        flags += ["--gin_param=replicas.rejoin_seconds=0"] if way == "restart" else []
        name, value = self._mark.split("=")
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [ROOT / "launch" / where[0], *where[1:], "--", *flags],
                cwd=ROOT,
                env={
                    **os.environ,
                    name: value,
                    "FAULTS_CRAWL": str(self.crawl),  # where there is a file, examples take long
                    "FAULTS_HOLD": str(self.hold),  # where there is one, none comes in place of a lost worker
                    "PYTHON": sys.executable,
                    "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
                    "CUDA_VISIBLE_DEVICES": "-1",
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self) -> dict[int, dict[str, str]]:
        """All processes of this run, by pid, with their environments."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                environment = (path / "environ").read_bytes().decode(errors="replace").split("\0")
                if self._mark in environment:
                    found[int(path.name)] = dict(each.split("=", 1) for each in environment if "=" in each)
        return found

    def trainers(self) -> dict[int, tuple[int, str]]:
        """The pid and the address of each worker, by index."""
        found = {}
        for pid, environment in self.processes().items():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"dist_partial.train" in command and "TF_CONFIG" in environment:
                    config = json.loads(environment["TF_CONFIG"])
                    index = config["task"]["index"]
                    found[index] = pid, config["cluster"]["worker"][index]
                    self.addresses.add(found[index][1])
        return found

    def address(self, pid: int) -> str:
        """Where a worker was told that it is, when it was started."""
        config = json.loads(self.processes()[pid]["TF_CONFIG"])
        return config["cluster"]["worker"][config["task"]["index"]]

    def members(self) -> list[int]:
        """The pids of the workers that are connected to all others: a spare is not."""
        found = []
        for pid, environment in self.processes().items():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"dist_partial.train" in command and "TF_CONFIG" in environment:
                    found += [pid] * (len(sockets(pid, CONNECTED)) >= self.workers - 1)
        return sorted(found)

    def chief(self) -> int:
        """The pid of the worker that holds the run folder."""
        lock, until = os.path.realpath(self.run_dir / ".lock"), time.monotonic() + 10
        while time.monotonic() < until:  # a file that is closed while it is looked at ends a look
            for pid in self.members():
                with contextlib.suppress(OSError):
                    if lock in [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()]:
                        return pid
            time.sleep(0.05)
        raise Broken(f"no worker holds the run folder:\n{self.tail()}")

    def ready(self) -> bool:
        """Whether all workers train, and a spare waits, if there is to be one."""
        text = self.log.read_text(errors="replace")
        ready, taken = (re.findall(rf"(spare \d+) {what}", text) for what in ("is ready to", "takes"))
        return len(self.members()) == self.workers and (self.way != "spare" or bool(set(ready) - set(taken)))

    def progress(self) -> tuple[int, int]:
        """Which file the metrics are in, and the last step there: a restart writes another file."""
        with contextlib.suppress(OSError), open(self.run_dir / "metrics.jsonl") as file:
            # A line that is being written, and those of evaluations, have no place here.
            steps = re.findall(r'^\{"step": (\d+), "split": "train".*\}$', file.read(), re.MULTILINE)
            return os.fstat(file.fileno()).st_ino, int(steps[-1]) if steps else 0
        return 0, 0

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """Returns what the condition gives, once it is true."""
        until = time.monotonic() + WAIT_SECONDS
        while not (result := condition()):
            if self.process.poll() is not None:
                raise Broken(f"the launcher has ended with {self.process.returncode}, {what}:\n{self.tail()}")
            if time.monotonic() > until:
                raise Broken(f"waited for {WAIT_SECONDS:g} s, {what}:\n{self.tail()}")
            time.sleep(0.01)
        return result

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])

    def suffer(self, fault: str, generator: random.Random) -> Outcome:
        """Injects a fault, and waits until the run has gone on after it."""
        file, _ = self.progress()
        said = len(self.log.read_bytes())
        last, samples = 0, []

        def gone_on() -> Outcome | None:
            nonlocal last
            now, (found, step) = time.monotonic(), self.progress()
            if found == file:
                last = max(last, step)
            elif found:
                samples.append((now, step))
            text = self.log.read_text(errors="replace")[said:] if samples else ""
            # All start again, or some stay.
            resumed = re.findall(r"^(?:\[0\] going|all go) on from step (\d+)\b", text, re.MULTILINE)
            later = [time for time, step in samples if resumed and step > int(resumed[-1])]
            if not resumed or not later:
                return None
            delays = re.findall(r"^restart \d+ of \d+ in ([\d.]+) s: ", text, re.MULTILINE)
            recomputed = last - int(resumed[-1])
            seconds = later[0] - start
            return Outcome(fault, self.way, self.workers, seconds, sum(map(float, delays)), recomputed, len(delays))

        start = time.monotonic()
        with INJECTIONS[fault](self, generator):
            return self.wait(gone_on, f"in vain for a step after the fault {fault!r}")

    def end(self, steps: int = STEPS) -> dict[str, Any]:
        """Waits for the end of the run, and checks what it leaves; returns what it has computed in so many steps."""
        try:
            code = self.process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise Broken(f"does not end:\n{self.tail()}") from None
        if code:
            raise Broken(f"exit code {code}:\n{self.tail()}")
        if left := self.processes():
            raise Broken(f"left processes: {[(pid, Path(f'/proc/{pid}/cmdline').read_bytes()) for pid in left]}")
        for each in self.held:
            each.close()
        for address in () if self.on_hosts else sorted(self.addresses):  # a host without processes has no ports
            host, port = address.split(":")
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, int(port)), 5):
                raise Broken(f"left something that listens on {address}")
        computed = load_file(self.run_dir / "checkpoints" / f"step-{steps:010d}.safetensors")
        rows = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row["split"] not in ("fault", "workers")]
        return computed | {"metrics": [(row["split"], row["step"], row.get("loss")) for row in rows]}

    def kill(self) -> None:
        """Ends all that may be left of it."""
        self.process.kill()
        self.process.wait()
        for each in self.held:
            each.close()
        until = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.1)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def chosen(launch: Launch, generator: random.Random) -> int:
    """The pid of a random worker."""
    members = launch.members()
    if len(members) != launch.workers:
        raise Broken(f"{len(members)} of {launch.workers} workers run:\n{launch.tail()}")
    return generator.choice(members)


@contextlib.contextmanager
def kill(launch: Launch, generator: random.Random) -> Iterator[None]:
    os.kill(chosen(launch, generator), signal.SIGKILL)
    yield


@contextlib.contextmanager
def two(launch: Launch, generator: random.Random) -> Iterator[None]:
    """Two workers are killed, one a moment after the other."""
    first, second = generator.sample(launch.members(), 2)
    os.kill(first, signal.SIGKILL)
    time.sleep(generator.uniform(0, 0.2))
    os.kill(second, signal.SIGKILL)
    yield


@contextlib.contextmanager
def chief(launch: Launch, generator: random.Random) -> Iterator[None]:
    """The worker is killed that writes the run folder."""
    os.kill(launch.chief(), signal.SIGKILL)
    yield


@contextlib.contextmanager
def stop(launch: Launch, generator: random.Random) -> Iterator[None]:
    os.kill(chosen(launch, generator), signal.SIGSTOP)
    yield


@contextlib.contextmanager
def disk(launch: Launch, generator: random.Random) -> Iterator[None]:
    """The next checkpoint does not fit."""
    resource.prlimit(launch.chief(), resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    yield


@contextlib.contextmanager
def port(launch: Launch, generator: random.Random) -> Iterator[None]:
    """A worker is killed, and its port is another process's at once."""
    pid = chosen(launch, generator)
    address = launch.address(pid)
    os.kill(pid, signal.SIGKILL)
    launch.held.append(taken(address))
    yield


@contextlib.contextmanager
def port_again(launch: Launch, generator: random.Random) -> Iterator[None]:
    """A worker is killed, and its next port is another process's before it gets there."""
    index, (pid, address) = generator.choice(sorted(launch.trainers().items()))
    os.kill(pid, signal.SIGKILL)

    def restarted() -> str | None:
        _, new = launch.trainers().get(index, (0, address))
        return new if new != address else None

    with taken(launch.wait(restarted, "in vain for a restart")):
        yield


@contextlib.contextmanager
def network(launch: Launch, generator: random.Random) -> Iterator[None]:
    """A host's link is cut for a minute."""
    index = generator.choice(sorted(launch.trainers()))

    def link(state: str) -> None:
        subprocess.run(["ip", "-n", hosts.name(index + 1), "link", "set", "e0", state], check=True)

    link("down")
    mended = threading.Timer(CUT_SECONDS, link, ["up"])
    mended.start()
    try:
        yield
    finally:
        if mended.is_alive():  # the run has gone on without it, or never will
            mended.cancel()
            link("up")
        mended.join()


def taken(address: str) -> socket.socket:
    """A socket that listens there, as soon as whoever has the port is dead."""
    host, number = address.split(":")
    until = time.monotonic() + 5
    while True:
        try:
            return socket.create_server((host, int(number)))
        except OSError as error:
            if time.monotonic() > until:
                raise Broken(f"{address} does not get free: {error}") from None


INJECTIONS: dict[str, Callable[[Launch, random.Random], contextlib.AbstractContextManager[None]]] = {
    "kill": kill,
    "chief": chief,
    "two": two,
    "stop": stop,
    "disk": disk,
    "port": port,
    "port_again": port_again,
    "network": network,
}
WORDS = {
    "kill": "a worker is killed",
    "chief": "the first worker is killed",
    "two": "two workers are killed",
    "stop": "a worker is stopped (SIGSTOP)",
    "disk": "the first worker's disk is full",
    "port": "a worker is killed, its port taken",
    "port_again": "a worker is killed, its next port taken",
    "network": f"a host's link is cut for {CUT_SECONDS:g} s",
}
SLOW = ("port_again", "network")


def run(
    faults: list[str], generator: random.Random, workers: int, way: str = "process", on_hosts: bool = False
) -> tuple[list[Outcome], dict[str, Any]]:
    """One run that suffers the faults one after the other, each in a part of it of its own."""
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        launch = Launch(Path(folder), workers, way, on_hosts)
        try:
            part = STEPS // (len(faults) + 1)
            for i, fault in enumerate(faults):
                # Steps from where a checkpoint is certain; a call of the loop is cut anywhere.
                step = max(i * part, SAVE_EVERY + LOOP) + generator.randrange(part - SAVE_EVERY - LOOP)
                launch.wait(lambda step=step: launch.progress()[1] >= step, f"in vain for step {step}")
                launch.crawl.touch()  # a spare takes long to start, and the run is to suffer more
                launch.wait(launch.ready, "in vain for all workers and spares")
                launch.crawl.unlink()
                if ports := [port for pid, _ in launch.trainers().values() for port in sockets(pid)]:
                    raise Broken(f"listens in the middle of a run: {ports}")
                time.sleep(generator.uniform(0, 0.02 * LOOP))
                outcomes.append(launch.suffer(fault, generator))
                print(outcomes[-1], flush=True)
                if outcomes[-1].recomputed > (SAVE_EVERY + LOOP if way == "restart" else 0):
                    raise Broken(f"{fault}: {outcomes[-1].recomputed} steps were made again")
            return outcomes, launch.end()
        except Broken:
            # What the workers have said is worth more than an empty /tmp.
            kept = shutil.copytree(folder, tempfile.mkdtemp(prefix="faults-"), dirs_exist_ok=True)
            print(f"see {kept}", file=sys.stderr)
            raise
        finally:
            launch.kill()


def compare(expected: dict[str, Any], computed: dict[str, Any]) -> None:
    """Raises Broken unless all arrays have the same bits, and all metrics are the same."""
    if expected.keys() != computed.keys():
        raise Broken(f"the last checkpoints differ in what they hold: {set(expected) ^ set(computed)}")
    for name, value in expected.items():
        if name == "metrics":
            same = value == computed[name]
        else:
            same = value.dtype == computed[name].dtype and value.tobytes() == computed[name].tobytes()
        if not same:
            raise Broken(f"{name} is not what a run without faults ends with")


def rows(outcomes: list[Outcome], command: str) -> list[dict[str, Any]]:
    """A row a fault: medians and maxima over all times it was injected."""
    found = []
    for fault, way in itertools.product(WORDS, WAYS):
        if own := [outcome for outcome in outcomes if (outcome.fault, outcome.way) == (fault, way)]:
            seconds = [outcome.seconds for outcome in own]
            found.append(
                {
                    "fault": fault,
                    "words": WORDS[fault],
                    "way": way,
                    "workers": sorted({outcome.workers for outcome in own}),
                    "times": len(own),
                    "seconds_median": round(statistics.median(seconds), 1),
                    "seconds_max": round(max(seconds), 1),
                    "delay_seconds_median": statistics.median(outcome.delay_seconds for outcome in own),
                    "recomputed_steps_median": statistics.median(outcome.recomputed for outcome in own),
                    "recomputed_steps_max": max(outcome.recomputed for outcome in own),
                    "restarts_max": max(outcome.restarts for outcome in own),
                    "command": command,
                }
            )
    return found


def write(rows_: list[dict[str, Any]], key: str) -> None:
    """Writes the rows in place of those of the kind that are there."""
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    content |= {"command": COMMAND, "steps": STEPS, "save_every": SAVE_EVERY, "steps_per_loop": LOOP, key: rows_}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def killed_every(options: argparse.Namespace, generator: random.Random) -> int:
    """Counts the steps of a run that loses a worker every so many seconds, and of one that does not."""
    found = []
    for workers, way in itertools.product(options.workers, (None, *options.ways)):
        with tempfile.TemporaryDirectory() as folder:
            launch = Launch(
                Path(folder), workers, way or "process", params=["run.steps=1000000", "run.save_every=1000"]
            )
            kills = 0
            try:
                launch.wait(lambda launch=launch: launch.progress()[1] >= LOOP and launch.ready(), "in vain for a step")
                start, first = time.monotonic(), launch.progress()[1]
                end = start + 60 * (options.minutes if way else min(options.minutes, 1.0))
                while (now := time.monotonic()) < end:
                    if way and now >= start + options.every * (kills + 1):
                        if members := launch.members():
                            os.kill(generator.choice(members), signal.SIGKILL)
                        kills += 1
                    time.sleep(0.05)
                seconds, steps = time.monotonic() - start, launch.progress()[1] - first
            finally:
                launch.kill()
        rate = steps / seconds
        undisturbed = rate if way is None else undisturbed  # noqa: F821 (the first of these workers has none)
        row = {"workers": workers, "way": way or "none", "kills": kills, "seconds": round(seconds, 1), "steps": steps}
        found.append(row | {"share": round(rate / undisturbed, 3)})
        print(found[-1], flush=True)
    write(found, f"every_{options.every:g}_seconds")
    return 0


def plan(options: argparse.Namespace, generator: random.Random) -> Iterator[tuple[list[str], bool]]:
    """The faults of each run, and whether it runs on hosts."""
    quick = [fault for fault in options.faults if fault not in SLOW]
    queue = []
    for number in range(max(options.rounds, options.slow_rounds)):
        now = quick if number < options.rounds else []
        if "port_again" in options.faults and number < options.slow_rounds:
            now = [*now, "port_again"]
        queue += generator.sample(now, len(now))
        while len(queue) >= FAULTS_A_RUN:
            yield queue[:FAULTS_A_RUN], False
            queue = queue[FAULTS_A_RUN:]
        if "network" in options.faults and number < options.slow_rounds:
            yield ["network"], True
    if queue:
        yield queue, False


def arguments() -> argparse.Namespace:
    def known(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(INJECTIONS):
            raise argparse.ArgumentTypeError(f"{unknown} unknown: choose from {list(INJECTIONS)}")
        return text.split(",")

    parser = argparse.ArgumentParser(prog=COMMAND)
    parser.add_argument("--rounds", type=int, default=10, help="how often each fault is injected")
    parser.add_argument("--slow_rounds", type=int, default=2, help=f"the same of {' and '.join(SLOW)}")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the workers")
    parser.add_argument("--faults", type=known, default=list(INJECTIONS), help="which, with commas between")
    parser.add_argument("--workers", type=lambda text: [int(each) for each in text.split(",")], default=[3])
    parser.add_argument("--ways", type=lambda text: text.split(","), default=["spare", "process"], help=f"of {WAYS}")
    parser.add_argument("--every", type=float, help="kill a worker every so many seconds, and count steps")
    parser.add_argument("--minutes", type=float, default=15, help="no run begins that could end later")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    start = time.monotonic()
    if sys.platform != "linux":
        print("error: faults are injected by way of /proc, which Linux alone has", file=sys.stderr)
        return 2
    if "network" in options.faults and (why := hosts.available()):
        print(f"skipped: network, for {why}", flush=True)
        options.faults.remove("network")
    generator = random.Random(options.seed)
    if options.every:
        return killed_every(options, generator)
    expected = {workers: run([], generator, workers)[1] for workers in options.workers}
    kinds = itertools.cycle(itertools.product(options.workers, options.ways))
    outcomes: list[Outcome] = []
    longest = {False: 60.0, True: 60.0 + CUT_SECONDS}  # seconds of a run so far
    for faults, on_hosts in plan(options, generator):
        begun, (workers, way) = time.monotonic(), next(kinds)
        if begun + longest[on_hosts] > start + 60 * options.minutes:
            print(f"no time is left for {', '.join(faults)}", flush=True)
            continue
        try:
            with hosts.hosts(workers) if on_hosts else contextlib.nullcontext():
                found, computed = run(faults, generator, workers, "process" if on_hosts else way, on_hosts)
            compare(expected[workers], computed)
        except Broken as reason:
            print(f"error: {', '.join(faults)}: {reason}", file=sys.stderr)
            return 1
        outcomes += found
        longest[on_hosts] = max(longest[on_hosts], time.monotonic() - begun)
    write(rows(outcomes, shlex.join([*COMMAND.split(), *sys.argv[1:]])), "rows")
    print(tables.text("faults"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
