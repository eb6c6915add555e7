"""What ends a run: mistakes that the user can mend, faults after which the same command goes on, and exceptions."""

import contextlib
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INTERRUPTED = 130  # the exit code after Ctrl-C: 128 + SIGINT, as shells report it
AGAIN = 75  # the exit code after a fault or SIGTERM: EX_TEMPFAIL of sysexits.h, "try again later"

# TensorFlow's errors of collectives between workers, which come wherever one is waited for.
_LOST = ("UnavailableError", "AbortedError")


class Ending(Exception):
    """Ends a run with one line, which the command prints, and an exit code.

    Attributes:
        code: the exit code.
    """

    code: int


class UserError(Ending):
    """A mistake in what the user wrote or pointed at.

    The message is one line: it names the thing, shows what was near it and says what to do. The
    command line prints it without a traceback and exits with 2.
    """

    code = 2


class Fault(Ending):
    """Something around the run has failed: a worker is lost, a disk is full.

    Nothing needs to be changed for the same command to go on from the last checkpoint. The message is one line; the
    command line prints it without a traceback and exits with `AGAIN`, on which launchers and schedulers start again.
    """

    code = AGAIN


class Raised(Ending):
    """An exception that nobody has foreseen, mostly of the user's own code: a data source, a model, a loss.

    The message is one line, which says who raised what, and where. The command line prints the traceback below it and
    exits with 1.
    """

    code = 1


def raised(what: str, error: Exception) -> Raised:
    """The exception as what ends a run; `what` has raised it, such as 'run.loss', or '' if nobody knows."""
    name, line = type(error).__name__, first_line(error)
    words = name if line == name else f"{name}: {line}"
    return Raised(f"{what} raised {words}{own_line(error)}".removeprefix(" raised "))


@contextlib.contextmanager
def calling(what: str) -> Iterator[None]:
    """Turns an exception of what the user has bound, such as 'run.loss', into one line on it.

    Example:
        >>> try:
        ...     with calling("run.loss"):
        ...         [][0]
        ... except Raised as error:
        ...     print(error)
        run.loss raised IndexError: list index out of range
    """
    try:
        yield
    except Ending:
        raise
    except Exception as error:
        if type(error).__name__ in _LOST:
            raise
        raise raised(what, error) from error


def of_graph(message: str) -> Ending | None:
    """What Python code raised that a graph has called, of which TensorFlow makes text; None if it is none of that.

    Args:
        message: of a `tf.errors.OpError`.
    """
    kinds = {kind.__name__: kind for kind in (UserError, Fault, Raised)}
    if found := re.search(rf"\b({'|'.join(kinds)}): (.+)", message):
        return kinds[found[1]](found[2])
    # A function of the user's, in a model or a loss. Unlike code, what was raised is not indented.
    _, mark, last = message.rpartition("Traceback (most recent call last):")
    words = [line for line in last.splitlines() if line and not line[0].isspace()]
    if not mark or not words:
        return None
    frames = [frame for frame in re.findall(r'File "(.+?)", line (\d+)', last) if _own(frame[0])]
    return Raised(f"run.model or run.loss raised {words[0]}{_place(*frames[-1]) if frames else ''}")


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line; its type where it says nothing."""
    text, *_ = str(error).split("\n  In call to configurable")  # which gin adds to whatever passes through it
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    # Keras names the layer first, and gives the reason in the next paragraph.
    while len(lines) > 1 and (lines[0].startswith("Exception encountered") or lines[0].endswith("encountered:")):
        lines.pop(0)
    return re.sub(r"\x1b\[\d*m|\{\{.*?\}\} ?", "", lines[0])  # colours, and TensorFlow's names of nodes


def own_line(error: Exception) -> str:
    """Where in the user's own code an error was raised, as " (file, line n)"; nothing where no such code was called."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if _own(frame.filename):
            return _place(frame.filename, frame.lineno)
    return ""


def _place(filename: str, line: Any) -> str:
    return f" ({filename}, line {line})"


def _own(filename: str) -> bool:
    """Whether a file of a traceback is the user's."""
    others = ("<", str(Path(__file__).parent), str(Path(traceback.__file__).parent))
    return not filename.startswith(others) and "-packages" not in filename
