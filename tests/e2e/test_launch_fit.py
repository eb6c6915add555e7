"""A launcher that starts a Python script, whose `model.fit` then runs on all workers."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tests import ROOT
from tests.helpers.shared import once

pytestmark = pytest.mark.slow
# The last worker may be killed once, or raise, in the third epoch.
SCRIPT = """
import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np

import dist_partial
from dist_partial import fit

keras.config.set_floatx("float64")
folder, breaks = Path(sys.argv[1]), sys.argv[2]
workers = dist_partial.connect()
keras.utils.set_random_seed(1 if workers.is_chief else 2)
x = np.random.default_rng(0).normal(size=(48, 3))
y = x.sum(1, keepdims=True)
with workers.strategy.scope():
    hidden = keras.layers.Dense(4, activation="tanh", name="hidden")
    model = keras.Sequential([keras.Input([3]), hidden, keras.layers.Dense(1, name="head")])
    model.compile(dist_partial.partial(keras.optimizers.Adam(0.05), [("train", ".*")], model), loss="mse")


class Breaks(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        print(f"epoch {epoch} of {workers.rank}", flush=True)
        if epoch == 2 and workers.rank == workers.workers - 1 and breaks != "never":
            if breaks == "raises":
                raise LookupError("no such table")
            if breaks == "exits":
                sys.exit("no such table")
            if not (folder / "killed").exists():
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)


callbacks = [
    keras.callbacks.BackupAndRestore(folder / "backup"),
    keras.callbacks.ModelCheckpoint(folder / "{epoch}.weights.h5", save_weights_only=True),
    Breaks(),
]
mine = [array[workers.rank :: workers.workers] for array in (x, y)]
size = 24 // workers.workers
callbacks = fit.on_workers(callbacks, workers)
model.fit(*mine, batch_size=size, epochs=4, shuffle=False, verbose=0, callbacks=callbacks)
np.save(folder / f"{workers.rank}.npy", np.concatenate([weight.ravel() for weight in model.get_weights()]))
"""


def run(folder, *command):
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment.pop("TF_CONFIG", None)
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, timeout=240, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def launched(folder, breaks, workers=3):
    launcher = ["-m", "dist_partial.launch", "local", f"--workers={workers}", "--run_dir=run", "--", "python"]
    return run(folder, *launcher, "mine.py", ".", breaks)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Where the same script ends without a launcher, in one process."""

    def make(folder):
        code, output = run(folder, "mine.py", ".", "never")
        assert code == 0, output

    return np.load(once(tmp_path_factory, "launch-fit-alone", make) / "0.npy")


@pytest.mark.parametrize("breaks", ["never", "killed"])
def test_a_script_ends_where_one_process_does_also_after_a_worker_was_killed(breaks, alone, tmp_path):
    code, output = launched(tmp_path, breaks)
    assert code == 0, output[-3000:]
    for rank in range(3):
        np.testing.assert_allclose(np.load(tmp_path / f"{rank}.npy"), alone, rtol=1e-9, atol=1e-9)
    assert sorted(path.name for path in tmp_path.glob("*.h5")) == [f"{epoch}.weights.h5" for epoch in range(1, 5)]
    epochs = [int(found) for found in re.findall(r"epoch (\d) of 2", output)]
    if breaks == "never":
        assert epochs == [0, 1, 2, 3]
    else:  # of the last worker, which has no backup
        assert epochs == [0, 1, 2, 2, 3]
        assert "restart 1 of 10 in 1 s: worker 2 was killed by SIGKILL" in output
        # What the others have ended with is worth another start.
        lines = [(tmp_path / "run.logs" / "attempt-1" / f"worker-{k}.log").read_text() for k in range(2)]
        assert all(re.search(r"^error: worker [012] \(.*\)", text, re.MULTILINE) for text in lines), lines


@pytest.mark.parametrize(("breaks", "kind"), [("raises", "LookupError"), ("exits", "SystemExit")])
def test_what_ends_a_script_is_the_last_line_of_all_workers(breaks, kind, tmp_path):
    code, output = launched(tmp_path, breaks, workers=2)
    assert code == 1
    texts = [(tmp_path / "run.logs" / "attempt-1" / f"worker-{k}.log").read_text() for k in range(2)]
    words = rf"^error: worker 1 \(127\.0\.0\.1:\d+\): {kind}: no such table"
    assert re.search(words, texts[0], re.MULTILINE), texts[0]
    assert re.search(r"^(error: LookupError: )?no such table", texts[1], re.MULTILINE), texts[1]
    assert "not again: " in output
