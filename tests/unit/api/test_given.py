"""What users' objects have that no config of Keras's holds: kept in a run and in its folder, or said in one line."""

import dataclasses

import keras
import numpy as np
import pytest

from dist_partial import train
from dist_partial.api.given import Data, Optimizer
from dist_partial.config import gin_files, gin_text
from dist_partial.config.settings import Settings
from dist_partial.data import ArraySource, Dataset, stdlib_shapes
from dist_partial.errors import UserError
from dist_partial.export import __main__ as export_command
from dist_partial.models import two_dense
from dist_partial.step import losses
from tests.helpers.people import HEAD, X, Y


def person() -> keras.Model:
    hidden = keras.layers.Dense(4, activation="tanh", name="hidden")
    head = keras.layers.Dense(1, name="head", bias_initializer="ones")
    return keras.Sequential([keras.Input([3]), hidden, head], name="person")


def quickly(model, **more):
    return train(model, (X, Y), **{"rules": HEAD, "loss": "mse", "steps": 2, "global_batch": 24} | more)


def decaying(**exclusions) -> keras.optimizers.Optimizer:
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(**exclusions)
    return optimizer


@pytest.mark.slow
def test_a_used_optimizer_keeps_its_exclusions(capfd):
    model, used = person(), decaying(var_names=["bias"])
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    model.compile(used, "mse")
    model.fit(X, Y, batch_size=24, verbose=0)
    model.set_weights(other.get_weights())
    found = quickly(model, optimizer=used, evaluation=(X, Y))
    other.layers[0].trainable = False
    other.compile(decaying(var_names=["bias"]), "mse")
    other.fit(X, Y, batch_size=24, epochs=2, verbose=0)
    for ours, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    arguments = [f"--run_dir={found.folder}", "--format=keras", "--output=out.keras"]
    assert export_command.main(arguments) == 0, capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("used", [False, True])
def test_metrics_of_compile_are_measured(used):
    model = person()
    counts = keras.metrics.MeanMetricWrapper(lambda y, outputs: abs(y - outputs), name="mine")
    weight = np.linspace(0.0, 1.0, 24, dtype=np.float32)
    model.compile(keras.optimizers.SGD(0.01), "mse", metrics=["mae", counts], weighted_metrics=["mse"])
    if used:
        model.evaluate(X, Y, verbose=0)
    found = train(model, (X, Y, weight), rules=HEAD, evaluation=(X, Y, weight), steps=1, global_batch=24)
    names = ["loss", "mae", "mine", "mse"]
    expected = model.evaluate(X, Y, sample_weight=weight, verbose=0, return_dict=True)
    expected["mae"] = expected.get("mae", expected.get("mean_absolute_error"))
    for name in names:
        assert found.metrics[name] == pytest.approx(expected[name], rel=1e-5), (name, found.metrics, expected)
    again = train(model, (X, Y), rules=HEAD, evaluation=(X, Y), steps=1, global_batch=24, metrics=["mape"])
    assert "mape" in again.metrics and "mine" not in again.metrics
    made = train(person, (X, Y), rules=HEAD, loss="mse", evaluation=(X, Y), steps=1, metrics=["mape"], global_batch=24)
    more = train(made.model, (X, Y), rules=HEAD, evaluation=(X, Y), steps=1, global_batch=24)
    assert "mape" not in more.metrics


class Scaling(keras.layers.Layer):
    def __init__(self, by=1.0, **kwargs):
        super().__init__(**kwargs)
        self.by = by

    def call(self, x):
        return x * self.by

    def get_config(self):
        return {**super().get_config(), "by": self.by}


