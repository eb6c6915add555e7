"""Events between steps, which know when they are due: periods, saving and stopping; `evaluation.py` has evaluation."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dist_partial import checkpoints
from dist_partial.distributed import network
from dist_partial.errors import AGAIN, INTERRUPTED, Ending, Interrupted, first_line
from dist_partial.training.build import Trainer
from dist_partial.training.metric_writer import MetricWriter
from dist_partial.training.state import TrainState

BEST = "best"  # the folder of the best checkpoint


class Event(Protocol):
    """Follows certain steps, up to which one call may make steps.

    Examples:
        >>> class Doublings:
        ...     def next_due(self, step):
        ...         return 2 ** int(step).bit_length()
        >>> [next_due(step, Doublings(), Every(10, last=100)) for step in (3, 8, 10)]
        [4, 10, 16]
    """

    def next_due(self, step: int) -> int: ...


def next_due(step: int, *events: Event) -> int:
    """Gives the first step after `step` that one of the events follows.

    Examples:
        >>> next_due(4, Every(6, last=10), Every(5, last=10))
        5
    """
    return min(event.next_due(step) for event in events)


@dataclasses.dataclass(frozen=True)
class Every:
    """Repeats: due after every `period` steps, if there is one, and after the last step.

    Examples:
        >>> every = Every(4, last=10)
        >>> [step for step in range(1, 11) if every.due(step)]
        [4, 8, 10]
        >>> every.next_due(8)
        10
    """

    period: int | None
    last: int

    def due(self, step: int) -> bool:
        """Tells whether the event follows `step`, counted from 1."""
        return step == self.last or (self.period is not None and step % self.period == 0)

    def next_due(self, step: int) -> int:
        """Gives the first step after `step` that the event follows."""
        return self.last if self.period is None else min(self.last, (step // self.period + 1) * self.period)


class Saving:
    """Saves a checkpoint every `run.save_every` steps and at the end.

    The values are read between two steps; with `run.save_async` a thread checks and writes them while the next steps
    are made. A context manager: at its end all is written.

    Attributes:
        meter: counts what this process has sent.

    Args:
        trainer: of the run.
        folder: the run folder.
        state: with which the run begins.
    """

    def __init__(self, trainer: Trainer, folder: Path, state: TrainState) -> None:
        replicas = trainer.replicas
        interface = network.interface(replicas.host) if replicas.host else None
        self._trainer, self._folder = trainer, folder
        self.meter = network.Meter(replicas.workers, interface, state.step)
        self._every = Every(trainer.settings.save_every, trainer.settings.steps)
        self._thread = ThreadPoolExecutor(1, "checkpoints", _yields) if trainer.settings.save_async else None
        self._written: Future[None] | None = None  # what the thread is at

    def __enter__(self) -> "Saving":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        try:
            self.settle()
        except Exception as error:
            if kind is None:
                raise
            self._trainer.replicas.say(f"a checkpoint is not saved: {first_line(error)}")  # the other one ends the run

    def due(self, step: int) -> bool:
        return self._every.due(step)

    def next_due(self, step: int) -> int:
        return self._every.next_due(step)

    def __call__(self, state: TrainState, writer: MetricWriter) -> None:
        # First, for a run that is killed once its last checkpoint is there has nothing left to do.
        self._write(
            state, "checkpoints", self._trainer.settings.keep, lambda: writer.traffic(self.meter.to_json(state.step))
        )

    def best(self, state: TrainState) -> None:
        """Saves a checkpoint beside the others, in place of the best so far."""
        self._write(state, BEST, 1)

    def settle(self) -> None:
        """Waits until what was saved is written.

        Raises:
            UserError: it cannot be.
        """
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def kept(self) -> str:
        """Says which checkpoint is the newest, once it is written; all workers call it, and none ends before."""
        said, backend = "", self._trainer.replicas.backend
        try:
            self.settle()
        except Ending as error:
            said = f"a later one is not saved: {first_line(error)}, and "
        if backend is not None:
            with contextlib.suppress(Ending):  # of a lost worker, which then matters no more
                backend.barrier()
        saved = max(checkpoints.steps(self._folder / "checkpoints"), default=0)
        return said + (f"the checkpoint of step {saved} is kept" if saved else "no checkpoint was due before it")

    def _write(self, state: TrainState, name: str, keep: int, first: Callable[[], None] = lambda: None) -> None:
        trainer = self._trainer
        self.settle()  # of two at a time the values of both would be in memory
        arrays = checkpoints.read(state.variables, trainer.replicas.gather)
        first()
        metadata = state.metadata() | {"frozen": trainer.fingerprint["frozen"]}

        def write() -> None:
            frozen = checkpoints.frozen_fingerprints(trainer.model, trainer.plan, trainer.layer_state.moving)
            checkpoints.check_frozen(metadata["frozen"], frozen, state.step)
            if trainer.replicas.is_chief:
                checkpoints.save(self._folder / name, state.step, arrays, metadata, keep)

        if self._thread is None:
            write()
        else:
            self._written = self._thread.submit(write)


def _yields() -> None:
    """Has this thread leave the CPU to others, where the system lets it: what it does may take as long as it likes."""
    with contextlib.suppress(OSError):
        if sys.platform == "linux":  # elsewhere a thread has the priority of its process
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


class Stopping:
    """Stops all workers after the same step once one of them got Ctrl-C or SIGTERM; a second Ctrl-C is not caught.

    A context manager, which catches the signals. Workers vote by sums, which they make anyway.

    Args:
        last: the step at which the run ends by itself.

    Examples:
        >>> stop = Stopping(last=10)
        >>> stop.count(stop.votes())
        >>> stop.due(9), stop.due(10)
        (False, True)
        >>> stop.count(np.array([0, 1]))  # one worker got SIGTERM
        >>> stop.due(9)
        True
    """

    def __init__(self, last: int) -> None:
        self._last = last
        self._received: set[int] = set()
        self._before: dict[int, Any] = {}
        self._interrupted = self._terminated = False

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():  # to which alone Python hands signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._before.items():
            signal.signal(number, previous)

    def _receive(self, number: int, _: Any) -> None:
        self._received.add(number)
        # A scheduler may repeat SIGTERM while the last checkpoint is written, and has SIGKILL; people have Ctrl-C.
        signal.signal(number, signal.SIG_IGN if number == signal.SIGTERM else self._before[number])

    def votes(self) -> np.ndarray:
        """What this worker got, float32 [2]; the sum over the workers goes to `count`."""
        return np.array([number in self._received for number in (signal.SIGINT, signal.SIGTERM)], np.float32)

    def count(self, votes: np.ndarray) -> None:
        """Takes what all workers got, [2]."""
        self._interrupted, self._terminated = (votes > 0).tolist()

    @property
    def interrupted(self) -> bool:
        """Whether a worker has got a signal."""
        return self._interrupted or self._terminated

    def due(self, step: int) -> bool:
        """Tells whether the run ends after `step`: it is the last, or a worker has got a signal."""
        return step >= self._last or self.interrupted

    def __call__(self, state: TrainState, folder: Path) -> None:
        """Raises Interrupted, with the exit code that fits what was received."""
        raise Interrupted(
            f"stopped at step {state.step} of {self._last}, saved in {folder}; run the same command again to go on",
            AGAIN if self._terminated else INTERRUPTED,
            state,
        )


def going_on(state: TrainState, folder: Path, steps: int) -> str:
    """Says from where a run goes on, or that it is finished.

    Examples:
        >>> state = TrainState(None, None, None, [], [], [], [], step=10)
        >>> going_on(state, Path("runs/mine"), steps=10)
        'finished: runs/mine is at step 10 of 10; bind a larger run.steps to go on'
    """
    if state.step > steps:
        return (
            f"finished: {folder} is at step {state.step}, beyond run.steps = {steps}; bind a larger run.steps to go on"
        )
    if state.step == steps:
        return f"finished: {folder} is at step {state.step} of {steps}; bind a larger run.steps to go on"
    if state.stopped:
        return (
            f"finished: {folder} stopped at step {state.step} of {steps}: {state.stopped}; change what has stopped it "
            "to go on, or choose another --run_dir"
        )
    return f"going on from step {state.step} ({state.checkpoint})"
