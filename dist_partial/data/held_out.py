"""Parts of a source: what is trained, and what is held out."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.data.reading import Wrapped, checked, trait
from dist_partial.data.source import Source
from dist_partial.errors import UserError


@dataclass(frozen=True, eq=False)
class Part(Wrapped):
    """Reads a part of the examples of a source.

    Which they are follows from the number of examples alone: those of ranks [first, first + count) of one fixed
    permutation, a cipher, so that nothing of the size of the source is made. A source with an order of its own keeps
    it: its part is [first, first + count) of the order.

    Args:
        source: all of the examples.
        first: the rank of the first.
        count: how many.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> whole = ArraySource(np.arange(10))
        >>> parts = Part(whole, 0, 3), Part(whole, 3, 7)
        >>> sorted(x for part in parts for x in part.fetch(np.arange(len(part)))[0].tolist())
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    source: Source
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def fetch_with(self, indices: np.ndarray, draws: np.ndarray | None) -> tuple[Any, ...]:
        """Examples `indices`, int64 [b], of the part."""
        return checked(self.source, self._indices(indices), draws)

    def place(self, index: int) -> str:
        """What the source calls example `index` of the part in messages."""
        whole = int(self._indices(np.array([index]))[0])
        place = trait(self.source, "place")
        return place(whole) if place else f"example {whole:,}"

    def _indices(self, indices: np.ndarray) -> np.ndarray:
        ranks = self.first + indices % self.count
        if trait(self.source, "own_order", False):
            return ranks
        if len(other := indices[(indices < 0) | (indices >= self.count)]):
            raise UserError(f"there is no example {other[0]} here: the {self.count:,} count from 0")
        return tf.raw_ops.RandomIndexShuffle(index=ranks, rounds=8, **self._cipher).numpy()

    @functools.cached_property
    def _cipher(self) -> dict[str, tf.Tensor]:
        """The key, the same in each run, or runs could not be compared; and the last of the numbers."""
        return {
            "seed": tf.constant([13, 17, 19], tf.int32),
            "max_index": tf.constant(len(self.source) - 1, tf.int64),
        }


def hold_out(source: Source, share: float) -> tuple[Part, Part]:
    """Divides a source into what is trained and what is held out.

    Args:
        source: the examples; with an order of its own, the last are held out, else those that a fixed permutation
            draws from all over.
        share: of the examples that are held out, in (0, 1).

    Raises:
        UserError: there are fewer than two examples.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> [len(part) for part in hold_out(ArraySource(np.arange(10)), 0.2)]
        [8, 2]
    """
    count = len(source)
    if count < 2:
        raise UserError("one example alone cannot be divided into parts to train on and to evaluate: give evaluation=")
    held = min(max(1, round(share * count)), count - 1)
    return Part(source, 0, count - held), Part(source, count - held, held)
