"""python -m dist_partial.plan --gin_file=F --workers=64 --bandwidth=10gbit [--latency_ms=0.1]

Prints, without training, what each variable sends, which rules cost most, what optimizers hold, and how long a step
will take, for this plan and for training everything in float32 every step. The computation is measured here.

A gin file is a program: this imports the modules that it names, as training does. Read one that is not yours first.
"""

import contextlib
import dataclasses
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from dist_partial import cli
from dist_partial.selection.payload import average_bytes, itemsize

if TYPE_CHECKING:
    from dist_partial.selection.plan import Plan
    from dist_partial.settings import Settings

# Of the bits on a wire, those that are payload: a frame of 1514 bytes carries 1448, and a few are acknowledgements.
EFFICIENCY = 0.95
# CPU time that a byte takes on its way through one worker's sockets and sums, in nanoseconds; measured by
# tests/benchmarks/wire.py, unshaped.
CPU_NS_PER_BYTE = 1.5
_REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a plan will run on.

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
    """What a plan costs one worker in a step, on average; times in seconds.

    Attributes:
        plan: the plan.
        payload: bytes that the replica hands over.
        nic_bytes: bytes that leave its network interface.
        memory: bytes of optimizer slots, and of what reductions keep.
        compute: the step without communication, measured, where the workers of a host share its cores.
        wire: the least time that the bytes at the interface take.
        step: what is expected.
    """

    plan: "Plan"
    payload: float
    nic_bytes: float
    memory: int
    compute: float
    wire: float
    step: float


@dataclasses.dataclass(frozen=True)
class Computation:
    """One worker's step without communication, in seconds: forward pass, whole step and CPU time of it.

    `sums` is how many sums over the workers its layers wait for, one after the other.
    """

    forward: float
    step: float
    cpu: float
    sums: int


