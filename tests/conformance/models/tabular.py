"""Rows of tables: lookups of words and numbers, several inputs and outputs, recommendation, weighted targets."""

import keras
import numpy as np
from keras import layers, ops

from tests.conformance import toy_data
from tests.conformance.case import ROWS, WITHOUT_KEY_BIAS, Case

THALS = ["fixed", "normal", "reversible"]


def patients():
    """Words, whole numbers and measurements, as read from a table: each [ROWS, 1]."""
    x = {
        "sex": toy_data.ids(0, 2, 1),
        "thal": toy_data.words(1, [*THALS, "unknown"], 1),
        "town": toy_data.words(2, ["Ghent", "Lund", "Oulu", "Pisa", "Vigo"], 1),
        "doctor": toy_data.ids(3, 5000, 1),
        "age": 50 + 15 * toy_data.features(4, 1),
        "oxygen": 95 + 2 * toy_data.features(5, 1),
    }
    risk = (x["age"] - 50) / 15 + (x["thal"] == "fixed") - x["sex"]
    return x, (risk > 0).astype(np.float64)


def structured_lookup():
    inputs = {
        "sex": keras.Input((1,), dtype="int32", name="sex"),
        "thal": keras.Input((1,), dtype="string", name="thal"),
        "town": keras.Input((1,), dtype="string", name="town"),
        "doctor": keras.Input((1,), dtype="int32", name="doctor"),
        "age": keras.Input((1,), name="age"),
        "oxygen": keras.Input((1,), name="oxygen"),
    }
    sex = layers.IntegerLookup(vocabulary=[0, 1], num_oov_indices=0, output_mode="one_hot", name="sex_lookup")
    thal = layers.StringLookup(vocabulary=THALS, name="thal_lookup")
    town = layers.Hashing(4, salt=7, name="town_hash")
    doctor = layers.Hashing(6, name="doctor_hash")
    thal_code = layers.CategoryEncoding(len(THALS) + 1, output_mode="one_hot", name="thal_code")
    town_code = layers.CategoryEncoding(4, output_mode="multi_hot", name="town_code")
    age = layers.Discretization(bin_boundaries=[35.0, 50.0, 65.0], output_mode="one_hot", name="age_bins")
    doctors = layers.Embedding(6, 2, name="doctors")
    normal = layers.Normalization(mean=[95.0], variance=[4.0], name="oxygen_normal")
    x = layers.Concatenate(name="features")(
        [
            sex(inputs["sex"]),
            thal_code(thal(inputs["thal"])),
            town_code(town(inputs["town"])),
            layers.Flatten(name="doctor_vector")(doctors(doctor(inputs["doctor"]))),
            age(inputs["age"]),
            normal(inputs["oxygen"]),
        ]
    )
    x = layers.Dense(8, activation="relu", name="hidden")(x)
    return keras.Model(inputs, layers.Dense(1, activation="sigmoid", name="risk")(x), name="structured_lookup")


def adapted():
    """The statistics and the vocabulary are learned from the data, before training."""
    columns = patients()[0]
    age, town = keras.Input((1,), name="age"), keras.Input((1,), dtype="string", name="town")
    normal = layers.Normalization(name="normal")
    normal.adapt(columns["age"])
    lookup = layers.StringLookup(output_mode="multi_hot", name="lookup")
    lookup.adapt(columns["town"].astype(str))
    x = layers.Concatenate(name="both")([normal(age), lookup(town)])
    x = layers.Dense(6, activation="tanh", name="hidden")(x)
    return keras.Model([age, town], layers.Dense(1, activation="sigmoid", name="head")(x), name="adapted")


def adapted_data():
    x, y = patients()
    return [x["age"], x["town"]], y


def crossed():
    """Two columns crossed and hashed, and a linear model of them."""
    left, right = keras.Input((1,), dtype="string", name="left"), keras.Input((1,), dtype="int32", name="right")
    word = layers.StringLookup(vocabulary=["a", "b", "c"], output_mode="int", name="word")(left)
    cross = layers.HashedCrossing(16, output_mode="one_hot", name="cross")((word, right))
    return keras.Model((left, right), layers.Dense(1, name="linear")(cross), name="crossed")


def crossed_data():
    left, right = toy_data.words(6, ["a", "b", "c", "d"], 1), toy_data.ids(7, 4, 1)
    return (left, right), ((left == "a") ^ (right > 1)).astype(np.float64)


def patients_with_one_more_column():
    """The table has a column that the model does not read.

    Its name is the last: Keras takes inputs by the order of all names, and gives another column to the model else.
    """
    x, y = patients()
    return {**x, "zone": toy_data.features(27, 1)}, y


