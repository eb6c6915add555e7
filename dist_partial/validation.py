"""Checks arguments by their annotations, compares values, and shows them and names near a misspelt one in messages.

    @dataclasses.dataclass(frozen=True)
    class Settings:
        steps: Annotated[int, AtLeast(1)] = 1000
        precision: Annotated[str, OneOf("float32", "float64")] = "float32"

        def __post_init__(self) -> None:
            check(self, "run")

`Settings(steps=0)` then raises "run.steps is 0: it must be a whole number of at least 1".
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_partial.errors import UserError


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """Annotates a number that is not below a bound.

    Examples:
        >>> print(AtLeast(1), AtLeast(1).holds(1), AtLeast(1).holds(0))
        at least 1 True False
    """

    bound: float

    def holds(self, value: float) -> bool:
        return value >= self.bound

    def __str__(self) -> str:
        return f"at least {self.bound:,}"


@dataclasses.dataclass(frozen=True)
class AtMost:
    """Annotates a number that is not above a bound.

    Examples:
        >>> print(AtMost(4096), AtMost(4096).holds(4096), AtMost(4096).holds(4097))
        at most 4,096 True False
    """

    bound: float

    def holds(self, value: float) -> bool:
        return value <= self.bound

    def __str__(self) -> str:
        return f"at most {self.bound:,}"


@dataclasses.dataclass(frozen=True)
class Above:
    """Annotates a number above a bound.

    Examples:
        >>> print(Above(0), Above(0).holds(0.1), Above(0).holds(0))
        above 0 True False
    """

    bound: float

    def holds(self, value: float) -> bool:
        return value > self.bound

    def __str__(self) -> str:
        return f"above {self.bound:,}"


@dataclasses.dataclass(frozen=True)
class Below:
    """Annotates a number below a bound.

    Examples:
        >>> print(Below(1), Below(1).holds(0.9), Below(1).holds(1))
        below 1 True False
    """

    bound: float

    def holds(self, value: float) -> bool:
        return value < self.bound

    def __str__(self) -> str:
        return f"below {self.bound:,}"


class OneOf:
    """Annotates one of several values; True is not 1.

    Examples:
        >>> OneOf("float32", None).refusal("float23"), OneOf("float32", None).refusal(None), OneOf(1).refusal(True)
        ("write 'float32' or None", '', 'write 1')
    """

    def __init__(self, *choices: Any) -> None:
        self.choices = choices

    def refusal(self, value: Any) -> str:
        """What to write instead of a value; '' where it is one of them."""
        for each in self.choices:
            if isinstance(value, bool) == isinstance(each, bool) and isinstance(value, _PLAIN) and value == each:
                return ""
        *first, last = map(repr, self.choices)
        return f"write {', '.join(first)} or {last}" if first else f"write {last}"


@dataclasses.dataclass(frozen=True)
class Factory:
    """Annotates a function or class that makes something.

    Attributes:
        example: as a gin file has it.
        made: classes of what it makes, which can be called, too.

    Examples:
        >>> refusal = Factory("@two_dense").refusal
        >>> refusal("two_dense").endswith("@two_dense without ()"), refusal(dict)
        (True, '')
    """

    example: str
    made: tuple[type, ...] = ()

    def refusal(self, value: Any) -> str:
        """What to write instead of a value; '' where it is a factory."""
        if callable(value) and not isinstance(value, self.made):
            return ""
        name = self.example.removeprefix("@")
        return f"give what makes one, such as {name} or lambda: {name}(...), in a gin file {self.example} without ()"


@dataclasses.dataclass(frozen=True)
class Has:
    """Annotates an object with an attribute.

    Attributes:
        attribute: its name.
        words: what to write instead of something else.

    Examples:
        >>> mark = Has("upper", "write a text")
        >>> mark.refusal("a text"), mark.refusal(5), mark.refusal(str)
        ('', 'write a text', 'write a text')
    """

    attribute: str
    words: str

    def refusal(self, value: Any) -> str:
        """What to write instead of a value; '' where it has the attribute, and is no class, which all have it."""
        return "" if hasattr(value, self.attribute) and not isinstance(value, type) else self.words


@dataclasses.dataclass(frozen=True)
class Patterns:
    """Annotates a list of regular expressions.

    Attributes:
        empty: whether it may be empty.

    Examples:
        >>> print(Patterns().refusal([".*/kernel", "block_(0"]))
        'block_(0' is not a regular expression: missing ), unterminated subpattern at position 6
    """

    empty: bool = True

    def refusal(self, value: Any) -> str:
        """What to write instead of a value; '' where it is such a list."""
        if not isinstance(value, (list, tuple)) or not (value or self.empty):
            return "write a list of patterns, such as [r'block_0/.*']"
        return next((problem for each in value if (problem := _pattern_problem(each))), "")


def check(owner: Any, prefix: str, separator: str = ".") -> None:
    """Checks the fields of a dataclass by their annotations.

    An `Annotated` field has, after its type, bounds or other marks of this module, and possibly a text, which takes
    the place of the standard words for what to write. A field of type `int`, `float`, `str` or `bool`, or one of these
    or None, is checked for its type; a whole number is no bool, and a number is finite.

    Args:
        owner: the object.
        prefix: of the names in messages, such as the name that gin has for it.
        separator: between it and a field's name.

    Raises:
        UserError: the first field that does not fit.

    Examples:
        >>> @dataclasses.dataclass
        ... class Options:
        ...     steps: typing.Annotated[int, AtLeast(1)] = 100
        >>> check(Options(steps=5), "mine")
        >>> check(Options(steps=0), "mine")
        Traceback (most recent call last):
        dist_partial.errors.UserError: mine.steps is 0: it must be a whole number of at least 1
    """
    for name, hint in _hints(type(owner)).items():
        check_value(f"{prefix}{separator}{name}", getattr(owner, name), hint)


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], prefix: str | None = None) -> None:
    """Checks the arguments of a function by their annotations, as `check` does.

    Args:
        function: the function.
        arguments: by name, such as `locals()` where the function begins.
        prefix: of the names in messages; None is the function's name.

    Raises:
        UserError: the first that does not fit.

    Examples:
        >>> def corpus(window: typing.Annotated[int, AtLeast(1)], name: str = "mine") -> None:
        ...     check_arguments(corpus, locals())
        >>> corpus(5)
        >>> corpus(5, name=7)
        Traceback (most recent call last):
        dist_partial.errors.UserError: corpus.name is 7: write a text in quotes
    """
    prefix = function.__name__ if prefix is None else prefix
    for name, hint in _hints(function).items():
        if name in arguments:
            check_value(f"{prefix}.{name}".lstrip("."), arguments[name], hint)


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raises UserError, which begins with the name, unless a value fits an annotation.

    Examples:
        >>> check_value("mine.rate", None, float | None)
        >>> check_value("mine.rate", "fast", float | None)
        Traceback (most recent call last):
        dist_partial.errors.UserError: mine.rate is 'fast': it must be a number, or None
    """
    kind, *marks = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if value is None and types.NoneType in kinds:
        return
    problem = next((problem for mark in marks if hasattr(mark, "refusal") and (problem := mark.refusal(value))), "")
    bounds = [mark for mark in marks if hasattr(mark, "holds")]
    plain = set(kinds) <= set(_PLAIN) and not any(hasattr(mark, "refusal") for mark in marks)
    if plain and not (any(_is(value, each) for each in kinds) and all(bound.holds(value) for bound in bounds)):
        problem = _words(kinds, bounds)
    if problem:
        raise UserError(f"{name} is {shown(value)}: {next((mark for mark in marks if isinstance(mark, str)), problem)}")


