"""Simulates a run on many workers: the clock of every replica, step by step, and what stops them all."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

_STEPS = 2_000  # that are simulated, of a run that has as many
_DRAWS = 20_000_000  # step times that are drawn at most, unless the rarest exchange needs more
_PACKS = 256  # messages of a step, at most
_FAULTS = 20_000  # after so many a run goes on as it has until then
_RUNS = 200  # of which the mean is taken, unless fewer have as many faults


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Describes what replicas exchange after every so many steps, between which each trains by itself.

    Attributes:
        every: steps from one exchange to the next.
        offset: it follows the steps s with s % every == offset % every.
        delay: steps that are made while it travels.
        warm_up: steps at the beginning, after each of which it is made without a delay.
        compute: seconds that each replica computes for one.
        wire: seconds that it takes on the links, those within a host and those between hosts one after the other.
    """

    every: int
    offset: int = 0
    delay: int = 0
    warm_up: int = 0
    compute: float = 0.0
    wire: float = 0.0


@dataclasses.dataclass(frozen=True)
class Work:
    """Describes what each replica does in a step; times in seconds.

    Attributes:
        forward: of the step, the forward pass, in which nothing can be sent yet.
        step: computation, with the forward pass.
        packs: messages, one after the other, in which the gradients of a step travel.
        inside: what travels in every step takes so long on the links within a host.
        between: and so long on those between hosts.
        waits: latency of the messages of a step that wait for each other; more than 0 where hosts wait for each other.
        least: what a step takes at least, on average, as where workers share the cores of one machine.
        exchanges: those of every few steps.
    """

    forward: float
    step: float
    packs: int = 1
    inside: float = 0.0
    between: float = 0.0
    waits: float = 0.0
    least: float = 0.0
    exchanges: tuple[Exchange, ...] = ()


@dataclasses.dataclass(frozen=True)
class Faults:
    """Says how often a host fails, and what that costs.

    Attributes:
        mean_seconds: between two faults of one host, on average; infinite where none fails.
        restart_seconds: from a fault until steps are made again.
        checkpoint_every: steps; those since the last checkpoint are made again.
        rejoin: whether the host comes back to the others, which keep all their steps, instead.
    """

    mean_seconds: float = math.inf
    restart_seconds: float = 60.0
    checkpoint_every: int = 1
    rejoin: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Holds what a run is expected to take.

    Attributes:
        step: seconds a step where nothing fails.
        seconds: of the whole run; infinite where faults come before any checkpoint.
        made: steps that are made, those included that are made again.
        faults: how many there are.
        goodput: the part of the time in which steps are made that count.
    """

    step: float
    seconds: float
    made: float
    faults: float
    goodput: float


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Describes who takes part.

    Attributes:
        count: workers, between which the slower links are.
        devices: replicas of each.
        spread: step times as they were measured, divided by their median: each replica draws one for each step.
        stragglers: so many hosts take so many times as long as the others.
        faults: of the hosts.
    """

    count: int
    devices: int = 1
    spread: Sequence[float] = (1.0,)
    stragglers: Sequence[tuple[int, float]] = ()
    faults: Faults = Faults()


def simulate(work: Work, hosts: Hosts, steps: int = _STEPS, seed: int = 0) -> Outcome:
    """Simulates a run; the same arguments give the same outcome.

    Examples:
        >>> alone, uneven = Work(forward=0.02, step=0.1), [1.0, 1.0, 1.0, 1.2]
        >>> round(simulate(alone, Hosts(100, spread=uneven)).step, 3)  # the last of 100 that do not wait
        0.106
        >>> together = dataclasses.replace(alone, waits=1e-3)
        >>> round(simulate(together, Hosts(100, spread=uneven)).step, 3)  # in every step somebody is slow
        0.121
        >>> found = simulate(alone, Hosts(1000, faults=Faults(1e6, 30.0, checkpoint_every=100)), steps=100_000)
        >>> round(found.step, 3), round(found.goodput, 2)
        (0.1, 0.97)
    """
    generator = np.random.default_rng(seed)
    step = _mean_step(work, hosts, steps, generator)
    mean = hosts.faults.mean_seconds / hosts.count
    if mean == math.inf:
        return with_faults(step, steps, hosts.faults, iter(()))
    runs: list[Outcome] = []  # of few faults one run says little
    while len(runs) < _RUNS and sum(run.faults for run in runs) < _FAULTS:
        runs.append(with_faults(step, steps, hosts.faults, iter(lambda: generator.exponential(mean), None)))
    seconds, made, faults = (
        sum(getattr(run, name) for run in runs) / len(runs) for name in ("seconds", "made", "faults")
    )
    return Outcome(step, seconds, made, faults, steps * step / seconds)


