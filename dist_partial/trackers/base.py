"""The interface of a tracker."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dist_partial.errors import UserError


class Row(NamedTuple):
    """Holds numbers of one step, by names such as 'train/loss' and 'eval/accuracy'.

    Examples:
        >>> Row(7, {"train/loss": 2.5}).numbers["train/loss"]
        2.5
    """

    step: int
    numbers: dict[str, float]


class Tracker:
    """Gets what a run writes to its folder; subclass it for another one.

    Each method does nothing unless a subclass says otherwise. One thread calls them, in this order, and never that of
    the training: a call may take long. What it raises ends the tracker and not the run (see `Following`).

    Examples:
        >>> class Printed(Tracker):
        ...     def log(self, rows):
        ...         for row in rows:
        ...             print(row.step, row.numbers)
        >>> Printed().log([Row(1, {"train/loss": 2.5})])
        1 {'train/loss': 2.5}
    """

    def begin(self, folder: Path, known: str) -> str:
        """Begins a run, or goes on with one.

        Args:
            folder: the run folder, whose name is that of the run.
            known: what this method returned before the run was stopped; '' for a new one.

        Returns:
            By what the tracker knows the run.
        """
        return known

    def log(self, rows: Sequence[Row]) -> None:
        """Takes numbers, of all steps since the last call; those of a step that is made again come twice."""

    def text(self, name: str, text: str, step: int) -> None:
        """Takes a text: 'plan.txt', 'operative_config.gin', or 'sample_0.txt' and so on."""

    def end(self, outcome: str) -> None:
        """Ends the run: 'finished', 'stopped' (by a signal) or 'failed'; not called in a process that is killed."""


def needed(module: str, tracker: str) -> None:
    """Raises UserError unless a module can be imported; imports nothing."""
    if importlib.util.find_spec(module) is None:
        extra = tracker.lower()
        raise UserError(f"{tracker} needs {module}, which is not installed: pip install 'dist_partial[{extra}]'")
