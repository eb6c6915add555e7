"""Which failures of a run are worth another start: the rules of all launchers, from what the run folder shows.

- Never: 0; 130 (Ctrl-C); 2, 126 and 127, which are mistakes; 1, an exception, before the first step of the attempt.
- The same failure, exit code and error line, once more at most, if the run has got no step further in between. This
  is not for what comes from around a run: 75, ssh's 255, and the signals that somebody sends.
- All others up to a limit of restarts in a row without a new checkpoint, from which alone a run goes on.

What is on the disk of the run survives whatever kills a worker. It is looked at where the workers are.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
from pathlib import Path
from typing import Any, NamedTuple

from dist_partial.errors import AGAIN, INTERRUPTED
from dist_partial.files import CHECKPOINT, write_json

EXCEPTION = 1  # Python's exit code after one that nobody has caught
MISTAKES = (2, 126, 127)  # a shell's 126 and 127 say that it cannot run Python
_SENT = (signal.SIGHUP, signal.SIGPIPE, signal.SIGALRM, signal.SIGTERM, signal.SIGKILL)
_AROUND = (AGAIN, 255, *(128 + number for number in _SENT))
_VARIES = re.compile(r"worker \d+ \(.*?\): |0x[0-9a-f]+|\d+")
_TAIL = 2**20  # bytes of the metrics, in which there is a line of a step


class Seen(NamedTuple):
    """Records what a run folder shows.

    Attributes:
        checkpoint: step of the newest.
        step: the last in the metrics.
        file: tells whether the metrics have been written meanwhile.

    Examples:
        >>> before, after = Seen(100, 120, file=[7, 500, 1]), Seen(100, 120, file=[7, 500, 1])
        >>> progress(before, after)  # nothing was written meanwhile
        Progress(checkpoint=100, step=0)
    """

    checkpoint: int
    step: int
    file: list[int]


class Progress(NamedTuple):
    """Records the step of the newest checkpoint and the last step that was made, or 0, after an attempt.

    Examples:
        >>> restarts = Restarts(checkpoint=100, step=120)
        >>> restarts.refusal(139, "", Progress(checkpoint=150, step=160), limit=10), restarts.count
        ('', 1)
    """

    checkpoint: int = 0
    step: int = 0


def look(folder: Path) -> Seen:
    """Looks at a run folder, which need not exist yet.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "checkpoints", "step-0000000010.safetensors").mkdir(parents=True)
        ...     _ = Path(folder, "metrics.jsonl").write_text('{"split": "train", "step": 12}\\n{"split": "tr')
        ...     look(Path(folder))[:2]
        (10, 12)
    """
    names, lines, written = [""], [b""], [0]
    with contextlib.suppress(OSError):
        names = os.listdir(folder / "checkpoints")
    with contextlib.suppress(OSError), open(folder / "metrics.jsonl", "rb") as file:
        status = os.fstat(file.fileno())
        written = [status.st_ino, status.st_size, status.st_mtime_ns]
        file.seek(max(0, status.st_size - _TAIL))
        lines = file.read().splitlines()
    checkpoints = [int(found[1]) for name in names if (found := CHECKPOINT.fullmatch(name))]
    step = 0
    for line in reversed(lines):
        try:
            row = json.loads(line)
            if row["split"] == "train":
                step = int(row["step"])
                break
        except (ValueError, KeyError, TypeError):  # half a line, of a run that was killed while it wrote
            continue
    return Seen(max(checkpoints, default=0), step, written)


def progress(before: Seen, after: Seen) -> Progress:
    """Computes what an attempt has done between two looks.

    Attempts take from the metrics what follows the checkpoint from which they go on, and then add to them.

    Examples:
        >>> progress(Seen(100, 120, [7, 500, 1]), Seen(100, 130, [7, 600, 2]))
        Progress(checkpoint=100, step=130)
    """
    made = after.file != before.file and after.step > before.checkpoint
    return Progress(after.checkpoint, after.step if made else 0)


@dataclasses.dataclass
class Restarts:
    """Counts restarts without a new checkpoint.

    Attributes:
        count: how many there were, with the one to come.
        checkpoint: step of the newest checkpoint so far.
        step: the furthest so far.
        failure: the last one.

    Examples:
        >>> restarts, stuck = Restarts(), Progress(checkpoint=0, step=7)
        >>> restarts.refusal(1, "error: worker 0 (a:1): out of range", stuck, limit=10)
        ''
        >>> restarts.refusal(1, "error: worker 1 (b:1): out of range", stuck, limit=10)
        'it is the same failure as before, and the run has got no further in between'
    """

    count: int = 0
    checkpoint: int = 0
    step: int = 0
    failure: str = ""

    def refusal(self, code: int, line: str, progress: Progress, limit: int) -> str:
        """Notes a failure; returns why there is to be no restart after it, or ''.

        Args:
            code: the exit code; 128 + n of what signal n has ended.
            line: the worker's error line, or '' where nobody has it.
            progress: of the attempt.
            limit: how many restarts there may be in a row.
        """
        # Another worker's words are the same, and so are those with other numbers: a port, an address in memory.
        failure = f"{code} {_VARIES.sub('', line)}"
        saved = progress.checkpoint > self.checkpoint
        again = failure == self.failure and not saved and progress.step <= self.step
        self.count = 1 if saved else self.count + 1
        self.checkpoint, self.step = max(progress.checkpoint, self.checkpoint), max(progress.step, self.step)
        self.failure = failure
        if code in (0, INTERRUPTED, *MISTAKES):
            return "the same command would end in the same way"
        if code == EXCEPTION and not progress.step:
            return "an exception before any step is on record would come again"
        if again and code not in _AROUND:
            return "it is the same failure as before, and the run has got no further in between"
        if self.count > limit:
            return f"restarts without a new checkpoint have reached their limit of {limit}"
        return ""


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Keeps the count in a file beside the run folder where no process outlives all attempts of a job.

    Where it cannot be written, for the disk is full, the scheduler's own count goes on, which progress does not reset.

    Attributes:
        path: of the file.
        folder: the run folder.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for attempt in range(3):
        ...         ledger = Ledger(Path(folder, "restarts.json"), Path(folder, "run"))  # in a process of its own
        ...         ledger.begin()
        ...         print(ledger.refusal(75, limit=2)[:2])
        ('', 1)
        ('', 2)
        ('restarts without a new checkpoint have reached their limit of 2', 3)
    """

    path: Path
    folder: Path

    def begin(self) -> None:
        """Notes what the run folder shows before an attempt."""
        self._write(dataclasses.asdict(Restarts()) | self._read() | {"seen": look(self.folder)})

    def refusal(self, code: int, limit: int, earlier: int = 0) -> tuple[str, int, Progress]:
        """Notes how an attempt has ended.

        Args:
            code: the exit code.
            limit: how many restarts there may be in a row.
            earlier: how many there were by the scheduler's count, for where nothing could be noted.

        Returns:
            Why there is to be no restart, or ''; which it would be; and what the attempt has done.
        """
        kept, after = self._read(), look(self.folder)
        before = Seen(*kept.pop("seen", after))
        done = progress(before, after)
        restarts = Restarts(**{"count": earlier, "checkpoint": before.checkpoint} | kept)
        reason = restarts.refusal(code, "", done, limit)
        self._write(dataclasses.asdict(Restarts() if reason else restarts))  # who starts it again has fixed something
        return reason, restarts.count, done

    def _read(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.path.read_bytes()))
        except (OSError, ValueError):
            return {}

    def _write(self, kept: dict[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, kept)
        except OSError:
            with contextlib.suppress(OSError):
                self.path.unlink()
