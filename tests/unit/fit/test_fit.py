"""`model.fit` with a wrapped optimizer against plain Keras on one device, the trainer, and the traced graph."""

import functools
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial import UserError, fit, partial, selection
from dist_partial.distributed import traffic
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.reductions.local_only import LocalOnly
from dist_partial.reductions.local_sgd import LocalSGD
from dist_partial.reductions.power_sgd import PowerSGD
from dist_partial.reductions.top_k import TopK
from dist_partial.selection.table import plan_table
from tests.helpers import cases
from tests.helpers.cases import CASES, GLOBAL_BATCH, OPTIONS
from tests.helpers.files import same_bits
from tests.helpers.marks import quick

RULES = CASES["two_dense"].rules
TWO = [
    selection.Rule(r"dense1/kernel"),
    selection.Rule(r"dense2/kernel", optimizer=keras.optimizers.SGD, learning_rate=0.05),
    ("freeze", r".*"),
]


def scope(mirrored, replicas):
    return mirrored(replicas) if replicas else tf.distribute.get_strategy()


def compiled(strategy, case, rules=None, optimizer=None, reduction=AllReduce(), policy=None, **options):  # noqa: B008
    with strategy.scope():
        if policy:
            keras.config.set_dtype_policy(policy)
        model = cases.build(case)
        keras.config.set_dtype_policy(keras.config.floatx())
        optimizer = optimizer() if optimizer else cases.optimizer("adam", OPTIONS["plain"])
        wrapped = partial(optimizer, rules or case.rules, model, reduction)
        model.compile(wrapped, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
    return model


def arrays(case, dtype="float32", first=0, last=cases.STEPS):
    return [np.concatenate(column) for column in zip(*cases.batches(case, dtype)[first:last], strict=True)]


def train(model, x, y, **options):
    return model.fit(x, y, batch_size=GLOBAL_BATCH, shuffle=False, verbose=0, **options).history


def sent(model, x, y):
    """Bytes that one replica hands over in a step of the function that `fit` runs."""
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(GLOBAL_BATCH, drop_remainder=True)
    # Keras keeps the compiled function in a closure.
    function = model.train_function
    inner = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))["multi_step_on_iterator"]
    iterator = iter(model.distribute_strategy.experimental_distribute_dataset(data))
    found = traffic.collectives(inner.cell_contents.get_concrete_function(iterator))
    return traffic.total(traffic._of_a_replica(found))


def planned(case, rules=None, reduction=AllReduce()):  # noqa: B008
    return selection.resolve(rules or case.rules, cases.build(case), reduction).wire_bytes


@pytest.mark.parametrize("replicas", quick([0, 1, 2, 4], 0, 2))
def test_equals_one_device(replicas, mirrored):
    cases.set_precision("float64")
    case = CASES["two_dense"]
    model = compiled(scope(mirrored, replicas), case)
    before = cases.weights(model)
    assert [v.path for v in model.trainable_variables] == ["dense1/kernel", "dense2/kernel"]
    train(model, *arrays(case, "float64"))
    after = cases.weights(model)
    cases.assert_equal(after, cases.reference(case, "adam", OPTIONS["plain"], "float64"), 1e-12)
    for name in after:
        assert (after[name].tobytes() == before[name].tobytes()) == (not name.endswith("kernel"))
    shapes = sorted(tuple(v.shape) for v in model.optimizer.variables if len(v.shape))
    assert shapes == sorted(2 * [tuple(v.shape) for v in model.trainable_variables])
    assert sent(model, *arrays(case, "float64")) == (planned(case) if replicas > 1 else 0)


@pytest.mark.parametrize("name", ["byte_transformer", "shared_embedding", "batch_norm_untrained"])
def test_models_equal_one_device(name, mirrored):
    """Sparse gradients, selected rows, and BatchNorm layers that go into inference mode."""
    cases.set_precision("float64")
    case = CASES[name]
    model = compiled(mirrored(2), case)
    train(model, *arrays(case, "float64"))
    cases.assert_equal(cases.weights(model), cases.reference(case, "adam", OPTIONS["plain"], "float64"), 1e-12)
    assert sent(model, *arrays(case, "float64")) == planned(case)


def test_float32(mirrored):
    case = CASES["two_dense"]
    model = compiled(mirrored(2), case)
    train(model, *arrays(case))
    cases.assert_equal(cases.weights(model), cases.reference(case, "adam", OPTIONS["plain"], "float32"), 1e-6)


