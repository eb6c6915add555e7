"""What a loss is made of: runs on two replicas against plain Keras on one device, and NumPy."""

import dataclasses
import functools
import re
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial import selection
from dist_partial.data import ArraySource, Dataset, train_batches
from dist_partial.errors import UserError
from dist_partial.reductions.local_sgd import LocalSGD
from dist_partial.reductions.power_sgd import PowerSGD
from dist_partial.reductions.quantized import Quantized
from dist_partial.reductions.top_k import TopK
from dist_partial.step import losses
from dist_partial.training import loop
from tests.helpers.against_fit import COUNT, check_against_fit, compiled, features, fitted, one_output, settings
from tests.helpers.cases import set_precision
from tests.helpers.files import rows, state, trained
from tests.helpers.marks import in_turns, quick


@pytest.mark.parametrize(
    ("y_shape", "weight_shape"), quick([((), ()), ((), (1,)), ((1,), ()), ((1,), (1,))], ((), (1,)), ((1,), ()))
)
@pytest.mark.parametrize("loss", quick(["class", "function"], "class"))
def test_weights_of_examples_in_any_shape_are_those_of_fit(tmp_path, y_shape, weight_shape, loss):
    x = features(7)
    y = x.sum(1).reshape(COUNT, *y_shape)
    weight = np.random.default_rng(2).uniform(0, 3, (COUNT, *weight_shape))
    makers = {
        "class": keras.losses.MeanSquaredError,
        "function": lambda: lambda y, outputs: keras.ops.mean(keras.ops.square(y - outputs), axis=-1),
    }
    check_against_fit(tmp_path / "run", one_output, (x, y, weight), makers[loss])


STEPS, CLASSES = 5, 6  # of a sequence, and what each of its steps may be


def sequences(seed=3):
    """Ids of sequences, [COUNT, STEPS], that end at lengths of their own: 0 follows."""
    rng = np.random.default_rng(seed)
    lengths = np.array([0, STEPS, *rng.integers(1, STEPS + 1, COUNT - 2)])
    ids = rng.integers(1, CLASSES, (COUNT, STEPS))
    return np.where(np.arange(STEPS) < lengths[:, None], ids, 0).astype(np.int32)


def weights_of(*shape):
    """Weights, some of which are 0."""
    return np.maximum(np.random.default_rng(2).uniform(-1, 3, (COUNT, *shape)), 0)


def reader(mask_zero, **more):
    def model():
        embedding = keras.layers.Embedding(CLASSES, 4, mask_zero=mask_zero, name="embedding")
        head = keras.layers.Dense(CLASSES, name="head", **more)
        return keras.Sequential([keras.Input((STEPS,), dtype="int32"), embedding, head])

    return model


def per_class(**more):
    return lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True, **more)


def two_readers():
    inputs = {name: keras.Input((STEPS,), dtype="int32", name=name) for name in ("words", "tags")}
    embedding = keras.layers.Embedding(CLASSES, 4, mask_zero=True, name="embedding")
    heads = {"words": keras.layers.Dense(CLASSES, name="next"), "tags": keras.layers.Dense(1, name="kind")}
    return keras.Model(inputs, {heads[name].name: heads[name](embedding(x)) for name, x in inputs.items()})


def two_sets(*weights):
    x = {"words": sequences(), "tags": sequences(7)}
    return x, {"next": sequences(4), "kind": features(STEPS, 1)}, *weights


def two_losses():
    return {"next": per_class()(), "kind": keras.losses.Huber(reduction="mean_with_sample_weight")}


