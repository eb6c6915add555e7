"""Predicts what a step will take: computation measured here, and the time on the wire."""

import contextlib
import dataclasses
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from dist_partial import reductions
from dist_partial.config.settings import Settings
from dist_partial.distributed import replicas
from dist_partial.distributed.collectives import PACK_BYTES
from dist_partial.schedules.fixed import Constant
from dist_partial.selection.payload import Payload, average_bytes, itemsize
from dist_partial.selection.plan import Plan
from dist_partial.session import put_back
from dist_partial.step.evaluation_step import EvaluationSpec, evaluation_step
from dist_partial.step.exchanges import compiled_exchanges
from dist_partial.training.build import batches, build, compiled_step

# Of the bits on a wire, those that are payload: a frame of 1514 bytes carries 1448, and a few are acknowledgements.
EFFICIENCY = 0.95
# CPU time that a byte takes on its way through one worker's sockets and sums, in nanoseconds; measured by
# tests/benchmarks/wire.py, unshaped.
CPU_NS_PER_BYTE = 1.5
_REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Machine:
    """Describes what a plan will run on.

    Attributes:
        workers: how many, with one replica each.
        bandwidth: of each worker's link, each way, bytes a second.
        latency: of a message between two workers, seconds.
        workers_per_host: how many share the cores of one host.
    """

    workers: int
    bandwidth: float
    latency: float = 1e-4
    workers_per_host: int = 1


@dataclasses.dataclass(frozen=True)
class Cost:
    """Holds what a plan costs one worker in a step, on average; times in seconds.

    Attributes:
        plan: the plan.
        payload: bytes that the replica hands over.
        nic_bytes: bytes that leave its network interface.
        memory: bytes of optimizer slots, and of what reductions keep.
        compute: the step without communication, measured, where the workers of a host share its cores.
        wire: the least time that the bytes at the interface take.
        step: what is expected.
    """

    plan: Plan
    payload: float
    nic_bytes: float
    memory: int
    compute: float
    wire: float
    step: float


@dataclasses.dataclass(frozen=True)
class Computation:
    """Holds one worker's times without communication, in seconds: forward pass, whole step and its CPU time.

    `sums` is how many sums over the workers its layers wait for, one after the other.
    """

    forward: float
    step: float
    cpu: float
    sums: int