class DenseAdam(keras.optimizers.Adam):
    """Keras updates only the rows of an embedding that the batch holds; dense, its sums are those of `partial`."""

    def apply(self, grads, trainable_variables=None):
        return super().apply([tf.convert_to_tensor(gradient) for gradient in grads], trainable_variables)


@pytest.mark.slow
def test_float32_is_as_far_from_one_device_as_plain_keras_is(mirrored):
    """The sums of a part of the batch round otherwise than the sum of all of it, and Adam magnifies small gradients."""
    case = CASES["byte_transformer"]
    model = compiled(mirrored(2), case)
    train(model, *arrays(case))
    chosen = {id(v) for v in model.optimizer.selected}
    with mirrored(2).scope():
        plain = cases.build(case)
        for mine, theirs in zip(model.variables, plain.variables, strict=True):
            theirs.trainable = id(mine) in chosen
        plain.compile(DenseAdam(0.01), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    train(plain, *arrays(case))
    expected = cases.reference(case, "adam", OPTIONS["plain"], "float32")
    cases.assert_equal(cases.weights(model), expected, 4e-6)
    for name, value in expected.items():
        ours, keras_own = (np.linalg.norm(cases.weights(each)[name] - value) for each in (model, plain))
        assert ours <= 2 * keras_own, name


@pytest.mark.parametrize(
    "reduction", quick([AllReduce(), AllReduce("bfloat16"), TopK(0.1), PowerSGD(2)], AllReduce(), PowerSGD(2)), ids=str
)
def test_reductions_equal_the_trainer(reduction, mirrored, tmp_path):
    """Also when it was saved in between, with what the replicas had not sent yet."""
    cases.set_precision("float64")
    case = CASES["two_dense"]
    strategy = mirrored(2)
    model = compiled(strategy, case, reduction=reduction)
    train(model, *arrays(case, "float64", last=10))
    model.save(tmp_path / "model.keras")
    with strategy.scope():
        model = keras.saving.load_model(tmp_path / "model.keras")
    train(model, *arrays(case, "float64", first=10))
    expected = cases.train(mirrored(2), case, all_reduce=reduction)
    cases.assert_equal(cases.weights(model), expected.after, 1e-9)
    assert sent(model, *arrays(case, "float64")) == expected.bytes_per_step == planned(case, reduction=reduction)


def test_a_rule_has_an_optimizer_of_its_own_and_callbacks_set_each_learning_rate(mirrored, tmp_path):
    cases.set_precision("float64")
    case = CASES["two_dense"]
    model = compiled(mirrored(2), case, TWO)
    x, y = arrays(case, "float64", last=5)
    callbacks = [
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2 if epoch else rate),
        keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", monitor="loss", save_best_only=True),
        keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=1, min_delta=100.0),
        keras.callbacks.EarlyStopping(monitor="loss", patience=9, restore_best_weights=True),
    ]
    history = train(model, x, y, epochs=3, callbacks=callbacks)
    # The scheduler halves twice; the plateau is seen in epochs 2 and 3, after which nothing is trained any more.
    rates = [key for key in history if key.startswith("learning_rate_")]
    assert len(rates) == 2 and (tmp_path / "best.keras").exists()

    expected = cases.build(case)
    chosen = {v.path.removeprefix(f"{expected.name}/"): v for v in expected.trainable_variables}
    adam, sgd = keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.05)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for epoch in range(3):
        if epoch:
            for each in (adam, sgd):
                each.learning_rate = float(each.learning_rate.numpy()) / (2 if epoch == 1 else 4)
        for x_part, y_part in zip(np.split(x, 5), np.split(y, 5), strict=True):
            with tf.GradientTape() as tape:
                value = loss(y_part, expected(x_part, training=True))
            one, two = tape.gradient(value, [chosen["dense1/kernel"].value, chosen["dense2/kernel"].value])
            adam.apply([one], [chosen["dense1/kernel"]])
            sgd.apply([two], [chosen["dense2/kernel"]])
    cases.assert_equal(cases.weights(model), cases.weights(expected), 1e-12)


