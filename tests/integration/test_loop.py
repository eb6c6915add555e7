"""A run as a user sees it: the folder's contract, resuming bit for bit, samples, mixed replicas."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial import checkpoints, sample, train
from dist_partial.config.settings import Sampling, Settings
from dist_partial.data import ArraySource, Dataset, evaluation_batches, fingerprint
from dist_partial.distributed.per_replica import topology
from dist_partial.distributed.replicas import create
from dist_partial.errors import AGAIN
from dist_partial.models import byte_transformer
from dist_partial.selection.rules import Rule
from dist_partial.step import loss_scale
from dist_partial.step.evaluation_step import EvaluationSpec, evaluation_step
from dist_partial.training import evaluation, loop, metric_writer
from dist_partial.training.build import build, restore
from tests import ROOT
from tests.helpers.files import assert_same_state, contents, rows, same_bits, state
from tests.helpers.letters import start
from tests.helpers.marks import quick
from tests.helpers.strategies import in_process
from tests.helpers.workers import assert_all_end, run_workers


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """The same bits in the last checkpoint, and the same metrics and samples."""
    assert_same_state(one, other, step)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert rows(one / name) == rows(other / name)


def test_the_folder_keeps_the_contract(letters, tmp_path, capsys):
    folder = tmp_path / "run"
    assert start(letters, folder, "run.keep = 2") == 0
    plan = json.loads((folder / "plan.json").read_text())
    width, selected = 16, [v for v in plan["variables"] if v["trained"]]
    # An MLP of four widths, its norm, and the head.
    expected = 2 * 4 * width**2 + width + width * 256
    assert plan["trained_parameters"] == sum(np.prod(v["shape"]) for v in selected) == expected
    assert plan["wire_bytes_per_step"] == sum(v["wire_bytes_per_step"] for v in plan["variables"]) == 4 * expected
    assert plan["full_wire_bytes_per_step"] == 4 * plan["total_parameters"]
    assert (folder / "plan.txt").read_text().strip() in capsys.readouterr().out
    metrics = rows(folder / "metrics.jsonl")
    steps = [r for r in metrics if r["split"] == "train"]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert [r["wire_bytes"] for r in steps] == [4 * expected * i for i in range(1, 13)]
    evaluations = [r for r in metrics if r["split"] == "eval"]
    assert [(r["step"], r["examples"]) for r in evaluations] == [(6, 11), (12, 11)]
    assert evaluations[-1]["bits_per_byte"] == pytest.approx(evaluations[-1]["loss"] / np.log(2))
    samples = rows(folder / "samples.jsonl")
    assert [(r["step"], r["temperature"], r["prompt"], len(r["text"])) for r in samples] == [
        (6, 0.6, "\n", 20),
        (12, 0.6, "\n", 20),
    ]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "step-0000000008.safetensors",
        "step-0000000012.safetensors",
    ]
    assert any((folder / "tensorboard").iterdir())
    saved = state(folder, 12)
    assert {n.removeprefix("variables/") for n in saved if n.startswith("variables/")} == {v["path"] for v in selected}
    assert not any("attention" in name or "embedding" in name for name in saved)


@pytest.mark.slow
def test_tensorboard_has_the_same_scalars(letters, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    assert start(letters, folder) == 0
    boards = {}
    for split in ("train", "eval"):
        events = EventAccumulator(str(folder / "tensorboard" / split), size_guidance={"tensors": 0}).Reload()
        boards[split] = events
        written = [row for row in rows(folder / "metrics.jsonl") if row["split"] == split]
        # The same names in both, so that TensorBoard draws them in one chart; nothing that never changes.
        names = {"loss", "accuracy", "bits_per_byte"} if split == "eval" else {"loss", "learning_rate", "gradient_norm"}
        tags = {tag for tag in events.Tags()["tensors"] if not tag.startswith(("samples/", "speed/"))}
        assert tags == names | ({"nic_bytes"} if split == "train" else set())
        for name in tags:
            shown = [(e.step, float(tf.make_ndarray(e.tensor_proto))) for e in events.Tensors(name)]
            np.testing.assert_allclose(shown, [(row["step"], row[name]) for row in written], rtol=1e-6)
    assert len(boards["eval"].Tensors("samples/0")) == 2
    for name in ("examples_per_second", "tokens_per_second", "flops_per_second"):
        shown = [(e.step, float(tf.make_ndarray(e.tensor_proto))) for e in boards["train"].Tensors(f"speed/{name}")]
        np.testing.assert_allclose(shown, [(row["step"], row[name]) for row in rows(folder / "speed.jsonl")], rtol=1e-6)


@pytest.mark.parametrize(
    ("precision", "stops"), quick([("mixed_float16", [3]), ("float32", [3, 8, 11])], "mixed_float16")
)
def test_a_run_in_pieces_is_the_run_in_one(precision, stops, letters, tmp_path, capsys, monkeypatch):
    """Also where the first gradients overflow, for a scale that is halved then and doubled after three good steps."""
    scale, good = 2.0**19, 0
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", scale)
    monkeypatch.setattr(loss_scale, "GROW_AFTER", 3)
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    bound = ("run.accumulate = 2", f"run.precision = '{precision}'")
    assert start(letters, whole, *bound) == 0
    for stop in [*stops, 12]:
        assert start(letters, pieces, *bound, f"run.steps = {stop}") == 0
    left, right = state(whole, 12), state(pieces, 12)
    for name, value in left.items():
        assert value.tobytes() == right[name].tobytes(), name
    steps = [[r for r in rows(f / "metrics.jsonl") if r["split"] == "train"] for f in (whole, pieces)]
    assert steps[0] == steps[1]
    skipped = [row["gradient_norm"] is None for row in steps[0]]
    assert any(skipped) == (precision == "mixed_float16") and not any(skipped[1:3])  # that it stops amid good steps
    for overflow in skipped:
        good = 0 if overflow else good + 1
        scale *= 0.5 if overflow else 2 if good % 3 == 0 else 1
    assert left.get("loss_scale/scale", scale) == scale
    capsys.readouterr()
    assert start(letters, pieces, *bound) == 0
    assert "finished" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["Adafactor", "Nadam", "Muon"])
def test_optimizers_with_slots_of_their_own_resume(optimizer, letters, tmp_path):
    """Adafactor's factored slots all have one name, and Keras numbers one of Nadam's through the process."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    bound = f"run.optimizer = @keras.optimizers.{optimizer}"
    for folder, steps in [(whole, 6), (pieces, 2), (pieces, 6)]:
        assert start(letters, folder, bound, f"run.steps = {steps}", "run.eval_every = None") == 0
    for name, value in state(whole, 6).items():
        assert value.tobytes() == state(pieces, 6)[name].tobytes(), name


