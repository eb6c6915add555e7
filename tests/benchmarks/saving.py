"""What a checkpoint costs the steps: SmolLM2-135M, all of it trained, written meanwhile, between two steps, or never.

python -m tests.benchmarks.saving [--rounds=2]

Each run is a process of its own, with one replica; the ways take turns. Needs the weights of SmolLM2. Writes
tests/benchmarks/results/saving.json.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks import fine_tuning, tables
from tests.benchmarks.runs import give, in_rounds

COMMAND = "python -m tests.benchmarks.saving"
RESULTS = Path(__file__).parent / "results" / "saving.json"
# Steps that are counted follow the first checkpoint; the last one is not among them, for nothing is made meanwhile.
EVERY, PERIODS, BATCH = 10, 3, 8
WAYS = {
    "no checkpoint": ["run.save_every = None"],
    "written by a thread": [f"run.save_every = {EVERY}"],
    "between two steps": [f"run.save_every = {EVERY}", "run.save_async = False"],
}


def child(way: str) -> None:
    """Trains one way; prints the mean and the longest time of a step, in milliseconds, and what a checkpoint holds."""
    import keras

    from dist_partial.config import gin_files
    from dist_partial.training import loop

    ends: list[float] = []
    sizes: list[int] = []

    def noted(batch: int, logs: Any) -> None:
        ends.append(time.perf_counter())
        with contextlib.suppress(FileNotFoundError):  # the thread has removed it
            sizes.extend(path.stat().st_size for path in Path("run", "checkpoints").glob("step-*"))

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        text = Path(folder, "text")
        text.mkdir()
        fine_tuning.disassembly(text, 200_000)
        params = [
            f"tokenized_text.root = {str(text)!r}",
            f"tokenized_text.window = {fine_tuning.WINDOW}",
            "tokenized_text.limit = None",
            fine_tuning.EVERYTHING,
            f"run.steps = {EVERY * (PERIODS + 1) + 1}",
            f"run.global_batch = {BATCH}",
            "run.steps_per_loop = 1",
            "run.eval_examples = 8",
            "run.eval_every = None",
            "run.keep = 1",
            "replicas.cpu = 1",
            "replicas.kind = 'mirrored'",
            "sample.count = 0",
            *WAYS[way],
        ]
        settings = gin_files.load([fine_tuning.CONFIGS / "smollm2.gin"], params).settings
        callbacks = [keras.callbacks.LambdaCallback(on_train_batch_end=noted)]
        loop.run(dataclasses.replace(settings, callbacks=callbacks), Path("run"))
    counted = ends[EVERY - 1 : EVERY * (PERIODS + 1)]
    took = [1e3 * (after - before) for before, after in itertools.pairwise(counted)]
    give([statistics.mean(took), max(took), max(sizes, default=0)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    found = in_rounds("tests.benchmarks.saving", list(WAYS), arguments.rounds, timeout=1800)
    rows: list[dict[str, Any]] = []
    for way, runs in found.items():
        means, longest, sizes = ([run[i] for run in runs] for i in range(3))
        more = [run[0] - without[0] for run, without in zip(runs, found["no checkpoint"], strict=True)]
        seconds = [EVERY * each / 1e3 for each in more]
        numbers = {"mean_ms": means, "longest_ms": longest, "seconds": seconds}
        row = {"way": way, "checkpoint_bytes": max(sizes)}
        rows.append(row | {key: round(statistics.median(each), 3) for key, each in numbers.items()})
    setting = (
        f"SmolLM2-135M, all of it trained by Adam in batches of {BATCH} x {fine_tuning.WINDOW} tokens, one replica, a "
        f"checkpoint every {EVERY} steps, {EVERY * PERIODS} steps counted; medians of {arguments.rounds} rounds"
    )
    RESULTS.write_text(json.dumps({"command": COMMAND, "setting": setting, "rows": rows}, indent=1) + "\n")
    print(tables.text("saving"))


if __name__ == "__main__":
    main()
