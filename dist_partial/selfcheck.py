"""python -m dist_partial.selfcheck [--output=selfcheck.json] [--replicas=2]

Tries on this machine, in about a minute, what a training needs: replicas, their sums against NumPy, bytes as planned,
mixed precision, XLA, each reduction, sampling, and going on after a stop. Prints a table; --output writes it as JSON,
for a report of a fault. GPUs are taken where there are some; of a single one two logical GPUs are made.
"""

import dataclasses
import functools
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from dist_partial import cli
from dist_partial.errors import Raised, first_line
from dist_partial.files import write_json

STEPS, BATCH, RATE = 6, 840, 0.1  # 840 examples divide among up to 8 replicas
RNG = np.random.default_rng(0)
X = RNG.normal(size=(STEPS * BATCH, 4))
Y = X @ RNG.normal(size=(4, 2))
FIRST = np.full([4, 2], 0.5)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 1 where a check has failed, or 2 for a mistake of the user's."""
    values = flags.FlagValues()
    flags.DEFINE_string("output", None, "a file for the results, as JSON", flag_values=values)
    about = "1 to 8 replicas, simulated where there are no GPUs"
    flags.DEFINE_integer("replicas", 2, about, flag_values=values)

    def command() -> int:
        if not 1 <= values.replicas <= 8:
            raise cli.UserError(f"--replicas={values.replicas}: write 1 to 8")
        cli.import_tensorflow_quietly()
        found = [tried(name, check) for name, check in checks(devices(values.replicas)).items()]
        width = max(len(row["check"]) for row in found)
        for row in found:
            print(f"{row['check']:<{width}}  {row['outcome']:<6}  {row['seconds']:5.1f} s  {row['detail']}")
        failed = [row["check"] for row in found if row["outcome"] != "passed"]
        print(
            f"{len(found) - len(failed)} of {len(found)} passed" + (f"; failed: {', '.join(failed)}" if failed else "")
        )
        if values.output:
            write_json(Path(values.output), described() | {"checks": found})
        return 1 if failed else 0

    return cli.call(__doc__, values, argv, command)


@dataclasses.dataclass(frozen=True)
class Devices:
    """Holds what the checks run on.

    Attributes:
        options: attributes of `ReplicaOptions` for all replicas.
        count: how many there are.
        words: what they are.

    Examples:
        >>> Devices({"kind": "mirrored", "cpu": 2}, 2, "2 simulated on the CPU").count
        2
    """

    options: dict[str, Any]
    count: int
    words: str


def devices(replicas: int) -> Devices:
    """Takes all GPUs, two logical ones of a single GPU, or replicas simulated on the CPU; TensorFlow has not started.

    Examples:
        >>> devices(1).words
        '1 simulated on the CPU'
    """
    import tensorflow as tf

    from dist_partial.distributed.replicas import simulated

    gpus = tf.config.list_physical_devices("GPU")
    if len(gpus) == 1:
        share = tf.config.LogicalDeviceConfiguration(memory_limit=2048)
        tf.config.set_logical_device_configuration(gpus[0], [share, share])
    count = max(len(gpus), 2) if gpus else replicas
    words = f"{len(gpus)} GPUs" if len(gpus) > 1 else "2 logical GPUs of one" if gpus else ""
    if not gpus:
        simulated(count)
    kind = "mirrored" if count > 1 else "default"
    return Devices({"kind": kind, "cpu": count}, count, words or f"{count} simulated on the CPU")


def checks(on: Devices) -> dict[str, Callable[[], str]]:
    """Lists the checks by name; each returns a detail, or raises an exception.

    Examples:
        >>> [*checks(Devices({"kind": "default"}, 1, "one"))][:3]
        ['replicas', 'equal to NumPy', 'bytes as planned']
    """
    from dist_partial import reductions

    quickly = functools.partial(trained, on)
    how = {
        "all-reduce in bfloat16": reductions.AllReduce("bfloat16"),
        "4 bits": reductions.Quantized(4),
        "top-k": reductions.TopK(0.5),
        "PowerSGD": reductions.PowerSGD(1),
        "local SGD": reductions.LocalSGD(2),
        "block-parallel": reductions.BlockParallel(2),
    }
    return {
        "replicas": lambda: on.words,
        "equal to NumPy": lambda: equal_to_numpy(on),
        "bytes as planned": lambda: bytes_as_planned(on),
        "mixed_bfloat16": lambda: falls(quickly(precision="mixed_bfloat16")),
        "mixed_float16": lambda: falls(quickly(precision="mixed_float16")),
        "XLA": lambda: falls(quickly(jit_compile=True)),
        **({"prefetch to the GPU": lambda: prefetched(on)} if "GPU" in on.words else {}),
        **{name: functools.partial(lambda each: falls(quickly(reduction=each)), each) for name, each in how.items()},
        "sampling": sampling,
        "going on after a stop": lambda: going_on(on),
    }


