"""The examples that workers read, and checks that they share one order."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.data import train_batches


def read(source: Any, steps: Sequence[int], workers: int = 1, global_batch: int = 12, seed: int = 3) -> list[Any]:
    """The global batches of steps [first, last], each a list of its arrays, put together of what each worker reads."""
    first, last = steps
    parts = []
    for worker in range(workers):
        context = tf.distribute.InputContext(workers, worker, workers)
        batches = train_batches(source, first_step=first, global_batch=global_batch, seed=seed, context=context)
        parts.append([tf.nest.flatten(batch) for batch in batches.take(last - first + 1).as_numpy_iterator()])
    return [[np.concatenate(arrays) for arrays in zip(*step, strict=True)] for step in zip(*parts, strict=True)]


def assert_one_order(source: Any, steps: int = 7, first: int = 4) -> list[Any]:
    """Compares 1, 2 and 3 workers, and a start in the middle, bit for bit; returns the batches from step 0 on."""
    whole = read(source, (0, steps))
    for workers, start in ((2, 0), (3, first), (1, first)):
        for wanted, found in zip(whole[start:], read(source, (start, steps), workers), strict=True):
            for one, other in zip(wanted, found, strict=True):
                assert one.dtype == other.dtype and one.tolist() == other.tolist()
    return whole
