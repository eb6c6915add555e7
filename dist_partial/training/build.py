"""Builds everything that a run computes with from its settings, and restores it from its folder."""

import collections
import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from dist_partial import checkpoints, reductions, selection, session
from dist_partial.adapters import lora, quantization
from dist_partial.checkpoints import fingerprints
from dist_partial.config.settings import Settings
from dist_partial.data import Dataset, check_source, class_weighted, dataset, started, train_batches, without_lists
from dist_partial.data.repeats import notes_on_repeats
from dist_partial.distributed import consistency
from dist_partial.distributed.replicas import Replicas
from dist_partial.errors import UserError, calling
from dist_partial.reductions.reduce_gradients import make_states
from dist_partial.schedules.base import Partition, Schedule, Unit
from dist_partial.schedules.fixed import Constant
from dist_partial.selection.payload import average_bytes, itemsize
from dist_partial.step import batch_norm, layer_state, optimizers, outer_step
from dist_partial.step.loss_scale import LossScale, needs_loss_scale
from dist_partial.step.objective import Batch, Objective
from dist_partial.step.train_step import StepOptions, StepSpec, TrainStep, train_step
from dist_partial.training import run_fingerprint
from dist_partial.training.activation_cache import check_cached
from dist_partial.training.batch_coupling import coupling_notes
from dist_partial.training.checks import (
    check_added,
    check_batch,
    check_levels,
    check_scaled,
    divided_objective,
    prefetching_device,
)
from dist_partial.training.loss_and_metrics import make_objective, notes_on
from dist_partial.training.model import make_model, taking, with_compiled
from dist_partial.training.state import TrainState
from dist_partial.validation import counted


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trainer:
    """Holds everything that a run computes with, made from its settings in one strategy's scope.

    Attributes:
        settings: what to do.
        replicas: what computes, and how workers reach each other.
        data: the data set.
        model: the model.
        objective: its loss and metrics.
        plan: all that is ever trained.
        optimizers: one a group of the plan.
        reduction_states: what the reductions keep, in the order of `plan.trained`.
        fragments: what is exchanged every few steps.
        scale: the loss scale, or None.
        units: what the schedule switches.
        batch_norms: layers whose mode depends on what is trained.
        layer_state: what layers change in a step.
        fingerprint: what must not change under a run folder.
        notes: lines that the user should read.

    Examples:
        >>> from dist_partial.data import stdlib_shapes
        >>> from dist_partial.distributed.replicas import create
        >>> from dist_partial.models import two_dense
        >>> settings = Settings([("train", "dense2/bias"), ("freeze", ".*")], two_dense, stdlib_shapes)
        >>> list(build(settings, create("default")).state().variables)[0]
        'variables/dense2/bias'
    """

    settings: Settings
    replicas: Replicas
    data: Dataset
    model: keras.Model
    objective: Objective
    plan: selection.Plan
    optimizers: tuple[optimizers.GroupOptimizer, ...]
    reduction_states: list[dict[str, tf.Variable]]
    fragments: tuple[outer_step.Fragment, ...]
    scale: LossScale | None
    units: tuple[Unit, ...]
    batch_norms: list[keras.layers.BatchNormalization]
    layer_state: layer_state.LayerState
    fingerprint: dict[str, Any]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        trained, count = len(self.plan.trained), self.replicas.topology.replicas
        variables = f"{trained} of {len(self.plan.entries)} variables"
        return f"Trainer({self.model.name!r}, {variables}, {self.data!r}, {counted(count, 'replica')})"

    def state(self) -> TrainState:
        """The state before the first step; its variables are the live ones."""
        return TrainState(
            self.replicas.topology,
            self.model,
            self.plan,
            self.optimizers,
            self.reduction_states,
            self.fragments,
            self.layer_state.moving,
            self.scale,
        )

    @property
    def schedule(self) -> Schedule:
        """What is trained when."""
        return self.settings.schedule

    @property
    def moving(self) -> list[Any]:
        """What layers change in a step, in the modes that they are in now."""
        asleep = {id(v) for layer in self.batch_norms if not layer.trainable for v in layer.variables}
        return [variable for variable in self.layer_state.moving if id(variable) not in asleep]

    @property
    def averaged(self) -> list[Any]:
        """Variables that layers change in a step and replicas average, in the modes that the layers are in now."""
        return [*batch_norm.local_statistics(self.model), *self.layer_state.averaged]


