"""Everything that a run computes with: built from its settings, and restored from its folder."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from dist_partial import checkpoints, reductions, selection, session
from dist_partial.adapters import lora, quantization
from dist_partial.checkpoints import fingerprints
from dist_partial.config.settings import Settings
from dist_partial.data import Dataset, check_source, train_batches
from dist_partial.distributed import consistency
from dist_partial.distributed.per_replica import input_context
from dist_partial.distributed.replicas import Replicas
from dist_partial.errors import UserError, calling
from dist_partial.schedules.base import Schedule, Unit
from dist_partial.schedules.fixed import Constant
from dist_partial.selection.payload import average_bytes
from dist_partial.step import batch_norm, layer_state, optimizers, outer_step
from dist_partial.step.gradients import Batch
from dist_partial.step.loss_scale import LossScale, needs_loss_scale
from dist_partial.step.train_step import StepOptions, TrainStep, train_step
from dist_partial.training import run_fingerprint, state
from dist_partial.training.checks import check_batch, make_loss, make_model, taking


@dataclasses.dataclass(frozen=True, eq=False)
class Built:
    """Everything that a run computes with, made from its settings in one strategy's scope."""

    replicas: Replicas
    data: Dataset
    model: keras.Model
    loss: Callable[[Any, Any], tf.Tensor]
    plan: selection.Plan
    optimizers: tuple[optimizers.GroupOptimizer, ...]
    reduction_states: list[dict[str, tf.Variable]]
    fragments: tuple[outer_step.Fragment, ...]
    scale: LossScale | None
    schedule: Schedule
    units: tuple[Unit, ...]
    batch_norms: list[keras.layers.BatchNormalization]
    layer_state: layer_state.LayerState
    fingerprint: dict[str, Any]
    notes: tuple[str, ...] = ()  # what the user should hear of, in lines

    def state(self) -> dict[str, Any]:
        """All variables that training changes, as they are now: see `checkpoints.resumable_state`."""
        return state.resumable_state(
            self.replicas.strategy,
            self.model,
            self.plan,
            self.optimizers,
            self.reduction_states,
            self.fragments,
            self.layer_state.moving,
            self.scale,
        )

    @property
    def moving(self) -> list[Any]:
        """What layers change in a step, in the modes that they are in now."""
        asleep = {id(v) for layer in self.batch_norms if not layer.trainable for v in layer.variables}
        return [variable for variable in self.layer_state.moving if id(variable) not in asleep]

    @property
    def averaged(self) -> list[Any]:
        """Variables that layers change in a step and replicas average, in the modes that the layers are in now."""
        return [*batch_norm.local_statistics(self.model), *self.layer_state.averaged]


def build(settings: Settings, replicas: Replicas) -> Built:
    """Builds data, model, plan and optimizers; reads and writes nothing of the run folder.

    Sets Keras's precision and all random seeds to the run's; `session.put_back` around it undoes the former.

    Raises:
        UserError: every mistake in the rules, the factories or the data.
    """
    keras.config.set_floatx("float64" if settings.precision == "float64" else "float32")
    keras.config.set_dtype_policy(settings.precision)
    with session.numbered_afresh(settings.data, settings.model):
        return _build(settings, replicas)


def _build(settings: Settings, replicas: Replicas) -> Built:
    with calling("run.data"):
        data = settings.data()
    if not isinstance(data, Dataset):
        raise UserError(f"run.data made a {type(data).__name__}: its factory must return a dist_partial.data.Dataset")
    with calling("run.data"):
        for name in ("train", "evaluation"):
            check_source(f"{name} of {data.name}", getattr(data, name))
    strategy, x = replicas.strategy, data.train.spec[0]
    with strategy.scope():
        keras.utils.set_random_seed(settings.seed)
        with calling("run.model"):
            model, example = make_model(settings, data, strategy)
            if fixed := layer_state.batch_size(model):
                check_batch(fixed, model, settings, data, strategy)
        batch_norms = batch_norm.layers(model)
        adapters = lora.enable(settings.rules, model)
        plan = selection.resolve(settings.rules, model, settings.reduction, adapters)
        plan = dataclasses.replace(plan, workers=max(2, replicas.strategy.num_replicas_in_sync))
        plan, units, notes = _divided(quantization.lower(plan, model, settings.frozen_dtype), settings, batch_norms)
        batch_norm.set_modes(batch_norms, plan, everywhere=settings.statistics == "all")
        with calling("run.model"), taking(data.name, x):
            state, outputs = layer_state.find(model, x, plan)
        with calling("run.optimizer"):
            groups = optimizers.build(plan, settings.optimizer, slots=isinstance(settings.schedule, Constant))
        reduction_states = reductions.states(plan)
        fragments = outer_step.build(plan, groups, reduction_states)
        scale = LossScale() if needs_loss_scale(model) else None
    for entry, kept in zip(plan.trained, reduction_states, strict=True):
        if scale is not None and (kept or not entry.reduction.shared):
            raise UserError(
                f"float16 scales the loss and skips the steps that overflow on any replica, which {entry.reduction} of "
                f"rule {entry.rule.match!r} cannot: bind run.precision = 'mixed_bfloat16', or @all_reduce()"
            )
    parts = strategy.num_replicas_in_sync * settings.accumulate
    with calling("run.loss"):
        loss, note = make_loss(settings, data, outputs, example, parts)
    layer_state.spread(strategy, state.generators)
    notes += [note] if note else []
    if model.compiled and not type(model).__module__.startswith("keras_hub."):  # which compiles its tasks by itself
        notes.append("run.model is compiled: run.loss and run.optimizer take the place of its own loss and optimizer")
    optimizers_ = [*groups, *[fragment.outer for fragment in fragments]]
    return Built(
        replicas=replicas,
        data=data,
        model=model,
        loss=loss,
        plan=plan,
        optimizers=groups,
        reduction_states=reduction_states,
        fragments=fragments,
        scale=scale,
        schedule=settings.schedule,
        units=units,
        batch_norms=batch_norms,
        layer_state=state,
        fingerprint=run_fingerprint.of_run(settings, data, model, plan, state.moving, optimizers_),
        notes=tuple(notes),
    )


