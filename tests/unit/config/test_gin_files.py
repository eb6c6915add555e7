"""gin files: includes, references, a user's own module, mistakes and what was never used."""

import importlib
import json
import re
import sys
import textwrap
from pathlib import Path

import keras
import numpy as np
import pytest

from dist_partial import selection
from dist_partial.config import gin_files
from dist_partial.config.settings import Settings
from dist_partial.distributed.replicas import create
from dist_partial.errors import Raised, UserError
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.reductions.local_sgd import LocalSGD
from dist_partial.schedules import Lisa
from dist_partial.training import loop
from dist_partial.training.build import build
from tests import ROOT
from tests.helpers import user_module

BASE = """
    import tests.helpers.user_module
    run.model = @tests.helpers.user_module.model
    run.data = @tests.helpers.user_module.data
    run.rules = [('train', r'head/.*'), ('freeze', r'.*')]
    run.steps = 3
    run.global_batch = 4
"""
BASE_WITHOUT_MODEL = "run.data = @stdlib_shapes\nrun.rules = [('train', '.*')]\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


@pytest.fixture
def load(tmp_path):
    """Loads a file of the given text on top of the base, with `params` over it."""

    def loader(text: str = "", *params: str) -> gin_files.Configuration:
        return gin_files.load([write(tmp_path / "user.gin", textwrap.dedent(BASE) + textwrap.dedent(text))], params)

    return loader


def test_bindings_reach_the_settings(load):
    settings = load("sample.temperature = 0.25\nreplicas.kind = 'default'").settings
    assert isinstance(settings, Settings)
    assert (settings.steps, settings.global_batch, settings.sampling.temperature) == (3, 4, 0.25)
    assert settings.rules == [("train", "head/.*"), ("freeze", ".*")]
    assert settings.model().name == "tiny"
    assert settings.data().name == "points"
    replicas = settings.replicas()
    strategy, line = replicas.strategy, replicas.description
    assert strategy.num_replicas_in_sync == 1 and line == "replicas: 1, default strategy"


def test_later_files_and_params_win(tmp_path):
    first = write(tmp_path / "first.gin", BASE)
    second = write(tmp_path / "second.gin", "run.steps = 7\nrun.seed = 8\n")
    settings = gin_files.load([first, second], ["run.seed = 9"]).settings
    assert (settings.steps, settings.seed, settings.global_batch) == (7, 9, 4)
    assert gin_files.load([first]).settings.seed == 0  # nothing is left of an earlier call


def test_an_include_is_relative_to_its_file(tmp_path, monkeypatch):
    write(tmp_path / "configs" / "base.gin", BASE)
    write(tmp_path / "configs" / "more" / "inner.gin", "include '../base.gin'\nrun.seed = 5\n")
    outer = write(tmp_path / "configs" / "outer.gin", "include 'more/inner.gin'\nrun.steps = 11\n")
    monkeypatch.chdir(tmp_path)
    for file in (outer, outer.relative_to(tmp_path)):
        settings = gin_files.load([file]).settings
        assert (settings.steps, settings.seed, settings.global_batch) == (11, 5, 4)


def test_each_file_includes_its_own_neighbour(tmp_path, monkeypatch, caplog):
    """Neither the working directory nor an earlier file's folder is asked for a file of the same name."""
    write(tmp_path / "base.gin", "run.steps = 1\n")
    monkeypatch.chdir(tmp_path)
    files = []
    for i, name in enumerate(["it's one", "two"]):
        write(tmp_path / name / "base.gin", BASE + f"    run.steps = {10 + i}\n")
        files.append(write(tmp_path / name / "user.gin", "include 'base.gin'\n"))
    assert gin_files.load(files).settings.steps == 11
    assert gin_files.load(files[::-1]).settings.steps == 10
    assert not caplog.records  # gin logs errors about files that it finds in the end


@pytest.mark.parametrize("line", ["import tests.helpers.user_module", "from tests.helpers import user_module"])
def test_ways_to_import(line, tmp_path):
    base = textwrap.dedent(BASE).replace("import tests.helpers.user_module", line)
    assert gin_files.load([write(tmp_path / "user.gin", base)]).settings.data().name == "points"


