"""Losses of examples: what one example counts, and in which precision."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial.errors import UserError, first_line, own_line

Loss = Callable[[Any, Any], tf.Tensor]


def unreduced(loss: Any) -> Loss:
    """What a Keras loss or a function makes of targets and outputs, before Keras takes its mean.

    Raises:
        UserError: it is neither; or a loss whose mean would be another one here than in Keras.
    """
    if not callable(loss):
        raise UserError(f"run.loss made a {type(loss).__name__}: its factory must return a Keras loss or a function")
    if not isinstance(loss, keras.losses.Loss):
        return loss
    if getattr(loss, "ignore_class", None) is not None:  # Keras divides by what is left in the whole batch
        raise UserError(
            f"run.loss ignores the class {loss.ignore_class}, which would count as a loss of 0: unbind ignore_class, "
            "and have run.data give weights (x, y, weight) that are 0 there"
        )
    if loss.reduction == "sum":
        raise UserError("run.loss is a sum over the batch, and a run trains on the mean: unbind its reduction")
    # As in `keras.losses.Loss.__call__`, which does this first and takes the mean, by masks and weights, last.
    return lambda y, outputs: loss.call(*(keras.ops.convert_to_tensor(v, dtype=loss.dtype) for v in (y, outputs)))


def check_shapes(loss: Loss, y: tf.TensorSpec, outputs: tf.Tensor, batch: int) -> None:
    """Looks whether targets and outputs go together under a loss; computes nothing.

    Args:
        loss: from `unreduced`.
        y: of one target.
        outputs: of one example, [1, ...].
        batch: examples that a replica reads at once.

    Raises:
        UserError: they do not, or the loss gives one number for a batch.
    """
    specs = [tf.TensorSpec([batch, *y.shape], y.dtype), tf.TensorSpec([batch, *outputs.shape[1:]], outputs.dtype)]

    def traced(y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        return example_losses(loss(y, full_precision(outputs)), None)

    try:
        tf.function(traced, autograph=False).get_concrete_function(*specs)
    except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
        shapes = " and outputs ".join(f"{spec.dtype.name} {spec.shape.as_list()}" for spec in specs)
        raise UserError(
            f"run.loss does not take run.data's targets {shapes} of run.model: {first_line(error)}{own_line(error)}; "
            "bind another loss, or a model of other outputs"
        ) from error


def check_class_ids(loss: Any, name: str, y: np.ndarray, classes: int) -> None:
    """Looks whether targets are ids of the model's classes, if the loss takes them for that.

    TensorFlow fails on others in the first step, or on a GPU trains on NaN; it cuts fractions off.

    Args:
        loss: a Keras loss or a function; of others than Keras's own sparse cross-entropy nothing is asked.
        name: of the data set.
        y: targets of any shape.
        classes: how many logits the model gives.

    Raises:
        UserError: a target is none of 0 to classes - 1.
    """
    if type(loss) is not keras.losses.SparseCategoricalCrossentropy or loss.get_config().get("axis", -1) != -1:
        return
    if not y.size or y.dtype.kind not in "iufb":
        return
    low, high = np.min(y), np.max(y)
    if y.dtype.kind == "f" and (y != np.floor(y)).any():
        raise UserError(
            f"{name} has targets such as {y[y != np.floor(y)][0]:.6g}, which are no class ids, and run.loss is a "
            "cross-entropy over classes: bind e.g. run.loss = @keras.losses.MeanSquaredError"
        )
    if low < 0:
        raise UserError(f"{name} has the target {low:g}: run.loss takes class ids, which are numbered from 0")
    if high >= classes:
        raise UserError(
            f"{name} has targets up to {high:g} and run.model gives logits for the classes 0 to {classes - 1}: "
            f"bind a model of at least {high + 1:g} classes, or another run.loss if the targets are no class ids"
        )


def example_losses(losses: tf.Tensor, weight: tf.Tensor | None) -> tf.Tensor:
    """One loss an example: the mean over its other axes, weighted.

    Args:
        losses: [batch, ...].
        weight: None, [batch], or the shape of `losses`, where an example's loss is the weighted mean over its own
            elements: what an example counts does not depend on how the others in its batch are masked, so that
            any division of a batch among replicas gives the same sum.

    Returns:
        [batch].

    Raises:
        UserError: `losses` has no axis of examples.
    """
    if losses.shape.rank == 0:
        raise UserError(
            "run.loss gives one number for a whole batch: it must give one an example, without reduce_mean; Keras's "
            "losses do for outputs [batch, 1], not [batch]"
        )
    axes = list(range(1, losses.shape.rank))
    if weight is None or not axes:
        losses = tf.reduce_mean(losses, axes) if axes else losses
        return losses if weight is None else losses * tf.cast(weight, losses.dtype)
    weight = tf.cast(weight, losses.dtype)
    if weight.shape.rank == 1:
        return tf.reduce_mean(losses, axes) * weight
    return tf.math.divide_no_nan(tf.reduce_sum(losses * weight, axes), tf.reduce_sum(weight, axes))


def full_precision(outputs: tf.Tensor) -> tf.Tensor:
    """Casts half-precision outputs to float32: a softmax over them loses too much."""
    return tf.cast(outputs, tf.float32) if outputs.dtype in (tf.float16, tf.bfloat16) else outputs


def is_classification(y: tf.Tensor, outputs: tf.Tensor) -> bool:
    """Whether `y` holds class ids for logits `outputs` (one more axis, of several classes)."""
    return y.dtype.is_integer and outputs.shape.rank == y.shape.rank + 1 and outputs.shape[-1] > 1


def symbol_weights(weight: tf.Tensor, losses: tf.Tensor) -> tf.Tensor:
    """The weight of each element of `losses` [batch, ...]; `weight` has its shape, or [batch]."""
    missing = losses.shape.rank - weight.shape.rank
    return tf.broadcast_to(tf.reshape(weight, tf.concat([tf.shape(weight), [1] * missing], 0)), tf.shape(losses))
