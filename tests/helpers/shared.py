"""What several processes of pytest need is made by one of them."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make(folder)` fills, once for all processes of this run of pytest; the others wait for it.

    Where it fails, each that asks tries again.
    """
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder := base / name).exists():
            part = factory.mktemp(f"{name}-part")
            make(part)
            part.rename(folder)
    return folder
