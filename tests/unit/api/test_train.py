"""`dist_partial.train`: compared with Keras's fit, run again and again in one process, and read by the commands."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_partial
from dist_partial import Rule, reductions, sample, schedules, train
from dist_partial.config import gin_files, gin_text, words
from dist_partial.config.settings import Settings
from dist_partial.data import stdlib_corpus
from dist_partial.errors import Interrupted, Raised, UserError
from dist_partial.export import __main__ as export_command
from dist_partial.models import byte_transformer, two_dense
from dist_partial.report import __main__ as report
from tests.helpers.files import same_bits

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 3)).astype(np.float32)
Y = X.sum(1, keepdims=True)
HEAD = [("train", "head/.*"), ("freeze", ".*")]
SECOND = [("train", "dense_1/.*"), ("freeze", ".*")]


def named() -> keras.Model:
    hidden = keras.layers.Dense(4, activation="tanh", name="hidden")
    return keras.Sequential([keras.Input([3]), hidden, keras.layers.Dense(1, name="head")], name="person")


def numbered() -> keras.Model:
    return keras.Sequential([keras.Input([3]), keras.layers.Dense(4), keras.layers.Dense(1)])


class Net(keras.Model):
    """As people write it: without get_config."""

    def __init__(self, units: int = 4):
        super().__init__()
        self.body, self.head, self.scale = keras.layers.Dense(units), keras.layers.Dense(1, name="head"), 1.0

    def call(self, x):
        return self.head(self.body(x)) * self.scale


class Closed(Net):
    def __init__(self, function):
        super().__init__()
        self.function = function


def quickly(model, data=(X, Y), **more):
    given = {"rules": HEAD, "loss": "mse", "steps": 2, "global_batch": 8, "evaluation": (X, Y)}
    return train(model, data, **given | more)


@pytest.mark.parametrize("replicas", [1, 2])
def test_trains_the_users_model_as_fit_does(replicas):
    model = named()
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    other.layers[0].trainable = False
    other.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    other.fit(X, Y, batch_size=24, epochs=3, verbose=0)
    found = quickly(
        model, optimizer=keras.optimizers.SGD(0.1, momentum=0.9), steps=3, global_batch=24, replicas=replicas
    )
    assert found.model is model
    for ours, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert found.metrics["loss"] == pytest.approx(other.evaluate(X, Y, verbose=0), rel=1e-5)
    np.testing.assert_allclose(model.predict(X, verbose=0), other.predict(X, verbose=0), atol=1e-5)


def test_a_compiled_model_brings_its_loss_and_optimizer(capsys):
    model = named()
    model.compile(keras.optimizers.SGD(0.25), keras.losses.MeanAbsoluteError())
    found = train(model, (X, Y), rules=HEAD, steps=1, evaluation=(X, Y))
    assert found.history[0]["learning_rate"] == 0.25
    assert found.metrics["loss"] == pytest.approx(model.evaluate(X, Y, verbose=0), rel=1e-5)


@pytest.mark.slow
def test_again_with_other_rules_and_numbers_of_replicas():
    model = named()
    for replicas, trained in ((1, "head"), (2, "hidden"), (4, "head"), (1, "hidden")):
        before = dict(zip([v.path for v in model.weights], model.get_weights(), strict=True))
        found = quickly(model, rules=[("train", f"{trained}/.*"), ("freeze", ".*")], replicas=replicas)
        moved = {v.path.split("/")[-2] for v in model.weights if not same_bits([v.numpy(), before[v.path]])}
        assert moved == {trained}
    assert found.folder.name == "person-4"


@pytest.mark.slow
def test_a_cell_may_be_run_twice(capsys):
    """Keras calls the layers of the second model dense_2 and dense_3."""
    plans = []
    for _ in range(2):
        found = quickly(numbered(), rules=SECOND)
        plans.append((found.folder / "plan.json").read_text())
    assert plans[0] == plans[1] and '"dense_1/kernel"' in plans[0]
    assert "dense_3 is 'dense_1'" in capsys.readouterr().out
    # The same folder goes on, though its model is another one.
    assert quickly(numbered, rules=SECOND, folder="runs/mine").history.of("train").column("step") == [1, 2]
    assert quickly(numbered, rules=SECOND, folder="runs/mine", steps=4).history.of("train").column("step") == [
        1,
        2,
        3,
        4,
    ]


def test_names_that_the_user_gave_stay():
    """They may look like Keras's own, and then the rules say which are meant."""
    keras.layers.Dense(1), keras.layers.Dense(1), keras.layers.Dense(1)
    layers = [keras.layers.Dense(2, name="dense_1"), keras.layers.Dense(1, name="dense_2")]
    model = keras.Sequential([keras.Input([3]), *layers])
    with pytest.raises(UserError, match=r"'dense_1/kernel' would be 'dense/kernel' .* give the layers names"):
        quickly(model, rules=SECOND)
    found = quickly(model, rules=[("train", "dense_2/.*"), ("freeze", ".*")])
    assert [entry.path for entry in found.plan.trained] == ["dense_2/kernel", "dense_2/bias"]


