"""Reduces the gradients of a whole plan, each by its rule's reduction, together in packs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.distributed.collectives import BETWEEN, INSIDE, Collectives
from dist_partial.reductions.base import mean
from dist_partial.reductions.together import Term, reduce_together
from dist_partial.selection.plan import Plan, VariablePlan

OF_INSIDE = "inside_"  # names what a reduction keeps over the replicas of one worker


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
        gradients: in the order of `plan.trained`, divided by the global batch; None stays None and sends nothing; what
            is an IndexedSlices has a reduction that takes it.
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
    reduced: list[tf.Tensor | None] = list(gradients)

    def reduce(level: str, chosen: list[int], more: Sequence[Any] = ()) -> list[Any]:
        """Reduces some of them over a level, with other exchanges, whose results it returns."""
        inside = level == INSIDE
        terms = [
            Term(entry.inside if inside else entry.reduction, value, _of_level(state, inside), entry.shape)
            for entry, value, state in ((trained[i], reduced[i], states[i]) for i in chosen)
        ]
        results = reduce_together(collectives.at(level), terms, more)
        for i, result in zip(chosen, results, strict=False):
            reduced[i] = result
        return results[len(chosen) :]

    two_levels = [i for i in members if trained[i].inside is not None]
    reduce(INSIDE, two_levels)
    averages = reduce("all", [i for i in members if trained[i].inside is None], [*map(mean, statistics)])
    # One after the other: what waits for other workers holds one of TensorFlow's few threads.
    with tf.control_dependencies([each for each in (*averages, *reduced) if each is not None] if two_levels else []):
        reduce(BETWEEN, two_levels)
    return reduced, averages


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
        {name: own_variable(name, value) for name, value in _first_values(plan, entry).items()}
        for entry in plan.trained
    ]


def own_variable(name: str, value: np.ndarray) -> tf.Variable:
    """Makes a variable of which each replica has its own; called in the scope.

    Examples:
        >>> own_variable("residual", np.zeros(3)).numpy().tolist()
        [0.0, 0.0, 0.0]
    """
    return tf.Variable(
        value,
        trainable=False,
        name=name,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.NONE,
    )


def _first_values(plan: Plan, entry: VariablePlan) -> dict[str, Any]:
    found = entry.reduction.state(entry.path, entry.trained_shape, entry.dtype, plan.members(entry))
    if entry.inside is None:
        return found
    of_inside = entry.inside.state(entry.path, entry.trained_shape, entry.dtype, plan.members(entry, inside=True))
    return found | {f"{OF_INSIDE}{name}": value for name, value in of_inside.items()}


def _of_level(state: dict[str, Any], inside: bool) -> dict[str, Any]:
    """What the reduction of one level keeps, by its own names."""
    own = {name: variable for name, variable in state.items() if name.startswith(OF_INSIDE) == inside}
    return {name.removeprefix(OF_INSIDE): variable for name, variable in own.items()}