def test_a_folder_has_one_run_at_a_time(letters, tmp_path, capsys):
    from dist_partial.files import locked

    assert start(letters, tmp_path / "run", "run.steps = 1") == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with locked(tmp_path / "run"):
        assert start(letters, tmp_path / "run", "run.steps = 2") == 2
    assert "another run is writing" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert start(letters, tmp_path / "run", "run.steps = 2") == 0


def test_nothing_in_a_run_folder_is_written_through_a_link(letters, tmp_path, capsys):
    run, mine = tmp_path / "run", tmp_path / "mine"
    assert start(letters, run, "run.steps = 1") == 0
    for name in (".lock", "metrics.jsonl", "samples.jsonl", "checkpoints", "tensorboard", "tensorboard/eval"):
        (run / name).rename(mine)
        if name == ".lock":
            mine.write_text("precious")
        (run / name).symlink_to(mine)
        before = contents(mine)
        assert start(letters, run, "run.steps = 2") == 2, name
        line = f"error: {run / name} is a link to {mine}, and nothing is written through a link in a run folder"
        assert capsys.readouterr().err.splitlines()[-1].startswith(line)
        assert contents(mine) == before, name
        (run / name).unlink()
        mine.rename(run / name)


@pytest.mark.slow
def test_what_has_a_name_that_is_to_be_written_is_replaced_and_not_written_to(letters, tmp_path):
    """Files are written beside their names first, under names that can be guessed."""
    run, mine = tmp_path / "run", tmp_path / "mine"
    assert start(letters, run, "run.steps = 1") == 0
    mine.write_text("precious")
    for name in ("plan.txt", "run_fingerprint.json", "operative_config.gin", "metrics.jsonl"):
        (run / f".partial-{os.getpid()}-{name}").symlink_to(mine)
    (run / "plan.txt").unlink()
    (run / "plan.txt").symlink_to(mine)
    assert start(letters, run, "run.steps = 2") == 0
    assert mine.read_text() == "precious"
    assert not any(path.is_symlink() for path in run.iterdir())


