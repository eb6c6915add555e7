"""Splits a model below all that is still trained."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_partial import compat
from dist_partial.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class SplitModel:
    """Holds a model in two parts.

    Attributes:
        model: the whole.
        lower: inputs -> the tensors on which the rest depends.
        upper: (those tensors, training) -> the model's outputs.
        name: of the last layers of the lower part.
        changing: variables that training may change.

    Examples:
        >>> layers = [keras.layers.Dense(3, name="body"), keras.layers.Dense(1, name="head")]
        >>> model = keras.Sequential([keras.Input([4]), *layers])
        >>> part = split(model, model.layers[1].variables)
        >>> [tuple(tensor.shape) for tensor in part.lower(tf.ones([2, 4]))]  # what is kept of two examples
        [(2, 3)]
    """

    model: keras.Model
    lower: Callable[[Any], list[tf.Tensor]]
    upper: Callable[[Sequence[tf.Tensor], bool], Any]
    name: str
    changing: Collection[Any]

    def refusal(self, why: str) -> UserError:
        return UserError(f"run.activation_cache: what is frozen up to {self.name!r} {why}: unbind it")


def split(model: keras.Model, changing: Collection[Any]) -> SplitModel | None:
    """Cuts a model below everything that training may change; None if there is nothing to cut off.

    A functional or sequential model is cut along its graph, layer by layer. Another model is cut if it has a method
    `stages()`: pairs of (layers, function (x, training) -> x) of which it is the composition.

    Args:
        model: built.
        changing: the variables that training may still change, those that layers change among them.

    Raises:
        UserError: it is neither, or has a `call` of its own beside its graph.

    Examples:
        >>> layers = [keras.layers.Dense(3, name="body"), keras.layers.Dense(1, name="head")]
        >>> model = keras.Sequential([keras.Input([4]), *layers])
        >>> part, x = split(model, model.layers[1].variables), tf.ones([2, 4])
        >>> part.name, bool(tf.reduce_all(part.upper(part.lower(x), False) == model(x)))
        ('body', True)
    """
    ids = {id(v) for v in changing}

    def fixed(layers: Sequence[Any]) -> bool:
        # A regulariser of activations adds to the loss what a cache does not remember.
        return all(
            getattr(layer, "activity_regularizer", None) is None
            and not any(id(v) in ids for v in getattr(layer, "variables", ()))
            for layer in layers
        )

    if hasattr(model, "stages"):
        parts = _cut_stages(model.stages(), fixed)
    elif _is_its_graph(model):
        parts = _cut_graph(model, fixed)
    else:
        raise UserError(
            f"run.activation_cache splits a functional or sequential model, and {type(model).__name__} has a call() of "
            "its own: give it a method stages(), or unbind it"
        )
    return parts and SplitModel(model, *parts, changing)


def _is_its_graph(model: keras.Model) -> bool:
    """Whether calling the model is walking along its graph."""
    if not getattr(model, "outputs", None) or "call" in vars(model):
        return False
    functional = type(keras.Model(model.inputs, model.inputs))
    calls = [(kind.call, kind.__call__) for kind in (functional, keras.Sequential)]
    return (type(model).call, type(model).__call__) in calls


def _cut_stages(stages: Sequence[Any], fixed: Callable[[Sequence[Any]], bool]) -> tuple[Any, Any, str] | None:
    below = list(itertools.takewhile(lambda stage: fixed(stage[0]), stages))
    above = stages[len(below) :]
    if not above or not any(layer.weights for layers, _ in below for layer in layers):
        return None

    def upper(tensors: Sequence[tf.Tensor], training: bool) -> tf.Tensor:
        (x,) = tensors
        for _, function in above:
            x = function(x, training)
        return x

    def lower(x: tf.Tensor) -> list[tf.Tensor]:
        for _, function in below:
            x = function(x, True)
        return [x]

    return lower, upper, below[-1][0][0].name


def _cut_graph(model: keras.Model, fixed: Callable[[Sequence[Any]], bool]) -> tuple[Any, Any, str] | None:
    known: dict[int, bool] = {}

    def is_fixed(tensor: Any) -> bool:
        if id(tensor) not in known:
            parts = [is_fixed(argument) for argument in compat.producer_inputs(tensor)]
            operation = compat.producer(tensor)
            known[id(tensor)] = all(parts) and fixed(
                [*(compat.layers(operation) if isinstance(operation, keras.Layer) else ()), operation]
            )
        return known[id(tensor)]

    if any(is_fixed(output) for output in model.outputs):
        return None
    edge: dict[int, Any] = {}
    seen: set[int] = set()
    called: set[int] = set()
    above = list(model.outputs)
    while above:
        called.add(id(compat.producer(above[-1])))
        for tensor in compat.producer_inputs(above.pop()):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                if is_fixed(tensor):
                    edge[id(tensor)] = tensor
                else:
                    above.append(tensor)
        # Keras 3.15 makes no model of what a layer gives if the model also calls that layer.
        for tensor in [tensor for tensor in edge.values() if id(compat.producer(tensor)) in called]:
            above.append(edge.pop(id(tensor)))
    tensors = list(edge.values())
    # A sequential model has neither under Keras 3.15, nor more than one of each.
    inputs, outputs = (
        (model.inputs[0], model.outputs[0]) if isinstance(model, keras.Sequential) else (model.input, model.output)
    )
    below, rest = keras.Model(inputs, tensors), keras.Model(tensors, model.outputs)
    if not below.weights:  # the inputs alone, or little more
        return None
    names = {compat.producer(tensor).name for tensor in tensors if compat.producer_inputs(tensor)}
    return (
        lambda x: tf.nest.flatten(below(x, training=True)),
        lambda given, training: tf.nest.pack_sequence_as(
            outputs, tf.nest.flatten(rest(list(given), training=training))
        ),
        " and ".join(sorted(names)),
    )
