"""The resumable state of a run: what is trained, its slots and the step; never what is frozen.

Each checkpoint is one safetensors file with a checksum of all of it. It is complete or absent: it is written beside its
name, fsynced and renamed.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dist_partial.checkpoints import safetensors_file
from dist_partial.checkpoints.fingerprints import view
from dist_partial.distributed import per_replica
from dist_partial.distributed.per_replica import OfOwner, PerReplica
from dist_partial.errors import UserError, first_line
from dist_partial.files import CHECKPOINT, remove_leftovers, writing
from dist_partial.validation import shown


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """Holds a checkpoint that was read whole: arrays by the names of `TrainState.variables`, and its metadata.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(Path(folder), 10, {"variables/w": np.ones(2)}, {"seed": 0}, keep=3)
        ...     found = newest(Path(folder), warn=print)
        >>> found.step, found.arrays["variables/w"].tolist(), found.metadata
        (10, [1.0, 1.0], {'seed': 0, 'step': 10})
    """

    path: Path
    step: int
    arrays: dict[str, np.ndarray]
    metadata: dict[str, Any]


_FORMAT = "dist_partial_checkpoint"  # the key of the metadata, whose value begins with the format's number


def read(state: dict[str, Any], gather: Callable[[bytes], list[bytes]]) -> dict[str, np.ndarray]:
    """Reads the values of all of it; called by all workers, which send each other what differs between replicas.

    What is on the CPU and the same on all replicas is not copied, and stays as it is: see `view`.

    Args:
        state: from `TrainState.variables`.
        gather: gives every worker's bytes, from `Replicas.gather`.

    Examples:
        >>> import keras
        >>> read({"variables/w": keras.Variable([1.0, 2.0])}, gather=lambda data: [data])
        {'variables/w': array([1., 2.], dtype=float32)}
    """
    own = {name: variable for name, variable in state.items() if isinstance(variable, PerReplica | OfOwner)}
    arrays = dict(zip(own, per_replica.values(list(own.values()), gather), strict=True))
    return arrays | {name: view(variable) for name, variable in state.items() if name not in own}


def _finite(array: np.ndarray) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        # A sum is half the time, and finite only if all of it is; one that is not may have overflowed.
        return bool(np.isfinite(array.sum())) or bool(np.isfinite(array).all())


def save(folder: Path, step: int, arrays: dict[str, np.ndarray], metadata: dict[str, Any], keep: int) -> Path:
    """Writes one checkpoint atomically, then removes all but the newest `keep`.

    Args:
        folder: the checkpoints'.
        step: which they are of.
        arrays: from `read`.
        metadata: JSON values to keep beside them.
        keep: how many checkpoints stay.

    Raises:
        UserError: a value is not finite, or the folder cannot be written (full, read-only); no checkpoint that was
            there is touched.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for step in (10, 20, 30):
        ...         _ = save(Path(folder), step, {"variables/w": np.ones(2)}, {}, keep=2)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['step-0000000020.safetensors', 'step-0000000030.safetensors']
        >>> save(Path("mine"), 5, {"variables/w": np.array([1.0, np.nan])}, {}, keep=2)
        Traceback (most recent call last):
        dist_partial.errors.UserError: variables/w is not finite at step 5; nothing is saved of it; ...
    """
    for name, array in arrays.items():
        # The loss of a step is that of the weights before its update: here the update itself has overflowed.
        if not _finite(array):
            raise UserError(
                f"{name} is not finite at step {step}; nothing is saved of it; lower the learning rate or bind "
                "run.clip_norm"
            )
    texts = {"format": "1", "metadata": json.dumps(metadata | {"step": step})}
    texts["checksum"] = safetensors_file.checksum(arrays, texts, _digest)
    path = folder / f"step-{step:010d}.safetensors"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        safetensors_file.write(path, arrays, {_FORMAT: json.dumps(texts)})
        listed = _listed(folder)
        before = [old for number, old in listed if number < step]
        damaged = [newer for number, newer in listed if number > step]  # or this would have gone on from it
        for leftover in [*before[: max(0, len(before) - keep + 1)], *damaged]:
            leftover.unlink()
        remove_leftovers(folder)
    return path


def newest(folder: Path, warn: Callable[[str], None], at_most: int | None = None) -> Checkpoint | None:
    """Reads the newest checkpoint that is whole; says so of each newer one that is not.

    Args:
        folder: the checkpoints'.
        warn: takes a line of text.
        at_most: the newest step that may be read; None is any.

    Raises:
        UserError: there are checkpoints, but none is whole.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     paths = [save(Path(folder), step, {"variables/w": np.ones(2)}, {}, keep=2) for step in (10, 20)]
        ...     _ = paths[1].write_bytes(paths[1].read_bytes()[:-1])
        ...     newest(Path(folder), warn=lambda line: print(line[-30:])).step
        falling back to the one before
        10
    """
    listed = [(step, path) for step, path in _listed(folder) if at_most is None or step <= at_most]
    for step, path in reversed(listed):
        try:
            arrays, texts = _read(path)
            metadata = json.loads(texts["metadata"])
            if metadata["step"] != step:
                raise ValueError(f"it holds step {metadata['step']}")
            return Checkpoint(path, step, arrays, metadata)
        except Exception as error:  # a damaged header raises the library's, NumPy's, or json's
            warn(f"checkpoint {path} is damaged ({first_line(error)}): falling back to the one before")
    if listed:
        raise UserError(f"no checkpoint in {folder} can be read ({len(listed)} damaged): remove them to start afresh")
    if old := next(folder.glob("step-*.npz"), None):
        raise UserError(
            f"{old} is a checkpoint of an earlier version of dist_partial, which this one cannot read: choose another "
            "--run_dir, or go on with that version"
        )
    return None


def steps(folder: Path) -> list[int]:
    """Lists the steps of the checkpoints in a folder, whole or not; the newest is the last.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     paths = [save(Path(folder), step, {"variables/w": np.ones(2)}, {}, keep=2) for step in (10, 20)]
        ...     steps(Path(folder))
        [10, 20]
    """
    return [step for step, _ in _listed(folder)]


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    arrays, metadata = safetensors_file.read(path)
    texts = json.loads(metadata[_FORMAT])
    if texts["format"] != "1":
        raise ValueError(f"it has the format {shown(texts['format'])}")
    if texts.pop("checksum") != safetensors_file.checksum(arrays, texts, _digest):
        raise ValueError("its content does not have its checksum")
    return arrays, texts


def _digest(array: np.ndarray) -> str:
    """A checksum against damage, of dtype, shape and values; half the time of a cryptographic one."""
    return f"{array.dtype} {array.shape} {zlib.crc32(safetensors_file.raw(array)):08x}"


def restore(checkpoint: Checkpoint, state: dict[str, Any]) -> None:
    """Assigns a checkpoint's arrays to the variables of the same names; called in the cross-replica context.

    Raises:
        UserError: a name or a shape differs; then nothing has been assigned.

    Examples:
        >>> import keras
        >>> variable = keras.Variable([0.0, 0.0])
        >>> restore(Checkpoint(Path("mine"), 10, {"variables/w": np.array([1.0, 2.0])}, {}), {"variables/w": variable})
        >>> variable.numpy().tolist()
        [1.0, 2.0]
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
        if found != wanted and not (isinstance(variable, PerReplica) and variable.takes(found)):
            raise UserError(f"{checkpoint.path}: {name} has shape {found}, not {wanted}")
    for name, variable in state.items():
        variable.assign(checkpoint.arrays[name])


def _listed(folder: Path) -> list[tuple[int, Path]]:
    names = [(match, path) for path in folder.glob("step-*") if (match := CHECKPOINT.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in names)
