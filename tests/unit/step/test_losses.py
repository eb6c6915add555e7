"""What a loss is made of: runs on two replicas against plain Keras on one device, and NumPy."""

import re
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial.config.settings import Settings
from dist_partial.data import ArraySource, Dataset
from dist_partial.errors import UserError
from dist_partial.reductions.local_sgd import LocalSGD
from dist_partial.reductions.power_sgd import PowerSGD
from dist_partial.reductions.quantized import Quantized
from dist_partial.reductions.top_k import TopK
from dist_partial.step import losses
from dist_partial.step.evaluation_step import evaluation_step
from dist_partial.training import loop
from tests.helpers.against_fit import COUNT, check_against_fit, features, fitted, one_output, settings
from tests.helpers.cases import set_precision
from tests.helpers.files import rows, trained
from tests.helpers.marks import quick


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


@pytest.mark.parametrize("y_last", [pytest.param((), marks=pytest.mark.slow), (1,)])
@pytest.mark.parametrize("weight_last", [(), (1,)])
def test_weights_of_elements_in_any_shape(tmp_path, y_last, weight_last):
    """An example's loss is the weighted mean over its own elements: NumPy counts it at the first step."""
    x = features(3, 7)
    y = x.sum(2, keepdims=True)
    weight = np.random.default_rng(2).uniform(0, 3, (COUNT, 3, *weight_last))
    weight[0] = 0
    data = (x, y.reshape(COUNT, 3, *y_last), weight)
    loss = keras.losses.MeanSquaredError if y_last else one_an_element
    loop.run(settings(one_output_a_step, data, loss, steps=1, eval_first=True), tmp_path / "run")
    set_precision("float64")
    keras.utils.set_random_seed(0)
    outputs = one_output_a_step()(x).numpy()
    squares, weight = ((outputs - y) ** 2)[..., 0], weight.reshape(COUNT, 3)
    sums = weight.sum(1)
    examples = np.divide((squares * weight).sum(1), sums, out=np.zeros(COUNT), where=sums > 0)
    for row in rows(tmp_path / "run" / "metrics.jsonl")[:2]:  # held out, before the step, and the step
        assert row["loss"] == pytest.approx(examples.mean(), rel=1e-6), row


def one_output_a_step():
    return keras.Sequential([keras.Input((3, 7)), keras.layers.Dense(1, name="d")])


def one_an_element():
    return lambda y, outputs: keras.ops.square(y - outputs)  # [b, 3] and [b, 3, 1], brought to one rank


@pytest.mark.parametrize("shape", [(2,), (1, 2), (3,)])
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
    with pytest.raises(UserError, match="give one weight an example"):
        loop.run(
            Settings(**{**vars(made), "data": lambda: Dataset("w", Weighted(), Weighted(), "1")}), tmp_path / "run"
        )


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


def test_a_mean_by_weights_is_refused_where_there_are_weights(tmp_path):
    x = features(7)
    loss = lambda: keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")  # noqa: E731
    with pytest.raises(UserError, match=r"divides by the weights of a batch \(reduction='mean_with_sample_weight'\)"):
        loop.run(settings(one_output, (x, x[:, :1], np.ones(COUNT)), loss), tmp_path / "weighted")
    check_against_fit(tmp_path / "run", one_output, (x, x[:, :1]), loss)


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


@pytest.mark.parametrize(
    ("replicas", "examples", "batch"),
    quick([(2, 13, 2), (1, 3, 8), (2, 3, 8), (3, 17, 6), (4, 18, 8)], (2, 13, 2), (2, 3, 8)),
)
def test_examples_beyond_the_last_whole_batch_weigh_as_much(tmp_path, replicas, examples, batch):
    """Held-out examples that do not fill the batches, and what layers add for them: Keras's evaluate, one at a time."""
    x = features(7)
    y = x.sum(1, keepdims=True)
    loss = keras.losses.MeanSquaredError
    made = settings(penalised, (x, y), loss, replicas=replicas, eval_first=True, steps=1)
    data = Dataset("numbers", ArraySource(x, y), ArraySource(x[:examples], y[:examples]), "1")
    loop.run(Settings(**{**vars(made), "data": lambda: data, "global_batch": batch}), tmp_path / "run")
    _, _, model = fitted(penalised, (x, y), loss, steps=0)
    expected = model.evaluate(x[:examples], y[:examples], batch_size=1, verbose=0)
    assert rows(tmp_path / "run" / "metrics.jsonl")[0]["loss"] == pytest.approx(expected, rel=1e-6)


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


