"""The compiled probe, which measures the gradient norms of all units and trains nothing."""

import dataclasses
import functools
from typing import Any

import keras
import tensorflow as tf

from dist_partial.distributed.per_replica import Topology
from dist_partial.selection.plan import Plan
from dist_partial.step.gradients import local_sum, model_outputs, own_part, selected_rows, unit_squares
from dist_partial.step.objective import Batch, Objective


@dataclasses.dataclass(frozen=True, eq=False)
class ProbeSpec:
    """Holds everything that a probe computes with.

    Attributes:
        strategy: the replicas.
        model: built in the strategy's scope.
        objective: the loss.
        plan: the units that are measured.
        parts: micro-batches of a replica's batch, of which the first is read.
    """

    strategy: tf.distribute.Strategy
    model: keras.Model
    objective: Objective
    plan: Plan
    parts: int


def probe(spec: ProbeSpec) -> Any:
    """Compiles the function that differentiates every unit of a plan: (iterator of this worker's batches) -> [units].

    No gradient travels: that alone would cost more than a budget saves.

    Examples:
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, use_bias=False)])
        >>> model.compile(loss="mae")
        >>> plan = resolve([("train", ".*")], model, AllReduce())
        >>> spec = ProbeSpec(tf.distribute.get_strategy(), model, Objective(model), plan, parts=1)
        >>> batch = tf.constant([[3.0, 4.0]]), tf.zeros([1, 1])
        >>> probe(spec)(iter(tf.data.Dataset.from_tensors(batch))).numpy().tolist()  # that of the input
        [25.0]
    """
    return tf.function(functools.partial(squares, spec), autograph=False)


def squares(spec: ProbeSpec, iterator: Any) -> tf.Tensor:
    """Probes the next batch of an iterator; called in the cross-replica context of a graph.

    Returns:
        float32 [units]: the sum over this worker's replicas of `replica_squares`.
    """
    return local_sum(spec.strategy, spec.strategy.run(replica_squares, args=(spec, next(iterator))))


def replica_squares(spec: ProbeSpec, batch: Batch) -> tf.Tensor:
    """Computes the squared norm of each unit's gradient; called in a replica context.

    Returns:
        float32 [units], of the mean loss of the replica's own examples.

    Examples:
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, use_bias=False)])
        >>> model.compile(loss="mae")
        >>> plan = resolve([("train", ".*")], model, AllReduce())
        >>> spec = ProbeSpec(tf.distribute.get_strategy(), model, Objective(model), plan, parts=2)
        >>> replica_squares(spec, (tf.constant([[3.0, 4.0], [9.0, 9.0]]), tf.zeros([2, 1]))).numpy().tolist()
        [25.0]
    """
    trained = spec.plan.trained
    values = [entry.variable.value for entry in trained]
    batch = tf.nest.map_structure(lambda t: t[: t.shape[0] // spec.parts], own_part(Topology(spec.strategy), batch))
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        # In inference mode: dropout draws nothing and BatchNorm's statistics stay as they are.
        total, _ = spec.objective.loss(batch, model_outputs(spec.model, batch[0], False), training=False)
    gradients = tape.gradient(total, values)
    return unit_squares(spec.plan, [selected_rows(g, e.rule.rows) for g, e in zip(gradients, trained, strict=True)])
