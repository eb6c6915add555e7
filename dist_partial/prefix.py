"""The part of a model below all that is still trained, and its activations, kept for when an example comes again.

He et al. 2021, "PipeTransformer", cache what frozen layers give in the same way.
"""

import dataclasses
import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial.checkpoints import moving
from dist_partial.data import Source, fetched
from dist_partial.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """A model in two.

    Attributes:
        prefix: inputs -> the tensors on which the rest depends; draws nothing and changes nothing.
        suffix: (those tensors, training) -> the model's outputs.
        name: of the last layers of the prefix.
    """

    prefix: Callable[[tf.Tensor], list[tf.Tensor]]
    suffix: Callable[[Sequence[tf.Tensor], bool], tf.Tensor]
    name: str


def cut(model: keras.Model, trained: Collection[Any]) -> Cut | None:
    """Cuts a model below everything that training may change; None if there is nothing to cut off.

    A functional or sequential model is cut along its graph, layer by layer. Another model is cut if it has a method
    `stages()`: pairs of (layers, function (x, training) -> x) of which it is the composition.

    Args:
        model: built.
        trained: the variables that may still be trained.
    """
    changing = {id(v) for v in [*trained, *moving(model)]}

    def fixed(layers: Sequence[Any]) -> bool:
        # A regulariser of activations adds to the loss what a cache does not remember.
        return all(
            getattr(layer, "activity_regularizer", None) is None
            and not any(id(v) in changing for v in getattr(layer, "variables", ()))
            for layer in layers
        )

    if hasattr(model, "stages"):
        return _cut_stages(model.stages(), fixed)
    if getattr(model, "outputs", None):
        return _cut_graph(model, fixed)
    return None


def _cut_stages(stages: Sequence[Any], fixed: Callable[[Sequence[Any]], bool]) -> Cut | None:
    below = list(itertools.takewhile(lambda stage: fixed(stage[0]), stages))
    above = stages[len(below) :]
    if not above or not any(layer.weights for layers, _ in below for layer in layers):
        return None

    def suffix(tensors: Sequence[tf.Tensor], training: bool) -> tf.Tensor:
        (x,) = tensors
        for _, function in above:
            x = function(x, training)
        return x

    def prefix(x: tf.Tensor) -> list[tf.Tensor]:
        for _, function in below:
            x = function(x, True)
        return [x]

    return Cut(prefix, suffix, below[-1][0][0].name)


def _cut_graph(model: keras.Model, fixed: Callable[[Sequence[Any]], bool]) -> Cut | None:
    known: dict[int, bool] = {}

    def arguments(tensor: Any) -> list[Any]:
        history = tensor._keras_history
        return history.operation._inbound_nodes[history.node_index].input_tensors

    def is_fixed(tensor: Any) -> bool:
        if id(tensor) not in known:
            parts = [is_fixed(argument) for argument in arguments(tensor)]
            operation = tensor._keras_history.operation
            known[id(tensor)] = all(parts) and fixed([*getattr(operation, "_flatten_layers", list)(), operation])
        return known[id(tensor)]

    if any(is_fixed(output) for output in model.outputs):
        return None
    edge: dict[int, Any] = {}
    seen: set[int] = set()
    above = list(model.outputs)
    while above:
        for tensor in arguments(above.pop()):
            if is_fixed(tensor):
                edge[id(tensor)] = tensor
            elif id(tensor) not in seen:
                seen.add(id(tensor))
                above.append(tensor)
    tensors = list(edge.values())
    below, rest = keras.Model(model.inputs, tensors), keras.Model(tensors, model.outputs)
    if not below.weights:  # the inputs alone, or little more
        return None
    names = {tensor._keras_history.operation.name for tensor in tensors if arguments(tensor)}
    return Cut(
        lambda x: tf.nest.flatten(below([x], training=True)),
        lambda given, training: tf.nest.flatten(rest(list(given), training=training))[0],
        " and ".join(sorted(names)),
    )