def with_faults(step: float, steps: int, faults: Faults, gaps: Iterator[float]) -> Outcome:
    """Adds to a run what faults cost it.

    Args:
        step: seconds a step.
        steps: of the run.
        faults: what each costs.
        gaps: seconds from one fault to the next, on whichever host; after the last there are no more.

    Examples:
        >>> found = with_faults(1.0, 100, Faults(restart_seconds=30, checkpoint_every=20), iter([50.0]))
        >>> found.seconds, found.made, round(found.goodput, 3)  # of 50 steps 10 are made again
        (140.0, 110.0, 0.714)
    """
    seconds, made, count, done = 0.0, 0.0, 0, 0
    gap = next(gaps, math.inf)
    while gap < (steps - done) * step and count < _FAULTS:
        seconds, made, count = seconds + gap, made + gap / step, count + 1
        done += int(gap / step)
        if not faults.rejoin:
            done -= done % faults.checkpoint_every
        # One that comes before steps are made again begins the restart again.
        while (gap := next(gaps, math.inf)) < faults.restart_seconds and count < _FAULTS:
            seconds, count = seconds + gap, count + 1
        seconds, gap = seconds + faults.restart_seconds, gap - faults.restart_seconds
    if count < _FAULTS:
        seconds, made, done = seconds + (steps - done) * step, made + steps - done, steps
    longer = steps / done if done else math.inf
    return Outcome(step, seconds * longer, made * longer, count * longer, done * step / seconds)


def _mean_step(work: Work, hosts: Hosts, steps: int, generator: np.random.Generator) -> float:
    """Seconds a step, on average over a run with its warm-up."""
    warm = min(steps, max((each.warm_up for each in work.exchanges), default=0))
    often = [dataclasses.replace(each, every=1, delay=0) if each.warm_up else each for each in work.exchanges]
    parts = [(warm, dataclasses.replace(work, exchanges=tuple(often))), (steps - warm, work)]
    return sum(count * _step_seconds(part, hosts, count, generator) for count, part in parts if count) / steps


def _step_seconds(work: Work, hosts: Hosts, steps: int, generator: np.random.Generator) -> float:
    """Seconds a step, on average over some of so many."""
    shape = hosts.count, hosts.devices
    rarest = max((each.every for each in work.exchanges), default=1)
    enough = max(4 * rarest, min(_STEPS, _DRAWS // math.prod(shape)))
    steps = min(steps, math.ceil(enough / rarest) * rarest)
    slower, spread = _slower(hosts), np.asarray(hosts.spread, float)
    together = work.between > 0 or work.waits > 0
    tail = _Tail(work, float(spread.min()), float(spread.max() * slower.max()))
    clocks, free, landings = np.zeros(shape), 0.0, {}
    for step in range(1, steps + 1):
        took = work.step * slower * generator.choice(spread, shape)
        clocks = clocks + took
        if together:
            clocks = np.full((1, 1), clocks.max() + tail(took.max()) + work.waits)
        elif work.inside:
            clocks = clocks.max(axis=1, keepdims=True) + tail(took.max(axis=1, keepdims=True))
        for number, exchange in enumerate(work.exchanges):
            if step % exchange.every == exchange.offset % exchange.every:
                clocks = clocks + exchange.compute * slower
                free = max(free, clocks.max()) + exchange.wire * (_sharing(work) if exchange.delay else 1.0)
                landings[step + exchange.delay, number] = free
            if (step, number) in landings:
                clocks = np.maximum(clocks, landings.pop((step, number)))
    return max(float(clocks.max()) / steps, work.least)


def _slower(hosts: Hosts) -> np.ndarray:
    """How many times as long as others each host takes, [hosts, 1]."""
    factors = [factor for count, factor in hosts.stragglers for _ in range(count)]
    return np.array([*factors, *[1.0] * (hosts.count - len(factors))])[: hosts.count, None]


def _sharing(work: Work) -> float:
    """How many times as long an exchange travels while steps use the same links, and go first."""
    used = work.between / max(work.step, work.between, 1e-9)
    return 1 / max(0.05, 1 - used)


class _Tail:
    """Tells how long after a step's computation its last gradients arrive.

    They appear evenly through the backward pass, and a pack leaves when it is full: first over the links within a
    host, then over those between hosts, where it waits for the packs before it.
    """

    def __init__(self, work: Work, least: float, most: float) -> None:
        self._computed = work.step * np.linspace(least, most, 33)
        packs = min(work.packs, _PACKS)
        forward = self._computed * (work.forward / work.step if work.step else 0.0)
        inside = between = np.zeros_like(self._computed)
        for filled in range(1, packs + 1):
            ready = forward + (self._computed - forward) * filled / packs
            inside = np.maximum(ready, inside) + work.inside / packs
            between = np.maximum(inside, between) + work.between / packs
        self._tails = between - self._computed

    def __call__(self, computed: np.ndarray) -> np.ndarray:
        return np.interp(computed, self._computed, self._tails)
