"""Whole runs whose groups travel in different ways: in pieces, on other numbers of replicas, on workers; bad input."""

import json
import os
import re
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from dist_partial import checkpoints
from dist_partial.config import gin_files
from dist_partial.config.settings import Settings
from dist_partial.data import ArraySource, Dataset, fingerprint
from dist_partial.distributed import replicas
from dist_partial.errors import UserError
from dist_partial.models import two_dense
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.reductions.local_only import LocalOnly
from dist_partial.reductions.local_sgd import LocalSGD, nesterov
from dist_partial.reductions.power_sgd import PowerSGD
from dist_partial.reductions.quantized import Quantized
from dist_partial.reductions.top_k import TopK
from dist_partial.selection.rules import Rule
from dist_partial.training import loop
from dist_partial.training.build import build, restore
from tests.helpers import cases
from tests.helpers.files import assert_same_state, rows, same_bits, state
from tests.helpers.marks import quick
from tests.helpers.strategies import in_process

# Nothing of tests.conftest or tests.integration.test_loop may be imported here: the workers below run this file, too,
# and have one device each.
STEPS = 7


def shapes() -> Dataset:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 10, (50, 16)).astype(np.int32), rng.integers(0, 10, 50).astype(np.int32)
    return Dataset("shapes", ArraySource(x, y), ArraySource(x[:12], y[:12]), fingerprint(x, y), None)


MIXED = [
    Rule("dense1/kernel", reduction=TopK(1 / 16, 64, 16)),
    Rule("dense1/bias", reduction=AllReduce()),
    Rule("dense2/kernel", reduction=LocalSGD(4, 0, nesterov, Quantized(8))),
    Rule("dense2/bias", reduction=LocalOnly()),
]
PLANS = {
    "all_reduce": [
        Rule("dense1/kernel", reduction=PowerSGD(2)),
        Rule("dense1/bias", reduction=Quantized(4)),
        Rule("dense2/kernel", reduction=TopK(1 / 16, 64, 8)),
        Rule("dense2/bias", reduction=AllReduce("bfloat16")),
    ],
    "local_sgd": [
        Rule("dense1/.*", reduction=LocalSGD(4, 1, nesterov, PowerSGD(1))),
        Rule("dense2/.*", reduction=LocalSGD(3, 0, nesterov, Quantized(4))),
    ],
    "never": [Rule(".*", reduction=LocalOnly())],
    "mixed": MIXED,
    "delayed": [
        Rule("dense1/.*", reduction=LocalSGD(4, 1, nesterov, PowerSGD(1), delay=3, mix=0.5)),
        Rule(
            "dense2/.*",
            reduction=LocalSGD(3, 0, None, Quantized(4), delay=2, keep_progress=True, warm_up=1, clip_norm=0.05),
        ),
    ],
}
# Not one of them follows an exchange; what is delayed travels meanwhile.
STOPS = {"mixed": (3,), "delayed": (2, 6)}


def settings(plan, made, steps=STEPS, precision="float32", **more) -> Settings:
    return Settings(
        **{
            "rules": PLANS[plan] if isinstance(plan, str) else plan,
            "model": lambda: two_dense(hidden=12),
            "data": shapes,
            "optimizer": lambda: keras.optimizers.Adam(0.01),
            "steps": steps,
            "global_batch": 12,
            "eval_every": 4,
            "steps_per_loop": 3,
            "keep": 10,
            "clip_norm": 1.0,
            "precision": precision,
            "replicas": lambda: made,
            **more,
        }
    )


def assert_same_run(one: Path, other: Path) -> None:
    """The same bits at the end, and the same metrics of all steps and of the evaluations that both have made."""
    assert_same_state(one, other, STEPS)
    metrics = [rows(folder / "metrics.jsonl") for folder in (one, other)]
    trained = [[row for row in each if row["split"] == "train"] for each in metrics]
    assert trained[0] == trained[1] and len(trained[0]) == STEPS
    evaluated = [{row["step"]: row for row in each if row["split"] == "eval"} for each in metrics]
    assert all(evaluated[1][step] == row for step, row in evaluated[0].items()) and len(evaluated[0]) == 2


def sent_after(step: int, rules) -> int:
    """What one replica has handed over in so many steps, by the messages of each variable."""
    sizes = {"dense1/kernel": (160, 12), "dense1/bias": (12,), "dense2/kernel": (12, 10), "dense2/bias": (10,)}
    total = 0
    for path, shape in sizes.items():
        each = next(rule.reduction for rule in rules if re.fullmatch(rule.match, path))
        times = step
        if isinstance(each, LocalSGD):
            begun = range(1, step + 1)
            times = len([s for s in begun if s <= each.warm_up or (s - each.offset) % each.sync_every == 0])
            each = each.compressor or AllReduce()
        total += times * sum(payload.bytes for payload in each.payloads(shape, "float32"))
    return total


