"""The training loop: build, restore, train, evaluate, sample, save."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_partial import checkpoints, selection
from dist_partial.checkpoints import fingerprints
from dist_partial.config.settings import Settings
from dist_partial.distributed import consistency, network, traffic
from dist_partial.distributed.replicas import Replicas
from dist_partial.errors import AGAIN, INTERRUPTED, Ending, UserError
from dist_partial.files import locked, refuse_links, write_json, write_text, writing
from dist_partial.schedules.fixed import Constant
from dist_partial.selection.payload import average_bytes
from dist_partial.selection.table import plan_table
from dist_partial.session import put_back
from dist_partial.step import outer_step
from dist_partial.step.evaluation_step import evaluation_step
from dist_partial.step.layer_state import untouched
from dist_partial.training import evaluation
from dist_partial.training.build import build, restore
from dist_partial.training.failures import Interrupted, connected, explained, let_go
from dist_partial.training.metric_writer import MetricWriter
from dist_partial.training.schedule_runner import ScheduleRunner


def run(
    settings: Settings,
    folder: str | Path,
    operative: Callable[[], str] = lambda: "",
    unused: Callable[[], list[str]] = lambda: [],
    bindings: Mapping[str, str] | None = None,
) -> None:
    """Trains, evaluates and samples; goes on from what is in the folder.

    Keras's floatx and dtype policy are put back at the end; the random seeds of Python, NumPy, TensorFlow and Keras,
    which `run.seed` sets, stay as they are then.

    Args:
        settings: what to do.
        folder: the run folder, made if absent.
        operative: gives the text of operative_config.gin, once the first step has used everything.
        unused: gives the bindings that nothing has used by then.
        bindings: what the user has bound, which must be the same on all workers.

    Raises:
        UserError: any mistake of the user's, on any of the workers; a damaged folder; a loss that is not finite.
        Fault: a worker is missing or lost, or the disk is full.
        Raised: the user's own code raised something else, on any of the workers.
        Interrupted: Ctrl-C or SIGTERM on any of the workers; the state is saved.
    """
    replicas = settings.replicas()
    try:
        backend = contextlib.closing(replicas.backend) if replicas.backend else contextlib.nullcontext()
        with put_back(), backend, connected(replicas), explained():
            _run(settings, Path(folder), replicas, operative, unused, bindings or {})
    except BaseException as error:
        let_go(error)
        raise


def _run(
    settings: Settings,
    folder: Path,
    replicas: Replicas,
    operative: Callable[[], str],
    unused: Callable[[], list[str]],
    bindings: Mapping[str, str],
) -> None:
    strategy = replicas.strategy
    say: Callable[[str], None] = print if replicas.is_chief else lambda _: None
    say(replicas.description)
    workers = replicas.backend.size if replicas.backend else 1
    parts = strategy.num_replicas_in_sync * settings.accumulate
    if settings.global_batch % parts:
        raise UserError(
            f"run.global_batch = {settings.global_batch} does not divide into {strategy.num_replicas_in_sync} "
            f"replicas x {settings.accumulate} micro-batches: bind a multiple of {parts}"
        )
    built = build(settings, replicas)
    if replicas.backend is not None:
        facts = {"versions": consistency.versions(), "bindings": dict(bindings)}
        start = {
            fingerprints.INITIAL: built.fingerprint[fingerprints.INITIAL]
        }  # first, for all else that differs follows from it
        consistency.check(replicas.backend, facts | start | built.fingerprint)
    say(plan_table(built.plan, workers))
    for note in built.notes:
        say(note)
    checkpoint = restore(built, folder, say)
    done = checkpoint.step if checkpoint else 0
    sent = np.array([checkpoint.metadata[name] if checkpoint else 0 for name in traffic.SENT])
    if done >= settings.steps:
        say(f"finished: {folder} is at step {done} of {settings.steps}; bind a larger run.steps to go on")
        return replicas.finish()
    if checkpoint:
        say(f"going on from step {done} ({checkpoint.path})")

    runner = ScheduleRunner(built, settings, done, checkpoint.metadata.get("schedule") if checkpoint else None)
    evaluate = evaluation.evaluation(
        strategy,
        evaluation_step(strategy, built.model, built.loss),
        replicas.sum,
        built.data,
        examples=min(settings.eval_examples or len(built.data.evaluation), len(built.data.evaluation)),
        global_batch=settings.global_batch,
    )
    runner.compile_ahead(done)
    switched = runner.enter(done)
    constant = isinstance(built.schedule, Constant)
    plan = runner.phase.plan if constant else built.plan
    meter = network.Meter(workers, network.interface(replicas.host) if replicas.host else None, done)
    saved, first, kept = done, True, None

    # Between two exchanges replicas have statistics of their own, too; what is evaluated is one model.
    apart = bool(built.fragments) and not any(group.reduction.shared for group in built.plan.groups)
    average = (
        outer_step.averages(strategy, replicas.collectives, built.averaged)
        if apart and built.averaged
        else lambda: None
    )

    def evaluated() -> None:
        # Nothing but a step moves a state: recurrent layers with dropout draw random numbers in inference, too.
        with outer_step.agreed(strategy, built.fragments), untouched(strategy, built.layer_state.states):
            average()
            with connected(replicas), explained():  # the others wait here, and what fails must not wait for them
                metrics = evaluate()
            writer.evaluation(done, metrics, sent)
            if built.data.codec is not None and replicas.is_chief:
                try:
                    texts = evaluation.samples(built.model, built.data, settings.sampling, done)
                except UserError as error:  # of the first worker alone; the others train on
                    writer.say(f"step {done}: no sample: {error}")
                else:
                    writer.samples(texts)

    def save() -> None:
        frozen = checkpoints.frozen_fingerprints(built.model, built.plan, built.layer_state.moving)
        checkpoints.check_frozen(built.fingerprint["frozen"], frozen, done)
        arrays = checkpoints.read(built.state(), done, replicas.gather)
        # First, for a run that is killed once its last checkpoint is there has nothing left to do.
        writer.traffic(meter.to_json(done))
        if replicas.is_chief:
            metadata = dict(zip(traffic.SENT, sent.tolist(), strict=True))
            metadata |= {"frozen": built.fingerprint["frozen"]}
            metadata |= {} if constant else {"schedule": runner.to_json()}
            checkpoints.save(folder / "checkpoints", done, arrays, metadata, settings.keep)

    with (
        _written_folder(folder, built.fingerprint, plan, workers) if replicas.is_chief else contextlib.nullcontext(),
        MetricWriter(folder, done, settings.steps, sent, replicas.is_chief) as writer,
        _signals() as received,
    ):
        if runner.phase.train.without_gradient:
            writer.say(
                f"selected, but the loss does not depend on it: {', '.join(runner.phase.train.without_gradient)}"
            )
        for exchange in runner.phase.exchanges:
            local = exchange.fragment.reduction
            last = local.next_due(settings.steps) - local.sync_every
            if last != settings.steps:
                writer.say(
                    f"{local}: the last exchange follows step {last} of {settings.steps}; what replicas train after it "
                    "is not in the weights on which they agree"
                    if last > 0
                    else f"{local}: run.steps = {settings.steps} ends before the first exchange"
                )
        if plan.statistics:
            writer.say(
                f"running statistics of layers add {average_bytes(plan.statistics):,} bytes a step to the payload"
            )
        if settings.eval_first and done == 0:
            evaluated()
        if settings.activation_cache and runner.phase.activations is None:
            writer.say(
                "run.activation_cache keeps nothing yet: nothing below all that may be trained is frozen for good"
            )
        while done < settings.steps:
            if switched and not constant:
                writer.plan(done + 1, runner.phase.plan, runner.phase.digest)
            while runner.notes:
                writer.say(runner.notes.pop(0))
            if runner.phase.activations not in (None, kept):
                kept = runner.phase.activations
                writer.say(
                    f"run.activation_cache keeps the activations up to {kept.name!r}, at most {kept.bytes:,} bytes"
                )
            count = _steps_until_event(settings, done, runner.phase.exchanges, runner.next_switch(done))
            meter.start()
            result = runner.advance(count)
            each = traffic.sent_each(runner.phase.sent, built.plan, steps=1)
            by_step = sent + each * np.arange(1, count + 1)[:, np.newaxis]
            for exchange in runner.phase.exchanges:
                if exchange.fragment.reduction.due(done + count):
                    exchange.function()
                    by_step[-1] += traffic.sent_each(exchange.sent, built.plan)
            # All workers stop after the same call, whichever of them was told to, and all hear of a norm that is not
            # finite on one of them alone, which trains by itself.
            told = np.array([number in received for number in (signal.SIGINT, signal.SIGTERM)], np.float32)
            sums = replicas.sum(np.concatenate([result["loss"], result["gradient_norm"], told]))
            losses, norms, (interrupted, terminated) = sums[:count], sums[count:-2] / workers, sums[-2:]
            meter.stop(runner.phase.plan, done, done + count, int(by_step[-1, 0] - sent[0]), sums.nbytes)
            good = _finite_steps(losses, norms, scaled=built.scale is not None)
            writer.train(done + 1, losses[:good], norms[:good], by_step[:good])
            if good < count:
                raise _not_finite(done + good + 1, losses[good], norms[good], saved)
            if built.scale is not None and built.scale.exhausted(norms):
                raise UserError(
                    f"the gradient overflowed in every step up to {done + count}, though the loss is no longer scaled: "
                    "bind run.precision = 'mixed_bfloat16'"
                )
            done, sent = done + count, by_step[-1]
            if first:
                writer.configuration(operative(), unused())
                first = False
            stop = interrupted + terminated > 0 and done < settings.steps
            to_save = stop or _due(settings, done, settings.save_every)
            try:
                if _due(settings, done, settings.eval_every):
                    evaluated()
            except BaseException:  # which must not cost the training
                if to_save:
                    with contextlib.suppress(Ending):  # what differs between workers cannot be had without the others
                        save()
                raise
            if to_save:
                save()
                saved = done
            if stop:
                break
            if done < settings.steps:
                switched = runner.enter(done)
    replicas.finish()  # none ends before the last checkpoint is written
    if done < settings.steps:
        raise Interrupted(
            f"stopped at step {done} of {settings.steps}, saved in {folder}; run the same command again to go on",
            AGAIN if terminated else INTERRUPTED,
        )


@contextlib.contextmanager
def _written_folder(folder: Path, content: dict[str, Any], plan: selection.Plan, hosts: int) -> Iterator[None]:
    with locked(folder):
        # Whatever else is written there replaces what has its name.
        refuse_links(*(folder / name for name in ("checkpoints", "tensorboard", "metrics.jsonl", "samples.jsonl")))
        with writing(folder):
            write_json(folder / fingerprints.RUN_FILE, content)
            write_json(folder / "plan.json", plan.to_json())
            write_text(folder / "plan.txt", plan_table(plan, hosts) + "\n")
        yield


def _steps_until_event(
    settings: Settings, done: int, exchanges: Sequence[outer_step.Exchange], switch: int | None
) -> int:
    """How many steps the next call may make: up to the next switch, exchange, evaluation, checkpoint or the end."""
    intervals = [every for every in (settings.eval_every, settings.save_every) if every]
    ends = [
        settings.steps if switch is None else switch,
        settings.steps,
        *((done // every + 1) * every for every in intervals),
    ]
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
def _signals() -> Iterator[set[int]]:
    """Collects Ctrl-C and SIGTERM, for the loop to read between calls; a second Ctrl-C is not caught."""
    received: set[int] = set()
    if threading.current_thread() is not threading.main_thread():  # to which alone Python hands signals
        yield received
        return

    def handler(number: int, frame: Any) -> None:
        received.add(number)
        # A scheduler may repeat SIGTERM while the last checkpoint is written, and has SIGKILL; people have Ctrl-C.
        signal.signal(number, signal.SIG_IGN if number == signal.SIGTERM else before[number])

    before: dict[int, Any] = {}
    for each in (signal.SIGINT, signal.SIGTERM):
        before[each] = signal.signal(each, handler)
    try:
        yield received
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
