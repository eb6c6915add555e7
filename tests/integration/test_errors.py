"""An exception of the user's own code: who raised what and where, in one line; the process ends, with exit code 1."""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorflow as tf
from absl import flags

from dist_partial import cli, train
from dist_partial.config.settings import Sampling
from dist_partial.data import some_targets
from dist_partial.errors import Raised, calling, first_line, of_graph, own_line
from dist_partial.training import evaluation
from tests import ROOT
from tests.helpers.workers import run_workers

# Who fails is a binding; each line that fails is marked with that name. SLOW keeps the thread that fetches ahead busy.
MODULE = """
import time
import keras
import numpy as np
import tensorflow as tf
from dist_partial import ArraySource, Dataset

X = np.random.default_rng(1).normal(size=(64, 5)).astype("float32")
Y = X.sum(1)


def call(function, value):
    return tf.ensure_shape(tf.numpy_function(function, [value], value.dtype), value.shape)


class Source(ArraySource):
    who, slow, calls = "", 0.0, 0

    def fetch(self, indices):
        type(self).calls += 1
        time.sleep(self.slow)
        x, y = super().fetch(indices)
        if self.calls == 31:
            if self.who == "fetch":
                raise RuntimeError("cannot read\\nthe row")  # fetch
            if self.who == "shape":
                return x[:, :4], y
            if self.who == "dtype":
                return x.astype("float64"), y
        return x, y


def data(who="", slow=0.0):
    Source.who, Source.slow, Source.calls = who, slow, 0
    if who == "data":
        raise LookupError  # data
    return Dataset("d", Source(X, Y), ArraySource(X, Y), "1")


class Layer(keras.layers.Layer):
    def __init__(self, who):
        super().__init__()
        self.who = who

    def call(self, x):
        if self.who == "layer":
            return undefined(x)  # layer
        if self.who == "layer in the graph":
            return call(self.failing, x)
        return x

    def failing(self, x):
        if len(x) > 2:
            raise RuntimeError("in the layer")  # layer in the graph
        return x


def model(who=""):
    if who == "model":
        undefined  # model
    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(4), Layer(who), keras.layers.Dense(1)])


def failing(value):
    if len(value) == 8:
        {}["y"]  # loss in the graph
    return value


def loss(who=""):
    if who == "loss":
        undefined  # loss

    def function(y, p):
        if who == "loss's function":
            undefined  # loss's function
        if who == "loss in the graph":
            y = call(failing, y)
        return tf.square(y - p)[:, 0]

    return function


class FailingSGD(keras.optimizers.SGD):
    def update_step(self, gradient, variable, learning_rate):
        undefined  # update


def optimizer(who="", learning_rate=1e-3):
    if who == "optimizer":
        undefined  # optimizer
    return (FailingSGD if who == "update" else keras.optimizers.SGD)(learning_rate)


class Failing:
    def __len__(self):
        undefined  # length

    def encode(self, text):
        if text == "e":
            undefined  # encode
        return [0]

    def decode(self, ids):
        undefined  # decode
"""
GIN = """
import own_code
run.model = @own_code.model
run.data = @own_code.data
run.loss = @own_code.loss
run.optimizer = @own_code.optimizer
run.rules = [('train', r'.*')]
run.steps = 60
run.global_batch = 8
"""
UNDEFINED = "NameError: name 'undefined' is not defined"
CASES = {  # what is bound, who fails, what the line says of it
    "data": ("data", "data of run.data raised LookupError"),
    "fetch": ("data", "run.data raised RuntimeError: cannot read"),
    "model": ("model", f"run.model raised {UNDEFINED}"),
    "layer": ("model", f"run.model raised {UNDEFINED}"),
    "layer in the graph": ("model", "run.model, run.loss or run.optimizer raised RuntimeError: in the layer"),
    "loss": ("loss", f"run.loss raised {UNDEFINED}"),
    "loss's function": ("loss", f"run.loss raised {UNDEFINED}"),
    "loss in the graph": ("loss", "run.model, run.loss or run.optimizer raised KeyError: 'y'"),
    "optimizer": ("optimizer", f"run.optimizer raised {UNDEFINED}"),
    "update": ("optimizer", f"run.optimizer raised {UNDEFINED}"),
}


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Iterator[Path]:
    """The folder of the user's module."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "own_code.py").write_text(MODULE)
    (folder / "own.gin").write_text(GIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.delenv("TF_CONFIG", raising=False)
        yield folder


def arguments(code: Path, run_dir: Path, *params: str) -> list[str]:
    bound = [f"--gin_param={param}" for param in params]
    return [f"--gin_file={code / 'own.gin'}", f"--run_dir={run_dir}", *bound]


def place(code: Path, who: str) -> str:
    lines = MODULE.splitlines()
    number = next(i for i, line in enumerate(lines, 1) if line.endswith(f"  # {who}"))
    return f" ({code / 'own_code.py'}, line {number})"


@pytest.mark.parametrize("who", CASES)
def test_who_raised_what_and_where(who, code, tmp_path, capfd):
    bound, words = CASES[who]
    assert train.main(arguments(code, tmp_path / "run", f'own_code.{bound}.who = "{who}"')) == 1
    lines = re.split(r"[\r\n]+", capfd.readouterr().err)
    (error,) = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert lines[error] == f"error: {words}{place(code, who)}"
    assert lines[error + 1] == "Traceback (most recent call last):"  # below what matters, and only once
    assert not any("Traceback" in line for line in lines[:error])


@pytest.mark.parametrize(("who", "gives"), [("shape", "float32 (8, 4)"), ("dtype", "float64 (8, 5)")])
def test_one_batch_that_is_not_as_the_spec_says(who, gives, code, tmp_path, capfd):
    assert train.main(arguments(code, tmp_path / "run", f"own_code.data.who = '{who}'")) == 2
    error = re.split(r"[\r\n]+", capfd.readouterr().err.strip())[-1]
    assert re.fullmatch(
        rf"error: Source\.fetch gives \[{re.escape(gives)}, float32 \(8,\)\] for the examples (\d+, ){{7}}\d+, and its "
        r"spec says \[float32 \(8, 5\), float32 \(8,\)\]: .*",
        error,
    ), error


@pytest.mark.slow
@pytest.mark.parametrize("program", ["command", "script"])
def test_a_process_ends_though_examples_are_being_fetched(program, code, tmp_path):
    """The thread that fetches ahead is in Python code when the exception comes: Python would wait for it for ever."""
    params = ["own_code.data.who = 'fetch'", "own_code.data.slow = 0.05"]
    script = f"""
