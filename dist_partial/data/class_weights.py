"""Weights of examples by their classes, as `class_weight` of `Model.fit`."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.data.forks import stages
from dist_partial.data.mapped import Mapped
from dist_partial.data.reading import Wrapped, checked, trait
from dist_partial.data.source import Source
from dist_partial.errors import UserError
from dist_partial.validation import shown


@dataclass(frozen=True, eq=False)
class ClassWeighted(Wrapped):
    """Weighs the examples of a source by their classes, as `class_weight` of `Model.fit` does.

    Args:
        source: of one target, a class id [] or [1], or one-hot [classes].
        weights: by class id; 1 for those that it lacks.

    Raises:
        UserError: the weights are no dict; the source has several targets, or those of an example are several.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> source = ClassWeighted(ArraySource(np.zeros([3, 1]), np.array([0, 1, 1])), {1: 5.0})
        >>> source.fetch(np.arange(3))[2].tolist()
        [1.0, 5.0, 5.0]
    """

    source: Source
    weights: Mapping[int, float]

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Mapping):
            raise UserError(f"run.class_weight is {shown(self.weights)}: write a dict such as {{0: 1.0, 1: 5.0}}")
        y = self.source.spec[1] if len(self.source.spec) > 1 else None
        if not isinstance(y, tf.TensorSpec) or y.shape.rank > 1:
            raise UserError(
                "run.class_weight weighs examples of one class each, and run.data gives targets of "
                f"{y if y is None or tf.nest.is_nested(y) else y.shape.as_list()}: have it give (x, y, weight)"
            )

    @functools.cached_property
    def spec(self) -> tuple[Any, ...]:
        """That of the source, with a weight."""
        x, y, *weight = self.source.spec
        return (x, y, *(weight or [tf.TensorSpec([], tf.float32)]))

    def fetch_with(self, indices: np.ndarray, draws: np.ndarray | None) -> tuple[Any, ...]:
        """Examples `indices`, each weight times that of the class."""
        x, y, *given = checked(self.source, indices, draws)
        flat = y.reshape(len(y), -1)
        classes = flat[:, 0] if flat.shape[1] == 1 else flat.argmax(axis=1)
        found = np.array([self.weights.get(int(each), 1.0) for each in classes], np.float32)
        if not given:
            return x, y, found
        return x, y, (given[0] * found.reshape(-1, *[1] * (given[0].ndim - 1))).astype(given[0].dtype)

    def weigh(self, x: Any, y: tf.Tensor, *given: tf.Tensor) -> tuple[Any, ...]:
        """Weighs one example in a graph, as `fetch` does a batch."""
        flat = tf.reshape(y, [-1])
        number = tf.cast(flat[0] if flat.shape[0] == 1 else tf.argmax(flat), tf.int64)
        hit, weights = tf.equal(number, [*map(int, self.weights)]), [*map(float, self.weights.values())]
        found = tf.where(tf.reduce_any(hit), tf.reduce_sum(tf.where(hit, weights, 0.0)), 1.0)
        return (x, y, given[0] * tf.cast(found, given[0].dtype) if given else found)


def class_weighted(source: Source, weights: Mapping[int, float]) -> Source:
    """Makes `ClassWeighted` of a source; behind its functions of TensorFlow, where it has some.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> source = Mapped(ArraySource(np.zeros([3, 1]), np.array([0, 1, 1])), lambda x, y: (x, 1 - y))
        >>> class_weighted(source, {1: 5.0}).fetch(np.arange(3))[2].tolist()
        [5.0, 1.0, 1.0]
    """
    weighted = ClassWeighted(source, weights)
    return Mapped(source, weighted.weigh) if stages(source)[1] or trait(source, "streamed", False) else weighted
