"""What is trained when: schedules that switch units of the trained variables on and off while a run goes on.

A schedule is a pure function of the step, the seed and, where it adapts, of statistics that were reduced over the
replicas: every worker comes to the same answer by itself. Nothing here knows variables; paths and sizes are enough.
"""

import bisect
import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from dist_partial.errors import UserError
from dist_partial.selection.rules import matches

State = dict[str, Any]  # JSON values
Partition = list[tuple[str, tuple[str, ...]]]
_CHOICES = {"order": ("ascending", "descending", "random"), "by": ("norm", "norm_per_byte")}


@dataclasses.dataclass(frozen=True)
class Unit:
    """Trained variables that are switched on and off together.

    Attributes:
        name: by which schedules and logs call it.
        paths: of its variables.
        bytes: what leaves a worker's network interface for it in a step in which it is on.
        parameters: how many of its parameters are trained.
    """

    name: str
    paths: tuple[str, ...]
    bytes: int
    parameters: int


class Schedule(Protocol):
    """What `run.schedule` has to offer.

    Units stand in order from the model's input to its output. `step` is a number of updates: what is said of it holds
    for the update that follows, and 0 is before the first.

    Attributes:
        statistics: what `observe` is given: None if it is never called; 'norms': for each unit the sum, over the steps
            since the last switch, of the squared norm of its reduced gradient, 0 for a unit that was off; 'probe': the
            squared norm of each unit's gradient, on or off, on one small batch.
    """

    @property
    def statistics(self) -> str | None: ...

    def partition(self, paths: Sequence[str]) -> Partition:
        """Names of the units and their paths; `paths` are of all that the rules train, in the model's order."""

    def check(self, units: Sequence[Unit], steps: int) -> list[str]:
        """Lines to say of what a run of so many steps does not reach; raises UserError if it does not fit the units."""

    def initial(self, units: Sequence[Unit]) -> State:
        """What is remembered before the first `observe`."""

    def select(self, step: int, units: Sequence[Unit], seed: int, state: State) -> frozenset[str]:
        """Names of the units to train; never empty. `state` is what the last `observe` up to this step returned."""

    def remaining(self, step: int, units: Sequence[Unit], state: State) -> frozenset[str]:
        """Names of the units that may still be trained at this step or later; the others are frozen for good."""

    def next_switch(self, step: int) -> int | None:
        """The least later step at which `select` may change or `observe` is due; None if there is none."""

    def observe(self, step: int, units: Sequence[Unit], norms: np.ndarray, state: State) -> State:
        """Takes in statistics [units] and returns the new state; called before `select` of that step."""


def observes(schedule: Schedule, step: int) -> bool:
    """Whether `observe` is due at this step: at each `next_switch`; a probe, which needs no past, at step 0, too."""
    if step == 0 or schedule.statistics is None:
        return schedule.statistics == "probe"
    return schedule.next_switch(step - 1) == step


class _Stateless:
    """Of the schedules that follow from step and seed alone."""

    statistics: ClassVar[str | None] = None

    def initial(self, units: Sequence[Unit]) -> State:
        return {}

    def observe(self, step: int, units: Sequence[Unit], norms: np.ndarray, state: State) -> State:
        return state

    def remaining(self, step: int, units: Sequence[Unit], state: State) -> frozenset[str]:
        return frozenset(unit.name for unit in units)


@dataclasses.dataclass(frozen=True)
class Constant(_Stateless):
    """Everything that the rules train, always: one unit without a name."""

    def partition(self, paths: Sequence[str]) -> Partition:
        return [("", tuple(paths))]

    def check(self, units: Sequence[Unit], steps: int) -> list[str]:
        return []

    def select(self, step: int, units: Sequence[Unit], seed: int, state: State) -> frozenset[str]:
        return frozenset(unit.name for unit in units)

    def next_switch(self, step: int) -> int | None:
        return None


