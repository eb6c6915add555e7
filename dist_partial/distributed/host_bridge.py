"""Two levels where layers reduce by themselves: over the devices of this host first, and over the hosts second.

Each worker has a MirroredStrategy over its own devices, which knows nothing of the others. What its replicas reduce
goes through here, by TensorFlow's public door for it (`tf.distribute.CrossDeviceOps`), so that a layer that meets its
other replicas, such as a synchronised BatchNorm, meets those of all hosts. No server of TensorFlow's is started.
"""

from typing import Any

import tensorflow as tf

from dist_partial.distributed.backend import HOST, host_sum
from dist_partial.distributed.worker_backend import WorkerBackend


class HostBridge(tf.distribute.CrossDeviceOps):
    """Reduces over this host's devices, then over the hosts: the `cross_device_ops` of a MirroredStrategy.

    Args:
        backend: what joins this host to the others.
    """

    def __init__(self, backend: WorkerBackend) -> None:
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
        count = self._backend.size * strategy.num_replicas_in_sync
        with tf.device(HOST):
            own = [host_sum(strategy, value) for value, _ in value_destination_pairs]
            sums, *_ = self._backend.exchange([tf.reshape(each, [-1]) for each in own], [])
            sums = [tf.reshape(total, each.shape) for total, each in zip(sums, own, strict=True)]
            if reduce_op in (tf.distribute.ReduceOp.MEAN, "MEAN"):
                sums = [total / count for total in sums]
        pairs = zip(sums, value_destination_pairs, strict=True)
        return [self._inside.broadcast(total, destinations) for total, (_, destinations) in pairs]
