"""The compiled evaluation step: top-level functions over one frozen spec."""

import dataclasses
import functools
from typing import Any

import keras
import tensorflow as tf

from dist_partial.distributed.collectives import Collectives, run_rounds
from dist_partial.reductions.base import total
from dist_partial.step.gradients import local_sum, model_outputs, own_part
from dist_partial.step.objective import Batch, Objective
from dist_partial.step.whole_batch import whole_batch


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationSpec:
    """Holds what an evaluation computes with: the replicas, how they reach each other, the model, what is computed."""

    strategy: tf.distribute.Strategy
    collectives: Collectives
    model: keras.Model
    objective: Objective


def evaluation_step(spec: EvaluationSpec) -> Any:
    """Compiles the evaluation pass: a function of what `evaluation_steps` takes after the spec."""
    return tf.function(functools.partial(evaluation_steps, spec), autograph=False)


def evaluation_steps(spec: EvaluationSpec, iterator: Any, steps: tf.Tensor, examples: int) -> tf.Tensor:
    """Evaluates the batches of one pass; called in the cross-replica context of a graph.

    Args:
        spec: what it computes with.
        iterator: of this worker's batches.
        steps: number of batches, an int32 scalar.
        examples: number of examples in each over all workers; what a batch holds beyond this worker's fills it up.

    Returns:
        float64 [1 + numbers of the metrics], this worker's sums: of the batches' losses, and of what they add to the
        metrics.
    """
    replicas = spec.collectives.backend.topology(spec.strategy)
    room = -(-examples // replicas.replicas) * replicas.local

    def one_step(i: tf.Tensor, sums: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        batch = tf.nest.map_structure(lambda tensor: tensor[:room], next(iterator))
        own = spec.strategy.run(replica_sums, args=(spec, batch, examples))
        return i + 1, sums + local_sum(spec.strategy, own)

    start = (tf.constant(0), tf.zeros([1 + spec.objective.size(training=False)], tf.float64))
    return tf.while_loop(lambda i, _: i < steps, one_step, start, parallel_iterations=1)[1]


def replica_sums(spec: EvaluationSpec, batch: Batch, examples: int) -> tf.Tensor:
    """Evaluates one replica's part of a batch; called in a replica context.

    Replicas read `examples` in turn, as many as there is room for; one that has none reads one that counts nothing, for
    there are models that take no empty batch.

    Returns:
        float64 [1 + numbers of the metrics]: what the part adds to the loss of the batch, and to the metrics.
    """
    replicas = spec.collectives.topology
    full = own_part(replicas, batch)
    room = tf.nest.flatten(full)[0].shape[0]
    own = min(max(examples - replicas.rank * room, 0), room)
    batch = tf.nest.map_structure(lambda tensor: tensor[: max(own, 1)], full)
    outputs_of = functools.partial(model_outputs, spec.model, training=False)
    share, counts = own / examples, None
    if spec.objective.counts and not spec.objective.coupled and replicas.replicas > 1:
        mine = spec.objective.counted(batch, outputs_of, False) * (1 if own else 0)
        counts = run_rounds(spec.collectives, [total(mine)])[0]
    whole = None
    if replicas.replicas > 1 and spec.objective.needs_whole(training=False):
        with keras.StatelessScope():  # no layer counts this pass
            of_full = outputs_of(full[0])
        whole = whole_batch(spec.collectives, spec.objective, full, of_full, 1.0, examples)
    # After the replicas have met, for a layer forgets then what it has added to the loss.
    outputs = outputs_of(batch[0])
    if whole and spec.objective.coupled:
        loss, changed = spec.objective.loss(*whole, False)
    else:
        loss, changed = spec.objective.loss(batch, outputs, False, share or 1.0, counts)
    spec.objective.assign(changed)
    added = spec.objective.added(batch, outputs, False, changed, share, whole)
    sums = tf.concat([tf.cast(loss * share, tf.float64)[tf.newaxis], added], axis=0)
    return sums if own else tf.zeros_like(sums)
