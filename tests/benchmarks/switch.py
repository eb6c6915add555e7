"""What a switch of the schedule costs: the steps after it, and the memory of slots that are dropped.

python -m tests.benchmarks.switch

Writes tests/benchmarks/results/switch.json.
"""

import ctypes
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from dist_partial.config.settings import Settings
from dist_partial.data import ArraySource, Dataset, fingerprint
from dist_partial.distributed import replicas
from dist_partial.models import byte_transformer
from dist_partial.schedules.fixed import Rotation
from dist_partial.training.build import Trainer, build
from dist_partial.training.schedule_runner import ScheduleRunner
from tests.benchmarks import tables

COMMAND = "python -m tests.benchmarks.switch"
RESULTS = Path(__file__).parent / "results" / "switch.json"
EVERY, AFTER, ROUNDS = 12, 3, 3
WIDTH = 2048  # of the dense layers whose slots come and go: 16.8 MB a layer and slot


def tokens() -> Dataset:
    x = np.random.default_rng(0).integers(0, 256, (64, 65)).astype(np.int32)
    source = ArraySource(x[:, :-1], x[:, 1:])
    return Dataset("tokens", source, source, fingerprint(x))


def vectors() -> Dataset:
    x = np.random.default_rng(0).normal(size=(16, WIDTH)).astype(np.float32)
    source = ArraySource(x, np.zeros(16, np.int32))
    return Dataset("vectors", source, source, fingerprint(x))


def wide() -> keras.Model:
    return keras.Sequential([keras.Input((WIDTH,)), *[keras.layers.Dense(WIDTH, name=f"dense{i}") for i in range(4)]])


def start(made: replicas.Replicas, model: Any, data: Any, leave: str, steps: int) -> tuple[Trainer, ScheduleRunner]:
    schedule = Rotation(every=EVERY, order="ascending")
    settings = Settings(
        [("train", ".*")], model, data, steps=steps, global_batch=8, schedule=schedule, leave=leave, compiled_plans=24
    )
    built = build(settings, made)
    return built, ScheduleRunner(built, built.state())


def step_times(made: replicas.Replicas) -> list[dict[str, Any]]:
    """Milliseconds a step right after a switch to a plan seen before, and later, of each unit."""
    built, runner = start(made, lambda: byte_transformer(layers=4, width=128, heads=4), tokens, "keep", 10**6)
    units = len(built.units)
    early: dict[str, list[float]] = {}
    steady: dict[str, list[float]] = {}
    for done in range(EVERY * units * (1 + ROUNDS)):
        begun = time.perf_counter()
        [trace() for trace in runner.enter(done)]  # compiles what is new
        runner.advance(1)["loss"].numpy()
        took = (time.perf_counter() - begun) * 1e3  # what choosing and changing takes is a part of the step
        if done >= EVERY * units:
            (name,) = runner.phase.units
            (early if done % EVERY < AFTER else steady).setdefault(name, []).append(took)
    rows = []
    for name in early:
        first, later = statistics.median(early[name]), statistics.median(steady[name])
        rows.append(
            {"unit": name, "after_ms": round(first, 2), "steady_ms": round(later, 2), "ratio": round(first / later, 3)}
        )
    return rows


def resident() -> float:
    """MiB of this process in memory, once what is free has been given back."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(leave: str) -> dict[str, Any]:
    """Memory with the slots of one unit of four, at each visit; run in a process of its own."""
    built, runner = start(replicas.create("mirrored", 2), wide, vectors, leave, 10**6)
    before = resident()
    visits = []
    for done in range(0, 3 * len(built.units) * EVERY, EVERY):
        [trace() for trace in runner.enter(done)]  # compiles what is new
        runner.advance(2)["loss"].numpy()
        visits.append(round(resident() - before))
    slots = sum(v.numpy().nbytes for group in built.optimizers for v in group.state.values()) / 2**20
    return {"leave": leave, "MiB_above_start": visits, "slots_MiB_at_the_end": round(slots, 1)}


def main() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        memories = list(pool.map(memory, ("keep", "drop")))
    found = {"command": COMMAND, "steps": step_times(replicas.create("mirrored", 2)), "memory": memories}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(tables.text("switch"))


if __name__ == "__main__":
    main()