def test_a_lock_keeps_what_is_in_it(tmp_path):
    from dist_partial.files import locked

    (tmp_path / ".lock").write_text("precious")
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == "precious"


def test_a_model_of_the_same_shapes_is_another_model(letters, tmp_path, capsys):
    assert start(letters, tmp_path / "run", "run.steps = 1") == 0
    assert start(letters, tmp_path / "run", "run.steps = 2", "letters_module.small.heads = 1") == 2
    assert "model_config.heads was 2 and is now 1" in capsys.readouterr().err


@pytest.mark.slow
def test_what_was_done_after_the_last_checkpoint_is_done_again(letters, tmp_path):
    """As after a kill at step 11: metrics and samples are there beyond the checkpoint, and half a line."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(letters, whole) == 0
    assert start(letters, killed) == 0
    (killed / "checkpoints" / "step-0000000012.safetensors").unlink()
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "spl')
    assert start(letters, killed) == 0
    assert_same_run(whole, killed, 12)


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(letters, tmp_path):
    """What it had recorded, the evaluation and sample of step 0 among it, is there once and not twice."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    bound = ("run.eval_first = True", "run.steps = 6")
    for folder in (whole, killed):
        assert start(letters, folder, *bound) == 0
    for checkpoint in (killed / "checkpoints").iterdir():
        checkpoint.unlink()
    assert start(letters, killed, *bound) == 0
    assert_same_run(whole, killed, 6)
    assert [row["step"] for row in rows(killed / "metrics.jsonl") if row["split"] == "eval"] == [0, 6]
    assert [row["step"] for row in rows(killed / "samples.jsonl")] == [0, 6]
    assert len(list((killed / "tensorboard").rglob("events*"))) == 2  # of training and of evaluation


