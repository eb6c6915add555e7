"""One worker of one system of tests/benchmarks/wire.py, which starts one on each host.

python tests/benchmarks/wire_worker.py SYSTEM --selected=all|part --blocks=B VARIANT=STEPS ...

A variant is the dtype on the wire or, for ddp, the number of threads; a process times its variants in turn, block by
block, and worker 0 prints a JSON line for each. PyTorch and TensorFlow may live in different environments, so each is
imported where its system is built, and nothing of this package outside `dist_partial`.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

LAYERS = 8
WIDTH = 1024
BATCH = 32  # a worker
LEARNING_RATE = 0.1
WARM_UP = 3  # steps; DDP settles its buckets after the first one, TensorFlow compiles in it
# Longer than the 200 ms that a shaped interface may queue: a block's bytes are out before they are read.
SETTLE = 0.3
CARD = os.environ.get("WIRE_CARD", "e0")
# How our connections are protected: not at all, as those of the others, by tags, or by TLS.
GUARDS: dict[str, dict[str, bool]] = {"plain": {"seal": False}, "tags": {"seal": True}, "tls": {"tls": True}}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One thing to be timed.

    Attributes:
        train: number of steps -> this worker's mean loss in each, or nothing if that would slow the steps down.
        payload: bytes of gradients that this worker hands to the sum in a step.
    """

    train: Callable[[int], Iterable[float]]
    payload: int


@dataclasses.dataclass(frozen=True)
class Worker:
    """What TF_CONFIG says about this process, for PyTorch, too."""

    index: int
    count: int
    first: str

    @classmethod
    def from_environment(cls) -> "Worker":
        config = json.loads(os.environ["TF_CONFIG"])
        addresses = config["cluster"]["worker"]
        return cls(config["task"]["index"], len(addresses), addresses[0].rpartition(":")[0])


def weights() -> list[np.ndarray]:
    """Kernel [in, out] and bias of each layer: the same for every system, worker and run."""
    random = np.random.default_rng(0)
    pairs = [(random.normal(0, WIDTH**-0.5, (WIDTH, WIDTH)), np.zeros(WIDTH)) for _ in range(LAYERS)]
    return [array.astype(np.float32) for pair in pairs for array in pair]


def examples(index: int) -> np.ndarray:
    """The one batch [BATCH, WIDTH] of a worker, which is its own target."""
    return np.random.default_rng(1 + index).normal(size=(BATCH, WIDTH)).astype(np.float32)


def ddp(worker: Worker, selected: str, names: list[str]) -> tuple[dict[str, Variant], str]:
    """PyTorch's DistributedDataParallel over gloo, as it comes."""
    import torch

    os.environ.update(MASTER_ADDR=worker.first, MASTER_PORT="2333", GLOO_SOCKET_IFNAME=CARD)
    torch.distributed.init_process_group("gloo", rank=worker.index, world_size=worker.count)
    default_threads = torch.get_num_threads()
    x = torch.from_numpy(examples(worker.index))

    def variant(threads: int) -> Variant:
        model = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
        with torch.no_grad():
            for parameter, array in zip(model.parameters(), weights(), strict=True):
                parameter.copy_(torch.from_numpy(array.T))
        if selected == "part":
            model[:-1].requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        replica = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(trained, LEARNING_RATE)

        def train(steps: int) -> Iterable[float]:
            torch.set_num_threads(threads)
            losses = []
            for _ in range(steps):
                optimizer.zero_grad()
                loss = torch.mean((replica(x) - x) ** 2)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            return [float(loss) for loss in losses]

        return Variant(train, sum(parameter.numel() * parameter.element_size() for parameter in trained))

    counts = {name: default_threads if name == "default" else int(name) for name in names}
    return {name: variant(count) for name, count in counts.items()}, f"PyTorch {torch.__version__}"


def keras_model() -> Any:
    import keras

    layers = [keras.layers.Dense(WIDTH, name=f"dense_{number}") for number in range(LAYERS)]
    model = keras.Sequential([keras.Input([WIDTH]), *layers])
    model.set_weights(weights())
    return model