def test_scoped_references_to_a_users_module(load):
    settings = load(
        """
        run.model = @wide/tests.helpers.user_module.model
        wide/model.units = 7
        model.units = 5
        run.data = @other/user_module.data
        other/tests.helpers.user_module.data.seed = 3
        """
    ).settings
    assert settings.model().get_layer("body").units == 7
    assert settings.data().fingerprint == user_module.data(seed=3).fingerprint


def test_rules_in_full_form(load):
    settings = load(
        """
        run.rules = [@head/Rule(), @body/Rule(), ('freeze', r'.*')]
        head/Rule.match = r'head/.*'
        head/Rule.optimizer = @head/keras.optimizers.SGD
        head/keras.optimizers.SGD.momentum = 0.5
        head/Rule.learning_rate = 0.25
        head/Rule.reduction = @half/all_reduce()
        half/all_reduce.dtype = 'bfloat16'
        body/Rule.match = r'body/kernel'
        body/Rule.rows = (1, 3)
        run.optimizer = @keras.optimizers.Adam
        keras.optimizers.Adam.learning_rate = @keras.optimizers.schedules.CosineDecay()
        keras.optimizers.schedules.CosineDecay.initial_learning_rate = 0.125
        keras.optimizers.schedules.CosineDecay.decay_steps = 100
        """
    ).settings
    head, body, rest = selection.parse_rules(settings.rules)
    assert (head.match, head.train, head.rows) == ("head/.*", True, None)
    assert (body.match, body.rows, body.optimizer) == ("body/kernel", (1, 3), None)
    assert (rest.match, rest.train) == (".*", False)
    assert head.reduction == AllReduce("bfloat16")
    built = build(settings, settings.replicas())
    first, second = (group.optimizer for group in built.optimizers)
    assert isinstance(first, keras.optimizers.SGD) and first.momentum == 0.5 and float(first.learning_rate) == 0.25
    assert isinstance(second, keras.optimizers.Adam) and float(second.learning_rate) == 0.125
    assert [entry.path for entry in built.plan.trained] == ["head/kernel", "head/bias", "body/kernel"]


@pytest.mark.parametrize(
    ("text", "attribute", "kind"),
    [
        ("run.optimizer = @keras.optimizers.AdamW", "optimizer", keras.optimizers.AdamW),
        ("run.optimizer = @SGD", "optimizer", keras.optimizers.SGD),
        ("run.optimizer = @Lion\nLion.beta_1 = 0.5", "optimizer", keras.optimizers.Lion),
        ("run.loss = @keras.losses.Huber\nHuber.delta = 2.0", "loss", keras.losses.Huber),
        ("run.loss = @tests.helpers.user_module.never_finite", "loss", object),
        ("run.model = @two_dense", "model", keras.Model),
    ],
)
def test_factories_by_name(text, attribute, kind, load):
    assert isinstance(getattr(load(text).settings, attribute)(), kind)


