"""Schedules under `model.fit` against the loop, which reads the same batches, and against plain Keras."""

import contextlib
import functools
import itertools
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial import UserError, fit, partial
from dist_partial.config.settings import Settings
from dist_partial.data import train_indices
from dist_partial.distributed import replicas
from dist_partial.schedules import AutoFreeze, Budget, Constant, Gradual, Lisa, Phases, Rotation
from dist_partial.selection import Rule
from dist_partial.training import loop
from tests.helpers import cases
from tests.helpers.cases import LAYERS, dataset, mlp
from tests.helpers.files import same_bits
from tests.helpers.marks import quick

STEPS, BATCH, WIDTH = 16, 8, 6
RULES = [
    Rule("[ab]/.*"),
    Rule("c/kernel", optimizer=functools.partial(keras.optimizers.SGD, momentum=0.9), learning_rate=0.05),
    ("freeze", "c/bias"),
    ("train", ".*"),
]
SCHEDULES = {
    "phases": Phases([(0, "d/.*"), (3, "[cd]/.*"), (7, "[ab]/kernel"), (9, ".*"), (12, "d/bias"), (14, "[cd]/.*")]),
    "gradual": Gradual(every=4),
    "rotation": Rotation(every=3),
    "lisa": Lisa(every=3, count=1),
    "autofreeze": AutoFreeze(every=2, percentile=100.0, retest=3),
}


def points():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, WIDTH)).astype(keras.config.floatx())
    return dataset("points", x, np.argmax(x @ rng.normal(size=(WIDTH, WIDTH)), axis=1).astype(np.int32))


def batches(steps=STEPS):
    """What the loop reads on one replica, in its order."""
    alone, source = tf.distribute.InputContext(), points().train
    indices = train_indices(len(source), first_step=0, global_batch=BATCH, seed=0, context=alone).take(steps)
    x, y = zip(*(source.fetch(each.numpy()) for each in indices), strict=True)
    return np.concatenate(x), np.concatenate(y)


