"""What functions of the user's compute with, as text: what tells a function apart from another of the same name."""

import base64
import contextlib
import dataclasses
import dis
import functools
import hashlib
import inspect
import marshal
import platform
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.errors import is_users

_SHOWN = 60  # characters of a value; of a longer one a digest is shown, too
_ITEMS = 10_000  # of a list, and
_BYTES = 2**24  # of an array: of larger ones, the size counts
_VALUES = 100_000  # in all
_PYTHON = ".".join(platform.python_version_tuple()[:2])
# Methods of layers, losses, optimizers and schedules.
_CALLED = ("__init__", "__call__", "build", "call", "compute_loss", "update_step")
_HAS_DOCSTRING = 0x4000000  # CO_HAS_DOCSTRING of Python 3.13


def name_of(function: Callable[..., Any]) -> str:
    """Finds the name of a function, or of the class of what is called like one.

    Examples:
        >>> name_of(functools.partial(max, 3))
        'max'
    """
    function = function.func if isinstance(function, functools.partial) else function
    return getattr(function, "__name__", type(function).__name__)


def defined_at(function: Callable[..., Any]) -> str:
    """Finds where a function is written, as " (file, line n)"; '' for one that is not of Python.

    Examples:
        >>> defined_at(max)
        ''
    """
    code = getattr(inspect.unwrap(getattr(function, "func", function)), "__code__", None)
    return f" ({code.co_filename}, line {code.co_firstlineno})" if code else ""


def described(function: Callable[..., Any]) -> dict[str, str]:
    """Collects what a function computes with: a digest of its code, and the values that it has beside its arguments.

    These are the arguments of a `functools.partial`, defaults, variables of the functions around it, what it is a
    method of, and the globals of its module and of the user's other modules, if its code names them. Functions of the
    user's among these are followed. Of the code of installed packages the names count.

    Returns:
        Text by name. Of code it is a digest of the bytecode, which another Python makes otherwise: see `other_python`.

    Examples:
        >>> def scale(factor, x):
        ...     return x * factor
        >>> described(functools.partial(scale, 3))["argument 0"]
        '3'
        >>> described(np.sin)
        {'code': 'numpy.sin'}
    """
    found = _Found()
    found.function("", function)
    return found.texts


def other_python(old: Any, new: Any) -> bool:
    """Tells whether two texts of `described` are of code that two versions of Python have made.

    Examples:
        >>> other_python("code 12ab of Python 3.11", "code 34cd of Python 3.12")
        True
        >>> other_python("code 12ab of Python 3.11", "code 34cd of Python 3.11"), other_python("3.11", "3.12")
        (False, False)
    """
    both = [re.fullmatch(r"code \w+ of Python (\S+)", str(text)) for text in (old, new)]
    return all(both) and len({found[1] for found in both if found}) == 2


def nameless(config: Any) -> Any:
    """Makes of a configuration of Keras's what is the same in each process.

    Without the names of layers, which Keras numbers where they have none, and the links by these names; and with a
    digest of the code of a lambda, which is written with its file and line.

    Examples:
        >>> nameless({"name": "dense_1", "units": 3})
        {'units': 3}
    """
    if isinstance(config, dict):
        if (found := _of_lambda(config)) is not None:
            code, *rest = found
            return [_digest(_content(marshal.loads(base64.b64decode(code)))), *map(nameless, rest)]  # of this process
        links = ("name", "inbound_nodes", "input_layers", "output_layers")
        return {str(key): nameless(value) for key, value in config.items() if key not in links}
    return [nameless(value) for value in config] if isinstance(config, (list, tuple)) else config


def _of_lambda(config: dict[str, Any]) -> tuple[Any, ...] | None:
    """Finds code, defaults and closure where Keras 3.15 has written a lambda, which it does in three forms."""
    if config.get("class_name") == "__lambda__":
        config = config["config"]
    if config.keys() == {"code", "defaults", "closure"}:
        return tuple(config.values())
    value = config.get("value")
    return tuple(value) if len(config) == 1 and isinstance(value, (list, tuple)) and len(value) == 3 else None


