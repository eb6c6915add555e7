"""Callbacks, the best checkpoint and the early end: in real runs, in one and in pieces."""

import csv
import dataclasses
import json
import time

import keras
import numpy as np
import pytest

from dist_partial import checkpoints
from dist_partial.config.settings import Settings
from dist_partial.data import ArraySource, Dataset
from dist_partial.errors import UserError
from dist_partial.schedules import Phases
from dist_partial.selection import Rule
from dist_partial.training import evaluation, loop
from tests.helpers.files import assert_same_state, checkpoint_names, rows
from tests.helpers.marks import in_turns, quick
from tests.helpers.strategies import in_process
from tests.helpers.workers import run_workers

STEPS = 12
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(48, 4)).astype(np.float32), RNG.integers(0, 2, 48)


def model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])


def told(callbacks=(), rate=0.1, **more):
    """A run that is evaluated after every second step; each makes callbacks of its own."""
    source = ArraySource(X[:32], Y[:32])
    more = {"steps": STEPS, "eval_every": 2, "save_every": 2, "keep": 20, **more}
    return Settings(
        rules=[("train", ".*")],
        model=model,
        data=lambda: Dataset("points", source, ArraySource(X[32:], Y[32:]), "1"),
        optimizer=lambda: keras.optimizers.SGD(rate),
        global_batch=16,
        replicas=in_process,
        callbacks=callbacks,
        **more,
    )


def of(folder, split, name):
    return [(row["step"], row[name]) for row in rows(folder / "metrics.jsonl") if row["split"] == split]


def judged(folder, name="checkpoints"):
    """What the newest checkpoint keeps."""
    return checkpoints.newest(folder / name, print).metadata["judged"]


class Own(keras.callbacks.Callback):
    """Notes what it is told, and counts."""

    def __init__(self):
        super().__init__()
        self.told, self.batches = [], 0

    def on_train_begin(self, logs=None):
        self.told.append("train begins")

    def on_train_end(self, logs=None):
        self.told.append("train ends")

    def on_epoch_begin(self, epoch, logs=None):
        self.told.append(f"epoch {epoch} begins")

    def on_epoch_end(self, epoch, logs=None):
        self.told.append((f"epoch {epoch} ends", dict(logs)))

    def on_train_batch_begin(self, batch, logs=None):
        self.told.append(f"batch {batch} begins")

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1
        self.told.append((f"batch {batch} ends", dict(logs)))


def test_a_callback_is_told_what_fit_would_tell_it(tmp_path):
    own = Own()
    loop.run(told([own], steps=4, metrics=["accuracy"]), tmp_path)
    names = [each if isinstance(each, str) else each[0] for each in own.told]
    batches = ["batch 0 begins", "batch 0 ends", "batch 1 begins", "batch 1 ends"]
    assert names == [
        "train begins",
        *["epoch 0 begins", *batches, "epoch 0 ends"],
        *["epoch 1 begins", *batches, "epoch 1 ends"],
        *["epoch 2 begins", "train ends"],
    ]
    logs = dict(each for each in own.told if not isinstance(each, str))
    train, held_out = (dict(of(tmp_path, split, "loss")) for split in ("train", "eval"))
    assert logs["batch 1 ends"]["loss"] == train[4]
    assert logs["epoch 1 ends"].keys() == {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert logs["epoch 1 ends"]["loss"] == pytest.approx((train[3] + train[4]) / 2)
    accuracy = [value for _, value in of(tmp_path, "train", "accuracy")]
    assert logs["epoch 1 ends"]["accuracy"] == pytest.approx(np.mean(accuracy[2:]))
    assert logs["epoch 1 ends"]["val_loss"] == held_out[4]


def test_a_call_of_several_steps_is_one_batch(tmp_path):
    own = Own()
    loop.run(told([own], steps=4, steps_per_loop=2), tmp_path)
    assert own.batches == 2


def test_keras_stops_early(tmp_path, capsys):
    settings = told([keras.callbacks.EarlyStopping("val_loss", patience=2)], rate=30.0)
    loop.run(settings, tmp_path)
    losses = of(tmp_path, "eval", "loss")
    best = int(np.argmin([value for _, value in losses]))
    assert losses[-1][0] < STEPS
    assert len(losses) == best + 3
    said = f"stopped at step {losses[-1][0]} of {STEPS}: EarlyStopping has stopped it"
    assert said in capsys.readouterr().out
    before = (tmp_path / "metrics.jsonl").read_bytes()
    loop.run(settings, tmp_path)
    said = f"finished: {tmp_path} stopped at step {losses[-1][0]} of {STEPS}: EarlyStopping has stopped it"
    assert said in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_callback_stops_between_evaluations(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 2

    loop.run(told([Stop()], eval_every=None, save_every=None), tmp_path)
    # All workers hear of it with the numbers of the next step.
    assert [step for step, _ in of(tmp_path, "eval", "loss")] == [4]
    assert checkpoint_names(tmp_path) == ["step-0000000004.safetensors"]


def plateau():
    return keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1, min_delta=0.05)


def scheduler():
    return keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5 if epoch else rate)


