"""How gradients cross the replicas: the only place that talks to other replicas about them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from dist_partial.errors import UserError
from dist_partial.selection import Plan, itemsize

# Packs of about 2 MiB keep the link busy while later ones are still being filled; one pack of everything and
# TensorFlow's own default were 3 % slower at 200 Mbit and up to twice as slow unshaped.
PACK_BYTES = 2 * 2**20


@dataclasses.dataclass(frozen=True)
class EveryStep:
    """Sum the gradients of all replicas in every step.

    Attributes:
        dtype: what goes on the wire: 'float32', 'bfloat16', 'float16', 'float64', or None for the
            gradient's own. The gradient is divided by the global batch before it is cast and summed, so
            that the sum does not overflow where the mean does not.
    """

    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, "float64", "float32", "bfloat16", "float16"):
            raise UserError(f"every_step.dtype is {self.dtype!r}: write 'float32', 'bfloat16', 'float16' or None")

    def wire_dtype(self, dtype: str) -> str:
        return self.dtype or dtype

    def wire_bytes(self, shape: Sequence[int], dtype: str) -> int:
        """Bytes of one gradient of `shape` and `dtype` that one replica hands over in a step."""
        return math.prod(shape) * itemsize(self.wire_dtype(dtype))

    def __str__(self) -> str:
        return f"every step, {self.dtype}" if self.dtype else "every step"


def reduce(
    plan: Plan, gradients: Sequence[tf.Tensor | None], statistics: Sequence[tf.Tensor] = ()
) -> tuple[list[tf.Tensor | None], list[tf.Tensor]]:
    """Sums gradients over all replicas, each in its own wire dtype, in packs.

    Called in a replica context.

    Args:
        plan: what travels, and how.
        gradients: in the order of `plan.trained`; None stays None and sends nothing.
        statistics: tensors to be averaged, which travel in the same packs.

    Returns:
        The sums and the averages: the same bits on every replica, in the shapes and dtypes they came in.
    """
    context: Any = tf.distribute.get_replica_context()
    trained = plan.trained
    # Backprop produces the last layers' gradients first: they go first, while the rest is still computed.
    members = [i for i in reversed(range(len(gradients))) if gradients[i] is not None]
    tensors = [tf.cast(gradients[i], trained[i].reduction.wire_dtype(trained[i].dtype)) for i in members]
    tensors += [statistic / context.num_replicas_in_sync for statistic in statistics]
    sums = _all_reduce(context, tensors)
    reduced: list[tf.Tensor | None] = [None] * len(gradients)
    for i, total in zip(members, sums, strict=False):
        reduced[i] = tf.cast(total, trained[i].dtype)
    return reduced, sums[len(members) :]


def _all_reduce(context: Any, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    packs = _packs(tensors)
    flat = [tf.concat([tf.reshape(tensors[i], [-1]) for i in pack], axis=0) for pack in packs]
    # A limit of one byte leaves our packs as they are: TensorFlow's own packing loses the static shapes that
    # the count of bytes in the graph relies on, and fails on mixed dtypes.
    options = tf.distribute.experimental.CommunicationOptions(bytes_per_pack=1)
    totals = context.all_reduce(tf.distribute.ReduceOp.SUM, flat, options)
    sums: list[Any] = [None] * len(tensors)
    for pack, total in zip(packs, totals, strict=True):
        parts = tf.split(total, [tensors[i].shape.num_elements() for i in pack])
        for i, part in zip(pack, parts, strict=True):
            sums[i] = tf.reshape(part, tensors[i].shape)
    return sums


def _packs(tensors: Sequence[tf.Tensor]) -> list[list[int]]:
    """Indices of the tensors of each pack: of one dtype, in order, filled up to `PACK_BYTES`."""
    packs: list[list[int]] = []
    open_packs: dict[tf.DType, tuple[list[int], int]] = {}
    for i, tensor in enumerate(tensors):
        size = tensor.shape.num_elements() * tensor.dtype.size
        pack, filled = open_packs.get(tensor.dtype, ([], PACK_BYTES))
        if filled + size > PACK_BYTES:
            pack, filled = [], 0
            packs.append(pack)
        pack.append(i)
        open_packs[tensor.dtype] = (pack, filled + size)
    return packs
