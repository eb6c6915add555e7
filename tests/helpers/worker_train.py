"""One worker of tests/integration/test_multi_worker.py: trains every case and saves the weights it ends with."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from tensorflow.python.distribute import collective_all_reduce_strategy

from dist_partial.distributed import replicas
from tests.helpers import cases


def main(made: replicas.Replicas, folder: Path, dtype: str) -> None:
    cases.set_precision(dtype)
    for name, optimizer, option in cases.ROTATION:
        case = cases.CASES[name]
        options = cases.OPTIONS[option]
        trained = cases.train(
            made.strategy, case, optimizer, options, dtype, collectives=made.collectives, total=made.sum
        )
        cases.assert_nothing_else_moved(trained)
        statistics = case.statistics_bytes(np.dtype(dtype).itemsize)
        assert trained.bytes_per_step == trained.plan.wire_bytes + statistics, name
        slots = {f"slot {n}": v.numpy() for group in trained.optimizers for n, v in group.state.items()}
        np.savez(folder / f"{dtype}-{name}-{made.backend.rank}.npz", losses=trained.losses, **trained.after, **slots)
    made.sum(np.zeros(1))  # none leaves before the others


def several_cpus(count: int) -> None:
    """Has TensorFlow's multi-worker strategy take several devices where there is no GPU, as it takes all GPUs."""
    replicas.simulated(count)
    extended = collective_all_reduce_strategy.CollectiveAllReduceExtended
    extended._initialize_local_devices = lambda self, resolver, worker: (
        tuple(f"{worker}/device:CPU:{i}" for i in range(count)),
        "CPU",
    )


if __name__ == "__main__":
    if sys.argv[1] == "tensorflow":
        several_cpus(int(sys.argv[2]))
    connected = replicas.create("multi_worker", transport=sys.argv[1], cpu=int(sys.argv[2]))
    assert connected.strategy.num_replicas_in_sync == int(sys.argv[2]) * (2 if sys.argv[1] == "tensorflow" else 1)
    assert connected.topology.replicas == 2 * int(sys.argv[2])
    for precision in sys.argv[4:]:
        main(connected, Path(sys.argv[3]), precision)
