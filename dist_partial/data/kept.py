"""A few examples of a data set in a file: for those who use a run whose data only the process that trained it has."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dist_partial.data.batches import looks
from dist_partial.data.codecs import ByteCodec, Codec, ShapeCodec
from dist_partial.data.reading import fetch
from dist_partial.data.source import ArraySource, Dataset
from dist_partial.errors import UserError
from dist_partial.files import existing, write_atomically
from dist_partial.validation import check_arguments

KEPT = "kept"  # the fingerprint of such a data set, with which no run trains
_MOST = 64 * 2**20  # bytes of examples in a file
_CODECS: dict[str, Callable[[], Codec]] = {"bytes": ByteCodec, "shapes": ShapeCodec}


def kept_examples(path: str, codec: Callable[[], Codec] | None = None) -> Dataset:
    """Reads the examples that `dist_partial.train` has kept beside a run, for `sample` and `export`.

    Args:
        path: of the file, examples.npz of the run folder.
        codec: makes that of the data set, where it is not one of this package's.

    Raises:
        UserError: there is no such file, or it is damaged.

    Examples:
        >>> import tempfile
        >>> part = ArraySource({"a": np.zeros([100, 2], np.float32)}, np.arange(100))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = keep_examples(Path(folder, "examples.npz"), Dataset("mine", part, part, "its digest"))
        ...     data = kept_examples(f"{folder}/examples.npz")
        >>> data.name, len(data.train), data.train.spec[0]["a"].shape.as_list(), data.train.fetch(np.array([3]))[1]
        ('examples of mine', 64, [2], array([4]))
    """
    check_arguments(kept_examples, locals())
    file = existing("kept_examples.path", path, "*.npz")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            content = json.loads(str(arrays["content"]))
            train, evaluation = (ArraySource(*_nest(content[name], arrays)) for name in ("train", "evaluation"))
        codec = _CODECS[content["codec"]] if content["codec"] else codec
        named = f"examples of {content['name']}"
        unit, classes = content["unit"], tuple(content.get("classes", ()))
        return Dataset(named, train, evaluation, KEPT, codec and codec(), unit, classes)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"kept_examples.path: {path} is damaged ({error}): train again to write it") from error


def keep_examples(path: Path, data: Dataset) -> functools.partial[Codec] | None:
    """Writes some examples of a data set to a file, for `kept_examples`: 64 of each part, fewer of large ones.

    Returns:
        What makes its codec, where the file does not say it.

    Examples:
        >>> import tempfile
        >>> part = ArraySource(np.zeros([100, 2], np.float32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = keep_examples(Path(folder, "examples.npz"), Dataset("mine", part, part, "its digest"))
        ...     len(kept_examples(f"{folder}/examples.npz").evaluation)
        64
    """
    codecs = [name for name, kind in _CODECS.items() if type(data.codec) is kind]
    content: dict[str, Any] = {"name": data.name, "unit": data.unit, "classes": data.classes}
    content["codec"] = codecs[0] if codecs else None
    arrays: list[Any] = []
    for name, source in (("train", data.train), ("evaluation", data.evaluation)):
        own: list[Any] = []
        content[name] = _places(fetch(source, looks(source)), own, len(arrays))
        size = sum(array.nbytes for array in own)
        few = max(1, len(own[0]) * _MOST // 2 // size) if size > _MOST // 2 else None
        arrays += [array[:few] for array in own]
    named = {str(number): array for number, array in enumerate(arrays)} | {"content": np.array(json.dumps(content))}
    write_atomically(path, lambda file: np.savez(file, **named))
    if codecs or data.codec is None:
        return None
    return functools.partial(type(data.codec), **getattr(data.codec, "__dict__", {}))


def _places(nest: Any, arrays: list[Any], first: int) -> Any:
    """The nest as JSON, with the number of an array in its place, counted from `first`."""
    if isinstance(nest, dict):
        return {key: _places(each, arrays, first) for key, each in nest.items()}
    if isinstance(nest, (list, tuple)):
        return [_places(each, arrays, first) for each in nest]
    array = np.asarray(nest)
    if array.dtype == object:  # objects would be pickled
        texts = [each.decode("utf-8", "replace") if isinstance(each, bytes) else str(each) for each in array.flat]
        array = np.array(texts).reshape(array.shape)
    arrays.append(array)
    return first + len(arrays) - 1


def _nest(places: Any, arrays: Any) -> Any:
    if isinstance(places, dict):
        return {key: _nest(each, arrays) for key, each in places.items()}
    return [_nest(each, arrays) for each in places] if isinstance(places, list) else arrays[str(places)]
