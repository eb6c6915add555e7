"""What tests of `fit` on several workers have in common: data, a model, and plain Keras on one device beside them."""

import keras
import numpy as np

import dist_partial
from dist_partial import fit

EXAMPLES, BATCH = 60, 24  # of all workers together: two full batches and a short one
RNG = np.random.default_rng(3)
X = RNG.normal(size=(EXAMPLES, 6))
Y = np.tanh(X @ RNG.normal(size=(6, 2)))
VALIDATION = RNG.normal(size=(30, 6)), RNG.normal(size=(30, 2))
FIRST = [RNG.normal(size=shape) for shape in ((6, 5), (5,), (5, 2), (2,))]


def part(workers, arrays):
    """This worker's examples of all, in such an order that batches hold the same ones for any number of workers."""
    return [array[workers.rank :: workers.workers] for array in arrays]


def model():
    layers = [keras.layers.Dense(5, activation="tanh", name="body"), keras.layers.Dense(2, name="head")]
    made = keras.Sequential([keras.Input([6]), *layers])
    made.set_weights(FIRST)
    return made


def compiled(workers, made, optimizer, rules=(("train", ".*"),), frozen=(), more=None, **options):
    """Compiles with `partial` and its options, or, on one device, as one does with Keras alone."""
    if workers.workers > 1:
        optimizer = dist_partial.partial(optimizer, list(rules), made, **options)
    else:
        for layer in made.layers:
            layer.trainable = layer.name not in frozen
    usual = {"loss": "mse", "metrics": ["mae", keras.metrics.RootMeanSquaredError()]}
    made.compile(optimizer, **usual | (more or {}))
    return made


def fitted(workers, made, epochs=4, callbacks=(), validation=False, **more):
    history = made.fit(
        *part(workers, (X, Y)),
        batch_size=BATCH // workers.workers,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=fit.on_workers(list(callbacks), workers),
        validation_data=part(workers, VALIDATION) if validation else None,
        **more,
    )
    return ends(made) | logged(history)


def logged(history):
    return {f"log_{name}": np.array(values) for name, values in history.history.items()}


def ends(made):
    return {f"weight_{i}": value for i, value in enumerate(made.get_weights())}
