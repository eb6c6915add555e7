"""Any tfds data set that is prepared on this machine: images with labels, or text."""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tensorflow as tf

from dist_partial.data.codecs import ByteCodec
from dist_partial.data.quiet import quiet_tfds
from dist_partial.data.reading import fetch
from dist_partial.data.source import Dataset, fingerprint
from dist_partial.errors import Raised, UserError, raised
from dist_partial.validation import AtLeast, check_arguments, nearest

MEMORY_LIMIT = 2**30
"""Bytes of examples that a format without random access may take in memory."""

# tfds takes more: from a namespace it would load code that it downloads.
_NAME = r"\w+(/[\w+.-]+)?(:[\d*]+(\.[\d*]+)*)?"

Records = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class _Images:
    """Records to x float32 [b, height, width, channels] in [0, 1] and y int32 [b]."""

    image: str
    label: str
    shape: tuple[int, ...]
    scale: float

    @property
    def spec(self) -> tuple[tf.TensorSpec, ...]:
        return tf.TensorSpec(self.shape, tf.float32), tf.TensorSpec([], tf.int32)

    def batch(self, records: Records) -> tuple[np.ndarray, ...]:
        images = np.stack([record[self.image] for record in records])
        labels = np.array([record[self.label] for record in records], np.int32)
        return images.astype(np.float32) / np.float32(self.scale), labels


@dataclass(frozen=True)
class _Texts:
    """Records to bytes x, next bytes y: int32 [b, window]; weight: float32 [b, window], 0 on padding."""

    text: str
    window: int

    @property
    def spec(self) -> tuple[tf.TensorSpec, ...]:
        return tuple(tf.TensorSpec([self.window], dtype) for dtype in (tf.int32, tf.int32, tf.float32))

    def batch(self, records: Records) -> tuple[np.ndarray, ...]:
        rows = np.zeros([len(records), self.window + 1], np.int32)
        weight = np.zeros([len(records), self.window], np.float32)
        for i, record in enumerate(records):
            text = np.frombuffer(record[self.text], np.uint8)[: self.window + 1]
            rows[i, : len(text)] = text
            weight[i, : max(len(text) - 1, 0)] = 1
        return rows[:, :-1], rows[:, 1:], weight


