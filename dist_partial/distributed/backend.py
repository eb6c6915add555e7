"""What a backend of the collectives is: by what the replicas of all workers sum and gather.

Two are here: `tensorflow_backend`, by the strategy's own collectives, and `tcp_backend`, by connections between the
workers. The second is a `WorkerBackend`, of which another takes one class.
"""

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import tensorflow as tf

from dist_partial.distributed.per_replica import Topology

ALL, INSIDE, BETWEEN = "all", "inside", "between"  # levels
HOST = "CPU:0"  # where the bytes are that cross hosts, and bytes are counted by device
_NCCL = tf.distribute.NcclAllReduce()
Exchanged = tuple[list[tf.Tensor], list[tf.Tensor], list[tf.Tensor]]  # the sums, the gathered, and the swapped


class Backend(Protocol):
    """Sums and gathers what the replicas of all workers have: by which `Collectives` send.

    Attributes:
        two_levels: whether what crosses the workers may be reduced in another way than what their own replicas sum.
        has_all_to_all: whether a replica can send each other one something of its own, at the cost of that alone.
        concurrent: whether functions that exchange may run in several threads at once.

    Examples:
        >>> class Alone:  # of one replica
        ...     two_levels = has_all_to_all = concurrent = False
        ...     def topology(self, strategy):
        ...         return Topology(strategy)
        ...     def over_replicas(self, sums, gathers, swaps, level=ALL):
        ...         return sums, [words[tf.newaxis] for words in gathers], swaps
        >>> from dist_partial.distributed.collectives import AllReduceRequest, Collectives
        >>> Collectives(Alone()).exchange([AllReduceRequest(tf.constant([2.0]))])[0].numpy().tolist()
        [2.0]
    """

    @property
    def two_levels(self) -> bool: ...

    @property
    def has_all_to_all(self) -> bool: ...

    @property
    def concurrent(self) -> bool: ...

    def topology(self, strategy: tf.distribute.Strategy) -> Topology:
        """Says how many replicas there are in all, and which are this worker's, whose strategy is given."""

    def over_replicas(
        self,
        sums: Sequence[tf.Tensor],
        gathers: Sequence[tf.Tensor],
        swaps: Sequence[tf.Tensor] = (),
        level: str = ALL,
    ) -> Exchanged:
        """Sums, gathers and swaps tensors over the replicas of a level.

        Called in the context of each replica, in the same order on all, mostly while a function is traced. Where a
        worker is lost, running the function raises a TensorFlow error: it neither waits without end nor goes on.

        Args:
            sums: [n] each, of static size: floats or integers.
            gathers: int32 [n] each, of static size, not 0: words of four bytes.
            swaps: int32 [replicas or workers, n] each, likewise; row j is for the j-th of them.
            level: over `ALL` replicas, those `INSIDE` this worker, or `BETWEEN` workers, where the replicas of each
                have the same.

        Returns:
            The sums [n], the same bits on all, the gathered [replicas or workers, n], in the order of workers and, of a
            worker, of its replicas, and of each swap what they have sent to this one [replicas or workers, n].
        """


def alone(sums: Sequence[tf.Tensor], gathers: Sequence[tf.Tensor], swaps: Sequence[tf.Tensor]) -> Exchanged:
    """Answers what one replica exchanges with itself.

    Examples:
        >>> [[each.numpy().tolist() for each in found] for found in alone([], [tf.constant([2])], [tf.constant([[3]])])]
        [[], [[[2]]], [[[3]]]]
    """
    return list(sums), [words[tf.newaxis] for words in gathers], list(swaps)


def inside(sums: Sequence[tf.Tensor], gathers: Sequence[tf.Tensor], swaps: Sequence[tf.Tensor] = ()) -> Exchanged:
    """Sums, gathers and swaps over the replicas of this worker; called in the context of each.

    Examples:
        >>> sums, gathered, _ = inside([tf.constant([1.0])], [tf.constant([2])])
        >>> sums[0].numpy().tolist(), gathered[0].numpy().tolist()  # of one replica
        ([1.0], [[2]])
    """
    context: Any = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return alone(sums, gathers, swaps)
    counts = len(sums), len(gathers)
    totals, stacked, swapped = context.merge_call(
        functools.partial(joined, counts, False), args=[*sums, *gathers, *swaps]
    )
    return totals, stacked, [each[:, context.replica_id_in_sync_group] for each in swapped]


def joined(counts: tuple[int, int], alike: bool, strategy: tf.distribute.Strategy, *values: Any) -> Exchanged:
    """Sums and gathers what the replicas of this worker have, on its host; called in the cross-replica context.

    Args:
        counts: how many of the values are to be summed, and how many of the others gathered; the rest is swapped.
        alike: whether all replicas have the same, so that one will do.
        strategy: the replicas.
        values: [n] each, of each replica; [receivers, n] of a swap.

    Returns:
        The sums [n], the gathered [replicas, n], and the swapped [replicas, receivers, n]: plain tensors, which every
        replica can read.

    Examples:
        >>> joined((1, 0), False, tf.distribute.get_strategy(), tf.constant([1.0]))[0][0].numpy().tolist()
        [1.0]
    """
    local, (sums, gathers) = strategy.experimental_local_results, counts
    with tf.device(HOST):
        totals = [host_sum(strategy, value, alike) for value in values[:sums]]
        stacked = [tf.stack(local(value)[: 1 if alike else None]) for value in values[sums:]]
        return totals, stacked[:gathers], stacked[gathers:]


def host_sum(strategy: tf.distribute.Strategy, value: Any, alike: bool = False) -> tf.Tensor:
    """Sums a value over the replicas of this worker, or takes that of one of them if they are alike.

    Examples:
        >>> host_sum(tf.distribute.get_strategy(), tf.constant([1.0])).numpy().tolist()
        [1.0]
    """
    copies = strategy.experimental_local_results(value)
    if not alike and len(copies) > 1 and "GPU" in strategy.extended.worker_devices[0]:  # untested
        copies = strategy.experimental_local_results(_NCCL.reduce(tf.distribute.ReduceOp.SUM, value, value))[:1]
    return tf.add_n([tf.convert_to_tensor(copy) for copy in (copies[:1] if alike else copies)])
