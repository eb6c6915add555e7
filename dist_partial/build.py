"""Everything that a run computes with: built from its settings, and restored from its folder."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from dist_partial import (
    batch_norm,
    checkpoints,
    identity,
    layer_state,
    local_sgd,
    losses,
    optimizers,
    reductions,
    selection,
    session,
    step,
)
from dist_partial.adapters import lora, quantization
from dist_partial.data import Dataset, check_source, some_targets, train_batches
from dist_partial.distributed import consistency
from dist_partial.distributed.per_replica import input_context
from dist_partial.distributed.replicas import Replicas
from dist_partial.errors import UserError, calling, first_line, own_line
from dist_partial.loss_scale import LossScale, needs_loss_scale
from dist_partial.schedules.base import Schedule, Unit
from dist_partial.schedules.fixed import Constant
from dist_partial.selection.payload import average_bytes
from dist_partial.settings import Settings


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
    fragments: tuple[local_sgd.Fragment, ...]
    scale: LossScale | None
    schedule: Schedule
    units: tuple[Unit, ...]
    batch_norms: list[keras.layers.BatchNormalization]
    layer_state: layer_state.LayerState
    identity: dict[str, Any]
    notes: tuple[str, ...] = ()  # what the user should hear of, in lines

    def state(self) -> dict[str, Any]:
        """All variables that training changes, as they are now: see `checkpoints.resumable_state`."""
        return checkpoints.resumable_state(
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
            model, example = _model(settings, data, strategy)
            if fixed := layer_state.batch_size(model):
                _check_batch(fixed, model, settings, data, strategy)
        batch_norms = batch_norm.layers(model)
        adapters = lora.enable(settings.rules, model)
        plan = selection.resolve(settings.rules, model, settings.reduction, adapters)
        plan = dataclasses.replace(plan, workers=max(2, replicas.strategy.num_replicas_in_sync))
        plan, units, notes = _divided(quantization.lower(plan, model, settings.frozen), settings, batch_norms)
        batch_norm.set_modes(batch_norms, plan, everywhere=settings.statistics == "all")
        with calling("run.model"), _taking(data.name, x):
            state, outputs = layer_state.find(model, x, plan)
        with calling("run.optimizer"):
            groups = optimizers.build(plan, settings.optimizer, slots=isinstance(settings.schedule, Constant))
        reduction_states = reductions.states(plan)
        fragments = local_sgd.build(plan, groups, reduction_states)
        scale = LossScale() if needs_loss_scale(model) else None
    for entry, kept in zip(plan.trained, reduction_states, strict=True):
        if scale is not None and (kept or not entry.reduction.shared):
            raise UserError(
                f"float16 scales the loss and skips the steps that overflow on any replica, which {entry.reduction} of "
                f"rule {entry.rule.match!r} cannot: bind run.precision = 'mixed_bfloat16', or @every_step()"
            )
    parts = strategy.num_replicas_in_sync * settings.accumulate
    with calling("run.loss"):
        loss, note = _loss(settings, data, outputs, example, parts)
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
        identity=identity.of_run(settings, data, model, plan, state.moving, optimizers_),
        notes=tuple(notes),
    )


def _model(settings: Settings, data: Dataset, strategy: tf.distribute.Strategy) -> tuple[keras.Model, tf.Tensor]:
    """Makes the model, with its variables, and what it gives for one example of zeros; in the strategy's scope.

    Raises:
        UserError: it is none, or not one that a run trains as Keras would, or it does not fit the data.
    """
    model = settings.model()
    if not isinstance(model, keras.Model):
        raise UserError(f"run.model made a {type(model).__name__}: its factory must return a keras.Model")
    for name in ("train_step", "test_step", "compute_loss", "compute_metrics"):
        own = getattr(getattr(model, name), "__func__", None)
        if own is not getattr(keras.Model, name):
            raise UserError(
                f"run.model has a {name} of its own ({type(model).__name__}), which a run does not call: train it by "
                "model.fit with dist_partial.partial, or bind a model without it and its loss as run.loss"
            )
    x = data.train.spec[0]
    generators = [variable for variable in model.variables if layer_state.is_generator(variable)]
    generators += layer_state.recurrent(model)
    # A subclassed model has its variables only once it has been called.
    with _taking(data.name, x), layer_state.untouched(strategy, generators):
        wanted = model.inputs[0].dtype if getattr(model, "inputs", None) else x.dtype.name
        if x.dtype.is_floating and "int" in wanted:  # Keras would cut the fractions off
            raise UserError(
                f"run.model reads ids ({wanted}) and not {_example(data.name, x)}: bind a model of features, or other "
                "data"
            )
        outputs = model(tf.zeros([layer_state.batch_size(model) or 1, *x.shape], x.dtype))
    if not isinstance(outputs, tf.Tensor):
        raise UserError(f"run.model gives a {type(outputs).__name__} of outputs: its model must give one tensor")
    if getattr(outputs, "_keras_mask", None) is not None:  # which Keras's `fit` would apply to the loss
        raise UserError(
            "run.model's outputs have a mask of Keras's (mask_zero, Masking), and here weights mask a loss: have "
            "run.data give (x, y, weight) with 0 where it pads, and take the mask out of the model"
        )
    if data.codec is not None:
        _check_symbols(model, data.name, data.codec.size, outputs.shape[-1])
    return model, outputs


def _check_batch(
    fixed: int, model: keras.Model, settings: Settings, data: Dataset, strategy: tf.distribute.Strategy
) -> None:
    """Raises UserError unless training and evaluation read as many examples at a time as the model takes."""
    batch, parts = settings.global_batch, settings.accumulate
    where = f"run.model has a stateful recurrent layer, built for {fixed:,} examples at a time"
    if strategy.num_replicas_in_sync > 1:
        raise UserError(
            f"{where}, and replicas agree on what layers change, where each has examples of its own: train it on one "
            "replica, or make the layer without stateful=True"
        )
    if parts > 1 or batch != fixed:
        raise UserError(
            f"{where}, and reads {batch} / {parts} (run.global_batch, run.accumulate): bind run.global_batch = {fixed} "
            "and no run.accumulate, or build it for others (keras.Input(batch_shape=...))"
        )
    held_out = len(data.evaluation)
    if (examples := min(settings.eval_examples or held_out, held_out)) % batch:
        raise UserError(
            f"{where}, and an evaluation of {examples:,} does not divide into such batches: bind run.eval_examples = "
            f"{examples // batch * batch or batch}"
        )


def _check_symbols(model: keras.Model, name: str, symbols: int, outputs: int) -> None:
    """Raises UserError unless a model reads and writes all symbols of the data set of that name."""
    if outputs < symbols:
        raise UserError(
            f"{name} has {symbols:,} symbols and run.model gives logits for {outputs:,}: bind a tokenizer of the "
            "model's own, or a model of that size"
        )
    for layer in model._flatten_layers():  # Keras encodes an id beyond its tokens as nothing, without a word
        if isinstance(layer, keras.layers.CategoryEncoding) and layer.num_tokens < symbols:
            raise UserError(
                f"{name} has {symbols:,} symbols and {layer.name!r} of run.model encodes {layer.num_tokens:,}: bind a "
                "model that reads all of them"
            )


@contextlib.contextmanager
def _taking(name: str, x: tf.TensorSpec) -> Iterator[None]:
    """Turns what a model says of the examples of the data set of that name into a mistake of the user's."""
    try:
        yield
    except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
        raise UserError(
            f"run.model does not take {_example(name, x)}: {first_line(error)}{own_line(error)}; bind sizes that fit "
            "each other"
        ) from error