class Own(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        return loss + 0.3 * keras.ops.mean(keras.ops.square(y_pred))


def own_loss():
    made = reader(True)()
    return Own(made.inputs, made.outputs)


class Noisy(keras.Model):
    """Whose `compute_loss` draws random numbers and calls the model again, as those of diffusion models."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seed_generator = keras.random.SeedGenerator(5)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        noise = keras.random.normal(keras.ops.shape(x), seed=self.seed_generator, dtype=x.dtype)
        return keras.ops.mean(keras.ops.square(self(x + noise, training=training) - y))


def noisy():
    x = keras.Input((7,))
    layers = [
        keras.layers.Dropout(0.3),
        keras.layers.Dense(4, name="low"),
        keras.layers.BatchNormalization(name="norm"),
    ]
    return Noisy(x, keras.Sequential([*layers, keras.layers.Dense(1, name="top")])(x))


class Autoencoder(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return keras.ops.mean(keras.ops.square(x - y_pred))


def autoencoder():
    x = keras.Input((7,))
    return Autoencoder(x, keras.layers.Dense(7, name="d")(x))


def one_number():
    return lambda y, outputs: keras.ops.mean(keras.ops.square(y - outputs))


L2 = keras.regularizers.L2(0.1)
SEQUENCES = sequences(), sequences(4)
# A model, what it is given, its loss, and other settings.
LOSSES = {
    "ignore_class": (reader(False), SEQUENCES, per_class(ignore_class=0)),
    "mask": (reader(True), SEQUENCES, per_class()),
    "mask and ignore_class": (reader(True), SEQUENCES, per_class(ignore_class=2)),
    "mask, weights of examples": (reader(True), (*SEQUENCES, weights_of(1)), per_class()),
    "mask, weights of steps": (reader(True), (*SEQUENCES, weights_of(STEPS)), per_class()),
    "mask and regularisers": (reader(True, kernel_regularizer=L2, activity_regularizer=L2), SEQUENCES, per_class()),
    "two losses": (two_readers, two_sets(), two_losses, {"loss_weights": {"next": 0.3, "kind": 2.0}}),
    "two losses, two weights": (two_readers, two_sets({"next": weights_of(1), "kind": weights_of(STEPS)}), two_losses),
    "compute_loss": (own_loss, SEQUENCES, per_class()),
    "compute_loss alone": (autoencoder, (features(7),), None),
    "one number": (one_output, (features(7), features(1)), one_number),
} | {
    f"{reduction} of {name}": (reader(True), (*SEQUENCES, weights), per_class(reduction=reduction))
    for reduction in ("sum", "mean", "mean_with_sample_weight", "none", None)
    for name, weights in {"examples": weights_of(1), "steps": weights_of(STEPS)}.items()
}  # fmt: skip
DIVISIONS = [(1, 3), (2, 1), (3, 2)]
QUICK = {
    ("ignore_class", 2, 1),
    ("mask and regularisers", 1, 3),
    ("two losses, two weights", 2, 1),
    ("compute_loss", 2, 1),
    ("sum of steps", 2, 1),
    ("mean_with_sample_weight of steps", 3, 2),
}


@pytest.mark.parametrize(
    ("name", "replicas", "accumulate"),
    in_turns(quick([(name, *division) for name in LOSSES for division in DIVISIONS], *QUICK)),
)
def test_a_loss_is_that_of_fit_however_a_batch_is_divided(name, replicas, accumulate, tmp_path):
    model, data, loss, more = (*LOSSES[name], {})[:4]
    divided = {"replicas": replicas, "accumulate": accumulate, "summed": name.startswith(("none", "None"))}
    check_against_fit(tmp_path / "run", model, data, loss, steps=3, **divided, **more)


def masked(*layers):
    """Makes models in which layers read the mask of an embedding."""

    def model():
        embedding = keras.layers.Embedding(CLASSES, 4, mask_zero=True, name="embedding")
        return keras.Sequential([keras.Input((STEPS,), dtype="int32"), embedding, *(layer() for layer in layers)])

    return model


def attentive():
    x = keras.Input((STEPS,), dtype="int32")
    words = keras.layers.Embedding(CLASSES, 4, mask_zero=True, name="embedding")(x)
    mixed = keras.layers.MultiHeadAttention(2, 2, name="attention")(words, words)
    return keras.Model(x, keras.layers.Dense(CLASSES, name="head")(words + mixed))


def lstm(**more):
    return lambda: keras.layers.LSTM(3, name="lstm", **more)


def dense(units):
    return lambda: keras.layers.Dense(units, name="head")


SQUARES = (np.maximum(sequences(), np.eye(1, STEPS, dtype=np.int32)), features(1)), keras.losses.MeanSquaredError
COMPILED_BY_XLA = {
    "LSTM": (masked(lstm(return_sequences=True), dense(CLASSES)), SEQUENCES, per_class()),
    "the last of an LSTM": (masked(lstm(), dense(1)), *SQUARES),
    "two directions": (
        masked(lambda: keras.layers.Bidirectional(lstm(return_sequences=True)(), name="both"), dense(CLASSES)),
        SEQUENCES,
        per_class(),
    ),
    "pooling": (masked(keras.layers.GlobalAveragePooling1D, dense(1)), *SQUARES),
    "attention": (attentive, SEQUENCES, per_class()),
    "mask and ignore_class": LOSSES["mask and ignore_class"],
    "ignore_class": LOSSES["ignore_class"],
    "mean_with_sample_weight of steps": LOSSES["mean_with_sample_weight of steps"],
}


@pytest.mark.parametrize(
    ("name", "replicas", "accumulate"),
    in_turns(quick([(name, *division) for name in COMPILED_BY_XLA for division in DIVISIONS], ("pooling", 2, 1))),
)
def test_masks_are_those_of_fit_where_xla_compiles(name, replicas, accumulate, tmp_path):
    model, data, loss = COMPILED_BY_XLA[name]
    divided = {"replicas": replicas, "accumulate": accumulate, "jit_compile": True}
    check_against_fit(tmp_path / "run", model, data, loss, steps=3, **divided)


def test_what_a_compute_loss_draws_and_changes_goes_on_as_in_keras(tmp_path):
    """In the order of the run, which Keras is given: noise is of places in a batch."""
    data = (features(7), features(1))
    told = settings(noisy, data, None, replicas=1, steps=4, eval_every=2)
    loop.run(told, tmp_path / "run")
    order = train_batches(
        ArraySource(*data), first_step=0, global_batch=COUNT, seed=0, context=tf.distribute.InputContext()
    )
    model = compiled(noisy, None)
    losses = [model.train_on_batch(*batch) for batch in order.take(4)]
    found = [row["loss"] for row in rows(tmp_path / "run" / "metrics.jsonl") if row["split"] == "train"]
    np.testing.assert_allclose(found[0], losses[0], rtol=1e-9)
    saved = state(tmp_path / "run", 4)
    for path, variable in zip(selection.paths_of(model, model.variables), model.variables, strict=True):
        kind = "variables" if variable.trainable else "statistics"
        if variable.name != "seed_generator_state":
            np.testing.assert_allclose(saved[f"{kind}/{path}"], variable, rtol=1e-9, err_msg=path)
    counts = [int(saved[name][1]) for name in sorted(saved) if name.startswith("generators/")]
    assert sorted(counts) == sorted(int(v[1]) for v in model.variables if v.name == "seed_generator_state")


def test_weights_of_a_loss_of_one_number_are_refused_where_batches_are_divided(tmp_path):
    """Keras multiplies the number by their mean, which is not that of the parts."""
    data = (features(7), features(1), weights_of())
    check_against_fit(tmp_path / "alone", one_output, data, one_number, steps=3, replicas=1)
    for more in ({"replicas": 2}, {"replicas": 1, "accumulate": 3}):
        with pytest.raises(UserError, match=r"one number for a batch, and run\.data gives weights, which its parts"):
            loop.run(settings(one_output, data, one_number, **more), tmp_path / "run")


@pytest.mark.parametrize("reduction", ["none", None])
def test_a_loss_that_is_not_reduced_is_the_sum_on_which_fit_trains(reduction, tmp_path):
    loss, data = per_class(reduction=reduction), (*SEQUENCES, weights_of(1))
    loop.run(settings(reader(True), data, loss, steps=1, eval_first=True), tmp_path / "run")
    outputs = compiled(reader(True), loss)(data[0])
    expected = float(np.sum(loss()(data[1], outputs, data[2])))
    found = [row["loss"] for row in rows(tmp_path / "run" / "metrics.jsonl")[:2]]
    np.testing.assert_allclose(found, [expected] * 2, rtol=1e-12)


def test_replicas_that_train_by_themselves_divide_by_what_they_have(tmp_path):
    """One step of SGD and an exchange: the mean of what plain Keras makes of each half of the batch."""
    loop.run(settings(reader(True), SEQUENCES, per_class(), steps=1, reduction=LocalSGD(1)), tmp_path / "run")
    source, alone = ArraySource(*SEQUENCES), tf.distribute.InputContext()
    batch = next(iter(train_batches(source, first_step=0, global_batch=COUNT, seed=0, context=alone)))
    halves = []
    for half in (slice(COUNT // 2), slice(COUNT // 2, None)):
        model = compiled(reader(True), per_class())
        model.train_on_batch(*(column[half] for column in batch))
        halves.append([np.array(variable) for variable in model.trainable_variables])
    names = selection.variable_paths(model)
    after = trained(tmp_path / "run", 1)
    for name, values in zip(names, zip(*halves, strict=True), strict=True):
        np.testing.assert_allclose(after[name], np.mean(values, axis=0), rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("shape", [(2,), (1, 2), (4,)])
def test_weights_that_fit_nothing_are_refused(tmp_path, shape):
    class Weighted:
        spec = (
            tf.TensorSpec([7], tf.float64),
            tf.TensorSpec([1], tf.float64),
            tf.TensorSpec(shape, tf.float64),
        )

        def __len__(self):
            return COUNT

        def fetch(self, indices):
            return np.zeros((len(indices), 7)), np.zeros((len(indices), 1)), np.ones((len(indices), *shape))

    made = settings(one_output, (features(7), features(1)), keras.losses.MeanSquaredError)
    words = rf"targets float64 \[1\], weights float64 {re.escape(str(list(shape)))} and outputs float64 \[1\]"
    with pytest.raises(UserError, match=words):
        loop.run(dataclasses.replace(made, data=lambda: Dataset("w", Weighted(), Weighted(), "1")), tmp_path / "run")


def test_a_plain_function_is_brought_to_one_rank_as_keras_does(tmp_path):
    x = features(7)
    data = (x, x.sum(1).astype(np.float32))  # whose dtype is cast, too
    check_against_fit(tmp_path / "run", one_output, data, lambda: lambda y, outputs: keras.ops.square(y - outputs))


def test_targets_of_another_dtype_are_cast(tmp_path):
    x = features(7)
    made = settings(
        one_output,
        (x.astype(np.float32), x.sum(1)),
        lambda: lambda y, outputs: (y - outputs) ** 2,
        precision="float32",
        steps=1,
    )
    loop.run(made, tmp_path / "run")
    assert rows(tmp_path / "run" / "metrics.jsonl")[0]["loss"] < 100


def classifier(*behind, activation="softmax", units=10):
    return lambda: keras.Sequential([keras.Input((10,)), keras.layers.Dense(units, activation=activation), *behind])


def sparse():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("behind", [(), (keras.layers.Reshape((10,)),), (keras.layers.Rescaling(1.0),)])
def test_a_softmax_head_is_not_doubled(tmp_path, capsys, precision, behind):
    y = np.random.default_rng(1).integers(0, 10, COUNT).astype(np.int32)
    x = (5 * np.eye(10))[y].astype(np.float32)
    loop.run(settings(classifier(*behind), (x, y), sparse, precision=precision, steps=1), tmp_path / "run")
    assert "run.model gives probabilities (softmax), and run.loss takes logits" in capsys.readouterr().out
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(0)
    probabilities = classifier()()(x).numpy().astype(np.float64)
    expected = -np.log(probabilities[np.arange(COUNT), y]).mean()
    assert rows(tmp_path / "run" / "metrics.jsonl")[0]["loss"] == pytest.approx(
        expected, rel=1e-5 if precision == "float32" else 0.03
    )


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_a_sigmoid_head_is_not_doubled(tmp_path, precision):
    x = features(10).astype(np.float32)
    y = (x[:, :1] > 0).astype(np.float32)
    model = classifier(activation="sigmoid", units=1)
    loss = lambda: keras.losses.BinaryCrossentropy(from_logits=True)  # noqa: E731
    loop.run(settings(model, (x, y), loss, precision=precision, steps=1), tmp_path / "run")
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(0)
    p = model()(x).numpy().astype(np.float64)
    expected = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    assert rows(tmp_path / "run" / "metrics.jsonl")[0]["loss"] == pytest.approx(expected, rel=0.01)


def test_logits_that_look_like_little_are_logits(tmp_path, capsys):
    """Of a head whose kernel and bias are zero, and of sigmoids under a loss over classes: as Keras does."""
    y = np.random.default_rng(1).integers(0, 10, COUNT).astype(np.int32)
    x = features(10)
    zeros = lambda: keras.Sequential([keras.Input((10,)), keras.layers.Dense(10, kernel_initializer="zeros")])  # noqa: E731
    loop.run(settings(zeros, (x, y), sparse, steps=1), tmp_path / "zeros")
    assert rows(tmp_path / "zeros" / "metrics.jsonl")[0]["loss"] == pytest.approx(np.log(10))
    loop.run(settings(classifier(activation="sigmoid"), (x, y), sparse, steps=1), tmp_path / "sigmoid")
    losses, *_ = fitted(classifier(activation="sigmoid"), (x, y), sparse, steps=1)
    assert rows(tmp_path / "sigmoid" / "metrics.jsonl")[0]["loss"] == pytest.approx(losses[0])
    assert "probabilities" not in capsys.readouterr().out


class Penalty(keras.layers.Layer):
    """Adds to the loss what Keras's activity regularisers add: a mean over the examples."""

    def call(self, x):
        self.add_loss(0.3 * keras.ops.mean(x**2))
        return x


def penalised():
    l2 = keras.regularizers.L2(0.1)
    layers = [keras.layers.Dense(4, kernel_regularizer=l2, activity_regularizer=l2, name="low"), Penalty()]
    return keras.Sequential([keras.Input((7,)), *layers, keras.layers.Dense(1, name="top")])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("replicas", [1, 2])
def test_the_held_out_loss_is_the_training_loss_is_keras_val_loss(tmp_path, weighted, replicas):
    """Of the same examples: with weights, a regulariser of kernels and of activations, and add_loss."""
    x = features(7)
    data = (x, x.sum(1, keepdims=True), *([np.random.default_rng(2).uniform(0, 3, COUNT)] if weighted else []))
    made = settings(penalised, data, keras.losses.MeanSquaredError, replicas=replicas, eval_first=True, steps=1)
    loop.run(made, tmp_path / "run")
    before, step, _ = (row["loss"] for row in rows(tmp_path / "run" / "metrics.jsonl"))
    losses, _, _ = fitted(penalised, data, keras.losses.MeanSquaredError, steps=1)
    assert before == pytest.approx(step, rel=1e-6) and step == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize(("replicas", "accumulate"), [(1, 3), (2, 3)])
def test_a_penalty_counts_once_however_a_batch_is_divided(tmp_path, replicas, accumulate):
    made = {"replicas": replicas, "accumulate": accumulate}
    data = (features(7), features(7).sum(1, keepdims=True))
    check_against_fit(tmp_path / "run", penalised, data, keras.losses.MeanSquaredError, **made)


def test_replicas_of_one_process_that_would_mix_up_what_layers_add_are_refused(tmp_path):
    def model(**more):
        norm = keras.layers.BatchNormalization(synchronized=True, name="norm")
        return keras.Sequential(
            [keras.Input((7,)), keras.layers.Dense(4, name="low", **more), norm, keras.layers.Dense(1, name="top")]
        )

    data = (features(7), features(1))
    adding = functools.partial(model, activity_regularizer=L2)
    with pytest.raises(UserError, match="the synchronised BatchNorm 'norm' and layers that add to the loss"):
        loop.run(settings(adding, data, "mse"), tmp_path / "run")
    check_against_fit(tmp_path / "alone", adding, data, "mse", replicas=1, steps=3)
    check_against_fit(tmp_path / "run", functools.partial(model, kernel_regularizer=L2), data, "mse", steps=3)


@pytest.mark.parametrize("name", ["penalty", "mask"])
@pytest.mark.parametrize(
    ("replicas", "examples", "batch"),
    quick([(2, 13, 2), (1, 3, 8), (2, 3, 8), (3, 17, 6), (4, 18, 8)], (2, 13, 2), (4, 18, 8)),
)
def test_an_evaluation_is_that_of_keras_whatever_the_last_batch(tmp_path, name, replicas, examples, batch):
    """The loss is the mean over the examples of the loss of their batch, of which the last is shorter."""
    regularised = reader(True, kernel_regularizer=L2, activity_regularizer=L2)
    data, model, loss = {
        "penalty": ((features(7), features(7).sum(1, keepdims=True)), penalised, keras.losses.MeanSquaredError),
        "mask": ((*SEQUENCES, weights_of(STEPS)), regularised, per_class()),
    }[name]
    chosen = {"weighted_metrics": [keras.metrics.MeanSquaredError if name == "penalty" else "accuracy"]}
    made = settings(model, data, loss, replicas=replicas, eval_first=True, steps=1, **chosen)
    some = [column[:examples] for column in data]
    numbers = Dataset("numbers", ArraySource(*data), ArraySource(*some), "1")
    loop.run(dataclasses.replace(made, data=lambda: numbers, global_batch=batch), tmp_path / "run")
    x, y, weight = (*some, None)[:3]
    alone = compiled(model, loss, **chosen)
    expected = alone.evaluate(x, y, sample_weight=weight, batch_size=batch, verbose=0, return_dict=True)
    found = rows(tmp_path / "run" / "metrics.jsonl")[0]
    assert found["examples"] == examples and len(expected) == 2
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-9), key


