"""What is predicted without training: bytes and memory exactly, times by their parts."""

import json

import keras
import numpy as np
import pytest

from dist_partial import plan
from dist_partial.config import gin_files
from dist_partial.config.settings import Settings
from dist_partial.data import ArraySource, Dataset, fingerprint
from dist_partial.distributed.collectives import Collectives
from dist_partial.distributed.replicas import Replicas
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.reductions.local_only import LocalOnly
from dist_partial.reductions.local_sgd import LocalSGD
from dist_partial.reductions.power_sgd import PowerSGD
from dist_partial.reductions.quantized import Quantized
from dist_partial.reductions.top_k import TopK
from dist_partial.selection.resolve import resolve
from dist_partial.selection.rules import Rule
from dist_partial.training import loop
from dist_partial.training.cost_model import Machine, _hidden, estimate
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


@pytest.mark.parametrize(("delay", "step", "hidden"), [(0, 0.1, 0.0), (3, 0.001, 0.003 / 4), (3, 0.1, 0.02048 / 4)])
def test_what_travels_while_steps_are_made_takes_no_time(delay, step, hidden):
    """As far as these steps last: an exchange of 20,480 bytes every 4 steps, at a megabyte a second."""
    model = keras.Sequential([keras.Input((160,)), keras.layers.Dense(32, use_bias=False)])
    found = resolve([("train", ".*")], model, LocalSGD(4, delay=delay))
    assert _hidden(found, 2, 1e6, step) == pytest.approx(hidden)


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
