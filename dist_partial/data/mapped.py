"""Examples that go through a function of the user's: decoding, augmentation."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from dist_partial.data.arrays import parts_misfit, stacked
from dist_partial.data.draws import another, draws, seeds
from dist_partial.data.functions import defined_at, described, name_of
from dist_partial.data.randomness import Generators, calls_python, stateful_op
from dist_partial.data.reading import checked, trait, without_lists
from dist_partial.errors import Raised, UserError, calling
from dist_partial.validation import shown

if TYPE_CHECKING:
    from dist_partial.data.source import Source


@dataclass(frozen=True, eq=False)
class Mapped:
    """Passes the examples of a source through a function; `Dataset.map` makes it of both sources of a data set.

    Args:
        source: the examples.
        function: takes the parts of an example, x or (x, y) or (x, y, weight), and gives one to three such parts. A
            parameter called `seed` is given an int32 [2] for `tf.random.stateless_uniform` and the like; one called
            `rng` a `np.random.Generator`, where `numpy`. What they give is a function of the seed of the run, the
            epoch and the index of the example.
        numpy: whether the function takes and gives NumPy arrays, and not tensors.

    Attributes:
        described: what the function computes with now, see `functions.described`.

    Raises:
        UserError: the function does not take the examples.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> source = ArraySource(np.arange(3.0), np.arange(3))
        >>> Mapped(source, lambda x, y: (x / 2, y)).fetch(np.array([2, 1]))[0].tolist()
        [1.0, 0.5]
        >>> noisy = Mapped(source, lambda x, y, rng: (x + rng.normal(), y), numpy=True)
        >>> noisy.spec[0], noisy.random
        (TensorSpec(shape=(), dtype=tf.float64, name=None), True)
    """

    source: "Source"
    function: Callable[..., Any]
    numpy: bool = False
    described: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise UserError(
                f"Dataset.map got {shown(self.function)}: give a function, such as lambda x, y: (x / 255, y)"
            )
        object.__setattr__(self, "described", described(self.function))
        if self.numpy and trait(self.source, "streamed", False):
            raise UserError(
                f"{self.name} is to map a tf.data.Dataset with numpy=True: map that before, by tf.numpy_function, or "
                "give a function of TensorFlow"
            )
        count = len(self.source.spec)
        try:
            signature = inspect.signature(self.function)
            signature.bind(*[None] * count, **({self._drawn: None} if self._takes_draws else {}))
        except ValueError:  # a function in C may have none
            return
        except TypeError:
            parts = ", ".join(("x", "y", "weight")[:count])
            raise UserError(
                f"{self.name}{signature} does not take an example of run.data, ({parts}): write a function of "
                f"({parts}), or of ({parts}, {self._drawn}) if it draws random numbers"
                + ("" if self.numpy or "rng" not in signature.parameters else ", or say numpy=True to have an rng")
            ) from None

    @property
    def name(self) -> str:
        """The name of the function."""
        return name_of(self.function)

    def unlike(self, arrays: tuple[Any, ...]) -> str:
        """Says how the first example of a batch that the function gave differs from the very first."""
        one = _specs(tf.nest.map_structure(lambda array: array[0], arrays))
        wrong = parts_misfit(one, self.spec)
        return f"{self._words}{defined_at(self.function)}: {wrong} for the first example: give all one shape and type"

    @property
    def _drawn(self) -> str:
        return "rng" if self.numpy else "seed"

    @functools.cached_property
    def _takes_draws(self) -> bool:
        try:
            return self._drawn in inspect.signature(self.function).parameters
        except ValueError:
            return False

    @property
    def random(self) -> bool:
        """Whether the function draws random numbers, by its parameter or by Keras's random layers."""
        return self._takes_draws or not (self.numpy or self._traced[1].quiet)

    @property
    def draws(self) -> bool:
        """Whether this function or one before it draws random numbers."""
        return self.random or trait(self.source, "draws", False)

    @functools.cached_property
    def depth(self) -> int:
        """How many functions examples have gone through: each draws random numbers of its own."""
        return 1 + trait(self.source, "depth", 0)

    @functools.cached_property
    def spec(self) -> tuple[Any, ...]:
        """What the function gives: traced, or from the first example where it is of NumPy."""
        if not self.numpy:
            spec: tuple[Any, ...] = _specs(self._traced[0].structured_outputs)
            return spec
        (example,) = self._results(*self.inputs(np.zeros(1, np.int64), None))
        return _specs(example)

    def __len__(self) -> int:
        return len(self.source)

    def __reduce__(self) -> Any:  # without what is traced
        return type(self), (self.source, self.function, self.numpy)

    @property
    def thread_safe(self) -> bool:
        """Whether several threads may read: a NumPy function of the user's need not allow it."""
        return not self.numpy and bool(trait(self.source, "thread_safe", False))

    def place(self, index: int) -> str:
        """Where an example is."""
        inner = trait(self.source, "place")
        return inner(index) if inner else f"example {index:,}"

    def seeds(self, state: np.ndarray) -> np.ndarray:
        """The function's seeds, int32 [b, 2], for the examples of these draws."""
        return seeds(another(state, self.depth))

    def fetch(self, indices: np.ndarray) -> tuple[Any, ...]:
        """Examples, with the random numbers of the first epoch of a run of seed 0."""
        return self.fetch_with(indices, None)

    def fetch_with(self, indices: np.ndarray, state: np.ndarray | None) -> tuple[Any, ...]:
        """Examples, with the random numbers that follow from `draws.draws`, uint64 [b]."""
        return self.of_batch(*self.inputs(indices, state))

    def of_batch(self, parts: tuple[Any, ...], own: np.ndarray) -> tuple[Any, ...]:
        """Calls the function on each example of a batch; own uint64 [b], see `inputs`."""
        try:
            if self.numpy:
                return _stacked(self._results(parts, own))
            with calling(self._words), tf.device("CPU:0"):
                found = self._traced_batch(tf.nest.map_structure(tf.constant, parts), tf.constant(seeds(own)))
        except Raised as error:
            explain = trait(self.source, "explain") if self.depth == 1 else None
            if explain and error.__cause__ and (reason := explain(parts, error.__cause__)):
                raise UserError(f"{self._words}: {reason}") from error
            raise
        return tf.nest.map_structure(lambda tensor: tensor.numpy(), found)

    @property
    def calls_python(self) -> bool:
        """Whether Python code runs for each example, of which nobody knows whether it gives the same each time."""
        return self.numpy or calls_python(self._traced[0])

    def of_example(self, parts: tuple[Any, ...], seed: tf.Tensor) -> tuple[Any, ...]:
        """Calls a function of TensorFlow on one example, in a graph; seed int32 [2]."""
        found: tuple[Any, ...] = self._traced[0](parts, seed)
        return found

    @property
    def _words(self) -> str:
        return f"{self.name} of run.data"

    def inputs(self, indices: np.ndarray, state: np.ndarray | None) -> tuple[tuple[Any, ...], np.ndarray]:
        """A batch of the source, and this function's draws for it."""
        if state is None:
            state = draws(0, np.zeros_like(indices), indices)
        return checked(self.source, indices, state), another(state, self.depth)

    def _results(self, parts: tuple[Any, ...], own: np.ndarray) -> list[tuple[Any, ...]]:
        """What a NumPy function gives for each example of a batch, flat, but for the first, whose nest is kept."""
        flat, results = tf.nest.flatten(parts), []
        with calling(self._words):
            for i, draw in enumerate(own.tolist()):
                example = tf.nest.pack_sequence_as(parts, [array[i] for array in flat])
                drawn = {"rng": np.random.Generator(np.random.Philox(draw))} if self._takes_draws else {}
                results.append(_parts(self, self.function(*example, **drawn)))
        return results

    @functools.cached_property
    def _traced(self) -> tuple[Any, "Generators"]:
        """The function, traced on the spec of an example, and what has become of Keras's generators."""
        generators = Generators()

        @tf.function  # with autograph, as tf.data has it
        def function(seed: tf.Tensor, parts: tuple[Any, ...], drawn: dict[str, tf.Tensor]) -> Any:
            with generators.of(seed):
                return self.function(*parts, **drawn)

        @tf.function(autograph=False)
        def called(parts: tuple[Any, ...], seed: tf.Tensor) -> tuple[Any, ...]:
            return _parts(self, function(seed, parts, {"seed": seed} if self._takes_draws else {}))

        with calling(self._words), tf.device("CPU:0"):
            graph = called.get_concrete_function(without_lists(self.source.spec), tf.TensorSpec([2], tf.int32))
        for one in tf.nest.flatten(graph.structured_outputs):
            dense = isinstance(one, (tf.Tensor, tf.TensorSpec))
            if not dense or not one.shape.is_fully_defined():
                what = f"{one.dtype.name} {one.shape}" if dense else type(one).__name__
                raise UserError(
                    f"{self._words} gives {what}, and all examples must have one shape, known before they are read: "
                    "end it with tf.image.resize, a slice or padding, and tf.ensure_shape(x, [...])"
                )
        if found := stateful_op(graph):
            raise UserError(
                f"{self._words} draws random numbers or changes a variable ({found}), which gives something else each "
                "time: write a parameter seed, and draw with tf.random.stateless_uniform(shape, seed) and the like"
            )
        return graph, generators

    @functools.cached_property
    def _traced_batch(self) -> Any:
        """The function over the examples of a batch of any size, for where tf.data does not call it."""

        def batched(one: tf.TensorSpec) -> tf.TensorSpec:
            return tf.TensorSpec([None, *one.shape], one.dtype)

        @tf.function(autograph=False)
        def called(parts: tuple[Any, ...], own: tf.Tensor) -> tuple[Any, ...]:
            found: tuple[Any, ...] = tf.map_fn(
                lambda each: self.of_example(*each), (parts, own), fn_output_signature=self.spec
            )
            return found

        # Traced once, or TensorFlow would warn: it takes the functions of all data sets for one.
        spec = tf.nest.map_structure(batched, without_lists(self.source.spec))
        return called.get_concrete_function(spec, tf.TensorSpec([None, 2], tf.int32))