@pytest.mark.slow
@pytest.mark.parametrize("stop", [4, 8])
def test_each_switch_is_recorded_once(stop, letters, tmp_path):
    """Stopped where one is due, and killed after it: a line of the plan is of the step that follows."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    bound = ("run.schedule = @block_rotation()", "block_rotation.every = 4", "run.eval_first = True")
    assert start(letters, whole, *bound) == 0
    assert start(letters, killed, *bound) == 0
    for checkpoint in (killed / "checkpoints").iterdir():
        if int(checkpoint.stem[5:]) > stop:
            checkpoint.unlink()
    assert start(letters, killed, *bound) == 0
    assert_same_run(whole, killed, 12)
    assert [row["step"] for row in rows(killed / "metrics.jsonl") if row["split"] == "plan"] == [1, 5, 9]


def test_the_bar_shows_what_the_last_call_sent(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(metric_writer.tqdm, "set_postfix_str", lambda self, text, refresh: shown.append(text))
    sent = np.array([100, 4_000, 8_000])  # what came before: 50 %
    with metric_writer.MetricWriter(tmp_path, 2, 6, True) as writer:
        for step, (count, each) in zip((3, 5), ((2, 1_000), (2, 0)), strict=True):
            sent = sent + np.array([1, each, 4_000]) * np.arange(count + 1)[:, np.newaxis]
            writer.train(step, np.ones(count), np.ones(count), sent, [{"mae": 0.5}] * count)
            sent = sent[-1]
    assert shown == [
        f"loss 1.000, mae 0.500, {text}"
        for text in ("1.00kB/step at the interface (25.00%)", "0.00B/step at the interface (0.00%)")
    ]


@pytest.mark.slow
def test_operative_configuration_alone_reproduces_the_run(letters, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    assert start(letters, one) == 0
    assert start(one / "operative_config.gin", other) == 0
    assert_same_run(one, other, 12)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(letters, tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    command = [sys.executable, "-m", "dist_partial.train", f"--gin_file={letters}"]
    many = ["--gin_param=run.steps = 4000", "--gin_param=run.eval_every = None"]
    process = subprocess.Popen(
        [*command, f"--run_dir={folder}", *many], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    )
    try:
        deadline = time.monotonic() + 60
        while not list(folder.glob("checkpoints/*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "run the same command again" in output
    done = max(int(p.stem[5:]) for p in folder.glob("checkpoints/*.safetensors"))
    assert 4 <= done < 4000
    # Going on from there is the same as never having stopped.
    end = f"run.steps = {done + 2}"
    assert start(letters, folder, end, "run.eval_every = None") == 0
    assert start(letters, whole, end, "run.eval_every = None") == 0
    assert_same_run(folder, whole, done + 2)


@pytest.mark.slow
def test_the_number_of_replicas_may_change(letters, tmp_path):
    one, changed = tmp_path / "one", tmp_path / "changed"
    params = ["letters_module.small.width = 32", "run.precision = 'float64'"]
    # Dropout draws on each replica for its own part of the batch, so it is the one thing that may differ.
    params.append("letters_module.small.dropout = 0.0")
    assert start(letters, one, *params, "replicas.cpu = 1") == 0
    for cpu, steps in [(4, 5), (2, 9), (1, 12)]:
        assert start(letters, changed, *params, f"replicas.cpu = {cpu}", f"run.steps = {steps}") == 0
    for name, value in state(one, 12).items():
        difference = np.linalg.norm(state(changed, 12)[name] - value)
        assert difference <= 1e-10 * max(np.linalg.norm(value), 1e-12), name


@pytest.mark.slow
def test_samples_are_the_same_on_any_number_of_replicas(letters, tmp_path):
    texts = []
    for cpu in (1, 2, 4):
        folder = tmp_path / str(cpu)
        params = ["run.steps = 1", "Adam.learning_rate = 1e-12", "sample.count = 3"]
        assert start(letters, folder, *params, f"replicas.cpu = {cpu}") == 0
        texts.append([r["text"] for r in rows(folder / "samples.jsonl")])
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) == 3


@pytest.mark.slow
def test_a_sample_that_fails_costs_no_training(letters, tmp_path, capsys):
    folder = tmp_path / "run"
    assert start(letters, folder, "run.model = @letters_module.spoilt") == 0
    said = capsys.readouterr().out
    for step in (6, 12):
        assert f"step {step}: no sample: the model's logits are not finite" in said
    metrics = rows(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics if row["split"] == "eval"] == [6, 12]
    assert not (folder / "samples.jsonl").exists()
    assert sample.main([f"--run_dir={folder}", "--allow_imports"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the model's logits are not finite") and error.count("\n") == 1
    assert sample.main([f"--run_dir={folder}", "--allow_imports", "--prompt=ab"]) == 0


def test_sample_command(letters, tmp_path, capsys):
    folder = tmp_path / "run"
    assert start(letters, folder) == 0
    last = rows(folder / "samples.jsonl")[-1]
    capsys.readouterr()
    assert sample.main([f"--run_dir={folder}", "--allow_imports"]) == 0
    assert capsys.readouterr().out == last["prompt"] + last["text"] + "\n\n"
    given = ["--prompt=ab", "--temperature=0", "--length=5", "--count=2"]
    assert sample.main([f"--run_dir={folder}", "--allow_imports", *given]) == 0
    first, second, _ = capsys.readouterr().out.split("\n\n")
    assert first == second
    assert first.startswith("ab")
    assert len(first) == 7


def test_a_run_that_samples_nothing_can_be_sampled(letters, tmp_path, capsys):
    folder = tmp_path / "run"
    assert start(letters, folder, "sample.count = 0", "sample.length = 5") == 0
    assert not (folder / "samples.jsonl").exists()
    assert "sample at" not in capsys.readouterr().out
    assert sample.main([f"--run_dir={folder}", "--allow_imports", "--prompt=ab"]) == 0
    assert len(capsys.readouterr().out) == len("ab" + "x" * 5 + "\n\n")


@pytest.mark.slow
def test_sample_takes_the_anchors_of_a_run_folder(letters, tmp_path, capsys):
    """Between two exchanges: the text is the one that the run itself has sampled, from what all replicas agree on."""
    folder = tmp_path / "run"
    params = ["run.rules = [('train', '.*')]", "run.reduction = @local_sgd()", "local_sgd.sync_every = 5"]
    params += ["local_sgd.outer_optimizer = @nesterov", "nesterov.learning_rate = 0.5", "Adam.learning_rate = 0.05"]
    assert start(letters, folder, *params, "run.steps = 8", "sample.length = 12") == 0
    saved = state(folder, 8)
    own = saved["own/head/kernel"]
    assert own.shape[0] == 2 and not same_bits(own)
    assert not any(same_bits([value, saved["variables/head/kernel"]]) for value in own)
    last = rows(folder / "samples.jsonl")[-1]
    capsys.readouterr()
    assert sample.main([f"--run_dir={folder}", "--allow_imports"]) == 0
    assert capsys.readouterr().out == last["prompt"] + last["text"] + "\n\n"


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("reduction", ["mean_with_sample_weight", "sum_over_batch_size", "sum"])
def test_evaluation_is_that_of_one_device_on_every_example(reduction, weighted):
    """11 examples, of unequal weights, on 1, 2 and 4 replicas in batches of 4, 4 and 3: NumPy counts in float64."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (11, 6)).astype(np.int32), rng.integers(0, 256, (11, 6)).astype(np.int32)

    def total(vector):
        assert vector.ndim == 1  # which is what several workers sum
        return vector

    weight = rng.integers(1, 4, (11, 6)) * rng.integers(0, 2, (11, 6)) / 2 if weighted else np.ones((11, 6))
    source = ArraySource(x, y, weight if weighted else None)
    for replicas in (1, 2, 4):
        made = in_process(replicas)
        settings = Settings(
            rules=[("train", ".*")],
            model=lambda: byte_transformer(layers=1, width=8, heads=1),
            data=lambda: Dataset("random", source, source, fingerprint(x), None, "byte"),
            loss=lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction),
            global_batch=4,
            precision="float64",
        )
        built = build(settings, made)
        logits = keras.ops.convert_to_numpy(built.model(x)).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, y[..., None], -1)[..., 0]
        correct = (logits.argmax(-1) == y).astype(float)
        evaluate = evaluation.prepare_evaluation(
            built.objective,
            evaluation_step(EvaluationSpec(made.strategy, made.collectives, built.model, built.objective)),
            total,
            functools.partial(evaluation_batches, source, context=topology(made.strategy).input_context),
            examples=11,
            global_batch=4,
        )
        metrics = evaluate()
        assert evaluate() == metrics
        batches = [slice(0, 4), slice(4, 8), slice(8, 11)]
        divisors = {
            "mean_with_sample_weight": [weight[batch].sum() for batch in batches],
            "sum_over_batch_size": [weight[batch].size for batch in batches],
            "sum": [1, 1, 1],
        }[reduction]
        sums = [(losses * weight)[batch].sum() for batch in batches]
        of_batches = [total / divisor for total, divisor in zip(sums, divisors, strict=True)]
        # As Keras averages: by the examples of a batch.
        assert metrics["loss"] == pytest.approx(np.average(of_batches, weights=[4, 4, 3]), rel=1e-9)
        assert metrics["bits_per_byte"] == pytest.approx((losses * weight).sum() / weight.sum() / np.log(2), rel=1e-9)
        assert metrics["accuracy"] == pytest.approx((correct * weight).sum() / weight.sum())
        assert metrics["examples"] == 11


