"""A process of `tests.conformance.table`: trains cases and writes how far they are from Keras's, a line each."""

import contextlib
import dataclasses
import functools
import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from dist_partial.distributed import replicas
from dist_partial.errors import UserError
from dist_partial.training import loop
from tests.conformance import engine, reference
from tests.conformance.case import Case
from tests.conformance.comparison import difference, keras_of, trained
from tests.conformance.models import CASES
from tests.helpers.strategies import in_process

NAMED = {case.name: case for case in CASES}


def main(index: int, folder: Path, asked: Sequence[tuple[Case, str]]) -> None:
    """Trains the cases, as one of the workers in TF_CONFIG or on replicas in this process."""
    several = "TF_CONFIG" in os.environ
    if not several:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
    for case, column in asked:
        # A run closes its connections at its end. The first worker trains by Keras, too, while the others wait for it.
        make = functools.partial(replicas.create, "multi_worker", start_seconds=1e6)
        if not several:
            make = functools.partial(in_process, int(column))
        if index:  # the folder of the first worker has all results
            with contextlib.suppress(UserError):
                loop.run(engine.settings(case, replicas=make), folder / f"others {index}")
        else:
            row = _row(case, make)
            with (folder / "results").open("a") as file:
                file.write(json.dumps(row) + "\n")
        keras.utils.clear_session()
        gc.collect()


def _row(case: Case, make: Callable[[], Any]) -> dict[str, Any]:
    try:
        ours = trained(case, make)
    except UserError as error:
        return {"error": str(error)}
    return dataclasses.asdict(difference(ours, _by_keras(case.name)))


@functools.lru_cache(maxsize=1)
def _by_keras(name: str) -> reference.Reference:
    return keras_of(NAMED[name])


if __name__ == "__main__":
    pairs = [argument.split(":") for argument in sys.argv[3:]]
    main(int(sys.argv[1]), Path(sys.argv[2]), [(NAMED[name], column) for name, column in pairs])
