"""Batches that the user's code makes: keras.utils.PyDataset."""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial.data.arrays import as_parts, parts_misfit, spec_of
from dist_partial.errors import UserError, calling

KEPT = 8
"""Batches that are kept, of which several readers may be in different ones."""


@dataclass(frozen=True, eq=False)
class PyDatasetSource:
    """Reads examples from a `keras.utils.PyDataset`, whose batches it takes apart.

    The order is that of the batches, the same in each epoch: example i is row i % size of batch i // size. All batches
    have one size, of which the last may have less. A batch is made once for the examples that are read of it
    one after the other, and at most `workers` of the PyDataset are made at a time. `on_epoch_begin` and
    `on_epoch_end` are not called, for a worker that starts in the middle of a run could not know what they change.

    Args:
        batches: the PyDataset. A batch is a tuple (x, y), (x, y, weight) or (x,), or x alone.

    Raises:
        UserError: it is empty or endless, or a batch is no such tuple.

    Examples:
        >>> class Squares(keras.utils.PyDataset):
        ...     def __len__(self):
        ...         return 3
        ...     def __getitem__(self, index):
        ...         x = np.arange(4 * index, min(4 * index + 4, 10))
        ...         return x, x**2
        >>> source = PyDatasetSource(Squares())
        >>> len(source), source.fetch(np.array([9, 2]))[1].tolist()
        (10, [81, 4])
    """

    batches: keras.utils.PyDataset

    own_order = True
    batched = True  # a whole batch is made for one example

    def __post_init__(self) -> None:
        _ = len(self)  # reads the first and the last batch, or a mistake in them would show later

    def __reduce__(self) -> Any:  # another process keeps batches of its own
        return type(self), (self.batches,)

    @property
    def thread_safe(self) -> bool:
        """Whether several batches may be made at a time, as the PyDataset says by its `workers`."""
        return self.batches.workers > 1

    @functools.cached_property
    def spec(self) -> tuple[Any, ...]:
        """(x,), (x, y) or (x, y, weight) of one example: that of the first batch."""
        return spec_of(_row(self._first), self._name(0))

    def __len__(self) -> int:
        return self._examples

    def fetch(self, indices: np.ndarray) -> tuple[Any, ...]:
        """Examples `indices`, int64 [b]; from the length on, those of the next epochs."""
        batches, rows = np.divmod(indices % len(self), self._size)
        found = [np.empty([len(indices), *one.shape], one.dtype.as_numpy_dtype) for one in tf.nest.flatten(self.spec)]
        for batch in np.unique(batches).tolist():
            here = batches == batch
            for into, array in zip(found, self._kept(batch), strict=True):
                into[here] = array[rows[here]]
        return tf.nest.pack_sequence_as(self.spec, found)

    def read_again(self) -> tuple[Any, ...]:
        """Makes the first batch again, which random numbers within make another."""
        return self._read(0)

    def place(self, index: int) -> str:
        """What example `index` is called in messages."""
        return self._name(index % len(self) // self._size) + f", row {index % len(self) % self._size}"

    def _name(self, batch: int) -> str:
        return f"{type(self.batches).__name__}[{batch}]"

    @functools.cached_property
    def _count(self) -> int:
        """The number of batches."""
        name = type(self.batches).__name__
        with calling(f"len({name})"):
            count = self.batches.num_batches
        if count is None:
            raise UserError(f"{name} has no end, for its num_batches is None: give a number, and a run repeats it")
        if not count:
            raise UserError(f"{name} is empty: there is nothing to read")
        return count

    @functools.cached_property
    def _first(self) -> tuple[Any, ...]:
        return self.read_again()

    @functools.cached_property
    def _size(self) -> int:
        """The examples of each batch but the last."""
        return _rows(self._first)

    @functools.cached_property
    def _examples(self) -> int:
        last = self._count - 1
        return last * self._size + (len(self._kept(last)[0]) if last else self._size)

    @functools.cached_property
    def _kept(self) -> "_Kept":
        return _Kept(self._checked, max(1, self.batches.workers))

    def _read(self, batch: int) -> tuple[Any, ...]:
        """The arrays of a batch."""
        with calling(self._name(batch)):
            item = self.batches[batch]
        parts = as_parts(tuple(item) if isinstance(item, list) else item, self._name(batch))
        shapes = [array.shape for array in tf.nest.flatten(parts)]
        if len({shape[:1] for shape in shapes}) != 1 or shapes[0][:1] in ((), (0,)):
            raise UserError(
                f"{self._name(batch)} has shapes {', '.join(map(str, shapes))}: axis 0 counts the examples of the "
                "batch, alike in all, and there is at least one"
            )
        return parts

    def _checked(self, batch: int) -> list[np.ndarray]:
        """The arrays of a batch, flat; raises UserError unless it is as the first, but for the size of the last."""
        parts = self._read(batch)
        if wrong := parts_misfit(_row(parts), self.spec):
            raise UserError(f"{self._name(batch)}: {wrong} in the first batch: give all one shape and type")
        rows = _rows(parts)
        if rows > self._size or (rows < self._size and batch < self._count - 1):
            raise UserError(
                f"{self._name(batch)} has {rows} examples, and the first batch has {self._size}: give all one size, "
                "of which the last alone may have less"
            )
        return tf.nest.flatten(parts)


def _rows(parts: tuple[Any, ...]) -> int:
    return len(tf.nest.flatten(parts)[0])


def _row(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """The first example of a batch."""
    return tf.nest.map_structure(lambda array: np.asarray(array[0], array.dtype), parts)


class _Kept:
    """Makes batches, and keeps the last ones; readers that ask for one at once wait for the first of them.

    Args:
        make: of the number of a batch.
        at_once: the calls of it that may run at a time.
    """

    def __init__(self, make: Callable[[int], list[np.ndarray]], at_once: int) -> None:
        self._make = make
        self._calls = threading.Semaphore(at_once)
        self._lock = threading.Lock()
        self._futures: dict[int, Future[list[np.ndarray]]] = {}  # the one that was asked for last at the end

    def __call__(self, batch: int) -> list[np.ndarray]:
        with self._lock:
            known = self._futures.pop(batch, None)
            future = self._futures[batch] = known or Future()
            if len(self._futures) > KEPT:
                del self._futures[next(iter(self._futures))]
        if known is None:
            try:
                with self._calls:
                    future.set_result(self._make(batch))
            except BaseException as error:
                with self._lock:
                    self._futures.pop(batch, None)  # or it would never be tried again
                future.set_exception(error)
        return future.result()
