"""What is trained when: schedules that switch units of the trained variables on and off during a run.

A schedule is a pure function of the step, the seed and, where it adapts, of statistics that were reduced over the
replicas: every worker comes to the same answer by itself. Nothing here knows variables; paths and sizes are enough.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Protocol

import numpy as np

from dist_partial.errors import UserError
from dist_partial.selection.rules import matches
from dist_partial.validation import AtLeast, Patterns, check, nearest

State = dict[str, Any]  # JSON values
Partition = list[tuple[str, tuple[str, ...]]]


@dataclasses.dataclass(frozen=True)
class Unit:
    """Names trained variables that are switched on and off together.

    Attributes:
        name: by which schedules and logs call it.
        paths: of its variables.
        bytes: what leaves a worker's network interface for it in a step in which it is on.
        parameters: how many of its parameters are trained.
        memory: bytes that it takes on a replica while it is on, beside `kept`: gradients, and optimizer slots.
        kept: bytes that it takes there on or off: what reductions keep, and slots that stay.

    Examples:
        >>> Unit("head", ("head/kernel", "head/bias"), bytes=72, parameters=18).name
        'head'
    """

    name: str
    paths: tuple[str, ...]
    bytes: int
    parameters: int
    memory: int = 0
    kept: int = 0


class Schedule(Protocol):
    """Decides what is trained at each step: what `run.schedule` has to offer.

    Units stand in order from the model's input to its output. `step` is a number of updates: what is said of it holds
    for the update that follows, and 0 is before the first.

    Attributes:
        statistics: what `observe` is given: None if it is never called; 'norms': for each unit the sum, over the steps
            since the last switch, of the squared norm of its reduced gradient, 0 for a unit that was off; 'probe': the
            squared norm of each unit's gradient, on or off, on one small batch.

    Examples:
        >>> from dist_partial.schedules import Rotation
        >>> schedule: Schedule = Rotation(every=10)
        >>> units = [Unit(name, paths, 8, 2) for name, paths in schedule.partition(["a/kernel", "a/bias", "b/kernel"])]
        >>> [sorted(schedule.select(step, units, seed=0, state={})) for step in (0, schedule.next_switch(0))]
        [['b'], ['a']]
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
    """Tells whether `observe` is due at this step: at each `next_switch`; for a probe, at step 0, too.

    Examples:
        >>> from dist_partial.schedules import AutoFreeze, Constant
        >>> observes(Constant(), 50), observes(AutoFreeze(every=50), 50)
        (False, True)
    """
    if step == 0 or schedule.statistics is None:
        return schedule.statistics == "probe"
    return schedule.next_switch(step - 1) == step


class Stateless:
    """Gives schedules that follow from step and seed alone the methods of those with a state.

    Examples:
        >>> class HeadOnly(Stateless):
        ...     def select(self, step, units, seed, state):
        ...         return frozenset([units[-1].name])
        >>> schedule, units = HeadOnly(), [Unit("body", ("body/kernel",), 8, 2), Unit("head", ("head/kernel",), 8, 2)]
        >>> sorted(schedule.remaining(0, units, schedule.initial(units))), observes(schedule, 0)
        (['body', 'head'], False)
    """

    statistics: ClassVar[str | None] = None

    def initial(self, units: Sequence[Unit]) -> State:
        return {}

    def observe(self, step: int, units: Sequence[Unit], norms: np.ndarray, state: State) -> State:
        return state

    def remaining(self, step: int, units: Sequence[Unit], state: State) -> frozenset[str]:
        return frozenset(unit.name for unit in units)


