"""Exchanges every few steps: local SGD, and with an outer optimizer DiLoCo."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import keras
import numpy as np
import tensorflow as tf

from dist_partial.errors import UserError
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.reductions.base import Exchange
from dist_partial.reductions.local_only import own_part
from dist_partial.selection.payload import PAIR, Payload, Peers, itemsize
from dist_partial.selection.plan import Plan
from dist_partial.validation import Above, AtLeast, AtMost, Factory, check, shown


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
        delay: steps that are made while an exchange travels: what it brings is applied so many steps after it began.
        mix: how much of the anchors the variables take when an exchange has arrived; 1 is all, 0.5 the middle between
            where the replica is by then and the anchors, as in Streaming DiLoCo.
        keep_progress: what a replica has moved while an exchange travelled is kept, on top of the anchors (delayed
            averaging: Zhou et al. 2020, "DaSGD"); `mix` is then how much of the anchors' own movement is taken.
        warm_up: steps at the beginning, after each of which there is an exchange, without a delay.
        clip_norm: to which global norm the mean movements of a group are clipped before the outer optimizer; or None.

    Examples:
        >>> from dist_partial.reductions import Quantized
        >>> diloco = LocalSGD(sync_every=50, outer_optimizer=nesterov, compressor=Quantized(4))
        >>> diloco.next_due(done=60), diloco.payloads([256, 16], "float32")
        (100, (Payload(kind='gather', bytes=2080, every=50, offset=0, warm_up=0),))
    """

    binding: ClassVar[str] = "local_sgd"
    divided: ClassVar[bool] = False  # whether each replica trains a share of its own: see `BlockParallel`
    sync_every: Annotated[int, AtLeast(1)]
    offset: Annotated[int, AtLeast(0)] = 0
    outer_optimizer: Annotated[Callable[..., Any] | None, Factory("@nesterov", (keras.optimizers.Optimizer,))] = None
    compressor: Any = None
    keep_residual_local: bool = False
    delay: Annotated[int, AtLeast(0)] = 0
    mix: Annotated[float, Above(0), AtMost(1)] = 1.0
    keep_progress: bool = False
    warm_up: Annotated[int, AtLeast(0)] = 0
    clip_norm: Annotated[float | None, Above(0)] = None

    def __post_init__(self) -> None:
        check(self, self.binding)
        name = self.binding
        if self.delay > self.sync_every:
            raise UserError(
                f"{name}.delay is {self.delay}: an exchange must have arrived when the next one begins, after "
                f"{name}.sync_every = {self.sync_every} steps; give at most that"
            )
        if self.keep_progress and not self.delay:
            raise UserError(
                f"{name}.keep_progress is True, and nothing is trained while an exchange travels: set "
                f"{name}.delay, the steps that are made meanwhile, or unbind it"
            )
        if self.delay == self.sync_every and self.mix == 1 and not self.keep_progress:
            raise UserError(
                f"{name}.delay is {self.delay}, all of {name}.sync_every, and {name}.mix = 1 leaves nothing "
                f"of the steps made while an exchange travels: no step would count; set {name}.keep_progress = True, "
                "or give a smaller delay or mix"
            )
        # Of a class, not made by (), `shared` would be the property itself.
        if self.compressor is not None and getattr(self.compressor, "shared", False) is not True:
            raise UserError(
                f"{name}.compressor is {shown(self.compressor)}: give a reduction of every step, such as "
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
        """Whether an exchange begins after `step`, counted from 1."""
        return step <= self.warm_up or step % self.sync_every == self.offset % self.sync_every

    def next_due(self, done: int) -> int:
        """The first step after `done` after which an exchange begins."""
        return done + 1 if done < self.warm_up else self._next_regular(done)

    def _next_regular(self, done: int) -> int:
        return done + 1 + (self.offset - done - 1) % self.sync_every

    def delayed(self, step: int) -> bool:
        """Whether what begins after `step` is applied later."""
        return self.delay > 0 and step > self.warm_up

    def arrives(self, step: int) -> bool:
        """Whether an exchange that has travelled for `delay` steps is applied after `step`."""
        begun = step - self.delay
        return begun > 0 and self.delayed(begun) and self.due(begun)

    def next_arrival(self, done: int) -> int | None:
        """The first step after `done` after which such an exchange is applied; None without a delay."""
        return self._next_regular(max(done - self.delay, self.warm_up)) + self.delay if self.delay else None

    def last_applied(self, steps: int) -> int:
        """After which step the last exchange begins that is applied within so many steps; 0 if there is none."""
        if steps <= self.warm_up:
            return steps
        return max(self.warm_up, self._next_regular(steps - self.delay) - self.sync_every)

    def payloads(self, shape: Sequence[int], dtype: str, peers: Peers = PAIR) -> tuple[Payload, ...]:
        found = self.window.payloads(shape, dtype, peers)
        return tuple(m._replace(every=self.sync_every, offset=self.offset, warm_up=self.warm_up) for m in found)

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
        parts += [f"applied {self.delay} steps later"] if self.delay else []
        parts += [f"mixed by {self.mix:g}"] if self.mix != 1 else []
        parts += ["progress is kept"] if self.keep_progress else []
        parts += [f"every step until {self.warm_up}"] if self.warm_up else []
        parts += [f"clipped to {self.clip_norm:g}"] if self.clip_norm is not None else []
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
        (Payload(kind='sum', bytes=32, every=10, offset=0, warm_up=0),)
    """
    size = sum(math.prod(variable.shape) * itemsize(variable.dtype) for variable in variables)
    local = [group.reduction for group in plan.groups if isinstance(group.reduction, LocalSGD)]
    if size and any(group.reduction.shared for group in plan.groups):
        return (Payload("sum", size),)
    if not (size and local):
        return ()
    return (Payload("sum", size, local[0].sync_every, local[0].offset, local[0].warm_up),)
