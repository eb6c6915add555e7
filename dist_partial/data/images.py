"""Folders of images, one a class."""

import os
from pathlib import Path

import numpy as np
import tensorflow as tf

from dist_partial.errors import Fault, UserError
from dist_partial.files import MISTAKES
from dist_partial.validation import nearest

DECODED = (b".bmp", b".gif", b".jpeg", b".jpg", b".png")
"""Endings of files that are read; of an animated GIF, the first picture."""

_NOT_DECODED = (b".avif", b".heic", b".jp2", b".tif", b".tiff", b".webp")  # images all the same
_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM")


class ImageFolderSource:
    """Reads the files of a folder whose subfolders are the classes: encoded images, and class ids.

    The classes are in the order of their names, the files of a class in that of their paths. Their names are in memory,
    in one array.

    Args:
        folder: whose subfolders are classes; files deeper inside count for the class, too.

    Raises:
        UserError: there is no such folder, it has no subfolders, one of them has no image, or one that TensorFlow
            cannot decode.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for each in ("dog", "cat"):
        ...         Path(folder, each).mkdir()
        ...         _ = tf.keras.utils.save_img(f"{folder}/{each}/1.png", np.zeros([2, 2, 3]))
        ...     source = ImageFolderSource(folder)
        ...     images, classes = source.fetch(np.array([1]))
        >>> source.classes, classes.tolist(), images[0][:4]
        (('cat', 'dog'), [1], b'\\x89PNG')
    """

    spec = (tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.int32))

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.fsencode(os.path.expanduser(folder))
        classes = _subfolders(self.folder)
        files = [_images(os.path.join(self.folder, each)) for each in classes]
        self.classes = tuple(map(os.fsdecode, classes))
        self.names = np.concatenate(files)
        self.firsts = np.cumsum([0, *map(len, files)])

    def __len__(self) -> int:
        return len(self.names)

    def fetch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The files `indices`, int64 [b], as bytes, and their classes.

        Raises:
            UserError: a file is gone, or is no image.
            Fault: the file system fails.
        """
        classes = np.searchsorted(self.firsts, indices, side="right") - 1
        images = np.empty(len(indices), object)
        for i, index in enumerate(indices.tolist()):
            try:
                with open(self._path(index), "rb", buffering=0) as file:
                    images[i] = file.readall()
            except OSError as error:
                kind = UserError if error.errno in MISTAKES else Fault
                raise kind(f"cannot read {self.place(index)}: {error.strerror or error}") from None
            if not images[i].startswith(_STARTS):
                raise UserError(f"{self.place(index)} is no JPEG, PNG, GIF or BMP image: replace or delete it")
        return images, classes.astype(np.int32)

    def _path(self, index: int) -> bytes:
        name = os.fsencode(self.classes[np.searchsorted(self.firsts, index, side="right") - 1])
        return os.path.join(self.folder, name, self.names[index])

    def place(self, index: int) -> str:
        """The path of the file of an example."""
        return os.fsdecode(self._path(index))


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


def _images(folder: bytes) -> np.ndarray:
    """The paths of the images of a class within its folder, sorted: bytes [n]."""
    others, found = set(), []
    for path, _, names in os.walk(folder):
        within = path[len(folder) + 1 :]
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
        return np.array(sorted(found))
    has = f"files that end in {', '.join(map(repr, sorted(others)[:5]))}" if others else "no files"
    raise UserError(f"{os.fsdecode(folder)} is a class without images: it has {has}; fill or delete it")
