"""Settings that were made in Python, written as the gin file that makes them again."""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import gin
import keras
import numpy as np

from dist_partial import compat
from dist_partial.config import gin_files
from dist_partial.config.bindings import only_in_python
from dist_partial.config.settings import Sampling, Settings
from dist_partial.distributed.replicas import ReplicaOptions
from dist_partial.errors import first_line
from dist_partial.models import keras_file
from dist_partial.step.keras_configs import exclude_from_weight_decay, exclusions, left_out
from dist_partial.validation import shown

_FACTORIES = ("model", "data", "optimizer")
_LEFT_OUT = ("callbacks", "replicas", "sampling")


def has_name(value: Any) -> bool:
    """Tells whether a gin file can name a factory: a function or class of a module, or a `functools.partial` of one.

    Examples:
        >>> has_name(keras.optimizers.Adam), has_name(lambda: None)
        (True, False)
        >>> [has_name(functools.partial(keras.optimizers.Adam, learning_rate=rate)) for rate in (0.1, object())]
        [True, False]
    """
    gin_files._register()
    try:
        _Writer()._value(value)
    except _Unwritable:
        return False
    return True


def _importable(value: Any) -> bool:
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    return (
        (inspect.isclass(value) or inspect.isfunction(value))
        and module not in (None, "__main__")
        and not name.startswith("_")  # which gin_files makes no names of
        and getattr(sys.modules.get(module), name, None) is value
    )


def text(settings: Settings) -> str:
    """Writes settings as a gin file, without Keras's callbacks; what no file can name is `only_in_python`.

    Examples:
        >>> from dist_partial.data import stdlib_shapes
        >>> from dist_partial.models import two_dense
        >>> adam = functools.partial(keras.optimizers.Adam, 0.01)
        >>> print(text(Settings([("train", ".*")], two_dense, stdlib_shapes, adam, steps=5)))
        # What was given to dist_partial.train.
        run.rules = [('train', '.*')]
        run.model = @two_dense
        run.data = @stdlib_shapes
        run.optimizer = @optimizer/keras.optimizers.Adam
        optimizer/keras.optimizers.Adam.learning_rate = 0.01
        run.steps = 5
        <BLANKLINE>
    """
    gin_files._register()
    writer = _Writer()
    for field in dataclasses.fields(Settings):
        value = getattr(settings, field.name)
        if getattr(value, "func", None) is keras_file:  # which imports nothing by itself
            writer.imports |= {name.rpartition(".")[0] for name in value.keywords.get("classes", ())}
        if field.name not in _LEFT_OUT and not _same(value, _default(field)):
            writer.bind("run", field.name, value)
    replicas = getattr(settings.replicas, "__self__", None)
    for name, owner in (("sample", settings.sampling), ("replicas", replicas)):
        for field in dataclasses.fields(owner) if isinstance(owner, (Sampling, ReplicaOptions)) else ():
            if not _same(getattr(owner, field.name), _default(field)):
                writer.bind(name, field.name, getattr(owner, field.name))
    imports = [f"import {module}" for module in sorted(writer.imports)]
    return "\n".join(["# What was given to dist_partial.train.", *imports, *writer.lines, ""])


class _Unwritable(Exception):
    """A value has no form in a gin file."""


