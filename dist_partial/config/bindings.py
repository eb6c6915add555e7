"""Checks bindings against the signatures of what they are for: arguments of another type, missing and unknown ones."""

import inspect
import os
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import gin

from dist_partial.errors import UserError
from dist_partial.synonyms import SYNONYMS, meant
from dist_partial.validation import nearest, shown

# What a configuration file can write out, and in which words.
_PLAIN: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    bool: "True or False",
    types.NoneType: "None",
    tuple: "a tuple (..., ...)",
    dict: "a dictionary {...: ...}",
    os.PathLike: "",
}
_OWNERS = ("run", "sample", "replicas")  # before the dot of the names of a run itself
_KERAS = "keras.optimizers."
_FEW = 10  # parameters that a message lists


def check_bindings(ours: Collection[str], bindable: Mapping[str, Callable[..., Any]]) -> None:
    """Looks at what gin has parsed, before anything is called.

    Args:
        ours: selectors of this project's own functions and classes, whose annotations say which types they take.
        bindable: by selector, all that is registered: these, Keras's and the user's.

    Raises:
        UserError: a value of another type than its argument, or a factory that a run will call lacks an argument, or an
            optimizer has none of that name.
    """
    for (scope, selector), values in gin.config._CONFIG.items():
        if selector.startswith(_KERAS):  # which takes any, and refuses it once it is made
            known = [*inspect.signature(bindable[selector]).parameters]
            known += [*inspect.signature(bindable[f"{_KERAS}Optimizer"]).parameters]
            for argument in (each for each in values if each not in known):
                owner = selector.rpartition(".")[2]
                raise UserError(f"{owner} has no parameter {argument!r}{unknown(owner, argument, known)}")
        for argument, value in values.items() if selector in ours else ():
            bound = _written_out(value)
            if isinstance(bound, gin.config.ConfigurableReference):
                continue
            if words := _misfit(bindable[selector], argument, bound):
                name = f"{scope}/{selector.removeprefix('dist_partial.')}.{argument}".lstrip("/")
                raise UserError(f"{name} is {shown(bound)}: write {words}")
    _check_missing(ours, bindable)


def annotation(registry: Any, binding: str) -> Any:
    """Finds the type of what a binding such as 'run.steps' sets: its annotation, or else of what its default is.

    Args:
        registry: gin's, of what can be bound.
        binding: its name, with or without scopes.

    Returns:
        A type, `Annotated` or not; Any if nothing says more.
    """
    selector, _, argument = binding.rpartition("/")[2].rpartition(".")
    try:
        function = registry.get_match(selector).wrapped
        default = inspect.signature(function).parameters[argument].default
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception:  # an unknown name, or one of several; a user's annotation that is none
        return Any
    return hints.get(argument, {bool: bool, int: float, float: float}.get(type(default), Any))


def only_in_python(what: str, learning_rate: Any = None) -> NoReturn:
    """Stands in a run folder's configuration for what only the Python process that trained it has.

    Args:
        what: says what it is.
        learning_rate: with which an optimizer would be made.

    Raises:
        UserError: always.

    Examples:
        >>> only_in_python("run.loss is <function mine>")
        Traceback (most recent call last):
        dist_partial.errors.UserError: run.loss is <function mine>, which only the Python process that trained has: ...
    """
    raise UserError(
        f"{what}, which only the Python process that trained has: there, write result.model.save('mine.keras'); or "
        "define it in a module that can be imported, and train again"
    )


def _check_missing(ours: Collection[str], bindable: Mapping[str, Callable[..., Any]]) -> None:
    config = gin.config._CONFIG  # gin itself says so at the call alone
    bound = {(selector, name) for (_, selector), values in config.items() for name in values}
    waiting, seen = ["dist_partial.run"], set()
    while waiting:
        seen.add(owner := waiting.pop())
        values = [item for (_, selector), values in config.items() if selector == owner for item in values.items()]
        for name, reference in [(name, reference) for name, value in values for reference in _references(value)]:
            selector = reference.configurable.selector
            if selector not in seen:
                waiting.append(selector)
            # These three are called without arguments; what the user's own factories give each other is not known.
            alone = owner == "dist_partial.run" and name in ("model", "data", "loss")
            if reference.evaluate or selector not in bindable or not (alone or {owner, selector} <= set(ours)):
                continue
            missing = [each for each in _required(bindable[selector]) if (selector, each) not in bound]
            if name == "loss" and len(missing) == 2:  # a loss itself, of targets and outputs
                continue
            if missing:
                raise UserError(unbound([f"{reference.scoped_selector}.{each}" for each in missing]))


def unbound(names: Sequence[str]) -> str:
    """Says which arguments have no value, and what to write."""
    return f"not bound: {', '.join(names)}; write {names[0]} = ..."


def unknown(owner: str, argument: str, parameters: Collection[str]) -> str:
    """Ends a message about a parameter that `owner` does not have: with what it is called here, or what is near."""
    if owner in _OWNERS:
        ours = written(argument)
    else:
        name = SYNONYMS.get(argument, ("", ""))[0].rpartition(".")[2]
        ours = f": write {owner}.{name}" if name in parameters else ""
    few = f"; it has {', '.join(parameters)}" if 0 < len(parameters) <= _FEW else ""
    return ours or nearest(argument, parameters) or few or nearest(argument, parameters, always=True)


def written(argument: str) -> str:
    """Says under which name a run has an argument, by this name or one from elsewhere; '' if it has none."""
    for owner in _OWNERS:
        if argument in inspect.signature(gin.config._REGISTRY[f"dist_partial.{owner}"].wrapped).parameters:
            return f": write {owner}.{argument}"
    return meant(argument)


def _misfit(function: Callable[..., Any], name: str, value: Any) -> str | None:
    """What to write instead of a value; None where it fits, or the annotation is more than a union of plain types.

    A list serves as a tuple, and a whole number as a float; a bool, which is an int to Python, as neither.
    """
    hint = typing.get_type_hints(function).get(name, Any)
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = [typing.get_origin(part) or part for part in parts]
    like = {list: tuple, int: float}.get(type(value), type(value))
    if not set(kinds) <= _PLAIN.keys() or type(value) in kinds or like in kinds:
        return None
    words = " or ".join(_PLAIN[kind] for kind in kinds if _PLAIN[kind])
    default = inspect.signature(function).parameters[name].default
    says_nothing = default is None or default is inspect.Parameter.empty or isinstance(default, bool)
    return words if says_nothing else f"{words}, such as {default!r}"


def _required(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments without a default, or with gin's mark in its place."""
    return [
        p.name
        for p in inspect.signature(function).parameters.values()
        if (p.default is p.empty or p.default is gin.REQUIRED) and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]


def _references(value: Any) -> Iterator[Any]:
    """The gin references in a bound value; macros are followed."""
    value = _written_out(value)
    if isinstance(value, gin.config.ConfigurableReference):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _references(part)


def _written_out(value: Any) -> Any:
    """A bound value, or the value of the macro that it names."""
    names: set[str] = set()
    while isinstance(value, gin.config.ConfigurableReference) and value.selector in ("macro", "gin.macro"):
        key = ("/".join(value.scopes), "gin.macro")
        if key[0] in names or "value" not in gin.config._CONFIG.get(key, {}):
            break
        names.add(key[0])
        value = gin.config._CONFIG[key]["value"]
    return value
