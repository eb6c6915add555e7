"""The recipes of the documentation are as short as they say, and each is complete."""

import ast
import builtins
import re

import pytest

from tests import ROOT
from tests.helpers import snippets
from tests.helpers.snippets import Block

PAGE = ROOT / "docs" / "how_to" / "recipes.md"
DATA, RECIPE = "The data", "The recipe"
LINES = 25
FILE = re.compile(r"cat > \S+ <<'END'|END")  # around the lines of a file, for which people have an editor


def recipes() -> dict[str, dict[str, list[Block]]]:
    found: dict[str, dict[str, list[Block]]] = {}
    for block in snippets.blocks(PAGE):
        _, recipe, *part = snippets.headings(block)
        if part:
            found.setdefault(recipe, {}).setdefault(part[0], []).append(block)
    return found


RECIPES = recipes()


def lines_of(blocks: list[Block]) -> list[str]:
    """What a user writes: all lines that are neither blank nor comments."""
    lines = [line.strip() for block in blocks for line in block.code.splitlines()]
    return [line for line in lines if line and not line.startswith("#") and not FILE.fullmatch(line)]


def undefined(code: str) -> set[str]:
    """Names that Python code reads and nowhere defines."""
    defined, read = set(dir(builtins)), set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, ast.alias):
            defined.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
    return read - defined


def test_there_are_four_each_with_its_data():
    assert len(RECIPES) == 4 and all(list(parts) == [DATA, RECIPE] for parts in RECIPES.values())


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_at_most_25_lines(name):
    assert 10 < len(lines_of(RECIPES[name][RECIPE])) <= LINES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_needs_nothing_of_another(name):
    code = [block.code for blocks in RECIPES[name].values() for block in blocks if block.language == "python"]
    assert undefined("\n".join(code)) == set()
    for block in RECIPES[name][DATA] + RECIPES[name][RECIPE]:
        for file in re.findall(r"cat > \S+\.py <<'END'\n(.*?)^END$", block.code, re.M | re.S):
            assert undefined(file) == set()


@pytest.mark.parametrize("name", RECIPES)
def test_every_block_is_run(name):
    assert all(block.runs for blocks in RECIPES[name].values() for block in blocks)
