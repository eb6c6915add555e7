"""What a data set is: examples that are fetched by index."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import tensorflow as tf

from dist_partial.data.arrays import alike, parts_misfit
from dist_partial.data.codecs import Codec
from dist_partial.data.functions import defined_at
from dist_partial.data.mapped import Mapped
from dist_partial.data.order import InOrder
from dist_partial.data.reading import trait
from dist_partial.errors import UserError
from dist_partial.validation import shown


class Source(Protocol):
    """Gives random access to examples, the only thing the pipeline needs.

    It may have more: `place(index)`, where an example is, for errors (`'train-3.tfrecord, record 17'`);
    `thread_safe = True`, for several threads to call `fetch` at once; `own_order = True`, for indices that are
    positions of the run, unshuffled and growing beyond the length; `fetch_with(indices, draws)`, for random numbers
    (`draws.draws`); and `explain(parts, error)`, what is wrong with a batch that it has fetched, on which a function of
    `Dataset.map` has raised an error, or ''. A source that wraps another one has it in `source`, which is asked for
    what the wrapper lacks.

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
    def spec(self) -> tuple[Any, ...]:
        """(x,), (x, y) or (x, y, weight) of one example, without a batch axis.

        Each is a `tf.TensorSpec`, or a dict, tuple or list of them, as `Model.fit` takes arrays: named as the model
        names its inputs and outputs. A weight is a float of shape (), or of the shape of the loss of y where each
        target has its own.
        """

    def __len__(self) -> int: ...

    def fetch(self, indices: np.ndarray) -> tuple[Any, ...]:
        """Reads examples.

        Args:
            indices: int64 [b], each in [0, len(self)), in any order.

        Returns:
            The arrays of `spec`, stacked along a new axis 0 of length b.
        """