@dataclasses.dataclass(frozen=True)
class Phases(_Stateless):
    """From each first step on, the trained variables whose whole path matches the phase's pattern.

    Variables that are on in the same phases are a unit.

    Attributes:
        table: (first step, regular expression), in order; the first is of step 0.
    """

    table: Sequence[tuple[int, str]]

    def __post_init__(self) -> None:
        if not isinstance(self.table, (list, tuple)) or not self.table:
            raise UserError("phases.table is empty: bind a list such as [(0, r'head/.*'), (200, r'.*')]")
        for number, line in enumerate(self.table, 1):
            if not isinstance(line, (list, tuple)) or len(line) != 2 or type(line[0]) is not int:
                raise UserError(f"phases.table, phase {number} is {line!r}: write (first step, pattern)")
            _check_pattern(f"phases.table, phase {number}", line[1])
        if self._starts[0] != 0:
            raise UserError(f"phases.table, phase 1 starts at step {self._starts[0]}: the first must start at 0")
        for number, (one, other) in enumerate(zip(self._starts, self._starts[1:], strict=False), 1):
            if other <= one:
                raise UserError(
                    f"phases.table, phase {number + 1}, which starts at step {other}, overlaps phase {number}, which "
                    f"starts at {one}: each must start after the one before it"
                )

    @property
    def _starts(self) -> list[int]:
        return [start for start, _ in self.table]

    def partition(self, paths: Sequence[str]) -> Partition:
        classes: dict[tuple[int, ...], list[str]] = {}
        for path in paths:
            phases = tuple(n for n, (_, pattern) in enumerate(self.table, 1) if matches(pattern, path))
            if not phases:
                raise UserError(f"phases.table never trains {path!r}: add it to a phase, or freeze it in run.rules")
            classes.setdefault(phases, []).append(path)
        for number, (_, pattern) in enumerate(self.table, 1):
            if not any(number in phases for phases in classes):
                raise UserError(
                    f"phases.table, phase {number} ({pattern!r}) selects nothing that the rules train; nearest paths: "
                    f"{_nearest(pattern, paths)}"
                )
        return [
            (f"phase{'s' if len(phases) > 1 else ''} {'+'.join(map(str, phases))}", tuple(members))
            for phases, members in classes.items()
        ]

    def check(self, units: Sequence[Unit], steps: int) -> list[str]:
        number = self._number(steps - 1) + 1
        later = self._starts[number:]
        return (
            _unreached(f"phases.table, phase {number + 1} of {len(self.table)} starts", later[0], steps)
            if later
            else []
        )

    def select(self, step: int, units: Sequence[Unit], seed: int, state: State) -> frozenset[str]:
        return self._matched(units, slice(self._number(step), self._number(step) + 1))

    def remaining(self, step: int, units: Sequence[Unit], state: State) -> frozenset[str]:
        return self._matched(units, slice(self._number(step), None))

    def _number(self, step: int) -> int:
        return bisect.bisect_right(self._starts, step) - 1

    def _matched(self, units: Sequence[Unit], phases: slice) -> frozenset[str]:
        patterns = [pattern for _, pattern in self.table[phases]]
        return frozenset(unit.name for unit in units if any(matches(p, unit.paths[0]) for p in patterns))

    def next_switch(self, step: int) -> int | None:
        return next((start for start in self._starts if start > step), None)


