"""What must not change under a run folder: another value of any of it would be another run."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import keras

from dist_partial import checkpoints
from dist_partial.data import Dataset
from dist_partial.errors import UserError
from dist_partial.optimizers import GroupOptimizer, exclusions
from dist_partial.schedules.fixed import Constant
from dist_partial.selection.plan import Plan
from dist_partial.settings import Settings
from dist_partial.validation import differences, shown

FILE = "identity.json"
START = "initial values"  # the digests of all of them


def of_run(
    settings: Settings,
    data: Dataset,
    model: keras.Model,
    plan: Plan,
    moving: Sequence[Any],
    optimizers: Sequence[GroupOptimizer],
) -> dict[str, Any]:
    """Rules, optimizers, model, fingerprints of all that is frozen, data, seed: as plain JSON values."""
    content = {
        "rules": [f"{rule}" + (f", {rule.reduction}" if rule.reduction else "") for rule in plan.rules],
        "reduction": str(settings.reduction),
        "seed": settings.seed,
        "global_batch": settings.global_batch,
        "precision": settings.precision,
        "clip_norm": settings.clip_norm,
        "statistics": settings.statistics,
        "loss": _loss(settings.loss()),
        "data": {"name": data.name, "fingerprint": data.fingerprint},
        "model": {entry.path: f"{entry.dtype}{list(entry.shape)}" for entry in plan.entries},
        "model_config": _model_config(model),
        "optimizers": [_optimizer(group) for group in optimizers],
        "frozen": checkpoints.frozen_fingerprints(model, plan, moving),
    }
    # For what is exported later; a checkpoint takes the place of these values, so that `check` leaves them alone.
    content[START] = checkpoints.fingerprints(model)
    if not isinstance(settings.schedule, Constant):
        content |= {"schedule": str(settings.schedule), "leave": settings.leave}
    return _plain(content)


def check(folder: Path, identity: dict[str, Any], may_differ: Collection[str] = ()) -> bool:
    """Compares with the identity that the folder was made with.

    Args:
        folder: which may be absent.
        identity: from `of_run`.
        may_differ: what of it is not compared.

    Returns:
        Whether the folder is a run folder; False if it is absent or empty.

    Raises:
        UserError: it is of another run (the differences are shown), damaged, or something else.
    """
    path = folder / FILE
    if not path.exists():
        # Hidden files are the lock, and what a killed write left.
        if folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".") for p in folder.iterdir())):
            raise UserError(f"{folder} is there and is not a run folder: choose another --run_dir")
        return False
    try:
        before = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): choose another --run_dir") from None
    if isinstance(before, dict):
        if not any((folder / "checkpoints").glob("step-*")):
            return True  # it has not come far enough to be another run
        before |= {name: value for name, value in identity.items() if name == START or name in may_differ}
    if changed := differences(before, identity):
        first = "; ".join(f"{name} was {shown(old)} and is now {shown(new)}" for name, old, new in changed[:3])
        more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{folder} is of another run: {first}{more}; choose another --run_dir, or restore the configuration"
        )
    return True


def _optimizer(group: GroupOptimizer) -> dict[str, Any]:
    excluded = exclusions(group.optimizer, group.members)
    content = {"class": type(group.optimizer).__name__, **_nameless(group.optimizer.get_config())}
    return content | ({"exclude_from_weight_decay": excluded} if excluded else {})


def _loss(loss: Any) -> Any:
    name = getattr(loss, "__qualname__", type(loss).__name__)
    return {"class": name, **loss.get_config()} if isinstance(loss, keras.losses.Loss) else name


def _model_config(model: keras.Model) -> Any:
    # Models of the same shapes can be different functions: other activations, heads, epsilons.
    try:
        return _nameless(model.get_config())
    except Exception:  # a subclassed model need not have one, and Keras raises this and that
        return None


def _nameless(config: Any) -> Any:
    # Keras numbers what has no name of its own through the process, and links layers by these names.
    if isinstance(config, dict):
        links = ("name", "inbound_nodes", "input_layers", "output_layers")
        return {key: _nameless(value) for key, value in config.items() if key not in links}
    return [_nameless(value) for value in config] if isinstance(config, (list, tuple)) else config


def _plain(content: Any) -> Any:
    """As JSON reads it back; what JSON lacks is named by its type, for its text may hold an address."""
    return json.loads(json.dumps(content, default=lambda value: type(value).__name__))
