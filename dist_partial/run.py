"""The one orchestration: build, restore, loop, evaluate, sample, save."""

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial import (
    batch_norm,
    checkpoints,
    evaluation,
    identity,
    local_sgd,
    optimizers,
    reduction,
    selection,
    step,
    traffic,
)
from dist_partial.data import Dataset, train_batches
from dist_partial.errors import UserError
from dist_partial.files import locked, write_json, write_text, writing
from dist_partial.loss_scale import LossScale, needs_loss_scale
from dist_partial.replicas import Replicas, input_context, is_chief
from dist_partial.reporting import Journal, plan_table
from dist_partial.selection import average_bytes
from dist_partial.settings import Settings


class Interrupted(Exception):
    """The user stopped the run; everything is saved, and the message says how to go on."""


@dataclasses.dataclass(frozen=True, eq=False)
class Built:
    """Everything that a run computes with, made from its settings in one strategy's scope."""

    replicas: Replicas
    data: Dataset
    model: keras.Model
    loss: Callable[[Any, Any], tf.Tensor]
    plan: selection.Plan
    optimizers: tuple[optimizers.GroupOptimizer, ...]
    reductions: list[dict[str, tf.Variable]]
    fragments: tuple[local_sgd.Fragment, ...]
    scale: LossScale | None
    state: dict[str, Any]
    identity: dict[str, Any]


def build(settings: Settings, replicas: Replicas) -> Built:
    """Builds data, model, plan and optimizers; reads and writes nothing of the run folder.

    Raises:
        UserError: every mistake in the rules, the factories or the data.
    """
    keras.config.set_floatx("float64" if settings.precision == "float64" else "float32")
    keras.config.set_dtype_policy(settings.precision)
    data = settings.data()
    if not isinstance(data, Dataset):
        raise UserError(f"run.data made a {type(data).__name__}: its factory must return a dist_partial.data.Dataset")
    with replicas.strategy.scope():
        keras.utils.set_random_seed(settings.seed)
        model = settings.model()
        if not isinstance(model, keras.Model):
            raise UserError(f"run.model made a {type(model).__name__}: its factory must return a keras.Model")
        # A subclassed model has its variables only once it has been called.
        x = data.train.spec[0]
        outputs = model(tf.zeros([1, *x.shape], x.dtype))
        if not isinstance(outputs, tf.Tensor):
            raise UserError(f"run.model gives a {type(outputs).__name__} of outputs: its model must give one tensor")
        plan = selection.resolve(settings.rules, model, settings.reduction)
        batch_norm.set_modes(model, plan, everywhere=settings.statistics == "all")
        groups = optimizers.build(plan, settings.optimizer)
        reductions = reduction.states(plan)
        fragments = local_sgd.build(plan, groups, reductions)
        scale = LossScale() if needs_loss_scale(model) else None
    for entry, kept in zip(plan.trained, reductions, strict=True):
        if scale is not None and (kept or not entry.reduction.shared):
            raise UserError(
                f"float16 scales the loss and skips the steps that overflow on any replica, which {entry.reduction} of "
                f"rule {entry.rule.match!r} cannot: bind run.precision = 'mixed_bfloat16', or @every_step()"
            )
    loss = settings.loss()
    if not callable(loss):
        raise UserError(f"run.loss made a {type(loss).__name__}: its factory must return a Keras loss or a function")
    return Built(
        replicas=replicas,
        data=data,
        model=model,
        loss=loss.call if isinstance(loss, keras.losses.Loss) else loss,
        plan=plan,
        optimizers=groups,
        reductions=reductions,
        fragments=fragments,
        scale=scale,
        state=checkpoints.resumable_state(replicas.strategy, model, plan, groups, reductions, fragments, scale),
        identity=identity.of_run(settings, data, model, plan, [*groups, *[f.outer for f in fragments]]),
    )


def restore(built: Built, folder: Path, say: Callable[[str], None]) -> checkpoints.Checkpoint | None:
    """Restores the newest whole checkpoint of the folder, if there is one.

    Raises:
        UserError: the folder is of another run, or damaged.
    """
    if not identity.check(folder, built.identity):
        return None
    checkpoint = checkpoints.newest(folder / "checkpoints", say)
    if checkpoint is not None:
        if checkpoint.metadata["frozen"] != built.identity["frozen"]:
            raise UserError(f"{checkpoint.path} was saved beside other frozen variables: it is of another run")
        checkpoints.restore(checkpoint, built.state)
        for group in built.optimizers:
            optimizers.write_rows(built.replicas.strategy, group.members)
    return checkpoint


