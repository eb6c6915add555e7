"""The resumable state of a run: what is trained, its slots and the step; never what is frozen.

One file a checkpoint, an uncompressed .npz: a zip whose members carry checksums, which numpy reads without
unpickling. A file is complete or absent: it is written beside its name, fsynced and renamed.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf

from dist_partial.distributed import per_replica
from dist_partial.distributed.per_replica import PerReplica
from dist_partial.errors import UserError
from dist_partial.files import write_atomically, writing
from dist_partial.layer_state import is_generator
from dist_partial.local_sgd import Fragment
from dist_partial.loss_scale import LossScale
from dist_partial.optimizers import GroupOptimizer
from dist_partial.reductions.local_only import Never
from dist_partial.reductions.local_sgd import LocalSGD
from dist_partial.selection.paths import own_names
from dist_partial.selection.plan import Plan

_NAME = re.compile(r"step-(\d{10})\.npz")


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint that was read whole: arrays by the names of `resumable_state`, and what was saved beside them."""

    path: Path
    step: int
    arrays: dict[str, np.ndarray]
    metadata: dict[str, Any]


def resumable_state(
    strategy: tf.distribute.Strategy,
    model: keras.Model,
    plan: Plan,
    optimizers: Sequence[GroupOptimizer],
    states: Sequence[dict[str, Any]],
    fragments: Sequence[Fragment],
    moving: Sequence[Any],
    scale: LossScale | None = None,
) -> dict[str, Any]:
    """All variables that training changes, by a name that does not depend on their order.

    Selected variables (or their selected rows) and slots by path, what reductions keep, statistics of layers that
    run in training mode, states of random generators, and the loss scale. Of what differs between replicas all
    values are kept; `variables/` of a group that is exchanged every few steps are the anchors, on which they agree.

    Args:
        strategy: the replicas.
        model: the model.
        plan: all that is ever trained.
        optimizers: one a group; those without slots have none in the state.
        states: from `reduction.states`.
        fragments: from `local_sgd.build`.
        moving: what layers change, see `layer_state.find`.
        scale: the loss scale, or None.
    """
    state: dict[str, Any] = {}
    for group, planned in zip(optimizers, plan.groups, strict=True):
        when_fewer = "own" if isinstance(planned.reduction, Never) else "mean"
        shared = planned.reduction.shared

        def kept(variable: Any, shared: bool = shared, when_fewer: str = when_fewer) -> Any:
            return variable if shared else PerReplica(strategy, variable.value, when_fewer, variable.constraint)

        folder = "own" if isinstance(planned.reduction, LocalSGD) else "variables"
        for member in group.members:
            state[f"{folder}/{member.entry.path}"] = kept(member.variable)
        state |= {f"slots/{name}": kept(variable) for name, variable in group.state.items()}
    for fragment in fragments:
        for anchor in fragment.outer.members:
            state[f"variables/{anchor.entry.path}"] = anchor.variable
        state |= {f"outer/{name}": variable for name, variable in fragment.outer.state.items()}
    for entry, own in zip(plan.trained, states, strict=True):
        for name, variable in own.items():
            when_fewer = "sum" if name == "residual" else "own"
            state[f"reductions/{entry.path}/{name}"] = PerReplica(strategy, variable, when_fewer)
    # Keras numbers generators through the whole process (`seed_generator_7`), so they go by their order here.
    generators = [v for v in moving if is_generator(v)]
    state |= {f"generators/{i}": variable for i, variable in enumerate(generators)}
    statistics = [v for v in moving if not is_generator(v)]
    names = own_names(model, statistics)
    averaged = any(group.reduction.shared for group in plan.groups)
    for name, variable in zip(names, statistics, strict=True):
        state[f"statistics/{name}"] = variable if averaged else PerReplica(strategy, variable.value, "mean")
    if scale is not None:
        state |= {"loss_scale/scale": scale.scale, "loss_scale/good_steps": scale.good_steps}
    return state


def frozen_fingerprints(model: keras.Model, plan: Plan, moving: Sequence[Any]) -> dict[str, str]:
    """SHA-256 (the first 16 hex digits) of everything that training leaves as it is, by path.

    Args:
        model: the model.
        plan: all that is ever trained.
        moving: what its layers change, see `layer_state.find`.
    """
    prints = {}
    for entry in plan.entries:
        value = keras.ops.convert_to_numpy(entry.variable)
        if entry.rule.rows is not None and entry.trained:
            start, stop = entry.rule.rows
            prints[f"{entry.path}[other rows]"] = digest(np.delete(value, slice(start, stop), axis=0))
        elif not entry.trained:
            prints[entry.path] = digest(value)
    known = {id(v) for v in [*moving, *(entry.variable for entry in plan.entries)]}
    others = [v for v in model.variables if id(v) not in known]
    names = own_names(model, others)
    return prints | {n: digest(keras.ops.convert_to_numpy(v)) for n, v in zip(names, others, strict=True)}


def check_frozen(before: dict[str, str], now: dict[str, str], step: int) -> None:
    """Raises UserError if what is frozen has moved, by its fingerprints at the start and after a step."""
    if moved := [path for path, print_ in before.items() if now[path] != print_]:
        raise UserError(
            f"{moved[0]!r} is frozen and has changed by step {step}; nothing is saved of it. Something other than the "
            "training step assigns it: a layer's call, a callback, another thread"
        )