def _example(name: str, x: tf.TensorSpec) -> str:
    return f"one of {name}'s examples, {x.dtype.name} {list(x.shape)}"


def _loss(
    settings: Settings, data: Dataset, outputs: tf.Tensor, example: tf.Tensor, parts: int
) -> tuple[losses.Loss, str]:
    """What the loss makes of targets and the model's outputs, and a line to say of it, or ''.

    Args:
        settings: with the loss.
        data: the data set.
        outputs: the model's, in a traced graph.
        example: the same for some example.
        parts: into how many a batch is divided.

    Raises:
        UserError: the loss does not go with the model or the data.
    """
    loss, batch = settings.loss(), max(1, settings.global_batch // parts)
    unreduced = losses.unreduced(loss, weighted=len(data.train.spec) == 3)
    for source in (data.train, data.evaluation):
        targets = some_targets(source)
        losses.check_class_ids(loss, data.name, targets, example.shape[-1])
        losses.check_shapes(unreduced, source.spec, example, batch)
    losses.check_alone(unreduced, targets, example, parts)
    return losses.of_model(loss, unreduced, outputs, example)


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
        messages = [message for entry in entries for message in entry.messages]
        # The statistics of a layer that trains travel, too.
        moving = [layer for layer in batch_norms if {id(layer.gamma), id(layer.beta)} & variables]
        messages += reductions.averages(plan, batch_norm.unsynchronised_statistics(moving))
        sent = average_bytes(messages, plan.workers)
        units.append(Unit(name, tuple(paths), math.ceil(sent), sum(entry.trained_parameters for entry in entries)))
    notes = schedule.check(units, settings.steps)
    if not isinstance(schedule, Constant):
        for entry in trained.values():
            if any(message.every > 1 for message in entry.messages) or not entry.reduction.shared:
                raise UserError(
                    f"run.schedule switches what is reduced in every step, and {entry.reduction} of rule "
                    f"{entry.rule.match!r} is not: bind @every_step(), @power_sgd(), @top_k() or @quantized()"
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
    known = identity.check(folder, built.identity, may_differ)
    checkpoint = checkpoints.newest(folder / "checkpoints", say) if known else None
    while len(set(steps := consistency.everyone(built.replicas.mesh, checkpoint.step if checkpoint else 0))) > 1:
        least = min(steps)
        if not least:
            names = consistency.names(built.replicas.mesh, [k for k, found in enumerate(steps) if not found])
            raise UserError(
                f"{names} cannot see the checkpoint of step {max(steps)} in {folder}: all workers need the same run "
                "folder, on a disk that they share"
            )
        if checkpoint is not None and checkpoint.step > least:  # another worker cannot read it
            checkpoint = checkpoints.newest(folder / "checkpoints", say, least)
    if checkpoint is not None:
        if checkpoint.metadata["frozen"] != built.identity["frozen"]:
            raise UserError(f"{checkpoint.path} was saved beside other frozen variables: it is of another run")
        with built.replicas.strategy.scope():
            for number in checkpoint.metadata.get("course", {}).get("allocated", ()):
                built.optimizers[number].allocate()
        checkpoints.restore(checkpoint, built.state())
        layer_state.spread(built.replicas.strategy, built.layer_state.generators)
        for group in built.optimizers:
            optimizers.write_rows(built.replicas.strategy, group.members)
    return checkpoint


def train_step(
    built: Built,
    settings: Settings,
    plan: selection.Plan,
    global_batch: int,
    norms: bool = False,
    outputs: Callable[[tf.Tensor, bool], tf.Tensor] | None = None,
    loop: bool = True,
) -> step.TrainStep:
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
    return step.train_step(
        built.replicas.strategy,
        built.replicas.wire,
        built.model,
        built.loss,
        plan,
        [built.optimizers[numbers[group.entries[0].path]] for group in plan.groups],
        [states[entry.path] for entry in plan.trained],
        step.StepOptions(global_batch, settings.clip_norm, settings.accumulate, settings.jit_compile, norms, loop),
        built.scale,
        outputs,
        built.layer_state.averaged,
    )


def batches(built: Built, settings: Settings, first_step: int, global_batch: int) -> Iterator[step.Batch]:
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
