"""Looks at targets before a loss takes them: TensorFlow fails on many in the first step, or trains on nonsense."""

from typing import Any

import keras
import numpy as np

from dist_partial.errors import UserError

_SPARSE = keras.losses.sparse_categorical_crossentropy
# Of labels beyond these losses have no bound, or no sense.
_FROM_0_TO_1 = (
    keras.losses.binary_crossentropy,
    keras.losses.binary_focal_crossentropy,
    keras.losses.dice,
    keras.losses.tversky,
)


def check_targets(loss: Any, name: str, y: np.ndarray, outputs: Any, weighted: bool = False) -> None:
    """Looks whether a loss can take targets for these outputs.

    Args:
        loss: a Keras loss; of others than Keras's own only texts are refused.
        name: of the data set, or of one of its targets.
        y: targets of any shape.
        outputs: a tensor [..., classes], or anything with that shape.
        weighted: whether examples have weights, by which labels that are missing, such as -1, may count nothing.

    Raises:
        UserError: targets are texts; class ids are none of 0 to classes - 1; labels are not within 0 to 1.

    Examples:
        >>> check_targets(keras.losses.BinaryCrossentropy(), "mine", np.array([0, 2]), np.zeros([2, 1]))
        Traceback (most recent call last):
        dist_partial.errors.UserError: mine has the target 2, and run.loss (binary_crossentropy) takes targets from 0 \
to 1: ...
    """
    if y.dtype.kind in "OSU" and y.size:
        first = y.flat[0].decode(errors="replace") if isinstance(y.flat[0], bytes) else str(y.flat[0])
        raise UserError(
            f"{name} has texts ({first!r}, ...): make class ids of these targets, by keras.layers.StringLookup in "
            "Dataset.map"
        )
    of_keras = type(loss).call.__module__.startswith("keras.")  # one of the user's own may take other targets
    function = getattr(loss, "fn", None) if of_keras else None
    if not y.size or y.dtype.kind not in "iufb":
        return
    if function is _SPARSE and loss.get_config().get("axis", -1) == -1 and outputs.shape:
        ignored = getattr(loss, "ignore_class", None)
        y = y.astype(np.int8) if y.dtype.kind == "b" else y
        _check_class_ids(name, y if ignored is None else y[y != ignored], int(outputs.shape[-1]))
    if function in _FROM_0_TO_1 and not weighted and (beyond := y[(y < 0) | (y > 1)]).size:
        raise UserError(
            f"{name} has the target {beyond.flat[0]:g}, and run.loss ({function.__name__}) takes targets from 0 to 1: "
            "scale them, or bind another run.loss"
        )


def _check_class_ids(name: str, y: np.ndarray, classes: int) -> None:
    if not y.size:
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
    if classes == 1 and high <= 1:
        raise UserError(
            f"{name} has the labels 0 and 1, and run.model one output for them: the loss of that is "
            "'binary_crossentropy', or without a sigmoid keras.losses.BinaryCrossentropy(from_logits=True): bind "
            "run.loss"
        )
    if high >= classes:
        raise UserError(
            f"{name} has targets up to {high:g} and run.model gives logits for the classes 0 to {classes - 1}: "
            f"bind a model of at least {high + 1:g} classes, or another run.loss if the targets are no class ids"
        )
