"""Checks what a run consists of against each other before anything is compiled."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_partial import compat
from dist_partial.checkpoints import fingerprints
from dist_partial.config.settings import Settings
from dist_partial.data import Dataset, Source
from dist_partial.distributed import consistency
from dist_partial.distributed.per_replica import Topology
from dist_partial.distributed.replicas import Replicas
from dist_partial.errors import UserError, calling
from dist_partial.selection.plan import Plan
from dist_partial.step import batch_norm
from dist_partial.step.objective import Objective
from dist_partial.training.batch_coupling import own_loss_is_coupled
from dist_partial.validation import counted


def check_batch(fixed: int, model: keras.Model, settings: Settings, data: Dataset, topology: Topology) -> None:
    """Raises UserError unless training and evaluation read as many examples at a time as the model takes."""
    batch, parts = settings.global_batch, settings.accumulate
    where = f"run.model has a stateful recurrent layer, built for {fixed:,} examples at a time"
    if topology.replicas > 1:
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


def check_added(model: keras.Model, topology: Topology) -> None:
    """Raises UserError if replicas of one process would mix up what layers add to the loss.

    Keras 3.15 keeps it in one list a layer, and replicas that meet within the model, in a synchronised BatchNorm, find
    each other's. The model has been called.
    """
    met = [layer.name for layer in batch_norm.layers(model) if layer.synchronized]
    if met and topology.local > 1 and adds_losses(model):
        raise UserError(
            f"run.model has the synchronised BatchNorm {met[0]!r} and layers that add to the loss "
            "(activity_regularizer, add_loss), which replicas of one process would mix up: start one process a "
            "replica, or build it without synchronized=True"
        )


def adds_losses(model: keras.Model) -> bool:
    """Tells whether layers of a model that has been called add to its loss, besides regularisers of weights.

    Examples:
        >>> adds_losses(keras.Sequential([keras.Input([2]), keras.layers.Dense(1, kernel_regularizer="l2")]))
        False
    """
    return len(model.losses) > sum(variable.regularizer is not None for variable in model.trainable_variables)


def divided_objective(
    objective: Objective, settings: Settings, plan: Plan, topology: Topology, source: Source
) -> Objective:
    """Gives what a run trains on and is measured by, of which something may need the whole batch.

    Where the replicas cannot have it in training, such metrics are those of evaluations only.

    Raises:
        UserError: they cannot, and the loss needs it.
    """
    if topology.replicas * settings.accumulate == 1:
        return dataclasses.replace(objective, coupled=False)
    with calling("run.loss"):
        objective = dataclasses.replace(objective, coupled=objective.coupled or own_loss_is_coupled(objective, source))
    adds = topology.local > 1 and adds_losses(objective.model)
    if settings.accumulate > 1:
        reason, remedy = "run.accumulate divides it", "bind no run.accumulate"
    elif not all(entry.reduction.shared for entry in plan.trained):
        reason, remedy = "with LocalSGD or LocalOnly each replica trains by itself", "reduce in every step"
    elif settings.jit_compile:
        reason, remedy = "replicas cannot meet within what run.jit_compile compiles", "bind no run.jit_compile"
    elif compat.overrides(objective.model, "compute_loss") and tf.string in _dtypes(source.spec[0]):
        reason, remedy = "x has texts, which replicas do not exchange", "give run.loss and targets"
    elif adds:
        reason, remedy = "layers add to the loss (activity_regularizer, add_loss)", "start one process a replica"
    else:
        return objective
    if objective.coupled:
        own = compat.overrides(objective.model, "compute_loss")
        raise UserError(
            f"{'the compute_loss of run.model' if own else 'run.loss'} makes of an example what depends on the others "
            f"of its batch, which has to be whole, and {reason}: {remedy}, or train it on one replica without "
            "run.accumulate"
        )
    measures = [dataclasses.replace(each, training=each.training and not each.coupled) for each in objective.measures]
    return dataclasses.replace(objective, measures=measures)


def _dtypes(spec: Any) -> set[tf.DType]:
    return {one.dtype for one in tf.nest.flatten(spec)}


def _end(callback: Any) -> Any:
    return getattr(callback, "on_epoch_end", None)


def notes_on_callbacks(settings: Settings) -> list[str]:
    """Says which callbacks wait for evaluations that the run does not make.

    Examples:
        >>> from dist_partial.data import stdlib_shapes
        >>> from dist_partial.models import two_dense
        >>> callbacks = [keras.callbacks.EarlyStopping()]
        >>> notes_on_callbacks(Settings([("train", ".*")], two_dense, stdlib_shapes, callbacks=callbacks))
        ['run.callbacks has EarlyStopping, and run.eval_every is not bound: its epoch ends once, with the run']
    """
    if settings.eval_every is not None:
        return []
    nothing = (None, keras.callbacks.Callback.on_epoch_end)
    waiting = [each for each in settings.callbacks if getattr(_end(each), "__func__", _end(each)) not in nothing]
    names = ", ".join(dict.fromkeys(type(each).__name__ for each in waiting))
    its = "its epoch ends" if len(waiting) == 1 else "their epoch ends"
    return [f"run.callbacks has {names}, and run.eval_every is not bound: {its} once, with the run"] if waiting else []


def check_division(settings: Settings, replicas: int) -> None:
    """Raises UserError unless a batch divides into the micro-batches of that many replicas.

    Examples:
        >>> from dist_partial.data import stdlib_shapes
        >>> from dist_partial.models import two_dense
        >>> settings = Settings([("train", ".*")], two_dense, stdlib_shapes, global_batch=32, accumulate=2)
        >>> check_division(settings, replicas=4)
        >>> check_division(settings, replicas=3)
        Traceback (most recent call last):
        dist_partial.errors.UserError: run.global_batch = 32 does not divide into 3 replicas x 2 micro-batches: ...
    """
    if settings.global_batch % (parts := replicas * settings.accumulate):
        raise UserError(
            f"run.global_batch = {settings.global_batch} does not divide into {counted(replicas, 'replica')} x "
            f"{counted(settings.accumulate, 'micro-batch', 'micro-batches')}: bind a multiple of {parts}"
        )


def prefetching_device(settings: Settings, topology: Topology) -> str | None:
    """Gives the GPU on which batches are before their steps begin, or None.

    Raises:
        UserError: there is no GPU, or the worker has several replicas.
    """
    if not settings.prefetch_to_device:
        return None
    gpus = tf.config.list_logical_devices("GPU")
    if topology.local > 1 or not gpus:
        have = f"{counted(len(gpus), 'GPU')} and {counted(topology.local, 'replica')}"
        raise UserError(
            f"run.prefetch_to_device: it is for one replica on a GPU, and this worker has {have}; unbind it"
        )
    return str(gpus[0].name)


def check_levels(plan: Plan, replicas: Replicas) -> None:
    """Raises UserError if a reduction between hosts is asked of TensorFlow's collectives, which know replicas only."""
    if replicas.workers > 1 and not replicas.collectives.backend.two_levels:
        for entry in plan.trained:
            if entry.inside is not None:
                raise UserError(
                    f"rule {entry.rule.match!r} travels between hosts by {entry.reduction}, and replicas.transport = "
                    "'tensorflow' sums over all replicas at once: bind replicas.transport = 'sockets', or no "
                    "between_hosts"
                )


