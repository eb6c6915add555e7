"""How one group's gradients cross the replicas: every step, every few steps, or never.

A reduction says what it sends (`messages`), what it keeps on each replica (`state`) and what it does (`reduce`, a
generator that yields the requests of `wire` and returns the result). Those that compress are in `compression`.
"""

import dataclasses
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from dist_partial.distributed.collectives import Gather, Sum, Wire, together
from dist_partial.errors import UserError
from dist_partial.selection.payload import Message, itemsize
from dist_partial.selection.plan import Plan

Exchange = Generator[Sum | Gather, tf.Tensor, tf.Tensor]


class Reduction(Protocol):
    """What a rule's `reduction` has to offer.

    Attributes:
        shared: whether all replicas have the same bits after each step.
    """

    @property
    def shared(self) -> bool: ...

    def messages(self, shape: Sequence[int], dtype: str) -> tuple[Message, ...]:
        """What one replica sends for one gradient of `shape` and `dtype`."""

    def state(self, path: str, shape: Sequence[int], dtype: str) -> dict[str, np.ndarray]:
        """First values of what each replica keeps for one gradient, by name."""

    def reduce(self, value: tf.Tensor, state: dict[str, Any]) -> Exchange:
        """Yields requests and returns the sum of all replicas' `value`, or what stands for it; updates `state`."""


@dataclasses.dataclass(frozen=True)
class EveryStep:
    """Sum the gradients of all replicas in every step.

    Attributes:
        dtype: what goes on the wire: 'float32', 'bfloat16', 'float16', 'float64', or None for the
            gradient's own. The gradient is divided by the global batch before it is cast and summed, so
            that the sum does not overflow where the mean does not.
    """

    dtype: str | None = None

    def __post_init__(self) -> None:
        check_dtype("every_step.dtype", self.dtype)

    @property
    def shared(self) -> bool:
        return True

    def messages(self, shape: Sequence[int], dtype: str) -> tuple[Message, ...]:
        return (Message("sum", math.prod(shape) * itemsize(self.dtype or dtype)),)

    def state(self, path: str, shape: Sequence[int], dtype: str) -> dict[str, np.ndarray]:
        return {}

    def reduce(self, value: tf.Tensor, state: dict[str, Any]) -> Exchange:
        total = yield Sum(tf.cast(value, self.dtype or value.dtype))
        return tf.cast(total, value.dtype)

    def __str__(self) -> str:
        return f"every step, {self.dtype}" if self.dtype else "every step"


@dataclasses.dataclass(frozen=True)
class Never:
    """Each replica trains variables of its own, by the gradients of its own examples; nothing is sent.

    Each replica is evaluated with its own, and all of them are saved.
    """

    @property
    def shared(self) -> bool:
        return False

    def messages(self, shape: Sequence[int], dtype: str) -> tuple[Message, ...]:
        return ()

    def state(self, path: str, shape: Sequence[int], dtype: str) -> dict[str, np.ndarray]:
        return {}

    def reduce(self, value: tf.Tensor, state: dict[str, Any]) -> Exchange:
        return _own(value)

    def __str__(self) -> str:
        return "never"


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
        return _own(value)

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


def reduce(
    wire: Wire,
    plan: Plan,
    gradients: Sequence[tf.Tensor | None],
    states: Sequence[dict[str, Any]],
    statistics: Sequence[tf.Tensor] = (),
) -> tuple[list[tf.Tensor | None], list[tf.Tensor]]:
    """Reduces each gradient by its rule's reduction, all of them together in packs.

    Called in a replica context.

    Args:
        wire: how replicas reach each other.
        plan: what travels, and how.
        gradients: in the order of `plan.trained`, divided by the global batch; None stays None and sends nothing.
        states: what each reduction keeps, in the same order; from `states`.
        statistics: tensors to be averaged, which travel in the same packs.

    Returns:
        The sums and the averages, in the shapes and dtypes they came in: the same bits on every replica, except
        where a reduction is not `shared`.
    """
    trained = plan.trained
    # Backprop produces the last layers' gradients first: they go first, while the rest is still computed.
    members = [i for i in reversed(range(len(gradients))) if gradients[i] is not None]
    exchanges = [trained[i].reduction.reduce(gradients[i], states[i]) for i in members]
    results = together(wire, [*exchanges, *map(mean, statistics)])
    reduced: list[tf.Tensor | None] = [None] * len(gradients)
    for i, result in zip(members, results, strict=False):
        reduced[i] = result
    return reduced, results[len(members) :]


def states(plan: Plan) -> list[dict[str, tf.Variable]]:
    """Makes what the reductions keep on each replica, in the order of `plan.trained`; called in the scope."""
    return [
        {
            name: tf.Variable(
                value,
                trainable=False,
                name=name,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.NONE,
            )
            for name, value in entry.reduction.state(entry.path, entry.trained_shape, entry.dtype).items()
        }
        for entry in plan.trained
    ]


def mean(value: tf.Tensor) -> Exchange:
    """Asks for the mean of a tensor over all replicas."""
    context: Any = tf.distribute.get_replica_context()
    return (yield Sum(value / context.num_replicas_in_sync))


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


def check_dtype(name: str, dtype: str | None) -> None:
    """Raises UserError, which names the binding, if gradients cannot travel in this dtype."""
    if dtype not in (None, "float64", "float32", "bfloat16", "float16"):
        raise UserError(f"{name} is {dtype!r}: write 'float32', 'bfloat16', 'float16' or None")


def _own(gradient: tf.Tensor) -> Exchange:
    # It was divided by the global batch, and stands for the mean over this replica's part of it.
    context: Any = tf.distribute.get_replica_context()
    return gradient * context.num_replicas_in_sync
    yield  # a generator that asks for nothing
