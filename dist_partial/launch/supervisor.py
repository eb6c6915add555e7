"""Runs the workers of one run together, shows what they print, and starts all of them again after a fault.

Beside each worker, on its host, runs an agent. It reads from its stdin one line of JSON that says what to start, then
signals to forward; when stdin ends, with the launcher or with the connection to it, it kills the worker. What the
worker prints goes to stdout; on stderr the agent reports what the run folder shows, which the launcher's own machine
need not see.
"""

import collections
import contextlib
import ctypes
import dataclasses
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from dist_partial.cli import INTERRUPTED
from dist_partial.distributed.cluster import near, unresolved
from dist_partial.errors import AGAIN, Fault, UserError
from dist_partial.files import writing
from dist_partial.launch.restarts import EXCEPTION, MISTAKES, Progress, Restarts, look, progress

_REPORT = b"dist_partial agent: "  # begins an agent's report, a line of JSON
_FINISH = 60.0  # seconds in which the others may end after one has ended well; the first worker still saves
_KILL = 2.0  # seconds in which an agent kills its worker
_POLL = 0.05  # seconds
_LONGEST = 300  # characters of an error line that are shown


@dataclasses.dataclass(frozen=True)
class Command:
    """Describes how to start a worker.

    Attributes:
        name: what messages call it, such as 'worker 1 (10.0.0.2)'.
        argv: runs an agent, here or on another host.
        order: the line that the agent reads first, see `run_agent`.
        python: what messages call the Python that runs both.
    """

    name: str
    argv: Sequence[str]
    order: dict[str, Any]
    python: str = "its Python"


@dataclasses.dataclass(frozen=True, eq=False)
class Worker:
    """Holds a worker that was started; `process` is its agent's."""

    command: Command
    process: subprocess.Popen[bytes]
    stdin: IO[bytes]
    output: "_Output"
    readers: Sequence[threading.Thread]

    @property
    def name(self) -> str:
        return self.command.name


def run_agent() -> int:
    """Runs one worker; this is all that an agent does.

    The first line of stdin is `{"run_dir", "names": [], "arguments": [], "environment": {}, "program": []}`: the run
    folder, to be reported on; hosts, which must be known here; arguments of the program, by default dist_partial.train,
    and variables to be set besides the agent's own. They are on no command line, where all users of the host could
    read them. Each further line is the name of a signal, such as 'INT'.

    Returns:
        The worker's exit code; 128 + n if signal n has ended it; 2 if a host is not known.
    """
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: None)  # SIG_IGN would be inherited by the worker
    # Python would not end while a thread waits in a buffered read.
    orders = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115 - for as long as the process lives
    order = json.loads(orders.readline())
    folder = Path(order["run_dir"])
    before = look(folder)
    _report(Progress(before.checkpoint))
    for name in order["names"]:
        if reason := unresolved(name):
            print(f"error: no host {name!r} is known here: {reason}; fix --hosts or /etc/hosts", flush=True)
            return 2
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: None
    worker = subprocess.Popen(
        [*(order.get("program") or [sys.executable, "-u", "-m", "dist_partial.train"]), *order["arguments"]],
        env={**os.environ, **order["environment"]},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,  # one pipe keeps the order of what is printed, over ssh too
        process_group=0,
        preexec_fn=lambda: prctl(1, signal.SIGKILL),  # PR_SET_PDEATHSIG: it dies with an agent that is killed
    )
    threading.Thread(target=_obey, args=(worker, orders), daemon=True).start()
    code = worker.wait()
    _kill_group(worker.pid)  # what the worker has started and left
    _report(progress(before, look(folder)))
    return _exit_code(code)


def _report(progress: Progress) -> None:
    with contextlib.suppress(OSError):  # the launcher is gone
        os.write(2, _REPORT + json.dumps(progress).encode() + b"\n")


def _obey(worker: subprocess.Popen[bytes], orders: IO[bytes]) -> None:
    for line in orders:
        worker.send_signal(signal.Signals[f"SIG{line.decode().strip()}"])
    _kill_group(worker.pid)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left in it
        os.killpg(group, signal.SIGKILL)


def _exit_code(code: int) -> int:
    return 128 - code if code < 0 else code


