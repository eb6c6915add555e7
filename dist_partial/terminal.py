"""What a run says: one line after the other above a progress bar, in the words of whoever has called it."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from tqdm import tqdm

_speaking: list[Callable[[str], str]] = []  # of all threads: what a thread of a run's says is the run's


def say(line: str, file: TextIO | None = None) -> None:
    """Prints a line at once, above a progress bar, if there is one.

    Args:
        line: in the words of gin files, unless `speaking` changes them.
        file: sys.stdout, if it is None.

    Examples:
        >>> with speaking(str.upper):
        ...     say("step 1")
        STEP 1
    """
    for words in _speaking[-1:]:
        line = words(line)
    file = file or sys.stdout
    tqdm.write(line, file)
    file.flush()  # into a file, in which somebody looks for a sign of life


@contextlib.contextmanager
def speaking(words: Callable[[str], str]) -> Iterator[None]:
    """Has `say` put all lines into other words meanwhile."""
    _speaking.append(words)
    try:
        yield
    finally:
        _speaking.remove(words)
