"""What ends a run: mistakes that the user can fix, faults after which the same command goes on, and exceptions."""

import contextlib
import re
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

INTERRUPTED = 130  # the exit code after Ctrl-C: 128 + SIGINT, as shells report it
AGAIN = 75  # the exit code after a fault or SIGTERM: EX_TEMPFAIL of sysexits.h, "try again later"

# TensorFlow's errors of collectives between workers, which come wherever one is waited for.
_LOST = ("UnavailableError", "AbortedError")
_LONGEST = 500  # characters of what another library says, in a line
# What TensorFlow says before the reason, with the stack of the op and not of the call.
_PREAMBLE = re.compile(
    r'Graph execution error:|Detected at node .*|File ".+", line \d+.*|<stack traces unavailable>|\d+ root error.*'
)

# Colours, and what TensorFlow calls its ops and nodes.
_INSIDE = r"\x1b\[\d*m| for '\{\{node [^}]*\}\} = \w+\[[^']*\]\([^']*\)'| \[Op:\w+\](?: name:.*)?|\{\{.*?\}\} ?"
# And where a data set of the user's own is.
_INSIDE += r"|Error in user-defined function passed to \S+ transformation with iterator: \S+ "


class Ending(Exception):
    """Ends a run with one line, which the command prints, and an exit code.

    Attributes:
        code: the exit code.

    Examples:
        >>> issubclass(UserError, Ending), Fault.code
        (True, 75)
    """

    code: int

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of the traceback: the line, and what the user's own code has raised below it."""
        cause = self.__cause__ if isinstance(self, Raised) else None
        lines = "".join(traceback.format_exception(cause)).splitlines() if cause else []
        return [f"{type(self).__name__}: {self}", *lines]


class UserError(Ending):
    """Reports a mistake in what the user wrote or pointed at.

    The message is one line: it names the thing, shows what was near it and says what to do. The
    command line prints it without a traceback and exits with 2.

    Examples:
        >>> raise UserError("run.steps is 0: it must be a whole number of at least 1")
        Traceback (most recent call last):
        dist_partial.errors.UserError: run.steps is 0: it must be a whole number of at least 1
    """

    code = 2


class Fault(Ending):
    """Reports that something around the run has failed: a worker is lost, a disk is full.

    Nothing needs to be changed for the same command to go on from the last checkpoint. The message is one line; the
    command line prints it without a traceback and exits with `AGAIN`, on which launchers and schedulers start again.

    Examples:
        >>> Fault("worker 1 (10.0.0.2:5000) is lost").code
        75
    """

    code = AGAIN


class Raised(Ending):
    """Reports an exception of code that is not this package's: a data source, a model, a loss.

    The message is one line, which says who raised what, and where. The command line prints the traceback below it and
    exits with 1.

    Examples:
        >>> Raised("run.data raised KeyError: 'id' (mine.py, line 7)").code
        1
    """

    code = 1


class Interrupted(KeyboardInterrupt):
    """Says that Ctrl-C or SIGTERM stopped a run, what is saved of it, and how to go on.

    It is a KeyboardInterrupt, so that a loop over runs that catches exceptions ends, too.

    Attributes:
        code: the exit code.
        state: where the run is, for the one who called it; None once it has been used.
        result: of `dist_partial.train`: the `Result` so far; None if nothing is saved.

    Examples:
        >>> Interrupted("stopped at step 5 of 10, saved in runs/mine", INTERRUPTED).code
        130
    """

    def __init__(self, message: str, code: int, state: Any = None) -> None:
        super().__init__(message)
        self.code, self.state = code, state
        self.result: Any = None

    def _render_traceback_(self) -> list[str]:  # which IPython shows in place of the traceback
        return [f"{type(self).__name__}: {self}"]


def raised(what: str, error: BaseException) -> Raised:
    """Makes the ending of a run from an exception of `what`, such as 'run.loss', or '' if nobody knows.

    Examples:
        >>> print(raised("run.loss", ValueError("shapes differ")))
        run.loss raised ValueError: shapes differ
    """
    name, line = type(error).__name__, first_line(error)
    words = name if line == name else f"{name}: {line}"
    return Raised(f"{what} raised {words}{own_line(error)}".removeprefix(" raised "))