def check_workers(replicas: Replicas, fingerprint: dict[str, Any], bindings: Mapping[str, str]) -> None:
    """Raises UserError, the same on every worker, unless all have built the same from the same bindings."""
    if replicas.backend is not None:
        facts: dict[str, Any] = {"versions": consistency.versions(), "bindings": dict(bindings)}
        facts["replicas of each worker"] = replicas.topology.local
        start = {
            fingerprints.INITIAL: fingerprint[fingerprints.INITIAL]
        }  # first: all else that differs follows from it
        consistency.check(replicas.backend, facts | start | fingerprint)


def check_scaled(plan: Plan, states: Sequence[dict[str, tf.Variable]]) -> None:
    """Raises UserError unless all of a plan, with what its reductions keep, can skip a step that overflows.

    Examples:
        >>> from dist_partial.reductions import AllReduce, TopK
        >>> from dist_partial.selection import resolve
        >>> plan = resolve([("train", ".*")], keras.Sequential([keras.Input([4]), keras.layers.Dense(1)]), TopK())
        >>> check_scaled(plan, [{}, {}])
        >>> check_scaled(plan, [{"residual": tf.Variable([0.0])}, {}])
        Traceback (most recent call last):
        dist_partial.errors.UserError: float16 scales the loss and skips the steps that overflow on any ...
    """
    for entry, kept in zip(plan.trained, states, strict=True):
        if kept or not entry.reduction.shared:
            raise UserError(
                "float16 scales the loss and skips the steps that overflow on any replica, which "
                f"{type(entry.reduction).__name__} ({entry.reduction}) of rule {entry.rule.match!r} cannot: bind "
                "run.precision = 'mixed_bfloat16', or reduce by AllReduce(), in a gin file @all_reduce()"
            )