def test_accuracy_is_weighted():
    """By hand: right are the first two, of which the second weighs nothing."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False, kernel_initializer="identity")])
    x = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.float32)
    y, weight = np.array([0, 1, 1, 0], np.int32), np.array([1, 0, 1, 1], np.float32)
    evaluate = evaluation_step(tf.distribute.get_strategy(), model, losses.unreduced(sparse()))
    batches = iter(tf.data.Dataset.from_tensors((x, y, weight)))
    *_, right, total = evaluate(batches, tf.constant(1), tf.constant(4)).numpy()
    assert (right, total) == (1, 3)


def test_what_tensorflow_says_of_shapes_is_cut_to_what_helps():
    spec = (tf.TensorSpec([3]), tf.TensorSpec([]))
    for loss, words in (
        (lambda y, outputs: y - outputs, "Dimensions must be equal, but are 4 and 2 with input shapes: [4], [4,2]"),
        (tf.function(lambda y, outputs: y - outputs), "Dimensions must be equal, but are 4 and 2 with input shapes:"),
        (keras.losses.CategoricalCrossentropy().call, "must have the same rank (ndim). Received: target.shape=(4,)"),
    ):
        with pytest.raises(UserError) as found:
            losses.check_shapes(loss, spec, tf.zeros([1, 2]), 4)
        line = str(found.value)
        assert line.startswith("run.loss does not take run.data's targets float32 [4] and outputs float32 [4, 2] of")
        assert words in line and "\n" not in line and not re.search(r"T=DT_FLOAT|\.;|node|Op:", line), line


def test_class_ids_end_below_the_number_of_classes():
    losses.check_class_ids(sparse(), "d", np.array([0, 2]), 3)
    with pytest.raises(UserError, match=r"d has targets up to 3 .* classes 0 to 2: bind a model of at least 4 classes"):
        losses.check_class_ids(sparse(), "d", np.array([0, 3]), 3)


@pytest.mark.parametrize("name", ["train_step", "test_step", "compute_loss", "compute_metrics"])
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


def test_what_a_model_was_compiled_with_is_said_to_be_left_aside(tmp_path, capsys):
    def compiled():
        model = one_output()
        model.compile("adam", loss="mae")
        return model

    loop.run(settings(compiled, (features(7), features(1)), keras.losses.MeanSquaredError, steps=1), tmp_path / "run")
    assert "run.model is compiled: run.loss and run.optimizer take the place" in capsys.readouterr().out


class Contrast(keras.losses.Loss):
    """Of each example against the others of its batch."""

    def call(self, y, outputs):
        return keras.ops.mean(keras.ops.square(outputs - keras.ops.mean(outputs, axis=0)), axis=-1) + 0.0 * y[:, 0]


def circle():
    return keras.losses.Circle()


def test_a_loss_in_which_examples_meet_is_refused_where_batches_are_divided(tmp_path):
    x = features(7)
    data = (x, x[:, :1])
    for more in ({"replicas": 2}, {"replicas": 1, "accumulate": 3}):
        with pytest.raises(UserError, match="depends on the others of its batch, and a batch is divided into"):
            loop.run(settings(one_output, data, Contrast, **more), tmp_path / "run")
    check_against_fit(tmp_path / "alone", one_output, data, Contrast, replicas=1)
    y = np.random.default_rng(1).integers(0, 3, COUNT).astype(np.int32)
    with pytest.raises(UserError, match="depends on the others of its batch"):
        loop.run(settings(classifier(activation=None), (features(10), y), circle), tmp_path / "circle")


@pytest.mark.parametrize("reduction", ["sum", "none", None])
def test_a_loss_that_fit_sums_is_refused(tmp_path, reduction):
    loss = lambda: keras.losses.MeanSquaredError(reduction=reduction)  # noqa: E731
    with pytest.raises(UserError, match=f"sums over the batch .reduction={reduction!r}."):
        loop.run(settings(one_output, (features(7), features(1)), loss), tmp_path / "run")


def test_losses_along_another_axis_are_refused(tmp_path):
    loss = lambda: keras.losses.CosineSimilarity(axis=0)  # noqa: E731
    two = lambda: keras.Sequential([keras.Input((7,)), keras.layers.Dense(2)])  # noqa: E731
    with pytest.raises(UserError, match=r"gives losses of the shape \[2\] for 9 examples"):
        loop.run(settings(two, (features(7), features(2)), loss), tmp_path / "run")


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
        ({"a": np.zeros((3, 2))}, "ArraySource got x as a dict: give one array"),
        ([[1.0], [2.0]], "ArraySource got x as a list"),
    ],
)
def test_what_is_no_array_is_said(x, words):
    with pytest.raises(UserError, match=words):
        ArraySource(x, np.zeros(3))


def test_what_is_no_source_is_said(tmp_path):
    made = settings(one_output, (features(7), features(1)), keras.losses.MeanSquaredError)

    class Two:
        spec = ({"a": tf.TensorSpec([7], tf.float64)}, tf.TensorSpec([1], tf.float64))
        __len__ = fetch = None

    for source, words in (
        (tf.data.Dataset.range(3), "train of d is a .*Dataset.*: a Dataset holds sources"),
        (Two(), r"train of d has a spec of \(dict, TensorSpec\): write one tf.TensorSpec for x"),
    ):
        data = Dataset("d", source, source, "1")
        with pytest.raises(UserError, match=words):
            loop.run(Settings(**{**vars(made), "data": lambda data=data: data}), tmp_path / "run")


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
