"""Writing files that are whole or absent, and failures to write as errors or faults."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dist_partial.errors import Fault, UserError

# Of the file system's failures those that the user has written, and that come again until they are mended.
_MISTAKES = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names `path` where the file system fails: a `UserError` if it may not be written, a `Fault` if it is full."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _MISTAKES:
            raise UserError(f"cannot write {path}: {reason}; choose another --run_dir") from None
        raise Fault(f"cannot write {path}: {reason}; free some space or choose another --run_dir") from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder if need be, and keeps other processes of this machine from running in it.

    The system takes the lock back when the process ends, however it ends.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115 (held beyond this block)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing {folder}: wait for it, or choose another --run_dir") from None
        yield


def write_atomically(path: Path, write: Callable[[Any], Any]) -> None:
    """Writes a file so that under its name there is the old content or the new, whatever happens meanwhile."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself is durable only now
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Writes text atomically, in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")
