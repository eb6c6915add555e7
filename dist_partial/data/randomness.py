"""Random numbers within functions on examples: those of Keras's layers, and those that cannot be repeated."""

import pickle
import random
import re
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial.compat import is_generator

# What gives something else each time, or changes something for the next example, by the names of TensorFlow's ops.
_BY_ITSELF = re.compile(
    r"Random(?!IndexShuffle)|Stateful(?!PartitionedCall)|Rng|TruncatedNormal|Multinomial|SampleDistorted|Assign"
    r"|\w*CandidateSampler|Timestamp"
)
_FUNCTIONS = attrgetter("library.function")  # of a graph's definition: those that it calls
_TRIES = 16  # of what has drawn from global generators, which may decide one thing or another


class Generators(keras.StatelessScope):
    """Gives the generators of Keras's random layers the seed of the example, and keeps nothing of what they become.

    Attributes:
        quiet: whether none has been used.

    Examples:
        >>> generator, generators = keras.random.SeedGenerator(0), Generators()
        >>> with generators.of(tf.constant([3, 4])):
        ...     print(generator.next().numpy(), generators.quiet)
        [3 4] False
    """

    def __init__(self) -> None:
        super().__init__()
        self.quiet = True
        self._states: dict[int, tf.Tensor] = {}
        self._seed: Any = None

    def of(self, seed: tf.Tensor) -> "Generators":
        """The scope for a seed, int32 [2]."""
        self.state_mapping.clear()
        self._states.clear()
        self._seed = seed
        return self

    def get_current_value(self, variable: Any) -> Any:
        found = super().get_current_value(variable)
        if found is not None or not is_generator(variable):
            return found
        self.quiet = False
        apart = tf.constant([len(self._states) << 32, 0], tf.int64)  # each draws by itself
        return self._states.setdefault(id(variable), tf.cast(tf.cast(self._seed, tf.int64) + apart, variable.dtype))


def stateful_op(graph: Any) -> str:
    """Finds an operation of a traced function that gives something else each time, or changes something; '' if none.

    Examples:
        >>> stateful_op(tf.function(lambda: tf.random.uniform([])).get_concrete_function())
        'RandomUniform'
    """
    return next((node.op for node in _nodes(graph) if _BY_ITSELF.match(node.op)), "")


def calls_python(graph: Any) -> bool:
    """Tells whether a traced function calls Python code when it runs.

    Examples:
        >>> calls_python(tf.function(lambda: tf.numpy_function(np.sin, [0.0], tf.float32)).get_concrete_function())
        True
    """
    return any("PyFunc" in node.op for node in _nodes(graph))


def _nodes(graph: Any) -> list[Any]:
    definition = graph.graph.as_graph_def()
    return [*definition.node, *(node for function in _FUNCTIONS(definition) for node in function.node_def)]


def varies(call: Callable[[], Any]) -> bool:
    """Tells whether a call gives something else another time, or with other numbers of `np.random` and `random`.

    What these two give afterwards is what they would have given without it.

    Examples:
        >>> varies(lambda: np.sin(1.0)), varies(lambda: np.random.normal()), varies(lambda: random.random() < 0.5)
        (False, True, True)
    """
    kept = random.getstate(), np.random.get_state()
    try:
        results = []
        for seed in range(_TRIES):
            random.seed(seed)
            np.random.seed(seed)
            before = _global_state()
            results.append(tf.nest.flatten(call()))
            if not all(map(_same, results[0], results[-1])):
                return True
            if seed and _global_state() == before:  # or else chance may have made them the same
                break
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
    return False


def _global_state() -> bytes:
    return pickle.dumps((random.getstate(), np.random.get_state()))


def _same(one: Any, other: Any) -> bool:
    one, other = np.asarray(one), np.asarray(other)
    return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")
