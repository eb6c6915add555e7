"""Losses of examples: what one example counts, and in which precision."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial.errors import UserError, first_line, own_line
from dist_partial.models.output_logits import activation_op, full_precision, is_distribution, logits_behind

Loss = Callable[[Any, Any], tf.Tensor]
_TRIED = 2**20  # outputs of an example, up to which a loss is tried out


def unreduced(loss: Any, weighted: bool = False) -> Loss:
    """Computes what a Keras loss or a function makes of targets and outputs, before Keras takes its mean.

    As in Keras, targets and outputs are cast to the loss's dtype first; of a plain function, which Keras wraps for
    that, they are also brought to one rank ([b] and [b, 1] become [b, 1], lest they broadcast to [b, b]).

    Args:
        loss: what `run.loss` has made.
        weighted: whether the data has weights.

    Raises:
        UserError: it is neither; or a loss whose mean would be another one here than in Keras.

    Examples:
        >>> squares = unreduced(keras.losses.MeanSquaredError())
        >>> squares(np.array([[1.0], [2.0]]), np.array([[3.0], [2.0]])).numpy().tolist()
        [4.0, 0.0]
    """
    if not callable(loss):
        raise UserError(f"run.loss made a {type(loss).__name__}: its factory must return a Keras loss or a function")
    if not isinstance(loss, keras.losses.Loss):
        dtype = keras.config.floatx()
        return lambda y, outputs: loss(*_of_one_rank(_cast(y, dtype), _cast(outputs, dtype)))
    if getattr(loss, "ignore_class", None) is not None:  # Keras divides by what is left in the whole batch
        raise UserError(
            f"run.loss ignores the class {loss.ignore_class}, which would count as a loss of 0: unbind ignore_class, "
            "and have run.data give weights (x, y, weight) that are 0 there"
        )
    if loss.reduction in ("sum", "none", None):  # of the last two `fit` trains on the sum as well
        raise UserError(
            f"run.loss sums over the batch (reduction={loss.reduction!r}), and a run trains on the mean: unbind its "
            "reduction"
        )
    if loss.reduction == "mean_with_sample_weight" and weighted:  # whose sum differs from batch to batch
        raise UserError(
            "run.loss divides by the weights of a batch (reduction='mean_with_sample_weight'), and a run divides by "
            "the number of its examples: unbind its reduction"
        )
    return lambda y, outputs: loss.call(_cast(y, loss.dtype), _cast(outputs, loss.dtype))


def _cast(value: Any, dtype: str) -> tf.Tensor:
    return keras.ops.convert_to_tensor(value, dtype=dtype)


def _of_one_rank(y: tf.Tensor, outputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Adds or takes away a last axis of 1 where the ranks differ by it, as Keras does for plain functions."""
    if y.shape.rank == outputs.shape.rank + 1 and y.shape[-1] == 1:
        return (y, outputs[..., tf.newaxis]) if outputs.shape.rank == 1 else (tf.squeeze(y, -1), outputs)
    if outputs.shape.rank == y.shape.rank + 1 and outputs.shape[-1] == 1:
        return (y[..., tf.newaxis], outputs) if y.shape.rank == 1 else (y, tf.squeeze(outputs, -1))
    return y, outputs


def of_model(loss: Any, function: Loss, outputs: tf.Tensor, example: tf.Tensor) -> tuple[Loss, str]:
    """Adapts a loss to what the model gives, which may be probabilities where the loss is one of logits.

    Keras looks for the logits behind a softmax or sigmoid, too, but a Cast (mixed precision) or a Reshape hides them
    from Keras, which then takes the softmax of a softmax.

    Args:
        loss: what `run.loss` has made.
        function: `unreduced` of it.
        outputs: the model's, in a traced graph.
        example: the model's outputs for some example, [1, ...].

    Returns:
        The function, and a line that says what is taken for what, or ''.

    Examples:
        >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        >>> halves = tf.constant([[0.5, 0.5]])
        >>> function, line = of_model(loss, unreduced(loss), halves, halves)
        >>> line
        'run.model gives probabilities (softmax), and run.loss takes logits: it is given those behind them'
        >>> np.round(np.exp(-function(np.array([0]), tf.constant([[0.25, 0.75]]))), 3).tolist()
        [0.25]
    """
    if not getattr(loss, "from_logits", False):
        return function, ""
    if isinstance(loss, (keras.losses.BinaryCrossentropy, keras.losses.BinaryFocalCrossentropy)):
        kind, found = "Sigmoid", activation_op(outputs, "Sigmoid") is not None
    else:
        kind, found = "Softmax", is_distribution(outputs, example)
    if not found:
        return function, ""
    line = f"run.model gives probabilities ({kind.lower()}), and run.loss takes logits: it is given those behind them"
    return lambda y, outputs: function(y, logits_behind(outputs, kind)), line


