"""The global batches that workers read."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.data import evaluation_batches, train_batches


def contexts(workers: int, each: int = 1) -> list[tf.distribute.InputContext]:
    """The input contexts of all workers, which have `each` replicas."""
    return [tf.distribute.InputContext(workers, worker, workers * each) for worker in range(workers)]


def together(batches: Sequence[tf.data.Dataset], steps: int) -> list[Any]:
    """The first global batches, each a list of its arrays, put together of the batches of all workers."""
    parts = [[tf.nest.flatten(batch) for batch in each.take(steps).as_numpy_iterator()] for each in batches]
    return [[np.concatenate(arrays) for arrays in zip(*step, strict=True)] for step in zip(*parts, strict=True)]


def read(
    source: Any, steps: Sequence[int], workers: int = 1, each: int = 1, global_batch: int = 12, seed: int = 3
) -> list[Any]:
    """The global batches of steps [first, last], as workers of `each` replicas read them."""
    first, last = steps
    options = {"first_step": first, "global_batch": global_batch, "seed": seed}
    made = [train_batches(source, context=context, **options) for context in contexts(workers, each)]
    return together(made, last - first + 1)


def read_held_out(source: Any, steps: int, workers: int = 1, each: int = 1, **options: int) -> list[Any]:
    """The same of an evaluation; `options` are those of `evaluation_batches`."""
    made = [evaluation_batches(source, context=context, **options) for context in contexts(workers, each)]
    return together(made, steps)


def assert_same(found: Sequence[Any], wanted: Sequence[Any]) -> None:
    """Compares batches bit for bit."""
    for one, other in zip(found, wanted, strict=True):
        for array, its in zip(one, other, strict=True):
            assert array.dtype == its.dtype and array.tolist() == its.tolist()