def _rows() -> Settings:
    return Settings(
        rules=[Rule(r"embedding/.*", rows=(97, 101)), ("freeze", ".*")],
        model=lambda: byte_transformer(layers=1, width=8, heads=1),
        data=_letters,
        steps=3,
        global_batch=4,
        replicas=lambda: in_process(2),
        sampling=Sampling(length=3),
    )


def test_rows_that_are_not_selected_are_frozen():
    built = build(_rows(), create("default"))
    variable = next(v for v in built.model.trainable_variables if "embeddings" in v.path)

    def moved(row: int) -> list[str]:
        variable.assign(variable.numpy() + np.eye(256)[row][:, np.newaxis])
        now = checkpoints.frozen_fingerprints(built.model, built.plan, built.layer_state.moving)
        return [path for path, found in now.items() if found != built.fingerprint["frozen"][path]]

    assert (moved(97), moved(100)) == ([], [])
    assert moved(101) == ["embedding/embeddings[other rows]"]


def test_rows_are_saved_and_restored_alone(tmp_path):
    settings = _rows()
    loop.run(settings, tmp_path / "run")
    saved = state(tmp_path / "run", 3)
    assert saved["variables/embedding/embeddings"].shape == (4, 8)
    assert saved["slots/embedding/embeddings/momentum"].shape == (4, 8)
    built = build(settings, create("default"))
    whole = next(v for v in built.model.trainable_variables if "embeddings" in v.path)
    before = whole.numpy().copy()
    restore(built, tmp_path / "run", print)
    assert np.array_equal(np.delete(whole.numpy(), slice(97, 101), 0), np.delete(before, slice(97, 101), 0))
    assert np.array_equal(whole.numpy()[97:101], saved["variables/embedding/embeddings"])
    assert not np.array_equal(whole.numpy()[97:101], before[97:101])