@dataclass(frozen=True, repr=False)
class Dataset:
    """Names a data set and holds its sources, as the factory in `run.data` returns it.

    Args:
        name: for people.
        train: examples to learn from.
        evaluation: examples held out.
        fingerprint: hex SHA-256 of the content; a run folder refuses to resume with another.
        codec: text to ids and back; None where nothing can be sampled as text.
        unit: what one target is: 'byte' means that loss / ln 2 is bits per byte.
        classes: the names of the class ids 0, 1 and so on, where targets are such and have names.

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
    classes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, train={self.train!r}, evaluation={self.evaluation!r})"

    @property
    def window(self) -> int | None:
        """Symbols of an example, where its text has one target and not one a symbol: what a model reads at once."""
        x, y = (*self.train.spec, None)[:2]
        alone = isinstance(x, tf.TensorSpec) and isinstance(y, tf.TensorSpec)
        return x.shape[0] if alone and y.shape.rank < x.shape.rank else None

    def map(
        self, function: Callable[..., Any], evaluation: Callable[..., Any] | None = None, numpy: bool = False
    ) -> "Dataset":
        """Makes a data set whose examples go through a function: see `Mapped`.

        Args:
            function: of the parts of an example.
            evaluation: the function for the examples held out; None: the same, or if that draws random numbers none.
            numpy: whether the functions take and give NumPy arrays, and not tensors.

        Raises:
            UserError: a function does not take the examples, or those held out are then unlike the others.

        Examples:
            >>> x, y = np.zeros([100, 4], np.uint8), np.zeros([100], np.int32)
            >>> data = Dataset("mine", ArraySource(x, y), ArraySource(x, y), fingerprint(x, y))
            >>> scaled = data.map(lambda x, y: (tf.cast(x, tf.float32) / 255, y))
            >>> scaled.evaluation.spec[0].dtype
            tf.float32
            >>> def noisy(x, y, seed):
            ...     return x + tf.random.stateless_normal([4], seed), y
            >>> scaled.map(noisy).evaluation is scaled.map(noisy).train  # it draws: not for the examples held out
            False
        """
        train = Mapped(self.train, function, numpy)
        if evaluation is None and not train.random:
            evaluation = function
        held_out = self.evaluation if evaluation is None else Mapped(self.evaluation, evaluation, numpy)
        if not alike(held_out.spec, train.spec):
            wrong = f"{train.name} of run.data{defined_at(function)}: {parts_misfit(train.spec, held_out.spec)}"
            if evaluation is None and alike(held_out.spec, self.train.spec):
                raise UserError(
                    f"{wrong} before it, as in the examples held out, for which no random numbers are drawn: return "
                    "all parts with their types and shapes, or give Dataset.map an evaluation= that changes them alike"
                )
            raise UserError(f"{wrong} in the examples held out: give Dataset.map an evaluation= that makes them alike")
        names = [train.name, getattr(held_out, "name", "")]
        content = fingerprint(self.fingerprint, *names, str(train.spec))
        return dataclasses.replace(self, train=train, evaluation=held_out, fingerprint=content)

    def in_order(self) -> "Dataset":
        """Makes the data set whose examples are trained on as they are, one epoch after the other, and not shuffled.

        Examples:
            >>> x = np.arange(6)
            >>> data = Dataset("mine", ArraySource(x), ArraySource(x), fingerprint(x)).in_order()
            >>> from dist_partial.data import train_batches
            >>> batches = train_batches(
            ...     data.train, first_step=0, global_batch=4, seed=0, context=tf.distribute.InputContext()
            ... )
            >>> [batch[0].numpy().tolist() for batch in batches.take(2)]
            [[0, 1, 2, 3], [4, 5, 0, 1]]
        """
        if trait(self.train, "own_order", False):
            return self
        content = fingerprint(self.fingerprint, "in order")
        return dataclasses.replace(self, train=InOrder(self.train), fingerprint=content)


@dataclass(frozen=True, eq=False, repr=False)
class ArraySource:
    """Reads examples from arrays in memory: each argument an array, or a dict, tuple or list of arrays.

    Args:
        x: inputs [n, ...]; numbers, booleans or strings.
        y: targets [n, ...]; None where the model needs none.
        weight: float [n], or where each target has its own of the shape of y, or of its first axes; further axes of 1
            at the end are as none. None weighs all alike.

    Raises:
        UserError: the arrays do not belong together.

    Examples:
        >>> source = ArraySource(np.arange(6.0, dtype=np.float32).reshape(3, 2), np.array([0, 1, 2], np.int32))
        >>> [array.tolist() for array in source.fetch(np.array([2, 0]))]
        [[[4.0, 5.0], [0.0, 1.0]], [2, 0]]
        >>> source = ArraySource({"age": np.array([31, 54]), "name": np.array(["Ada", "Grace"])}, np.array([0.5, 1.0]))
        >>> source.spec[0]["name"].dtype
        tf.string
    """

    x: Any
    y: Any = None
    weight: Any = None

    def __repr__(self) -> str:
        return f"ArraySource({len(self):,} examples {described(self.spec)})"

    def __post_init__(self) -> None:
        for name, arrays in (("x", self.x), ("y", self.y), ("weight", self.weight)):
            for array in [] if arrays is None and name != "x" else tf.nest.flatten(arrays):
                if not (hasattr(array, "shape") and hasattr(array, "dtype")):
                    raise UserError(
                        f"ArraySource got a {type(array).__name__} in {name}: give an array, such as np.asarray makes, "
                        "or a dict, tuple or list of arrays"
                    )
        if self.y is None and self.weight is not None:
            raise UserError("ArraySource got a weight and no y: give the targets that it weighs")
        shapes = [array.shape for array in tf.nest.flatten(self.arrays)]
        if len({shape[:1] for shape in shapes}) != 1 or shapes[0] == ():
            raise UserError(f"ArraySource got shapes {shapes}: axis 0 counts the examples, alike in all")
        if self.weight is None or tf.nest.is_nested(self.weight) or tf.nest.is_nested(self.y):
            return
        shape = self.weight.shape
        while len(shape) > 1 and shape[-1] == 1:
            shape = shape[:-1]
        if shape != self.y.shape[: len(shape)]:
            raise UserError(
                f"ArraySource got weight {self.weight.shape} for y {self.y.shape}: give one an example "
                f"{self.y.shape[:1]}, or one a target {self.y.shape}, of which the last axes may be left out"
            )

    @functools.cached_property
    def arrays(self) -> tuple[Any, ...]:
        """(x,), (x, y) or (x, y, weight) of all examples."""
        return tuple(each for each in (self.x, self.y, self.weight) if each is not None)

    @functools.cached_property
    def spec(self) -> tuple[Any, ...]:
        """(x,), (x, y) or (x, y, weight) of one example."""
        return tf.nest.map_structure(
            lambda array: tf.TensorSpec(array.shape[1:], tf.string if array.dtype.kind in "OSU" else array.dtype),
            self.arrays,
        )

    def __len__(self) -> int:
        return len(tf.nest.flatten(self.x)[0])

    def fetch(self, indices: np.ndarray) -> tuple[Any, ...]:
        """Rows `indices`, int64 [b], of every array."""
        return tuple(_rows(arrays, indices) for arrays in self.arrays)


def _rows(arrays: Any, indices: np.ndarray) -> Any:
    if isinstance(arrays, np.ndarray):  # by far the most frequent, and called for each batch
        return arrays[indices]
    return tf.nest.map_structure(lambda array: array[indices], arrays)


def check_source(name: str, source: Any) -> None:
    """Raises UserError unless `source` has x and perhaps y and a weight; `name` says whose it is.

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
    spec = source.spec
    flat = tf.nest.flatten(spec)
    if not isinstance(spec, tuple) or not 1 <= len(spec) <= 3 or not all(isinstance(s, tf.TensorSpec) for s in flat):
        raise UserError(
            f"{name} has a spec of {shown(spec)}: write a tuple (x, y), or (x, y, weight), each a tf.TensorSpec or a "
            "dict, tuple or list of them"
        )