def of_classes(kinds: Iterable[type]) -> dict[str, str]:
    """Collects what the user's classes among these compute with: of each method what `described` collects.

    A method counts if Keras calls it or another one names it, so that a new one of another purpose makes no difference.

    Examples:
        >>> of_classes([dict])
        {}
    """
    found = _Found()
    for kind in dict.fromkeys(base for one in kinds for base in one.__mro__ if _is_users_class(base)):
        parts = {name: getattr(each, "fget", getattr(each, "__func__", each)) for name, each in vars(kind).items()}
        methods = {name: each for name, each in parts.items() if inspect.isfunction(each)}
        used = {*_CALLED}.union(*(_attribute_names(each.__code__) for each in methods.values()))
        for name in sorted(used & parts.keys()):
            found.value(f"{kind.__name__}.{name}", parts[name])
    return found.texts


class _Found:
    """Collects texts by name, each function once."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self._seen: dict[int, Any] = {}  # kept, so that no other one gets the id of one
        self._left = _VALUES

    def function(self, name: str, function: Any) -> None:
        """Adds what a function computes with; its name is '' for the first one."""
        if id(function) in self._seen:
            return
        self._seen[id(function)] = function
        if isinstance(function, functools.partial):
            for key, value in (*enumerate(function.args), *function.keywords.items()):
                self.value(_joined(name, f"argument {key}"), value)
            return self.function(name, function.func)
        if inspect.ismethod(function):
            self.value(_joined(name, "self"), function.__self__)
            return self.function(name, function.__func__)
        code = getattr(function, "__code__", None)
        own = code is not None and _is_users_code(code, function.__globals__.get("__name__"))
        if not own and hasattr(function, "__wrapped__"):  # of gin, tf.function, functools.wraps in a library
            return self.function(name, function.__wrapped__)
        if code is None:
            return self._called(name, function)
        self.texts[_joined(name, "code")] = _digest(_content(code)) if own else _full_name(function)
        for key, value in _defaults(function):
            self.value(_joined(name, f"default of {key}"), value)
        for key, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                self.value(_joined(name, key), cell.cell_contents)
            except ValueError:  # it is empty yet
                continue
        for key, value in _globals(function, code) if own else ():
            self.value(_joined(name, key), value)
        return None

    def _called(self, name: str, function: Any) -> None:
        """Adds what is not made of Python code by itself: a function in C, or an object that can be called."""
        if hasattr(function, "__name__"):
            self.texts[_joined(name, "code")] = _full_name(function)
            return
        self.texts[_joined(name, "code")] = self._class(type(function))
        for key, value in _parts(function).items():
            self.value(_joined(name, str(key)), value)

    def value(self, name: str, value: Any) -> None:
        """Adds a value; a function of the user's as what it computes with."""
        if isinstance(value, (functools.partial, types.FunctionType, types.MethodType)):
            self.function(name, value)
        elif not isinstance(value, types.ModuleType):
            self.texts[name] = self._text(value)

    def _text(self, value: Any, depth: int = 0) -> str:
        try:
            text = self._written(value, depth)
        except Exception:  # of an object whose attributes raise this and that
            text = type(value).__name__
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({hashlib.sha256(text.encode()).hexdigest()[:16]})"

    def _written(self, value: Any, depth: int) -> str:
        """A value as text that is the same in each process: without addresses, and sets in order."""
        kind, self._left = type(value).__name__, self._left - 1
        if self._left < 0:
            return kind
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, type(...), slice, range)):
            return repr(value)
        if isinstance(value, tf.Tensor) and hasattr(value, "numpy"):
            value = value.numpy()
        if isinstance(value, (np.ndarray, np.generic)):
            return _array(np.asarray(value))
        if isinstance(value, (list, tuple, set, frozenset, dict)):
            if depth > 8 or len(value) > _ITEMS:
                return f"{kind} of {len(value)}"
            each = functools.partial(self._text, depth=depth + 1)
            if isinstance(value, dict):
                return f"{{{', '.join(f'{each(key)}: {each(one)}' for key, one in value.items())}}}"
            texts = sorted(map(each, value)) if isinstance(value, (set, frozenset)) else map(each, value)
            return f"{'' if kind in ('list', 'tuple') else kind}[{', '.join(texts)}]"
        if isinstance(value, type) or hasattr(value, "__code__"):
            return self._class(value) if isinstance(value, type) else _full_name(value)
        parts = _parts(value) if depth <= 8 else {}
        text = self._class(type(value))
        return f"{text} {self._written(parts, depth + 1)}" if parts else text

    def _class(self, kind: type) -> str:
        """The name of a class; adds the code of its methods, if it is the user's."""
        if _is_users_class(kind):
            methods = {name: _content(each.__code__) for name, each in vars(kind).items() if inspect.isfunction(each)}
            self.texts[f"class {kind.__name__}"] = _digest(sorted(methods.items()))
        return _full_name(kind)


