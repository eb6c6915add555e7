"""Variables of which each replica has a value of its own, and which replicas are this worker's."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf


@dataclasses.dataclass(frozen=True, eq=False)
class Topology:
    """Counts the replicas, and says which are this worker's.

    Attributes:
        strategy: of this worker's replicas, or TensorFlow's own of all.
        workers: how many processes the replicas are divided among.
        worker: which of them this is, from 0.
        by_worker: whether those of a worker count as one, for they are alike.
        asked: called where somebody asks for a replica's number: what is traced then is of that replica alone.

    Examples:
        >>> second = Topology(tf.distribute.get_strategy(), workers=3, worker=1)
        >>> second.replicas, second.first
        (3, 1)
    """

    strategy: tf.distribute.Strategy
    workers: int = 1
    worker: int = 0
    by_worker: bool = False
    asked: Callable[[], None] = lambda: None

    @property
    def hosts(self) -> "Topology":
        """The workers in place of their replicas, each as one."""
        return dataclasses.replace(self, by_worker=True)

    @property
    def local(self) -> int:
        """How many replicas this worker has, and each of the others."""
        if self.by_worker:
            return 1
        # The default strategy has no list of its devices to ask for.
        return len(self.strategy.extended.worker_devices) if self.strategy.num_replicas_in_sync > 1 else 1

    @property
    def replicas(self) -> int:
        """How many there are in all."""
        return self.workers * self.local

    @property
    def first(self) -> int:
        """The number of this worker's first replica."""
        return self.worker * self.local

    @property
    def rank(self) -> int:
        """The number of this replica among all; called in a replica context."""
        self.asked()
        return self.first + self.index

    @property
    def index(self) -> int:
        """The number of this replica among those of its worker; called in a replica context."""
        context: Any = tf.distribute.get_replica_context()
        return int(tf.get_static_value(context.replica_id_in_sync_group)) % self.local

    @property
    def input_context(self) -> tf.distribute.InputContext:
        """Which part of each global batch is this worker's."""
        return tf.distribute.InputContext(self.workers, self.worker, self.replicas)


def topology(strategy: tf.distribute.Strategy) -> Topology:
    """Finds out how many replicas a strategy has, and which are this worker's.

    Examples:
        >>> topology(tf.distribute.get_strategy()).replicas
        1
    """
    workers, worker = strategy.num_replicas_in_sync // Topology(strategy).local, 0
    if workers > 1:
        resolver = strategy.cluster_resolver
        chiefs = len(resolver.cluster_spec().as_dict().get("chief", []))
        worker = resolver.task_id + (chiefs if resolver.task_type == "worker" else 0)
    return Topology(strategy, workers, worker)