@pytest.mark.slow
def test_ctc_is_that_of_fit(tmp_path):
    """Whose graph calls functions of TensorFlow's old kind, in float32."""
    model = lambda: keras.Sequential([keras.Input((6, 4)), keras.layers.Dense(5, name="d")])  # noqa: E731
    y = np.random.default_rng(1).integers(1, 5, (COUNT, 3)).astype(np.int32)
    check_against_fit(tmp_path / "run", model, (features(6, 4), y), keras.losses.CTC, tolerance=1e-5)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_accuracy_of_class_ids_in_any_shape(tmp_path, shape):
    y = np.random.default_rng(1).integers(0, 10, (COUNT, *shape)).astype(np.int32)
    x = features(10)
    loop.run(settings(classifier(activation=None), (x, y), sparse, steps=1, eval_first=True), tmp_path / "run")
    set_precision("float64")
    keras.utils.set_random_seed(0)
    right = classifier(activation=None)()(x).numpy().argmax(-1) == y.reshape(COUNT)
    assert rows(tmp_path / "run" / "metrics.jsonl")[0]["accuracy"] == pytest.approx(right.mean())


def test_what_tensorflow_says_of_shapes_is_cut_to_what_helps(tmp_path):
    data = (features(7).astype(np.float32), features(5).astype(np.float32))
    two = lambda: keras.Sequential([keras.Input((7,)), keras.layers.Dense(2)])  # noqa: E731
    for loss, words in (
        (lambda y, outputs: y - outputs, "Incompatible shapes: [3,5] vs. [3,2]"),
        (lambda: tf.function(lambda y, outputs: y - outputs), "Dimensions must be equal, but are 5 and 2"),
        (keras.losses.CategoricalCrossentropy, "must have the same shape. Received: target.shape=(3, 5)"),
    ):
        with pytest.raises(UserError) as found:
            loop.run(settings(two, data, loss, precision="float32"), tmp_path / "run")
        line = str(found.value)
        begin = "run.loss does not take run.data's targets float32 [5] and outputs float32 [2] of run"
        assert line.startswith(begin) and words in line, line
        assert "\n" not in line and not re.search(r"T=DT_FLOAT|\.;|node|Op:", line), line


