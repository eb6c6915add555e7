"""How far a tf.data.Dataset has been read: where it failed, and how long it took to go on."""

import collections
import time
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.terminal import say


class Position:
    """Follows the batches that one worker gets of a stream.

    Args:
        context: which worker it is.
        global_batch: examples of a step.
        skipped: examples before the first batch.
        end: examples of an evaluation; None has no end.

    Examples:
        >>> position = Position(tf.distribute.InputContext(), global_batch=4)
        >>> batches = position.follow(tf.data.Dataset.range(20).map(lambda i: (i, 1 // (i - 9))).batch(4))
        >>> [len(batch) for batch in batches.take(2)]
        [4, 4]
        >>> where_failed()
        'the examples 8 to 11 of the tf.data.Dataset'
    """

    def __init__(
        self, context: tf.distribute.InputContext, global_batch: int, skipped: int = 0, end: int | None = None
    ) -> None:
        part = global_batch // context.num_input_pipelines
        self._context = context
        self._size, self._end, self._skipped = global_batch, end, skipped
        self._offset = context.input_pipeline_id * part  # of this worker's examples in a step
        # The first example that is read for a step: those of the workers behind this one are read for its next.
        self._before = 0 if end is not None else self._offset + part - global_batch
        self._next = skipped  # the first example of the step whose batch comes next
        self._began = 0.0
        self.active = 0.0  # when it was last heard of

    def follow(self, batches: tf.data.Dataset) -> tf.data.Dataset:
        """The same batches, of (positions, examples), without their positions."""

        def begin(tick: np.ndarray) -> np.ndarray:
            self._began = self.active = time.perf_counter()
            begun.append(self)
            if self._skipped and not self._offset:  # on one worker
                say(f"run.data: skipping {self._skipped:,} examples, which a tf.data.Dataset reads again to go on...")
            return tick

        def passed(positions: tf.Tensor, parts: Any) -> Any:
            with tf.control_dependencies([tf.numpy_function(self._pass, [positions[0]], tf.int64)]):
                return tf.nest.map_structure(tf.identity, parts)

        # Before the first batch is asked for. Not by flat_map: the options of the data set would not hold in it.
        first = tf.data.Dataset.range(1).map(
            lambda tick: tf.ensure_shape(tf.numpy_function(begin, [tick], tf.int64), [])
        )
        ticks = first.concatenate(tf.data.Dataset.counter(1))
        return tf.data.Dataset.zip((ticks, batches)).map(lambda _, batch: passed(*batch))

    def _pass(self, position: np.ndarray) -> np.ndarray:
        """Takes the position of the first example of a batch."""
        # After an error batches may go on, with other positions, before anybody hears of it.
        if position == self._first:
            if self._next == self._skipped > 0 == self._offset:
                took = time.perf_counter() - self._began
                say(f"run.data: skipped {self._skipped:,} examples in {took:.1f} s to go on")
            self._next += self._size
            self.active = time.perf_counter()
        return position

    @property
    def evaluates(self) -> bool:
        """Whether it is of an evaluation."""
        return self._end is not None

    @property
    def ended(self) -> bool:
        """Whether all has been read."""
        return self._end is not None and self._next >= self._end

    @property
    def _first(self) -> int:
        """The position of this worker's first example of the next batch; the last one may be short, see `own_rows`."""
        count = self._size if self._end is None else min(self._size, self._end - self._next)
        workers, replicas = self._context.num_input_pipelines, self._context.num_replicas_in_sync
        room = -(-count // replicas) * (replicas // workers)
        return self._next + min(self._context.input_pipeline_id * room, count - 1)

    @property
    def failing(self) -> tuple[int, int]:
        """The first and the last of the examples that are being read for the next batch."""
        first = self._next + self._before
        last = first + self._size - 1
        return max(0, first) if self._next > self._skipped else 0, last if self._end is None else min(
            last, self._end - 1
        )


begun: collections.deque[Position] = collections.deque(maxlen=64)  # in this run: `reading` forgets those of others


def where_failed() -> str:
    """Says among which examples a stream has failed; '' if none is being read."""
    alive = [position for position in tuple(begun) if not position.ended]
    if not alive:
        return ""
    # Examples to train on are read ahead during an evaluation, and those of an evaluation during it alone.
    newest = max(alive, key=lambda position: (position.evaluates, position.active))
    begun.clear()  # the run ends, and another one may begin before these are forgotten
    first, last = newest.failing
    return f"the examples {first:,} to {last:,} of the tf.data.Dataset"
