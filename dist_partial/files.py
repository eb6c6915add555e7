"""Files: finding those that the user names, and writing them whole or not at all."""

import contextlib
import difflib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dist_partial.errors import Fault, UserError

# Of the file system's failures those that the user has written, and that come again until they are fixed.
MISTAKES = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


def existing(name: str, path: str | os.PathLike[str], pattern: str = "*") -> Path:
    """Finds a file that the user has named, with `~` expanded.

    Args:
        name: what messages begin with, such as the binding.
        path: of the file.
        pattern: of the names of such files, to show what is near.

    Raises:
        UserError: there is no such file.
    """
    try:
        place = Path(path).expanduser()
    except RuntimeError as error:  # ~somebody
        raise UserError(f"{name}: {str(path)!r}: {error}") from None
    if os.path.isfile(place):  # which, unlike Path.is_file, has no exception for names that are too long
        return place
    near: list[str] = []
    if os.path.isdir(place) and str(path):  # an empty path is this folder to pathlib
        what, folder = f"{str(path)!r} is a folder, and a file is needed", place
    else:
        what, folder = f"no file {str(path)[:300]!r}", place.parent
    with contextlib.suppress(OSError):
        names = sorted(entry.name for entry in folder.glob(pattern) if entry.is_file())
        near = difflib.get_close_matches(place.name, names) or (names[:5] if pattern != "*" else [])
    raise UserError(f"{name}: {what}" + (f"; in that folder there is {', '.join(near)}" if near else ""))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names `path` where the file system fails: a `UserError` if it may not be written, a `Fault` if it is full."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in MISTAKES:
            raise UserError(f"cannot write {path}: {reason}; choose another --run_dir") from None
        raise Fault(f"cannot write {path}: {reason}; free some space or choose another --run_dir") from None


def refuse_links(*paths: Path) -> None:
    """Raises UserError if one is a symbolic link: a folder from elsewhere could have this process write anywhere."""
    for path in paths:
        if path.is_symlink():
            raise UserError(
                f"{path} is a link to {os.readlink(path)}, and nothing is written through a link in a run folder: "
                "delete it, or choose another --run_dir, which may be a link itself"
            )


def open_lock(path: Path) -> BinaryIO:
    """Opens a file to be locked, which keeps what it has and is no link; makes it if need be."""
    return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "rb+")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder if need be, and keeps other processes of this machine from running in it.

    What writes that were killed have left there is removed.

    The system takes the lock back when the process ends, however it ends.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        refuse_links(folder / ".lock")
        file = open_lock(folder / ".lock")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing {folder}: wait for it, or choose another --run_dir") from None
        with writing(folder):
            for leftover in folder.glob(".*.partial"):
                leftover.unlink()
        yield


def write_atomically(path: Path, write: Callable[[Any], Any]) -> None:
    """Writes a file so that under its name there is the old content or the new, whatever happens meanwhile."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)  # of a killed process that had this one's number, or put there as a link
        with open(partial, "xb") as file:
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
