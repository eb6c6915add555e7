"""Runs on numbers, in batches of all of them, that plain Keras repeats with `fit` on one device."""

import inspect
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial.config.settings import Sampling, Settings
from dist_partial.data import ArraySource, Dataset
from dist_partial.training import loop
from tests.helpers.files import rows, trained
from tests.helpers.strategies import in_process

COUNT, STEPS = 18, 20  # examples, all of them in each step
COMPILED = ("loss_weights", "metrics", "weighted_metrics")  # settings that `Model.compile` takes, too


def settings(model, data, loss, *, replicas=2, steps=STEPS, rules=(("train", ".*"),), **more):
    """A run in batches of all examples, with SGD."""
    source = ArraySource(*data)
    more = {"precision": "float64", "optimizer": lambda: keras.optimizers.SGD(0.05), **more}
    made = in_process(replicas)
    return Settings(
        rules=list(rules),
        model=model,
        data=lambda: Dataset("numbers", source, source, "1"),
        loss=loss,
        steps=steps,
        global_batch=len(source),
        replicas=lambda: made,
        sampling=Sampling(length=1),
        **more,
    )


def compiled(model, loss, precision="float64", **more):
    """A fresh model as a run begins with it, compiled by plain Keras; `more` are settings of the run."""
    keras.config.set_floatx(precision)
    keras.config.set_dtype_policy(precision)
    keras.utils.set_random_seed(0)
    made = model()
    if loss is not None or not made.compiled:
        told = {name: _made(more[name]) for name in COMPILED if name in more}
        made.compile(keras.optimizers.SGD(0.05), loss=loss() if callable(loss) else loss, **told)
    return made


def _made(metrics: Any) -> Any:
    """Metrics of factories; each model has its own."""
    if isinstance(metrics, list):
        return [_made(each) for each in metrics]
    of_targets = inspect.isfunction(metrics) and inspect.signature(metrics).parameters
    return metrics() if callable(metrics) and not of_targets else metrics


def fitted(model, data, loss, steps=STEPS, precision="float64", **more):
    """The losses and weights of plain Keras on one device, and the model."""
    made = compiled(model, loss, precision, **more)
    x, y, weight = (*data, None, None)[:3]
    history = made.fit(
        x,
        y,
        sample_weight=weight,
        batch_size=len(tf.nest.flatten(x)[0]),
        epochs=steps,
        shuffle=False,
        verbose=0,
        class_weight=more.get("class_weight"),
    )
    names = [variable.path.removeprefix(f"{made.name}/") for variable in made.trainable_variables]
    return history.history.get("loss"), dict(zip(names, map(np.array, made.trainable_variables), strict=True)), made


def features(*shape):
    rng = np.random.default_rng(1)
    return rng.normal(size=(COUNT, *shape))


def one_output():
    return keras.Sequential([keras.Input((7,)), keras.layers.Dense(1, name="d")])


def check_against_fit(folder, model, data, loss, tolerance=1e-9, summed=False, steps=STEPS, **more):
    """Compares the losses and metrics of all steps, what is trained, and the last evaluation; returns the rows.

    What Keras shows of a loss that it sums without saying so is something else: `summed` compares it with nothing.
    """
    _, weights, made = fitted(model, data, loss, steps, **more)
    loop.run(settings(model, data, loss, steps=steps, **more), folder)
    for name, value in trained(folder, steps).items():
        np.testing.assert_allclose(value, weights[name], rtol=tolerance, atol=tolerance / 1e3, err_msg=name)
    *found, held_out = rows(folder / "metrics.jsonl")
    found = [row for row in found if row["split"] == "train"]
    own = [] if summed else list(made.history.history)
    for name in set(own) & found[0].keys():  # those that are not cheap are of the evaluation alone
        expected = made.history.history[name]
        np.testing.assert_allclose([row[name] for row in found], expected, rtol=tolerance, err_msg=name)
    x, y, weight = (*data, None, None)[:3]
    expected = made.evaluate(x, y, sample_weight=weight, batch_size=COUNT, verbose=0, return_dict=True)
    for name in own:
        np.testing.assert_allclose(held_out[name], expected[name], rtol=tolerance, err_msg=f"held-out {name}")
    return [*found, held_out]
