"""CPU and time of a sum over workers on loopback, against gloo: what the connections themselves cost.

python -m tests.benchmarks.collectives --python_torch=PYTHON_WITH_TORCH

Each worker is a process that sums one array again and again; gloo's are those of PyTorch. CPU is that of all threads
of a worker, of the system's calls, too. The systems take turns, in reverse every other round.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import tables

COMMAND = "python -m tests.benchmarks.collectives"
ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "collectives.json"
WARM_UP = 5  # sums
BLOCKS = 5  # in each round
BLOCK_SECONDS = 0.5
Sum = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One place in the table: who sums how many bytes."""

    workers: int
    bytes: int


def gloo(setting: Setting, folder: Path) -> Callable[[int], Sum]:
    import torch

    def join(rank: int) -> Sum:
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=setting.workers
        )

        def add(array: np.ndarray) -> np.ndarray:
            tensor = torch.from_numpy(array.copy())  # a sum of ours leaves what it is given, too
            torch.distributed.all_reduce(tensor)
            return tensor.numpy()

        return add

    return join


def dist_partial(setting: Setting, folder: Path) -> Callable[[int], Sum]:
    from dist_partial.distributed import rendezvous
    from dist_partial.distributed.tcp_backend import TCPBackend
    from tests.helpers.workers import loopback

    addresses = loopback(setting.workers)

    def join(rank: int) -> Sum:
        links = rendezvous.connect(rank, addresses, 60.0, sealed="SEAL" in os.environ)
        return TCPBackend(rank, addresses, links, 60.0).sum

    return join


SYSTEMS = {"gloo": gloo, "dist_partial": dist_partial}


def timed(add: Sum, setting: Setting, rank: int) -> dict[str, Any]:
    """Milliseconds of one worker a sum: CPU, and time."""
    array = np.arange(setting.bytes // 4, dtype=np.float32) % 1024 + rank
    expected = array * setting.workers + setting.workers * (setting.workers - 1) / 2 - rank * setting.workers
    np.testing.assert_array_equal(add(array), expected)
    begin = time.perf_counter()
    for _ in range(WARM_UP):
        add(array)
    slowest = -add(np.full(1, -(time.perf_counter() - begin) / WARM_UP, np.float32))[0] / setting.workers
    count = max(3, int(BLOCK_SECONDS / slowest))  # the same on all
    blocks = []
    for _ in range(BLOCKS):
        add(array[:1])
        cpu, begin = time.process_time(), time.perf_counter()
        for _ in range(count):
            add(array)
        blocks.append([(time.process_time() - cpu) * 1e3 / count, (time.perf_counter() - begin) * 1e3 / count])
    return {"blocks": blocks}


def work(system: str, setting: Setting) -> None:
    """Forks the workers, and prints what each has found."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        join = SYSTEMS[system](setting, folder)
        children = []
        for rank in range(setting.workers):
            if child := os.fork():
                children.append(child)
                continue
            found = timed(join(rank), setting, rank)
            (folder / f"{rank}.json").write_text(json.dumps(found))
            time.sleep(0.5)  # the others end their last sum
            os._exit(0)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            sys.exit(f"exit codes {codes}")
        for rank in range(setting.workers):
            print((folder / f"{rank}.json").read_text())


def launch(system: str, python: str, setting: Setting) -> list[list[float]]:
    """One round: for each block CPU and time, means over the workers."""
    command = [python, "-m", "tests.benchmarks.collectives", f"--work={system}"]
    command += [f"--workers={setting.workers}", f"--bytes={setting.bytes}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    blocks = np.array([json.loads(line)["blocks"] for line in done.stdout.splitlines()])
    return np.mean(blocks, axis=0).tolist()


def measure(setting: Setting, pythons: dict[str, str], rounds: int) -> list[dict[str, Any]]:
    found: dict[str, list[list[float]]] = {system: [] for system in pythons}
    for number in range(rounds):
        for system in list(pythons)[:: -1 if number % 2 else 1]:
            found[system] += launch(system, pythons[system], setting)
    rows = []
    for system, blocks in found.items():
        cpu, took = (statistics.median(column) for column in zip(*blocks, strict=True))
        row = {"system": system, **dataclasses.asdict(setting), "cpu_ms": round(cpu, 3), "ms": round(took, 3)}
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def numbers(text: str) -> Sequence[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND)
    torch_here = sys.executable if importlib.util.find_spec("torch") else None
    parser.add_argument("--python_torch", default=torch_here, help="the Python that has PyTorch; without it, no gloo")
    parser.add_argument("--workers", type=numbers, default=[2, 4, 8, 16])
    parser.add_argument("--bytes", type=numbers, default=[4 * 2**20, 2**16])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--no_write", action="store_true", help="print only")
    parser.add_argument("--work", choices=SYSTEMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.work, Setting(options.workers[0], options.bytes[0]))
    pythons = {"gloo": options.python_torch, "dist_partial": sys.executable}
    pythons = {system: python for system, python in pythons.items() if python}
    settings = [Setting(workers, size) for size in options.bytes for workers in options.workers]
    rows = [row for setting in settings for row in measure(setting, pythons, options.rounds)]
    content = {"command": COMMAND, "cores": os.cpu_count(), "rounds": options.rounds, "blocks_a_round": BLOCKS}
    if not options.no_write:
        RESULTS.write_text(json.dumps(content | {"rows": rows}, indent=1) + "\n")
    print(tables.text("collectives", {"rows": rows}))


if __name__ == "__main__":
    main()