# By keyword, so that a field without a default can follow.
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Periodic(_Stateless):
    """Of the schedules that may switch every few steps.

    Attributes:
        every: steps from one switch to the next.
        units: regular expressions of whole paths, from the model's input to its output, of which the first that
            matches counts; None makes a unit of each top layer, the first component of the paths.
    """

    every: int = 100
    units: Sequence[str] | None = None

    binding: ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            where, value = f"{self.binding}.{field.name}", getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if field.name in ("units", "always"):
                if not isinstance(value, (list, tuple)) or (field.name == "units" and not value):
                    raise UserError(f"{where} is {value!r}: write a list of patterns, such as [r'block_0/.*']")
                for pattern in value:
                    _check_pattern(where, pattern)
            elif field.name in _CHOICES:
                if value not in _CHOICES[field.name]:
                    raise UserError(f"{where} is {value!r}: write {' or '.join(map(repr, _CHOICES[field.name]))}")
            elif field.type in (int, int | None) and (type(value) is not int or value < 1):
                raise UserError(f"{where} is {value!r}: it must be a whole number of at least 1")

    def partition(self, paths: Sequence[str]) -> Partition:
        return _by_layer(paths) if self.units is None else _by_pattern(f"{self.binding}.units", self.units, paths)

    def next_switch(self, step: int) -> int | None:
        return (step // self.every + 1) * self.every


@dataclasses.dataclass(frozen=True)
class Gradual(_Periodic):
    """Gradual unfreezing: at first the top unit, then one more below it at a time (Howard & Ruder 2018, "ULMFiT").

    Attributes:
        every: steps until the next are added.
        count: units that are added at a time, and on at first.
    """

    binding: ClassVar[str] = "gradual_unfreezing"
    count: int = 1

    def check(self, units: Sequence[Unit], steps: int) -> list[str]:
        if self.count >= len(units):
            names = _names(unit.name for unit in units)
            raise UserError(
                f"gradual_unfreezing.count is {self.count}: all units, {names}, would be on at once: bind less"
            )
        last = self.every * ((len(units) - 1) // self.count)
        missed = _names(unit.name for unit in units[: -self._reached(steps - 1)])
        return _unreached(f"gradual_unfreezing.every is {self.every}: {missed} stay frozen; all are on", last, steps)

    def select(self, step: int, units: Sequence[Unit], seed: int, state: State) -> frozenset[str]:
        return frozenset(unit.name for unit in units[-self._reached(step) :])

    def _reached(self, step: int) -> int:
        return self.count * (1 + step // self.every)


@dataclasses.dataclass(frozen=True)
class Rotation(_Periodic):
    """Block coordinate descent: each unit in turn, for some steps (Luo et al. 2024, "BAdam").

    Attributes:
        every: steps of a turn.
        order: 'ascending' (from the input), 'descending', or 'random': another order, by the seed, in each round.
        always: names of units, or regular expressions of whole names, that are on in every turn and take none.
    """

    binding: ClassVar[str] = "block_rotation"
    order: str = "random"
    always: Sequence[str] = ()

    def check(self, units: Sequence[Unit], steps: int) -> list[str]:
        _, others = _split("block_rotation.always", self.always, units)
        if len(others) < 2:
            raise UserError(
                f"block_rotation has one unit to turn to, {_names(others)}: bind patterns of more to "
                "block_rotation.units"
            )
        last = self.every * (len(others) - 1)
        what = f"block_rotation.every is {self.every}: the last of {len(others)} units has its first turn"
        return _unreached(what, last, steps)

    def select(self, step: int, units: Sequence[Unit], seed: int, state: State) -> frozenset[str]:
        always, others = _split("block_rotation.always", self.always, units)
        number, turn = divmod(step // self.every, len(others))
        if self.order == "random":
            turn = _permutation(len(others), seed, number)[turn]
        elif self.order == "descending":
            turn = len(others) - 1 - turn
        return frozenset([*always, others[turn]])


@dataclasses.dataclass(frozen=True)
class Lisa(_Periodic):
    """Some units drawn anew every few steps, by the seed, and others always on (Pan et al. 2024, "LISA").

    Attributes:
        every: steps until the next draw.
        count: units that are drawn.
        always: names of units, or regular expressions of whole names, that are always on and not drawn; None is the
            first and the last: embedding and head, as in the paper.
    """

    binding: ClassVar[str] = "lisa"
    every: int = 20
    count: int = 2
    always: Sequence[str] | None = None

    def check(self, units: Sequence[Unit], steps: int) -> list[str]:
        always, others = self._split(units)
        if self.count > len(others):
            raise UserError(
                f"lisa.count is {self.count}: there are {len(others)} units to draw from, {_names(others)}, beside "
                f"those that are always on, {_names(always)}"
            )
        return _unreached(f"lisa.every is {self.every}: the second draw comes", self.every, steps)

    def select(self, step: int, units: Sequence[Unit], seed: int, state: State) -> frozenset[str]:
        always, others = self._split(units)
        drawn = _permutation(len(others), seed, step // self.every)[: self.count]
        return frozenset([*always, *(others[i] for i in drawn)])

    def _split(self, units: Sequence[Unit]) -> tuple[list[str], list[str]]:
        ends = [re.escape(units[0].name), re.escape(units[-1].name)]
        return _split("lisa.always", ends if self.always is None else self.always, units)


@dataclasses.dataclass(frozen=True)
class AutoFreeze(_Periodic):
    """Freezes, from the bottom, what has stopped changing (Liu et al. 2021, "AutoFreeze").

    After each interval the change of a unit that was on is | |g'| - |g| | / |g'|, with |g| the root of the sum of its
    squared gradient norms over the interval and |g'| that over the last one before it in which the unit was on (the
    paper sums the gradients themselves, which takes a copy of each). From the bottom, units are frozen as long as their
    change is below a percentile of all changes. Refreezing tests (Wang et al. 2022, "Egeria") train all units again for
    one interval, after which the same rule decides anew.

    Attributes:
        every: steps of an interval.
        percentile: above 0, at most 100.
        keep: units at the top that are never frozen.
        retest: all units are trained in each interval whose number, from 0, this divides; None never tests.
    """

    binding: ClassVar[str] = "autofreeze"
    statistics: ClassVar[str | None] = "norms"
    percentile: float = 50
    keep: int = 1
    retest: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retest == 1:
            raise UserError("autofreeze.retest is 1, which would never freeze: write at least 2, or None")
        if type(self.percentile) not in (int, float) or not 0 < self.percentile <= 100:
            raise UserError(f"autofreeze.percentile is {self.percentile!r}: it must be above 0 and at most 100")

    def check(self, units: Sequence[Unit], steps: int) -> list[str]:
        if self.keep >= len(units):
            names = _names(unit.name for unit in units)
            raise UserError(f"autofreeze.keep is {self.keep}: nothing could be frozen of the units {names}")
        lines = _unreached(f"autofreeze.every is {self.every}: the first unit can be frozen", 2 * self.every, steps)
        if self.retest is not None and not lines:
            what = f"autofreeze.retest is {self.retest}: the first test is"
            lines += _unreached(what, self.retest * self.every, steps)
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
class ByteBudget(_Periodic):
    """At most so many bytes a step, spent where the gradient is.

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
    """

    binding: ClassVar[str] = "byte_budget"
    statistics: ClassVar[str | None] = "probe"
    bytes: int
    by: str = "norm_per_byte"
    always: Sequence[str] = ()
    starve: int | None = None

    def check(self, units: Sequence[Unit], steps: int) -> list[str]:
        always, others = _split("byte_budget.always", self.always, units)
        size = {unit.name: unit.bytes for unit in units}
        least = min(units, key=lambda unit: unit.bytes)
        where = f"byte_budget.bytes is {self.bytes:,}"
        if self.bytes < least.bytes:
            raise UserError(
                f"{where}: the smallest unit, {least.name!r}, sends {least.bytes:,} bytes a step: bind more"
            )
        charged = sum(size[name] for name in always)
        if self.bytes < charged:
            raise UserError(f"{where}: what is always on, {_names(always)}, sends {charged:,} bytes a step: bind more")
        if large := [name for name in others if charged + size[name] > self.bytes]:
            beside = f" beside the {charged:,} of what is always on" if always else ""
            raise UserError(
                f"{where}: {_names(large)} would never be trained, for that takes up to "
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
        always, others = _split("byte_budget.always", self.always, units)
        starve = len(units) if self.starve is None else self.starve

        def rank(i: int) -> tuple[int, float]:
            # What sends nothing fits wherever it stands.
            score = norms[i] / max(units[i].bytes, 1) if self.by == "norm_per_byte" else norms[i]
            return (-waits[i] if waits[i] >= starve else 0), -score

        chosen = set(always)
        left = self.bytes - sum(unit.bytes for unit in units if unit.name in chosen)
        for i in sorted((i for i, unit in enumerate(units) if unit.name in others), key=rank):
            if units[i].bytes <= left:
                chosen.add(units[i].name)
                left -= units[i].bytes
        return [unit.name for unit in units if unit.name in chosen]


def _by_layer(paths: Sequence[str]) -> Partition:
    layers: dict[str, list[str]] = {}
    for path in paths:
        layers.setdefault(path.split("/")[0], []).append(path)
    return [(layer, tuple(members)) for layer, members in layers.items()]


def _by_pattern(where: str, patterns: Sequence[str], paths: Sequence[str]) -> Partition:
    """Units by the first pattern that matches, in the patterns' order."""
    units: list[list[str]] = [[] for _ in patterns]
    for path in paths:
        number = next((n for n, pattern in enumerate(patterns) if matches(pattern, path)), None)
        if number is None:
            raise UserError(f"{where}: no pattern matches {path!r} (patterns: {_nearest(path, patterns)}): add one")
        units[number].append(path)
    for pattern, members in zip(patterns, units, strict=True):
        if not members:
            raise UserError(
                f"{where}: {pattern!r} matches nothing that is trained and that no pattern before it takes; nearest "
                f"paths: {_nearest(pattern, paths)}"
            )
    return [(pattern, tuple(members)) for pattern, members in zip(patterns, units, strict=True)]


def _split(binding: str, always: Sequence[str], units: Sequence[Unit]) -> tuple[list[str], list[str]]:
    """Names of the units that are always on, and of the others, in the units' order."""
    names = [unit.name for unit in units]
    on = set()
    for pattern in always:
        # A unit that was made by a pattern is named by it, and a pattern need not match its own text.
        found = {name for name in names if name == pattern or re.fullmatch(pattern, name)}
        if not found:
            raise UserError(f"{binding}: no unit is called {pattern!r}; nearest: {_nearest(pattern, names)}")
        on |= found
    if len(on) == len(names):
        raise UserError(f"{binding}: all units, {_names(names)}, are always on: nothing is left to choose from")
    return [name for name in names if name in on], [name for name in names if name not in on]


def _permutation(count: int, seed: int, number: int) -> list[int]:
    # NumPy keeps the raw numbers of a bit generator from version to version, and not what `Generator` makes of them.
    return np.random.PCG64([seed, number]).random_raw(count).argsort(kind="stable").tolist()


def _roots(squares: np.ndarray) -> list[float]:
    # Loss scaling lets gradients overflow now and then: what is not finite says nothing, and is no JSON.
    return np.sqrt(np.nan_to_num(np.asarray(squares, np.float64), nan=0.0, posinf=0.0)).tolist()


def _nearest(word: str, names: Sequence[str]) -> str:
    return _names(difflib.get_close_matches(word, names, cutoff=0))


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _unreached(what: str, start: int, steps: int) -> list[str]:
    # No mistake: the schedule of a long run is tried for a few steps, and goes on when run.steps is more.
    return [f"{what} after {start} steps, and run.steps is {steps}"] if start >= steps else []


def _check_pattern(where: str, pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise UserError(f"{where}: the pattern {pattern!r} must be a string")
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is not a regular expression: {error}") from None
