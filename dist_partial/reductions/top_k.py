"""Sends the largest values and their places, with error feedback."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import tensorflow as tf

from dist_partial.distributed.collectives import AllGatherRequest
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.reductions.base import Exchange
from dist_partial.reductions.encoding import (
    FLOATS,
    LEVELS,
    bytes_of,
    decode_values,
    encode_values,
    index_dtype,
    padded,
    value_bytes,
    words,
    zeros,
)
from dist_partial.selection.payload import Payload, itemsize
from dist_partial.validation import Above, AtLeast, AtMost, OneOf, check


@dataclasses.dataclass(frozen=True)
class TopK:
    """Sends the largest values of each gradient and their places, with error feedback, by gather.

    Lin et al. 2018, "Deep Gradient Compression". The tensor is cut into blocks, of each of which the same share is
    sent, so that a place takes one byte and no sort spans the tensor; `block=None` takes the largest of all. Among N
    workers a gather costs N/2 times what a sum of as many bytes would.

    Attributes:
        density: share of the values that is sent; at least one of each block is.
        block: values a block, or None.
        bits: of each value as it is sent: 32 (float32), 16 (bfloat16), or as in `Quantized`.

    Examples:
        >>> TopK(density=1 / 64).payloads([256, 64], "float32")  # instead of 65,536 bytes
        (Payload(kind='gather', bytes=768, every=1, offset=0),)
    """

    density: Annotated[float, Above(0), AtMost(1)] = 1 / 64
    block: Annotated[int | None, AtLeast(1), "write how many values a block has, such as 256, or None"] = 256
    bits: Annotated[float, OneOf(*FLOATS, *LEVELS)] = 16

    def __post_init__(self) -> None:
        check(self, "top_k")

    @property
    def shared(self) -> bool:
        return True

    def blocks(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """How many blocks, how many values each has, and how many of them are sent."""
        size = math.prod(shape)
        block = min(self.block or size, size)
        return -(-size // block), block, max(1, round(self.density * block))

    def payloads(self, shape: Sequence[int], dtype: str) -> tuple[Payload, ...]:
        if not self._gains(shape, dtype):
            return AllReduce().payloads(shape, dtype)
        return (Payload("gather", self._bytes(shape)),)

    def _bytes(self, shape: Sequence[int]) -> int:
        blocks, block, k = self.blocks(shape)
        return words(blocks * k * index_dtype(block).size + value_bytes(blocks * k, self.bits))

    def _gains(self, shape: Sequence[int], dtype: str) -> bool:
        return self._bytes(shape) < math.prod(shape) * itemsize(dtype)

    def state(self, path: str, shape: Sequence[int], dtype: str) -> dict[str, np.ndarray]:
        return {"residual": zeros(shape, dtype)} if self._gains(shape, dtype) else {}

    def reduce(self, value: tf.Tensor, state: dict[str, Any]) -> Exchange:
        if not self._gains(value.shape, value.dtype.name):
            return (yield from AllReduce().reduce(value, state))
        blocks, block, k = self.blocks(value.shape)
        size = math.prod(value.shape)
        whole = tf.reshape(value + state["residual"], [-1])
        cut = tf.reshape(tf.pad(whole, [[0, blocks * block - size]]), [blocks, block])
        _, places = tf.math.top_k(tf.abs(cut), k, sorted=False)
        values = tf.reshape(tf.gather(cut, places, batch_dims=1), [-1])
        kind = index_dtype(block)
        message = tf.concat([bytes_of(tf.cast(places, kind)), encode_values(values, self.bits)], axis=0)
        index_bytes = blocks * k * kind.size
        starts = tf.range(blocks)[:, tf.newaxis] * block

        def add(dense: tf.Tensor, message: tf.Tensor) -> tf.Tensor:
            found = tf.reshape(message[:index_bytes], [blocks, k, kind.size] if kind.size > 1 else [blocks, k])
            places = tf.cast(tf.bitcast(found, kind) if kind != tf.uint8 else found, tf.int32)
            sent = decode_values(message[index_bytes:], blocks * k, self.bits, value.dtype)
            return tf.tensor_scatter_nd_add(dense, tf.reshape(starts + places, [-1, 1]), sent)

        empty = tf.zeros([blocks * block], value.dtype)
        state["residual"].assign(tf.reshape((tf.reshape(cut, [-1]) - add(empty, message))[:size], value.shape))
        total = empty
        for each in tf.unstack((yield AllGatherRequest(padded(message)))):  # in replica order: the same bits everywhere
            total = add(total, each)
        return tf.reshape(total[:size], value.shape)

    def __str__(self) -> str:
        return f"top {self.density!r} in {self.bits} bits" + (f", blocks of {self.block}" if self.block else "")