@pytest.mark.parametrize("name", ["train_step", "test_step"])
def test_a_model_with_a_training_of_its_own_is_refused(tmp_path, name):
    def own():
        model = one_output()
        made = type("Own", (keras.Sequential,), {name: lambda self, *args, **kwargs: None})
        return made(model.layers)

    def patched():
        model = one_output()
        setattr(model, name, lambda *args, **kwargs: None)
        return model

    for model in (own, patched):
        with pytest.raises(UserError, match=f"run.model has a {name} of its own"):
            loop.run(settings(model, (features(7), features(1)), keras.losses.MeanSquaredError), tmp_path / "run")


def test_a_model_trains_on_what_it_was_compiled_with_if_no_loss_is_bound(tmp_path):
    def model():
        made = two_readers()
        made.compile(keras.optimizers.SGD(0.05), loss=two_losses(), loss_weights={"next": 0.3, "kind": 2.0})
        return made

    check_against_fit(tmp_path / "run", model, two_sets(), None, steps=3)


def test_the_loss_without_any_is_the_weighted_mean_over_all_targets(tmp_path):
    """Cross-entropy of logits, in NumPy; weights of 0 leave targets out, and so does a mask."""
    data = (*SEQUENCES, weights_of(STEPS))
    loop.run(settings(reader(True), data, None, steps=1, eval_first=True), tmp_path / "run")
    logits = np.array(compiled(reader(True), None)(data[0]))
    picked = np.take_along_axis(logits, data[1][..., None], axis=-1)[..., 0]
    each, weights = np.log(np.exp(logits).sum(-1)) - picked, data[2] * (data[0] != 0)
    before, step, _ = rows(tmp_path / "run" / "metrics.jsonl")
    for row in (before, step):
        assert row["loss"] == pytest.approx((each * weights).sum() / weights.sum(), rel=1e-12)
    right = (logits.argmax(-1) == data[1]) * weights
    assert before["accuracy"] == pytest.approx(right.sum() / weights.sum(), rel=1e-12)


