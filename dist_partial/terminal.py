"""What a run says: one line after the other above a progress bar, in the words of whoever has called it."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from tqdm import tqdm

_speaking: list[Callable[[str], str]] = []  # of all threads: what a thread of a run's says is the run's
_silent: list[None] = []  # one for each run that says nothing


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
    if _silent and file is None:
        return
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


def is_silent() -> bool:
    """Tells whether nothing is to be shown, and no progress bar either."""
    return bool(_silent)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Has `say` print nothing meanwhile, but what goes to stderr.

    Examples:
        >>> with silent():
        ...     say("step 1")
    """
    _silent.append(None)
    try:
        yield
    finally:
        _silent.pop()


@contextlib.contextmanager
def without_notes() -> Iterator[None]:
    """Leaves out meanwhile what TensorFlow notes on how it sums over replicas, and grain on a profiler of JAX's."""
    tensorflow, absl = logging.getLogger("tensorflow"), logging.getLogger("absl")
    level = tensorflow.level
    tensorflow.setLevel(max(level, logging.WARNING))
    absl.addFilter(_is_worth_reading)
    try:
        yield
    finally:
        tensorflow.setLevel(level)
        absl.removeFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return "jax profiler" not in record.getMessage()