def test_a_subclassed_model_and_one_that_is_not_built():
    for model in (Net(), keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(1, name="head")])):
        found = quickly(model)
        np.testing.assert_allclose(model.predict(X, verbose=0).shape, Y.shape)
        assert found.model is model and len(found.plan.trained) == 2
    with pytest.raises(UserError, match=r"'closed.*' \(Closed\) cannot be made again .* give the function"):
        quickly(Closed(lambda x: x))
    assert len(quickly(lambda: Closed(lambda x: x)).plan.trained) == 2
    changed = Net()
    changed.scale = 5.0
    with pytest.raises(UserError, match="computes something else when it is made again"):
        quickly(changed)


def test_what_layers_have_adapted_to_comes_along():
    words_, text = keras.layers.StringLookup(), np.array([["a"], ["b"], ["b"], ["c"]])
    words_.adapt(text)
    x = keras.Input([1], dtype="string")
    hidden = keras.layers.Flatten()(keras.layers.Embedding(4, 2, name="body")(words_(x)))
    model = keras.Model(x, keras.layers.Dense(1, name="head")(hidden))
    before = model.predict(tf.constant(text), verbose=0)
    found = train(
        model,
        (text, before),
        rules=HEAD,
        loss="mse",
        evaluation=(text, before),
        steps=1,
        global_batch=4,
        optimizer=keras.optimizers.SGD(1e-9),
    )
    assert found.metrics["loss"] == pytest.approx(0.0, abs=1e-6)


def test_a_model_whose_variables_the_rules_change_stays(capsys):
    model = named()
    before = model.get_weights()
    found = quickly(model, rules=[Rule("head/kernel", lora=1), ("freeze", ".*")])
    assert same_bits([model.get_weights()[2], before[2]]) and found.model is not model
    assert "keeps its weights" in capsys.readouterr().out and found.model.predict(X, verbose=0).shape == Y.shape


class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.01

    def get_config(self):
        return {}


@pytest.mark.slow
def test_what_the_folder_cannot_hold_ends_no_run():
    """A Sequential whose config changes when it is built, and a schedule that no other process knows."""

    def unbuilt():
        return keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(1, name="head")])

    found = quickly(unbuilt, optimizer=keras.optimizers.SGD(WarmUp()))
    assert found.history[-1]["step"] == 2


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_model_of_a_result_is_trained_on_by_the_same_loss(replicas):
    model = quickly(named, loss=keras.losses.MeanSquaredError(reduction="sum")).model
    expected = np.sum((model.predict(X, verbose=0) - Y) ** 2)
    more = {"rules": HEAD, "evaluation": (X, Y), "steps": 1, "global_batch": 24, "replicas": replicas}
    [row] = train(model, (X, Y), **more).history.of("train")
    assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_rules_that_renamed_layers_would_swap_are_refused():
    keras.layers.Dense(1)
    model = keras.Sequential([keras.Input([3]), *(keras.layers.Dense(2, name=f"dense_{i}") for i in (1, 2, 3))])
    rules = [Rule("dense_1/.*", learning_rate=1e-4), Rule("dense_2/.*", learning_rate=1e-2), ("train", ".*")]
    with pytest.raises(UserError, match="Keras has numbered layers"):
        train(model, (X, np.zeros([24, 2], np.float32)), rules=rules, loss="mse", steps=1)


def test_frozen_weights_of_the_user_are_not_rounded():
    model = named()
    before = [np.array(variable) for variable in model.weights]
    quickly(model, rules=HEAD, frozen_dtype="bfloat16")
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_texts_of_any_letters_are_kept():
    def reader():
        inputs = keras.Input((), dtype="string")
        ids = keras.layers.StringLookup(vocabulary=["Zürich", "Rome"])(inputs)
        return keras.Model(inputs, keras.layers.Dense(1, name="head")(keras.layers.Embedding(3, 2)(ids)))

    texts = tf.data.Dataset.from_tensor_slices((["Zürich", "Rome"] * 12, np.zeros([24, 1], np.float32)))
    assert quickly(reader, texts, evaluation=texts).history[-1]["step"] == 2


