"""The images of a folder by class: found once, and of large folders kept in a file that is read by mmap."""

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dist_partial.data.file_lists import digest, index_folders
from dist_partial.errors import UserError
from dist_partial.files import write_atomically
from dist_partial.validation import nearest

DECODED = (b".bmp", b".gif", b".jpeg", b".jpg", b".png")
"""Endings of files that are read; of an animated GIF, the first picture."""

KEPT_FROM = 100_000
"""Images from which on an index is kept; fewer are found in less than a second."""

_NOT_DECODED = (b".avif", b".heic", b".jp2", b".tif", b".tiff", b".webp")  # images all the same
_SETTLED = 2.0  # seconds: a folder that was changed later may change again within one tick of its clock


class ImageIndex:
    """Tells the path and the class of each image of a folder.

    The classes are in the order of their names, the images of a class in that of their paths.

    Attributes:
        folder: whose subfolders are the classes.
        classes: their names.
        firsts: int64 [classes + 1], the number of the first image of each; the last is that of all images.

    Args:
        folder: likewise.
        content: uint8, usually on disk: the length of a head (int64), the head as JSON, where each name begins
            (int64), and the names one after the other.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("dog/2.png", "dog/1.png", "cat/a.jpg"):
        ...         Path(folder, name).parent.mkdir(exist_ok=True)
        ...         Path(folder, name).touch()
        ...     index = open_images(os.fsencode(folder))
        ...     index.classes, [os.path.basename(index.path(i)) for i in range(len(index))]
        (('cat', 'dog'), [b'a.jpg', b'1.png', b'2.png'])
    """

    def __init__(self, folder: bytes, content: np.ndarray) -> None:
        self.folder, self.content = folder, content
        size = int(content[:8].view(np.int64)[0])
        self._head = json.loads(content[8 : 8 + size].tobytes())
        classes, counts = zip(*self._head["classes"], strict=True)
        self.classes: tuple[str, ...] = classes
        self.firsts = np.cumsum([0, *counts])
        names = 8 + size + 8 * (int(self.firsts[-1]) + 1)
        self._begins, self._names = content[8 + size : names].view(np.int64), content[names:]
        if self._begins[-1] != len(self._names):
            raise ValueError("cut off")

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __reduce__(self) -> Any:  # another process maps the same file
        kept = getattr(self.content.base, "filename", None)
        return (_opened, (self.folder, kept)) if kept else (ImageIndex, (self.folder, self.content))

    def classes_of(self, indices: np.ndarray) -> np.ndarray:
        """The classes of images, int64 [b]."""
        return np.searchsorted(self.firsts, indices, side="right") - 1

    def path(self, index: int) -> bytes:
        """The path of the file of an image."""
        name = self._names[self._begins[index] : self._begins[index + 1]].tobytes()
        return os.path.join(self.folder, os.fsencode(self.classes[self.classes_of(np.array(index))]), name)

    def outdated(self, classes: Sequence[bytes]) -> bool:
        """Whether the folder has other classes by now, or one of the folders within was changed since."""
        if [*map(os.fsencode, self.classes)] != [*classes]:
            return True
        with suppress(OSError):
            changes = self._head["changes"]
            return any(os.stat(os.path.join(self.folder, os.fsencode(each))).st_mtime_ns != at for each, at in changes)
        return True


def open_images(folder: bytes) -> ImageIndex:
    """Finds the images of a folder, of which a large one is listed once and for all until it changes.

    What was found is kept in the folder `.dist_partial` beside it or, where that cannot be written, in
    `dist_partial/images` in `$XDG_CACHE_HOME` or `~/.cache`. An image that is replaced changes nothing.

    Raises:
        UserError: there is no such folder, it has no subfolders, one of them has no image, or one that TensorFlow
            cannot decode.

    Examples:
        >>> open_images(b"nowhere/at/all")
        Traceback (most recent call last):
        dist_partial.errors.UserError: cannot read the folder nowhere/at/all: No such file or directory
    """
    classes = _subfolders(folder)
    whole = os.path.abspath(os.fsdecode(folder))
    folders = index_folders(Path(whole).parent, "images")
    name = f"{digest(os.path.basename(whole))}-images.npy"
    for place in folders:
        with suppress(OSError, EOFError, ValueError, KeyError, TypeError, IndexError):  # missing, or not whole
            if not (index := _opened(folder, place / name)).outdated(classes):
                return index
    content, settled = _listed(folder, classes)
    if settled:
        for place in folders:
            with suppress(OSError):
                place.mkdir(parents=True, exist_ok=True)
                write_atomically(place / name, lambda file: np.save(file, content))
                return _opened(folder, place / name)
    return ImageIndex(folder, content)


