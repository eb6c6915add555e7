"""Steps whose data is slower than their computation: how long they take, beside the slower of the two.

python -m tests.benchmarks.waits

Writes tests/benchmarks/results/waits.json. A batch sleeps, as one does that waits for a disk, and so does a step; the
batches of the last rows compute. A step takes max(data / readers, step) where nothing waits for anything else.
"""

import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from dist_partial.config.settings import Settings
from dist_partial.data import ArraySource, Dataset
from dist_partial.training import loop
from tests.benchmarks import tables

COMMAND = "python -m tests.benchmarks.waits"
RESULTS = Path(__file__).parent / "results" / "waits.json"
SETTING = "2 CPU cores; medians of 5 runs of 60 steps, without the first 12"
RUNS, STEPS, FIRST = 5, 60, 12
X, Y = np.zeros([96, 2], np.float32), np.zeros([96, 1], np.float32)
# Milliseconds of a batch and of a step, and what reads.
CASES: tuple[tuple[str, float, float, dict[str, int]], ...] = (
    ("sleeps", 20, 60, {"readers": 1}),
    ("sleeps", 60, 20, {"readers": 1}),
    ("sleeps", 60, 60, {"readers": 1}),
    ("sleeps", 160, 20, {"readers": 4}),
    ("sleeps", 60, 40, {"readers": 4}),
    ("sleeps", 120, 20, {"reader_processes": 2}),
    ("computes", 40, 20, {"readers": 1}),
    ("computes", 40, 20, {"reader_processes": 2}),
)


class Slow(ArraySource):
    """Takes so many seconds for a batch, by sleeping or by computing in Python."""

    seconds, computes = 0.0, False

    def fetch(self, indices: np.ndarray) -> tuple[Any, ...]:
        if self.computes:
            until = time.thread_time() + self.seconds
            while time.thread_time() < until:
                pass
        else:
            time.sleep(self.seconds)
        return super().fetch(indices)


class Pause(keras.layers.Layer):
    """Sleeps for a while in each step, and notes when."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.times = seconds, []

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        def pause(x: np.ndarray) -> np.ndarray:
            self.times.append(time.perf_counter())
            time.sleep(self.seconds)
            return x

        return tf.ensure_shape(tf.numpy_function(pause, [x], x.dtype), x.shape) if training else x


def seconds(what: str, batch: float, step: float, readers: dict[str, int]) -> float:
    """Of a step, in a run."""
    source, pause = Slow(X, Y), Pause(step)
    source.__dict__.update(seconds=batch, computes=what == "computes")

    def model() -> keras.Model:
        return keras.Sequential([keras.Input([2]), pause, keras.layers.Dense(1)])

    data = Dataset("slow", source, ArraySource(X, Y), "1")
    settings = {"steps": STEPS, "global_batch": 8, "eval_every": None, "save_every": None, "loss": "mse"}
    with tempfile.TemporaryDirectory() as folder:
        loop.run(Settings([("train", ".*")], model, lambda: data, **settings, **readers), folder)
    return (pause.times[-1] - pause.times[FIRST]) / (len(pause.times) - 1 - FIRST)


def main() -> None:
    found: list[list[float]] = [[] for _ in CASES]
    for _, (number, (what, batch, step, readers)) in itertools.product(range(RUNS), enumerate(CASES)):
        found[number].append(1000 * seconds(what, batch / 1000, step / 1000, readers))
    rows = []
    for (what, batch, step, readers), times in zip(CASES, found, strict=True):
        ((name, count),) = readers.items()
        least = max(batch / count, step)
        rows.append(
            {"what": what, "data_ms": batch, "step_ms": step, "by": f"{name} = {count}", "least_ms": least}
            | {"median_ms": statistics.median(times), "most_ms": max(times)}
        )
    RESULTS.write_text(json.dumps({"command": COMMAND, "setting": SETTING, "rows": rows}, indent=1) + "\n")
    print(tables.text("waits"))


if __name__ == "__main__":
    main()
    os._exit(0)
