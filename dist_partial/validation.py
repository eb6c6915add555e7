"""Compares values, and shows them in messages."""

from typing import Any


def differences(before: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Finds where two JSON values differ: the dotted name, and both values there, None for what is absent."""
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
    """Writes a value as messages show it: cut if it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


_SHOWN = 200  # characters of a value in a message