@pytest.mark.parametrize("name", quick(PLANS, "mixed", "delayed"))
def test_a_run_in_pieces_is_the_run_at_once(name, tmp_path):
    """Residuals, factors, anchors, outer slots and each replica's own come back to the bit."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    # Checkpoints and evaluations cut the calls of a run, too, and change nothing in it.
    loop.run(settings(name, in_process(2)), whole)
    for steps in (*STOPS.get(name, (2,)), STEPS):
        keras.utils.clear_session(free_memory=False)
        loop.run(settings(name, in_process(2), steps), pieces)
    assert_same_run(whole, pieces)
    # The bytes are counted at the step in which they are sent.
    assert [row["wire_bytes"] for row in rows(whole / "metrics.jsonl") if row["split"] == "train"] == [
        sent_after(s, PLANS[name]) for s in range(1, STEPS + 1)
    ]
    plan = json.loads((whole / "plan.json").read_text())
    after_warm_up = sent_after(13, PLANS[name]) - sent_after(1, PLANS[name])
    assert plan["wire_bytes_per_step"] * 12 == pytest.approx(after_warm_up, rel=1e-12)
    assert plan["wire_bytes_per_step"] == pytest.approx(sum(v["wire_bytes_per_step"] for v in plan["variables"]))
    assert plan["statistics_wire_bytes_per_step"] == 0
    kept = {path.split("/")[0] for path in state(whole, STEPS)}
    expected = {"variables", "slots"}
    expected |= {"own", "outer"} if name in ("local_sgd", "mixed", "delayed") else set()
    expected |= {"moving", "begun"} if name == "delayed" else set()
    assert kept == expected | ({"reductions"} if name != "never" else set())


def left_out(name: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """All that replicas have left out of what they sent, and of the sums of their chunks."""
    found = arrays[name].sum(axis=0)
    chunks = arrays.get(name.replace("/residual", "/sum_residual"), np.zeros(found.size)).ravel()
    return found + chunks[: found.size].reshape(found.shape)


def test_the_number_of_replicas_may_change(tmp_path):
    """The residuals' sum is kept; local values become their mean; shared ones stay as they are."""
    rules = [
        Rule("dense1/kernel", reduction=TopK(1 / 16, 64, 16)),
        Rule("dense1/bias", reduction=AllReduce()),
        # What begins after steps 4, 8 and 12 is under way after 5 and 10, where the number of replicas changes.
        Rule("dense2/kernel", reduction=LocalSGD(4, 0, nesterov, PowerSGD(1), delay=3, keep_progress=True)),
        Rule("dense2/bias", reduction=LocalOnly()),
    ]
    steps, folder, before = 0, tmp_path / "run", None
    for count in (2, 3, 1):
        made = in_process(count)
        told = settings(rules, made, steps + 5, precision="float64")
        if before is not None:
            keras.utils.clear_session(free_memory=False)
            built = build(told, made)
            restore(built, folder, print)
            after = checkpoints.read(built.state().variables, built.replicas.gather)
            in_two_hops = {"reductions/dense1/kernel/sum_residual"}
            assert after.keys() ^ before.keys() == in_two_hops  # among three
            for name in after.keys() & before.keys():
                value, old = after[name], before[name]
                if name.endswith("/residual"):
                    np.testing.assert_allclose(left_out(name, after), left_out(name, before), rtol=0, atol=1e-12)
                elif name.startswith(("own/", "slots/dense2/kernel/", "moving/", "begun/")):
                    np.testing.assert_allclose(value, np.broadcast_to(old.mean(axis=0), value.shape), atol=1e-12)
                elif name.endswith("/right"):
                    assert same_bits([*value, *old]), name
                elif name.startswith(("variables/dense2/bias", "slots/dense2/bias/")):
                    assert all(same_bits([v, old[i % len(old)]]) for i, v in enumerate(value)), name
                elif name.startswith(("variables/", "outer/", "slots/dense1/")):
                    assert same_bits([value, old]), name
        steps += 5
        keras.utils.clear_session(free_memory=False)
        loop.run(told, folder)
        before = state(folder, steps)
        assert before["own/dense2/kernel"].shape == before["begun/dense2/kernel"].shape == (count, 12, 10)
        assert before["reductions/dense1/kernel/residual"].shape == (count, 160, 12)
    lines = [row for row in rows(folder / "metrics.jsonl") if row["split"] == "train"]
    assert [row["step"] for row in lines] == list(range(1, 16))
    assert len({row["wire_bytes"] for row in lines[9:]}) == 1, "one replica sends nothing"


