"""Finds the files of a data set by what the user has written, and where an index of them is kept."""

import contextlib
import glob
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from dist_partial.errors import UserError
from dist_partial.validation import nearest, shown

Files = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def find_files(name: str, files: Files, pattern: str) -> list[Path]:
    """Finds files in the order of their paths, each once, with `~` expanded.

    Args:
        name: what messages begin with, such as the binding.
        files: a path, a pattern such as `data/train-*` (`**` is any folders), a folder, or a list of these.
        pattern: of the names of the files of a folder; hidden ones never match.

    Raises:
        UserError: nothing matches.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for each in ("b.tfrecord", "a.tfrecord", "notes.txt"):
        ...         _ = Path(folder, each).write_text("")
        ...     [path.name for path in find_files("mine", folder, "*.tfrecord")]
        ...     find_files("mine", f"{folder}/c.tfrecord", "*.tfrecord")
        Traceback (most recent call last):
        dist_partial.errors.UserError: mine: no file '...c.tfrecord'; nearest: '...b.tfrecord', ...
    """
    given = [files] if isinstance(files, (str, os.PathLike)) or not isinstance(files, Iterable) else [*files]
    if not all(isinstance(each, (str, os.PathLike)) for each in given):
        raise UserError(f"{name} is {shown(files)}: write a path, a pattern, a folder, or a list of these")
    if not given:
        raise UserError(f"{name} is an empty list: name at least one file")
    return sorted({path for each in given for path in _matching(name, os.fspath(each), pattern)})


def _matching(name: str, written: str, pattern: str) -> list[Path]:
    """The files for which one text of the user is written."""
    if "://" in written:
        raise UserError(f"{name}: {written!r} is not on this machine: copy the files here, or mount them as a folder")
    place = os.path.expanduser(written)
    if os.path.isfile(place):  # whatever characters its name has
        return [Path(place)]
    if os.path.isdir(place):
        found, what = glob.glob(os.path.join(glob.escape(place), pattern)), f"no file {pattern!r} in {written!r}"
        folder, word = place, pattern
    elif glob.has_magic(place):
        found, what = glob.glob(place, recursive=True), f"no file matches {written!r}"
        folder, word = os.path.split(place)
    else:
        found, what = [], f"no file {written[:300]!r}"
        folder, word = os.path.split(place)
    if paths := [Path(each) for each in found if os.path.isfile(each)]:
        return paths
    names: list[str] = []
    with contextlib.suppress(OSError):  # a folder that is not there either, or a pattern itself
        names = sorted(entry.name for entry in os.scandir(folder or ".") if not entry.name.startswith("."))
    near = nearest(word, names, always=True, folder=Path(folder))
    raise UserError(f"{name}: {what}{near or '; write the path of files that are there'}")


def index_folders(beside: Path, kind: str, cache_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """Lists where an index of data is looked for, and is to be kept: in the first folder that can be written.

    Args:
        beside: an absolute folder, beside whose files it is best.
        kind: of index, which has a folder of its own in the user's cache.
        cache_dir: which the user has named instead.

    Examples:
        >>> index_folders(Path("/data"), "images", "/mine")
        [PosixPath('/mine/...')]
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dist_partial" / kind
    whose = digest(str(beside))  # all folders share the cache
    return [Path(cache_dir).expanduser() / whose] if cache_dir else [beside / ".dist_partial", caches / whose]


def digest(*texts: str) -> str:
    """Makes a name of texts: the first 16 digits of their SHA-256.

    Examples:
        >>> digest("a", "b") == digest("ab"), len(digest("a"))
        (False, 16)
    """
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:16]
