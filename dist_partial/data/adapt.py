"""The door for data: whatever people have becomes a `Dataset`, once."""

import os
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import keras
import tensorflow as tf

from dist_partial.data.arrays import PARTS, alike, as_arrays, parts_misfit, spec_of
from dist_partial.data.batches import looks
from dist_partial.data.codecs import Codec
from dist_partial.data.held_out import hold_out
from dist_partial.data.map_source import MapSource, is_grain
from dist_partial.data.py_dataset import PyDatasetSource
from dist_partial.data.reading import fetch, trait
from dist_partial.data.source import ArraySource, Dataset, Source, check_source, fingerprint
from dist_partial.data.stream import Stream
from dist_partial.errors import UserError, calling
from dist_partial.session import seeded
from dist_partial.terminal import say
from dist_partial.validation import Above, Below, check_arguments, shown

TRAIN, EVALUATION = "run.data", "the evaluation of run.data"
ALL_OF = 2**30  # bytes of arrays whose fingerprint is of all examples; more would delay the start
TAKEN = (
    "give arrays (x, y) or (x, y, weight), an object with __len__ and __getitem__ as PyTorch and Hugging Face have, a "
    "keras.utils.PyDataset, a grain.MapDataset, a tf.data.Dataset, a source of dist_partial, or a function that makes "
    "one of these"
)


def dataset(
    train: Any,
    evaluation: Any = None,
    held_out: Annotated[float, Above(0), Below(1)] = 0.1,
    name: str = "data",
    codec: Codec | None = None,
) -> Dataset:
    """Makes a data set of whatever holds the examples.

    Args:
        train: arrays (x,), (x, y) or (x, y, weight), each an array, or a dict, tuple or list of them, or x alone; an
            object with `__len__` and `__getitem__` (see `MapSource`), a `grain.MapDataset` among them; a
            `keras.utils.PyDataset`; a `tf.data.Dataset`; a source; or a function without arguments that makes one of
            these. A `Dataset` is returned as it is.
        evaluation: the examples held out, likewise; None: a part of `train`.
        held_out: the share of `train` that is held out if there is no `evaluation`: examples from all over, drawn
            by a fixed permutation, the same ones in each run; of a PyDataset the last ones.
        name: for people.
        codec: text to ids and back; None where nothing can be sampled as text.

    Returns:
        Its fingerprint is of all examples of arrays of up to 1 GiB, and of the number of examples and 64 of them of
        anything else; of the number and the types alone where examples differ each time that they are read, as by
        random crops.

    Raises:
        UserError: it is none of these, or an example has no form that tensors have; the examples held out are unlike
            those of `train`; of grain and tf.data, there is no `evaluation`.

    Examples:
        >>> import numpy as np
        >>> data = dataset((np.zeros([100, 4], np.float32), np.zeros([100], np.int32)), held_out=0.2)
        >>> len(data.train), len(data.evaluation)
        (80, 20)
        >>> dataset([({"age": 31, "city": "Rome"}, 1)] * 50).train.spec[0]["city"].dtype
        tf.string
    """
    check_arguments(dataset, locals())
    train, evaluation = (_made(value, of) for value, of in ((train, TRAIN), (evaluation, EVALUATION)))
    if isinstance(train, Dataset):
        if evaluation is not None:
            raise UserError(f"{TRAIN} is a Dataset, which has examples held out: leave evaluation out")
        return train
    source = _filled(train, TRAIN)
    if evaluation is None:
        _check_divisible(source, train)
        content = fingerprint(name, held_out, *_content(source))
        return Dataset(name, *hold_out(source, held_out), content, codec)
    other = _filled(evaluation, EVALUATION)
    if not alike(source.spec[:2], other.spec[:2]):
        raise UserError(
            f"{EVALUATION}: {parts_misfit(other.spec[:2], source.spec[:2])} in {TRAIN}: both must have the same x and y"
        )
    return Dataset(name, source, other, fingerprint(name, *_content(source), *_content(other, EVALUATION)), codec)


def makes_data(value: Any) -> bool:
    """Tells a function or a class that makes data from what holds them, of which some can be called, too.

    Examples:
        >>> makes_data(lambda: [1]), makes_data([1])
        (True, False)
    """
    held = hasattr(value, "fetch") or hasattr(value, "__getitem__")
    return isinstance(value, type) or (callable(value) and not held)


def _made(value: Any, name: str) -> Any:
    """What a function or a class makes; anything else as it is."""
    if not makes_data(value):
        return value
    called = getattr(value, "__name__", "")
    with calling(f"{called} of {name}" if called else name), seeded(0):
        made = value()
    return Stream(value, made=made) if isinstance(made, tf.data.Dataset) else made  # which begins again by the function


def _check_divisible(source: Source, given: Any) -> None:
    """Refuses a source of which the same part cannot be held out in each epoch."""
    if trait(source, "own_order", False) and not isinstance(source, PyDatasetSource):
        what = "tf.data.Dataset" if isinstance(source, Stream) else type(given).__name__
        raise UserError(
            f"{TRAIN} is a {what}, whose order may change from epoch to epoch, so that no part of it can be held out "
            "here: divide the examples before they are shuffled, and give evaluation=, in a gin file a function that "
            "returns dist_partial.dataset(train, evaluation)"
        )