def test_in_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(quickly(named(), replicas=2, folder="here")))
    thread.start()
    thread.join()
    assert found[0].metrics["step"] == 2


def test_takes_what_the_data_door_takes():
    rows = tf.data.Dataset.from_tensor_slices((X, Y)).batch(5)
    found = quickly(named(), rows, evaluation=rows, global_batch=24, optimizer=keras.optimizers.SGD(0.1))
    arrays = quickly(named, (X, Y), global_batch=24, optimizer="sgd", folder="arrays")
    assert found.metrics["examples"] == arrays.metrics["examples"] == 24
    assert found.history[0].keys() == arrays.history[0].keys()


class Interrupting(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_run_goes_on():
    model = named()
    before = model.get_weights()[2]
    with pytest.raises(Interrupted, match=r"^stopped at step 1 of 2, .*; call train again with the same folder"):
        quickly(model, folder="mine", callbacks=[Interrupting()])
    assert not same_bits([model.get_weights()[2], before])
    assert quickly(model, folder="mine").history.of("train").column("step") == [1, 2]


class InterruptingThird(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if batch == 2:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_what_replicas_agree_on_is_what_is_left_between_exchanges():
    """The third step follows the exchange of the second, and each replica has made it by itself."""
    first = named()
    models = [keras.models.clone_model(first) for _ in range(3)]
    for model in models:
        model.set_weights(first.get_weights())
    more = {"reduction": reductions.LocalSGD(sync_every=2), "replicas": 2, "optimizer": keras.optimizers.SGD(0.1)}
    quickly(models[0], steps=2, **more)
    quickly(models[1], steps=3, **more)
    with pytest.raises(Interrupted, match="step 3 of 4"):
        quickly(models[2], steps=4, callbacks=[InterruptingThird()], **more)
    two, three, interrupted = (np.concatenate([w.ravel() for w in each.get_weights()]) for each in models)
    assert same_bits([two, three]) and same_bits([two, interrupted])
    assert not same_bits([two, np.concatenate([w.ravel() for w in first.get_weights()])])
    made = [quickly(named, steps=steps, **more).model.get_weights()[2] for steps in (2, 3)]
    assert same_bits(made)


def test_the_result_shows_itself():
    found = quickly(named(), best="loss", eval_every=1, steps=3)
    assert found.history.of("eval").column("step") == [1, 2, 3]
    assert found.best["loss"] == min(found.history.of("eval").column("loss"))
    assert str(found).splitlines()[0] == f"{found.folder}: 3 of 3 steps"
    assert list(found.history.to_pandas()["step"]) == found.history.column("step")
    html, other = found._repr_html_(), quickly(named())._repr_html_()
    assert "<td>hidden</td>" in html and "<svg" in html
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (html, other)]
    assert ids[0] and not ids[0] & ids[1]  # both may be on one page


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"stepps": 5}, "train has no argument 'stepps'; nearest: 'steps'"),
        ({"epochs": 3}, "train has no argument 'epochs': write steps=epochs x examples / global_batch$"),
        ({"output_dir": "here"}, "'output_dir': write folder=..., the run folder$"),
        ({"validation_data": (X, Y)}, "'validation_data': write evaluation=...$"),
        ({"rules": None}, r"train has no rules: .* such as rules=\[\('train', 'head/\.\*'\), \('freeze', '\.\*'\)\];"),
        ({"validation_split": 0.2}, r"'validation_split': write data, made by dataset\(..., held_out=0.2\)"),
        ({"shuffle": True}, "'shuffle': write seed, from which each epoch's order is drawn"),
        ({"verbosity": 0}, "'verbosity': write eval_every, the updates between the lines"),
        ({"initial_epoch": 3}, "'initial_epoch': write steps, of the whole run, which goes on from the newest"),
        ({"batch_size": 3}, "'batch_size': write global_batch, the examples of an update over all replicas"),
        ({"steps_per_epoch": 3}, "'steps_per_epoch': write eval_every, the updates between evaluations"),
        ({"num_replicas": 2}, "'num_replicas': write replicas=..., simulated on the CPU"),
        ({"x": X}, r"train has no argument 'x': write data, both as one: \(x, y\)$"),
        ({"steps": 0}, "steps is 0: it must be"),
        ({"rules": [("train", "haed/.*"), ("freeze", ".*")]}, "nearest"),
        ({"global_batch": 9, "replicas": 2}, "global_batch=9 does not divide .* give a multiple of 2"),
        ({"optimizer": "adem"}, "Keras has none called 'adem'"),
        ({"optimizer": 5}, "optimizer is 5: give what makes one, such as keras.optimizers.Adam or lambda: .*[^@]$"),
        ({"replicas": "two"}, "replicas is 'two': write a number"),
        ({"replicas": 9}, r"replicas=9 comes too late: .* dist_partial.devices\(9\)"),
        ({"precision": "mixed_bfloat16"}, "was made in 'float32': give the function"),
        ({"schedule": "lisa"}, r"schedule is 'lisa': give an object, with parentheses, as in Phases\(table\)$"),
    ],
)
def test_mistakes_are_said_in_python(more, message):
    with pytest.raises(UserError, match=message) as raised:
        quickly(named(), **more)
    assert "run." not in str(raised.value) and "gin" not in str(raised.value) and "@" not in str(raised.value)


