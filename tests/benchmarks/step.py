"""Step time against a hand-written loop; step time and peak memory against training everything.

python -m tests.benchmarks.step
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial import reductions, selection
from dist_partial.config.settings import cross_entropy
from dist_partial.distributed.collectives import Collectives
from dist_partial.models import byte_transformer
from dist_partial.reductions.reduce_gradients import make_states
from dist_partial.step import losses, optimizers
from dist_partial.step.objective import prepare
from dist_partial.step.train_step import StepOptions, StepSpec, train_step
from tests.benchmarks import tables

COMMAND = "python -m tests.benchmarks.step"
RESULTS = Path(__file__).parent / "results" / "step.json"
REPLICAS = 2
GLOBAL_BATCH = 16
WINDOW = 128
STEPS_A_CALL = 5
REPEATS = 15
ALL = [("train", r".*")]
PART = [("train", r"block_[37]/.*"), ("train", r"final_norm/.*"), ("train", r"head/.*"), ("freeze", r".*")]
LARGE = {"layers": 8, "width": 512, "heads": 8}


def two_replicas() -> tf.distribute.Strategy:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * REPLICAS)
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(REPLICAS)])


def dataset(rows: int) -> tf.data.Dataset:
    tokens = np.random.default_rng(0).integers(0, 256, (8, rows, WINDOW + 1)).astype(np.int32)
    options = tf.data.Options()
    options.autotune.enabled = False
    return tf.data.Dataset.from_tensor_slices((tokens[:, :, :-1], tokens[:, :, 1:])).repeat().with_options(options)


def ours(
    strategy: tf.distribute.Strategy, rules: list[Any], global_batch: int = GLOBAL_BATCH, **model_arguments: int
) -> Callable[[], None]:
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = byte_transformer(**model_arguments)
        plan = selection.resolve(rules, model, reductions.AllReduce())
        groups = optimizers.build(plan, keras.optimizers.Adam)
        states = make_states(plan)
        x, y = next(iter(dataset(global_batch)))
        objective = prepare(model, (x, y), model(x, training=False), {"loss": losses.made(cross_entropy)})
    spec = StepSpec(strategy, Collectives(), model, objective, plan, groups, states, StepOptions())
    train = train_step(spec).function
    iterator = iter(dataset(global_batch))
    return lambda: train(iterator, tf.constant(STEPS_A_CALL))["loss"].numpy()


def hand_written(strategy: tf.distribute.Strategy, patterns: list[str]) -> Callable[[], None]:
    """The loop that TensorFlow's own guide to custom training suggests, for the variables that `patterns` begin."""
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = byte_transformer()
        chosen = [v for v in model.trainable_variables if any(f"/{p}" in f"/{v.path}" for p in patterns)]
        optimizer = keras.optimizers.Adam()
        optimizer.build(chosen)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)

    def replica_step(batch: Any) -> tf.Tensor:
        x, y = batch
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(tf.reduce_mean(loss(y, model(x, training=True)), axis=1)) / GLOBAL_BATCH
        optimizer.apply(tape.gradient(total, [v.value for v in chosen]), chosen)  # sums over the replicas
        return total

    @tf.function(autograph=False)
    def train(iterator: Any) -> tf.Tensor:
        def body(i: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            per_replica = strategy.run(replica_step, args=(next(iterator),))
            return i + 1, strategy.reduce(tf.distribute.ReduceOp.SUM, per_replica, axis=None)

        return tf.while_loop(lambda i, _: i < STEPS_A_CALL, body, [0, 0.0], parallel_iterations=1)[1]

    iterator = iter(strategy.distribute_datasets_from_function(lambda _: dataset(GLOBAL_BATCH // REPLICAS)))
    return lambda: train(iterator).numpy()


def milliseconds_a_step(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3 / STEPS_A_CALL


def against_hand_written() -> list[dict[str, Any]]:
    strategy = two_replicas()
    rows = []
    for selected, rules, patterns in [("all", ALL, [""]), ("part", PART, ["block_3/", "final_norm/", "head/"])]:
        calls = {"dist_partial": ours(strategy, rules), "hand-written": hand_written(strategy, patterns)}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(REPEATS + 2):
            for name, call in calls.items() if repeat % 2 else reversed(calls.items()):
                took = milliseconds_a_step(call)
                if repeat >= 2:
                    times[name].append(took)
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratio = statistics.median(a / b for a, b in zip(times["dist_partial"], times["hand-written"], strict=True))
        rows.append(
            {"selected": selected, **{f"{n} ms": round(m, 2) for n, m in medians.items()}, "ratio": round(ratio, 3)}
        )
    return rows


def child(selected: str) -> None:
    """One variant in a process of its own, so that its peak memory is its own; prints a JSON line."""
    call = ours(two_replicas(), {"all": ALL, "part": PART}[selected], global_batch=2, **LARGE)
    milliseconds_a_step(call)
    times = [milliseconds_a_step(call) for _ in range(5)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"selected": selected, "step ms": round(statistics.median(times), 1), "peak MiB": round(peak)}))


def against_everything() -> list[dict[str, Any]]:
    rows: dict[str, list[dict[str, Any]]] = {"all": [], "part": []}
    for _ in range(3):
        for selected, found in rows.items():
            output = subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.step", selected], check=True, capture_output=True, text=True
            ).stdout
            found.append(json.loads(output.splitlines()[-1]))
    return [
        {"selected": name, **{key: statistics.median(row[key] for row in found) for key in ("step ms", "peak MiB")}}
        for name, found in rows.items()
    ]


def main() -> None:
    everything = against_everything()
    hand = against_hand_written()
    RESULTS.parent.mkdir(exist_ok=True)
    found = {"command": COMMAND, "against_hand_written": hand, "against_everything": everything}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(tables.text("step"))


if __name__ == "__main__":
    child(sys.argv[1]) if len(sys.argv) > 1 else main()
