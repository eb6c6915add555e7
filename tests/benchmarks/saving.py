"""What a checkpoint costs the steps: SmolLM2-135M, all of it trained, written meanwhile or between two steps.

python -m tests.benchmarks.saving [--rounds=1]

Steps that follow a checkpoint are compared with later ones of the same run, for a machine's speed drifts. Each run is a
process of its own, with one replica; the ways take turns. Needs the weights of SmolLM2. Writes
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
EVERY, PERIODS, BATCH = 20, 4, 8
AFTER = 8  # steps in which a checkpoint is written, and some more
WAYS = {"written by a thread": ["run.save_async = True"], "between two steps": ["run.save_async = False"]}


def child(way: str) -> None:
    """Trains one way; gives by checkpoint a step without one, the longest, and how much longer all are, in seconds."""
    import keras

    from dist_partial.config import gin_files
    from dist_partial.training import loop

    ends: list[float] = []
    noted = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter()))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        text = Path(folder, "text")
        text.mkdir()
        fine_tuning.disassembly(text, 200_000)
        params = [
            f"tokenized_text.root = {str(text)!r}",
            f"tokenized_text.window = {fine_tuning.WINDOW}",
            "tokenized_text.limit = None",
            fine_tuning.EVERYTHING,
            f"run.steps = {EVERY * (PERIODS + 1) + 1}",  # of the last checkpoint no steps follow
            f"run.save_every = {EVERY}",
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
        loop.run(dataclasses.replace(settings, callbacks=[noted]), Path("run"))
        size = max(path.stat().st_size for path in Path("run", "checkpoints").glob("step-*"))
    took = [after - before for before, after in itertools.pairwise(ends)]
    for first in range(EVERY - 1, EVERY * PERIODS, EVERY):
        during, later = took[first : first + AFTER], took[first + AFTER : first + EVERY]
        alone = statistics.median(later)
        give([alone, max(during), sum(during) - AFTER * alone, size])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    found = in_rounds("tests.benchmarks.saving", list(WAYS), arguments.rounds, timeout=1800)
    rows: list[dict[str, Any]] = []
    for way, runs in found.items():
        alone, longest, longer, size = (statistics.median(run[i] for run in runs) for i in range(4))
        seconds = {"step_seconds": alone, "longest_seconds": longest, "longer_seconds": longer}
        row = {"way": way, "checkpoint_bytes": size} | {name: round(each, 3) for name, each in seconds.items()}
        rows.append(row | {"share": round(longer / (EVERY * alone), 4)})
    setting = (
        f"SmolLM2-135M, all of it trained by Adam in batches of {BATCH} x {fine_tuning.WINDOW} tokens, one replica, a "
        f"checkpoint every {EVERY} steps; medians of {len(runs)} checkpoints"
    )
    RESULTS.write_text(json.dumps({"command": COMMAND, "setting": setting, "rows": rows}, indent=1) + "\n")
    print(tables.text("saving"))


if __name__ == "__main__":
    main()
