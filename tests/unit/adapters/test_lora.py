"""LoRA by rule and the precision of what is frozen: against the same sums written out, and against the whole run."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial import selection
from dist_partial.adapters import lora, quantization
from dist_partial.config.settings import Settings
from dist_partial.data import ArraySource, Dataset, fingerprint
from dist_partial.distributed import traffic
from dist_partial.errors import UserError
from dist_partial.models import byte_transformer, two_dense
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.selection.rules import Rule
from dist_partial.step import layer_state
from dist_partial.step.objective import Objective
from dist_partial.training import loop
from dist_partial.training.build import batches, build, compiled_step, restore
from tests.helpers.files import state
from tests.helpers.marks import quick
from tests.helpers.strategies import in_process

RULES = [Rule(r"dense1/kernel", lora=3), ("train", r"dense2/bias"), ("freeze", r".*")]
STEPS = 6


def data(window=16, symbols=10):
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, symbols, (48, window)).astype(np.int32), rng.integers(0, 10, 48).astype(np.int32)
    return Dataset("ids", ArraySource(x[:40], y[:40]), ArraySource(x[40:], y[40:]), fingerprint(x, y))


def replicas(count=2):
    return in_process(count)


def settings(rules=RULES, **more):
    given = dict(
        rules=rules, model=two_dense, data=data, steps=STEPS, global_batch=8, steps_per_loop=2, replicas=replicas
    )
    given["optimizer"] = lambda **kw: keras.optimizers.SGD(**{"learning_rate": 0.5, **kw})
    return Settings(**{**given, **more})


def values(model):
    return {v.path: keras.ops.convert_to_numpy(v).copy() for v in model.variables}


@pytest.mark.parametrize("count", [1, 2])
def test_factors_train_as_the_sum_written_out(count):
    """W x + (A B) x, differentiated by hand on one device from the same start and the same batches."""
    told = settings()
    made = replicas(count)
    built = build(told, made)
    start = values(built.model)
    step = compiled_step(built, built.plan)
    iterator = batches(built, 0, told.global_batch)
    traced = step.function.get_concrete_function(iterator, tf.constant(1))
    step.function(iterator, tf.constant(STEPS))
    after = values(built.model)

    a, b = (start[f"dense1/lora_kernel_{letter}"].astype(np.float64) for letter in "ab")
    assert a.shape == (160, 3) and b.shape == (3, 64) and a.any() and not b.any()
    bias = start["dense2/bias"].astype(np.float64)
    one = build(told, in_process())
    for (x, y), _ in zip(batches(one, 0, told.global_batch), range(STEPS), strict=False):
        features = np.eye(10)[x.numpy()].reshape(8, -1)
        before = features @ (start["dense1/kernel"] + a @ b) + start["dense1/bias"]
        hidden = np.maximum(before, 0)
        logits = hidden @ start["dense2/kernel"] + bias
        likely = np.exp(logits - logits.max(1, keepdims=True))
        error = (likely / likely.sum(1, keepdims=True) - np.eye(10)[y.numpy()]) / 8
        back = (error @ start["dense2/kernel"].T) * (before > 0)
        of_kernel = features.T @ back
        a, b, bias = a - 0.5 * of_kernel @ b.T, b - 0.5 * a.T @ of_kernel, bias - 0.5 * error.sum(0)
    np.testing.assert_allclose(after["dense1/lora_kernel_a"], a, atol=1e-5)
    np.testing.assert_allclose(after["dense1/lora_kernel_b"], b, atol=1e-5)
    np.testing.assert_allclose(after["dense2/bias"], bias, atol=1e-5)
    assert np.abs(b).max() > 0.01
    for path in ("dense1/kernel", "dense1/bias", "dense2/kernel"):
        assert after[path].tobytes() == start[path].tobytes()
    expected = 4 * (160 * 3 + 3 * 64 + 10)
    assert built.plan.wire_bytes == expected
    assert traffic.total(traffic.in_step(traced)) == (expected if count > 1 else 0)


def test_a_run_saves_the_factors_alone_and_resumes_bit_for_bit(tmp_path):
    loop.run(settings(), tmp_path / "whole")
    loop.run(settings(steps=4), tmp_path / "parts")
    loop.run(settings(), tmp_path / "parts")
    whole, parts = (state(tmp_path / name, STEPS) for name in ("whole", "parts"))
    names = {"dense1/lora_kernel_a", "dense1/lora_kernel_b", "dense2/bias"}
    assert {n.removeprefix("variables/") for n in whole if n.startswith("variables/")} == names
    assert not any("dense1/kernel" in name for name in whole)
    for name, value in whole.items():
        assert value.tobytes() == parts[name].tobytes(), name
    plan = json.loads((tmp_path / "whole" / "plan.json").read_text())
    assert plan["trained_parameters"] == 160 * 3 + 3 * 64 + 10
    trained = {v["path"]: v["trained"] for v in plan["variables"]}
    assert trained == {name: name in names for name in ["dense1/kernel", "dense1/bias", "dense2/kernel", *names]}
    # The frozen kernel is a part of what the run is of.
    with pytest.raises(UserError, match=r"the frozen variable 'dense1/kernel' has other values"):
        loop.run(settings(model=lambda: _other_kernel()), tmp_path / "whole")


def _other_kernel():
    model = two_dense()
    model.get_layer("dense1").kernel.assign(model.get_layer("dense1").kernel * 2)
    return model


def test_embeddings_and_einsums_and_rules_of_their_own():
    rules = [
        Rule(r"embedding/.*", lora=2),
        Rule(r".*/(query|value)/kernel", lora=4, learning_rate=0.1, reduction=AllReduce(dtype="bfloat16")),
        ("freeze", r".*"),
    ]
    model = byte_transformer(2, 16, 2, vocabulary=17)
    plan = selection.resolve(rules, model, AllReduce(), lora.enable(rules, model))
    trained = [entry.path for entry in plan.trained]
    assert trained[:2] == ["embedding/lora_embeddings_a", "embedding/lora_embeddings_b"]
    assert trained[2:] == [
        f"block_{i}/attention/{name}/lora_kernel_{letter}"
        for i in range(2)
        for name in ("query", "value")
        for letter in "ab"
    ]
    assert [len(group.entries) for group in plan.groups] == [2, 8]
    assert plan.wire_bytes == 4 * (17 * 2 + 2 * 16) + 2 * 4 * (16 * 4 + 4 * 16)
    assert not next(e for e in plan.entries if e.path == "block_0/attention/query/kernel").trained
    model.compile(loss="mse")
    state = layer_state.find(model, (tf.TensorSpec([6], tf.int32), tf.TensorSpec([6, 17])), plan, Objective(model))
    assert not state.moving and not state.averaged


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (dict(match=r"dense1/.*", lora=2), "'dense1/bias', which is no kernel"),
        (dict(match=r"dense1/kernel", lora=0), "lora is 0"),
        (dict(match=r"dense1/kernel", lora=2.5), "lora is 2.5"),
        (dict(match=r"dense1/kernel", lora=True), "lora is True"),
        (dict(match=r"dense1/kernel", lora=2, rows=(0, 3)), "rows has no use"),
        (dict(match=r"dense1/kernel", lora=2, train=False), "lora has no use"),
        (dict(match=r"dense9/kernel", lora=2), "matches no variable"),
    ],
)
def test_mistakes(rule, words):
    with pytest.raises(UserError, match=words) as error:
        build(settings([Rule(**rule), ("freeze", ".*")]), replicas(1))
    assert "\n" not in str(error.value)


def test_a_rule_that_nothing_has_enabled_is_refused():
    with pytest.raises(UserError, match="nothing has enabled it"):
        selection.resolve(RULES, two_dense(), AllReduce())


@pytest.mark.parametrize("rules", [RULES, [("train", r"dense2/.*"), ("freeze", ".*")]], ids=["lora", "layers"])
@pytest.mark.parametrize("precision", quick(["bfloat16", "int8"], "int8"))
def test_what_is_frozen_is_stored_in_fewer_bits(precision, rules, tmp_path):
    told = settings(rules, frozen_dtype=precision)
    made = replicas()
    built = build(told, made)
    plain = build(settings(rules), replicas())
    kernel, exact = (next(e.variable for e in b.plan.entries if e.path == "dense1/kernel") for b in (built, plain))
    assert kernel.dtype == precision and all(e.variable.dtype == "float32" for e in built.plan.trained)
    copies = made.strategy.experimental_local_results(kernel.value)
    assert all(copy.dtype.name == precision for copy in copies)
    exact = keras.ops.convert_to_numpy(exact)
    if precision == "bfloat16":
        stored = keras.ops.convert_to_numpy(kernel).astype(np.float32)
        np.testing.assert_array_equal(stored, tf.cast(tf.cast(exact, tf.bfloat16), tf.float32))
    else:
        scale = keras.ops.convert_to_numpy(built.model.get_layer("dense1").kernel_scale)
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(kernel) / scale, exact, atol=0.51 * np.abs(exact).max() / 127
        )
    x = data().train.x
    np.testing.assert_allclose(built.model(x), plain.model(x), atol=0.05)
    assert built.plan.wire_bytes == plain.plan.wire_bytes
    loop.run(told, tmp_path / "run")
    planned = {v["path"]: v for v in json.loads((tmp_path / "run" / "plan.json").read_text())["variables"]}
    assert (planned["dense1/kernel"]["dtype"], planned["dense1/kernel"]["stored_dtype"]) == ("float32", precision)
    assert {v["stored_dtype"] for v in planned.values() if v["trained"]} == {"float32"}
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all()
    assert not any("dense1/kernel" in name for name in state(tmp_path / "run", STEPS))
    again = build(told, replicas())
    assert restore(again, tmp_path / "run", print).step == STEPS
    with pytest.raises(UserError, match="another run"):
        restore(plain, tmp_path / "run", print)


def test_training_beside_a_rounded_base_is_that_of_the_rounded_values():
    rules = [("train", r"dense2/.*"), ("freeze", ".*")]

    def rounded():
        model = two_dense()
        for variable in model.get_layer("dense1").variables:
            variable.assign(tf.cast(tf.cast(keras.ops.convert_to_tensor(variable), tf.bfloat16), tf.float32))
        return model

    results = []
    for told in (settings(rules, frozen_dtype="bfloat16"), settings(rules, model=rounded)):
        built = build(told, replicas())
        step = compiled_step(built, built.plan)
        step.function(batches(built, 0, told.global_batch), tf.constant(STEPS))
        results.append(values(built.model)["dense2/kernel"])
    np.testing.assert_allclose(*results, rtol=1e-6)


def test_a_layer_of_which_a_bias_is_trained_is_not_quantized():
    built = build(settings([("train", r"dense1/bias"), ("freeze", ".*")], frozen_dtype="int8"), replicas())
    assert {e.path: e.variable.dtype for e in built.plan.entries} == {
        "dense1/kernel": "float32",
        "dense1/bias": "float32",
        "dense2/kernel": "int8",
        "dense2/bias": "float32",
    }


def test_nothing_to_store_is_said():
    with pytest.raises(UserError, match="freeze nothing that can be stored so"):
        build(settings([("train", ".*")], frozen_dtype="int8"), replicas(1))
    with pytest.raises(UserError, match=r"run\.frozen_dtype is 'int4'"):
        settings(frozen_dtype="int4")
    assert quantization.PRECISIONS == (None, "bfloat16", "int8")


def given(rank=3):
    """A model whose factory has given a layer its factors by itself."""
    model = two_dense()
    model.get_layer("dense1").enable_lora(rank)
    return model


def test_factors_that_the_factory_has_made_are_those_of_the_rule(tmp_path):
    for name, model in (("ours", two_dense), ("given", given)):
        loop.run(settings(model=model), tmp_path / name)
    # With the kernel's seed between them the factors begin elsewhere; what is trained, sent and saved is the same.
    assert (tmp_path / "ours" / "plan.json").read_text() == (tmp_path / "given" / "plan.json").read_text()
    factors = {name for name in state(tmp_path / "given", STEPS) if name.startswith("variables/")}
    assert factors == {f"variables/{n}" for n in ("dense1/lora_kernel_a", "dense1/lora_kernel_b", "dense2/bias")}
    with pytest.raises(
        UserError, match=r"rule 1 .* of rank 3 of 'dense1/kernel', .* rank 4 by enable_lora: write lora = 4"
    ):
        lora.enable(RULES, given(4))
    model = given()
    with pytest.raises(
        UserError, match=r"would train 'dense1/kernel', .* by enable_lora: match its factors, such as 'dense1/lora"
    ):
        selection.resolve([("train", "dense1/kernel"), ("freeze", ".*")], model, AllReduce())
    # A rule for the factors themselves holds, whatever else asks for LoRA.
    rules = [("train", r".*/lora_.*"), Rule(r".*/kernel", lora=4), ("freeze", ".*")]
    plan = selection.resolve(rules, model, AllReduce(), lora.enable(rules, model))
    assert {e.path: e.rule.match for e in plan.trained} == {
        f"dense{n}/lora_kernel_{x}": {1: r".*/lora_.*", 2: r".*/kernel"}[n] for n in (1, 2) for x in "ab"
    }


@pytest.mark.parametrize("model", [two_dense, given])
def test_factors_are_as_wide_as_a_kernel_of_float64(model, tmp_path):
    loop.run(settings(model=model, precision="float64", replicas=lambda: replicas(1)), tmp_path)
    assert {v["dtype"] for v in json.loads((tmp_path / "plan.json").read_text())["variables"]} == {"float64"}
    saved = state(tmp_path, STEPS)
    assert {value.dtype for name, value in saved.items() if "lora_kernel" in name} == {np.dtype("float64")}
