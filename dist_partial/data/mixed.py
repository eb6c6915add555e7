"""Several data sets as one: one after the other, or mixed in given shares."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.data.arrays import alike, parts_misfit
from dist_partial.data.forks import Following, Fork, Forks, stages
from dist_partial.data.order import places
from dist_partial.data.reading import Wrapped, checked, innermost, trait
from dist_partial.data.source import Dataset, Source, check_source, fingerprint
from dist_partial.errors import UserError
from dist_partial.validation import shown

_BITS = 24  # of a share, so that positions up to 2 ** 39 have exact products


@dataclass(frozen=True, eq=False)
class Joined(Following):
    """Puts sources of the same spec one after the other.

    Args:
        sources: with random access.
        names: of them in messages; none: their numbers, from 1 on.

    Raises:
        UserError: their specs differ, or one of them has an order of its own.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> both = Joined([ArraySource(np.arange(3)), ArraySource(np.arange(10, 12))])
        >>> len(both), both.fetch(np.array([4, 0]))[0].tolist()
        (5, [11, 0])
    """

    sources: Sequence[Source]
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        for number, source in enumerate(self.sources):
            name = self._name(number)
            check_source(f"{name} of mix", source)
            if not len(source):
                raise UserError(f"mix: {name} is empty")
            if trait(source, "streamed", False):
                raise UserError(f"mix: {name} is a tf.data.Dataset, which cannot be read from any place on")
            if any(
                getattr(base, "own_order", False) and not getattr(base, "batched", False) for base in innermost(source)
            ):
                raise UserError(
                    f"mix: {name} has an order of its own from epoch to epoch (grain): mix it there, or "
                    "give what it is made of before it is shuffled"
                )
            if not alike(source.spec, self.spec):
                raise UserError(
                    f"mix: {name}: {parts_misfit(source.spec, self.spec)} in {self._name(0)}: map them to one form by "
                    "Dataset.map"
                )

    def _name(self, number: int) -> str:
        return f"data set {self.shown[number]}"

    @functools.cached_property
    def shown(self) -> list[str]:
        """What messages call each."""
        return [repr(name) for name in self.names] or [str(number + 1) for number in range(len(self.sources))]

    @property
    def spec(self) -> tuple[Any, ...]:
        """That of all of them."""
        return self.sources[0].spec

    @functools.cached_property
    def offsets(self) -> list[int]:
        """Where each begins, and the end."""
        return [0, *itertools.accumulate(map(len, self.sources))]

    @functools.cached_property
    def forked(self) -> tuple[Forks, Fork] | None:
        """What is read of the sources, and the functions of TensorFlow that follow; None if there are none."""
        sources, functions = zip(*map(stages, self.sources), strict=True)
        if not any(functions) or any(isinstance(each, Fork) for of_one in functions for each in of_one):
            return None
        depths = [[each.depth for each in of_one] for of_one in functions]
        return Forks(sources, self.offsets, depths, self.shown), Fork(functions)

    @property
    def draws(self) -> bool:
        """Whether one of them draws random numbers."""
        return any(trait(source, "draws", False) for source in self.sources)

    @property
    def depth(self) -> int:
        """The functions that examples of one of them go through, at most."""
        return max(trait(source, "depth", 0) for source in self.sources)

    def fetch(self, indices: np.ndarray) -> tuple[Any, ...]:
        """Examples, those of a source at once."""
        return self.fetch_with(indices, None)

    def fetch_with(self, indices: np.ndarray, draws: np.ndarray | None) -> tuple[Any, ...]:
        """The same, with the random numbers that follow from `draws.draws`."""
        numbers = np.searchsorted(self.offsets, indices, side="right") - 1
        where = [np.flatnonzero(numbers == number) for number in range(len(self.sources))]
        parts = [
            checked(source, indices[own] - offset, None if draws is None else draws[own])
            for source, offset, own in zip(self.sources, self.offsets, where, strict=False)
            if len(own)
        ]
        back = np.argsort(np.concatenate(where))
        found: tuple[Any, ...] = tf.nest.map_structure(lambda *arrays: np.concatenate(arrays)[back], *parts)
        return found


@dataclass(frozen=True, eq=False)
class Mixed(Wrapped):
    """Mixes the examples of several sources: of any so many positions each has its share, up to one for each source.

    Each is shuffled by itself and begins again at its end, whatever the others do; so all its examples come equally
    often.

    Args:
        source: the sources.
        weights: how much of a batch each is, relative to the others; above 0.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> mixed = Mixed(Joined([ArraySource(np.arange(4)), ArraySource(np.arange(10, 12))]), [3, 1])
        >>> indices, epochs = mixed.places(tf.range(8, dtype=tf.int64), seed=0)
        >>> np.sort(mixed.fetch(indices.numpy())[0]).tolist(), mixed.epoch
        ([0, 0, 1, 2, 2, 3, 10, 11], 6)
    """

    source: Joined
    weights: Sequence[float]
    own_order = True

    @property
    def forked(self) -> Any:
        """See `Joined.forked`."""
        return self.source.forked

    def places(self, positions: tf.Tensor, seed: int) -> tuple[tf.Tensor, tf.Tensor]:
        """Which examples of the sources come at positions of a run, and in which epochs of theirs."""
        indices = epochs = tf.zeros_like(positions)
        left = tf.ones_like(positions, tf.bool)
        for number, (source, own, mine) in enumerate(zip(self.source.sources, *self._taken(positions), strict=True)):
            index, epoch = places(source, own, seed + (number << 32))  # each is shuffled in another way
            chosen, left = left & mine, left & ~mine
            indices = tf.where(chosen, self.source.offsets[number] + index % len(source), indices)
            epochs = tf.where(chosen, epoch, epochs)
        return indices, epochs

    def _taken(self, positions: Any) -> tuple[list[Any], list[Any]]:
        """For each source how many examples it has given before positions, and whether it gives that at them.

        One source after the other takes its share of the positions that those before it leave.
        """
        before, takes = [], []
        for number, weight in enumerate(self.weights):
            share = round(weight / sum(self.weights[number:]) * 2**_BITS)
            before.append((positions * share) // 2**_BITS)
            takes.append(((positions + 1) * share) // 2**_BITS > before[-1])
            positions = positions - before[-1]
        return before, takes

    @functools.cached_property
    def epoch(self) -> int:
        """How many positions it takes until all examples of all sources have come."""
        sizes, low, high = [len(source) for source in self.source.sources], 0, 1

        def all_of_them(positions: int) -> bool:
            return all(taken >= size for taken, size in zip(self._taken(positions)[0], sizes, strict=True))

        while not all_of_them(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if all_of_them(middle) else (middle, high)
        return high


def mix(parts: Sequence[tuple[Dataset, float]], name: str | None = None) -> Dataset:
    """Mixes data sets in given shares.

    Training reads each in an order of its own, again and again; evaluation reads all held-out examples, once each.

    Args:
        parts: data sets of the same spec, each with its weight: how much of a batch it is, relative to the others.
        name: for people; None puts theirs together.

    Raises:
        UserError: a weight is not above 0, or the data sets are unlike.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> few, many = (Dataset(f"{n}", ArraySource(np.arange(n)), ArraySource(np.arange(2)), f"{n}") for n in (2, 50))
        >>> both = mix([(few, 1), (many, 3)])
        >>> both.name, len(both.evaluation), both.train.epoch
        ('2 + 50', 4, 66)
    """
    if not isinstance(parts, (list, tuple)) or not parts:
        raise UserError(f"mix got {shown(parts)}: give a list of data sets with weights, [(data, 3), (other, 1)]")
    for number, part in enumerate(parts, 1):
        if wrong := _refusal(part):
            raise UserError(f"mix got as entry {number} {wrong}")
    sets, weights = zip(*parts, strict=True)
    first, total = sets[0], sum(weights)
    if min(weights) / total < 2.0**-16:
        raise UserError(f"mix got the weights {list(weights)}: the least is less than one in {2**16:,}")
    return Dataset(
        name=name or " + ".join(each.name for each in sets),
        train=Mixed(Joined([each.train for each in sets], [each.name for each in sets]), weights),
        evaluation=Joined([each.evaluation for each in sets], [each.name for each in sets]),
        fingerprint=fingerprint("mix", *[each.fingerprint for each in sets], *weights),
        codec=first.codec if all(each.codec == first.codec for each in sets) else None,
        unit=first.unit if all(each.unit == first.unit for each in sets) else None,
    )


def _refusal(part: Any) -> str:
    """Says what an entry of `mix` is, and what to give instead; '' where it is a data set with a weight."""
    if isinstance(part, Dataset):
        return f"{part!r} without a weight: give (data, 1)"
    if not isinstance(part, (list, tuple)) or len(part) != 2:
        return f"{shown(part)}: give a pair (Dataset, weight)"
    data, weight = part
    if not isinstance(data, Dataset):
        return f"a {type(data).__name__} with a weight: make a Dataset of it by dist_partial.data.dataset(...)"
    if not isinstance(weight, (int, float)) or not weight > 0:
        return f"data set {data.name!r} with weight {shown(weight)}: give a number above 0, or leave the data set out"
    return ""