def test_callbacks_see_one_learning_rate(mirrored):
    model = compiled(mirrored(2), CASES["two_dense"])
    history = train(
        model,
        *arrays(CASES["two_dense"], last=2),
        epochs=2,
        callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)],
    )
    np.testing.assert_allclose(history["learning_rate"], [0.005, 0.0025], rtol=1e-6)
    assert int(model.optimizer.iterations.numpy()) == 4


def test_clips_the_sum(mirrored):
    """Keras by itself clips each replica's own gradient."""
    cases.set_precision("float64")
    case = CASES["two_dense"]
    model = compiled(mirrored(2), case, optimizer=lambda: keras.optimizers.SGD(0.05, 0.9, global_clipnorm=0.05))
    train(model, *arrays(case, "float64"))
    cases.assert_equal(cases.weights(model), cases.reference(case, "momentum", OPTIONS["clip"], "float64"), 1e-12)


@pytest.mark.parametrize(
    ("replicas", "rules", "policy"),
    [
        (0, RULES, None),
        (2, TWO, "mixed_float16"),
        (2, [selection.Rule("dense1/kernel", rows=(3, 99)), ("freeze", ".*")], None),
    ],
)
def test_a_loaded_model_goes_on_with_the_same_bits(replicas, rules, policy, mirrored, tmp_path):
    case, strategy = CASES["two_dense"], scope(mirrored, replicas)
    model = compiled(strategy, case, rules, policy=policy)
    train(model, *arrays(case, last=10))
    model.save(tmp_path / "model.keras")
    with strategy.scope():
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is type(model.optimizer)
    for old, new in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        assert old.numpy().tobytes() == new.numpy().tobytes(), old.path
    for each in (model, loaded):
        train(each, *arrays(case, first=10))
    assert [v.path for v in loaded.trainable_variables] == [v.path for v in model.trainable_variables]
    for name, value in cases.weights(model).items():
        assert value.tobytes() == cases.weights(loaded)[name].tobytes(), name


@keras.saving.register_keras_serializable(package="test_fit")
class Subclassed(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.below, self.head = keras.layers.Dense(4, name="below"), keras.layers.Dense(2, name="head")
        self.norm = keras.layers.BatchNormalization(name="norm")

    def call(self, x, training=None):
        return self.head(self.norm(self.below(x), training=training))


def test_a_subclassed_model_is_put_back_into_inference_mode(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))
    model = Subclassed()
    model(x)
    model.compile(partial("adam", [("train", "head/.*"), ("freeze", ".*")], model), loss="mse")
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    with pytest.raises(UserError, match=r"'norm/gamma' was in inference mode .*fit.resume\(model\)"):
        loaded.fit(x, y, verbose=0)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    fit.resume(loaded)
    for each in (model, loaded):
        each.fit(x, y, verbose=0, epochs=3, shuffle=False)
    for old, new in zip(model.variables, loaded.variables, strict=True):
        assert old.numpy().tobytes() == new.numpy().tobytes(), old.path


def test_overflow_on_one_replica_skips_the_update_on_both(mirrored):
    strategy = mirrored(2)
    keras.config.set_dtype_policy("mixed_float16")
    with strategy.scope():
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, name="dense")])
        optimizer = partial(keras.optimizers.SGD(0.1), [("train", ".*")], model)
        model.compile(optimizer, loss=lambda y, outputs: tf.reduce_sum(outputs, 1))
    x = np.ones([3, 2, 1], np.float32)
    x[1, 1] = np.inf  # the second step, and there the second replica
    weights = []
    for batch in x:
        model.fit(batch, np.zeros([2, 1]), batch_size=2, verbose=0, shuffle=False)
        weights.append([float(np.squeeze(copy)) for copy in cases.copies(strategy, model.weights[0])])
    assert all(one == two for one, two in weights)
    np.testing.assert_allclose(np.diff([one for one, _ in weights]), [0.0, -0.1], atol=1e-6)
    assert float(optimizer.dynamic_scale.numpy()) == 2.0**14
    assert int(optimizer.iterations.numpy()) == 2