@dataclass(frozen=True, eq=False)
class _Records:
    """Records of a split as a source."""

    form: _Images | _Texts
    read: Callable[[list[int]], Records]
    count: int
    name: str

    @property
    def spec(self) -> tuple[tf.TensorSpec, ...]:
        return self.form.spec

    def __len__(self) -> int:
        return self.count

    def fetch(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        return self.form.batch(self.read(indices.tolist()))

    def place(self, index: int) -> str:
        """Where an example is."""
        return f"example {index:,} of {self.name}"


def tfds_dataset(
    name: str,
    split_train: str = "train",
    split_evaluation: str = "test",
    data_dir: str | os.PathLike[str] | None = None,
    window: Annotated[int, AtLeast(1)] = 128,
) -> Dataset:
    """Loads a prepared tfds data set; it downloads nothing.

    Args:
        name: as tfds writes it: `mnist`, `glue/cola`, `my_text:1.2.0`.
        split_train: a split, or a part of one such as `train[:90%]`.
        split_evaluation: likewise.
        data_dir: the tfds folder; None: `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
        window: bytes of an example of text; longer texts are cut, shorter ones padded. Unused for images.

    Returns:
        For an image and a label: x float32 [height, width, channels] in [0, 1], y int32 (). For text: x int32
        [window], bytes; y int32 [window], the bytes that follow; weight float32 [window], 0 on padding. The
        fingerprint is of name, version, number of examples and 64 examples of each split.

    Raises:
        UserError: not prepared, no such split, features other than these, or a split that is larger than
            `MEMORY_LIMIT` in a format without random access.

    Examples:
        >>> import tempfile
        >>> import tensorflow_datasets as tfds
        >>> texts = {split: tf.data.Dataset.from_tensors({"text": "to be"}) for split in ("train", "test")}
        >>> features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        >>> with tempfile.TemporaryDirectory() as folder, quiet_tfds():
        ...     _ = tfds.dataset_builders.store_as_tfds_dataset("mine", "1.0.0", features, texts, data_dir=folder)
        ...     data = tfds_dataset("mine", data_dir=folder, window=6)
        >>> [array.tolist() for array in data.train.fetch(np.array([0]))]
        [[[116, 111, 32, 98, 101, 0]], [[111, 32, 98, 101, 0, 0]], [[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]]
    """
    check_arguments(tfds_dataset, locals())
    with quiet_tfds(), _own_classes_only():
        builder = _builder(name, data_dir)
        form = _form(builder.info, window)
        train = _source(builder, "split_train", split_train, form)
        evaluation = _source(builder, "split_evaluation", split_evaluation, form)
        content = fingerprint(builder.info.full_name, *_sketch(train), *_sketch(evaluation))
    text = isinstance(form, _Texts)
    return Dataset(
        name=builder.info.full_name,
        train=train,
        evaluation=evaluation,
        fingerprint=content,
        codec=ByteCodec() if text else None,
        unit="byte" if text else None,
    )


def _builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """The tfds builder of a data set that is prepared."""
    import tensorflow_datasets as tfds

    folder = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    if not re.fullmatch(_NAME, name):
        raise UserError(
            f"tfds_dataset.name={name!r}: write it as in 'mnist', 'glue/cola' or 'my_text:1.2.0', without a namespace "
            "or arguments"
        )
    try:
        builder = tfds.builder(name, data_dir=folder)
    except (ValueError, AssertionError) as error:  # an unknown data set, config or version
        here = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
        near = nearest(name, sorted({*here, *tfds.list_builders(with_community_datasets=False)}))
        if isinstance(error, tfds.core.DatasetNotFoundError):
            problem = f"is neither prepared in {folder} nor known to tfds"
        else:
            problem = " ".join(str(error).split())
        raise UserError(f"tfds_dataset.name={name!r}: {problem}{near}") from error
    if not builder.is_prepared():
        raise UserError(f"tfds data set {name!r} is not prepared in {folder}: run {_command(name, folder)}")
    return builder


@contextlib.contextmanager
def _own_classes_only() -> Iterator[None]:
    """Has tfds (4.9.10) import no code but its own, whatever class the files of a data set name, and wherever."""
    import tensorflow_datasets as tfds

    connector: Any = tfds.features.FeatureConnector
    find, method = connector.cls_from_name, vars(connector)["cls_from_name"]  # it imports the class's module

    def found(name: str) -> Any:
        if not name.startswith("tensorflow_datasets."):
            raise UserError(f"the data set names the class {name!r}, whose code would run: only tfds's own are read")
        return find(name)

    connector.cls_from_name = staticmethod(found)
    try:
        yield
    finally:
        connector.cls_from_name = method


def _command(name: str, folder: Path) -> str:
    """The shell command that prepares a data set (the `tfds` tool itself wants Apache Beam)."""
    builder = f"tfds.builder({name!r}, data_dir={str(folder)!r})"
    call = f"{builder}.download_and_prepare(file_format='array_record')"
    return f'`python -c "import tensorflow_datasets as tfds; {call}"`'


def _form(info: Any, window: int) -> _Images | _Texts:
    """How the records of a data set become examples."""
    from tensorflow_datasets import features as kinds

    def key(kind: type) -> str | None:
        """The feature of a kind: the supervised one, or else the only one."""
        found = [name for name, feature in info.features.items() if isinstance(feature, kind)]
        supervised = [name for name in found if name in (info.supervised_keys or ())]
        return supervised[0] if supervised else found[0] if len(found) == 1 else None

    image, label, text = key(kinds.Image), key(kinds.ClassLabel), key(kinds.Text)
    if image and label:
        feature = info.features[image]
        if None in feature.shape:
            raise UserError(
                f"the images of {info.full_name} are {feature.shape}, of many sizes: prepare them in one size"
            )
        dtype = np.dtype(feature.np_dtype)
        return _Images(image, label, feature.shape, np.iinfo(dtype).max if dtype.kind in "iu" else 1)
    if text:
        return _Texts(text, window)
    raise UserError(
        f"{info.full_name} has the features {', '.join(info.features)}, and not one image with one class "
        "label, or one text: bind run.data to a function of yours that returns a dist_partial.data.Dataset"
    )


def _source(builder: Any, parameter: str, split: str, form: _Images | _Texts) -> _Records:
    """A split by random access where the format has it, or from memory where it is small."""
    import tensorflow_datasets as tfds

    info = builder.info
    name = f"{info.full_name}, split {split!r}"
    try:
        part = info.splits[split]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"tfds_dataset.{parameter}={split!r} is no split of {info.full_name}: "
            f"take one of {', '.join(info.splits)}, or a part such as 'train[:90%]'"
        ) from error
    if info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        records = builder.as_data_source(split)
        return _Records(form, records.__getitems__, len(records), name)

    size = part.num_examples * math.prod(form.shape) if isinstance(form, _Images) else part.num_bytes
    if size > MEMORY_LIMIT:
        raise UserError(
            f"{info.full_name} is prepared as {info.file_format.value}, without random access, and {split!r} "
            f"takes {size / 2**30:.1f} GiB of memory, over the limit of {MEMORY_LIMIT / 2**30:.0f}: bind "
            f"tfds_dataset.data_dir to another FOLDER after {_command(info.full_name, Path('FOLDER'))}"
        )
    # Shards one after the other, the order that random access has.
    read_config = tfds.ReadConfig(interleave_cycle_length=1)
    rows: list[Any] = []
    try:
        for row in tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False, read_config=read_config)):
            rows.append(row)
    except Exception as error:
        raise Raised(f"{raised('run.data', error)}; it is example {len(rows):,} of {name}") from error
    return _Records(form, lambda indices: [rows[i] for i in indices], len(rows), name)


def _sketch(source: _Records) -> tuple[int | np.ndarray, ...]:
    """The number of examples, and 64 from all over the source: tells contents apart without reading all."""
    if not len(source):
        return (0,)
    return len(source), *fetch(source, np.linspace(0, len(source) - 1, 64).astype(np.int64))
