"""Checkpoints that a thread writes while the next steps are made: the same bits, and no fault of it is lost."""

import os
import signal
import threading

import pytest

from dist_partial import checkpoints
from dist_partial.errors import UserError
from dist_partial.training import metric_writer
from tests.helpers.files import assert_same_state, rows
from tests.helpers.letters import start

PARAMS = ["run.steps = 6", "run.save_every = 2", "run.eval_every = None", "run.keep = 9", "replicas.cpu = 2"]


@pytest.fixture
def waiting(monkeypatch):
    """Has the write of step 2 wait until the steps 3 and 4 are recorded; returns the names of the writing threads."""
    later, threads = threading.Event(), []
    save, train = checkpoints.save, metric_writer.MetricWriter.train

    def slow(folder, step, *args):
        threads.append(threading.current_thread().name)
        assert step != 2 or later.wait(60)
        return save(folder, step, *args)

    def recorded(self, step, *args):
        result = train(self, step, *args)
        if step == 3:
            later.set()
        return result

    monkeypatch.setattr(checkpoints, "save", slow)
    monkeypatch.setattr(metric_writer.MetricWriter, "train", recorded)
    return threads


RULE = "run.rules = [@my/Rule(), ('freeze', '.*')]"
EVERYTHING = "run.rules = [('train', '.*')]"  # embeddings too, whose rows are assigned by their numbers


@pytest.mark.parametrize(
    "params",
    [
        [EVERYTHING],
        *(
            pytest.param(params, marks=pytest.mark.slow)
            for params in (
                [EVERYTHING, "run.jit_compile = True"],
                [EVERYTHING, "run.optimizer = @keras.optimizers.Muon"],
                [EVERYTHING, "run.optimizer = @keras.optimizers.SGD", "SGD.learning_rate = 0.1", "SGD.momentum = 0.9"],
                ["run.reduction = @local_sgd()", "local_sgd.sync_every = 2"],
                ["run.reduction = @top_k()", "run.precision = 'mixed_bfloat16'"],
                [EVERYTHING, "run.precision = 'mixed_float16'"],
                [RULE, "my/Rule.match = 'embedding/embeddings'", "my/Rule.rows = (97, 101)"],
                [RULE, "my/Rule.match = '.*/kernel'", "my/Rule.lora = 2"],
            )
        ),
    ],
)
def test_steps_go_on_meanwhile_and_the_bits_are_those_of_their_step(letters, tmp_path, waiting, params):
    assert start(letters, tmp_path / "meanwhile", *PARAMS, *params) == 0
    assert len(waiting) == 3 and all(name.startswith("checkpoints") for name in waiting)
    waiting.clear()
    # The write of step 2 has had its event.
    assert start(letters, tmp_path / "between", *PARAMS, *params, "run.save_async = False") == 0
    assert waiting == ["MainThread"] * 3
    for step in (2, 4, 6):
        assert_same_state(tmp_path / "meanwhile", tmp_path / "between", step)
    assert rows(tmp_path / "meanwhile" / "metrics.jsonl") == rows(tmp_path / "between" / "metrics.jsonl")


def test_ctrl_c_meanwhile_waits_for_what_is_written(letters, tmp_path, waiting, monkeypatch):
    train, params = metric_writer.MetricWriter.train, [*PARAMS, "run.steps = 8"]

    def interrupted(self, step, *args):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return train(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(metric_writer.MetricWriter, "train", interrupted)
        assert start(letters, tmp_path / "stopped", *params) == 130
    saved = checkpoints.steps(tmp_path / "stopped" / "checkpoints")
    assert saved[0] == 2 and saved[-1] in (4, 6)
    for folder in ("stopped", "whole"):
        assert start(letters, tmp_path / folder, *params) == 0
    for step in (*saved, 8):
        assert_same_state(tmp_path / "stopped", tmp_path / "whole", step)


@pytest.mark.parametrize("fails_at, last_made", [(2, 4), pytest.param(6, 6, marks=pytest.mark.slow)])
def test_a_fault_of_the_thread_ends_the_run_at_the_next_checkpoint_or_the_end(
    letters, tmp_path, monkeypatch, capsys, fails_at, last_made
):
    save = checkpoints.save

    def full(folder, step, *args):
        if step == fails_at:
            raise UserError("cannot write it: No space left on device")
        return save(folder, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", full)
        assert start(letters, tmp_path / "run", *PARAMS) == 2
    assert capsys.readouterr().err.count("cannot write it: No space left on device") == 1
    assert rows(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == last_made
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [step for step in (2, 4) if step < fails_at]


def test_an_error_of_the_training_is_not_hidden_by_one_of_the_thread(letters, tmp_path, monkeypatch, capsys):
    train = metric_writer.MetricWriter.train

    def fails(self, step, *args):
        if step == 3:
            raise UserError("the error of step 3")
        return train(self, step, *args)

    def full(*args):
        raise UserError("cannot write it: No space left on device")

    monkeypatch.setattr(metric_writer.MetricWriter, "train", fails)
    monkeypatch.setattr(checkpoints, "save", full)
    assert start(letters, tmp_path / "run", *PARAMS) == 2
    said = capsys.readouterr()
    assert "a checkpoint is not saved: cannot write it: No space left on device" in said.out + said.err
    assert "error: the error of step 3" in said.err
