"""Makes the metrics of a run: those that are bound, or those that its data and loss suggest."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from dist_partial import compat
from dist_partial.errors import UserError
from dist_partial.step.keras_configs import remade
from dist_partial.step.losses import DividedLoss, takes_targets


def made(metrics: Any, name: str) -> Any:
    """Makes what `run.metrics` describes: what `Model.compile(metrics=...)` takes.

    Args:
        metrics: a Keras metric, its class or another factory of it, a name such as 'accuracy', or a function (y,
            outputs) -> values; or a list of them, or a dict or list of lists, by output.
        name: of the binding, for errors.

    Raises:
        UserError: it is something else.

    Examples:
        >>> [metric.name for metric in made([keras.metrics.AUC, keras.metrics.Mean(name="score")], "run.metrics")]
        ['auc', 'score']
    """
    if isinstance(metrics, dict):
        return {key: made(each, name) for key, each in metrics.items()}
    if isinstance(metrics, (list, tuple)):
        return [made(each, name) for each in metrics]
    if metrics is None or isinstance(metrics, str):
        return metrics
    if isinstance(metrics, keras.metrics.Metric):
        if metrics.dtype != keras.config.floatx():  # made before the run's precision was known
            with contextlib.suppress(TypeError, ValueError):  # a class of the user's need not be made of its config
                return remade(metrics, dtype=keras.config.floatx())
        return metrics
    if callable(metrics) and takes_targets(metrics):
        return metrics
    metric = metrics() if callable(metrics) else metrics
    if not isinstance(metric, keras.metrics.Metric):
        raise UserError(
            f"{name} has a {type(metric).__name__}: give Keras metrics, such as @keras.metrics.AUC(), or names, such "
            "as 'accuracy'"
        )
    return metric


def suggested(y: Any, outputs: Any, loss: Any, text: bool, unit: str | None) -> list[keras.metrics.Metric]:
    """Makes the metrics of a run that binds none, each weighted as the loss is.

    Args:
        y: the targets of some examples.
        outputs: the model's.
        loss: from `losses.made`.
        text: whether the targets are symbols of a text.
        unit: `Dataset.unit`.

    Returns:
        Where the targets are ids of the outputs' classes, the accuracy, and of text the perplexity; where a target is a
        byte, bits per byte.
    """
    found: list[keras.metrics.Metric] = []
    if isinstance(loss, DividedLoss) and tf.is_tensor(y) and tf.is_tensor(outputs) and are_class_ids(y, outputs):
        found.append(keras.metrics.SparseCategoricalAccuracy(name="accuracy"))
        if unit == "byte":
            found.append(OfMeanLoss("bits_per_byte", loss, lambda mean: mean / math.log(2)))
        elif text:
            found.append(OfMeanLoss("perplexity", loss, keras.ops.exp))
    return found


def are_class_ids(y: tf.Tensor, outputs: tf.Tensor) -> bool:
    """Tells whether targets [...] or [..., 1] can be ids of the classes of `outputs` [..., classes].

    Examples:
        >>> are_class_ids(tf.constant([2, 0]), tf.zeros([2, 3])), are_class_ids(tf.constant([0.5]), tf.zeros([1, 3]))
        (True, False)
    """
    if not y.dtype.is_integer or not (outputs.shape.rank and outputs.shape[-1] > 1):
        return False
    return y.shape.as_list() in (outputs.shape.as_list()[:-1], [*outputs.shape.as_list()[:-1], 1])


class OfMeanLoss(keras.metrics.Mean):
    """Computes a function of the mean loss of the targets, weighted; what is masked does not count.

    Args:
        name: of the result.
        loss: whose elements are averaged.
        function: of the mean.

    Examples:
        >>> loss = DividedLoss(keras.losses.MeanSquaredError())
        >>> metric = OfMeanLoss("rmse", loss, keras.ops.sqrt)
        >>> metric.update_state(tf.zeros([2, 1]), tf.constant([[1.0], [7.0]]))
        >>> float(metric.result())
        5.0
    """

    def __init__(self, name: str, loss: DividedLoss, function: Callable[[Any], Any]) -> None:
        super().__init__(name=name, dtype=keras.config.floatx())
        self._loss, self._function = loss, function

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        values = self._loss.elements(y_true, y_pred)
        masks = [mask for each in (y_pred, values) if (mask := compat.mask(each)) is not None]
        for mask in masks:
            mask = keras.ops.cast(mask, values.dtype)
            sample_weight = mask if sample_weight is None else sample_weight * mask
        super().update_state(values, sample_weight)

    def result(self) -> Any:
        return self._function(super().result())