def check_shapes(loss: Loss, spec: Sequence[tf.TensorSpec], outputs: tf.Tensor, batch: int) -> None:
    """Looks whether targets, outputs and weights go together under a loss; computes nothing.

    Args:
        loss: from `unreduced`.
        spec: (x, y) or (x, y, weight) of one example.
        outputs: of one example, [1, ...].
        batch: examples that a replica reads at once.

    Raises:
        UserError: they do not, or the loss gives one number for a batch.

    Examples:
        >>> spec = tf.TensorSpec([4], tf.float32), tf.TensorSpec([3], tf.float32)
        >>> squares = unreduced(keras.losses.MeanSquaredError())
        >>> check_shapes(squares, spec, tf.zeros([1, 3]), batch=8)
        >>> check_shapes(squares, spec, tf.zeros([1, 2]), batch=8)
        Traceback (most recent call last):
        dist_partial.errors.UserError: run.loss does not take run.data's targets float32 [8, 3] and outputs ...
    """
    specs = [tf.TensorSpec([batch, *each.shape], each.dtype) for each in spec[1:]]
    outputs = tf.TensorSpec([batch, *outputs.shape[1:]], outputs.dtype)

    def traced(outputs: tf.Tensor, y: tf.Tensor, weight: tf.Tensor | None = None) -> tf.Tensor:
        losses = loss(y, full_precision(outputs))
        if losses.shape.rank and losses.shape[0] not in (None, batch):
            raise UserError(
                f"run.loss gives losses of the shape {losses.shape.as_list()} for {batch} examples: it must give one "
                "an example, the batch axis first"
            )
        return example_losses(losses, weight)

    try:
        tf.function(traced, autograph=False).get_concrete_function(outputs, *specs)
    except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
        shapes = " and outputs ".join(f"{each.dtype.name} {each.shape.as_list()}" for each in (specs[0], outputs))
        raise UserError(
            f"run.loss does not take run.data's targets {shapes} of run.model: {first_line(error).rstrip('.')}"
            f"{own_line(error)}; bind another loss, or a model of other outputs"
        ) from error


