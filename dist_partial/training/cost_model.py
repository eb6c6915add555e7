"""Predicts what a run will take: computation measured here, time on the wire, and a simulation of the workers."""

import contextlib
import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from dist_partial import reductions
from dist_partial.config.settings import Settings
from dist_partial.distributed import replicas
from dist_partial.distributed.collectives import PACK_BYTES
from dist_partial.schedules.fixed import Constant
from dist_partial.selection.payload import Payload, average_bytes
from dist_partial.selection.plan import Plan, VariablePlan
from dist_partial.session import put_back
from dist_partial.step.evaluation_step import EvaluationSpec, evaluation_step
from dist_partial.step.exchanges import compiled_exchanges
from dist_partial.training.build import Trainer, batches, build, bytes_of, compiled_step, kept_by_reductions
from dist_partial.training.simulation import Exchange, Faults, Hosts, Outcome, Work, simulate

# Of the bits on a wire, those that are payload: a frame of 1514 bytes carries 1448, and a few are acknowledgements.
EFFICIENCY = 0.95
# CPU time that a byte takes on its way through one worker's sockets and sums, in nanoseconds; measured by
# tests/benchmarks/wire.py, unshaped.
CPU_NS_PER_BYTE = 1.5
# CPU time in seconds that a worker takes for a hop, and besides for each message of it that it sends and receives;
# fitted to tests/benchmarks/simulation.py --table=many.
CPU_SECONDS_PER_HOP = 6.5e-4
CPU_SECONDS_PER_MESSAGE = 2.8e-5
_REPEATS = 5
_SINGLE = 40  # steps that are timed one by one


