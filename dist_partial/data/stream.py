"""A `tf.data.Dataset` as a source: its examples in the order in which it gives them."""

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial import compat
from dist_partial.data.arrays import stacked
from dist_partial.errors import UserError, calling
from dist_partial.terminal import say
from dist_partial.validation import shown

_FIRST = 64  # examples to look at before a run


class Stream:
    """Reads a `tf.data.Dataset` from its beginning on, for ever: position p of a run is the p-th example that it gives.

    Each worker reads all of it and takes its own slices, so that a run on another number of workers trains on the same
    examples, where the data set is deterministic. A resumed run skips what has been read.

    Args:
        dataset: of examples or of batches, of x, (x, y) or (x, y, weight); or a function that makes it, which one with
            a shuffle needs: it shuffles otherwise each time that it is read from its beginning on.
        batched: whether its elements are batches, which are taken apart; None finds out.

    Raises:
        UserError: it is none, or its examples have no fixed shape.

    Examples:
        >>> stream = Stream(tf.data.Dataset.from_tensor_slices(([1.0, 2.0, 3.0], [4, 5, 6])).batch(2))
        run.data: the tf.data.Dataset gives batches: they are taken apart into examples, in their order
        >>> len(stream), stream.spec[0]
        (3, TensorSpec(shape=(), dtype=tf.float32, name=None))
        >>> stream.fetch(np.array([2, 3]))[1].tolist()
        [6, 4]
    """

    own_order = True
    streamed = True  # only from the beginning on

    def __init__(self, dataset: tf.data.Dataset | Callable[[], tf.data.Dataset], batched: bool | None = None) -> None:
        self._make = dataset if callable(dataset) else lambda: dataset
        with calling("run.data"):
            first = self._make()
        if not isinstance(first, tf.data.Dataset):
            raise UserError(f"a Stream got {shown(first)}: give a tf.data.Dataset, or a function that makes one")
        self._apart = _batched(first, batched)
        spec = self._examples().element_spec
        self._alone = not isinstance(spec, tuple)
        self.spec: tuple[Any, ...] = (spec,) if self._alone else spec
        for one in tf.nest.flatten(self.spec):
            if not isinstance(one, tf.TensorSpec) or not one.shape.is_fully_defined():
                raise UserError(
                    f"the tf.data.Dataset gives {one}, and all examples must have one shape, known before they are "
                    "read: pad or cut them in it, and end with tf.ensure_shape(x, [...])"
                )

    def _examples(self) -> tf.data.Dataset:
        dataset = self._make()
        return dataset.unbatch() if self._apart else dataset

    def _repeated(self) -> tf.data.Dataset:
        """Its examples as tuples, without an end."""
        examples = self._examples().repeat()
        return examples.map(lambda x: (x,)) if self._alone else examples

    @functools.cached_property
    def _first(self) -> list[Any]:
        """The first examples; kept, for a shuffle within gives others whenever it begins."""
        return list(self._repeated().take(_FIRST))

    def read_again(self) -> tuple[Any, ...]:
        """Reads the first examples again, which a shuffle makes others."""
        return _stacked(list(self._repeated().take(_FIRST)))

    @functools.cached_property
    def _length(self) -> int:
        count = int(self._examples().cardinality())
        if count == tf.data.INFINITE_CARDINALITY:
            return sys.maxsize
        if count == tf.data.UNKNOWN_CARDINALITY:
            began = time.perf_counter()
            with calling("run.data"):
                count = int(self._examples().reduce(np.int64(0), lambda number, *_: number + 1))
            if (took := time.perf_counter() - began) > 1:
                say(f"run.data: counted {count:,} examples in {took:.1f} s")
        return count

    def __len__(self) -> int:
        """The examples that it gives; counted where it does not say, and the largest length of Python if no end."""
        return self._length

    def fetch(self, indices: np.ndarray) -> tuple[Any, ...]:
        """The examples at some positions near the beginning, which is read up to the last of them."""
        last, examples = int(indices.max()), self._first
        if not examples:
            raise UserError("the tf.data.Dataset of run.data is empty: there is nothing to read")
        if last >= len(examples):
            examples = list(self._repeated().take(last + 1))
        return _stacked([examples[index] for index in indices.tolist()])

    def train(self, first_step: int, global_batch: int, context: tf.distribute.InputContext) -> tf.data.Dataset:
        """This worker's batches from a step on: (positions, examples)."""
        workers = context.num_input_pipelines
        part = global_batch // workers
        examples = self._repeated().enumerate().skip(first_step * global_batch)
        batches = examples.batch(part, drop_remainder=True).shard(workers, context.input_pipeline_id)
        if first_step and context.input_pipeline_id == 0:
            batches = _timed(batches, first_step * global_batch)
        return batches.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))

    def evaluation(
        self, first: int, examples: int, global_batch: int, context: tf.distribute.InputContext
    ) -> tf.data.Dataset:
        """The same for an evaluation of `examples` examples, the last of which fills the last batch; for ever."""
        wanted = self._repeated().enumerate().skip(first).take(examples)
        fill = -examples % global_batch
        if fill:
            last = self._repeated().enumerate().skip(first + examples - 1).take(1)
            wanted = wanted.concatenate(last.repeat(fill))
        batches = wanted.batch(global_batch // context.num_input_pipelines, drop_remainder=True)
        return batches.shard(context.num_input_pipelines, context.input_pipeline_id).repeat()


def _stacked(examples: list[Any]) -> tuple[Any, ...]:
    found: tuple[Any, ...] = tf.nest.map_structure(lambda *row: stacked([one.numpy() for one in row]), *examples)
    return found


def _batched(dataset: tf.data.Dataset, batched: bool | None) -> bool:
    """Whether the elements of a data set are batches: it was batched last, or all have an axis of unknown length."""
    shapes = [one.shape for one in tf.nest.flatten(dataset.element_spec) if isinstance(one, tf.TensorSpec)]
    axes = {shape[0] if shape.rank else "none" for shape in shapes}
    if batched is None:
        batched = compat.is_batched(dataset)
        if batched and len(axes) == 1 and "none" not in axes:
            say("run.data: the tf.data.Dataset gives batches: they are taken apart into examples, in their order")
    if batched and "none" in axes:
        raise UserError(f"the tf.data.Dataset gives {dataset.element_spec}, which are no batches: say batched=False")
    return batched


def _timed(batches: tf.data.Dataset, skipped: int) -> tf.data.Dataset:
    """The same, which says how long it took to the first."""
    began: list[float] = []

    def now() -> float:
        began[:] = [time.perf_counter()]
        return began[0]

    def begin(_: tf.Tensor) -> tf.data.Dataset:
        with tf.control_dependencies([tf.numpy_function(now, [], tf.float64)]):
            return batches.skip(tf.constant(0, tf.int64))

    def said(number: np.ndarray) -> np.ndarray:
        if number == 0:
            say(f"run.data: skipped {skipped:,} examples in {time.perf_counter() - began[0]:.1f} s to go on")
        return number

    def passed(number: tf.Tensor, element: Any) -> Any:
        with tf.control_dependencies([tf.numpy_function(said, [number], tf.int64)]):
            return tf.nest.map_structure(tf.identity, element)

    return tf.data.Dataset.range(1).flat_map(begin).enumerate().map(passed)