from dist_partial.config import gin_files
from dist_partial.training import loop
loaded = gin_files.load(["{code / "own.gin"}"], {params})
loop.run(loaded.settings, "{tmp_path / "run"}")
"""
    command = ["-m", "dist_partial.train", *arguments(code, tmp_path / "run", *params)]
    done = subprocess.run(
        [sys.executable, *(command if program == "command" else ["-c", script])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{code}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert f"run.data raised RuntimeError: cannot read{place(code, 'fetch')}" in done.stderr


@pytest.mark.slow
def test_the_other_workers_hear_of_it_and_end_with_the_same_code(code, tmp_path):
    first_lines = "import json, os\nRANK = json.loads(os.environ['TF_CONFIG'])['task']['index']\n"
    second_worker = MODULE.replace('if self.who == "fetch":', 'if self.who == "fetch" and RANK == 1:')
    (tmp_path / "own_code.py").write_text(first_lines + second_worker)
    command = ["-m", "dist_partial.train", *arguments(code, tmp_path / "run", "own_code.data.who = 'fetch'")]
    results = run_workers(command, workers=2, timeout=120, pythonpath=tmp_path)
    assert [code for code, _ in results] == [1, 1], results
    first, second = ([x for x in re.split(r"[\r\n]+", out) if x.startswith("error: ")] for _, out in results)
    words = re.escape(f"run.data raised RuntimeError: cannot read ({tmp_path / 'own_code.py'}, line ") + r"\d+\)"
    assert len(first) == 1 and re.fullmatch(rf"error: worker 1 \([\w.:]+\): {words}", first[0]), first
    assert len(second) == 1 and re.fullmatch(rf"error: {words}", second[0]), second


@pytest.mark.slow
def test_an_evaluation_that_fails_on_one_worker_keeps_no_other_waiting(code, tmp_path):
    """Though a checkpoint is due, for which each worker has to send what it has of its own."""
    held = """
import json, os
RANK = json.loads(os.environ["TF_CONFIG"])["task"]["index"]


class Held(ArraySource):
    calls = 0

    def fetch(self, indices):
        self.__dict__["calls"] = self.calls + 1
        if self.calls == 20 and RANK == 1:
            raise RuntimeError("in the second evaluation")
        return super().fetch(indices)
