"""Sums the gradients of all replicas in every step."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.distributed.collectives import AllGatherRequest, AllReduceRequest
from dist_partial.reductions.base import Dtype, Exchange
from dist_partial.reductions.encoding import bytes_of, padded, words
from dist_partial.selection.payload import PAIR, Payload, Peers, itemsize
from dist_partial.validation import check

_ID = tf.int32  # of a row that was looked up


@dataclasses.dataclass(frozen=True)
class AllReduce:
    """Sums the gradients of all replicas in every step.

    Of an embedding of which a batch looks up few rows, these rows and their numbers are gathered where that sends less.

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

    def lookup_payloads(self, ids: int, shape: Sequence[int], dtype: str, peers: Peers) -> tuple[Payload, ...] | None:
        """What one replica sends of an embedding of which it has looked up so many rows; None if a sum costs no more.

        Their numbers and their gradients are gathered: the size does not depend on the rows that there are.

        Examples:
            >>> AllReduce().lookup_payloads(256, [1_000_000, 16], "float32", Peers(4))[0].bytes  # instead of 64,000,000
            17408
        """
        size = itemsize(self.dtype or dtype) * math.prod(shape[1:])
        found = (Payload("gather", words(ids * (_ID.size + size))),)
        return found if peers.cost(found) < peers.cost(self.payloads(shape, dtype, peers)) else None

    def state(self, path: str, shape: Sequence[int], dtype: str, peers: Peers = PAIR) -> dict[str, np.ndarray]:
        return {}

    def reduce(self, value: tf.Tensor, state: dict[str, Any]) -> Exchange:
        total = yield AllReduceRequest(tf.cast(value, self.dtype or value.dtype))
        return tf.cast(total, value.dtype)

    def reduce_lookups(self, gradient: tf.IndexedSlices, shape: Sequence[int]) -> Exchange:
        """Sums what replicas have looked up of an embedding of `shape`; each has the same number of ids [n]."""
        sent_as, count = tf.as_dtype(self.dtype or gradient.dtype), gradient.indices.shape[0]
        values = tf.cast(tf.reshape(gradient.values, [-1]), sent_as)
        split = count * _ID.size
        message = tf.concat([bytes_of(tf.cast(gradient.indices, _ID)), bytes_of(values)], axis=0)
        received = yield AllGatherRequest(padded(message, words(message.shape[-1])))
        replicas = received.shape[0]
        ids = tf.bitcast(tf.reshape(received[:, :split], [replicas * count, _ID.size]), _ID)
        parts = received[:, split : split + values.shape[0] * sent_as.size]
        rows = tf.bitcast(tf.reshape(parts, [replicas * count, *shape[1:], sent_as.size]), sent_as)
        ids = tf.where(ids < shape[0], ids, -1)  # an id that there is not counts for nothing
        return tf.math.unsorted_segment_sum(tf.cast(rows, gradient.dtype), ids, shape[0])

    def __str__(self) -> str:
        return f"all-reduce in {self.dtype}" if self.dtype else "all-reduce"
