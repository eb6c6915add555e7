"""Metrics: what users write becomes what `Model.compile` takes; what a run chooses itself, against NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial import compat
from dist_partial.errors import UserError
from dist_partial.step import losses, metrics
from dist_partial.step.keras_names import names_in


def cross_entropy(**more):
    return losses.made(keras.losses.SparseCategoricalCrossentropy(from_logits=True, **more))


def test_what_users_write_is_made():
    def error(y, outputs):
        return keras.ops.abs(y - outputs)

    ready = keras.metrics.Mean(name="ready")
    written = {"a": ["accuracy", keras.metrics.AUC, lambda: keras.metrics.Mean(name="made")], "b": (ready, error, None)}
    found = metrics.made(written, "run.metrics")
    assert list(found) == ["a", "b"]
    assert found["a"][0] == "accuracy" and isinstance(found["a"][1], keras.metrics.AUC) and found["a"][2].name == "made"
    assert found["b"] == [ready, error, None]
    assert metrics.made(None, "run.metrics") is None


def test_a_metric_that_was_made_before_the_precision_was_known_has_it():
    made = keras.metrics.MeanSquaredError(name="square")
    keras.config.set_floatx("float64")
    found = metrics.made([made], "run.metrics")[0]
    assert (found.name, found.dtype, made.dtype) == ("square", "float64", "float32")
    assert metrics.made(found, "run.metrics") is found


@pytest.mark.parametrize("given", [3, lambda: "accuracy", dict.fromkeys("ab", object)])
def test_what_is_no_metric_is_one_line(given):
    with pytest.raises(UserError) as found:
        metrics.made([given], "run.weighted_metrics")
    line = str(found.value)
    assert line.startswith("run.weighted_metrics has a") and "give Keras metrics, such as" in line and "\n" not in line


def test_results_are_called_as_in_a_new_process():
    """Keras counts metrics without a name through the process: a cell that is run again makes `auc_1` of `auc`."""
    for _ in range(2):
        before = keras.metrics.AUC(), keras.metrics.AUC(curve="PR"), keras.metrics.FalsePositives()
    named = keras.metrics.AUC(name="score"), keras.metrics.MeanSquaredError(name="mean_squared_error_3")
    assert before[0].name != "auc"  # as Keras calls it
    given = [(metric.name, metric) for metric in (*before, *named)]
    names = [name for name, _ in metrics.as_in_new_process(given)]
    assert names == ["auc", "auc_1", "false_positives", "score", "mean_squared_error_3"]
    by_output = [(f"{output}_{metric.name}", metric) for output, metric in zip("ab", before[:2], strict=True)]
    assert [name for name, _ in metrics.as_in_new_process(by_output)] == ["a_auc", "b_auc_1"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("acuracy", "Keras has no metric 'acuracy'; nearest: 'accuracy'"),
        ("Acuracy", "nearest: 'accuracy'"),
        ("false_positive", "nearest: 'false_positives'"),
        ("MeanIoU", "a name is not enough for 'MeanIoU'"),
    ],
)
def test_a_name_that_is_none_of_keras_has_near_ones(name, words):
    with pytest.raises(UserError) as found:
        metrics.made({"a": [name]}, "run.metrics")
    assert words in str(found.value) and "\n" not in str(found.value)


def test_the_names_that_are_shown_are_those_that_keras_takes():
    shown = names_in(keras.losses)
    assert {"huber", "kl_divergence"} <= set(shown) and "categorical_generalized_cross_entropy" not in shown
    assert {"auc", "f1_score", "mean_io_u"} <= set(names_in(keras.metrics))


def test_a_misspelt_loss_has_near_ones():
    with pytest.raises(UserError, match=r"Keras has no loss 'sparse_.*i'; nearest: 'sparse_categorical_crossentropy'"):
        losses.made("sparse_categorical_crossentropi")


IDS = tf.constant([[0, 2], [1, 1], [2, 0]])
LOGITS = tf.random.stateless_normal([3, 2, 3], [1, 2])


@pytest.mark.parametrize(
    ("y", "outputs", "text", "unit", "names"),
    [
        (IDS, LOGITS, False, None, ["accuracy"]),
        (IDS[:, :, None], LOGITS, False, None, ["accuracy"]),
        (IDS, LOGITS, True, None, ["accuracy", "perplexity"]),
        (IDS, LOGITS, True, "byte", ["accuracy", "bits_per_byte"]),
        (tf.cast(IDS, tf.float32), LOGITS, False, None, []),  # no ids
        (IDS, LOGITS[:, :, :1], False, None, []),  # one logit is no choice
        (IDS, LOGITS[:, :1], False, None, []),  # another number of targets than of outputs, as for CTC
        ({"a": IDS}, {"a": LOGITS}, False, None, []),
        (None, LOGITS, True, None, []),
    ],
)
def test_suggested_metrics_follow_from_the_data(y, outputs, text, unit, names):
    assert [each.name for each in metrics.suggested(y, outputs, cross_entropy(), text, unit)] == names


def test_nothing_is_suggested_for_several_losses_or_a_loss_of_the_models_own():
    for loss in ({"a": cross_entropy()}, None):
        assert metrics.suggested(IDS, LOGITS, loss, True, "byte") == []


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("unit", "function"), [("byte", lambda mean: mean / np.log(2)), (None, np.exp)])
def test_bits_and_perplexity_are_those_of_the_weighted_mean(unit, function, weighted):
    """With a mask of the outputs and ignore_class, in NumPy."""
    loss, weight = cross_entropy(ignore_class=2), np.array([[1.0, 0.5], [2.0, 0.0], [3.0, 1.5]], np.float32)
    mask = np.array([[False, True], [True, True], [True, True]])
    masked = tf.identity(LOGITS)
    compat.set_mask(masked, tf.constant(mask))
    metric = metrics.suggested(IDS, masked, loss, True, unit)[1]
    metric.update_state(IDS, masked, weight if weighted else None)
    logits, ids = LOGITS.numpy(), IDS.numpy()
    each = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, ids[..., None], -1)[..., 0]
    weights = mask * (ids != 2) * (weight if weighted else 1)
    assert float(metric.result()) == pytest.approx(function((each * weights).sum() / weights.sum()), rel=1e-6)
