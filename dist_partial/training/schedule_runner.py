"""Follows the schedule through a run: which selection is trained now, each compiled once, and what it reads."""

import collections
import dataclasses
import functools
import gc
import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial import reductions
from dist_partial.data import started, train_indices
from dist_partial.distributed import consistency, traffic
from dist_partial.errors import UserError
from dist_partial.schedules.base import observes
from dist_partial.schedules.budget import Budget
from dist_partial.schedules.fixed import Constant
from dist_partial.selection.payload import average_bytes
from dist_partial.selection.plan import Plan
from dist_partial.selection.table import trained_layers
from dist_partial.step import batch_norm
from dist_partial.step.exchanges import Exchange, compiled_exchanges
from dist_partial.step.flops import flops
from dist_partial.step.layer_state import untouched
from dist_partial.step.objective import Batch
from dist_partial.step.probe import ProbeSpec, probe
from dist_partial.step.train_step import TrainStep
from dist_partial.training import activation_cache, split_model
from dist_partial.training.build import Trainer, batches, compiled_step, order
from dist_partial.training.metric_writer import MetricWriter
from dist_partial.training.progress import Progress
from dist_partial.training.state import TrainState
from dist_partial.validation import counted


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledPhase:
    """Holds one selection, compiled.

    Attributes:
        units: names of the units that are trained.
        plan: what is trained, with what tracing has shown of it.
        train: the compiled step.
        sent: what it hands over.
        flops: what a worker computes in a step, from `flops`; None if it is not known.
        exchanges: of the fragments that are exchanged every few steps.
        activations: what it reads in place of examples, or None.
    """

    units: frozenset[str]
    plan: Plan
    train: TrainStep
    sent: list[traffic.Collective]
    flops: int | None
    exchanges: list[Exchange]
    activations: activation_cache.Activations | None

    @property
    def digest(self) -> str:
        """Tells selections apart: SHA-256 of what is trained and how it travels, the first 16 hex digits."""
        what = [(entry.path, entry.travels(self.plan.peers(entry))) for entry in self.plan.trained]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


_Key = tuple[frozenset[str], activation_cache.Activations | None]  # of what is compiled

Trace = Callable[[], Any]  # traces a step, as it will read batches


