"""The compiled exchanges of groups that train by themselves for some steps, and those that travel meanwhile."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.distributed import traffic
from dist_partial.distributed.backend import Backend
from dist_partial.distributed.collectives import Collectives
from dist_partial.distributed.worker_backend import WorkerBackend
from dist_partial.selection.plan import Plan
from dist_partial.step import outer_step
from dist_partial.step.outer_step import ExchangeSpec, Fragment


@dataclasses.dataclass(frozen=True, eq=False)
class Flight:
    """Holds the three functions of an exchange that travels while steps are made.

    Attributes:
        begin: notes what is sent.
        travel: sends it, in a thread where there is one.
        arrive: applies what has come.
        thread: runs one flight after the other, in the order in which they begin, which is that of all workers; None
            where functions that exchange must not run beside each other: then it travels as soon as it begins.
    """

    begin: functools.partial[None]
    travel: functools.partial[None]
    arrive: functools.partial[None]
    thread: concurrent.futures.Executor | None


@dataclasses.dataclass(eq=False)
class Exchange:
    """Holds the compiled exchange of one fragment, and knows when it is due.

    Attributes:
        fragment: what is exchanged.
        function: makes one exchange at once, after which all replicas have the same bits of it.
        sent: what one replica hands over each time.
        flight: for a fragment with a delay.
    """

    fragment: Fragment
    function: Callable[[], None]
    sent: list[traffic.Collective]
    flight: Flight | None = None
    _travelling: concurrent.futures.Future[None] | None = None

    def due(self, step: int) -> bool:
        """Tells whether an exchange begins after `step`, counted from 1."""
        return self.fragment.reduction.due(step)

    def next_due(self, step: int) -> int:
        """Gives the first step after `step` after which an exchange begins, or one that has travelled is applied."""
        reduction = self.fragment.reduction
        return min(reduction.next_due(step), reduction.next_arrival(step) or reduction.next_due(step))

    def apply(self, step: int) -> None:
        """Applies after `step` what has travelled until then, if an exchange has; waits until it is there."""
        if self.flight is not None and self.fragment.reduction.arrives(step):
            self.join()
            self.flight.arrive()

    def begin(self, step: int) -> None:
        """Begins the exchange that is due after `step`; without a delay it is made at once."""
        if self.flight is None or not self.fragment.reduction.delayed(step):
            self.function()
            return
        self.flight.begin()
        if self.flight.thread is None:
            self.flight.travel()
        else:
            self._travelling = self.flight.thread.submit(self.flight.travel)

    def join(self) -> None:
        """Waits until nothing travels: what is kept for the next steps is then complete."""
        if self._travelling is not None:
            self._travelling.result()
            self._travelling = None


def compiled_exchanges(
    strategy: tf.distribute.Strategy,
    collectives: Collectives,
    plan: Plan,
    fragments: Sequence[Fragment],
    without_gradient: Sequence[str],
    statistics: Sequence[Any],
) -> list[Exchange]:
    """Compiles the exchanges of all fragments.

    Args:
        strategy: the replicas.
        collectives: how they reach each other.
        plan: the plan.
        fragments: from `build`.
        without_gradient: paths on which the loss does not depend: they do not move.
        statistics: variables that are to be averaged; where no group is shared in every step, which would take them
            along, the first fragment does.

    Examples:
        >>> import keras
        >>> from dist_partial.reductions import LocalSGD
        >>> from dist_partial.reductions.reduce_gradients import make_states
        >>> from dist_partial.selection import resolve
        >>> from dist_partial.step import optimizers
        >>> model = keras.Sequential([keras.Input([1]), keras.layers.Dense(2)])
        >>> plan = resolve([("train", ".*/bias"), ("freeze", ".*")], model, LocalSGD(sync_every=10))
        >>> fragments = outer_step.build(plan, optimizers.build(plan, keras.optimizers.SGD), make_states(plan))
        >>> [each] = compiled_exchanges(tf.distribute.get_strategy(), Collectives(), plan, fragments, [], [])
        >>> _ = model.layers[0].bias.assign([1.0, 2.0])
        >>> each.function()
        >>> fragments[0].outer.members[0].variable.numpy().tolist(), each.next_due(10)
        ([1.0, 2.0], 20)
    """
    shared = any(group.reduction.shared for group in plan.groups)
    beside = _beside(collectives.backend) if any(fragment.reduction.delay for fragment in fragments) else None
    thread = concurrent.futures.ThreadPoolExecutor(1, "exchange") if beside else None
    found = []
    for i, fragment in enumerate(fragments):
        moved = [n for n, member in enumerate(fragment.members) if member.entry.path not in without_gradient]
        assert len(moved) == len(fragment.members) or not fragment.reduction.divided  # one layout for all
        spec = ExchangeSpec(strategy, collectives, fragment, moved, [] if shared or i else statistics)
        flight = _flight(spec, beside, thread) if fragment.reduction.delay else None
        parts = [flight.begin, flight.travel, flight.arrive] if flight else [_compiled(outer_step.exchange, spec)]
        sent = [call for part in parts for call in traffic.in_call(part.func)]
        found.append(Exchange(fragment, functools.partial(_one_after_the_other, parts), sent, flight))
    return found


def _one_after_the_other(parts: Sequence[Callable[[], None]]) -> None:
    for part in parts:
        part()


def _beside(backend: Backend) -> WorkerBackend | None:
    """The backend, if exchanges may travel beside steps: on all workers alike, or they would wait in different calls.

    Of TensorFlow's threads one is taken by what waits there, so that it must have another one.
    """
    if not (backend.concurrent and isinstance(backend, WorkerBackend)):
        return None
    bound = tf.config.threading.get_inter_op_parallelism_threads() or int(os.environ.get("TF_NUM_INTEROP_THREADS", 0))
    several = (bound or len(os.sched_getaffinity(0))) > 1
    return backend if int(backend.sum(np.array([several], np.int64))[0]) == backend.size else None


def _compiled(what: Callable[[ExchangeSpec], None], spec: ExchangeSpec) -> functools.partial[None]:
    """Traces and optimizes now what is called first after many steps, which would otherwise wait for it.

    TensorFlow optimizes a graph when it is first called; hence the branch that does nothing.
    """

    def either(makes: tf.Tensor) -> None:
        tf.cond(makes, lambda: what(spec), lambda: None)

    concrete = tf.function(either, autograph=False).get_concrete_function(tf.TensorSpec([], tf.bool))
    concrete(tf.constant(False))
    return functools.partial(concrete, tf.constant(True))


def _flight(spec: ExchangeSpec, beside: WorkerBackend | None, thread: concurrent.futures.Executor | None) -> Flight:
    begin = _compiled(outer_step.begin, spec)
    # Without a thread all wait where it travels, as in a step, and one that has gone on is named.
    with beside.traced_apart() if beside else contextlib.nullcontext():
        travel = _compiled(outer_step.travel, spec)
    return Flight(begin, travel, _compiled(outer_step.arrive, spec), thread)