@pytest.mark.slow
def test_bytes_at_the_network_interface(tmp_path):
    """By arithmetic, among as many workers as there are replicas, in pieces, and when their number changes."""
    rules = [
        Rule("dense1/kernel", reduction=TopK(1 / 16, 64, 16)),
        Rule("dense1/bias"),
        Rule("dense2/kernel", reduction=LocalSGD(4, 0, nesterov, Quantized(8))),
        ("freeze", ".*"),
    ]
    sums = 12 * 4
    # Messages of a chunk in words of 4: of 10 and of 8 blocks of 64 values every 16th, 6 bits of a place and two bytes
    # each; of 40 and of 30 values a byte each, and a scale. Each other worker is sent one, and then all are.
    chunks, at_exchange = {3: 30 + 80 + 2, 4: 24 + 64}, {3: 40 + 2 + 2, 4: 30 + 2}
    full = 4 * (160 * 12 + 12 + 12 * 10 + 10)
    sent = share_of = payload = 0
    expected = []
    for step in range(1, 9):
        workers = 3 if step <= 5 else 4
        chunk = chunks[workers] + (at_exchange[workers] if step % 4 == 0 else 0)
        payload += sums + (workers + 1) * chunk
        sent += 2 * (workers - 1) / workers * sums + 2 * (workers - 1) * chunk
        share_of += 2 * (workers - 1) / workers * full
        expected.append((payload, sent, sent / share_of))
    for steps, count in ((2, 3), (5, 3), (8, 4)):
        keras.utils.clear_session(free_memory=False)
        loop.run(settings(rules, in_process(count), steps), tmp_path)
        plan = json.loads((tmp_path / "plan.json").read_text())
        assert plan["workers"] == count
        by_kind = 2 * (count - 1) / count * sums + 2 * (count - 1) * (chunks[count] + at_exchange[count] / 4)
        assert plan["nic_bytes_per_step"] == pytest.approx(by_kind, rel=1e-12)
        assert plan["full_nic_bytes_per_step"] == pytest.approx(2 * (count - 1) / count * full, rel=1e-12)
    lines = rows(tmp_path / "metrics.jsonl")
    for line in lines:
        payload, sent, share = expected[line["step"] - 1]
        assert line["wire_bytes"] == payload
        assert line["nic_bytes"] == pytest.approx(sent, abs=line["step"])  # whole numbers in each step
        assert line["wire_share"] == pytest.approx(share, rel=1e-3)
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 9))


WORKER_RULES = [
    Rule("dense1/kernel", reduction=TopK(1 / 16, 64, 32)),
    Rule("dense1/bias", reduction=AllReduce()),
    # What begins after step 3 is under way when the run is stopped, after 4, and applied after 5.
    Rule("dense2/kernel", reduction=LocalSGD(3, 0, nesterov, PowerSGD(2), delay=2, mix=0.5)),
    Rule("dense2/bias", reduction=PowerSGD(1)),  # sent whole
]


def noisy() -> keras.Model:
    """Of which each replica draws masks of its own."""
    plain = two_dense(hidden=12)
    dropped = keras.layers.Dropout(0.2, name="dropout")(plain.get_layer("dense1").output)
    return keras.Model(plain.inputs, plain.get_layer("dense2")(dropped))


FEW_BITS = [
    Rule("dense1/kernel", reduction=Quantized(4)),
    Rule("dense1/bias", reduction=Quantized(1.6)),
    Rule("dense2/.*", reduction=TopK(1 / 16, 16, 8, decay=0.9)),
]


def _train_in_few_bits(folder: Path) -> None:
    """One of three workers."""
    made = replicas.create("multi_worker")
    loop.run(settings(FEW_BITS, made, precision="float64"), folder / "three")


@pytest.mark.slow
def test_three_workers_in_two_hops(tmp_path):
    """Three processes over TCP, and one process with three replicas, which goes on with what they have saved."""
    from tests.helpers.workers import assert_all_end, run_workers

    command = ["-m", "tests.integration.test_exchanges", "few_bits", str(tmp_path)]
    assert_all_end(run_workers(command, workers=3, timeout=120))
    keras.utils.clear_session(free_memory=False)
    made = in_process(3)
    loop.run(settings(FEW_BITS, made, precision="float64"), tmp_path / "simulated")
    left, right = (state(tmp_path / name, STEPS) for name in ("three", "simulated"))
    assert left["reductions/dense1/kernel/sum_residual"].shape == (3, 640)
    assert left.keys() == right.keys()
    cases.assert_equal(left, right, 1e-10)
    keras.utils.clear_session(free_memory=False)
    loop.run(settings(FEW_BITS, made, STEPS + 2, precision="float64"), tmp_path / "three")


