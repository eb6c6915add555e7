"""What a factory's own signature says of its arguments: which types they take, and which it cannot do without."""

import inspect
import os
import types
import typing
from collections.abc import Callable
from typing import Any

# What a configuration file can write out, and in which words.
_PLAIN: dict[Any, str] = {
    **{int: "a whole number", float: "a number", str: "a text in quotes", bool: "True or False"},
    **{types.NoneType: "None", tuple: "a tuple (..., ...)", dict: "a dictionary {...: ...}", os.PathLike: ""},
}


def misfit(function: Callable[..., Any], name: str, value: Any) -> str | None:
    """Compares a value with the annotation of an argument.

    A list serves as a tuple, and a whole number as a float; a bool, which is an int to Python, as neither.

    Args:
        function: a function or a class.
        name: of its argument.
        value: for it.

    Returns:
        What to write instead; None where the value fits, or the annotation is more than a union of plain types.
    """
    hint = typing.get_type_hints(function).get(name, Any)
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = [typing.get_origin(part) or part for part in parts]
    like = {list: tuple, int: float}.get(type(value), type(value))
    if not set(kinds) <= _PLAIN.keys() or type(value) in kinds or like in kinds:
        return None
    default = inspect.signature(function).parameters[name].default
    example = (
        ""
        if default is None or isinstance(default, bool) or default is inspect.Parameter.empty
        else f", such as {default!r}"
    )
    return " or ".join(_PLAIN[kind] for kind in kinds if _PLAIN[kind]) + example


def required(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments without a default."""
    return [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
