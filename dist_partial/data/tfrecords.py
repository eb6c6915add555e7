"""TFRecord files by random access."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import google_crc32c
import numpy as np
import tensorflow as tf

from dist_partial.data.adapt import dataset
from dist_partial.data.corpus import Share
from dist_partial.data.decoding import Augment, decoded
from dist_partial.data.file_lists import Files, find_files
from dist_partial.data.parallel import read_parts, unreadable
from dist_partial.data.record_index import FOOTER, HEADER, RecordIndex, masked, open_index
from dist_partial.data.source import Dataset
from dist_partial.errors import UserError, first_line, own_line
from dist_partial.validation import Has, check_arguments, nearest

_PARSE = "give a function of a record, such as parse, in a gin file @my_module.parse without ()"
PATTERN = "*.tfrec*"
"""The files of a folder: `train.tfrecord`, `images.tfrecords-00003-of-00128`, `a.tfrec`."""


@dataclass(frozen=True, eq=False)
class TFRecordSource:
    """Reads the records of TFRecord files by number, each a scalar string; checks each against its checksum.

    Where the records are is found once, and kept in a file, see `record_index.open_index`; no record is held in memory.

    Args:
        files: a path, a pattern such as `data/train-*`, a folder (its files `*.tfrec*`), or a list of these. Records
            are in the order of the paths.
        cache_dir: where the index is kept; None: beside the files or, if that cannot be written, in the user's cache.

    Raises:
        UserError: there is no such file; one is no TFRecord file, is compressed, damaged or cut; there is no record.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with tf.io.TFRecordWriter(f"{folder}/mine.tfrecord") as writer:
        ...         for text in ("to", "be"):
        ...             writer.write(text)
        ...     source = TFRecordSource(folder)
        ...     len(source), source.fetch(np.array([1, 0]))[0].tolist()
        (2, [b'be', b'to'])
    """

    files: Files
    cache_dir: str | os.PathLike[str] | None = None

    spec = (tf.TensorSpec([], tf.string),)

    def __post_init__(self) -> None:
        if not len(self):
            raise UserError(f"{self._index.paths[0]} holds no record: write some, or leave it out")

    @cached_property
    def _index(self) -> RecordIndex:
        return open_index(find_files("TFRecordSource.files", self.files, PATTERN), self.cache_dir)

    def __reduce__(self) -> Any:  # another process opens the index itself
        return type(self), (self._index.paths, self.cache_dir)

    def __len__(self) -> int:
        return int(self._index.firsts[-1])

    def fetch(self, indices: np.ndarray) -> tuple[np.ndarray]:
        """Records `indices`, int64 [b], of bytes.

        Raises:
            UserError: a file is gone or was changed since the index was opened; a record fails its checksum.
            Fault: the file system fails.
        """
        return (read_parts(self._read, indices),)

    def _read(self, indices: np.ndarray) -> list[bytes]:
        """Records `indices`, ascending; each file is opened once."""
        files, offsets, lengths = self._index.locate(indices)
        found = []
        for file in np.unique(files):
            here = files == file
            try:
                found += self._read_file(file, *(part[here].tolist() for part in (indices, offsets, lengths)))
            except OSError as error:
                raise unreadable(self.place(int(indices[here][0])), error) from None
        return found

    def _read_file(self, file: int, indices: list[int], offsets: list[int], lengths: list[int]) -> list[bytes]:
        """Records of a file, which must be as it was when the index was made."""
        path, found = self._index.paths[file], []
        with open(path, "rb", buffering=0) as opened:
            now = os.fstat(opened.fileno())
            if (now.st_size, now.st_mtime_ns) != tuple(self._index.states[file]):
                raise UserError(f"{path} was changed since the run began: start again, or put back what it was")
            for index, offset, length in zip(indices, offsets, lengths, strict=True):
                content = os.pread(opened.fileno(), length + FOOTER, offset + HEADER)
                data, check = content[:-FOOTER], int.from_bytes(content[-FOOTER:], "little")
                if masked(google_crc32c.value(data)) != check:
                    raise UserError(
                        f"{self.place(index)} is damaged: its data fails its checksum (CRC32C); copy the file again, "
                        "or write it again"
                    )
                found.append(data)
        return found

    def place(self, index: int) -> str:
        """Where an example is: its file, which record of it, and at which byte."""
        return self._index.place(index)

    def explain(self, parts: tuple[np.ndarray], error: BaseException) -> str:
        """Says which features a record has, where a function asked for others; '' if that was not it."""
        words = r"Feature: (.+) \(data type: \w+\) is required|Key: (.+?)(?:, Index: \d+)?\.  (.+)"
        found = re.search(words, first_line(error))
        if not found:
            return ""
        features = tf.train.Example.FromString(parts[0][0]).features.feature
        kinds = {key: (features[key].WhichOneof("kind") or "none").removesuffix("_list") for key in sorted(features)}
        has = ", ".join(f"{key!r} ({kind})" for key, kind in kinds.items()) or "none"
        if missing := found[1]:
            return f"the record has no feature {missing!r}{own_line(error)}{nearest(missing, kinds)}; it has {has}"
        why = found[3].rstrip(".")
        return f"the feature {found[2]!r} of the record is not as asked for ({why}){own_line(error)}; it has {has}"


def tfrecord_dataset(
    train: Files,
    parse: Annotated[Callable[..., Any], Has("__call__", _PARSE)],
    evaluation: Files | None = None,
    held_out: Share = 0.1,
    augment: Augment = None,
    name: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Reads examples from TFRecord files; nothing but what is being trained on is in memory.

    Args:
        train: a path, a pattern such as `data/train-*`, a folder (its files `*.tfrec*`), or a list of these.
        parse: makes x, (x, y) or (x, y, weight) of a record, a scalar string, in TensorFlow: with
            `tf.io.parse_single_example`, `tf.io.decode_jpeg` and the like, to tensors of one shape for all.
        evaluation: files held out, likewise; None: a part of the records of `train`.
        held_out: that part of them, in (0, 1), drawn from all over.
        augment: changes what `parse` makes of the records that are trained on: a function of (x, y, seed), or of
            (x, y) if it draws no random numbers; see `Dataset.map`.
        name: for people; None: that of the folder of the files.
        cache_dir: where the index of the records is kept, see `TFRecordSource`.

    Raises:
        UserError: as of `TFRecordSource`; `parse` or `augment` does not fit the records.

    Examples:
        >>> import tempfile
        >>> def parse(serialized):
        ...     digits = tf.strings.to_number(tf.strings.split(tf.ensure_shape(serialized, [])))
        ...     return tf.ensure_shape(digits, [2]), digits[0]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with tf.io.TFRecordWriter(f"{folder}/mine.tfrecord") as writer:
        ...         for text in ("1 2", "3 4", "5 6"):
        ...             writer.write(text)
        ...     data = tfrecord_dataset(folder, parse, held_out=0.3)
        ...     len(data.train), data.evaluation.fetch(np.array([0]))[0].shape
        (2, (1, 2))
    """
    check_arguments(tfrecord_dataset, locals())
    paths = find_files("tfrecord_dataset.train", train, PATTERN)
    others = None if evaluation is None else find_files("tfrecord_dataset.evaluation", evaluation, PATTERN)
    source = TFRecordSource(paths, cache_dir)
    other = None if others is None else TFRecordSource(others, cache_dir)
    return decoded(dataset(source, other, held_out, name or paths[0].absolute().parent.name), parse, augment)
