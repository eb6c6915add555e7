"""What an epoch takes with the activations of a frozen prefix kept, and without.

python -m tests.benchmarks.cache

Writes tests/benchmarks/results/cache.json.
"""

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from dist_partial.config.settings import Settings
from dist_partial.data import ArraySource, Dataset, fingerprint
from dist_partial.distributed import replicas
from dist_partial.models import byte_transformer
from dist_partial.training.build import build
from dist_partial.training.schedule_runner import ScheduleRunner
from tests.benchmarks import tables

COMMAND = "python -m tests.benchmarks.cache"
RESULTS = Path(__file__).parent / "results" / "cache.json"
BLOCKS, WIDTH, WINDOW, BATCH = 10, 128, 64, 32
EXAMPLES, EPOCHS = 512, 5
CACHES = (None, "memory", "disk")


def tokens() -> Dataset:
    x = np.random.default_rng(0).integers(0, 256, (EXAMPLES, WINDOW + 1)).astype(np.int32)
    source = ArraySource(x[:, :-1], x[:, 1:])
    return Dataset("tokens", source, source, fingerprint(x))


def start(made: replicas.Replicas, frozen: int, cache: str | None) -> ScheduleRunner:
    above = "|".join(f"block_{i}" for i in range(frozen, BLOCKS))
    settings = Settings(
        [("train", rf"({above}|final_norm|head)/.*"), ("freeze", ".*")],
        lambda: byte_transformer(layers=BLOCKS, width=WIDTH, heads=4),
        tokens,
        steps=EPOCHS * EXAMPLES // BATCH,
        global_batch=BATCH,
        activation_cache=cache,
        steps_per_loop=4,
    )
    trainer = build(settings, made)
    return ScheduleRunner(trainer, trainer.state())


def epochs(made: replicas.Replicas, frozen: int) -> list[dict[str, Any]]:
    """Seconds of each epoch, the three taking turns; the second and later ones find everything kept."""
    courses = {cache: start(made, frozen, cache) for cache in CACHES}
    took: dict[str | None, list[float]] = {cache: [] for cache in CACHES}
    for runner in courses.values():
        [trace() for trace in runner.enter(0)]  # compiles
        runner.advance(0)
    kept = {cache: runner.phase.activations for cache, runner in courses.items()}
    for _ in range(EPOCHS):
        for cache, runner in courses.items():
            begun = time.perf_counter()
            for _ in range(EXAMPLES // BATCH // 4):
                runner.advance(4)["loss"].numpy()
            took[cache].append(time.perf_counter() - begun)
    whole = statistics.median(took[None][1:])
    return [
        {
            "frozen": f"{frozen} of {BLOCKS} blocks",
            "run.activation_cache": str(cache),
            "first epoch, s": round(times[0], 2),
            "later epochs, s": round(statistics.median(times[1:]), 2),
            "of the time without": round(statistics.median(times[1:]) / whole, 2),
            "MB kept": round(kept[cache].bytes / 1e6, 1) if kept[cache] else 0,
        }
        for cache, times in took.items()
    ]


def main() -> None:
    made = replicas.create("mirrored", 2)
    rows = []
    for frozen in (5, 8):
        rows += epochs(made, frozen)
        keras.utils.clear_session()
    setting = f"byte_transformer({BLOCKS} layers, width {WIDTH}), {EXAMPLES} examples of {WINDOW} bytes, 2 replicas"
    RESULTS.write_text(json.dumps({"command": COMMAND, "setting": setting, "rows": rows}, indent=1) + "\n")
    print(tables.text("cache"))


if __name__ == "__main__":
    main()