def wide_and_deep():
    wide, deep = keras.Input((5,), name="wide"), keras.Input((8,), name="deep")
    x = layers.Dense(8, activation="relu", name="deep1")(deep)
    x = layers.Dense(8, activation="relu", name="deep2")(layers.LayerNormalization(name="norm")(x))
    x = layers.Concatenate(name="both")([wide, x])
    return keras.Model([wide, deep], layers.Dense(1, activation="sigmoid", name="head")(x), name="wide_and_deep")


def wide_and_deep_data():
    wide, deep = toy_data.features(8, 5), toy_data.features(9, 8)
    return [wide, deep], (wide[:, :1] + np.abs(deep[:, :1]) > 0.5).astype(np.int32)


class FactorizationMachine(layers.Layer):
    """Half the squared sum less the sum of squares: all products of two fields."""

    def call(self, vectors):
        total = ops.square(ops.sum(vectors, axis=1)) - ops.sum(ops.square(vectors), axis=1)
        return 0.5 * ops.sum(total, axis=-1, keepdims=True)


def deep_fm():
    fields = keras.Input((4,), dtype="int32", name="fields")
    vectors = layers.Embedding(20, 4, name="vectors")(fields)
    linear = ops.sum(layers.Embedding(20, 1, name="linear")(fields), axis=1)
    deep = layers.Dense(8, activation="relu", name="deep")(layers.Flatten(name="flatten")(vectors))
    deep = layers.Dense(1, name="deep_out")(deep)
    x = layers.Add(name="logit")([linear, FactorizationMachine(name="products")(vectors), deep])
    return keras.Model(fields, layers.Activation("sigmoid", name="click")(x), name="deep_fm")


def clicks():
    fields = toy_data.ids(10, 5, 4) + 5 * np.arange(4, dtype=np.int32)
    return fields, ((fields.sum(1) % 2) == 0).astype(np.float64)[:, None]


def matrix_factorization():
    """The product of two embeddings beside a network of both."""
    user, item = keras.Input((), dtype="int32", name="user"), keras.Input((), dtype="int32", name="item")
    make = lambda name, count: layers.Embedding(  # noqa: E731
        count, 4, embeddings_initializer="he_normal", embeddings_regularizer=keras.regularizers.L2(1e-4), name=name
    )
    product = make("user_product", 9)(user) * make("item_product", 12)(item)
    x = layers.Concatenate(name="both")([make("user_deep", 9)(user), make("item_deep", 12)(item)])
    x = layers.Dense(8, activation="relu", name="hidden")(x)
    x = layers.Concatenate(name="all")([product, x])
    return keras.Model({"user": user, "item": item}, layers.Dense(1, name="rating")(x), name="matrix_factorization")


def ratings():
    user, item = toy_data.ids(11, 9), toy_data.ids(12, 12)
    return {"item": item, "user": user}, (1.0 + (user % 3) + (item % 2))[:, None]


def tab_transformer():
    """A token for each column, categories embedded and numbers scaled, and attention between columns."""
    kind, size = keras.Input((3,), dtype="int32", name="kind"), keras.Input((2,), name="size")
    tokens = layers.Embedding(10, 8, name="kinds")(kind)
    numbers = layers.EinsumDense("bn,nd->bnd", (2, 8), bias_axes="nd", name="numbers")
    x = layers.Concatenate(axis=1, name="tokens")([tokens, numbers(size)])
    x = x + layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.Dense(1, name="head")(layers.GlobalAveragePooling1D(name="pool")(x))
    return keras.Model({"kind": kind, "size": size}, x, name="tab_transformer")


def tab_data():
    x = {"kind": toy_data.ids(13, 10, 3), "size": toy_data.features(14, 2)}
    return x, x["size"][:, :1] * np.where(x["kind"][:, :1] < 5, 1, -1)


def two_heads(outputs):
    """A trunk of two inputs, one of them a pair, and a price and a chance of sale."""
    a, b, c = (keras.Input((width,), name=name) for name, width in (("a", 3), ("b", 4), ("c", 2)))
    x = layers.Dense(8, activation="tanh", name="trunk")(layers.Concatenate(name="all")([a, b, c]))
    price, sold = layers.Dense(1, name="price")(x), layers.Dense(3, activation="softmax", name="sold")(x)
    return ((a, b), c), outputs(price, sold)


def house_features():
    return toy_data.features(15, 3), toy_data.features(16, 4), toy_data.features(17, 2)


def houses(targets):
    a, b, c = house_features()
    together = np.concatenate([a, b, c], axis=1)
    return ((a, b), c), targets(toy_data.targets(together), toy_data.classes(together, 3))


