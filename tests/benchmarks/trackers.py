"""What a tracker costs a step: of short steps, each of which is reported, it gets those of every other block.

python -m tests.benchmarks.trackers

Blocks of one run are compared with each other, for a machine's speed drifts; `nothing` shows how far it does even so.
Of a profile, the blocks after it are compared with those before. Each run is a process of its own, with one replica.
Writes tests/benchmarks/results/trackers.json.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import tables
from tests.benchmarks.runs import give, in_rounds

COMMAND = "python -m tests.benchmarks.trackers"
RESULTS = Path(__file__).parent / "results" / "trackers.json"
BLOCK, BLOCKS = 400, 12
SETTLED = 150  # steps, after which a tracker is done with the block before
NOTHING, PROFILE = "nothing", "a profile of ten steps before"
NAMES = (NOTHING, PROFILE, "MLflow", "WandB", "Trackio", "Prometheus")


def child(name: str) -> None:
    """Trains with one tracker; gives the mean times of a step in the blocks, in milliseconds."""
    import keras

    from dist_partial import trackers
    from dist_partial.config.settings import Settings
    from dist_partial.data import stdlib_corpus
    from dist_partial.models import byte_transformer
    from dist_partial.training import loop

    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # in which MLflow makes a folder
        os.environ["TRACKIO_DIR"] = str(Path(folder, "trackio"))
        chosen = []
        if name not in (NOTHING, PROFILE):
            kind = getattr(trackers, name)

            class Alternate(kind):  # type: ignore[misc, valid-type]
                def log(self, rows: Sequence[Any]) -> None:
                    if found := [row for row in rows if row.step // BLOCK % 2]:
                        super().log(found)

            options = {"MLflow": {"uri": f"sqlite:///{folder}/mlflow.db"}, "Prometheus": {"port": 0}}
            chosen = [Alternate(**options.get(name, {}))]
        noted = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter()))
        half = BLOCK * BLOCKS // 2
        settings = Settings(
            [("train", ".*")],
            lambda: byte_transformer(layers=2, width=32, heads=2),
            lambda: stdlib_corpus(window=64),
            steps=BLOCK * BLOCKS,
            global_batch=8,
            eval_examples=8,
            trackers=chosen,
            profile=(half + 1, half + 10) if name == PROFILE else None,
            callbacks=[noted],
        )
        loop.run(settings, Path(folder, "run"))
    edges = [(k * BLOCK + SETTLED, (k + 1) * BLOCK - 1) for k in range(BLOCKS)]
    give([1e3 * (ends[last] - ends[first]) / (last - first) for first, last in edges])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    rows: list[dict[str, Any]] = []
    found = in_rounds("tests.benchmarks.trackers", NAMES, 1, timeout=900, wrong="gets nothing more")
    for name, [blocks] in found.items():
        half = BLOCKS // 2
        without, beside = (blocks[:half], blocks[half:]) if name == PROFILE else (blocks[::2], blocks[1::2])
        ratio = statistics.median(after / before for before, after in zip(without, beside, strict=True))
        row = {"with": name, "ms": statistics.median(without), "with_ms": statistics.median(beside), "ratio": ratio}
        rows.append({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    setting = f"a small transformer, one replica, {BLOCKS} blocks of {BLOCK} steps; medians of pairs of blocks"
    RESULTS.write_text(json.dumps({"command": COMMAND, "setting": setting, "rows": rows}, indent=1) + "\n")
    print(tables.text("trackers"))


if __name__ == "__main__":
    main()