def check_pattern(where: str, pattern: Any) -> None:
    """Raises UserError unless it is a regular expression.

    Examples:
        >>> check_pattern("rule 1", "head/.*")
        >>> check_pattern("rule 1", "*")
        Traceback (most recent call last):
        dist_partial.errors.UserError: rule 1: '*' is not a regular expression: nothing to repeat at position 0
    """
    if problem := _pattern_problem(pattern):
        raise UserError(f"{where}: {problem}")


_PLAIN = (int, float, str, bool, types.NoneType)


def _is(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    return isinstance(value, str) if kind is str else type(value) is kind


def _words(kinds: Sequence[Any], bounds: Sequence[Any]) -> str:
    limits, optional = " and ".join(map(str, bounds)), types.NoneType in kinds
    if float in kinds or int in kinds:
        number = "a number" if float in kinds else "a whole number"
        of = " of" if limits.startswith("at") else ""
        return f"it must be {number}{of}{' ' if limits else ''}{limits}{', or None' if optional else ''}"
    if bool in kinds:
        return "write True, False or None" if optional else "write True or False"
    return f"write a text in quotes{', or None' if optional else ''}"


def _pattern_problem(pattern: Any) -> str:
    if not isinstance(pattern, str):
        return f"the pattern {shown(pattern)} must be a string"
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{pattern!r} is not a regular expression: {error}"
    return ""


def _hints(of: Any) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(of)} if dataclasses.is_dataclass(of) else None
    hints = typing.get_type_hints(of, include_extras=True)
    return {name: hint for name, hint in hints.items() if (names is None or name in names) and name != "return"}


