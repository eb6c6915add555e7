"""Batches as a function of (first step, input context): any step is reached in O(1).

The examples of a run have one global order, whatever the number of workers. Step s takes its positions
[s * global_batch, (s + 1) * global_batch), and worker i of n takes the i-th of n contiguous slices of them.
"""

import os
import re
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.data.draws import draws
from dist_partial.data.forks import stages
from dist_partial.data.held_out import Part
from dist_partial.data.order import own_rows, places, shuffled
from dist_partial.data.readers import readers, recent
from dist_partial.data.reading import as_op, fetch, trait
from dist_partial.data.source import ArraySource, Source
from dist_partial.data.stream import Stream
from dist_partial.data.stream_position import Position, where_failed
from dist_partial.errors import Ending, Raised, UserError, calling, raised

PREFETCHED = 4  # batches
_CPUS = len(os.sched_getaffinity(0))


def train_batches(
    source: Source, *, first_step: int, global_batch: int, seed: int, context: tf.distribute.InputContext
) -> tf.data.Dataset:
    """Makes the shuffled batches of one worker, without end.

    Each epoch visits every example once, in an order of its own; a batch may straddle two epochs.

    Args:
        source: the examples.
        first_step: the step that the first element belongs to.
        global_batch: examples of a step, over all replicas.
        seed: of the order.
        context: which worker this is, and how many replicas there are.

    Returns:
        A data set of infinite cardinality and static shapes. Element k is this worker's part of step first_step + k:
        arrays of `source.spec` with a leading axis of global_batch / workers, of which each of its replicas takes
        an equal slice.

    Raises:
        UserError: the batch does not divide by the replicas; the source is empty, or not as its spec says.

    Examples:
        >>> import numpy as np
        >>> from dist_partial.data import ArraySource
        >>> source = ArraySource(np.arange(8, dtype=np.float32)[:, None], np.arange(8, dtype=np.int32))
        >>> alone = tf.distribute.InputContext()
        >>> batches = iter(train_batches(source, first_step=0, global_batch=4, seed=0, context=alone))
        >>> first, second = next(batches)[1].numpy(), next(batches)[1].numpy()
        >>> sorted([*first.tolist(), *second.tolist()])
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    _check(source)
    base, _ = stages(source)
    if isinstance(base, Stream):
        _check_division(global_batch, context)
        return _streamed(source, *base.train(first_step, global_batch, seed, context), seed)
    order = _batches(lambda positions: places(source, positions, seed), first_step, global_batch, context)
    return _read(source, order, seed)


def train_indices(
    count: int, *, first_step: int, global_batch: int, seed: int, context: tf.distribute.InputContext
) -> tf.data.Dataset:
    """Makes the indices, int64 [b] each, of the examples that `train_batches` reads out of `count`.

    Examples:
        >>> alone = tf.distribute.InputContext()
        >>> batches = iter(train_indices(6, first_step=0, global_batch=3, seed=0, context=alone))
        >>> sorted([*next(batches).numpy().tolist(), *next(batches).numpy().tolist()])
        [0, 1, 2, 3, 4, 5]
    """
    return _batches(lambda positions: shuffled(positions, count, seed), first_step, global_batch, context)


def evaluation_batches(
    source: Source,
    *,
    examples: int,
    global_batch: int,
    seed: int = 0,
    context: tf.distribute.InputContext,
) -> tf.data.Dataset:
    """Makes one worker's batches of the first `examples` examples, in order, each exactly once.

    An example draws the same random numbers in each pass, so that evaluations can be compared.

    Args:
        source: the examples.
        examples: how many of them.
        global_batch: examples of a step, over all replicas.
        seed: of the random numbers.
        context: which worker this is, and how many replicas there are.

    Returns:
        A data set of ceil(examples / global_batch) elements, which are those of `train_batches`. Of the last batch,
        if it is short, replicas read in turn as many examples as there is room for; the last example of a worker fills
        up the rest.

    Raises:
        UserError: there are fewer examples, or as for `train_batches`.

    Examples:
        >>> source = ArraySource(np.zeros([5, 1], np.float32), np.arange(5))
        >>> batches = evaluation_batches(source, examples=5, global_batch=3, context=tf.distribute.InputContext())
        >>> [y.numpy().tolist() for _, y in batches]
        [[0, 1, 2], [3, 4, 4]]
    """
    _check(source)
    if not 0 < examples <= len(source):
        raise UserError(f"cannot evaluate {examples} examples: ask for 1 to {len(source)}, that is all")
    _check_division(global_batch, context)
    base, _ = stages(source)
    if isinstance(base, Stream):
        if examples > sys.maxsize // 2:
            raise UserError("the examples held out have no end: bind run.eval_examples to how many are to be read")
        return _streamed(source, *base.evaluation(examples, global_batch, context), seed=seed)

    @tf.autograph.experimental.do_not_convert  # which takes a while, for nothing
    def own(first: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        rows = own_rows(tf.minimum(examples - first, global_batch), global_batch, context)
        return first + rows, tf.zeros_like(rows)

    return _read(source, _untuned(tf.data.Dataset.range(0, examples, global_batch).map(own)), seed)


def _read(source: Source, order: tf.data.Dataset, seed: int) -> tf.data.Dataset:
    """Reads the batches of a source whose (indices, epochs), int64 [b] each, `order` gives, ahead of their use."""
    base, functions = stages(source)
    read, threads = readers().reader(base), readers().threads(base)
    try:
        known: Callable[[], Any] = weakref.ref(source)
    except TypeError:  # a class with slots
        known = lambda: source  # noqa: E731

    def plain(indices: np.ndarray) -> Any:
        return read(indices, None)

    def drawn(indices: np.ndarray, epochs: np.ndarray) -> Any:
        state = draws(seed, epochs, indices)
        if not functions:
            return read(indices, state)
        recent.append((known, indices, state))
        return read(indices, state), np.stack([function.seeds(state) for function in functions], 1)

    @tf.autograph.experimental.do_not_convert  # which takes a while, for nothing
    def batch(indices: tf.Tensor, epochs: tf.Tensor) -> Any:
        if not functions and not hasattr(base, "fetch_with"):
            return as_op(plain, base.spec, indices)
        spec = (base.spec, tf.TensorSpec([len(functions), 2], tf.int32)) if functions else base.spec
        return as_op(drawn, spec, indices, epochs)

    several = {"num_parallel_calls": threads, "deterministic": True} if threads > 1 else {}
    batches = order.map(batch, **several)
    if functions:
        batches = _through(batches, functions)
    if threads > 1:
        # A thread that reads may wait, and those of TensorFlow's own pool are as many as there are CPUs.
        options = tf.data.Options()
        options.threading.private_threadpool_size = threads + _CPUS
        batches = batches.with_options(options)
    return batches.prefetch(PREFETCHED)


def _streamed(source: Source, batches: tf.data.Dataset, position: Position, seed: int) -> tf.data.Dataset:
    """Batches, whose (positions, examples) a stream gives, through the functions of a source."""
    _, functions = stages(source)

    def seeds(positions: np.ndarray) -> np.ndarray:
        state = draws(seed, np.zeros_like(positions), positions)
        return np.stack([function.seeds(state) for function in functions], 1)

    def seeded(positions: tf.Tensor, parts: Any) -> Any:
        return parts, as_op(seeds, tf.TensorSpec([len(functions), 2], tf.int32), positions), positions

    if functions:
        batches = _through(batches.map(seeded), functions).map(lambda parts, positions: (positions, parts))
    return _untuned(position.follow(batches)).prefetch(PREFETCHED)


def _through(batches: tf.data.Dataset, functions: Sequence[Any]) -> tf.data.Dataset:
    """Passes each example of (batches, seeds) through the functions, several at a time; further parts stay beside."""

    @tf.autograph.experimental.do_not_convert  # which takes a while, for nothing
    def example(parts: Any, seeds: tf.Tensor, *beside: tf.Tensor) -> Any:
        for i, function in enumerate(functions):
            parts = function.of_example(parts, seeds[i])
        return (parts, *beside) if beside else parts

    size = batches.element_spec[1].shape[0]
    examples = batches.unbatch().map(example, num_parallel_calls=_CPUS, deterministic=True)
    return examples.batch(size, drop_remainder=True)


def failing_example(error: tf.errors.OpError) -> Ending | None:
    """Finds the example that a function of TensorFlow failed on, among those read last.

    Returns:
        What ends the run; None if it was not the data that failed, or if the error has it.

    Examples:
        >>> failing_example(tf.errors.InvalidArgumentError(None, None, "shapes differ")) is None
        True
    """
    at = r"\[\[(\{\{node )?([\w/]+/)?IteratorGetNext(\}\})?\]\]|Op:IteratorGetNext"  # alone, or in the loop of steps
    if not re.search(at, str(error)) or re.search(rf"^{re.escape(Ending.__module__)}\.", str(error), re.MULTILINE):
        return None
    alive = [(source, *read) for known, *read in tuple(recent) if (source := known()) is not None]
    for last in dict.fromkeys(source for source, *_ in reversed(alive)):
        for source, indices, state in alive:
            try:
                if source is last:
                    fetch(source, indices, state)
            except Ending as ending:
                return ending
    found = raised("run.data", error)
    return Raised(f"{found}; it is among {where}") if (where := where_failed()) else found


def _batches(
    fetch: Callable[[tf.Tensor], Any],
    first_step: int,
    global_batch: int,
    context: tf.distribute.InputContext,
) -> tf.data.Dataset:
    """Maps `fetch` over the positions, int64 [b], of this worker's part of one step after the other."""
    _check_division(global_batch, context)
    part = global_batch // context.num_input_pipelines

    @tf.autograph.experimental.do_not_convert  # which takes a while, for nothing
    def batch(step: tf.Tensor) -> Any:
        return fetch(step * global_batch + context.input_pipeline_id * part + tf.range(part, dtype=tf.int64))

    # A counter is infinite, and so is what is mapped over it: were it finite, MultiWorkerMirroredStrategy
    # would ask in every step, with a collective of its own, whether all workers still have data.
    batches = tf.data.Dataset.counter(first_step).map(batch)
    return _untuned(batches)


