"""The compiled probe: the gradient norms of all units, of which nothing is trained."""

from typing import Any

import keras
import tensorflow as tf

from dist_partial.selection.plan import Plan
from dist_partial.step.gradients import (
    Batch,
    added_losses,
    batch_losses,
    local_sum,
    model_outputs,
    own_part,
    selected_rows,
    unit_squares,
)
from dist_partial.step.losses import Loss


def probe(
    strategy: tf.distribute.Strategy,
    model: keras.Model,
    loss: Loss,
    plan: Plan,
    parts: int,
) -> Any:
    """Builds the function that differentiates every unit of a plan and trains nothing.

    Each replica takes the first of the `parts` micro-batches of its batch, and no gradient travels: that alone would
    cost more than a budget saves.

    Returns:
        A function (iterator of this worker's batches) -> float32 [units]: the sum over this worker's replicas of the
        squared norms of each unit's gradient, each of the mean loss of its own examples.
    """
    values = [entry.variable.value for entry in plan.trained]

    def replica_squares(batch: Batch) -> tf.Tensor:
        batch = tuple(tensor[: tensor.shape[0] // parts] for tensor in own_part(strategy, batch))
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            # In inference mode: dropout draws nothing and BatchNorm's statistics stay as they are.
            losses = batch_losses(loss, batch, model_outputs(model, batch[0], False))
            total = tf.reduce_mean(losses) + added_losses(model, losses.dtype)
        gradients = tape.gradient(total, values)
        return unit_squares(plan, [selected_rows(g, e.rule.rows) for g, e in zip(gradients, plan.trained, strict=True)])

    @tf.function(autograph=False)
    def squares(iterator: Any) -> tf.Tensor:
        return local_sum(strategy, strategy.run(replica_squares, args=(next(iterator),)))

    return squares
