"""Sends two thin factors of each matrix, with error feedback."""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import tensorflow as tf

from dist_partial.distributed.collectives import AllReduceRequest
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.reductions.base import Dtype, Exchange, decay_text, with_residual
from dist_partial.reductions.encoding import numpy_dtype, zeros
from dist_partial.selection.payload import PAIR, Payload, Peers, itemsize
from dist_partial.validation import Above, AtLeast, AtMost, check


@dataclasses.dataclass(frozen=True)
class PowerSGD:
    """Sends a low-rank factorisation of each gradient.

    One power iteration from the last step's right factor (warm start), with error feedback: Vogels et al. 2019,
    "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization", algorithms 1 and 2. As both
    factors are sums over the replicas, the result does not depend on how the batch is divided among them.

    Attributes:
        rank: columns of each factor.
        dtype: of the factors as they are sent; None for the gradient's own.
        decay: how much of what was left out is added to the next gradient, as in `Quantized`.

    A tensor of more than two axes is folded into the matrix that takes the fewest bytes. One whose factors would not
    be smaller than itself is sent whole.

    Examples:
        >>> [each.bytes for each in PowerSGD(rank=4).payloads([256, 64], "float32")]  # instead of 65,536
        [4096, 1024]
    """

    rank: Annotated[int, AtLeast(1)] = 4
    dtype: Dtype = None
    decay: Annotated[float, Above(0), AtMost(1)] = 1.0

    def __post_init__(self) -> None:
        check(self, "power_sgd")

    @property
    def shared(self) -> bool:
        return True

    def matrix(self, shape: Sequence[int]) -> tuple[int, int] | None:
        """Rows and columns of the matrix view of a gradient of `shape`; None if it is sent whole."""
        folds = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
        best = min(folds, key=sum, default=(0, 0))
        return best if self.rank * sum(best) < math.prod(best) else None

    def payloads(self, shape: Sequence[int], dtype: str, peers: Peers = PAIR) -> tuple[Payload, ...]:
        matrix = self.matrix(shape)
        if matrix is None:
            return AllReduce(self.dtype).payloads(shape, dtype)
        return tuple(Payload("sum", self.rank * side * itemsize(self.dtype or dtype)) for side in matrix)

    def state(self, path: str, shape: Sequence[int], dtype: str, peers: Peers = PAIR) -> dict[str, np.ndarray]:
        matrix = self.matrix(shape)
        if matrix is None:
            return {}
        rng = np.random.default_rng(zlib.crc32(path.encode()))  # the same on every replica
        right = rng.standard_normal((matrix[1], self.rank))
        return {"residual": zeros(shape, dtype), "right": right.astype(numpy_dtype(dtype))}

    def reduce(self, value: tf.Tensor, state: dict[str, Any]) -> Exchange:
        matrix = self.matrix(value.shape)
        if matrix is None:
            return (yield from AllReduce(self.dtype).reduce(value, state))
        collectives = tf.as_dtype(self.dtype or value.dtype)
        whole = tf.reshape(with_residual(value, state["residual"], self.decay), matrix)
        left = yield AllReduceRequest(tf.cast(whole @ state["right"], collectives))
        # Householder's QR gives orthonormal columns even where the product has lost rank.
        precise = tf.float32 if value.dtype == tf.bfloat16 else value.dtype  # in which TensorFlow 2.21 has it
        left = tf.cast(tf.linalg.qr(tf.cast(left, precise))[0], value.dtype)
        right = tf.cast(tf.matmul(whole, left, transpose_a=True), collectives)
        state["residual"].assign(
            tf.reshape(whole - tf.matmul(left, tf.cast(right, value.dtype), transpose_b=True), value.shape)
        )
        total = tf.cast((yield AllReduceRequest(right)), value.dtype)
        state["right"].assign(total)
        return tf.reshape(tf.matmul(left, total, transpose_b=True), value.shape)

    def __str__(self) -> str:
        return f"PowerSGD rank {self.rank}" + (f", {self.dtype}" if self.dtype else "") + decay_text(self.decay)