def check_alone(loss: Loss, y: np.ndarray, outputs: tf.Tensor, parts: int) -> None:
    """Looks whether the loss of an example stays the same beside others, as a batch that is divided needs.

    Args:
        loss: from `unreduced`.
        y: some targets, [n, ...].
        outputs: of one example, [1, ...], for its shape and dtype.
        parts: into how many a batch is divided, among replicas and micro-batches.

    Raises:
        UserError: it does not (Keras's Circle, contrastive losses), and batches are divided.

    Examples:
        >>> def centred(y, outputs):
        ...     return (outputs - tf.reduce_mean(outputs))[:, 0]
        >>> check_alone(centred, np.zeros([5]), tf.zeros([1, 1]), parts=1)
        >>> check_alone(centred, np.zeros([5]), tf.zeros([1, 1]), parts=2)
        Traceback (most recent call last):
        dist_partial.errors.UserError: run.loss makes of an example what depends on the others of its batch, ...
    """
    if parts == 1 or math.prod(outputs.shape) > _TRIED:
        return
    rng = np.random.default_rng(0)
    some = y[rng.integers(0, len(y), 12)]
    shape = (12, *outputs.shape[1:])
    # As probabilities are, and as embeddings are.
    for values in (rng.uniform(0.05, 0.95, shape), rng.normal(scale=0.1, size=shape)):
        found = []
        for beside in (slice(4, 8), slice(8, 12)):
            own = (tf.constant(np.concatenate([each[:4], each[beside]])) for each in (some, values))
            try:
                found.append(loss(next(own), full_precision(tf.cast(next(own), outputs.dtype)))[:4])
            except (ValueError, TypeError, tf.errors.OpError):  # it takes no such values, or not so many examples
                return
        first, second = (keras.ops.convert_to_numpy(tf.cast(each, tf.float64)) for each in found)
        if not np.allclose(first, second, rtol=1e-3, equal_nan=True):
            raise UserError(
                "run.loss makes of an example what depends on the others of its batch, and a batch is divided into "
                f"{parts} parts: train it on one replica without run.accumulate, or bind another loss"
            )


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

    Examples:
        >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        >>> check_class_ids(loss, "mine", np.array([0, 9]), classes=10)
        >>> check_class_ids(loss, "mine", np.array([1, 10]), classes=10)
        Traceback (most recent call last):
        dist_partial.errors.UserError: mine has targets up to 10 and run.model gives logits for the classes 0 to 9: ...
    """
    if type(loss) is not keras.losses.SparseCategoricalCrossentropy or loss.get_config().get("axis", -1) != -1:
        return
    if not y.size or y.dtype.kind not in "iufb":
        return
    low, high = np.min(y), np.max(y)
    if y.dtype.kind == "f" and (y != np.floor(y)).any():
        raise UserError(
            f"{name} has targets such as {y[y != np.floor(y)][0]:.6g}, which are no class ids, and run.loss is a "
            "cross-entropy over classes: give another, such as keras.losses.MeanSquaredError, in a gin file "
            "run.loss = @keras.losses.MeanSquaredError"
        )
    if low < 0:
        raise UserError(f"{name} has the target {low:g}: run.loss takes class ids, which are numbered from 0")
    if high >= classes:
        raise UserError(
            f"{name} has targets up to {high:g} and run.model gives logits for the classes 0 to {classes - 1}: "
            f"bind a model of at least {high + 1:g} classes, or another run.loss if the targets are no class ids"
        )


def example_losses(losses: tf.Tensor, weight: tf.Tensor | None) -> tf.Tensor:
    """Computes one loss an example: the mean over its other axes, weighted.

    Args:
        losses: [batch, ...].
        weight: None, [batch], or one an element as for `element_weights`, where an example's loss is the weighted mean
            over its own elements: what an example counts does not depend on how the others in its batch are masked, so
            that any division of a batch among replicas gives the same sum.

    Returns:
        [batch].

    Raises:
        UserError: `losses` has no axis of examples, or the weights do not fit them.

    Examples:
        >>> losses = tf.constant([[1.0, 3.0], [5.0, 7.0]])
        >>> example_losses(losses, None).numpy().tolist()
        [2.0, 6.0]
        >>> example_losses(losses, tf.constant([[1.0, 0.0], [1.0, 1.0]])).numpy().tolist()
        [1.0, 6.0]
    """
    if losses.shape.rank == 0:
        raise UserError(
            "run.loss gives one number for a whole batch: it must give one an example, without reduce_mean; Keras's "
            "losses do for outputs [batch, 1], not [batch]"
        )
    axes = list(range(1, losses.shape.rank))
    if weight is None:
        return tf.reduce_mean(losses, axes)
    weight = tf.cast(weight, losses.dtype)
    if weight.shape[1:].num_elements() == 1:  # [batch], [batch, 1]: what the example counts
        return tf.reduce_mean(losses, axes) * tf.reshape(weight, [-1])
    weight = element_weights(weight, losses)
    return tf.math.divide_no_nan(tf.reduce_sum(losses * weight, axes), tf.reduce_sum(weight, axes))


def element_weights(weight: tf.Tensor, losses: tf.Tensor) -> tf.Tensor:
    """Computes the weight of each element of `losses` [batch, ...].

    Args:
        weight: [batch], or the shape of `losses` but for axes of 1, of which there may be another at the end: a weight
            for each of the targets [batch, ..., 1] whose losses are [batch, ...].
        losses: what is weighted.

    Raises:
        UserError: it has another shape.

    Examples:
        >>> element_weights(tf.constant([2.0, 1.0]), tf.zeros([2, 3])).numpy().tolist()
        [[2.0, 2.0, 2.0], [1.0, 1.0, 1.0]]
    """
    shape = weight.shape.as_list()
    while len(shape) > max(losses.shape.rank, 1) and shape[-1] == 1:
        shape.pop()
    wanted = losses.shape.as_list()
    shape += [1] * (len(wanted) - len(shape))
    if len(shape) > len(wanted) or any(own not in (1, size) for own, size in zip(shape[1:], wanted[1:], strict=True)):
        raise UserError(
            f"run.data's weights are {weight.shape.as_list()[1:]} an example, and run.loss gives losses of "
            f"{wanted[1:]}: give one weight an example, or one a loss"
        )
    return tf.broadcast_to(tf.reshape(weight, [tf.shape(losses)[0], *shape[1:]]), tf.shape(losses))


def class_ids(y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor | None:
    """Reads the targets [...] as ids of the classes of `outputs` [..., classes]; None if they are no such ids.

    A last axis of 1 of the targets is left out, as Keras's sparse losses do.

    Examples:
        >>> class_ids(tf.constant([[1], [0]]), tf.zeros([2, 3])).numpy().tolist()
        [1, 0]
        >>> class_ids(tf.constant([0.5, 1.0]), tf.zeros([2, 3]))
    """
    if not y.dtype.is_integer or not (outputs.shape.rank and outputs.shape[-1] > 1):
        return None
    if y.shape.rank == outputs.shape.rank and y.shape[-1] == 1:
        y = tf.squeeze(y, -1)
    return y if y.shape.rank == outputs.shape.rank - 1 else None