def built(schedule, rules=RULES, model=mlp, accumulate=1, optimizer=keras.optimizers.Adam):
    keras.utils.set_random_seed(0)
    model = model()
    wrapped = partial(optimizer(0.02), rules, model, schedule=schedule, accumulate=accumulate)
    model.compile(wrapped, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def fitted(model, schedule, part=slice(None), batch=BATCH, **options):
    x, y = (column[part] for column in batches())
    scheduler = fit.SelectionScheduler(schedule, **options)
    model.fit(x, y, batch_size=batch, shuffle=False, verbose=0, callbacks=[scheduler])
    return cases.weights(model)


def looped(schedule, folder, rules=RULES, leave="keep", accumulate=1):
    made = []
    settings = Settings(
        rules=rules,
        model=lambda: made.append(mlp()) or made[-1],
        data=points,
        optimizer=functools.partial(keras.optimizers.Adam, 0.02),
        schedule=schedule,
        leave=leave,
        steps=STEPS,
        global_batch=BATCH,
        accumulate=accumulate,
        precision="float64",
        replicas=lambda: replicas.create("default"),
    )
    loop.run(settings, folder)
    return cases.weights(made[-1])


@pytest.mark.parametrize(
    ("name", "leave"),
    quick(list(itertools.product(SCHEDULES, ("keep", "reset"))), ("phases", "reset"), ("autofreeze", "keep")),
)
def test_the_weights_are_the_loops(name, leave, tmp_path):
    cases.set_precision("float64")
    model = built(SCHEDULES[name])
    before = cases.weights(model)
    after = fitted(model, SCHEDULES[name], leave=leave)
    cases.assert_equal(after, looped(SCHEDULES[name], tmp_path, leave=leave), 1e-12)
    assert same_bits((before["c/bias"], after["c/bias"])) and not same_bits((before["d/bias"], after["d/bias"]))


@pytest.mark.parametrize("count", quick([1, 2], 2))
def test_replicas_equal_one_device(count, mirrored):
    cases.set_precision("float64")
    schedule = SCHEDULES["phases"]
    expected = fitted(built(schedule), schedule)
    with mirrored(count).scope():
        model = built(schedule)
    cases.assert_equal(fitted(model, schedule), expected, 1e-12)


def test_a_schedule_goes_on_in_another_fit_and_in_a_loaded_model(tmp_path):
    """AutoFreeze remembers norms, the optimizer of each unit its own steps, and no switch falls on the breaks."""
    cases.set_precision("float64")
    schedule = SCHEDULES["autofreeze"]
    expected = fitted(built(schedule), schedule)
    model = built(schedule)
    for part in (slice(0, 3 * BATCH), slice(3 * BATCH, 8 * BATCH)):
        fitted(model, schedule, part)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    after = fitted(loaded, schedule, slice(8 * BATCH, None))
    for path, value in expected.items():
        assert same_bits((value, after[path])), path
    assert str(loaded.optimizer.plan) == str(model.optimizer.plan)


@pytest.mark.slow
def test_a_fit_that_was_broken_off_goes_on_from_its_backup(tmp_path):
    """By Keras's own callback, in the middle of an interval of the schedule, with what was accumulated."""

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    schedule, (x, y), results = SCHEDULES["autofreeze"], batches(), []
    for callbacks in (
        [],
        [keras.callbacks.BackupAndRestore(tmp_path), Stop()],
        [keras.callbacks.BackupAndRestore(tmp_path)],
    ):
        model = built(schedule, accumulate=3)
        callbacks = [fit.SelectionScheduler(schedule), *callbacks]
        with contextlib.suppress(KeyboardInterrupt):
            model.fit(x, y, batch_size=BATCH, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)
        results.append((int(model.optimizer.iterations.numpy()), cases.weights(model)))
    (whole, expected), (stopped, _), (again, found) = results
    assert (whole, stopped, again) == (16, 5, 16)
    assert all(same_bits((value, found[path])) for path, value in expected.items())


def test_a_step_that_runs_eagerly_follows_it_too():
    cases.set_precision("float64")
    schedule = Phases([(0, "d/.*"), (2, ".*"), (4, "[cd]/.*")])
    results = []
    for eagerly in (False, True):
        model = built(schedule)
        model.compile(model.optimizer, model.loss, run_eagerly=eagerly)
        results.append(fitted(model, schedule, slice(6 * BATCH)))
    cases.assert_equal(*results, 1e-12)


def with_norms():
    layers = [keras.layers.Dense(WIDTH, name="a"), keras.layers.BatchNormalization(name="norm")]
    return keras.Sequential([keras.Input((WIDTH,)), *layers, keras.layers.Dense(WIDTH, name="d")])


def test_batch_norm_is_in_inference_mode_while_it_is_off(tmp_path):
    """And the model is saved, in the middle, with all that the rules train."""
    schedule, seen = Phases([(0, "d/.*"), (4, ".*"), (8, "a/.*")]), []
    model = built(schedule, [("train", ".*")], with_norms)
    steps = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: seen.append(model.get_layer("norm").moving_mean.numpy())
    )
    saved = keras.callbacks.ModelCheckpoint(tmp_path / "{batch}.keras", save_freq=2)
    x, y = batches()
    scheduler = fit.SelectionScheduler(schedule)
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[scheduler, steps, saved])
    moved = [not same_bits(pair) for pair in itertools.pairwise(seen)]
    assert [step for step, moves in enumerate(moved) if moves] == [4, 5, 6, 7]
    assert len(model.trainable_variables) == 6 and model.get_layer("norm").trainable
    loaded = keras.saving.load_model(tmp_path / "2.keras")
    assert len(loaded.trainable_variables) == 6 and int(loaded.optimizer.iterations.numpy()) == 2


def test_what_is_off_is_not_differentiated():
    calls = []

    class Counts(keras.layers.Layer):
        def call(self, x):
            @tf.custom_gradient
            def same(x):
                def backward(dy):
                    return tf.numpy_function(lambda v: calls.append(1) or v, [dy], dy.dtype, stateful=False)

                return tf.identity(x), backward

            return same(x)

    def model():
        layers = [keras.layers.Dense(WIDTH, name="a"), Counts(), keras.layers.Dense(WIDTH, name="d")]
        return keras.Sequential([keras.Input((WIDTH,)), *layers])

    schedule = Phases([(0, "d/.*"), (6, ".*"), (9, "d/.*")])
    fitted(built(schedule, [("train", ".*")], model), schedule)
    assert len(calls) == 3


