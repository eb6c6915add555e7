"""What is foretold without training: bytes and memory exactly, times by their parts."""

import pytest

from dist_partial import config, plan
from dist_partial.plan import Machine, estimate

TINY = """
run.model = @two_dense
two_dense.hidden = 32
run.data = @stdlib_shapes
run.rules = [@kernels/Rule(), ('train', r'dense2/.*'), ('freeze', r'.*')]
kernels/Rule.match = r'dense1/kernel'
kernels/Rule.reduction = @local_sgd()
local_sgd.steps = 4
local_sgd.outer = @nesterov
local_sgd.exchange = @quantized()
run.global_batch = 16
"""
KERNEL1, KERNEL2, BIAS2 = 160 * 32, 32 * 10, 10


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.gin"
    path.write_text(TINY)
    return path


def test_bytes_and_memory_are_exact(tiny):
    settings = config.load([tiny]).settings
    cost = estimate(settings, Machine(workers=4, bandwidth=25e6, latency=0.001))
    exchanged = (KERNEL1 + 2 * KERNEL1 // 256) / 4  # 8 bits and a scale for 256 values, every 4 steps
    every_step = 4 * (KERNEL2 + BIAS2)
    assert cost.payload == exchanged + every_step
    assert cost.at_card == 3 * exchanged + 1.5 * every_step  # a gather goes to all others
    adam = 2 * 4 * (KERNEL1 + KERNEL2 + BIAS2)
    scalars = cost.memory - adam - 3 * 4 * KERNEL1  # residual, anchor and momentum of the outer optimizer
    assert 0 <= scalars <= 64  # step counters and learning rates
    assert cost.wire == pytest.approx(cost.at_card / 25e6)
    assert cost.step >= max(cost.compute, cost.wire)


def test_a_slower_link_takes_longer_and_one_worker_sends_nothing(tiny):
    settings = config.load([tiny]).settings
    slow, alone = (estimate(settings, Machine(workers, 1e4)) for workers in (2, 1))
    assert slow.step > 0.9 * slow.at_card / 1e4
    assert (alone.at_card, alone.wire) == (0, 0)


def test_the_command_prints_plan_comparison_and_rules(tiny, capsys):
    assert plan.main([f"--gin_file={tiny}", "--workers=8", "--bandwidth=200mbit", "--gin_param=run.seed=3"]) == 0
    printed = capsys.readouterr().out
    assert "dense1/kernel  160x32  yes" in printed
    rows = {line[:28].strip(): line[28:].split() for line in printed.splitlines()}
    assert rows["trained parameters"] == [f"{KERNEL1 + KERNEL2 + BIAS2:,}", f"{160 * 32 + 32 + 320 + 10:,}"]
    assert float(rows["expected step"][0]) > 0
    rules = printed.split("rules by what they make each card send:")[1].strip().splitlines()
    assert [line.split("train ")[1].split(":")[0] for line in rules] == ["dense1/kernel", r"dense2/.*"]
    assert "does not divide" not in printed


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
