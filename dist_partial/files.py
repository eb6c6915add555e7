"""Files: finding those that the user names, and writing them whole or not at all."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dist_partial.errors import Fault, UserError
from dist_partial.validation import nearest

CHECKPOINT = re.compile(r"step-(\d{10})\.safetensors")  # the name of one; here since launchers import no TensorFlow
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

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "mine.keras").write_text("")
        ...     print(existing("keras_file.path", f"{folder}/mine.keras").name)
        ...     existing("keras_file.path", f"{folder}/mini.keras", "*.keras")
        Traceback (most recent call last):
        dist_partial.errors.UserError: keras_file.path: no file '...mini.keras'; nearest: '...mine.keras'
    """
    try:
        place = Path(path).expanduser()
    except RuntimeError as error:  # ~somebody
        raise UserError(f"{name}: {str(path)!r}: {error}") from None
    if os.path.isfile(place):  # which, unlike Path.is_file, has no exception for names that are too long
        return place
    near = ""
    if os.path.isdir(place) and str(path):  # an empty path is this folder to pathlib
        what, folder = f"{str(path)!r} is a folder, and a file is needed", place
    else:
        what, folder = f"no file {str(path)[:300]!r}", place.parent
    with contextlib.suppress(OSError):
        names = sorted(entry.name for entry in folder.glob(pattern) if entry.is_file())
        near = nearest(place.name, names, always=pattern != "*", folder=folder)
    raise UserError(f"{name}: {what}{near or '; write the path of one that is there'}")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names `path` where the file system fails: a `UserError` if it may not be written, a `Fault` if it is full.

    Examples:
        >>> with writing(Path("runs/mine")):
        ...     raise OSError(errno.ENOSPC, "No space left on device")
        Traceback (most recent call last):
        dist_partial.errors.Fault: cannot write runs/mine: No space left on device; free some space or ...
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in MISTAKES:
            raise UserError(f"cannot write {path}: {reason}; choose another --run_dir") from None
        raise Fault(f"cannot write {path}: {reason}; free some space or choose another --run_dir") from None


def refuse_links(*paths: Path) -> None:
    """Raises UserError if one is a symbolic link: a folder from elsewhere could have this process write anywhere.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     refuse_links(Path(folder))
        ...     Path(folder, "checkpoints").symlink_to("elsewhere")
        ...     refuse_links(Path(folder, "checkpoints"))
        Traceback (most recent call last):
        dist_partial.errors.UserError: ...checkpoints is a link to elsewhere, and nothing is written through a link ...
    """
    for path in paths:
        if path.is_symlink():
            raise UserError(
                f"{path} is a link to {os.readlink(path)}, and nothing is written through a link in a run folder: "
                "delete it, or choose another --run_dir, which may be a link itself"
            )


@contextlib.contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Holds an exclusive lock between the processes of this machine; the system drops it when its holder dies.

    Args:
        path: a file that is made if need be, keeps its content, and is no link.
        wait: whether to wait for another process that holds it.

    Raises:
        BlockingIOError: another process holds it, and this one does not wait.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, lock(Path(folder, "mine")):
        ...     with lock(Path(folder, "mine"), wait=False):
        ...         print("two hold it")
        Traceback (most recent call last):
        BlockingIOError: ...
    """
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


@contextlib.contextmanager
def locked(folder: Path, patience_seconds: float = 0.0) -> Iterator[None]:
    """Makes the folder if need be, and keeps other processes of this machine from running in it.

    What writes that were killed have left there is removed.

    Args:
        folder: the run folder.
        patience_seconds: how long to wait for another process that holds it, and is about to end.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
        Fault: another process holds it after `patience_seconds`.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, locked(Path(folder, "run")):
        ...     with locked(Path(folder, "run")):
        ...         print("two hold it")
        Traceback (most recent call last):
        dist_partial.errors.UserError: another run is writing .../run: wait for it, or choose another --run_dir
    """
    with contextlib.ExitStack() as held:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            refuse_links(folder / ".lock")
            until = time.monotonic() + patience_seconds
            while True:
                try:
                    held.enter_context(lock(folder / ".lock", wait=False))
                    break
                except BlockingIOError:
                    if time.monotonic() >= until:
                        kind = Fault if patience_seconds else UserError
                        raise kind(
                            f"another run is writing {folder}: wait for it, or choose another --run_dir"
                        ) from None
                    time.sleep(0.01)
            remove_leftovers(folder)
        yield


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the place of a file or folder to write, which then takes the place of `path`, whatever happens meanwhile.

    Under the name `path` there is the old content or the new. A folder is renamed aside before another can take its
    place, and is back if that fails; between two renamings there is neither.

    Yields:
        A name beside it, at which there is nothing: hidden, and with the same end.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     place = Path(folder, "mine.txt")
        ...     _ = place.write_text("old")
        ...     with replacing(place) as partial:
        ...         _ = partial.write_text("new")
        ...         print(place.read_text())
        ...     print(place.read_text(), len(list(Path(folder).iterdir())))
        old
        new 1
    """
    partial = path.with_name(f"{_PARTIAL}{os.getpid()}-{path.name}")
    try:
        remove(partial)  # of a killed process that had this one's number, or put there as a link
        yield partial
        for each in (partial, *partial.rglob("*")):
            _sync(each)
        if partial.is_dir() and path.is_dir() and not path.is_symlink():  # a file replaces no folder
            aside = path.with_name(f"{_PARTIAL}{os.getpid()}-replaced-{path.name}")
            os.replace(path, aside)
            try:
                os.replace(partial, path)
            except OSError:
                os.replace(aside, path)
                raise
            remove(aside)
        else:
            os.replace(partial, path)
        _sync(path.parent)  # the new name itself is durable only now
    finally:
        remove(partial)


_PARTIAL = ".partial-"  # begins the names of what is being written


def remove_leftovers(folder: Path) -> None:
    """Removes what writes that were killed have left in a folder that no other process writes.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in (".partial-17-mine.txt", "mine.txt"):
        ...         _ = Path(folder, name).write_text("")
        ...     remove_leftovers(Path(folder))
        ...     [path.name for path in Path(folder).iterdir()]
        ['mine.txt']
    """
    for leftover in folder.glob(f"{_PARTIAL}*"):
        remove(leftover)


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder, if it is there.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "run", "checkpoints").mkdir(parents=True)
        ...     for name in ("run", "absent"):
        ...         remove(Path(folder, name))
        ...     list(Path(folder).iterdir())
        []
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_atomically(path: Path, write: Callable[[Any], Any]) -> None:
    """Has `write` write an open binary file, see `replacing`.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(Path(folder, "mine"), lambda file: file.write(b"a"))
        ...     [(path.name, path.read_bytes()) for path in Path(folder).iterdir()]
        [('mine', b'a')]
    """
    with replacing(path) as partial, open(partial, "xb") as file:
        write(file)


def write_text(path: Path, text: str) -> None:
    """Writes text atomically, in UTF-8.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_text(Path(folder, "mine.txt"), "\u00fc")
        ...     Path(folder, "mine.txt").read_bytes().hex()
        'c3bc'
    """
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON atomically.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(Path(folder, "mine.json"), {"step": 5})
        ...     print(Path(folder, "mine.json").read_text())
        {
         "step": 5
        }
        <BLANKLINE>
    """
    write_text(path, json.dumps(content, indent=1) + "\n")
