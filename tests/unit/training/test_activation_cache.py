"""Cut models and kept activations, against the whole model and against runs that compute all each time."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial.config.settings import Sampling, Settings
from dist_partial.data import ArraySource, Dataset
from dist_partial.errors import UserError
from dist_partial.models import byte_transformer
from dist_partial.schedules.adaptive import AutoFreeze
from dist_partial.schedules.fixed import Phases
from dist_partial.training import activation_cache, loop, split_model
from tests.helpers.against_fit import COUNT, check_against_fit, features
from tests.helpers.cases import LAYERS, dataset, mlp
from tests.helpers.files import rows, same_bits, state
from tests.helpers.marks import in_turns, quick
from tests.helpers.strategies import in_process


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
    return dataset("numbers", x, y, rng.uniform(size=20).astype(np.float32))


def text() -> Dataset:
    ids = np.random.default_rng(0).integers(0, 16, (20, 9), np.int32)
    return dataset("text", ids[:, :-1], ids[:, 1:])


transformer = functools.partial(byte_transformer, layers=3, width=16, heads=2, vocabulary=16)


def variables(model, layers):
    """Those that training may change: of these layers, and what layers that are not frozen change themselves."""
    own = [v for layer in model.layers if layer.trainable for v in layer.non_trainable_variables]
    return [v for layer in model.layers if layer.name in layers for v in layer.trainable_variables] + own


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
    part = split_model.split(model, variables(model, set(trained)))
    assert (part and part.name) == name
    if part:
        x = tf.constant(np.random.default_rng(0).normal(size=(5, 6)), tf.float32)
        between = part.lower(x)
        assert len(between) == tensors
        np.testing.assert_array_equal(part.upper(between, False), model(x, training=False))


def test_stages_are_cut():
    model = transformer(tied=True)
    ids = tf.constant(text().train.fetch(np.arange(4))[0])
    part = split_model.split(model, [v for v in model.trainable_variables if "block_2" in v.path])
    assert part.name == "block_1"
    np.testing.assert_array_equal(part.upper(part.lower(ids), False), model(ids))
    assert split_model.split(model, [model.embedding.embeddings]) is None
    noisy = transformer(dropout=0.1)
    assert split_model.split(noisy, [v for v in noisy.variables if v.name == "seed_generator_state"]) is None


def activations(model, trained="d", **more):
    source = numbers().train
    given = {"rows": 5, "expected": 20, "where": "memory"} | more
    return activation_cache.Activations(source, split_model.split(model, variables(model, trained)), **given)


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


class Placed(keras.layers.Layer):
    """Rounds, as it were, each row by its place in the batch: as vectorised code may do with the last rows."""

    def call(self, x):
        return x * (1 + 1e-6 * keras.ops.expand_dims(keras.ops.arange(keras.ops.shape(x)[0], dtype=x.dtype), 1))


def placed():
    layers = [keras.layers.Dense(6, "tanh" if name != "d" else None, name=name) for name in LAYERS]
    return keras.Sequential([keras.Input((6,)), layers[0], Placed(name="placed"), *layers[1:]])


def test_after_a_stop_an_example_is_computed_where_it_was_met_first():
    source, model = numbers().train, placed()
    part = split_model.split(model, variables(model, "d"))
    rng = np.random.default_rng(2)
    batches = [rng.integers(0, 20, 10) for _ in range(9)]  # of two replicas; an example comes twice in some
    assert len(set(np.concatenate(batches[:4]))) < 20
    whole = activation_cache.Activations(source, part, 5, 20, "memory")
    for batch in batches:
        whole.fill(batch)
    for stop in (1, 4, 8):
        past = (piece for batch in batches[:stop] for piece in batch.reshape(2, 5))
        again = activation_cache.Activations(source, part, 5, 20, "memory", past)
        for batch in batches[stop:]:
            again.fill(batch)
            assert same_bits([kept.read(tf.constant(batch))[0].numpy() for kept in (whole, again)])


CASES = {
    "mlp": {"model": mlp, "rules": [("train", "[cd]/.*"), ("freeze", ".*")]},
    "one replica": {"model": mlp, "rules": [("train", "[cd]/.*"), ("freeze", ".*")], "replicas": 1},
    "branches": {"model": branches, "rules": [("train", "[cd]/.*"), ("freeze", ".*")]},
    "branches, bfloat16": {
        "model": branches,
        "rules": [("train", "[cd]/.*"), ("freeze", ".*")],
        "precision": "mixed_bfloat16",
    },
    "int8": {"model": mlp, "rules": [("train", "d/.*"), ("freeze", ".*")], "frozen_dtype": "int8"},
    "accumulated": {"model": mlp, "rules": [("train", "d/.*"), ("freeze", ".*")], "accumulate": 2, "global_batch": 8},
    "transformer": {"model": transformer, "data": text, "rules": [("train", "(block_2|head)/.*"), ("freeze", ".*")]},
    "phases": {"model": mlp, "schedule": Phases([(0, ".*"), (5, "[bcd]/.*"), (9, "d/.*"), (13, "[cd]/.*")])},
    "autofreeze": {"model": mlp, "schedule": AutoFreeze(every=3, percentile=80.0)},
}


def trained(folder, cache, case, *stops):
    """What a run that is stopped and goes on leaves: the last checkpoint, and the lines of its training."""
    given = {
        "rules": [("train", ".*")],
        "data": numbers,
        "global_batch": 6,  # so that batches straddle epochs
        "steps_per_loop": 4,
        "save_every": 7,
        "replicas": 2,
        "clip_norm": 1.0,
        "sampling": Sampling(length=1),
    }
    given |= case
    made = in_process(given["replicas"])
    given["replicas"] = lambda: made
    for steps in stops:
        keras.utils.clear_session(free_memory=False)
        loop.run(Settings(**given, activation_cache=cache, steps=steps), folder)
    return state(folder, stops[-1]), [r for r in rows(folder / "metrics.jsonl") if r["split"] != "eval"]


@pytest.mark.parametrize(
    ("name", "where"),
    in_turns(quick([*((name, "memory") for name in CASES), ("phases", "disk")], "mlp", ("phases", "disk"))),
)
def test_the_run_is_the_same_up_to_rounding(name, where, tmp_path, monkeypatch):
    filled = []
    fill = activation_cache.Activations.fill
    monkeypatch.setattr(activation_cache.Activations, "fill", lambda self, i: (filled.append(self.name), fill(self, i)))
    want, want_rows = trained(tmp_path / "computed", None, CASES[name], 18)
    assert not filled
    have, have_rows = trained(tmp_path / "kept", where, CASES[name], 18)
    tolerance = 2e-2 if "bfloat16" in name else 1e-5
    assert want.keys() == have.keys()
    for key, value in want.items():
        np.testing.assert_allclose(have[key], value, tolerance, tolerance, err_msg=key)
    for left, right in zip(want_rows, have_rows, strict=True):
        numbers_of_it = {key: value for key, value in left.items() if isinstance(value, float)}
        assert right == left | {key: pytest.approx(value, rel=tolerance) for key, value in numbers_of_it.items()}
    assert len(set(filled)) == {"phases": 2}.get(name, 1)


@pytest.mark.parametrize("name", in_turns(quick(["mlp", "accumulated", "phases", "autofreeze"], "mlp")))
def test_a_stopped_run_goes_on_with_the_same_bits(name, tmp_path):
    """Also where activations are rounded by the place of an example in its batch."""
    case = CASES[name] | {"model": placed}
    whole, whole_rows = trained(tmp_path / "whole", "memory", case, 18)
    again, again_rows = trained(tmp_path / "again", "memory", case, 7, 11, 18)
    assert whole.keys() == again.keys()
    assert all(same_bits([value, again[key]]) for key, value in whole.items())
    assert whole_rows == again_rows


def stack(*layers, shape=(6,)):
    return keras.Sequential([keras.Input(shape), keras.layers.Dense(6, name="a"), *layers])


class Tripled(keras.Model):
    def call(self, x, training=None, mask=None):
        return super().call(x, training=training, mask=mask) * 3


class TripledSequence(keras.Sequential):
    def call(self, x, training=None, mask=None):
        return super().call(x, training=training, mask=mask) * 3


class TripledOutside(keras.Sequential):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * 3


def own_call(kind):
    model = mlp()
    return kind(model.inputs, model.outputs) if kind is Tripled else kind([keras.Input((6,)), *model.layers])


def patched():
    model = mlp()
    call = model.call
    model.call = lambda x, training=None, mask=None: call(x, training=training, mask=mask) * 3
    return model


@pytest.mark.parametrize("kind", [Tripled, TripledSequence, TripledOutside, None])
def test_a_model_that_is_more_than_its_graph_is_not_cut(kind):
    model = own_call(kind) if kind else patched()
    with pytest.raises(
        UserError, match=r"run\.activation_cache splits .*, and \w+ has a call\(\) of its own: give it a method stages"
    ):
        split_model.split(model, variables(model, "d"))


def test_a_subclass_with_keras_own_call_is_cut():
    class Named(keras.Model):
        pass

    model = mlp()
    assert split_model.split(Named(model.inputs, model.outputs), variables(model, "d")).name == "c"


@pytest.mark.parametrize("training", [True, False])
def test_stages_that_are_not_the_model_are_an_error(training):
    model = mlp()
    one_by_one = [([layer], lambda x, _, layer=layer: layer(x)) for layer in model.layers]
    model.stages = lambda: one_by_one
    activations(model)
    model.stages = lambda: [*one_by_one, ([], lambda x, flag: x * (1.01 if flag == training else 1.0))]
    if training:
        with pytest.raises(
            UserError, match=r"run\.activation_cache: .*'c' and the rest are not the model.*\(0\.01 apart\)"
        ):
            activations(model)
    else:  # which stages are for training alone
        activations(model)


class BatchMean(keras.layers.Layer):
    def call(self, x):
        return x - 0.1 * keras.ops.mean(x, axis=0)


class Penalty(keras.layers.Layer):
    def call(self, x):
        self.add_loss(keras.ops.mean(x**2))
        return x


class Counter(keras.layers.Layer):
    def build(self, _):
        self.calls = self.add_weight(shape=(), trainable=False, name="calls")

    def call(self, x, training=None):
        if training:
            self.calls.assign_add(1.0)
        return x


class Dropped(keras.layers.Layer):
    def call(self, x):
        return keras.random.dropout(x, 0.5)


class Drawn(keras.layers.Layer):
    def call(self, x):
        rng = np.random.default_rng()
        drawn = tf.numpy_function(lambda x: x + rng.normal(size=x.shape).astype("f"), [x], tf.float32, stateful=False)
        return tf.ensure_shape(drawn, x.shape)


def frozen(layer):
    layer.trainable = False
    return layer


def reads_what_is_trained():
    head = keras.layers.Dense(6, name="d")
    head.build((None, 6))
    return stack(keras.layers.Lambda(lambda x: x @ head.kernel, name="tied"), head)


def folded():
    x = keras.Input((6,))
    pairs = keras.ops.reshape(keras.layers.Dense(6, name="a")(x), (-1, 3))
    return keras.Model(x, keras.ops.reshape(keras.layers.Dense(3, name="d")(pairs), (-1, 6)))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: stack(BatchMean(name="b"), last()), r"'b' depends on the other examples of a batch"),
        (lambda: stack(Drawn(name="b"), last()), r"'b' depends on the other examples of a batch, or is random"),
        (lambda: stack(Penalty(name="b"), last()), r"'b' adds to the loss \(add_loss\)"),
        (lambda: stack(frozen(Counter(name="b")), last()), r"'b' is not the same each time \(it changes .*/b/calls\)"),
        (lambda: stack(Dropped(name="b"), last()), r"'b' is not the same each time \(it changes a random state\)"),
        (reads_what_is_trained, r"'tied' reads d/kernel, which is trained"),
        (folded, r"'reshape.*' does not give each example numbers of one shape \(.* \(10, 3\) for 5\)"),
    ],
)
def test_what_an_example_alone_does_not_decide_is_an_error(make, why):
    with pytest.raises(UserError, match=rf"run\.activation_cache: what is frozen up to {why}.*: unbind it"):
        activations(make())


def last():
    return keras.layers.Dense(6, name="d")


def test_one_example_at_a_time_has_no_neighbours():
    activations(stack(BatchMean(), last()), rows=1)


def shared():
    """A frozen layer that is called below and above what is trained."""
    x, layer = keras.Input((6,)), keras.layers.Dense(6, "tanh", name="s")
    below = layer(keras.layers.Dense(6, name="a")(x))
    return keras.Model(x, layer(keras.layers.Dense(6, name="d")(below)))


def widened():
    """What crosses is float32 in a model of bfloat16, and what is above draws and adds to the loss."""
    return stack(keras.layers.LayerNormalization(dtype="float32"), last(), keras.layers.Dropout(0.5), Penalty())


@pytest.mark.parametrize(("make", "policy"), [(shared, "float32"), (widened, "mixed_bfloat16")])
def test_what_is_kept_is_what_the_model_computes(make, policy):
    keras.config.set_dtype_policy(policy)
    model, some = make(), np.arange(7, 12)
    before = [np.array(v) for v in model.variables]
    kept = activations(model)
    assert same_bits([np.concatenate([np.ravel(v) for v in values]) for values in (before, model.variables)])
    kept.fill(some)
    x, *_ = kept.read(tf.constant(some))
    with keras.StatelessScope():
        np.testing.assert_allclose(kept.outputs(x, False), model(numbers().train.fetch(some)[0]), atol=1e-6)


def test_an_example_that_is_no_number_is_kept_like_the_others():
    model, x = mlp(), numbers().train.x.copy()
    x[0], x[1, 2], x[2] = np.nan, np.inf, 0
    kept = activation_cache.Activations(
        ArraySource(x, x), split_model.split(model, variables(model, "d")), 5, 20, "memory"
    )
    kept.fill(np.arange(5))
    outputs = kept.outputs(kept.read(tf.constant(np.arange(5)))[0], False)
    np.testing.assert_array_equal(np.isnan(outputs).all(axis=1), [True, False, False, False, False])


@keras.saving.register_keras_serializable("tests")
class Noise(keras.layers.Layer):
    def call(self, x):
        return x + tf.random.normal(tf.shape(x))


def test_what_cannot_be_kept_is_an_error(monkeypatch):
    x = keras.Input((6,))
    random = keras.Model(x, keras.layers.Dense(6, name="d")(Noise(name="noise")(keras.layers.Dense(6)(x))))
    with pytest.raises(
        UserError, match=r"run\.activation_cache: what is frozen up to 'noise' is not the same each time"
    ):
        activations(random)
    masked = keras.Sequential([keras.Input((6,)), keras.layers.Embedding(9, 4, mask_zero=True, name="words")])
    masked.add(keras.layers.LSTM(3, name="d"))
    with pytest.raises(UserError, match=r"run\.activation_cache: .*words' makes a mask"):
        activations(masked)
    monkeypatch.setattr(activation_cache, "_free_memory", lambda: 479)
    with pytest.raises(UserError, match=r"needs up to 480 bytes, and 479 are free: bind run.activation_cache = 'disk'"):
        activations(mlp())


def test_what_cannot_be_kept_at_a_switch_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    """A selection that resets the slots of what it leaves has a run behind it, too, that must not be lost."""
    monkeypatch.setattr(activation_cache, "_free_memory", lambda: 0)
    made = in_process(2)
    settings = Settings(
        rules=[("train", ".*")],
        model=mlp,
        data=numbers,
        schedule=AutoFreeze(every=2, percentile=100.0),
        steps=12,
        global_batch=4,
        leave="reset",
        activation_cache="memory",
        replicas=lambda: made,
    )
    loop.run(settings, tmp_path)
    said = capsys.readouterr()
    assert "0 are free: bind run.activation_cache = 'disk', or unbind it; going on without it" in said.out + said.err


def on_frozen():
    """A layer that the user froze, below one that trains."""
    low = keras.layers.Dense(5, "tanh", name="low", trainable=False)
    return keras.Sequential([keras.Input((7,)), low, keras.layers.Dense(3, name="top")])


def classes_loss(reduction):
    return lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)


@pytest.mark.parametrize(
    ("reduction", "where"),
    quick(
        [(mean, where) for mean in ("sum_over_batch_size", "mean_with_sample_weight") for where in ("memory", "disk")],
        ("mean_with_sample_weight", "memory"),
    ),
)
def test_class_weights_are_those_of_fit(reduction, where, tmp_path, monkeypatch):
    """Activations are kept by example, and so is its weight."""
    filled = []
    fill = activation_cache.Activations.fill
    monkeypatch.setattr(
        activation_cache.Activations, "fill", lambda self, indices: (filled.append(indices), fill(self, indices))
    )
    data = features(7), np.random.default_rng(1).integers(0, 3, COUNT).astype(np.int32)
    rules = [("train", "top/.*"), ("freeze", ".*")]
    more = {"class_weight": {0: 0.25, 2: 4.0}, "activation_cache": where, "rules": rules}
    check_against_fit(tmp_path, on_frozen, data, classes_loss(reduction), steps=4, **more)
    assert filled


def test_bad_settings():
    given = {"rules": [("train", ".*")], "model": mlp, "data": numbers}
    with pytest.raises(UserError, match=r"run\.activation_cache is 'ram': write 'memory', 'disk' or None"):
        Settings(**given, activation_cache="ram")
    with pytest.raises(UserError, match=r"run\.activation_cache beside run\.jit_compile"):
        Settings(**given, activation_cache="disk", jit_compile=True)
