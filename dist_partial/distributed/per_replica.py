"""Variables of which each replica has a value of its own, and which replicas are this worker's."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf


@dataclasses.dataclass(frozen=True, eq=False)
class PerReplica:
    """Shows a variable of which each replica has a value of its own as one array [replicas, ...].

    Attributes:
        strategy: the replicas.
        variable: a mirrored variable, or one that is synchronised on read.
        when_fewer: what becomes of the values on another number of replicas: 'sum' keeps their sum and divides it
            evenly, 'mean' gives each replica their mean, 'own' deals them out.
        constraint: of the variable, which the mean must satisfy as the values do; or None.

    Examples:
        >>> own = PerReplica(tf.distribute.get_strategy(), tf.Variable([0.0, 0.0]), when_fewer="mean")
        >>> own.shape  # of one replica
        (1, 2)
        >>> own.assign(np.array([[1.0, 2.0], [3.0, 4.0]], np.float32))  # of two
        >>> own.variable.numpy().tolist()
        [2.0, 3.0]
    """

    strategy: tf.distribute.Strategy
    variable: Any
    when_fewer: str
    constraint: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.strategy.num_replicas_in_sync, *self.variable.shape)

    @property
    def dtype(self) -> Any:
        return np.dtype(self.variable.dtype.as_numpy_dtype)

    def assign(self, array: np.ndarray) -> None:
        """Gives this worker's replicas their values; called in the cross-replica context.

        Args:
            array: [replicas, ...], of any number of replicas.
        """
        count = self.strategy.num_replicas_in_sync
        if len(array) == count:
            mine = array
        elif self.when_fewer == "own":
            mine = array[np.arange(count) % len(array)]
        else:
            divisor = count if self.when_fewer == "sum" else len(array)
            one = (np.sum(array, axis=0, dtype=np.float64) / divisor).astype(self.dtype)
            one = one if self.constraint is None else np.asarray(self.constraint(tf.constant(one)))
            mine = np.broadcast_to(one, self.shape)
        first = input_context(self.strategy).input_pipeline_id * local_count(self.strategy)
        for i, copy in enumerate(self.strategy.experimental_local_results(self.variable)):
            copy.assign(mine[first + i])


def values(variables: Sequence[PerReplica], gather: Callable[[bytes], list[bytes]]) -> list[np.ndarray]:
    """Gathers all replicas' values, [replicas, ...] each; all workers must call it.

    Args:
        variables: of the same strategy.
        gather: gives every worker's bytes, from `Replicas.gather`.

    Examples:
        >>> strategy = tf.distribute.get_strategy()
        >>> own = [PerReplica(strategy, tf.Variable(value), "own") for value in ([1.0, 2.0], [[3]])]
        >>> [array.tolist() for array in values(own, gather=lambda data: [data])]
        [[[1.0, 2.0]], [[[3]]]]
    """
    if not variables:
        return []
    strategy = variables[0].strategy
    local = [[copy.numpy() for copy in strategy.experimental_local_results(v.variable)] for v in variables]
    # One message, and not a gather for each of many small variables.
    data = b"".join(copy.tobytes() for copies in local for copy in copies)
    rows = gather(data)
    found, start = [], 0
    for variable, copies in zip(variables, local, strict=True):
        size = sum(copy.nbytes for copy in copies)
        parts = [np.frombuffer(row[start : start + size], variable.dtype) for row in rows]
        found.append(np.concatenate(parts).reshape(variable.shape))
        start += size
    return found


def local_count(strategy: tf.distribute.Strategy) -> int:
    """Counts the replicas of this worker.

    Examples:
        >>> local_count(tf.distribute.get_strategy())
        1
    """
    # The default strategy has no list of its devices to ask for.
    return len(strategy.extended.worker_devices) if strategy.num_replicas_in_sync > 1 else 1


def input_context(strategy: tf.distribute.Strategy) -> tf.distribute.InputContext:
    """Says which part of each global batch is this worker's.

    Examples:
        >>> context = input_context(tf.distribute.get_strategy())
        >>> context.num_input_pipelines, context.input_pipeline_id, context.num_replicas_in_sync
        (1, 0, 1)
    """
    workers = strategy.num_replicas_in_sync // local_count(strategy)
    index = 0
    if workers > 1:
        resolver = strategy.cluster_resolver
        chiefs = len(resolver.cluster_spec().as_dict().get("chief", []))
        index = resolver.task_id + (chiefs if resolver.task_type == "worker" else 0)
    return tf.distribute.InputContext(workers, index, strategy.num_replicas_in_sync)
