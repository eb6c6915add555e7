"""What a tracker costs a step: short steps, each of which is reported, with each tracker and without.

A profile of steps before those that are counted takes its turn, too.

python -m tests.benchmarks.trackers [--rounds=5]

Each run is a process of its own, with one replica; the trackers take turns. Writes
tests/benchmarks/results/trackers.json.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks import tables
from tests.benchmarks.runs import give, in_rounds

COMMAND = "python -m tests.benchmarks.trackers"
RESULTS = Path(__file__).parent / "results" / "trackers.json"
STEPS, FIRST = 1000, 200  # of which the first are not counted: trackers begin meanwhile
PROFILE = "none, steps 101 to 110 profiled"
NAMES = ("none", PROFILE, "MLflow", "WandB", "Trackio", "Prometheus")


def child(name: str) -> None:
    """Trains with one tracker; prints the median and the mean time of a step, in milliseconds."""
    import keras

    from dist_partial import trackers
    from dist_partial.config.settings import Settings
    from dist_partial.data import stdlib_corpus
    from dist_partial.models import byte_transformer
    from dist_partial.training import loop

    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # in which MLflow makes a folder
        os.environ["TRACKIO_DIR"] = str(Path(folder, "trackio"))
        options = {"MLflow": {"uri": f"sqlite:///{folder}/mlflow.db"}, "Prometheus": {"port": 0}}
        chosen = [] if name.startswith("none") else [getattr(trackers, name)(**options.get(name, {}))]
        noted = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter()))
        settings = Settings(
            [("train", ".*")],
            lambda: byte_transformer(layers=2, width=32, heads=2),
            lambda: stdlib_corpus(window=64),
            steps=STEPS,
            global_batch=8,
            eval_examples=8,
            trackers=chosen,
            profile=(101, 110) if name == PROFILE else None,
            callbacks=[noted],
        )
        loop.run(settings, Path(folder, "run"))
    took = [1e3 * (after - before) for before, after in zip(ends[FIRST:], ends[FIRST + 1 :], strict=False)]
    give([statistics.median(took), statistics.mean(took)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    found = in_rounds("tests.benchmarks.trackers", NAMES, arguments.rounds, timeout=600, wrong="gets nothing more")
    rows: list[dict[str, Any]] = []
    for name, runs in found.items():
        medians, means = ([run[i] for run in runs] for i in (0, 1))
        ratios = [run[1] / alone[1] for run, alone in zip(runs, found["none"], strict=True)]
        numbers = {"median_ms": medians, "mean_ms": means, "ratio": ratios}
        rows.append({"tracker": name, **{key: round(statistics.median(each), 3) for key, each in numbers.items()}})
    setting = f"{STEPS - FIRST} steps of a small transformer, one replica; medians of {arguments.rounds} rounds"
    RESULTS.write_text(json.dumps({"command": COMMAND, "setting": setting, "rows": rows}, indent=1) + "\n")
    print(tables.text("trackers"))


if __name__ == "__main__":
    main()
