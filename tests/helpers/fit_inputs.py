"""Scenarios of tests/helpers/fit_workers.py: kinds of data, layers that keep something, precision, and saved models."""

import json
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import dist_partial
from dist_partial import fit
from dist_partial.schedules import Phases
from tests.helpers.fit_common import BATCH, EXAMPLES, FIRST, X, Y, compiled, ends, fitted, logged, model, part

WEIGHTS = np.random.default_rng(5).uniform(0.2, 3.0, EXAMPLES)
LABELS = np.random.default_rng(6).integers(0, 2, EXAMPLES)
MOMENTUM = 0.9  # of BatchNorm
HUGE = 24  # an example whose gradient is no number in half precision; it is in the second batch


def messages(backend):
    """How many exchanges outside of steps there were, each of which waits for the slowest worker."""
    return sum(op.begun for tensor in backend._outside.values() for op in tensor.ops) if backend else 0


def run(workers, made, *data, epochs=4, **more):
    """Fits what is this worker's already."""
    on_all = fit.on_workers([], workers)
    history = made.fit(*data, epochs=epochs, shuffle=False, verbose=0, callbacks=on_all, **more)
    return ends(made) | logged(history)


def sharded(workers):
    """A tf.data.Dataset."""
    examples = tf.data.Dataset.from_tensor_slices((X, Y)).shard(workers.workers, workers.rank)
    made = compiled(workers, model(), keras.optimizers.Adam(0.05))
    return run(workers, made, examples.batch(BATCH // workers.workers))


class Batches(keras.utils.PyDataset):
    def __init__(self, *arrays, size):
        super().__init__()
        self.arrays, self.size = arrays, size

    def __len__(self):
        return -(-len(self.arrays[0]) // self.size)

    def __getitem__(self, index):
        return tuple(array[index * self.size : (index + 1) * self.size] for array in self.arrays)


def py_dataset(workers):
    batches = Batches(*part(workers, (X, Y)), size=BATCH // workers.workers)
    return run(workers, compiled(workers, model(), keras.optimizers.Adam(0.05)), batches)


def split(workers):
    """The last examples of each worker are held out: together the last of all."""
    made = compiled(workers, model(), keras.optimizers.Adam(0.05))
    return fitted(workers, made, validation_split=0.2)


def several_steps(workers):
    """Two steps in one call, the last of an epoch alone."""
    made = compiled(workers, model(), keras.optimizers.Adam(0.05), more={"steps_per_execution": 2})
    return fitted(workers, made, validation=True)


def sample_weight(workers):
    made = compiled(workers, model(), keras.optimizers.Adam(0.05), more={"weighted_metrics": ["mae"]})
    return fitted(workers, made, sample_weight=part(workers, [WEIGHTS])[0])


def class_weight(workers):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    more = {"loss": loss, "metrics": ["accuracy"]}
    made = compiled(workers, model(), keras.optimizers.Adam(0.05), more=more)
    data = part(workers, (X, LABELS))
    return run(workers, made, *data, batch_size=BATCH // workers.workers, class_weight={0: 0.5, 1: 2.0})


def confusion(workers):
    """A metric of whole numbers that is no mean, and has several results."""
    more = {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": ["accuracy", Confusion()],
    }
    made = compiled(workers, model(), keras.optimizers.Adam(0.05), more=more)
    return run(workers, made, *part(workers, (X, LABELS)), batch_size=BATCH // workers.workers)


class Confusion(keras.metrics.Metric):
    def __init__(self, **config):
        super().__init__(name="confusion")
        self.counts = self.add_weight(shape=(2, 2), initializer="zeros", dtype="int64", name="counts")

    def update_state(self, y_true, y_pred, sample_weight=None):
        found = tf.math.confusion_matrix(tf.reshape(y_true, [-1]), tf.argmax(y_pred, -1), 2, dtype=tf.int64)
        self.counts.assign_add(found)

    def result(self):
        return {"false_0": self.counts[1, 0], "false_1": self.counts[0, 1]}


def batch_norm(workers):
    """What the first layer keeps depends on the data alone."""
    layers = [keras.layers.BatchNormalization(momentum=MOMENTUM, name="norm"), keras.layers.Dense(2, name="head")]
    made = keras.Sequential([keras.Input([6]), *layers])
    made.layers[1].set_weights([np.ones([6, 2]), np.zeros(2)])
    counts = []
    count = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: counts.append(messages(workers.backend)))
    made = compiled(workers, made, keras.optimizers.Adam(0.05))
    found = fitted(workers, made, epochs=3, callbacks=[count], validation=True)
    return {} if workers.workers == 1 else found | {"messages": np.diff(counts)}  # one device has other means


def frozen_norm(workers):
    """What nothing trains keeps what it has, each worker the first one's."""
    layers = [keras.layers.BatchNormalization(name="norm"), keras.layers.Dense(2, name="head")]
    made = keras.Sequential([keras.Input([6]), *layers])
    made.layers[1].set_weights([np.ones([6, 2]), np.zeros(2)])
    made.layers[0].moving_mean.assign(np.arange(6) + workers.rank)
    rules = [("train", "head/.*"), ("freeze", ".*")]
    made = compiled(workers, made, keras.optimizers.Adam(0.05), rules, frozen=["norm"])
    return fitted(workers, made, validation=True)


def unlike(workers):
    """Each worker draws other weights, and other masks for dropout."""
    made = model()
    made.set_weights([value + workers.rank for value in FIRST])
    return fitted(workers, compiled(workers, made, keras.optimizers.Adam(0.05)))


def dropout(workers):
    dropped = keras.layers.Dropout(0.5, seed=workers.rank)
    made = keras.Sequential([keras.Input([6]), dropped, keras.layers.Dense(2, name="head")])
    found = fitted(workers, compiled(workers, made, keras.optimizers.Adam(0.05)))
    return {} if workers.workers == 1 else found | {"own_seed": dropped.seed_generator.state.numpy()}


def scheduled(workers):
    """The same optimizer and callback on one device: no others know schedules."""
    schedule = Phases([(0, "head/.*"), (4, ".*")])
    made = model()
    optimizer = dist_partial.partial(keras.optimizers.Adam(0.05), [("train", ".*")], made, schedule=schedule)
    made.compile(optimizer, loss="mse")
    return fitted(workers, made, callbacks=[fit.SelectionScheduler(schedule)])


def half(workers):
    """mixed_float16: all skip a step that overflows on one worker."""
    kept, floats = keras.mixed_precision.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx("float32")
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    try:
        # A small loss, of which nothing else overflows: a worker's mean is of fewer examples, and so larger.
        made = compiled(workers, model(), keras.optimizers.SGD(2.0), more={"loss_weights": [0.05]})
        x, y = X.astype(np.float32), Y.astype(np.float32)
        y[HUGE] = 1e4
        x, y = part(workers, (x[:48], y[:48]))
        found = run(workers, made, x, y, batch_size=BATCH // workers.workers, epochs=2)
        skipped = made.optimizer.step_counter, made.optimizer.dynamic_scale, made.optimizer.inner_optimizer.iterations
        return {key: value for key, value in found.items() if key.startswith("weight_")} | {
            f"scale_{i}": keras.ops.convert_to_numpy(each) for i, each in enumerate(skipped)
        }
    finally:
        keras.config.set_floatx(floats)
        keras.mixed_precision.set_dtype_policy(kept)


def restored(workers):
    """The first worker alone has another loss scale, and a schedule that is further: all begin with both."""
    if workers.workers == 1:
        return {}
    made = model()
    schedule = Phases([(0, "head/.*"), (4, ".*")])
    optimizer = dist_partial.partial("sgd", [("train", ".*")], made, schedule=schedule, accumulate=2)
    made.compile(fit.PartialLossScale(optimizer, initial_scale=16.0 if workers.is_chief else 64.0), loss="mse")
    made.optimizer.build(made.trainable_variables)
    optimizer.schedule_state = json.dumps({"at": 1, "active": ["head"], "state": None}) if workers.is_chief else None
    (added,) = workers.strategy.experimental_local_results(optimizer._sums[0])
    added.assign(tf.ones_like(added))  # before it was restored
    run(workers, made, X[:4], Y[:4], epochs=0)
    return {
        "scale": keras.ops.convert_to_numpy(made.optimizer.dynamic_scale),
        "at": np.array(json.loads(optimizer.schedule_state)["at"]),
        "sums": added.numpy(),
    }


class OwnStep(keras.Model):
    """Returns a loss of its own beside another number, which Keras's tracker of the loss knows nothing of."""

    def __init__(self):
        super().__init__()
        self.inner = model()
        self.rest = {"judge": None}

    def call(self, x):
        return self.inner(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.inner(x) - y))
        variables = self.inner.trainable_variables
        self.rest["judge"].apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return {"loss": loss, "mean_of_x": tf.reduce_mean(x)}


def own_step(workers):
    """Its optimizer is in a dict; of what it returns callbacks read the mean over the workers."""
    made = OwnStep()
    optimizer = keras.optimizers.SGD(0.05)
    if workers.workers > 1:
        optimizer = dist_partial.partial(optimizer, [("train", ".*")], made.inner)
    made.rest["judge"] = optimizer
    made.compile()
    ended = []
    callbacks = fit.on_workers([keras.callbacks.LambdaCallback(on_train_end=lambda logs: ended.append(logs))], workers)
    data = {"batch_size": BATCH // workers.workers, "epochs": 2, "shuffle": False, "callbacks": callbacks}
    history = made.fit(*part(workers, (X[:48], Y[:48])), verbose=0, **data)
    assert ended[0]["loss"] == history.history["loss"][-1] != 0
    return ends(made.inner) | logged(history)


def stopped_amid(workers):
    """The last worker's callback wants to stop after the first batch: all go on to the end of that epoch."""

    class Stops(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if workers.rank == workers.workers - 1:
                self.model.stop_training = True

    made = compiled(workers, model(), keras.optimizers.Adam(0.05))
    return fitted(workers, made, epochs=1) if workers.workers == 1 else fitted(workers, made, callbacks=[Stops()])


def loaded(workers):
    """A saved model goes on, on all workers."""
    path = Path(sys.argv[1]) / f"saved-{workers.workers}.keras"
    made = compiled(workers, model(), keras.optimizers.Adam(0.05))
    fitted(workers, made, epochs=2)
    if workers.is_chief:
        made.save(path)
    workers.gather(b"")  # the others wait for the file
    return fitted(workers, keras.saving.load_model(path), epochs=2)


SCENARIOS = {
    each.__name__: each
    for each in (
        sharded,
        py_dataset,
        split,
        several_steps,
        sample_weight,
        class_weight,
        confusion,
        batch_norm,
        frozen_norm,
        unlike,
        dropout,
        scheduled,
        half,
        restored,
        own_step,
        stopped_amid,
        loaded,
    )
}
