"""Sums what travels in few bits: by a gather, or in two hops, of which each replica adds up a part.

A gather hands every replica's message to every other, so that what each sends grows with their number. In two hops the
tensor is cut into one chunk a replica: replica j is sent every chunk j, decodes and adds them in rank order, and sends
the sum to all, encoded as well. What leaves each is then the same share at any number (the scheme of 1-bit Adam, Tang
et al. 2021, and of qgZ in Wang et al. 2023, "ZeRO++"). Both hops have error feedback: what the first leaves out is each
replica's `residual`, and what the second leaves out of chunk j is the `sum_residual` of replica j.
"""

import abc
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.distributed.collectives import AllGatherRequest, AllReduceRequest, AllToAllRequest, PeersRequest
from dist_partial.reductions.base import Exchange
from dist_partial.reductions.encoding import ceil, zeros
from dist_partial.selection.payload import PAIR, Payload, Peers, itemsize


class EncodedSum(abc.ABC):
    """Sums gradients in few bits, in the cheapest way; how it encodes chunks of their values is a subclass's part."""

    @property
    @abc.abstractmethod
    def decay(self) -> float:
        """How much of a residual is added to the next gradient."""

    @abc.abstractmethod
    def rounded(self, count: int, size: int) -> int:
        """How many values a chunk of at least `count` of a tensor's `size` has."""

    @abc.abstractmethod
    def message_bytes(self, count: int) -> int:
        """How many bytes are made of `count` values: a multiple of 4."""

    @abc.abstractmethod
    def encode(self, chunks: tf.Tensor, filled: Sequence[int]) -> tf.Tensor:
        """[chunks, count] floating -> [chunks, message_bytes(count)] uint8; beyond `filled` of each there are zeros."""

    @abc.abstractmethod
    def decode(self, messages: tf.Tensor, count: int, dtype: tf.DType) -> tf.Tensor:
        """[chunks, message_bytes(count)] uint8 -> [chunks, count] of `dtype`; beyond what was filled, anything."""

    @property
    def shared(self) -> bool:
        return True

    def payloads(self, shape: Sequence[int], dtype: str, peers: Peers = PAIR) -> tuple[Payload, ...]:
        """Says what one replica sends for a gradient: itself in a sum, a gather, or two hops, whichever costs least."""
        size = math.prod(shape)
        whole = self.message_bytes(self.rounded(size, size))
        ways: list[tuple[Payload, ...]] = [(Payload("sum", size * itemsize(dtype)),), (Payload("gather", whole),)]
        if peers.all_to_all:
            part = self.message_bytes(self._chunk(size, peers.replicas))
            ways.append((Payload("all-to-all", peers.replicas * part), Payload("gather", part)))
        return min(ways, key=peers.cost)

    def state(self, path: str, shape: Sequence[int], dtype: str, peers: Peers = PAIR) -> dict[str, np.ndarray]:
        """Makes the first values of residuals: none where even two replicas send the gradient as it is."""
        if self.payloads(shape, dtype, PAIR)[0].kind == "sum":
            return {}
        found = {"residual": zeros(shape, dtype)}
        if self.payloads(shape, dtype, peers)[0].kind == "all-to-all":
            found["sum_residual"] = zeros([self._chunk(math.prod(shape), peers.replicas)], dtype)
        return found

    def reduce(self, value: tf.Tensor, state: dict[str, Any]) -> Exchange:
        """Sums a gradient over the replicas in the cheapest way, for which its state was made."""
        if "residual" not in state:
            return (yield AllReduceRequest(value))
        peers, rank = yield PeersRequest()
        way = self.payloads(value.shape, value.dtype.name, peers)[0].kind
        assert (way == "all-to-all") == ("sum_residual" in state), (way, peers, list(state))
        value = value + self.decay * state["residual"]
        if way == "all-to-all":
            return (yield from self._in_two_hops(value, state, peers.replicas, rank))
        if way == "sum":
            state["residual"].assign(tf.zeros_like(value))
            return (yield AllReduceRequest(value))
        size = math.prod(value.shape)
        message = self._encoded(value, state, [size])[0]
        received = self.decode((yield AllGatherRequest(message)), self.rounded(size, size), value.dtype)
        return tf.reshape(_added(received)[:size], value.shape)

    def _in_two_hops(self, value: tf.Tensor, state: dict[str, Any], replicas: int, rank: int) -> Exchange:
        size, own, dtype = math.prod(value.shape), state["sum_residual"], value.dtype
        count = own.shape[0]
        filled = [min(max(size - i * count, 0), count) for i in range(replicas)]
        received = yield AllToAllRequest(self._encoded(value, state, filled))
        total = _added(self.decode(received, count, dtype)) + self.decay * own
        # What fills the last chunks up is no value: its zeros would decode to others, and add up.
        total = tf.where(tf.range(count) < filled[rank], total, 0)
        message = self.encode(total[tf.newaxis], [filled[rank]])
        own.assign(tf.where(tf.range(count) < filled[rank], total - self.decode(message, count, dtype)[0], 0))
        totals = self.decode((yield AllGatherRequest(message[0])), count, dtype)
        return tf.reshape(tf.reshape(totals, [-1])[:size], value.shape)

    def _encoded(self, value: tf.Tensor, state: dict[str, Any], filled: Sequence[int]) -> tf.Tensor:
        """The messages of a value in chunks, [chunks, bytes]; what they leave out becomes the residual."""
        size, parts = math.prod(value.shape), len(filled)
        count = self._chunk(size, parts)
        chunks = tf.reshape(tf.pad(tf.reshape(value, [-1]), [[0, parts * count - size]]), [parts, count])
        messages = self.encode(chunks, filled)
        left = chunks - self.decode(messages, count, value.dtype)
        state["residual"].assign(tf.reshape(tf.reshape(left, [-1])[:size], value.shape))
        return messages

    def _chunk(self, size: int, replicas: int) -> int:
        """How many values each replica adds up in two hops; the last ones may have fewer, or none."""
        return self.rounded(ceil(size, replicas), size)

    def decay_text(self) -> str:
        """Writes what the text of a reduction says of its decay."""
        return f", decay {self.decay:g}" if self.decay != 1 else ""


def _added(rows: tf.Tensor) -> tf.Tensor:
    """The sum of rows [replicas, n], one after the other: where all add the same they get the same bits."""
    return tf.add_n(tf.unstack(rows))
