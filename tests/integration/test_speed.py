"""How fast a run is, as `speed.jsonl` says."""

import pytest

from tests.helpers.files import rows
from tests.helpers.letters import start

FIELDS = ["step", "seconds", "share_of_time", "examples_per_second", "tokens_per_second", "flops_per_second"]
FIELDS += ["computed_seconds", "waited_seconds", "data_seconds"]
BATCH, WIDTH, LENGTH, IDS = 8, 16, 12, 256


def flops() -> int:
    """Of a step of `letters`, by hand: the MLP and the head are trained, and nothing below them."""
    tokens = BATCH * LENGTH
    attention = 4 * tokens * WIDTH**2 + 2 * tokens * LENGTH * WIDTH  # four projections; scores, and what they weigh
    mlp, head = 2 * tokens * WIDTH * 4 * WIDTH, tokens * WIDTH * IDS
    return 2 * (attention + 3 * mlp + 3 * head)


@pytest.mark.parametrize(
    "params", [["run.steps_per_loop = 1"], ["run.steps_per_loop = 3", "run.accumulate = 2", "replicas.cpu = 1"]]
)
def test_rates(letters, tmp_path, params):
    assert start(letters, tmp_path / "run", *params, "sample.count = 0") == 0
    first, last = rows(tmp_path / "run" / "speed.jsonl")
    assert list(first) == list(last) == FIELDS
    assert (first["step"], last["step"]) == (6, 12)
    # Within what rounding leaves: seconds have three decimals, rates four digits.
    assert 6 * BATCH / last["examples_per_second"] == pytest.approx(last["seconds"], rel=6e-4, abs=6e-4)
    for row in (first, last):  # the first without the call that compiles
        assert row["tokens_per_second"] == pytest.approx(LENGTH * row["examples_per_second"], rel=2e-3)
        assert row["flops_per_second"] == pytest.approx(flops() / BATCH * row["examples_per_second"], rel=2e-3)
        assert 0 < row["share_of_time"] <= 1 and row["waited_seconds"] == [0.0]
        assert 0 <= row["data_seconds"][0] < row["seconds"]
        assert row["computed_seconds"][0] == pytest.approx(row["seconds"] - row["data_seconds"][0], abs=2e-3)
