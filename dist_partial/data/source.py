"""What a data set is: examples that are fetched by index."""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import tensorflow as tf

from dist_partial.data.codecs import Codec
from dist_partial.errors import UserError


class Source(Protocol):
    """Gives random access to examples, the only thing the pipeline needs.

    Examples:
        >>> class Squares:
        ...     spec = tf.TensorSpec([1], tf.float32), tf.TensorSpec([], tf.float32)
        ...     def __len__(self):
        ...         return 100
        ...     def fetch(self, indices):
        ...         return indices[:, None].astype(np.float32), (indices**2).astype(np.float32)
        >>> from dist_partial.data import fetch
        >>> fetch(Squares(), np.array([3, 2]))[1].tolist()  # which compares it with the spec
        [9.0, 4.0]
    """

    @property
    def spec(self) -> tuple[tf.TensorSpec, ...]:
        """(x, y) or (x, y, weight) of one example, without a batch axis.

        The weight is a float of shape (), or of the shape of the loss of y where each target has its own.
        """

    def __len__(self) -> int: ...

    def fetch(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        """Reads examples.

        Args:
            indices: int64 [b], each in [0, len(self)), in any order.

        Returns:
            The arrays of `spec`, stacked along a new axis 0 of length b.
        """


@dataclass(frozen=True)
class Dataset:
    """Names a data set and holds its sources, as the factory in `run.data` returns it.

    Args:
        name: for people.
        train: examples to learn from.
        evaluation: examples held out.
        fingerprint: hex SHA-256 of the content; a run folder refuses to resume with another.
        codec: text to ids and back; None where nothing can be sampled as text.
        unit: what one target is: 'byte' means that loss / ln 2 is bits per byte.

    Examples:
        >>> x, y = np.zeros([100, 4], np.float32), np.zeros([100], np.int32)
        >>> parts = ArraySource(x[:90], y[:90]), ArraySource(x[90:], y[90:])
        >>> data = Dataset("mine", *parts, fingerprint(x, y), codec=None)
        >>> len(data.train), len(data.evaluation)
        (90, 10)
    """

    name: str
    train: Source
    evaluation: Source
    fingerprint: str
    codec: Codec | None = None
    unit: Literal["byte"] | None = None


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Reads examples from arrays in memory.

    Args:
        x: inputs [n, ...].
        y: targets [n, ...].
        weight: float [n], or where each target has its own of the shape of y, or of its first axes; further axes of 1
            at the end are as none. None weighs all alike.

    Raises:
        UserError: the arrays do not belong together.

    Examples:
        >>> source = ArraySource(np.arange(6.0, dtype=np.float32).reshape(3, 2), np.array([0, 1, 2], np.int32))
        >>> [array.tolist() for array in source.fetch(np.array([2, 0]))]
        [[[4.0, 5.0], [0.0, 1.0]], [2, 0]]
    """

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, array in (("x", self.x), ("y", self.y), ("weight", self.weight)):
            optional = name == "weight" and array is None
            if not optional and not (hasattr(array, "shape") and hasattr(array, "dtype")):
                raise UserError(
                    f"ArraySource got {name} as a {type(array).__name__}: give one array, such as np.asarray makes; a "
                    "run feeds models of one input"
                )
        shapes = [array.shape for array in self._arrays]
        if len({shape[:1] for shape in shapes}) != 1 or shapes[0] == ():
            raise UserError(f"ArraySource got shapes {shapes}: axis 0 counts the examples, alike in all")
        if self.weight is None:
            return
        shape = self.weight.shape
        while len(shape) > 1 and shape[-1] == 1:
            shape = shape[:-1]
        if shape != self.y.shape[: len(shape)]:
            raise UserError(
                f"ArraySource got weight {self.weight.shape} for y {self.y.shape}: give one an example "
                f"{self.y.shape[:1]}, or one a target {self.y.shape}, of which the last axes may be left out"
            )

    @property
    def _arrays(self) -> tuple[np.ndarray, ...]:
        return (self.x, self.y) if self.weight is None else (self.x, self.y, self.weight)

    @property
    def spec(self) -> tuple[tf.TensorSpec, ...]:
        """(x, y) or (x, y, weight) of one example."""
        return tuple(tf.TensorSpec(array.shape[1:], array.dtype) for array in self._arrays)

    def __len__(self) -> int:
        return len(self.x)

    def fetch(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        """Rows `indices`, int64 [b], of every array."""
        return tuple(array[indices] for array in self._arrays)


def check_source(name: str, source: Any) -> None:
    """Raises UserError unless `source` has one x, one y and perhaps one weight; `name` says whose it is.

    Examples:
        >>> check_source("train", ArraySource(np.zeros([5, 2]), np.zeros([5])))
        >>> check_source("train", [1, 2])
        Traceback (most recent call last):
        dist_partial.errors.UserError: train is a list: a Dataset holds sources, with spec, fetch(indices) and ...
    """
    if not all(hasattr(source, each) for each in ("spec", "fetch", "__len__")):
        raise UserError(
            f"{name} is a {type(source).__name__}: a Dataset holds sources, with spec, fetch(indices) and a length, "
            "such as dist_partial.ArraySource(x, y)"
        )
    spec = source.spec if isinstance(source.spec, (tuple, list)) else (source.spec,)
    if not all(isinstance(each, tf.TensorSpec) for each in spec):
        raise UserError(
            f"{name} has a spec of ({', '.join(type(each).__name__ for each in spec)}): write one tf.TensorSpec for x, "
            "one for y, and one for a weight; a run feeds models of one input"
        )


def fingerprint(*parts: np.ndarray | bytes | str | int | float) -> str:
    """Computes the hex SHA-256 of the parts: content, order, and for arrays type and shape too.

    Examples:
        >>> fingerprint("a set", np.arange(3)) == fingerprint("a set", np.arange(3))
        True
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            head, content = f"{part.dtype.str}{part.shape}", np.ascontiguousarray(part).tobytes()
        elif isinstance(part, bytes):
            head, content = "bytes", part
        else:
            head, content = type(part).__name__, str(part).encode()
        # Without lengths ("ab", "c") would equal ("a", "bc").
        digest.update(f"{head}:{len(content)}:".encode() + content)
    return digest.hexdigest()
