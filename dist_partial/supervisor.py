"""Runs the workers of one run together, shows what they print, and starts all of them again after a fault.

Beside each worker, on its host, runs a keeper. It reads from its stdin one line of JSON that says what to start, then
signals to forward; when stdin ends, with the launcher or with the connection to it, it kills the worker.
"""

import collections
import contextlib
import ctypes
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from dist_partial.cli import INTERRUPTED
from dist_partial.errors import AGAIN, UserError
from dist_partial.files import writing

_MISTAKES = (2, 126, 127)  # exit codes that come again; a shell's 126 and 127 say that it cannot run Python
_FINISH = 60.0  # seconds in which the others may end after one has ended well; the first worker still saves
_KILL = 2.0  # seconds in which a keeper kills its worker
_POLL = 0.05  # seconds


@dataclasses.dataclass(frozen=True)
class Command:
    """What starts a worker.

    Attributes:
        name: what messages call it, such as 'worker 1 (10.0.0.2)'.
        argv: runs a keeper, here or on another host.
        order: the line that the keeper reads first, see `keep`.
    """

    name: str
    argv: Sequence[str]
    order: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Worker:
    """A worker that was started; `process` is its keeper's, `lines` the last that it has printed."""

    name: str
    process: subprocess.Popen[bytes]
    stdin: IO[bytes]
    log: Path
    lines: collections.deque[str]
    reader: threading.Thread


def keep() -> int:
    """Runs one worker; this is all that a keeper does.

    The first line of stdin is `{"arguments": [...], "environment": {...}, "program": [...]}`: arguments of the program,
    by default dist_partial.train, and variables to be set besides the keeper's own. They stand on no command line,
    where all users of the host could read them. Each further line is the name of a signal, such as 'INT'.

    Returns:
        The worker's exit code; 128 + n if signal n has ended it.
    """
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: None)  # SIG_IGN would be inherited by the worker
    # Python would not end while a thread waits in a buffered read.
    orders = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115 - for as long as the process lives
    order = json.loads(orders.readline())
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: None
    worker = subprocess.Popen(
        [*(order.get("program") or [sys.executable, "-u", "-m", "dist_partial.train"]), *order["arguments"]],
        env={**os.environ, **order["environment"]},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,  # one pipe keeps the order of what is printed, over ssh too
        process_group=0,
        preexec_fn=lambda: prctl(1, signal.SIGKILL),  # PR_SET_PDEATHSIG: it dies with a keeper that is killed
    )
    threading.Thread(target=_obey, args=(worker, orders), daemon=True).start()
    code = worker.wait()
    _kill_group(worker.pid)  # what the worker has started and left
    return _exit_code(code)


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
    """The launcher's terminal: lines on stdout and, if stderr is a terminal, one progress bar below them.

    Args:
        out: file descriptor that takes the lines.
        err: file descriptor that takes the bar.
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

    def show(self, worker: int, lines: Sequence[bytes], bar: str) -> None:
        """Prints a worker's lines, and draws its progress bar: '' if it has none."""
        with self._lock:
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
    """Splits what a worker has printed.

    Returns:
        The finished lines, of which carriage returns leave what a terminal would show; the rest, which the next output
        continues; and the progress bar that the rest shows, or ''.
    """
    *lines, rest = text.split(b"\n")
    lines = [line.rstrip(b"\r").rpartition(b"\r")[2] for line in lines]
    if b"\r" not in rest:
        return lines, rest, ""
    before, last = rest.split(b"\r")[-2:]
    bar = last if last.strip() else before
    return lines, before + b"\r" + last, bar.decode(errors="replace").strip()


def backoff(restart: int) -> float:
    """Seconds before a restart, counted from 1."""
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
    """Runs workers until all have ended well; after a fault ends all and starts them again.

    SIGINT is forwarded, so that workers save and end; a second one kills them. SIGTERM and SIGHUP are forwarded as
    SIGTERM. However this function ends, it leaves no worker.

    Args:
        commands: what to start, given the number of the attempt, from 0.
        logs: folder for attempt-<n>/worker-<k>.log, whole; n goes on where an earlier launch ended.
        restarts: how many there may be.
        grace_seconds: what workers may take to end after SIGTERM.
        console: shows what they print.
        settle: seconds in which the others may end by themselves after one has failed.
        delay: seconds before a restart, counted from 1.

    Returns:
        0; 2 after a mistake of the user's, which no restart mends (126, 127: no Python there); 130 after SIGINT, here
        or at a worker; 75 after SIGTERM; when no restarts are left, the code of what failed first.

    Raises:
        UserError: the logs cannot be written, or a command cannot be started.
    """
    told: list[int] = []
    restart = 0
    with _listening(told):
        while not told:
            folder = _new_folder(logs)
            workers: list[Worker] = []
            try:
                for index, command in enumerate(commands(restart)):
                    workers.append(_start(index, command, folder, console))
                ended = _watch(workers, told, grace_seconds, settle, console)
            finally:
                _stop(workers)
            if len(ended) == len(workers) and not any(ended.values()):
                return 0
            if told:
                break
            worker, code, text = _first_failure(workers, ended)
            if code == INTERRUPTED:
                return code
            if code in _MISTAKES or restart == restarts:
                print(f"error: {text}; its last lines, of {worker.log}:", *worker.lines, sep="\n", file=sys.stderr)
                return code
            restart += 1
            console.say(f"restart {restart} of {restarts} in {delay(restart):g} s: {text}")
            until = time.monotonic() + delay(restart)
            while time.monotonic() < until and not told:
                time.sleep(_POLL)
    return INTERRUPTED if told[0] == signal.SIGINT else AGAIN


