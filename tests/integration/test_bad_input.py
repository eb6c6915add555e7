"""Every mistake ends in one line that names it and exit code 2, and leaves the run folder as it was."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from safetensors.numpy import load_file

from dist_partial import sample, train
from dist_partial.data import train_batches
from tests import ROOT
from tests.helpers import user_module
from tests.helpers.files import checkpoint_names, contents

BASE = """
import tests.helpers.user_module
run.model = @tests.helpers.user_module.model
run.data = @tests.helpers.user_module.data
run.rules = [('train', r'head/.*'), ('freeze', r'.*')]
run.optimizer = @keras.optimizers.Adam
run.steps = 4
run.save_every = 2
run.global_batch = 4
"""

pytestmark = pytest.mark.usefixtures("no_cluster")


@pytest.fixture
def gin_file(tmp_path) -> Path:
    file = tmp_path / "user.gin"
    file.write_text(BASE)
    return file


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def train_main(gin_file, run_dir) -> Callable[..., int]:
    """The command on the base file; `params` are bindings over it."""
    return lambda *params, folder=run_dir: train.main(
        [f"--gin_file={gin_file}", f"--run_dir={folder}", *(f"--gin_param={param}" for param in params)]
    )


def error_line(stderr: str) -> str:
    """The one line of an error that comes before any training."""
    lines = stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    return lines[0]


def last_error_line(stderr: str) -> str:
    """The error of a run that had begun: the only such line, and the last, below the progress bar."""
    lines = [line for line in re.split(r"[\r\n]+", stderr) if line]
    assert [line.startswith("error: ") for line in lines].count(True) == 1, stderr
    assert lines[-1].startswith("error: ") and "Traceback" not in stderr, stderr
    return lines[-1]


def metrics(folder: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


PARAMS = {
    "rule matches nothing": (["run.rules=[('train','haed/.*'),('freeze','.*')]"], ["'haed/.*'", "'head/kernel'"]),
    "variable not covered": (["run.rules=[('train','head/kernel'),('freeze','body/.*')]"], ["'head/bias'"]),
    "empty selection": (["run.rules=[('freeze','.*')]"], ["nothing"]),
    "bad pattern": (["run.rules=[('train','head/(')]"], ["rule 1", "'head/('"]),
    "unreachable rule": (["run.rules=[('train','.*'),('freeze','body/.*')]"], ["rule 2", "rule 1"]),
    "one path twice": (["run.model=@user_module.Twins", "run.rules=[('train','.*')]"], ["2 variables", "'same/"]),
    "no rules": (["run.rules=[]"], ["run.rules"]),
    "a step of its own": (["run.model=@user_module.own_step"], ["a train_step of its own (OwnStep)", "compute_loss"]),
    "a contrastive loss": (
        ["run.loss=@user_module.contrastive", "run.accumulate=2", "user_module.model.outputs=1"],
        ["depends on the others of its batch", "run.accumulate divides it"],
    ),
    "unknown loss": (["run.loss='mean_square'"], ["run.loss", "no loss 'mean_square'"]),
    "metric of another kind": (["run.metrics=[5]"], ["run.metrics has a int", "'accuracy'"]),
    "unknown metric": (["run.metrics=['acuracy']"], ["run.metrics", "acuracy"]),
    "metric that keeps a maximum": (["run.metrics=[@user_module.Largest]"], ["run.metrics: 'largest'", "add them up"]),
    "weights of no classes": (["run.class_weight=[1.0, 2.0]"], ["run.class_weight is [1.0, 2.0]", "{0: 1.0, 1: 5.0}"]),
    "classes of several targets": (
        ["run.class_weight={0: 2.0}", "run.data=@user_module.boxes", "user_module.model.outputs=4"],
        ["run.class_weight", "[2, 2]"],
    ),
    "a call of two arguments": (["run.model=@user_module.two_inputs"], ["'mode'", "one of points's examples"]),
    "bad reduction": (["run.reduction='half'"], ["reduction", "'half'"]),
    "misspelt binding": (["run.stepz=3"], ["'stepz'", "steps"]),
    "unknown binding": (["trainer.steps=3"], ["'trainer'"]),
    "misspelt reference": (["run.model=@two_dens"], ["'two_dens'", "two_dense"]),
    "syntax": (["run.steps="], ["run.steps="]),
    "wrong type": (["run.steps='four'"], ["run.steps", "'four'"]),
    "optimizer's argument": (["Adam.lr=0.1"], ["lr"]),
    "optimizer's value": (["Adam.learning_rate='fast'"], ["fast"]),
    "optimizer made already": (["run.optimizer=@keras.optimizers.Adam()"], ["run.optimizer", "without ()"]),
    "model is none": (["run.model=@user_module.nothing"], ["run.model", "NoneType"]),
    "data is none": (["run.data=@user_module.nothing"], ["run.data", "NoneType"]),
    "loss is none": (["run.loss=@user_module.nothing"], ["run.loss", "NoneType"]),
    "optimizer is none": (["run.optimizer=@user_module.nothing"], ["optimizer", "None"]),
    "temperature": (["sample.temperature=-0.5"], ["sample.temperature", "-0.5"]),
    "top_k": (["sample.top_k=0"], ["sample.top_k"]),
    "top_p": (["sample.top_p=1.5"], ["sample.top_p", "1.5"]),
    "prompt": (["sample.prompt=''"], ["sample.prompt"]),
    "batch over replicas": (["replicas.cpu=2", "run.global_batch=3"], ["run.global_batch = 3", "2 replicas"]),
    "batch over micro-batches": (["run.accumulate=3"], ["run.global_batch = 4", "into 1 replica x 3 micro-batches:"]),
    "steps": (["run.steps=0"], ["run.steps is 0"]),
    "kind": (["replicas.kind='mirorred'"], ["replicas.kind", "'mirrored'"]),
    "too many replicas": (["replicas.cpu=64"], ["replicas.cpu = 64"]),
    "workers without cluster": (["replicas.kind='multi_worker'"], ["TF_CONFIG"]),
    "number for a text": (["hub_model.preset=5"], ["hub_model.preset is 5", "text in quotes"]),
    "text for a number": (["stdlib_prose.window='16'"], ["stdlib_prose.window is '16'", "whole number", "128"]),
    "text in a scope": (["a/hub_model.classes='3'"], ["a/hub_model.classes is '3'"]),
    "float for a count": (["byte_transformer.width=16.0"], ["byte_transformer.width is 16.0", "whole number"]),
    "bool for a count": (["run.keep=True"], ["run.keep is True", "whole number"]),
    "text for a bool": (["byte_transformer.tied='yes'"], ["byte_transformer.tied is 'yes'", "True or False"]),
    "none for a size": (["two_dense.hidden=None"], ["two_dense.hidden is None", "64"]),
    "list for a dictionary": (["hub_model.arguments=[1]"], ["hub_model.arguments is [1]", "dictionary"]),
    "number for a path": (["stdlib_shapes.root=5"], ["stdlib_shapes.root is 5"]),
    "factory lacks an argument": (["run.data=@tfds_dataset"], ["not bound: tfds_dataset.name"]),
    "inner factory lacks one": (
        ["run.data=@tokenized_text", "tokenized_text.tokenizer=@a/hub_tokenizer"],
        ["not bound: a/hub_tokenizer.preset"],
    ),
    "user's factory lacks one": (["run.model=@user_module.needy"], ["not bound: user_module.needy.units"]),
    "labels beyond the classes": (["user_module.data.classes=4"], ["points", "up to 3", "0 to 1", "4 classes"]),
    "labels of floats": (["user_module.data.classes=4", "user_module.data.labels='float64'"], ["up to 3", "0 to 1"]),
    "negative label": (["user_module.data.lowest=-1"], ["points", "-1", "from 0"]),
    "fractions as labels": (["user_module.data.labels='fraction'"], ["points", "0.5", "MeanSquaredError"]),
    "labels of a source on disk": (["run.data=@user_module.on_disk", "on_disk.label=7"], ["up to 7", "0 to 1"]),
    "loss of other shapes": (["run.loss=@keras.losses.MeanSquaredError"], ["run.loss", "int32 []", "float32 [2]"]),
    "features for ids": (["run.model=@two_dense", "two_dense.window=3"], ["float32 [3]", "int32", "features"]),
    "features of another size": (["run.model=@two_dense", "two_dense.symbols=None"], ["float32 [3]", "(None, 16)"]),
    "fewer ids than symbols": (
        ["run.model=@two_dense", "run.data=@stdlib_shapes", "two_dense.symbols=5"],
        ["stdlib_shapes", "10 symbols", "'one_hot'", "5"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMS)
def test_bindings(name, train_main, run_dir, capsys):
    params, words = PARAMS[name]
    tf.zeros([])  # devices are fixed from the first op on
    assert train_main(*params) == 2
    line = error_line(capsys.readouterr().err)
    for word in words:
        assert word in line
    assert not run_dir.exists()


@pytest.mark.slow
def test_what_is_no_mistake(train_main, tmp_path, capsys):
    """Targets and values that look like those above, and are right."""
    regression = [
        "run.loss=@keras.losses.MeanSquaredError",
        "run.rules=[('train','.*')]",
        "user_module.model.outputs=1",
    ]
    for params in (
        [*regression, "user_module.data.labels='fraction'", "run.clip_norm=1"],
        [*regression, "user_module.data.lowest=-1", "user_module.data.labels='float32'"],
        ["run.loss=@user_module.FromOne", "user_module.data.lowest=1", "user_module.data.classes=3"],
        ["run.loss=@user_module.positive", "user_module.data.lowest=1", "user_module.data.classes=3"],
        ["run.loss=@user_module.Whole", "user_module.data.lowest=-1", "user_module.model.outputs=1"],
        ["run.loss=@user_module.pairs", "run.global_batch=8"],
        ["run.loss=@user_module.own_loss", "user_module.data.lowest=-1"],
        [
            "run.loss=@keras.losses.SparseCategoricalCrossentropy",
            "keras.losses.SparseCategoricalCrossentropy.ignore_class=-1",
            "keras.losses.SparseCategoricalCrossentropy.from_logits=True",
            "user_module.data.lowest=-1",
        ],
        [
            "run.loss=@keras.losses.MeanSquaredError",
            "keras.losses.MeanSquaredError.reduction='sum'",
            "user_module.model.outputs=1",
        ],
        ["run.loss=@keras.losses.Dice", "user_module.model.outputs=1", "user_module.data.labels='float32'"],
        ["run.loss=@user_module.contrastive", "user_module.model.outputs=1"],
        ["run.loss='mse'", "user_module.model.outputs=1", "run.metrics=['mae', @keras.metrics.RootMeanSquaredError]"],
        ["run.class_weight={0: 2.0}"],
        ["unused/hub_model.preset=None", "Rule.rows=[0, 2]", "local_sgd.outer_optimizer=@nesterov"],
    ):
        assert train_main(*params, "run.steps=1", folder=tmp_path / str(len(list(tmp_path.iterdir())))) == 0, params
        assert "error:" not in capsys.readouterr().err


def test_an_id_that_no_look_has_found(train_main, capsys):
    """TensorFlow's own error, in the step, is one line."""
    assert train_main("run.data=@user_module.on_disk", "on_disk.label=7", "on_disk.rare=True") == 2
    assert "class id 7" in (line := last_error_line(capsys.readouterr().err)) and "2 of them" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--gin_file"]),
        (["--gin_file=absent.gin"], ["absent.gin"]),
        (["--gin_file=" + "a" * 300], ["a" * 300, "too long"]),
        (["--gin_fiel=absent.gin"], ["gin_fiel"]),
        (["absent.gin"], ["'absent.gin'", "--name=value"]),
    ],
)
def test_arguments_of_train(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(arguments) == 2
    line = error_line(capsys.readouterr().err)
    assert all(word in line for word in words)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{", '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}'])
def test_malformed_tf_config(text, train_main, run_dir, monkeypatch, capsys):
    monkeypatch.setenv("TF_CONFIG", text)
    assert train_main() == 2
    assert "TF_CONFIG" in error_line(capsys.readouterr().err)
    assert not run_dir.exists()


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "user.gin").write_text(BASE)
    assert train.main([f"--gin_file={folder / 'user.gin'}", f"--run_dir={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.fixture
def finished(finished_once, run_dir, capsys) -> Path:
    """A run folder with checkpoints of steps 2 and 4."""
    shutil.copytree(finished_once, run_dir)
    assert checkpoint_names(run_dir) == ["step-0000000002.safetensors", "step-0000000004.safetensors"]
    capsys.readouterr()
    return run_dir


def test_a_folder_of_another_run_is_refused(finished, train_main, capsys):
    before = contents(finished)
    others = [
        ("run.rules=[('train','head/kernel'),('freeze','.*')]", ["rules", "'train head/.*'", "'train head/kernel'"]),
        ("user_module.model.units=5", ["model.body/kernel", "[3, 4]", "[3, 5]"]),
        ("user_module.data.seed=9", ["the data has other examples"]),
        ("run.seed=9", ["seed was 0 and is now 9"]),
        ("run.global_batch=8", ["global_batch was 4 and is now 8"]),
        ("run.optimizer=@keras.optimizers.SGD", ["optimizers.0.class", "'Adam'", "'SGD'"]),
        ("Adam.learning_rate=0.5", ["optimizers.0.learning_rate", "0.5"]),
        ("run.precision='float64'", ["precision", "'float32'", "'float64'"]),
        ("run.reduction=@half/all_reduce()\nhalf/all_reduce.dtype='bfloat16'", ["reduction", "bfloat16"]),
    ]
    for param, words in others:
        assert train_main(param, "run.steps=6") == 2, param
        line = error_line(capsys.readouterr().err)
        for word in [str(finished), "another run", *words]:
            assert word in line, (word, line)
        assert contents(finished) == before
    assert train_main() == 0
    assert "finished" in capsys.readouterr().out
    assert contents(finished) == before


@pytest.mark.parametrize("kind", ["a folder", "a file", "below a file", "damaged"])
def test_what_is_not_a_run_folder(kind, train_main, tmp_path, capsys):
    folder = tmp_path / "other"
    if kind == "a folder":
        folder.mkdir()
        (folder / "thesis.txt").write_text("three years")
    elif kind == "damaged":
        folder.mkdir()
        (folder / "run_fingerprint.json").write_text("{")
    else:
        folder.write_text("three years")
        folder = folder / "run" if kind == "below a file" else folder
    before = contents(tmp_path)
    assert train_main(folder=folder) == 2
    assert str(folder) in error_line(capsys.readouterr().err)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("folder", ["/proc/run", "/sys/run"])
def test_a_folder_that_cannot_be_made(folder, train_main, capsys):
    if not Path(folder).parent.is_dir():
        pytest.skip("a file system of Linux")
    assert train_main(folder=folder) == 2
    assert f"cannot write {folder}: " in error_line(capsys.readouterr().err)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    kernel = load_file(path)["variables/head/kernel"].tobytes()
    data[data.index(kernel) + 5] ^= 4
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def transpose(path: Path) -> None:
    """Another shape of the same size, and so another valid safetensors file."""
    before, name, after = path.read_bytes().partition(b'"variables/head/kernel":')
    assert b'"shape":[4,2]' in after[:60], after[:60]
    path.write_bytes(before + name + after.replace(b'"shape":[4,2]', b'"shape":[2,4]', 1))


def swap(path: Path) -> None:
    path.write_bytes((path.parent / "step-0000000002.safetensors").read_bytes())


@pytest.mark.parametrize("damage", [truncate, flip, empty, transpose, swap])
def test_a_damaged_checkpoint_falls_back(damage, finished, train_main, capsys):
    newest = finished / "checkpoints" / "step-0000000004.safetensors"
    expected = load_file(newest)
    rows = metrics(finished)
    damage(newest)
    assert train_main() == 0
    output = capsys.readouterr().out
    assert f"{newest} is damaged" in output and "going on from step 2" in output
    again = load_file(newest)
    assert again.keys() == expected.keys()
    assert all(again[name].tobytes() == value.tobytes() for name, value in expected.items())
    assert metrics(finished) == rows


def test_all_checkpoints_damaged(finished, train_main, capsys):
    for name in checkpoint_names(finished):
        truncate(finished / "checkpoints" / name)
    before = contents(finished)
    assert train_main() == 2
    line = error_line(capsys.readouterr().err)
    assert "2 damaged" in line and str(finished / "checkpoints") in line
    assert contents(finished) == before


def test_bits_of_a_checkpoint(finished):
    """Any flipped bit is noticed, or is where nothing is read from."""
    from dist_partial import checkpoints
    from dist_partial.errors import UserError

    folder = finished / "checkpoints"
    path = folder / "step-0000000004.safetensors"
    (folder / "step-0000000002.safetensors").unlink()
    whole = path.read_bytes()
    expected = checkpoints.newest(folder, pytest.fail)
    for position in range(0, len(whole), 3):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        try:
            read = checkpoints.newest(folder, lambda line: None)
        except UserError:
            continue
        assert read.metadata == expected.metadata and read.arrays.keys() == expected.arrays.keys()
        assert all(read.arrays[name].tobytes() == value.tobytes() for name, value in expected.arrays.items()), position


def sample_main(*arguments: str) -> int:
    return sample.main(["--allow_imports", *arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--run_dir"]),
        (["--run_dir=absent"], ["absent", "name a folder that training has written"]),
        (["--run_dir={}s"], ["s is no run folder", "; nearest: '{}'"]),
        (["--run_dir={}", "--temperature=-1"], ["temperature", "-1.0"]),
        (["--run_dir={}", "--temperature=nan"], ["temperature", "nan"]),
        (["--run_dir={}", "--temperature=warm"], ["temperature", "warm"]),
        (["--run_dir={}", "--top_k=0"], ["top_k", "0"]),
        (["--run_dir={}", "--top_p=2"], ["top_p", "2.0"]),
        (["--run_dir={}", "--length=0"], ["length", "0"]),
        (["--run_dir={}", "--count=-1"], ["count", "-1"]),
        (["--run_dir={}", "--prompt="], ["prompt", "''"]),
        (["--run_dir={}", "--top=3"], ["top"]),
        (["--run_dir={}"], ["'points'", "no text", "give its Dataset a codec"]),  # the data set has no codec
    ],
)
def test_arguments_of_sample(arguments, words, finished, capsys):
    before = contents(finished)
    assert sample_main(*(argument.format(finished) for argument in arguments)) == 2
    line = error_line(capsys.readouterr().err)
    assert all(word.format(finished) in line for word in words), line
    assert contents(finished) == before


@pytest.mark.parametrize(
    "line", ["import os", "from os import path", "import \\\n  os", "include 'other.gin'", "include \\\n 'other.gin'"]
)
def test_a_run_folder_runs_no_code(line, finished, capsys):
    """Unless the user allows it: what it would import or include is named."""
    file = finished / "operative_config.gin"
    file.write_text(line + "\n" + file.read_text().replace("import", "# import"))
    before = contents(finished)
    assert sample.main([f"--run_dir={finished}"]) == 2
    message = error_line(capsys.readouterr().err)
    assert f"{file}, line 1: " in message and "--allow_imports" in message
    assert contents(finished) == before


@pytest.mark.parametrize("name", ["keras.optimizers.deserialize", "keras.initializers.get"])
def test_what_loads_code_by_name_cannot_be_bound(name, gin_file, run_dir, train_main, capsys):
    assert train_main(f"run.optimizer = @{name}") == 2
    assert "nothing is called" in error_line(capsys.readouterr().err)


def test_sample_from_a_folder_without_checkpoint(finished, capsys):
    for name in checkpoint_names(finished):
        (finished / "checkpoints" / name).unlink()
    assert sample_main(f"--run_dir={finished}") == 2
    assert "no checkpoint" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("steps_per_loop", [1, 4])
def test_a_loss_that_is_not_finite(steps_per_loop, train_main, run_dir, capsys):
    """One example is NaN; the step that meets it is found by reading the same batches with NumPy."""
    spoilt = _spoilt_in_step(3)
    params = [f"user_module.data.spoilt={spoilt}", f"run.steps_per_loop={steps_per_loop}"]
    assert train_main(*params) == 2
    line = last_error_line(capsys.readouterr().err)
    assert "not finite at step 3 " in line and "the checkpoint of step 2 is kept" in line
    assert checkpoint_names(run_dir) == ["step-0000000002.safetensors"]
    assert [row["step"] for row in metrics(run_dir)] == [1, 2]
    kept = load_file(run_dir / "checkpoints" / "step-0000000002.safetensors")
    assert all(np.isfinite(array).all() for array in kept.values())
    # The same command meets the same example, from the checkpoint on.
    assert train_main(*params) == 2
    captured = capsys.readouterr()
    assert "going on from step 2" in captured.out and "not finite at step 3 " in last_error_line(captured.err)
    assert checkpoint_names(run_dir) == ["step-0000000002.safetensors"]


def _spoilt_in_step(step: int) -> int:
    source = user_module.data().train
    batches = train_batches(source, first_step=step - 1, global_batch=4, seed=0, context=tf.distribute.InputContext())
    features = next(iter(batches.take(1)))[0].numpy()[0]
    return int(np.flatnonzero((source.x == features).all(axis=1))[0])


def test_a_loss_that_is_never_finite(train_main, run_dir, capsys):
    assert train_main("run.loss=@user_module.never_finite") == 2
    line = last_error_line(capsys.readouterr().err)
    assert "not finite at step 1 " in line and "no checkpoint" in line
    assert not (run_dir / "checkpoints").exists()
    assert not (run_dir / "metrics.jsonl").exists() or metrics(run_dir) == []


@pytest.mark.parametrize("decay", ["None", "1e30"])
def test_a_huge_learning_rate(decay, train_main, run_dir, capsys):
    """No checkpoint holds a number that is not finite, also where the update itself overflows and not the loss."""
    optimizer = ["run.optimizer=@SGD", "SGD.learning_rate=1e38", f"SGD.weight_decay={decay}"]
    assert train_main(*optimizer, "run.save_every=1", "run.steps=50") == 2
    line = last_error_line(capsys.readouterr().err)
    at = int(re.search(r"not finite at step (\d+)", line)[1])
    rows = metrics(run_dir)
    assert rows[-1]["step"] == (at - 1 if "loss" in line else at)
    assert all(np.isfinite(row["loss"]) for row in rows)
    for path in (run_dir / "checkpoints").glob("*.safetensors"):
        assert all(np.isfinite(array).all() for array in load_file(path).values()), path


# Sets the largest size of a file, which fails as a full disk does, and only for files above that size.
FULL_DISK = """
    import resource, sys
    from dist_partial import train

    codes = []
    for size in map(int, sys.argv[1].split(",")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        codes.append(train.main(sys.argv[2:]))
    print("codes", codes)
"""


@pytest.mark.slow
def test_a_full_disk(gin_file, run_dir, train_main, tmp_path, capsys):
    wide = "user_module.model.units=4000"
    assert train_main(wide) == 0
    kept = (run_dir / "checkpoints" / "step-0000000004.safetensors").read_bytes()
    assert len(kept) > 90_000
    before = contents(run_dir)
    arguments = [f"--gin_file={gin_file}", f"--run_dir={run_dir}", f"--gin_param={wide}", "--gin_param=run.steps=6"]
    # 200 bytes do not hold the plan, 20 kB hold everything but a checkpoint.
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK), "200,20000", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "codes [75, 75]" in done.stdout, done.stderr
    errors = [line for line in re.split(r"[\r\n]+", done.stderr) if line.startswith("error: ")]
    assert len(errors) == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"cannot write {run_dir}" in errors[0]
    assert f"cannot write {run_dir}/checkpoints/step-0000000006.safetensors: File too large" in errors[1]
    after = contents(run_dir)
    assert not [name for name in after if "partial" in name]
    for name in [n for n in before if n.startswith("checkpoints") or n == "run_fingerprint.json"]:
        assert after[name] == before[name], name
    assert after.keys() - before.keys() == {n for n in after if n.startswith("tensorboard/") and n not in before}
    # With room again the same command goes on as if nothing had happened.
    capsys.readouterr()
    assert train_main(wide, "run.steps=6") == 0
    assert "going on from step 4" in capsys.readouterr().out
    assert train_main(wide, "run.steps=6", folder=tmp_path / "whole") == 0
    last = "checkpoints/step-0000000006.safetensors"
    assert contents(run_dir)[last] == contents(tmp_path / "whole")[last]
    assert metrics(run_dir)[:4] == metrics(tmp_path / "whole")[:4]