def training(
    built: Built, settings: Settings, first_step: int, global_batch: int
) -> tuple[step.TrainStep, Iterator[step.Batch]]:
    """The compiled step and this worker's batches for it, from `first_step` on."""
    train = step.train_step(
        built.replicas.strategy,
        built.replicas.wire,
        built.model,
        built.loss,
        built.plan,
        built.optimizers,
        built.reductions,
        step.StepOptions(global_batch, settings.clip_norm, settings.accumulate, settings.jit_compile),
        built.scale,
    )
    batches = train_batches(
        built.data.train,
        first_step=first_step,
        global_batch=global_batch,
        seed=settings.seed,
        context=input_context(built.replicas.strategy),
    )
    return train, iter(batches)


def run(
    settings: Settings,
    folder: Path,
    operative: Callable[[], str] = lambda: "",
    unused: Callable[[], list[str]] = lambda: [],
) -> None:
    """Trains, evaluates and samples; goes on from what is in the folder.

    Args:
        settings: what to do.
        folder: the run folder, made if absent.
        operative: gives the text of operative_config.gin, once the first step has used everything.
        unused: gives the bindings that nothing has used by then.

    Raises:
        UserError: any mistake of the user's, a full disk, a damaged folder, a loss that is not finite.
        Interrupted: the user pressed Ctrl-C; the state is saved.
    """
    replicas = settings.replicas()
    strategy = replicas.strategy
    say: Callable[[str], None] = print if is_chief() else lambda _: None
    say(replicas.description)
    workers = input_context(strategy).num_input_pipelines
    parts = strategy.num_replicas_in_sync * settings.accumulate
    if settings.global_batch % parts:
        raise UserError(
            f"run.global_batch = {settings.global_batch} does not divide into {strategy.num_replicas_in_sync} "
            f"replicas x {settings.accumulate} micro-batches: bind a multiple of {parts}"
        )
    built = build(settings, replicas)
    say(plan_table(built.plan))
    checkpoint = restore(built, folder, say)
    done, wire_bytes = (checkpoint.step, checkpoint.metadata["wire_bytes"]) if checkpoint else (0, 0)
    if done >= settings.steps:
        say(f"finished: {folder} is at step {done} of {settings.steps}; bind a larger run.steps to go on")
        return
    if checkpoint:
        say(f"going on from step {done} ({checkpoint.path})")

    train, batches = training(built, settings, done, settings.global_batch)
    traced = train.function.get_concrete_function(batches, tf.constant(1))
    sent_in_step = traffic.in_step(traced)
    exchanges = local_sgd.exchanges(
        strategy,
        replicas.wire,
        built.plan,
        built.fragments,
        train.without_gradient,
        batch_norm.local_statistics(built.model),
    )
    total = step.worker_sum(strategy)
    evaluate = evaluation.evaluation(
        strategy,
        step.evaluation_step(strategy, built.model, built.loss),
        total,
        built.data,
        examples=min(settings.eval_examples or len(built.data.evaluation), len(built.data.evaluation)),
        global_batch=settings.global_batch,
    )
    plan = built.plan.traced(train.without_gradient, [])
    if strategy.num_replicas_in_sync > 1:  # or else nothing is sent
        plan = plan.traced(train.without_gradient, traffic.beyond(plan, sent_in_step, exchanges))
    meter = traffic.Meter(plan, workers, traffic.card(replicas.host) if replicas.host else None, done)
    saved, first = done, True
    with (
        _connected(replicas),
        _written_folder(folder, built.identity, plan) if is_chief() else contextlib.nullcontext(),
        Journal(folder, done, settings.steps, plan, is_chief()) as journal,
        _interruptible() as interrupted,
    ):
        if train.without_gradient:
            journal.say(f"selected, but the loss does not depend on it: {', '.join(train.without_gradient)}")
        for exchange in exchanges:
            local = exchange.fragment.reduction
            last = local.next_due(settings.steps) - local.steps
            if last != settings.steps:
                journal.say(
                    f"{local}: the last exchange follows step {last} of {settings.steps}; what replicas train after it "
                    "is not in the weights on which they agree"
                    if last > 0
                    else f"{local}: run.steps = {settings.steps} ends before the first exchange"
                )
        if plan.statistics:
            journal.say(f"BatchNorm statistics add {average_bytes(plan.statistics):,} bytes a step to the wire")
        while done < settings.steps:
            count = _steps_until_event(settings, done, exchanges)
            meter.start()
            result = train.function(batches, tf.constant(count))
            sent = wire_bytes + traffic.total(sent_in_step) * np.arange(1, count + 1)
            for exchange in exchanges:
                if exchange.fragment.reduction.due(done + count):
                    exchange.function()
                    sent[-1] += traffic.total(exchange.sent)
            # All workers stop after the same call, whichever of them was interrupted, and all hear of a norm that is
            # not finite on one of them alone, which trains by itself.
            sums = total(tf.concat([result["loss"], result["gradient_norm"], [float(interrupted())]], axis=0)).numpy()
            losses, norms, stopped = sums[:count], sums[count:-1] / workers, sums[-1]
            meter.stop(count, int(sent[-1]) - wire_bytes, sums.nbytes)
            good = _finite_steps(losses, norms, scaled=built.scale is not None)
            journal.train(done + 1, losses[:good], norms[:good], sent[:good])
            if good < count:
                raise _not_finite(done + good + 1, losses[good], norms[good], saved)
            if built.scale is not None and built.scale.exhausted(norms):
                raise UserError(
                    f"the gradient overflowed in every step up to {done + count}, though the loss is no longer scaled: "
                    "bind run.precision = 'mixed_bfloat16'"
                )
            done, wire_bytes = done + count, int(sent[-1])
            if first:
                journal.configuration(operative(), unused())
                first = False
            stop = stopped > 0 and done < settings.steps
            try:
                if _due(settings, done, settings.eval_every):
                    with local_sgd.agreed(strategy, built.fragments):
                        journal.evaluation(done, evaluate(), wire_bytes)
                        if built.data.codec is not None and is_chief():
                            journal.samples(evaluation.samples(built.model, built.data, settings.sampling, done))
            finally:  # what fails in an evaluation must not cost the training
                if stop or _due(settings, done, settings.save_every):
                    arrays = checkpoints.read(built.state, done)
                    if is_chief():
                        metadata = {"wire_bytes": wire_bytes, "frozen": built.identity["frozen"]}
                        checkpoints.save(folder / "checkpoints", done, arrays, metadata, settings.keep)
                    saved = done
                    journal.traffic(meter.to_json(done))
            if stop:
                raise Interrupted(
                    f"stopped at step {done} of {settings.steps}, saved in {folder}; run the same command again to "
                    "go on"
                )