def test_losses_and_metrics_are_bound_as_compile_takes_them(load):
    """Names, factories and what is made already, by output."""
    settings = load(
        "run.loss = {'a': 'mse', 'b': @keras.losses.Huber(), 'c': @keras.losses.Poisson}\nHuber.delta = 2.0\n"
        "run.loss_weights = {'a': 2.0, 'b': 0.5}\n"
        "run.metrics = {'a': ['mae', @keras.metrics.TopKCategoricalAccuracy()]}\nTopKCategoricalAccuracy.k = 2\n"
        "run.weighted_metrics = ['accuracy']\nrun.class_weight = {0: 2.0}"
    ).settings
    assert settings.loss["a"] == "mse" and settings.loss["b"](np.zeros(1), np.full(1, 3.0)) == 2.0 * (3.0 - 1.0)
    assert isinstance(settings.loss["c"](), keras.losses.Poisson)
    name, metric = settings.metrics["a"]
    assert name == "mae" and metric.get_config()["k"] == 2
    assert (settings.loss_weights, settings.weighted_metrics) == ({"a": 2.0, "b": 0.5}, ["accuracy"])
    assert settings.class_weight == {0: 2.0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run.stepz = 3", ["run has no parameter 'stepz'", "steps", "user.gin", "line 8"]),
        ("runn.steps = 3", ["'runn'", "nearest: 'run'", "line 8"]),
        ("sample.temprature = 3", ["sample has no parameter 'temprature'", "temperature"]),
        ("all_reduce.dtypes = 'x'", ["all_reduce has no parameter 'dtypes'", "dtype"]),
        ("model.unit = 3", ["model has no parameter 'unit'", "units"]),
        ("run.model = @two_dens", ["'two_dens'", "two_dense"]),
        ("run.optimizer = @keras.optimizers.Adm", ["'keras.optimizers.Adm'", "keras.optimizers.Adam"]),
        ("run.data = @scope/stdlib_corpsu", ["'stdlib_corpsu'", "stdlib_corpus"]),
        ("run.model = @user_module.modle", ["'user_module.modle'", "user_module.model"]),
        ("run.rules = [('train', r'head/.*'", ["user.gin", "not closed"]),
        ("run.steps = 'abc", ["user.gin"]),
        ("run.steps =", ["line 8"]),
        ("run.steps 3", ["line 8"]),
        ("run.steps = %undefined", ["%undefined is not defined"]),
        ("run.steps = '3'", ["run.steps is '3'"]),
        ("run.steps = 0", ["run.steps is 0"]),
        ("run.model = @two_dense()", ["run.model is", "without ()"]),
        ("run.optimizer = @keras.optimizers.Adam()", ["run.optimizer is", "without ()"]),
        ("run.rules = [@head/Rule()]", ["not bound: head/Rule.match"]),
        ("run.precision = 'float8'", ["run.precision is 'float8'", "'mixed_bfloat16'"]),
        ("run.statistics = 'none'", ["run.statistics is 'none'", "'trained'"]),
        ("run.clip_norm = -1.0", ["run.clip_norm is -1.0"]),
        ("run.reduction = @all_reduce()\nall_reduce.dtype = 'int8'", ["all_reduce.dtype is 'int8'"]),
        ("include 'absent.gin'", ["user.gin includes 'absent.gin'", "beside it"]),
        ("include 'user.gin'", ["user.gin", "includes itself"]),
        ("run.rules = 'train'", ["run.rules is 'train'", "a str and no list", "[('train', r'head/.*')"]),
        ("run.rules = [('trian', '.*')]", ["rule 1 is ('trian', '.*')", "write ('train', pattern)"]),
        ("run.rules = [('train', '(')]", ["rule 1", "'('", "regular expression"]),
        ("run.rules = [@a/Rule()]\na/Rule.match = 'h'\na/Rule.learning_rate = 'a'", ["rule 'h': learning_rate is 'a'"]),
        ("run.data = @tests.helpers.user_module.data()", ["run.data is Dataset(", "without ()"]),
        ("run.steps = four", ["run.steps is 'four'", "whole number", "user.gin, line 8"]),
        ("run.steps = four  # 4", ["run.steps is 'four'", "whole number"]),
        ("run.clip_norm = none", ["run.clip_norm is 'none'", "a number above 0, or None"]),
        ("run.eval_first = true", ["run.eval_first is 'true'", "True or False"]),
        ("run.leave = rest", ["run.leave is 'rest'", "'reset'"]),
        ("run.leave = reset", ["a text needs quotes: run.leave = 'reset' ("]),
        ("sample.prompt = a", ["a text needs quotes: sample.prompt = 'a' ("]),
        ("Adam.learning_rate = fast", ["Adam.learning_rate is 'fast'", "a number"]),
        ("model.units = few", ["model.units is 'few'", "whole number"]),
        ("run.model = two_dense", ["run.model is 'two_dense'", "in a gin file @"]),
        ("run.rules = [('train', head)]", ["a text needs quotes: run.rules = [('train', 'head')]"]),
        ("run.rules = [\n  head]", ["a text needs quotes: 'head'"]),
        ("run:\n  leave = reset", ["a text needs quotes: leave = 'reset'"]),
        ("sample.prompt = '\0n'", ["cannot be read as a text: for a backslash write two", "user.gin, line 8"]),
        ("sample.prompt = '\\x'", ["cannot be read as a text: for a backslash write two"]),
        ("sample.prompt = a\\b", ["a text needs quotes: sample.prompt = 'a'"]),
        ("local_sgd.steps = 4", ["local_sgd has no parameter 'steps'; it has sync_every, offset, outer_optimizer"]),
        ("local_sgd.keep = 4", ["; it has sync_every, offset, outer_optimizer, compressor, keep_residual_local"]),
        ("all_reduce.precision = 'a'", ["; it has dtype"]),
        ("run.xyz = 4", ["run has no parameter 'xyz'; nearest: "]),
        ("run.epochs = 4", ["run has no parameter 'epochs': write run.steps = epochs x examples / run.global_batch ("]),
        ("run.lr = 4", ["run has no parameter 'lr': write Adam.learning_rate, or that of another optimizer ("]),
        ("run.temperature = 4", ["run has no parameter 'temperature': write sample.temperature ("]),
        ("sample.n = 4", ["sample has no parameter 'n': write sample.count, how many texts ("]),
        ("head/SGD.lr = 4", ["SGD has no parameter 'lr': write SGD.learning_rate"]),
        ("Adam.lerning_rate = 4", ["Adam has no parameter 'lerning_rate'; nearest: 'learning_rate'"]),
        ("optimizer.lr = 4", ["nothing is called 'optimizer': write Adam.learning_rate, or ", "user.gin, line 8"]),
        ("train.steps = 4", ["nothing is called 'train': write run.steps ("]),
        (
            "byte_budget.bytes = 4",
            ["'byte_budget': write budget, whose budget.bytes is an average over the run ("],
        ),
        ("run.schedule = @byte_budget()", ["'byte_budget': write budget, whose budget.bytes", "user.gin, line 8"]),
        ("SDG.learning_rate = 4", ["nothing is called 'SDG'; nearest: 'SGD'"]),
        ("run.model = @keras_file", ["not bound: keras_file.path; write keras_file.path = ..."]),
        ("import no_such_module", ["user.gin", "no_such_module"]),
        ("from no_such_package import no_such_module", ["user.gin", "no_such_package"]),
    ],
)
def test_mistakes_in_a_file(text, words, load):
    with pytest.raises(UserError) as raised:
        load(text).settings.replicas()
    message = str(raised.value).splitlines()[0]  # gin adds lines, of which the command line prints none
    for word in words:
        assert word in message, (word, message)