def test_what_fit_takes_is_taken_or_named(tmp_path):
    """None for nothing, and NumPy's numbers; inputs and targets are one argument."""
    quickly(named(), steps=np.int64(2), callbacks=None, metrics=None, folder="mine")
    assert "run.steps = 2\n" in (tmp_path / "mine" / "operative_config.gin").read_text()
    with pytest.raises(UserError, match=r"give inputs and targets as \(x, y\)"):
        train(named(), X, Y, rules=[("train", ".*")])


def test_the_few_examples_of_a_folder_are_not_trained_on(tmp_path, capsys):
    quickly(named(), folder="mine")
    arguments = ["gin_file=mine/operative_config.gin", "run_dir=again"]
    assert command(train.main, *arguments) == 2
    assert "run.data is kept_examples, the few that dist_partial.train has kept" in capsys.readouterr().err
    assert command(train.main, arguments[0], "run_dir=mine", "gin_param=run.steps = 9") == 2
    assert "call it again with the run's folder" in capsys.readouterr().err


def test_a_mistake_leaves_no_folder(tmp_path):
    with pytest.raises(Raised, match=r"^loss raised ZeroDivisionError"):
        quickly(named(), loss=lambda y, outputs: 1 / 0)
    assert not list((tmp_path / "runs").iterdir())


def test_messages_are_found_in_all_words():
    assert (
        words.in_python("bind run.global_batch = 6 (mine/run.py, line 3)")
        == "give global_batch=6 (mine/run.py, line 3)"
    )


@pytest.mark.slow
def test_lines_are_said_in_python(capsys):
    """Those of the data, of the schedule, of the plan, and of a run that is finished."""
    rows = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
    more = {"schedule": schedules.Phases([(0, "head/.*"), (99, ".*")]), "evaluation": rows, "folder": "here"}
    for _ in range(2):
        quickly(named, rows, rules=[("train", ".*")], **more)
    said = capsys.readouterr().out
    for line in ("data: the tf.data.Dataset gives batches", "after 99 steps, and steps is 2", "give a larger steps"):
        assert line in said
    assert not re.search(r"\brun\.|\bbind\b|@", said)


def test_fit_speaks_python():
    model, schedule = named(), schedules.Rotation(always=["nothing"])
    with pytest.raises(UserError, match=r"^Rotation\.always: no unit is called 'nothing'"):
        dist_partial.partial("sgd", [("train", ".*")], model, schedule=schedule)
    phases = schedules.Phases([(0, "head/.*")])
    with pytest.raises(UserError, match=r"^Phases\.table never trains .* or freeze it in rules$"):
        dist_partial.partial("sgd", [("train", ".*")], model, schedule=phases)


ORDERS = {
    "the module first": "import dist_partial.train\nfrom dist_partial import train",
    "the function first": "from dist_partial import train\nimport dist_partial.train",
    "the module alone": "from dist_partial.train import main\nimport dist_partial\ntrain = dist_partial.train",
}


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("code", ORDERS.values(), ids=ORDERS)
def test_train_is_the_function_in_any_order(code):
    check = "assert inspect.isfunction(train) and train.main is sys.modules['dist_partial.train'].main"
    run(f"{code}\nimport inspect, sys\n{check}")


def test_importing_the_package_imports_no_tensorflow():
    run("import dist_partial, sys; dir(dist_partial); assert 'tensorflow' not in sys.modules")


