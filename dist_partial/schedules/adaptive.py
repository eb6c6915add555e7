"""Schedules that follow from statistics of the gradients, reduced over all replicas."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np

from dist_partial.errors import UserError
from dist_partial.schedules.base import Periodic, State, Unit, quoted, split_always, unreached
from dist_partial.validation import Above, AtLeast, AtMost, OneOf, Patterns


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
        now, before = _roots(norms), state["norms"]
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


@dataclasses.dataclass(frozen=True)
class ByteBudget(Periodic):
    """Trains the layers with the most gradient within a budget of bytes a step.

    Before the first step, and then every few, the gradients of all units are measured on a probe, and units are taken,
    those with the most first, as long as they fit. A unit that has been left out `starve` times in a row comes before
    all others, the longest wait first: with n units, none is left out more than starve + n - 1 times in a row.

    Attributes:
        bytes: what may leave each worker's network interface in a step, among as many workers as there are replicas (of
            one replica, as among two).
        every: steps until the next ranking.
        by: 'norm_per_byte' (of the gradient, per byte that the unit sends) or 'norm'.
        always: names of units, or regular expressions of whole names, that are always on, and charged first.
        starve: times a unit may be left out before it has priority; None is the number of units.

    Examples:
        >>> from dist_partial.schedules import Unit
        >>> units = [Unit("block", ("block/kernel",), 3000, 750), Unit("head", ("head/kernel",), 1000, 250)]
        >>> budget = ByteBudget(bytes=3500)
        >>> state = budget.observe(0, units, np.array([4.0, 1.0]), budget.initial(units))
        >>> sorted(budget.select(0, units, 0, state))
        ['head']
    """

    binding: ClassVar[str] = "byte_budget"
    statistics: ClassVar[str | None] = "probe"
    bytes: Annotated[int, AtLeast(1)]
    by: Annotated[str, OneOf("norm", "norm_per_byte")] = "norm_per_byte"
    always: Annotated[Sequence[str], Patterns()] = ()
    starve: Annotated[int | None, AtLeast(1)] = None

    def check(self, units: Sequence[Unit], steps: int) -> list[str]:
        always, others = split_always("byte_budget.always", self.always, units)
        size = {unit.name: unit.bytes for unit in units}
        least = min(units, key=lambda unit: unit.bytes)
        where = f"byte_budget.bytes is {self.bytes:,}"
        if self.bytes < least.bytes:
            raise UserError(
                f"{where}: the smallest unit, {least.name!r}, sends {least.bytes:,} bytes a step: bind more"
            )
        charged = sum(size[name] for name in always)
        if self.bytes < charged:
            raise UserError(f"{where}: what is always on, {quoted(always)}, sends {charged:,} bytes a step: bind more")
        if large := [name for name in others if charged + size[name] > self.bytes]:
            beside = f" beside the {charged:,} of what is always on" if always else ""
            raise UserError(
                f"{where}: {quoted(large)} would never be trained, for that takes up to "
                f"{max(size[name] for name in large):,} bytes a step{beside}: bind more, divide it by "
                "byte_budget.units, or freeze it in run.rules"
            )
        return []

    def initial(self, units: Sequence[Unit]) -> State:
        waits = [0] * len(units)
        return {"trained": self._choose(units, waits, waits), "waits": waits}

    def select(self, step: int, units: Sequence[Unit], seed: int, state: State) -> frozenset[str]:
        return frozenset(state["trained"])

    def observe(self, step: int, units: Sequence[Unit], norms: np.ndarray, state: State) -> State:
        trained = self._choose(units, _roots(norms), state["waits"])
        waits = [0 if u.name in trained else n + 1 for u, n in zip(units, state["waits"], strict=True)]
        return {"trained": trained, "waits": waits}

    def _choose(self, units: Sequence[Unit], norms: Sequence[float], waits: Sequence[int]) -> list[str]:
        always, others = split_always("byte_budget.always", self.always, units)
        starve = len(units) if self.starve is None else self.starve

        def rank(i: int) -> tuple[int, float]:
            # What sends nothing always fits.
            score = norms[i] / max(units[i].bytes, 1) if self.by == "norm_per_byte" else norms[i]
            return (-waits[i] if waits[i] >= starve else 0), -score

        chosen = set(always)
        left = self.bytes - sum(unit.bytes for unit in units if unit.name in chosen)
        for i in sorted((i for i, unit in enumerate(units) if unit.name in others), key=rank):
            if units[i].bytes <= left:
                chosen.add(units[i].name)
                left -= units[i].bytes
        return [unit.name for unit in units if unit.name in chosen]


def _roots(squares: np.ndarray) -> list[float]:
    # Loss scaling lets gradients overflow now and then: what is not finite says nothing, and is no JSON.
    return np.sqrt(np.nan_to_num(np.asarray(squares, np.float64), nan=0.0, posinf=0.0)).tolist()
