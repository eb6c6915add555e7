"""The compiled evaluation step: top-level functions over one frozen spec."""

import dataclasses
import functools
from typing import Any

import keras
import tensorflow as tf

from dist_partial.errors import calling
from dist_partial.models.output_logits import full_precision
from dist_partial.step.gradients import Batch, added_losses, local_sum, model_outputs, own_part
from dist_partial.step.losses import Loss, class_ids, element_weights, example_losses


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationSpec:
    """Holds what an evaluation computes with: the replicas, the model, and the loss (y, outputs) -> losses.

    Examples:
        >>> model = keras.Sequential([keras.Input([1]), keras.layers.Identity()])
        >>> spec = EvaluationSpec(tf.distribute.get_strategy(), model, lambda y, outputs: (y - outputs)[:, 0])
        >>> batch = tf.constant([[1.0], [1.0]]), tf.constant([[4.0], [9.0]]), tf.constant([1.0, 0.0])
        >>> replica_sums(spec, batch, tf.constant(0), tf.constant(1)).numpy()[[0, 4]].tolist()  # losses and weights
        [3.0, 1.0]
    """

    strategy: tf.distribute.Strategy
    model: keras.Model
    loss: Loss


def evaluation_step(strategy: tf.distribute.Strategy, model: keras.Model, loss: Loss) -> Any:
    """Compiles the evaluation pass: a function of what `evaluation_steps` takes after the spec.

    Examples:
        >>> model = keras.Sequential([keras.Input([1]), keras.layers.Identity()])
        >>> evaluate = evaluation_step(tf.distribute.get_strategy(), model, lambda y, outputs: (y - outputs)[:, 0])
        >>> batch = tf.ones([2, 1]), tf.constant([[4.0], [2.0]]), tf.ones([2])
        >>> again = iter(tf.data.Dataset.from_tensors(batch).repeat())
        >>> evaluate(again, tf.constant(3), tf.constant(6)).numpy()[[0, 4]].tolist()  # losses and weights
        [12.0, 6.0]
    """
    return tf.function(functools.partial(evaluation_steps, EvaluationSpec(strategy, model, loss)), autograph=False)


def evaluation_steps(spec: EvaluationSpec, iterator: Any, steps: tf.Tensor, examples: tf.Tensor) -> tf.Tensor:
    """Evaluates the batches of one pass; called in the cross-replica context of a graph.

    Args:
        spec: what it computes with.
        iterator: of this worker's (x, y, weight).
        steps: number of batches, an int32 scalar.
        examples: number of examples in them; what the last batch has beyond them has weight 0.

    Returns:
        float64 [5], this worker's sums: see `replica_sums`.
    """

    def one_step(i: tf.Tensor, sums: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        own = spec.strategy.run(replica_sums, args=(spec, next(iterator), i, examples))
        return i + 1, sums + local_sum(spec.strategy, own)

    start = [tf.constant(0), tf.zeros([5], tf.float64)]
    return tf.while_loop(lambda i, _: i < steps, one_step, start, parallel_iterations=1)[1]


def replica_sums(spec: EvaluationSpec, batch: Batch, step: tf.Tensor, examples: tf.Tensor) -> tf.Tensor:
    """Sums over one replica's part of a batch; called in a replica context.

    Returns:
        float64 [5]: sums of the examples' losses, as in training; of what layers add to the loss, for each example; of
        weighted losses of elements; of weighted correct predictions (NaN if `y` is no class); and of weights.

    Examples:
        >>> model = keras.Sequential([keras.Input([1]), keras.layers.Dense(3)])
        >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
        >>> spec = EvaluationSpec(tf.distribute.get_strategy(), model, loss)
        >>> batch = tf.zeros([2, 1]), tf.constant([0, 1]), tf.ones([2])  # three classes that are alike: ln 3
        >>> replica_sums(spec, batch, tf.constant(0), tf.constant(2)).numpy().round(3).tolist()
        [2.197, 0.0, 2.197, 1.0, 2.0]
    """
    x, y, weight = batch = own_part(spec.strategy, batch)
    outputs = full_precision(model_outputs(spec.model, x, False))
    with calling("run.loss"):
        losses = tf.cast(spec.loss(y, outputs), tf.float64)
    weights = tf.cast(element_weights(weight, losses), tf.float64)
    right = tf.fill(tf.shape(losses), tf.constant(float("nan"), tf.float64))
    if (ids := class_ids(y, outputs)) is not None:
        right = tf.cast(tf.argmax(outputs, axis=-1, output_type=tf.int64) == tf.cast(ids, tf.int64), tf.float64)
    context: Any = tf.distribute.get_replica_context()
    first = (step * spec.strategy.num_replicas_in_sync + context.replica_id_in_sync_group) * y.shape[0]
    real = tf.cast(tf.clip_by_value(examples - first, 0, y.shape[0]), tf.float64)
    sums = [example_losses(losses, weight), losses * weights, right * weights, weights]
    total, elements, correct, weight = (tf.reduce_sum(each) for each in sums)
    return tf.stack([total, added_losses(spec.model, tf.float64) * real, elements, correct, weight])
