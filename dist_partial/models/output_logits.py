"""Finds the logits behind a model's outputs."""

import numpy as np
import tensorflow as tf


def adds_up(values: tf.Tensor) -> tf.Tensor:
    """Tells, as a boolean scalar, whether all of `values` [..., classes] are distributions.

    Examples:
        >>> bool(adds_up(tf.constant([[0.25, 0.75]]))), bool(adds_up(tf.constant([[0.25, 0.25]])))
        (True, False)
    """
    if values.shape.rank < 2 or values.shape[-1] == 1:
        return tf.constant(False)
    # Half precision rounds a sum of many; logits that are all positive and add up to 1 are not seen.
    sums = tf.reduce_sum(tf.cast(values, tf.float32), -1)
    return tf.reduce_all(values >= 0) & tf.reduce_all(tf.abs(sums - 1) < 0.02)


def as_logits(outputs: tf.Tensor) -> tf.Tensor:
    """Turns a model's outputs [..., classes] in a traced graph into logits, whether they are that or probabilities.

    Examples:
        >>> given = tf.constant([[2.0, -1.0]])
        >>> of_softmax = tf.function(lambda x: as_logits(tf.nn.softmax(x)))
        >>> as_logits(given).numpy().tolist(), of_softmax(given).numpy().tolist()
        ([[2.0, -1.0]], [[2.0, -1.0]])
    """
    outputs = full_precision(outputs)
    if activation_op(outputs, "Softmax") is not None:
        return logits_behind(outputs, "Softmax")
    return tf.where(adds_up(outputs), logits_behind(outputs, "Softmax"), outputs)


def logits_behind(probabilities: tf.Tensor, kind: str) -> tf.Tensor:
    """Finds the logits behind probabilities: those in the graph, else logarithms, of which the softmax is the same.

    Examples:
        >>> behind = tf.function(lambda x: logits_behind(tf.sigmoid(x), "Sigmoid"))
        >>> behind(tf.constant([[100.0]])).numpy().tolist()  # whose sigmoid rounds to 1
        [[100.0]]
    """
    activation = activation_op(probabilities, kind)  # no :=, which AutoGraph cannot transform
    if activation is not None:
        return tf.reshape(tf.cast(activation.inputs[0], probabilities.dtype), tf.shape(probabilities))
    return tf.math.log(tf.maximum(probabilities, np.finfo(np.float32).tiny))


def activation_op(outputs: tf.Tensor, kind: str) -> tf.Operation | None:
    """Finds the op of that kind that gives a tensor of a graph, if only dtype and shape are changed after it.

    Examples:
        >>> with tf.Graph().as_default():
        ...     outputs = tf.cast(tf.nn.softmax(tf.zeros([1, 2])), tf.float16)
        ...     activation_op(outputs, "Softmax").type, activation_op(outputs, "Sigmoid")
        ('Softmax', None)
    """
    operation = outputs.op if tf.is_symbolic_tensor(outputs) else None
    while operation is not None and operation.type in ("Cast", "Reshape", "Identity", "Squeeze", "ExpandDims"):
        operation = operation.inputs[0].op
    if operation is None or operation.type != kind or operation.outputs[0].shape[-1:] != outputs.shape[-1:]:
        return None
    return operation


def full_precision(outputs: tf.Tensor) -> tf.Tensor:
    """Casts half-precision outputs to float32: a softmax over them loses too much.

    Examples:
        >>> full_precision(tf.constant([1.0], tf.bfloat16)).dtype
        tf.float32
    """
    return tf.cast(outputs, tf.float32) if outputs.dtype in (tf.float16, tf.bfloat16) else outputs