class ScheduleRunner:
    """Follows the schedule of a run.

    Attributes:
        trainer: what the run computes with.
        switched: whether the last `enter` changed the selection.
        notes: lines that the user should read, until `report` writes them.

    Args:
        trainer: what the run computes with.
        state: from which the run goes on.
        progress: says what is compiled; None says nothing.
    """

    def __init__(self, trainer: Trainer, state: TrainState, progress: Progress | None = None) -> None:
        self.trainer, self._settings = trainer, trainer.settings
        self._progress = progress or Progress(active=False)
        self._phases: collections.OrderedDict[_Key, CompiledPhase] = collections.OrderedDict()
        self._kept: dict[frozenset[str], activation_cache.Activations | None] = {}
        self._probe: Any = None
        self.notes: list[str] = []
        self.go_to(state)

    def go_to(self, state: TrainState) -> None:
        """Follows the schedule from a state on; what is compiled stays so, until `enter` asks for something else."""
        saved = state.schedule or {}
        self._state = saved.get("state", self.trainer.schedule.initial(self.trainer.units))
        if self._budget is not None:
            self._state = self._budget.begun(self._state, self._settings.steps)
        self._active = frozenset(saved["active"]) if saved.get("active") is not None else None
        self._squares = np.array(saved.get("squares", [0.0] * len(self.trainer.units)))
        self._phase: CompiledPhase | None = None
        self._said = False  # that the time cannot be held
        # With which a step was made since then: a worker that has just come has made none with any.
        self._made: set[_Key] = set()
        self._fresh = not self._phases  # until a step was made with the phase
        self._reading: activation_cache.Activations | None = None
        # From which step on the activations up to which layer are read.
        self._since: dict[str, int] = saved.get("since", {})
        self._inputs = batches(self.trainer, state.step, self._settings.global_batch)
        self._indices: Iterator[tf.Tensor] | None = None
        self.switched = False

    def prepare(self) -> Iterator[Trace]:
        """Compiles, as `enter` does, all that is known to come, before this worker has met others."""
        yield from self._ahead(0)
        if self._constant and self._settings.steps_per_loop > 1:
            for phase in self._phases.values():  # TensorFlow optimises a graph when it first runs
                phase.train.function(self._inputs, tf.constant(0))

    def to_json(self) -> dict[str, Any] | None:
        """What a run needs to go on exactly from here, as JSON values; None for a constant schedule.

        The groups of which there are slots are among it.
        """
        if self._constant:
            return None
        return {
            "state": self._state,
            "active": None if self._active is None else sorted(self._active),
            "squares": self._squares.tolist(),
            "since": self._since,
            "allocated": [number for number, group in enumerate(self.trainer.optimizers) if group.state],
        }

    @property
    def compiles(self) -> bool:
        """Whether the next call is the first of what is trained now, in which TensorFlow, or XLA, still compiles."""
        return self._fresh

    @property
    def _constant(self) -> bool:
        return isinstance(self.trainer.schedule, Constant)

    @property
    def _budget(self) -> Budget | None:
        return self.trainer.schedule if isinstance(self.trainer.schedule, Budget) else None

    @property
    def phase(self) -> CompiledPhase:
        """What is trained now; there is none before the first `enter`."""
        assert self._phase is not None
        return self._phase

    @property
    def exchanges(self) -> Sequence[Exchange]:
        """Of the fragments that are exchanged every few steps, if anything was trained since `go_to`."""
        return () if self._phase is None else self._phase.exchanges

    @property
    def plan(self) -> Plan:
        """What the run trains: with what tracing has shown, if that is one selection."""
        return self.phase.plan if self._constant else self.trainer.plan

    def next_due(self, step: int) -> int:
        """Gives the first step after `step` that a switch to another selection may follow, or the end."""
        switch = self.trainer.schedule.next_switch(step)
        if not self._timed:
            return step + 1
        return self._settings.steps if switch is None else switch

    @property
    def _timed(self) -> bool:
        """Whether the time of a call counts: not of a first step, a call by itself, for XLA compiles in it."""
        timing = self._budget is not None and self._budget.seconds is not None
        return not timing or self._phase is None or _key(self._phase) in self._made

    def enter(self, done: int) -> Iterator[Trace]:
        """Makes `phase` what the step after `done` steps trains; all workers call it at the same steps.

        Yields:
            What traces each step that is not compiled yet, for the caller to call before it goes on: the first time
            also those of all later selections, where they are known and few enough to be kept.
        """
        if not self._phases:
            yield from self._ahead(done)
        schedule, trainer = self.trainer.schedule, self.trainer
        backend = trainer.replicas.backend
        if observes(schedule, done) or (self._budget is not None and self._budget.outdated(trainer.units, self._state)):
            self._observe(done)
        units, remaining = self._selected(done)
        self.switched = units != self._active
        self._fresh |= self.switched
        if backend is not None and (self._phase is None or schedule.next_switch(done - 1) == done):
            # Before anything is traced: workers that disagree would wait for each other in different functions.
            consistency.check(backend, {f"what is trained from step {done + 1} on": sorted(units)})
        activations = self._activations(remaining, done)
        if self._active is not None and self.switched:
            self._leave(self._active - units)
        phase = self._phase = yield from self._found(units, activations, done)
        self._active = units
        if phase.activations is not self._reading:
            for known in [known for known in self._phases if known[1] is self._reading]:
                self._drop(known)  # what is frozen for good does not come back
            self._kept = {of: kept for of, kept in self._kept.items() if kept is not self._reading}
            self._reading, self._inputs = phase.activations, self._batches(phase.activations, done)
            kept = phase.activations
            self._since = {kept.name: self._begun(kept.name, done)} if kept else {}  # which reads the old one
            if kept:
                self.notes.append(
                    f"run.activation_cache keeps the activations up to {kept.name!r}, at most {kept.bytes:,} bytes"
                )
            self._indices = iter(self._order(done)) if kept else None

    def report(self, writer: MetricWriter, done: int) -> None:
        """Records a switch after `done` steps, and the notes."""
        if self.switched and not self._constant:
            writer.plan(done + 1, self.phase.plan, self.phase.digest)
        while self.notes:
            writer.say(self.notes.pop(0))

    def opening_notes(self) -> Iterator[str]:
        """Lines that the user should read before the first step of this process."""
        steps = self._settings.steps
        if self.phase.train.without_gradient:
            yield f"selected, but the loss does not depend on it: {', '.join(self.phase.train.without_gradient)}"
        for exchange in self.phase.exchanges:
            local = exchange.fragment.reduction
            last = local.last_applied(steps)
            if last != steps:
                yield (
                    f"{local}: the last exchange that is applied follows step {last} of {steps}; what replicas "
                    "train after it is not in the weights on which they agree"
                    if last > 0
                    else f"{local}: run.steps = {steps} ends before the first exchange is applied"
                )
        if self.plan.statistics:
            objective = self.trainer.objective
            kinds = {
                "outputs of the whole batch for run.loss": objective.coupled,
                "divisors of the loss": objective.counts and not objective.coupled,
                "running statistics of layers": self.trainer.averaged,
            }
            what = ", ".join(kind for kind, found in kinds.items() if found)
            yield f"{what} add {average_bytes(self.plan.statistics):,} bytes a step to the payload"
        if self._settings.activation_cache and self.phase.activations is None:
            yield "run.activation_cache keeps nothing yet: nothing below all that may be trained is frozen for good"

    def closing_notes(self, done: int) -> list[str]:
        """Lines that the user should read after the last step of this process."""
        return [] if self._budget is None else self._budget.summary(self.trainer.units, self._state, done)

    def advance(self, count: int) -> dict[str, tf.Tensor]:
        """Makes so many steps of the current phase; returns what its `train` does."""
        if self._reading is not None and self._indices is not None:
            for _ in range(count):
                self._reading.fill(next(self._indices).numpy())
        if self._fresh:
            what = "XLA compiles it" if self._settings.jit_compile else "TensorFlow optimizes its graph"
            self._progress.begin(f"making the first step{'' if self._constant else ' of the selection'}: {what}")
        began, timed = time.perf_counter(), self._timed
        result = self.phase.train.function(self._inputs, tf.constant(count))
        self._fresh = False
        self._progress.end()
        if self.trainer.schedule.statistics == "norms":
            squares = result["unit_norms"].numpy().astype(np.float64).sum(axis=0)
            places = {unit.name: i for i, unit in enumerate(self.trainer.units)}
            for name, square in zip(self.phase.plan.units, squares, strict=True):
                self._squares[places[name]] += square
        if self._budget is not None:
            result["loss"].numpy()  # a GPU goes on computing after the call
            seconds = time.perf_counter() - began if timed else None
            self._state = self._budget.spent(self._state, count, self.phase.plan.nic_bytes, seconds)
            self._made.add(_key(self.phase))
        return result

    def _observe(self, done: int) -> None:
        """Gives the schedule what was measured since it was asked last, the same on all workers."""
        schedule, trainer = self.trainer.schedule, self.trainer
        squares, backend = self._squares, trainer.replicas.backend
        if schedule.statistics == "probe":
            squares = self._probed(done)
        elif schedule.statistics == "norms" and backend is not None:
            # Workers on processors of another make could round their norms otherwise, and freeze something else.
            squares = trainer.replicas.sum(squares.astype(np.float32)) / backend.size
        if self._budget is not None and self._budget.seconds is not None:
            replicas = trainer.replicas
            self._state = self._budget.agreed(self._state, lambda own: float(replicas.sum(own)) / replicas.workers)
        self._state = schedule.observe(done, trainer.units, squares, self._state)
        self._squares = np.zeros_like(self._squares)
        if self._budget is not None and (late := self._budget.notes(trainer.units, self._state)) and not self._said:
            self._said = True
            self.notes += late

    def _selected(self, done: int) -> tuple[frozenset[str], frozenset[str]]:
        """Names of the units that are trained at a step, and of those that may be trained from it on."""
        schedule, units = self.trainer.schedule, self.trainer.units
        return (
            schedule.select(done, units, self._settings.seed, self._state),
            schedule.remaining(done, units, self._state),
        )

    def _ahead(self, done: int) -> Iterator[Trace]:
        """Compiles all selections that are still to come, where they are known and few enough to be kept."""
        schedule, settings = self.trainer.schedule, self._settings
        if schedule.statistics is not None or settings.leave == "drop":
            return
        ahead: dict[tuple[frozenset[str], frozenset[str]], None] = {}
        switch: int | None = done
        while switch is not None and switch < settings.steps and len(ahead) <= settings.compiled_plans:
            ahead[self._selected(switch)] = None
            switch = schedule.next_switch(switch)
        if len(ahead) <= settings.compiled_plans:
            for number, (units, remaining) in enumerate(ahead, 1):
                which = f"selection {number} of {len(ahead)}" if len(ahead) > 1 else "the step"
                yield from self._found(units, self._activations(remaining, done), done, which)

    def _found(
        self,
        units: frozenset[str],
        activations: activation_cache.Activations | None,
        done: int,
        which: str = "the next selection",
    ) -> Generator[Trace, None, CompiledPhase]:
        key = units, activations
        if key not in self._phases:
            plan = self.trainer.plan.only(units)
            variables = f"{counted(len(plan.trained), 'variable')} of {trained_layers(plan)}"
            self._progress.begin(f"compiling {which}: {variables}")
            with self.trainer.replicas.tracing(_name(key)):
                self._phases[key] = yield from self._compiled(plan, activations, done)
            self._progress.end()
        self._phases.move_to_end(key)
        while len(self._phases) > self._settings.compiled_plans:
            self._drop(next(iter(self._phases)))
        return self._phases[key]

    def _drop(self, key: _Key) -> None:
        del self._phases[key]
        self._made.discard(key)
        self.trainer.replicas.forget(_name(key))

    def _activations(self, remaining: frozenset[str], done: int) -> activation_cache.Activations | None:
        """Of what lies below all that may still be trained; None if they are not to be kept."""
        trainer, settings = self.trainer, self._settings
        if settings.activation_cache is None:
            return None
        if remaining not in self._kept:
            # The layers of what is frozen for good run in inference mode from here on.
            later = trainer.plan.only(remaining)
            batch_norm.set_modes(trainer.batch_norms, later, everywhere=settings.statistics == "all")
            known = {kept.name: kept for kept in self._kept.values() if kept is not None}
            part = None
            try:
                changing = [*(entry.variable for entry in later.trained), *trainer.moving]
                part = split_model.split(trainer.model, changing)
                if part is not None and part.name not in known:
                    known[part.name] = self._kept_from(part, settings.activation_cache, done)
            except UserError as error:
                if not done:
                    raise
                self.notes.append(f"{error}; going on without it")
                part = None
            self._kept[remaining] = None if part is None else known[part.name]
        return self._kept[remaining]

    def _kept_from(self, part: split_model.SplitModel, where: str, done: int) -> activation_cache.Activations:
        trainer, settings = self.trainer, self._settings
        context = trainer.replicas.topology.input_context
        rows = settings.global_batch // context.num_replicas_in_sync // settings.accumulate
        begun = self._begun(part.name, done)
        read = settings.global_batch // context.num_input_pipelines * (settings.steps - begun)
        past = self._order(begun).take(done - begun)
        return activation_cache.Activations(
            trainer.data.train,
            part,
            rows,
            expected=min(len(trainer.data.train), read),
            where=where,
            past=(batch for indices in past for batch in indices.numpy().reshape(-1, rows)),
        )

    def _begun(self, name: str, done: int) -> int:
        """From which step on the activations up to a layer are read, `done` steps having been made."""
        return 0 if self._constant else self._since.get(name, done)

    def _batches(self, activations: activation_cache.Activations | None, done: int) -> Iterator[Batch]:
        # Not prefetched: what was read before it was asked for might not be there yet.
        return started(self._order(done).map(activations.read)) if activations else self._inputs

    def _order(self, done: int) -> tf.data.Dataset:
        """Indices of this worker's examples, from a step on."""
        at = order(self.trainer, done, self._settings.global_batch)
        return train_indices(len(self.trainer.data.train), **at)

    def _compiled(
        self, plan: Plan, activations: activation_cache.Activations | None, done: int
    ) -> Generator[Trace, None, CompiledPhase]:
        trainer, settings = self.trainer, self._settings
        strategy, collectives = trainer.replicas.strategy, trainer.replicas.collectives
        units = frozenset(plan.units)
        with strategy.scope():
            for planned, group in zip(trainer.plan.groups, trainer.optimizers, strict=True):
                if planned.entries[0].unit in units:
                    group.allocate()
        loop = settings.steps_per_loop > 1 or not self._constant  # a selection that comes later is compiled by no step
        train = compiled_step(
            trainer,
            plan,
            norms=trainer.schedule.statistics == "norms",
            outputs=activations.outputs if activations else None,
            loop=loop,
        )
        inputs = self._batches(activations, done)
        # By the caller: the way from the command to the gradient is then the loop's file and that of the step.
        yield functools.partial(train.function.get_concrete_function, inputs, tf.constant(1))
        traced = train.function.get_concrete_function(inputs, tf.constant(1))
        sent, computed = traffic.in_step(traced, loop), flops(traced, loop)
        averaged = trainer.averaged
        exchanges = compiled_exchanges(strategy, collectives, plan, trainer.fragments, train.without_gradient, averaged)
        plan = plan.traced(train.without_gradient, reductions.averages(plan, averaged), train.looked_up)
        if trainer.replicas.topology.replicas > 1:  # or else nothing is sent
            plan = plan.traced(
                train.without_gradient, traffic.beyond(plan, sent, exchanges, collectives.backend.two_levels)
            )
        if self._budget is not None:
            self._budget.check_sent(trainer.units, units, plan.nic_bytes)
        if not self._constant:
            train.function(inputs, tf.constant(0))  # TensorFlow optimises a graph when it first runs
        return CompiledPhase(units, plan, train, sent, computed, exchanges, activations)

    def _leave(self, units: frozenset[str]) -> None:
        """Keeps, resets or drops the slots of what is no longer trained."""
        if self._settings.leave == "keep":
            return
        self._phase = None
        with self.trainer.replicas.strategy.scope():
            for planned, group in zip(self.trainer.plan.groups, self.trainer.optimizers, strict=True):
                if planned.entries[0].unit in units:
                    group.reset() if self._settings.leave == "reset" else group.drop()
        if self._settings.leave == "drop":
            for known in [known for known in self._phases if known[0] & units]:
                self._drop(known)
            gc.collect()  # a function and its graph refer to each other

    def _probed(self, done: int) -> np.ndarray:
        """The squared gradient norms of all units on the batch that comes next, summed over the replicas."""
        trainer, settings = self.trainer, self._settings
        if self._probe is None:
            parts = settings.accumulate
            self._probe = probe(
                ProbeSpec(trainer.replicas.strategy, trainer.model, trainer.objective, trainer.plan, parts)
            )
        ahead: Iterator[Batch] = batches(trainer, done, settings.global_batch)
        with untouched(trainer.replicas.strategy, trainer.layer_state.states), trainer.replicas.tracing("probe"):
            local = self._probe(ahead).numpy()
        squares = dict(zip(trainer.plan.units, trainer.replicas.sum(local), strict=True))
        return np.array([squares[unit.name] for unit in trainer.units], np.float64)


def _key(phase: CompiledPhase) -> _Key:
    return phase.units, phase.activations


def _name(key: _Key) -> str:
    """What workers call what is compiled: the same on all."""
    units, activations = key
    return f"{sorted(units)} above {activations and activations.name}"