def build(settings: Settings, replicas: Replicas) -> Trainer:
    """Builds data, model, plan and optimizers; reads and writes nothing of the run folder.

    Sets Keras's precision and all random seeds to the run's; `session.put_back` around it undoes the former.

    Raises:
        UserError: every mistake in the rules, the factories or the data.

    Examples:
        >>> from dist_partial.data import stdlib_shapes
        >>> from dist_partial.distributed.replicas import create
        >>> from dist_partial.models import two_dense
        >>> settings = Settings([("train", "dense2/.*"), ("freeze", ".*")], two_dense, stdlib_shapes)
        >>> trainer = build(settings, create("default"))
        >>> trainer.units[0].paths, trainer.plan.wire_bytes
        (('dense2/kernel', 'dense2/bias'), 2600)
    """
    keras.config.set_floatx("float64" if settings.precision == "float64" else "float32")
    keras.config.set_dtype_policy(settings.precision)
    with session.numbered_afresh(settings.data, settings.model):
        return _build(settings, replicas)


def _data(settings: Settings) -> Dataset:
    with calling("run.data"):
        data = dataset(settings.data, name=getattr(settings.data, "__name__", "data"))  # not what it makes: see Stream
        for name in ("train", "evaluation"):
            check_source(f"{name} of {data.name}", getattr(data, name))
        if settings.class_weight:
            data = dataclasses.replace(data, train=class_weighted(data.train, settings.class_weight))
        if settings.activation_cache:
            check_cached(data.train)
    return data


def _plan(settings: Settings, model: keras.Model, replicas: Replicas) -> selection.Plan:
    """The rules resolved against the model, which gets the LoRA factors that they ask for."""
    adapters = lora.enable(settings.rules, model, settings.seed)
    plan = selection.resolve(settings.rules, model, settings.reduction, adapters, settings.between_hosts)
    check_levels(plan, replicas)
    return plan.among(replicas.collectives)


def _build(settings: Settings, replicas: Replicas) -> Trainer:
    data = _data(settings)
    strategy, topology, spec = replicas.strategy, replicas.topology, without_lists(data.train.spec)
    with strategy.scope():
        keras.utils.set_random_seed(settings.seed)
        with calling("run.model"):
            model, examples, outputs = make_model(settings, data, strategy)
            settings, compiled = with_compiled(settings)
            check_added(model, topology)
            if fixed := layer_state.batch_size(model):
                check_batch(fixed, model, settings, data, topology)
        batch_norms = batch_norm.layers(model)
        plan = quantization.lower(_plan(settings, model, replicas), model, settings.frozen_dtype)
        plan, parts = _divided(plan, settings)
        batch_norm.set_modes(batch_norms, plan, everywhere=settings.statistics == "all")
        objective, divided = make_objective(settings, data, model, examples, outputs)
        objective = divided_objective(objective, settings, plan, topology, data.train)
        with calling("run.model"), taking(data.name, spec[0]):
            changed = layer_state.find(model, spec, plan, objective)
        averaged = [*batch_norm.local_statistics(model), *changed.averaged]
        plan = dataclasses.replace(plan, statistics=reductions.averages(plan, averaged))
        with calling("run.optimizer"):
            at_once = isinstance(settings.schedule, Constant)
            groups = optimizers.build(plan, settings.optimizer, at_once, _elsewhere(plan, replicas))
            units = _units(plan, parts, settings, batch_norms)
        notes = settings.schedule.check(units, settings.steps)
        notes += coupling_notes(objective, data.train, topology.replicas, settings.accumulate)
        notes += notes_on_repeats(data)
        reduction_states = make_states(plan)
        fragments = outer_step.build(plan, groups, reduction_states)
        scale = LossScale() if needs_loss_scale(model) else None
    if scale is not None:
        check_scaled(plan, reduction_states)
    layer_state.spread(topology, changed.generators)
    notes += [*notes_on(divided), *compiled]
    optimizers_ = [*groups, *[fragment.outer for fragment in fragments]]
    return Trainer(
        settings=settings,
        replicas=replicas,
        data=data,
        model=model,
        objective=objective,
        plan=plan,
        optimizers=groups,
        reduction_states=reduction_states,
        fragments=fragments,
        scale=scale,
        units=units,
        batch_norms=batch_norms,
        layer_state=changed,
        fingerprint=run_fingerprint.of_run(settings, data, objective, plan, changed.moving, optimizers_),
        notes=tuple(notes),
    )


