"""Batches as a function of (first step, input context): any step is reached in O(1).

The examples of a run have one global order, whatever the number of workers. Step s takes its positions
[s * global_batch, (s + 1) * global_batch), and replica i of n takes the i-th of n contiguous slices of them.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial.data.source import ArraySource, Source
from dist_partial.errors import UserError, calling

PREFETCHED = 4  # batches


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
        A data set of infinite cardinality and static shapes. Element k is the batch of local replica k % r of
        step first_step + k // r, where a worker has r replicas: arrays of `source.spec` with a leading axis
        of global_batch / replicas.

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
    order = {"first_step": first_step, "global_batch": global_batch, "seed": seed, "context": context}
    return train_indices(len(source), **order).map(lambda i: fetched(source, i)).prefetch(PREFETCHED)


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
    return _batches(lambda positions: _shuffled(positions, count, seed), first_step, global_batch, context)


def evaluation_batches(
    source: Source, *, first: int = 0, examples: int, global_batch: int, context: tf.distribute.InputContext
) -> tf.data.Dataset:
    """Makes one worker's batches of `examples` examples from the first on, in order, each exactly once.

    Args:
        source: the examples.
        first: the place of the first of them.
        examples: how many of them.
        global_batch: examples of a step, over all replicas.
        context: which worker this is, and how many replicas there are.

    Returns:
        A data set of infinite cardinality and static shapes that starts over after
        ceil(examples / global_batch) steps. Its elements are those of `train_batches`; the last batch is filled up by
        repeating the last example.

    Raises:
        UserError: there are fewer examples, or as for `train_batches`.

    Examples:
        >>> source = ArraySource(np.zeros([5, 1], np.float32), np.arange(5))
        >>> batches = evaluation_batches(source, examples=5, global_batch=3, context=tf.distribute.InputContext())
        >>> [y.numpy().tolist() for _, y in batches.take(2)]
        [[0, 1, 2], [3, 4, 4]]
    """
    _check(source)
    if not 0 < first + examples <= len(source):
        raise UserError(f"cannot evaluate {first + examples} examples: ask for 1 to {len(source)}, that is all")
    padded = -(-examples // global_batch) * global_batch

    def fetch(positions: tf.Tensor) -> tuple[Any, ...]:
        return fetched(source, first + tf.minimum(positions % padded, examples - 1))

    return _batches(fetch, 0, global_batch, context).prefetch(PREFETCHED)


def _batches(
    fetch: Callable[[tf.Tensor], Any],
    first_step: int,
    global_batch: int,
    context: tf.distribute.InputContext,
) -> tf.data.Dataset:
    """Maps `fetch` over the positions, int64 [b], of this worker's part of one step after the other."""
    replicas = context.num_replicas_in_sync
    if global_batch < 1 or global_batch % replicas:
        below = max(global_batch // replicas, 1) * replicas
        raise UserError(
            f"run.global_batch={global_batch} does not divide by {replicas} replicas: "
            f"take a multiple such as {below} or {below + replicas}"
        )
    part = global_batch // context.num_input_pipelines

    def batch(step: tf.Tensor) -> Any:
        return fetch(step * global_batch + context.input_pipeline_id * part + tf.range(part, dtype=tf.int64))

    # A counter is infinite, and so is what is mapped over it: were it finite, MultiWorkerMirroredStrategy
    # would ask in every step, with a collective of its own, whether all workers still have data.
    batches = tf.data.Dataset.counter(first_step).map(batch)
    # With autotuning on, the destructor of an iterator waits for a thread that may sleep for up to a minute
    # (TensorFlow 2.21): the end of every run. There is nothing to tune here.
    options = tf.data.Options()
    options.autotune.enabled = False
    return batches.with_options(options)


def _shuffled(positions: tf.Tensor, count: int, seed: int) -> tf.Tensor:
    """Example indices, int64 [b], at global positions: a permutation of [0, count) for each (seed, epoch).

    The permutation is a block cipher over [0, count) (Beaulieu et al. 2013, "The SIMON and SPECK families of
    lightweight block ciphers"), so that nothing of size `count` is ever made. The wrapper of it in TensorFlow
    2.21, `tf.random.experimental.index_shuffle`, fails on a seed per row, and its 4 rounds leave neighbours
    correlated; 8 do not. The cipher of a small range uses few bits of its key, so that epochs would repeat
    soon: each key is drawn from (seed, epoch) by Philox.
    """
    epochs = positions // count

    def key(epoch: tf.Tensor) -> tf.Tensor:
        return tf.random.stateless_uniform([3], [seed, epoch], None, None, tf.int32, alg="philox")

    touched = tf.range(epochs[0], epochs[-1] + 1)
    keys = tf.map_fn(key, touched, fn_output_signature=tf.TensorSpec([3], tf.int32))
    return tf.raw_ops.RandomIndexShuffle(
        index=positions % count,
        seed=tf.gather(keys, epochs - epochs[0]),
        max_index=tf.constant(count - 1, tf.int64),
        rounds=8,
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
    _check(source)
    if len(source.spec) == 1:
        return None
    if isinstance(source, ArraySource) and sum(array.nbytes for array in tf.nest.flatten(source.y)) <= 2**30:
        return source.y
    return fetch(source, looks(source))[1]


def looks(source: Source) -> np.ndarray:
    """Chooses up to 64 examples from all over a source, to look at before a run: int64 [n].

    Examples:
        >>> looks(ArraySource(np.zeros([3, 1], np.float32), np.array([5, 6, 7]))).tolist()
        [0, 1, 2]
    """
    return np.unique(np.linspace(0, len(source) - 1, 64).astype(np.int64))


def fetched(source: Source, indices: tf.Tensor) -> tuple[Any, ...]:
    """Wraps `fetch` as a TensorFlow op, with static shapes.

    Examples:
        >>> source = ArraySource(np.zeros([3, 1], np.float32), np.array([5, 6, 7]))
        >>> fetched(source, tf.constant([2, 0], tf.int64))[1].numpy().tolist()
        [7, 5]
    """
    spec = tf.nest.flatten(source.spec)
    arrays = tf.numpy_function(
        lambda indices: tf.nest.flatten(fetch(source, indices)),
        [indices],
        [one.dtype for one in spec],
        stateful=False,
        name="fetch",
    )
    flat = [tf.ensure_shape(a, indices.shape + one.shape) for a, one in zip(arrays, spec, strict=True)]
    return tf.nest.pack_sequence_as(without_lists(source.spec), flat)


def fetch(source: Source, indices: np.ndarray) -> tuple[Any, ...]:
    """Calls `source.fetch` and checks the result against the source's spec.

    Raises:
        UserError: it gives something else.
        Raised: it raises an exception.

    Examples:
        >>> class Halves:
        ...     spec = tf.TensorSpec([], tf.float32), tf.TensorSpec([], tf.float32)
        ...     def fetch(self, indices):
        ...         return indices / 2, np.float32(indices)
        >>> fetch(Halves(), np.array([1]))
        Traceback (most recent call last):
        dist_partial.errors.UserError: Halves.fetch gives [float64 (1,), float32 (1,)] for the examples 1, and its ...
    """
    with calling("run.data"):
        arrays, spec = source.fetch(indices), source.spec
    if _fits(arrays, spec, len(indices)):
        return without_lists(arrays)
    arrays = tuple(arrays) if isinstance(arrays, list) else arrays
    want = tf.nest.map_structure(lambda one: f"{one.dtype.name} {(len(indices), *one.shape)}", spec)
    have = _described(arrays)
    if want == have:
        return without_lists(arrays)
    some = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    raise UserError(
        f"{type(source).__name__}.fetch gives {_listed(have)} for the examples {some}, and its spec says "
        f"{_listed(want)}: both must be the same (x, y) or (x, y, weight)"
    )


def _fits(found: Any, spec: Any, count: int) -> bool:
    """Whether NumPy arrays are those of a spec; by hand, for it is called for each batch."""
    if isinstance(spec, tf.TensorSpec):
        if not isinstance(found, np.ndarray) or found.shape != (count, *spec.shape.as_list()):
            return False
        return found.dtype == spec.dtype.as_numpy_dtype or (spec.dtype == tf.string and found.dtype.kind in "OSU")
    if isinstance(spec, dict):
        same = isinstance(found, dict) and found.keys() == spec.keys()
        return same and all(_fits(found[name], spec[name], count) for name in spec)
    same = isinstance(found, (tuple, list)) and len(found) == len(spec)
    return same and all(_fits(one, its, count) for one, its in zip(found, spec, strict=True))


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


def _check(source: Source) -> None:
    """Compares the first example with the spec, before anything else is done."""
    with calling("run.data"):
        count = len(source)
    if count == 0:
        raise UserError(f"{type(source).__name__} is empty: there is nothing to read")
    fetch(source, np.zeros(1, np.int64))
