"""One worker of tests/integration/test_fit_workers.py, or, without TF_CONFIG, plain Keras on one device.

python -m tests.helpers.fit_workers FOLDER REPLICAS SCENARIO ...
"""

import contextlib
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import dist_partial
from dist_partial import fit
from dist_partial.reductions import AllReduce, PowerSGD, Quantized, TopK
from tests.helpers import fit_inputs
from tests.helpers.fit_common import BATCH, FIRST, VALIDATION, X, Y, compiled, ends, fitted, model, part


def everything(workers):
    """All is trained; two callbacks follow what is read on the held-out part, and one writes."""
    folder = Path(sys.argv[1]) / f"of-{workers.workers}"
    folder.mkdir(exist_ok=True)
    best, log = (folder / f"{workers.rank}-{name}" for name in ("best.weights.h5", "log.csv"))  # each names its own
    callbacks = [
        keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.1, patience=1, min_delta=0.1),
        keras.callbacks.EarlyStopping("val_loss", patience=4, min_delta=0.1, restore_best_weights=True),
        keras.callbacks.ModelCheckpoint(best, "val_loss", save_best_only=True, save_weights_only=True),
        keras.callbacks.CSVLogger(log),
    ]
    made = compiled(workers, model(), keras.optimizers.Adam(0.05))
    found = fitted(workers, made, epochs=12, callbacks=callbacks, validation=True)
    made.evaluate(*part(workers, VALIDATION), verbose=0)
    found |= {f"evaluated_{name}": np.array(value) for name, value in fit.metrics(workers, made).items()}
    if workers.workers > 1:
        found["own_files"] = np.array([best.exists(), log.exists()])
    if best.exists():
        made.load_weights(best)
        found |= {f"saved_{i}": value for i, value in enumerate(made.get_weights())}
    return found


def selection(workers):
    """The head alone, by its own optimizer, whose clipping is of the sum."""
    rules = [("train", "head/.*"), ("freeze", ".*")]
    optimizer = keras.optimizers.SGD(0.2, momentum=0.9, clipnorm=0.05)
    return fitted(workers, compiled(workers, model(), optimizer, rules, frozen=["body"]), validation=True)


def accumulation(workers):
    """Two steps make one update; on one device, one step of twice as many examples."""
    made = compiled(workers, model(), keras.optimizers.Adam(0.05), accumulate=2)
    rows = slice(0, 48)
    x, y = part(workers, (X[rows], Y[rows]))
    batch = BATCH // workers.workers if workers.workers > 1 else 2 * BATCH
    made.fit(x, y, batch_size=batch, epochs=4, shuffle=False, verbose=0, callbacks=fit.on_workers([], workers))
    return ends(made)


def rows(workers):
    """Rows of a kernel."""
    made = model()
    if workers.workers > 1:
        rules = [dist_partial.Rule("body/kernel", rows=(1, 4)), ("freeze", ".*")]
        optimizer = dist_partial.partial(keras.optimizers.SGD(0.2), rules, made)
        made.compile(optimizer, loss="mse")
        return fitted(workers, made)
    for step in range(4 * 3):  # the same by hand
        batch = slice(step % 3 * BATCH, (step % 3 + 1) * BATCH)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(made(X[batch]) - Y[batch]))
        kernel = made.layers[0].kernel
        change = tape.gradient(loss, kernel.value).numpy()
        change[[0, 4, 5]] = 0
        kernel.assign(kernel.numpy() - 0.2 * change)
    return ends(made)


def lora(workers):
    """LoRA's factors."""
    made = model()
    keras.utils.set_random_seed(1)
    made.layers[0].enable_lora(2)
    made.layers[0].lora_kernel_b.assign(np.ones([2, 5]))
    made.layers[0].lora_kernel_a.assign(RNG_LORA)
    rules = [("train", "body/lora_.*"), ("freeze", ".*")]
    if workers.workers == 1:
        made.layers[0].bias.trainable = False
    compiled(workers, made, keras.optimizers.Adam(0.05), rules, frozen=["head"])
    if workers.workers == 1:
        made.layers[0].bias.trainable = False
    return fitted(workers, made)


RNG_LORA = np.random.default_rng(4).normal(size=(6, 2))


