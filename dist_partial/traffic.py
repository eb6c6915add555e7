"""Bytes on the wire, counted in a traced graph."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

_OPS = ("CollectiveReduce", "CollectiveGather", "CollectiveBcast", "CollectiveAllToAll", "NcclAllReduce")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective op of the graph.

    Attributes:
        op: its type, such as `CollectiveReduceV2`.
        device: where it runs; one replica has one device.
        bytes: payload that the device hands to it, in bytes.
        in_loop: whether it stands in a loop's body, so that it runs once a step and not once a call.
    """

    op: str
    device: str
    bytes: int
    in_loop: bool


def collectives(function: Any) -> list[Collective]:
    """All collectives of a concrete function, through nested functions, branches and loop bodies.

    Raises:
        ValueError: if the shape of a collective's input is not static, so that its bytes are not known.
    """
    return list(_walk(function.graph, in_loop=False))


def bytes_per_step(function: Any) -> int:
    """Payload bytes that one replica hands over in one step (one turn of the loop) of a train function."""
    return _per_replica([c for c in collectives(function) if c.in_loop])


def bytes_per_call(function: Any) -> int:
    """Payload bytes that one replica hands over once in a call, outside the loop."""
    return _per_replica([c for c in collectives(function) if not c.in_loop])


def _per_replica(found: list[Collective]) -> int:
    by_device: dict[str, int] = {}
    for collective in found:
        by_device[collective.device] = by_device.get(collective.device, 0) + collective.bytes
    if len(set(by_device.values())) > 1:
        raise ValueError(f"the replicas of one graph hand over different numbers of bytes: {by_device}")
    return next(iter(by_device.values()), 0)


def _walk(graph: Any, in_loop: bool) -> Iterator[Collective]:
    for op in graph.get_operations():
        if op.type.startswith(_OPS):
            yield Collective(op.type, op.device, _payload(op), in_loop)
        for name in _called(op):
            inner = graph._get_function(name)
            body = in_loop or op.type in ("While", "StatelessWhile")
            yield from _walk(inner.graph if hasattr(inner, "graph") else inner, body)


def _payload(op: tf.Operation) -> int:
    tensor = op.inputs[0]
    if not tensor.shape.is_fully_defined():
        raise ValueError(f"{op.type} {op.name!r} has an input of shape {tensor.shape}: its bytes cannot be counted")
    return math.prod(tensor.shape.as_list()) * tensor.dtype.size


def _called(op: tf.Operation) -> list[str]:
    names = []
    for attribute in op.node_def.attr.values():
        names += [attribute.func.name] if attribute.func.name else []
        names += [function.name for function in attribute.list.func]
    return names