def _letters() -> Dataset:
    ids = np.random.default_rng(0).integers(97, 101, (20, 9)).astype(np.int32)
    source = ArraySource(ids[:, :-1], ids[:, 1:])
    return Dataset("letters", source, source, fingerprint(ids), None, "byte")


@pytest.mark.slow
def test_two_workers_write_one_folder_and_go_on(letters, tmp_path):
    """The same run on one device and on two workers of one folder, the second time stopped in between."""
    folder, single = tmp_path / "workers", tmp_path / "single"
    params = ["run.precision = 'float64'", "letters_module.small.dropout = 0.0"]
    for steps in (5, 12):
        flags = [f"--gin_param={param}" for param in [*params, f"run.steps = {steps}"]]
        command = ["-m", "dist_partial.train", f"--run_dir={folder}", f"--gin_file={letters}", *flags]
        assert_all_end(run_workers(command, workers=2, timeout=120, pythonpath=tmp_path))
    assert start(letters, single, *params, "replicas.cpu = 1") == 0
    for name, value in state(single, 12).items():
        assert np.linalg.norm(state(folder, 12)[name] - value) <= 1e-10 * max(np.linalg.norm(value), 1e-12), name
    plan = json.loads((folder / "plan.json").read_text())
    last = [r for r in rows(folder / "metrics.jsonl") if r["split"] == "train"][-1]
    assert (last["step"], last["wire_bytes"]) == (12, 12 * plan["wire_bytes_per_step"])


@pytest.mark.slow
def test_one_step_a_call_is_the_same_as_several(letters, tmp_path):
    """It is compiled without a loop. With micro-batches, for these are a loop of their own."""
    params = ["run.steps = 6", "run.accumulate = 2", "run.eval_every = None", "run.save_every = None"]
    for name, steps in (("one", 1), ("several", 3)):
        assert start(letters, tmp_path / name, *params, f"run.steps_per_loop = {steps}") == 0
    one, several = (json.loads((tmp_path / name / "traffic.json").read_text()) for name in ("one", "several"))
    assert_same_run(tmp_path / "one", tmp_path / "several", 6)
    assert one["counted_bytes"] == several["counted_bytes"] == one["planned_bytes"] > 0


def test_a_run_that_is_killed_after_its_last_checkpoint_has_written_everything(letters, tmp_path, monkeypatch):
    """tests/kills.py kills it after each call that writes; this is what it found."""
    save = checkpoints.save

    class Killed(BaseException):
        pass

    def and_die(*args):
        save(*args)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoints, "save", and_die)
        start(letters, tmp_path / "run", "run.steps = 3", "run.save_every = None", "replicas.cpu = 1")
    assert json.loads((tmp_path / "run" / "traffic.json").read_text())["last_step"] == 3
    leftover = tmp_path / "run" / ".partial-1-plan.json"
    leftover.touch()
    for steps in (3, 4):
        assert start(letters, tmp_path / "run", f"run.steps = {steps}", "replicas.cpu = 1") == 0
    assert not leftover.exists()


