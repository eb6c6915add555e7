"""What is predicted without training: bytes and memory exactly, times by their parts."""

import dataclasses
import json

import keras
import numpy as np
import pytest

from dist_partial import models, plan
from dist_partial.config import gin_files
from dist_partial.config.settings import Settings
from dist_partial.data import ArraySource, Dataset, fingerprint, stdlib_shapes
from dist_partial.distributed.collectives import Collectives
from dist_partial.distributed.replicas import Replicas
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.reductions.local_only import LocalOnly
from dist_partial.reductions.local_sgd import LocalSGD
from dist_partial.reductions.power_sgd import PowerSGD
from dist_partial.reductions.quantized import Quantized
from dist_partial.reductions.top_k import TopK
from dist_partial.selection.rules import Rule
from dist_partial.training import loop
from dist_partial.training.cost_model import Machine, estimate
from tests.helpers.cases import convolutional
from tests.helpers.files import rows
from tests.helpers.marks import quick

TINY = """
run.model = @two_dense
two_dense.hidden = 32
run.data = @stdlib_shapes
run.rules = [@kernels/Rule(), ('train', r'dense2/.*'), ('freeze', r'.*')]
kernels/Rule.match = r'dense1/kernel'
kernels/Rule.reduction = @local_sgd()
local_sgd.sync_every = 4
local_sgd.outer_optimizer = @nesterov
local_sgd.compressor = @quantized()
run.global_batch = 16
"""
KERNEL1, KERNEL2, BIAS2 = 160 * 32, 32 * 10, 10


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.gin"
    path.write_text(TINY)
    return path


