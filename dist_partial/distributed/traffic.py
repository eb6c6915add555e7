"""Bytes sent: counted in a traced graph, expected at the network interface, and read from it."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial import compat
from dist_partial.distributed.worker_backend import ALL_TO_ALL_OP, GATHER_OP, SUM_OP
from dist_partial.selection.payload import Payload, nic_bytes
from dist_partial.selection.plan import Plan

# What a run adds up: payload of one replica, what leaves its worker's network interface, and what would if everything
# were trained and summed in its own dtype.
SENT = ("wire_bytes", "nic_bytes", "full_nic_bytes")
_KINDS = {
    "CollectiveReduce": "sum",
    "NcclAllReduce": "sum",
    "CollectiveGather": "gather",
    "CollectiveBcast": "broadcast",
    "CollectiveAllToAll": "all-to-all",
}
_OURS = {SUM_OP: "sum", GATHER_OP: "gather", ALL_TO_ALL_OP: "all-to-all"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Describes one collective op of a graph.

    Attributes:
        op: its type, such as `CollectiveReduceV2`.
        kind: 'sum', 'gather', 'broadcast' or 'all-to-all'.
        device: where it runs; one replica has one device.
        bytes: payload that the device hands to it, in bytes.
        in_loop: whether it is in a loop's body, so that it runs once a step and not once a call.

    Examples:
        >>> sent = Collective("CollectiveReduceV2", "sum", "CPU:0", bytes=100, in_loop=True)
        >>> total([sent, sent])
        200
    """

    op: str
    kind: str
    device: str
    bytes: int
    in_loop: bool


def collectives(function: Any) -> list[Collective]:
    """Finds all collectives of a concrete function, through nested functions, branches and loop bodies.

    Raises:
        ValueError: if the shape of a collective's input is not static, so that its bytes are not known.

    Examples:
        >>> def summed(x):  # as the workers' own connections do it
        ...     return tf.numpy_function(lambda x: x, [x], tf.float32, name=SUM_OP)
        >>> function = tf.function(summed).get_concrete_function(tf.TensorSpec([10], tf.float32))
        >>> [(each.kind, each.bytes, each.in_loop) for each in collectives(function)]
        [('sum', 40, False)]
    """
    return list(_walk(function.graph, in_loop=False))


def in_step(function: Any, loop: bool = True) -> list[Collective]:
    """Finds what one replica hands over in one step of a train function: in one turn of its loop, if it has one.

    Examples:
        >>> def summed(x):  # as the workers' own connections do it
        ...     return tf.ensure_shape(tf.numpy_function(lambda x: x, [x], tf.float32, name=SUM_OP), [10])
        >>> def three(x):
        ...     return tf.while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, summed(x)), (tf.constant(0), x))
        >>> function = tf.function(three).get_concrete_function(tf.TensorSpec([10], tf.float32))
        >>> total(in_step(function)), total(in_call(function))
        (40, 0)
    """
    return _of_a_replica([c for c in collectives(function) if c.in_loop or not loop])


def in_call(function: Any) -> list[Collective]:
    """Finds what one replica hands over once in a call, outside the loop.

    Examples:
        >>> def summed(x):  # as the workers' own connections do it
        ...     return tf.numpy_function(lambda x: x, [x], tf.float32, name=SUM_OP)
        >>> function = tf.function(summed).get_concrete_function(tf.TensorSpec([10], tf.float32))
        >>> total(in_call(function)), total(in_step(function))
        (40, 0)
    """
    return _of_a_replica([c for c in collectives(function) if not c.in_loop])


def total(found: Sequence[Any]) -> int:
    """Adds up the bytes of collectives, or of payloads.

    Examples:
        >>> total([Payload("sum", 100), Payload("gather", 24)])
        124
    """
    return sum(each.bytes for each in found)


def sent_each(found: Sequence[Collective], plan: Plan, steps: int = 0) -> np.ndarray:
    """Counts the bytes of collectives as `SENT`, int64 [3]; those at the interface are whole, so that sums stay exact.

    Args:
        found: what one replica hands over.
        plan: for the number of workers, and for what everything would take.
        steps: in which it does so.

    Examples:
        >>> import keras
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([10]), keras.layers.Dense(10, use_bias=False, name="head")])
        >>> plan = resolve([("train", ".*")], model, AllReduce())  # for two workers
        >>> sent_each([Collective("CollectiveReduceV2", "sum", "CPU:0", 100, in_loop=True)], plan, steps=3).tolist()
        [100, 100, 1200]
    """
    at_interface = sum(nic_bytes(each.kind, each.bytes, plan.workers) for each in found)
    return np.array([total(found), round(at_interface), round(plan.full_nic_bytes) * steps])


