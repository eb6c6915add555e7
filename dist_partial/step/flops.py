"""Floating-point operations of a step, counted in its traced graph."""

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from dist_partial.distributed.traffic import called

_LOOPS, _BRANCHES = ("While", "StatelessWhile"), ("If", "StatelessIf", "Case", "StatelessCase")


def flops(function: Any, loop: bool) -> int | None:
    """Counts what one worker computes in a step: its products of matrices and its convolutions, forth and back.

    A multiplication and an addition are two operations. What is frozen below all that is trained costs no way back, and
    none is counted for it. Other operations are left out, as is usual for a model's FLOP/s (Chowdhery et al. 2022,
    https://arxiv.org/abs/2204.02311, appendix B).

    Args:
        function: the concrete train function.
        loop: whether it makes its steps in a loop, of which one turn is counted.

    Returns:
        The operations of all replicas of the worker; None where they are not known: a shape is not, how often a loop
        within the step is run, or what a GPU's own op for a recurrent layer does.

    Examples:
        >>> def two_layers(x):
        ...     return tf.einsum("ij,jk->ik", tf.matmul(x, tf.ones([8, 16])), tf.ones([16, 2]))
        >>> function = tf.function(two_layers).get_concrete_function(tf.TensorSpec([4, 8]))
        >>> flops(function, loop=False), 2 * 4 * 8 * 16 + 2 * 4 * 16 * 2
        (1280, 1280)
    """
    try:
        return _in(function.graph, loop)
    except _Unknown:
        return None


class _Unknown(Exception):
    """A shape, or the turns of a loop, are not in the graph."""


def _in(graph: Any, loop: bool) -> int:
    """The operations of a graph; of a loop in it, if there is the one of the steps, those of one turn."""
    total = 0
    for op in _needed(graph):
        if op.type in _COUNTS:
            total += 2 * _COUNTS[op.type](op)
        elif op.type in _LOOPS:
            inside = sum(_in(inner, loop=False) for inner in called(op))
            if inside and not loop:
                raise _Unknown
            total += inside
        elif op.type.startswith("CudnnRNN"):
            raise _Unknown
        elif inner := called(op):
            counts = [_in(each, loop) for each in inner]
            total += max(counts) if op.type in _BRANCHES else sum(counts)
    return total


def _needed(graph: Any) -> set[tf.Operation]:
    """The operations that are run: a graph as it is traced has others, such as gradients of a convolution's input."""
    found: set[tf.Operation] = set()
    waiting = [tensor.op for tensor in graph.outputs] + list(graph.control_outputs)
    while waiting:
        if (op := waiting.pop()) not in found:
            found.add(op)
            waiting += [tensor.op for tensor in op.inputs] + list(op.control_inputs)
    return found


def _size(shape: tf.TensorShape) -> int:
    if not shape.is_fully_defined():
        raise _Unknown
    return math.prod(shape.as_list())


def _product(transposed: str) -> Callable[[tf.Operation], int]:
    def count(op: tf.Operation) -> int:
        shape = op.inputs[0].shape
        _size(shape)
        return _size(op.outputs[0].shape) * shape[-2 if op.get_attr(transposed) else -1]

    return count


def _einsum(op: tf.Operation) -> int:
    """The product of the sizes of all labels; an ellipsis is for the axes that no label names."""
    sizes: dict[str, int] = {}
    terms = op.get_attr("equation").decode().split("->")[0].split(",")
    for term, value in zip(terms, op.inputs, strict=True):
        _size(value.shape)
        before, ellipsis, after = term.partition("...")
        shape = value.shape.as_list()
        middle = len(shape) - len(before) - len(after)
        named = [*before, *(f"...{i - middle}" for i in range(middle if ellipsis else 0)), *after]
        for label, size in zip(named, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    return math.prod(sizes.values())


def _convolution(of: Callable[[tf.Operation], tf.Tensor], kernel: Callable[[tf.Operation], tf.TensorShape]) -> Any:
    """Each value of what the kernel gives, `of`, takes one product for each value of the kernel that leads to it."""

    def count(op: tf.Operation) -> int:
        shape = kernel(op)
        _size(shape)
        outputs = shape[-1] if not op.type.startswith("Depthwise") else shape[-1] * shape[-2]
        return _size(of(op).shape) * _size(shape) // outputs

    return count


_FORTH = _convolution(lambda op: op.outputs[0], lambda op: op.inputs[1].shape)
_TO_INPUT = _convolution(lambda op: op.inputs[2], lambda op: op.inputs[1].shape)
_TO_KERNEL = _convolution(lambda op: op.inputs[2], lambda op: op.outputs[0].shape)
_COUNTS: dict[str, Callable[[tf.Operation], int]] = {
    "MatMul": _product("transpose_a"),
    "BatchMatMul": _product("adj_x"),
    "BatchMatMulV2": _product("adj_x"),
    "BatchMatMulV3": _product("adj_x"),
    "Einsum": _einsum,
    "Conv2D": _FORTH,
    "Conv3D": _FORTH,
    "DepthwiseConv2dNative": _FORTH,
    "Conv2DBackpropInput": _TO_INPUT,
    "Conv3DBackpropInputV2": _TO_INPUT,
    "DepthwiseConv2dNativeBackpropInput": _TO_INPUT,
    "Conv2DBackpropFilter": _TO_KERNEL,
    "Conv3DBackpropFilterV2": _TO_KERNEL,
    "DepthwiseConv2dNativeBackpropFilter": _TO_KERNEL,
}
