"""What goes wrong in `model.fit` on several workers: every one ends soon, and says what it was and where."""

import re

import pytest

from tests.helpers.workers import run_workers

pytestmark = pytest.mark.slow
WORKERS = 2


def outputs(tmp_path, kind):
    """Exit code and output of each worker; one that hangs has -9 and no last line."""
    return run_workers(["-m", "tests.helpers.fit_mistakes", kind, str(tmp_path)], workers=WORKERS, timeout=120)


def last_line(output):
    return output.strip().splitlines()[-1]


def test_what_all_workers_find_together_leaves_them_able_to_go_on(tmp_path):
    found = {
        "plain": "(Adam) knows nothing of the other workers, whose gradients would be summed",
        "batch": "(SGD) knows nothing of the other workers, whose gradients would be summed",
        "elsewhere": "was made outside this strategy's scope",
        "xla": "XLA cannot compile what crosses workers",
        "outside": "was made outside the workers' strategy",
        "epochs": "epochs: 3 against 2",
        "initial_epoch": "initial_epoch: 1 against 0",
        "fewer": "of batches in an epoch, worker 1 (",
        "right": "nothing",
    }
    for rank, (code, output) in enumerate(outputs(tmp_path, "go_on")):
        assert code == 0, output[-3000:]
        for name, words in found.items():
            said = [line for line in output.splitlines() if line.startswith(f"{name} of {rank}: ")]
            assert words in said[0], output[-3000:]
    assert "evaluation of 1: nothing" in output and "no callback of" not in output


def test_a_training_without_on_workers_is_said_once(tmp_path):
    said = [output.count("no callback of dist_partial.fit.on_workers") for _, output in outputs(tmp_path, "without")]
    assert said == [1, 0]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("rules", r"UserError: worker 1 \(\S+\) runs something else than worker 0 \(\S+\): optimizer\."),
        ("fewer", r"UserError: .*worker 1 \(\S+\) has gone on where worker 0 \(\S+\) waits for its part"),
        ("held_out", r"UserError: .*worker \d \(\S+\) has gone on where worker \d \(\S+\) waits for its part"),
        ("raises", r"LookupError: no such table"),
    ],
    ids=["rules", "fewer", "held_out", "raises"],
)
def test_a_mistake_on_one_worker_ends_all_and_is_named_by_all(kind, words, tmp_path):
    ended = outputs(tmp_path, kind)
    for code, output in ended:
        assert code == 1, output[-3000:]
        assert re.search(words, last_line(output)), output[-3000:]
    if kind == "raises":
        assert re.search(r"worker 1 \(\S+\): LookupError", last_line(ended[0][1]))


@pytest.mark.parametrize(
    ("kind", "words", "code"),
    [
        ("alone", r"UserError: .*worker \d \(\S+\) has gone on where worker \d \(\S+\) waits for its part", 0),
        ("killed", r"Fault: worker 1 \(\S+\) is gone", -9),
    ],
    ids=["alone", "killed"],
)
def test_a_worker_that_has_ended_is_named_by_the_other(kind, words, code, tmp_path):
    (first, output), (last, _) = outputs(tmp_path, kind)
    assert (first, last) == (1, code), output[-3000:]
    assert re.search(words, last_line(output)), output[-3000:]