@pytest.mark.slow
def test_devices_for_replicas_are_there_from_the_first_import_on():
    code = "assert len(tf.config.list_logical_devices('CPU')) == 8"
    run(f"from dist_partial import train; import tensorflow as tf; {code}")


def test_the_signature_names_all_settings():
    names = inspect.signature(dist_partial.train).parameters
    assert set(names) == {*inspect.signature(Settings).parameters, "evaluation", "folder", "restore_best", "verbose"}


def command(main, *arguments) -> int:
    return main([f"--{name}" for name in arguments])


@pytest.mark.slow
def test_the_folder_serves_the_commands(tmp_path, capfd):
    found = quickly(
        numbered(), rules=SECOND, optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 9))
    )
    frozen = found.model.get_weights()
    (tmp_path / "runs").rename(tmp_path / "moved")  # it may be moved
    folder = f"run_dir={tmp_path / 'moved' / 'sequential-1'}"
    assert command(export_command.main, folder, "format=keras", "output=out.keras") == 0
    loaded = keras.saving.load_model("out.keras")
    assert same_bits(map(np.concatenate, [[w.ravel() for w in each] for each in (loaded.get_weights(), frozen)]))
    assert command(export_command.main, folder, "format=safetensors", "output=out.safetensors") == 0
    assert command(report.main, folder, "output=out.html") == 0
    assert command(sample.main, folder) == 2
    assert "has no text to sample" in capfd.readouterr().err


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_what_it_began_with():
    """The model that is given to the second call has been trained by the first."""
    model = named()
    first = model.get_weights()
    for steps in (2, 4):
        found = quickly(model, folder="mine", steps=steps)
    assert found.history.of("train").column("step") == [1, 2, 3, 4]
    straight = named()
    straight.set_weights(first)
    quickly(straight, folder="straight", steps=4)
    assert same_bits([np.concatenate([w.ravel() for w in each.get_weights()]) for each in (model, straight)])
    assert command(export_command.main, "run_dir=mine", "format=safetensors", "output=out.safetensors") == 0
    assert same_bits([keras.saving.load_model("mine/model.keras").get_weights()[2], first[2]])


@pytest.mark.slow
def test_text_from_python_is_sampled(capfd):
    def tiny():
        return byte_transformer(layers=1, width=8, heads=1)

    found = train(
        tiny,
        stdlib_corpus,
        rules=[("train", ".*")],
        steps=1,
        global_batch=2,
        eval_examples=2,
        sampling=dist_partial.Sampling(length=3),
    )
    assert command(sample.main, f"run_dir={found.folder}", "length=5") == 0


