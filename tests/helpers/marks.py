"""Which parameters of a test are quick."""

from collections.abc import Iterable
from typing import Any

import pytest


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
