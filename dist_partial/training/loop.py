"""The training loop on one screen: connect, build, restore, loop, finish.

What happens between steps is in `events.py`, what is trained when in `schedule_runner.py`, and the step itself in
`step/train_step.py`, which `_train` traces and `_advance` runs.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dist_partial.config.settings import Settings
from dist_partial.data import reading
from dist_partial.data.kept import KEPT
from dist_partial.distributed import traffic
from dist_partial.distributed.replicas import Replicas
from dist_partial.errors import Ending, Fault, UserError, calling
from dist_partial.selection.table import plan_summary
from dist_partial.session import put_back
from dist_partial.step.optimizers import finalize
from dist_partial.terminal import say
from dist_partial.trackers import Following
from dist_partial.training import evaluation, events, failures, run_folder
from dist_partial.training.build import Trainer, build, restore
from dist_partial.training.checks import check_division, check_workers, notes_on_callbacks
from dist_partial.training.hand_over import hand_over
from dist_partial.training.judge import Judge, learning_rates, notes_on_averages, notes_on_clipping, reopened
from dist_partial.training.metric_writer import MetricWriter
from dist_partial.training.profile import Profile
from dist_partial.training.progress import Progress
from dist_partial.training.recovery import Recovery, Rejoined, Resized
from dist_partial.training.schedule_runner import CompiledPhase, ScheduleRunner
from dist_partial.training.state import TrainState
from dist_partial.training.times import Call, Times
from dist_partial.validation import shown


@failures.released()
def run(
    settings: Settings,
    folder: str | Path,
    operative: Callable[[], str] = lambda: "",
    unused: Callable[[], list[str]] = lambda: [],
    bindings: Mapping[str, str] | None = None,
) -> Trainer:
    """Trains, evaluates, samples and saves; goes on from what is in the folder. Returns what it computed with.

    Keras's floatx and dtype policy are put back at the end; the random seeds that `run.seed` sets stay.

    Args:
        settings: what to do.
        folder: the run folder, made if absent.
        operative: gives the text of operative_config.gin, after the first step has used everything; on one worker.
        unused: gives the bindings that nothing has used by then.
        bindings: what the user has bound, which must be the same on all workers.

    Raises:
        UserError, Fault, Raised: see `errors`; on every worker, whichever of them it happened on.
        Interrupted: Ctrl-C or SIGTERM on any of the workers; the state is saved.
    """
    folder, replicas, words, recovery, stop = Path(folder), _replicas(settings), _Words(operative, unused), None, None
    with (
        put_back(),
        failures.ended_together(replicas),
        Progress(replicas.is_chief) as progress,
        Following(settings.trackers, folder, say) as following,
        Profile(settings.profile if replicas.is_chief else None, folder) as profile,
        contextlib.ExitStack() as stack,
    ):
        while True:
            with reading(settings.readers, settings.reader_processes):
                trainer = _built(settings, replicas, bindings or {}, progress)
                recovery = Recovery(trainer, bindings or {}, recovery)
                joins = replicas.membership is not None and replicas.membership.joins
                state = trainer.state() if joins else _restored(trainer, folder, following)
                if state.step >= settings.steps or state.stopped:
                    recovery.end()
                    replicas.finish()
                    return trainer
                stop = stop or stack.enter_context(events.Stopping(settings.steps))
                runner, evaluate = ScheduleRunner(trainer, state, progress), evaluation.Evaluation(trainer, progress)
                job = _Run(folder, runner, evaluate, recovery, stop, words, progress, following, profile)
                try:
                    job, state = _ready(job, state, joins)
                    while True:
                        try:
                            _train(job, state)
                            return trainer
                        except Rejoined as met:
                            state = met.state
                        job.runner.go_to(state)
                except Resized as met:
                    hand_over(trainer, recovery, met, folder)
            replicas = replicas.again()


@dataclasses.dataclass
class _Words:
    """What the writer gets once, after the first step of this process."""

    operative: Callable[[], str]
    unused: Callable[[], list[str]]
    said: bool = False

    def say(self, writer: MetricWriter, active: bool) -> None:
        if not self.said:
            self.said = True
            writer.configuration(self.operative() if active else "", self.unused())


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a run goes on with after a worker was lost."""

    folder: Path
    runner: ScheduleRunner
    evaluate: evaluation.Evaluation
    recovery: Recovery
    stop: events.Stopping
    words: _Words
    progress: Progress
    following: Following
    profile: Profile


def _ready(run: _Run, state: TrainState, joins: bool) -> tuple[_Run, TrainState]:
    """Compiles what shows mistakes before the training, or, in place of a lost worker, all that may, and joins."""
    if not joins:
        run.evaluate.compile()
        return run, state
    trainer, before = run.runner.trainer, run.runner.trainer.replicas.rank
    cached = trainer.settings.activation_cache is not None  # whose batches follow from the step
    if not cached:
        for trace in run.runner.prepare():
            trace()
    state, backend = run.recovery.join(), trainer.replicas.backend
    if cached or (backend is not None and backend.knows_rank and backend.rank != before):
        return dataclasses.replace(run, runner=ScheduleRunner(trainer, state, run.progress)), state
    run.runner.go_to(state)
    return run, state