def test_keras_lowers_the_learning_rate(tmp_path):
    loop.run(told([plateau()], rate=30.0), tmp_path)
    rates = [rate for _, rate in of(tmp_path, "train", "learning_rate")]
    assert rates[0] == 30.0
    assert rates[-1] < 30.0
    assert {np.log2(30.0 / rate) % 1 for rate in rates} == {0.0}
    # Of a schedule the callback sets nothing, and the run says so.
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 4, 0.5)
    loop.run(dataclasses.replace(told(), optimizer=lambda: keras.optimizers.SGD(schedule)), tmp_path / "decay")
    rates = [rate for _, rate in of(tmp_path / "decay", "train", "learning_rate")]
    np.testing.assert_allclose(rates[3::4], [0.05, 0.025, 0.0125], rtol=1e-6)


def test_keras_sets_the_learning_rate_of_each_epoch(tmp_path):
    loop.run(told([scheduler()]), tmp_path)
    rates = [rate for _, rate in of(tmp_path, "train", "learning_rate")]
    np.testing.assert_allclose(rates, [0.1 * 0.5 ** (step // 2) for step in range(STEPS)], rtol=1e-6)


@pytest.mark.parametrize("callback", [plateau, scheduler, keras.callbacks.Callback])
def test_callbacks_do_on_several_replicas_what_they_do_on_one(tmp_path, callback):
    for count in (1, 2):
        run = dataclasses.replace(told([callback()], rate=30.0), replicas=lambda count=count: in_process(count))
        loop.run(run, tmp_path / str(count))
    one, two = (of(tmp_path / str(count), "train", "learning_rate") for count in (1, 2))
    assert one == two
    assert judged(tmp_path / "1")["rates"] == judged(tmp_path / "2")["rates"]


class Halve(keras.callbacks.Callback):
    """As people write it."""

    def on_epoch_end(self, epoch, logs=None):
        rate = float(self.model.optimizer.learning_rate)
        self.model.optimizer.learning_rate = rate * 0.5
        assert int(self.model.optimizer.iterations) == 2 * (epoch + 1)


class Assign(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        rate = self.model.optimizer.learning_rate
        rate.assign(keras.ops.convert_to_numpy(rate) * 0.5)


def two_layers():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="low"), keras.layers.Dense(2, name="head")])


def two_rates(callbacks, **more):
    """A run with a rate for the head, and another for the rest."""
    rules = [Rule("head/.*", learning_rate=0.004), Rule(".*")]
    return dataclasses.replace(
        told(callbacks, **more),
        model=two_layers,
        rules=rules,
        optimizer=lambda learning_rate=0.1: keras.optimizers.SGD(learning_rate),
    )


@pytest.mark.parametrize("callback", [Halve, Assign])
@pytest.mark.parametrize("count", [1, 2])
def test_rates_that_differ_keep_their_proportion(tmp_path, callback, count):
    run = dataclasses.replace(two_rates([callback()], steps=8), replicas=lambda: in_process(count))
    loop.run(run, tmp_path)
    for number, first in enumerate((0.004, 0.1)):
        rates = [rate for _, rate in of(tmp_path, "train", f"learning_rate_{number}")]
        np.testing.assert_allclose(rates, [first * 0.5 ** (step // 2) for step in range(8)], rtol=1e-6)


@pytest.mark.parametrize("leave", ["keep", "reset", "drop"])
def test_a_rate_that_a_callback_has_set_is_that_of_what_is_trained_later(tmp_path, leave):
    phases = Phases([(0, "head/.*"), (6, "low/.*"), (9, "head/.*")])
    settings = told([Halve10()], steps=12, eval_every=3)
    run = dataclasses.replace(settings, model=two_layers, schedule=phases, leave=leave)
    trainer = loop.run(run, tmp_path / "whole")
    assert [float(keras.ops.convert_to_numpy(g.optimizer.learning_rate)) for g in trainer.optimizers] == pytest.approx(
        [0.1 * 0.1**4] * 2
    )
    loop.run(dataclasses.replace(run, steps=9), tmp_path / "pieces")
    loop.run(run, tmp_path / "pieces")
    assert_same_state(tmp_path / "whole", tmp_path / "pieces", 12)


class Halve10(keras.callbacks.Callback):
    """Sets the rate of each, as Keras's own callbacks do."""

    def on_epoch_end(self, epoch, logs=None):
        for each in getattr(self.model.optimizer, "optimizers", [self.model.optimizer]):
            each.learning_rate = float(keras.ops.convert_to_numpy(each.learning_rate)) * 0.1


@pytest.mark.parametrize("count", [1, 2])
def test_a_loss_that_is_not_finite_ends_the_run_where_a_callback_wants_it(tmp_path, capsys, count):
    settings = dataclasses.replace(told(rate=3e38, save_every=1), replicas=lambda: in_process(count))
    with pytest.raises(UserError, match="the loss is not finite at step") as error:
        loop.run(settings, tmp_path / "without")
    own = Own()
    run = dataclasses.replace(settings, callbacks=[keras.callbacks.TerminateOnNaN(), own])
    capsys.readouterr()
    loop.run(run, tmp_path / "with")  # as after fit, no error
    said = capsys.readouterr().out
    last = len(of(tmp_path / "with", "train", "loss"))
    assert f"at step {last + 1} " in str(error.value)
    assert (
        f"stopped after step {last} of {STEPS}: TerminateOnNaN has stopped it; the checkpoint of step {last} is" in said
    )
    ends = [each for each in own.told if each[0].startswith("batch ") and not isinstance(each, str)]
    assert not np.isfinite(ends[-1][1]["loss"]) and all(np.isfinite(logs["loss"]) for _, logs in ends[:-1])
    assert checkpoint_names(tmp_path / "with") == checkpoint_names(tmp_path / "without")
    assert "nan" not in (tmp_path / "with" / "metrics.jsonl").read_text().lower()


def test_the_norm_of_all_gradients_is_not_that_of_each_rule(tmp_path, capsys):
    def adam(learning_rate=0.01):
        return keras.optimizers.Adam(learning_rate, global_clipnorm=0.1)

    loop.run(dataclasses.replace(told(steps=1), optimizer=adam), tmp_path / "one")
    assert "global_clipnorm" not in capsys.readouterr().out
    loop.run(dataclasses.replace(two_rates([], steps=1), optimizer=adam), tmp_path / "two")
    assert "and 2 optimizers are at work: run.clip_norm limits that of all together" in capsys.readouterr().out


def test_keras_writes_what_can_be_read(tmp_path):
    seen = []
    callbacks = [
        keras.callbacks.ModelCheckpoint(str(tmp_path / "best.keras"), save_best_only=True),
        keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append((epoch, logs["val_loss"]))),
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.TensorBoard(str(tmp_path / "board")),
        keras.callbacks.History(),
    ]
    loop.run(told(callbacks, best="loss"), tmp_path / "run")
    losses = [value for _, value in of(tmp_path / "run", "eval", "loss")]
    assert seen == list(enumerate(losses))
    with open(tmp_path / "log.csv") as file:
        assert [float(row["val_loss"]) for row in csv.DictReader(file)] == losses
    saved = keras.saving.load_model(tmp_path / "best.keras")
    best = checkpoints.newest(tmp_path / "run" / "best", print)
    np.testing.assert_array_equal(saved.get_layer("head").kernel.numpy(), best.arrays["variables/head/kernel"])
    assert any((tmp_path / "board").rglob("events*"))
    assert callbacks[-1].history["val_loss"] == losses


@pytest.mark.parametrize(("name", "best"), [("loss", min), ("accuracy", max)])
def test_the_best_checkpoint_is_kept(name, best, tmp_path):
    loop.run(told(best=name, rate=3.0), tmp_path)
    values = of(tmp_path, "eval", name)
    expected = next(step for step, value in values if value == best(value for _, value in values))
    [file] = (tmp_path / "best").iterdir()
    assert file.name == f"step-{expected:010d}.safetensors"
    assert file.read_bytes() != b""
    arrays = checkpoints.newest(tmp_path / "best", print).arrays
    beside = checkpoints.newest(tmp_path / "checkpoints", print, expected).arrays
    for key, array in beside.items():
        np.testing.assert_array_equal(arrays[key], array, err_msg=key)
    assert judged(tmp_path)["best"]["step"] == expected


def averaging():
    return keras.optimizers.SGD(40.0, use_ema=True, ema_momentum=0.5)


def swap():
    return [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)]


@pytest.mark.parametrize("callbacks", [(), swap])
@pytest.mark.parametrize("replicas", [1, 2])
def test_weights_and_averages_are_evaluated_as_in_fit(callbacks, replicas, tmp_path, capsys):
    """The best checkpoint has what was evaluated: the weights, or with SwapEMAWeights the averages."""
    made, steps = in_process(replicas), 6
    whole = told(callbacks() if callbacks else (), best="loss", steps=steps, eval_every=1, metrics=["accuracy"])
    source = ArraySource(X[:32].astype(np.float64), Y[:32])
    settings = dataclasses.replace(
        whole,
        optimizer=averaging,
        global_batch=32,
        precision="float64",
        replicas=lambda: made,
        data=lambda: Dataset("points", source, ArraySource(X[32:].astype(np.float64), Y[32:]), "1"),
    )
    loop.run(settings, tmp_path)
    assert ("not the averages of use_ema" in capsys.readouterr().out) == (not callbacks)

    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(0)
    plain, seen = model(), []
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    plain.compile(averaging(), loss=loss)
    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: seen.append(plain.get_weights()))
    more = {"batch_size": 32, "epochs": steps, "shuffle": False, "verbose": 0}
    held_out = X[32:].astype(np.float64), Y[32:]
    told_keras = [*(callbacks() if callbacks else ()), note]
    fitted = plain.fit(X[:32].astype(np.float64), Y[:32], validation_data=held_out, callbacks=told_keras, **more)
    expected = fitted.history["val_loss"]
    losses = [value for _, value in of(tmp_path, "eval", "loss")]
    # The run's last evaluation is of the averages, which are then the weights.
    np.testing.assert_allclose(losses[:-1], expected[:-1], rtol=1e-9)
    assert losses[-1] == pytest.approx(plain.evaluate(*held_out, batch_size=16, verbose=0), rel=1e-9)
    best = int(np.argmin(losses))
    assert best < steps - 1
    arrays = checkpoints.newest(tmp_path / "best", print).arrays
    for name, value in zip(("kernel", "bias"), seen[best], strict=True):
        np.testing.assert_allclose(arrays[f"variables/head/{name}"], value, rtol=1e-9)
    for name, value in zip(("kernel", "bias"), plain.get_weights(), strict=True):
        last = checkpoints.newest(tmp_path / "checkpoints", print).arrays[f"variables/head/{name}"]
        np.testing.assert_allclose(last, value, rtol=1e-9)


def test_patience_ends_the_run(tmp_path, capsys):
    loop.run(told(best="loss", patience=2, rate=30.0), tmp_path)
    losses = of(tmp_path, "eval", "loss")
    best = min(losses, key=lambda pair: pair[1])[0]
    assert losses[-1][0] == best + 4 < STEPS
    said = f"stopped at step {best + 4} of {STEPS}: loss was best at step {best}, 2 evaluations ago (run.patience)"
    assert said in capsys.readouterr().out


def test_what_is_no_number_is_never_the_best(tmp_path):
    class Broken(keras.metrics.Mean):
        def update_state(self, y, outputs, sample_weight=None):
            super().update_state(keras.ops.ones([1]))

        def result(self):
            return super().result() * np.nan

    loop.run(told(best="broken", patience=1, metrics=[lambda: Broken(name="broken")]), tmp_path)
    assert [step for step, _ in of(tmp_path, "eval", "broken")] == [2, 4]


MANY = {
    "patience": lambda: {"best": "loss", "patience": 2, "rate": 30.0},
    "stopping": lambda: {"callbacks": [keras.callbacks.EarlyStopping(patience=2, min_delta=0.01)], "rate": 30.0},
    "plateau": lambda: {"callbacks": [plateau(), Own()], "rate": 30.0, "best": "accuracy"},
    "scheduler": lambda: {"callbacks": [scheduler()]},
}


@pytest.mark.parametrize("name", in_turns(quick(MANY, "patience", "plateau")))
def test_a_run_in_pieces_decides_as_the_run_in_one(name, tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    loop.run(told(**MANY[name]()), whole)
    for stop in (2, 4, 8, STEPS):
        loop.run(told(**MANY[name](), steps=stop), pieces)
    assert rows(whole / "metrics.jsonl") == rows(pieces / "metrics.jsonl")
    assert checkpoint_names(whole) == checkpoint_names(pieces)
    assert judged(whole) == judged(pieces)
    assert_same_state(whole, pieces, rows(whole / "metrics.jsonl")[-1]["step"])
    if "best" in MANY[name]():
        one, other = (next((folder / "best").iterdir()) for folder in (whole, pieces))
        assert (one.name, one.read_bytes()) == (other.name, other.read_bytes())


def test_replicas_of_one_process_go_on_with_their_learning_rate(tmp_path):
    made = in_process(2)
    for folder, steps in (("whole", (STEPS,)), ("pieces", (4, STEPS))):
        for stop in steps:
            settings = told([scheduler()], steps=stop)
            loop.run(dataclasses.replace(settings, replicas=lambda: made), tmp_path / folder)
    whole, pieces = (of(tmp_path / folder, "train", "learning_rate") for folder in ("whole", "pieces"))
    assert whole == pieces
    np.testing.assert_allclose([rate for _, rate in whole], [0.1 * 0.5 ** (step // 2) for step in range(STEPS)], 1e-6)


def test_a_run_that_goes_on_between_evaluations(tmp_path):
    """Its epoch has begun before; what the checkpoint keeps of it is what a run in one has then."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    made = [told([scheduler(), Own()], eval_every=4, save_every=3) for _ in range(3)]
    loop.run(made[0], whole)
    loop.run(made[1], pieces)
    for path in (pieces / "checkpoints").iterdir():
        if int(path.stem[5:]) > 6:
            path.unlink()
    loop.run(made[2], pieces)
    assert rows(whole / "metrics.jsonl") == rows(pieces / "metrics.jsonl")
    assert judged(whole) == judged(pieces)
    assert made[2].callbacks[1].batches == STEPS


def test_settings_of_a_callback_may_change_when_a_run_goes_on(tmp_path):
    loop.run(told([keras.callbacks.EarlyStopping(patience=5)], rate=30.0, steps=4), tmp_path)
    loop.run(told([keras.callbacks.EarlyStopping(patience=1)], rate=30.0), tmp_path)
    assert of(tmp_path, "eval", "loss")[-1][0] < STEPS


class Limit(keras.callbacks.Callback):
    """Stops after so many batches; counts and notes the time, as people's callbacks do."""

    def __init__(self, batches=3):
        super().__init__()
        self.batches, self.seen = batches, 0

    def on_train_begin(self, logs=None):
        self.began = time.time()

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        self.model.stop_training = self.seen >= self.batches


def stopping(**more):
    return keras.callbacks.EarlyStopping(**{"monitor": "val_loss", "patience": 1, **more})


# What stopped a run, what is the same, and what is not.
STOPS = {
    "patience": ({"best": "loss", "patience": 1}, {}, {"patience": 9}),
    "no patience": ({"best": "loss", "patience": 1}, {"patience": 1}, {"patience": None}),
    "another best": ({"best": "loss", "patience": 1}, {"metrics": ["accuracy"]}, {"best": "accuracy", "patience": 9}),
    "nothing judged": ({"best": "loss", "patience": 1}, {}, {"best": None, "patience": None}),
    "callback": (
        {"callbacks": lambda: [stopping(), Own()]},
        {"callbacks": lambda: [Own(), stopping()]},
        {"callbacks": lambda: [stopping(patience=9), Own()]},
    ),
    "callback of another delta": (
        {"callbacks": lambda: [stopping(min_delta=5.0)]},
        {"callbacks": lambda: [stopping(min_delta=5.0)]},
        {"callbacks": lambda: [stopping(min_delta=0.0, patience=9)]},
    ),
    "callback left out": ({"callbacks": lambda: [stopping()]}, {"best": "loss"}, {"callbacks": lambda: []}),
    "own callback": (
        {"callbacks": lambda: [Limit()]},
        {"callbacks": lambda: [Limit()]},
        {"callbacks": lambda: [Limit(batches=50)]},
    ),
}


def made(more):
    return {name: value() if name == "callbacks" else value for name, value in more.items()}


@pytest.mark.parametrize("name", in_turns(quick(STOPS, "patience", "callback", "own callback")))
def test_a_run_that_stopped_goes_on_once_what_stopped_it_has_changed(name, tmp_path, capsys):
    first, alike, other = STOPS[name]
    first = {"rate": 30.0, **first}
    loop.run(told(**made(first)), tmp_path)
    stopped = rows(tmp_path / "metrics.jsonl")[-1]["step"]
    assert stopped < STEPS
    capsys.readouterr()
    loop.run(told(**made(first | alike)), tmp_path)
    said = capsys.readouterr().out
    assert f"finished: {tmp_path} stopped at step {stopped} of {STEPS}" in said
    assert "change what has stopped it to go on, or choose another --run_dir" in said
    assert rows(tmp_path / "metrics.jsonl")[-1]["step"] == stopped
    loop.run(told(**made(first | other)), tmp_path)
    said = capsys.readouterr().out
    assert "that has changed since, and the run goes on" in said
    assert f"going on from step {stopped}" in said
    assert [step for step, _ in of(tmp_path, "train", "loss")] == list(range(1, STEPS + 1))


def test_a_run_that_was_stopped_goes_on_as_one_of_more_patience(tmp_path):
    """Nothing of the early end is left: the bits are those of a run that was more patient from the beginning."""
    more = {"best": "loss", "rate": 30.0}
    loop.run(told(**more, patience=1), tmp_path / "stopped")
    assert rows(tmp_path / "stopped" / "metrics.jsonl")[-1]["step"] < STEPS
    for folder in ("stopped", "patient"):
        loop.run(told(**more, patience=9), tmp_path / folder)
    one, other = (tmp_path / folder for folder in ("stopped", "patient"))
    assert rows(one / "metrics.jsonl") == rows(other / "metrics.jsonl")
    assert judged(one) == judged(other)
    assert_same_state(one, other, STEPS)


def test_another_number_may_be_the_best_when_a_run_goes_on(tmp_path):
    loop.run(told(best="loss", rate=3.0, steps=4), tmp_path)
    loop.run(told(best="accuracy", rate=3.0), tmp_path)
    later = [(step, value) for step, value in of(tmp_path, "eval", "accuracy") if step > 4]
    best = max(later, key=lambda pair: pair[1])
    assert judged(tmp_path)["best"] | {"waited": 0} == {
        **dict(zip(("step", "value"), best, strict=True)),
        "name": "accuracy",
        "waited": 0,
    }


def test_an_evaluation_that_is_made_up_is_judged(tmp_path, monkeypatch):
    whole, failed = tmp_path / "whole", tmp_path / "failed"
    loop.run(told([scheduler()], best="loss"), whole)
    call = evaluation.Evaluation.__call__

    def fails(self, state, writer):
        if state.step == 6:
            raise UserError("no")
        return call(self, state, writer)

    monkeypatch.setattr(evaluation.Evaluation, "__call__", fails)
    with pytest.raises(UserError):
        loop.run(told([scheduler()], best="loss"), failed)
    monkeypatch.undo()
    loop.run(told([scheduler()], best="loss"), failed)
    assert rows(whole / "metrics.jsonl") == rows(failed / "metrics.jsonl")
    assert judged(whole) == judged(failed)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"best": "acurracy"}, "run.best is 'acurracy', which is no number of an evaluation; nearest: 'accuracy'"),
        ({"best": "val_lss"}, "run.best is 'val_lss', which is no number of an evaluation; nearest: 'loss'"),
        ({"patience": 2}, "run.patience without run.best"),
        ({"callbacks": print}, "run.callbacks is <built-in function print>: give a list, such as"),
        ({"callbacks": [print]}, "run.callbacks has a builtin_function_or_method: give Keras callbacks"),
        ({"callbacks": [keras.callbacks.CSVLogger]}, "run.callbacks has a type: give Keras callbacks"),
        (
            {"callbacks": [keras.callbacks.SwapEMAWeights()]},
            "run.callbacks has SwapEMAWeights, and no optimizer averages weights: make one with use_ema=True",
        ),
        (
            {"callbacks": [keras.callbacks.BackupAndRestore("there")]},
            "run.callbacks has BackupAndRestore: the run folder goes on by itself; leave it out",
        ),
        (
            {"callbacks": [keras.callbacks.EarlyStopping(restore_best_weights=True)]},
            "run.callbacks has EarlyStopping with restore_best_weights, which a checkpoint does not hold: bind run",
        ),
        (
            {"callbacks": [keras.callbacks.EarlyStopping("val_acuracy")]},
            "run.callbacks has EarlyStopping with monitor='val_acuracy', which is no number of this run; nearest: "
            "'val_accuracy'",
        ),
    ],
)
def test_mistakes_are_told_before_the_first_step(more, message, tmp_path):
    with pytest.raises(UserError) as caught:
        loop.run(told(**more), tmp_path / "run")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_error_in_a_callback_says_where(tmp_path):
    class Broken(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise ValueError("nothing to see")

    with pytest.raises(Exception, match=r"run\.callbacks.*nothing to see"):
        loop.run(told([Broken()]), tmp_path)
    # The checkpoint owes the evaluation, which the next run makes up.
    loop.run(told(), tmp_path)
    assert [step for step, _ in of(tmp_path, "eval", "loss")] == list(range(2, STEPS + 1, 2))


def test_a_checkpoint_keeps_json(tmp_path):
    loop.run(told([plateau(), keras.callbacks.EarlyStopping(patience=9)], best="loss"), tmp_path)
    kept = judged(tmp_path)
    assert json.loads(json.dumps(kept)) == kept
    assert [name for name, _ in kept["callbacks"]] == ["ReduceLROnPlateau", "EarlyStopping"]


APART = """

class Apart(keras.callbacks.Callback):
    # Each worker wants something else.
    def on_epoch_end(self, epoch, logs=None):
        import json, os
        rank = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        self.model.optimizer.learning_rate = 0.5 ** (1 + epoch + 3 * rank)
        self.model.stop_training = epoch == (2 if rank == 0 else 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("callbacks", ["[@CSVLogger()]", "[@CSVLogger(), @letters_module.Apart()]"])
def test_all_workers_do_what_callbacks_of_the_first_want(callbacks, letters, tmp_path):
    """Of a callback that writes the second worker has none to call."""
    with open(tmp_path / "letters_module.py", "a") as module:
        module.write(APART)
    folder = tmp_path / "run"
    params = ["run.eval_every = 3", f"run.callbacks = {callbacks}", f"CSVLogger.filename = '{tmp_path}/log.csv'"]
    params += ["run.best = 'loss'", "CSVLogger.append = True", "run.optimizer = @keras.optimizers.SGD"]
    command = ["-m", "dist_partial.train", f"--run_dir={folder}", f"--gin_file={letters}"]

    def train(*more):
        flags = [f"--gin_param={param}" for param in (*params, *more)]
        results = run_workers([*command, *flags], workers=2, timeout=120, pythonpath=tmp_path)
        assert [code for code, _ in results] == [0, 0], "\n".join(output[-1500:] for _, output in results)
        return results[0][1]

    train()
    losses = of(folder, "eval", "loss")
    apart = "Apart" in callbacks
    assert [step for step, _ in losses] == ([3, 6, 9] if apart else [3, 6, 9, 12])
    with open(tmp_path / "log.csv") as file:
        assert [float(row["val_loss"]) for row in csv.DictReader(file)] == [value for _, value in losses]
    rates = [rate for _, rate in of(folder, "train", "learning_rate")]
    assert rates[::3] == pytest.approx([0.01, 0.5, 0.25] if apart else [0.01] * 4)
    assert len(list((folder / "best").iterdir())) == 1
    if apart:
        assert "change what has stopped it to go on" in train()
        assert "the run goes on" in train("run.callbacks = [@CSVLogger()]")
        assert [step for step, _ in of(folder, "eval", "loss")] == [3, 6, 9, 12]
