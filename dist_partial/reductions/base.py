"""How one group's gradients cross the replicas.

A reduction says what it sends (`payloads`), what it keeps on each replica (`state`) and what it does (`reduce`, a
generator that yields the requests of `distributed.collectives` and returns the result).
"""

from collections.abc import Generator, Sequence
from typing import Annotated, Any, Protocol

import numpy as np
import tensorflow as tf

from dist_partial.distributed.collectives import AllReduceRequest, PeersRequest, ReplicaCount, Request
from dist_partial.selection.payload import Payload, Peers
from dist_partial.validation import OneOf

Exchange = Generator[Request | ReplicaCount | PeersRequest, Any, tf.Tensor]
# In which gradients can travel; None is their own.
Dtype = Annotated[str | None, OneOf("float64", "float32", "bfloat16", "float16", None)]

# What becomes of what a reduction keeps, by its name, on another number of replicas: see `PerReplica`.
WHEN_FEWER = {"residual": "sum", "sum_residual": "chunks"}


class Reduction(Protocol):
    """Carries the gradients of one rule across the replicas: what a `reduction` has to offer.

    Attributes:
        shared: whether all replicas have the same bits after each step.

    Examples:
        >>> from dist_partial.distributed.collectives import Collectives, run_rounds
        >>> class Signs:
        ...     shared = True
        ...     def payloads(self, shape, dtype, peers):
        ...         return (Payload("sum", 4 * int(np.prod(shape))),)
        ...     def state(self, path, shape, dtype, peers):
        ...         return {}
        ...     def reduce(self, value, state):
        ...         return (yield AllReduceRequest(tf.sign(value)))
        >>> run_rounds(Collectives(), [Signs().reduce(tf.constant([-3.0, 2.0]), {})])[0].numpy().tolist()
        [-1.0, 1.0]
    """

    @property
    def shared(self) -> bool: ...

    def payloads(self, shape: Sequence[int], dtype: str, peers: Peers) -> tuple[Payload, ...]:
        """What one replica sends to `peers` for one gradient of `shape` and `dtype`."""

    def state(self, path: str, shape: Sequence[int], dtype: str, peers: Peers) -> dict[str, np.ndarray]:
        """First values of what each replica keeps for one gradient, by name."""

    def reduce(self, value: tf.Tensor, state: dict[str, Any]) -> Exchange:
        """Yields requests and returns the sum of all replicas' `value`, or an approximation of it; updates `state`."""


def mean(value: tf.Tensor) -> Exchange:
    """Asks for the mean of a tensor over all replicas.

    Examples:
        >>> from dist_partial.distributed.collectives import Collectives, run_rounds
        >>> run_rounds(Collectives(), [mean(tf.constant([3.0]))])[0].numpy().tolist()  # of one replica its own
        [3.0]
    """
    count = yield ReplicaCount()
    return (yield AllReduceRequest(value / count))


def total(value: tf.Tensor) -> Exchange:
    """Asks for the sum of a tensor over all replicas."""
    return (yield AllReduceRequest(value))


def with_residual(value: tf.Tensor, residual: Any, decay: float) -> tf.Tensor:
    """Adds what was left out before, or a part of it.

    Examples:
        >>> float(with_residual(tf.constant(1.0), tf.constant(4.0), decay=0.5))
        3.0
    """
    return value + (residual if decay == 1 else decay * residual)


def decay_text(decay: float) -> str:
    """Writes what the text of a reduction says of its decay."""
    return f", decay {decay:g}" if decay != 1 else ""