def _train(run: _Run, state: TrainState) -> None:
    """Trains from a state to the end; raises Rejoined where a worker was lost, and all have met again."""
    runner, evaluate, recovery, stop = run.runner, run.evaluate, run.recovery, run.stop
    trainer, settings, replicas = runner.trainer, runner.trainer.settings, runner.trainer.replicas
    judge, owes = Judge(trainer, state), recovery.owes
    stop.count(recovery.votes)
    try:
        for trace in () if owes else runner.enter(state.step):
            trace()
    except Exception as error:
        raise Rejoined(recovery.rejoined(error)) from None
    times = Times(trainer)
    with (
        run_folder.begun(run.folder, trainer, None if owes else runner.plan, comes=bool(recovery.lost)),
        MetricWriter(
            run.folder, state.step, settings.steps, replicas.is_chief, not owes, recovery.rows, run.following
        ) as writer,
        events.Saving(trainer, run.folder, state) as save,
        judge.training(),
    ):
        try:
            recovery.begin(dataclasses.replace(state, judged=judge.to_json()))
            if recovery.lost:
                writer.workers(recovery.went_on(), recovery.gone)
            if owes:
                _after_steps(run, state, writer, (save, judge))
            for trace in runner.enter(state.step) if owes and not (stop.due(state.step) or judge.reason) else ():
                trace()
            if not owes:
                for note in runner.opening_notes():
                    writer.say(note)
            if settings.eval_first and state.step == 0:
                evaluate(state, writer)
            while not (stop.due(state.step) or judge.reason):
                runner.report(writer, state.step)
                due = events.next_due(state.step, evaluate, save, runner, run.profile, *runner.exchanges)
                count = min(settings.steps_per_loop, due - state.step)
                settle = any(each.due(state.step + count) for each in (evaluate, save, stop))
                state = _advance(run, state, count, writer, (save, judge, times), settle)
                run.words.say(writer, replicas.is_chief)
                times.report(state.step, writer, evaluate.due(state.step))
                _after_steps(run, state, writer, (save, judge))
                for trace in () if stop.due(state.step) or judge.reason else runner.enter(state.step):
                    trace()
            save.settle()
            if replicas.backend is not None:
                replicas.backend.barrier()  # none ends before the last checkpoint is written
            for text in filter(None, [*runner.closing_notes(state.step), recovery.goodput()]):
                writer.say(text)
            recovery.end()
            replicas.finish()
        except Exception as error:
            raise Rejoined(recovery.rejoined(error, save.settle)) from None
    if stop.interrupted and state.step < settings.steps:
        stop(state, run.folder)


def _replicas(settings: Settings) -> Replicas:
    with calling("run.replicas"):
        made = settings.replicas()
    if not isinstance(made, Replicas):
        raise UserError(
            f"run.replicas made {shown(made)}: return Replicas, as dist_partial.distributed.replicas.over(backend) does"
        )
    return made


def _built(settings: Settings, replicas: Replicas, bindings: Mapping[str, str], progress: Progress) -> Trainer:
    """Builds the trainer, the same on all workers, and prints its replicas and its plan."""
    if not (replicas.membership and replicas.membership.joins):
        replicas.say(replicas.description)
    check_division(settings, replicas.topology.replicas)
    progress.begin("building the model")
    trainer = build(settings, replicas)
    progress.end()
    if trainer.data.fingerprint == KEPT:
        raise UserError(
            "run.data is kept_examples, the few that dist_partial.train has kept for sample and export: call it again "
            "with the run's folder to go on, or bind run.data to all examples"
        )
    if replicas.membership and replicas.membership.joins:
        return trainer  # the others have said all, and are asked when they are met
    check_workers(replicas, trainer.fingerprint, bindings)
    replicas.say(
        "\n".join(
            [
                plan_summary(trainer.plan, replicas.workers),
                *trainer.notes,
                *notes_on_averages(trainer),
                *notes_on_clipping(trainer),
                *notes_on_callbacks(settings),
            ]
        )
    )
    return trainer


def _restored(trainer: Trainer, folder: Path, following: Following) -> TrainState:
    """Restores the newest checkpoint, makes up the evaluation that it owes, and says that the run goes on."""
    state = restore(trainer, folder, trainer.replicas.say)
    state = reopened(trainer, evaluation.make_up(trainer, folder, state, following))
    if state.checkpoint:
        trainer.replicas.say(events.going_on(state, folder, trainer.settings.steps))
    return state


