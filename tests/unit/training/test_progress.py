"""What a run says of what takes long: begun, done, and nothing after a failure."""

import threading

import keras
import pytest

from dist_partial.config.settings import Settings
from dist_partial.data import stdlib_shapes
from dist_partial.models import two_dense
from dist_partial.schedules.fixed import Phases
from dist_partial.training import loop, progress
from dist_partial.training.progress import Progress
from tests.helpers.strategies import in_process


@pytest.fixture
def lines(monkeypatch):
    """Lines that are written, and an event after each."""
    found, written = [], threading.Event()

    def write(line: str) -> None:
        found.append(line)
        written.set()

    monkeypatch.setattr(progress, "say", write)
    return found, written


def test_what_takes_long_is_said_when_it_begins_and_ends(lines):
    found, written = lines
    with Progress(active=True, seconds=0.0) as told:
        told.begin("compiling the step")
        assert written.wait(60)
        assert found == ["compiling the step..."]
        written.clear()
        told.begin("compiling the evaluation")  # ends what was before it
        assert found[1].startswith("done in ") and found[1].endswith(" s")
        told.end()
        told.end()
    assert [line for line in found[2:] if line.startswith("done")] == found[3:4]


def test_what_is_quick_is_not(lines):
    with Progress(active=True, seconds=3600.0) as told:
        for what in ("one", "two"):
            told.begin(what)
        told.end()
    assert lines[0] == []


def test_other_workers_say_nothing(lines):
    before = threading.active_count()
    with Progress(active=False, seconds=0.0) as told:
        told.begin("compiling the step")
        assert threading.active_count() == before
    assert lines[0] == []


def test_nothing_is_said_of_what_has_failed(lines):
    with pytest.raises(ValueError), Progress(active=True, seconds=3600.0) as told:
        told.begin("compiling the step")
        timer = told._timer
        raise ValueError
    timer.join(60)
    assert not timer.is_alive()
    told._say(timer, "compiling the step")  # had it been about to
    assert lines[0] == []


class Noted(Progress):
    """Notes what begins."""

    def __init__(self, active: bool) -> None:
        super().__init__(active=False)
        NOTES.clear()

    def begin(self, what: str) -> None:
        NOTES.append(what)


NOTES: list[str] = []


def settings(**more) -> Settings:
    made = in_process(1)
    given = {"rules": [("train", ".*")], "steps": 3, "global_batch": 8, "replicas": lambda: made, "eval_examples": 8}
    return Settings(model=two_dense, data=stdlib_shapes, **{**given, **more})


def test_a_run_says_what_it_compiles_and_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "Progress", Noted)
    loop.run(settings(), tmp_path / "constant")
    first = "making the first step: TensorFlow optimizes its graph"
    start = ["building the model", "compiling the evaluation"]
    assert [*start, "compiling the step: 4 variables of dense1, dense2", first] == NOTES
    keras.utils.clear_session(free_memory=False)
    capsys.readouterr()
    schedule = Phases([(0, "dense2/bias"), (1, "dense2/.*"), (2, ".*")])
    loop.run(settings(schedule=schedule), tmp_path / "phases")
    first = "making the first step of the selection: TensorFlow optimizes its graph"
    assert [
        *start,
        "compiling selection 1 of 3: 1 variable of dense2 (in part)",
        "compiling selection 2 of 3: 2 variables of dense2",
        "compiling selection 3 of 3: 4 variables of dense1, dense2",
        *[first] * 3,
    ] == NOTES
    said = [line for line in capsys.readouterr().out.splitlines() if ": training " in line]
    names = ["dense2 (in part)", "dense2", "dense1, dense2"]
    assert [line.split(" parameters")[0].rpartition(":")[0] for line in said] == [
        f"step {step}: training {name}" for step, name in enumerate(names, 1)
    ]
    keras.utils.clear_session(free_memory=False)
    loop.run(settings(schedule=schedule, compiled_plans=1), tmp_path / "one_kept")
    assert [note for note in NOTES if note.startswith("compiling ")][1:] == [
        f"compiling the next selection: {words}"
        for words in ("1 variable of dense2 (in part)", "2 variables of dense2", "4 variables of dense1, dense2")
    ]
