"""Data as a run reads it: through functions, in shares, from tf.data, slower than its steps, and very large."""

import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial.config.settings import Settings
from dist_partial.data import ArraySource, Dataset, Stream, dataset, mix, train_batches
from dist_partial.errors import Raised, UserError
from dist_partial.training import loop
from dist_partial.training.build import batches, build
from dist_partial.training.times import DataWaits
from tests.helpers.files import rows
from tests.helpers.strategies import in_process

X = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
Y = (X.sum(axis=1) > 0).astype(np.int32)
RULES = [("train", "head/.*"), ("freeze", ".*")]


def model():
    return keras.Sequential([keras.Input([3]), keras.layers.Dense(4, name="body"), keras.layers.Dense(2, name="head")])


def fixed():
    """The same model whatever the seed of the run."""
    made = model()
    made.set_weights([np.linspace(-1, 1, weight.size).reshape(weight.shape) for weight in made.get_weights()])
    return made


def still():
    return keras.optimizers.SGD(0.0)


def arrays(count=40):
    return Dataset("numbers", ArraySource(X[:count], Y[:count]), ArraySource(X[:16], Y[:16]), "1")


def noisy(x, y, seed):
    return x + tf.random.stateless_normal([3], seed), y


def mixed():
    return mix([(arrays(), 3), (arrays(7).map(lambda x, y: (-x, y)), 1)]).map(noisy)


def streamed():
    def make():
        return tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(40, seed=1)

    return Dataset("stream", Stream(make), Stream(make), "1").map(noisy)


