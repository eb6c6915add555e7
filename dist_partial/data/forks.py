"""What tf.data does with examples that were read: it calls functions of TensorFlow, several at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from dist_partial.data.draws import another, draws, seeds
from dist_partial.data.mapped import Mapped
from dist_partial.data.order import InOrder
from dist_partial.data.reading import checked, trait, without_lists

if TYPE_CHECKING:
    from dist_partial.data.source import Source


def stages(source: "Source") -> tuple["Source", list[Any]]:
    """Finds what is read by `fetch`, and the functions of TensorFlow that its examples go through then, in order.

    Each has `seeds` and `of_example`, as `Mapped` has. Of mixed sources the first is a `Fork`.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> base = ArraySource(np.arange(3.0))
        >>> found, functions = stages(Mapped(Mapped(base, lambda x: x + 1, numpy=True), lambda x: x / 2))
        >>> found.source is base, [function.numpy for function in functions]
        (True, [False])
    """
    functions: list[Any] = []
    while isinstance(inner := source.source if isinstance(source, InOrder) else source, Mapped) and not inner.numpy:
        functions.insert(0, inner)
        source = InOrder(inner.source) if isinstance(source, InOrder) else inner.source
    if (forked := getattr(source, "forked", None)) is not None:
        source, fork = forked
        functions.insert(0, fork)
    return source, functions


class Following:
    """Has several sources, one after the other: the base of what reads them.

    Attributes:
        sources: what is read.
        offsets: where each begins, and the end.
        shown: of each what messages call it.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> both = Following()
        >>> both.sources, both.offsets, both.shown = [ArraySource(np.arange(3))] * 2, [0, 3, 6], ["'a'", "'b'"]
        >>> len(both), both.place(4)
        (6, "example 1 of data set 'b'")
    """

    sources: Sequence["Source"]
    offsets: Any  # a field of one, and in another computed when it is first needed
    shown: Any

    @property
    def thread_safe(self) -> bool:
        """Whether several threads may read all of them."""
        return all(trait(source, "thread_safe", False) for source in self.sources)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def place(self, index: int) -> str:
        """Where an example is."""
        number = int(np.searchsorted(self.offsets, index, side="right")) - 1
        index -= self.offsets[number]
        inner = trait(self.sources[number], "place")
        return f"{inner(index) if inner else f'example {index:,}'} of data set {self.shown[number]}"


@dataclass(frozen=True, eq=False)
class Forks(Following):
    """Reads of each example which source it is of, the seeds for the functions of that, and what they take.

    What the functions of the other sources take is there too, and empty: an element of tf.data has one form.

    Args:
        sources: what is read of each.
        offsets: where each begins, and the end.
        depths: of the functions that the examples of each go through, see `Mapped.depth`.
        shown: of each what messages call it.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> sources = ArraySource(np.arange(3)), ArraySource(np.array(["a", "b"]))
        >>> forks = Forks(sources, [0, 3, 5], [[], [1]], ["1", "2"])
        >>> number, _, ((first,), (second,)) = forks.fetch(np.array([4, 2]))
        >>> number.tolist(), first.tolist(), second.tolist()
        ([1, 0], [0, 2], ['b', b''])
    """

    sources: Sequence["Source"]
    offsets: Sequence[int]
    depths: Sequence[Sequence[int]]
    shown: Sequence[str]

    @property
    def spec(self) -> tuple[Any, ...]:
        """(which source, seeds, what is read of each)."""
        most = max(map(len, self.depths))
        parts = tuple(without_lists(source.spec) for source in self.sources)
        return tf.TensorSpec([], tf.int32), tf.TensorSpec([most, 2], tf.int32), parts

    def fetch(self, indices: np.ndarray) -> tuple[Any, ...]:
        """Examples, with the random numbers of the first epoch of a run of seed 0."""
        return self.fetch_with(indices, draws(0, np.zeros_like(indices), indices))

    def fetch_with(self, indices: np.ndarray, state: np.ndarray) -> tuple[Any, ...]:
        """The same, with the random numbers that follow from `draws.draws`, uint64 [b]."""
        numbers = np.searchsorted(self.offsets, indices, side="right") - 1
        drawn = np.zeros([len(indices), *self.spec[1].shape], np.int32)
        parts = []
        for number, (source, depths) in enumerate(zip(self.sources, self.depths, strict=True)):
            own = np.flatnonzero(numbers == number)
            empty = [_empty(len(indices), one) for one in tf.nest.flatten(source.spec)]
            if len(own):
                found = checked(source, indices[own] - self.offsets[number], state[own])
                for into, array in zip(empty, tf.nest.flatten(found), strict=True):
                    into[own] = array
            for place, depth in enumerate(depths):
                drawn[own, place] = seeds(another(state[own], depth))
            parts.append(tf.nest.pack_sequence_as(without_lists(source.spec), empty))
        return numbers.astype(np.int32), drawn, tuple(parts)


def _empty(count: int, spec: tf.TensorSpec) -> np.ndarray:
    if spec.dtype == tf.string:
        return np.full([count, *spec.shape], b"", object)
    return np.zeros([count, *spec.shape], spec.dtype.as_numpy_dtype)


@dataclass(frozen=True, eq=False)
class Fork:
    """Has an example that `Forks` has read go through the functions of its source.

    Args:
        functions: of TensorFlow, those of each source in order: `Mapped`.
    """

    functions: Sequence[Sequence[Any]]

    def seeds(self, state: np.ndarray) -> np.ndarray:
        """Seeds that nothing uses, for those of the functions come with the example."""
        return seeds(state)

    def of_example(self, parts: Any, seed: tf.Tensor) -> tuple[Any, ...]:
        """Calls the functions of one source."""
        number, drawn, of_sources = parts

        def through(own: Any, functions: Sequence[Any]) -> Any:
            for i, function in enumerate(functions):
                own = function.of_example(own, drawn[i])
            return tf.nest.map_structure(tf.identity, own)

        found: tuple[Any, ...] = tf.switch_case(
            number,
            [
                lambda own=own, functions=functions: through(own, functions)
                for own, functions in zip(of_sources, self.functions, strict=True)
            ],
        )
        return found
