"""Going on from a file that Keras has saved, on another text; and what a run says before its first step."""

import json

import keras
import numpy as np
import pytest

from dist_partial.config import gin_files
from dist_partial.data import stdlib_prose
from dist_partial.errors import UserError
from dist_partial.models import byte_transformer, keras_file
from dist_partial.training import loop


def test_a_saved_model_is_the_same_model(tmp_path):
    model = byte_transformer(layers=1, width=16, heads=2)
    model.save(tmp_path / "model.keras")
    loaded = keras_file(str(tmp_path / "model.keras"))
    ids = np.arange(20).reshape(2, 10)
    np.testing.assert_array_equal(loaded(ids), model(ids))


def test_bad_files(tmp_path):
    (tmp_path / "damaged.keras").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UserError, match=r"no file '.*absent\.keras'; nearest: '/.*/damaged\.keras'"):
        keras_file(str(tmp_path / "absent.keras"))
    with pytest.raises(UserError, match=r"Keras cannot load .*damaged\.keras: "):
        keras_file(str(tmp_path / "damaged.keras"))
    keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x)]).save(tmp_path / "lambda.keras")
    with pytest.raises(UserError, match=r"Keras cannot load .*lambda\.keras: "):  # which would run its code
        keras_file(str(tmp_path / "lambda.keras"))


def test_prose():
    data = stdlib_prose(window=64)
    x, y = data.train.fetch(np.array([0, 5]))
    assert x.shape == y.shape == (2, 64) and (x[:, 1:] == y[:, :-1]).all()
    text = data.codec.decode(data.train.fetch(np.arange(500))[0].reshape(-1))
    assert text.count("the ") > 100 and data.unit == "byte" and 1000 > len(data.evaluation) > 500


@pytest.mark.slow
def test_evaluated_and_sampled_before_the_first_step(tmp_path):
    """What tiny_finetune.gin does, smaller: the first line is of the model as it was saved."""
    model = byte_transformer(layers=2, width=16, heads=2)
    model.save(tmp_path / "model.keras")
    file = tmp_path / "fine.gin"
    file.write_text(f"""
run.model = @keras_file
keras_file.path = '{tmp_path}/model.keras'
run.data = @stdlib_prose
stdlib_prose.window = 32
run.rules = [('train', r'(block_1|final_norm|head)/.*'), ('freeze', r'.*')]
run.steps = 4
run.global_batch = 8
run.eval_first = True
run.eval_examples = 40
run.activation_cache = 'memory'
sample.length = 4
""")
    for _ in range(2):  # the second finds it finished, and adds nothing
        loop.run(gin_files.load([file]).settings, tmp_path / "run")
    found = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(row["split"], row["step"]) for row in found][:2] == [("eval", 0), ("train", 1)]
    assert [row["step"] for row in found if row["split"] == "eval"] == [0, 4]
    x, y = stdlib_prose(window=32).evaluation.fetch(np.arange(40))
    loss = keras.losses.sparse_categorical_crossentropy(y, model(x), from_logits=True)
    assert found[0]["loss"] == pytest.approx(float(np.mean(loss)), rel=1e-5)
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0, 4]


def test_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras_file("~/model.keras")(np.ones([1, 2])), model(np.ones([1, 2])))
    (tmp_path / "notes.txt").write_text("")
    for path, words in {
        "~/modle.keras": rf"no file '~/modle\.keras'; nearest: '{tmp_path}/model\.keras'",
        "~/notes.txt": r"notes\.txt'.*\.keras",
        "": r"no file ''; write the path of one that is there",
        "a" * 300: "no file 'aaa",
        "~": "'~' is a folder",
        "~nobody-of-this-name/x.keras": "home",
    }.items():
        with pytest.raises(UserError, match=words):
            keras_file(path)
