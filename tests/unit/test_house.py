"""The size of functions: each fits on a screen and takes few arguments."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

MOST_LINES = 60  # with its docstring
MOST_PARAMETERS = 7  # without self, *args and **kwargs; who needs more passes a dataclass
FILES = sorted((ROOT / "dist_partial").rglob("*.py"))


def functions(text: str) -> Iterator[tuple[str, int, int]]:
    """The name, lines and parameters of each function, methods and inner ones among them."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            parameters = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
            yield node.name, node.end_lineno - node.lineno + 1, len(parameters)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT / "dist_partial")))
def test_functions_are_small(file: Path):
    found = list(functions(file.read_text()))
    assert not [each for each in found if each[1] > MOST_LINES or each[2] > MOST_PARAMETERS]


def test_what_is_counted():
    text = "class A:\n    def f(self, a, /, b=1, *c, d, **e):\n\n        async def g(): ...\n        return g\n"
    assert sorted(functions(text)) == [("f", 4, 3), ("g", 1, 0)]