def test_a_selection_that_returns_is_not_traced_again():
    traced = []

    class Model(keras.Sequential):
        def train_step(self, data):
            traced.append(sorted(v.path.split("/")[1] for v in self.trainable_variables if "kernel" in v.path))
            return super().train_step(data)

    schedule = Rotation(every=2, order="ascending")
    layers = [keras.Input((WIDTH,)), *(keras.layers.Dense(WIDTH, name=name) for name in LAYERS)]
    model = built(schedule, [("train", ".*")], lambda: Model(layers))
    scheduler = fit.SelectionScheduler(schedule)
    x, y = batches()
    for _ in range(2):
        model.fit(x, y, batch_size=BATCH, verbose=0, callbacks=[scheduler])
    assert traced == [[name] for name in LAYERS]


def test_callbacks_set_the_learning_rate_of_all_units():
    schedule = SCHEDULES["rotation"]
    model = built(schedule, [("train", "[abc]/.*"), Rule(".*", learning_rate=0.5)])
    model.optimizer.learning_rate = 0.25
    rates = [float(each.learning_rate) for each in model.optimizer.optimizers]
    assert rates == [0.25, 0.25, 0.25, 0.5]
    halves = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    scheduler = fit.SelectionScheduler(schedule)
    model.fit(*batches(), batch_size=BATCH, verbose=0, callbacks=[scheduler, halves])
    assert [float(each.learning_rate) for each in model.optimizer.optimizers] == [rate / 2 for rate in rates]


@pytest.mark.parametrize("leave", ["keep", "reset"])
def test_mixed_precision_follows_it(leave):
    keras.config.set_dtype_policy("mixed_float16")
    schedule, paths = Phases([(0, "d/.*"), (8, "[cd]/.*")]), []
    model = built(schedule, [("freeze", "[ab]/.*"), *RULES[1:]])
    record = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: paths.append(cases.weights(model)))
    x, y = batches()
    scheduler = fit.SelectionScheduler(schedule, leave=leave)
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[scheduler, record])
    moved = [{p for p in one if not same_bits((one[p], two[p]))} for one, two in itertools.pairwise(paths)]
    assert moved[0] == {"d/kernel", "d/bias"} and moved[-1] == {"d/kernel", "d/bias", "c/kernel"}


def refused(schedule=SCHEDULES["rotation"], given=None, **options):
    model = built(given or schedule)
    model.compile(model.optimizer, model.loss, **options)
    fitted(model, schedule)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: built(Budget(bytes=1000)), "Budget measures gradients on the batch that comes next, which"),
        (lambda: built("rotation"), "give one such as dist_partial.schedules.Rotation(every=20)"),
        (lambda: built(Gradual(count=9)), "Gradual.count is 9: all units"),
        (lambda: built(Phases([(0, "e/.*")])), "Phases.table, phase 1 ('e/.*') selects nothing that the rules train"),
        (lambda: built(SCHEDULES["lisa"]).fit(*batches(), verbose=0), "fit.SelectionScheduler(schedule)"),
        (lambda: refused(given=Constant()), "another schedule than the optimizer is made for"),
        (lambda: refused(SCHEDULES["phases"], SCHEDULES["lisa"]), "another schedule than the optimizer is made for"),
        (lambda: refused(steps_per_execution=2), "steps_per_execution = 2 makes several in one call: compile with"),
        (lambda: fit.SelectionScheduler(Rotation(), leave="drop"), "write 'keep' or 'reset'"),
        (lambda: fit.SelectionScheduler(Rotation(), leave="lose"), "'keep' or 'reset'"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(act, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        act()
    assert "\n" not in str(error.value)


def test_a_fit_without_the_callback_is_refused_after_one_that_was_broken_off():
    class Breaks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    schedule, (x, y) = SCHEDULES["rotation"], batches()
    model = built(schedule)
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, verbose=0, callbacks=[fit.SelectionScheduler(schedule), Breaks()])
    with pytest.raises(UserError, match="SelectionScheduler"):
        model.fit(x, y, verbose=0)
    fitted(model, schedule)