def _parts(value: Any) -> dict[str, Any]:
    """What an object consists of: Keras's of its configuration, the user's of its attributes, others of nothing."""
    if hasattr(value, "get_config"):
        with contextlib.suppress(Exception):  # of a class that has none
            return dict(nameless(value.get_config()))
    if not _is_users_class(type(value)):
        return {}
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dict(getattr(value, "__dict__", {}))


def _joined(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _full_name(value: Any) -> str:
    name = getattr(value, "__qualname__", value.__name__)
    return f"{getattr(value, '__module__', None) or type(value).__module__}.{name}"


def _array(array: np.ndarray) -> str:
    if array.ndim == 0 and array.dtype != object:
        return f"{array.dtype.name} {array}"
    words = f"{array.dtype.name} {list(array.shape)}"
    if array.dtype == object or array.nbytes > _BYTES:
        return words
    return f"{words} {hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]}"


def _is_users_code(code: types.CodeType, module: Any) -> bool:
    return module == "__main__" or is_users(code.co_filename)  # what is typed into Python has no file


def _is_users_class(kind: type) -> bool:
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return kind.__module__ == "__main__" or is_users(file or "<")


def _digest(content: Any) -> str:
    return f"code {hashlib.sha256(repr(content).encode()).hexdigest()[:16]} of Python {_PYTHON}"


def _content(code: types.CodeType) -> tuple[Any, ...]:
    """What a code object does, without lines, files, docstrings and the names of local variables."""
    constants = list(code.co_consts)
    if sys.version_info < (3, 13):
        documented = code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")
    else:
        documented = code.co_flags & _HAS_DOCSTRING
    if documented and constants and isinstance(constants[0], str):
        constants[0] = None
    return (
        code.co_code,
        code.co_exceptiontable,
        code.co_names,
        code.co_argcount,
        code.co_freevars,
        [_constant(each) for each in constants],
    )


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _content(value)
    if isinstance(value, frozenset):  # whose order changes from process to process
        return sorted(map(repr, value))
    return [_constant(each) for each in value] if isinstance(value, tuple) else repr(value)


def _defaults(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, parameter in inspect.signature(function, follow_wrapped=False).parameters.items():
        if parameter.default is not parameter.empty:
            yield name, parameter.default


def _globals(function: types.FunctionType, code: types.CodeType) -> Iterator[tuple[str, Any]]:
    """The globals that code names, and what it names of the user's other modules."""
    for name in sorted(_global_names(code)):
        if name not in function.__globals__:
            continue
        value = function.__globals__[name]
        yield name, value
        if isinstance(value, types.ModuleType) and is_users(getattr(value, "__file__", None) or "<"):
            for attribute in sorted(_attribute_names(code)):
                if attribute in vars(value):
                    yield f"{name}.{attribute}", vars(value)[attribute]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object and those of the functions within."""
    yield code
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from _codes(each)


def _global_names(code: types.CodeType) -> set[str]:
    loads = ("LOAD_GLOBAL", "LOAD_NAME")
    return {each.argval for one in _codes(code) for each in dis.get_instructions(one) if each.opname in loads}


def _attribute_names(code: types.CodeType) -> set[str]:
    return {name for one in _codes(code) for name in one.co_names}
