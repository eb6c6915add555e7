"""The precision in which what is frozen is stored; what is trained keeps its own."""

import dataclasses
from typing import Any

import keras

from dist_partial import compat
from dist_partial.adapters import layers
from dist_partial.errors import UserError
from dist_partial.selection.plan import Plan

PRECISIONS = (None, "bfloat16", "int8")


def lower(plan: Plan, model: keras.Model, precision: str | None) -> Plan:
    """Stores what no rule trains in fewer bits, in the strategy's scope.

    'bfloat16' rounds every frozen float32 variable; layers compute in the precision that they had, on values cast as
    they are read. 'int8' has Keras quantize (`keras.Layer.quantize`) the Dense, EinsumDense and Embedding layers of
    which nothing is trained but LoRA's factors: a scale for each output channel, activations quantized as they come;
    all other layers stay as they are.

    Args:
        plan: what is trained.
        model: built; its frozen variables are changed.
        precision: 'bfloat16', 'int8', or None for nothing.

    Returns:
        The same plan, with the variables that take the place of others.

    Raises:
        UserError: nothing of the model can be stored so.

    Examples:
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2, name="body"), keras.layers.Dense(1)])
        >>> plan = resolve([("freeze", "body/.*"), ("train", ".*")], model, AllReduce())
        >>> [entry.variable.dtype for entry in lower(plan, model, "bfloat16").entries]
        ['bfloat16', 'bfloat16', 'float32', 'float32']
    """
    if precision is None:
        return plan
    frozen = {id(entry.variable) for entry in plan.entries if not entry.rule.train}
    if precision == "bfloat16":
        lowered = [e.variable for e in plan.entries if id(e.variable) in frozen and e.variable.dtype == "float32"]
        for variable in lowered:
            store(variable, precision)
        replaced: dict[int, Any] = {}
    else:
        replaced = _quantize(model, frozen)
        lowered = list(replaced.values())
    if not lowered:
        raise UserError(
            f"run.frozen_dtype = {precision!r}, and the rules freeze nothing that can be stored so (for int8: whole "
            "Dense, EinsumDense or Embedding layers): unbind it"
        )
    entries = tuple(dataclasses.replace(e, variable=replaced.get(id(e.variable), e.variable)) for e in plan.entries)
    return dataclasses.replace(plan, entries=entries)


def widen(plan: Plan) -> None:
    """Stores what `lower` has rounded to bfloat16 in its former dtype; the values stay as they are.

    Examples:
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2, name="body"), keras.layers.Dense(1)])
        >>> plan = lower(resolve([("freeze", "body/.*"), ("train", ".*")], model, AllReduce()), model, "bfloat16")
        >>> widen(plan)
        >>> {variable.dtype for variable in model.variables}
        {'float32'}
    """
    for entry in plan.entries:
        if entry.variable.dtype == "bfloat16":
            store(entry.variable, entry.dtype)


def store(variable: Any, dtype: str) -> None:
    """Replaces the value of a Keras variable by a variable of another dtype, in the strategy's scope.

    Examples:
        >>> variable = keras.Variable([1.0, 0.1])
        >>> store(variable, "bfloat16")
        >>> variable.dtype, variable.numpy().astype(float).tolist()
        ('bfloat16', [1.0, 0.10009765625])
    """
    # Not by a dtype policy: it must be known before the layer is built, when no rule has been resolved yet. Within a
    # layer's call Keras casts what is read to the compute dtype.
    value = keras.ops.convert_to_numpy(variable).astype(dtype)
    compat.initialize(variable, value, dtype)


def _quantize(model: keras.Model, frozen: set[int]) -> dict[int, Any]:
    """Quantizes the layers of which nothing is trained; returns the new kernels by the id of the old ones."""
    replaced = {}
    for layer in layers.layers(model):
        before = layers.raw(layer)
        own = [v for v in layer.variables if not v.name.startswith("lora_")]
        if id(before) not in frozen or any(v.trainable and id(v) not in frozen for v in own):
            continue
        try:
            layer.quantize("int8")
        except NotImplementedError:  # a subclass, with a call of its own
            continue
        replaced[id(before)] = layers.raw(layer)
    return replaced