@dataclasses.dataclass(frozen=True, eq=False)
class PerReplica:
    """Shows a variable of which each replica has a value of its own as one array [replicas, ...].

    Attributes:
        topology: the replicas.
        variable: a mirrored variable, or one that is synchronised on read.
        when_fewer: what becomes of the values on another number of replicas: 'sum' keeps their sum and divides it
            evenly, 'mean' gives each replica their mean, 'own' deals them out, 'chunks' cuts what they are together,
            one after the other, into as many chunks as there are replicas.
        constraint: of the variable, which the mean must satisfy as the values do; or None.

    Examples:
        >>> own = PerReplica(topology(tf.distribute.get_strategy()), tf.Variable([0.0, 0.0]), when_fewer="mean")
        >>> own.shape  # of one replica
        (1, 2)
        >>> own.assign(np.array([[1.0, 2.0], [3.0, 4.0]], np.float32))  # of two
        >>> own.variable.numpy().tolist()
        [2.0, 3.0]
    """

    topology: Topology
    variable: Any
    when_fewer: str
    constraint: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.topology.replicas, *self.variable.shape)

    def held(self, worker: int) -> int:
        """How many values a worker has."""
        return self.topology.local * math.prod(self.variable.shape)

    def copies(self) -> list[tf.Variable]:
        """This worker's."""
        return list(self.topology.strategy.experimental_local_results(self.variable)[: self.topology.local])

    @property
    def dtype(self) -> Any:
        return np.dtype(self.variable.dtype.as_numpy_dtype)

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether `assign` takes an array of this shape: of any number of replicas."""
        return len(shape) == len(self.shape) and (self.when_fewer == "chunks" or shape[1:] == self.shape[1:])

    def assign(self, array: np.ndarray) -> None:
        """Gives this worker's replicas their values; called in the cross-replica context.

        Args:
            array: [replicas, ...], of any number of replicas.
        """
        count = self.topology.replicas
        if len(array) == count:
            mine = array
        elif self.when_fewer == "chunks":
            mine = np.resize(np.concatenate([array.ravel(), np.zeros(math.prod(self.shape), self.dtype)]), self.shape)
        elif self.when_fewer == "own":
            mine = array[np.arange(count) % len(array)]
        else:
            divisor = count if self.when_fewer == "sum" else len(array)
            one = (np.sum(array, axis=0, dtype=np.float64) / divisor).astype(self.dtype)
            one = one if self.constraint is None else np.asarray(self.constraint(tf.constant(one)))
            mine = np.broadcast_to(one, self.shape)
        first = self.topology.first
        for i, copy in enumerate(self.topology.strategy.experimental_local_results(self.variable)):
            copy.assign(mine[first + i % self.topology.local])


@dataclasses.dataclass(frozen=True, eq=False)
class OfOwner:
    """Shows a variable of which one replica has the value, and the others none that counts.

    Attributes:
        topology: the replicas.
        variable: as in `PerReplica`; where another worker has the value it may be smaller.
        owner: the number of the replica that has it.
        shape: of the value.

    Examples:
        >>> here = topology(tf.distribute.get_strategy())
        >>> own = OfOwner(here, tf.Variable([1.0, 2.0]), owner=0, shape=(2,))
        >>> own.assign(np.array([3.0, 4.0], np.float32))
        >>> own.variable.numpy().tolist(), own.held(worker=0)
        ([3.0, 4.0], 2)
    """

    topology: Topology
    variable: Any
    owner: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> Any:
        return np.dtype(self.variable.dtype.as_numpy_dtype)

    def held(self, worker: int) -> int:
        """How many values a worker has."""
        return math.prod(self.shape) if self.owner // self.topology.local == worker else 0

    def copies(self) -> list[tf.Variable]:
        """This worker's."""
        mine = self.owner - self.topology.first
        found = self.topology.strategy.experimental_local_results(self.variable)
        return [found[mine]] if 0 <= mine < self.topology.local else []

    def assign(self, array: np.ndarray) -> None:
        """Gives the owner its value; called in the cross-replica context."""
        if self.held(self.topology.worker):
            found = self.topology.strategy.experimental_local_results(self.variable)
            for copy in found if self.topology.by_worker else self.copies():
                copy.assign(array)


def values(variables: Sequence[PerReplica | OfOwner], gather: Callable[[bytes], list[bytes]]) -> list[np.ndarray]:
    """Gathers all replicas' values, [replicas, ...] each, or its owner's; all workers must call it.

    Args:
        variables: of the same strategy.
        gather: gives every worker's bytes, from `Replicas.gather`.

    Examples:
        >>> here = topology(tf.distribute.get_strategy())
        >>> own = [PerReplica(here, tf.Variable(value), "own") for value in ([1.0, 2.0], [[3]])]
        >>> [array.tolist() for array in values(own, gather=lambda data: [data])]
        [[[1.0, 2.0]], [[[3]]]]
    """
    if not variables:
        return []
    # One message, and not a gather for each of many small variables.
    rows = gather(b"".join(copy.numpy().tobytes() for variable in variables for copy in variable.copies()))
    found, starts = [], [0] * len(rows)
    for variable in variables:
        parts = []
        for worker, row in enumerate(rows):
            count = variable.held(worker)
            parts.append(np.frombuffer(row, variable.dtype, count, starts[worker]))
            starts[worker] += count * variable.dtype.itemsize
        found.append(np.concatenate(parts).reshape(variable.shape))
    return found
