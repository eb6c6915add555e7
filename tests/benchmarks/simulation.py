"""What `dist_partial.plan` simulates against runs on real hosts, and what it says of more workers than there are here.

python -m tests.benchmarks.simulation [--table=runs] [--table=many] [--table=straggler] [--table=kills] [--table=large]

Hosts are network namespaces on this machine, which share its cores; this needs root and iproute2, and for the straggler
the `cpu` controller of cgroup v1. Every prediction is made in a process of its own before its run.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests import ROOT
from tests.benchmarks import tables
from tests.helpers import hosts

COMMAND = "python -m tests.benchmarks.simulation"
RESULTS = Path(__file__).parent / "results" / "simulation.json"
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
LOOP = "run.eval_examples = 16\nsample.length = 1\n"
WIDE = f"""
run.model = @two_dense
two_dense.hidden = 8192
run.data = @stdlib_shapes
run.rules = [('train', '.*')]
run.optimizer = @keras.optimizers.SGD
run.steps = 48
run.steps_per_loop = 8
{LOOP}"""
DEEP = f"""
run.model = @byte_transformer
run.data = @stdlib_corpus
run.rules = [('train', '.*')]
run.steps = 64
run.steps_per_loop = 8
{LOOP}"""
TINY = f"""
run.model = @two_dense
two_dense.hidden = 32
run.data = @stdlib_shapes
run.rules = [('train', '.*')]
run.steps = 240
run.steps_per_loop = 24
{LOOP}"""
FOUR_BITS = "run.reduction = @quantized()\nquantized.bits = 4\n"
LOCAL = "run.reduction = @local_sgd()\nlocal_sgd.sync_every = 8\n"
RUNS = {
    "two_dense, float32 every step": (WIDE, 8),
    "two_dense, float32 every 8 steps": (WIDE + LOCAL, 8),
    "transformer, 4 bits every step": (DEEP + FOUR_BITS, 4),
}
WORKERS, RATE = (2, 4, 8, 16), "100mbit"
MANY = (2, 16, 32)
CORES = 0.2  # that the straggler may use, of one
PERIOD_US = 10_000
KILLS, KILLED_STEPS, SAVE_EVERY, ROUNDS = 3, 1_200, 50, 2


def config(folder: str, text: str) -> Path:
    path = Path(folder, "config.gin")
    path.write_text(text)
    return path


def predicted(path: Path, prefix: Sequence[str] = (), **machine: Any) -> dict[str, float]:
    """What is said of a run, from a process of its own."""
    command = [*prefix, sys.executable, "-m", "tests.benchmarks.simulation", "--child", str(path), json.dumps(machine)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **QUIET})
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def child(path: str, described: str) -> None:
    from dist_partial import plan
    from dist_partial.config import gin_files
    from dist_partial.training import cost_model

    values = json.loads(described)
    rate, slow_ms = values.pop("rate", None), values.pop("slow_ms", None)
    machine = cost_model.Machine(bandwidth=plan.bytes_per_second(rate) if rate else math.inf, **values)
    settings = gin_files.load([path]).settings
    measured = cost_model.measure(settings, machine)
    if slow_ms:
        others = measured.step * measured.slower(machine)
        machine = dataclasses.replace(machine, stragglers=[(1, max(1.0, slow_ms / 1e3 / others))])
    cost = cost_model.cost_of(measured, settings, machine)
    print(json.dumps({"step_ms": cost.step * 1e3, "compute_ms": measured.step * 1e3}))


@contextlib.contextmanager
def held(host: int, group: Path) -> Iterator[None]:
    """Keeps the processes of a host in a control group; within a namespace there is another /sys."""
    ended = threading.Event()

    def hold() -> None:
        while not ended.wait(0.5):
            for process in hosts.processes(host):
                with contextlib.suppress(OSError):  # it has ended
                    Path(group, "cgroup.procs").write_text(str(process))

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def compared(name: str, text: str, count: int, rate: str | None, group: Path | None = None, **more: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = config(folder, text)
        machine = {"workers": count, "workers_per_host": count, **more}
        expected = predicted(path, **machine, **({"rate": rate} if rate else {}))["step_ms"]
        meanwhile = held(2, group) if group else None
        found = hosts.trained(path, count, rate, meanwhile)["mean_step_ms"]
    row = {"run": name, "workers": count, "rate": rate or "no limit", "predicted_ms": expected, "measured_ms": found}
    row["error"] = expected / found - 1
    print(row, file=sys.stderr, flush=True)
    return row


def runs() -> list[Any]:
    """Runs of every kind on links of one rate."""
    found = []
    for name, (text, each) in RUNS.items():
        for count in WORKERS:
            found.append(compared(name, f"{text}run.global_batch = {each * count}\n", count, RATE))
    return found


def many() -> list[Any]:
    """A tiny model, of which a step is nearly all messages."""
    return [compared("two_dense, 6 kB", f"{TINY}run.global_batch = {8 * count}\n", count, None) for count in MANY]


def straggler() -> list[Any]:
    """One worker of four may use a part of a core only; how long its steps take is measured on one like it.

    Operations have one thread: of several, one that waits for work uses up the others' part while nobody else does.
    """
    rows = []
    os.environ["TF_NUM_INTRAOP_THREADS"] = "1"
    with _slow_group() as group, tempfile.TemporaryDirectory() as folder:
        enter = f"echo $$ > {group}/cgroup.procs"
        for name, more in (("float32 every step", ""), ("float32 every 8 steps", LOCAL)):
            text = f"{DEEP}{more}run.global_batch = 32\n"
            alone = ["bash", "-c", f'{enter}; exec "$@"', "bash"]
            slow = predicted(config(folder, text), alone, workers=4)["compute_ms"]
            rows.append(compared(f"transformer, {name}", text, 4, "1gbit", group, slow_ms=slow))
    return rows


@contextlib.contextmanager
def _slow_group() -> Iterator[Path]:
    group = Path("/sys/fs/cgroup/cpu/dist_partial_straggler")
    group.mkdir()
    try:
        Path(group, "cpu.cfs_period_us").write_text(str(PERIOD_US))
        Path(group, "cpu.cfs_quota_us").write_text(str(int(CORES * PERIOD_US)))
        yield group
    finally:
        group.rmdir()


def kills() -> list[Any]:
    """Two workers under the launcher, of which one is killed some times; from its first step to its end.

    A run without kills says what a step takes, and the first with kills what a restart takes.
    """
    from dist_partial.training.simulation import Faults, with_faults

    alone = _killed([])
    step, restart = alone / KILLED_STEPS, 0.0
    drawn = random.Random(0)
    rows = []
    for number in range(ROUNDS + 1):
        moments = sorted(drawn.uniform(0.1, 0.9) * (alone + KILLS * restart) for _ in range(KILLS))
        gaps = [after - before for before, after in zip([0.0, *moments], moments, strict=False)]
        found = _killed(moments)

        def expected(restart: float, gaps: Sequence[float] = gaps) -> Any:
            return with_faults(step, KILLED_STEPS, Faults(0.0, restart, SAVE_EVERY), iter(gaps))

        if number == 0:
            restart = min((each / 10 for each in range(1, 600)), key=lambda each: abs(expected(each).seconds - found))
            continue
        outcome = expected(restart)
        row = {"round": number, "kills": KILLS, "step_ms": step * 1e3, "restart_seconds": restart}
        row |= {"predicted_seconds": outcome.seconds, "measured_seconds": found}
        row |= {"error": outcome.seconds / found - 1, "goodput": outcome.goodput}
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def _killed(moments: Sequence[float]) -> float:
    """Seconds from the first step to the end of a run of which a worker is killed so long after that step."""
    text = f"{DEEP}run.global_batch = 8\nrun.save_every = {SAVE_EVERY}\n"
    with tempfile.TemporaryDirectory() as folder:
        path = config(folder, text)
        command = [sys.executable, "-m", "dist_partial.launch", "local", "--workers=2", "--restarts=10", "--"]
        command += [f"--gin_file={path}", f"--gin_param=run.steps={KILLED_STEPS}", f"--run_dir={folder}/run"]
        with Path(folder, "output").open("w") as output:
            launcher = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **QUIET}, stdout=output, stderr=output, start_new_session=True
            )
            try:
                while not _steps(Path(folder, "run", "metrics.jsonl")):
                    time.sleep(0.02)
                    assert launcher.poll() is None, Path(folder, "output").read_text()[-2000:]
                began = time.monotonic()
                for moment in moments:
                    time.sleep(max(0.0, began + moment - time.monotonic()))
                    os.kill(_workers(launcher.pid)[-1], signal.SIGKILL)
                if launcher.wait(timeout=500):
                    raise RuntimeError(Path(folder, "output").read_text()[-2000:])
                return time.monotonic() - began
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(launcher.pid, signal.SIGKILL)


def _steps(path: Path) -> bool:
    return path.exists() and '"train"' in path.read_text()


def _workers(launcher: int) -> list[int]:
    """Processes of the workers, once there are some."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    while not (found := children.read_text().split()):
        time.sleep(0.05)
    return [int(process) for process in found]


