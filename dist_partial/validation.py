"""Compares values, and shows them and the names near a misspelt one in messages."""

import difflib
from collections.abc import Iterable
from typing import Any


def differences(before: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Where two JSON values differ: the place as a dotted name, and both values there, None for what is absent."""
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
    """A value as messages show it: cut if it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def nearest(word: str, names: Iterable[str], always: bool = False) -> str:
    """The end of a message about a name that is not known: the up to three names most like it.

    Args:
        word: what was written.
        names: those that are known.
        always: whether to show some also where none is like it.

    Example:
        >>> nearest("dens1/kernel", ["dense1/kernel", "dense2/kernel", "bias"])
        "; nearest: 'dense1/kernel', 'dense2/kernel'"
        >>> nearest("head", ["kernel"])
        ''
    """
    known, word = list(dict.fromkeys(names)), word[:_SHOWN]
    found = difflib.get_close_matches(word, known, 3, 0.5)
    if always and not found:
        found = difflib.get_close_matches(word, known, 3, 0)
    return f"; nearest: {', '.join(map(repr, found))}" if found else ""


_SHOWN = 200  # characters of a value in a message