class Person(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.scaling, self.head = Scaling(2.0), keras.layers.Dense(1, name="head")

    def call(self, x):
        return self.head(self.scaling(x))


def scaled() -> keras.Model:
    return keras.Sequential([keras.Input([3]), Scaling(3.0), keras.layers.Dense(1, name="head")])


@pytest.mark.slow
@pytest.mark.parametrize("make", [scaled, Person, lambda: scaled()], ids=["layer", "model", "function"])
def test_classes_of_a_module_are_found_by_the_commands(make, capfd):
    found = quickly(make if make.__name__ == "<lambda>" else make())
    arguments = [f"--run_dir={found.folder}", "--format=keras", "--output=out.keras"]
    assert export_command.main(arguments) == 2 and "give --allow_imports" in capfd.readouterr().err
    assert export_command.main([*arguments, "--allow_imports"]) == 0, capfd.readouterr().err
    loaded = keras.saving.load_model("out.keras", {"Scaling": Scaling, "Person": Person})
    np.testing.assert_allclose(loaded.predict(X, verbose=0), found.model.predict(X, verbose=0), rtol=1e-6)


@pytest.mark.slow
def test_a_class_that_keras_cannot_load_says_so(monkeypatch, capfd):
    class WithoutArguments(Person):
        def __init__(self):
            super().__init__()

    monkeypatch.setitem(globals(), "WithoutArguments", WithoutArguments)
    WithoutArguments.__qualname__ = "WithoutArguments"
    found = quickly(WithoutArguments())
    assert export_command.main([f"--run_dir={found.folder}", "--format=keras", "--output=out.keras"]) == 2
    assert "cannot load it: " in (said := capfd.readouterr().err) and "result.model.save" in said


@pytest.mark.slow
def test_a_class_of_a_notebook_says_what_to_do(monkeypatch, capfd):
    monkeypatch.setattr(Scaling, "__module__", "__main__")
    found = quickly(scaled())
    assert export_command.main([f"--run_dir={found.folder}", "--format=keras", "--output=out.keras"]) == 2
    said = capfd.readouterr().err
    assert "layer of class Scaling" in said and "result.model.save" in said and "module that can be imported" in said


class Letters:
    """A codec of the user's."""

    def __init__(self, letters):
        self.letters = letters

    @property
    def size(self):
        return len(self.letters)

    def encode(self, text):
        return np.array([self.letters.index(letter) for letter in text if letter in self.letters], np.int32)

    def decode(self, ids):
        return "".join(self.letters[i] for i in ids)


class Adapted(Letters):
    def __init__(self):
        super().__init__("ab")


def kept_of(tmp_path, data, capsys):
    """The data set as another process reads it from the folder, and what was said."""
    factory = Data(data, None).kept(tmp_path)
    file = tmp_path / "written.gin"
    file.write_text(gin_text.text(Settings([("train", ".*")], two_dense, factory)))
    return gin_files.load([file]).settings.data(), capsys.readouterr().out


def test_the_folder_keeps_codecs_and_classes(tmp_path, capsys):
    part = ArraySource(np.zeros([100, 4], np.int32), np.zeros([100, 4], np.int32))
    data = Dataset("mine", part, part, "its digest", Letters("abc"), classes=("cat", "dog"))
    kept, said = kept_of(tmp_path, data, capsys)
    assert kept.classes == ("cat", "dog") and kept.codec.decode(kept.codec.encode("cab")) == "cab" and not said
    kept, said = kept_of(tmp_path, dataclasses.replace(data, codec=Adapted()), capsys)
    assert kept.codec is None and "no other process can make its codec Adapted" in said


def test_the_folder_keeps_fewer_of_large_examples(tmp_path, capsys):
    large = ArraySource(np.arange(80 * 2**18, dtype=np.float32).reshape(80, 2**18), np.arange(80))  # 1 MiB each
    kept, _ = kept_of(tmp_path, Dataset("mine", large, ArraySource(np.zeros([9, 2**18], np.float32)), "d"), capsys)
    assert (tmp_path / "examples.npz").stat().st_size < 45 * 2**20
    assert 20 < len(kept.train) < 32 and len(kept.evaluation) == 9
    np.testing.assert_array_equal(
        kept.train.fetch(np.array([2]))[0], large.fetch(kept.train.fetch(np.array([2]))[1])[0]
    )


def normed() -> keras.Model:
    layers = [keras.layers.BatchNormalization(name=name) for name in ("asleep", "half", "awake")]
    model = keras.Sequential([keras.Input([3]), *layers, keras.layers.Dense(1, name="head")])
    layers[0].trainable = False
    layers[1].gamma.trainable = False
    return model


@pytest.mark.slow
@pytest.mark.parametrize("instance", [True, False])
def test_what_the_user_has_frozen_stays_frozen(instance):
    """A layer, and a single variable, in the copy that a run trains and in the model afterwards."""
    given = normed()
    before = {variable.path: variable.numpy() for variable in given.weights}
    model = quickly(given if instance else lambda: normed(), rules=[("train", ".*")], statistics="all").model
    names = [variable.path.split("/", 1)[-1] for variable in model.weights]
    changed = [(a != b).any() for a, b in zip(map(np.asarray, model.weights), before.values(), strict=True)]
    moved = {"/".join(name.split("/")[-2:]) for name, each in zip(names, changed, strict=True) if each}
    assert not {name for name in moved if name.startswith("asleep") or name == "half/gamma"}
    assert {"half/beta", "half/moving_mean", "awake/gamma", "head/kernel"} <= moved
    asleep, half, awake, _ = model.layers
    assert not asleep.trainable and half.trainable and awake.trainable and awake.gamma.trainable
    assert not half.gamma.trainable and half.beta.trainable


def test_single_variables_that_are_excluded_are_refused():
    model = person()
    with pytest.raises(UserError, match=r"^optimizer 'sgd' excludes single variables .* name them"):
        quickly(model, optimizer=decaying(var_list=[model.layers[1].bias]))


class Scaled(keras.losses.Loss):
    """Without a get_config."""

    def __init__(self, scale=1.0, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale

    def call(self, y_true, y_pred):
        return self.scale * keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)


class Counted(keras.metrics.Mean):
    def __init__(self, scale=1.0, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale


class Slow(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, step):
        return self.scale

    def get_config(self):
        return {}


def read_again(tmp_path, **more) -> Settings:
    file = tmp_path / "written.gin"
    file.write_text(gin_text.text(Settings([("train", ".*")], two_dense, stdlib_shapes, **more)))
    return gin_files.load([file]).settings


@pytest.mark.parametrize(
    ("name", "what", "kept"),
    [
        ("loss", lambda: Scaled(2.0), "get_config leaves out 'scale'"),
        ("loss", lambda: Scaled(), None),
        ("metrics", lambda: [Counted(2.0)], "get_config leaves out 'scale'"),
        ("metrics", lambda: [Counted()], None),
    ],
    ids=["loss", "loss as made", "metric", "metric as made"],
)
def test_what_no_config_has_is_said(tmp_path, name, what, kept):
    text = gin_text.text(Settings([("train", ".*")], two_dense, stdlib_shapes, **{name: what()}))
    assert ("only_in_python" in text) == (kept is not None)
    assert kept is None or kept in text.replace("\\", "")


def test_a_loss_keeps_what_its_config_leaves_out(tmp_path):
    """Keras 3.15 loses Huber's delta, in a folder and in float64."""
    loss, y, outputs = keras.losses.Huber(delta=5.0), np.zeros([4, 1]), np.full([4, 1], 3.0)
    assert float(read_again(tmp_path, loss=loss).loss(y, outputs)) == 4.5
    keras.config.set_floatx("float64")
    try:
        assert float(losses.made(loss).inner(y, outputs)) == 4.5
    finally:
        keras.config.set_floatx("float32")


def test_optimizers_are_written_with_what_they_exclude(tmp_path):
    found = read_again(tmp_path, optimizer=Optimizer(decaying(var_names=["gamma", "bias"]))).optimizer
    for made in (found(), found(learning_rate=0.25)):
        assert made.get_config()["weight_decay"] == 0.5
        pattern = made._exclude_from_weight_decay_pattern
        assert sorted(pattern.pattern.split("|")) == ["bias", "gamma"]
    assert float(made.learning_rate) == 0.25
    kept = gin_text.text(Settings([("train", ".*")], two_dense, stdlib_shapes, Optimizer(keras.optimizers.SGD(Slow()))))
    assert "import tests.unit.api.test_given" in kept and "only_in_python" not in kept
    changed = keras.optimizers.SGD(Slow(3.0))
    assert "leaves out 'scale'" in gin_text.text(
        Settings([("train", ".*")], two_dense, stdlib_shapes, Optimizer(changed))
    )