def _filled(value: Any, name: str) -> Source:
    """How examples are read from a value, of which there are some."""
    source = source_of(value, name)
    if isinstance(source, ArraySource) and not len(source):  # to count others may be to read them
        raise UserError(f"{name} has no examples: give some")
    return source


def _content(source: Source, name: str = TRAIN) -> tuple[Any, ...]:
    """What tells the content of a source apart from another."""
    if isinstance(source, ArraySource) and sum(array.nbytes for array in tf.nest.flatten(source.arrays)) <= ALL_OF:
        return source.arrays
    read = getattr(source, "read_again", lambda: fetch(source, looks(source)))
    first, again = fetch(source, looks(source)) if isinstance(source, Stream) else read(), read()
    same = fingerprint(first) == fingerprint(again)
    if isinstance(source, Stream) and not same:
        say(f"{name}: the tf.data.Dataset gives other examples each time that it is read: {source.repeatable}")
    # To count the examples of a stream may be to read it.
    return "?" if trait(source, "streamed", False) else len(source), str(source.spec), *(first if same else ())


def source_of(value: Any, name: str = "the data") -> Source:
    """Finds how examples are read from a value: see `dataset`.

    Args:
        value: whatever holds the examples.
        name: of it in messages.

    Raises:
        UserError: it cannot be read by position, or an example has no form that tensors have.

    Examples:
        >>> import numpy as np
        >>> source_of({"a": np.arange(3), "b": np.arange(3.0)}).fetch(np.array([2]))
        ({'a': array([2]), 'b': array([2.])},)
        >>> source_of(each for each in "abc")
        Traceback (most recent call last):
        dist_partial.errors.UserError: the data is a generator, which is read from its beginning only: give ...
    """
    if hasattr(value, "spec") and hasattr(value, "fetch"):
        check_source(name, value)
        return value
    if isinstance(value, keras.utils.PyDataset):
        return _of_batches(value)
    if isinstance(value, tf.data.Dataset):
        return Stream(value)
    if is_grain(value, "MapDataset"):
        return MapSource(value)
    what = f"{name} is {_described(value)}"
    if problem := _refusal(value):
        raise UserError(f"{what}{problem}")
    if isinstance(value, (tuple, Mapping)) or _is_array(value):
        return _in_memory(value, name)
    if _has_items(value):
        return MapSource(value)
    raise UserError(f"{what}: {TAKEN}")


def _of_batches(value: keras.utils.PyDataset) -> PyDatasetSource:
    for name in ("on_epoch_begin", "on_epoch_end"):
        if getattr(type(value), name) is not getattr(keras.utils.PyDataset, name):
            what = f"{type(value).__name__}.{name} is not called"
            say(f"run.data: {what}: each epoch has the same batches, in the same order")
    return PyDatasetSource(value)


def _refusal(value: Any) -> str:
    """Says what to give instead of a value that is near to one that is taken; '' if it is not."""
    if isinstance(value, (str, os.PathLike)):
        return ": for files, take csv_dataset, parquet_dataset, tfrecord_dataset or image_folder"
    if is_grain(value, "IterDataset"):
        return ", which is read in order only: give the MapDataset that it is made of, before to_iter_dataset()"
    if hasattr(value, "iloc") and hasattr(value, "columns"):
        return ": give x and y of it, such as (dict(frame[['age', 'city']]), frame['label'])"
    if isinstance(value, list) and 0 < len(value) <= 3 and _is_array(value[0]):
        return f" of {len(value)} arrays: give a tuple (x, y), or np.stack of them if each is an example"
    if hasattr(value, "dataset") and hasattr(value, "batch_size"):
        return ", which makes batches: give its .dataset, for a run makes batches of run.global_batch itself"
    if isinstance(value, Iterable) and not _has_items(value) and not _is_array(value):
        return (
            ", which is read from its beginning only: give an object with __len__ and __getitem__, or "
            "tf.data.Dataset.from_generator(...)"
        )
    parts = value if isinstance(value, tuple) else value.values() if isinstance(value, Mapping) else ()
    for part in parts:
        held = isinstance(part, (tuple, list, Mapping, str, bytes)) or _is_array(part) or hasattr(part, "iloc")
        if isinstance(part, tf.data.Dataset) or (_has_items(part) and not held):
            return f" that holds a {type(part).__name__}: give the parts, as in dataset(train, evaluation)"
    return ""


def _described(value: Any) -> str:
    return shown(os.fspath(value)) if isinstance(value, (str, os.PathLike)) else f"a {type(value).__name__}"


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _has_items(value: Any) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "__getitem__")


def _in_memory(value: Any, name: str) -> ArraySource:
    """Arrays, or what can be made arrays."""
    parts = value if isinstance(value, tuple) else (value,)
    if not 1 <= len(parts) <= 3:
        raise UserError(f"{name} is a tuple of {len(parts)}: write (x,), (x, y) or (x, y, weight)")
    arrays = [
        None if part is None else as_arrays(part, f"{name}: {each}") for part, each in zip(parts, PARTS, strict=False)
    ]
    source = ArraySource(*arrays)
    spec_of(source.arrays, name)
    return source
