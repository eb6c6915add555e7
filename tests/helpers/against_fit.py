"""Runs on numbers, in batches of all of them, that plain Keras repeats with `fit` on one device."""

import keras
import numpy as np

from dist_partial.config.settings import Sampling, Settings
from dist_partial.data import ArraySource, Dataset
from dist_partial.training import loop
from tests.helpers.files import rows, trained
from tests.helpers.strategies import in_process

COUNT, STEPS = 18, 20  # examples, all of them in each step


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
        global_batch=len(data[0]),
        replicas=lambda: made,
        sampling=Sampling(length=1),
        **more,
    )


def fitted(model, data, loss, steps=STEPS, precision="float64"):
    """The losses and weights of plain Keras on one device."""
    keras.config.set_floatx(precision)
    keras.config.set_dtype_policy(precision)
    keras.utils.set_random_seed(0)
    made = model()
    made.compile(keras.optimizers.SGD(0.05), loss=loss())
    x, y, *weight = data
    history = made.fit(
        x, y, sample_weight=weight[0] if weight else None, batch_size=len(x), epochs=steps, shuffle=False, verbose=0
    )
    names = [variable.path.removeprefix(f"{made.name}/") for variable in made.trainable_variables]
    return history.history.get("loss"), dict(zip(names, map(np.array, made.trainable_variables), strict=True)), made


def features(*shape):
    rng = np.random.default_rng(1)
    return rng.normal(size=(COUNT, *shape))


def one_output():
    return keras.Sequential([keras.Input((7,)), keras.layers.Dense(1, name="d")])


def check_against_fit(folder, model, data, loss, tolerance=1e-9, **more):
    losses, weights, _ = fitted(model, data, loss)
    loop.run(settings(model, data, loss, **more), folder)
    found = rows(folder / "metrics.jsonl")
    np.testing.assert_allclose([row["loss"] for row in found if row["split"] == "train"], losses, rtol=1e-6)
    for name, value in trained(folder, more.get("steps", STEPS)).items():
        np.testing.assert_allclose(value, weights[name], rtol=tolerance, atol=tolerance / 1e3, err_msg=name)
