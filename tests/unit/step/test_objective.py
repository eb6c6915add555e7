"""The objective: what parts of a batch give adds up to what Keras computes of the whole, and no variable changes."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial.errors import Raised, UserError
from dist_partial.step import losses
from dist_partial.step.objective import prepare, unpacked
from tests.helpers.against_fit import COUNT, check_against_fit, features, one_output
from tests.helpers.marks import quick

STEPS, CLASSES = 4, 5


def masked():
    l2 = keras.regularizers.L2(0.1)
    layers = [
        keras.layers.Embedding(CLASSES, 3, mask_zero=True, embeddings_regularizer=l2, name="embedding"),
        keras.layers.Dense(CLASSES, activity_regularizer=l2, name="head"),
    ]
    return keras.Sequential([keras.Input((STEPS,), dtype="int32"), *layers])


def batch(weighted=True):
    rng = np.random.default_rng(1)
    x, y = (rng.integers(0, CLASSES, (COUNT, STEPS)).astype(np.int32) for _ in range(2))
    weight = rng.uniform(0, 2, (COUNT, STEPS)).astype(np.float32)
    return tuple(tf.constant(each) for each in (x, y, weight)[: 3 if weighted else 2])


def cross_entropy(**more):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **more)


def prepared(model, whole, loss, **compiled):
    some = tf.nest.map_structure(lambda each: each[:3], whole)
    return prepare(model, some, model(some[0]), {"loss": losses.made(loss), **compiled})


def evaluated(model, whole, loss, **compiled):
    """What plain Keras gives for the whole in one batch, by a model of the same weights."""
    plain = keras.models.clone_model(model)
    plain.set_weights(model.get_weights())
    plain.compile(loss=loss, **compiled)
    x, y, weight = unpacked(whole)
    return plain.evaluate(x, y, sample_weight=weight, batch_size=len(x), verbose=0, return_dict=True)


def parts_of(whole, *cuts):
    edges = [0, *cuts, COUNT]
    return [tf.nest.map_structure(lambda each, a=a, b=b: each[a:b], whole) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("reduction", quick(["mean", "mean_with_sample_weight", "sum"], "mean_with_sample_weight"))
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_of_parts_of_any_size_is_that_of_the_whole(reduction, weighted):
    """Activity regularisers are means over a batch, to which parts of different sizes add by their examples."""
    model, whole = masked(), batch(weighted)
    expected = evaluated(model, whole, cross_entropy(reduction=reduction))["loss"]
    objective = prepared(model, whole, cross_entropy(reduction=reduction))
    assert objective.counts == (reduction != "sum")
    parts = parts_of(whole, 1, 7)
    counts = None
    if objective.counts:
        counts = tf.add_n([objective.counted(part, model, True) for part in parts])
        assert counts.shape == [1]
    total = 0.0
    for part in parts:
        share = len(part[0]) / COUNT
        loss, _ = objective.loss(part, model(part[0]), True, share, counts)
        total += float(loss) * share
    assert total == pytest.approx(expected, rel=1e-5)


def test_a_part_divides_by_its_own_without_counts():
    model, whole = masked(), batch()
    part = parts_of(whole, 5)[0]
    expected = evaluated(model, part, cross_entropy())["loss"]
    objective = prepared(model, whole, cross_entropy())
    assert float(objective.loss(part, model(part[0]), False)[0]) == pytest.approx(expected, rel=1e-6)


class Positive(keras.metrics.Metric):
    """The share of positive outputs, and how many there are."""

    def __init__(self, begin=0.0, **kwargs):
        super().__init__(**kwargs)
        self.begin = begin
        self.positive = self.add_weight(shape=(2,), initializer="zeros", name="positive")
        self.count = self.add_weight(initializer=keras.initializers.Constant(begin), name="count")

    def update_state(self, y_true, y_pred, sample_weight=None):
        found = keras.ops.cast(y_pred > 0, "float32")
        self.positive.assign_add(keras.ops.stack([keras.ops.sum(found), keras.ops.sum(found)]))
        self.count.assign_add(float(np.prod(y_pred.shape)))

    def result(self):
        return {"share": self.positive[0] / (self.count - self.begin), "number": self.positive[1]}


class Largest(keras.metrics.Metric):
    """No sum: the largest output."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.largest = self.add_weight(initializer="zeros", name="largest")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.largest.assign(keras.ops.maximum(self.largest, keras.ops.max(keras.ops.abs(y_pred))))

    def result(self):
        return self.largest


