"""Folders of images, one a class."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tensorflow as tf

from dist_partial.data.adapt import dataset
from dist_partial.data.corpus import Share
from dist_partial.data.decoding import Augment, decoded
from dist_partial.data.parallel import read_parts, unreadable
from dist_partial.data.source import Dataset
from dist_partial.errors import UserError
from dist_partial.validation import check_arguments, nearest

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
        return read_parts(self._read, indices), classes.astype(np.int32)

    def _read(self, indices: np.ndarray) -> list[bytes]:
        found = []
        for index in indices.tolist():
            try:
                with open(self._path(index), "rb", buffering=0) as file:
                    found.append(file.readall())
            except OSError as error:
                raise unreadable(self.place(index), error) from None
            if not found[-1].startswith(_STARTS):
                raise UserError(f"{self.place(index)} is no JPEG, PNG, GIF or BMP image: replace or delete it")
        return found

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


def _refuse(error: OSError) -> None:
    """Raises what `os.walk` would pass over."""
    raise UserError(f"cannot read the folder {os.fsdecode(error.filename)}: {error.strerror}")


def _images(folder: bytes) -> np.ndarray:
    """The paths of the images of a class within its folder, sorted: bytes [n]."""
    others, found = set(), []
    for path, _, names in os.walk(folder, onerror=_refuse):
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


class _Size:
    """Annotates the size of an image."""

    def refusal(self, value: Any) -> str:
        """What to write instead of a value; '' where it is a size."""
        whole = isinstance(value, (tuple, list)) and all(type(each) is int and each > 0 for each in value)
        return "" if whole and len(value) == 2 else "write (height, width) in pixels, such as (224, 224)"


def image_folder(
    folder: str | os.PathLike[str],
    size: Annotated[tuple[int, int], _Size()],
    evaluation: str | os.PathLike[str] | None = None,
    held_out: Share = 0.1,
    augment: Augment = None,
    name: str | None = None,
) -> Dataset:
    """Reads images from a folder whose subfolders are the classes.

    Args:
        folder: of the classes, see `ImageFolderSource`.
        size: height and width to which images are resized, by bilinear interpolation and without keeping their shape.
        evaluation: a folder of images held out, with the same classes; None: a part of `folder`.
        held_out: that part of them, in (0, 1), drawn from all over.
        augment: changes the images that are trained on: a function of (x, y, seed), or of (x, y) if it draws no random
            numbers, in TensorFlow; see `Dataset.map`.
        name: for people; None: that of the folder.

    Returns:
        x float32 [height, width, 3] in [0, 255], as of `keras.utils.image_dataset_from_directory`, and as the models of
        `keras.applications` take them, whose `preprocess_input` or first layer scales them; y int32 (), the class id:
        its name is `classes[y]` of the data set.

    Raises:
        UserError: as of `ImageFolderSource`; the classes of both folders differ; `augment` does not fit the images.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for each in ("dog", "cat"):
        ...         Path(folder, each).mkdir()
        ...         _ = tf.keras.utils.save_img(f"{folder}/{each}/1.png", np.zeros([9, 16, 3]))
        ...     data = image_folder(folder, size=(4, 4), held_out=0.5)
        ...     data.classes, len(data.train), data.train.fetch(np.array([0]))[0].shape
        (('cat', 'dog'), 1, (1, 4, 4, 3))
    """
    check_arguments(image_folder, locals())
    train = ImageFolderSource(folder)
    other = None if evaluation is None else ImageFolderSource(evaluation)
    if other and (differ := {*train.classes} ^ {*other.classes}):
        odd = min(differ)
        has, lacks = (train, other) if odd in train.classes else (other, train)
        raise UserError(
            f"{os.fsdecode(has.folder)} has a class {odd!r}, and {os.fsdecode(lacks.folder)} has none"
            f"{nearest(odd, lacks.classes)}: both need the same subfolders"
        )
    data = dataset(train, other, held_out, name or Path(os.path.abspath(os.fsdecode(train.folder))).name)
    data = dataclasses.replace(data, classes=train.classes)

    def decode(image: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        pixels = tf.io.decode_image(image, channels=3, expand_animations=False)
        return tf.image.resize(pixels, size), y

    return decoded(data, decode, augment)