@contextlib.contextmanager
def calling(what: str) -> Iterator[None]:
    """Turns an exception of what the user has bound, such as 'run.loss', into one line on it.

    Examples:
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
    except (Exception, SystemExit) as error:  # an exit with code 0 would say that the run is done
        if type(error).__name__ in _LOST and not what.endswith("run.data"):  # which waits for no other worker
            raise
        raise raised(what, error) from error


def of_graph(message: str) -> Ending | None:
    """Finds what Python code raised inside a graph, which TensorFlow turns into text; None if it raised nothing.

    Args:
        message: of a `tf.errors.OpError`.

    Examples:
        >>> print(of_graph("dist_partial.errors.Fault: worker 1 is lost"))
        worker 1 is lost
    """
    kinds = {kind.__name__: kind for kind in (UserError, Fault, Raised)}
    # As a traceback has it: the user's classes may have the same names.
    if found := re.search(rf"^{re.escape(__name__)}\.({'|'.join(kinds)}): (.+)", message, re.MULTILINE):
        return kinds[found[1]](found[2])
    # A function of the user's, in what steps call. Unlike code, what was raised is not indented.
    _, mark, last = message.rpartition("Traceback (most recent call last):")
    words = [line for line in last.splitlines() if line and not line[0].isspace()]
    if not mark or not words:
        return None
    what = _readable(words[0].rstrip(": "))
    return Raised(f"run.model, run.loss or run.optimizer raised {what}{_place(_frames(last))}")


def first_line(error: BaseException) -> str:
    """Reduces an error of another library to one line; its type where it says nothing.

    Examples:
        >>> first_line(ValueError("shapes differ\\nin layer 'head'"))
        'shapes differ'
    """
    text, *_ = str(error).split("\n  In call to configurable")  # which gin adds to whatever passes through it
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines[:1] == ["Graph execution error:"]:
        lines = [re.sub(r"^\(0\) \w+: +", "", line) for line in lines if not _PREAMBLE.fullmatch(line)]
    lines = lines or [type(error).__name__]
    # Keras names the layer first, and gives the reason in the next paragraph.
    while len(lines) > 1 and (lines[0].startswith("Exception encountered") or lines[0].endswith("encountered:")):
        lines.pop(0)
    if lines[0] == "in user code:":  # of AutoGraph; the error is below the lines of code that led to it
        lines = [line.partition(": ")[2] for line in lines if re.match(r"\w*(Error|Exception): ", line)] or lines
    return _readable(re.sub(_INSIDE, "", lines[0]).rstrip())


def own_line(error: BaseException) -> str:
    """Finds the line of the user's code that raised an error, as " (file, line n)"; nothing where none was called.

    Examples:
        >>> own_line(ValueError("raised nowhere"))
        ''
    """
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    return _place([*frames, *_frames(str(error))])  # an op of a graph was made there


def _readable(line: str) -> str:
    """The line as any terminal, file and worker takes it."""
    line = re.sub(r"[\x00-\x1f\ud800-\udfff]", lambda found: found[0].encode("unicode_escape").decode(), line)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def _frames(text: str) -> list[tuple[str, str]]:
    return re.findall(r'File "(.+?)", line (\d+)', text)


def _place(frames: Sequence[tuple[str, Any]]) -> str:
    """The last of a traceback's frames that is the user's."""
    own = [f" ({filename}, line {line})" for filename, line in frames if is_users(filename)]
    return own[-1] if own else ""


def is_users(filename: str) -> bool:
    """Tells whether a file of code is the user's, and not of Python, this package or an installed one.

    Examples:
        >>> is_users("/home/ada/mine.py"), is_users(traceback.__file__)
        (True, False)
    """
    others = ("<", str(Path(__file__).parent), str(Path(traceback.__file__).parent))
    return not filename.startswith(others) and "-packages" not in filename