def _elsewhere(plan: selection.Plan, replicas: Replicas) -> set[str]:
    """Paths of what other workers update alone, where this one has a strategy of its own."""
    topology = replicas.topology
    if topology.strategy.num_replicas_in_sync != topology.local:
        return set()  # TensorFlow's own of all: what it makes is of one shape on all
    found: set[str] = set()
    for inside in {entry.inside is not None for entry in plan.trained if entry.dealt}:
        one = topology.hosts if inside else topology
        if one.local == 1:
            found |= plan.elsewhere(one.replicas, one.worker, inside)
    return found


def _divided(plan: selection.Plan, settings: Settings) -> tuple[selection.Plan, Partition]:
    """The plan in the units of the schedule, and those."""
    schedule = settings.schedule
    trained = [entry for entry in plan.entries if entry.trained]
    parts = schedule.partition([entry.path for entry in trained])
    plan = plan.divided(parts)
    for entry in () if isinstance(schedule, Constant) else trained:
        if any(payload.every > 1 for payload in plan.handed_over(entry)) or not entry.reduction.shared:
            raise UserError(
                "run.schedule switches what is reduced in every step, and "
                f"{type(entry.reduction).__name__} ({entry.reduction}) of rule {entry.rule.match!r} is not: give "
                "AllReduce(), PowerSGD(), TopK() or Quantized(), in a gin file @all_reduce() and so on"
            )
    return plan, parts


def _units(
    plan: selection.Plan,
    parts: Partition,
    settings: Settings,
    batch_norms: Sequence[keras.layers.BatchNormalization],
) -> tuple[Unit, ...]:
    """The units of the schedule, and what each costs."""
    trained = {entry.path: entry for entry in plan.trained}
    slots: collections.Counter[str] = collections.Counter()
    if getattr(settings.schedule, "memory", None) is not None:
        # All of them, as the owner of what is dealt out has: all workers must come to the same units.
        groups = optimizers.build(plan, settings.optimizer, slots=False)
        for planned, group in zip(plan.groups, groups, strict=True):
            group.allocate()  # one at a time: slots need not be as large as what they are for
            slots[planned.entries[0].unit] += sum(bytes_of(variable) for variable in group.state.values())
            group.drop()
    units = []
    for name, paths in parts:
        entries = [trained[path] for path in paths]
        variables = {id(entry.variable) for entry in entries}
        payloads = [payload for entry in entries for payload in plan.handed_over(entry)]
        # The statistics of a layer that trains travel, too.
        moving = [layer for layer in batch_norms if {id(layer.gamma), id(layer.beta)} & variables]
        payloads += reductions.averages(plan, batch_norm.unsynchronised_statistics(moving))
        gradients = sum(entry.trained_parameters * itemsize(entry.dtype) for entry in entries)
        kept, memory = kept_by_reductions(plan, entries), gradients
        if settings.leave == "drop":
            memory += slots[name]
        else:
            kept += slots[name]
        sent, parameters = average_bytes(payloads, plan.workers), sum(entry.trained_parameters for entry in entries)
        units.append(Unit(name, tuple(paths), math.ceil(sent), parameters, memory, kept))
    return tuple(units)


def bytes_of(variable: Any) -> int:
    """Counts the bytes of a variable on one replica.

    Examples:
        >>> bytes_of(keras.Variable([[1.0, 2.0]], dtype="float32"))
        8
    """
    return math.prod(variable.shape) * itemsize(getattr(variable.dtype, "name", str(variable.dtype)))


def kept_by_reductions(plan: selection.Plan, entries: Iterable[selection.VariablePlan]) -> int:
    """Counts the bytes that the reductions of some variables keep on each replica.

    Examples:
        >>> from dist_partial.reductions import PowerSGD
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([8]), keras.layers.Dense(64, use_bias=False, name="head")])
        >>> plan = resolve([("train", ".*")], model, PowerSGD(rank=1))
        >>> kept_by_reductions(plan, plan.trained) > 8 * 64 * 4  # a residual, and a factor
        True
    """
    states = [e.reduction.state(e.path, e.trained_shape, e.dtype, plan.members(e)) for e in entries]
    return sum(array.nbytes for state in states for array in state.values())


