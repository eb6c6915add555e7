"""Sums and gathers by TensorFlow's own collectives: over the devices of one process, or those of all workers."""

import contextlib
import faulthandler
import signal
import socket
import time
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from dist_partial import compat
from dist_partial.distributed.backend import ALL, BETWEEN, INSIDE, Exchanged, alone, inside
from dist_partial.distributed.cluster import split
from dist_partial.distributed.per_replica import Topology, topology

_LAST_SECONDS = 5.0  # for which the first worker waits until the processes of the others have ended


class TensorFlowBackend:
    """Computes collectives by the strategy in whose replica context it is called.

    Workers of a MultiWorkerMirroredStrategy are one level: TensorFlow sums over all their replicas at once.

    Examples:
        >>> sums, gathered, _ = TensorFlowBackend().over_replicas([tf.constant([1.0])], [tf.constant([2])])
        >>> sums[0].numpy().tolist(), gathered[0].numpy().tolist()  # of one replica
        ([1.0], [[2]])
    """

    two_levels = False
    has_all_to_all = True
    concurrent = False

    def topology(self, strategy: tf.distribute.Strategy) -> Topology:
        """How many replicas the strategy has, and which are this worker's."""
        return topology(strategy)

    def over_replicas(
        self,
        sums: Sequence[tf.Tensor],
        gathers: Sequence[tf.Tensor],
        swaps: Sequence[tf.Tensor] = (),
        level: str = ALL,
    ) -> Exchanged:
        """Sums, gathers and swaps over the strategy's replicas; `BETWEEN` there is only this process."""
        context: Any = tf.distribute.get_replica_context()
        if context.num_replicas_in_sync == 1 or level == BETWEEN:
            return alone(sums, gathers, swaps)
        if level == INSIDE:
            return inside(sums, gathers, swaps)
        summed = context.merge_call(_sum, args=sums) if sums else []
        gathered = [context.merge_call(_gather, args=(words,)) for words in gathers]
        return list(summed), gathered, [context.merge_call(_swap, args=(words,)) for words in swaps]


def workers_strategy(patience_seconds: float) -> tf.distribute.Strategy:
    """Makes the strategy of all workers, which have met; one that is missing now is lost, and ends this process."""
    # Its servers wait for each other for ever and meanwhile hold Python's lock, so that no thread and no handler of a
    # signal runs. The workers have just met: one that is missing now is lost, and SIGALRM ends the process: not with
    # code 1, which says that its own code has failed.
    faulthandler.dump_traceback_later(patience_seconds)
    signal.setitimer(signal.ITIMER_REAL, patience_seconds + 0.5)
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def outlive(workers: Sequence[str]) -> None:
    """Waits until the servers of the others are gone: TensorFlow calls it an error if the first one ends before."""
    until = time.monotonic() + _LAST_SECONDS
    for worker in workers:
        with contextlib.suppress(OSError):  # nobody listens there
            while time.monotonic() < until:
                socket.create_connection(split(worker), timeout=1.0).close()
                time.sleep(0.05)


def _sum(strategy: Any, *values: Any) -> Any:
    # Not `ReplicaContext.all_reduce`, whose gradient function TensorFlow 2.21 keeps in a registry for good, and with it
    # the graph and the memory of all variables of which it is. A limit of one byte leaves our packs as they are:
    # TensorFlow's own packing loses the static shapes that the count of bytes in the graph relies on, and fails on
    # mixed dtypes.
    options = tf.distribute.experimental.CommunicationOptions(bytes_per_pack=1)
    return strategy.extended.batch_reduce_to(tf.distribute.ReduceOp.SUM, [(v, v) for v in values], options)


def _gather(strategy: Any, value: Any) -> Any:
    # All payloads have the same shape on every replica.
    return compat.gather(strategy, value, tf.distribute.experimental.CommunicationOptions())


def _swap(strategy: Any, value: Any) -> Any:
    return compat.all_to_all(strategy, value, tf.distribute.experimental.CommunicationOptions())
