"""Reductions of every step that send less than the gradient and keep what they left out for the next time.

Error feedback (Karimireddy et al. 2019, "Error Feedback Fixes SignSGD"): each replica adds what it has not sent yet,
its residual, to its next gradient, so that all that was sent and all residuals are together the sum of all gradients.
"""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.distributed.collectives import Gather, Sum
from dist_partial.errors import UserError
from dist_partial.reduction import EveryStep, Exchange, check_dtype
from dist_partial.selection.payload import Message, itemsize

SCALED = 256  # values that share a scale
_FLOATS = {32: tf.float32, 16: tf.bfloat16}
_LEVELS = {8: 256, 4: 16, 2: 4, 1.6: 3, 1: 2}  # by bits: how many there are
# The outermost level, over the mean magnitude: what errs least for normal values (Max 1960, "Quantizing for minimum
# distortion", uniform case). With more levels the largest value is the outermost.
_OUTERMOST = {2: 1.872, 1.6: 1.534, 1: 1.0}


@dataclasses.dataclass(frozen=True)
class PowerSGD:
    """Send a low-rank factorisation of each gradient.

    One power iteration from the last step's right factor (warm start), with error feedback: Vogels et al. 2019,
    "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization", algorithms 1 and 2. As both
    factors are sums over the replicas, the result does not depend on how the batch is divided among them.

    Attributes:
        rank: columns of each factor.
        dtype: of the factors on the wire; None for the gradient's own.

    A tensor of more than two axes is folded into the matrix that takes the fewest bytes. One whose factors would not
    be smaller than itself is sent whole.
    """

    rank: int = 4
    dtype: str | None = None

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise UserError(f"power_sgd.rank is {self.rank!r}: it must be a whole number of at least 1")
        check_dtype("power_sgd.dtype", self.dtype)

    @property
    def shared(self) -> bool:
        return True

    def matrix(self, shape: Sequence[int]) -> tuple[int, int] | None:
        """Rows and columns of the matrix that stands for a gradient of `shape`; None if it is sent whole."""
        folds = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
        best = min(folds, key=sum, default=(0, 0))
        return best if self.rank * sum(best) < math.prod(best) else None

    def messages(self, shape: Sequence[int], dtype: str) -> tuple[Message, ...]:
        matrix = self.matrix(shape)
        if matrix is None:
            return EveryStep(self.dtype).messages(shape, dtype)
        return tuple(Message("sum", self.rank * side * itemsize(self.dtype or dtype)) for side in matrix)

    def state(self, path: str, shape: Sequence[int], dtype: str) -> dict[str, np.ndarray]:
        matrix = self.matrix(shape)
        if matrix is None:
            return {}
        rng = np.random.default_rng(zlib.crc32(path.encode()))  # the same on every replica
        right = rng.standard_normal((matrix[1], self.rank))
        return {"residual": _zeros(shape, dtype), "right": right.astype(_numpy(dtype))}

    def reduce(self, value: tf.Tensor, state: dict[str, Any]) -> Exchange:
        matrix = self.matrix(value.shape)
        if matrix is None:
            return (yield from EveryStep(self.dtype).reduce(value, state))
        wire = tf.as_dtype(self.dtype or value.dtype)
        whole = tf.reshape(value + state["residual"], matrix)
        left = yield Sum(tf.cast(whole @ state["right"], wire))
        # Householder's QR gives orthonormal columns even where the product has lost rank.
        precise = tf.float32 if value.dtype == tf.bfloat16 else value.dtype  # in which TensorFlow 2.21 has it
        left = tf.cast(tf.linalg.qr(tf.cast(left, precise))[0], value.dtype)
        right = tf.cast(tf.matmul(whole, left, transpose_a=True), wire)
        state["residual"].assign(
            tf.reshape(whole - tf.matmul(left, tf.cast(right, value.dtype), transpose_b=True), value.shape)
        )
        total = tf.cast((yield Sum(right)), value.dtype)
        state["right"].assign(total)
        return tf.reshape(tf.matmul(left, total, transpose_b=True), value.shape)

    def __str__(self) -> str:
        return f"PowerSGD rank {self.rank}" + (f", {self.dtype}" if self.dtype else "")


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Send each gradient in few bits a value, with error feedback, by gather.

    Values lie on evenly spaced levels, symmetric to zero, whose scale 256 values share. A gather hands every replica's
    message to every other: among N workers each sends N/2 times what a sum of as many bytes would cost, so that 4 bits
    are 1/8 of float32 between two workers, and more than float32 among 16.

    Attributes:
        bits: of each value: 8, 4, 2, 1.6 (three levels, five values a byte) or 1 (the sign); scales add 1/16 bit.
    """

    bits: float = 8

    def __post_init__(self) -> None:
        if type(self.bits) not in (int, float) or self.bits not in _LEVELS:
            raise UserError(f"quantized.bits is {self.bits!r}: write 8, 4, 2, 1.6 or 1")

    @property
    def shared(self) -> bool:
        return True

    def messages(self, shape: Sequence[int], dtype: str) -> tuple[Message, ...]:
        return (Message("gather", _words(_value_bytes(math.prod(shape), self.bits))),)

    def state(self, path: str, shape: Sequence[int], dtype: str) -> dict[str, np.ndarray]:
        return {"residual": _zeros(shape, dtype)}

    def reduce(self, value: tf.Tensor, state: dict[str, Any]) -> Exchange:
        whole = tf.reshape(value + state["residual"], [-1])
        message = _encode_values(whole, self.bits)
        count = whole.shape[0]
        state["residual"].assign(
            tf.reshape(whole - _decode_values(message, count, self.bits, whole.dtype), value.shape)
        )
        messages = yield Gather(_padded(message))
        parts = [_decode_values(m, count, self.bits, whole.dtype) for m in tf.unstack(messages)]
        return tf.reshape(tf.add_n(parts), value.shape)

    def __str__(self) -> str:
        return f"{self.bits} bits a value"


@dataclasses.dataclass(frozen=True)
class TopK:
    """Send the largest values of each gradient and their places, with error feedback, by gather.

    Lin et al. 2018, "Deep Gradient Compression". The tensor is cut into blocks, of each of which the same share is
    sent, so that a place takes one byte and no sort spans the tensor; `block=None` takes the largest of all. Among N
    workers a gather costs N/2 times what a sum of as many bytes would.

    Attributes:
        density: share of the values that is sent; at least one of each block is.
        block: values a block, or None.
        bits: of each value on the wire: 32 (float32), 16 (bfloat16), or as in `Quantized`.
    """

    density: float = 1 / 64
    block: int | None = 256
    bits: float = 16

    def __post_init__(self) -> None:
        if isinstance(self.density, bool) or not isinstance(self.density, (int, float)) or not 0 < self.density <= 1:
            raise UserError(f"top_k.density is {self.density!r}: it is a share above 0 and at most 1")
        if self.block is not None and (type(self.block) is not int or self.block < 1):
            raise UserError(f"top_k.block is {self.block!r}: write how many values a block has, such as 256, or None")
        if type(self.bits) not in (int, float) or (self.bits not in _FLOATS and self.bits not in _LEVELS):
            raise UserError(f"top_k.bits is {self.bits!r}: write 32, 16, 8, 4, 2, 1.6 or 1")

    @property
    def shared(self) -> bool:
        return True

    def blocks(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """How many blocks, how many values each has, and how many of them are sent."""
        size = math.prod(shape)
        block = min(self.block or size, size)
        return -(-size // block), block, max(1, round(self.density * block))

    def messages(self, shape: Sequence[int], dtype: str) -> tuple[Message, ...]:
        if not self._gains(shape, dtype):
            return EveryStep().messages(shape, dtype)
        return (Message("gather", self._bytes(shape)),)

    def _bytes(self, shape: Sequence[int]) -> int:
        blocks, block, k = self.blocks(shape)
        return _words(blocks * k * _index_dtype(block).size + _value_bytes(blocks * k, self.bits))

    def _gains(self, shape: Sequence[int], dtype: str) -> bool:
        return self._bytes(shape) < math.prod(shape) * itemsize(dtype)

    def state(self, path: str, shape: Sequence[int], dtype: str) -> dict[str, np.ndarray]:
        return {"residual": _zeros(shape, dtype)} if self._gains(shape, dtype) else {}

    def reduce(self, value: tf.Tensor, state: dict[str, Any]) -> Exchange:
        if not self._gains(value.shape, value.dtype.name):
            return (yield from EveryStep().reduce(value, state))
        blocks, block, k = self.blocks(value.shape)
        size = math.prod(value.shape)
        whole = tf.reshape(value + state["residual"], [-1])
        cut = tf.reshape(tf.pad(whole, [[0, blocks * block - size]]), [blocks, block])
        _, places = tf.math.top_k(tf.abs(cut), k, sorted=False)
        values = tf.reshape(tf.gather(cut, places, batch_dims=1), [-1])
        kind = _index_dtype(block)
        message = tf.concat([_bytes_of(tf.cast(places, kind)), _encode_values(values, self.bits)], axis=0)
        index_bytes = blocks * k * kind.size
        starts = tf.range(blocks)[:, tf.newaxis] * block

        def add(dense: tf.Tensor, message: tf.Tensor) -> tf.Tensor:
            found = tf.reshape(message[:index_bytes], [blocks, k, kind.size] if kind.size > 1 else [blocks, k])
            places = tf.cast(tf.bitcast(found, kind) if kind != tf.uint8 else found, tf.int32)
            sent = _decode_values(message[index_bytes:], blocks * k, self.bits, value.dtype)
            return tf.tensor_scatter_nd_add(dense, tf.reshape(starts + places, [-1, 1]), sent)

        empty = tf.zeros([blocks * block], value.dtype)
        state["residual"].assign(tf.reshape((tf.reshape(cut, [-1]) - add(empty, message))[:size], value.shape))
        total = empty
        for each in tf.unstack((yield Gather(_padded(message)))):  # in replica order: the same bits everywhere
            total = add(total, each)
        return tf.reshape(total[:size], value.shape)

    def __str__(self) -> str:
        return f"top {self.density!r} in {self.bits} bits" + (f", blocks of {self.block}" if self.block else "")


def _encode_values(values: tf.Tensor, bits: float) -> tf.Tensor:
    """Flat floating [n] -> uint8 [`_value_bytes(n, bits)`]."""
    if bits in _FLOATS:
        return _bytes_of(tf.cast(values, _FLOATS[int(bits)]))
    count, top, in_byte = values.shape[0], _LEVELS[bits] - 1, int(8 / bits)
    groups = _ceil(count, SCALED)
    cut = tf.reshape(tf.pad(values, [[0, groups * SCALED - count]]), [groups, SCALED])
    if bits in _OUTERMOST:
        members = np.minimum(SCALED, count - SCALED * np.arange(groups))
        outermost = tf.reduce_sum(tf.abs(cut), axis=1) * (_OUTERMOST[bits] / members)
    else:
        outermost = tf.reduce_max(tf.abs(cut), axis=1)
    scales = tf.cast(outermost, tf.bfloat16)
    scale = tf.cast(scales, values.dtype)[:, tf.newaxis]
    level = tf.clip_by_value(tf.round((tf.math.divide_no_nan(cut, scale) + 1) * (top / 2)), 0, top)
    size = _ceil(count, in_byte)
    levels = tf.reshape(tf.cast(level, tf.int32), [-1])[:count]
    # Several values share a byte, the first as its lowest digit.
    digits = tf.reshape(tf.pad(levels, [[0, size * in_byte - count]]), [size, in_byte])
    packed = tf.reduce_sum(digits * [[_LEVELS[bits] ** i for i in range(in_byte)]], axis=1)
    return tf.concat([_bytes_of(scales), tf.cast(packed, tf.uint8)], axis=0)


def _decode_values(message: tf.Tensor, count: int, bits: float, dtype: tf.DType) -> tf.Tensor:
    """The inverse of `_encode_values`; bytes beyond those of `count` values are ignored."""
    if bits in _FLOATS:
        kind = _FLOATS[int(bits)]
        return tf.cast(tf.bitcast(tf.reshape(message[: count * kind.size], [count, kind.size]), kind), dtype)
    groups, top, in_byte = _ceil(count, SCALED), _LEVELS[bits] - 1, int(8 / bits)
    scales = tf.cast(tf.bitcast(tf.reshape(message[: 2 * groups], [groups, 2]), tf.bfloat16), dtype)
    packed = tf.cast(message[2 * groups : _value_bytes(count, bits)], tf.int32)
    levels = packed[:, tf.newaxis] // [[_LEVELS[bits] ** i for i in range(in_byte)]] % _LEVELS[bits]
    unit = tf.cast(2 * tf.reshape(levels, [-1])[:count] - top, dtype) / top
    return unit * tf.repeat(scales, SCALED)[:count]


def _value_bytes(count: int, bits: float) -> int:
    if bits in _FLOATS:
        return count * int(bits) // 8
    return 2 * _ceil(count, SCALED) + _ceil(count, int(8 / bits))


def _bytes_of(tensor: tf.Tensor) -> tf.Tensor:
    return tf.reshape(tensor if tensor.dtype == tf.uint8 else tf.bitcast(tensor, tf.uint8), [-1])


def _index_dtype(block: int) -> tf.DType:
    return tf.uint8 if block <= 256 else tf.uint16 if block <= 65536 else tf.int32


def _padded(message: tf.Tensor) -> tf.Tensor:
    return tf.pad(message, [[0, _words(message.shape[0]) - message.shape[0]]])


def _words(size: int) -> int:
    return _ceil(size, 4) * 4


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _zeros(shape: Sequence[int], dtype: str) -> np.ndarray:
    return np.zeros(shape, _numpy(dtype))


def _numpy(dtype: str) -> Any:
    return tf.as_dtype(dtype).as_numpy_dtype
