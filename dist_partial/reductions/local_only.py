"""Sends nothing: each replica trains variables of its own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.distributed.collectives import ReplicaCount
from dist_partial.reductions.base import Exchange
from dist_partial.selection.payload import PAIR, Payload, Peers


@dataclasses.dataclass(frozen=True)
class LocalOnly:
    """Trains each replica's own variables by the gradients of its own examples; nothing is sent.

    Each replica is evaluated with its own, and all of them are saved.

    Examples:
        >>> LocalOnly().payloads([8, 2], "float32")
        ()
    """

    @property
    def shared(self) -> bool:
        return False

    def payloads(self, shape: Sequence[int], dtype: str, peers: Peers = PAIR) -> tuple[Payload, ...]:
        return ()

    def state(self, path: str, shape: Sequence[int], dtype: str, peers: Peers = PAIR) -> dict[str, np.ndarray]:
        return {}

    def reduce(self, value: tf.Tensor, state: dict[str, Any]) -> Exchange:
        return own_part(value)

    def __str__(self) -> str:
        return "local only"


def own_part(gradient: tf.Tensor) -> Exchange:
    # It was divided by the global batch, and represents the mean over this replica's part of it.
    """Scales a gradient to the mean over this replica's own examples; requests nothing.

    Examples:
        >>> from dist_partial.distributed.collectives import Collectives, run_rounds
        >>> from dist_partial.distributed.replicas import create
        >>> strategy = create("mirrored", cpu=2).strategy
        >>> found = strategy.run(lambda: run_rounds(Collectives(), [own_part(tf.constant([0.5]))])[0])
        >>> [each.numpy().tolist() for each in strategy.experimental_local_results(found)]
        [[1.0], [1.0]]
    """
    count = yield ReplicaCount()
    return gradient * count