def test_bytes_and_memory_are_exact(tiny):
    settings = gin_files.load([tiny]).settings
    cost = estimate(settings, Machine(workers=4, bandwidth=25e6, latency=1000.0))
    # Every 4 steps; in chunks of a quarter, of 8 bits and a scale for 256 values, and filled up to a word.
    chunk = (KERNEL1 // 4 + 2 * KERNEL1 // 4 // 256 + 2) / 4
    all_reduce = 4 * (KERNEL2 + BIAS2)
    assert cost.payload == (4 + 1) * chunk + all_reduce
    assert cost.nic_bytes == 2 * 3 * chunk + 1.5 * all_reduce  # a chunk for each other one, and one to all of them
    adam = 2 * 4 * (KERNEL1 + KERNEL2 + BIAS2)
    # Residual, anchor and momentum of the outer optimizer, and the residual of the chunk that a worker adds up.
    scalars = cost.memory - adam - 3 * 4 * KERNEL1 - 4 * KERNEL1 // 4
    assert 0 <= scalars <= 64  # step counters and learning rates
    assert cost.wire == pytest.approx(cost.nic_bytes / 25e6)
    assert cost.step >= max(cost.compute, cost.wire)
    # Of what waits for messages the rest is little: a sum takes two in each step, one of chunks two in every fourth.
    assert cost.step == pytest.approx(1000 * (2 + 2 / 4), rel=0.01)


def test_a_slower_link_takes_longer_and_one_worker_sends_nothing(tiny):
    settings = gin_files.load([tiny]).settings
    slow, alone = (estimate(settings, Machine(workers, 1e4)) for workers in (2, 1))
    assert slow.step > 0.9 * slow.nic_bytes / 1e4
    assert (alone.nic_bytes, alone.wire) == (0, 0)


@pytest.mark.parametrize("delay", [0, 3])
def test_what_travels_while_steps_are_made_takes_no_time(delay):
    """An exchange of 20,480 bytes every 4 steps, at a megabyte a second, beside steps of 10 ms."""
    rules = [("train", "dense1/kernel"), ("freeze", ".*")]
    settings = Settings(
        rules, lambda: models.two_dense(hidden=32), stdlib_shapes, reduction=LocalSGD(4, delay=delay), steps=2000
    )
    cost = estimate(settings, Machine(2, 1e6, latency=0.0, step_seconds=[0.01]))
    wire = KERNEL1 * 4 / 1e6 / 0.95
    assert cost.step == pytest.approx(0.01 if delay else 0.01 + wire / 4, rel=0.05)


def test_devices_of_a_host_send_inside_it_and_the_host_once():
    """4 hosts of 8 devices: a ring in each host, and between hosts what one worker sends."""
    settings = Settings([("train", ".*")], lambda: models.two_dense(hidden=32), stdlib_shapes)
    size = 4 * (160 * 32 + 32 + 32 * 10 + 10)
    cost = estimate(settings, Machine(4, 1e6, devices=8, inside=1e5, step_seconds=[1e-3]))
    assert (cost.nic_bytes, cost.inside_bytes) == (1.5 * size, 1.75 * size)
    assert cost.step == pytest.approx(1.5 * size / 0.95e6 + 1.75 * size / 0.95e5, rel=0.05)
    apart = dataclasses.replace(settings, between_hosts=LocalSGD(10))
    cost = estimate(apart, Machine(4, 1e6, devices=8, inside=1e5, step_seconds=[1e-3]))
    assert (cost.nic_bytes, cost.inside_bytes) == (0.15 * size, 1.75 * size)


def test_the_command_prints_plan_comparison_and_rules(tiny, capsys):
    assert plan.main([f"--gin_file={tiny}", "--workers=8", "--bandwidth=200mbit", "--gin_param=run.seed=3"]) == 0
    printed = capsys.readouterr().out
    assert "dense1/kernel  160x32  yes" in printed
    rows = {line[:28].strip(): line[28:].split() for line in printed.splitlines()}
    assert rows["trained parameters"] == [f"{KERNEL1 + KERNEL2 + BIAS2:,}", f"{160 * 32 + 32 + 320 + 10:,}"]
    assert float(rows["expected step"][0]) > 0
    rules = printed.split("rules by what they make each worker send:")[1].strip().splitlines()
    assert [line.split("train ")[1].split(":")[0] for line in rules] == [r"dense2/.*", "dense1/kernel"]
    assert "does not divide" not in printed


MANY = ["--hosts=250", "--devices=4", "--bandwidth=1gbit", "--between=100mbit", "--step_ms=20,20,21,30"]
FAILING = ["--hours_between_faults=500", "--restart_seconds=90", "--gin_param=run.save_every=100"]
PRICES = ["--price_per_hour=2", "--price_per_gb=0.05", "--max_loss=1", "--gin_param=run.steps=500000"]


def test_a_thousand_replicas_are_simulated_the_same_each_time(tiny, capsys):
    flags = [f"--gin_file={tiny}", "--gin_param=run.global_batch=16000", *MANY, *FAILING, *PRICES]
    outputs = []
    for seed in (1, 1, 2):
        assert plan.main([*flags, f"--seed={seed}"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert "250 hosts with 4 devices each at 1gbit, 100mbit between them" in outputs[0]
    table = outputs[0].split("100mbit between them")[1].splitlines()
    cells = {line[:28].strip(): line[28:].split("  ") for line in table if line}
    cells = {name: [each.strip() for each in row if each.strip()] for name, row in cells.items()}
    assert cells[""] == ["this plan", "all, float32", "cheapest"]
    assert cells["computation, as given"] == ["20.5 ms"] * 3
    faults = [float(each.replace(",", "")) for each in cells["faults in that time"]]
    goodput = [float(each.rstrip("%")) for each in cells["goodput"]]
    assert all(count > 0 for count in faults) and all(50 < each < 100 for each in goodput)
    costs = [float(each.replace(",", "")) for each in cells["the run costs"]]
    assert costs[2] == min(costs) > 0
    day = cells["a worker sends a day"][0].split()[0], cells["all workers send a day"][0].split()[0]
    assert all(float(each) > 0 for each in day)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--hosts=2", "--workers=3"], "both say how many"),
        (["--devices=2"], "give --hosts instead of --workers"),
        (["--between=1gbit"], "give --hosts instead of --workers"),
        (["--hosts=2", "--between=fast"], "--between is 'fast'"),
        (["--slowest_link=0mbit"], "--slowest_link is '0mbit'"),
        (["--stragglers=3"], "--stragglers has '3'"),
        (["--stragglers=3x0.5"], "--stragglers has '3x0.5'"),
        (["--stragglers=3x2"], "more workers than the 2"),
        (["--step_ms=ten"], "--step_ms is 'ten'"),
        (["--step_ms=10,-1"], "--step_ms is '10,-1'"),
        (["--step_ms=inf"], "--step_ms is 'inf'"),
        (["--seed=-1"], "--seed is -1"),
        (["--slowest_link=2gbit"], "faster than the others"),
        (["--hours_between_faults=0"], "must be more than 0"),
        (["--price_per_gb=-1"], "must be at least 0"),
        (["--max_loss=-1"], "must be at least 0"),
    ],
)
def test_mistakes_in_the_flags_are_named(tiny, flags, words, capsys):
    assert plan.main([f"--gin_file={tiny}", *flags]) == 2
    assert words in capsys.readouterr().err


KINDS = {
    "every step": AllReduce(),
    "bfloat16": AllReduce("bfloat16"),
    "PowerSGD": PowerSGD(1),
    "top-k": TopK(1 / 16),
    "quantized": Quantized(4),
    "local SGD": LocalSGD(3, 1),
    "local SGD, quantized": LocalSGD(2, compressor=Quantized(8)),
    "never": LocalOnly(),
}


def images() -> Dataset:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(48, 8, 8, 3)).astype(np.float32), rng.integers(0, 5, 48).astype(np.int32)
    return Dataset("images", ArraySource(x, y), ArraySource(x[:12], y[:12]), fingerprint(x, y), None)