class Console:
    """Writes the launcher's terminal: lines on stdout and, if stderr is a terminal, one progress bar below them.

    Args:
        out: file descriptor that takes the lines.
        err: file descriptor that takes the bar.

    Examples:
        >>> reader, writer = os.pipe()
        >>> console = Console(out=writer, err=writer)
        >>> console.say("worker 1 is lost")
        >>> console.show(0, [b"step 10"])
        >>> os.read(reader, 100)
        b'worker 1 is lost\\n[0] step 10\\n'
    """

    def __init__(self, out: int = 1, err: int = 2) -> None:
        self._out, self._err = out, err
        self._terminal = os.isatty(err)
        self._bars: dict[int, str] = {}
        self._drawn = ""
        self._lock = threading.Lock()  # each worker's thread writes here

    def say(self, text: str) -> None:
        """Prints a line of the launcher's own."""
        with self._lock:
            self._update([text.encode()])

    def show(self, worker: int, lines: Sequence[bytes], bar: str | None = None) -> None:
        """Prints a worker's lines, and draws its progress bar: '' if it has none, None for the one that it has."""
        with self._lock:
            if bar is not None:
                self._bars[worker] = bar
            self._update([b"[%d] %b" % (worker, line) for line in lines])

    def _update(self, lines: Sequence[bytes]) -> None:
        bar = next(filter(None, self._bars.values()), "") if self._terminal else ""
        if not lines and bar == self._drawn:
            return
        # Whoever read this may be gone, as behind `| head`; the run is worth more, and the logs have everything.
        with contextlib.suppress(OSError):
            if self._drawn:
                _write(self._err, b"\r\x1b[K")
            _write(self._out, b"".join(line + b"\n" for line in lines))
            if bar:  # cut, for a bar that wraps cannot be erased
                _write(self._err, bar[: (os.get_terminal_size(self._err).columns or 80) - 1].encode())
        self._drawn = bar


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def split(text: bytes) -> tuple[list[bytes], bytes, str]:
    """Splits what a worker has printed into lines.

    Returns:
        The finished lines, of which carriage returns leave what a terminal would show; the rest, which the next output
        continues; and the progress bar that the rest shows, or ''.

    Examples:
        >>> split(b"one\\ntwo\\r\\n 50%\\r100%")
        ([b'one', b'two'], b' 50%\\r100%', '100%')
    """
    *lines, rest = text.split(b"\n")
    lines = [line.rstrip(b"\r").rpartition(b"\r")[2] for line in lines]
    if b"\r" not in rest:
        return lines, rest, ""
    before, last = rest.split(b"\r")[-2:]
    bar = last if last.strip() else before
    return lines, before + b"\r" + last, bar.decode(errors="replace").strip()


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
        commands: what to start, given the number of the attempt, from 0.
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
        for attempt in itertools.count():
            folder = _new_folder(logs, attempt == 0, console)
            workers: list[Worker] = []
            try:
                for index, command in enumerate(commands(attempt)):
                    workers.append(_start(index, command, folder, console))
                ended = _watch(workers, signals, grace_seconds, settle, console)
            finally:
                _stop(workers)
            if len(ended) == len(workers) and not any(ended.values()):
                return 0
            if signals:
                break
            failure = _first_failure(workers, ended)
            if failure.code == INTERRUPTED:
                return INTERRUPTED
            if mistake := _mistake(failure, attempt):
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


def _mistake(failure: _Failure, attempt: int) -> str:
    """What the user has to fix where nothing of this package, or not all that it needs, has run; or ''."""
    worker, code, line, _ = failure
    said = [line, *list(worker.output.lines)[-1:]]
    if code == EXCEPTION and (found := re.search(r"No module named '?([\w.]+)", "\n".join(said))):
        return (
            f"{worker.name}: {worker.command.python} has no module {found[1]!r}: install it there, or name a Python "
            f"that has it (--python, or the variable PYTHON); it said: {line.removeprefix('error: ')[:_LONGEST]}"
        )
    # Later the name may be known, and the resolver out of order.
    if code == 255 and attempt == 0 and (found := re.search(r"resolve hostname ([\w.-]+)", line)):
        return f"{worker.name}: {line}{near(found[1])}; fix --hosts, or name it in /etc/hosts or ~/.ssh/config"
    return ""


def _last_words(failure: _Failure, reason: str) -> str:
    output = failure.worker.output
    where = f", of {output.path}" if output.path else ""
    return "\n".join([f"error: {failure.text}; not again: {reason}; its last lines{where}:", *output.lines])