@pytest.mark.parametrize(
    ("param", "words"),
    [
        ("run.stepz=3", ["run has no parameter 'stepz'", "steps"]),
        ("run.steps", ["run.steps"]),
        ("run.steps=", ["run.steps"]),
        ("run.model=@two_dens", ["two_dense"]),
        ("run.steps=four", ["run.steps is 'four': it must be a whole number of at least 1 (in 'run.steps=four')"]),
        ("run.leave=reset", ["also within the shell's: --gin_param=\"run.leave = 'reset'\" (in"]),
    ],
)
def test_mistakes_in_a_param(param, words, load):
    with pytest.raises(UserError) as raised:
        load("", param)
    for word in words:
        assert word in str(raised.value).splitlines()[0]


def test_a_missing_file_shows_its_neighbours(tmp_path):
    write(tmp_path / "quickstart.gin", BASE)
    with pytest.raises(UserError, match=rf"no gin file .*quikstart\.gin; nearest: '{tmp_path}/quickstart\.gin'"):
        gin_files.load([tmp_path / "quikstart.gin"])
    outer = write(tmp_path / "outer" / "user.gin", "include '../quikstart.gin'")  # as an include finds it
    with pytest.raises(UserError, match=r"includes '\.\./quikstart\.gin', .*; nearest: '\.\./quickstart\.gin'"):
        gin_files.load([outer])
    with pytest.raises(UserError, match="no gin file"):
        gin_files.load([tmp_path])
    with pytest.raises(UserError, match="no gin file"):
        gin_files.load([tmp_path / "absent" / "quickstart.gin"])


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "binary.gin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.gin is not text in UTF-8"):
        gin_files.load([tmp_path / "binary.gin"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"data": user_module.data()}, "run.data is Dataset("),
        ({"model": user_module.model()}, "such as byte_transformer or lambda: byte_transformer(...)"),
        ({"optimizer": keras.optimizers.Adam()}, "such as keras.optimizers.Adam or lambda: keras.optimizers.Adam(...)"),
        ({"schedule": Lisa}, "give an object, with parentheses, as in Phases(table), in a gin file @phases()"),
        ({"reduction": LocalSGD}, "give one such as AllReduce(), in a gin file @all_reduce(), with the ()"),
        ({"rules": "train"}, "run.rules is 'train': it is a str and no list; write a list such as [('train'"),
        ({"rules": None}, "run.rules is None: "),
        ({"rules": []}, "run.rules is []: write a list such as"),
        ({"rules": [("trian", ".*")]}, "rule 1 is ('trian', '.*'): write ('train', pattern)"),
        ({"rules": [("train", "(")]}, "rule 1: '(' is not a regular expression: missing )"),
        ({"rules": [("train", np.zeros([2, 2]))]}, "rule 1: the pattern array([[0., 0.], [0., 0.]]) must be a string"),
        ({"rules": [np.zeros([2, 2])]}, "rule 1 is array([[0., 0.], [0., 0.]]): write"),
        ({"steps": np.zeros([2, 2])}, "run.steps is array([[0., 0.], [0., 0.]]): it must be"),
        ({"sampling": 5}, "run.sampling is 5: give a Sampling(...)"),
        ({"replicas": 5}, "run.replicas is 5: give what makes them, such as functools.partial("),
    ],
)  # fmt: skip
def test_settings_made_in_python(more, words):
    """They fail where they are made, in one line, and what only a gin file has is named as such."""
    given = {"rules": [("train", ".*")], "model": user_module.model, "data": user_module.data}
    Settings(**given)
    with pytest.raises(UserError) as raised:
        Settings(**given | more)
    message = str(raised.value)
    assert words in message and "\n" not in message
    assert not re.search(r"(?<!in a gin file )@|\bbind\b", message)


