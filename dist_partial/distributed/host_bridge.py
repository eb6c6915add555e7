"""Two levels: sums and gathers over the devices of this host first, and over the hosts second.

Each worker has a MirroredStrategy over its own devices, which knows nothing of the others. What its replicas reduce
goes through here, by TensorFlow's public door for it (`tf.distribute.CrossDeviceOps`), so that a layer that meets its
other replicas, such as a synchronised BatchNorm, meets those of all hosts. No server of TensorFlow's is started.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from dist_partial.distributed.tcp_backend import TCPBackend

_HOST = "CPU:0"  # where the bytes are that cross hosts, and bytes are counted by device


def exchange(
    backend: TCPBackend, strategy: tf.distribute.Strategy, sums: Sequence[Any], gathers: Sequence[Any]
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Sums and gathers over all replicas of all hosts; called in the cross-replica context, as `TCPBackend.exchange`.

    Args:
        backend: this host's connections to the others.
        strategy: the replicas of this host.
        sums: [n] each, of each replica.
        gathers: [n] each, of each replica.

    Returns:
        The sums [n], and the gathered [replicas, n], in the order of workers and, of a worker, of its replicas.
    """
    local = strategy.experimental_local_results
    with tf.device(_HOST):
        totals = [tf.add_n([tf.convert_to_tensor(copy) for copy in local(value)]) for value in sums]
        stacked = [tf.stack(local(value)) for value in gathers]
        summed, gathered = backend.exchange(totals, [tf.reshape(each, [-1]) for each in stacked])
        return summed, [tf.reshape(each, [-1, own.shape[-1]]) for each, own in zip(gathered, stacked, strict=True)]


class HostBridge(tf.distribute.CrossDeviceOps):
    """Reduces over this host's devices, then over the hosts: the `cross_device_ops` of a MirroredStrategy.

    Args:
        backend: this host's connections to the others.
    """

    def __init__(self, backend: TCPBackend) -> None:
        super().__init__()
        self._backend = backend
        self._inside = tf.distribute.ReductionToOneDevice()

    # Not `reduce_implementation` and `batch_reduce_implementation`, which are not called for a single device.

    def reduce(self, reduce_op: Any, per_replica_value: Any, destinations: Any, options: Any = None) -> Any:
        """Reduces one value of each replica."""
        return self.batch_reduce(reduce_op, [(per_replica_value, destinations)], options)[0]

    def batch_reduce(self, reduce_op: Any, value_destination_pairs: Any, options: Any = None) -> list[Any]:
        """Reduces several values of each replica, in one round."""
        strategy = tf.distribute.get_strategy()
        flat = [
            [tf.reshape(copy, [-1]) for copy in strategy.experimental_local_results(value)]
            for value, _ in value_destination_pairs
        ]
        with tf.device(_HOST):
            sums, _ = self._backend.exchange([tf.add_n(copies) for copies in flat], [])
        found = []
        for (value, destinations), total, copies in zip(value_destination_pairs, sums, flat, strict=True):
            total = tf.reshape(total, strategy.experimental_local_results(value)[0].shape)
            if reduce_op in (tf.distribute.ReduceOp.MEAN, "MEAN"):
                total /= len(copies) * self._backend.size
            found.append(self._inside.broadcast(total, destinations))
        return found