def _train_worker(transport: str, folder: Path) -> None:
    """One of two workers: two runs; that in float64 by TensorFlow's collectives is made in pieces."""
    made = replicas.create("multi_worker", transport=transport)
    assert made.collectives.backend.two_levels == (transport == "sockets")
    made.backend.close = lambda reason=None: None  # which a run calls at its end; the next one here goes on with it
    stops = (STEPS,) if transport == "sockets" else (4, STEPS)
    for precision, steps in (*(("float64", steps) for steps in stops), ("float32", STEPS)):
        keras.utils.clear_session(free_memory=False)
        loop.run(settings(WORKER_RULES, made, steps, precision, model=noisy), folder / f"{transport}-{precision}")


@pytest.mark.slow
def test_workers_are_the_replicas_that_are_simulated(tmp_path):
    """Two processes by either transport: the same bits; one process with two replicas: the same numbers."""
    from tests.helpers.workers import assert_all_end, run_workers

    for transport in ("sockets", "tensorflow"):
        command = ["-m", "tests.integration.test_exchanges", transport, str(tmp_path)]
        assert_all_end(run_workers(command, workers=2, timeout=120))
    for precision, tolerance in (("float64", 1e-10), ("float32", 1e-5)):
        sockets, collectives = (tmp_path / f"{transport}-{precision}" for transport in ("sockets", "tensorflow"))
        assert_same_run(sockets, collectives)  # so what two workers saved at step 4 was all there was
        keras.utils.clear_session(free_memory=False)
        simulated = tmp_path / f"simulated-{precision}"
        made = in_process(2)
        loop.run(settings(WORKER_RULES, made, precision=precision, model=noisy), simulated)
        left, right = state(sockets, STEPS), state(simulated, STEPS)
        assert left["own/dense2/kernel"].shape == (2, 12, 10) and not same_bits(left["own/dense2/kernel"])
        cases.assert_equal(left, right, tolerance)
        own = [row for row in rows(sockets / "metrics.jsonl") if row["split"] != "workers"]  # one waits for nobody
        for one, other in zip(own, rows(simulated / "metrics.jsonl"), strict=True):
            assert one.keys() == other.keys()
            assert all(one[key] == other[key] for key in ("step", "split", "wire_bytes"))
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