def described(spec: Any) -> str:
    """Writes a nest of tensors or their specs as messages show it.

    Examples:
        >>> described({"age": tf.TensorSpec([2], tf.int32)})
        "{'age': int32 [2]}"
    """
    if isinstance(spec, dict):
        return "{" + ", ".join(f"{name!r}: {described(each)}" for name, each in spec.items()) + "}"
    if isinstance(spec, (list, tuple)):
        return f"({', '.join(map(described, spec))})"
    return f"{spec.dtype.name} {spec.shape.as_list()}"


def fingerprint(*parts: Any) -> str:
    """Computes the hex SHA-256 of the parts: content, order, and for arrays type and shape too.

    Args:
        *parts: arrays, bytes, text, numbers; dicts, tuples and lists of such.

    Examples:
        >>> fingerprint("a set", np.arange(3)) == fingerprint("a set", np.arange(3))
        True
    """
    digest = hashlib.sha256()
    content: Any
    for part in parts:
        if isinstance(part, (dict, list, tuple)):
            items = sorted(part.items()) if isinstance(part, dict) else enumerate(part)
            head, content = type(part).__name__, "".join(f"{key}={fingerprint(each)};" for key, each in items).encode()
        elif isinstance(part, np.ndarray) and part.dtype == object:  # whose bytes are addresses
            head, content = f"object{part.shape}", fingerprint(*part.ravel().tolist()).encode()
        elif isinstance(part, np.ndarray):
            flat = np.ascontiguousarray(part).reshape(-1)
            head, content = f"{part.dtype.str}{part.shape}", flat.view(np.uint8)  # tobytes() would copy
        elif isinstance(part, bytes):
            head, content = "bytes", part
        else:
            head, content = type(part).__name__, str(part).encode()
        # Without lengths ("ab", "c") would equal ("a", "bc").
        digest.update(f"{head}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()