def _opened(folder: bytes, path: str | os.PathLike[str]) -> ImageIndex:
    return ImageIndex(folder, np.asarray(np.load(path, mmap_mode="r")))


def _listed(folder: bytes, classes: Sequence[bytes]) -> tuple[np.ndarray, bool]:
    """The content of the index, and whether it is worth to be kept."""
    counts, sizes, names, changes = [], [np.zeros(1, np.int64)], [], []
    begun = time.time()
    for each in tqdm(classes, "images", unit="class", delay=3, leave=False, disable=None):
        found, within = _images(os.path.join(folder, each))
        counts.append((os.fsdecode(each), len(found)))
        sizes.append(np.fromiter(map(len, found), np.int64, len(found)))
        names.append(b"".join(found))
        changes += [(os.fsdecode(os.path.join(each, path)), change) for path, change in within]
    head = json.dumps({"classes": counts, "changes": changes}).encode()
    head += b" " * (-len(head) % 8)
    begins = np.cumsum(np.concatenate(sizes))
    parts = [np.array([len(head)]).tobytes(), head, begins.tobytes(), *names]
    content = np.frombuffer(b"".join(parts), np.uint8)
    settled = max(change for _, change in changes) < (begun - _SETTLED) * 1e9
    return content, settled and sum(count for _, count in counts) >= KEPT_FROM


def _subfolders(folder: bytes) -> list[bytes]:
    """The names of the classes, sorted."""
    shown = os.fsdecode(folder)
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(b"."))
    except OSError as error:
        above = Path(shown).parent
        names = [each.name for each in above.iterdir() if each.is_dir()] if above.is_dir() else []
        near = nearest(Path(shown).name, sorted(names), always=True, folder=above)
        raise UserError(f"cannot read the folder {shown}: {error.strerror}{near}") from None
    if classes := [name for name, is_folder in found if is_folder]:
        return classes
    some = ", ".join(repr(os.fsdecode(name)) for name, _ in found[:3])
    raise UserError(
        f"{shown} has no subfolders, which are the classes{f', but {some}' if some else ''}: name a folder "
        "with one subfolder of images a class"
    )


def _refuse(error: OSError) -> None:
    """Raises what `os.walk` would pass over."""
    raise UserError(f"cannot read the folder {os.fsdecode(error.filename)}: {error.strerror}")


def _images(folder: bytes) -> tuple[list[bytes], list[tuple[bytes, int]]]:
    """The paths of the images of a class within its folder, sorted; and when each folder was changed last, in ns."""
    others, found, changes = set(), [], []
    for path, _, names in os.walk(folder, onerror=_refuse):
        within = path[len(folder) + 1 :]
        changes.append((within, os.stat(path).st_mtime_ns))
        for name in names:
            if name.startswith(b"."):
                continue
            if (lower := name.lower()).endswith(DECODED):
                found.append(os.path.join(within, name))
            elif lower.endswith(_NOT_DECODED):
                shown = os.fsdecode(os.path.join(path, name))
                raise UserError(f"{shown} is of a kind that TensorFlow cannot decode: convert it to JPEG or PNG")
            else:
                others.add(os.fsdecode(os.path.splitext(lower)[1]))
    if found:
        return sorted(found), changes
    has = f"files that end in {', '.join(map(repr, sorted(others)[:5]))}" if others else "no files"
    raise UserError(f"{os.fsdecode(folder)} is a class without images: it has {has}; fill or delete it")
