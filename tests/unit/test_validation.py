"""validation.py: each kind of annotation takes what it is for, and refuses the rest in one line."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest

from dist_partial import validation
from dist_partial.errors import UserError
from dist_partial.validation import Above, AtLeast, AtMost, Below, Factory, Has, OneOf, Patterns, nearest
from tests import ROOT

COUNT = Annotated[int, AtLeast(1)]
MAYBE = Annotated[int | None, AtLeast(1), AtMost(9)]
SHARE = Annotated[float, Above(0), Below(1)]
CHOICE = Annotated[Any, OneOf("a", 1, None)]
MAKES = Annotated[Callable[[], Any] | None, Factory("@adam", (np.ufunc,))]
MAKE = "give what makes one, such as adam or lambda: adam(...), in a gin file @adam without ()"
TEXT = Annotated[int, AtLeast(1), "write how many"]


@pytest.mark.parametrize(
    ("hint", "values"),
    [
        (COUNT, [1, 2, 10**30]),
        (MAYBE, [None, 1, 9]),
        (SHARE, [0.5, 1e-300]),
        (Annotated[float, AtLeast(0)], [0, 0.0, 3, 10**400]),
        (CHOICE, ["a", 1, 1.0, None]),
        (MAKES, [None, dict, lambda: 1]),
        (Annotated[Any, Has("shape", "")], [np.zeros(1)]),
        (Annotated[Sequence[str], Patterns()], [[], (), ["a.*", "b"]]),
        (bool, [True, False]),
        (bool | None, [True, None]),
        (str, ["", "a"]),
        (str | None, [None, "a"]),
        (Any, [None, object(), [1]]),
        (Sequence[Any], [3, None]),  # what is no plain type is not checked
        (int | Sequence[int], ["a"]),
    ],
)
def test_what_fits(hint, values):
    for value in values:
        validation.check_value("run.x", value, hint)


@pytest.mark.parametrize(
    ("hint", "value", "line"),
    [
        (COUNT, 0, "run.x is 0: it must be a whole number of at least 1"),
        (COUNT, 1.0, "run.x is 1.0: it must be a whole number of at least 1"),
        (COUNT, True, "run.x is True: it must be a whole number of at least 1"),
        (COUNT, None, "run.x is None: it must be a whole number of at least 1"),
        (COUNT, "3", "run.x is '3': it must be a whole number of at least 1"),
        (MAYBE, 10, "run.x is 10: it must be a whole number of at least 1 and at most 9, or None"),
        (SHARE, 1, "run.x is 1: it must be a number above 0 and below 1"),
        (SHARE, float("nan"), "run.x is nan: it must be a number above 0 and below 1"),
        (Annotated[float, AtLeast(0)], float("inf"), "run.x is inf: it must be a number of at least 0"),
        (Annotated[float, AtLeast(0)], False, "run.x is False: it must be a number of at least 0"),
        (CHOICE, True, "run.x is True: write 'a', 1 or None"),
        (CHOICE, [1], "run.x is [1]: write 'a', 1 or None"),
        (CHOICE, np.ones(2), "run.x is array([1., 1.]): write 'a', 1 or None"),
        (Annotated[str, OneOf("a")], "b", "run.x is 'b': write 'a'"),
        (MAKES, 3, f"run.x is 3: {MAKE}"),
        (MAKES, np.add, f"run.x is <ufunc 'add'>: {MAKE}"),
        (bool, np.zeros([2, 2]), "run.x is array([[0., 0.], [0., 0.]]): write True or False"),
        (Annotated[Any, Patterns()], [np.ones([2, 1])],
         "run.x is [array([[1.], [1.]])]: the pattern array([[1.], [1.]]) must be a string"),
        (Annotated[Any, Has("shape", "bind an array")], [], "run.x is []: bind an array"),
        (Annotated[Any, Has("shape", "bind an array")], np.ndarray, "run.x is <class 'numpy.ndarray'>: bind an array"),
        (Annotated[Any, Has("shape", "bind an array")], None, "run.x is None: bind an array"),
        (Annotated[Any, Patterns()], "a", "run.x is 'a': write a list of patterns, such as [r'block_0/.*']"),
        (Annotated[Any, Patterns(empty=False)], [], "run.x is []: write a list of patterns, such as [r'block_0/.*']"),
        (Annotated[Any, Patterns()], [3], "run.x is [3]: the pattern 3 must be a string"),
        (bool, 1, "run.x is 1: write True or False"),
        (str, None, "run.x is None: write a text in quotes"),
        (str | None, 3, "run.x is 3: write a text in quotes, or None"),
        (bool | None, 1, "run.x is 1: write True, False or None"),
        (TEXT, 0, "run.x is 0: write how many"),
        (str, b"\n" * 500, "run.x is b'" + "\\n" * 99 + "...: write a text in quotes"),
    ],
)  # fmt: skip
def test_what_does_not_fit(hint, value, line):
    with pytest.raises(UserError) as raised:
        validation.check_value("run.x", value, hint)
    assert str(raised.value) == line


def test_a_pattern_that_is_no_regular_expression():
    with pytest.raises(UserError, match=re.escape("run.x is ['(']: '(' is not a regular expression: missing )")):
        validation.check_value("run.x", ["("], Annotated[Sequence[str], Patterns()])


@dataclasses.dataclass(frozen=True)
class Example:
    size: COUNT
    names: Sequence[str] = ()
    share: SHARE = 0.5

    def __post_init__(self):
        validation.check(self, "example")


def test_the_fields_of_a_dataclass_are_checked_in_their_order():
    assert list(inspect.signature(Example).parameters) == ["size", "names", "share"]  # what gin sees
    Example(3)
    with pytest.raises(UserError, match=r"^example\.size is 0: "):
        Example(0, share=2)
    with pytest.raises(UserError, match=r"^example\.share is 2: "):
        dataclasses.replace(Example(3), share=2)
    with pytest.raises(UserError, match=r"^rule 1: share is 7: "):
        validation.check(type("Other", (Example,), {"__post_init__": lambda self: None})(3, share=7), "rule 1", ": ")


def test_the_arguments_of_a_function_are_checked():
    def make(size: COUNT = 1, *, share: SHARE = 0.5) -> tuple:
        validation.check_arguments(make, locals())
        return size, share

    assert make(2, share=0.1) == (2, 0.1)
    with pytest.raises(UserError, match=r"^make\.size is 0: "):
        make(0)
    with pytest.raises(UserError, match=r"^share is 1: "):
        validation.check_arguments(make, {"share": 1}, "")


def test_names_that_are_near():
    names = ["dense1/kernel", "dense2/kernel", "bias"]
    assert nearest("dens1/kernel", names) == "; nearest: 'dense1/kernel', 'dense2/kernel'"
    assert nearest("zzz", names) == "" and nearest("zzz", []) == nearest("zzz", [], always=True) == ""
    assert nearest("zzz", names, always=True).startswith("; nearest: '")
    assert nearest("bias", iter(["bias", "bias"])) == "; nearest: 'bias'"
    assert nearest("a.gni", ["a.gin"], folder=Path("b/c")) == "; nearest: 'b/c/a.gin'"
    assert nearest("a.gni", ["a.gin"], folder=Path()) == "; nearest: 'a.gin'"


def test_how_many():
    assert [validation.counted(n, "unit") for n in (0, 1, 2)] == ["0 units", "1 unit", "2 units"]
    assert validation.counted(3, "batch", "batches") == "3 batches"


@pytest.mark.parametrize("name", ["difflib", "fcntl", "unittest"])
def test_one_module_searches_for_near_names_and_one_locks(name):
    allowed = {"difflib": ["dist_partial/validation.py"], "fcntl": ["dist_partial/files.py"], "unittest": []}
    found = []
    for path in sorted((ROOT / "dist_partial").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if name in [each.split(".")[0] for each in names]:
                found.append(str(path.relative_to(ROOT)))
    assert found == allowed[name]