@pytest.mark.parametrize("frozen", [True, False])
def test_backprop_ends_at_the_lowest_selected_layer(frozen):
    calls = []

    class Counts(keras.layers.Layer):
        def call(self, x):
            @tf.custom_gradient
            def same(x):
                def backward(dy):
                    return tf.numpy_function(lambda v: calls.append(1) or v, [dy], dy.dtype, stateful=False)

                return tf.identity(x), backward

            return same(x)

    layers = [keras.layers.Dense(4, name="below"), Counts(), keras.layers.Dense(2, name="head")]
    model = keras.Sequential([keras.Input((3,)), *layers])
    rules = [("train", "head/.*"), ("freeze", ".*")] if frozen else [("train", ".*")]
    model.compile(partial(keras.optimizers.SGD(0.1), rules, model), loss="mse")
    model.fit(np.ones([6, 3]), np.zeros([6, 2]), batch_size=2, verbose=0)
    assert len(calls) == (0 if frozen else 3)


def test_steps_per_execution_and_xla_change_nothing():
    case = CASES["two_dense"]
    results = []
    for options in ({}, {"steps_per_execution": 5}, {"jit_compile": True}):
        model = compiled(tf.distribute.get_strategy(), case, **options)
        train(model, *arrays(case))
        results.append(cases.weights(model))
    for result in results[1:]:
        cases.assert_equal(result, results[0], 1e-6)


def small():
    return keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, name="below"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(2, name="head"),
        ],
        name="small",
    )


def test_another_table_begins_from_the_whole_model():
    model = small()
    model.layers[0].bias.trainable = False  # by the user, and stays so
    partial("sgd", [("train", "head/.*"), ("freeze", ".*")], model)
    assert not model.layers[1].trainable
    with pytest.raises(UserError, match="matches no variable"):
        partial("sgd", [("train", "nothing"), ("freeze", ".*")], model)
    assert [v.path for v in model.trainable_variables] == ["small/head/kernel", "small/head/bias"]
    partial("sgd", [("train", "norm/.*"), ("freeze", ".*")], model)
    assert [v.path for v in model.trainable_variables] == ["small/norm/gamma", "small/norm/beta"]
    fit.release(model)
    assert len(model.trainable_variables) == 5 and model.layers[1].trainable


HEAD, NORM = [("train", "head/.*"), ("freeze", ".*")], [("train", "norm/.*"), ("freeze", ".*")]


def begun(freeze=lambda model: None, weights=None):
    keras.utils.set_random_seed(3)
    model = small()
    if weights:
        model.set_weights(weights)
    freeze(model)
    return model


def fitted(model, optimizer):
    rng = np.random.default_rng(0)
    model.compile(optimizer, "mse")
    train(model, rng.normal(size=(96, 3)), rng.normal(size=(96, 2)), epochs=2)
    return model.get_weights()


def freeze_norm(model):
    model.get_layer("norm").trainable = False


def freeze_gamma(model):
    model.get_layer("norm").gamma.trainable = False


def freeze_but_norm(model):
    model.get_layer("below").trainable = model.get_layer("head").trainable = False


