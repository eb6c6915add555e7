"""Schedules that follow from statistics of the gradients, reduced over all replicas."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np

from dist_partial.errors import UserError
from dist_partial.schedules.base import Periodic, State, Unit, quoted, roots, unreached
from dist_partial.validation import Above, AtLeast, AtMost


@dataclasses.dataclass(frozen=True)
class AutoFreeze(Periodic):
    """Freezes, from the bottom, what has stopped changing (Liu et al. 2021, "AutoFreeze").

    After each interval the change of a unit that was on is | |g'| - |g| | / |g'|, with |g| the root of the sum of its
    squared gradient norms over the interval and |g'| that over the last one before it in which the unit was on (the
    paper sums the gradients themselves, which takes a copy of each). From the bottom, units are frozen as long as their
    change is below a percentile of all changes. Refreezing tests (Wang et al. 2022, "Egeria") train all units again for
    one interval, after which the same rule decides again.

    Attributes:
        every: steps of an interval.
        percentile: above 0, at most 100.
        keep: units at the top that are never frozen.
        retest: all units are trained in each interval whose number, from 0, this divides; None never tests.

    Examples:
        >>> from dist_partial.schedules import Unit
        >>> units = [Unit(name, (f"{name}/kernel",), 4, 1) for name in ("embedding", "block", "head")]
        >>> autofreeze = AutoFreeze(every=50)
        >>> sorted(autofreeze.select(0, units, 0, autofreeze.initial(units)))  # until one stops changing
        ['block', 'embedding', 'head']
    """

    binding: ClassVar[str] = "autofreeze"
    statistics: ClassVar[str | None] = "norms"
    percentile: Annotated[float, Above(0), AtMost(100)] = 50
    keep: Annotated[int, AtLeast(1)] = 1
    retest: Annotated[int | None, AtLeast(2)] = None  # 1 would never freeze

    def check(self, units: Sequence[Unit], steps: int) -> list[str]:
        if self.keep >= len(units):
            names = quoted(unit.name for unit in units)
            raise UserError(f"autofreeze.keep is {self.keep}: nothing could be frozen of the units {names}")
        lines = unreached(f"autofreeze.every is {self.every}: the first unit can be frozen", 2 * self.every, steps)
        if self.retest is not None and not lines:
            what = f"autofreeze.retest is {self.retest}: the first test is"
            lines += unreached(what, self.retest * self.every, steps)
        return lines

    def initial(self, units: Sequence[Unit]) -> State:
        return {"frozen": 0, "norms": [0.0] * len(units)}

    def select(self, step: int, units: Sequence[Unit], seed: int, state: State) -> frozenset[str]:
        return frozenset(unit.name for unit in units[self._first(step, state) :])

    def observe(self, step: int, units: Sequence[Unit], norms: np.ndarray, state: State) -> State:
        first = self._first(step - 1, state)
        now, before = roots(norms), state["norms"]
        # A unit that has never had a gradient does not change; one that has its first has changed beyond measure, and
        # so, for all that is known, has one that overflowed.
        changes = [
            abs(a - b) / b if b and np.isfinite(square) else math.inf if a or not np.isfinite(square) else 0.0
            for a, b, square in zip(now[first:], before[first:], norms[first:], strict=True)
        ]
        now = [a if np.isfinite(square) else b for a, b, square in zip(now, before, norms, strict=True)]
        # Being below this one is being below the interpolated percentile, and needs no arithmetic, which could differ.
        bound = sorted(changes)[math.ceil(self.percentile * (len(changes) - 1) / 100)]
        frozen = first
        while frozen < len(units) - self.keep and changes[frozen - first] < bound:
            frozen += 1
        return {"frozen": frozen, "norms": [*before[:first], *now[first:]]}

    def remaining(self, step: int, units: Sequence[Unit], state: State) -> frozenset[str]:
        first = state["frozen"] if self.retest is None else 0
        return frozenset(unit.name for unit in units[first:])

    def _first(self, step: int, state: State) -> int:
        """Index of the lowest unit that is trained."""
        test = self.retest is not None and step // self.every % self.retest == 0
        return 0 if test else state["frozen"]