def beyond(
    plan: Plan, sent_in_step: Sequence[Collective], exchanges: Sequence[Any], hosts: bool = True
) -> list[Payload]:
    """Finds what traced graphs send besides the plan's gradients and movements: the statistics of BatchNorm layers.

    Args:
        plan: with what tracing has shown of it.
        sent_in_step: what the step hands over.
        exchanges: from `exchanges.compiled_exchanges`.
        hosts: whether there are several, between which a reduction of its own sends something.

    Examples:
        >>> import keras
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([10]), keras.layers.Dense(10, use_bias=False, name="head")])
        >>> plan = resolve([("train", ".*")], model, AllReduce())
        >>> beyond(plan, [Collective("CollectiveReduceV2", "sum", "CPU:0", 432, in_loop=True)], exchanges=[])
        [Payload(kind='sum', bytes=32, every=1, offset=0, warm_up=0)]
    """
    crossing = [entry for entry in plan.trained if hosts or entry.inside is None]
    more = _difference(sent_in_step, [m for e in crossing if e.reduction.shared for m in plan.handed_over(e)])
    for exchange in exchanges:
        planned = [m for e in exchange.fragment.entries(plan) if e in crossing for m in plan.handed_over(e)]
        reduction = exchange.fragment.reduction
        for payload in _difference(exchange.sent, planned):
            more.append(
                payload._replace(every=reduction.sync_every, offset=reduction.offset, warm_up=reduction.warm_up)
            )
    return more


def _difference(found: Sequence[Collective], planned: Sequence[Payload]) -> list[Payload]:
    payloads = []
    for kind in sorted({each.kind for each in found}):
        more = total([c for c in found if c.kind == kind]) - total([m for m in planned if m.kind == kind])
        assert more >= 0, (kind, more)
        payloads += [Payload(kind, more)] if more else []
    return payloads


def _of_a_replica(found: list[Collective]) -> list[Collective]:
    by_device: dict[str, list[Collective]] = {}
    for collective in found:
        by_device.setdefault(collective.device, []).append(collective)
    if len({total(each) for each in by_device.values()}) > 1:
        totals = {device: total(each) for device, each in by_device.items()}
        raise ValueError(f"the replicas of one graph hand over different numbers of bytes: {totals}")
    return next(iter(by_device.values()), [])


def _walk(graph: Any, in_loop: bool) -> Iterator[Collective]:
    for op in graph.get_operations():
        kind = _kind(op)
        if kind is not None:
            yield Collective(op.type, kind, op.device, _payload(op), in_loop)
        for inner in called(op):
            yield from _walk(inner, in_loop or op.type in ("While", "StatelessWhile"))


def _kind(op: tf.Operation) -> str | None:
    if op.type == "PyFunc":
        name = op.name.split("/")[-1]
        return next((kind for prefix, kind in _OURS.items() if name.startswith(prefix)), None)
    return next((kind for prefix, kind in _KINDS.items() if op.type.startswith(prefix)), None)


def _payload(op: tf.Operation) -> int:
    tensor = op.inputs[0]
    if not tensor.shape.is_fully_defined():
        raise ValueError(f"{op.type} {op.name!r} has an input of shape {tensor.shape}: its bytes cannot be counted")
    return math.prod(tensor.shape.as_list()) * tensor.dtype.size


def called(op: tf.Operation) -> list[Any]:
    """Finds the graphs of the functions that an op calls.

    Examples:
        >>> inner = tf.function(lambda x: tf.sin(x))
        >>> graph = tf.function(lambda x: tf.cos(inner(x))).get_concrete_function(tf.constant(0.0)).graph
        >>> [found] = [found for operation in graph.get_operations() for found in called(operation)]
        >>> [operation.type for operation in found.get_operations()]
        ['Placeholder', 'Sin', 'Identity']
    """
    names = []
    for attribute in op.node_def.attr.values():
        names += [attribute.func.name] if attribute.func.name else []
        names += [function.name for function in attribute.list.func]
    return list(compat.called_graphs(op, names))


def operations(graph: Any) -> Iterator[tf.Operation]:
    """Walks all operations of a graph, through nested functions, branches and loop bodies.

    Examples:
        >>> inner = tf.function(lambda x: tf.sin(x))
        >>> graph = tf.function(lambda x: tf.cos(inner(x))).get_concrete_function(tf.constant(0.0)).graph
        >>> [operation.type for operation in operations(graph) if operation.type in ("Sin", "Cos")]
        ['Sin', 'Cos']
    """
    for op in graph.get_operations():
        yield op
        for inner in called(op):
            yield from operations(inner)
