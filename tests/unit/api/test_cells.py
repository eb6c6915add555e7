"""What people do in the cells of a notebook: interrupt, run a cell again, catch exceptions, wait for a callback."""

import inspect
import os
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_partial
from dist_partial import Result, Rule, UserError, delta, train
from dist_partial.errors import Raised, calling
from dist_partial.export import __main__ as export_command
from tests.helpers.people import HEAD, X, Y, person


def quickly(model=person, **more):
    given = {"rules": HEAD, "loss": "mse", "steps": 2, "global_batch": 8, "evaluation": (X, Y)}
    return train(model, (X, Y), **given | more)


def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)


class Interrupting(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        interrupt()


def test_an_interrupt_is_one_also_for_a_loop_that_catches_exceptions():
    done = []
    with pytest.raises(KeyboardInterrupt) as caught:
        for folder in ("one", "two"):
            try:
                quickly(folder=folder, callbacks=[Interrupting()])
            except Exception:
                done.append(folder)
    assert not done and isinstance(caught.value, dist_partial.Interrupted)
    found = caught.value.result
    assert isinstance(found, Result) and found.history.of("train").column("step") == [1]
    assert found.model.predict(X, verbose=0).shape == (24, 1)


@pytest.mark.parametrize("where", ["model", "loss"])
def test_an_interrupt_while_the_run_is_built_is_one_line(where):
    def model():
        interrupt()
        return person()

    def loss(y, outputs):
        interrupt()
        return keras.ops.mean(outputs, -1)

    with pytest.raises(dist_partial.Interrupted, match=r"^stopped before .*call train again with the same folder"):
        quickly(**{where: {"model": model, "loss": loss}[where]})


def test_a_notebook_shows_the_line_alone():
    """As IPython asks an exception for what it shows; of what the user's own code has raised, where that was."""
    with pytest.raises(UserError) as caught:
        quickly(steps=0)
    assert caught.value._render_traceback_() == [f"UserError: {caught.value}"]
    assert dist_partial.Interrupted("stopped", 130)._render_traceback_() == ["Interrupted: stopped"]
    with pytest.raises(Raised) as raised, calling("run.loss"):
        [][0]
    first, *rest = raised.value._render_traceback_()
    assert first.startswith("Raised: run.loss raised IndexError") and any("[][0]" in line for line in rest)


def test_other_frozen_weights_of_a_model_made_again_say_what_to_do():
    quickly(person(), folder="mine")
    with pytest.raises(
        UserError, match=r"^mine belongs .* 'hidden/kernel' .*; where a cell makes 'person' again, .*0\)"
    ):
        quickly(person(), folder="mine", steps=4)
    for steps in (2, 4):
        keras.utils.set_random_seed(0)
        assert quickly(person(), folder="other", steps=steps).history[-1]["step"] == steps


def test_what_waits_for_evaluations_is_said(capsys):
    early = keras.callbacks.EarlyStopping(monitor="val_loss")
    quickly(callbacks=[early, keras.callbacks.LambdaCallback()])
    said = "callbacks has EarlyStopping, and eval_every is not given: its epoch ends once, with the run"
    assert said in capsys.readouterr().out
    quickly(callbacks=[early], eval_every=1)
    assert "its epoch ends" not in capsys.readouterr().out


def test_fewer_steps_than_were_made_are_said_so(capsys):
    quickly(folder="mine")
    quickly(folder="mine", steps=1)
    assert "finished: mine is at step 2, beyond steps=1; give a larger steps to go on" in capsys.readouterr().out


def test_one_replica_shows_no_bytes(capfd):
    quickly()
    assert "at the interface" not in capfd.readouterr().err


@pytest.mark.parametrize("replicas", [1, 2])
def test_nothing_is_shown_but_errors(replicas, capfd, caplog):
    """Nor by TensorFlow, whose logger notes each sum over replicas."""
    tf.get_logger().setLevel("INFO")
    quickly(verbose=0, replicas=replicas)
    assert [*capfd.readouterr()] == ["", ""] and not caplog.messages
    quickly(replicas=replicas)
    assert "step 2: held-out" in capfd.readouterr().out and not caplog.messages
    with pytest.raises(UserError):
        quickly(verbose=0, steps=0)


def test_a_history_is_a_short_table_and_names_what_is_near():
    history = quickly(steps=8).history
    assert len(repr(history).splitlines()) == 3 + 5 + 1 and "wire_bytes" not in repr(history)
    for call, message in (
        (lambda: history.of("val"), "history has no split 'val'; nearest: 'eval'"),
        (lambda: history.column("los"), "history has no 'los'; nearest: 'loss'"),
        (lambda: history["loss"], r"write history\.of\('train'\)\.column\('loss'\)"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert history.of("plan").column("anything") == [] and history[0]["step"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("instance", [True, False])
def test_the_best_weights_are_restored(instance):
    """Which are those after two of the steps, for the learning rate then grows beyond all measure."""
    model, more = person(), {"optimizer": keras.optimizers.SGD(Growing()), "eval_every": 1}
    model.set_weights(quickly(steps=1, verbose=0, optimizer=keras.optimizers.SGD(0.0)).model.get_weights())
    given = model if instance else person
    found = quickly(given, steps=4, best="loss", restore_best=True, folder="mine", **more)
    assert found.best["step"] == 2 and found.metrics["loss"] > found.best["loss"]
    found.model.compile(loss="mse")
    assert found.model.evaluate(X, Y, verbose=0) == pytest.approx(found.best["loss"], rel=1e-5)
    assert quickly(given, steps=4, best="loss", folder="mine", **more).history[-1]["step"] == 4
    with pytest.raises(UserError, match=r"^restore_best without best"):
        quickly(restore_best=True)


class Growing(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return tf.where(step < 2, 0.01, 5.0)

    def get_config(self):
        return {}


def seeded() -> keras.Model:
    keras.utils.set_random_seed(2)
    return person()


@pytest.mark.slow
@pytest.mark.parametrize("instance", [True, False])
def test_a_delta_of_lora_is_that_of_the_export(instance, capfd):
    """Though the function of the model seeds by itself; the command builds the base again in another process."""
    rules = [Rule("head/kernel", lora=2), ("freeze", ".*")]
    found = quickly(person() if instance else lambda: seeded(), rules=rules, optimizer=keras.optimizers.SGD(0.1))
    mine = found.delta()
    command = [f"--run_dir={found.folder}", "--format=safetensors", "--output=out.safetensors"]
    assert export_command.main(command) == 0, capfd.readouterr().err
    theirs = delta.read("out.safetensors")
    assert (mine.base, mine.step, mine.rules) == (theirs.base, theirs.step, theirs.rules)
    assert mine.arrays.keys() == theirs.arrays.keys()
    for name, array in mine.arrays.items():
        np.testing.assert_array_equal(array, theirs.arrays[name])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metrics": "accuracy"}, r"metrics is 'accuracy': give a list, such as \['accuracy'\]"),
        ({"weighted_metrics": keras.metrics.AUC}, r"weighted_metrics is .*AUC.*: give a list"),
        ({"folder": 3}, "folder is 3: write a path"),
        ({"model": "p.keras"}, "model is 'p.keras': give a Keras model, .*; keras.saving.load_model reads a file"),
        ({"model": None}, "model is None: give a Keras model, or a function that makes one$"),
        ({"model": keras.layers.Dense(1)}, "model is .*Dense.*: give a Keras model"),
    ],
    ids=["metrics", "weighted", "folder", "file", "none", "layer"],
)
def test_what_is_no_such_thing_is_said(given, message):
    with pytest.raises(UserError, match=f"^{message}"):
        quickly(**given)


@pytest.mark.parametrize(
    "callback",
    [
        lambda: keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate),
        lambda: keras.callbacks.ReduceLROnPlateau("val_loss"),
    ],
    ids=["scheduler", "plateau"],
)
def test_a_callback_that_sets_the_rate_of_a_schedule_is_refused(callback):
    optimizer = keras.optimizers.SGD(Growing())
    with pytest.raises(UserError, match=r"^callbacks has .*, which sets learning rates, and optimizer has a schedule"):
        quickly(optimizer=optimizer, callbacks=[callback()], eval_every=1)


class Listening(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.heard = []

    def on_train_begin(self, logs=None):
        self.heard.append(dict(self.params))

    def on_epoch_end(self, epoch, logs=None):
        self.heard.append(("epoch", epoch))

    def on_test_begin(self, logs=None):
        self.heard.append("begin")

    def on_test_end(self, logs=None):
        self.heard.append(("end", *logs))


def test_callbacks_hear_of_evaluations_and_of_how_many_come():
    """As fit has it: within an epoch, before its end."""
    listening = Listening()
    quickly(steps=4, eval_every=2, callbacks=[listening], metrics=["mae"])
    pair = ["begin", ("end", "loss", "mae")]
    expected = [{"epochs": 2, "steps": 2, "verbose": 0}, *pair, ("epoch", 0), *pair, ("epoch", 1)]
    assert listening.heard == expected


def test_help_shows_types_and_no_objects():
    text = str(inspect.signature(train))
    assert " object at 0x" not in text and "Annotated" not in text and "steps: int = 1000" in text
