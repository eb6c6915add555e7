"""Cut models and kept activations, against the whole model and against runs that compute all each time."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial import prefix, run
from dist_partial.data import ArraySource, Dataset, fingerprint
from dist_partial.errors import UserError
from dist_partial.models import byte_transformer
from dist_partial.replicas import Replicas
from dist_partial.schedule import AutoFreeze, Phases
from dist_partial.settings import Sampling, Settings
from dist_partial.wire import Wire
from tests.cases import rows, same_bits, state

LAYERS = ("a", "b", "c", "d")


def mlp():
    layers = [keras.layers.Dense(6, "tanh" if name != "d" else None, name=name) for name in LAYERS]
    return keras.Sequential([keras.Input((6,)), *layers])


def branches():
    """Two tensors cross from what is frozen to the rest, BatchNorm is frozen, and the rest draws dropout."""
    x = keras.Input((6,))
    a = keras.layers.Dense(6, "relu", name="a")(x)
    n = keras.layers.BatchNormalization(name="b")(a)
    c = keras.layers.Dropout(0.3)(keras.layers.Dense(6, "relu", name="c")(n))
    return keras.Model(x, keras.layers.Dense(6, name="d")(keras.layers.Concatenate()([a, c])))


def numbers() -> Dataset:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 6)).astype(keras.config.floatx())
    y = np.argmax(x @ rng.normal(size=(6, 6)), axis=1).astype(np.int32)
    source = ArraySource(x, y, rng.uniform(size=20).astype(np.float32))
    return Dataset("numbers", source, source, fingerprint(x, y))


def text() -> Dataset:
    ids = np.random.default_rng(0).integers(0, 16, (20, 9), np.int32)
    source = ArraySource(ids[:, :-1], ids[:, 1:])
    return Dataset("text", source, source, fingerprint(ids))


transformer = functools.partial(byte_transformer, layers=3, width=16, heads=2, vocabulary=16)


def variables(model, layers):
    return [v for layer in model.layers if layer.name in layers for v in layer.trainable_variables]


@pytest.mark.parametrize(
    ("make", "trained", "name", "tensors"),
    [
        (mlp, "d", "c", 1),
        (mlp, "bd", "a", 1),
        (mlp, "ad", None, 0),
        (branches, "cd", "a and b", 2),
        (branches, "bcd", "a", 1),
        (branches, "d", "a and c", 2),  # what draws dropout is not below the cut, trained or not
    ],
)
def test_a_graph_is_cut_below_what_is_trained(make, trained, name, tensors):
    model = make()
    for layer in model.layers:  # as a run does with layers of which nothing is trained
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = "b" in trained
    part = prefix.cut(model, variables(model, set(trained)))
    assert (part and part.name) == name
    if part:
        x = tf.constant(np.random.default_rng(0).normal(size=(5, 6)), tf.float32)
        between = part.prefix(x)
        assert len(between) == tensors
        np.testing.assert_array_equal(part.suffix(between, False), model(x, training=False))


def test_stages_are_cut():
    model = transformer(tied=True)
    ids = tf.constant(text().train.fetch(np.arange(4))[0])
    part = prefix.cut(model, [v for v in model.trainable_variables if "block_2" in v.path])
    assert part.name == "block_1"
    np.testing.assert_array_equal(part.suffix(part.prefix(ids), False), model(ids))
    assert prefix.cut(model, [model.embedding.embeddings]) is None
    assert prefix.cut(transformer(dropout=0.1), []) is None


def activations(model, trained="d", **more):
    source = numbers().train
    given = {"rows": 5, "expected": 20, "where": "memory"} | more
    return prefix.Activations(source, prefix.cut(model, variables(model, trained)), **given)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_an_example_is_computed_once(where, monkeypatch):
    model = mlp()
    kept, rng = activations(model, where=where), np.random.default_rng(1)
    order = rng.permutation(20)
    kept.fill(order[:10])
    kept.fill(order[5:15])  # half of it is new
    kept.fill(np.concatenate([order[10:], order[:5]]))
    monkeypatch.setattr(kept, "_computed", None)
    for _ in range(3):
        some = rng.choice(20, 10)
        kept.fill(some)
        x, y, weight = kept.read(tf.constant(some))
        want = numbers().train.fetch(some)
        np.testing.assert_allclose(kept.outputs(x, False), model(want[0]), atol=1e-6)  # compiled, it rounds otherwise
        np.testing.assert_array_equal(y, want[1])
        np.testing.assert_array_equal(weight, want[2])


CASES = {
    "mlp": {"model": mlp, "rules": [("train", "[cd]/.*"), ("freeze", ".*")]},
    "branches": {"model": branches, "rules": [("train", "[cd]/.*"), ("freeze", ".*")]},
    "branches, bfloat16": {
        "model": branches,
        "rules": [("train", "[cd]/.*"), ("freeze", ".*")],
        "precision": "mixed_bfloat16",
    },
    "accumulated": {"model": mlp, "rules": [("train", "d/.*"), ("freeze", ".*")], "accumulate": 2, "global_batch": 8},
    "transformer": {"model": transformer, "data": text, "rules": [("train", "(block_2|head)/.*"), ("freeze", ".*")]},
    "phases": {"model": mlp, "schedule": Phases([(0, ".*"), (5, "[bcd]/.*"), (9, "d/.*"), (13, "[cd]/.*")])},
    "autofreeze": {"model": mlp, "schedule": AutoFreeze(every=3, percentile=80.0)},
}


@pytest.mark.parametrize(("name", "where"), [*((name, "memory") for name in CASES), ("phases", "disk")])
def test_the_run_has_the_same_bits(name, where, mirrored, tmp_path, monkeypatch):
    made = Replicas(mirrored(2), Wire(), "two")
    filled = []
    fill = prefix.Activations.fill
    monkeypatch.setattr(prefix.Activations, "fill", lambda self, i: (filled.append(self.name), fill(self, i)))
    given = {
        "rules": [("train", ".*")],
        "data": numbers,
        "steps": 18,
        "global_batch": 6,  # so that batches straddle epochs
        "steps_per_loop": 4,
        "save_every": 7,
        "replicas": lambda: made,
        "clip_norm": 1.0,
        "sampling": Sampling(length=1),
    }
    for folder, cache, steps in [("whole", None, 18), ("kept", where, 7), ("kept", where, 18)]:
        keras.utils.clear_session(free_memory=False)
        with pytest.MonkeyPatch.context() as patch:  # a run that is stopped has the schedule of the whole
            patch.setattr(Phases, "check", lambda *_: None)
            patch.setattr(AutoFreeze, "check", lambda *_: None)
            run.run(Settings(**given | CASES[name] | {"cache": cache, "steps": steps}), tmp_path / folder)
    left, right = state(tmp_path / "whole", 18), state(tmp_path / "kept", 18)
    assert left.keys() == right.keys()
    assert all(same_bits([value, right[key]]) for key, value in left.items())
    trained = [[r for r in rows(tmp_path / f / "metrics.jsonl") if r["split"] != "eval"] for f in ("whole", "kept")]
    if name == "accumulated":  # TensorFlow adds up what is reported of the parts in another order
        for row in [*trained[0], *trained[1]]:
            row["loss"] = round(row["loss"], 6)
    assert trained[0] == trained[1]
    assert len(set(filled)) == {"phases": 2}.get(name, 1)


@keras.saving.register_keras_serializable("tests")
class Noise(keras.layers.Layer):
    def call(self, x):
        return x + tf.random.normal(tf.shape(x))


def test_what_cannot_be_kept_is_an_error(monkeypatch):
    x = keras.Input((6,))
    random = keras.Model(x, keras.layers.Dense(6, name="d")(Noise(name="noise")(keras.layers.Dense(6)(x))))
    with pytest.raises(UserError, match=r"run\.cache: what is frozen up to 'noise' is not the same each time"):
        activations(random)
    masked = keras.Sequential([keras.Input((6,)), keras.layers.Embedding(9, 4, mask_zero=True, name="words")])
    masked.add(keras.layers.LSTM(3, name="d"))
    with pytest.raises(UserError, match=r"run\.cache: .*words' makes a mask"):
        activations(masked)
    monkeypatch.setattr(prefix, "_free_memory", lambda: 479)
    with pytest.raises(UserError, match=r"needs up to 480 bytes, and 479 are free: bind run.cache = 'disk'"):
        activations(mlp())


def test_what_cannot_be_kept_at_a_switch_does_not_end_the_run(mirrored, tmp_path, monkeypatch, capsys):
    """A selection that resets the slots of what it leaves has a run behind it, too, that must not be lost."""
    monkeypatch.setattr(prefix, "_free_memory", lambda: 0)
    made = Replicas(mirrored(2), Wire(), "two")
    settings = Settings(
        rules=[("train", ".*")],
        model=mlp,
        data=numbers,
        schedule=AutoFreeze(every=2, percentile=100.0),
        steps=12,
        global_batch=4,
        leave="reset",
        cache="memory",
        replicas=lambda: made,
    )
    run.run(settings, tmp_path)
    said = capsys.readouterr()
    assert "0 are free: bind run.cache = 'disk', or unbind it; going on without it" in said.out + said.err


def test_bad_settings():
    given = {"rules": [("train", ".*")], "model": mlp, "data": numbers}
    with pytest.raises(UserError, match=r"run\.cache is 'ram': write 'memory', 'disk' or None"):
        Settings(**given, cache="ram")
    with pytest.raises(UserError, match=r"run\.cache beside run\.jit_compile"):
        Settings(**given, cache="disk", jit_compile=True)
