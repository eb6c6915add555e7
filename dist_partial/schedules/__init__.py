"""Decides what is trained when: schedules, which know paths and sizes, and no variables."""

from typing import NoReturn

from dist_partial.errors import UserError
from dist_partial.schedules.adaptive import AutoFreeze
from dist_partial.schedules.base import Schedule, Unit, observes
from dist_partial.schedules.budget import Budget
from dist_partial.schedules.fixed import Constant, Gradual, Lisa, Phases, Rotation
from dist_partial.synonyms import renamed

__all__ = [
    "AutoFreeze",
    "Budget",
    "Constant",
    "Gradual",
    "Lisa",
    "Phases",
    "Rotation",
    "Schedule",
    "Unit",
    "observes",
]


def __getattr__(name: str) -> NoReturn:
    """Says what a name is called now."""
    if now := renamed(name):
        raise UserError(f"dist_partial.schedules has no {name}{now}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
