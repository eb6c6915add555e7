"""Which parameters of a test are quick, and which tests take turns."""

from collections.abc import Iterable
from typing import Any

import pytest

TURNS = 3  # days, after which each test that takes turns has run in CI


def quick(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Marks all of a test's parameters as slow, but those to keep.

    Args:
        values: for `pytest.mark.parametrize`: single values, or a tuple for each set of several.
        kept: those that stay unmarked; of a set of several, its first value is enough.
    """
    found, missing = [], list(kept)
    for value in values:
        several = value if isinstance(value, tuple) else (value,)
        keep = next((each for each in kept if each in (value, several[0])), None) is not None
        missing = [each for each in missing if each not in (value, several[0])]
        found.append(pytest.param(*several, marks=() if keep else pytest.mark.slow))
    assert not missing, f"no parameter is {missing}"
    return found


def in_turns(values: Iterable[Any]) -> list[Any]:
    """Has those parameters take turns that are slow, or all if none is marked: see `turn` in tests/README.md.

    Args:
        values: for `pytest.mark.parametrize`: from `quick`, or single values.
    """
    params = [value if hasattr(value, "marks") else pytest.param(value, marks=pytest.mark.slow) for value in values]
    return [
        pytest.param(*each.values, marks=[*each.marks, pytest.mark.turn(i)]) if each.marks else each
        for i, each in enumerate(params)
    ]


def waits_for_its_turn(item: pytest.Item, turn: int) -> bool:
    """Whether a test is left out in this turn, 0 to `TURNS` - 1."""
    mark = item.get_closest_marker("turn")
    return mark is not None and mark.args[0] % TURNS != turn