def losses(folder, data, steps, **settings):
    loop.run(
        Settings(**{"rules": RULES, "model": model, "data": data, "steps": steps, "global_batch": 12} | settings),
        folder,
    )
    return [row["loss"] for row in rows(folder / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("data", [lambda: arrays().map(noisy), mixed, streamed])
def test_a_run_goes_on_as_if_it_had_not_stopped_and_replicas_train_on_the_same(data, tmp_path):
    whole = losses(tmp_path / "whole", data, 9, class_weight={1: 3.0})
    losses(tmp_path / "parts", data, 5, class_weight={1: 3.0})
    parts = losses(tmp_path / "parts", data, 9, class_weight={1: 3.0})
    assert [loss for loss in parts if loss in whole] == whole  # beside the evaluation of the first part
    both = losses(tmp_path / "both", data, 9, class_weight={1: 3.0}, replicas=lambda: in_process(2))
    np.testing.assert_allclose(both, whole, rtol=1e-5)


@pytest.mark.parametrize("numpy", [False, True])
def test_evaluations_of_a_run_draw_the_same_and_those_of_another_seed_others(numpy, tmp_path):
    """Of a model that stays as it is, and that gives no loss but that of the noise."""

    def jittered(x, y, rng=None, seed=None):
        noise = rng.normal(size=3) if numpy else tf.random.stateless_normal([3], seed)
        return (x + noise).astype(np.float32) if numpy else x + noise, y

    def data():
        return arrays().map(lambda x, y: (x, y), evaluation=jittered, numpy=numpy)

    found = {}
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        losses(tmp_path / name, data, 4, seed=seed, eval_every=2, optimizer=still, model=fixed)
        measured = [row["loss"] for row in rows(tmp_path / name / "metrics.jsonl") if row["split"] == "eval"]
        assert len(measured) == 2 and len(set(measured)) == 1
        found[name] = measured[0]
    assert found["one"] == found["again"] != found["other"]


CELL = """
import tensorflow as tf
STRENGTH = 0.1
def jitter(x, y, seed):
    return x + STRENGTH * tf.random.stateless_normal([3], seed), y
train(lambda: arrays().map(jitter).map(lambda x, y: (x / 2, y)))
"""


def test_a_cell_that_is_run_again_goes_on_and_one_that_computes_something_else_is_refused(tmp_path):
    """Where the functions are made again, and those of an earlier cell are there yet."""
    steps = iter([2, 4, 6, 8, 8])
    names = {"__name__": "__main__", "arrays": arrays}
    names["train"] = lambda data: losses(tmp_path / "run", data, next(steps))
    exec(CELL, names)
    exec(CELL, names)
    exec(CELL.replace("def jitter", "# another line\n\ndef jitter"), names)
    for old, new, words in (
        ("STRENGTH = 0.1", "STRENGTH = 0.2", r"jitter of run\.data: STRENGTH was 0\.1 and is now 0\.2"),
        ("x / 2", "x / 3", r"<lambda> of run\.data has other code"),
    ):
        with pytest.raises(UserError, match=rf"belongs to another run: {words}; choose another --run_dir, or restore"):
            exec(CELL.replace(old, new), names)


def test_a_function_that_cannot_be_repeated_is_said_and_trains(tmp_path, capsys):
    def jittered(x, y):
        return x + np.float32(np.random.normal()), y

    losses(tmp_path / "run", lambda: arrays().map(jittered, numpy=True), 4)
    said = [line for line in capsys.readouterr().out.splitlines() if "gives something else each time" in line]
    assert len(said) == 1 and said[0].startswith("jittered of run.data")


def shuffled():
    """Shuffles without a seed, each epoch by itself; what is held out, too."""

    def make():
        return tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(40, reshuffle_each_iteration=True)

    return dataset(make, lambda: make().batch(7))


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_shuffle_of_tf_data_goes_on_bit_for_bit(replicas, tmp_path, capsys):
    """Evaluations of a part of the examples, whose last batch is short, too; whatever seeds the process had."""

    def trained(folder, steps):
        settings = {"eval_every": 2, "eval_examples": 29, "replicas": lambda: in_process(replicas)}
        return losses(tmp_path / folder, shuffled, steps, **settings)

    tf.random.set_seed(5)
    whole = trained("whole", 9)
    trained("parts", 5)
    parts = trained("parts", 9)
    evaluated = rows(tmp_path / "parts" / "metrics.jsonl")[7]  # at the end of the first part
    assert (evaluated["split"], evaluated["step"]) == ("eval", 5)
    assert parts[:7] + parts[8:] == whole
    assert "other examples each time" not in capsys.readouterr().out


class Slow(ArraySource):
    def fetch(self, indices):
        time.sleep(0.1)
        return super().fetch(indices)


@pytest.mark.parametrize("data", [mixed, streamed])
def test_batches_that_are_on_a_device_before_their_steps_change_nothing(data, tmp_path, monkeypatch):
    """The second CPU device is in place of a GPU."""
    devices = tf.config.list_logical_devices
    whole = losses(tmp_path / "whole", data, 9)
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: devices("CPU" if kind == "GPU" else kind)[1:])
    losses(tmp_path / "parts", data, 5, prefetch_to_device=True)
    parts = losses(tmp_path / "parts", data, 9, prefetch_to_device=True)
    assert [loss for loss in parts if loss in whole] == whole  # beside the evaluation of the first part
    settings = Settings(rules=RULES, model=model, data=data, prefetch_to_device=True)
    x, y = next(batches(build(settings, in_process(1)), first_step=0, global_batch=12))
    assert x.device.endswith("CPU:1") and y.device.endswith("CPU:1")


@pytest.mark.parametrize(("replicas", "have"), [(1, "0 GPUs and 1 replica"), (2, "0 GPUs and 2 replicas")])
def test_batches_are_sent_ahead_to_one_replica_on_a_gpu(replicas, have, tmp_path):
    with pytest.raises(UserError, match=f"run.prefetch_to_device: it is for one replica on a GPU.* has {have}"):
        losses(tmp_path / "run", arrays, 3, prefetch_to_device=True, replicas=lambda: in_process(replicas))


def test_data_that_is_slower_than_the_steps_is_said(tmp_path, capsys):
    losses(tmp_path / "run", lambda: Dataset("slow", Slow(X, Y), ArraySource(X, Y), "1"), 20)
    said = [line for line in capsys.readouterr().out.splitlines() if "data: steps waited" in line]
    assert len(said) == 1 and "s for examples (" in said[0] and "bind run.reader_processes" in said[0]
    losses(tmp_path / "quick", lambda: arrays(), 20)
    assert "data: steps waited" not in capsys.readouterr().out


def test_slow_data_is_said_long_before_an_evaluation():
    waits, said = DataWaits(Slow(X, Y)), []
    for step in range(1, 200):
        waits.add(0.9, 1.0)
        before = len(said)
        waits.report(lambda line, step=step: said.append((step, line)), evaluated=False)
        assert len(said) <= before + 1
    # The first call is left out; then after 10 s, 20, 40 and 80 more.
    assert [step for step, _ in said] == [11, 31, 71, 151]
    assert said[0][1].startswith("data: steps waited 9.0 s of 10.0 s for examples (90 %)")


class Meeting(ArraySource):
    """Has each of 20 steps compute until so many later batches are being read, and these be read until then.

    Batches have their place in the order of the examples: that in which threads begin to read them is another one.

    Attributes:
        readers: how many.
        late: who has waited in vain.
    """

    readers = 1

    def __post_init__(self):
        self.__dict__.update(changed=threading.Condition(), read=0, steps=0, late=[])
        super().__post_init__()

    def meet(self, counted, met):
        with self.changed:
            self.__dict__[counted] += 1
            self.changed.notify_all()
            if not self.changed.wait_for(lambda: self.late or met(), timeout=30):
                self.late.append((counted, self.read, self.steps))

    def fetch(self, indices):
        if len(indices) == 12:  # else it is looked at before the run
            before = indices[0] // 12
            self.meet("read", lambda: self.steps > before - self.readers)
        return super().fetch(indices)

    def step(self, x):
        number = self.steps + 1
        self.meet("steps", lambda: self.read >= min(number + self.readers, 20))
        return x


class Step(keras.layers.Layer):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x, training=False):
        return tf.ensure_shape(tf.numpy_function(self.function, [x], x.dtype), x.shape) if training else x