def estimate(settings: Settings, machine: Machine) -> Cost:
    """Builds the model, measures the computation of a few steps, and adds what the wire takes.

    The gradients of the last layers travel while those of the first are computed, pack by pack.
    """
    with put_back():
        plan, computation, exchanges, memory = _measure(settings, max(1, settings.global_batch // machine.workers))
    own = plan
    plan = dataclasses.replace(plan, workers=max(2, machine.workers))
    memory += _kept(plan) - _kept(own)  # residuals of sums are there from three workers on
    cores = os.cpu_count() or 1
    shared = [entry for entry in plan.trained if entry.reduction.shared]
    all_reduce = [payload for entry in shared for payload in plan.handed_over(entry)]
    all_reduce += [payload for payload in plan.statistics if payload.every == 1]
    sending = average_bytes(all_reduce, machine.workers)
    periodic = average_bytes(plan.payloads, machine.workers) - sending
    # Workers that share a host's cores compute side by side until the cores are full; sockets want their share.
    crowded = machine.workers_per_host / cores
    transport = 2 * (sending + periodic) * CPU_NS_PER_BYTE * 1e-9
    compute = max(computation.step, computation.cpu * crowded) + exchanges
    slower = compute / (computation.step + exchanges)
    wire = (sending + periodic) / machine.bandwidth
    rate = machine.bandwidth * EFFICIENCY
    forward = computation.forward * slower
    step = _travel(average_bytes(all_reduce), sending / rate, forward, computation.step * slower)
    step += exchanges * slower + periodic / rate - _hidden(plan, machine.workers, rate, step)
    if machine.workers > 1:
        apart = [group.entries for group in plan.groups if not group.reduction.shared]
        step += machine.latency * (_hops(plan, shared) + sum(_hops(plan, each) for each in apart) + computation.sums)
        step = max(step, (computation.cpu + transport) * crowded)
    return Cost(plan, plan.wire_bytes, sending + periodic, memory, compute, wire, step)


def _travel(payload: float, wire: float, forward: float, computed: float) -> float:
    """When the last pack has arrived; gradients appear evenly through the backward pass, a pack leaves when full."""
    arrived = filled = 0.0
    while filled < payload:
        pack = min(PACK_BYTES, payload - filled)
        filled += pack
        ready = forward + (computed - forward) * filled / payload
        arrived = max(ready, arrived) + wire * pack / payload
    return max(arrived, computed)


def _hidden(plan: Plan, workers: int, rate: float, step: float) -> float:
    """Seconds a step, on average, in which exchanges travel while steps are made."""
    found = 0.0
    for group in plan.groups:
        delay, every = getattr(group.reduction, "delay", 0), getattr(group.reduction, "sync_every", 1)
        each = average_bytes([payload for entry in group.entries for payload in plan.handed_over(entry)], workers)
        found += min(each * every / rate, delay * step) / every
    return found


def _hops(plan: Plan, entries: Sequence[Any]) -> float:
    """Messages a step that wait for each other: a sum takes two hops, a gather or an all-to-all one."""
    return max(
        (sum((2 if m.kind == "sum" else 1) / m.every for m in plan.handed_over(e)) for e in entries), default=0.0
    )


def _measure(settings: Settings, batch: int) -> tuple[Plan, Computation, float, int]:
    # Of a schedule the costliest case: everything that it may train, at once.
    if not isinstance(settings.schedule, Constant):
        print("run.schedule trains a part of this at a time; what follows is of all that the rules train together")
    trainer = build(dataclasses.replace(settings, schedule=Constant()), replicas.create("default"))
    strategy, wire = trainer.replicas.strategy, trainer.replicas.collectives
    batch = -(-batch // settings.accumulate) * settings.accumulate
    train, inputs = compiled_step(trainer, trainer.plan), batches(trainer, 0, batch)
    forward = evaluation_step(EvaluationSpec(strategy, wire, trainer.model, trainer.objective))
    again = iter(tf.data.Dataset.from_tensors(next(inputs)).repeat())
    forward_time, _ = _time(lambda n: forward(again, tf.constant(n), batch).numpy())
    with _summed() as sums:
        train.function.get_concrete_function(inputs, tf.constant(1))
    averages = reductions.averages(trainer.plan, trainer.averaged)
    step_time, cpu = _time(lambda n: train.function(inputs, tf.constant(n))["loss"].numpy())
    exchanges = 0.0
    for exchange in compiled_exchanges(strategy, wire, trainer.plan, trainer.fragments, train.without_gradient, []):
        once, _ = _time(lambda n, exchange=exchange: [exchange.function() for _ in range(n)])
        exchanges += once / exchange.fragment.reduction.sync_every
    memory = sum(
        _bytes(v)
        for k, v in trainer.state().variables.items()
        if k.startswith(("slots/", "outer/", "reductions/", "moving/"))
    )
    memory += sum(_bytes(anchor.variable) for fragment in trainer.fragments for anchor in fragment.outer.members)
    plan = trainer.plan.traced(train.without_gradient, [*averages, *sums], train.looked_up)
    return plan, Computation(forward_time, step_time, cpu, len(sums)), exchanges, memory


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


def _kept(plan: Plan) -> int:
    """Bytes of what the reductions keep on each replica."""
    states = [e.reduction.state(e.path, e.trained_shape, e.dtype, plan.peers(e)) for e in plan.trained]
    return sum(array.nbytes for state in states for array in state.values())


def _bytes(variable: Any) -> int:
    dtype = getattr(variable.dtype, "name", str(variable.dtype))
    return math.prod(variable.shape) * itemsize(dtype)
