"""Sends the largest values and their places, with error feedback."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tensorflow as tf

from dist_partial.reductions.base import decay_text
from dist_partial.reductions.encoded_sum import EncodedSum
from dist_partial.reductions.encoding import (
    FLOATS,
    LEVELS,
    ceil,
    decode_places,
    decode_values,
    encode_places,
    encode_values,
    padded,
    place_bits,
    place_bytes,
    value_bytes,
    words,
)
from dist_partial.validation import Above, AtLeast, AtMost, OneOf, check


@dataclasses.dataclass(frozen=True)
class TopK(EncodedSum):
    """Sends the largest values of each gradient and their places, with error feedback.

    Lin et al. 2018, "Deep Gradient Compression". The tensor is cut into blocks, of each of which the same share is
    sent, so that a place takes one byte and no sort spans the tensor; `block=None` takes the largest of all. From three
    replicas on blocks are summed in two hops: of the sum as well its largest values are sent, and the rest waits for
    the next one (see `encoded_sum`).

    Attributes:
        density: share of the values that is sent; at least one of each block is.
        block: values a block, or None; a place takes as many bits as tell so many apart.
        bits: of each value as it is sent: 32 (float32), 16 (bfloat16), or as in `Quantized`.
        decay: how much of what was left out is added to the next gradient, as in `Quantized`.

    Examples:
        >>> TopK(density=1 / 64).payloads([256, 64], "float32")  # instead of 65,536 bytes
        (Payload(kind='gather', bytes=768, every=1, offset=0, warm_up=0),)
    """

    density: Annotated[float, Above(0), AtMost(1)] = 1 / 64
    block: Annotated[int | None, AtLeast(1), "write how many values a block has, such as 256, or None"] = 256
    bits: Annotated[float, OneOf(*FLOATS, *LEVELS)] = 16
    decay: Annotated[float, Above(0), AtMost(1)] = 1.0

    def __post_init__(self) -> None:
        check(self, "top_k")

    def rounded(self, count: int, size: int) -> int:
        block = min(self.block or size, size)
        return ceil(count, block) * block

    def message_bytes(self, count: int) -> int:
        blocks, block, k = self._blocks(count)
        return words(place_bytes(blocks * k, place_bits(block)) + value_bytes(blocks * k, self.bits))

    def encode(self, chunks: Sequence[tf.Tensor], filled: Sequence[Sequence[int]]) -> tf.Tensor:
        return tf.concat([self._encode(*each) for each in zip(chunks, filled, strict=True)], axis=1)

    def decode(self, messages: tf.Tensor, counts: Sequence[int], dtype: tf.DType) -> list[tf.Tensor]:
        parts = tf.split(messages, [self.message_bytes(count) for count in counts], axis=1)
        return [self._decode(part, count, dtype) for part, count in zip(parts, counts, strict=True)]

    def _encode(self, chunks: tf.Tensor, filled: Sequence[int]) -> tf.Tensor:
        parts, count = chunks.shape
        blocks, block, k = self._blocks(count)
        cut = tf.reshape(chunks, [parts, blocks, block])
        _, places = tf.math.top_k(tf.abs(cut), k, sorted=False)
        values = tf.reshape(tf.gather(cut, places, batch_dims=2), [parts, blocks * k])
        sent = [ceil(each, block) * k for each in filled]
        places = encode_places(tf.reshape(places, [parts, blocks * k]), place_bits(block))
        message = tf.concat([places, encode_values([values], self.bits, [sent])], axis=1)
        return padded(message, self.message_bytes(count))

    def _decode(self, messages: tf.Tensor, count: int, dtype: tf.DType) -> tf.Tensor:
        parts = messages.shape[0]
        blocks, block, k = self._blocks(count)
        size = place_bytes(blocks * k, place_bits(block))
        places = decode_places(messages[:, :size], blocks * k, place_bits(block))
        [values] = decode_values(messages[:, size:], [blocks * k], self.bits, dtype)
        starts = tf.range(parts)[:, tf.newaxis] * count + tf.repeat(tf.range(blocks) * block, k)
        where = tf.reshape(starts + places, [-1, 1])
        return tf.reshape(tf.scatter_nd(where, tf.reshape(values, [-1]), [parts * count]), [parts, count])

    def _blocks(self, count: int) -> tuple[int, int, int]:
        """How many blocks there are of `count` values, how many each has, and how many of them are sent."""
        block = min(self.block or count, count)
        return count // block, block, max(1, round(self.density * block))

    def __str__(self) -> str:
        blocks = f", blocks of {self.block}" if self.block else ""
        return f"top {self.density!r} in {self.bits} bits{blocks}" + decay_text(self.decay)