@pytest.mark.slow
def test_ctrl_c_on_one_worker_stops_both_at_one_step(letters, tmp_path):
    folder = tmp_path / "run"
    params = ["run.steps = 100000", "run.eval_every = None", "run.save_every = None"]
    command = ["-m", "dist_partial.train", f"--run_dir={folder}", f"--gin_file={letters}"]

    def interrupt(processes):
        deadline = time.monotonic() + 60
        while not (folder / "operative_config.gin").exists():
            assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGINT)

    flags = [f"--gin_param={param}" for param in params]
    results = run_workers([*command, *flags], workers=2, timeout=90, pythonpath=tmp_path, meanwhile=interrupt)
    assert [code for code, _ in results] == [130, 130], results
    assert len(list(folder.glob("checkpoints/*.safetensors"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["@all_reduce()", "@local_sgd()"])
def test_a_worker_that_dies_ends_the_other_with_one_line(reduction, letters, tmp_path):
    """Whether the other one waits for a gradient or, between two exchanges, for nothing but a loss."""
    folder = tmp_path / "run"
    params = ["run.steps = 100000", "run.eval_every = None", "run.save_every = None", "local_sgd.sync_every = 50000"]
    command = ["-m", "dist_partial.train", f"--run_dir={folder}", f"--gin_file={letters}"]

    def kill(processes):
        deadline = time.monotonic() + 60
        while not (folder / "operative_config.gin").exists():
            assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
            time.sleep(0.05)
        processes[1].kill()

    flags = [f"--gin_param={param}" for param in [*params, f"run.reduction = {reduction}"]]
    (code, output), _ = run_workers([*command, *flags], workers=2, timeout=90, pythonpath=tmp_path, meanwhile=kill)
    last = output.strip().splitlines()[-1]
    assert code == AGAIN, output[-2000:]
    assert "error: " in last and "worker 1" in last and "Traceback" not in output, output[-2000:]


@pytest.mark.parametrize("step", quick([6, 12], 12))
def test_an_evaluation_that_failed_is_made_up(step, letters, tmp_path, capsys, monkeypatch):
    """Also at the end, and after it has failed again; what it had written is not there twice."""
    make, made, fails = evaluation.prepare_evaluation, [], {step // 6, step // 6 + 1}

    def flaky(*args, **kwargs):
        evaluate = make(*args, **kwargs)

        def call():
            made.append(None)
            if len(made) in fails:
                raise RuntimeError("no such luck")
            return evaluate()

        return call

    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    bound = ("run.save_every = 3", "replicas.cpu = 1")
    assert start(letters, whole, *bound) == 0
    monkeypatch.setattr(evaluation, "prepare_evaluation", flaky)
    for _ in fails:
        assert start(letters, pieces, *bound) == 1
        assert "no such luck" in capsys.readouterr().err
        assert state(pieces, step)
        assert [row["step"] for row in rows(pieces / "metrics.jsonl") if row["split"] == "eval"] == [6][: step // 6 - 1]
    assert start(letters, pieces, *bound) == 0
    said = capsys.readouterr().out
    assert said.count(f"step {step}: making up the evaluation that is owed") == 1
    assert ("finished" in said) == (step == 12)
    assert_same_run(whole, pieces, 12)
    count = len(made)
    assert start(letters, pieces, *bound) == 0
    assert "making up" not in capsys.readouterr().out and len(made) == count


@pytest.mark.slow
def test_an_evaluation_is_made_up_once_though_the_run_was_killed_then(letters, tmp_path, monkeypatch):
    """After it had written its line, and before the checkpoint said so."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    bound = ("run.steps = 3", "replicas.cpu = 1")
    assert start(letters, whole, *bound) == 0
    samples = evaluation.samples
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "samples", lambda *args: 1 / 0)
        assert start(letters, killed, *bound) == start(letters, killed, *bound) == 1
    assert len(rows(killed / "metrics.jsonl")) == 4 and samples is evaluation.samples
    assert start(letters, killed, *bound) == 0
    assert_same_run(whole, killed, 3)


def test_the_command_reaches_the_gradient_by_few_functions(letters, tmp_path, monkeypatch):
    """From `train.main` to the call of `tape.gradient`: at most 7 functions of the package, in 3 files."""
    package, gradient, ways = str(Path(loop.__file__).parents[1]), tf.GradientTape.gradient, []

    def watched(*args, **kwargs):
        codes, frame = [], sys._getframe(1)
        while frame is not None and frame.f_code is not train.main.__code__:
            codes.append(frame.f_code)
            frame = frame.f_back
        if frame is not None:  # a run of one device traces in the thread of the command
            way = dict.fromkeys(code for code in [*codes, train.main.__code__] if code.co_filename.startswith(package))
            ways.append([f"{Path(code.co_filename).stem}.{code.co_name}" for code in reversed(way)])
        return gradient(*args, **kwargs)

    monkeypatch.setattr(tf.GradientTape, "gradient", watched)
    bound = ("run.steps = 2", "block_rotation.every = 1", "replicas.cpu = 1", "run.accumulate = 2")
    for schedule in ("constant", "block_rotation"):
        more = () if schedule == "constant" else (f"run.schedule = @{schedule}()",)
        assert start(letters, tmp_path / schedule, *bound, *more) == 0
    assert len(ways) >= 3
    for way in ways:
        assert way == [
            "train.main",
            "loop.run",
            "loop._train",
            "train_step.train_steps",
            "train_step.one_step",
            "train_step.replica_gradients",
            "train_step.backprop",
        ]
