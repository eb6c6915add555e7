"""The objective: what parts of a batch give adds up to what Keras computes of the whole, and no variable changes."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial.errors import Raised, UserError
from dist_partial.step import losses
from dist_partial.step.objective import prepare, unpacked
from dist_partial.training import loop
from tests.helpers.against_fit import COUNT, check_against_fit, features, fitted, one_output, settings
from tests.helpers.files import rows
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

    def reset_state(self):
        self.positive.assign([0.0, 0.0])
        self.count.assign(self.begin)

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
            added = objective.added(part, outputs, training, changed, share=1 / 3)
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
    sums = objective.added(whole, model(whole[0]), True, {}, share=1.0)
    assert list(objective.results(np.array(sums), True).values()) == [1.0]


def test_a_compute_metrics_that_gives_something_of_its_own_is_refused():
    class Own(keras.Model):
        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            logs = super().compute_metrics(x, y, y_pred, sample_weight)
            return logs | {"twice": 2 * logs["mae"]}

    inner = one_output()
    model, whole = Own(inner.inputs, inner.outputs), (tf.constant(features(7)), tf.ones([COUNT, 1], tf.float64))
    with pytest.raises(UserError, match=r"compute_metrics of its own \(Own\) that gives 'twice'.* run.metrics"):
        prepared(model, whole, "mse", metrics=["mae"])


class Endpoint(keras.layers.Layer):
    """Measures when it is called, as layers of Keras's guides do."""

    def __init__(self):
        super().__init__()
        self.error = keras.metrics.Mean(name="size")

    def call(self, x):
        self.error.update_state(keras.ops.abs(x))
        return x


def test_a_metric_that_a_call_of_the_model_updates_is_refused(tmp_path):
    def model():
        return keras.Sequential([keras.Input((7,)), keras.layers.Dense(1), Endpoint()])

    with pytest.raises(UserError, match=r"run\.model updates its metric 'size' when it is called"):
        loop.run(settings(model, (features(7), features(1)), keras.losses.MeanSquaredError), tmp_path / "run")


def test_a_metric_that_has_counted_before_begins_anew():
    metric = keras.metrics.MeanAbsoluteError(name="error")
    metric.update_state([0.0], [100.0])
    whole = tuple(map(tf.constant, (features(7), features(1))))
    [measure] = prepared(one_output(), whole, "mse", metrics=[metric]).measures
    assert [value.tolist() for value in measure.initial] == [0.0, 0.0]


def rooted(y, outputs):
    return keras.ops.sqrt(keras.ops.mean(keras.ops.square(y - outputs)))


def averaged(y, outputs):
    return keras.ops.mean(keras.ops.abs(y - outputs))


class BatchMean(keras.metrics.Metric):
    """Has no config and takes no dtype; counts batches."""

    def __init__(self, power):
        super().__init__(name="batch_mean")
        self.power = power
        self.total, self.batches = (self.add_weight(initializer="zeros", name=each) for each in ("total", "batches"))

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.total.assign_add(keras.ops.mean(keras.ops.abs(y_true - y_pred)) ** self.power)
        self.batches.assign_add(1.0)

    def result(self):
        return self.total / self.batches


@pytest.mark.parametrize(
    ("metric", "of_batch", "coupled"),
    [
        (rooted, False, True),
        (averaged, True, False),
        (lambda: BatchMean(1), True, False),
        (lambda: BatchMean(2), False, True),
        (keras.metrics.RootMeanSquaredError, False, False),
    ],
)
@pytest.mark.parametrize("replicas", [2, 3])
def test_metrics_of_a_batch_are_those_of_fit(metric, of_batch, coupled, replicas, tmp_path):
    """Also where the parts of the last batch of an evaluation are not alike."""
    data, loss = (features(7), features(1)), keras.losses.MeanSquaredError
    told = {"replicas": replicas, "steps": 3, "metrics": [metric]}
    check_against_fit(tmp_path / "run", one_output, data, loss, tolerance=1e-6, **told)
    loop.run(settings(one_output, data, loss, eval_examples=7, **told), tmp_path / "short")
    *_, made = fitted(one_output, data, loss, **told)
    expected = made.evaluate(data[0][:7], data[1][:7], batch_size=COUNT, verbose=0, return_dict=True)
    found = rows(tmp_path / "short" / "metrics.jsonl")[-1]
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    made = metric if metric in (rooted, averaged) else metric()
    whole = tuple(map(tf.constant, data))
    [measure] = prepared(one_output(), whole, "mse", metrics=[made]).measures
    assert (measure.of_batch, measure.coupled) == (of_batch, coupled)


def test_metrics_of_the_whole_batch_are_left_out_of_training_where_it_is_divided_otherwise(tmp_path):
    told = {"replicas": 2, "accumulate": 3, "steps": 3, "metrics": [rooted, averaged]}
    loop.run(settings(one_output, (features(7), features(1)), keras.losses.MeanSquaredError, **told), tmp_path)
    found = {row["split"]: row.keys() & {"rooted", "averaged"} for row in rows(tmp_path / "metrics.jsonl")}
    assert found == {"train": {"averaged"}, "eval": {"rooted", "averaged"}}


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