class Activations:
    """What the prefix of a model gives for each example, kept from the first time that it is needed.

    Args:
        source: the examples.
        part: the cut model.
        rows: examples that a replica computes at a time, in training too: sums of another shape may round otherwise.
        expected: how many examples will be kept, at most.
        where: 'memory', or 'disk': a temporary file, which goes with the process.

    Raises:
        UserError: there is no room, or the prefix cannot be kept: it is random, changes something, or makes masks.
    """

    def __init__(self, source: Source, part: Cut, rows: int, expected: int, where: str) -> None:
        x = source.spec[0]
        self.name = part.name
        self._source, self._rows = source, rows
        self._specs: list[tf.TensorSpec] = []

        @tf.function(autograph=False, input_signature=[tf.TensorSpec([rows, *x.shape], x.dtype)])
        def computed(x: tf.Tensor) -> tf.Tensor:
            tensors = part.prefix(x)
            if any(getattr(tensor, "_keras_mask", None) is not None for tensor in tensors):
                raise UserError(f"run.cache: {part.name!r} makes a mask, which is no activation: unbind it")
            self._specs = [tf.TensorSpec(tensor.shape[1:], tensor.dtype) for tensor in tensors]
            return tf.concat([_to_bytes(tensor) for tensor in tensors], axis=1)

        graph = computed.get_concrete_function()
        for operation in _operations(graph.graph):
            if operation.op_def.is_stateful and operation.type not in ("ReadVariableOp", "ResourceGather"):
                if "Call" in operation.type:
                    continue
                raise UserError(
                    f"run.cache: what is frozen up to {part.name!r} is not the same each time ({operation.type} in "
                    f"{operation.name}): unbind it"
                )
        self._computed = computed
        size = graph.structured_outputs.shape[1]
        self.bytes = expected * size
        # Rows in the order in which they come: memory that has not been written takes no room.
        self._place = np.full(len(source), -1)
        self._count = 0
        self._kept = _room((expected, size), self.bytes, where)
        self._suffix = part.suffix

    def fill(self, indices: np.ndarray) -> None:
        """Computes those of a worker's batch, a whole number of `rows`, if one of them is not there yet."""
        new, where = np.unique(indices, return_index=True)
        missing = self._place[new] < 0
        if not missing.any():
            return
        x = self._source.fetch(indices)[0]
        pieces = [x[start : start + self._rows] for start in range(0, len(x), self._rows)]
        computed = np.concatenate([self._computed(tf.constant(piece)) for piece in pieces])
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

    def outputs(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        """The model's outputs for the activations that `read` gives."""
        tensors, start = [], 0
        for spec in self._specs:
            size = math.prod(spec.shape) * spec.dtype.size
            tensors.append(_from_bytes(x[:, start : start + size], spec))
            start += size
        return self._suffix(tensors, training)


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


def _operations(graph: Any) -> list[Any]:
    """Of a graph and of all functions that it may call."""
    found = list(graph.get_operations())
    for definition in graph.as_graph_def().library.function:
        found += graph._get_function(definition.signature.name).graph.get_operations()
    return found


def _room(shape: tuple[int, int], needed: int, where: str) -> np.ndarray:
    free = shutil.disk_usage(tempfile.gettempdir()).free if where == "disk" else _free_memory()
    if free is not None and needed > free:
        hint = "set TMPDIR to a larger disk" if where == "disk" else "bind run.cache = 'disk'"
        raise UserError(
            f"run.cache = {where!r} needs up to {needed:,} bytes, and {free:,} are free: {hint}, or unbind it"
        )
    if where == "disk":
        return np.memmap(tempfile.TemporaryFile(), np.uint8, "w+", shape=shape)
    return np.empty(shape, np.uint8)


def _free_memory() -> int | None:
    """Bytes that the system could give; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