@dataclasses.dataclass(frozen=True)
class Machine:
    """Describes what a plan will run on.

    Attributes:
        workers: how many; each is a host of its own, but for `workers_per_host`.
        bandwidth: of each worker's link, the slowest of them, each way, bytes a second.
        latency: of a message between two workers, seconds.
        workers_per_host: how many share the cores of one host.
        devices: replicas of each worker.
        inside: bytes a second of each device's link within its host, each way.
        step_seconds: times of steps without communication, measured elsewhere, in which all that a replica computes is
            included; else computation is measured here.
        stragglers: so many workers take so many times as long as the others.
        faults: of the workers; how often checkpoints are written is the run's to say.
    """

    workers: int
    bandwidth: float
    latency: float = 1e-4
    workers_per_host: int = 1
    devices: int = 1
    inside: float = math.inf
    step_seconds: Sequence[float] = ()
    stragglers: Sequence[tuple[int, float]] = ()
    faults: Faults = dataclasses.field(default_factory=Faults)

    @property
    def crowded(self) -> float:
        """How many workers share a core of their host."""
        return self.workers_per_host / (os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Holds what a plan costs one worker in a step, on average; times in seconds.

    Attributes:
        plan: the plan.
        payload: bytes that the worker hands over.
        nic_bytes: bytes that leave its network interface.
        inside_bytes: bytes that leave each of its devices for others of the same host.
        memory: bytes of optimizer slots, and of what reductions keep.
        compute: the step without communication, measured, where the workers of a host share its cores.
        wire: the least time that the bytes at the interface take.
        run: what the simulation of the whole run says, of all workers.
    """

    plan: Plan
    payload: float
    nic_bytes: float
    inside_bytes: float
    memory: int
    compute: float
    wire: float
    run: Outcome

    @property
    def step(self) -> float:
        """The step that is expected where nothing fails."""
        return self.run.step


@dataclasses.dataclass(frozen=True)
class Measured:
    """Holds one replica's times without communication, in seconds, of one build of a plan.

    Attributes:
        plan: as tracing has shown it.
        forward: a forward pass.
        step: a whole step.
        cpu: its CPU time.
        spread: times of single steps, divided by their median.
        sums: how many sums over the workers its layers wait for, one after the other.
        exchanges: of every group that trains by itself, the computation of an exchange.
        memory: bytes.
    """

    plan: Plan
    forward: float
    step: float
    cpu: float
    spread: Sequence[float]
    sums: int
    exchanges: Sequence[float]
    memory: int

    def slower(self, machine: Machine) -> float:
        """How many times as long computation takes there: workers compute side by side until the cores are full."""
        return max(1.0, self.cpu * machine.crowded / self.step)


def estimate(settings: Settings, machine: Machine, seed: int = 0) -> Cost:
    """Builds the model, measures the computation of a few steps, and simulates the run.

    Examples:
        >>> from dist_partial.data import stdlib_shapes
        >>> from dist_partial.models import two_dense
        >>> settings = Settings([("train", "dense2/.*"), ("freeze", ".*")], two_dense, stdlib_shapes)
        >>> cost = estimate(settings, Machine(workers=4, bandwidth=25e6, latency=0.05))
        >>> cost.payload, cost.nic_bytes, cost.step > 0.1  # a sum takes two messages, one after the other
        (2600, 3900, True)
    """
    return cost_of(measure(settings, machine), settings, machine, seed)


def measure(settings: Settings, machine: Machine) -> Measured:
    """Builds the model, and times what one replica of the machine computes, unless that is known."""
    batch = max(1, settings.global_batch // (machine.workers * machine.devices))
    with put_back():  # of a schedule the costliest case: everything that it may train, at once
        trainer = build(dataclasses.replace(settings, schedule=Constant()), replicas.create("default"))
        return _measure(trainer, -(-batch // settings.accumulate) * settings.accumulate, machine.step_seconds)


def cost_of(measured: Measured, settings: Settings, machine: Machine, seed: int = 0) -> Cost:
    """Simulates the run of which one replica's computation is known."""
    plan = measured.plan.on(machine.workers, machine.devices)
    # Residuals of sums are there from three workers on.
    kept, before = (kept_by_reductions(p, p.trained) for p in (plan, measured.plan))
    memory = measured.memory + kept - before
    work = _work(plan, measured, machine)
    hosts = Hosts(
        machine.workers,
        machine.devices,
        measured.spread,
        machine.stragglers,
        dataclasses.replace(machine.faults, checkpoint_every=settings.save_every or settings.steps),
    )
    nic_bytes = average_bytes(plan.payloads, machine.workers)
    return Cost(
        plan,
        plan.wire_bytes,
        nic_bytes,
        sum(_inside_bytes(plan, plan.trained, exchanged) for exchanged in (False, True)),
        memory,
        compute=measured.step * measured.slower(machine) + sum(each.compute / each.every for each in work.exchanges),
        wire=nic_bytes / machine.bandwidth,
        run=simulate(work, hosts, settings.steps, seed),
    )


def _work(plan: Plan, measured: Measured, machine: Machine) -> Work:
    """What the simulation works with."""
    workers, rate, inside = machine.workers, machine.bandwidth * EFFICIENCY, machine.inside * EFFICIENCY
    shared = [entry for entry in plan.trained if entry.reduction.shared]
    every_step = [payload for entry in shared for payload in plan.handed_over(entry)]
    every_step += [payload for payload in plan.statistics if payload.every == 1]
    slower = measured.slower(machine)
    handling = CPU_SECONDS_PER_HOP + CPU_SECONDS_PER_MESSAGE * (workers - 1)
    message = machine.latency + handling * max(1.0, machine.crowded) if workers > 1 else 0.0
    exchanges = []
    averaged = [payload for payload in plan.statistics if payload.every > 1]  # they travel with the first exchange
    for group, compute in zip([g for g in plan.groups if _periodic(g.reduction)], measured.exchanges, strict=True):
        reduction, sent = group.reduction, averaged + [m for e in group.entries for m in plan.handed_over(e)]
        averaged = []
        once = average_bytes(sent, workers) / rate + message * _hops(plan, group.entries)
        once += _inside_bytes(plan, group.entries, exchanged=True) / inside
        wire = once * reduction.sync_every
        exchanges.append(
            Exchange(reduction.sync_every, reduction.offset, reduction.delay, reduction.warm_up, compute * slower, wire)
        )
    hops = _hops(plan, shared) + 2 * measured.sums
    # Sockets want their share of the cores.
    transport = 2 * average_bytes(plan.payloads, workers) * CPU_NS_PER_BYTE * 1e-9 + handling * hops
    return Work(
        forward=measured.forward * slower,
        step=measured.step * slower,
        packs=max(1, math.ceil(average_bytes(every_step) / PACK_BYTES)),
        inside=_inside_bytes(plan, plan.trained, exchanged=False) / inside,
        between=average_bytes(every_step, workers) / rate,
        waits=message * hops,
        least=(measured.cpu + transport) * machine.crowded if workers > 1 else 0.0,
        exchanges=tuple(exchanges),
    )


def _periodic(reduction: Any) -> bool:
    """Whether a group exchanges something, and not in every step."""
    return getattr(reduction, "window", None) is not None


def _inside_bytes(plan: Plan, entries: Sequence[VariablePlan], exchanged: bool) -> int | float:
    """Bytes a step from a device to others of its host: in exchanges of every few steps, or else in every step."""
    found: list[Payload] = []
    for entry in entries:
        if entry.inside is not None and not exchanged:
            found += entry.inside.payloads(entry.trained_shape, entry.dtype, plan.members(entry, inside=True))
        elif entry.inside is None and exchanged != entry.reduction.shared:
            # They add up what they have before one of them sends it.
            payloads = entry.payloads(plan.peers(entry))
            found += [payload for payload in payloads if payload.kind == "sum" or plan.hosts == 1]
    return average_bytes(found, plan.devices)


def _hops(plan: Plan, entries: Sequence[Any]) -> float:
    """Messages a step that wait for each other: a sum takes two hops, a gather or an all-to-all one."""
    return max(
        (sum((2 if m.kind == "sum" else 1) / m.every for m in plan.handed_over(e)) for e in entries), default=0.0
    )


def _measure(trainer: Trainer, batch: int, step_seconds: Sequence[float]) -> Measured:
    strategy, wire = trainer.replicas.strategy, trainer.replicas.collectives
    train, inputs = compiled_step(trainer, trainer.plan), batches(trainer, 0, batch)
    with _summed() as sums:
        train.function.get_concrete_function(inputs, tf.constant(1))
    plan = trainer.plan.traced(
        train.without_gradient, [*reductions.averages(trainer.plan, trainer.averaged), *sums], train.looked_up
    )
    memory = sum(
        bytes_of(v)
        for k, v in trainer.state().variables.items()
        if k.startswith(("slots/", "outer/", "reductions/", "moving/", "begun/"))
    )
    memory += sum(bytes_of(anchor.variable) for fragment in trainer.fragments for anchor in fragment.outer.members)
    if step_seconds:  # as for a step of everything, whose backward pass computes twice as much
        step = statistics.median(step_seconds)
        spread, exchanges = [each / step for each in step_seconds], [0.0] * len(trainer.fragments)
        return Measured(plan, step / 3, step, step, spread, len(sums), exchanges, memory)
    forward = evaluation_step(EvaluationSpec(strategy, wire, trainer.model, trainer.objective))
    again = iter(tf.data.Dataset.from_tensors(next(inputs)).repeat())
    forward_time, _ = _time(lambda n: forward(again, tf.constant(n), batch).numpy())
    step_time, cpu = _time(make := lambda n: train.function(inputs, tf.constant(n))["loss"].numpy())
    exchanges = []
    for exchange in compiled_exchanges(strategy, wire, trainer.plan, trainer.fragments, train.without_gradient, []):
        exchanges.append(_time(lambda n, exchange=exchange: [exchange.function() for _ in range(n)])[0])
    return Measured(plan, forward_time, step_time, cpu, _spread(make), len(sums), exchanges, memory)


def _spread(step: Callable[[int], Any]) -> list[float]:
    """Times of single steps, divided by their median."""
    times = []
    for _ in range(_SINGLE):
        start = time.perf_counter()
        step(1)
        times.append(time.perf_counter() - start)
    return [each / statistics.median(times) for each in times]


@contextlib.contextmanager
def _summed() -> Iterator[list[Any]]:
    """Notes what a model's own layers sum over the replicas while a step is traced, as synchronised BatchNorm does.

    With one replica no such sum is in the graph.
    """
    found: list[Payload] = []
    all_reduce = tf.distribute.ReplicaContext.all_reduce

    def noted(context: Any, reduce_op: Any, value: Any, options: Any = None) -> Any:
        for tensor in map(tf.convert_to_tensor, tf.nest.flatten(value)):
            found.append(Payload("sum", tensor.shape.num_elements() * tensor.dtype.size))
        return all_reduce(context, reduce_op, value, options)

    tf.distribute.ReplicaContext.all_reduce = noted
    try:
        yield found
    finally:
        tf.distribute.ReplicaContext.all_reduce = all_reduce


def _time(call: Any) -> tuple[float, float]:
    """Median wall and CPU seconds of a step, after warming up; `call(n)` makes n steps."""
    call(1)
    start = time.perf_counter()
    call(1)
    steps = max(1, min(20, int(0.2 / max(time.perf_counter() - start, 1e-6))))
    walls, cpus = [], []
    for _ in range(_REPEATS):
        start, cpu = time.perf_counter(), time.process_time()
        call(steps)
        walls.append((time.perf_counter() - start) / steps)
        cpus.append((time.process_time() - cpu) / steps)
    return statistics.median(walls), statistics.median(cpus)