"""
    (tmp_path / "own_code.py").write_text(MODULE.replace('ArraySource(X, Y), "1"', 'Held(X, Y), "1"') + held)
    params = ["run.reduction = @local_only()", "run.steps = 90", "run.eval_every = 30", "run.save_every = 30"]
    command = ["-m", "dist_partial.train", *arguments(code, tmp_path / "run", *params)]
    results = run_workers(command, workers=2, timeout=60, pythonpath=tmp_path)
    assert [code for code, _ in results] == [1, 1], results
    assert all("run.data raised RuntimeError: in the second evaluation" in out for _, out in results), results
    steps = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert steps and f"step-{90:010d}.safetensors" not in steps


def test_what_passes_through_calling():
    inner = Raised("run.loss raised ValueError: one")
    with pytest.raises(Raised) as found, calling("run.data"):
        raise inner
    assert found.value is inner


@pytest.mark.parametrize("code", [0, 3, None, "no such file"])
def test_an_exit_is_an_exception_like_others_and_does_not_say_that_all_is_done(code, capsys):
    with pytest.raises(Raised, match=r"^run\.data raised SystemExit"), calling("run.data"):
        sys.exit(code)
    assert cli.call(None, flags.FlagValues(), [], lambda: sys.exit(code)) == 1
    assert capsys.readouterr().err.startswith("error: SystemExit")


def test_a_lost_worker_is_waited_for_by_no_data():
    away = tf.errors.UnavailableError(None, None, "the bucket is away")
    with pytest.raises(Raised, match=r"^run\.data raised UnavailableError: the bucket is away"), calling("run.data"):
        raise away
    with pytest.raises(tf.errors.UnavailableError), calling("run.model"):
        raise away


@pytest.mark.parametrize("name", ["UserError", "Fault", "Raised"])
def test_an_exception_of_the_users_with_a_name_of_ours(name):
    message = (
        f'{name}: one\nTraceback (most recent call last):\n\n  File "/a/own.py", line 3, in f\n\nown.{name}: one\n'
    )
    found = of_graph(f"{message}\n\n\t [[{{{{node PyFunc}}}}]]")
    assert type(found) is Raised
    assert str(found) == f"run.model, run.loss or run.optimizer raised own.{name}: one (/a/own.py, line 3)"


def test_the_reason_of_a_graph_follows_where_its_op_was_made():
    @tf.function(autograph=False)
    def function(x):
        tf.debugging.assert_less(x, 2.0, message="too large")
        return x

    with pytest.raises(tf.errors.InvalidArgumentError) as found:
        function(tf.constant(3.0))
    several = (
        f"{found.value.message.partition('assertion')[0]}2 root error(s) found.\n  (0) INVALID_ARGUMENT:  two replicas"
    )
    assert first_line(tf.errors.InvalidArgumentError(None, None, several)) == "two replicas"
    line = function.python_function.__code__.co_firstlineno + 2
    assert first_line(found.value).startswith("assertion failed: [too large]")
    assert own_line(found.value) == f" ({__file__}, line {line})"


def test_a_line_that_every_terminal_and_worker_takes():
    assert first_line(ValueError("a\0b \udcff Größe\u2028c")) == r"a\x00b \udcff Größe"
    assert first_line(ValueError("x" * 501)) == "x" * 500 + "..."
    assert str(of_graph("Traceback (most recent call last):\nRuntimeError: ")).endswith("raised RuntimeError")


@pytest.mark.parametrize("who", ["length", "encode", "decode"])
def test_what_else_is_asked_of_data(who, code, monkeypatch):
    import own_code

    failing = own_code.Failing()
    data = dataclasses.replace(own_code.data(), codec=failing)
    monkeypatch.setattr(evaluation, "generate", lambda *_, **__: [[0]])
    with pytest.raises(Raised) as found:
        if who == "length":
            some_targets(failing)
        evaluation.samples(None, data, Sampling(prompt=who[0]), 0)
    assert str(found.value) == f"run.data raised {UNDEFINED}{place(code, who)}"


def test_what_is_no_python_code_is_left_alone():
    assert of_graph("OOM when allocating tensor with shape[1,2]\n\t [[{{node x}}]]") is None
    assert first_line(KeyError()) == "KeyError"


def test_of_tensorflows_own_text_the_part_that_helps_is_left():
    with pytest.raises(tf.errors.InvalidArgumentError) as found:
        tf.zeros([4]) - tf.zeros([4, 2])
    assert first_line(found.value) == "Incompatible shapes: [4] vs. [4,2]"
    graph = (
        "Dimensions must be equal, but are 4 and 2 for '{{node sub}} = Sub[T=DT_FLOAT](a, b)' with input shapes: [4]"
    )
    assert first_line(ValueError(graph)) == "Dimensions must be equal, but are 4 and 2 with input shapes: [4]"
    user = f'in user code:\n\n    File "own.py", line 3, in loss  *\n        return a - b\n\n    ValueError: {graph}\n'
    assert first_line(ValueError(user)) == "Dimensions must be equal, but are 4 and 2 with input shapes: [4]"
    assert first_line(ValueError("in user code:")) == "in user code:"