def functions_of(source: Any) -> list[Mapped]:
    """Lists the functions that examples of a source go through, in order; one after the other where it joins sources.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> source = Mapped(Mapped(ArraySource(np.arange(3.0)), tf.exp), lambda x: x / 2)
        >>> [function.name for function in functions_of(source)]
        ['exp', '<lambda>']
    """
    inner = source.sources if hasattr(source, "sources") else [getattr(source, "source", None)]
    before = [function for each in inner if hasattr(each, "fetch") for function in functions_of(each)]
    return [*before, source] if isinstance(source, Mapped) else before


def _parts(mapped: Mapped, found: Any) -> tuple[Any, ...]:
    """What a function gives for an example as a tuple of its parts."""
    parts = without_lists(tuple(found)) if isinstance(found, (tuple, list)) else (found,)
    if not 1 <= len(parts) <= 3 or any(part is None for part in parts):
        raise UserError(
            f"{mapped.name} of run.data gives {shown(found)}: return x, (x, y) or (x, y, weight) of an example"
        )
    return parts


def _stacked(results: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Examples as a batch."""
    columns = zip(*map(tf.nest.flatten, results), strict=True)
    found: tuple[Any, ...] = tf.nest.pack_sequence_as(results[0], [stacked(column) for column in columns])
    return found


def _specs(example: Any) -> tuple[Any, ...]:
    """The spec of an example of arrays or of tensors of a graph; without the names of the latter."""

    def spec(each: Any) -> tf.TensorSpec:
        if isinstance(each, (tf.Tensor, tf.TensorSpec)):
            return tf.TensorSpec(each.shape, each.dtype)
        array = np.asarray(each)
        return tf.TensorSpec(array.shape, tf.string if array.dtype.kind in "OSU" else array.dtype)

    found: tuple[Any, ...] = tf.nest.map_structure(spec, example)
    return found
