"""The compiled evaluation step."""

from typing import Any

import keras
import tensorflow as tf

from dist_partial.errors import calling
from dist_partial.models.logits import full_precision
from dist_partial.step.gradients import Batch, added_losses, local_sum, model_outputs, own_part
from dist_partial.step.losses import Loss, class_ids, element_weights, example_losses


def evaluation_step(strategy: tf.distribute.Strategy, model: keras.Model, loss: Loss) -> Any:
    """Builds the compiled evaluation pass.

    Returns:
        A function (iterator of this worker's (x, y, weight), number of steps, number of examples) -> float64 [5]: this
        worker's sums of the examples' losses, as in training; of what layers add to the loss, for each example; of
        weighted losses of elements; of weighted correct predictions (NaN if `y` is no class); and of weights. What the
        last batch has beyond the examples has weight 0.
    """

    def replica_sums(batch: Batch, step: tf.Tensor, examples: tf.Tensor) -> tf.Tensor:
        x, y, weight = batch = own_part(strategy, batch)
        outputs = full_precision(model_outputs(model, x, False))
        with calling("run.loss"):
            losses = tf.cast(loss(y, outputs), tf.float64)
        weights = tf.cast(element_weights(weight, losses), tf.float64)
        right = tf.fill(tf.shape(losses), tf.constant(float("nan"), tf.float64))
        if (ids := class_ids(y, outputs)) is not None:
            right = tf.cast(tf.argmax(outputs, axis=-1, output_type=tf.int64) == tf.cast(ids, tf.int64), tf.float64)
        context: Any = tf.distribute.get_replica_context()
        first = (step * strategy.num_replicas_in_sync + context.replica_id_in_sync_group) * y.shape[0]
        real = tf.cast(tf.clip_by_value(examples - first, 0, y.shape[0]), tf.float64)
        sums = [example_losses(losses, weight), losses * weights, right * weights, weights]
        total, elements, correct, weight = (tf.reduce_sum(each) for each in sums)
        return tf.stack([total, added_losses(model, tf.float64) * real, elements, correct, weight])

    @tf.function(autograph=False)
    def evaluate(iterator: Any, steps: tf.Tensor, examples: tf.Tensor) -> tf.Tensor:
        def one_step(i: tf.Tensor, sums: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return i + 1, sums + local_sum(strategy, strategy.run(replica_sums, args=(next(iterator), i, examples)))

        start = [tf.constant(0), tf.zeros([5], tf.float64)]
        return tf.while_loop(lambda i, _: i < steps, one_step, start, parallel_iterations=1)[1]

    return evaluate
