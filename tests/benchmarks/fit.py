"""A step of `model.fit` on two workers beside a step of the loop: the same model, batches, rules and connections.

python -m tests.benchmarks.fit

Writes tests/benchmarks/results/fit.json. Both are timed in turn, block by block, in the same processes.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

from dist_partial import fit, partial, reductions, selection
from dist_partial.config.settings import cross_entropy
from dist_partial.distributed.replicas import Replicas
from dist_partial.models import byte_transformer
from dist_partial.reductions.reduce_gradients import make_states
from dist_partial.step import losses, optimizers
from dist_partial.step.objective import prepare
from dist_partial.step.train_step import StepOptions, StepSpec, train_step
from tests.benchmarks import tables
from tests.benchmarks.step import ALL, PART, dataset
from tests.helpers.workers import run_workers

COMMAND = "python -m tests.benchmarks.fit"
RESULTS = Path(__file__).parent / "results" / "fit.json"
SETTING = "2 workers of 8 examples each, on 2 cores that did other work, too; medians of {} blocks of {} steps"
WORKERS, BATCH = 2, 8  # of a worker
BLOCKS, STEPS = 7, 15
RULES = {"all": ALL, "part": PART}


def by_loop(workers: Replicas, rules: list[Any]) -> Callable[[], dict[str, float]]:
    with workers.strategy.scope():
        keras.utils.set_random_seed(0)
        model = byte_transformer()
        plan = selection.resolve(rules, model, reductions.AllReduce()).among(workers.collectives)
        groups, states = optimizers.build(plan, keras.optimizers.Adam), make_states(plan)
        x, y = next(iter(dataset(BATCH)))
        objective = prepare(model, (x, y), model(x, training=False), {"loss": losses.made(cross_entropy)})
    spec = StepSpec(workers.strategy, workers.collectives, model, objective, plan, groups, states, StepOptions())
    train, iterator = train_step(spec).function, iter(dataset(BATCH))

    def block() -> dict[str, float]:
        start = time.perf_counter()
        train(iterator, tf.constant(STEPS))["loss"].numpy()
        return {"loop": (time.perf_counter() - start) / STEPS}

    return block


class Clock(keras.callbacks.Callback):
    """Notes when each step ends."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.ends.append(time.perf_counter())


def by_fit(workers: Replicas, rules: list[Any]) -> Callable[[], dict[str, float]]:
    with workers.strategy.scope():
        keras.utils.set_random_seed(0)
        model = byte_transformer()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(partial(keras.optimizers.Adam(), rules, model), loss)
    data, clock = dataset(BATCH), Clock()
    callbacks = fit.on_workers([clock], workers)

    def block() -> dict[str, float]:
        start = time.perf_counter()
        model.fit(data, steps_per_epoch=STEPS, epochs=1, verbose=0, callbacks=callbacks)
        took = time.perf_counter() - start
        step = (clock.ends[-1] - clock.ends[0]) / (STEPS - 1)
        return {"fit": step, "call": took - step * STEPS}

    return block


def worker() -> None:
    """Prints a JSON line for each selection: seconds a step, and what a call takes besides, block by block."""
    workers = fit.connect()
    for selected, rules in RULES.items():
        blocks = [by_loop(workers, rules), by_fit(workers, rules)]
        found: dict[str, list[float]] = {"loop": [], "fit": [], "call": []}
        for number in range(BLOCKS + 1):
            for block in blocks if number % 2 else reversed(blocks):
                for name, seconds in block().items():
                    found[name] += [seconds] if number else []  # the first traces
        print(json.dumps({"selected": selected, **found}), flush=True)


def main() -> None:
    (code, output), *_ = run_workers(["-m", "tests.benchmarks.fit", "worker"], WORKERS, timeout=1000)
    assert code == 0, output
    rows = []
    for found in map(json.loads, [line for line in output.splitlines() if line.startswith("{")]):
        ms = {name: round(1e3 * statistics.median(found[name]), 2) for name in ("loop", "fit", "call")}
        ratio = statistics.median(a / b for a, b in zip(found["fit"], found["loop"], strict=True))
        rows.append(
            {"selected": found["selected"], "loop ms": ms["loop"], "fit ms": ms["fit"], "ratio": round(ratio, 3)}
            | {"call ms": ms["call"]}
        )
    result = {"command": COMMAND, "setting": SETTING.format(BLOCKS, STEPS), "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(tables.text("fit"))


if __name__ == "__main__":
    worker() if sys.argv[1:] == ["worker"] else main()
    os._exit(0)
