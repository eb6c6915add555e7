"""A launcher that starts a Python script, whose `dist_partial.train` then runs on all workers."""

import os
import subprocess
import sys

import numpy as np
import pytest

from dist_partial.launch import __main__ as launch
from dist_partial.launch import script
from tests import ROOT

SCRIPT = """
import os
import sys

import keras
import numpy as np

from dist_partial import train

keras.utils.set_random_seed(1)
x = np.random.default_rng(0).normal(size=(48, 3)).astype("float32")
hidden = keras.layers.Dense(4, activation="tanh", name="hidden")
model = keras.Sequential([keras.Input([3]), hidden, keras.layers.Dense(1, name="head")])
data = (x, x.sum(1, keepdims=True))
rules = [("train", "head/.*"), ("freeze", ".*")]
train(model, data, rules=rules, loss="mse", steps=3, global_batch=24, folder=sys.argv[1])
worker = "TF_CONFIG" in os.environ and "-1" * os.environ["TF_CONFIG"].endswith('"index": 1}}')
np.save(f"{sys.argv[1]}{worker or ''}.npy", np.concatenate([weight.ravel() for weight in model.get_weights()]))
"""


@pytest.mark.slow
def test_a_script_on_two_workers_trains_as_one_process(tmp_path):
    (tmp_path / "mine.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}

    def run(*command):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, timeout=240)
        assert done.returncode == 0

    launcher = ["-m", "dist_partial.launch", "local", "--workers=2", "--run_dir=two", "--", "python"]
    run(*launcher, "mine.py", "two")
    run("mine.py", "one")
    one, chief, other = (np.load(tmp_path / f"{name}.npy") for name in ("one", "two", "two-1"))
    assert chief.tobytes() == other.tobytes()
    np.testing.assert_allclose(chief, one, rtol=1e-5, atol=1e-7)
    assert (tmp_path / "two.logs" / "attempt-1" / "worker-1.log").exists()


ENDLESS = """
import time

import keras
import numpy as np


def batches():
    while True:
        time.sleep(0.05)
        yield np.ones([4, 3]), np.ones([4, 1])


class Breaks(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise ValueError("no such luck")


model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
model.compile("sgd", "mse")
model.fit(batches(), steps_per_epoch=10, callbacks=[Breaks()], verbose=0)
"""


@pytest.mark.slow
def test_a_script_that_fails_ends_though_python_code_reads_ahead_for_it(tmp_path):
    (tmp_path / "mine.py").write_text(ENDLESS)
    done = subprocess.run(
        [sys.executable, "-m", "dist_partial.launch.script", "mine.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 1
    assert "error: ValueError: no such luck" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers=2", "--", "mine.sh"], "'mine.sh' after the -- is no Python script: write -- mine.py"),
        (["--workers=2", "--", "python3"], "is no Python script"),
        (["--workers=2", "--gin_file=F", "--", "mine.py"], "write --gin_file=F after a --"),
        (["--workers=2", "--run_dir=here", "--", "--gin_file=F"], "write --run_dir=here after a --"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert launch.main(["local", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("raise UserError('steps is 0: write 1')", 2, "error: steps is 0: write 1"),
        ("raise Fault('worker 1 is lost')", 75, "error: worker 1 is lost"),
        ("raise Interrupted('stopped at step 1', 130)", 130, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('no data')", 1, "no data"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("import beside; sys.exit(len(sys.argv))", 2, ""),
    ],
)
def test_a_script_ends_as_a_command_does(line, code, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "beside.py").touch()
    path = tmp_path / "mine.py"
    imports = "import sys\nfrom dist_partial.errors import Fault, Interrupted, UserError"
    path.write_text(f"{imports}\nif __name__ == '__main__':\n    {line}\n")
    monkeypatch.setattr(sys, "argv", ["script"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert script.main([str(path), "argument"]) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "found"),
    [("1 / 0", ZeroDivisionError), ("raise SystemExit('no data')", SystemExit), ("exit()", type(None))],
)
def test_what_runs_at_exit_finds_the_exception(line, found, tmp_path, monkeypatch):
    """As `dist_partial.fit` does, which says it to the other workers."""
    path = tmp_path / "mine.py"
    path.write_text(f"{line}\n")
    monkeypatch.setattr(sys, "argv", ["script"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "last_value", None, raising=False)
    script.main([str(path)])
    assert isinstance(sys.last_value, found)