def same_weights(one, other):
    return all(same_bits(pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "freeze", quick([lambda model: None, freeze_norm, freeze_gamma], freeze_norm), ids=["all", "norm", "gamma"]
)
def test_what_is_released_trains_as_in_plain_keras(freeze, mirrored):
    """Also where the user has frozen a BatchNorm layer, or a variable of one, before."""
    with mirrored(2).scope():
        model = begun(freeze)
        before = [v.trainable for v in model.variables]
        statistics = model.get_weights()[4:6]
        after = fitted(model, partial("sgd", HEAD, model))
        assert same_weights(after[4:6], statistics)  # it was in inference mode
        fit.release(model)
        assert [v.trainable for v in model.variables] == before
        expected = fitted(begun(freeze, after), "sgd")
        assert same_weights(fitted(model, "sgd"), expected)
        assert same_weights(expected[4:6], statistics) == (freeze is freeze_norm)


@pytest.mark.slow
def test_other_rules_train_what_the_first_froze_as_in_plain_keras(mirrored):
    with mirrored(2).scope():
        model = begun()
        after = fitted(model, partial("sgd", HEAD, model))
        assert same_weights(fitted(model, partial("sgd", NORM, model)), fitted(begun(freeze_but_norm, after), "sgd"))
        frozen = begun(freeze_norm)
        partial("sgd", HEAD, frozen)
        with pytest.raises(UserError, match="'norm/gamma', which the model's own code has frozen"):
            partial("sgd", NORM, frozen)
        assert same_weights(
            fitted(frozen, partial("sgd", [("train", ".*")], frozen)), fitted(begun(freeze_norm), "sgd")
        )


def test_a_loaded_model_is_released_whole(tmp_path):
    model = begun()
    fitted(model, partial("sgd", HEAD, model))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    with pytest.raises(UserError, match="matches no variable"):
        partial("sgd", [("train", "nothing"), ("freeze", ".*")], loaded)
    assert not loaded.get_layer("norm").trainable and len(loaded.trainable_variables) == 2
    fit.release(loaded)
    assert loaded.get_layer("norm").trainable and len(loaded.trainable_variables) == 6
    assert same_weights(fitted(loaded, "sgd"), fitted(begun(weights=model.get_weights()), "sgd"))


def test_what_is_thawed_after_it_is_refused():
    model = small()
    model.compile(partial("sgd", [("train", "head/.*"), ("freeze", ".*")], model), loss="mse")
    model.layers[0].kernel.trainable = True
    with pytest.raises(UserError, match="'small/below/kernel' was made trainable after"):
        model.fit(np.ones([2, 3]), np.zeros([2, 2]), verbose=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rules": [("train", "haed/.*"), ("freeze", ".*")]}, "matches no variable; nearest: 'head/bias'"),
        ({"rules": [("train", "head/.*")]}, "no rule covers 'below/kernel'"),
        ({"rules": [("freeze", ".*")]}, "the rules train nothing"),
        ({"rules": []}, "rules is []: write a list"),
        ({"rules": "train"}, "rules is 'train': it is a str and no list; write a list such as [('train'"),
        ({"rules": [("train", ".*"), ("train", "head/.*")]}, "never applies: rule 1 ('.*') is before it"),
        ({"rules": [("trian", ".*")]}, "rule 1 is ('trian', '.*'): write ('train', pattern)"),
        ({"rules": [selection.Rule(".*", lora=2)]}, "call enable_lora(2) of the layer and match"),
        (
            {"rules": lambda: [selection.Rule(".*", optimizer="sgd")]},
            "give what makes one, such as keras.optimizers.SGD",
        ),
        (
            {"rules": lambda: [selection.Rule(".*", optimizer=keras.optimizers.SGD(0.1))]},
            "give what makes one, such as keras.optimizers.SGD (in a gin file @keras.optimizers.SGD) without ()",
        ),
        ({"rules": [selection.Rule(".*", optimizer=dict)]}, "is {}: give a factory, such as keras.optimizers.Adam"),
        (
            {"rules": [selection.Rule(".*", reduction=LocalOnly())]},
            "rule '.*': model.fit cannot reduce by LocalOnly (local only)",
        ),
        ({"rules": lambda: [selection.Rule(".*", reduction="sum")]}, "reduction is 'sum': give one such as AllReduce"),
        ({"optimizer": None}, "partial was given None: pass a Keras optimizer such as keras.optimizers.Adam(1e-3)"),
        ({"optimizer": "adamm"}, "'adamm': pass a Keras optimizer"),
        ({"optimizer": keras.optimizers.Adam}, "pass a Keras optimizer"),
        ({"optimizer": lambda: partial("sgd", [("train", ".*")], small())}, "wrapped already"),
        ({"optimizer": lambda: keras.optimizers.SGD(gradient_accumulation_steps=2)}, "accumulates gradients"),
        ({"optimizer": lambda: keras.optimizers.SGD(use_ema=True)}, "averages weights"),
        ({"optimizer": lambda: keras.optimizers.SGD(loss_scale_factor=8.0)}, "scales the loss by itself"),
        (
            {"optimizer": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())},
            "scales the loss by itself",
        ),
        ({"optimizer": lambda: built(keras.optimizers.SGD())}, "has slots for other variables already"),
        ({"reduction": LocalOnly()}, "(local only): take one of AllReduce, Quantized, TopK, PowerSGD"),
        ({"reduction": LocalSGD(4)}, "cannot reduce by LocalSGD (every 4 steps)"),
        ({"reduction": AllReduce}, "give one such as AllReduce()"),
        ({"model": keras.Sequential([keras.layers.Dense(2)], name="empty")}, "'empty' has no variables yet"),
        ({"model": np.zeros([9, 9])}, "...: the third argument is the Keras model"),
        ({"optimizer": np.zeros([9, 9])}, "...: pass a Keras optimizer"),
        ({"model": "small"}, "'small': the third argument is the Keras model"),
    ],
)
def test_bad_input(arguments, message):
    optimizer = arguments.get("optimizer", "sgd")
    if callable(optimizer) and not isinstance(optimizer, type):
        optimizer = optimizer()
    rules = arguments.get("rules", [("train", "head/.*"), ("freeze", ".*")])
    with pytest.raises(UserError, match=re.escape(message)) as error:
        rules = rules() if callable(rules) else rules
        partial(optimizer, rules, arguments.get("model", small()), arguments.get("reduction", AllReduce()))
    assert "\n" not in str(error.value)
    # What only a gin file has is named as such, beside what Python has.
    assert not re.search(
        r"(?<!in a gin file )@|\b(un)?bind\b|(?<!dist_partial\.train: )(?<![(])(?<!has )run\.", str(error.value)
    )


