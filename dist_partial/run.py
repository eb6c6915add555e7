"""The one orchestration: build, restore, loop, evaluate, sample, save."""

import contextlib
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial import checkpoints, evaluation, identity, local_sgd, selection, step
from dist_partial.build import build, restore
from dist_partial.course import Course
from dist_partial.distributed import consistency, network, traffic
from dist_partial.distributed.replicas import Replicas
from dist_partial.errors import AGAIN, INTERRUPTED, Ending, Fault, UserError, of_graph, raised
from dist_partial.files import locked, refuse_links, write_json, write_text, writing
from dist_partial.layer_state import untouched
from dist_partial.reporting import Journal
from dist_partial.schedules.fixed import Constant
from dist_partial.selection.payload import average_bytes
from dist_partial.selection.table import plan_table
from dist_partial.session import put_back
from dist_partial.settings import Settings


class Interrupted(Exception):
    """Ctrl-C or SIGTERM stopped the run; everything is saved, and the message says how to go on.

    Attributes:
        code: the exit code of the process.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


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
        mesh = contextlib.closing(replicas.mesh) if replicas.mesh else contextlib.nullcontext()
        with put_back(), mesh, _connected(replicas), _explained():
            _run(settings, Path(folder), replicas, operative, unused, bindings or {})
    except BaseException as error:
        _let_go(error)
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
    workers = replicas.mesh.size if replicas.mesh else 1
    parts = strategy.num_replicas_in_sync * settings.accumulate
    if settings.global_batch % parts:
        raise UserError(
            f"run.global_batch = {settings.global_batch} does not divide into {strategy.num_replicas_in_sync} "
            f"replicas x {settings.accumulate} micro-batches: bind a multiple of {parts}"
        )
    built = build(settings, replicas)
    if replicas.mesh is not None:
        facts = {"versions": consistency.versions(), "bindings": dict(bindings)}
        start = {identity.START: built.identity[identity.START]}  # first, for all else that differs follows from it
        consistency.check(replicas.mesh, facts | start | built.identity)
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

    course = Course(built, settings, done, checkpoint.metadata.get("course") if checkpoint else None)
    evaluate = evaluation.evaluation(
        strategy,
        step.evaluation_step(strategy, built.model, built.loss),
        replicas.sum,
        built.data,
        examples=min(settings.eval_examples or len(built.data.evaluation), len(built.data.evaluation)),
        global_batch=settings.global_batch,
    )
    course.compile_ahead(done)
    switched = course.enter(done)
    constant = isinstance(built.schedule, Constant)
    plan = course.leg.plan if constant else built.plan
    meter = network.Meter(workers, network.interface(replicas.host) if replicas.host else None, done)
    saved, first, kept = done, True, None

    # Between two exchanges replicas have statistics of their own, too; what is evaluated is one model.
    apart = bool(built.fragments) and not any(group.reduction.shared for group in built.plan.groups)
    average = local_sgd.averages(strategy, replicas.wire, built.averaged) if apart and built.averaged else lambda: None

    def evaluated() -> None:
        # Nothing but a step moves a state: recurrent layers with dropout draw random numbers in inference, too.
        with local_sgd.agreed(strategy, built.fragments), untouched(strategy, built.layer_state.states):
            average()
            with _connected(replicas), _explained():  # the others wait here, and what fails must not wait for them
                metrics = evaluate()
            journal.evaluation(done, metrics, sent)
            if built.data.codec is not None and replicas.is_chief:
                try:
                    texts = evaluation.samples(built.model, built.data, settings.sampling, done)
                except UserError as error:  # of the first worker alone; the others train on
                    journal.say(f"step {done}: no sample: {error}")
                else:
                    journal.samples(texts)

    def save() -> None:
        frozen = checkpoints.frozen_fingerprints(built.model, built.plan, built.layer_state.moving)
        checkpoints.check_frozen(built.identity["frozen"], frozen, done)
        arrays = checkpoints.read(built.state(), done, replicas.gather)
        # First, for a run that is killed once its last checkpoint is there has nothing left to do.
        journal.traffic(meter.to_json(done))
        if replicas.is_chief:
            metadata = dict(zip(traffic.SENT, sent.tolist(), strict=True))
            metadata |= {"frozen": built.identity["frozen"]}
            metadata |= {} if constant else {"course": course.to_json()}
            checkpoints.save(folder / "checkpoints", done, arrays, metadata, settings.keep)

    with (
        _written_folder(folder, built.identity, plan, workers) if replicas.is_chief else contextlib.nullcontext(),
        Journal(folder, done, settings.steps, sent, replicas.is_chief) as journal,
        _signals() as received,
    ):
        if course.leg.train.without_gradient:
            journal.say(f"selected, but the loss does not depend on it: {', '.join(course.leg.train.without_gradient)}")
        for exchange in course.leg.exchanges:
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
            journal.say(
                f"running statistics of layers add {average_bytes(plan.statistics):,} bytes a step to the payload"
            )
        if settings.eval_first and done == 0:
            evaluated()
        if settings.cache and course.leg.activations is None:
            journal.say(
                "run.cache keeps nothing yet: nothing that comes before all that may be trained is frozen for good"
            )
        while done < settings.steps:
            if switched and not constant:
                journal.plan(done + 1, course.leg.plan, course.leg.digest)
            while course.notes:
                journal.say(course.notes.pop(0))
            if course.leg.activations not in (None, kept):
                kept = course.leg.activations
                journal.say(f"run.cache keeps the activations up to {kept.name!r}, at most {kept.bytes:,} bytes")
            count = _steps_until_event(settings, done, course.leg.exchanges, course.next_switch(done))
            meter.start()
            result = course.advance(count)
            each = traffic.sent_each(course.leg.sent, built.plan, steps=1)
            by_step = sent + each * np.arange(1, count + 1)[:, np.newaxis]
            for exchange in course.leg.exchanges:
                if exchange.fragment.reduction.due(done + count):
                    exchange.function()
                    by_step[-1] += traffic.sent_each(exchange.sent, built.plan)
            # All workers stop after the same call, whichever of them was told to, and all hear of a norm that is not
            # finite on one of them alone, which trains by itself.
            told = np.array([number in received for number in (signal.SIGINT, signal.SIGTERM)], np.float32)
            sums = replicas.sum(np.concatenate([result["loss"], result["gradient_norm"], told]))
            losses, norms, (interrupted, terminated) = sums[:count], sums[count:-2] / workers, sums[-2:]
            meter.stop(course.leg.plan, done, done + count, int(by_step[-1, 0] - sent[0]), sums.nbytes)
            good = _finite_steps(losses, norms, scaled=built.scale is not None)
            journal.train(done + 1, losses[:good], norms[:good], by_step[:good])
            if good < count:
                raise _not_finite(done + good + 1, losses[good], norms[good], saved)
            if built.scale is not None and built.scale.exhausted(norms):
                raise UserError(
                    f"the gradient overflowed in every step up to {done + count}, though the loss is no longer scaled: "
                    "bind run.precision = 'mixed_bfloat16'"
                )
            done, sent = done + count, by_step[-1]
            if first:
                journal.configuration(operative(), unused())
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
                switched = course.enter(done)
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
            write_json(folder / identity.FILE, content)
            write_json(folder / "plan.json", plan.to_json())
            write_text(folder / "plan.txt", plan_table(plan, hosts) + "\n")
        yield


@contextlib.contextmanager
def _connected(replicas: Replicas) -> Iterator[None]:
    """Turns what a lost worker leads to into what has become of it, and tells the others why this one ends."""
    mesh = replicas.mesh
    if mesh is None:
        yield
        return
    try:
        try:
            yield
        except tf.errors.OpError as error:
            # TensorFlow's own collectives may hear of it first.
            until = time.monotonic() + 2.0
            while not mesh.lost() and time.monotonic() < until:
                time.sleep(0.05)
            if lost := mesh.lost():
                raise lost from error
            # TensorFlow's collectives end like this on the workers that are left.
            if isinstance(error, (tf.errors.UnavailableError, tf.errors.AbortedError)):
                what = error.message.splitlines()[0]
                raise Fault(
                    f"another worker is gone ({what}): its own output says why; run the same command again"
                ) from error
            raise
    except (Exception, SystemExit) as error:
        mesh.close(error if isinstance(error, Ending) else raised("", error))
        raise


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turns what TensorFlow says, after many lines, of an id out of range or of Python code in a graph into one."""
    try:
        yield
    except tf.errors.OpError as error:
        ids = "run.data has the {} {}, and run.model has {} of them, from 0 on: bind sizes that fit each other"
        for pattern, what in (
            (r"label value of (-?\d+) which is outside the valid range of \[0, (\d+)\)", "class id"),
            (r"indices\[[\d,]+\] = (-?\d+) is not in \[0, (\d+)\)", "id"),
        ):
            if found := re.search(pattern, error.message):
                raise UserError(ids.format(what, found[1], found[2])) from error
        if reason := of_graph(error.message):
            raise reason from error
        raise


def _let_go(error: BaseException | None) -> None:
    """Lets go of what the frames of an exception and of its causes hold: iterators, for one.

    An iterator that is destroyed while Python shuts down waits for ever where its thread waits in Python code, as one
    that fetches examples ahead does (TensorFlow 2.21).
    """
    while error is not None:
        for called, _ in traceback.walk_tb(error.__traceback__):
            frame: FrameType | None = called
            # Of the frames that TensorFlow hides from a traceback, too; those that still run cannot be cleared.
            with contextlib.suppress(RuntimeError):
                while frame is not None:
                    frame.clear()
                    frame = frame.f_back
        error = error.__cause__ or error.__context__


def _steps_until_event(
    settings: Settings, done: int, exchanges: Sequence[local_sgd.Exchange], switch: int | None
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
