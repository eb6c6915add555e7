"""Sends every value in few bits, with error feedback."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tensorflow as tf

from dist_partial.reductions.base import decay_text
from dist_partial.reductions.encoded_sum import EncodedSum
from dist_partial.reductions.encoding import LEVELS, decode_values, encode_values, padded, value_bytes, words
from dist_partial.validation import Above, AtMost, OneOf, check


@dataclasses.dataclass(frozen=True)
class Quantized(EncodedSum):
    """Sends each gradient in few bits a value, with error feedback.

    Values lie on evenly spaced levels, symmetric to zero, whose scale 256 values share. From three replicas on they are
    summed in two hops, so that 4 bits are about an eighth of float32 among any number (see `encoded_sum`).

    Attributes:
        bits: of each value: 8, 4, 2, 1.6 (three levels, five values a byte) or 1 (the sign); scales add 1/16 bit.
        decay: how much of what was left out is added to the next gradient (Sarfi et al. 2025, "SparseLoCo": 0.95).

    Examples:
        >>> [Quantized(bits).payloads([256, 16], "float32")[0].bytes for bits in (8, 4, 2, 1.6, 1)]
        [4128, 2080, 1056, 852, 544]
        >>> from dist_partial.selection.payload import Peers
        >>> [(each.kind, each.bytes) for each in Quantized(4).payloads([256, 16], "float32", Peers(16))]
        [('all-to-all', 2112), ('gather', 132)]
    """

    bits: Annotated[float, OneOf(*LEVELS)] = 8
    decay: Annotated[float, Above(0), AtMost(1)] = 1.0

    def __post_init__(self) -> None:
        check(self, "quantized")

    def rounded(self, count: int, size: int) -> int:
        return count

    def message_bytes(self, count: int) -> int:
        return words(value_bytes(count, self.bits))

    def encode(self, chunks: Sequence[tf.Tensor], filled: Sequence[Sequence[int]]) -> tf.Tensor:
        whole = sum(self.message_bytes(each.shape[-1]) for each in chunks)
        return padded(encode_values(chunks, self.bits, filled), whole)

    def decode(self, messages: tf.Tensor, counts: Sequence[int], dtype: tf.DType) -> list[tf.Tensor]:
        return decode_values(messages, counts, self.bits, dtype)

    def __str__(self) -> str:
        return f"{self.bits} bits a value" + decay_text(self.decay)
