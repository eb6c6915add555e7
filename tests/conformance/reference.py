"""What a case comes to by plain Keras: `compile`, `fit` and `evaluate` on one device."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tests.conformance.case import Case, batches_of


@dataclasses.dataclass(frozen=True)
class Reference:
    """Holds the results of a training.

    Attributes:
        initial: the weights before training by their paths, statistics of layers among them.
        weights: the same after it.
        trained: the paths of those that the rules train.
        steps: `loss` as it was reported after each step: the mean over the epoch so far.
        epochs: `fit`'s history: for each name, a value an epoch.
        evaluations: `evaluate`'s results on the held-out rows by batch size.
    """

    initial: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    trained: tuple[str, ...]
    steps: list[float]
    epochs: dict[str, list[float]]
    evaluations: dict[int, dict[str, float]]


@contextlib.contextmanager
def float_type(name: str) -> Iterator[None]:
    """Sets Keras's float type and policy, and puts back what was there."""
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(name)
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])


def as_tensors(nest: Any, floatx: str) -> Any:
    """Prepares arrays for tf.data: floats in `floatx`, and tuples in place of lists, which it would stack."""
    cast = lambda array: array.astype(floatx) if array.dtype.kind == "f" else array  # noqa: E731
    return keras.tree.map_structure(cast, keras.tree.lists_to_tuples(nest))


def joined(batches: Sequence[tuple]) -> tuple:
    """Joins the rows of batches."""
    return keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *batches)


def dataset(rows: tuple, batch: int, floatx: str) -> tf.data.Dataset:
    """Makes batches of rows in their order; the last may be short."""
    return tf.data.Dataset.from_tensor_slices(as_tensors(rows, floatx)).batch(batch)


def weights_by_path(model: keras.Model, variables: Sequence[Any] | None = None) -> dict[str, Any]:
    """Names variables by their paths without the model's own leading name; the model's weights if None.

    Equal paths but the first end in " (2)", " (3)", ...; states of random generators are none of its weights.
    """
    every = [variable.path for variable in model.weights]
    borne = any(layer.name == model.name for layer in model._flatten_layers(include_self=False))
    root = "" if borne and not all(path.startswith(f"{model.name}/") for path in every) else f"{model.name}/"
    named: dict[str, Any] = {}
    for variable in model.weights:
        path, number = variable.path.removeprefix(root), 1
        while path + (f" ({number})" if number > 1 else "") in named:
            number += 1
        named[path + (f" ({number})" if number > 1 else "")] = variable
    chosen = {id(variable) for variable in (model.weights if variables is None else variables)}
    return {path: variable for path, variable in named.items() if id(variable) in chosen}


def select(model: keras.Model, rules: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Makes those variables untrainable that the rules do not train; returns the paths of the others."""
    trained = []
    for path, variable in weights_by_path(model, model.trainable_variables).items():
        words = [word for word, pattern in rules if re.fullmatch(pattern, path)]
        if words[:1] == ["train"]:
            trained.append(path)
        else:
            variable.trainable = False
    return tuple(trained)


class _Steps(keras.callbacks.Callback):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.losses.append(float(np.sum(logs["loss"])))


def _of_dense_gradients(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Sums the gradients of an embedding's row first: Keras 3.15 squares those of a repeated id apart in Adam."""
    apply = optimizer.apply

    def summed(grads: Sequence[Any], trainable_variables: Any = None) -> None:
        apply([None if g is None else tf.convert_to_tensor(g) for g in grads], trainable_variables)

    optimizer.apply = summed
    return optimizer


def compiled(case: Case, batch: tuple, floatx: str) -> tuple[keras.Model, tuple[str, ...]]:
    """Makes the model of a case, builds it on a batch, freezes by the rules, and compiles."""
    keras.utils.set_random_seed(0)
    model = case.model()
    if not model.built:
        model(keras.tree.map_structure(tf.convert_to_tensor, as_tensors(batch[0], floatx)))
    trained = select(model, case.rules)
    make = lambda factory: None if factory is None else factory()  # noqa: E731
    model.compile(
        optimizer=_of_dense_gradients(case.optimizer()),
        loss=make(case.loss),
        loss_weights=case.loss_weights,
        metrics=make(case.metrics),
        weighted_metrics=make(case.weighted_metrics),
    )
    return model, trained


def fit_reference(case: Case, batches: Sequence[tuple], held_out: tuple, floatx: str = "float64") -> Reference:
    """Trains a case for one epoch on batches as they come, and evaluates the held-out rows in batches of 12 and 4."""
    with float_type(floatx):
        model, trained = compiled(case, batches[0], floatx)
        values = lambda: {path: np.array(v) for path, v in weights_by_path(model).items()}  # noqa: E731
        initial, steps, size = values(), _Steps(), len(keras.tree.flatten(batches[0])[0])
        history = model.fit(
            dataset(joined(batches), size, floatx),
            epochs=1,
            shuffle=False,
            class_weight=case.class_weight,
            callbacks=[steps],
            verbose=0,
        )
        evaluations = {
            size: model.evaluate(dataset(held_out, size, floatx), verbose=0, return_dict=True) for size in (12, 4)
        }
        return Reference(initial, values(), trained, steps.losses, history.history, evaluations)


def reference_of(case: Case, floatx: str = "float64") -> Reference:
    """Trains a case on its own batches, as `batches_of` draws them."""
    return fit_reference(case, *batches_of(case), floatx=floatx)
