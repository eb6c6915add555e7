"""A case of the conformance suite: a model, its data, and what `compile` and `fit` are given for it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

TRAIN_ROWS, HELD_OUT_ROWS = 48, 10
ROWS = TRAIN_ROWS + HELD_OUT_ROWS
STEPS, BATCH = 20, 12

# A bias of keys moves all scores of a query alike: its gradient is nothing but rounding errors, which Adam makes large.
WITHOUT_KEY_BIAS = (("freeze", r".*/key/bias"), ("train", ".*"))


def _adam() -> keras.optimizers.Optimizer:
    return keras.optimizers.Adam(1e-2)


@dataclasses.dataclass(frozen=True)
class Case:
    """Holds what one training is made of; everything is made again at each call.

    Attributes:
        name: words with underscores, unique.
        model: makes the model. The same weights after the same `keras.utils.set_random_seed`.
        data: makes NumPy arrays of ROWS rows: (x,), (x, y) or (x, y, weight), each any nest that `fit` takes. Floats
            are float64, ids int32, strings object arrays.
        loss: makes what `compile(loss=...)` takes.
        loss_weights: what `compile(loss_weights=...)` takes.
        metrics: makes what `compile(metrics=...)` takes.
        weighted_metrics: makes what `compile(weighted_metrics=...)` takes.
        class_weight: what `fit(class_weight=...)` takes.
        optimizer: makes the optimizer.
        rules: ("train" | "freeze", pattern) over the whole paths of variables, without the model's own leading name.
            The first match wins; what no rule matches is frozen.
        random: why training draws random numbers, so that the case equals only itself.
        needs: an optional package.
        single: why some variables are float32 in any model, so that weights agree to float32's precision alone.
    """

    name: str
    model: Callable[[], keras.Model]
    data: Callable[[], tuple]
    loss: Callable[[], Any] | None = None
    loss_weights: Any = None
    metrics: Callable[[], Any] | None = None
    weighted_metrics: Callable[[], Any] | None = None
    class_weight: dict | None = None
    optimizer: Callable[[], keras.optimizers.Optimizer] = _adam
    rules: tuple[tuple[str, str], ...] = (("train", ".*"),)
    random: str = ""
    needs: str = ""
    single: str = ""

    def __repr__(self) -> str:
        return self.name


def rows_of(nest: Any, rows: Any) -> Any:
    """Takes rows of all arrays of a nest; `rows` is a slice or an array of indices."""
    return keras.tree.map_structure(lambda array: array[rows], nest)


def batches_of(case: Case, steps: int = STEPS, batch: int = BATCH, seed: int = 1) -> tuple[list[tuple], tuple]:
    """Draws the batches of training, in passes over the training rows in another order each, and the held-out rows."""
    data, rng = case.data(), np.random.default_rng(seed)
    passes = -(-steps * batch // TRAIN_ROWS)
    order = np.concatenate([rng.permutation(TRAIN_ROWS) for _ in range(passes)])
    batches = [rows_of(data, order[step * batch : (step + 1) * batch]) for step in range(steps)]
    return batches, rows_of(data, slice(TRAIN_ROWS, ROWS))