def outputs_dict():
    x, y = two_heads(lambda price, sold: {"price": price, "sold": sold})
    return keras.Model(x, y, name="outputs_dict")


def outputs_list():
    x, y = two_heads(lambda price, sold: [price, sold])
    return keras.Model(x, y, name="outputs_list")


class NestedOutputs(keras.Model):
    """Takes a pair of a pair and a dict, and returns a dict with a tuple in it."""

    def __init__(self):
        super().__init__(name="nested_outputs")
        self.rent = layers.Dense(1, name="rent")
        self.trunk = layers.Dense(8, activation="tanh", name="trunk")
        self.price = layers.Dense(1, name="price")
        self.sold = layers.Dense(3, activation="softmax", name="sold")

    def call(self, inputs):
        (a, b), named = inputs
        x = self.trunk(ops.concatenate([a, b, named["c"]], axis=1))
        return {"rent": self.rent(x), "sale": (self.price(x), self.sold(x))}


def nested_data():
    a, b, c = house_features()
    _, y = houses(lambda price, sold: {"rent": 0.1 * price**2, "sale": (price, sold)})
    return ((a, b), {"c": c}), y


class OwnMetrics(NestedOutputs):
    """Reports a metric of its own beside those of `compile`, by `compute_metrics`."""

    def __init__(self):
        super().__init__()
        self.income = keras.metrics.Mean(name="income")

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        self.income.update_state(y_pred["rent"] + y_pred["sale"][0])
        return {**super().compute_metrics(x, y, y_pred, sample_weight), "income": self.income.result()}


def close(y_true, y_pred):
    """Whether a price is nearly right: [n]."""
    return ops.cast(ops.abs(y_true - y_pred)[:, 0] < 0.2, y_pred.dtype)


def apart(y_true, y_pred):
    """Prices in a logarithm: a mean over the batch, not an example each."""
    return ops.mean(ops.log1p(ops.abs(y_true - y_pred)))


def house_targets_dict():
    return houses(lambda price, sold: {"price": price, "sold": sold})


def house_targets_list():
    return houses(lambda price, sold: [price, sold])


def house_price_only():
    return houses(lambda price, sold: {"price": price})


def weighted_houses():
    x, y = house_targets_dict()
    draw = toy_data.rng(18)
    return x, y, {"price": draw.random(ROWS), "sold": draw.random(ROWS)}


def one_weight_for_all_outputs():
    x, y = house_targets_list()
    return x, y, toy_data.rng(19).random(ROWS)


def mlp(name, width, outputs, activation=None):
    def make():
        return keras.Sequential(
            [
                keras.Input((width,)),
                layers.Dense(8, activation="relu", name="hidden1"),
                layers.Dense(8, activation="relu", name="hidden2"),
                layers.Dense(outputs, activation=activation, name="head"),
            ],
            name=name,
        )

    return make


def regression_data():
    x = toy_data.features(20, 6)
    return x, toy_data.targets(x)


def weighted_regression_data():
    x, y = regression_data()
    return x, y, toy_data.rng(21).integers(0, 3, ROWS).astype(np.float64)


def rare_class_data():
    x = toy_data.features(22, 6)
    return x, (x[:, 0] > 1.0).astype(np.int32)


def rare_one_hot_data():
    x, y = rare_class_data()
    return x, toy_data.one_hot(y, 2)


def multi_label_data():
    x = toy_data.features(23, 6)
    return x, (toy_data.targets(x, 4) > 0).astype(np.float64)


class OrdinalLoss(keras.losses.Loss):
    """Cross entropy of "is above this grade" for each grade but the last (CORAL): [n]."""

    def __init__(self, grades, name="ordinal", **arguments):
        super().__init__(name=name, **arguments)
        self.grades = grades

    def call(self, y_true, y_pred):
        above = ops.cast(ops.reshape(y_true, (-1, 1)) > ops.arange(self.grades - 1, dtype=y_true.dtype), y_pred.dtype)
        return ops.sum(ops.softplus(y_pred) - above * y_pred, axis=-1)


class GradeError(keras.metrics.Metric):
    """The mean distance of grades, by two counters of its own."""

    def __init__(self, name="grade_error", **arguments):
        super().__init__(name=name, **arguments)
        self.total = self.add_variable((), "zeros", name="total")
        self.rows = self.add_variable((), "zeros", name="rows")

    def update_state(self, y_true, y_pred, sample_weight=None):
        grade = ops.sum(ops.cast(y_pred > 0, self.dtype), axis=-1)
        error = ops.abs(ops.cast(ops.reshape(y_true, (-1,)), self.dtype) - grade)
        weight = ops.ones_like(error) if sample_weight is None else ops.cast(sample_weight, self.dtype)
        self.total.assign_add(ops.sum(error * weight))
        self.rows.assign_add(ops.sum(weight))

    def result(self):
        return self.total / self.rows


