"""Reads the examples of a source, and compares them with what its spec says."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial.errors import Raised, UserError, calling

if TYPE_CHECKING:
    from dist_partial.data.source import Source


def trait(source: Any, name: str, default: Any = None) -> Any:
    """Finds an optional attribute of a source, or of the one that it wraps, its `source`, and so on.

    Examples:
        >>> class Text:
        ...     own_order = True
        >>> class Weighted:
        ...     source = Text()
        >>> trait(Weighted(), "own_order", False), trait(Weighted(), "thread_safe", False)
        (True, False)
    """
    while source is not None:
        if hasattr(source, name):
            return getattr(source, name)
        source = getattr(source, "source", None)
    return default


class Wrapped:
    """Reads another source, `source`: the base of those that say in `fetch_with` what they make of it."""

    source: "Source"

    @functools.cached_property
    def spec(self) -> tuple[Any, ...]:
        """That of the source."""
        return self.source.spec

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, indices: np.ndarray) -> tuple[Any, ...]:
        """Examples `indices`, int64 [b], with the random numbers of the first epoch of a run of seed 0."""
        return self.fetch_with(indices, None)

    def fetch_with(self, indices: np.ndarray, draws: np.ndarray | None) -> tuple[Any, ...]:
        """The same, with the random numbers that follow from `draws.draws`, uint64 [b]."""
        return checked(self.source, indices, draws)


def innermost(source: Any) -> list[Any]:
    """Finds what a source reads from in the end: several things where it joins others, its `sources`.

    Examples:
        >>> from dist_partial.data import ArraySource, Joined, Mapped
        >>> base = ArraySource(np.arange(3))
        >>> innermost(Joined([base, Mapped(base, lambda x: x + 1)])) == [base, base]
        True
    """
    while (inner := getattr(source, "source", None)) is not None:
        source = inner
    parts = getattr(source, "sources", None)
    if isinstance(parts, (list, tuple)) and all(hasattr(part, "fetch") for part in parts):
        return [each for part in parts for each in innermost(part)]
    return [source]


def fetched(source: "Source", indices: tf.Tensor) -> tuple[Any, ...]:
    """Wraps `fetch` as a TensorFlow op, with static shapes.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> source = ArraySource(np.zeros([3, 1], np.float32), np.array([5, 6, 7]))
        >>> fetched(source, tf.constant([2, 0], tf.int64))[1].numpy().tolist()
        [7, 5]
    """
    return as_op(lambda indices: fetch(source, indices), source.spec, indices)


@tf.autograph.experimental.do_not_convert  # or each call of `read` would go through it
def as_op(read: Callable[..., Any], spec: Any, indices: tf.Tensor, *others: tf.Tensor) -> Any:
    """Wraps a function of indices, int64 [b], and other arrays as a TensorFlow op that gives a batch of a spec.

    Examples:
        >>> as_op(lambda i: i / 2, tf.TensorSpec([], tf.float64), tf.constant([3, 4], tf.int64)).numpy().tolist()
        [1.5, 2.0]
    """
    flat = tf.nest.flatten(spec)
    arrays = tf.numpy_function(
        lambda *values: tf.nest.flatten(read(*values)),
        [indices, *others],
        [one.dtype for one in flat],
        stateful=False,
        name="fetch",
    )
    arrays = tf.nest.flatten(arrays)  # one alone comes without its list in eager mode
    shaped = [tf.ensure_shape(a, indices.shape + one.shape) for a, one in zip(arrays, flat, strict=True)]
    return tf.nest.pack_sequence_as(without_lists(spec), shaped)


def fetch(source: "Source", indices: np.ndarray, draws: np.ndarray | None = None) -> tuple[Any, ...]:
    """Calls `source.fetch` and checks the result against the source's spec.

    Args:
        source: the examples.
        indices: int64 [b].
        draws: of `draws.draws`, uint64 [b], for sources that draw random numbers; None draws as in the first epoch of
            a run of seed 0.

    Raises:
        UserError: it gives something else.
        Raised: it raises an exception. Either says for which example, where the source has a `place(index)`.

    Examples:
        >>> class Halves:
        ...     spec = tf.TensorSpec([], tf.float32), tf.TensorSpec([], tf.float32)
        ...     def fetch(self, indices):
        ...         return indices / 2, np.float32(indices)
        >>> fetch(Halves(), np.array([1]))
        Traceback (most recent call last):
        dist_partial.errors.UserError: Halves.fetch gives [float64 (1,), float32 (1,)] for the examples 1, and its ...
    """
    try:
        return checked(source, indices, draws)
    except (UserError, Raised) as error:
        found = error
    if (place := trait(source, "place")) is not None:
        for i in range(len(indices)):  # one by one: which is it?
            try:
                checked(source, indices[i : i + 1], None if draws is None else draws[i : i + 1])
            except (UserError, Raised) as error:
                where = place(int(indices[i]))
                # A source of files has named it itself.
                raise type(error)(str(error) if where in str(error) else f"{error}; it is {where}") from error.__cause__
    raise found


def checked(source: "Source", indices: np.ndarray, draws: np.ndarray | None = None) -> tuple[Any, ...]:
    """Does as `fetch`, and looks for no example to blame.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> checked(ArraySource(np.array([5, 6, 7])), np.array([2, 0]))[0].tolist()
        [7, 5]
    """
    with calling("run.data"):
        if draws is None or not hasattr(source, "fetch_with"):
            arrays = source.fetch(indices)
        else:
            arrays = source.fetch_with(indices, draws)
        spec = source.spec
    if fits(arrays, spec, len(indices)):
        return without_lists(arrays)
    arrays = tuple(arrays) if isinstance(arrays, list) else arrays
    want = tf.nest.map_structure(lambda one: f"{one.dtype.name} {(len(indices), *one.shape)}", spec)
    have = _described(arrays)
    if want == have:
        return without_lists(arrays)
    if hasattr(source, "unlike"):
        raise UserError(source.unlike(arrays))
    some = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    raise UserError(
        f"{type(source).__name__}.fetch gives {_listed(have)} for the examples {some}, and its spec says "
        f"{_listed(want)}: both must be the same (x, y) or (x, y, weight)"
    )


def fits(found: Any, spec: Any, count: int) -> bool:
    """Tells whether NumPy arrays are `count` examples of a spec; by hand, for it is called for each batch.

    Examples:
        >>> fits((np.zeros([3, 2]),), (tf.TensorSpec([2], tf.float64),), 3)
        True
    """
    if isinstance(spec, tf.TensorSpec):
        if not isinstance(found, np.ndarray) or found.shape != (count, *spec.shape.as_list()):
            return False
        return found.dtype == spec.dtype.as_numpy_dtype or (spec.dtype == tf.string and found.dtype.kind in "OSU")
    if isinstance(spec, dict):
        same = isinstance(found, dict) and found.keys() == spec.keys()
        return same and all(fits(found[name], spec[name], count) for name in spec)
    same = isinstance(found, (tuple, list)) and len(found) == len(spec)
    return same and all(fits(one, its, count) for one, its in zip(found, spec, strict=True))


def without_lists(nest: Any) -> Any:
    """Replaces the lists of a nest by tuples, for tf.data would make one tensor of a list.

    Examples:
        >>> without_lists(([1, 2], {"a": [3]}))
        ((1, 2), {'a': (3,)})
    """
    if isinstance(nest, tuple) and not any(isinstance(part, (dict, list, tuple)) for part in nest):
        return nest
    return keras.tree.lists_to_tuples(nest)


def _listed(parts: Any) -> str:
    if isinstance(parts, dict):
        return "{" + ", ".join(f"{name!r}: {_listed(part)}" for name, part in parts.items()) + "}"
    return f"[{', '.join(map(_listed, parts))}]" if isinstance(parts, (tuple, list)) else parts


def _described(found: Any) -> Any:
    """A nest of arrays as a nest of words; a list without arrays is no nest of them, and may be long."""
    if isinstance(found, dict):
        return {name: _described(each) for name, each in found.items()}
    if isinstance(found, (tuple, list)) and any(hasattr(each, "dtype") for each in tf.nest.flatten(found)):
        parts = [_described(each) for each in found]
        return parts if isinstance(found, list) else tuple(parts)
    try:
        dtype = tf.string if found.dtype.kind in "OSU" else tf.as_dtype(found.dtype)
        return f"{dtype.name} {tuple(found.shape)}"
    except (AttributeError, TypeError):  # no array, or none that TensorFlow knows
        return type(found).__name__
