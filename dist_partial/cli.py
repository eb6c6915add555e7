"""What the commands share: reading flags, and errors in one line with exit code 2."""

import contextlib
import dataclasses
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import flags

from dist_partial.errors import INTERRUPTED, Fault, Interrupted, Raised, UserError, raised
from dist_partial.files import MISTAKES
from dist_partial.validation import nearest

__all__ = [
    "INTERRUPTED",
    "Ended",
    "UserError",
    "call",
    "check_gin_file",
    "check_run_dir",
    "define_gin_flags",
    "ending",
    "import_tensorflow_quietly",
    "parse",
    "run_folder",
]


def import_tensorflow_quietly() -> None:
    """Imports TensorFlow without its start-up notes, which it writes before any log level is in force."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    terminal = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        import tensorflow  # noqa: F401
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def define_gin_flags(values: flags.FlagValues) -> None:
    """Defines --gin_file and --gin_param, as every command that reads a configuration has them.

    Examples:
        >>> values = flags.FlagValues()
        >>> define_gin_flags(values)
        >>> _ = values(["train", "--gin_file=a.gin", "--gin_file=b.gin"])
        >>> values.gin_file, values.gin_param
        (['a.gin', 'b.gin'], [])
    """
    flags.DEFINE_multi_string("gin_file", [], "gin file; may be given several times", flag_values=values)
    flags.DEFINE_multi_string("gin_param", [], "binding over the files, such as run.steps=100", flag_values=values)


def check_gin_file(values: flags.FlagValues) -> None:
    """Raises UserError if none is given.

    Examples:
        >>> values = flags.FlagValues()
        >>> define_gin_flags(values)
        >>> _ = values(["train"])
        >>> check_gin_file(values)
        Traceback (most recent call last):
        dist_partial.errors.UserError: no --gin_file: try --gin_file=gin_configs/quickstart.gin
    """
    if not values.gin_file:
        raise UserError("no --gin_file: try --gin_file=gin_configs/quickstart.gin")


def run_folder(run_dir: str | None, gin_files: Sequence[str]) -> Path:
    """Returns the run folder that the flags name: by default runs/<name of the last gin file>.

    Examples:
        >>> str(run_folder(None, ["base.gin", "configs/mine.gin"])), str(run_folder("here", ["mine.gin"]))
        ('runs/mine', 'here')
    """
    return Path(run_dir or Path("runs") / Path(gin_files[-1]).stem)


def check_run_dir(run_dir: str | None) -> Path:
    """Returns the folder that --run_dir names; raises UserError unless a run has begun in it.

    Examples:
        >>> check_run_dir("absent")
        Traceback (most recent call last):
        dist_partial.errors.UserError: absent is no run folder: it has no operative_config.gin; ...
    """
    if not run_dir:
        raise UserError("no --run_dir: name the folder of a run, such as --run_dir=runs/quickstart")
    folder = Path(run_dir)
    if not (folder / "operative_config.gin").is_file():
        runs = [file.parent.name for file in sorted(folder.parent.glob("*/operative_config.gin"))]
        near = nearest(folder.name, runs, always=True, folder=folder.parent)
        raise UserError(
            f"{folder} is no run folder: it has no operative_config.gin; name a folder that training has written{near}"
        )
    return folder


@dataclasses.dataclass
class Ended:
    """Records how a command has ended.

    Attributes:
        code: the exit code: 0; 2 after an error in the flags or a `UserError`, 75 after a `Fault`, 1 after any other
            exception, 130 after Ctrl-C, 141 if whatever reads the output, such as `head`, has left.
    """

    code: int = 0


UNREAD = 141  # the exit code after the reader of what is printed has left: 128 + SIGPIPE, as shells report it


class _Helped(Exception):
    """`--help` was given and answered."""


@contextlib.contextmanager
def ending() -> Iterator[Ended]:
    """Turns what ends a command into one line on stderr and an exit code.

    Examples:
        >>> with ending() as ended:
        ...     raise UserError("no --gin_file")
        >>> ended.code
        2
    """
    ended = Ended()
    try:
        yield ended
        sys.stdout.flush()
    except _Helped:
        pass
    except BrokenPipeError:
        if not _reader_left():  # the pipe is another one
            raise
        ended.code = UNREAD
    except Interrupted as interrupted:
        print(interrupted)
        ended.code = interrupted.code
    except KeyboardInterrupt:  # before there was anything to save, or a second time
        rest = "the same command begins again, or goes on from its last checkpoint"
        print(f"stopped before anything more was saved: {rest}", file=sys.stderr)
        ended.code = INTERRUPTED
    except OSError as error:  # a name that is too long for the file system, say, wherever it is first looked for
        if error.errno not in MISTAKES or not error.filename:
            raise
        print(f"error: {str(error.filename)[:300]}: {error.strerror}; name another file or folder", file=sys.stderr)
        ended.code = 2
    except (UserError, Fault, flags.Error) as error:
        _say(error)
        ended.code = error.code if isinstance(error, Fault) else 2
    except (Exception, SystemExit) as error:  # whose code would say what has not happened
        # To print it here and to go on lets go of what it holds, see `failures.released`.
        _say(error if isinstance(error, Raised) else raised("", error))
        if error.__cause__ or not isinstance(error, Raised):  # or else another worker's, who prints its own
            traceback.print_exception(error.__cause__ or error)
        ended.code = Raised.code


def parse(usage: str | None, values: flags.FlagValues, argv: Sequence[str] | None) -> None:
    """Parses a command's flags; prints them and ends the command if --help is among them. Call it in `ending`.

    Args:
        usage: what --help prints before the flags.
        values: the command's flags, which get their values.
        argv: arguments without the program's name; None takes the process's own.

    Examples:
        >>> values = flags.FlagValues()
        >>> _ = flags.DEFINE_integer("count", 1, "how many", flag_values=values)
        >>> parse("Counts.", values, ["--count", "5"])
        >>> values.count
        5
    """
    flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=values)
    rest = values([sys.argv[0], *(sys.argv[1:] if argv is None else argv)])[1:]
    if values.help:
        started = str(usage)
        if Path(sys.argv[0]).stem == "dist-partial":
            started = started.replace("python -m dist_partial.", "dist-partial ")
        print(f"{started}\n{values.main_module_help() or values.get_help()}", flush=True)
        raise _Helped
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: flags are written --name=value")


def call(usage: str | None, values: flags.FlagValues, argv: Sequence[str] | None, command: Callable[[], int]) -> int:
    """Parses the flags, runs a command that reads `values`, and returns its exit code: see `Ended`.

    Examples:
        >>> values = flags.FlagValues()
        >>> _ = flags.DEFINE_integer("count", 1, "how many", flag_values=values)
        >>> call("Counts.", values, ["--count=5"], lambda: values.count)
        5
    """
    with ending() as ended:
        parse(usage, values, argv)
        ended.code = command()
    return ended.code


def _reader_left() -> bool:
    """Whether nobody reads stdout or stderr any more; what is still to be written there is dropped."""
    poll, left = select.poll(), False
    for number in (1, 2):
        poll.register(number, select.POLLOUT)
    for number, event in poll.poll(0):
        if event & select.POLLERR:
            left = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return left


def _say(error: BaseException) -> None:
    # gin adds lines to whatever passes through it, with the names of its own functions.
    print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
