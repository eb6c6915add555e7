"""Runs the workers of one run together, and starts all of them again after a fault.

Each worker is started by an agent beside it (`agent`). What both print is shown and kept (`output`); whether there is
to be another start is decided in `restarts`.
"""

import contextlib
import itertools
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dist_partial.cli import INTERRUPTED
from dist_partial.distributed.cluster import near
from dist_partial.errors import AGAIN, Fault, UserError
from dist_partial.files import writing
from dist_partial.launch.attempt import Attempt
from dist_partial.launch.output import Console
from dist_partial.launch.replacements import Replacements
from dist_partial.launch.restarts import EXCEPTION, MISTAKES, Restarts
from dist_partial.launch.workers import Command, Worker

_POLL = 0.05  # seconds
_LONGEST = 300  # characters of an error line that are shown


def backoff(restart: int) -> float:
    """Computes the seconds before a restart, counted from 1.

    Examples:
        >>> [backoff(count) for count in (1, 2, 3, 10)]
        [1.0, 2.0, 4.0, 60.0]
    """
    return min(2.0 ** (restart - 1), 60.0)


def supervise(
    commands: Callable[[int], Sequence[Command]],
    *,
    logs: Path,
    restarts: int,
    grace_seconds: float,
    console: Console,
    settle: float = 5.0,
    delay: Callable[[int], float] = backoff,
) -> int:
    """Runs workers until all have ended well; after a fault ends all and starts them again, as `restarts` says.

    SIGINT is forwarded, so that workers save and end; a second one kills them. SIGTERM and SIGHUP are forwarded as
    SIGTERM. However this function ends, it leaves no worker.

    Args:
        commands: what to start, given a number, from 0, of the attempt or of a meeting after others were lost.
        logs: folder for attempt-<n>/worker-<k>.log, whole; n goes on where an earlier launch ended. On a full disk an
            attempt has none.
        restarts: how many there may be in a row without a new checkpoint.
        grace_seconds: what workers may take to end after SIGTERM.
        console: shows what they print.
        settle: seconds in which the others may end by themselves after one has failed.
        delay: seconds before a restart, counted from 1.

    Returns:
        0; 2 after a mistake of the user's; 130 after SIGINT, here or at a worker; 75 after SIGTERM; else the code of
        what failed first.

    Raises:
        UserError: the logs may not be written, a command cannot be started, or a host or a module is not there.
    """
    counted = Restarts()
    with _listening() as signals:
        numbers = itertools.count()  # of attempts, and of meetings in them
        for first in itertools.chain([True], itertools.repeat(False)):
            folder = _new_folder(logs, first, console)
            attempt = Attempt(Replacements(lambda: commands(next(numbers)), folder, console, restarts, delay), console)
            try:
                ended = attempt.run(signals, grace_seconds, settle)
            finally:
                attempt.stop()
            workers = attempt.workers
            if len(ended) == len(workers) and not any(ended.values()):
                return 0
            if signals:
                break
            failure = _first_failure(workers, ended)
            if failure.code == INTERRUPTED:
                return INTERRUPTED
            if mistake := _mistake(failure, first):
                raise UserError(mistake)
            done = max(worker.output.progress for worker in workers)
            if reason := counted.refusal(failure.code, failure.line, done, restarts):
                print(_last_words(failure, reason), file=sys.stderr)
                return failure.code
            console.say(f"restart {counted.count} of {restarts} in {delay(counted.count):g} s: {failure.text}")
            if _wait(delay(counted.count), signals):
                break
    return INTERRUPTED if signals[0] == signal.SIGINT else AGAIN


def _wait(seconds: float, signals: list[int]) -> bool:
    """Waits, unless asked to end; returns whether it was."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not signals:
        time.sleep(_POLL)
    return bool(signals)


@contextlib.contextmanager
def _listening() -> Iterator[list[int]]:
    """Collects the signals that ask this process to end."""
    signals: list[int] = []
    before = {}
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # as nohup leaves it
            before[signum] = signal.signal(signum, lambda signum, frame: signals.append(signum))
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _new_folder(logs: Path, first: bool, console: Console) -> Path | None:
    """A folder for the logs of an attempt; None where there can be none, for which no run must end that can go on."""
    try:
        with writing(logs):
            logs.mkdir(parents=True, exist_ok=True)
            taken = [int(number) for path in logs.glob("attempt-*") if (number := path.name[8:]).isdecimal()]
            folder = logs / f"attempt-{max(taken, default=0) + 1}"
            folder.mkdir()
            return folder
    except (UserError, Fault) as error:
        if first and isinstance(error, UserError):
            raise
        console.say(f"this attempt has no logs: {error}")
        return None


class _Failure(NamedTuple):
    """What ended an attempt: the worker that began it, its exit code, its error line, and all three in words."""

    worker: Worker
    code: int
    line: str
    text: str


def _first_failure(workers: Sequence[Worker], ended: dict[Worker, int]) -> _Failure:
    failures = [each for each in ended.items() if each[1] != 0]
    if not failures:
        worker = next(worker for worker in workers if worker not in ended)
        return _Failure(worker, AGAIN, "", f"{worker.name} does not end, as others have")

    def later(failure: tuple[Worker, int]) -> tuple[bool, ...]:
        # Who says AGAIN has probably lost another, and may have been faster than that one's traceback.
        reported = failure[0].output.error.startswith("error: worker ")
        return failure[1] not in MISTAKES, failure[1] == AGAIN, reported

    worker, code = min(failures, key=later)
    if code - 128 in set(signal.Signals):
        return _Failure(worker, code, "", f"{worker.name} was killed by {signal.Signals(code - 128).name}")
    line = worker.output.error or "".join(list(worker.output.lines)[-1:])
    said = f": {line[:_LONGEST]}" if line else ""
    return _Failure(worker, code, line, f"{worker.name} ended with exit code {code}{said}")


def _mistake(failure: _Failure, first: bool) -> str:
    """What the user has to fix where nothing of this package, or not all that it needs, has run; or ''."""
    worker, code, line, _ = failure
    said = [line, *list(worker.output.lines)[-1:]]
    if code == EXCEPTION and (found := re.search(r"No module named '?([\w.]+)", "\n".join(said))):
        return (
            f"{worker.name}: {worker.command.python} has no module {found[1]!r}: install it there, or name a Python "
            f"that has it (--python, or the variable PYTHON); it said: {line.removeprefix('error: ')[:_LONGEST]}"
        )
    # Later the name may be known, and the resolver out of order.
    if code == 255 and first and (found := re.search(r"resolve hostname ([\w.-]+)", line)):
        return f"{worker.name}: {line}{near(found[1])}; fix --hosts, or name it in /etc/hosts or ~/.ssh/config"
    return ""


def _last_words(failure: _Failure, reason: str) -> str:
    output = failure.worker.output
    if failure.code in MISTAKES and failure.line:  # which says all
        return f"error: {failure.text}; not again: {reason}"
    where = f", of {output.path}" if output.path else ""
    return "\n".join([f"error: {failure.text}; not again: {reason}; its last lines{where}:", *output.lines])
