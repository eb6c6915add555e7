"""Dynamic loss scaling for float16, decided once for all replicas.

Micikevicius et al. 2018, "Mixed Precision Training".
"""

import keras
import numpy as np
import tensorflow as tf

from dist_partial import compat

GROW_AFTER = 2000  # updates in a row without overflow, after which the scale is doubled
FIRST_SCALE = 2.0**15


class LossScale:
    """Scales the loss before backprop, so that small gradients survive float16.

    Make it in the strategy's scope. Both variables are mirrored, and are changed in the cross-replica
    context by what is known of the *summed* gradient, so replicas cannot disagree.

    Examples:
        >>> scale = LossScale()
        >>> scale.adjust(tf.constant(False))
        >>> float(scale.value()) == FIRST_SCALE / 2
        True
    """

    def __init__(self) -> None:
        self.scale = tf.Variable(FIRST_SCALE, trainable=False, name="loss_scale")
        self.good_steps = tf.Variable(0, trainable=False, name="good_steps")

    def value(self) -> tf.Tensor:
        return tf.convert_to_tensor(self.scale)

    def adjust(self, finite: tf.Tensor) -> None:
        """Halves the scale after an overflow, doubles it after `GROW_AFTER` updates without one.

        Args:
            finite: bool scalar, whether the summed gradient was finite.
        """
        good = tf.where(finite, self.good_steps + 1, 0)
        grow = good >= GROW_AFTER
        factor = tf.where(finite, tf.where(grow, 2.0, 1.0), 0.5)
        self.scale.assign(tf.maximum(self.scale * factor, 1.0))
        self.good_steps.assign(tf.where(grow, 0, good))

    def exhausted(self, norms: np.ndarray) -> bool:
        """Whether none of the last steps' gradient norms is finite, though the scale is at its least."""
        return not np.isfinite(norms).any() and float(self.scale.numpy()) <= 1.0


def needs_loss_scale(model: keras.Model) -> bool:
    """Tells whether any layer computes in float16.

    Examples:
        >>> layers = [keras.layers.Dense(1, dtype=dtype) for dtype in ("float32", "mixed_float16")]
        >>> [needs_loss_scale(keras.Sequential([layer])) for layer in layers]
        [False, True]
    """
    return any(layer.compute_dtype == "float16" for layer in compat.layers(model))
