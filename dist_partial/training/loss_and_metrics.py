"""The loss and the metrics of a run, compared with its model and its data."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial import compat
from dist_partial.config.settings import Settings, cross_entropy
from dist_partial.data import Dataset, some_targets
from dist_partial.data.source import described
from dist_partial.errors import Raised, UserError, calling, first_line, own_line
from dist_partial.models.outputs import check_outputs
from dist_partial.step import losses, metrics
from dist_partial.step.objective import Batch, Objective, prepare, unpacked
from dist_partial.step.targets import check_targets
from dist_partial.validation import counted


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
        if isinstance(loss, list) and isinstance(outputs, (list, tuple)) and len(loss) < len(outputs):
            # Keras trains on the first ones then.
            raise UserError(
                f"run.loss has {counted(len(loss), 'loss', 'losses')}, and run.model {len(outputs)} outputs: give each "
                "output one, or None"
            )
    _, y, weight = unpacked(batch)
    if any(tf.as_dtype(each.dtype) == tf.string for each in tf.nest.flatten(weight) if each is not None):
        raise UserError(f"{data.name} has texts for weights: give numbers, of 1.0 for what counts as usual")
    compiled = {"loss": loss, "loss_weights": weights}
    with calling("run.metrics"):
        names = ("metrics", "weighted_metrics")
        compiled |= {name: metrics.made(getattr(settings, name), f"run.{name}") for name in names}
        quiet = []
        if settings.metrics is None and settings.weighted_metrics is None:
            text = data.codec is not None
            compiled["weighted_metrics"] = metrics.suggested(y, outputs, loss, text, data.unit) or None
            quiet = [metric.name for metric in compiled["weighted_metrics"] or ()]
    targets = some_targets(data.train)
    try:
        with losses.looking(_look(data, y, targets)):
            objective = prepare(model, batch, outputs, compiled, quiet)
    except Raised as raised:
        _explain(raised, model, data, batch, outputs, compiled)
        raise
    called = _called(loss)
    found = list(_targets_of(called, y, targets))
    coupled = any(losses.is_coupled(each, own) for each, _, own in found)
    return dataclasses.replace(objective, coupled=coupled), called


def _look(data: Dataset, y: Any, trained: Any) -> Callable[[Any, Any, Any], None]:
    """What looks at all targets, `trained` and held-out ones, that a loss is about to take some of, which `y` has."""
    names = {
        id(tensor): f"target {(path[0] if len(path) == 1 else path)!r} of {data.name}" if path else data.name
        for path, tensor in keras.tree.flatten_with_path(y)
    }
    own = [id(tensor) for tensor in tf.nest.flatten(y)]
    weighted = len(data.train.spec) == 3
    parts = (trained, some_targets(data.evaluation))
    found = [dict(zip(own, tf.nest.flatten(each), strict=True)) for each in parts]

    def look(loss: Any, targets: Any, given: Any) -> None:
        for arrays in found if targets is not None and id(targets) in names else ():
            check_targets(loss, names[id(targets)], arrays[id(targets)], given, weighted)

    return look


def _explain(
    raised: Raised, model: keras.Model, data: Dataset, batch: Batch, outputs: Any, compiled: Mapping[str, Any]
) -> None:
    """Raises UserError for what Keras says, after the fact, of targets, loss and metrics that do not go together."""
    error = raised.__cause__
    if not isinstance(error, (ValueError, TypeError, KeyError, tf.errors.InvalidArgumentError)):
        return
    _, y, weight = unpacked(batch)
    if not compat.overrides(model, "compute_loss"):
        bound = {f"run.{name}": value for name, value in compiled.items()}
        given = {f"{data.name}'s targets": y, f"{data.name}'s weights": weight}
        check_outputs(model, outputs, bound, {name: value for name, value in given.items() if value is not None})
    words = "none" if y is None else _batchless(y)
    words += "" if weight is None else f", weights {_batchless(weight)}"
    what = str(raised).split(" raised ")[0]
    if what.endswith("run.data"):  # which was read for them
        return
    cure = "bind another loss, or a model of other outputs"
    if what == "run.metrics":
        what, cure = f"{what}{_failing(compiled, y, outputs)}", "bind other metrics, or a model of other outputs"
        if tf.is_tensor(y) and tf.is_tensor(outputs) and metrics.are_class_ids(y, outputs):
            cure = "with class ids for targets bind metrics of class ids, such as 'accuracy', or make y one-hot"
    raise UserError(
        f"{what} does not take run.data's targets {words} and outputs {_batchless(outputs)} of run.model: "
        f"{first_line(error).rstrip('.')}{own_line(error)}; {cure}"
    ) from error


def _failing(compiled: Mapping[str, Any], y: Any, outputs: Any) -> str:
    """Names the metric that does not take them, where there is one output; '' if that is not known."""
    for metric in tf.nest.flatten([compiled["metrics"], compiled["weighted_metrics"]]):
        if isinstance(metric, keras.metrics.Metric) and tf.is_tensor(y) and tf.is_tensor(outputs):
            try:
                with keras.StatelessScope():
                    metric.update_state(y, outputs)
            except Exception:
                return f" ({type(metric).__name__})"
    return ""


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