def tried(name: str, check: Callable[[], str]) -> dict[str, Any]:
    """Makes a check, and says what came of it.

    Examples:
        >>> row = tried("division", lambda: str(1 // 0))
        >>> row["outcome"], row["detail"]
        ('failed', 'ZeroDivisionError: integer division or modulo by zero')
    """
    began = time.perf_counter()
    try:
        outcome, detail = "passed", check()
    except Exception as error:  # whatever a machine has in store
        kind = "" if isinstance(error, AssertionError | cli.UserError | Raised) else f"{type(error).__name__}: "
        outcome, detail = "failed", f"{kind}{first_line(error)}"
    return {"check": name, "outcome": outcome, "seconds": round(time.perf_counter() - began, 1), "detail": detail}


def described() -> dict[str, Any]:
    """Describes this machine, and the versions of what computes on it.

    Examples:
        >>> sorted(described())
        ['cores', 'devices', 'machine', 'python', 'versions']
    """
    import tensorflow as tf

    from dist_partial.distributed import consistency

    gpus = [tf.config.experimental.get_device_details(each) for each in tf.config.list_physical_devices("GPU")]
    return {
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "versions": consistency.versions(),
        "devices": [str(each.get("device_name", "GPU")) for each in gpus] or ["CPU"],
    }


def trained(on: Devices, **settings: Any) -> Any:
    """Gives the result of a short training of one layer, on all replicas."""
    import keras

    from dist_partial import ReplicaOptions, dataset, train

    def model() -> keras.Model:
        layers = [keras.layers.Dense(2, use_bias=False, name="head"), keras.layers.Dense(2, name="tail")]
        made = keras.Sequential([keras.Input([4]), *layers[: 1 if settings.get("precision") == "float64" else 2]])
        made.layers[0].kernel.assign(FIRST)
        return made

    given: dict[str, Any] = {"steps": STEPS, "optimizer": functools.partial(keras.optimizers.SGD, RATE), "loss": "mse"}
    with tempfile.TemporaryDirectory() as folder:
        given |= {"rules": [("train", ".*")], "global_batch": BATCH, "folder": Path(folder, "run"), "verbose": 0}

        def data() -> Any:
            return dataset((X, Y), (X[:BATCH], Y[:BATCH]), name="points").in_order()

        return train(model, data, replicas=ReplicaOptions(**on.options), **given | settings)


def equal_to_numpy(on: Devices) -> str:
    """Compares six steps of SGD in float64 with the same in NumPy."""
    kernel = FIRST
    for step in range(STEPS):
        x, y = (values[step * BATCH : (step + 1) * BATCH] for values in (X, Y))
        kernel = kernel - RATE * 2 * x.T @ (x @ kernel - y) / y.size
    found = trained(on, precision="float64").model.get_weights()[0]
    difference = float(np.abs(found - kernel).max())
    assert difference < 1e-12, f"weights differ by {difference:.1e}"
    return f"weights differ by {difference:.0e}"


def bytes_as_planned(on: Devices) -> str:
    """Compares the bytes that the plan says with those counted in the graph."""
    if on.count == 1:
        return "one replica sends nothing"
    found = trained(on)
    sent = found.history.of("train").column("wire_bytes")[-1]
    expected = STEPS * found.plan.wire_bytes
    assert sent == expected, f"{sent:,} bytes in the graph, {expected:,} in the plan"
    return f"{sent:,} bytes"


def falls(found: Any) -> str:
    """Asks that the loss has fallen."""
    losses = found.history.of("train").column("loss")
    assert losses[-1] < losses[0], f"the loss went from {losses[0]:.4g} to {losses[-1]:.4g}"
    return f"loss {losses[0]:.3f} to {losses[-1]:.3f}"


def sampling() -> str:
    """Draws a text twice, with a cache and without."""
    from dist_partial.models import byte_transformer
    from dist_partial.models.sampling import Generation, generate

    model, how = byte_transformer(layers=1, width=16, heads=2), Generation(count=1, length=8, temperature=0.6, seed=1)
    cached, plain = (generate(model, [100, 101, 102], how, use_cache=cache) for cache in (True, False))
    assert (cached == plain).all(), "another text with the key-value cache than without"
    return f"{cached.size} symbols, the same with a cache and without"


def prefetched(on: Devices) -> str:
    """Compares a training whose batches are on the GPU before its steps begin with one of the same batches."""
    one = dataclasses.replace(on, options={"kind": "default"}, count=1)
    plain, ahead = (trained(one, prefetch_to_device=each).model.get_weights() for each in (False, True))
    assert all(np.array_equal(*pair) for pair in zip(plain, ahead, strict=True)), "other weights than without"
    return "the same bits as without"


def going_on(on: Devices) -> str:
    """Compares a training in two pieces with one in a piece, bit for bit."""
    weights = []
    for pieces in ([STEPS], [STEPS // 2, STEPS]):
        with tempfile.TemporaryDirectory() as folder:
            for steps in pieces:
                found = trained(on, steps=steps, folder=Path(folder, "run"))
        weights.append([value.tobytes() for value in found.model.get_weights()])
    assert weights[0] == weights[1], "a run that was stopped ends with other weights"
    return f"the same bits after {STEPS // 2} + {STEPS - STEPS // 2} steps"


if __name__ == "__main__":
    sys.exit(main())