# By keyword, so that a field without a default can follow.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Periodic(Stateless):
    """Gives schedules that may switch every few steps their units and switches.

    Attributes:
        every: steps from one switch to the next.
        units: regular expressions of whole paths, from the model's input to its output, of which the first that
            matches counts; None makes a unit of each top layer, the first component of the paths.

    Examples:
        >>> class Mine(Periodic):
        ...     binding = "mine"
        >>> mine = Mine(every=10, units=["head/.*", ".*"])
        >>> mine.next_switch(10), mine.partition(["body/kernel", "head/kernel"])
        (20, [('head/.*', ('head/kernel',)), ('.*', ('body/kernel',))])
    """

    every: Annotated[int, AtLeast(1)] = 100
    units: Annotated[Sequence[str] | None, Patterns(empty=False)] = None

    binding: ClassVar[str]

    def __post_init__(self) -> None:
        check(self, self.binding)

    def partition(self, paths: Sequence[str]) -> Partition:
        return by_layer(paths) if self.units is None else by_pattern(f"{self.binding}.units", self.units, paths)

    def next_switch(self, step: int) -> int | None:
        return (step // self.every + 1) * self.every


def by_layer(paths: Sequence[str]) -> Partition:
    """Divides paths into one unit a top layer.

    Examples:
        >>> by_layer(["body/kernel", "head/kernel", "body/bias"])
        [('body', ('body/kernel', 'body/bias')), ('head', ('head/kernel',))]
    """
    layers: dict[str, list[str]] = {}
    for path in paths:
        layers.setdefault(path.split("/")[0], []).append(path)
    return [(layer, tuple(members)) for layer, members in layers.items()]


def by_pattern(where: str, patterns: Sequence[str], paths: Sequence[str]) -> Partition:
    """Divides paths into units by the first pattern that matches, in the patterns' order.

    Examples:
        >>> by_pattern("phases.units", [".*/bias", "body/.*"], ["body/kernel", "body/bias"])
        [('.*/bias', ('body/bias',)), ('body/.*', ('body/kernel',))]
    """
    units: list[list[str]] = [[] for _ in patterns]
    for path in paths:
        number = next((n for n, pattern in enumerate(patterns) if matches(pattern, path)), None)
        if number is None:
            raise UserError(f"{where}: no pattern matches {path!r}: add one{nearest(path, patterns, always=True)}")
        units[number].append(path)
    for pattern, members in zip(patterns, units, strict=True):
        if not members:
            raise UserError(
                f"{where}: {pattern!r} matches nothing that is trained and that no pattern before it takes"
                f"{nearest(pattern, paths, always=True)}"
            )
    return [(pattern, tuple(members)) for pattern, members in zip(patterns, units, strict=True)]


def split_always(binding: str, always: Sequence[str], units: Sequence[Unit]) -> tuple[list[str], list[str]]:
    """Splits the names of the units into those that are always on, and the others, in the units' order.

    Examples:
        >>> units = [Unit(name, (f"{name}/kernel",), 8, 2) for name in ("body", "neck", "head")]
        >>> split_always("lisa.always", ["h.*"], units)
        (['head'], ['body', 'neck'])
    """
    names = [unit.name for unit in units]
    on = set()
    for pattern in always:
        # A unit that was made by a pattern is named by it, and a pattern need not match its own text.
        found = {name for name in names if name == pattern or re.fullmatch(pattern, name)}
        if not found:
            raise UserError(f"{binding}: no unit is called {pattern!r}{nearest(pattern, names, always=True)}")
        on |= found
    if len(on) == len(names):
        raise UserError(f"{binding}: all units, {quoted(names)}, are always on: nothing is left to choose from")
    return [name for name in names if name in on], [name for name in names if name not in on]


def quoted(words: Iterable[str]) -> str:
    """Joins words, each in quotes.

    Examples:
        >>> print(quoted(["body", "head"]))
        'body', 'head'
    """
    return ", ".join(map(repr, words))


def unreached(what: str, start: int, steps: int) -> list[str]:
    # No mistake: the schedule of a long run is tried for a few steps, and goes on when run.steps is more.
    """Says, if so, that a run ends before `start`.

    Examples:
        >>> unreached("phase 2 begins", start=100, steps=60), unreached("phase 2 begins", start=100, steps=200)
        (['phase 2 begins after 100 steps, and run.steps is 60'], [])
    """
    return [f"{what} after {start} steps, and run.steps is {steps}"] if start >= steps else []


def roots(squares: np.ndarray) -> list[float]:
    # Loss scaling lets gradients overflow now and then: what is not finite says nothing, and is no JSON.
    """Takes the roots of squared norms, with 0 for what is not finite.

    Examples:
        >>> roots(np.array([4.0, np.inf]))
        [2.0, 0.0]
    """
    return np.sqrt(np.nan_to_num(np.asarray(squares, np.float64), nan=0.0, posinf=0.0)).tolist()