def bytes_per_second(rate: str) -> float:
    """Reads a rate as network tools write it, such as '200mbit' or '10gbit'.

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)(bit|bps)(?:/s)?", rate.strip().lower())
    if match is None or float(match[1]) == 0:
        raise cli.UserError(f"--bandwidth is {rate!r}: write e.g. 200mbit or 10gbit, of each worker's link")
    return float(match[1]) * {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]] / 8


def estimate(settings: "Settings", machine: Machine) -> Cost:
    """Builds the model, measures the computation of a few steps, and adds what the wire takes.

    The gradients of the last layers travel while those of the first are computed, pack by pack.
    """
    from dist_partial.session import put_back

    with put_back():
        plan, computation, exchanges, memory = _measure(settings, max(1, settings.global_batch // machine.workers))
    plan = dataclasses.replace(plan, workers=max(2, machine.workers))
    cores = os.cpu_count() or 1
    shared = [entry for entry in plan.trained if entry.reduction.shared]
    every_step = [message for entry in shared for message in entry.messages]
    every_step += [message for message in plan.statistics if message.every == 1]
    sending = average_bytes(every_step, machine.workers)
    periodic = average_bytes(plan.messages, machine.workers) - sending
    # Workers that share a host's cores compute side by side until the cores are full; sockets want their share.
    crowded = machine.workers_per_host / cores
    transport = 2 * (sending + periodic) * CPU_NS_PER_BYTE * 1e-9
    compute = max(computation.step, computation.cpu * crowded) + exchanges
    slower = compute / (computation.step + exchanges)
    wire = (sending + periodic) / machine.bandwidth
    rate = machine.bandwidth * EFFICIENCY
    forward = computation.forward * slower
    step = _travel(average_bytes(every_step), sending / rate, forward, computation.step * slower)
    step += exchanges * slower + periodic / rate
    if machine.workers > 1:
        apart = [group.entries for group in plan.groups if not group.reduction.shared]
        step += machine.latency * (_hops(shared) + sum(map(_hops, apart)) + computation.sums)
        step = max(step, (computation.cpu + transport) * crowded)
    return Cost(plan, plan.wire_bytes, sending + periodic, memory, compute, wire, step)


def _travel(payload: float, wire: float, forward: float, computed: float) -> float:
    """When the last pack has arrived; gradients appear evenly through the backward pass, a pack leaves when full."""
    from dist_partial.distributed.collectives import PACK_BYTES

    arrived = filled = 0.0
    while filled < payload:
        pack = min(PACK_BYTES, payload - filled)
        filled += pack
        ready = forward + (computed - forward) * filled / payload
        arrived = max(ready, arrived) + wire * pack / payload
    return max(arrived, computed)


def _hops(entries: Sequence[Any]) -> float:
    """Messages a step that wait for each other: a sum takes two hops, a gather one."""
    return max((sum((2 if m.kind == "sum" else 1) / m.every for m in e.messages) for e in entries), default=0.0)


def _measure(settings: "Settings", batch: int) -> tuple["Plan", Computation, float, int]:
    import tensorflow as tf

    from dist_partial import local_sgd, reductions, step
    from dist_partial.build import batches, build, train_step
    from dist_partial.distributed import replicas
    from dist_partial.schedules.fixed import Constant

    # Of a schedule the costliest case: everything that it may train, at once.
    if not isinstance(settings.schedule, Constant):
        print("run.schedule trains a part of this at a time; what follows is of all that the rules train together")
    built = build(dataclasses.replace(settings, schedule=Constant()), replicas.create("default"))
    strategy, wire = built.replicas.strategy, built.replicas.wire
    batch = -(-batch // settings.accumulate) * settings.accumulate
    train, inputs = train_step(built, settings, built.plan, batch), batches(built, settings, 0, batch)
    one = next(inputs)
    weighted = (*one[:2], tf.ones(one[1].shape[:1]))
    forward = step.evaluation_step(strategy, built.model, built.loss)
    again = iter(tf.data.Dataset.from_tensors(weighted).repeat())
    forward_time, _ = _time(lambda n: forward(again, tf.constant(n), tf.constant(n * batch)).numpy())
    with _summed() as sums:
        train.function.get_concrete_function(inputs, tf.constant(1))
    averages = reductions.averages(built.plan, built.averaged)
    step_time, cpu = _time(lambda n: train.function(inputs, tf.constant(n))["loss"].numpy())
    exchanges = 0.0
    for exchange in local_sgd.exchanges(strategy, wire, built.plan, built.fragments, train.without_gradient, []):
        once, _ = _time(lambda n, exchange=exchange: [exchange.function() for _ in range(n)])
        exchanges += once / exchange.fragment.reduction.steps
    memory = sum(_bytes(v) for k, v in built.state().items() if k.startswith(("slots/", "outer/", "reductions/")))
    memory += sum(_bytes(anchor.variable) for fragment in built.fragments for anchor in fragment.outer.members)
    plan = built.plan.traced(train.without_gradient, [*averages, *sums])
    return plan, Computation(forward_time, step_time, cpu, len(sums)), exchanges, memory


@contextlib.contextmanager
def _summed() -> Iterator[list[Any]]:
    """Notes what a model's own layers sum over the replicas while a step is traced, as synchronised BatchNorm does.

    With one replica no such sum is in the graph.
    """
    import tensorflow as tf

    from dist_partial.selection.payload import Message

    found: list[Message] = []
    all_reduce = tf.distribute.ReplicaContext.all_reduce

    def noted(context: Any, reduce_op: Any, value: Any, options: Any = None) -> Any:
        for tensor in map(tf.convert_to_tensor, tf.nest.flatten(value)):
            found.append(Message("sum", tensor.shape.num_elements() * tensor.dtype.size))
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


def _bytes(variable: Any) -> int:
    dtype = getattr(variable.dtype, "name", str(variable.dtype))
    return math.prod(variable.shape) * itemsize(dtype)


def report(cost: Cost, full: Cost, machine: Machine) -> str:
    """The comparison, and the rules by what they cost, for people."""
    rows = [
        ("trained parameters", *(f"{sum(e.trained_parameters for e in c.plan.entries):,}" for c in (cost, full))),
        ("payload a step and replica", *(_size(c.payload) for c in (cost, full))),
        (f"interface of each of {machine.workers}", *(_size(c.nic_bytes) for c in (cost, full))),
        ("slots, residuals, anchors", *(_size(c.memory) for c in (cost, full))),
        ("computation, measured here", *(_ms(c.compute) for c in (cost, full))),
        ("wire, lower bound", *(_ms(c.wire) for c in (cost, full))),
        ("expected step", *(_ms(c.step) for c in (cost, full))),
    ]
    lines = [f"{'':28}{'this plan':>16}{'all, float32':>16}"]
    lines += [f"{name:28}{one:>16}{other:>16}" for name, one, other in rows]
    lines += ["", "rules by what they make each worker send:"]
    sent = [(f"{g.rule}: {g.reduction}", [m for e in g.entries for m in e.messages]) for g in cost.plan.groups]
    sent += [("statistics of layers", list(cost.plan.statistics))] if cost.plan.statistics else []
    sizes = [(average_bytes(messages, machine.workers), name) for name, messages in sent]
    for size, name in sorted(sizes, key=lambda item: -item[0]):
        share = size / cost.nic_bytes if cost.nic_bytes else 0.0
        lines.append(f"  {share:7.2%}  {_size(size):>10}  {_ms(size / machine.bandwidth):>10}  {name}")
    return "\n".join(lines)


def _size(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 for a mistake of the user's."""
    values = flags.FlagValues()
    cli.define_gin_flags(values)
    flags.DEFINE_integer("workers", 2, "workers, with one replica each", flag_values=values)
    flags.DEFINE_string("bandwidth", "1gbit", "of each worker's link, each way", flag_values=values)
    flags.DEFINE_float("latency_ms", 0.1, "of a message between two workers", flag_values=values)
    flags.DEFINE_integer("workers_per_host", 1, "workers that share the cores of one host", flag_values=values)

    def command() -> int:
        cli.check_gin_file(values)
        for name, least in (("workers", 1), ("workers_per_host", 1), ("latency_ms", 0)):
            if not float(values[name].value or 0) >= least:
                raise cli.UserError(f"--{name} is {values[name].value}: it must be at least {least}")
        bandwidth = bytes_per_second(values.bandwidth)
        machine = Machine(values.workers, bandwidth, values.latency_ms / 1e3, values.workers_per_host)
        cli.import_tensorflow_quietly()
        from dist_partial import config
        from dist_partial.reductions.all_reduce import EveryStep
        from dist_partial.selection.table import plan_table

        settings = config.load(values.gin_file, values.gin_param).settings
        everything = dataclasses.replace(settings, rules=[("train", ".*")], reduction=EveryStep("float32"))
        cost = estimate(settings, machine)
        print(plan_table(cost.plan, machine.workers))
        if settings.global_batch % machine.workers:
            print(f"run.global_batch = {settings.global_batch} does not divide among {machine.workers} workers")
        print(f"\n{machine.workers} workers at {values.bandwidth}\n")
        print(report(cost, estimate(everything, machine), machine))
        return 0

    return cli.call(__doc__, values, argv, command)


if __name__ == "__main__":
    sys.exit(main())
