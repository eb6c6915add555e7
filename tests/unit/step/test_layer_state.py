"""What layers change in a training step: the same as on one device, saved, agreed; and nothing else moves a state."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial import selection
from dist_partial.config.settings import Sampling, Settings
from dist_partial.data import ArraySource, Dataset, train_batches
from dist_partial.distributed.replicas import create
from dist_partial.errors import UserError
from dist_partial.reductions.local_sgd import LocalSGD
from dist_partial.training import loop
from dist_partial.training.build import build, restore
from tests.helpers import cases
from tests.helpers.against_fit import COUNT, check_against_fit, features, settings
from tests.helpers.cases import copies
from tests.helpers.files import rows, same_bits, state
from tests.helpers.marks import quick
from tests.helpers.strategies import in_process


class Running(keras.layers.Layer):
    """Subtracts the moving mean of earlier batches; what else it changes is chosen by `kind`."""

    def __init__(self, kind="mean", **kwargs):
        super().__init__(**kwargs)
        self.kind = kind

    def build(self, shape):
        own = dict(initializer="zeros", trainable=False)
        self.mean = self.add_weight(shape=(shape[-1],), name="running_mean", **own)
        self.steps = self.add_weight(shape=(), dtype="int32", name="steps", **own)
        self.raw = tf.Variable(0.0)

    def call(self, x, training=False):
        outputs = x - self.mean
        if training:
            self.mean.assign(0.5 * self.mean + 0.5 * keras.ops.mean(x, axis=0))
            seen = keras.ops.sum(keras.ops.cast(x > 0, "int32")) if self.kind == "count" else 1
            self.steps.assign_add(seen)
            if self.kind == "raw":
                self.raw.assign_add(1.0)
            if self.kind == "random":
                outputs += keras.random.normal(keras.ops.shape(x))
        return outputs


def running(kind="mean"):
    return lambda: keras.Sequential([keras.Input((7,)), Running(kind, name="run"), keras.layers.Dense(1, name="d")])


def numbers():
    x = features(7) + np.arange(COUNT)[:, None] / 9
    return x, x.sum(1, keepdims=True)


def test_state_of_a_users_layer_is_that_of_one_device_and_goes_on_bit_for_bit(tmp_path):
    data, loss = numbers(), keras.losses.MeanSquaredError
    check_against_fit(tmp_path / "run", running(), data, loss)
    saved = state(tmp_path / "run", 20)
    assert saved["statistics/run/steps"] == 20
    mean = np.zeros(7)
    for _ in range(20):
        mean = 0.5 * mean + 0.5 * data[0].mean(0)
    np.testing.assert_allclose(saved["statistics/run/running_mean"], mean, rtol=1e-12)
    for steps in (9, 20):
        loop.run(settings(running(), data, loss, steps=steps), tmp_path / "parts")
    for name, value in state(tmp_path / "parts", 20).items():
        assert same_bits([value, saved[name]]), name
    step = rows(tmp_path / "run" / "metrics.jsonl")[0]
    assert step["wire_bytes"] == 8 * 8 + 7 * 8  # the gradients and the mean, in float64; the counter is not sent


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("count", "'run/steps' is int32 and a layer changes it by what each replica sees"),
        ("raw", "run.model changes the tf.Variable '.+': make it by self.add_weight"),
        ("random", "such as Keras's global random generator"),
    ],
)
def test_state_on_which_replicas_could_not_agree_is_refused(tmp_path, kind, words):
    with pytest.raises(UserError, match=words):
        loop.run(settings(running(kind), numbers(), keras.losses.MeanSquaredError), tmp_path / "run")


def spectral():
    low = keras.layers.Dense(4, "tanh", name="low")
    layers = [keras.layers.SpectralNormalization(low, name="sn"), keras.layers.Dense(1, name="top")]
    return keras.Sequential([keras.Input((7,)), *layers])


def test_a_layer_that_assigns_its_kernel_trains_as_on_one_device(tmp_path):
    check_against_fit(tmp_path / "run", spectral, numbers(), keras.losses.MeanSquaredError)
    assert rows(tmp_path / "run" / "metrics.jsonl")[0]["wire_bytes"] == 8 * (28 + 4 + 4 + 1)  # gradients alone
    assert "statistics/sn/vector_u" in state(tmp_path / "run", 20)


def test_a_layer_that_assigns_what_is_frozen_is_refused(tmp_path):
    rules = [("train", r"top/.*"), ("freeze", ".*")]
    made = settings(spectral, numbers(), keras.losses.MeanSquaredError, rules=rules)
    with pytest.raises(UserError, match=r"'sn/low/kernel' is frozen \(freeze \.\*\), and its layer changes it"):
        loop.run(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_the_factory_froze_and_a_layer_changes_is_saved(tmp_path):
    def frozen():
        model = spectral()
        model.layers[0].trainable = False
        return model

    loop.run(settings(frozen, numbers(), keras.losses.MeanSquaredError, steps=3), tmp_path / "run")
    loss = rows(tmp_path / "run" / "metrics.jsonl")[-1]["loss"]
    saved = state(tmp_path / "run", 3)
    low = np.tanh(numbers()[0] @ saved["statistics/sn/low/kernel"])
    outputs = low @ saved["variables/top/kernel"] + saved["variables/top/bias"]
    assert loss == pytest.approx(np.mean((outputs - numbers()[1]) ** 2), rel=1e-9)


def test_what_is_frozen_is_looked_at_before_each_save(tmp_path):
    kept = []

    def model():
        kept.append(keras.Sequential([keras.Input((7,)), keras.layers.Dense(4, name="low"), keras.layers.Dense(1)]))
        return kept[-1]

    class Meddling(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            super().update_step(gradient, variable, learning_rate)
            kept[-1].layers[0].kernel.assign_add(keras.ops.ones((7, 4)))

    told = {"rules": [("freeze", r"low/.*"), ("train", ".*")], "steps": 2, "optimizer": Meddling}
    with pytest.raises(UserError, match="'low/kernel' is frozen and has changed by step 2; nothing is saved of it"):
        loop.run(settings(model, numbers(), keras.losses.MeanSquaredError, **told), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


def test_a_loss_that_changes_what_is_frozen_or_none_of_the_models_is_refused(tmp_path):
    kept = []

    def model():
        kept.append(keras.Sequential([keras.Input((7,)), keras.layers.Dense(4, name="low"), keras.layers.Dense(1)]))
        return kept[-1]

    def meddling():
        return lambda y, outputs: (kept[-1].layers[0].bias.assign_add([1.0] * 4), y - outputs)[1] ** 2

    def counting():
        count = keras.Variable(0.0)
        return lambda y, outputs: (count.assign_add(1.0), y - outputs)[1] ** 2

    rules = [("freeze", r"low/.*"), ("train", ".*")]
    for loss, words in ((meddling, "'low/bias' is frozen"), (counting, "run.loss changes a variable that is none of")):
        with pytest.raises(UserError, match=words):
            loop.run(settings(model, numbers(), loss, rules=rules), tmp_path / "run")


class Letters:
    size = 9

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) % 9

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)


def letters():
    ids = np.random.default_rng(0).integers(0, 9, (COUNT, 5)).astype(np.int32)
    source = ArraySource(ids[:, :-1], ids[:, 1:])
    return Dataset("letters", source, source, "1", Letters())


def recurrent():
    lstm = keras.layers.LSTM(4, dropout=0.3, recurrent_dropout=0.3, return_sequences=True, name="lstm")
    layers = [keras.layers.Embedding(9, 4, name="embedding"), lstm, keras.layers.Dense(9, name="head")]
    return keras.Sequential([keras.Input((None,), dtype="int32"), *layers])


@pytest.mark.slow
def test_nothing_but_a_step_moves_a_random_state(tmp_path):
    """Evaluating and sampling more often, or more, trains the same weights; an evaluation repeats itself."""
    for name, more in {
        "never": {},
        "often": {"eval_every": 1, "eval_first": True, "eval_examples": 5},
        "long": {"eval_every": 2, "sampling": Sampling(prompt="abc", length=12, count=2)},
    }.items():
        loop.run(
            Settings(
                rules=[("train", ".*")],
                model=recurrent,
                data=letters,
                steps=6,
                global_batch=6,
                replicas=lambda: in_process(2),
                **{"sampling": Sampling(prompt="abc", length=4), **more},
            ),
            tmp_path / name,
        )
    never = state(tmp_path / "never", 6)
    assert "generators/0" in never
    for name in ("often", "long"):
        for key, value in state(tmp_path / name, 6).items():
            assert same_bits([value, never[key]]), (name, key)


def stateful(count):
    layers = [keras.layers.LSTM(5, stateful=True, name="lstm"), keras.layers.Dense(1, name="d")]
    return lambda: keras.Sequential([keras.Input(batch_shape=(count, 4, 3)), *layers])


@pytest.mark.parametrize("count", quick([1, 6], 6))
def test_a_stateful_layer_trains_as_in_keras_and_goes_on_bit_for_bit(count, tmp_path):
    """In the batches of the run, which Keras is given; no evaluation between them moves the state."""
    x = features(4, 3)
    data, steps = (x, x.sum((1, 2))[:, None]), 6
    told = settings(
        lambda: stateful(count)(), data, keras.losses.MeanSquaredError, replicas=1, steps=steps, eval_every=2
    )
    told = dataclasses.replace(told, global_batch=count)
    loop.run(told, tmp_path / "whole")
    loop.run(dataclasses.replace(told, steps=3), tmp_path / "parts")
    loop.run(told, tmp_path / "parts")
    whole, parts = (state(tmp_path / name, steps) for name in ("whole", "parts"))
    assert all(same_bits([value, parts[name]]) for name, value in whole.items())
    cases.set_precision("float64")
    keras.utils.set_random_seed(0)
    model = stateful(count)()
    model.compile(keras.optimizers.SGD(0.05), "mse")
    order = train_batches(
        ArraySource(*data), first_step=0, global_batch=count, seed=0, context=tf.distribute.InputContext()
    )
    for batch in order.take(steps):
        model.train_on_batch(*batch)
    for path, variable in zip(selection.variable_paths(model), model.trainable_variables, strict=True):
        np.testing.assert_allclose(whole[f"variables/{path}"], variable, rtol=1e-9, err_msg=path)
    states = [value for name, value in whole.items() if name.startswith("statistics/")]
    for found, expected in zip(states, model.layers[0].states, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "built for 6 examples at a time, and reads 18 / 1 .*: bind run.global_batch = 6"),
        ({"global_batch": 6, "replicas": 2}, "train it on one replica"),
        ({"global_batch": 6, "eval_examples": 8}, "evaluation of 8 does not divide .*: bind run.eval_examples = 6"),
        ({"global_batch": 6, "accumulate": 2}, "reads 6 / 2 .*no run.accumulate"),
    ],
)
def test_a_stateful_layer_of_another_batch_is_one_line(more, words, tmp_path):
    x = features(4, 3)
    replicas = more.get("replicas", 1)
    made = settings(stateful(6), (x, x[:, 0, :1]), keras.losses.MeanSquaredError, replicas=replicas)
    more = {name: value for name, value in more.items() if name != "replicas"}
    with pytest.raises(UserError, match=words):
        loop.run(dataclasses.replace(made, **more), tmp_path)


def noisy():
    return keras.Sequential([keras.Input((7,)), keras.layers.Dropout(0.5), keras.layers.Dense(1, name="d")])


def masks(replicas, steps=3):
    """Which inputs dropout leaves in each step, on each replica: [steps, replicas, 7]."""
    made = settings(noisy, (np.ones((COUNT, 7)), np.ones((COUNT, 1))), keras.losses.MeanSquaredError, replicas=replicas)
    built = build(made, made.replicas())
    dropout, ones = built.model.layers[0], tf.ones([1, 7], tf.float64)
    strategy = built.replicas.strategy
    function = tf.function(lambda: strategy.run(lambda: dropout(ones, training=True)))
    found = [strategy.experimental_local_results(function()) for _ in range(steps)]
    return np.array([[np.asarray(each)[0] > 0 for each in step] for step in found])


def test_each_replica_draws_masks_of_its_own_and_the_first_those_of_keras():
    found = masks(4)
    patterns = {found[step, replica].tobytes() for step in range(3) for replica in range(4)}
    assert len(patterns) == 12
    assert np.array_equal(found, masks(4))
    assert np.array_equal(found[:, :2], masks(2))  # on fewer replicas the same, for those that are left
    keras.utils.set_random_seed(0)
    plain = noisy()
    drawn = [plain.layers[0](tf.ones([1, 7], tf.float64), training=True).numpy()[0] > 0 for _ in range(3)]
    assert np.array_equal(found[:, 0], drawn)


def test_masks_go_on_after_a_resume_on_any_number_of_replicas(tmp_path):
    data = numbers()
    loop.run(settings(noisy, data, keras.losses.MeanSquaredError, steps=2), tmp_path / "run")
    for replicas in (2, 3):
        made = settings(noisy, data, keras.losses.MeanSquaredError, replicas=replicas)
        built = build(made, made.replicas())
        fresh = copies(built.replicas.strategy, built.layer_state.generators[0])
        restore(built, tmp_path / "run", print)
        states = copies(built.replicas.strategy, built.layer_state.generators[0])
        assert [each[1] for each in states] == [2] * replicas
        assert [each[0] for each in states] == [each[0] for each in fresh]


def normalised():
    layers = [keras.layers.Dense(4, name="low"), keras.layers.BatchNormalization(name="norm"), keras.layers.ReLU()]
    return keras.Sequential([keras.Input((7,)), *layers, keras.layers.Dense(1, name="top")])


def test_an_evaluation_between_two_exchanges_is_of_the_model_that_is_saved(tmp_path):
    data = numbers()
    order = np.argsort(data[0].sum(1))  # so that replicas see unlike parts, whatever the order of the run
    made = settings(
        normalised, tuple(each[order] for each in data), keras.losses.MeanSquaredError, steps=3,
        reduction=LocalSGD(sync_every=5), replicas=2, eval_every=1,
    )  # fmt: skip
    loop.run(made, tmp_path / "run")
    alone = build(made, create("default"))
    restore(alone, tmp_path / "run", print)
    statistics = state(tmp_path / "run", 3)["statistics/norm/moving_mean"]
    assert statistics.shape == (2, 4) and not same_bits(statistics)
    outputs = alone.model(made.data().evaluation.x, training=False).numpy()
    # The anchors are the first weights, as no exchange was made.
    fresh = build(made, create("default"))
    for mine, theirs in zip(fresh.layer_state.moving, alone.layer_state.moving, strict=True):
        mine.assign(theirs)
    outputs = fresh.model(made.data().evaluation.x, training=False).numpy()
    assert rows(tmp_path / "run" / "metrics.jsonl")[-1]["loss"] == pytest.approx(
        np.mean((outputs - made.data().evaluation.y) ** 2), rel=1e-12
    )