def _advance(
    run: _Run,
    state: TrainState,
    count: int,
    writer: MetricWriter,
    followers: tuple[events.Saving, Judge, Times],
    settle: bool,
) -> TrainState:
    """Makes `count` steps and the exchanges that follow, and records them; returns the state after them.

    With `settle` it waits until nothing travels: a checkpoint holds what has, whether or not it is applied by then.
    """
    runner, trainer, phase, done = run.runner, run.runner.trainer, run.runner.phase, state.step + count
    save, judge, times = followers
    judge.begin_steps()
    save.meter.start()
    began, waited, workers = time.perf_counter(), trainer.replicas.waited - times.owed, trainer.replicas.workers
    first = runner.compiles
    with run.profile.of(state.step):
        result = runner.advance(count)
    each = traffic.sent_each(phase.sent, phase.plan, steps=1)
    sent = state.sent + each * np.arange(count + 1)[:, np.newaxis]
    sent[-1] += _exchange(phase, done, settle)
    # All workers stop after the same call, whichever of them got the signal, and all hear of a norm that is not finite
    # on one of them alone, which trains by itself.
    votes = np.append(run.stop.votes(), judge.wants_to_stop)
    until = trainer.replicas.waited
    own = [trainer.replicas.alone(each) for each in (until - waited, np.sum(result["waited"]))]
    parts = [result["loss"], result["gradient_norm"], votes, *own, np.ravel(result.get("metrics", ()))]

    def finish(sums: np.ndarray) -> TrainState:
        losses, norms, votes, waited, data, metrics = np.split(sums, np.cumsum([len(part) for part in parts])[:-1])
        norms = norms / workers  # of the call: by now more or fewer may have met
        times.add(Call(count, time.perf_counter() - began, waited, data, phase.flops, first))
        times.owed = trainer.replicas.waited - until
        run.stop.count(votes[:2])
        if votes[2]:
            judge.stop()
        save.meter.stop(phase.plan, state.step, done, int(sent[-1, 0] - sent[0, 0]), sums.nbytes, run.recovery.copied)
        good = failures.finite_steps(losses, norms, trainer.scale)
        metrics = metrics.reshape(count, -1)[:good]
        results = [trainer.objective.results(row, training=True) for row in metrics]
        rates = learning_rates([group.optimizer for group in trainer.optimizers])
        rows = writer.train(state.step + 1, losses[:good], norms[:good], sent[: good + 1], [m | rates for m in results])
        if judge.made_steps(losses, metrics, results):
            return state
        order = {"global_batch": trainer.settings.global_batch, "seed": trainer.settings.seed}
        blamed = functools.partial(failures.not_finite, trainer.data.train, **order)
        failures.check_finite(losses, norms, state.step, save.kept, trainer.scale, blamed)
        after = dataclasses.replace(state.after(sent[1:]), schedule=runner.to_json())
        if run.recovery.stays:  # or nothing of it is needed after each call
            run.recovery.keep(dataclasses.replace(after, judged=judge.to_json()), votes[:2], sums, rows)
        return after

    return finish(run.recovery.sum(np.concatenate(parts, dtype=np.float64), done, finish))


def _exchange(phase: CompiledPhase, done: int, settle: bool) -> np.ndarray:
    """Applies the exchanges that have come, and begins those that are due; returns what they send."""
    sent = np.zeros(len(traffic.SENT), np.int64)
    for exchange in phase.exchanges:
        exchange.apply(done)
    for exchange in phase.exchanges:
        if exchange.due(done):
            exchange.begin(done)
            sent += traffic.sent_each(exchange.sent, phase.plan)
        if settle:  # before the votes, after which all workers have what the meter counts
            exchange.join()
    return sent


def _after_steps(run: _Run, state: TrainState, writer: MetricWriter, followers: tuple[events.Saving, Judge]) -> None:
    """Evaluates and saves where that is due; a failed evaluation costs no training.

    The checkpoint then says that the evaluation is owed, and the next run in the folder makes it up: see `make_up`.
    """
    (save, judge), runner, evaluate, stop = followers, run.runner, run.evaluate, run.stop
    trainer = runner.trainer
    if judge.broke_off:  # with weights that are not finite, which would only take the place of good ones
        writer.say(f"stopped after step {state.step} of {trainer.settings.steps}: {judge.reason}; {save.kept()}")
        return
    to_save = save.due(state.step) or stop.due(state.step)
    # That a signal or a callback ends the run here is known only since the votes, before which `_advance` settles.
    for exchange in runner.exchanges if to_save or judge.reason else ():
        exchange.join()
    if state.step >= trainer.settings.steps:
        finalize(trainer.replicas.strategy, trainer.optimizers)
    judged = judge.to_json()
    try:
        if evaluate.due(state.step) or judge.reason:
            with judge.weights():
                held_out: dict[str, float] = {}
                with judge.testing(held_out):
                    held_out |= evaluate(state, writer)
                better = judge.evaluated(state.step, held_out)
                state = dataclasses.replace(state, judged=judge.to_json())
                if better:
                    save.best(state)
    except BaseException as error:
        if to_save and not (isinstance(error, Fault) and run.recovery.stays):
            with contextlib.suppress(Ending):  # what differs between workers cannot be had without the others
                save(dataclasses.replace(state, evaluated=False, judged=judged), writer)
        raise
    if judge.reason:
        writer.say(f"stopped at step {state.step} of {trainer.settings.steps}: {judge.reason}")
        finalize(trainer.replicas.strategy, trainer.optimizers)
    if to_save or judge.reason:
        save(dataclasses.replace(state, judged=judge.to_json()), writer)
