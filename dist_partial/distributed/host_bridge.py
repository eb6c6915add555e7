"""Two levels: sums and gathers over the devices of this host first, and over the hosts second.

Each worker has a MirroredStrategy over its own devices, which knows nothing of the others. What its replicas reduce
goes through here, by TensorFlow's public door for it (`tf.distribute.CrossDeviceOps`), so that a layer that meets its
other replicas, such as a synchronised BatchNorm, meets those of all hosts. No server of TensorFlow's is started.
"""

from typing import Any

import tensorflow as tf

from dist_partial.distributed.tcp_backend import TCPBackend

ALL, INSIDE, BETWEEN = "all", "inside", "between"  # levels
_NCCL = tf.distribute.NcclAllReduce()
HOST = "CPU:0"  # where the bytes are that cross hosts, and bytes are counted by device


def exchange(
    backend: TCPBackend | None, level: str, sums: int, strategy: tf.distribute.Strategy, *values: Any
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Sums and gathers over the replicas of one level; called in the cross-replica context.

    Args:
        backend: this host's connections to the others; not needed `INSIDE`.
        level: of `ALL` hosts, `INSIDE` this one, or `BETWEEN` hosts, where the replicas of each have the same values.
        sums: how many of the values are to be summed; the others are gathered.
        strategy: the replicas of this host.
        values: [n] each, of each replica.

    Returns:
        The sums [n], and the gathered [replicas or hosts, n], in the order of hosts and, of a host, of its replicas:
        plain tensors, which every replica can read.

    Examples:
        >>> values = tf.constant([1.0]), tf.constant([2])
        >>> total, gathered = exchange(None, INSIDE, 1, tf.distribute.get_strategy(), *values)
        >>> total[0].numpy().tolist(), gathered[0].numpy().tolist()
        ([1.0], [[2]])
    """
    local, alike = strategy.experimental_local_results, level == BETWEEN
    with tf.device(HOST):
        totals = [_total(strategy, value, alike) for value in values[:sums]]
        stacked = [tf.stack(local(value)[: 1 if alike else None]) for value in values[sums:]]
        if backend is None or level == INSIDE:
            return totals, stacked
        summed, gathered = backend.exchange(totals, [tf.reshape(each, [-1]) for each in stacked])
        return summed, [tf.reshape(each, [-1, own.shape[-1]]) for each, own in zip(gathered, stacked, strict=True)]


def _total(strategy: tf.distribute.Strategy, value: Any, alike: bool = False) -> tf.Tensor:
    """The sum of a value over the replicas of this host, or that of one of them if they are alike."""
    copies = strategy.experimental_local_results(value)
    if not alike and len(copies) > 1 and "GPU" in strategy.extended.worker_devices[0]:  # untested
        copies = strategy.experimental_local_results(_NCCL.reduce(tf.distribute.ReduceOp.SUM, value, value))[:1]
    return tf.add_n([tf.convert_to_tensor(copy) for copy in (copies[:1] if alike else copies)])


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
        count = self._backend.size * strategy.num_replicas_in_sync
        with tf.device(HOST):
            own = [_total(strategy, value) for value, _ in value_destination_pairs]
            sums, _ = self._backend.exchange([tf.reshape(each, [-1]) for each in own], [])
            sums = [tf.reshape(total, each.shape) for total, each in zip(sums, own, strict=True)]
            if reduce_op in (tf.distribute.ReduceOp.MEAN, "MEAN"):
                sums = [total / count for total in sums]
        pairs = zip(sums, value_destination_pairs, strict=True)
        return [self._inside.broadcast(total, destinations) for total, (_, destinations) in pairs]