def batch_by_batch(workers):
    """`train_on_batch` and `test_on_batch`."""
    made = compiled(workers, model(), keras.optimizers.Adam(0.05))
    x, y = part(workers, (X, Y))
    size = BATCH // workers.workers
    for start in range(0, len(x), size):
        made.train_on_batch(x[start : start + size], y[start : start + size])
    return ends(made)


class Gan(keras.Model):
    """Two models, each with an optimizer of its own, and a `train_step` of one's own."""

    def __init__(self, workers):
        super().__init__()
        self.generator, self.judge = model(), keras.Sequential([keras.Input([2]), keras.layers.Dense(1, name="score")])
        self.judge.set_weights([np.ones([2, 1]), np.zeros(1)])
        chosen = [keras.optimizers.Adam(0.05), keras.optimizers.SGD(0.1)]
        if workers.workers > 1:
            rules = [("train", "head/.*"), ("freeze", ".*")], [("train", ".*")]
            models = self.generator, self.judge
            chosen = [dist_partial.partial(*each) for each in zip(chosen, rules, models, strict=True)]
        else:
            self.generator.layers[0].trainable = False
        self.both = chosen

    def call(self, x):
        return self.judge(self.generator(x))

    def train_step(self, data):
        x, y = data
        generator_optimizer, judge_optimizer = self.both
        with tf.GradientTape() as tape:
            score = self.judge(self.generator(x))
            loss = tf.reduce_mean(score) - tf.reduce_mean(self.judge(y))
        variables = self.judge.trainable_variables
        judge_optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        with tf.GradientTape() as tape:
            loss = -tf.reduce_mean(self.judge(self.generator(x)))
        variables = self.generator.trainable_variables
        generator_optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return {"of_the_generator": loss}


def gan(workers):
    made = Gan(workers)
    made.compile()
    x, y = part(workers, (X[:48], Y[:48]))
    on_all = fit.on_workers([], workers)
    history = made.fit(x, y, batch_size=BATCH // workers.workers, epochs=3, shuffle=False, verbose=0, callbacks=on_all)
    weights = [*made.generator.get_weights(), *made.judge.get_weights()]
    log = {} if workers.workers == 1 else {"log": np.array(history.history["of_the_generator"])}
    return {f"weight_{i}": value for i, value in enumerate(weights)} | log


class Broken(Exception):
    pass


class Breaks(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise Broken


def backup(workers):
    """Breaks off after two epochs of four, and goes on in a new model."""
    folder = Path(sys.argv[1]) / f"backup-{workers.workers}"
    made = compiled(workers, model(), keras.optimizers.Adam(0.05))
    if workers.workers == 1:
        fitted(workers, made)
        return ends(made)
    with contextlib.suppress(Broken):
        fitted(workers, made, callbacks=[keras.callbacks.BackupAndRestore(folder), Breaks()])
    again = model()
    again.set_weights([value + workers.rank for value in FIRST])
    again = compiled(workers, again, keras.optimizers.Adam(0.05))
    fitted(workers, again, callbacks=[keras.callbacks.BackupAndRestore(folder)])
    return ends(again)


def stopped(workers):
    """The last worker alone wants to stop."""

    class Stops(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch == 1 and workers.rank == workers.workers - 1

    return fitted(workers, compiled(workers, model(), keras.optimizers.Adam(0.05)), callbacks=[Stops()])


def levels(workers, between):
    made = compiled(workers, model(), keras.optimizers.Adam(0.05), between_hosts=between)
    return fitted(workers, made)


SCENARIOS = {
    each.__name__: each
    for each in (everything, selection, accumulation, rows, lora, batch_by_batch, gan, backup, stopped)
} | fit_inputs.SCENARIOS
LEVELS = {"all_reduce": AllReduce(), "quantized": Quantized(8), "top_k": TopK(0.5), "power_sgd": PowerSGD(1)}

if __name__ == "__main__":
    keras.config.set_floatx("float64")
    folder, connected = Path(sys.argv[1]), dist_partial.connect(cpu=int(sys.argv[2]))
    for name in sys.argv[3:]:
        keras.utils.clear_session(free_memory=False)  # which numbers names
        print("scenario", name, flush=True)  # the last one, where a process fails
        with connected.strategy.scope():
            found = levels(connected, LEVELS[name]) if name in LEVELS else SCENARIOS[name](connected)
        np.savez(folder / f"{name}-{connected.workers}-{connected.rank}.npz", **found)
