"""How one group's gradients cross the replicas.

A reduction says what it sends (`messages`), what it keeps on each replica (`state`) and what it does (`reduce`, a
generator that yields the requests of `distributed.collectives` and returns the result).
"""

from collections.abc import Generator, Sequence
from typing import Annotated, Any, Protocol

import numpy as np
import tensorflow as tf

from dist_partial.distributed.collectives import AllGatherRequest, AllReduceRequest, Collectives, run_rounds
from dist_partial.selection.payload import Payload
from dist_partial.selection.plan import Plan
from dist_partial.validation import OneOf

Exchange = Generator[AllReduceRequest | AllGatherRequest, tf.Tensor, tf.Tensor]
# In which gradients can travel; None is their own.
Dtype = Annotated[str | None, OneOf("float64", "float32", "bfloat16", "float16", None)]


class Reduction(Protocol):
    """Carries the gradients of one rule across the replicas: what a `reduction` has to offer.

    Attributes:
        shared: whether all replicas have the same bits after each step.
    """

    @property
    def shared(self) -> bool: ...

    def payloads(self, shape: Sequence[int], dtype: str) -> tuple[Payload, ...]:
        """What one replica sends for one gradient of `shape` and `dtype`."""

    def state(self, path: str, shape: Sequence[int], dtype: str) -> dict[str, np.ndarray]:
        """First values of what each replica keeps for one gradient, by name."""

    def reduce(self, value: tf.Tensor, state: dict[str, Any]) -> Exchange:
        """Yields requests and returns the sum of all replicas' `value`, or an approximation of it; updates `state`."""


def reduce(
    collectives: Collectives,
    plan: Plan,
    gradients: Sequence[tf.Tensor | None],
    states: Sequence[dict[str, Any]],
    statistics: Sequence[tf.Tensor] = (),
) -> tuple[list[tf.Tensor | None], list[tf.Tensor]]:
    """Reduces each gradient by its rule's reduction, all of them together in packs.

    Called in a replica context.

    Args:
        collectives: how replicas reach each other.
        plan: what travels, and how.
        gradients: in the order of `plan.trained`, divided by the global batch; None stays None and sends nothing.
        states: what each reduction keeps, in the same order; from `states`.
        statistics: tensors to be averaged, which travel in the same packs.

    Returns:
        The sums and the averages, in the shapes and dtypes they came in: the same bits on every replica, except
        where a reduction is not `shared`.
    """
    trained = plan.trained
    # Backprop produces the last layers' gradients first: they go first, while the rest is still computed.
    members = [i for i in reversed(range(len(gradients))) if gradients[i] is not None]
    exchanges = [trained[i].reduction.reduce(gradients[i], states[i]) for i in members]
    results = run_rounds(collectives, [*exchanges, *map(mean, statistics)])
    reduced: list[tf.Tensor | None] = [None] * len(gradients)
    for i, result in zip(members, results, strict=False):
        reduced[i] = result
    return reduced, results[len(members) :]


def states(plan: Plan) -> list[dict[str, tf.Variable]]:
    """Makes what the reductions keep on each replica, in the order of `plan.trained`; called in the scope."""
    return [
        {
            name: tf.Variable(
                value,
                trainable=False,
                name=name,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.NONE,
            )
            for name, value in entry.reduction.state(entry.path, entry.trained_shape, entry.dtype).items()
        }
        for entry in plan.trained
    ]


def mean(value: tf.Tensor) -> Exchange:
    """Asks for the mean of a tensor over all replicas."""
    context: Any = tf.distribute.get_replica_context()
    return (yield AllReduceRequest(value / context.num_replicas_in_sync))