def test_what_an_overflow_would_spoil_is_refused():
    """What is left of an infinite gradient is infinite, and so would all later sums be."""
    keras.config.set_dtype_policy("mixed_float16")
    model = keras.Sequential([keras.Input((300,)), keras.layers.Dense(1, name="dense")])
    with pytest.raises(UserError, match=r"rule '\.\*': under mixed_float16 .* which TopK \(top 0\.1 .*\) cannot"):
        partial("sgd", [("train", ".*")], model, TopK(0.1))
    partial("sgd", [selection.Rule(".*/bias", reduction=TopK(0.1)), ("freeze", ".*")], model)  # which is sent whole


def test_an_optimizer_from_outside_the_strategy_is_refused(mirrored):
    optimizer = keras.optimizers.SGD()
    with mirrored(2).scope():
        model = small()
        with pytest.raises(UserError, match="make both inside the same strategy"):
            partial(optimizer, [("train", ".*")], model)


def towers():
    def tower(name):
        x = keras.Input((3,))
        return keras.Model(x, keras.layers.Dense(2, "tanh", name="hidden")(x), name=name)

    keras.utils.set_random_seed(3)
    x = keras.Input((3,))
    return keras.Model(x, keras.layers.Dense(2, name="head")(keras.layers.Add()([tower("left")(x), tower("right")(x)])))


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_one_of_two_towers_trains_as_in_plain_keras(policy, tmp_path):
    """Their layers have the same paths in Keras, by which a saved optimizer cannot tell them apart."""
    x, y = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32), np.arange(16) % 2
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    keras.config.set_dtype_policy(policy)
    ours, theirs = towers(), towers()
    ours.compile(partial(keras.optimizers.Adam(0.05), [("train", r"right/.*"), ("freeze", ".*")], ours), loss)
    for layer in (theirs.get_layer("left"), theirs.get_layer("head")):
        layer.trainable = False
    theirs.compile(keras.optimizers.Adam(0.05), loss)
    for model in (ours, theirs):
        model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0)
    for one, other in zip(ours.variables, theirs.variables, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 if policy == "float32" else 1e-3)
    ours.save(tmp_path / "ours.keras")
    keras.saving.load_model(tmp_path / "ours.keras", compile=False)
    with pytest.raises(UserError, match=r"trains 'right/hidden/kernel', .*: load it with compile=False"):
        keras.saving.load_model(tmp_path / "ours.keras")


def looked_up():
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Embedding(6, 2, name="embedding"), keras.layers.Flatten(), keras.layers.Dense(1, name="d")]
    return keras.Sequential([keras.Input((2,), dtype="int32"), *layers])


@pytest.mark.parametrize("name", quick(["adam", "momentum"], "adam"))
@pytest.mark.parametrize("ids", [[[0, 1], [2, 3], [4, 5], [1, 2]], [[0, 0], [2, 0], [4, 5], [1, 1]]])
def test_gradients_of_ids_that_a_batch_repeats_are_added_before_they_are_squared(ids, name, mirrored):
    """Where none is repeated, and for optimizers that square nothing, this is plain Keras, also for rows left out."""
    cases.set_precision("float64")
    x, y = np.array(ids), np.arange(4.0)[:, None]
    optimizer = functools.partial(cases.optimizer, name, OPTIONS["plain"])
    with mirrored(2).scope():
        ours = looked_up()
        ours.compile(partial(optimizer(), [("train", ".*")], ours), "mse")
    plain, dense = looked_up(), looked_up()
    plain.compile(optimizer(), "mse")
    for model in (ours, plain):
        model.fit(x, y, batch_size=2, epochs=3, shuffle=False, verbose=0)
    weights, summed = dense.trainable_variables, optimizer()
    for first in [0, 2] * 3:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((dense(x[first : first + 2]) - y[first : first + 2]) ** 2)
        gradients = tape.gradient(loss, [v.value for v in weights])
        summed.apply([tf.convert_to_tensor(gradient) for gradient in gradients], weights)
    tables = [np.array(model.get_layer("embedding").embeddings) for model in (ours, dense, plain)]
    np.testing.assert_allclose(tables[0], tables[1], rtol=1e-9)
    alike = name == "momentum" or all(len(set(pair)) == 4 for pair in np.reshape(ids, (2, 4)).tolist())
    assert np.allclose(tables[0], tables[2], rtol=1e-9) == alike


