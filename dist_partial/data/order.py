"""Which example comes at which position of a run, in O(1) for any position."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from dist_partial.data.reading import Wrapped, checked, trait

if TYPE_CHECKING:
    from dist_partial.data.source import Source


@dataclass(frozen=True, eq=False)
class InOrder(Wrapped):
    """Gives the examples of a source as they are, one epoch after the other; `Dataset.in_order` makes it.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> InOrder(ArraySource(np.arange(3))).fetch(np.arange(4))[0].tolist()
        [0, 1, 2, 0]
    """

    source: "Source"
    own_order = True

    def fetch_with(self, indices: np.ndarray, draws: np.ndarray | None) -> tuple[Any, ...]:
        """Examples at positions, which may be beyond the first epoch."""
        return checked(self.source, indices % len(self.source), draws)

    def place(self, index: int) -> str:
        """Where an example is."""
        index %= len(self.source)
        inner = trait(self.source, "place")
        return inner(index) if inner else f"example {index:,}"


@tf.autograph.experimental.do_not_convert
def places(source: "Source", positions: tf.Tensor, seed: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Says which examples come at positions of a run, int64 [b] that grow, and in which of its epochs.

    Shuffled, each epoch by itself; or as they are, beyond the first epoch too, where the source has `own_order = True`.

    Returns:
        Indices to fetch and epochs, int64 [b] each.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> indices, epochs = places(ArraySource(np.arange(3)), tf.range(6, dtype=tf.int64), seed=0)
        >>> sorted(indices.numpy()[:3].tolist()), epochs.numpy().tolist()
        ([0, 1, 2], [0, 0, 0, 1, 1, 1])
    """
    if (own := trait(source, "places")) is not None:
        found: tuple[tf.Tensor, tf.Tensor] = own(positions, seed)
        return found
    count = len(source)
    shuffle = not trait(source, "own_order", False)
    return shuffled(positions, count, seed) if shuffle else positions, positions // count


def own_rows(count: tf.Tensor, global_batch: int, context: tf.distribute.InputContext) -> tf.Tensor:
    """Gives the rows of a batch of an evaluation, int64 [global_batch / workers], that are a worker's.

    Replicas read `count` examples in turn, as many as there is room for; the last row fills up what is left.

    Examples:
        >>> contexts = [tf.distribute.InputContext(2, worker, 2) for worker in range(2)]
        >>> [own_rows(tf.constant(3, tf.int64), 8, context).numpy().tolist() for context in contexts]
        [[0, 1, 1, 1], [2, 2, 2, 2]]
    """
    workers, replicas = context.num_input_pipelines, context.num_replicas_in_sync
    room = -(-count // replicas) * (replicas // workers)
    rows = tf.minimum(tf.range(global_batch // workers, dtype=tf.int64), room - 1)
    return tf.minimum(context.input_pipeline_id * room + rows, count - 1)


def shuffled(positions: tf.Tensor, count: int, seed: int) -> tf.Tensor:
    """Gives example indices, int64 [b], at global positions: a permutation of [0, count) for each (seed, epoch).

    The permutation is a block cipher over [0, count) (Beaulieu et al. 2013, "The SIMON and SPECK families of
    lightweight block ciphers"), so that nothing of size `count` is ever made. The wrapper of it in TensorFlow
    2.21, `tf.random.experimental.index_shuffle`, fails on a seed per row, and its 4 rounds leave neighbours
    correlated; 8 do not. The cipher of a small range uses few bits of its key, so that epochs would repeat
    soon: each key is drawn from (seed, epoch) by Philox.

    Examples:
        >>> sorted(shuffled(tf.range(4, dtype=tf.int64), count=4, seed=0).numpy().tolist())
        [0, 1, 2, 3]
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