@contextlib.contextmanager
def _written_folder(folder: Path, content: dict[str, Any], plan: selection.Plan) -> Iterator[None]:
    with locked(folder):
        with writing(folder):
            write_json(folder / identity.FILE, content)
            write_json(folder / "plan.json", plan.to_json())
            write_text(folder / "plan.txt", plan_table(plan) + "\n")
        yield


@contextlib.contextmanager
def _connected(replicas: Replicas) -> Iterator[None]:
    """Says in one line which worker is lost, and closes the connections at the end."""
    mesh = replicas.wire.mesh
    try:
        yield
    except tf.errors.OpError as error:
        if mesh is not None and (lost := mesh.lost()):
            raise UserError(lost) from error
        # TensorFlow's collectives end like this on the workers that are left.
        if replicas.host and isinstance(error, (tf.errors.UnavailableError, tf.errors.AbortedError)):
            raise UserError(
                f"another worker is gone ({error.message.splitlines()[0]}): its own output says why; start all workers "
                "again"
            ) from error
        raise
    finally:
        if mesh is not None:
            mesh.close()


def _steps_until_event(settings: Settings, done: int, exchanges: Sequence[local_sgd.Exchange]) -> int:
    """How many steps the next call may make: up to the next exchange, evaluation, checkpoint or the end."""
    intervals = [every for every in (settings.eval_every, settings.save_every) if every]
    ends = [settings.steps, *((done // every + 1) * every for every in intervals)]
    ends += [exchange.fragment.reduction.next_due(done) for exchange in exchanges]
    return min(settings.steps_per_loop, min(ends) - done)


def _due(settings: Settings, done: int, every: int | None) -> bool:
    return done == settings.steps or (every is not None and done % every == 0)


def _finite_steps(losses: np.ndarray, norms: np.ndarray, scaled: bool) -> int:
    """How many steps there are before the first that has spoilt the weights.

    Under a loss scale an update whose sum overflowed was skipped, and has spoilt nothing.
    """
    bad = ~np.isfinite(losses) if scaled else ~(np.isfinite(losses) & np.isfinite(norms))
    return int(np.argmax(bad)) if bad.any() else len(losses)


def _not_finite(at: int, loss: float, norm: float, saved: int) -> UserError:
    what = "loss" if not np.isfinite(loss) else "gradient"
    kept = f"the checkpoint of step {saved} is kept" if saved else "no checkpoint was due before it"
    return UserError(
        f"the {what} is not finite at step {at} (loss {loss:.4g}, gradient norm {norm:.4g}); {kept}; lower the "
        "learning rate or bind run.clip_norm"
    )


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a flag that the loop reads between calls; the second one is not caught."""
    pressed: list[int] = []

    def handler(signum: int, frame: Any) -> None:
        pressed.append(signum)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
