"""The whole batch on every replica, for a loss or a metric in which one example depends on the others of its batch.

Each replica computes the loss of the whole batch, and its gradient by its own outputs alone: their sum over the
replicas is the gradient of the whole.
"""

import math
from typing import Any

import tensorflow as tf

from dist_partial import compat
from dist_partial.distributed.collectives import AllGatherRequest, Collectives
from dist_partial.step.objective import Batch, Objective, unpacked


def whole_batch(
    collectives: Collectives,
    objective: Objective,
    batch: Batch,
    outputs: Any,
    share: float,
    examples: int | None = None,
) -> tuple[Batch, Any]:
    """Gathers targets, weights and outputs of all replicas; called in a replica context, also within a gradient tape.

    A `compute_loss` of the model's own has x of all of them, too; else x is that of this replica's part.

    Args:
        collectives: how the replicas reach each other.
        objective: what needs them.
        batch: this replica's part, of as many examples as that of the others.
        outputs: the model's for it.
        share: by which the loss is weighed before replicas add up its gradients.
        examples: of all parts together; those beyond fill the last parts up. None means that none do.

    Returns:
        The batch, and the outputs, through whose own part the gradient flows.

    Examples:
        >>> import keras
        >>> y, outputs = tf.constant([1, 0]), tf.constant([[3.0], [4.0]])
        >>> objective = Objective(keras.Sequential([keras.Input([1])]), coupled=True)
        >>> (_, whole_y, _), whole = whole_batch(Collectives(), objective, (outputs, y), outputs, share=1.0)
        >>> whole_y.numpy().tolist(), whole.numpy().tolist()  # of one replica its own
        ([1, 0], [[3.0], [4.0]])
    """
    with_x = objective.coupled and compat.overrides(objective.model, "compute_loss")
    rank = collectives.topology.rank
    x, y, weight = unpacked(batch)
    known = (x if with_x else None, y, weight)
    given, made = tf.nest.flatten(known), tf.nest.flatten(outputs)
    masks = [compat.mask(tensor) for tensor in made]
    sent = [each for each in (*given, *made, *masks) if each is not None and each.shape.rank]
    found = iter(_gathered(collectives, sent))
    given = [next(found)[:examples] if each is not None and each.shape.rank else each for each in given]
    # A number that is no example's, such as a temperature, all replicas have.
    every = [_with_own(next(found), each, rank, 1 / share)[:examples] if each.shape.rank else each for each in made]
    for tensor, mask in zip(every, masks, strict=True):
        if mask is not None:
            compat.set_mask(tensor, next(found)[:examples])
    every_x, y, weight = tf.nest.pack_sequence_as(known, given)
    return (every_x if with_x else x, y, weight), tf.nest.pack_sequence_as(outputs, every)


def _with_own(every: tf.Tensor, own: tf.Tensor, rank: int, factor: float) -> tf.Tensor:
    """The tensors of all replicas, through whose own part a gradient passes times `factor`."""

    @tf.custom_gradient
    def scaled(value: tf.Tensor) -> Any:
        return tf.identity(value), lambda upstream: upstream * tf.cast(factor, upstream.dtype)

    first = rank * own.shape[0]
    return tf.concat([every[:first], scaled(own), every[first + own.shape[0] :]], axis=0)


def _gathered(collectives: Collectives, tensors: list[tf.Tensor]) -> list[tf.Tensor]:
    """Tensors [b, ...] of all replicas, in their order: [replicas * b, ...]; by bytes, so that they are exact."""
    flags = [tensor.dtype == tf.bool for tensor in tensors]
    numbers = [tf.cast(tensor, tf.uint8) if flag else tensor for tensor, flag in zip(tensors, flags, strict=True)]
    messages = []
    for tensor in numbers:
        message = tf.reshape(tensor if tensor.dtype == tf.uint8 else tf.bitcast(tensor, tf.uint8), [-1])
        messages.append(AllGatherRequest(tf.pad(message, [[0, -message.shape[0] % 4]])))
    answers = []
    for tensor, flag, answer in zip(numbers, flags, collectives.exchange(messages), strict=True):
        size = tensor.dtype.size
        kept = answer[:, : math.prod(tensor.shape) * size]
        form = [answer.shape[0] * tensor.shape[0], *tensor.shape[1:]]
        values = tf.reshape(kept, form) if size == 1 and tensor.dtype == tf.uint8 else _from_bytes(kept, tensor, form)
        answers.append(tf.cast(values, tf.bool) if flag else values)
    return answers


def _from_bytes(message: tf.Tensor, like: tf.Tensor, form: list[int]) -> tf.Tensor:
    size = like.dtype.size
    return tf.bitcast(tf.reshape(message, form if size == 1 else [*form, size]), like.dtype)