@pytest.mark.parametrize("missing", ["rules", "model", "data"])
def test_what_must_be_bound(missing, tmp_path):
    lines = [line for line in textwrap.dedent(BASE).splitlines() if not line.startswith(f"run.{missing} ")]
    with pytest.raises(UserError, match=f"not bound: run.{missing}"):
        gin_files.load([write(tmp_path / "user.gin", "\n".join(lines))])


def test_a_module_is_found_on_the_path_and_its_imports_stay_private(tmp_path, monkeypatch):
    write(
        tmp_path / "code" / "my_models.py",
        """
        from tests.helpers.user_module import model, data
        from keras.layers import Dense

        def small(units=2):
            return model(units)

        def _hidden():
            return model(1)
        """,
    )
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    base = textwrap.dedent(BASE).replace("@tests.helpers.user_module.model", "@my_models.small")
    file = write(tmp_path / "user.gin", "import my_models\n" + base + "my_models.small.units = 3\n")
    assert gin_files.load([file]).settings.model().get_layer("body").units == 3
    for reference in ("my_models._hidden", "my_models.Dense"):
        with pytest.raises(UserError, match="nothing is called"):
            gin_files.load([file], [f"run.model = @{reference}"])


def test_unused_bindings(load):
    configuration = load(
        """
        run.optimizer = @used/keras.optimizers.Adam
        used/Adam.learning_rate = 0.1
        Adam.beta_1 = 0.8
        wasted/Adam.beta_2 = 0.9
        SGD.momentum = 0.9
        byte_transformer.width = 8
        model.units = 3
        macro = 3
        """
    )
    settings = configuration.settings
    # Until its factory has been called, nothing tells whether a binding is going to be used.
    assert "tests.helpers.user_module.model.units" in configuration.unused()
    build(settings, settings.replicas())
    assert sorted(configuration.unused()) == [
        "byte_transformer.width",
        "keras.optimizers.SGD.momentum",
        "macro",
        "wasted/keras.optimizers.Adam.beta_2",
    ]


