"""The resumable state of a run: what is trained, its slots and the step; never what is frozen.

One file a checkpoint, an uncompressed .npz: a zip whose members carry checksums, which numpy reads without
unpickling. A file is complete or absent: it is written beside its name, fsynced and renamed.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import keras
import numpy as np

from dist_partial.distributed import per_replica
from dist_partial.distributed.per_replica import PerReplica
from dist_partial.errors import UserError
from dist_partial.files import write_atomically, writing


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint that was read whole: arrays by the names of `resumable_state`, and what was saved beside them."""

    path: Path
    step: int
    arrays: dict[str, np.ndarray]
    metadata: dict[str, Any]


_NAME = re.compile(r"step-(\d{10})\.npz")


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