@contextlib.contextmanager
def _listening(told: list[int]) -> Iterator[None]:
    """Collects the signals that ask this process to end."""
    before = {}
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # as nohup leaves it
            before[signum] = signal.signal(signum, lambda signum, frame: told.append(signum))
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _new_folder(logs: Path) -> Path:
    with writing(logs):
        logs.mkdir(parents=True, exist_ok=True)
        taken = [int(number) for path in logs.glob("attempt-*") if (number := path.name[8:]).isdecimal()]
        folder = logs / f"attempt-{max(taken, default=0) + 1}"
        folder.mkdir()
    return folder


def _first_failure(workers: Sequence[Worker], ended: dict[Worker, int]) -> tuple[Worker, int, str]:
    """The worker that began it, its exit code, and both in words."""
    failures = [each for each in ended.items() if each[1] != 0]
    if not failures:
        worker = next(worker for worker in workers if worker not in ended)
        return worker, AGAIN, f"{worker.name} does not end, as others have"
    worker, code = min(failures, key=lambda failure: failure[1] not in _MISTAKES)
    if code - 128 in set(signal.Signals):
        return worker, code, f"{worker.name} was killed by {signal.Signals(code - 128).name}"
    lines = [line for line in worker.lines if line.startswith("error:")] or list(worker.lines)
    return (
        worker,
        code,
        f"{worker.name} ended with exit code {code}" + "".join(f": {line[:200]}" for line in lines[-1:]),
    )


def _start(index: int, command: Command, folder: Path, console: Console) -> Worker:
    path, pipe = folder / f"worker-{index}.log", subprocess.PIPE
    with writing(path), contextlib.ExitStack() as stack:
        log = stack.enter_context(open(path, "wb", buffering=0))
        try:
            # A session of its own: what Ctrl-C sends to all processes of a terminal must reach the launcher alone.
            process = subprocess.Popen(
                command.argv, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            raise UserError(f"cannot start {command.argv[0]!r}: {error.strerror}") from None
        stack.pop_all()
    assert process.stdin is not None and process.stdout is not None
    lines: collections.deque[str] = collections.deque(maxlen=20)
    reader = threading.Thread(target=_read, args=(index, process.stdout, log, lines, console), daemon=True)
    reader.start()
    worker = Worker(command.name, process, process.stdin, path, lines, reader)
    _tell(worker, json.dumps(command.order))
    return worker


def _tell(worker: Worker, line: str) -> None:
    with contextlib.suppress(OSError):  # the keeper has ended
        worker.stdin.write(line.encode() + b"\n")
        worker.stdin.flush()


def _read(index: int, output: IO[bytes], log: IO[bytes], last: collections.deque[str], console: Console) -> None:
    """Shows and keeps what a worker prints, to the end."""
    rest = b""
    with output, log:
        while chunk := os.read(output.fileno(), 1 << 16):
            with contextlib.suppress(OSError):  # a full disk, with which the run may be able to go on
                log.write(chunk)
            lines, rest, bar = split(rest + chunk)
            last.extend(line.decode(errors="replace") for line in lines if line.strip())
            console.show(index, lines, bar)
        lines, _, _ = split(rest + b"\n" if rest.strip() else b"")
        last.extend(line.decode(errors="replace") for line in lines)
        console.show(index, lines, "")


def _watch(
    workers: Sequence[Worker], told: list[int], grace_seconds: float, settle: float, console: Console
) -> dict[Worker, int]:
    """Waits until all have ended, or long enough; returns exit codes in the order in which workers ended."""
    ended: dict[Worker, int] = {}
    until, heard = math.inf, 0
    while len(ended) < len(workers) and time.monotonic() < until:
        time.sleep(_POLL)
        for signum in told[heard:]:
            heard += 1
            if told[:heard].count(signal.SIGINT) > 1:
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
        if new and set(told) <= {signal.SIGINT}:
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
        worker.reader.join(_KILL)  # a process that a worker has left may hold the pipe open