def restore(
    trainer: Trainer,
    folder: Path,
    say: Callable[[str], None],
    may_differ: Collection[str] = (),
    place: str = "checkpoints",
    at_most: int | None = None,
) -> TrainState:
    """Restores the newest checkpoint of the folder that every worker can read, if there is one; all call it.

    Args:
        trainer: whose variables take its values.
        folder: the run folder.
        say: takes a line of text.
        may_differ: for `fingerprints.check_run`.
        place: where in the folder the checkpoints are.
        at_most: the newest step that may be restored; None is any.

    Returns:
        The state from which to go on: that before the first step, without `checkpoint`, if there is none.

    Raises:
        UserError: the folder belongs to another run, or is damaged.
    """
    known = fingerprints.check_run(folder, trainer.fingerprint, may_differ)
    checkpoint = checkpoints.newest(folder / place, say, at_most) if known else None
    backend = trainer.replicas.backend
    while len(set(steps := consistency.everyone(backend, checkpoint.step if checkpoint else 0))) > 1:
        least = min(steps)
        if not least:
            names = consistency.names(backend, [k for k, found in enumerate(steps) if not found])
            raise UserError(
                f"{names} cannot see the checkpoint of step {max(steps)} in {folder}: all workers need the same run "
                "folder, on a disk that they share"
            )
        if checkpoint is not None and checkpoint.step > least:  # another worker cannot read it
            checkpoint = checkpoints.newest(folder / place, say, least)
    state = trainer.state()
    if checkpoint is None:
        return state
    if checkpoint.metadata["frozen"] != trainer.fingerprint["frozen"]:
        raise UserError(f"{checkpoint.path} was saved beside other frozen variables: it belongs to another run")
    with trainer.replicas.strategy.scope():
        for number in checkpoint.metadata.get("schedule", {}).get("allocated", ()):
            trainer.optimizers[number].allocate()
    state = state.restored(checkpoint)
    layer_state.spread(trainer.replicas.topology, trainer.layer_state.generators)
    for group in trainer.optimizers:
        optimizers.write_rows(trainer.replicas.strategy, group.members)
    return state


def compiled_step(
    trainer: Trainer,
    plan: selection.Plan,
    norms: bool = False,
    outputs: Callable[[Any, bool], Any] | None = None,
    loop: bool = True,
) -> TrainStep:
    """Compiles the step of a plan, which is the whole one or a part of it.

    Args:
        trainer: what it computes with.
        plan: from `trainer.plan`; its groups have slots.
        norms: whether it returns the squared gradient norms of the plan's units.
        outputs: for `step.train_step`.
        loop: whether a call may make another number of steps than one.
    """
    settings = trainer.settings
    numbers = {entry.path: number for number, group in enumerate(trainer.plan.groups) for entry in group.entries}
    states = {e.path: state for e, state in zip(trainer.plan.trained, trainer.reduction_states, strict=True)}
    batch_norm.set_modes(trainer.batch_norms, plan, everywhere=settings.statistics == "all")
    return train_step(
        StepSpec(
            strategy=trainer.replicas.strategy,
            collectives=trainer.replicas.collectives,
            model=trainer.model,
            objective=trainer.objective,
            plan=plan,
            optimizers=[trainer.optimizers[numbers[group.entries[0].path]] for group in plan.groups],
            states=[states[entry.path] for entry in plan.trained],
            options=StepOptions(settings.clip_norm, settings.accumulate, settings.jit_compile, norms, loop),
            scale=trainer.scale,
            outputs=outputs,
            averaged=trainer.layer_state.averaged,
        )
    )


def batches(trainer: Trainer, first_step: int, global_batch: int) -> Iterator[Batch]:
    """This worker's batches from `first_step` on.

    Examples:
        >>> from dist_partial.data import stdlib_shapes
        >>> from dist_partial.distributed.replicas import create
        >>> from dist_partial.models import two_dense
        >>> trainer = build(Settings([("train", ".*")], two_dense, stdlib_shapes), create("default"))
        >>> early = batches(trainer, first_step=0, global_batch=8)
        >>> _ = next(early)
        >>> bool((next(early)[0] == next(batches(trainer, first_step=1, global_batch=8))[0]).numpy().all())
        True
    """
    made = train_batches(trainer.data.train, **order(trainer, first_step, global_batch))
    if device := prefetching_device(trainer.settings, trainer.replicas.topology):
        made = made.apply(tf.data.experimental.prefetch_to_device(device))
    return started(made)


def order(trainer: Trainer, first_step: int, global_batch: int) -> dict[str, Any]:
    """Says which examples this worker reads from `first_step` on: for `train_batches` and `train_indices`."""
    return {
        "first_step": first_step,
        "global_batch": global_batch,
        "seed": trainer.settings.seed,
        "context": trainer.replicas.topology.input_context,
    }
