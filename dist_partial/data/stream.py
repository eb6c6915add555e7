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
from dist_partial.data.order import own_rows
from dist_partial.data.stream_position import Position
from dist_partial.errors import Raised, UserError, calling, raised
from dist_partial.session import seeded
from dist_partial.terminal import say
from dist_partial.validation import shown

_FIRST = 64  # examples to look at before a run
_COUNTED = 4096  # examples at a time


class Stream:
    """Reads a `tf.data.Dataset` from its beginning on, for ever: position p of a run is the p-th example that it gives.

    Each worker reads all of it and takes its own slices, so that a run on another number of workers trains on the same
    examples, where the data set is deterministic. A resumed run skips what has been read.

    Args:
        dataset: of examples or of batches, of x, (x, y) or (x, y, weight); or a function that makes it, which one with
            a shuffle needs: it shuffles otherwise each time that it is read from its beginning on. The function is
            called for each reading: to look at the first examples, twice, as the training begins, and at each
            evaluation. TensorFlow's seed is then `run.seed`, for an evaluation 0, so that shuffles repeat themselves.
        batched: whether its elements are batches, which are taken apart; None finds out.
        made: what the function has made already, of which nothing has been read; None calls it.

    Raises:
        UserError: it is none, or its examples have no fixed shape.

    Examples:
        >>> stream = Stream(tf.data.Dataset.from_tensor_slices(([1.0, 2.0, 3.0], [4, 5, 6])).batch(2))
        run.data: the tf.data.Dataset gives batches, which are taken apart into examples, ...
        >>> len(stream), stream.spec[0]
        (3, TensorSpec(shape=(), dtype=tf.float32, name=None))
        >>> stream.fetch(np.array([2, 3]))[1].tolist()
        [6, 4]
    """

    own_order = True
    streamed = True  # only from the beginning on

    def __init__(
        self,
        dataset: tf.data.Dataset | Callable[[], tf.data.Dataset],
        batched: bool | None = None,
        made: tf.data.Dataset | None = None,
    ) -> None:
        self._by_function = callable(dataset)
        self._make = dataset if callable(dataset) else lambda: dataset
        made = self._made(seed=0) if made is None else made
        if not isinstance(made, tf.data.Dataset):
            raise UserError(f"a Stream got {shown(made)}: give a tf.data.Dataset, or a function that makes one")
        self._apart = _batched(made, batched)
        self._unread: tf.data.Dataset | None = made
        examples = self._examples(made)
        self._cardinality = int(examples.cardinality())
        self._alone = not isinstance(examples.element_spec, tuple)
        self.spec: tuple[Any, ...] = (examples.element_spec,) if self._alone else examples.element_spec
        for one in tf.nest.flatten(self.spec):
            if not isinstance(one, tf.TensorSpec) or not one.shape.is_fully_defined():
                raise UserError(
                    f"the tf.data.Dataset gives {one}, and all examples must have one shape, known before they are "
                    "read: pad or cut them in it, and end with tf.ensure_shape(x, [...])"
                )

    @property
    def repeatable(self) -> str:
        """What would make one repeat itself that gives other examples each time that it is read."""
        if not self._by_function:
            return "give a function that makes it, and a run can go on with the examples that would have come next"
        return "have its function draw from random numbers with a seed, and a run can go on where it was"

    def _made(self, seed: int) -> tf.data.Dataset:
        """The data set, made again if there is a function for it."""
        with calling("run.data"), seeded(seed):
            return self._make()

    def _examples(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        return dataset.unbatch() if self._apart else dataset

    def _repeated(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """Examples as tuples, without an end."""
        examples = self._examples(dataset).repeat()
        return examples.map(lambda x: (x,)) if self._alone else examples

    def _read(self, dataset: tf.data.Dataset, count: int) -> list[Any]:
        """The first examples."""
        found: list[Any] = []
        try:
            for example in self._repeated(dataset).take(count):
                found.append(example)
        except Exception as error:
            where = f"; it comes after {len(found):,} examples of the tf.data.Dataset"
            raise Raised(f"{raised('run.data', error)}{where}") from error
        return found

    @functools.cached_property
    def _first(self) -> list[Any]:
        """The first examples; kept, for a shuffle within may give others whenever it begins."""
        dataset, self._unread = self._unread, None
        return self._read(self._made(seed=0) if dataset is None else dataset, _FIRST)

    def read_again(self) -> tuple[Any, ...]:
        """Reads the first examples again, which a shuffle may make others."""
        return _stacked(self._read(self._made(seed=0), _FIRST))

    @functools.cached_property
    def _length(self) -> int:
        if self._cardinality == tf.data.INFINITE_CARDINALITY:
            return sys.maxsize
        if self._cardinality >= 0:
            return self._cardinality
        began, count = time.perf_counter(), 0
        try:
            for many in self._examples(self._made(seed=0)).map(lambda *_: np.int64(1)).batch(_COUNTED):
                count += len(many)
        except Exception as error:
            where = f"; it is among the examples {count:,} to {count + _COUNTED - 1:,} of the tf.data.Dataset"
            raise Raised(f"{raised('run.data', error)}{where}") from error
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
            examples = self._read(self._made(seed=0), last + 1)
        return _stacked([examples[index] for index in indices.tolist()])

    def train(
        self, first_step: int, global_batch: int, seed: int, context: tf.distribute.InputContext
    ) -> tuple[tf.data.Dataset, Position]:
        """This worker's batches from a step on, (positions, examples), and what follows how far it has come."""
        workers, worker = context.num_input_pipelines, context.input_pipeline_id
        skipped = first_step * global_batch
        examples = self._repeated(self._made(seed)).enumerate().skip(skipped)
        batches = examples.batch(global_batch // workers, drop_remainder=True).shard(workers, worker)
        batches = batches.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
        return batches, Position(context, global_batch, skipped)

    def evaluation(
        self, examples: int, global_batch: int, context: tf.distribute.InputContext
    ) -> tuple[tf.data.Dataset, Position]:
        """The same for one pass of the first `examples` examples."""
        batches = self._repeated(self._made(seed=0)).take(examples).enumerate().batch(global_batch)

        def own(positions: tf.Tensor, parts: Any) -> Any:
            rows = own_rows(tf.size(positions, tf.int64), global_batch, context)
            return tf.nest.map_structure(lambda tensor: tf.gather(tensor, rows), (positions, parts))

        return batches.map(own), Position(context, global_batch, end=examples)


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
            say(
                "run.data: the tf.data.Dataset gives batches, which are taken apart into examples, in their order; if "
                "they are examples, give dist_partial.Stream(dataset, batched=False)"
            )
    if batched and "none" in axes:
        raise UserError(
            f"the tf.data.Dataset gives {dataset.element_spec}, which are no batches: give Stream(dataset, "
            "batched=False)"
        )
    return batched
