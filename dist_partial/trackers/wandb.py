"""Weights & Biases (the extra `wandb`)."""

import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

from dist_partial.trackers.base import Row, Tracker, needed
from dist_partial.validation import OneOf, check


@dataclasses.dataclass
class WandB(Tracker):
    """Tells Weights & Biases of numbers and texts.

    Args:
        project: its name.
        mode: 'offline' writes into `wandb/` of the run folder, which `wandb sync` sends; 'online' sends at once.

    Raises:
        UserError: wandb is not installed.

    Examples:
        >>> WandB(project="distillation").mode
        'offline'
    """

    project: str = "dist_partial"
    mode: Annotated[str, OneOf("offline", "online")] = "offline"

    def __post_init__(self) -> None:
        check(self, "WandB")
        needed("wandb", "WandB")
        self._run: Any = None

    def begin(self, folder: Path, known: str) -> str:
        import wandb

        self._run = wandb.init(
            project=self.project,
            name=folder.name,
            dir=str(folder),
            mode=cast(Any, self.mode),
            id=known or None,
            resume="allow" if known else None,
            # The terminal is the run's own, and nothing else of the process is its matter.
            settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True),
        )
        self._run.define_metric("*", step_metric="step")  # its own number only grows; steps may be made again
        return self._run.id

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log({"step": row.step} | row.numbers)

    def text(self, name: str, text: str, step: int) -> None:
        import wandb

        shown = wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
        self._run.log({"step": step, f"texts/{name.partition('.')[0]}": shown})

    def end(self, outcome: str) -> None:
        self._run.summary["outcome"] = outcome
        self._run.finish(exit_code=int(outcome == "failed"))
