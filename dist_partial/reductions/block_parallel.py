"""Trains another part of the variables on each replica, and gathers what their owners have moved."""

import dataclasses
import fractions
import math
from collections.abc import Generator, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from dist_partial.distributed.collectives import AllGatherRequest, PeersRequest
from dist_partial.errors import UserError
from dist_partial.reductions.base import with_residual
from dist_partial.reductions.encoded_sum import EncodedSum
from dist_partial.reductions.encoding import bytes_of, padded, words, zeros
from dist_partial.reductions.local_sgd import LocalSGD
from dist_partial.selection.payload import PAIR, Payload, Peers, itemsize
from dist_partial.validation import shown


@dataclasses.dataclass(frozen=True)
class BlockParallel(LocalSGD):
    """Deals the variables out: each replica trains its own by its own examples, beside what the others had last.

    Consecutive variables in the model's order make a share, of which the largest is as small as it can be
    (`Plan.owners`). Every `sync_every` steps each replica sends what its share has moved, which all others take:
    nothing is averaged, so that it is encoded once. A replica differentiates no further down than its share, and sends
    the N-th part of what `LocalSGD` does. That is block coordinate descent, of which BAdam (Luo et al. 2024) takes
    one block after the other, with all blocks at once (Jacobi's way: Bertsekas & Tsitsiklis 1989, "Parallel and
    Distributed Computation", section 3.1).

    The other attributes are those of `LocalSGD`, but `mix`. On another number of replicas the shares change: slots go
    with their variables, and of what moved since the last exchange a part is kept.

    Attributes:
        compressor: encodes what a share has moved, such as `Quantized`; None sends it as it is.

    Examples:
        >>> from dist_partial.reductions import Quantized
        >>> parts = BlockParallel(sync_every=50, compressor=Quantized(4))
        >>> parts.payloads([256, 16], "float32", Peers(4))[0].bytes  # each of the four owns a kernel of four
        Fraction(520, 1)
    """

    binding: ClassVar[str] = "block_parallel"
    divided: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compressor is not None and not isinstance(self.compressor, EncodedSum):
            raise UserError(
                f"block_parallel.compressor is {shown(self.compressor)}, which sums: a share is sent by one replica "
                "alone; give Quantized() or TopK(), in a gin file @quantized() or @top_k()"
            )

        if self.mix != 1:
            raise UserError(
                f"block_parallel.mix is {self.mix:g}: what another replica trains must be where that has it; leave it "
                "out (block_parallel.keep_progress keeps what is trained while an exchange travels)"
            )

    def payloads(self, shape: Sequence[int], dtype: str, peers: Peers = PAIR) -> tuple[Payload, ...]:
        # One of the replicas sends it: each its part, on average.
        mine = fractions.Fraction(self._size(shape, dtype), peers.replicas)
        return (Payload("gather", mine, self.sync_every, self.offset, self.warm_up),)

    def state(self, path: str, shape: Sequence[int], dtype: str, peers: Peers = PAIR) -> dict[str, np.ndarray]:
        return {} if self.compressor is None else {"residual": zeros(shape, dtype)}

    def gather(
        self, values: Sequence[tf.Tensor], states: Sequence[dict[str, Any]], owners: Sequence[int]
    ) -> Generator[Any, Any, list[tf.Tensor]]:
        """Asks for what each owner has of its values, in few bits as there are; returns them all, the same everywhere.

        Args:
            values: what this replica has, of which the others take those that it owns.
            states: what is kept of each; that of the owner changes.
            owners: by which replica each is owned.

        Examples:
            >>> from dist_partial.distributed.collectives import Collectives, run_rounds
            >>> from dist_partial.distributed.replicas import create
            >>> strategy = create("mirrored", cpu=2).strategy
            >>> def gather():
            ...     rank = tf.distribute.get_replica_context().replica_id_in_sync_group
            ...     mine = [tf.cast([rank + 1, rank + 1], tf.float32), tf.cast([rank + 5], tf.float32)]
            ...     return run_rounds(Collectives(), [BlockParallel(10).gather(mine, [{}, {}], [0, 1])])[0]
            >>> found = tf.function(lambda: strategy.run(gather))()
            >>> [strategy.experimental_local_results(each)[1].numpy().tolist() for each in found]
            [[1.0, 1.0], [6.0]]
        """
        peers, rank = yield PeersRequest()
        shares = [[i for i, owner in enumerate(owners) if owner == k] for k in range(peers.replicas)]
        sizes = [sum(self._size(values[i].shape, values[i].dtype.name) for i in share) for share in shares]
        mine = shares[rank]
        message = padded(self._encoded([values[i] for i in mine], [states[i] for i in mine]), max(sizes))
        received = yield AllGatherRequest(message)
        found: dict[int, tf.Tensor] = {}
        for k, share in enumerate(shares):
            found |= zip(share, self._decoded(received[k], [values[i] for i in share]), strict=True)
        return [found[i] for i in range(len(values))]

    def _size(self, shape: Sequence[int], dtype: str) -> int:
        """How many bytes the message of a variable has: a multiple of 4."""
        size = math.prod(shape)
        if self.compressor is None:
            return words(size * itemsize(dtype))
        return self.compressor.message_bytes(self.compressor.rounded(size, size))

    def _encoded(self, values: Sequence[tf.Tensor], states: Sequence[dict[str, Any]]) -> tf.Tensor:
        """The message of this replica's share, uint8 [bytes]; what it leaves out becomes the residuals."""
        messages = [tf.zeros([0], tf.uint8)]
        for alike in _by_dtype(values):
            flat = [tf.reshape(values[i], [-1]) for i in alike]
            if self.compressor is None:
                rows = map(bytes_of, flat)
                messages += [padded(row, words(row.shape[0])) for row in rows]
                continue
            flat = [
                with_residual(value, tf.reshape(states[i]["residual"], [-1]), self.compressor.decay)
                for i, value in zip(alike, flat, strict=True)
            ]
            counts = [self.compressor.rounded(size, size) for size in (value.shape[0] for value in flat)]
            chunks = [padded(value, count)[tf.newaxis] for value, count in zip(flat, counts, strict=True)]
            message = self.compressor.encode(chunks, [[value.shape[0]] for value in flat])
            sent = self.compressor.decode(message, counts, flat[0].dtype)
            for i, value, decoded in zip(alike, flat, sent, strict=True):
                left_out = value - decoded[0][: value.shape[0]]
                states[i]["residual"].assign(tf.reshape(left_out, values[i].shape))
            messages.append(message[0])
        return tf.concat(messages, axis=0)

    def _decoded(self, message: tf.Tensor, like: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Inverts `_encoded`, in the shapes and dtypes of `like`; what follows in the message is ignored."""
        found: dict[int, tf.Tensor] = {}
        start = 0
        for alike in _by_dtype(like):
            shapes, dtype = [like[i].shape for i in alike], like[alike[0]].dtype
            sizes = [self._size(shape, dtype.name) for shape in shapes]
            whole = message[start : start + sum(sizes)]
            start += sum(sizes)
            if self.compressor is None:
                parts = [
                    tf.bitcast(tf.reshape(part[: math.prod(shape) * dtype.size], [-1, dtype.size]), dtype)
                    for part, shape in zip(tf.split(whole, sizes), shapes, strict=True)
                ]
            else:
                counts = [self.compressor.rounded(math.prod(shape), math.prod(shape)) for shape in shapes]
                parts = [each[0] for each in self.compressor.decode(whole[tf.newaxis], counts, dtype)]
            found |= {
                i: tf.reshape(part[: math.prod(shape)], shape)
                for i, part, shape in zip(alike, parts, shapes, strict=True)
            }
        return [found[i] for i in range(len(like))]

    def __str__(self) -> str:
        return f"dealt out, {super().__str__()}"


def _by_dtype(values: Sequence[tf.Tensor]) -> list[list[int]]:
    """Numbers of the values, those of one dtype together."""
    found: dict[tf.DType, list[int]] = {}
    for i, value in enumerate(values):
        found.setdefault(value.dtype, []).append(i)
    return list(found.values())
