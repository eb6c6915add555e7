"""Makes arrays of what people's examples hold: numbers, texts, lists, images of PIL, tensors of any library."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial.errors import UserError
from dist_partial.validation import shown


def as_arrays(value: Any, name: str) -> Any:
    """Makes arrays of a nest: dicts, tuples and lists of arrays keep their form; any other list is an array.

    Python's own numbers become int64 and float32; what has a type keeps it. Texts become objects, as tf.string takes
    them.

    Args:
        value: a number, a text, a list of these, an image of PIL, a tensor of any library; or a nest of such.
        name: of the value in messages.

    Raises:
        UserError: it is of no type that a tensor has, or no array.

    Examples:
        >>> as_arrays({"age": 31, "name": "Ada"}, "x")["age"].dtype
        dtype('int64')
        >>> as_arrays([[1, 2], [3]], "x")
        Traceback (most recent call last):
        dist_partial.errors.UserError: x is a list of several lengths: pad or cut it to one, as by the data's own map
    """
    if isinstance(value, Mapping):
        return {key: as_arrays(each, f"{name}[{key!r}]") for key, each in value.items()}
    if isinstance(value, tuple) or (isinstance(value, list) and value and all(map(_has_axes, value))):
        return tuple(as_arrays(each, f"{name}[{i}]") for i, each in enumerate(value))
    return _array(value, name)


def _has_axes(value: Any) -> bool:
    return bool(getattr(value, "shape", ()))


def _array(value: Any, name: str) -> np.ndarray:
    if hasattr(value, "detach"):  # a tensor of PyTorch, perhaps with gradients or on another device
        value = value.detach().cpu()
    try:
        array = np.asarray(value, object if isinstance(value, (str, bytes)) else None)
    except ValueError:
        raise UserError(
            f"{name} is a {type(value).__name__} of several lengths: pad or cut it to one, as by the data's own map"
        ) from None
    if array.dtype == np.float64 and not hasattr(value, "dtype"):
        return array.astype(np.float32)
    if array.dtype.kind in "SU":  # whose types have lengths, and of bytes lose zeros at the end
        return np.asarray(value, object)
    if array.dtype.kind == "O":
        for each in array.flat:
            if not isinstance(each, (str, bytes)):
                what = "no value (None)" if each is None else f"a {type(each).__name__}, {shown(each)}"
                raise UserError(f"{name} has {what}: give numbers, texts, arrays, or dicts and tuples of these")
    return array


def stacked(values: Sequence[Any]) -> np.ndarray:
    """Stacks what examples have in one place; bytes and texts as objects, for NumPy cuts zeros off their ends.

    Examples:
        >>> stacked([b"a\\0", b"b"]).tolist()
        [b'a\\x00', b'b']
    """
    if isinstance(values[0], (bytes, str)):
        return np.array(values, object)
    return np.stack([np.asarray(value) for value in values])


def alike(one: Any, other: Any) -> bool:
    """Tells whether two specs describe the same examples, whatever names their tensors have.

    Examples:
        >>> alike((tf.TensorSpec([2], name="x"),), (tf.TensorSpec([2]),)), alike([tf.TensorSpec([2])], ())
        (True, False)
    """
    forms = [
        keras.tree.map_structure(lambda spec: f"{spec.dtype.name} {spec.shape}", keras.tree.lists_to_tuples(each))
        for each in (one, other)
    ]
    return bool(forms[0] == forms[1])


def spec_of(arrays: Any, name: str) -> Any:
    """Describes a nest of arrays by `tf.TensorSpec`.

    Raises:
        UserError: a type that TensorFlow does not know, such as a date.

    Examples:
        >>> spec_of((np.zeros([2]),), "x")
        (TensorSpec(shape=(2,), dtype=tf.float64, name=None),)
    """

    def one(array: np.ndarray) -> tf.TensorSpec:
        try:
            return tf.TensorSpec(array.shape, tf.string if array.dtype.kind in "OSU" else tf.as_dtype(array.dtype))
        except TypeError:
            raise UserError(f"{name} has the type {array.dtype}: make a number or a text of it") from None

    return tf.nest.map_structure(one, arrays)


def misfit(found: Any, spec: Any, name: str = "") -> str:
    """Tells how a nest of arrays, or of specs, differs from a spec; '' where it fits.

    Examples:
        >>> spec = spec_of({"age": np.zeros([2])}, "x")
        >>> misfit({"age": np.zeros([3])}, spec, "x")
        "x['age'] is float64 [3], and was float64 [2]"
        >>> misfit({"age": np.ones([2])}, spec, "x")
        ''
    """
    if isinstance(spec, tf.TensorSpec):
        if isinstance(found, (np.ndarray, tf.TensorSpec)):
            if found.dtype == spec.dtype.as_numpy_dtype and [*found.shape] == spec.shape.as_list():
                return ""
            dtype = "string" if found.dtype in (np.dtype(object), tf.string) else found.dtype.name
            return f"{name} is {dtype} {[*found.shape]}, and was {spec.dtype.name} {spec.shape.as_list()}"
        return f"{name} is a {type(found).__name__}, and was one array"
    if type(found) is not type(spec):
        return f"{name} is a {_kind(found)}, and was a {type(spec).__name__}"
    if isinstance(spec, dict):
        if found.keys() != spec.keys():
            return f"{name} has {_listed(found)}, and had {_listed(spec)}"
        return next((m for key in spec if (m := misfit(found[key], spec[key], f"{name}[{key!r}]"))), "")
    if len(found) != len(spec):
        return f"{name} has {len(found)} parts, and had {len(spec)}"
    return next((m for i, each in enumerate(spec) if (m := misfit(found[i], each, f"{name}[{i}]"))), "")


def _kind(found: Any) -> str:
    return "single array" if isinstance(found, np.ndarray) else type(found).__name__


def _listed(keys: Any) -> str:
    return ", ".join(map(repr, keys)) or "nothing"


PARTS = ("x", "y", "weight")


def as_parts(item: Any, name: str) -> tuple[Any, ...]:
    """Makes (x,), (x, y) or (x, y, weight) of what is a tuple of them, or x alone; each as `as_arrays` does.

    Examples:
        >>> x, y = as_parts(([1.0, 2.0], 3), "mine[0]")
        >>> x.tolist(), y.tolist()
        ([1.0, 2.0], 3)
    """
    parts = item if isinstance(item, tuple) else (item,)
    if not 1 <= len(parts) <= 3:
        raise UserError(f"{name} is a tuple of {len(parts)}: give (x,), (x, y) or (x, y, weight)")
    return tuple(as_arrays(part, f"{name}: {PARTS[i]}") for i, part in enumerate(parts))


def parts_misfit(found: tuple[Any, ...], spec: tuple[Any, ...]) -> str:
    """Tells how the parts of an example differ from a spec, each by its name; '' where they fit."""
    if len(found) != len(spec):
        return f"it has {', '.join(PARTS[: len(found)])}, and had {', '.join(PARTS[: len(spec)])}"
    return next((m for i, each in enumerate(spec) if (m := misfit(found[i], each, PARTS[i]))), "")