def norms() -> keras.Model:
    return convolutional(synchronized=False)


def with_norms(rules, synchronized, replicas, **more) -> Settings:
    return Settings(
        rules=rules,
        model=lambda: convolutional(synchronized),
        data=images,
        steps=6,
        global_batch=12,
        replicas=lambda: Replicas(replicas, Collectives(), "replicas"),
        **more,
    )


@pytest.mark.parametrize("name", quick(KINDS, "every step", "never"))
def test_statistics_are_predicted_as_a_run_counts_them(name, mirrored, tmp_path):
    """The moving mean and variance of 6 channels: with the gradients, or else with an exchange, or else not at all."""
    rules = [Rule("head/.*")] if name == "top-k" else []  # a sum beside the gathers
    settings = with_norms([*rules, Rule(".*", reduction=KINDS[name])], False, mirrored(3))
    loop.run(settings, tmp_path)
    found = json.loads((tmp_path / "plan.json").read_text())
    cost = estimate(settings, Machine(workers=3, bandwidth=1e9))
    assert cost.plan.to_json() == found
    every = getattr(KINDS[name], "sync_every", 1)
    assert found["statistics_wire_bytes_per_step"] == (0 if name == "never" else 2 * 6 * 4 / every)
    assert (cost.payload, cost.nic_bytes) == (found["wire_bytes_per_step"], found["nic_bytes_per_step"])
    assert cost.wire == pytest.approx(found["nic_bytes_per_step"] / 1e9)
    last = [row for row in rows(tmp_path / "metrics.jsonl") if row["split"] == "train"][-1]
    assert last["wire_bytes"] == 6 * found["wire_bytes_per_step"]
    assert last["nic_bytes"] == pytest.approx(6 * found["nic_bytes_per_step"], abs=6)  # whole numbers in each step


@pytest.mark.parametrize("more", quick([{}, {"accumulate": 2}, {"precision": "mixed_bfloat16"}], {}), ids=str)
@pytest.mark.parametrize(
    "rules", [[("train", ".*")], [("train", "(norm1|head)/.*"), ("freeze", ".*")]], ids=["all", "part"]
)
def test_what_synchronised_layers_sum_is_predicted(rules, more, mirrored, tmp_path):
    """Forward and backward, each micro-batch, as far back as gradients go; NumPy would not know how Keras sums."""
    settings = with_norms(rules, True, mirrored(2), **more)
    loop.run(settings, tmp_path)
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["statistics_wire_bytes_per_step"] >= 3 * 6 * 4
    assert estimate(settings, Machine(workers=2, bandwidth=1e9)).plan.to_json() == found


def test_statistics_are_a_line_of_what_is_printed(tmp_path, capsys):
    file = tmp_path / "norms.gin"
    lines = [
        "import tests.unit.training.test_cost_model",
        "run.model = @test_cost_model.norms",
        "run.data = @test_cost_model.images",
    ]
    lines += ["run.rules = [('train', '.*')]", "run.global_batch = 16"]
    file.write_text("\n".join(lines) + "\n")
    assert plan.main([f"--gin_file={file}", "--workers=16"]) == 0
    printed = capsys.readouterr().out
    table = {line.split("  ")[0].strip(): line.split() for line in printed.splitlines()}
    assert table["(statistics)"][-1] == "90"  # 48, in a sum of 16
    parameters = 3 * 9 * 6 + 12 + 6 * 9 * 8 + 8 + 8 * 5 + 5
    assert f"payload: {4 * parameters + 48:,} of {4 * parameters + 48:,} bytes" in printed
    assert "at the network interface of each of 16 workers: " in printed
    assert "statistics of layers" in printed.split("rules by what")[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bandwidth=fast"], ["--bandwidth", "'fast'", "200mbit"]),
        (["--bandwidth=0gbit"], ["--bandwidth"]),
        (["--workers=0"], ["--workers is 0"]),
        (["--latency_ms=-1"], ["--latency_ms"]),
    ],
)
def test_mistakes(tiny, flags, words, capsys):
    assert plan.main([f"--gin_file={tiny}", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words)


def test_no_file(capsys):
    assert plan.main([]) == 2
    assert "--gin_file" in capsys.readouterr().err