def _divided(
    plan: selection.Plan, settings: Settings, batch_norms: Sequence[keras.layers.BatchNormalization]
) -> tuple[selection.Plan, tuple[Unit, ...], list[str]]:
    """The plan in the units of the schedule, and lines to say of it."""
    schedule = settings.schedule
    trained = {entry.path: entry for entry in plan.entries if entry.trained}
    parts = schedule.partition(list(trained))
    plan = plan.divided(parts)
    units = []
    for name, paths in parts:
        entries = [trained[path] for path in paths]
        variables = {id(entry.variable) for entry in entries}
        payloads = [payload for entry in entries for payload in entry.payloads]
        # The statistics of a layer that trains travel, too.
        moving = [layer for layer in batch_norms if {id(layer.gamma), id(layer.beta)} & variables]
        payloads += reductions.averages(plan, batch_norm.unsynchronised_statistics(moving))
        sent = average_bytes(payloads, plan.workers)
        units.append(Unit(name, tuple(paths), math.ceil(sent), sum(entry.trained_parameters for entry in entries)))
    notes = schedule.check(units, settings.steps)
    if not isinstance(schedule, Constant):
        for entry in trained.values():
            if any(payload.every > 1 for payload in entry.payloads) or not entry.reduction.shared:
                raise UserError(
                    f"run.schedule switches what is reduced in every step, and {entry.reduction} of rule "
                    f"{entry.rule.match!r} is not: bind @all_reduce(), @power_sgd(), @top_k() or @quantized()"
                )
    return plan, tuple(units), notes


def restore(
    built: Built, folder: Path, say: Callable[[str], None], may_differ: Collection[str] = ()
) -> checkpoints.Checkpoint | None:
    """Restores the newest checkpoint of the folder that every worker can read, if there is one; all call it.

    Args:
        built: whose variables take its values.
        folder: the run folder.
        say: takes a line of text.
        may_differ: for `identity.check`.

    Raises:
        UserError: the folder is of another run, or damaged.
    """
    known = fingerprints.check_run(folder, built.fingerprint, may_differ)
    checkpoint = checkpoints.newest(folder / "checkpoints", say) if known else None
    while len(set(steps := consistency.everyone(built.replicas.backend, checkpoint.step if checkpoint else 0))) > 1:
        least = min(steps)
        if not least:
            names = consistency.names(built.replicas.backend, [k for k, found in enumerate(steps) if not found])
            raise UserError(
                f"{names} cannot see the checkpoint of step {max(steps)} in {folder}: all workers need the same run "
                "folder, on a disk that they share"
            )
        if checkpoint is not None and checkpoint.step > least:  # another worker cannot read it
            checkpoint = checkpoints.newest(folder / "checkpoints", say, least)
    if checkpoint is not None:
        if checkpoint.metadata["frozen"] != built.fingerprint["frozen"]:
            raise UserError(f"{checkpoint.path} was saved beside other frozen variables: it is of another run")
        with built.replicas.strategy.scope():
            for number in checkpoint.metadata.get("schedule", {}).get("allocated", ()):
                built.optimizers[number].allocate()
        checkpoints.restore(checkpoint, built.state())
        layer_state.spread(built.replicas.strategy, built.layer_state.generators)
        for group in built.optimizers:
            optimizers.write_rows(built.replicas.strategy, group.members)
    return checkpoint


def compiled_step(
    built: Built,
    settings: Settings,
    plan: selection.Plan,
    global_batch: int,
    norms: bool = False,
    outputs: Callable[[tf.Tensor, bool], tf.Tensor] | None = None,
    loop: bool = True,
) -> TrainStep:
    """The compiled step of a plan, which is the whole one or a part of it.

    Args:
        built: what it computes with.
        settings: how.
        plan: from `built.plan`; its groups have slots.
        global_batch: examples in a step.
        norms: whether it is to return the squared gradient norms of the plan's units.
        outputs: for `step.train_step`.
        loop: whether a call may make another number of steps than one.
    """
    numbers = {entry.path: number for number, group in enumerate(built.plan.groups) for entry in group.entries}
    states = {e.path: state for e, state in zip(built.plan.trained, built.reduction_states, strict=True)}
    batch_norm.set_modes(built.batch_norms, plan, everywhere=settings.statistics == "all")
    return train_step(
        built.replicas.strategy,
        built.replicas.collectives,
        built.model,
        built.loss,
        plan,
        [built.optimizers[numbers[group.entries[0].path]] for group in plan.groups],
        [states[entry.path] for entry in plan.trained],
        StepOptions(global_batch, settings.clip_norm, settings.accumulate, settings.jit_compile, norms, loop),
        built.scale,
        outputs,
        built.layer_state.averaged,
    )


def batches(built: Built, settings: Settings, first_step: int, global_batch: int) -> Iterator[Batch]:
    """This worker's batches from `first_step` on."""
    return iter(train_batches(built.data.train, **order(built, settings, first_step, global_batch)))


def order(built: Built, settings: Settings, first_step: int, global_batch: int) -> dict[str, Any]:
    """Which examples this worker reads from `first_step` on: for `data.train_batches` and `data.train_indices`."""
    return {
        "first_step": first_step,
        "global_batch": global_batch,
        "seed": settings.seed,
        "context": input_context(built.replicas.strategy),
    }