def test_class_weights_are_those_of_fit(tmp_path):
    y = np.random.default_rng(1).integers(0, 10, COUNT).astype(np.int32)
    model, weights = classifier(activation=None), {0: 3.0, 4: 0.0}
    losses, after, _ = fitted(model, (features(10), y), sparse, steps=3, class_weight=weights)
    told = settings(model, (features(10), y), sparse, steps=3, class_weight=weights)
    loop.run(told, tmp_path / "run")
    found = [row["loss"] for row in rows(tmp_path / "run" / "metrics.jsonl") if row["split"] == "train"]
    np.testing.assert_allclose(found, losses, rtol=1e-6)
    for name, value in trained(tmp_path / "run", 3).items():
        np.testing.assert_allclose(value, after[name], rtol=1e-6, err_msg=name)


class Contrast(keras.losses.Loss):
    """Of each example against the others of its batch."""

    def call(self, y, outputs):
        return keras.ops.mean(keras.ops.square(outputs - keras.ops.mean(outputs, axis=0)), axis=-1) + 0.0 * y[:, 0]


def circle():
    return keras.losses.Circle()


def pair():
    return keras.Sequential([keras.Input((7,)), keras.layers.Dense(2)])


def on_a_sphere():
    return keras.Sequential([keras.Input((7,)), keras.layers.Dense(5), keras.layers.UnitNormalization()])