def differences(before: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Lists where two JSON values differ: a dotted name and both values there, None for what is absent.

    Examples:
        >>> differences({"steps": 5, "rules": ["a", "b"]}, {"steps": 5, "rules": ["a", "c"], "seed": 0})
        [('rules.1', 'b', 'c'), ('seed', None, 0)]
    """
    if isinstance(before, list) and isinstance(now, list):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if not (isinstance(before, dict) and isinstance(now, dict)):
        # Python calls 0, 0.0 and False equal.
        return [] if type(before) is type(now) and before == now else [(name, before, now)]
    found: list[tuple[str, Any, Any]] = []
    for key in [*before, *[key for key in now if key not in before]]:
        place = f"{name}.{key}".lstrip(".")
        both = key in before and key in now
        found += differences(before[key], now[key], place) if both else [(place, before.get(key), now.get(key))]
    return found


def shown(value: Any) -> str:
    """Writes a value as messages show it: in one line, and cut if it is long.

    Examples:
        >>> import numpy as np
        >>> shown(np.zeros([2, 2]))
        'array([[0., 0.], [0., 0.]])'
    """
    text = re.sub(r"\s*[\r\n]\s*", " ", repr(value))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def counted(count: int, noun: str, plural: str = "") -> str:
    """Writes a number of things, whose plural has an s where none is given.

    Examples:
        >>> counted(1, "unit"), counted(2, "unit")
        ('1 unit', '2 units')
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def nearest(word: str, names: Iterable[str], always: bool = False, folder: Path | None = None) -> str:
    """Ends a message about a name that is not known with the up to three names most like it.

    Args:
        word: what was written.
        names: those that are known.
        always: whether to show three also where fewer are like it.
        folder: in which files of these names are; they are shown with it, as they can be pasted.

    Examples:
        >>> nearest("dens1/kernel", ["dense1/kernel", "dense2/kernel", "bias"])
        "; nearest: 'dense1/kernel', 'dense2/kernel'"
        >>> nearest("head", ["kernel"])
        ''
        >>> nearest("fulll.gin", ["full.gin"], folder=Path("gin_configs"))
        "; nearest: 'gin_configs/full.gin'"
        >>> nearest("Auc", ["Sum", "AUC"])
        "; nearest: 'AUC'"
    """
    known: dict[str, list[str]] = {}  # by the name in small letters
    for name in dict.fromkeys(names):
        known.setdefault(name.lower(), []).append(name)
    close = difflib.get_close_matches(word[:_SHOWN].lower(), known, 3, 0 if always else 0.5)
    found = [name for each in close for name in known[each]][:3]
    found = [str(folder / name) for name in found] if folder else found
    return f"; nearest: {', '.join(map(repr, found))}" if found else ""


_SHOWN = 200  # characters of a value in a message
