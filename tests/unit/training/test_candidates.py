"""The cheapest reduction of those whose held-out loss was measured."""

import json

import pytest

from dist_partial import models
from dist_partial.config.settings import Settings
from dist_partial.data import stdlib_shapes
from dist_partial.errors import UserError
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.reductions.power_sgd import PowerSGD
from dist_partial.selection.rules import Rule
from dist_partial.training.candidates import MEASURED, cheapest
from dist_partial.training.cost_model import Machine
from tests.benchmarks.tables import RESULTS

RULES = [Rule("dense1/.*", reduction=PowerSGD(1)), ("freeze", ".*")]


def settings(**more):
    return Settings(RULES, lambda: models.two_dense(hidden=16), stdlib_shapes, **more)


def test_losses_are_those_of_the_benchmark():
    rows = json.loads((RESULTS / "quality.json").read_text())["rows"]
    losses = {row["policy"]: row["eval_loss"] for row in rows}
    for name, candidate in MEASURED.items():
        assert candidate.loss == pytest.approx(max(0.0, losses[name] / losses["full"] - 1), abs=1e-4), name


@pytest.mark.parametrize(
    ("bandwidth", "max_loss", "name"),
    [
        (1e4, 0.0, "4 bits"),
        (1e4, 0.017, "every 2 steps, top 6 % in 1 bit, residual kept local"),
        (1e4, 0.02, "every 6 steps, 1.6 bits"),
    ],
)
def test_the_loss_that_is_allowed_decides(bandwidth, max_loss, name):
    machine = Machine(workers=4, bandwidth=bandwidth, step_seconds=[0.01])
    found, cost = cheapest(settings(), machine, max_loss, lambda cost: 0.0)
    assert found == name
    assert [str(entry.reduction) for entry in cost.plan.trained] == [str(MEASURED[name].reduction)] * 2
    assert not any(entry.trained for entry in cost.plan.entries if entry.path.startswith("dense2"))


def test_a_price_may_decide_otherwise_than_the_time():
    machine = Machine(workers=4, bandwidth=1e12, step_seconds=[0.01])
    found, _ = cheapest(settings(), machine, 0.02, lambda cost: cost.nic_bytes)
    assert MEASURED[found].reduction.sync_every == 6


def test_between_hosts_it_is_what_travels_there_that_is_chosen():
    machine = Machine(workers=4, bandwidth=1e4, devices=2, inside=1e9, step_seconds=[0.01])
    rules = [("train", ".*")]
    both = Settings(rules, lambda: models.two_dense(hidden=16), stdlib_shapes, between_hosts=AllReduce("bfloat16"))
    _, cost = cheapest(both, machine, 0.0, lambda cost: 0.0)
    assert {(str(e.inside), str(e.reduction)) for e in cost.plan.trained} == {("all-reduce", "4 bits a value")}


def test_where_nothing_suits_that_is_said(monkeypatch):
    monkeypatch.setattr("dist_partial.training.candidates.MEASURED", {})
    with pytest.raises(UserError, match=r"^no reduction"):
        cheapest(settings(), Machine(2, 1e6), 0.0, lambda cost: 0.0)