def variables(model: keras.Model) -> dict[str, Any]:
    """All variables but the states of random generators, by path without the model's own leading name.

    Where several have one path, those after the first are called `path (2)`, `path (3)` and so on.
    """
    kept = [v for v in model.variables if not is_generator(v)]
    return dict(zip(own_names(model, kept), kept, strict=True))


def fingerprints(model: keras.Model) -> dict[str, str]:
    """SHA-256 (the first 16 hex digits) of the values of `variables`, by path."""
    return {path: digest(keras.ops.convert_to_numpy(variable)) for path, variable in variables(model).items()}


def read(state: dict[str, Any], step: int, gather: Callable[[bytes], list[bytes]]) -> dict[str, np.ndarray]:
    """The values of all of it; called by all workers, which send each other what differs between replicas.

    Args:
        state: from `resumable_state`.
        step: which the values are of.
        gather: gives every worker's bytes, from `Replicas.gather`.

    Raises:
        UserError: a value is not finite.
    """
    own = {name: variable for name, variable in state.items() if isinstance(variable, PerReplica)}
    arrays = dict(zip(own, per_replica.values(list(own.values()), gather), strict=True))
    arrays |= {name: keras.ops.convert_to_numpy(v) for name, v in state.items() if name not in own}
    for name, array in arrays.items():
        # The loss of a step is that of the weights before its update: here the update itself has overflowed.
        if not np.isfinite(array).all():
            raise UserError(
                f"{name} is not finite at step {step}; nothing is saved of it; lower the learning rate or bind "
                "run.clip_norm"
            )
    return arrays


def save(folder: Path, step: int, arrays: dict[str, np.ndarray], metadata: dict[str, Any], keep: int) -> Path:
    """Writes one checkpoint atomically, then removes all but the newest `keep`.

    Args:
        folder: the checkpoints'.
        step: which they are of.
        arrays: from `read`.
        metadata: JSON values to keep beside them.
        keep: how many checkpoints stay.

    Raises:
        UserError: the folder cannot be written (full, read-only); no checkpoint that was there is touched.
    """
    arrays = dict(arrays)
    arrays["metadata"] = np.frombuffer(json.dumps(metadata | {"step": step}).encode(), np.uint8)
    path = folder / f"step-{step:010d}.npz"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: np.savez(file, **cast(dict[str, Any], arrays)))
        listed = _listed(folder)
        before = [old for number, old in listed if number < step]
        damaged = [newer for number, newer in listed if number > step]  # or this would have gone on from it
        for leftover in [*before[: max(0, len(before) - keep + 1)], *damaged, *folder.glob(".*.partial")]:
            leftover.unlink()
    return path


def newest(folder: Path, warn: Callable[[str], None], at_most: int | None = None) -> Checkpoint | None:
    """Reads the newest checkpoint that is whole; says so of each newer one that is not.

    Args:
        folder: the checkpoints'.
        warn: takes a line of text.
        at_most: the newest step that may be read; None is any.

    Raises:
        UserError: there are checkpoints, but none is whole.
    """
    listed = [(step, path) for step, path in _listed(folder) if at_most is None or step <= at_most]
    for step, path in reversed(listed):
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            metadata = json.loads(arrays.pop("metadata").tobytes())
            if metadata["step"] != step:
                raise ValueError(f"it holds step {metadata['step']}")
            return Checkpoint(path, step, arrays, metadata)
        except Exception as error:  # a damaged zip can look encrypted, compressed, enormous: each raises another
            warn(f"checkpoint {path} is damaged ({error}): falling back to the one before")
    if listed:
        raise UserError(f"no checkpoint in {folder} can be read ({len(listed)} damaged): remove them to start afresh")
    return None


def restore(checkpoint: Checkpoint, state: dict[str, Any]) -> None:
    """Assigns a checkpoint's arrays to the variables of the same names; called in the cross-replica context.

    Raises:
        UserError: a name or a shape differs; then nothing has been assigned.
    """
    missing, extra = sorted(set(state) - set(checkpoint.arrays)), sorted(set(checkpoint.arrays) - set(state))
    if missing or extra:
        raise UserError(
            f"{checkpoint.path} holds another state: it lacks {missing[:3]} and has {extra[:3]} besides; "
            "use another --run_dir or the configuration that made it"
        )
    for name, variable in state.items():
        found, wanted = checkpoint.arrays[name].shape, tuple(variable.shape)
        # Another number of replicas may go on with what was kept for each.
        skip = 1 if isinstance(variable, PerReplica) and found else 0
        if found[skip:] != wanted[skip:]:
            raise UserError(f"{checkpoint.path}: {name} has shape {found}, not {wanted}")
    for name, variable in state.items():
        array = checkpoint.arrays[name]
        if array.dtype.kind == "V":  # npz knows no bfloat16 and reads it back as two bytes of nothing in particular
            own = isinstance(variable, PerReplica)
            array = array.view(variable.dtype if own else keras.ops.convert_to_numpy(variable).dtype)
        variable.assign(array)


def _listed(folder: Path) -> list[tuple[int, Path]]:
    names = [(match, path) for path in folder.glob("step-*.npz") if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in names)


def digest(array: np.ndarray, digits: int = 16) -> str:
    """SHA-256 of an array's dtype, shape and values: its first hex digits."""
    content = hashlib.sha256(str((array.dtype, array.shape)).encode())
    content.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return content.hexdigest()[:digits]
