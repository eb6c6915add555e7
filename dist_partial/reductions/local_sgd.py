"""Exchanges every few steps: local SGD, and with an outer optimizer DiLoCo."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial.errors import UserError
from dist_partial.reductions.all_reduce import EveryStep
from dist_partial.reductions.base import Exchange
from dist_partial.reductions.local_only import own_part
from dist_partial.selection.payload import Message, itemsize
from dist_partial.selection.plan import Plan


@dataclasses.dataclass(frozen=True)
class LocalSGD:
    """Each replica trains by itself for some steps; then what they have moved is averaged.

    The mean movement since the last exchange, `anchor - variable`, is the gradient of an outer optimizer that updates
    the anchor, from which all replicas go on. With outer SGD(1) that is local SGD (Stich 2019, "Local SGD Converges
    Fast and Communicates Little"); with Nesterov momentum it is DiLoCo (Douillard et al. 2023); with another offset for
    each group, fragments take turns (Douillard et al. 2025, "Streaming DiLoCo"). The inner optimizer's slots stay on
    their replica.

    Attributes:
        steps: steps between two exchanges.
        offset: the exchanges follow the steps s with s % steps == offset % steps.
        outer: factory of the outer Keras optimizer; None is SGD(1): the replicas' mean.
        exchange: a reduction of every step, by which the movements are summed; None sends them as they are.
        keep: what the exchange leaves out stays in the replica's own variables, and goes on to be trained from, instead
            of waiting in a residual for the next exchange (the better choice with `top_k`).
    """

    steps: int
    offset: int = 0
    outer: Callable[..., Any] | None = None
    exchange: Any = None
    keep: bool = False

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("offset", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UserError(f"local_sgd.{name} is {value!r}: it must be a whole number of at least {least}")
        if self.outer is not None and (not callable(self.outer) or isinstance(self.outer, keras.optimizers.Optimizer)):
            raise UserError(f"local_sgd.outer is {self.outer!r}: bind a factory, such as @nesterov without ()")
        if not isinstance(self.keep, bool):
            raise UserError(f"local_sgd.keep is {self.keep!r}: write True or False")
        # Of a class, not made by (), `shared` would be the property itself.
        if self.exchange is not None and getattr(self.exchange, "shared", False) is not True:
            raise UserError(
                f"local_sgd.exchange is {self.exchange!r}: bind a reduction of every step, such as @quantized()"
            )

    @property
    def shared(self) -> bool:
        return False

    @property
    def window(self) -> Any:
        """The reduction of the movements."""
        return self.exchange or EveryStep()

    def due(self, step: int) -> bool:
        """Whether an exchange follows `step`, counted from 1."""
        return step % self.steps == self.offset % self.steps

    def next_due(self, done: int) -> int:
        """The first step after `done` that an exchange follows."""
        return done + 1 + (self.offset - done - 1) % self.steps

    def messages(self, shape: Sequence[int], dtype: str) -> tuple[Message, ...]:
        return tuple(m._replace(every=self.steps, offset=self.offset) for m in self.window.messages(shape, dtype))

    def state(self, path: str, shape: Sequence[int], dtype: str) -> dict[str, np.ndarray]:
        return self.window.state(path, shape, dtype)

    def reduce(self, value: tf.Tensor, state: dict[str, Any]) -> Exchange:
        return own_part(value)

    def __str__(self) -> str:
        parts = [f"every {self.steps} steps"]
        parts += [f"offset {self.offset}"] if self.offset else []
        # No repr of what has no name: it may hold an address, and the text says whether a run goes on.
        parts += [f"outer {getattr(self.outer, '__name__', type(self.outer).__name__)}"] if self.outer else []
        parts += [str(self.exchange)] if self.exchange else []
        parts += ["keep"] if self.keep else []
        return ", ".join(parts)


def nesterov(learning_rate: float = 0.7, momentum: float = 0.9) -> keras.optimizers.Optimizer:
    """The outer optimizer of DiLoCo, with the paper's values: SGD with Nesterov momentum."""
    return keras.optimizers.SGD(learning_rate, momentum=momentum, nesterov=True)


def averages(plan: Plan, variables: Sequence[Any]) -> tuple[Message, ...]:
    """How variables that are averaged over the replicas travel: with the shared gradients, or else with an exchange.

    Args:
        plan: what is trained.
        variables: of layers in training mode, each of which its replicas would change by themselves.

    Returns:
        One message at most: none where nothing travels that would take them along.
    """
    size = sum(math.prod(variable.shape) * itemsize(variable.dtype) for variable in variables)
    local = [group.reduction for group in plan.groups if isinstance(group.reduction, LocalSGD)]
    if size and any(group.reduction.shared for group in plan.groups):
        return (Message("sum", size),)
    return (Message("sum", size, local[0].steps, local[0].offset),) if size and local else ()
