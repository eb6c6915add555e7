"""What an optimizer reads of a variable, and what it carries, is the same for a part of the variable and for a copy."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial import UserError, partial, selection
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.selection.rules import Rule
from dist_partial.step import optimizers
from tests.helpers import cases
from tests.helpers.cases import GLOBAL_BATCH
from tests.helpers.marks import quick

STEPS = 5
ROWS = 11


def looked_up(constraint=None):
    return keras.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            keras.layers.Embedding(ROWS, 4, name="words", embeddings_constraint=constraint),
            keras.layers.Flatten(),
            keras.layers.Dense(6, activation="tanh", name="body"),
            keras.layers.Dense(5, name="head"),
        ],
        name="looked_up",
    )


def case(rules=(), constraint=None):
    return cases.Case(lambda: looked_up(constraint), list(rules), cases._ids(ROWS, 3), cases._ids(5))


def data():
    return cases.batches(case(), "float64", STEPS)


def adamw(names=None, variables=None, **options):
    optimizer = keras.optimizers.AdamW(**{"learning_rate": 0.05, "weight_decay": 0.3, **options})
    optimizer.exclude_from_weight_decay(variables, names)
    return optimizer


def muon(**options):
    return keras.optimizers.Muon(0.02, exclude_embeddings=False, **options)


# Optimizers of a model, and the embedding's constraint; TensorFlow's name of a variable is its layer's, too.
KINDS = {
    "constraint": (lambda model: keras.optimizers.SGD(0.5, 0.9), keras.constraints.UnitNorm(axis=0)),
    "names": (lambda model: adamw(["words/", "bias"]), None),
    "variables": (lambda model: adamw(None, model.trainable_variables[:2]), None),
    "path": (lambda model: muon(exclude_layers=["words/"]), None),
    "shape": (lambda model: muon(), None),
}


def plain(make, constraint=None, rows=None, parts=lambda variables: [variables]):
    """Plain Keras on one device; other rows than `rows` are put back after each step."""
    model = cases.build(case(constraint=constraint))
    variables = list(model.trainable_variables)
    made = [(make(model), part) for part in parts(variables)]
    for x, y in data():
        with tf.GradientTape() as tape:
            value = tf.reduce_mean(cases.loss(y, model(x, training=True)))
        found = tape.gradient(value, [v.value for v in variables])
        gradients = {v.path: tf.convert_to_tensor(g).numpy() for v, g in zip(variables, found, strict=True)}
        before = variables[0].numpy()
        if rows:
            gradients[variables[0].path][: rows[0]] = gradients[variables[0].path][rows[1] :] = 0
        for optimizer, part in made:
            optimizer.apply([tf.constant(gradients[v.path]) for v in part], part)
        if rows:
            after = variables[0].numpy()
            after[: rows[0]], after[rows[1] :] = before[: rows[0]], before[rows[1] :]
            variables[0].assign(after)
    return cases.weights(model)


def stepped(strategy, make, constraint, rows):
    models = []  # the factories are called once the model is made
    factory = lambda: make(models[0])  # noqa: E731
    rules = [Rule("words/.*", rows=rows, optimizer=factory), Rule(".*", optimizer=factory)]
    build = lambda: models.append(looked_up(constraint)) or models[0]  # noqa: E731
    each = cases.Case(build, rules, cases._ids(ROWS, 3), cases._ids(5))
    return cases.train(strategy, each, data=data()).after


def fitted(strategy, make, constraint=None, rows=None, rules=None, path=None):
    """By `model.fit`; saved and loaded after two steps if there is a path."""
    rules = rules or [Rule("words/.*", rows=rows), ("train", ".*")]
    with strategy.scope():
        model = cases.build(case(constraint=constraint))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(partial(make(model), rules, model), loss=loss)
    x, y = (np.concatenate(column) for column in zip(*data(), strict=True))
    cut = 2 * GLOBAL_BATCH if path else len(x)
    model.fit(x[:cut], y[:cut], batch_size=GLOBAL_BATCH, shuffle=False, verbose=0)
    if path:
        model.save(path)
        with strategy.scope():
            model = keras.saving.load_model(path)
        model.fit(x[cut:], y[cut:], batch_size=GLOBAL_BATCH, shuffle=False, verbose=0)
    return cases.weights(model)


@pytest.mark.parametrize("kind", quick(KINDS, "names", "constraint"))
def test_all_rows_are_the_whole_variable(kind, mirrored):
    cases.set_precision("float64")
    make, constraint = KINDS[kind]
    expected, strategy = plain(make, constraint), mirrored(2)
    whole, rows = (stepped(strategy, make, constraint, rows) for rows in (None, (0, ROWS)))
    for name, value in whole.items():
        assert value.tobytes() == rows[name].tobytes(), name
    cases.assert_equal(rows, expected, 1e-12)
    cases.assert_equal(fitted(strategy, make, constraint, (0, ROWS)), expected, 1e-12)


@pytest.mark.parametrize("constraint", [keras.constraints.NonNeg(), keras.constraints.UnitNorm(axis=1)])
def test_rows_are_constrained_and_the_others_stay(constraint, mirrored):
    cases.set_precision("float64")
    make = lambda model: keras.optimizers.Adam(0.05)  # noqa: E731
    expected, strategy = plain(make, constraint, (2, 9)), mirrored(2)
    for train in (stepped, fitted):
        after = train(strategy, make, constraint, (2, 9))
        cases.assert_equal(after, expected, 1e-12)
        start = cases.weights(cases.build(case()))["words/embeddings"]
        for rows in (slice(0, 2), slice(9, ROWS)):
            assert after["words/embeddings"][rows].tobytes() == start[rows].tobytes()


def padding(w):
    """The first of all rows is zero."""
    return w * keras.ops.cast(keras.ops.arange(w.shape[0])[:, None] > 0, w.dtype)


@pytest.mark.parametrize(
    ("constraint", "name"),
    [
        (keras.constraints.UnitNorm(axis=0), "UnitNorm"),
        (keras.constraints.MaxNorm(2), "MaxNorm"),
        (keras.constraints.MinMaxNorm(1e-4, 1e-3, rate=0.05), "MinMaxNorm"),
        (lambda w: w - keras.ops.mean(w), "<lambda>"),
        (padding, "padding"),
        (lambda w: w * np.ones([ROWS, 1], np.float32), "<lambda>"),
    ],
)
def test_a_constraint_in_which_other_rows_count_is_refused(constraint, name):
    message = rf"^rule 'words/\.\*': rows 1:9 of 'words/embeddings' cannot .* constraint {re.escape(name)}, [^\n]*$"
    model = looked_up(constraint)
    rules = [Rule("words/.*", rows=(1, 9)), ("train", ".*")]
    with pytest.raises(UserError, match=message):
        optimizers.build(selection.resolve(rules, model, AllReduce()), keras.optimizers.SGD)
    with pytest.raises(UserError, match=message):
        partial("sgd", rules, model)


def test_a_constraint_of_the_first_row_holds_for_the_first_rows():
    rules = [Rule("words/.*", rows=(0, 9)), ("train", ".*")]
    optimizers.build(selection.resolve(rules, looked_up(padding), AllReduce()), keras.optimizers.SGD)


class Scaled(keras.optimizers.AdamW):
    """Takes arguments that its config lacks, and has state of its own."""

    def __init__(self, learning_rate=0.1, scale=1.0, weight_decay=0.3, **options):
        super().__init__(learning_rate, weight_decay, **options)
        self.scale, self.first_rate = np.array([scale, 0.0]), learning_rate
        self.calls = [keras.Variable(np.zeros(2), trainable=False)]

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient * self.scale[0] + self.scale[1] + self.first_rate, variable, learning_rate)


def scaled(model, learning_rate=0.05):
    optimizer = Scaled(learning_rate, scale=3.0)
    optimizer.scale[1] = 0.25
    optimizer.exclude_from_weight_decay(var_names=["kernel"])
    return optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda model, **rate: adamw(["bias"], **rate),
        lambda model, **rate: adamw(None, model.trainable_variables[:2], **rate),
        lambda model, learning_rate=None: adamw(["head"], learning_rate=learning_rate or (lambda: 0.05)),
        scaled,
    ],
    ids=["names", "variables", "called", "class"],
)
@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
def test_a_rule_with_a_learning_rate_keeps_what_no_config_has(make, mirrored):
    cases.set_precision("float64")
    rules = [Rule("body/.*", learning_rate=0.01), ("train", ".*")]
    rates = iter([{}, {"learning_rate": 0.01}])
    expected = plain(lambda model: make(model, **next(rates)), parts=lambda v: [[v[0], *v[3:]], v[1:3]])
    cases.assert_equal(fitted(mirrored(2), make, rules=rules), expected, 1e-12)


@pytest.mark.parametrize(("given", "rows"), quick([("names", None), ("variables", (0, ROWS))], "names"))
def test_exclusions_are_saved_with_the_model(given, rows, mirrored, tmp_path):
    """Plain Keras forgets them."""
    cases.set_precision("float64")
    make = KINDS[given][0]
    cases.assert_equal(fitted(mirrored(2), make, rows=rows, path=tmp_path / "model.keras"), plain(make), 1e-12)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_exclusions_can_be_set_after_it(policy):
    keras.config.set_dtype_policy(policy)
    model = looked_up()
    optimizer = partial(adamw(learning_rate=0.1), [Rule("words/.*", rows=(1, 9)), ("train", ".*")], model)
    optimizer.exclude_from_weight_decay(var_list=model.trainable_variables[:1])
    before = [v.numpy() for v in model.trainable_variables]
    optimizer.apply([tf.zeros(v.shape) for v in model.trainable_variables], model.trainable_variables)
    decayed = [not np.array_equal(old, v.numpy()) for old, v in zip(before, model.trainable_variables, strict=True)]
    assert decayed == [False, True, False, True, False]  # biases are zero


def test_a_method_set_on_the_object_is_refused_where_it_would_be_lost():
    model, optimizer = looked_up(), adamw()
    optimizer.update_step = lambda *arguments: None
    with pytest.raises(UserError, match=r"'update_step' set on the object, which a rule's learning_rate cannot take"):
        partial(optimizer, [Rule("words/.*", learning_rate=0.1), ("train", ".*")], model)
    partial(optimizer, [("train", ".*")], model)


class Wrapper(keras.optimizers.SGD):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.MultiOptimizer(lambda variable: keras.optimizers.SGD()),
        lambda: Wrapper(keras.optimizers.Adam()),
    ],
)
def test_one_that_hands_gradients_on_is_refused(make):
    """The inner ones would sum them over the replicas once more."""
    message = r"hands gradients to other optimizers: name those in the rules"
    model = looked_up()
    with pytest.raises(UserError, match=message):
        optimizers.build(selection.resolve([("train", ".*")], model, AllReduce()), make)
    with pytest.raises(UserError, match=message):
        partial(make(), [("train", ".*")], model)
