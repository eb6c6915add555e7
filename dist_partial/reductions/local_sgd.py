"""Exchanges every few steps: local SGD, and with an outer optimizer DiLoCo."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial.errors import UserError
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.reductions.base import Exchange
from dist_partial.reductions.local_only import own_part
from dist_partial.selection.payload import PAIR, Payload, Peers, itemsize
from dist_partial.selection.plan import Plan
from dist_partial.validation import AtLeast, Factory, check, shown


@dataclasses.dataclass(frozen=True)
class LocalSGD:
    """Trains each replica by itself for some steps, then averages what they have moved.

    The mean movement since the last exchange, `anchor - variable`, is the gradient of an outer optimizer that updates
    the anchor, from which all replicas go on. With outer SGD(1) that is local SGD (Stich 2019, "Local SGD Converges
    Fast and Communicates Little"); with Nesterov momentum it is DiLoCo (Douillard et al. 2023); with another offset for
    each group, fragments take turns (Douillard et al. 2025, "Streaming DiLoCo"). The inner optimizer's slots stay on
    their replica.

    Attributes:
        sync_every: steps between two exchanges.
        offset: the exchanges follow the steps s with s % sync_every == offset % sync_every.
        outer_optimizer: factory of the outer Keras optimizer; None is SGD(1): the replicas' mean.
        compressor: a reduction of every step, by which the movements are summed; None sends them as they are.
        keep_residual_local: what the exchange leaves out stays in the replica's own variables, from which training
            goes on, instead of waiting in a residual for the next exchange (the better choice with `top_k`).

    Examples:
        >>> from dist_partial.reductions import Quantized
        >>> diloco = LocalSGD(sync_every=50, outer_optimizer=nesterov, compressor=Quantized(4))
        >>> diloco.next_due(done=60), diloco.payloads([256, 16], "float32")
        (100, (Payload(kind='gather', bytes=2080, every=50, offset=0),))
    """

    sync_every: Annotated[int, AtLeast(1)]
    offset: Annotated[int, AtLeast(0)] = 0
    outer_optimizer: Annotated[Callable[..., Any] | None, Factory("@nesterov", (keras.optimizers.Optimizer,))] = None
    compressor: Any = None
    keep_residual_local: bool = False

    def __post_init__(self) -> None:
        check(self, "local_sgd")
        # Of a class, not made by (), `shared` would be the property itself.
        if self.compressor is not None and getattr(self.compressor, "shared", False) is not True:
            raise UserError(
                f"local_sgd.compressor is {shown(self.compressor)}: give a reduction of every step, such as "
                "Quantized(), in a gin file @quantized(), with the ()"
            )

    @property
    def shared(self) -> bool:
        return False

    @property
    def window(self) -> Any:
        """The reduction of the movements."""
        return self.compressor or AllReduce()

    def due(self, step: int) -> bool:
        """Whether an exchange follows `step`, counted from 1."""
        return step % self.sync_every == self.offset % self.sync_every

    def next_due(self, done: int) -> int:
        """The first step after `done` that an exchange follows."""
        return done + 1 + (self.offset - done - 1) % self.sync_every

    def payloads(self, shape: Sequence[int], dtype: str, peers: Peers = PAIR) -> tuple[Payload, ...]:
        return tuple(
            m._replace(every=self.sync_every, offset=self.offset) for m in self.window.payloads(shape, dtype, peers)
        )

    def state(self, path: str, shape: Sequence[int], dtype: str, peers: Peers = PAIR) -> dict[str, np.ndarray]:
        return self.window.state(path, shape, dtype, peers)

    def reduce(self, value: tf.Tensor, state: dict[str, Any]) -> Exchange:
        return own_part(value)

    def __str__(self) -> str:
        parts = [f"every {self.sync_every} steps"]
        parts += [f"offset {self.offset}"] if self.offset else []
        # No repr of what has no name: it may hold an address, and the text says whether a run goes on.
        parts += (
            [f"outer {getattr(self.outer_optimizer, '__name__', type(self.outer_optimizer).__name__)}"]
            if self.outer_optimizer
            else []
        )
        parts += [str(self.compressor)] if self.compressor else []
        parts += ["residuals stay local"] if self.keep_residual_local else []
        return ", ".join(parts)


def nesterov(learning_rate: float = 0.7, momentum: float = 0.9) -> keras.optimizers.Optimizer:
    """Makes the outer optimizer of DiLoCo, with the paper's values: SGD with Nesterov momentum.

    Args:
        learning_rate: how far the anchors move along the velocity.
        momentum: how much of the last exchange's velocity the next one keeps.

    Examples:
        >>> nesterov().momentum
        0.9
    """
    return keras.optimizers.SGD(learning_rate, momentum=momentum, nesterov=True)


def averages(plan: Plan, variables: Sequence[Any]) -> tuple[Payload, ...]:
    """Says how variables averaged over the replicas travel: with the shared gradients, else with an exchange.

    Args:
        plan: what is trained.
        variables: of layers in training mode, each of which its replicas would change by themselves.

    Returns:
        One message at most: none where nothing travels that would take them along.

    Examples:
        >>> from dist_partial.selection import resolve
        >>> layer = keras.layers.BatchNormalization()
        >>> plan = resolve([("train", ".*")], keras.Sequential([keras.Input([4]), layer]), LocalSGD(sync_every=10))
        >>> averages(plan, [layer.moving_mean, layer.moving_variance])
        (Payload(kind='sum', bytes=32, every=10, offset=0),)
    """
    size = sum(math.prod(variable.shape) * itemsize(variable.dtype) for variable in variables)
    local = [group.reduction for group in plan.groups if isinstance(group.reduction, LocalSGD)]
    if size and any(group.reduction.shared for group in plan.groups):
        return (Payload("sum", size),)
    return (Payload("sum", size, local[0].sync_every, local[0].offset),) if size and local else ()
