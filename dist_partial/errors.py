"""What ends a run: mistakes that the user can mend, and faults after which the same command goes on."""

import re
import traceback
from pathlib import Path

INTERRUPTED = 130  # the exit code after Ctrl-C: 128 + SIGINT, as shells report it
AGAIN = 75  # the exit code after a fault or SIGTERM: EX_TEMPFAIL of sysexits.h, "try again later"


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # Keras names the layer first, and gives the reason in the next paragraph.
    line = lines[1] if len(lines) > 1 and lines[0].startswith("Exception encountered") else lines[0]
    return re.sub(r"\x1b\[\d*m|\{\{.*?\}\} ?", "", line)  # colours, and TensorFlow's names of nodes


def own_line(error: Exception) -> str:
    """Where in the user's own code an error was raised, as " (file, line n)"; nothing where no such code was called."""
    others = ("<", str(Path(__file__).parent), str(Path(traceback.__file__).parent))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(others) and "-packages" not in frame.filename:
            return f" ({frame.filename}, line {frame.lineno})"
    return ""


class UserError(Exception):
    """A mistake in what the user wrote or pointed at.

    The message is one line: it names the thing, shows what was near it and says what to do. The
    command line prints it without a traceback and exits with 2.
    """


class Fault(Exception):
    """Something around the run has failed: a worker is lost, a disk is full.

    Nothing needs to be changed for the same command to go on from the last checkpoint. The message is one line; the
    command line prints it without a traceback and exits with `AGAIN`, on which launchers and schedulers start again.
    """
