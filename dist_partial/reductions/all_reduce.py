"""Sums the gradients of all replicas in every step."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.distributed.collectives import AllReduceRequest
from dist_partial.reductions.base import Dtype, Exchange
from dist_partial.selection.payload import PAIR, Payload, Peers, itemsize
from dist_partial.validation import check


@dataclasses.dataclass(frozen=True)
class AllReduce:
    """Sums the gradients of all replicas in every step.

    Attributes:
        dtype: in which it is sent: 'float32', 'bfloat16', 'float16', 'float64', or None for the
            gradient's own. The gradient is divided by the global batch before it is cast and summed, so
            that the sum does not overflow where the mean does not.

    Examples:
        >>> str(AllReduce()), AllReduce("bfloat16").payloads([8, 2], "float32")
        ('all-reduce', (Payload(kind='sum', bytes=32, every=1, offset=0, warm_up=0),))
    """

    dtype: Dtype = None

    def __post_init__(self) -> None:
        check(self, "all_reduce")

    @property
    def shared(self) -> bool:
        return True

    def payloads(self, shape: Sequence[int], dtype: str, peers: Peers = PAIR) -> tuple[Payload, ...]:
        return (Payload("sum", math.prod(shape) * itemsize(self.dtype or dtype)),)

    def state(self, path: str, shape: Sequence[int], dtype: str, peers: Peers = PAIR) -> dict[str, np.ndarray]:
        return {}

    def reduce(self, value: tf.Tensor, state: dict[str, Any]) -> Exchange:
        total = yield AllReduceRequest(tf.cast(value, self.dtype or value.dtype))
        return tf.cast(total, value.dtype)

    def __str__(self) -> str:
        return f"all-reduce in {self.dtype}" if self.dtype else "all-reduce"