@pytest.mark.parametrize("readers", [1, 4])
def test_batches_are_read_while_a_step_computes_and_neither_waits_for_more(readers, tmp_path):
    source = Meeting(np.tile(X, (6, 1)), np.tile(Y, 6))  # an epoch
    source.__dict__["readers"] = readers
    layers = [keras.Input([3]), keras.layers.Dense(4, name="body"), Step(source.step)]
    data = Dataset("meeting", source, ArraySource(X, Y), "1").in_order()
    settings = {"steps": 20, "global_batch": 12, "readers": readers, "eval_every": 7}
    head = keras.layers.Dense(2, name="head")
    loop.run(Settings(RULES, lambda: keras.Sequential([*layers, head]), lambda: data, **settings), tmp_path / "run")
    assert source.steps == 20 and not source.late


def failing(x, y):
    tf.debugging.assert_none_equal(tf.reduce_sum(x), float(X[17].sum()), message="no such colour")
    return x, y


def test_a_function_that_fails_in_a_run_names_the_example(tmp_path):
    words = r"^failing of run\.data raised InvalidArgumentError: .*no such colour.*; it is example 17$"
    data = arrays()
    data = Dataset("some", data.train, ArraySource(X[20:], Y[20:]), "1").map(failing)
    with pytest.raises(Raised, match=words) as caught:
        losses(tmp_path / "run", lambda: data, 20)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"), [(mixed, "would keep one draw"), (lambda: arrays().in_order(), "an order of its own: unbind it")]
)
def test_no_activations_are_kept_of_what_changes(data, words, tmp_path):
    with pytest.raises(UserError, match=rf"^run\.activation_cache .*{words}"):
        losses(tmp_path / "run", data, 2, activation_cache="memory")


class Large(ArraySource):
    """Has ten million examples, and counts those that are read."""

    def __len__(self):
        return 10**7

    def fetch(self, indices):
        self.__dict__["read"] = self.__dict__.get("read", 0) + len(indices)
        return super().fetch(indices % 40)


def test_ten_million_examples_start_at_once(tmp_path):
    source = Large(X, Y)
    data = Dataset("large", source, ArraySource(X, Y), "1").map(noisy)
    losses(tmp_path / "run", lambda: data, 2)
    assert source.read < 1000
    began = time.perf_counter()
    batches = train_batches(
        data.train, first_step=10**6, global_batch=128, seed=0, context=tf.distribute.InputContext()
    )
    x, _ = next(iter(batches))
    assert x.shape == (128, 3) and time.perf_counter() - began < 2