class OrdinalHead(layers.Layer):
    """One score of a row, and a learned threshold of each grade."""

    def __init__(self, grades, **arguments):
        super().__init__(**arguments)
        self.grades = grades
        self.score = layers.Dense(1, use_bias=False, name="score")

    def build(self, shape):
        self.score.build(shape)
        self.thresholds = self.add_weight(shape=(self.grades - 1,), initializer="zeros", name="thresholds")

    def call(self, x):
        return self.score(x) + self.thresholds


def ordinal():
    x = keras.Input((6,), name="x")
    y = layers.Dense(8, activation="relu", name="hidden")(x)
    return keras.Model(x, OrdinalHead(4, name="grades")(y), name="ordinal")


def ordinal_data():
    x = toy_data.features(24, 6)
    return x, np.digitize(toy_data.targets(x)[:, 0], [-0.5, 0.0, 0.5]).astype(np.int32)


def quantile_loss(y_true, y_pred):
    """Pinball loss of the quantiles 0.1, 0.5 and 0.9: [n]."""
    levels = ops.convert_to_tensor([0.1, 0.5, 0.9], dtype=y_pred.dtype)
    error = y_true - y_pred
    return ops.mean(ops.maximum(levels * error, (levels - 1) * error), axis=-1)


def below(y_true, y_pred):
    """The share of targets that are below the last quantile: [n]."""
    return ops.cast(y_true[:, 0] < y_pred[:, -1], y_pred.dtype)


class Experts(layers.Layer):
    """A soft mixture of dense experts; adds the mean over the examples of how unequal the gates are."""

    def __init__(self, experts, units, **arguments):
        super().__init__(**arguments)
        self.experts, self.units = experts, units
        self.gate = layers.Dense(experts, activation="softmax", name="gate")

    def build(self, shape):
        self.gate.build(shape)
        self.kernel = self.add_weight(shape=(self.experts, shape[-1], self.units), name="kernel")

    def call(self, x):
        gates = self.gate(x)
        self.add_loss(0.1 * ops.mean(self.experts * ops.sum(ops.square(gates), axis=-1) - 1.0))
        return ops.einsum("be,bi,eio->bo", gates, x, self.kernel)


def mixture_of_experts():
    x = keras.Input((6,), name="x")
    y = layers.Dense(8, activation="relu", name="stem")(x)
    y = Experts(3, 6, name="experts")(y)
    return keras.Model(x, layers.Dense(1, name="head")(y), name="mixture_of_experts")


BCE = lambda: keras.losses.BinaryCrossentropy()  # noqa: E731
HOUSE_LOSSES = lambda: {"price": "mse", "sold": "sparse_categorical_crossentropy"}  # noqa: E731
NESTED_LOSSES = lambda: {"rent": "mse", "sale": ("mse", "sparse_categorical_crossentropy")}  # noqa: E731