class _Output:
    """What a worker and its agent print, as two threads read it.

    Attributes:
        path: of the log, or None.
        lines: the last.
        error: the last that begins with "error:" and has a traceback below it, in which there may be others; where
            there is none, the last that begins so.
        progress: what the agent has reported.
    """

    def __init__(self, index: int, folder: Path | None, console: Console) -> None:
        self.path = folder / f"worker-{index}.log" if folder else None
        self.lines: collections.deque[str] = collections.deque(maxlen=20)
        self.error = ""
        self._traced = False
        self.progress = Progress()
        self._index, self._console = index, console
        self._log: IO[bytes] | None = None
        if self.path:
            with contextlib.suppress(OSError):  # a full disk, with which the run may be able to go on
                self._log = open(self.path, "wb", buffering=0)  # noqa: SIM115 - for as long as anything is read

    def read(self, stdout: IO[bytes]) -> None:
        """Shows and keeps what a worker prints, to the end."""
        rest = b""
        with stdout:
            while chunk := os.read(stdout.fileno(), 1 << 16):
                self._write(chunk)
                lines, rest, bar = split(rest + chunk)
                self._keep(lines)
                self._console.show(self._index, lines, bar)
            lines, _, _ = split(rest + b"\n" if rest.strip() else b"")
            self._keep(lines)
            self._console.show(self._index, lines, "")

    def listen(self, stderr: IO[bytes]) -> None:
        """Takes the agent's reports, and shows what else ssh, a shell or Python says there."""
        with stderr:
            for line in stderr:
                if line.startswith(_REPORT):
                    self.progress = Progress(*json.loads(line.removeprefix(_REPORT)))
                    continue
                self._write(line)
                lines, _, _ = split(line.rstrip(b"\n") + b"\n")
                self._keep(lines)
                self._console.show(self._index, lines)

    def close(self) -> None:
        if self._log:
            self._log.close()

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):  # a full disk; closed, as a process of the worker's is left
            if self._log:
                self._log.write(data)

    def _keep(self, lines: Sequence[bytes]) -> None:
        for line in lines:
            if (text := line.decode(errors="replace")).strip():
                if text.startswith("Traceback (") and self.lines and self.lines[-1].startswith("error:"):
                    self.error, self._traced = self.lines[-1], True
                elif text.startswith("error:") and not self._traced:
                    self.error = text
                self.lines.append(text)


def _start(index: int, command: Command, folder: Path | None, console: Console) -> Worker:
    pipe = subprocess.PIPE
    try:
        # A session of its own: what Ctrl-C sends to all processes of a terminal must reach the launcher alone.
        process = subprocess.Popen(command.argv, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
    except OSError as error:
        raise UserError(f"cannot start {command.argv[0]!r}: {error.strerror}") from None
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    output = _Output(index, folder, console)
    readers = [
        threading.Thread(target=output.read, args=(process.stdout,), daemon=True),
        threading.Thread(target=output.listen, args=(process.stderr,), daemon=True),
    ]
    for reader in readers:
        reader.start()
    worker = Worker(command, process, process.stdin, output, readers)
    _tell(worker, json.dumps(command.order))
    return worker


def _tell(worker: Worker, line: str) -> None:
    with contextlib.suppress(OSError):  # the agent has ended
        worker.stdin.write(line.encode() + b"\n")
        worker.stdin.flush()


def _watch(
    workers: Sequence[Worker], signals: list[int], grace_seconds: float, settle: float, console: Console
) -> dict[Worker, int]:
    """Waits until all have ended, or long enough; returns exit codes in the order in which workers ended."""
    ended: dict[Worker, int] = {}
    until, heard = math.inf, 0
    while len(ended) < len(workers) and time.monotonic() < until:
        time.sleep(_POLL)
        for signum in signals[heard:]:
            heard += 1
            if signals[:heard].count(signal.SIGINT) > 1:
                return ended
            for worker in workers:
                _tell(worker, "INT" if signum == signal.SIGINT else "TERM")
            if signum == signal.SIGINT:
                console.say("stopping: the workers save and end; another Ctrl-C kills them")
            else:
                console.say(f"{signal.Signals(signum).name}: the workers have {grace_seconds:g} s to save and end")
                until = min(until, time.monotonic() + grace_seconds)
        waited = [worker for worker in workers if worker not in ended]
        new = {worker: _exit_code(code) for worker in waited if (code := worker.process.poll()) is not None}
        # Of those that end together, one with AGAIN has probably lost one of the others.
        ended.update(sorted(new.items(), key=lambda each: each[1] == AGAIN))
        if new and set(signals) <= {signal.SIGINT}:
            well = set(new.values()) <= {0, INTERRUPTED}
            until = min(until, time.monotonic() + (max(_FINISH, grace_seconds) if well else settle))
    return ended


def _stop(workers: Sequence[Worker]) -> None:
    """Kills what still runs, and waits for all that was printed."""
    for worker in workers:
        with contextlib.suppress(OSError):  # of what could not be written
            worker.stdin.close()
    until = time.monotonic() + _KILL
    for worker in workers:
        try:
            worker.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            _kill_group(worker.process.pid)
            worker.process.wait()
    for worker in workers:
        for reader in worker.readers:
            reader.join(_KILL)  # a process that a worker has left may hold the pipe open
        worker.output.close()
