"""Tasks of KerasHub as people have them: with their preprocessor, made already, and given texts."""

import re
import warnings

import keras
import keras_hub
import numpy as np
import pytest

from dist_partial import dataset, train
from dist_partial.errors import UserError
from dist_partial.models import ModelCopy, keras_file

TEXTS, LABELS = np.array(["a dull film", "a warm film"] * 20), np.array([0, 1] * 20, np.int32)
RULES = [("train", r"logits/.*"), ("freeze", r".*")]


@pytest.fixture
def task():
    keras.utils.set_random_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dull", "warm", "film"]
    tokenizer = keras_hub.models.BertTokenizer(vocabulary)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=6)
    backbone = keras_hub.models.BertBackbone(len(vocabulary), 1, 2, 8, 16, max_sequence_length=6)
    return keras_hub.models.BertTextClassifier(backbone, 2, preprocessor=preprocessor)


def test_a_copy_after_the_preprocessor_was_used(task):
    """Which makes a layer in its first call that a new one does not have yet."""
    expected = task.predict(TEXTS[:3], verbose=0)
    made = ModelCopy(task)()
    np.testing.assert_array_equal(made.predict(TEXTS[:3], verbose=0), expected)  # by the copy's own vocabulary


def test_a_copy_that_would_lack_a_vocabulary_is_refused():
    class Words(keras.Model):
        def __init__(self, **options):
            super().__init__(**options)
            self.head = keras.layers.Dense(1)

        def call(self, x):
            return self.head(x)

        def get_config(self):
            return {"name": self.name}

    model = Words()
    model.lookup = keras.layers.StringLookup(vocabulary=["warm"], name="late")
    model(np.ones([1, 3]))
    with pytest.raises(UserError, match=r"cannot be made again .*: its layer 'late' is not made by __init__"):
        ModelCopy(model)()


@pytest.mark.slow
def test_it_is_trained_on_texts_by_its_preprocessor(task, tmp_path):
    before = task.get_weights()
    result = train(task, dataset((TEXTS, LABELS)).map(task.preprocessor), rules=RULES, steps=2, folder=tmp_path / "run")
    assert result.model is task and result.metrics["examples"] == 4
    changed = {
        variable.path for variable, old in zip(task.weights, before, strict=True) if (variable.numpy() != old).any()
    }
    assert changed == {"logits/kernel", "logits/bias"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Keras's, of the optimizer with which a task compiles itself
        kept = keras_file(str(tmp_path / "run" / "model.keras"))
    for array, old in zip(kept.get_weights(), before, strict=True):  # as it was at first
        np.testing.assert_array_equal(array, old)


@pytest.mark.parametrize("made", [True, False])
def test_texts_alone_are_refused_with_what_to_do(task, tmp_path, made):
    with pytest.raises(UserError) as caught:
        train(task if made else lambda: task, (TEXTS, LABELS), rules=RULES, folder=tmp_path / "run")
    assert re.fullmatch(
        r".+ of data's examples is text, and model takes int32 there: map it by the preprocessor of the model, as in "
        r"dataset\(\(x, y\)\)\.map\(preprocessor\)",
        str(caught.value),
    )
