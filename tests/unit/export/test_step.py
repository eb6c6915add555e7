"""`--step` of export and sample: the best checkpoint, or that of a step."""

import pytest

from dist_partial import checkpoints, sample
from dist_partial.export import __main__ as export
from dist_partial.export import delta
from tests.helpers.letters import start


@pytest.fixture
def run(letters, tmp_path):
    """A run with checkpoints of two steps, and a best one of another."""
    folder = tmp_path / "run"
    # The learning rate is far too high from the sixth step on.
    bound = ("run.best = 'loss'", "run.eval_every = 3", "run.keep = 2", "run.callbacks = [@letters_module.Worse()]")
    with open(tmp_path / "letters_module.py", "a") as module:
        module.write(
            "\nclass Worse(keras.callbacks.Callback):\n"
            "    def on_epoch_begin(self, epoch, logs=None):\n"
            "        self.model.optimizer.learning_rate = 0.01 if epoch < 1 else 3.0\n"
        )
    assert start(letters, folder, *bound) == 0
    assert (checkpoints.steps(folder / "checkpoints"), checkpoints.steps(folder / "best")) == ([8, 12], [3])
    return folder


def exported(folder, *more):
    flags = [f"--run_dir={folder}", "--format=safetensors", f"--output={folder / 'delta.safetensors'}", "--overwrite"]
    return export.main([*flags, "--allow_imports", *more])


def test_a_step_is_taken_home(run, capsys):
    for step, expected in ((None, 12), ("8", 8), ("12", 12), ("best", 3), ("3", 3)):
        assert exported(run, *([] if step is None else [f"--step={step}"])) == 0
        assert f": step {expected} of {run}" in capsys.readouterr().out
        arrays = delta.read(run / "delta.safetensors").arrays
        place = run / ("best" if expected == 3 else "checkpoints")
        kept = checkpoints.newest(place, print, expected).arrays
        for name, array in arrays.items():
            assert array.tobytes() == kept[f"variables/{name}"].tobytes(), name
    for step in ("4", "13", "latest", "-8", ""):
        assert exported(run, f"--step={step}") == 2
        line = f"error: --step={step}: {run} has no such checkpoint; there are 8, 12, best (step 3)"
        assert capsys.readouterr().err.splitlines()[-1] == line


def test_a_step_is_sampled(run, capsys):
    texts = []
    for more in ([], ["--step=12"], ["--step=best"]):
        capsys.readouterr()
        assert sample.main([f"--run_dir={run}", "--allow_imports", *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_run_without_a_best_one(letters, tmp_path, capsys):
    folder = tmp_path / "run"
    assert start(letters, folder, "run.steps = 4") == 0
    assert exported(folder, "--step=best") == 2
    line = "has no such checkpoint; there are 4; bind run.best to have a run keep the best one"
    assert capsys.readouterr().err.splitlines()[-1].endswith(line)


def test_a_damaged_checkpoint_is_not_replaced_by_an_older_one(run, capsys):
    path = run / "checkpoints" / "step-0000000012.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert exported(run, "--step=12") == 2
    line = f"error: the checkpoint of step 12 in {run} is damaged: give another --step"
    assert capsys.readouterr().err.splitlines()[-1] == line
