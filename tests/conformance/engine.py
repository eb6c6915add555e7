"""What a case comes to by the training loop, on any replicas."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import tensorflow as tf

from dist_partial import checkpoints
from dist_partial.config.settings import Settings
from dist_partial.data import ArraySource, Dataset, train_indices
from dist_partial.training import loop
from tests.conformance.case import BATCH, HELD_OUT_ROWS, STEPS, TRAIN_ROWS, Case, rows_of


@dataclasses.dataclass(frozen=True)
class Trained:
    """Holds the results of a training.

    Attributes:
        weights: what the rules train, by path, from the last checkpoint.
        losses: one a step.
        metrics: of each step's batch, by name.
        evaluation: of the held-out rows, by name.
    """

    weights: dict[str, np.ndarray]
    losses: list[float]
    metrics: list[dict[str, float]]
    evaluation: dict[str, float]


def settings(case: Case, accumulate: int = 1, **more) -> Settings:
    """Says the same of a case as `reference.compiled` does to Keras."""
    rules = [*case.rules] if case.rules[-1][1] == ".*" else [*case.rules, ("freeze", ".*")]
    given = {
        "steps": STEPS,
        "global_batch": BATCH,
        "precision": "float64",
        "accumulate": accumulate,
        "optimizer": case.optimizer,
        "loss": case.loss,
        "loss_weights": case.loss_weights,
        "metrics": case.metrics and case.metrics(),
        "weighted_metrics": case.weighted_metrics and case.weighted_metrics(),
        "class_weight": case.class_weight,
    }
    return Settings(rules, case.model, functools.partial(data, case), **{**given, **more})


def data(case: Case) -> Dataset:
    """Divides the rows of a case into those to learn from and those held out."""
    rows = case.data()
    parts = (slice(TRAIN_ROWS), slice(TRAIN_ROWS, TRAIN_ROWS + HELD_OUT_ROWS))
    return Dataset(case.name, *(ArraySource(*rows_of(rows, part)) for part in parts), fingerprint=case.name)


def batches(case: Case) -> tuple[list[tuple], tuple]:
    """Gives the batches that the loop reads on one replica, in its order, and the held-out rows."""
    rows = case.data()
    alone = tf.distribute.InputContext()
    indices = train_indices(TRAIN_ROWS, first_step=0, global_batch=BATCH, seed=0, context=alone).take(STEPS)
    return [rows_of(rows, each.numpy()) for each in indices], rows_of(rows, slice(TRAIN_ROWS, None))


def trained(case: Case, folder: Path, replicas, accumulate: int = 1) -> Trained:
    """Trains a case in a folder; `replicas` makes them."""
    loop.run(settings(case, accumulate, replicas=replicas), folder)
    return results(folder)


def results(folder: Path) -> Trained:
    """Reads what a training has left in its folder."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    own = {"step", "split", "gradient_norm", "wire_bytes", "nic_bytes", "wire_share", "examples"}
    rows = {split: [row for row in lines if row["split"] == split] for split in ("train", "eval")}
    train, held_out = ([{k: v for k, v in row.items() if k not in own} for row in rows[split]] for split in rows)
    saved = checkpoints.newest(folder / "checkpoints", print).arrays
    weights = {name.removeprefix("variables/"): value for name, value in saved.items() if name.startswith("variables/")}
    return Trained(weights, [row.pop("loss") for row in train], train, held_out[-1])
