"""One round of communication between the replicas: sums and gathers, in packs.

The only place that talks to other replicas about gradients, by whichever `backend` there is.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from dist_partial.distributed.backend import ALL, BETWEEN, INSIDE, Backend
from dist_partial.distributed.per_replica import Topology
from dist_partial.distributed.tensorflow_backend import TensorFlowBackend
from dist_partial.selection.payload import Peers

# Large enough to cost little each, small enough to be under way while later gradients are still being computed. Packs
# of 0.5 to 2 MiB took the same time within the noise, at 200 Mbit, 1 Gbit and unshaped.
PACK_BYTES = 2 * 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class AllReduceRequest:
    """Asks for the sum of a tensor over all replicas.

    Examples:
        >>> from dist_partial.distributed.replicas import create
        >>> strategy = create("mirrored", cpu=2).strategy
        >>> def add():
        ...     rank = tf.distribute.get_replica_context().replica_id_in_sync_group
        ...     return Collectives().exchange([AllReduceRequest(tf.cast([rank, 1], tf.float32))])[0]
        >>> sums = tf.function(lambda: strategy.run(add))()
        >>> [each.numpy().tolist() for each in strategy.experimental_local_results(sums)]
        [[1.0, 2.0], [1.0, 2.0]]
    """

    tensor: tf.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class AllGatherRequest:
    """Asks for the payloads of all replicas: uint8 [n], n a multiple of 4 -> [replicas, n] in replica order.

    Examples:
        >>> from dist_partial.distributed.replicas import create
        >>> strategy = create("mirrored", cpu=2).strategy
        >>> def gather():
        ...     rank = tf.distribute.get_replica_context().replica_id_in_sync_group
        ...     return Collectives().exchange([AllGatherRequest(tf.cast([rank, 1, 2, 3], tf.uint8))])[0]
        >>> gathered = tf.function(lambda: strategy.run(gather))()
        >>> strategy.experimental_local_results(gathered)[0].numpy().tolist()
        [[0, 1, 2, 3], [1, 1, 2, 3]]
    """

    message: tf.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class AllToAllRequest:
    """Sends each replica something of its own: uint8 [replicas, n], n a multiple of 4; row j is for replica j.

    The answer, [replicas, n], has in row i what replica i has sent to this one.

    Examples:
        >>> from dist_partial.distributed.replicas import create
        >>> strategy = create("mirrored", cpu=2).strategy
        >>> def send():
        ...     rank = tf.distribute.get_replica_context().replica_id_in_sync_group
        ...     return Collectives().exchange([AllToAllRequest(tf.cast([[rank] * 4, [rank + 10] * 4], tf.uint8))])[0]
        >>> received = tf.function(lambda: strategy.run(send))()
        >>> [each.numpy()[:, 0].tolist() for each in strategy.experimental_local_results(received)]
        [[0, 1], [10, 11]]
    """

    messages: tf.Tensor


class PeersRequest:
    """Asks who exchange, and which of them this is; answered at once with (`Peers`, rank), without a round.

    Examples:
        >>> def own():
        ...     peers, rank = yield PeersRequest()
        ...     return peers.replicas, rank
        >>> run_rounds(Collectives(), [own()])
        [(1, 0)]
    """


class ReplicaCount:
    """Asks how many replicas exchange; answered at once, without a round.

    Examples:
        >>> def own():
        ...     count = yield ReplicaCount()
        ...     return count
        >>> run_rounds(Collectives(), [own()])
        [1]
    """


Request = AllReduceRequest | AllGatherRequest | AllToAllRequest


@dataclasses.dataclass(frozen=True, eq=False)
class Collectives:
    """Sums and gathers over the replicas, in packs.

    Attributes:
        backend: by what they travel.
        pack_bytes: up to how many bytes travel as one.
        level: which replicas exchange: all, those `INSIDE` a worker, or, `BETWEEN` workers, one of each: its others
            have the same.

    Examples:
        >>> requests = [AllReduceRequest(tf.constant([[1.0], [2.0]])), AllReduceRequest(tf.constant([3.0, 4.0, 5.0]))]
        >>> [answer.numpy().tolist() for answer in Collectives().exchange(requests)]  # which travel as one
        [[[1.0], [2.0]], [3.0, 4.0, 5.0]]
    """

    backend: Backend = TensorFlowBackend()  # noqa: RUF009 (it has no state)
    pack_bytes: int = PACK_BYTES
    level: str = ALL

    @property
    def topology(self) -> Topology:
        """The replicas that it reaches from within the strategy in whose scope, or replica context, it is called."""
        found = self.backend.topology(tf.distribute.get_strategy())
        if self.level == INSIDE:
            return Topology(found.strategy)
        return found.hosts if self.level == BETWEEN else found

    @property
    def peers(self) -> Peers:
        """Who exchange: by which a step decides how, and a plan predicts it."""
        found = self.topology
        # One process counts as so many workers as it has devices. Inside a worker there is nothing to gain.
        local = found.local if found.workers > 1 else 1
        return Peers(found.replicas, local, self.backend.has_all_to_all and self.level != INSIDE)

    def at(self, level: str) -> "Collectives":
        """The same for a level."""
        return dataclasses.replace(self, level=level)

    def exchange(self, requests: Sequence[Request]) -> list[tf.Tensor]:
        """Answers all requests in one round; called in a replica context, in the same order on every replica.

        Gradients come in the order in which backprop produces them, so that the first packs travel while the rest
        is still computed.

        Returns:
            An answer a request: for `Sum` the same bits, shape and dtype on every replica.
        """
        sent = [
            tf.reshape(request.tensor, [-1])
            if isinstance(request, AllReduceRequest)
            else _words(request.message if isinstance(request, AllGatherRequest) else request.messages)
            for request in requests
        ]
        packs = [
            _packs([i for i, request in enumerate(requests) if isinstance(request, kind)], sent, self.pack_bytes)
            for kind in (AllReduceRequest, AllGatherRequest, AllToAllRequest)
        ]
        sums, gathers, swaps = [[_joined([sent[i] for i in pack]) for pack in each] for each in packs]
        found = self.backend.over_replicas(sums, gathers, swaps, self.level)
        answers: list[Any] = [None] * len(requests)
        for pack, whole in zip(itertools.chain(*packs), itertools.chain(*found), strict=True):
            sizes = [sent[i].shape[-1] for i in pack]
            for i, part in zip(pack, tf.split(whole, sizes, axis=-1) if len(pack) > 1 else [whole], strict=True):
                request = requests[i]
                answers[i] = (
                    tf.reshape(part, request.tensor.shape) if isinstance(request, AllReduceRequest) else _bytes(part)
                )
        return answers


def run_rounds(collectives: Collectives, exchanges: Sequence[Any]) -> list[Any]:
    """Runs generators that yield requests side by side, so that the requests of a round share packs.

    Args:
        collectives: what answers.
        exchanges: generators; each returns its result.

    Returns:
        The results.

    Examples:
        >>> def twice(value):
        ...     total = yield AllReduceRequest(tf.constant(value))
        ...     return 2 * total
        >>> [result.numpy().tolist() for result in run_rounds(Collectives(), [twice([1.0]), twice([2.0])])]
        [[2.0], [4.0]]
    """
    results: list[Any] = [None] * len(exchanges)
    answers: dict[int, Any] = dict.fromkeys(range(len(exchanges)))
    while answers:
        requests: dict[int, Any] = {}
        for i, answer in answers.items():
            try:
                request = exchanges[i].send(answer)
                while isinstance(request, ReplicaCount | PeersRequest):
                    known: Any = collectives.topology.replicas
                    if isinstance(request, PeersRequest):
                        known = collectives.peers, collectives.topology.rank
                    request = exchanges[i].send(known)
                requests[i] = request
            except StopIteration as stop:
                results[i] = stop.value
        answers = dict(zip(requests, collectives.exchange(list(requests.values())), strict=True)) if requests else {}
    return results


def _words(message: tf.Tensor) -> tf.Tensor:
    """Views uint8 [..., n] as int32 [..., n / 4]: TensorFlow gathers no bytes, but whole words of them."""
    return tf.bitcast(tf.reshape(message, [*message.shape[:-1], message.shape[-1] // 4, 4]), tf.int32)


def _bytes(words: tf.Tensor) -> tf.Tensor:
    return tf.reshape(tf.bitcast(words, tf.uint8), [*words.shape[:-1], 4 * words.shape[-1]])


def _joined(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.concat(tensors, axis=-1) if len(tensors) > 1 else tensors[0]


def _packs(members: Sequence[int], tensors: Sequence[tf.Tensor], limit: int) -> list[list[int]]:
    """Cuts the members, indices of tensors, into packs: of one dtype, in order, filled up to `limit` bytes."""
    packs: list[list[int]] = []
    open_packs: dict[tf.DType, tuple[list[int], int]] = {}
    for i in members:
        size = tensors[i].shape.num_elements() * tensors[i].dtype.size
        pack, filled = open_packs.get(tensors[i].dtype, ([], limit))
        if filled + size > limit or not pack:
            pack, filled = [], 0
            packs.append(pack)
        pack.append(i)
        open_packs[tensors[i].dtype] = (pack, filled + size)
    return packs
