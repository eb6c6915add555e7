"""Which failures are worth another start: the rules, what a run folder shows, and the count that outlives a process."""

import json

import pytest

from dist_partial.launch.restarts import Ledger, Progress, Restarts, look, progress

# Failures one after the other: exit code, error line, newest checkpoint, last step of the attempt; and what becomes of
# each: which restart it is of three, or a word of why there is none.
HISTORIES = {
    "a mistake": [(2, "error: no rule", 10, 12, "same way")],
    "Ctrl-C": [(130, "", 10, 12, "same way")],
    "no Python": [(127, "", 0, 0, "same way")],
    "a shell that cannot run it": [(126, "", 0, 0, "same way")],
    "an exception before the first step": [(1, "error: NameError", 0, 0, "before any step")],
    "the same of a run that goes on": [(1, "error: NameError", 40, 0, "before any step")],
    "an exception that comes again": [(1, "error: a", 0, 60, 1), (1, "error: a", 0, 60, "same failure")],
    "and before the step where it came": [(1, "error: a", 0, 60, 1), (1, "error: a", 0, 20, "same failure")],
    "at another address": [(1, "error: at 0x7f3a", 0, 6, 1), (1, "error: at 0x7e21", 0, 6, "same failure")],
    "as another worker tells it": [
        (1, "error: run.data raised KeyError", 0, 6, 1),
        (1, "error: worker 1 (10.0.0.2:2222): run.data raised KeyError", 0, 6, "same failure"),
    ],
    "an exception that lets some steps pass": [(1, "error: a", 0, n, n) for n in (1, 2, 3)],
    "and a checkpoint": [(1, "error: a", n, n + 5, 1) for n in range(1, 9)],
    "another exception": [(1, "error: a", 0, 6, 1), (1, "error: b", 0, 6, 2), (1, "error: a", 0, 6, 3)],
    "another code": [(3, "", 0, 0, 1), (4, "", 0, 0, 2)],
    "a crash": [(139, "", 0, 0, 1), (139, "", 0, 0, "same failure")],
    "what comes from around": [(75, "error: full", 0, 0, n) for n in (1, 2, 3)] + [(75, "", 0, 0, "limit of 3")],
    "the same with steps": [(75, "error: full", 0, 9 * n, n) for n in (1, 2, 3)] + [(75, "", 0, 99, "limit of 3")],
    "kills": [(137, "", 0, 0, 1), (137, "", 0, 0, 2), (143, "", 0, 0, 3), (137, "", 0, 0, "limit of 3")],
    "a host that is away": [(255, "ssh: refused", 5, 0, n) for n in (1, 2, 3)] + [(255, "", 5, 0, "limit of 3")],
    "a long run": [(75, "error: full", n, n, 1) for n in range(1, 99)],
    "no checkpoint any more": [(75, "", 5, 5, 1), (75, "", 9, 9, 1), *((75, "", 9, 9, n) for n in (2, 3))],
    "nothing is known of an attempt": [(75, "", 5, 5, 1), (137, "", 0, 0, 2), (75, "", 7, 7, 1)],
}


@pytest.mark.parametrize("name", HISTORIES)
def test_rules(name):
    restarts = Restarts()
    for code, line, checkpoint, step, expected in HISTORIES[name]:
        reason = restarts.refusal(code, line, Progress(checkpoint, step), 3)
        if isinstance(expected, str):
            assert expected in reason
        else:
            assert (reason, restarts.count) == ("", expected)


def test_no_restart_is_allowed():
    assert "limit of 0" in Restarts().refusal(75, "", Progress(), 0)


def line(split: str, step: int) -> str:
    return json.dumps({"step": step, "split": split, "loss": 1.0}) + "\n"


def test_what_a_run_folder_shows(tmp_path):
    metrics, checkpoints = tmp_path / "metrics.jsonl", tmp_path / "checkpoints"
    nothing = look(tmp_path / "none")
    assert nothing[:2] == (0, 0)
    assert progress(nothing, look(tmp_path / "none")) == (0, 0)

    # A run that begins: an evaluation comes first, and the selection of a schedule.
    metrics.write_text(line("eval", 0) + line("plan", 1))
    assert progress(nothing, look(tmp_path)) == (0, 0)
    metrics.write_text(line("eval", 0) + line("plan", 1) + line("train", 1) + line("train", 2) + line("plan", 3))
    assert progress(nothing, look(tmp_path)) == (0, 2)
    checkpoints.mkdir()
    for name in ("step-0000000002.safetensors", ".partial-12-step-0000000009.safetensors", "step-x.safetensors"):
        (checkpoints / name).touch()
    with open(metrics, "a") as file:
        file.write(line("train", 3) + '{"step": 4, "split": "tr')  # it is killed
    before = look(tmp_path)
    assert progress(nothing, before) == (2, 3)

    # It goes on, and ends before it has got to the metrics; when it has cut them; after a step.
    assert progress(before, look(tmp_path)) == (2, 0)
    metrics.unlink()
    metrics.write_text(line("train", 1) + line("train", 2))
    assert progress(before, look(tmp_path)) == (2, 0)
    metrics.write_text("".join(line("train", step) for step in (1, 2, 3)))
    assert progress(before, look(tmp_path)) == (2, 3)


def test_only_the_end_of_the_metrics_is_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(line("train", 1) * 50_000 + line("train", 7))
    assert look(tmp_path).step == 7


def test_a_count_that_outlives_the_process(tmp_path):
    run, path = tmp_path / "run", tmp_path / "run.logs" / "restarts.json"
    (run / "checkpoints").mkdir(parents=True)

    def attempt(code: int, checkpoint: int | None = None, step: int | None = None) -> tuple:
        Ledger(path, run).begin()
        if step is not None:
            (run / "metrics.jsonl").write_text(line("train", step))
        if checkpoint is not None:
            (run / "checkpoints" / f"step-{checkpoint:010d}.safetensors").touch()
        return Ledger(path, run).refusal(code, 2)

    assert attempt(75) == ("", 1, (0, 0))
    assert attempt(75, checkpoint=10, step=12) == ("", 1, (10, 12))
    assert attempt(143) == ("", 2, (10, 0))
    assert "limit of 2" in attempt(143)[0]
    assert attempt(1, step=13) == ("", 1, (10, 13))  # somebody has started it again
    assert "same failure" in attempt(1, step=13)[0]
    assert "before any step" in attempt(1)[0]


def test_a_count_that_cannot_be_written(tmp_path):
    """The scheduler's own takes its place, though the run goes on from a checkpoint."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-0000000010.safetensors").touch()
    (tmp_path / "run.logs").touch()
    ledger = Ledger(tmp_path / "run.logs" / "restarts.json", tmp_path / "run")
    for earlier, expected in ((0, ""), (1, ""), (2, "limit of 2")):
        ledger.begin()
        reason, count, _ = ledger.refusal(75, 2, earlier)
        assert count == earlier + 1 and (expected in reason if expected else not reason)
