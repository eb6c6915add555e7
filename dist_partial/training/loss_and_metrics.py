"""The loss and the metrics of a run, compared with its model and its data."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial import compat
from dist_partial.config.settings import Settings, cross_entropy
from dist_partial.data import Dataset, some_targets
from dist_partial.data.source import described
from dist_partial.errors import Raised, UserError, calling, first_line, own_line
from dist_partial.step import losses, metrics
from dist_partial.step.objective import Batch, Objective, prepare, unpacked


def make_objective(
    settings: Settings, data: Dataset, model: keras.Model, batch: Batch, outputs: Any
) -> tuple[Objective, list[losses.DividedLoss]]:
    """Makes the loss and the metrics, and lines to say of them; in the strategy's scope.

    Args:
        settings: with the loss and the metrics.
        data: the data set.
        model: the model.
        batch: some examples.
        outputs: the model's for them.

    Raises:
        UserError: the loss or the metrics do not go with the model or the data.
    """
    with calling("run.loss"):
        loss, weights = _loss(settings, data, model)
        loss = losses.made(loss)
    _, y, weight = unpacked(batch)
    compiled = {"loss": loss, "loss_weights": weights}
    with calling("run.metrics"):
        names = ("metrics", "weighted_metrics")
        compiled |= {name: metrics.made(getattr(settings, name), f"run.{name}") for name in names}
        quiet = []
        if settings.metrics is None and settings.weighted_metrics is None:
            text = data.codec is not None
            compiled["weighted_metrics"] = metrics.suggested(y, outputs, loss, text, data.unit) or None
            quiet = [metric.name for metric in compiled["weighted_metrics"] or ()]
    try:
        objective = prepare(model, batch, outputs, compiled, quiet)
    except Raised as raised:
        _check_class_ids(data, loss, y)
        error = raised.__cause__
        if not isinstance(error, (ValueError, TypeError, KeyError, tf.errors.InvalidArgumentError)):
            raise
        given = "none" if y is None else _batchless(y)
        given += "" if weight is None else f", weights {_batchless(weight)}"
        raise UserError(
            f"{str(raised).split(' raised ')[0]} does not take run.data's targets {given} and outputs "
            f"{_batchless(outputs)} of run.model: {first_line(error)}{own_line(error)}; bind another loss, or a model "
            "of other outputs"
        ) from error
    _check_class_ids(data, loss, y)
    called = _called(loss)
    found = list(_targets_of(called, y, some_targets(data.train)))
    coupled = any(losses.is_coupled(each, targets) for each, _, targets in found)
    return dataclasses.replace(objective, coupled=coupled), called


def _check_class_ids(data: Dataset, loss: Any, y: Any) -> None:
    for source in (data.train, data.evaluation):
        for each, outputs, targets in _targets_of(_called(loss), y, some_targets(source)):
            losses.check_class_ids(each.inner, data.name, targets, outputs.shape[-1])


def _called(loss: Any) -> list[losses.DividedLoss]:
    return [each for each in tf.nest.flatten(loss) if each is not None and each.seen is not None]


def _loss(settings: Settings, data: Dataset, model: keras.Model) -> tuple[Any, Any]:
    """What is bound; or what the model was compiled with; or its own `compute_loss` alone; or cross-entropy."""
    if settings.loss is not None:
        return settings.loss, settings.loss_weights
    compiled = compat.compiled_loss(model)
    if compiled or compat.overrides(model, "compute_loss") or len(data.train.spec) == 1:
        return compiled or (None, None)
    return cross_entropy(), settings.loss_weights


def _batchless(values: Any) -> str:
    return described(tf.nest.map_structure(lambda value: tf.TensorSpec(value.shape[1:], value.dtype), values))


def _targets_of(
    found: Sequence[losses.DividedLoss], y: Any, targets: Any
) -> Iterator[tuple[losses.DividedLoss, tf.Tensor, np.ndarray]]:
    """Gives each loss with the outputs that it was tried on and the targets that it takes, of the whole data set."""
    places = {id(tensor): array for tensor, array in zip(tf.nest.flatten(y), tf.nest.flatten(targets), strict=True)}
    for loss in found:
        assert loss.seen is not None
        if id(loss.seen[0]) in places:
            yield loss, loss.seen[1], places[id(loss.seen[0])]


def notes_on(found: Sequence[losses.DividedLoss]) -> list[str]:
    """Says what outputs are taken for, where the loss takes logits."""
    kinds = sorted({loss.probabilities for loss in found} - {""})
    return [
        f"run.model gives probabilities ({k}), and run.loss takes logits: it is given those behind them" for k in kinds
    ]