def labels(classes=3):
    return np.random.default_rng(1).integers(0, classes, COUNT).astype(np.int32)


@pytest.mark.parametrize(
    ("replicas", "model", "data", "loss"),
    [
        (2, one_output, (features(7), features(7)[:, :1]), Contrast),
        (3, one_output, (features(7), features(7)[:, :1], np.arange(COUNT) % 3 + 0.5), Contrast),
        (2, on_a_sphere, (features(7), labels()), circle),
        (3, pair, (features(7), features(2)), lambda: keras.losses.CosineSimilarity(axis=0)),
    ],
    ids=["contrastive", "weighted", "circle", "another axis"],
)
def test_a_loss_in_which_examples_meet_is_that_of_the_whole_batch(tmp_path, replicas, model, data, loss):
    check_against_fit(tmp_path / "run", model, data, loss, replicas=replicas)


def test_a_loss_in_which_examples_meet_is_refused_where_replicas_cannot_have_the_whole_batch(tmp_path):
    x = features(7)
    data = (x, x[:, :1])
    rule = selection.Rule(".*", reduction=LocalSGD(sync_every=2))
    for more, words in (
        ({"replicas": 1, "accumulate": 3}, "run.accumulate divides it: bind no run.accumulate"),
        ({"replicas": 2, "jit_compile": True}, "run.jit_compile"),
        ({"replicas": 2, "rules": [rule]}, "each replica trains by itself: reduce in every step"),
    ):
        with pytest.raises(UserError, match=f"depends on the others of its batch, .*{words}"):
            loop.run(settings(one_output, data, Contrast, **more), tmp_path / "run")
    check_against_fit(tmp_path / "alone", one_output, data, Contrast, replicas=1)


def test_variables_of_two_dtypes_are_clipped_together(tmp_path):
    """By the norm over both, in NumPy; without a bound they train as in Keras."""

    def model():
        half = keras.layers.Dense(1, dtype="float32", name="half")
        return keras.Sequential([keras.Input((7,)), keras.layers.Dense(4, name="low"), half])

    x = features(7)
    data = (x, x[:, :1])
    check_against_fit(tmp_path / "free", model, data, keras.losses.MeanSquaredError, tolerance=1e-5)
    made = settings(model, data, keras.losses.MeanSquaredError, steps=1, clip_norm=0.01)
    loop.run(made, str(tmp_path / "clipped"))
    keras.utils.set_random_seed(0)
    fresh, after = model(), trained(tmp_path / "clipped", 1)
    before = {v.path.removeprefix(f"{fresh.name}/"): np.array(v, np.float64) for v in fresh.trainable_variables}
    assert before.keys() == after.keys()
    moved = np.sqrt(sum(np.sum((after[path].astype(np.float64) - old) ** 2) for path, old in before.items()))
    assert moved == pytest.approx(0.05 * 0.01, rel=1e-4)


