"""The run folder: one run at a time holds it, and begins with the files that say what the run is."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from dist_partial.checkpoints import fingerprints
from dist_partial.files import locked, refuse_links, write_json, write_text, writing
from dist_partial.selection.plan import Plan
from dist_partial.selection.table import plan_table
from dist_partial.training.build import Trainer
from dist_partial.training.metric_writer import LINES

PATIENCE_SECONDS = 10.0
_WRITTEN = ("checkpoints", "best", "tensorboard", "tensorboard/train", "tensorboard/eval", *LINES)


@contextlib.contextmanager
def held(folder: Path, active: bool, patience_seconds: float = 0.0) -> Iterator[None]:
    """Locks the folder for this run; does nothing on a worker that does not write it.

    Args:
        folder: the run folder.
        active: whether this worker writes it.
        patience_seconds: how long to wait for another process that holds it, and is about to end.

    Raises:
        UserError: another run holds it, or something that will be written there is a link.
    """
    # A lost worker that is being killed may hold it for a moment.
    with locked(folder, patience_seconds) if active else contextlib.nullcontext():
        if active:  # whatever else is written there replaces what has its name
            refuse_links(*(folder / name for name in _WRITTEN))
        yield


@contextlib.contextmanager
def begun(folder: Path, trainer: Trainer, plan: Plan | None, comes: bool = False) -> Iterator[None]:
    """Holds the folder, and writes the run's fingerprint and its plan.

    Args:
        folder: the run folder.
        trainer: of the run.
        plan: None where both are there.
        comes: whether this worker may come in place of another, which is about to leave the folder.
    """
    active = trainer.replicas.is_chief
    with held(folder, active, PATIENCE_SECONDS if comes else 0.0):
        if active and plan is not None:
            with writing(folder):
                write_json(folder / fingerprints.RUN_FILE, trainer.fingerprint | fingerprints.began(folder))
                write_json(folder / "plan.json", plan.to_json())
                write_text(folder / "plan.txt", plan_table(plan, trainer.replicas.workers) + "\n")
        yield
