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
from dist_partial.data.image_index import open_images
from dist_partial.data.parallel import read_parts, unreadable
from dist_partial.data.source import Dataset
from dist_partial.errors import UserError, first_line
from dist_partial.validation import check_arguments, nearest

_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM")


class ImageFolderSource:
    """Reads the files of a folder whose subfolders are the classes: encoded images, and class ids.

    The classes are in the order of their names, the files of a class in that of their paths. Where they are is found
    once, see `image_index.open_images`; no image is opened before it is read.

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
        self._index = open_images(self.folder)
        self.classes = self._index.classes

    def __len__(self) -> int:
        return len(self._index)

    def fetch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The files `indices`, int64 [b], as bytes, and their classes.

        Raises:
            UserError: a file is gone, or is no image.
            Fault: the file system fails.
        """
        return read_parts(self._read, indices), self._index.classes_of(indices).astype(np.int32)

    def _read(self, indices: np.ndarray) -> list[bytes]:
        found = []
        for index in indices.tolist():
            try:
                with open(self._index.path(index), "rb", buffering=0) as file:
                    found.append(file.readall())
            except OSError as error:
                raise unreadable(self.place(index), error) from None
            if not found[-1].startswith(_STARTS):
                raise UserError(f"{self.place(index)} is no JPEG, PNG, GIF or BMP image: replace or delete it")
        return found

    def place(self, index: int) -> str:
        """The path of the file of an example."""
        return os.fsdecode(self._index.path(index))

    def explain(self, parts: tuple[np.ndarray, np.ndarray], error: BaseException) -> str:
        """Says that an image of a batch is broken, on which a function failed; '' if none is."""
        del error  # the image itself shows it, however it was decoded
        for image in parts[0]:
            try:
                tf.io.decode_image(image)
            except tf.errors.InvalidArgumentError as broken:
                return f"the image cannot be decoded ({first_line(broken)}): replace or delete it"
        return ""


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
