"""Makes the metrics of a run: those that are bound, or those that its data and loss suggest."""

import contextlib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_partial import compat
from dist_partial.errors import UserError, first_line
from dist_partial.step.keras_configs import remade
from dist_partial.step.keras_names import names_in, snake_case
from dist_partial.step.losses import DividedLoss, takes_targets
from dist_partial.validation import nearest

_CHOSEN = ("accuracy", "acc", "crossentropy", "ce")  # of which Keras makes what the targets ask for


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
    if metrics is None:
        return None
    if isinstance(metrics, str):
        _check_name(metrics, name)
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


def _check_name(metric: str, binding: str) -> None:
    """Raises UserError unless Keras makes a metric of a name."""
    if metric.lower() in _CHOSEN:
        return
    try:
        keras.metrics.get(metric)
    except ValueError as error:
        names = [*_CHOSEN[:2], *names_in(keras.metrics)]
        raise UserError(
            f"{binding}: Keras has no metric {metric!r}{nearest(metric, names)}; write a name such as 'accuracy', or "
            "give a metric"
        ) from error
    except TypeError as error:
        raise UserError(
            f"{binding}: a name is not enough for {metric!r} ({first_line(error)}): give the metric itself, such as "
            "keras.metrics.MeanIoU(num_classes=3), in a gin file @keras.metrics.MeanIoU() and its bindings"
        ) from error


def as_in_new_process(metrics: Sequence[tuple[str, keras.metrics.Metric]]) -> list[tuple[str, keras.metrics.Metric]]:
    """Names the results of metrics as in a new process, whatever this one has made before: `auc`, and not `auc_3`.

    Keras numbers metrics without a name through the process; `run.best`, callbacks and run folders go by these names.

    Args:
        metrics: all of a run, by the names of their results.

    Examples:
        >>> metrics = [("kind_auc_7", keras.metrics.AUC(name="auc_7")), ("auc_4", keras.metrics.AUC(name="auc_4"))]
        >>> [name for name, _ in as_in_new_process(metrics)]
        ['kind_auc_1', 'auc']
    """
    numbers = [_number(metric) for _, metric in metrics]
    found = []
    for (name, metric), number in zip(metrics, numbers, strict=True):
        if number is not None and name.endswith(metric.name):
            same = {n for n, (_, other) in zip(numbers, metrics, strict=True) if type(other) is type(metric)}
            rank = sorted(same - {None}).index(number)  # type: ignore[type-var]
            own = snake_case(type(metric).__name__) + (f"_{rank}" if rank else "")
            name = name.removesuffix(metric.name) + own
        found.append((name, metric))
    return found


def _number(metric: keras.metrics.Metric) -> int | None:
    """The number that Keras has given a metric without a name; None of one with a name."""
    own = inspect.signature(type(metric)).parameters.get("name")
    called = re.fullmatch(rf"{snake_case(type(metric).__name__)}(?:_(\d+))?", metric.name)
    if called is None or (own is not None and own.default is not None):
        return None
    return int(called[1] or 0)


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