@pytest.mark.parametrize("count", quick([16, 17], 17))
def test_a_last_batch_that_replicas_do_not_share_evenly_is_that_of_plain_keras_on_as_many(count, mirrored):
    """Keras divides by each replica's own examples, so that those of the smaller part weigh more."""
    cases.set_precision("float64")
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(count, 3)), rng.normal(size=(count, 1))

    def trained(replicas, wrapped):
        with scope(mirrored, replicas).scope():
            keras.utils.set_random_seed(3)
            layers = [keras.layers.Dense(4, "tanh", name="low"), keras.layers.Dense(1, name="top")]
            model = keras.Sequential([keras.Input((3,)), *layers])
            optimizer = keras.optimizers.Adam(0.05)
            model.compile(partial(optimizer, [("train", ".*")], model) if wrapped else optimizer, "mse")
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        return [np.array(v) for v in model.trainable_variables]

    ours, alike, one = trained(2, True), trained(2, False), trained(0, False)
    assert all(np.allclose(a, b, rtol=1e-9) for a, b in zip(ours, alike, strict=True))
    assert all(np.allclose(a, b, rtol=1e-9) for a, b in zip(ours, one, strict=True)) == (count == 16)


def built(optimizer):
    optimizer.build(small().trainable_variables)
    return optimizer


@pytest.mark.parametrize("rules", [RULES, TWO], ids=["one optimizer", "two"])
def test_the_plan_prints_as_the_commands_table(rules, tmp_path):
    """Also that of a loaded model, which has the table of rules and what they freeze."""
    model = compiled(tf.distribute.get_strategy(), CASES["two_dense"], rules)
    expected = plan_table(selection.resolve(rules, cases.build(CASES["two_dense"]), AllReduce()), 1)
    assert str(model.optimizer.plan) == expected
    model.save(tmp_path / "model.keras")
    assert str(keras.saving.load_model(tmp_path / "model.keras").optimizer.plan) == expected


def test_the_learning_rate_is_the_one_that_is_set():
    """Of the rules that name none, though another's optimizer is the first; and logs have each rule's."""
    layers = [keras.layers.Dense(2, name="a"), keras.layers.Dense(2, name="b"), keras.layers.Dense(1, name="c")]
    model = keras.Sequential([keras.Input([2]), *layers])
    rules = [selection.Rule("a/.*", learning_rate=1e-4), selection.Rule("b/.*", learning_rate=1e-3), ("train", "c/.*")]
    optimizer = partial(keras.optimizers.Adam(1e-2), rules, model)
    assert float(optimizer.learning_rate) == pytest.approx(1e-2)
    optimizer.learning_rate = 0.5
    assert float(optimizer.learning_rate) == 0.5
    model.compile(optimizer, "mse")
    callback = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    history = model.fit(np.ones([4, 2]), np.ones([4, 1]), verbose=0, callbacks=[callback]).history
    rates = [value[0] for name, value in history.items() if name.startswith("learning_rate")]
    np.testing.assert_allclose(rates, [5e-5, 5e-4, 0.25], rtol=1e-5)
    assert repr(optimizer) == "<Partial of Adam, Adam, Adam: trains 15 parameters; its plan says which>"


def test_misspelt_arguments_say_what_is_near():
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    with pytest.raises(UserError, match=r"^partial has no argument 'accumulat'; nearest: 'accumulate'"):
        partial("adam", [("train", ".*")], model, accumulat=2)
    with pytest.raises(UserError, match=r"^SelectionScheduler has no argument 'seeed'; nearest: 'seed'"):
        fit.SelectionScheduler(None, seeed=1)
