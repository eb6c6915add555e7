"""Objects with a length and items: lists, Hugging Face data sets, data sets in PyTorch's style, grain's MapDataset."""

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.data.arrays import PARTS, as_arrays, as_parts, parts_misfit, spec_of
from dist_partial.errors import UserError, calling
from dist_partial.validation import nearest

Columns = str | Sequence[str]


@dataclass(frozen=True, eq=False)
class MapSource:
    """Reads examples from an object with `__len__` and `__getitem__`, such as PyTorch and Hugging Face have.

    An item is a tuple (x, y), (x, y, weight) or (x,), or x alone; or a dict of columns, of which `x`, `y` and
    `weight` name some. Images of PIL, tensors of any library, texts, numbers and lists of them become arrays; Python's
    numbers become int64 and float32. Items are read by `__getitems__(indices)`, all of a batch at once, where there is
    one, else one after the other.

    A `grain.MapDataset` keeps the order it has, with all its shuffling from epoch to epoch.

    Args:
        items: the object.
        x: name of a column, or a list of names, which makes x a dict; None where items are tuples.
        y: likewise; None where the model needs no targets.
        weight: likewise.

    Raises:
        UserError: it is empty, has no such column, or an item has no form that tensors have.

    Examples:
        >>> rows = [{"text": "to be", "label": 1}, {"text": "or not", "label": 0}]
        >>> source = MapSource(rows, x="text", y="label")
        >>> [array.tolist() for array in source.fetch(np.array([1, 0]))]
        [['or not', 'to be'], [0, 1]]
        >>> MapSource([(np.zeros([28, 28]), 3), (np.ones([28, 28]), 5)]).spec[0].shape
        TensorShape([28, 28])
    """

    items: Any
    x: Columns | None = None
    y: Columns | None = None
    weight: Columns | None = None

    def __post_init__(self) -> None:
        if self.x is None and (self.y is not None or self.weight is not None):
            raise UserError("MapSource got y or weight and no x: name the column, or the columns, of x")
        if self.y is None and self.weight is not None:
            raise UserError("MapSource got a weight and no y: name the column of the targets that it weighs")
        if not len(self):
            raise UserError(f"{type(self.items).__name__} is empty: there is nothing to read")
        if len(self) == sys.maxsize:
            raise UserError(f"{type(self.items).__name__} repeats without end: leave repeat() out, for a run repeats")
        _ = self.spec  # or a wrong column would show later

    @functools.cached_property
    def own_order(self) -> bool:
        """Whether items come in an order of their own that goes on beyond the first epoch: that of grain."""
        return is_grain(self.items, "MapDataset")

    @property
    def thread_safe(self) -> bool:
        """Whether several threads may read: grain is made for that."""
        return self.own_order

    @functools.cached_property
    def spec(self) -> tuple[Any, ...]:
        """(x,), (x, y) or (x, y, weight) of one example: that of the first item."""
        return spec_of(self._parts(0, self._read(np.array([0]))[0]), self.place(0))

    def __len__(self) -> int:
        with calling(f"len({type(self.items).__name__})"):
            return len(self.items)

    def fetch(self, indices: np.ndarray) -> tuple[Any, ...]:
        """Items `indices`, int64 [b], as arrays; with grain beyond its length, too."""
        rows = []
        for index, item in zip(indices.tolist(), self._read(indices), strict=True):
            parts = self._parts(index, item)
            if wrong := parts_misfit(parts, self.spec):
                raise UserError(
                    f"{self.place(index)}: {wrong} in the first item: give all one shape and type, as by "
                    "the data's own map"
                )
            rows.append(tf.nest.flatten(parts))
        columns = [np.stack(column) for column in zip(*rows, strict=True)]
        return tf.nest.pack_sequence_as(self.spec, columns)

    def place(self, index: int) -> str:
        """What example `index` is called in messages."""
        return f"{type(self.items).__name__}[{index}]"

    def _read(self, indices: np.ndarray) -> Sequence[Any]:
        """The items as they are."""
        wanted = indices.tolist()
        if hasattr(self.items, "__getitems__"):
            with calling(", ".join(map(self.place, wanted[:8])) + (", ..." if len(wanted) > 8 else "")):
                return self.items.__getitems__(wanted)
        found = []
        for index in wanted:
            with calling(self.place(index)):
                found.append(self.items[index])
        return found

    def _parts(self, index: int, item: Any) -> tuple[Any, ...]:
        """(x,), (x, y) or (x, y, weight) of an item, as arrays."""
        name = self.place(index)
        if item is None and self.own_order:
            raise UserError(f"{name} is left out by a filter: filter what the MapDataset is made of, before it is made")
        if isinstance(item, Mapping) and self.x is None:
            raise UserError(
                f"{name} is a dict of {', '.join(map(repr, item))}: say which of them are x and y, as in "
                "MapSource(data, x='text', y='label')"
            )
        if self.x is None:
            return as_parts(item, name)
        if not isinstance(item, Mapping):
            raise UserError(f"{name} is a {type(item).__name__}, and no dict of columns: leave x, y and weight out")
        chosen = [names for names in (self.x, self.y, self.weight) if names is not None]
        return tuple(
            _column(item, names, name, part)
            if isinstance(names, str)
            else {each: _column(item, each, name, f"{part}[{each!r}]") for each in names}
            for part, names in zip(PARTS, chosen, strict=False)
        )


def _column(item: Mapping[str, Any], column: str, name: str, part: str) -> Any:
    if column not in item:
        near = nearest(column, map(str, item), always=True)
        raise UserError(f"{name} has no column {column!r}{near}")
    return as_arrays(item[column], f"{name}: {part}")


def is_grain(value: Any, kind: str) -> bool:
    """Tells whether a value is of a class of grain, such as 'MapDataset', without importing grain.

    Examples:
        >>> is_grain([1, 2], "MapDataset")
        False
    """
    grain = sys.modules.get("grain")
    return grain is not None and isinstance(value, getattr(grain, kind))