def test_the_operative_configuration_alone_reproduces_the_run(load, tmp_path, capsys):
    configuration = load(
        """
        run.model = @wide/tests.helpers.user_module.model
        wide/model.units = 6
        run.rules = [@head/Rule(), @rest/Rule()]
        head/Rule.match = r'head/.*'
        head/Rule.optimizer = @head/SGD
        head/SGD.learning_rate = @keras.optimizers.schedules.ExponentialDecay()
        ExponentialDecay.initial_learning_rate = 0.5
        ExponentialDecay.decay_steps = 2
        ExponentialDecay.decay_rate = %decay
        decay = 0.5
        rest/Rule.match = r'body/kernel|body/bias'
        rest/Rule.rows = (0, 2)
        run.optimizer = @keras.optimizers.Adam
        SGD.momentum = 0.9
        """,
        "run.seed = 4",
    )
    first, second = tmp_path / "first", tmp_path / "second"
    loop.run(configuration.settings, first, configuration.operative, configuration.unused)
    replay = gin_files.load([first / "operative_config.gin"])
    loop.run(replay.settings, second, replay.operative, replay.unused)
    assert "never used" not in capsys.readouterr().out
    for name in ("metrics.jsonl", "plan.json", "run_fingerprint.json", "operative_config.gin"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert json.loads((first / "run_fingerprint.json").read_text())["optimizers"][0]["momentum"] == 0.9


def test_an_unused_binding_is_reported_after_the_first_step(load, tmp_path, capsys):
    configuration = load("SGD.momentum = 0.9\nlr = 0.1")
    loop.run(configuration.settings, tmp_path / "run", configuration.operative, configuration.unused)
    said = "bound but never used: keras.optimizers.SGD.momentum, lr (write Adam.learning_rate, or that of another opt"
    assert said in capsys.readouterr().out


SCHEDULES = ["phases", "gradual", "rotation", "lisa", "autofreeze", "budget"]


@pytest.mark.parametrize("name", ["quickstart", "two_dense", "full", "local_sgd", *SCHEDULES])
def test_the_configurations_that_come_along_load(name):
    file = ROOT / "gin_configs" / f"{name}.gin"
    settings = gin_files.load([file]).settings
    assert selection.parse_rules(settings.rules)
    if name in SCHEDULES:
        built = build(settings, create("default"))
        assert len(built.units) > 2 and built.schedule.next_switch(0)
    if name == "two_dense":
        plan = selection.resolve(settings.rules, settings.model(), AllReduce())
        assert {entry.path for entry in plan.trained} == {"dense1/kernel", "dense2/kernel"}
        assert settings.sampling.temperature == 0.6
        assert float(settings.optimizer().learning_rate) == pytest.approx(1e-3)


def test_defaults_heed_their_bindings(tmp_path):
    """Neither run.optimizer nor run.reduction is bound here; their parts are."""
    file = tmp_path / "own.gin"
    file.write_text("run.rules = [('train', '.*')]\nrun.model = @two_dense\nrun.data = @stdlib_shapes\n")
    loaded = gin_files.load([file], ["Adam.learning_rate = 0.5", "all_reduce.dtype = 'bfloat16'"]).settings
    assert float(loaded.optimizer().learning_rate) == 0.5
    assert loaded.reduction.dtype == "bfloat16"


def test_a_param_without_a_dot_is_an_error(tmp_path):
    file = tmp_path / "own.gin"
    file.write_text("rate = 0.1\nrun.rules = [('train', '.*')]\nrun.model = @two_dense\nrun.data = @stdlib_shapes\n")
    with pytest.raises(UserError, match=r"'step = 3' binds nothing: a name has a dot; nearest: 'run\.steps'"):
        gin_files.load([file], ["step = 3"])
    with pytest.raises(UserError, match=r"'batch_size=3' binds nothing: write run\.global_batch, the examples"):
        gin_files.load([file], ["batch_size=3"])
    with pytest.raises(UserError, match=r"'top_k=3' binds nothing: write sample\.top_k$"):
        gin_files.load([file], ["top_k=3"])
    gin_files.load([file], ["rate = 0.2"])  # a macro of the file's


def test_a_module_may_hold_what_cannot_be_bound(tmp_path, monkeypatch):
    """gin makes a subclass of each class, and an enumeration has none; layers and models do."""
    (tmp_path / "mixed_module.py").write_text(
        "import enum, keras\n"
        "class Colour(enum.Enum): RED = 1\n"
        "class Scale(keras.layers.Layer): pass\n"
        "class Net(keras.Model):\n"
        "    def __init__(self, units=3):\n"
        "        super().__init__()\n"
        "        self.units = units\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "own.gin"
    file.write_text(
        "import mixed_module\nrun.rules = [('train', '.*')]\nrun.model = @mixed_module.Net\nNet.units = 5\n"
        "run.data = @stdlib_shapes\n"
    )
    assert gin_files.load([file]).settings.model().units == 5


def test_names_of_our_own_win_over_a_users(tmp_path, monkeypatch, capsys):
    (tmp_path / "of_mine.py").write_text("def run(): return 1\ndef sample(): return 2\ndef model(): return 3\n")
    (tmp_path / "c.gin").write_text(
        "import of_mine\nrun.rules = [('train', '.*')]\nrun.model = @of_mine.model\nrun.data = @stdlib_corpus\n"
        "run.steps = 7\nsample.length = 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = gin_files.load([tmp_path / "c.gin"]).settings
    assert (settings.steps, settings.sampling.length, settings.model()) == (7, 5, 3)
    assert "of_mine.run cannot be bound: run is a name of dist_partial's own" in capsys.readouterr().err


def test_functions_with_gins_own_decorator(tmp_path, monkeypatch):
    (tmp_path / "decorated.py").write_text(
        "import gin\n"
        "@gin.configurable\n"
        "def inner(units=gin.REQUIRED): return units\n"
        "@gin.configurable\n"
        "def build(units=4, head=gin.REQUIRED): return units, head\n"
        "@gin.register\n"
        "def calls(): return inner()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    file = write(tmp_path / "c.gin", "import decorated\nrun.model = @decorated.build\n" + BASE_WITHOUT_MODEL)
    assert gin_files.load([file], ["build.head = 2"]).settings.model() == (4, 2)
    assert gin_files.load([file], ["run.model = @calls", "inner.units = 3"]).settings.model() == 3
    for params, words in (
        (["build.unitz = 3"], r"build has no parameter 'unitz'; nearest: 'units'"),
        ([], r"not bound: decorated\.build\.head"),
        (["build.head = %gin.REQUIRED"], r"build\.head set to `%gin\.REQUIRED`"),
        (["run.model = @calls"], r"not bound: inner\.units"),
    ):
        with pytest.raises(UserError, match=words):
            gin_files.load([file], params).settings.model()


def test_a_module_that_was_loaded_again_has_its_new_functions(tmp_path, monkeypatch):
    module = write(tmp_path / "edited.py", "def model(units=1): return units\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = write(tmp_path / "c.gin", "import edited\nrun.model = @edited.model\n" + BASE_WITHOUT_MODEL)
    assert gin_files.load([file]).settings.model() == 1
    module.write_text("def model(layers=2): return 10 * layers  # is longer than the old one\n")
    importlib.reload(sys.modules["edited"])
    assert gin_files.load([file], ["model.layers = 3"]).settings.model() == 30


def test_a_function_of_the_users_whose_result_is_bound_raises_its_own(load):
    line = user_module.spoilt_rules.__code__.co_firstlineno + 1
    with pytest.raises(Raised) as found:
        load("run.rules = @tests.helpers.user_module.spoilt_rules()")
    assert str(found.value) == f"KeyError: '' ({user_module.__file__}, line {line})"
    with pytest.raises(UserError):
        load("run.rules = @tests.helpers.user_module.spoilt_rules()\nspoilt_rules.knd = 1")
