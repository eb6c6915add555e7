"""What steps take: how long they wait for examples and for other workers, and how fast they go."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from dist_partial.data import Dataset, Source, faster
from dist_partial.training.build import Trainer
from dist_partial.training.metric_writer import MetricWriter


@dataclasses.dataclass(frozen=True)
class Call:
    """Holds what a call of the compiled step has taken, on all workers.

    Attributes:
        steps: that it made.
        seconds: of the call.
        waited: of them, [workers], those in which each waited for the others.
        data: of them, [workers], those in which each waited for its examples.
        flops: what a worker computes in a step, from `flops`; None if it is not known.
        first: whether TensorFlow, or XLA, still compiled in it.
    """

    steps: int
    seconds: float
    waited: np.ndarray
    data: np.ndarray
    flops: int | None = None
    first: bool = False


class Times:
    """Follows what the steps of a run take, and records and says it when it is due.

    Attributes:
        owed: seconds in which this worker waited for the others in the sum that ends a call, after it has said how
            long it waited before; the next call has them besides.

    Args:
        trainer: of the run.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._data, self._workers = DataWaits(trainer.data.train), WorkerWaits(trainer.replicas.workers)
        self.owed = 0.0
        self._speed = Speed(trainer.settings.global_batch, tokens(trainer.data))

    def add(self, call: Call) -> None:
        self._data.add(float(call.data.mean()), call.seconds)
        self._workers.add(call.seconds, call.waited)
        self._speed.add(call)

    def report(self, step: int, writer: MetricWriter, evaluated: bool) -> None:
        """Reports after `step`, and the more if an evaluation is due."""
        self._data.report(writer.say, evaluated)
        self._speed.report(step, writer.speed, evaluated)
        if evaluated:
            self._workers.report(step, writer.say, writer.workers)


class Speed:
    """Adds up what calls of the step have taken, for a row of `speed.jsonl` with each evaluation and each half minute.

    Calls in which something is compiled are left out.

    Args:
        batch: examples a step, of all workers.
        tokens: of an example; None if it has none.

    Examples:
        >>> speed = Speed(batch=32, tokens=64)
        >>> speed.add(Call(steps=10, seconds=2.0, waited=np.array([0.5, 0.0]), data=np.array([0.0, 0.25]), flops=10**9))
        >>> speed.report(10, lambda row: print({name: row[name] for name in list(row)[3:]}), evaluated=True)
        {'examples_per_second': 160.0, 'tokens_per_second': 10240.0, 'flops_per_second': 10000000000.0,
         'computed_seconds': [1.5, 1.75], 'waited_seconds': [0.5, 0.0], 'data_seconds': [0.0, 0.25]}
    """

    SECONDS = 30.0

    def __init__(self, batch: int, tokens: int | None) -> None:
        self._batch, self._tokens = batch, tokens
        self._calls: list[Call] = []
        self._began = time.monotonic()

    def add(self, call: Call) -> None:
        if not call.first:
            self._calls.append(call)

    def report(self, step: int, record: Callable[[dict[str, Any]], None], evaluated: bool) -> None:
        """Records the calls since the last row, if one is due after `step`."""
        passed = time.monotonic() - self._began
        if not self._calls or not (evaluated or passed > self.SECONDS):
            return
        calls, self._calls, self._began = self._calls, [], time.monotonic()
        seconds, steps = sum(call.seconds for call in calls), sum(call.steps for call in calls)
        waited, data = sum(call.waited for call in calls), sum(call.data for call in calls)
        row = {"step": step, "seconds": round(seconds, 3), "share_of_time": round(min(seconds / passed, 1.0), 4)}
        row["examples_per_second"] = _rounded(self._batch * steps / seconds)
        if self._tokens:
            row["tokens_per_second"] = _rounded(self._batch * self._tokens * steps / seconds)
        if all(call.flops is not None for call in calls):
            computed = sum(len(call.waited) * call.steps * (call.flops or 0) for call in calls)
            row["flops_per_second"] = _rounded(computed / seconds)
        each = {"computed_seconds": seconds - waited - data, "waited_seconds": waited, "data_seconds": data}
        record(row | {name: np.round(values, 3).tolist() for name, values in each.items()})


