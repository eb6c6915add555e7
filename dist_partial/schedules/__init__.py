"""Decides what is trained when: schedules, which know paths and sizes, and no variables."""

from dist_partial.schedules.adaptive import AutoFreeze, ByteBudget
from dist_partial.schedules.base import Schedule, Unit, observes
from dist_partial.schedules.fixed import Constant, Gradual, Lisa, Phases, Rotation

__all__ = [
    "AutoFreeze",
    "ByteBudget",
    "Constant",
    "Gradual",
    "Lisa",
    "Phases",
    "Rotation",
    "Schedule",
    "Unit",
    "observes",
]
