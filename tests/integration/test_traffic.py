"""What a plan says, what the graphs hold and what the network interface sends are the same bytes."""

import json
import sys

import numpy as np
import pytest

from dist_partial.distributed import network
from dist_partial.plan import bytes_per_second
from dist_partial.selection.payload import Payload, nic_bytes
from dist_partial.selection.plan import Plan
from tests.helpers import hosts
from tests.helpers.files import rows

BUDGET = 3_000_000  # of 5.6 MB, on average: less than the largest variable, which is not trained in every interval
PLANS = {
    "all_reduce": ["run.rules = [('train', '.*')]"],
    "mixed": [
        "run.rules = [@first/Rule(), @second/Rule(), ('train', '.*')]",
        "first/Rule.match = 'dense1/kernel'",
        "first/Rule.reduction = @top_k()",
        "top_k.density = 0.25",
        "second/Rule.match = 'dense2/kernel'",
        "second/Rule.reduction = @local_sgd()",
        "local_sgd.sync_every = 2",
        "all_reduce.dtype = 'bfloat16'",
    ],
    "budget": [
        "run.rules = [('train', '.*')]",
        "run.schedule = @budget()",
        f"budget.bytes = {BUDGET}",
        "budget.units = ['dense1/kernel', 'dense1/bias', 'dense2/.*']",
        "budget.by = 'norm'",
        "budget.every = 3",
        "budget.starve = 1",
    ],
}

WIDE = """
run.model = @two_dense
two_dense.hidden = 8192
run.data = @stdlib_shapes
run.global_batch = 16
run.eval_examples = 16
run.steps = 12
run.steps_per_loop = 4
sample.length = 1
"""


@pytest.mark.parametrize(
    ("payload", "workers", "expected"),
    [
        (Payload("sum", 100), 2, 100),
        (Payload("sum", 100), 4, 150),
        (Payload("gather", 100), 2, 100),
        (Payload("gather", 100), 4, 300),
        (Payload("sum", 100), 1, 0),
    ],
)
def test_bytes_at_the_network_interface(payload, workers, expected):
    assert nic_bytes(payload.kind, payload.bytes, workers) == expected


@pytest.mark.parametrize("every", [1, 3, 7])
@pytest.mark.parametrize("offset", [0, 2, 9])
def test_how_often_a_message_travels(every, offset):
    payload = Payload("sum", 1, every, offset)
    for first in range(12):
        for last in range(first, 25):
            expected = sum(step % every == offset % every for step in range(first + 1, last + 1))
            assert payload.times(first, last) == expected


def test_a_step_takes_the_median_of_all_calls_but_the_first(monkeypatch):
    """Which is still warming up: calls of 9, 2, 1 and 4 seconds, of two steps each."""
    now, meter, found = [0.0], network.Meter(2, None, 0), []
    monkeypatch.setattr(network.time, "perf_counter", lambda: now[0])
    for seconds in (9, 2, 1, 4):
        meter.start()
        now[0] += seconds
        meter.stop(Plan((), ()), 0, 2, 0, 0)
        found.append(meter.to_json(2)["step_ms"])
    assert found == [None, 1000, 750, 1000]


def test_the_loopback_device_leads_to_no_network():
    assert network.interface("127.0.0.1") is None
    assert network.interface("no-such-host.invalid") is None


@pytest.mark.parametrize(("rate", "expected"), [("200mbit", 25e6), ("10gbit", 1.25e9), ("1.5Gbps", 187.5e6)])
def test_rates(rate, expected):
    assert bytes_per_second(rate) == expected


@pytest.mark.slow
@pytest.mark.network
def test_interface_graph_and_plan_agree(tmp_path):
    """Two hosts with an interface each, whose counters are the kernel's; one test, as there is one set of hosts."""
    config = tmp_path / "wide.gin"
    config.write_text(WIDE)
    with hosts.hosts(2, None):
        for name, bindings in PLANS.items():
            folder = tmp_path / name
            command = [sys.executable, "-m", "dist_partial.train", f"--gin_file={config}", f"--run_dir={folder}"]
            for code, output in hosts.run([*command, *[f"--gin_param={b}" for b in bindings]], 2, timeout=100):
                assert code == 0, (name, output[-3000:])
            found = json.loads((folder / "traffic.json").read_text())
            assert found["nic"] == "e0"
            assert found["planned_bytes"] == found["counted_bytes"] > 1e6, name
            # After a call losses, norms, three flags and both waits of both workers are summed.
            steps = {"mixed": 2, "budget": 3}.get(name, 4)
            assert found["metrics_bytes"] == 12 // steps * 8 * (2 * steps + 3 + 2 * 2)
            # With two workers as much as the payload leaves each interface, of a sum and of a gather.
            assert found["expected_nic_bytes"] == found["planned_bytes"] + found["metrics_bytes"]
            assert found["nic_bytes"] == pytest.approx(found["expected_nic_bytes"], rel=0.02), name
            if name == "budget":
                sent = [0, *[row["wire_bytes"] for row in rows(folder / "metrics.jsonl") if row["split"] == "train"]]
                per_step = set(np.diff(sent))
                assert len(per_step) > 1
                half = 3 * max(per_step) / 2  # of the largest unit, for an interval
                assert found["planned_bytes"] == pytest.approx(12 * BUDGET, abs=half)