def large() -> list[Any]:
    """What is said of more workers than there are here, on one core."""
    rows = []
    for workers in (100, 1_000, 10_000):
        command = ["taskset", "-c", "0", sys.executable, "-m", "dist_partial.plan", *LARGE_FLAGS]
        command += [f"--hosts={workers // 10}", f"--gin_param=run.global_batch={8 * workers}"]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **QUIET}, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        row = {"workers": workers, "seconds": time.perf_counter() - began, "command": " ".join(command[4:])}
        row["output"] = done.stdout[done.stdout.index("cheapest within") :]
        rows.append(row)
        print(row["output"], row["seconds"], file=sys.stderr, flush=True)
    return rows


LARGE_FLAGS = [
    "--gin_file=gin_configs/quickstart.gin",
    "--gin_param=run.steps=100000",
    "--devices=10",
    "--bandwidth=100gbit",
    "--between=10gbit",
    "--step_ms=100,100,101,101,102,103,104,108,115,140",
    "--hours_between_faults=2000",
    "--restart_seconds=120",
    "--price_per_hour=20",
    "--price_per_gb=0.01",
    "--max_loss=2",
]
TABLES = {"runs": runs, "many": many, "straggler": straggler, "kills": kills, "large": large}


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND)
    parser.add_argument("--table", choices=list(TABLES), action="append")
    chosen = parser.parse_args().table or list(TABLES)
    if reason := hosts.available():
        sys.exit(f"error: no hosts can be made here: {reason}")
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    content |= {"command": COMMAND}
    for name in chosen:
        content[name] = TABLES[name]()
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(tables.text("simulation", content))


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
