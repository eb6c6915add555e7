"""A run in a process that has done other things: as in a new one, and nothing of it stays behind."""

import json
import textwrap

import keras
import numpy as np
import pytest

from dist_partial import sample, selection, session, train
from dist_partial.config import gin_files
from dist_partial.config.settings import Settings
from dist_partial.data import Dataset
from dist_partial.distributed.replicas import create
from dist_partial.errors import UserError
from dist_partial.export import restore
from dist_partial.training import build, loop
from dist_partial.training.cost_model import Machine, estimate
from tests.helpers.cases import dataset
from tests.helpers.strategies import in_process

X = np.random.default_rng(0).normal(size=(8, 3))


def data() -> Dataset:
    return dataset("points", X, X.sum(1))


def unnamed() -> keras.Model:
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])


def settings(**more) -> Settings:
    given = {
        "rules": [("train", r"dense_1/.*"), ("freeze", ".*")],
        "model": unnamed,
        "data": data,
        "loss": keras.losses.MeanSquaredError,
        "steps": 2,
        "global_batch": 4,
        "replicas": in_process,
    }
    return Settings(**given | more)


def test_names_do_not_depend_on_what_the_process_has_made(tmp_path):
    for folder in ("one", "two"):
        keras.layers.Dense(1), unnamed()
        loop.run(settings(), tmp_path / folder)
    loop.run(settings(steps=3), tmp_path / "one")
    contents = [(tmp_path / folder / "plan.json").read_text() for folder in ("one", "two")]
    assert contents[0] == contents[1]
    paths = [each["path"] for each in json.loads(contents[0])["variables"]]
    assert paths == ["dense/kernel", "dense/bias", "dense_1/kernel", "dense_1/bias"]


def test_runs_on_other_numbers_of_replicas(tmp_path):
    """TensorFlow would have the collectives of all of them meet under one key."""
    for number in (2, 4, 2):
        loop.run(settings(replicas=lambda: create("mirrored", cpu=number)), tmp_path / f"of {number}")  # noqa: B023
        plan = json.loads((tmp_path / f"of {number}" / "plan.json").read_text())
        assert plan["workers"] == number


def test_the_process_counts_on_as_if_nothing_had_been_made():
    keras.utils.clear_session(free_memory=False)
    assert keras.layers.Dense(1).name == "dense"
    build.build(settings(), settings().replicas())
    with pytest.raises(UserError, match="no rule covers"):
        build.build(settings(rules=[("train", "absent")]), settings().replicas())
    assert keras.layers.Dense(1).name == "dense_1"


def test_layers_that_a_module_holds_keep_their_numbers(tmp_path, monkeypatch):
    """As in a new process, in which they are made when the module is imported."""
    (tmp_path / "holding.py").write_text(
        "import keras\nSHARED = keras.Sequential([keras.layers.Dense(3)])\n"
        "def model(): return keras.Sequential([keras.Input((3,)), SHARED, keras.layers.Dense(1)])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "c.gin"
    file.write_text(
        "import holding\nrun.model = @holding.model\nrun.data = @stdlib_shapes\nrun.rules = [('train', '.*')]\n"
    )
    keras.layers.Dense(1)
    for _ in range(2):
        factory = gin_files.load([file]).settings.model
        with session.numbered_afresh(factory):
            assert selection.variable_paths(factory())[::2] == ["sequential/dense/kernel", "dense_1/kernel"]
    named = keras.layers.Dense(3, name="dense")
    with session.numbered_afresh(lambda: named):
        assert keras.layers.Dense(3).name == "dense_1"


def other() -> tuple:
    return keras.config.floatx(), keras.config.dtype_policy().name


def test_precision_is_put_back(tmp_path):
    keras.config.set_floatx("float16")
    keras.config.set_dtype_policy("mixed_bfloat16")
    before = other()
    told = settings(precision="float64")
    loop.run(told, tmp_path / "run")
    assert other() == before
    with pytest.raises(UserError):
        loop.run(settings(precision="float64", rules=[("train", "absent")]), tmp_path / "other")
    assert other() == before
    estimate(told, Machine(2, 1e9))
    assert other() == before


@pytest.mark.slow
def test_commands_put_precision_back(tmp_path, monkeypatch):
    file = tmp_path / "c.gin"
    file.write_text(
        textwrap.dedent("""
            run.model = @byte_transformer
            byte_transformer.layers = 1
            byte_transformer.width = 8
            byte_transformer.heads = 1
            run.data = @stdlib_corpus
            stdlib_corpus.window = 8
            run.rules = [('train', r'.*')]
            run.steps = 1
            run.global_batch = 2
            run.eval_examples = 2
            run.precision = 'float64'
            sample.length = 2
        """)
    )
    folder = f"--run_dir={tmp_path / 'run'}"
    assert train.main([f"--gin_file={file}", folder]) == 0
    assert other() == ("float32", "float32")
    assert sample.main([folder]) == 0
    assert other() == ("float32", "float32")
    base = restore.base(file)
    assert other() == ("float32", "float32") and {v.dtype for v in base.model.trainable_variables} == {"float64"}
    assert selection.variable_paths(base.model)[0] == "embedding/embeddings"