BASE = """
import tests.helpers.user_module
run.model = @tests.helpers.user_module.model
run.data = @tests.helpers.user_module.data
run.rules = [('train', r'.*')]
"""
BAD = {
    "steps": (["run.reduction = @local_sgd()", "local_sgd.sync_every = 0"], ["local_sgd.sync_every is 0"]),
    "no steps": (["run.reduction = @local_sgd()"], ["local_sgd.sync_every"]),
    "offset": (
        ["run.reduction = @local_sgd()", "local_sgd.sync_every = 2", "local_sgd.offset = -1"],
        ["local_sgd.offset is -1"],
    ),
    "delay": (
        ["run.reduction = @local_sgd()", "local_sgd.sync_every = 2", "local_sgd.delay = 3"],
        ["local_sgd.delay is 3", "local_sgd.sync_every = 2"],
    ),
    "progress at once": (
        ["run.reduction = @local_sgd()", "local_sgd.sync_every = 2", "local_sgd.keep_progress = True"],
        ["local_sgd.keep_progress is True", "set local_sgd.delay"],
    ),
    "delay of all": (
        ["run.reduction = @local_sgd()", "local_sgd.sync_every = 2", "local_sgd.delay = 2"],
        ["local_sgd.delay is 2", "no step would count"],
    ),
    "mix": (["run.reduction = @local_sgd()", "local_sgd.sync_every = 2", "local_sgd.mix = 0"], ["local_sgd.mix is 0"]),
    "decay": (["run.reduction = @quantized()", "quantized.decay = 1.5"], ["quantized.decay is 1.5"]),
    "exchange is local": (
        [
            "run.reduction = @outside/local_sgd()",
            "outside/local_sgd.sync_every = 4",
            "outside/local_sgd.compressor = @inside/local_sgd()",
            "inside/local_sgd.sync_every = 2",
        ],
        ["local_sgd.compressor", "LocalSGD"],
    ),
    "exchange is never": (
        ["run.reduction = @local_sgd()", "local_sgd.sync_every = 2", "local_sgd.compressor = @local_only()"],
        ["local_sgd.compressor", "LocalOnly"],
    ),
    "outer is made already": (
        ["run.reduction = @local_sgd()", "local_sgd.sync_every = 2", "local_sgd.outer_optimizer = @nesterov()"],
        ["local_sgd.outer_optimizer", "without ()"],
    ),
    "outer is a number": (
        ["run.reduction = @local_sgd()", "local_sgd.sync_every = 2", "local_sgd.outer_optimizer = 0.7"],
        ["local_sgd.outer_optimizer is 0.7"],
    ),
    "density 0": (["run.reduction = @top_k()", "top_k.density = 0"], ["top_k.density is 0"]),
    "density 2": (["run.reduction = @top_k()", "top_k.density = 2"], ["top_k.density is 2"]),
    "block": (["run.reduction = @top_k()", "top_k.block = 0"], ["top_k.block is 0"]),
    "bits of the largest": (["run.reduction = @top_k()", "top_k.bits = 3"], ["top_k.bits is 3"]),
    "bits": (["run.reduction = @quantized()", "quantized.bits = 3"], ["quantized.bits is 3"]),
    "rank": (["run.reduction = @power_sgd()", "power_sgd.rank = 0"], ["power_sgd.rank is 0"]),
    "factors": (["run.reduction = @power_sgd()", "power_sgd.dtype = 'int8'"], ["power_sgd.dtype is 'int8'"]),
    "factory": (["run.reduction = @power_sgd"], ["reduction", "with the ()"]),
    "optimizer": (["run.reduction = @keras.optimizers.Adam()"], ["reduction", "with the ()"]),
    "bits in a list": (["run.reduction = @quantized()", "quantized.bits = [8]"], ["quantized.bits is [8]"]),
    "bits of the largest in a list": (["run.reduction = @top_k()", "top_k.bits = [4]"], ["top_k.bits is [4]"]),
    "bits are a truth": (["run.reduction = @quantized()", "quantized.bits = True"], ["quantized.bits is True"]),
    "keep": (
        ["run.reduction = @local_sgd()", "local_sgd.sync_every = 2", "local_sgd.keep_residual_local = 'no'"],
        ["local_sgd.keep_residual_local is 'no'"],
    ),
    "exchange is itself": (
        ["run.reduction = @local_sgd()", "local_sgd.sync_every = 2", "local_sgd.compressor = @local_sgd()"],
        ["refers to itself"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bindings(name, tmp_path):
    params, words = BAD[name]
    file = tmp_path / "base.gin"
    file.write_text(BASE)
    with pytest.raises(UserError) as raised:
        loaded = gin_files.load([file], params).settings
        build(loaded, in_process())
    payload = str(raised.value).splitlines()[0]  # gin adds lines of its own, which the command leaves out
    assert all(word in payload for word in words), payload


def test_an_exchange_without_brackets(tmp_path):
    file = tmp_path / "base.gin"
    file.write_text(BASE)
    with pytest.raises(UserError, match=r"local_sgd\.compressor"):
        params = ["run.reduction = @local_sgd()", "local_sgd.sync_every = 2", "local_sgd.compressor = @quantized"]
        loaded = gin_files.load([file], params)
        build(loaded.settings, in_process())


@pytest.mark.parametrize("params", [{"transport": "udp"}, {"pack_bytes": 0}, {"pack_bytes": 1e6}, {"congestion": 5}])
def test_bad_replicas(params):
    (name,) = params
    with pytest.raises(UserError, match=rf"^replicas\.{name} is {params[name]!r}"):
        replicas.create("default", **params)


def test_sockets_need_other_workers(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(UserError, match=r"replicas\.transport = 'sockets'"):
        replicas.create("mirrored", 1, transport="sockets")


# A matrix of 64x64 would be sent whole with rank 32; the rule is about the variables that there are.
@pytest.mark.parametrize("each", [LocalSGD(2), LocalOnly(), PowerSGD(1), TopK(), Quantized()])
def test_float16_needs_replicas_that_agree(each):
    made = in_process()
    with pytest.raises(UserError, match=r"float16.*run\.precision"):
        build(settings([Rule("dense1/.*"), Rule("dense2/.*", reduction=each)], made, precision="mixed_float16"), made)


def test_outer_factory_of_nothing():
    made = in_process()
    with pytest.raises(UserError, match=r"local_sgd\.outer_optimizer of rule 'dense1/\.\*'"):
        build(settings([Rule("dense1/.*", reduction=LocalSGD(2, 0, lambda: None)), Rule(".*")], made), made)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if sys.argv[1] == "few_bits":
        _train_in_few_bits(Path(sys.argv[2]))
    else:
        _train_worker(sys.argv[1], Path(sys.argv[2]))
