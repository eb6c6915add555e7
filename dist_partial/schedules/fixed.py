"""Schedules that follow from the step and the seed alone."""

import bisect
import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np

from dist_partial.errors import UserError
from dist_partial.schedules.base import (
    Partition,
    Periodic,
    State,
    Stateless,
    Unit,
    quoted,
    split_always,
    unreached,
)
from dist_partial.selection.rules import matches
from dist_partial.validation import AtLeast, OneOf, Patterns, check_pattern, counted, nearest, shown


@dataclasses.dataclass(frozen=True)
class Constant(Stateless):
    """Trains everything that the rules train, always: one unit without a name.

    Examples:
        >>> Constant().partition(["body/kernel", "head/kernel"])
        [('', ('body/kernel', 'head/kernel'))]
    """

    def partition(self, paths: Sequence[str]) -> Partition:
        return [("", tuple(paths))]

    def check(self, units: Sequence[Unit], steps: int) -> list[str]:
        return []

    def select(self, step: int, units: Sequence[Unit], seed: int, state: State) -> frozenset[str]:
        return frozenset(unit.name for unit in units)

    def next_switch(self, step: int) -> int | None:
        return None


@dataclasses.dataclass(frozen=True)
class Phases(Stateless):
    """Trains, from each first step on, the variables whose whole path matches the phase's pattern.

    Variables that are on in the same phases are a unit.

    Attributes:
        table: (first step, regular expression), in order; the first is of step 0.

    Examples:
        >>> phases = Phases([(0, "head/.*"), (200, ".*")])
        >>> phases.next_switch(0)
        200
    """

    table: Sequence[tuple[int, str]]

    def __post_init__(self) -> None:
        if not isinstance(self.table, (list, tuple)) or not self.table:
            raise UserError(
                f"phases.table is {shown(self.table)}: write a list such as [(0, r'head/.*'), (200, r'.*')]"
            )
        for number, line in enumerate(self.table, 1):
            if not isinstance(line, (list, tuple)) or len(line) != 2 or type(line[0]) is not int:
                raise UserError(f"phases.table, phase {number} is {shown(line)}: write (first step, pattern)")
            check_pattern(f"phases.table, phase {number}", line[1])
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
        for number, (_, pattern) in enumerate(self.table, 1):
            if not any(matches(pattern, path) for path in paths):
                raise UserError(
                    f"phases.table, phase {number} ({pattern!r}) selects nothing that the rules train"
                    f"{nearest(pattern, paths, always=True)}"
                )
        classes: dict[tuple[int, ...], list[str]] = {}
        for path in paths:
            phases = tuple(n for n, (_, pattern) in enumerate(self.table, 1) if matches(pattern, path))
            if not phases:
                raise UserError(f"phases.table never trains {path!r}: add it to a phase, or freeze it in run.rules")
            classes.setdefault(phases, []).append(path)
        return [
            (f"phase{'s' if len(phases) > 1 else ''} {'+'.join(map(str, phases))}", tuple(members))
            for phases, members in classes.items()
        ]

    def check(self, units: Sequence[Unit], steps: int) -> list[str]:
        number = self._number(steps - 1) + 1
        later = self._starts[number:]
        return (
            unreached(f"phases.table, phase {number + 1} of {len(self.table)} starts", later[0], steps) if later else []
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


@dataclasses.dataclass(frozen=True)
class Gradual(Periodic):
    """Unfreezes gradually: first the top unit, then one more below it at a time (Howard & Ruder 2018, "ULMFiT").

    Attributes:
        every: steps until the next are added.
        count: units that are added at a time, and on at first.

    Examples:
        >>> from dist_partial.schedules import Unit
        >>> units = [Unit(name, (f"{name}/kernel",), 4, 1) for name in ("embedding", "block", "head")]
        >>> [sorted(Gradual(every=10).select(step, units, 0, {})) for step in (0, 10)]
        [['head'], ['block', 'head']]
    """

    binding: ClassVar[str] = "gradual_unfreezing"
    count: Annotated[int, AtLeast(1)] = 1

    def check(self, units: Sequence[Unit], steps: int) -> list[str]:
        if self.count >= len(units):
            names = quoted(unit.name for unit in units)
            raise UserError(
                f"gradual_unfreezing.count is {self.count}: all units, {names}, would be on at once: bind less"
            )
        last = self.every * ((len(units) - 1) // self.count)
        missed = quoted(unit.name for unit in units[: -self._reached(steps - 1)])
        return unreached(f"gradual_unfreezing.every is {self.every}: {missed} stay frozen; all are on", last, steps)

    def select(self, step: int, units: Sequence[Unit], seed: int, state: State) -> frozenset[str]:
        return frozenset(unit.name for unit in units[-self._reached(step) :])

    def _reached(self, step: int) -> int:
        return self.count * (1 + step // self.every)


@dataclasses.dataclass(frozen=True)
class Rotation(Periodic):
    """Trains each unit in turn, for some steps: block coordinate descent (Luo et al. 2024, "BAdam").

    Attributes:
        every: steps of a turn.
        order: 'ascending' (from the input), 'descending', or 'random': another order, by the seed, in each round.
        always: names of units, or regular expressions of whole names, that are on in every turn and take none.

    Examples:
        >>> from dist_partial.schedules import Unit
        >>> units = [Unit(name, (f"{name}/kernel",), 4, 1) for name in ("embedding", "block", "head")]
        >>> rotation = Rotation(every=10, order="ascending", always=["head"])
        >>> [sorted(rotation.select(step, units, 0, {})) for step in (0, 10)]
        [['embedding', 'head'], ['block', 'head']]
    """

    binding: ClassVar[str] = "block_rotation"
    order: Annotated[str, OneOf("ascending", "descending", "random")] = "random"
    always: Annotated[Sequence[str], Patterns()] = ()

    def check(self, units: Sequence[Unit], steps: int) -> list[str]:
        _, others = split_always("block_rotation.always", self.always, units)
        if len(others) < 2:
            raise UserError(
                f"block_rotation has one unit to turn to, {quoted(others)}: bind patterns of more to "
                "block_rotation.units"
            )
        last = self.every * (len(others) - 1)
        what = f"block_rotation.every is {self.every}: the last of {len(others)} units has its first turn"
        return unreached(what, last, steps)

    def select(self, step: int, units: Sequence[Unit], seed: int, state: State) -> frozenset[str]:
        always, others = split_always("block_rotation.always", self.always, units)
        number, turn = divmod(step // self.every, len(others))
        if self.order == "random":
            turn = _permutation(len(others), seed, number)[turn]
        elif self.order == "descending":
            turn = len(others) - 1 - turn
        return frozenset([*always, others[turn]])


@dataclasses.dataclass(frozen=True)
class Lisa(Periodic):
    """Draws units every few steps, by the seed, besides those always on (Pan et al. 2024, "LISA").

    Attributes:
        every: steps until the next draw.
        count: units that are drawn.
        always: names of units, or regular expressions of whole names, that are always on and not drawn; None is the
            first and the last: embedding and head, as in the paper.

    Examples:
        >>> from dist_partial.schedules import Unit
        >>> units = [Unit(f"block_{i}", (f"block_{i}/kernel",), 4, 1) for i in range(8)]
        >>> lisa = Lisa(every=10, count=2)  # besides the first and the last
        >>> [len(lisa.select(step, units, 0, {})) for step in (0, 9, 10)]
        [4, 4, 4]
    """

    binding: ClassVar[str] = "lisa"
    every: Annotated[int, AtLeast(1)] = 20
    count: Annotated[int, AtLeast(1)] = 2
    always: Annotated[Sequence[str] | None, Patterns()] = None

    def check(self, units: Sequence[Unit], steps: int) -> list[str]:
        always, others = self._split(units)
        if self.count > len(others):
            raise UserError(
                f"lisa.count is {self.count}: it draws from {counted(len(others), 'unit')}, {quoted(others)}, beside "
                f"those that are always on, {quoted(always)}; draw fewer, or have fewer in lisa.always"
            )
        return unreached(f"lisa.every is {self.every}: the second draw comes", self.every, steps)

    def select(self, step: int, units: Sequence[Unit], seed: int, state: State) -> frozenset[str]:
        always, others = self._split(units)
        drawn = _permutation(len(others), seed, step // self.every)[: self.count]
        return frozenset([*always, *(others[i] for i in drawn)])

    def _split(self, units: Sequence[Unit]) -> tuple[list[str], list[str]]:
        ends = [re.escape(units[0].name), re.escape(units[-1].name)]
        return split_always("lisa.always", ends if self.always is None else self.always, units)


def _permutation(count: int, seed: int, number: int) -> list[int]:
    # NumPy keeps the raw numbers of a bit generator from version to version, and not what `Generator` makes of them.
    return np.random.PCG64([seed, number]).random_raw(count).argsort(kind="stable").tolist()