def tokens(data: Dataset) -> int | None:
    """Counts the tokens of an example of text: the ids of what the model reads; None of other data.

    Examples:
        >>> from dist_partial.data import stdlib_corpus
        >>> tokens(stdlib_corpus(window=64))
        64
    """
    if data.codec is None:
        return None
    ids = [part for part in keras.tree.flatten(data.train.spec[0]) if part.dtype.is_integer and part.shape.rank == 1]
    lengths = [part.shape[0] for part in ids]
    return max((length for length in lengths if length), default=None)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


class DataWaits:
    """Adds up how long steps waited for their examples, and says so where it is long.

    The first call is left out: reading begins with it.

    Args:
        source: the examples to train on.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> waits = DataWaits(ArraySource(np.arange(3)))
        >>> for waited, took in ((5.0, 5.1), (1.1, 4.2), (2.0, 6.0)):
        ...     waits.add(waited, took)
        >>> waits.report(print, evaluated=False)
        data: steps waited 3.1 s of 10.2 s for examples (30 %): bind run.reader_processes where Python computes, ...
    """

    def __init__(self, source: Source) -> None:
        self._advice = faster(source)
        self._waited = self._took = 0.0
        self._seconds = 10.0  # of steps, after which it is said
        self._begun = False

    def add(self, waited: float, took: float) -> None:
        """Takes the seconds in which steps waited, a mean over the workers, and those that the steps took."""
        if self._begun:
            self._waited += waited
            self._took += took
        self._begun = True

    def report(self, say: Callable[[str], None], evaluated: bool) -> None:
        """Says how long the steps since the last report waited, once that is a tenth of the time, and a second.

        Args:
            say: gets the line.
            evaluated: whether an evaluation is due, at which it is said as well; otherwise after 10 seconds of steps,
                and then after twice as many each time.
        """
        waited, took = self._waited, self._took
        if not evaluated and took < self._seconds:
            return
        said = waited > max(0.1 * took, 1.0)
        if said or took > 60:  # what was long ago says little of what is now
            self._waited = self._took = 0.0
        if said:
            self._seconds = min(2 * self._seconds, 600)
            say(
                f"data: steps waited {waited:.1f} s of {took:.1f} s for examples ({100 * waited / took:.0f} %): "
                f"{self._advice}, or do less for an example"
            )


class WorkerWaits:
    """Adds up how long each worker waited for the others in a call of the step: who waits least is the slowest.

    Args:
        workers: how many there are.

    Examples:
        >>> waits = WorkerWaits(workers=3)
        >>> waits.add(12.0, np.array([5.0, 0.5, 4.5]))
        >>> waits.report(100, print, lambda row: None)
        step 100: the others waited 4.2 s of 12.0 s for worker 1, the slowest (35 %)
    """

    def __init__(self, workers: int) -> None:
        self._took, self._waited = 0.0, np.zeros(workers)

    def add(self, took: float, waited: np.ndarray) -> None:
        """Takes the seconds of a call, and of them, [workers], those in which each has waited."""
        self._took += took
        self._waited += waited

    def report(self, step: int, say: Callable[[str], None], record: Callable[[dict[str, Any]], None]) -> None:
        """Records the seconds since the last report, and says who is the slowest where the others wait long for it."""
        took, waited = self._took, self._waited
        if len(waited) == 1 or not took:
            return
        seconds = {"seconds": round(took, 3), "waited_seconds": np.round(waited, 3).tolist()}
        record({"step": step, "split": "workers"} | seconds)
        slowest = int(np.argmin(waited))
        longer = (waited.sum() - len(waited) * waited[slowest]) / (len(waited) - 1)
        if longer > max(0.1 * took, 1.0):
            say(
                f"step {step}: the others waited {longer:.1f} s of {took:.1f} s for worker {slowest}, the slowest "
                f"({longer / took:.0%})".replace("%", " %")
            )
        self._took, self._waited = 0.0, np.zeros_like(waited)