def tensorflow(worker: Worker, selected: str, names: list[str]) -> tuple[dict[str, Variant], str]:
    """A loop written by hand under MultiWorkerMirroredStrategy, in which Keras's optimizer sums the gradients."""
    import keras
    import tensorflow as tf

    assert names == ["float32"], names
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = keras_model()
        if selected == "part":
            for layer in model.layers[:-1]:
                layer.trainable = False
        optimizer = keras.optimizers.SGD(LEARNING_RATE)
        optimizer.build(model.trainable_variables)

    def replica_step(x: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            losses = tf.reduce_mean(tf.square(model(x, training=True) - x), axis=1)
            loss = tf.reduce_sum(losses) / (BATCH * worker.count)
        trained = model.trainable_variables
        optimizer.apply(tape.gradient(loss, [variable.value for variable in trained]), trained)
        return loss * worker.count

    # Several steps in a call, as in this package: what is compared is the step, not the way into TensorFlow.
    @tf.function(autograph=False)
    def train(iterator: Any, steps: tf.Tensor) -> tf.Tensor:
        def body(i: tf.Tensor, losses: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
            return i + 1, losses.write(i, strategy.run(replica_step, args=(next(iterator),)))

        start = [0, tf.TensorArray(tf.float32, steps)]
        return tf.while_loop(lambda i, _: i < steps, body, start, parallel_iterations=1)[1].stack()

    iterator = iter(strategy.distribute_datasets_from_function(lambda _: batches(worker).map(lambda x, _: x)))
    payload = sum(4 * int(np.prod(variable.shape)) for variable in model.trainable_variables)
    variant = Variant(lambda steps: train(iterator, tf.constant(steps)).numpy().tolist(), payload)
    return {"float32": variant}, f"TensorFlow {tf.__version__}"


def batches(worker: Worker) -> Any:
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    x = examples(worker.index)[None]
    return tf.data.Dataset.from_tensor_slices((x, x)).repeat().with_options(options)


def dist_partial(worker: Worker, selected: str, names: list[str]) -> tuple[dict[str, Variant], str]:
    """This package, which connects its workers by itself."""
    import tensorflow as tf

    from dist_partial.distributed import replicas

    connected = replicas.create("multi_worker", **GUARDS[os.environ.get("WIRE_GUARD", "plain")])
    variants = {name: dist_partial_variant(connected, worker, selected, name) for name in names}
    # Said in the results: without connections of its own it falls back on TensorFlow's.
    return variants, f"TensorFlow {tf.__version__}; {connected.description}"


def dist_partial_variant(replicas: Any, worker: Worker, selected: str, dtype: str) -> Variant:
    import keras
    import tensorflow as tf

    from dist_partial import reductions, selection
    from dist_partial.reductions.reduce_gradients import make_states
    from dist_partial.step import losses, optimizers
    from dist_partial.step.objective import prepare
    from dist_partial.step.train_step import StepOptions, StepSpec, train_step

    rules = {"all": [("train", r".*")], "part": [("train", rf"dense_{LAYERS - 1}/.*"), ("freeze", r".*")]}
    with replicas.strategy.scope():
        model = keras_model()
        plan = selection.resolve(rules[selected], model, reductions.AllReduce(dtype))
        groups = optimizers.build(plan, lambda: keras.optimizers.SGD(LEARNING_RATE))
        states = make_states(plan)
        x, y = next(iter(batches(worker)))
        objective = prepare(model, (x, y), model(x, training=False), {"loss": losses.made("mse")})
    spec = StepSpec(replicas.strategy, replicas.collectives, model, objective, plan, groups, states, StepOptions())
    compiled = train_step(spec)
    iterator = iter(batches(worker))

    def train(steps: int) -> Iterable[float]:
        return (compiled.function(iterator, tf.constant(steps))["loss"].numpy() * worker.count).tolist()

    return Variant(train, plan.wire_bytes)


SYSTEMS = {"ddp": ddp, "tensorflow": tensorflow, "dist_partial": dist_partial}


def sent_bytes() -> int:
    return int(Path(f"/sys/class/net/{CARD}/statistics/tx_bytes").read_text())


def measure(variants: dict[str, Variant], steps: dict[str, int], blocks: int) -> dict[str, dict[str, Any]]:
    """Warms every variant up, then times `blocks` blocks of each, in turn and every other time in reverse."""
    found: dict[str, dict[str, Any]] = {}
    for name, variant in variants.items():
        found[name] = {"first_losses": list(variant.train(WARM_UP)), "blocks_ms": [], "sent": [], "cpu": []}
    time.sleep(SETTLE)
    for block in range(blocks):
        for name in list(variants)[:: -1 if block % 2 else 1]:
            sent, cpu, start = sent_bytes(), time.process_time(), time.perf_counter()
            variants[name].train(steps[name])
            took, cpu = time.perf_counter() - start, time.process_time() - cpu
            time.sleep(SETTLE)
            found[name]["blocks_ms"].append(took * 1e3 / steps[name])
            found[name]["cpu"].append(cpu * 1e3 / steps[name])
            found[name]["sent"].append((sent_bytes() - sent) / steps[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("variants", nargs="+", metavar="VARIANT=STEPS")
    parser.add_argument("--selected", choices=("all", "part"), required=True)
    parser.add_argument("--blocks", type=int, required=True)
    options = parser.parse_args()
    steps = {name: int(count) for name, _, count in (text.partition("=") for text in options.variants)}
    worker = Worker.from_environment()
    variants, version = SYSTEMS[options.system](worker, options.selected, list(steps))
    for name, values in measure(variants, steps, options.blocks).items():
        line = {
            "system": options.system,
            "variant": name,
            "step_ms": round(statistics.median(values["blocks_ms"]), 2),
            "blocks_ms": [round(value, 2) for value in values["blocks_ms"]],
            "nic_bytes": round(statistics.mean(values["sent"])),
            "cpu_ms": round(statistics.mean(values["cpu"]), 2),
            "payload": variants[name].payload,
            "first_losses": values["first_losses"],
            "version": version,
        }
        if worker.index == 0:
            print(json.dumps(line), flush=True)
    # All have ended their last step before any leaves, and none waits for the others to shut down in order, which
    # both frameworks report as errors when one is a little earlier.
    sys.stdout.flush()
    time.sleep(1)
    os._exit(0)


if __name__ == "__main__":
    main()
