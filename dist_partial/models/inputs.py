"""Compares the inputs of a model with the examples of a data set, by name and number."""

import re
from collections.abc import Sequence
from typing import Any

import keras

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
    _check_texts(inputs, name, x)
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


def _check_texts(inputs: dict[str, Any] | list[Any], name: str, x: Any) -> None:
    """Raises UserError if an input of numbers is given texts: TensorFlow ends with many lines then."""
    if isinstance(x, dict):
        tensors = inputs if isinstance(inputs, dict) else {tensor.name: tensor for tensor in inputs}
        pairs = [(repr(key), tensor, x.get(key)) for key, tensor in tensors.items()]
    else:
        flat = [inputs[key] for key in sorted(inputs)] if isinstance(inputs, dict) else inputs
        pairs = [
            ("x", tensor, each) for tensor, each in zip(flat, x if isinstance(x, (list, tuple)) else [x], strict=False)
        ]
    for which, tensor, spec in pairs:
        if getattr(spec, "dtype", None) == "string" and tensor.dtype != "string":
            raise UserError(
                f"{which} of {name}'s examples is text, and run.model takes {tensor.dtype} there: make numbers of it "
                "in Dataset.map, by keras.layers.StringLookup or TextVectorization"
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
