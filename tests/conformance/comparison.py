"""How far a training is from Keras's own, and the differences that are known."""

import contextlib
import dataclasses
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.conformance import engine, reference
from tests.conformance.case import Case
from tests.conformance.known import PARTS


@dataclasses.dataclass(frozen=True)
class Difference:
    """Holds the largest differences, each relative to max(1, |Keras's value|); infinite where a value is missing.

    Attributes:
        weights: of what the rules train.
        losses: of each step.
        evaluations: of all that `evaluate` reports.
    """

    weights: float
    losses: float
    evaluations: float


assert tuple(field.name for field in dataclasses.fields(Difference)) == PARTS


def step_losses(means: list[float]) -> np.ndarray:
    """The loss of each step, of the means so far that Keras reports."""
    return np.diff(np.asarray(means) * np.arange(1, len(means) + 1), prepend=0.0)


def difference(ours: engine.Trained, keras: reference.Reference) -> Difference:
    """Compares a training with Keras's."""
    assert keras.trained
    return Difference(
        max(_far(ours.weights.get(path), keras.weights[path]) for path in keras.trained),
        _far(ours.losses, step_losses(keras.steps)),
        max(_far(ours.evaluation.get(name), value) for name, value in keras.evaluations[12].items()),
    )


def check_trained(keras: reference.Reference) -> None:
    """What Keras trains is finite and moved, and the loss fell."""
    assert keras.trained
    for path, weight in keras.weights.items():
        assert np.isfinite(weight).all(), path
        if path in keras.trained:
            moved = np.abs(weight.astype(np.float64) - keras.initial[path].astype(np.float64))
            assert np.max(moved, initial=0.0) > 1e-7, f"{path} does not move"
    each = step_losses(keras.steps)
    assert np.isfinite(each).all()
    assert each[-4:].mean() < each[:4].mean()  # four steps are a pass over the rows
    for logs in (keras.epochs, *keras.evaluations.values()):
        assert "loss" in logs and all(np.isfinite(value).all() for value in logs.values())


def _far(ours: Any, keras: Any) -> float:
    if ours is None or np.shape(ours) != np.shape(keras):
        return np.inf
    one, two = np.asarray(ours, np.float64), np.asarray(keras, np.float64)
    far = np.abs(one - two) / np.maximum(1.0, np.abs(two))
    return float(np.max(np.where(np.isnan(far), np.inf, far), initial=0.0))


def keras_of(case: Case) -> reference.Reference:
    """Trains a case by Keras on the batches that the loop reads."""
    with _silent():
        return reference.fit_reference(case, *engine.batches(case))


def trained(case: Case, replicas: Callable[[], Any]) -> engine.Trained:
    """Trains a case by the loop, in a folder that is gone afterwards."""
    with _silent(), tempfile.TemporaryDirectory() as folder:
        return engine.trained(case, Path(folder), replicas)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