@pytest.mark.slow
def test_a_model_that_draws_and_one_with_statistics():
    class Noise(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.generator = keras.random.SeedGenerator(1)

        def call(self, x):
            return x + keras.random.normal(keras.ops.shape(x), seed=self.generator)

    def drawing():
        return keras.Sequential([keras.Input([3]), Noise(), keras.layers.Dense(1, name="head")])

    assert quickly(drawing(), rules=[("train", ".*")]).metrics["step"] == 2

    def normed():
        norm = keras.layers.BatchNormalization(name="norm")
        return keras.Sequential([keras.Input([3]), norm, keras.layers.Dense(1, name="head")])

    for number, model in enumerate((normed(), normed)):
        found = quickly(model, folder=f"run{number}")
        assert all(layer.trainable for layer in found.model.layers)
        assert command(export_command.main, f"run_dir=run{number}", "format=keras", f"output={number}.keras") == 0
        loaded = keras.saving.load_model(f"{number}.keras")
        np.testing.assert_allclose(loaded.predict(X, verbose=0), found.model.predict(X, verbose=0), atol=1e-6)


@pytest.mark.slow
def test_what_a_module_has_is_named(capfd):
    quickly(named, folder="mine")
    arguments = ("run_dir=mine", "format=keras", "output=out.keras")
    assert command(export_command.main, *arguments) == 2 and "give --allow_imports" in capfd.readouterr().err
    assert command(export_command.main, *arguments, "allow_imports") == 0
    assert [layer.name for layer in keras.saving.load_model("out.keras").layers] == ["hidden", "head"]


@pytest.mark.slow
def test_what_no_file_can_name_says_so(capfd):
    def mine(y, outputs):
        return keras.ops.mean(keras.ops.square(y - outputs), axis=-1)

    for number, (model, more) in enumerate([(named(), {"loss": mine}), (lambda: Closed(lambda x: x), {})]):
        quickly(model, folder=f"run{number}", **more)
        capfd.readouterr()
        assert command(export_command.main, f"run_dir=run{number}", "format=keras", "output=out.keras") == 2
        assert "result.model.save" in capfd.readouterr().err


def test_settings_are_the_same_when_they_are_read_again(tmp_path):
    settings = Settings(
        rules=[
            Rule(
                "dense1/.*", optimizer=keras.optimizers.SGD, learning_rate=0.5, reduction=reductions.TopK(density=0.5)
            ),
            Rule("dense2/kernel", reduction=reductions.PowerSGD(rank=2)),
            ("train", ".*"),
        ],
        model=two_dense,
        data=stdlib_corpus,
        optimizer=lambda **more: None,
        loss=keras.losses.Huber(delta=2.0),
        metrics=[keras.metrics.MeanAbsoluteError(name="mine"), "mse"],
        class_weight={0: 1.0, 3: 0.5},
        schedule=schedules.Lisa(),
        steps=7,
        sampling=dist_partial.Sampling(temperature=0.5),
    )
    file = tmp_path / "written.gin"
    file.write_text(gin_text.text(settings))
    again = gin_files.load([file]).settings
    for name in ("rules", "class_weight", "schedule", "steps", "sampling"):
        mine, theirs = getattr(settings, name), getattr(again, name)
        assert repr(mine) == repr(theirs).replace("<class 'keras.optimizers.SGD'>", repr(keras.optimizers.SGD)), name
    assert again.loss.get_config() == settings.loss.get_config() and again.metrics[0].name == "mine"
    with pytest.raises(UserError, match=r"run.optimizer is .*result.model.save"):
        again.optimizer()


@pytest.mark.parametrize("best", ["auc", "val_auc"])
def test_a_metric_is_called_the_same_in_each_run_of_a_process(best):
    """As it is when a cell is run again, and in a run that goes on."""
    for steps in (2, 4):
        train(
            numbered,
            (X, (Y > 0).astype(np.float32)),
            rules=SECOND,
            loss=keras.losses.BinaryCrossentropy(from_logits=True),
            metrics=[keras.metrics.AUC(from_logits=True)],
            callbacks=[keras.callbacks.EarlyStopping(monitor="val_auc", mode="max", patience=9)],
            best=best,
            eval_every=2,
            steps=steps,
            folder="run",
        )
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert {name for row in rows for name in row if "auc" in name} == {"auc"}


def test_a_metric_of_other_targets_is_named():
    with pytest.raises(
        UserError, match=r"^metrics \(AUC\) does not take .*; with class ids for targets give metrics of"
    ):
        two = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
        train(two, (X, (Y[:, 0] > 0).astype(np.int32)), rules=[("train", ".*")], metrics=[keras.metrics.AUC()], steps=1)


def test_a_misspelt_optimizer_has_near_ones():
    with pytest.raises(UserError, match=r"^optimizer: Keras has none called 'adamm'; nearest: 'adam'"):
        train(numbered, (X, Y), rules=SECOND, loss="mse", optimizer="adamm", steps=1)


def test_everything_sends_at_most_what_everything_would_take(capsys):
    """The running statistics of BatchNorm, which replicas average, are among both."""
    layers = [keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    found = train(
        keras.Sequential([keras.Input([3]), *layers]), (X, Y), rules=[("train", ".*")], loss="mse", steps=2, replicas=2
    )
    trained = 4 * (3 * 4 + 4 + 2 * 4 + 4 + 1)
    moving = 4 * 2 * 4
    assert [row["wire_share"] for row in found.history.of("train")] == [1.0, 1.0]
    assert found.history.of("train")[-1]["wire_bytes"] == 2 * (trained + moving)
    assert found.plan.wire_bytes == found.plan.full_wire_bytes == trained + moving
    said = capsys.readouterr().out
    assert re.search(rf"\(statistics\) .* {moving}\n", said)
    assert f"payload: {trained + moving} of {trained + moving} bytes a step" in said


def test_an_evaluation_prints_names_as_best_takes_them(capsys):
    metric = keras.metrics.MeanAbsoluteError(name="off_by")
    train(numbered, (X, Y), rules=SECOND, loss="mse", metrics=[metric], best="off_by", eval_every=1, steps=1)
    assert re.search(r"held-out loss [\d.]+, off_by [\d.]+ \(", capsys.readouterr().out)
    with pytest.raises(UserError, match=r"^best is 'OFF_BY', which is no number of an evaluation; nearest: 'off_by'"):
        train(numbered, (X, Y), rules=SECOND, loss="mse", metrics=[metric], best="OFF_BY", steps=1)
