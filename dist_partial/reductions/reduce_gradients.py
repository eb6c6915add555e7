"""Reduces the gradients of a whole plan, each by its rule's reduction, together in packs."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from dist_partial.distributed.collectives import Collectives, run_rounds
from dist_partial.reductions.base import mean
from dist_partial.selection.plan import Plan


def reduce_gradients(
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
        states: what each reduction keeps, in the same order; from `make_states`.
        statistics: tensors to be averaged, which travel in the same packs.

    Returns:
        The sums and the averages, in the shapes and dtypes they came in: the same bits on every replica, except
        where a reduction is not `shared`.

    Examples:
        >>> import keras
        >>> from dist_partial.reductions import TopK
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1)])
        >>> plan = resolve([("train", ".*")], model, TopK(density=0.25, bits=32))
        >>> gradients = [tf.constant([[1.0], [-4.0], [2.0], [3.0]]), None]
        >>> sums, _ = reduce_gradients(Collectives(), plan, gradients, make_states(plan))
        >>> sums[0].numpy().ravel().tolist(), sums[1]
        ([0.0, -4.0, 0.0, 0.0], None)
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


def make_states(plan: Plan) -> list[dict[str, tf.Variable]]:
    """Makes what the reductions keep on each replica, in the order of `plan.trained`; called in the scope.

    Examples:
        >>> import keras
        >>> from dist_partial.reductions import TopK
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([100]), keras.layers.Dense(1)])
        >>> plan = resolve([("train", ".*")], model, TopK())  # by which a bias of one is sent whole
        >>> [list(state) for state in make_states(plan)]
        [['residual'], []]
    """
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