def _untuned(batches: tf.data.Dataset) -> tf.data.Dataset:
    """The same without autotuning, with which the destructor of an iterator waits (TensorFlow 2.21) for a thread.

    That thread may sleep for up to a minute: the end of every run. There is nothing to tune here.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return batches.with_options(options)


def _check_division(global_batch: int, context: tf.distribute.InputContext) -> None:
    replicas = context.num_replicas_in_sync
    if global_batch < 1 or global_batch % replicas:
        below = max(global_batch // replicas, 1) * replicas
        raise UserError(
            f"run.global_batch={global_batch} does not divide by {replicas} replicas: "
            f"take a multiple such as {below} or {below + replicas}"
        )


def some_targets(source: Source) -> Any:
    """Reads targets to check before a run: all where they are in memory, else those of 64 examples from all over.

    Returns:
        A nest of arrays as `y` of the spec; None if there is no y.

    Raises:
        UserError: the source is empty, or not as its spec says.

    Examples:
        >>> some_targets(ArraySource(np.zeros([3, 1], np.float32), np.array([5, 6, 7]))).tolist()
        [5, 6, 7]
    """
    if isinstance(source, Part):  # whose whole may be in memory
        return some_targets(source.source)
    _check(source)
    if len(source.spec) == 1:
        return None
    if isinstance(source, ArraySource) and sum(array.nbytes for array in tf.nest.flatten(source.y)) <= 2**30:
        return source.y
    return fetch(source, looks(source))[1]


def some_inputs(source: Source) -> tuple[Any, np.ndarray]:
    """Reads inputs to check before a run, chosen as `some_targets` are.

    Returns:
        A nest of arrays as `x` of the spec, and which examples they are: int64 [n].

    Examples:
        >>> some_inputs(ArraySource(np.array([5, 6, 7])))[0].tolist()
        [5, 6, 7]
    """
    if isinstance(source, Part):
        return some_inputs(source.source)
    if isinstance(source, ArraySource) and sum(array.nbytes for array in tf.nest.flatten(source.x)) <= 2**30:
        return source.x, np.arange(len(source))
    indices = looks(source)
    return fetch(source, indices)[0], indices


def looks(source: Source) -> np.ndarray:
    """Chooses up to 64 examples from all over a source, to look at before a run: int64 [n].

    The first ones of a source that is read from its beginning on, or by whole batches.

    Examples:
        >>> looks(ArraySource(np.zeros([3, 1], np.float32), np.array([5, 6, 7]))).tolist()
        [0, 1, 2]
    """
    if trait(source, "streamed", False):
        return np.arange(64)
    if trait(source, "batched", False):
        return np.arange(min(64, len(source)))
    return np.unique(np.linspace(0, len(source) - 1, 64).astype(np.int64))


def _check(source: Source) -> None:
    """Compares the first example with the spec, before anything else is done."""
    with calling("run.data"):
        count = 1 if trait(source, "streamed", False) else len(source)
    if count == 0:
        raise UserError(f"{type(source).__name__} is empty: there is nothing to read")
    fetch(source, np.zeros(1, np.int64))
