"""Saves the state from which more or fewer workers go on, which have met after a loss: see `recovery`."""

import dataclasses
from pathlib import Path

from dist_partial import checkpoints
from dist_partial.step.optimizers import finalize
from dist_partial.training import run_folder
from dist_partial.training.build import Trainer
from dist_partial.training.events import Every
from dist_partial.training.metric_writer import MetricWriter
from dist_partial.training.recovery import Recovery, Resized


def hand_over(trainer: Trainer, recovery: Recovery, met: Resized, folder: Path) -> None:
    """Saves a checkpoint of the state that the workers have gone back to; all call it.

    An evaluation that was due after the last call is owed: who goes on makes it up. Before the first step nothing is
    saved, for all begin alike.

    Args:
        trainer: whose variables have the state.
        recovery: which has gone back to it.
        met: what it has raised.
        folder: the run folder, which the first worker writes.
    """
    replicas, settings, state = trainer.replicas, trainer.settings, met.state
    if replicas.is_chief and state is not None and state.step:
        owed = recovery.owes and Every(settings.eval_every, settings.steps).due(state.step)
        with (
            run_folder.held(folder, True, run_folder.PATIENCE_SECONDS),
            # Adds what who is lost has not written.
            MetricWriter(folder, state.step, settings.steps, True, not owed, recovery.rows),
        ):
            if state.step >= settings.steps:
                finalize(replicas.strategy, trainer.optimizers)  # as the end of the run does, which is yet to come
            metadata = dataclasses.replace(state, evaluated=not owed).metadata()
            metadata |= {"frozen": trainer.fingerprint["frozen"]}
            checkpoints.save(folder / "checkpoints", state.step, recovery.arrays(met), metadata, settings.keep)
    assert replicas.backend is not None
    replicas.backend.barrier()
