"""Sums the gradients of all replicas in every step."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.distributed.collectives import AllReduceRequest
from dist_partial.reductions.base import Exchange, check_dtype
from dist_partial.selection.payload import Payload, itemsize


@dataclasses.dataclass(frozen=True)
class AllReduce:
    """Sum the gradients of all replicas in every step.

    Attributes:
        dtype: what goes on the wire: 'float32', 'bfloat16', 'float16', 'float64', or None for the
            gradient's own. The gradient is divided by the global batch before it is cast and summed, so
            that the sum does not overflow where the mean does not.
    """

    dtype: str | None = None

    def __post_init__(self) -> None:
        check_dtype("all_reduce.dtype", self.dtype)

    @property
    def shared(self) -> bool:
        return True

    def payloads(self, shape: Sequence[int], dtype: str) -> tuple[Payload, ...]:
        return (Payload("sum", math.prod(shape) * itemsize(self.dtype or dtype)),)

    def state(self, path: str, shape: Sequence[int], dtype: str) -> dict[str, np.ndarray]:
        return {}

    def reduce(self, value: tf.Tensor, state: dict[str, Any]) -> Exchange:
        total = yield AllReduceRequest(tf.cast(value, self.dtype or value.dtype))
        return tf.cast(total, value.dtype)

    def __str__(self) -> str:
        return f"all-reduce in {self.dtype}" if self.dtype else "all-reduce"
