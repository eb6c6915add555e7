"""The part of a model below all that is still trained, and its activations, kept for when an example comes again.

He et al. 2021, "PipeTransformer", cache what frozen layers give in the same way.
"""

import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import psutil
import tensorflow as tf

from dist_partial import compat
from dist_partial.data import Source, fetch, fetched, trait
from dist_partial.distributed import traffic
from dist_partial.errors import UserError
from dist_partial.training.split_model import SplitModel

# What reads and changes nothing, though TensorFlow calls it stateful; the bodies of control flow are looked at, too.
_HARMLESS = {
    "ReadVariableOp",
    "ResourceGather",
    "ResourceGatherNd",
    "LookupTableFindV2",
    "Assert",
    "While",
    "If",
    "Case",
}


class Activations:
    """Caches the outputs of the frozen lower part of a model, example by example, from the first use on.

    The value of an example is what the lower part gives for it in the batch in which this worker meets it first. In
    another place of a batch the last bits may round otherwise, so after a stop it is computed in that batch again.

    Args:
        source: the examples.
        part: the cut model.
        rows: examples that a replica computes at a time, in training too: sums of another shape may round otherwise.
        expected: how many examples will be kept, at most.
        where: 'memory', or 'disk': a temporary file, which goes with the process.
        past: int64 [rows] each, the examples that this worker has met since it reads from here, in order.

    Raises:
        UserError: there is no room, or what the lower part gives for an example does not depend on that example alone.
    """

    def __init__(
        self, source: Source, part: SplitModel, rows: int, expected: int, where: str, past: Iterable[np.ndarray] = ()
    ) -> None:
        self.name = part.name
        self._source, self._rows, self._upper = source, rows, part.upper
        self._computed, self._specs = _compiled(part, rows, source.spec[0])
        size = sum(_size(spec) for spec in self._specs)
        self.bytes = expected * size
        # Rows in the order in which they come: memory that has not been written takes no room.
        self._place = np.full(len(source), -1)
        self._count = 0
        self._kept = _room((expected, size), self.bytes, where)
        self._past: list[np.ndarray] = []
        self._met = np.full(len(source), -1)  # in which of those batches first
        unmet = len(source)
        for batch in past:
            if not unmet:
                break
            new = np.unique(batch[self._met[batch] < 0])
            self._met[new] = len(self._past)
            self._past.append(batch)
            unmet -= len(new)
        self._check(part)

    def fill(self, indices: np.ndarray) -> None:
        """Computes those of a worker's batch, a whole number of `rows`, that are not there yet."""
        met = np.unique(self._met[indices[self._place[indices] < 0]])
        for number in met[met >= 0]:
            self._keep(self._past[number], number)
        for batch in indices.reshape(-1, self._rows):
            self._keep(batch, -1)

    def _keep(self, batch: np.ndarray, number: int) -> None:
        """Computes those of a batch that are not there yet, and were met in the past batch of that number, or never."""
        new, where = np.unique(batch, return_index=True)
        missing = (self._place[new] < 0) & (self._met[new] == number)
        if missing.any():
            computed = self._computed(_inputs(self._source, batch)).numpy()
            new, where = new[missing], where[missing]
            self._place[new] = self._count + np.arange(len(new))
            self._kept[self._place[new]] = computed[where]
            self._count += len(new)

    def read(self, indices: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """A batch of what has been filled: uint8 [b, bytes of an example], and all but x of the examples."""
        kept = tf.numpy_function(self._rows_of, [indices], tf.uint8, stateful=False)
        return tf.ensure_shape(kept, [*indices.shape, self._kept.shape[1]]), *fetched(self._source, indices)[1:]

    def _rows_of(self, indices: np.ndarray) -> np.ndarray:
        assert (self._place[indices] >= 0).all()
        return self._kept[self._place[indices]]

    def outputs(self, x: tf.Tensor, training: bool) -> Any:
        """The model's outputs for the activations that `read` gives."""
        return self._upper(self._tensors(x), training)

    def _tensors(self, x: tf.Tensor) -> list[tf.Tensor]:
        sizes = [_size(spec) for spec in self._specs]
        return [_from_bytes(part, spec) for part, spec in zip(tf.split(x, sizes, axis=1), self._specs, strict=True)]

    def _check(self, part: SplitModel) -> None:
        """Compares on some examples: the same ones beside others, and the cut model with the whole.

        Raises:
            UserError: they are further apart than rounding brings them.
        """
        rows, count = self._rows, len(self._source)
        some = np.arange(2 * rows) * max(1, count // (2 * rows)) % count
        first, half = some[:rows], rows // 2
        beside = np.roll(some, -half - rows)[:rows]  # half of the first, in other places, and half of the others
        repeated = np.repeat(first[[0, -1]], [rows - half, half])
        x, *others = (_inputs(self._source, batch) for batch in (first, beside, repeated))
        bytes_of_x = self._computed(x)
        known = dict(zip(first, range(rows), strict=True))
        limit = _rounding(part.model)
        for batch, other in zip((beside, repeated), others, strict=True):
            there = np.flatnonzero(np.isin(batch, first))
            here = [known[index] for index in batch[there]]
            pairs = zip(self._tensors(bytes_of_x), self._tensors(self._computed(other)), strict=True)
            apart = max(_apart(a.numpy()[here], b.numpy()[there]) for a, b in pairs)
            if apart > limit:
                raise part.refusal(f"depends on the other examples of a batch, or is random ({apart:.2g} apart)")
        self._compare(part, x, bytes_of_x, limit)

    def _compare(self, part: SplitModel, x: Any, kept: tf.Tensor, limit: float) -> None:
        def apart(a: list[np.ndarray], b: list[np.ndarray]) -> float:
            return max(itertools.starmap(_apart, zip(a, b, strict=True)))

        for training in (True, False):  # what draws by itself is often quiet in inference
            whole = _outputs(part.model, x, training)
            distance = apart(whole, _outputs(self.outputs, kept, training))
            if distance <= limit:
                return
            if apart(whole, _outputs(part.model, x, training)) <= limit:
                raise part.refusal(f"and the rest are not the model of which they are parts ({distance:.2g} apart)")
        raise part.refusal("cannot be compared with the whole model, which gives something else each time")


def check_cached(source: Source) -> None:
    """Raises UserError unless an example of a source is the same whenever it comes again.

    Examples:
        >>> from dist_partial.data import ArraySource, Mapped
        >>> noisy = Mapped(ArraySource(np.zeros([9])), lambda x, rng: x + rng.normal(), numpy=True)
        >>> check_cached(noisy)
        Traceback (most recent call last):
        dist_partial.errors.UserError: run.activation_cache would keep one draw of what Dataset.map draws for an ...
    """
    if trait(source, "draws", False):
        raise UserError(
            "run.activation_cache would keep one draw of what Dataset.map draws for an example, and give it in every "
            "epoch: unbind it, or draw nothing"
        )
    if trait(source, "own_order", False):
        raise UserError(
            f"run.activation_cache keeps what it computes by example, and {type(source).__name__} of run.data has an "
            "order of its own: unbind it, or give data with random access"
        )


def _inputs(source: Source, indices: np.ndarray) -> Any:
    return tf.nest.map_structure(tf.constant, fetch(source, indices)[0])


def _compiled(part: SplitModel, rows: int, x: Any) -> tuple[Any, list[tf.TensorSpec]]:
    """The lower part as a function [rows, ...] -> uint8 [rows, bytes of an example], and its tensors for one example.

    Raises:
        UserError: its tensors are not all that it gives, or are not an example's.
    """
    specs: list[tf.TensorSpec] = []

    spec = tf.nest.map_structure(lambda one: tf.TensorSpec([rows, *one.shape], one.dtype), x)

    @tf.function(autograph=False, input_signature=[spec])
    def computed(x: Any) -> tf.Tensor:
        with _Watched() as scope:
            tensors = part.lower(x)
        if scope.losses:
            raise part.refusal("adds to the loss (add_loss), which a cache does not remember")
        if scope.state_mapping:
            paths = [v.path for v in part.model.variables if id(v) in scope.state_mapping]
            raise part.refusal(f"is not the same each time (it changes {paths[0] if paths else 'a random state'})")
        for variable in part.changing:
            if id(variable) in scope.read:
                raise part.refusal(f"reads {variable.path}, which is trained")
        for tensor in tensors:
            if compat.mask(tensor) is not None:
                raise part.refusal("makes a mask, which is no activation")
            dense = isinstance(tensor, tf.Tensor) and tensor.dtype != tf.string and tensor.shape.is_fully_defined()
            if not dense or tensor.shape[:1] != [rows]:
                what = f"{type(tensor).__name__} {tensor.dtype.name} {tensor.shape} for {rows}"
                raise part.refusal(f"does not give each example numbers of one shape ({what})")
        specs[:] = [tf.TensorSpec(tensor.shape[1:], tensor.dtype) for tensor in tensors]
        return tf.concat([_to_bytes(tensor) for tensor in tensors], axis=1)

    if stateful := _stateful(computed.get_concrete_function()):
        raise part.refusal(f"is not the same each time ({stateful})")
    return computed, specs


class _Watched(keras.StatelessScope):
    """Keeps what layers would change, add to the loss and read; nothing is changed."""

    def __init__(self) -> None:
        super().__init__(collect_losses=True)
        self.read: set[int] = set()

    def get_current_value(self, variable: Any) -> Any:
        self.read.add(id(variable))
        return super().get_current_value(variable)


def _outputs(model: Callable[..., Any], x: Any, training: bool) -> list[np.ndarray]:
    """Outputs and the losses that layers add; the same masks are drawn each time."""
    with _Watched() as scope:
        y = model(x, training=training)
    return [*(one.numpy() for one in tf.nest.flatten(y)), *(loss.numpy().reshape(1, -1) for loss in scope.losses)]


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance between two examples' values, as a share of the largest norm of one; NaNs are alike."""
    a, b = (values.reshape(len(values), math.prod(values.shape[1:])).astype(np.float64) for values in (a, b))
    with np.errstate(invalid="ignore"):
        distances = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    distance = np.linalg.norm(np.nan_to_num(distances, nan=np.inf), axis=1).max(initial=0.0)
    norm = np.linalg.norm(np.where(np.isfinite(a), a, 0.0), axis=1).max(initial=0.0)
    return distance and float(distance / norm if norm else np.inf)


def _rounding(model: keras.Model) -> float:
    """How far rounding may bring values apart, as a share of them: half of the digits of the coarsest dtype."""
    digits = {"bfloat16": 8, "float16": 11}
    return 2.0 ** (-min(digits.get(layer.compute_dtype, 24) for layer in compat.layers(model)) / 2)


def _stateful(function: Any) -> str:
    """An operation that may give something else, or change something, each time; empty if there is none."""
    for operation in traffic.operations(function.graph):
        if operation.op_def.is_stateful and operation.type not in _HARMLESS and "Call" not in operation.type:
            return f"{operation.type} in {operation.name}"
    return ""


def _size(spec: tf.TensorSpec) -> int:
    """Bytes of an example."""
    return math.prod(spec.shape) * spec.dtype.size


def _to_bytes(tensor: tf.Tensor) -> tf.Tensor:
    tensor = tf.cast(tensor, tf.uint8) if tensor.dtype == tf.bool else tf.bitcast(tensor, tf.uint8)
    return tf.reshape(tensor, [tensor.shape[0], -1])


def _from_bytes(x: tf.Tensor, spec: tf.TensorSpec) -> tf.Tensor:
    shape = [x.shape[0], *spec.shape]
    if spec.dtype == tf.bool:
        return tf.cast(tf.reshape(x, shape), tf.bool)
    if spec.dtype.size > 1:
        shape.append(spec.dtype.size)
    return tf.bitcast(tf.reshape(x, shape), spec.dtype)


def _room(shape: tuple[int, int], needed: int, where: str) -> np.ndarray:
    free = shutil.disk_usage(tempfile.gettempdir()).free if where == "disk" else _free_memory()
    if needed > free:
        hint = "set TMPDIR to a larger disk" if where == "disk" else "bind run.activation_cache = 'disk'"
        raise UserError(
            f"run.activation_cache = {where!r} needs up to {needed:,} bytes, and {free:,} are free: {hint}, or "
            "unbind it"
        )
    if where == "disk":
        return np.memmap(tempfile.TemporaryFile(), np.uint8, "w+", shape=shape)
    return np.empty(shape, np.uint8)


def _free_memory() -> int:
    """Returns the bytes that the system could give."""
    return int(psutil.virtual_memory().available)
