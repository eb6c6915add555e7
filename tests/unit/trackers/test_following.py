import json
import threading
import time

import pytest

from dist_partial.trackers import Following, Row, Tracker


class Recorded(Tracker):
    def __init__(self):
        self.calls = []

    def begin(self, folder, known):
        self.calls.append(("begin", folder.name, known))
        return known or "the run"

    def log(self, rows):
        self.calls.append(("log", [row.step for row in rows]))

    def text(self, name, text, step):
        self.calls.append(("text", name, text, step))

    def end(self, outcome):
        self.calls.append(("end", outcome))

    @property
    def steps(self):
        return [step for method, *rest in self.calls if method == "log" for step in rest[0]]


def rows(*steps):
    return [Row(step, {"train/loss": 1.0 / step}) for step in steps]


def test_everything_is_told_in_its_order(tmp_path):
    tracker = Recorded()
    with Following([tracker], tmp_path, print) as following:
        following.log(rows(1, 2))
        following.text("plan.txt", "all", 0)
        following.log(rows(3))
    assert tracker.calls[0] == ("begin", tmp_path.name, "")
    assert [call for call in tracker.calls if call[0] != "log"][1:] == [
        ("text", "plan.txt", "all", 0),
        ("end", "finished"),
    ]
    assert tracker.steps == [1, 2, 3]


def test_rows_that_come_while_one_is_told_are_told_together(tmp_path, monkeypatch):
    tracker = Recorded()
    with Following([tracker], tmp_path, print) as following:
        for step in range(1, 1001):
            following.log(rows(step))
    assert tracker.steps == list(range(1, 1001))
    assert len(tracker.calls) < 50


@pytest.mark.parametrize(
    ("error", "outcome"), [(None, "finished"), (KeyboardInterrupt, "stopped"), (ValueError, "failed")]
)
def test_how_the_run_ended(error, outcome, tmp_path):
    tracker = Recorded()
    try:
        with Following([tracker], tmp_path, print) as following:
            following.log(rows(1))
            if error:
                raise error
    except (KeyboardInterrupt, ValueError):
        pass
    assert tracker.calls[-1] == ("end", outcome)


def test_a_run_that_goes_on_is_known_by_what_it_was(tmp_path):
    for known in ("", "the run"):
        tracker = Recorded()
        with Following([tracker, Recorded()], tmp_path, print) as following:
            following.log(rows(1))
        assert tracker.calls[0][2] == known
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"Recorded": "the run", "Recorded (2)": "the run"}


def test_who_is_told_nothing_begins_nothing(tmp_path):
    tracker = Recorded()
    with Following([tracker], tmp_path, print) as following:
        following.log([])
    assert tracker.calls == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["begin", "log", "text", "end"])
@pytest.mark.parametrize("error", [ValueError("no\nroute"), SystemExit(1), KeyboardInterrupt()])
def test_what_a_tracker_raises_ends_the_tracker(method, error, tmp_path):
    def failing(*_):
        raise error

    broken, well, said = Recorded(), Recorded(), []
    setattr(broken, method, failing)
    with Following([broken, well], tmp_path, said.append) as following:
        following.log(rows(1))
        following.text("plan.txt", "all", 0)
        following.log(rows(2))
    [line] = said
    assert line.startswith(f"Recorded gets nothing more: {type(error).__name__}") and "\n" not in line
    assert well.calls[-1] == ("end", "finished")


def test_a_tracker_that_hangs_is_left(tmp_path):
    released = threading.Event()

    class Hanging(Tracker):
        def log(self, rows):
            released.wait()

    said = []
    began = time.monotonic()
    with Following([Hanging(), well := Recorded()], tmp_path, said.append, seconds=1.5) as following:
        for step in range(1, 100):
            following.log(rows(step))
        told = time.monotonic() - began
    took = time.monotonic() - began
    released.set()
    assert told < 1 and took < 4
    assert said == ["Hanging has not taken everything within 1.5 s, and is left"]
    assert well.calls[-1] == ("end", "finished")


def test_a_tracker_that_hangs_with_all_it_can_be_told(tmp_path, monkeypatch):
    """The training does not wait, and neither does its end."""
    monkeypatch.setattr("dist_partial.trackers.following._MOST", 5)
    released = threading.Event()

    class Hanging(Tracker):
        def begin(self, folder, known):
            released.wait()
            return ""

    said = []
    began = time.monotonic()
    with Following([Hanging()], tmp_path, said.append, seconds=1) as following:
        for step in range(1, 100):
            following.log(rows(step))
    assert time.monotonic() - began < 3 and len(said) == 1
    released.set()