def mixed():
    layers = [
        keras.layers.Dense(4, "tanh", name="low"),
        keras.layers.Dense(6, "tanh", name="half", dtype="bfloat16"),
        keras.layers.Dense(2, name="top", dtype="float32"),
    ]
    return keras.Sequential([keras.Input((7,)), *layers])


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_a_layer_in_bfloat16_trains_beside_others(clip_norm, tmp_path):
    """As in plain Keras on one device, where the sum is clipped by the norm over both dtypes."""
    x = features(7).astype(np.float32)
    y = np.stack([x[:, 0], x[:, 1] - x[:, 2]], axis=1)
    keras.utils.set_random_seed(0)
    model, optimizer = mixed(), keras.optimizers.SGD(0.05)
    optimizer.build(model.trainable_variables)
    start = np.array(model.layers[0].kernel)

    @tf.function(autograph=False)
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(keras.losses.mean_squared_error(y, model(x, training=True)))
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        norm = tf.sqrt(tf.add_n([tf.reduce_sum(tf.cast(g, tf.float32) ** 2) for g in gradients]))
        scale = tf.minimum(1.0, (clip_norm or np.inf) / norm)
        optimizer.apply(
            [tf.cast(tf.cast(g, tf.float32) * scale, g.dtype) for g in gradients], model.trainable_variables
        )

    for _ in range(4):
        step()
    told = settings(mixed, (x, y), keras.losses.MeanSquaredError, precision="float32", steps=4, clip_norm=clip_norm)
    loop.run(told, tmp_path / "run")
    found = trained(tmp_path / "run", 4)
    for layer in model.layers:
        for variable in layer.variables:
            ours, theirs = found[f"{layer.name}/{variable.name}"], keras.ops.convert_to_numpy(variable)
            ours = ours.view(theirs.dtype).astype(np.float32)
            # One bit of bfloat16, which passes on to the layers beside it.
            np.testing.assert_allclose(ours, theirs.astype(np.float32), rtol=2**-7, atol=1e-3)
    ours, theirs = (kernel - start for kernel in (found["low/kernel"], np.array(model.layers[0].kernel)))
    assert np.abs(ours - theirs).max() < 0.05 * np.abs(theirs).max()


@pytest.mark.parametrize(
    "reduction",
    quick([PowerSGD(1), TopK(1 / 4, block=4), Quantized(4), LocalSGD(2)], PowerSGD(1), LocalSGD(2)),
    ids=str,
)
def test_a_layer_in_bfloat16_travels_by_any_reduction(reduction, tmp_path):
    x = features(7).astype(np.float32)
    told = settings(mixed, (x, x[:, :2]), keras.losses.MeanSquaredError, precision="float32", reduction=reduction)
    loop.run(told, tmp_path / "run")
    losses = [row["loss"] for row in rows(tmp_path / "run" / "metrics.jsonl") if row["split"] == "train"]
    assert losses[-1] < 0.9 * losses[0]


def test_a_run_in_a_thread_trains(tmp_path):
    made = settings(one_output, (features(7), features(1)), keras.losses.MeanSquaredError, steps=1, replicas=1)
    thread = threading.Thread(target=loop.run, args=(made, tmp_path / "run"))
    thread.start()
    thread.join()
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 2


@pytest.mark.parametrize(
    ("x", "words"),
    [
        ({"a": np.zeros((3, 2)), "b": [1, 2]}, "ArraySource got a int in x: give an array, such as np.asarray makes"),
        ([[1.0], [2.0]], "ArraySource got a float in x"),
    ],
)
def test_what_is_no_array_is_said(x, words):
    with pytest.raises(UserError, match=words):
        ArraySource(x, np.zeros(3))


def test_what_is_no_source_is_said(tmp_path):
    made = settings(one_output, (features(7), features(1)), keras.losses.MeanSquaredError)

    class Array:
        spec = (np.zeros(3), tf.TensorSpec([1], tf.float64))
        __len__ = fetch = None

    for source, words in (
        (tf.data.Dataset.range(3), "train of d is a .*Dataset.*: a Dataset holds sources"),
        (Array(), r"train of d has a spec of .*: write a tuple \(x, y\), or \(x, y, weight\), each a tf.TensorSpec or"),
    ):
        data = Dataset("d", source, source, "1")
        with pytest.raises(UserError, match=words):
            loop.run(dataclasses.replace(made, data=lambda data=data: data), tmp_path / "run")


@pytest.mark.parametrize("kind", quick([object, "S3", "U3"], object))
def test_text_is_a_models_input(tmp_path, kind):
    texts = ["a b", "b", "c a"]
    x = np.array([[texts[i % 3]] for i in range(COUNT)]).astype("S3" if kind is object else kind).astype(kind)
    y = np.arange(COUNT, dtype=np.float32)[:, None] / COUNT

    def model():
        layers = [
            keras.layers.TextVectorization(vocabulary=["a", "b"], output_sequence_length=4, name="text"),
            keras.layers.Embedding(4, 3, name="embedding"),
            keras.layers.Flatten(),
            keras.layers.Dense(1, name="d"),
        ]
        return keras.Sequential([keras.Input((1,), dtype="string"), *layers])

    loop.run(settings(model, (x, y), keras.losses.MeanSquaredError, precision="float32", steps=2), tmp_path / "run")
    _, weights, _ = fitted(model, (tf.constant(x.tolist()), y), keras.losses.MeanSquaredError, 2, "float32")
    for name, value in trained(tmp_path / "run", 2).items():
        np.testing.assert_allclose(value, weights[name], rtol=1e-5, atol=1e-7)


