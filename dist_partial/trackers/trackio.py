"""Trackio (the extra `trackio`)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_partial.trackers.base import Row, Tracker, needed


@dataclasses.dataclass
class Trackio(Tracker):
    """Tells Trackio of numbers and texts; `trackio show` draws them.

    Args:
        project: its name.

    Raises:
        UserError: Trackio is not installed.

    Examples:
        >>> Trackio(project="distillation").project
        'distillation'
    """

    project: str = "dist_partial"

    def __post_init__(self) -> None:
        needed("trackio", "Trackio")
        self._run: Any = None

    def begin(self, folder: Path, known: str) -> str:
        import trackio

        self._run = trackio.init(
            self.project,
            known or folder.name,
            resume="allow" if known else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return self._run.name

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log(dict(row.numbers), step=row.step)

    def text(self, name: str, text: str, step: int) -> None:
        import trackio

        self._run.log({f"texts/{name.partition('.')[0]}": trackio.Markdown(f"```text\n{text}\n```")}, step=step)

    def end(self, outcome: str) -> None:
        self._run.finish()
