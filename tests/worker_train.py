"""One worker of tests/test_multi_worker.py: trains every case and saves the weights it ends with."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from tests import cases


def main(strategy: tf.distribute.Strategy, folder: Path, dtype: str) -> None:
    cases.set_precision(dtype)
    index = strategy.cluster_resolver.task_id
    for name, optimizer, option in cases.ROTATION:
        case = cases.CASES[name]
        trained = cases.train(strategy, case, optimizer, cases.OPTIONS[option], dtype)
        cases.assert_nothing_else_moved(trained)
        statistics = case.statistics_bytes(np.dtype(dtype).itemsize)
        assert trained.bytes_per_step == trained.plan.wire_bytes + statistics, name
        slots = {f"slot {n}": v.numpy() for group in trained.optimizers for n, v in group.state.items()}
        np.savez(folder / f"{dtype}-{name}-{index}.npz", losses=trained.losses, **trained.after, **slots)


if __name__ == "__main__":
    workers = tf.distribute.MultiWorkerMirroredStrategy()
    for precision in ("float64", "float32"):
        main(workers, Path(sys.argv[1]), precision)