class _Writer:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.imports: set[str] = set()
        self._known = {id(known.wrapped): name for name, known in gin.config._REGISTRY.items()}
        self._scopes: set[str] = set()
        self._scope = ""

    def bind(self, owner: str, name: str, value: Any) -> None:
        """Adds the line of a binding, and those of what it refers to."""
        self._scope, place = name, len(self.lines)
        try:
            written = self._value(value)
        except _Unwritable as error:
            del self.lines[place:]
            lost = functools.partial(only_in_python, what=f"{owner}.{name} is {error}")
            written = self._value(lost) + ("" if name in _FACTORIES else "()")
        self.lines.insert(place, f"{owner}.{name} = {written}")

    def _value(self, value: Any) -> str:
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, (bool, int, str)) or (type(value) is float and np.isfinite(value)):
            return repr(value)
        if isinstance(value, (list, tuple)):
            inner = ", ".join(map(self._value, value)) + ("," if isinstance(value, tuple) and len(value) == 1 else "")
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        if isinstance(value, dict):
            if "class_name" in value and "config" in value:  # of a config of Keras's
                try:
                    made = keras.saving.deserialize_keras_object(value)
                except Exception as error:  # of a class that is not registered, or that its config does not make
                    raise _Unwritable(f"a {value['class_name']}") from error
                return self._value(made)
            return f"{{{', '.join(f'{self._value(k)}: {self._value(each)}' for k, each in value.items())}}}"
        if isinstance(value, functools.partial):
            return self._configured(value.func, _by_name(value) | value.keywords)
        if (found := getattr(value, "instance", None)) is not None:  # a factory of what is like this one
            return self._made(found)
        if inspect.isclass(value) or inspect.isfunction(value):
            return self._configured(value, {})
        return f"{self._made(value)}()"

    def _made(self, value: Any) -> str:
        """What makes an object like this one."""
        if dataclasses.is_dataclass(value):
            arguments = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        elif hasattr(value, "get_config"):
            arguments = {name: each for name, each in value.get_config().items() if name != "dtype"}
            arguments |= compat.loss_arguments(value)
            if isinstance(value, keras.optimizers.Optimizer) and callable(rate := compat.learning_rate(value)):
                arguments["learning_rate"] = rate  # whose own config may not have all of it
            for name in _left_out(value):
                if name not in compat.EXCLUSIONS and name != compat.LOSS_ARGUMENTS:
                    raise _Unwritable(f"{shown(value)}, whose get_config leaves out {name!r}")
            if str(arguments.get("name")).replace("_", "") == type(value).__name__.lower():  # Keras's own
                del arguments["name"]
        else:
            raise _Unwritable(shown(value))
        parameters = inspect.signature(type(value)).parameters
        changed = {k: v for k, v in arguments.items() if k not in parameters or not _same(v, parameters[k].default)}
        kind: Callable[..., Any] = type(value)
        made = functools.partial(kind, **changed)
        if isinstance(value, keras.optimizers.Optimizer) and (pattern := exclusions(value, ()).get("pattern")):
            made = functools.partial(exclude_from_weight_decay, optimizer=made, names=pattern.split("|"))
        return self._value(made)

    def _configured(self, function: Callable[..., Any], arguments: dict[str, Any]) -> str:
        """A reference to a function or class that is called with these arguments, in a scope of its own."""
        name = self._known.get(id(function), "").removeprefix("dist_partial.")
        if not name:
            if not _importable(function):
                raise _Unwritable(shown(function))
            self.imports.add(function.__module__)
            name = f"{function.__module__}.{function.__name__}"
        if not arguments:
            return f"@{name}"
        scope, number = self._scope, 1
        while scope in self._scopes:
            number += 1
            scope = f"{self._scope}_{number}"
        self._scopes.add(scope)
        for key, value in arguments.items():
            place = len(self.lines)
            self.lines.insert(place, f"{scope}/{name}.{key} = {self._value(value)}")
        return f"@{scope}/{name}"


def _left_out(value: Any) -> list[str]:
    try:
        return sorted(left_out(value))
    except Exception as error:  # of a class of the user's, whose get_config is not what its __init__ takes
        raise _Unwritable(f"{shown(value)} ({first_line(error)})") from error


def _by_name(partial: functools.partial[Any]) -> dict[str, Any]:
    """What a partial function was given by position, under the names of its parameters."""
    parameters = list(inspect.signature(partial.func).parameters.values())[: len(partial.args)]
    if len(parameters) < len(partial.args) or any(each.kind is not each.POSITIONAL_OR_KEYWORD for each in parameters):
        raise _Unwritable(shown(partial))
    return {each.name: value for each, value in zip(parameters, partial.args, strict=True)}


def _default(field: Any) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _same(value: Any, other: Any) -> bool:
    try:
        return type(value) is type(other) and bool(value == other)
    except (ValueError, TypeError):  # of arrays, say
        return False
