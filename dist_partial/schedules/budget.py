"""A budget: what may leave a worker's interface, and how long a step may take, on average; what memory it may hold."""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Annotated, ClassVar

import numpy as np

from dist_partial.errors import UserError
from dist_partial.schedules import step_time
from dist_partial.schedules.base import Periodic, State, Unit, quoted, roots, split_always, unreached
from dist_partial.validation import Above, AtLeast, OneOf, Patterns

_On = AbstractSet[int]  # numbers of the units that are trained


@dataclasses.dataclass(frozen=True)
class Budget(Periodic):
    """Trains the layers with the most gradient within a budget of bytes, of time and of memory.

    Before the first step, and then every few, the gradients of all units are measured on a probe, and units are taken,
    those with the most first, as long as they fit into what the run may have spent by the end of the interval that
    begins. What an interval leaves is thus there for the next ones, and what it has taken too much is missing. One unit
    more is taken where that comes closer. Where nothing fits, the cheapest unit is trained on credit.

    A unit that was left out `starve` times in a row comes before all others, the longest wait first. If it does not
    fit, nothing but the cheapest is trained until enough is saved for it. With n units, of which v takes s[v] intervals
    to save for, none is left out more than starve + n + sum(s) times in a row while enough of the run is left to save.

    Attributes:
        bytes: what may leave each worker's network interface in a step, on average over the run, among as many workers
            as there are replicas (of one replica, as among two).
        seconds: what a step may take, on average over the run, without compilation, probes and evaluations. Where it
            is bound, the choice follows from measured times, and another run may train something else.
        memory: bytes that gradients, optimizer slots and what reductions keep may take on a replica, at any time.
        every: steps until the next ranking.
        by: 'norm_per_byte' (of the gradient, per byte that the unit sends) or 'norm'.
        always: names of units, or regular expressions of whole names, that are always on, and charged first.
        starve: times a unit may be left out before it has priority; None is the number of units.

    Examples:
        >>> from dist_partial.schedules import Unit
        >>> units = [Unit("block", ("block/kernel",), 3000, 750), Unit("head", ("head/kernel",), 1000, 250)]
        >>> budget = Budget(bytes=2000, every=10)
        >>> state = budget.observe(0, units, np.array([4.0, 1.0]), budget.begun(budget.initial(units), steps=40))
        >>> sorted(budget.select(0, units, 0, state))
        ['head']
        >>> state = budget.spent(state, steps=10, bytes=1000)  # of 20 000, so that the next interval has 30 000
        >>> sorted(budget.select(10, units, 0, budget.observe(10, units, np.array([9.0, 1.0]), state)))
        ['block']
    """

    binding: ClassVar[str] = "budget"
    statistics: ClassVar[str | None] = "probe"
    bytes: Annotated[int | None, AtLeast(1)] = None
    seconds: Annotated[float | None, Above(0)] = None
    memory: Annotated[int | None, AtLeast(1)] = None
    by: Annotated[str, OneOf("norm", "norm_per_byte")] = "norm_per_byte"
    always: Annotated[Sequence[str], Patterns()] = ()
    starve: Annotated[int | None, AtLeast(1)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bytes is None and self.seconds is None and self.memory is None:
            raise UserError("budget limits nothing: bind budget.bytes, budget.seconds or budget.memory")
        if self.seconds is not None and self.every < 2:
            raise UserError(
                "budget.every is 1, and the first step of a selection, which may be compiled in it, is not timed: "
                "bind at least 2 with budget.seconds"
            )

    def check(self, units: Sequence[Unit], steps: int) -> list[str]:
        always, others = split_always("budget.always", self.always, units)
        self._check_memory(units, always, others)
        if self.bytes is None:
            return []
        size = {unit.name: unit.bytes for unit in units}
        charged, least = sum(size[name] for name in always), self._least(units)
        smallest = min(others, key=lambda name: size[name])
        where = f"budget.bytes is {self.bytes:,}"
        if self.bytes < least:
            what = f"what is always on, {quoted(always)}," if always else f"the smallest unit, {smallest!r},"
            raise UserError(f"{where}: {what} sends {least:,} bytes a step: bind more")
        large = {name: charged + size[name] - self.bytes for name in others if charged + size[name] > self.bytes}
        if large and self.bytes == least:
            raise UserError(
                f"{where}: {quoted(large)} would never be trained, for {quoted(always or [smallest])} alone sends as "
                "much, and nothing is saved: bind more, or freeze it in run.rules"
            )
        lines = []
        for name, missing in large.items():
            saved = self.every * -(-missing // (self.bytes - least))
            lines += unreached(f"{where}: enough is saved for {name!r}, which sends {size[name]:,},", saved, steps)
        return lines

    def check_sent(self, units: Sequence[Unit], on: AbstractSet[str], sent: float) -> None:
        """Raises UserError if what a selection sends in truth is more than its units say, by too much for any."""
        more = sent - sum(unit.bytes for unit in units if unit.name in on)
        if self.bytes is not None and more > 0 and self._least(units) + more > self.bytes:
            raise UserError(
                f"budget.bytes is {self.bytes:,}, and {', '.join(sorted(on))} send {sent:,} bytes with what "
                "synchronised BatchNorm layers and the loss add: bind more"
            )

    def _least(self, units: Sequence[Unit]) -> int:
        """Bytes of the least that can be trained."""
        always, others = self._numbers(units)
        return sum(units[i].bytes for i in always) if always else min(units[i].bytes for i in others)

    def _check_memory(self, units: Sequence[Unit], always: Sequence[str], others: Sequence[str]) -> None:
        if self.memory is None:
            return
        numbers = {unit.name: i for i, unit in enumerate(units)}
        on = {numbers[name] for name in always}
        taken = {name: _memory(units, on | {numbers[name]}) for name in others}
        if large := [name for name, taken_ in taken.items() if taken_ > self.memory]:
            kept, beside = sum(unit.kept for unit in units), ""
            if always:
                beside = f" with what is always on, {quoted(always)}"
            if kept:
                beside += (
                    f", {kept:,} of them for what is off (slots, which run.leave = 'drop' frees, and what reductions "
                    "keep)"
                )
            raise UserError(
                f"budget.memory is {self.memory:,}: {quoted(large)} would never be trained, for that takes up to "
                f"{max(taken.values()):,} bytes{beside}: bind more, divide it by budget.units, or freeze it in "
                "run.rules"
            )

    def initial(self, units: Sequence[Unit]) -> State:
        waits = [0] * len(units)
        state = {
            "steps": sys.maxsize,
            "waits": waits,
            "sizes": [unit.bytes for unit in units],
            "bytes": 0,
            "seconds": 0.0,
            "times": None,
            "interval": [0, 0, 0.0],
        }
        return state | {"trained": self._choose(0, units, [0.0] * len(units), state)}

    def begun(self, state: State, steps: int) -> State:
        """Notes how many steps the run will have made at its end."""
        return state | {"steps": steps}

    def spent(self, state: State, steps: int, bytes: float, seconds: float | None = None) -> State:
        """Charges steps that were made.

        Args:
            state: before them.
            steps: how many.
            bytes: that each of them has sent.
            seconds: that all of them took; None is not known, as of one in which something was compiled: they are
                then charged as the others of the interval.
        """
        made, timed, took = state["interval"]
        interval = [made + steps, timed, took] if seconds is None else [made + steps, timed + steps, took + seconds]
        return state | {"bytes": state["bytes"] + steps * bytes, "interval": interval}

    def agreed(self, state: State, mean: Callable[[float], float]) -> State:
        """Takes the mean over the workers in place of this one's time of the interval."""
        made, timed, took = state["interval"]
        return state | {"interval": [made, timed, mean(took)]}

    def summary(self, units: Sequence[Unit], state: State, steps: int) -> list[str]:
        """A line that says what was spent in so many steps, if anything is limited on average."""
        state, parts = self._settled(units, state), []
        if self.bytes is not None and steps:
            parts.append(f"{state['bytes'] / steps:,.0f} of {self.bytes:,} bytes")
        if self.seconds is not None and steps:
            parts.append(f"{state['seconds'] / steps:.3g} of {self.seconds:g} s")
        return [f"budget: a step took {' and '.join(parts)} on average"] if parts else []

    def outdated(self, units: Sequence[Unit], state: State) -> bool:
        """Tells whether another number of workers has changed what the units cost since the last choice."""
        return state["sizes"] != [unit.bytes for unit in units]

    def notes(self, units: Sequence[Unit], state: State) -> list[str]:
        """Lines to say of a time that cannot be held."""
        if self.seconds is None or state["times"] is None:
            return []
        always, others = self._numbers(units)
        least = min(step_time.predicted(state["times"], on) for on in ([always] if always else [{i} for i in others]))
        if least <= self.seconds:
            return []
        return [f"budget.seconds is {self.seconds:g}: a step takes {least:.3g} s with the least that can be trained"]

    def select(self, step: int, units: Sequence[Unit], seed: int, state: State) -> frozenset[str]:
        return frozenset(state["trained"])

    def observe(self, step: int, units: Sequence[Unit], norms: np.ndarray, state: State) -> State:
        state = self._settled(units, state) | {"sizes": [unit.bytes for unit in units]}
        trained = self._choose(step, units, roots(norms), state)
        waits = [0 if u.name in trained else n + 1 for u, n in zip(units, state["waits"], strict=True)]
        return state | {"trained": trained, "waits": waits}

    def _settled(self, units: Sequence[Unit], state: State) -> State:
        """Charges the time of an interval, and learns from it."""
        made, timed, took = state["interval"]
        on, times = {i for i, unit in enumerate(units) if unit.name in state["trained"]}, state["times"]
        if timed:
            each = took / timed
            learnt = step_time.learnt(times, on, each) if times else step_time.first(len(units), on, each)
        else:
            each, learnt = step_time.predicted(times, on) if times else 0.0, times
        return state | {"seconds": state["seconds"] + made * each, "times": learnt, "interval": [0, 0, 0.0]}

    def _numbers(self, units: Sequence[Unit]) -> tuple[_On, list[int]]:
        always, others = split_always("budget.always", self.always, units)
        numbers = {unit.name: i for i, unit in enumerate(units)}
        return {numbers[name] for name in always}, [numbers[name] for name in others]

    def _choose(self, step: int, units: Sequence[Unit], norms: Sequence[float], state: State) -> list[str]:
        always, others = self._numbers(units)
        waits, starve = state["waits"], len(units) if self.starve is None else self.starve

        def rank(i: int) -> tuple[int, float]:
            # What sends nothing always fits.
            score = norms[i] / max(units[i].bytes, 1) if self.by == "norm_per_byte" else norms[i]
            return (-waits[i] if waits[i] >= starve else 0), -score

        order = sorted(others, key=rank)
        interval = _Interval(self, units, state, step)
        least = always or {interval.cheapest(always, order)}
        late = [i for i in order if waits[i] >= starve]
        if (self.seconds is not None and state["times"] is None) or interval.saves(always, least, late):
            chosen = least
        else:
            chosen = interval.filled(always, order) or least
        return [unit.name for i, unit in enumerate(units) if i in chosen]


@dataclasses.dataclass(frozen=True)
class _Interval:
    """What fits into the interval that begins at a step, by numbers of units."""

    budget: Budget
    units: Sequence[Unit]
    state: State
    step: int

    @property
    def limits(self) -> list[float]:
        return [limit for limit in (self.budget.bytes, self.budget.seconds) if limit is not None]

    @property
    def length(self) -> int:
        return max(1, min(self.budget.next_switch(self.step) or 0, self.state["steps"]) - self.step)

    def left(self, end: int) -> list[float]:
        """Of each limit, what is left to spend until the end of a step."""
        spent = (self.state["bytes"], self.state["seconds"])
        limits = (self.budget.bytes, self.budget.seconds)
        return [limit * end - used for limit, used in zip(limits, spent, strict=True) if limit is not None]

    def costs(self, on: _On) -> list[float]:
        """Of each limit, what a step costs."""
        costs: list[float] = [] if self.budget.bytes is None else [sum(self.units[i].bytes for i in on)]
        if self.budget.seconds is not None:
            # Before the first measurement it matters alone which unit is the cheapest.
            count = len(self.units)
            times = self.state["times"] or step_time.first(count, set(range(count)), self.budget.seconds)
            costs.append(step_time.predicted(times, on))
        return costs

    def holds(self, on: _On) -> bool:
        return self.budget.memory is None or _memory(self.units, on) <= self.budget.memory

    def cheapest(self, on: _On, others: Iterable[int]) -> int:
        """Which of the others adds least, by the limit that is nearest."""
        return min(others, key=lambda i: max(_ratios(self.costs({*on, i}), self.limits), default=0.0))

    def fits(self, on: _On, more: _On, length: int, left: Sequence[float]) -> bool:
        """Whether a selection can be made greater; what costs nothing more always fits."""
        costs = zip(self.costs(on), self.costs(more), left, strict=True)
        return self.holds(more) and all(new * length <= rest or new <= old for old, new, rest in costs)

    def saves(self, always: _On, least: _On, late: Sequence[int]) -> bool:
        """Whether the first in line of those that have waited is saved for: not what there will never be enough for."""
        steps, every = self.state["steps"], self.budget.every
        last = (steps // every - 1) * every  # with a whole interval after it
        most, before = self.left(last + every), last - self.step
        saved = [rest - cost * before for rest, cost in zip(most, self.costs(least), strict=True)]
        for i in late:
            if self.fits(always, {*always, i}, self.length, self.left(self.step + self.length)):
                return False
            if before > 0 and self.fits(always, {*always, i}, every, saved):
                return True
        return False

    def filled(self, always: _On, order: Sequence[int]) -> _On:
        """Takes units in order as long as they fit, and one more if that comes closer."""
        chosen, left = set(always), self.left(self.step + self.length)
        for i in order:
            if self.fits(chosen, {*chosen, i}, self.length, left):
                chosen.add(i)
        rest = [i for i in order if i not in chosen and self.holds({*chosen, i})]
        if rest and left:
            more = {*chosen, self.cheapest(chosen, rest)}
            both = zip(self.costs(chosen), self.costs(more), left, strict=True)
            if all((old + new) * self.length <= 2 * left_ for old, new, left_ in both):
                return more
        return chosen


def _ratios(costs: Sequence[float], limits: Sequence[float]) -> list[float]:
    return [cost / limit for cost, limit in zip(costs, limits, strict=True)]


def _memory(units: Sequence[Unit], on: _On) -> int:
    """Bytes on a replica where these are trained."""
    return sum(unit.kept for unit in units) + sum(units[i].memory for i in on)
