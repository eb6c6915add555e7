"""What must not change under a run folder, collected from a run that has been built."""

import contextlib
import json
import re
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_partial import checkpoints, compat
from dist_partial.checkpoints.fingerprints import INITIAL
from dist_partial.config import gin_files
from dist_partial.config.settings import Settings
from dist_partial.data import Dataset, functions
from dist_partial.data.functions import nameless
from dist_partial.data.mapped import functions_of
from dist_partial.schedules.fixed import Constant
from dist_partial.selection.plan import Plan
from dist_partial.selection.rules import Rule
from dist_partial.step.keras_configs import exclusions, left_out
from dist_partial.step.objective import Objective
from dist_partial.step.optimizers import GroupOptimizer


def _rule(rule: Rule) -> str:
    return f"{rule}{f', {rule.reduction}' if rule.reduction else ''}{_between(rule.between_hosts)}"


def _between(reduction: Any) -> str:
    return f", between hosts {reduction}" if reduction else ""


def of_run(
    settings: Settings,
    data: Dataset,
    objective: Objective,
    plan: Plan,
    moving: Sequence[Any],
    optimizers: Sequence[GroupOptimizer],
) -> dict[str, Any]:
    """Collects rules, optimizers, model, fingerprints of all that is frozen, data, seed: as plain JSON values."""
    model = objective.model
    content = {
        "rules": [_rule(rule) for rule in plan.rules],
        "reduction": str(settings.reduction) + _between(settings.between_hosts),
        "seed": settings.seed,
        "global_batch": settings.global_batch,
        "precision": settings.precision,
        "clip_norm": settings.clip_norm,
        "statistics": settings.statistics,
        "loss": _loss(objective),
        "class_weight": settings.class_weight,
        "data": {"name": data.name, "fingerprint": data.fingerprint, "functions": _functions(data)},
        "model": {entry.path: f"{entry.dtype}{list(entry.shape)}" for entry in plan.entries},
        "model_config": _model_config(model),
        "optimizers": [_optimizer(group) for group in optimizers],
        "code": _code(objective, optimizers),
        "frozen": checkpoints.frozen_fingerprints(model, plan, moving),
    }
    # For what is exported later; a checkpoint takes the place of these values, so that `check` leaves them alone.
    content[INITIAL] = checkpoints.model_fingerprints(model)
    if not isinstance(settings.schedule, Constant):
        content |= {"schedule": str(settings.schedule), "leave": settings.leave}
    return _plain(content)


def _functions(data: Dataset) -> dict[str, dict[str, str]]:
    """What the functions of `Dataset.map` compute with, those on the examples held out too, by name."""
    found: dict[str, dict[str, str]] = {}
    for source in (data.train, data.evaluation):
        for function in functions_of(source):
            content = function.described | gin_files.bound(function.function)
            same = [name for name in found if re.sub(r" \(\d+\)$", "", name) == function.name]
            if content not in [found[name] for name in same]:
                found[f"{function.name} ({len(same) + 1})" if same else function.name] = content
    return found


def _optimizer(group: GroupOptimizer) -> dict[str, Any]:
    excluded = exclusions(group.optimizer, group.members)
    content = {"class": type(group.optimizer).__name__, **nameless(group.optimizer.get_config())}
    return content | ({"exclude_from_weight_decay": excluded} if excluded else {})


def _loss(objective: Objective) -> Any:
    found, weights = compat.compiled_loss(objective.model) or (None, None)

    def described(loss: Any) -> Any:
        if loss is None:
            return None
        config = keras.losses.Loss.get_config(loss.inner)
        # A class of the user's need not be made of its config, and a lambda that is typed into Python has no source.
        with contextlib.suppress(Exception):
            config |= loss.inner.get_config()
            config |= left_out(loss.inner)
        config.pop("fn", None)  # which counts by its code
        return {"class": type(loss.inner).__name__, **nameless(config)}

    content = {"loss": tf.nest.map_structure(described, found), "weights": weights}
    if compat.overrides(objective.model, "compute_loss"):
        content["compute_loss"] = type(objective.model).__qualname__
    return content


def _code(objective: Objective, optimizers: Sequence[GroupOptimizer]) -> dict[str, str]:
    """What the user's functions and classes compute with: of the loss, of the model and its layers, of optimizers."""
    compiled, _ = compat.compiled_loss(objective.model) or (None, None)
    losses = [loss.inner for loss in tf.nest.flatten(compiled) if loss is not None]
    made = [group.optimizer for group in optimizers]
    parts = [objective.model, *compat.layers(objective.model), *losses, *made, *map(compat.learning_rate, made)]
    found = functions.of_classes(map(type, parts))
    for number, loss in enumerate(losses):
        if function := getattr(loss, "fn", None):
            name = "the loss function" if len(losses) == 1 else f"the loss function {number}"
            found |= {f"{name}.{key}": text for key, text in functions.described(function).items()}
    return found


def _model_config(model: keras.Model) -> Any:
    # Models of the same shapes can be different functions: other activations, heads, epsilons.
    try:
        return nameless(model.get_config())
    except Exception:  # a subclassed model need not have one, and Keras raises this and that
        return None


def _plain(content: Any) -> Any:
    """As JSON reads it back; what JSON lacks is named by its type, for its text may hold an address."""
    return json.loads(json.dumps(content, default=lambda value: type(value).__name__))
