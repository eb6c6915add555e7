"""Compares the inputs of a model with the examples of a data set, by name and number."""

import re
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from dist_partial import compat
from dist_partial.errors import UserError, own_line
from dist_partial.validation import nearest

_LISTED = 8  # names in a message


def check_inputs(model: keras.Model, name: str, x: Any) -> None:
    """Raises UserError unless the data set of that name gives a model all its inputs, and no others in their place.

    Where the model has a dict of inputs, Keras 3.15 assigns the values of a dict in the order of their names and leaves
    out the last ones, so that one too many moves those after it; where it has a list, Keras goes by the names.

    Args:
        model: whose inputs are known if it is no subclass.
        name: of the data set.
        x: specs of an example's inputs.

    Examples:
        >>> a, b = keras.Input([2], name="age"), keras.Input([2], name="height")
        >>> check_inputs(keras.Model([a, b], a + b), "people", {"age": ..., "hight": ...})
        Traceback (most recent call last):
        dist_partial.errors.UserError: run.model has the inputs 'age', 'height', and people's examples have no \
'height'; nearest: 'hight'; ...
    """
    inputs = _inputs(model)
    if inputs is None:
        return
    names = sorted(inputs) if isinstance(inputs, dict) else [tensor.name for tensor in inputs]
    has = f"run.model has the {'inputs' if len(names) > 1 else 'input'} {listed(names)}, and {name}'s examples have"
    _check_texts(model, inputs, name, x)
    if isinstance(x, dict):
        missing = [each for each in names if each not in x]
        others = [each for each in x if each not in names]
        near = nearest(missing[0], others) if missing else ""
        if missing:
            also = f", but {listed(others)}" if others and not near else ""
            raise UserError(f"{has} no {listed(missing)}{near or also}; give each input under its name")
        if others and isinstance(inputs, dict) and sorted(x)[: len(names)] != names:
            raise UserError(f"{has} {listed(others)} as well; leave out what it does not take")
        return
    given = len(x) if isinstance(x, (list, tuple)) else 1
    if given == len(names):
        return
    lacking = f"{listed(names[given:])} {'is' if len(names) == given + 1 else 'are'} missing"
    problem = lacking if given < len(names) else f"{given - len(names)} too many"
    form = "{" + ", ".join(f"{each!r}: ..." for each in names[:_LISTED]) + ", ..." * (len(names) > _LISTED) + "}"
    form += "" if isinstance(inputs, dict) else ", or as a tuple in that order"
    form = form if len(names) > 1 else "one array"
    raise UserError(f"{has} {given} without a name: {problem}; give x as {form}")


def _check_texts(model: keras.Model, inputs: dict[str, Any] | list[Any], name: str, x: Any) -> None:
    """Raises UserError if an input of numbers is given texts: TensorFlow ends with many lines then."""
    for which, tensor, spec in _paired(inputs, x):
        if getattr(spec, "dtype", None) == "string" and tensor.dtype != "string":
            remedy = "make numbers of it in Dataset.map, by keras.layers.StringLookup or TextVectorization"
            if getattr(model, "preprocessor", None) is not None:  # a task of KerasHub
                remedy = "map it by the preprocessor of the model, as in dataset((x, y)).map(preprocessor)"
            raise UserError(f"{which} of {name}'s examples is text, and run.model takes {tensor.dtype} there: {remedy}")


def _paired(inputs: dict[str, Any] | list[Any], x: Any) -> list[tuple[str, Any, Any]]:
    """What messages call each part of x, the model's input for it, and the part."""
    if isinstance(x, dict):
        tensors = inputs if isinstance(inputs, dict) else {tensor.name: tensor for tensor in inputs}
        return [(repr(key), tensor, x.get(key)) for key, tensor in tensors.items()]
    flat = [inputs[key] for key in sorted(inputs)] if isinstance(inputs, dict) else inputs
    parts = x if isinstance(x, (list, tuple)) else [x]
    names = ["x"] if len(parts) == 1 else [f"x[{i}]" for i in range(len(parts))]
    return list(zip(names, flat, parts, strict=False))


def check_ids(model: keras.Model, name: str, x: Any, indices: np.ndarray) -> None:
    """Raises UserError if ids are none of those that an Embedding at an input of a model has.

    Args:
        model: the model.
        name: of the data set.
        x: arrays of examples, a nest.
        indices: which examples they are, int64 [n].

    Examples:
        >>> ids = keras.Input([1], dtype="int32")
        >>> model = keras.Model(ids, keras.layers.Embedding(20, 4, name="item")(ids))
        >>> check_ids(model, "mine", np.array([[3], [77]]), np.array([5, 8]))
        Traceback (most recent call last):
        dist_partial.errors.UserError: x of mine has the id 77 (example 8), and layer 'item' of run.model has 20 of \
them, from 0 on: bind sizes that fit each other
    """
    inputs = _inputs(model)
    if inputs is None:
        return
    for layer in compat.layers(model):
        try:
            own = layer.input if isinstance(layer, keras.layers.Embedding) else None
        except (AttributeError, ValueError):  # it is called never, or more than once
            continue
        for which, tensor, array in _paired(inputs, x) if own is not None else ():
            if tensor is own and isinstance(array, np.ndarray) and array.dtype.kind in "iu" and array.size:
                for place in (np.argmin(array), np.argmax(array)):
                    if not 0 <= (found := array.flat[place]) < layer.input_dim:
                        example = indices[np.unravel_index(place, array.shape)[0]]
                        raise UserError(
                            f"{which} of {name} has the id {found} (example {example:,}), and layer {layer.name!r} of "
                            f"run.model has {layer.input_dim:,} of them, from 0 on: bind sizes that fit each other"
                        )


def check_asked(name: str, x: Any, error: KeyError) -> None:
    """Raises UserError if a model's own `call` asked for an input that examples of the data set do not have.

    Examples:
        >>> check_asked("people", {"hight": ...}, KeyError("height"))
        Traceback (most recent call last):
        dist_partial.errors.UserError: run.model asks for 'height', and people's examples have 'hight'; nearest: 'hight'
    """
    found = re.search(r"\x1b\[1m(.*)\x1b\[0m", str(error.args[0]))  # where Keras says more
    key = (found[1] if found else str(error.args[0])).strip("'")
    if isinstance(x, dict) and key not in x:
        raise UserError(
            f"run.model asks for {key!r}{own_line(error)}, and {name}'s examples have {listed(list(x))}"
            f"{nearest(key, x)}"
        ) from error


def _inputs(model: keras.Model) -> dict[str, Any] | list[Any] | None:
    """A model's inputs by name, or in order; None where they are not known, nested, or may be left out."""
    inputs = getattr(model, "input", None)  # as the model was made of them, and `inputs` is flat
    if inputs is None:
        inputs = getattr(model, "inputs", None) or None
    flat = list(inputs.values()) if isinstance(inputs, dict) else inputs
    flat = list(flat) if isinstance(flat, (list, tuple)) else [flat]
    if not all(isinstance(tensor, keras.KerasTensor) for tensor in flat):
        return None
    if any(getattr(spec, "optional", False) for spec in model.input_spec or ()):
        return None
    return inputs if isinstance(inputs, dict) else flat


def listed(names: Sequence[str]) -> str:
    """Writes names as messages show them: the first eight.

    Examples:
        >>> listed(["buy", "kind"])
        "'buy', 'kind'"
    """
    more = len(names) - _LISTED
    return ", ".join(map(repr, names[:_LISTED])) + (f" and {more} more" if more > 0 else "")