CASES = [
    Case(
        "structured_lookup",
        structured_lookup,
        patients,
        BCE,
        metrics=lambda: ["accuracy", keras.metrics.AUC(name="auc")],
    ),
    Case("adapted_lookups", adapted, adapted_data, lambda: "binary_crossentropy", metrics=lambda: ["accuracy"]),
    Case(
        "hashed_crossing",
        crossed,
        crossed_data,
        lambda: keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=lambda: [keras.metrics.BinaryAccuracy(threshold=0.0)],
    ),
    Case(
        "wide_and_deep",
        wide_and_deep,
        wide_and_deep_data,
        BCE,
        metrics=lambda: [
            keras.metrics.AUC(curve="PR", name="pr"),
            keras.metrics.SpecificityAtSensitivity(0.5, name="spec"),
        ],
    ),
    Case("deep_fm", deep_fm, clicks, BCE, metrics=lambda: ["accuracy", keras.metrics.BinaryCrossentropy(name="nats")]),
    Case(
        "matrix_factorization",
        matrix_factorization,
        ratings,
        lambda: "mse",
        metrics=lambda: [keras.metrics.RootMeanSquaredError(name="rmse"), keras.metrics.R2Score()],
    ),
    Case(
        "tab_transformer",
        tab_transformer,
        tab_data,
        lambda: "mean_squared_error",
        metrics=lambda: ["mae"],
        rules=WITHOUT_KEY_BIAS,
    ),
    Case(
        "outputs_dict",
        outputs_dict,
        house_targets_dict,
        HOUSE_LOSSES,
        loss_weights={"price": 0.5, "sold": 2.0},
        metrics=lambda: {"price": ["mae", keras.metrics.R2Score(), close, apart], "sold": "accuracy"},
    ),
    Case(
        "outputs_list",
        outputs_list,
        house_targets_list,
        lambda: ["mse", "sparse_categorical_crossentropy"],
        loss_weights=[0.5, 2.0],
        metrics=lambda: [["mae"], ["accuracy"]],
    ),
    Case(
        "outputs_list_losses_dict",
        outputs_list,
        house_targets_dict,
        HOUSE_LOSSES,
        metrics=lambda: {"sold": ["accuracy"]},
    ),
    Case(
        "outputs_weighted_by_dict",
        outputs_dict,
        weighted_houses,
        HOUSE_LOSSES,
        metrics=lambda: {"sold": ["accuracy"]},
        weighted_metrics=lambda: {"price": ["mae"], "sold": ["accuracy"]},
    ),
    Case(
        "outputs_one_weight",
        outputs_list,
        one_weight_for_all_outputs,
        lambda: ["mse", "sparse_categorical_crossentropy"],
        weighted_metrics=lambda: [["mae"], ["accuracy"]],
    ),
    Case(
        "nested_outputs",
        NestedOutputs,
        nested_data,
        NESTED_LOSSES,
        metrics=lambda: {"rent": "mae", "sale": (["mae", keras.metrics.R2Score()], "accuracy")},
    ),
    Case(
        "own_metrics_of_the_model",
        OwnMetrics,
        nested_data,
        NESTED_LOSSES,
        metrics=lambda: {"rent": "mae", "sale": ("mae", "accuracy")},
    ),
    Case(
        "output_without_loss",
        outputs_dict,
        house_targets_dict,
        lambda: {"price": "mse", "sold": None},
        metrics=lambda: {"sold": ["accuracy"]},
        rules=(("freeze", "sold/.*"), ("train", ".*")),
    ),
    Case(
        "output_missing_in_losses",
        outputs_dict,
        house_targets_dict,
        lambda: {"price": "mse"},
        metrics=lambda: {"price": ["mae"]},
        rules=(("freeze", "sold/.*"), ("train", ".*")),
    ),
    Case(
        "target_missing",
        outputs_dict,
        house_price_only,
        lambda: {"price": "mse", "sold": None},
        rules=(("freeze", "sold/.*"), ("train", ".*")),
    ),
    Case(
        "regression_log_cosh",
        mlp("regression", 6, 1),
        regression_data,
        lambda: keras.losses.LogCosh(),
        metrics=lambda: [keras.metrics.MeanAbsoluteError(name="mae"), keras.metrics.R2Score(name="r2")],
    ),
    Case(
        "regression_sample_weights",
        mlp("regression", 6, 1),
        weighted_regression_data,
        lambda: "mse",
        metrics=lambda: ["mae"],
        weighted_metrics=lambda: ["mae", keras.metrics.R2Score(name="r2")],
    ),
    Case(
        "class_weights",
        mlp("classifier", 6, 2),
        rare_class_data,
        lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=lambda: ["accuracy"],
        weighted_metrics=lambda: ["accuracy"],
        class_weight={0: 0.5, 1: 3.0},
    ),
    Case("unread_column", structured_lookup, patients_with_one_more_column, BCE, metrics=lambda: ["accuracy"]),
    Case(
        "class_weights_one_hot",
        mlp("classifier", 6, 2, "softmax"),
        rare_one_hot_data,
        lambda: "categorical_crossentropy",
        metrics=lambda: [keras.metrics.F1Score("weighted", name="f1")],
        class_weight={0: 1.0, 1: 4.0},
    ),
    Case(
        "multi_label",
        mlp("multi_label", 6, 4, "sigmoid"),
        multi_label_data,
        BCE,
        metrics=lambda: [
            keras.metrics.AUC(multi_label=True, num_labels=4, name="auc"),
            keras.metrics.F1Score("micro", threshold=0.5, name="f1"),
            keras.metrics.BinaryAccuracy(name="right"),
        ],
    ),
    Case("ordinal_grades", ordinal, ordinal_data, lambda: OrdinalLoss(4), metrics=lambda: [GradeError()]),
    Case("quantiles", mlp("quantiles", 6, 3), regression_data, lambda: quantile_loss, metrics=lambda: [below]),
    Case("mixture_of_experts", mixture_of_experts, regression_data, lambda: "mse", metrics=lambda: ["mae"]),
]
