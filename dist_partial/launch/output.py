"""What workers print: on the launcher's terminal, in their logs, and the line that says why one ended."""

import collections
import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from dist_partial.launch.agent import read_report
from dist_partial.launch.restarts import Progress


class Console:
    """Writes the launcher's terminal: lines on stdout and, if stderr is a terminal, one progress bar below them.

    Args:
        out: file descriptor that takes the lines.
        err: file descriptor that takes the bar.

    Examples:
        >>> import os
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
        self._errors: dict[bytes, int] = {}  # the lines on what ended workers, and who said each first
        self._lock = threading.Lock()  # each worker's thread writes here

    def say(self, text: str) -> None:
        """Prints a line of the launcher's own."""
        with self._lock:
            self._update([text.encode()])

    def show(self, worker: int, lines: Sequence[bytes], bar: str | None = None) -> None:
        """Prints a worker's lines, and draws its progress bar: '' if it has none, None for the one that it has.

        One mistake ends all workers: of those with the same line on it, the first prints it.
        """
        with self._lock:
            lines = [
                line
                for line in lines
                if not line.startswith(b"error: ") or self._errors.setdefault(line, worker) == worker
            ]
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


class Output:
    """Shows and keeps what a worker and its agent print, as two threads read it.

    Attributes:
        index: the worker's number, before its lines.
        path: of the log, or None.
        lines: the last.
        error: the last that begins with "error:" and has a traceback below it, in which there may be others; where
            there is none, the last that begins so.
        progress: what the agent has reported.
        messages: of the worker to the launcher, until they are taken from there.
    """

    def __init__(self, index: int, folder: Path | None, console: Console, number: int = 0) -> None:
        name = f"worker-{index}.{number}.log" if number else f"worker-{index}.log"
        self.path = folder / name if folder else None
        self.lines: collections.deque[str] = collections.deque(maxlen=20)
        self.error = ""
        self._traced = False
        self.progress = Progress()
        self.messages: collections.deque[dict[str, Any]] = collections.deque()
        self.index, self._console = index, console
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
                self._console.show(self.index, lines, bar)
            lines, _, _ = split(rest + b"\n" if rest.strip() else b"")
            self._keep(lines)
            self._console.show(self.index, lines, "")

    def listen(self, stderr: IO[bytes]) -> None:
        """Takes the agent's reports, and shows what else ssh, a shell or Python says there."""
        with stderr:
            for line in stderr:
                if (report := read_report(line)) is not None:
                    if isinstance(report, Progress):
                        self.progress = report
                    else:
                        self.messages.append(report)
                    continue
                self._write(line)
                lines, _, _ = split(line.rstrip(b"\n") + b"\n")
                self._keep(lines)
                self._console.show(self.index, lines)

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
