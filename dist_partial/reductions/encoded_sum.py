"""Sums what travels in few bits: by a gather, or in two hops, of which each replica adds up a part.

A gather hands every replica's message to every other, so that what each sends grows with their number. In two hops the
tensor is cut into one chunk a replica: replica j is sent every chunk j, decodes and adds them in rank order, and sends
the sum to all, encoded as well. What leaves each is then the same share at any number (the scheme of 1-bit Adam, Tang
et al. 2021, and of qgZ in Wang et al. 2023, "ZeRO++"). Both hops have error feedback: what the first leaves out is each
replica's `residual`, and what the second leaves out of chunk j is the `sum_residual` of replica j.
"""

import abc
import math
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.distributed.collectives import AllGatherRequest, AllReduceRequest, AllToAllRequest, PeersRequest
from dist_partial.reductions.base import Exchange, with_residual
from dist_partial.reductions.encoding import ceil, padded, zeros
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
    def encode(self, chunks: Sequence[tf.Tensor], filled: Sequence[Sequence[int]]) -> tf.Tensor:
        """Encodes several tensors in one message.

        Args:
            chunks: [chunks, count] floating each, with a count of its own.
            filled: of each tensor, how many values of each chunk there are before zeros that are none.

        Returns:
            uint8 [chunks, the sum of `message_bytes(count)`].
        """

    @abc.abstractmethod
    def decode(self, messages: tf.Tensor, counts: Sequence[int], dtype: tf.DType) -> list[tf.Tensor]:
        """Inverts `encode`: [chunks, count] of `dtype` a count; beyond what was filled, anything."""

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

    def together(self, shape: Sequence[int], dtype: str, peers: Peers) -> str | None:
        """Names how a gradient travels in few bits: `reduce_several` takes those of one name; None if it does not."""
        kind = self.payloads(shape, dtype, peers)[0].kind
        return None if kind == "sum" else kind

    def reduce(self, value: tf.Tensor, state: dict[str, Any]) -> Exchange:
        """Sums a gradient over the replicas in the cheapest way, for which its state was made."""
        if "residual" not in state:
            return (yield AllReduceRequest(value))
        peers, _ = yield PeersRequest()
        if self.together(value.shape, value.dtype.name, peers):
            return (yield from self.reduce_several([value], [state]))[0]
        assert "sum_residual" not in state, (peers, list(state))
        value = with_residual(value, state["residual"], self.decay)
        state["residual"].assign(tf.zeros_like(value))
        return (yield AllReduceRequest(value))

    def reduce_several(
        self, values: Sequence[tf.Tensor], states: Sequence[dict[str, Any]]
    ) -> Generator[Any, Any, list[tf.Tensor]]:
        """Sums gradients of one dtype that travel alike (see `together`) as `reduce` does, by fewer operations."""
        peers, rank = yield PeersRequest()
        [way] = {self.together(value.shape, value.dtype.name, peers) for value in values}
        assert all((way == "all-to-all") == ("sum_residual" in state) for state in states), (way, peers)
        if way == "all-to-all":
            return (yield from self._in_two_hops(values, states, peers.replicas, rank))
        counts = [self.rounded(size, size) for size in map(_size, values)]
        received = yield AllGatherRequest(self._encoded(values, states, 1)[0])
        totals = [_added(each) for each in self.decode(received, counts, values[0].dtype)]
        return [_shaped(total, value) for total, value in zip(totals, values, strict=True)]

    def _in_two_hops(
        self, values: Sequence[tf.Tensor], states: Sequence[dict[str, Any]], replicas: int, rank: int
    ) -> Generator[Any, Any, list[tf.Tensor]]:
        dtype, own = values[0].dtype, [state["sum_residual"] for state in states]
        counts = [each.shape[0] for each in own]
        received = self.decode((yield AllToAllRequest(self._encoded(values, states, replicas))), counts, dtype)
        filled = [_filled(_size(value), count, replicas)[rank] for value, count in zip(values, counts, strict=True)]
        totals = [
            _but_for(with_residual(_added(parts), residual, self.decay), end)
            for parts, residual, end in zip(received, own, filled, strict=True)
        ]
        message = self.encode([total[tf.newaxis] for total in totals], [[end] for end in filled])
        sent = self.decode(message, counts, dtype)
        for residual, total, decoded, end in zip(own, totals, sent, filled, strict=True):
            residual.assign(_but_for(total - decoded[0], end))
        found = self.decode((yield AllGatherRequest(message[0])), counts, dtype)
        return [_shaped(each, value) for each, value in zip(found, values, strict=True)]

    def _encoded(self, values: Sequence[tf.Tensor], states: Sequence[dict[str, Any]], parts: int) -> tf.Tensor:
        """The message of values in so many chunks, [chunks, bytes]; what it leaves out becomes their residuals."""
        counts = [self._chunk(_size(value), parts) for value in values]
        chunks = []
        for value, state, count in zip(values, states, counts, strict=True):
            flat = tf.reshape(with_residual(value, state["residual"], self.decay), [-1])
            chunks.append(tf.reshape(padded(flat, parts * count), [parts, count]))
        filled = [_filled(_size(value), count, parts) for value, count in zip(values, counts, strict=True)]
        message = self.encode(chunks, filled)
        sent = self.decode(message, counts, values[0].dtype)
        for value, state, chunk, decoded in zip(values, states, chunks, sent, strict=True):
            state["residual"].assign(_shaped(chunk - decoded, value))
        return message

    def _chunk(self, size: int, replicas: int) -> int:
        """How many values each replica adds up in two hops; the last ones may have fewer, or none."""
        return self.rounded(ceil(size, replicas), size)


def _size(value: tf.Tensor) -> int:
    return math.prod(value.shape)


def _filled(size: int, count: int, parts: int) -> list[int]:
    """How many of so many values each chunk has; the last ones may have fewer, or none."""
    return [min(max(size - i * count, 0), count) for i in range(parts)]


def _but_for(values: tf.Tensor, end: int) -> tf.Tensor:
    """Values [n], with zeros from `end` on: what fills a chunk up is no value, and would decode to others."""
    return values if end == values.shape[0] else padded(values[:end], values.shape[0])


def _shaped(values: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """As many of the values, of any shape, as `like` has, in its shape."""
    if values.shape.num_elements() > _size(like):
        values = tf.reshape(values, [-1])[: _size(like)]
    return tf.reshape(values, like.shape)


def _added(rows: tf.Tensor) -> tf.Tensor:
    """The sum of rows [replicas, n], one after the other: where all add the same they get the same bits."""
    return tf.add_n(tf.unstack(rows))