def test_what_users_write_is_made():
    def error(y, outputs):
        return keras.ops.abs(y - outputs)[:, 0]

    ready = keras.losses.Huber(0.3, name="ready")
    written = {
        "a": "mse",
        "b": [keras.losses.LogCosh, lambda: error],
        "c": (ready, error),
        "d": None,
        "e": lambda: "mae",
    }
    found = losses.made(written)
    assert list(found) == list("abcde") and found["d"] is None
    made = [found["a"], *found["b"], *found["c"], found["e"]]
    assert all(isinstance(each, losses.DividedLoss) for each in made)
    assert [made[0].name, made[1].name, made[3].inner, made[4].inner.fn] == ["mse", "log_cosh", ready, error]
    y, outputs = np.zeros([2, 1], np.float32), np.array([[1.0], [-3.0]], np.float32)
    expected = [
        5.0,
        *[float(loss()(y, outputs)) for loss in (keras.losses.LogCosh,)],
        2.0,
        float(ready(y, outputs)),
        2,
        2,
    ]
    np.testing.assert_allclose([float(each(y, outputs)) for each in made], expected, rtol=1e-6)
    assert losses.made(None) is None


def test_a_loss_that_was_made_before_the_precision_was_known_has_it():
    made = keras.losses.Huber(0.3, reduction="sum")
    keras.config.set_floatx("float64")
    found = losses.made(made)
    assert (found.inner.dtype, made.dtype, found.reduction) == ("float64", "float32", "sum")
    assert found.inner.get_config() == made.get_config()
    assert losses.made(found.inner).inner is found.inner


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            "squares",
            "run.loss: Keras has no loss 'squares'; nearest: 'squared_hinge'; write a name such as 'mse', or a class",
        ),
        (lambda: 3, "run.loss made a int: its factory must return a Keras loss or a function"),
    ],
)
def test_what_is_no_loss_is_one_line(given, words):
    with pytest.raises(UserError) as found:
        losses.made({"a": given})
    assert str(found.value) == words


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda y, outputs: y, True),
        (lambda y, outputs, margin=0.2: y, True),
        (functools.partial(lambda margin, y, outputs: y, 0.2), True),
        (lambda: None, False),
        (lambda delta=1.0, scale=2.0: None, False),
        (lambda model: None, False),
        (keras.losses.Huber, False),
        (keras.losses.mean_squared_error, True),
    ],
)
def test_functions_of_targets_are_told_from_factories(function, expected):
    assert losses.takes_targets(function) is expected


def test_losses_within_one_computation_are_of_one_part():
    """Of two that nest, the inner one counts; outside of any the loss is Keras's own."""
    loss = losses.made(per_class(ignore_class=0))
    y, outputs = tf.constant([0, 1, 2, 2]), tf.random.stateless_normal([4, 3], [0, 1])
    alone = float(per_class(ignore_class=0)()(y, outputs))
    assert float(loss(y, outputs)) == pytest.approx(alone, rel=1e-6)
    with losses.computing(losses.Part()) as outer:
        loss(y, outputs)
        with losses.computing(losses.Part(0.5, iter([tf.constant(12.0)]))) as inner:
            assert float(loss(y, outputs)) == pytest.approx(alone * 3 / 12 / 0.5, rel=1e-6)
        loss(y[:2], outputs[:2])
    assert [float(each) for each in outer.found] == [3.0, 1.0] and [float(each) for each in inner.found] == [3.0]


def test_a_part_without_any_target_adds_nothing():
    loss, y, outputs = losses.made(per_class(ignore_class=0)), tf.zeros([4], tf.int32), tf.ones([4, 3])
    for counts in ([tf.constant(5.0)], [tf.constant(0.0)]):
        with losses.computing(losses.Part(0.5, iter(counts))):
            assert float(loss(y, outputs)) == 0.0


def test_a_loss_is_tried_out_on_parts():
    y = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    fine, contrast = losses.made(keras.losses.CosineSimilarity), losses.made(Contrast)
    for loss in (fine, contrast):
        loss(tf.constant(y), tf.zeros([20, 2]))
    assert (losses.is_coupled(fine, y), losses.is_coupled(contrast, y)) == (False, True)


def test_a_large_output_is_tried_out_too():
    y = np.random.default_rng(0).integers(0, 2, (4, 256, 256, 1)).astype(np.float32)
    loss = losses.made(keras.losses.Dice)
    loss(tf.constant(y), tf.constant(0.5 * y))
    assert losses.is_coupled(loss, y)
