"""What is in run folders, and what reaches the disk."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy


def rows(path: Path) -> list[dict]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def state(folder: Path, step: int) -> dict[str, np.ndarray]:
    """What the checkpoint of a run folder holds."""
    return safetensors.numpy.load_file(folder / "checkpoints" / f"step-{step:010d}.safetensors")


def trained(folder: Path, step: int) -> dict[str, np.ndarray]:
    """The variables that a checkpoint holds, by path."""
    return {k.removeprefix("variables/"): v for k, v in state(folder, step).items() if k.startswith("variables/")}


def assert_same_state(one: Path, other: Path, step: int) -> None:
    """The checkpoints of two run folders have the same bits."""
    left, right = state(one, step), state(other, step)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert same_bits([value, right[name]]), name


def checkpoint_names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, and every folder; of a file, its bytes."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def same_bits(arrays: Iterable[Any]) -> bool:
    """Whether NumPy arrays are the same to the last bit, and of one dtype and shape."""
    first, *rest = arrays
    return all((a.dtype, a.shape, a.tobytes()) == (first.dtype, first.shape, first.tobytes()) for a in rest)


def durable(monkeypatch: Any) -> list[tuple[str, str, bytes]]:
    """Notes each fsync and each renaming from now on: the call, the name, and what is on the disk of a file."""
    calls: list[tuple[str, str, bytes]] = []

    def noted(name: str, seen: Callable[..., Path]) -> None:
        function = getattr(os, name)

        def call(*arguments: Any) -> Any:
            path = seen(*arguments)
            calls.append((name, path.name, path.read_bytes() if path.is_file() else b""))
            return function(*arguments)

        monkeypatch.setattr(os, name, call)

    noted("fsync", lambda descriptor: Path(os.readlink(f"/proc/self/fd/{descriptor}")))
    for name in ("replace", "rename"):
        noted(name, lambda old, new: Path(new))
    return calls
