"""One worker of tests/integration/test_two_levels.py: trains by every reduction, and saves where it ends."""

import functools
import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from dist_partial.config.settings import Settings
from dist_partial.data import dataset
from dist_partial.distributed import replicas, traffic
from dist_partial.distributed.per_replica import OfOwner, PerReplica, values
from dist_partial.reductions import AllReduce, BlockParallel, LocalSGD, PowerSGD, Quantized, TopK, nesterov
from dist_partial.selection import Rule
from dist_partial.step.exchanges import compiled_exchanges
from dist_partial.training.build import batches, build, compiled_step

STEPS, BATCH, RATE, MOMENTUM = 8, 16, 0.05, 0.5
RNG = np.random.default_rng(5)
X = RNG.normal(size=(STEPS * BATCH, 6))
Y = np.tanh(X @ RNG.normal(size=(6, 3)))
FIRST = RNG.normal(size=(6, 3))
REDUCTIONS = {
    "all_reduce": AllReduce(),
    "bfloat16": AllReduce("bfloat16"),
    "quantized": Quantized(8),
    "of_a_rule": Quantized(8),  # which a rule names, and the run another
    "top_k": TopK(density=0.5),
    "power_sgd": PowerSGD(rank=1),
    "local_sgd": LocalSGD(3),
    "diloco": LocalSGD(3, outer_optimizer=nesterov, compressor=Quantized(8)),
    "block_parallel": BlockParallel(3),  # of two layers, one for each worker
}


def model(several=False):
    tail = [keras.layers.Dense(3, use_bias=False, kernel_initializer="identity", name="tail")] if several else []
    made = keras.Sequential([keras.Input([6]), keras.layers.Dense(3, use_bias=False, name="head"), *tail])
    made.layers[0].kernel.assign(FIRST)
    return made


def train(made: replicas.Replicas, name: str, steps: int = STEPS) -> dict[str, np.ndarray]:
    """What is trained by one reduction between the workers, and the bytes that this worker hands over."""
    how = {"between_hosts": REDUCTIONS[name]} if made.topology.local > 1 else {"reduction": REDUCTIONS[name]}
    dealt, rules = name == "block_parallel", [("train", ".*")]
    if name == "of_a_rule":
        rules, how = [Rule(".*", **how)], {key: AllReduce("bfloat16") for key in how}
    settings = Settings(
        rules,
        functools.partial(model, several=dealt),
        lambda: dataset((X, Y), (X[:8], Y[:8])).in_order(),
        optimizer=lambda: keras.optimizers.SGD(RATE, momentum=MOMENTUM if dealt else 0.0),
        loss="mse",
        global_batch=BATCH,
        precision="float64",
        **how,
    )
    trainer = build(settings, made)
    step, inputs = compiled_step(trainer, trainer.plan), batches(trainer, 0, BATCH)
    sent = traffic.total(traffic.in_step(step.function.get_concrete_function(inputs, tf.constant(1))))
    exchanges = compiled_exchanges(
        made.strategy, made.collectives, trainer.plan, trainer.fragments, step.without_gradient, []
    )
    for number in range(1, steps + 1):
        step.function(inputs, tf.constant(1))
        for exchange in exchanges:
            if exchange.due(number):
                exchange.function()
    found = {"sent": sent, "exchanged": sum(traffic.total(exchange.sent) for exchange in exchanges)}
    for key, variable in trainer.state().variables.items():
        own = values([variable], made.gather)[0] if isinstance(variable, PerReplica | OfOwner) else variable.numpy()
        found[key] = np.asarray(own)
    copies = [copy.numpy() for copy in made.strategy.experimental_local_results(trainer.model.layers[0].kernel.value)]
    assert all(copy.tobytes() == copies[0].tobytes() for copy in copies), "the replicas of a worker are alike"
    return found


if __name__ == "__main__":
    make = functools.partial(replicas.create, "multi_worker")
    if len(sys.argv) > 3:  # a module that has a backend of its own
        os.chdir(sys.argv[2])
        make = importlib.import_module(sys.argv[3]).replicas
    connected = make(cpu=int(sys.argv[1]))
    for each in REDUCTIONS:
        np.savez(Path(sys.argv[2]) / f"{each}-{connected.backend.rank}.npz", **train(connected, each))
    connected.sum(np.zeros(1))  # none leaves before the others