def test_what_parts_add_to_metrics_gives_those_of_the_whole():
    model, whole = masked(), batch()
    make = {
        "metrics": [
            lambda: Positive(2.0, name="positive"),
            lambda: keras.metrics.MeanIoU(CLASSES, sparse_y_pred=False, name="iou"),
        ],
        "weighted_metrics": [lambda: keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    }
    expected = evaluated(model, whole, cross_entropy(), **{name: [f() for f in made] for name, made in make.items()})
    objective = prepared(model, whole, cross_entropy(), **{name: [f() for f in made] for name, made in make.items()})
    assert [(each.name, each.size, each.training) for each in objective.measures] == [
        ("positive", 3, True),
        ("iou", CLASSES**2, False),
        ("accuracy", 2, True),
    ]
    assert (objective.size(True), objective.size(False)) == (5, 5 + CLASSES**2)
    variables = [np.array(variable) for variable in model.metrics_variables]
    for training in (False, True):
        sums = np.zeros(objective.size(training))
        for part in parts_of(whole, 3, 4):
            outputs = model(part[0])
            _, changed = objective.loss(part, outputs, training)
            added = objective.added(part, outputs, training, changed)
            assert added.dtype == tf.float64
            sums += added.numpy()
        found = objective.results(sums, training)
        assert found.keys() == {"accuracy", "share", "number"} | (set() if training else {"iou"})
        for name, value in found.items():
            assert value == pytest.approx(expected[name], rel=1e-6), name
    for variable, before in zip(model.metrics_variables, variables, strict=True):
        np.testing.assert_array_equal(variable, before)


def test_metrics_that_are_expensive_or_named_quiet_are_of_the_evaluation_alone():
    model, whole = one_output(), (tf.constant(features(7)), tf.constant(features(1)))
    metrics = [keras.metrics.MeanAbsoluteError(name="error"), keras.metrics.MeanSquaredError(name="square")]
    compiled = {"loss": losses.made("mse"), "metrics": metrics}
    objective = prepare(model, whole, model(whole[0]), compiled, quiet=["square"])
    assert [each.name for each in objective.chosen(True)] == ["error"]
    assert [each.name for each in objective.chosen(False)] == ["error", "square"]


def test_a_metric_that_is_no_sum_over_batches_is_refused():
    model, whole = one_output(), (tf.constant(features(7)), tf.constant(features(1)))
    with pytest.raises(UserError) as found:
        prepared(model, whole, "mse", metrics=[Largest(name="peak")])
    line = str(found.value)
    assert line.startswith("run.metrics: 'peak' keeps numbers that are no sums over batches") and "\n" not in line


def test_several_losses_have_a_metric_and_a_divisor_each():
    """The tracker of a loss is compared with that of `fit` in test_losses.py."""
    x = keras.Input((STEPS,), dtype="int32")
    embedded = keras.layers.Embedding(CLASSES, 3, mask_zero=True)(x)
    heads = [keras.layers.Dense(size, name=name)(embedded) for name, size in (("a", 1), ("b", 2), ("c", CLASSES))]
    model, ids = keras.Model(x, heads), batch()[0]
    whole = ids, [tf.zeros([COUNT, STEPS, 1]), tf.zeros([COUNT, STEPS, 2]), ids]
    objective = prepared(model, whole, ["mse", keras.losses.MeanSquaredError(reduction="sum"), cross_entropy()])
    assert objective.counts == 2
    assert [each.name for each in objective.measures] == ["a_loss", "b_loss", "c_loss"]
    real = float(np.count_nonzero(ids))
    np.testing.assert_allclose(objective.counted(whole, model, True), [real, real])


def test_an_exception_of_the_users_code_names_what_raised_it():
    def broken(y, outputs):
        if tf.inside_function():
            raise KeyError("price")
        return keras.ops.mean(keras.ops.square(y - outputs), axis=-1)

    model, whole = one_output(), (tf.constant(features(7)), tf.constant(features(1)))
    objective = prepared(model, whole, broken)
    with pytest.raises(Raised, match=r"run\.loss raised KeyError: 'price'"):
        tf.function(lambda: objective.loss(whole, model(whole[0]), True)[0])()


def test_a_compute_metrics_of_the_models_own_is_called():
    class Own(keras.Model):
        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            return super().compute_metrics(x, y, 0 * y_pred, sample_weight)

    inner = one_output()
    model, whole = Own(inner.inputs, inner.outputs), (tf.constant(features(7)), tf.ones([COUNT, 1], tf.float64))
    objective = prepared(model, whole, "mse", metrics=["mae"])
    sums = objective.added(whole, model(whole[0]), True, {})
    assert list(objective.results(np.array(sums), True).values()) == [1.0]


@pytest.mark.parametrize(
    ("batch", "expected"), [((1,), (1, None, None)), ((1, 2), (1, 2, None)), ((1, 2, 3), (1, 2, 3))]
)
def test_unpacked(batch, expected):
    assert unpacked(batch) == expected


def classifier():
    return keras.Sequential([keras.Input((7,)), keras.layers.Dense(4, name="d")])


def binary():
    return keras.Sequential([keras.Input((7,)), keras.layers.Dense(1, "sigmoid", name="d")])


METRICS = {
    "names": (classifier, "classes", ["accuracy", "sparse_categorical_crossentropy"]),
    "auc": (binary, "halves", [keras.metrics.AUC, "accuracy", keras.metrics.Precision]),
    "mean_iou": (classifier, "classes", [lambda: keras.metrics.MeanIoU(4, sparse_y_pred=False)]),
    "own": (binary, "halves", [Positive]),
}


@pytest.mark.parametrize("kind", ["metrics", "weighted_metrics"])
@pytest.mark.parametrize(("replicas", "accumulate"), [(1, 2), (2, 1), (3, 3)])
@pytest.mark.parametrize("name", quick(METRICS, "auc"))
def test_metrics_are_those_of_fit_and_evaluate(name, replicas, accumulate, kind, tmp_path):
    model, targets, metrics = METRICS[name]
    rng = np.random.default_rng(1)
    y = {"classes": rng.integers(0, 4, COUNT).astype(np.int32), "halves": rng.integers(0, 2, (COUNT, 1)) * 1.0}[targets]
    loss = keras.losses.BinaryCrossentropy if targets == "halves" else cross_entropy
    data = (features(7), y, rng.uniform(0, 3, COUNT))
    told = {"replicas": replicas, "accumulate": accumulate, "steps": 3, kind: metrics}
    # Metrics that are added up in float32, whatever the model's precision.
    check_against_fit(tmp_path / "run", model, data, loss, tolerance=1e-6, **told)
