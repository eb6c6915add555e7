"""The step ends where a plain Keras loop on one device ends, on any number of replicas, and moves nothing else."""

import functools
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial import reductions, selection
from dist_partial.distributed import collectives
from dist_partial.distributed.collectives import Collectives
from dist_partial.reductions.reduce_gradients import reduce_gradients
from dist_partial.step import batch_norm, optimizers
from dist_partial.step.loss_scale import FIRST_SCALE, LossScale
from dist_partial.step.probe import ProbeSpec, probe
from dist_partial.step.train_step import StepOptions, StepSpec, train_step
from tests.helpers import cases
from tests.helpers.cases import CASES, OPTIMIZERS, OPTIONS, STEPS
from tests.helpers.marks import in_turns, quick

reference = functools.cache(
    lambda case, name, options, dtype: cases.reference(CASES[case], name, OPTIONS[options], dtype)
)

# Every pair of (optimizer, option), (replicas, optimizer) and (replicas, option) comes up.
COVERING = [
    (replicas, list(OPTIMIZERS)[(i + replicas) % 3], option)
    for replicas in (1, 2, 3, 4)
    for i, option in enumerate(OPTIONS)
]


def _check(trained: cases.Trained, case: cases.Case) -> None:
    cases.assert_replicas_agree(trained)
    cases.assert_nothing_else_moved(trained)
    many = trained.strategy.num_replicas_in_sync > 1
    itemsize = np.dtype(keras.config.floatx()).itemsize
    assert trained.bytes_per_step == (trained.plan.wire_bytes + case.statistics_bytes(itemsize) if many else 0)
    assert all(c.in_loop for c in trained.collectives)


@pytest.mark.parametrize(("replicas", "optimizer", "option"), COVERING)
def test_two_dense_equals_one_device(replicas, optimizer, option, mirrored):
    cases.set_precision("float64")
    case = CASES["two_dense"]
    trained = cases.train(mirrored(replicas), case, optimizer, OPTIONS[option])
    cases.assert_equal(trained.after, reference("two_dense", optimizer, option, "float64"), 1e-10)
    _check(trained, case)


@pytest.mark.parametrize(
    "name",
    in_turns(
        quick(
            [n for n in CASES if n != "two_dense"],
            "byte_transformer",
            "batch_norm_synchronised",
            "shared_embedding",
            "masked",
        )
    ),
)
@pytest.mark.parametrize("replicas", quick([1, 2, 3, 4], 2))
def test_models_equal_one_device(name, replicas, mirrored):
    cases.set_precision("float64")
    case = CASES[name]
    # Batch statistics of a part of a batch are not those of the whole.
    option = "clip" if name == "batch_norm_synchronised" else ["all", "plain", "clip", "accumulate"][replicas - 1]
    optimizer = list(OPTIMIZERS)[replicas % 3]
    trained = cases.train(mirrored(replicas), case, optimizer, OPTIONS[option])
    cases.assert_equal(trained.after, reference(name, optimizer, option, "float64"), 1e-10)
    _check(trained, case)


@pytest.mark.parametrize("name", quick(CASES, "two_dense", "batch_norm_untrained"))
def test_float32(name, mirrored):
    cases.set_precision("float32")
    case = CASES[name]
    trained = cases.train(mirrored(2), case, "momentum", OPTIONS["clip"], dtype="float32")
    cases.assert_equal(trained.after, reference(name, "momentum", "clip", "float32"), 1e-5)
    _check(trained, case)


def test_steps_per_call_change_nothing(mirrored):
    cases.set_precision("float32")
    one, many = (
        cases.train(mirrored(2), CASES["two_dense"], "adam", OPTIONS["clip"], "float32", steps_per_call=n)
        for n in (1, STEPS)
    )
    assert one.losses.tobytes() == many.losses.tobytes()
    for name, value in one.after.items():
        assert value.tobytes() == many.after[name].tobytes()


@pytest.mark.slow
def test_jit_compiles_the_gradient_computation(mirrored):
    cases.set_precision("float64")
    case = CASES["byte_transformer"]
    trained = cases.train(mirrored(2), case, "adam", OPTIONS["clip"], jit_compile=True)
    cases.assert_equal(trained.after, reference("byte_transformer", "adam", "clip", "float64"), 1e-10)
    _check(trained, case)
    compiled = re.findall(r'"_XlaMustCompile"\s+value \{\s+b: true', str(trained.traced.graph.as_graph_def()))
    assert len(compiled) >= 2  # one a replica


@pytest.mark.parametrize(("dtype", "bytes_of_one"), [("bfloat16", 2), ("float16", 2), ("float32", 4)])
def test_wire_dtype(dtype, bytes_of_one, mirrored):
    cases.set_precision("float64")
    case = CASES["two_dense"]
    trained = cases.train(mirrored(2), case, all_reduce=reductions.AllReduce(dtype))
    assert trained.bytes_per_step == trained.plan.wire_bytes == bytes_of_one * (160 * 64 + 64 * 10)
    cases.assert_replicas_agree(trained)
    plain = cases.reference(case, "adam", OPTIONS["plain"], "float64")
    # Adam makes of a gradient's rounding error as large a step as of the gradient itself where both are small.
    cases.assert_equal(trained.after, plain, 0.2 if bytes_of_one == 2 else 1e-3)


def test_float16_divides_before_it_sums(mirrored):
    """60000 + 60000 is infinite in float16, and its mean is not."""
    strategy = mirrored(2)
    with strategy.scope():
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, name="dense")])
        plan = selection.resolve([("train", ".*")], model, reductions.AllReduce("float16"))

    @tf.function
    def reduced():
        return strategy.run(lambda: reduce_gradients(Collectives(), plan, [tf.fill([1, 1], 60000.0 / 2)], [{}])[0][0])

    for copy in strategy.experimental_local_results(reduced()):
        assert copy.numpy() == pytest.approx(60000.0, rel=1e-3)


def test_packs_hold_one_dtype_and_no_more_than_their_size():
    tensors = [
        tf.zeros([n], dtype)
        for n, dtype in [(400_000, "float32"), (9, "float16"), (200_000, "float32"), (5, "float32")]
    ]
    assert collectives._packs(range(4), tensors, 2 * 2**20) == [[0], [1], [2, 3]]


def test_a_variable_without_gradient_is_not_sent(mirrored):
    cases.set_precision("float32")

    def model() -> keras.Model:
        x = keras.Input((16,), dtype="int32")
        one_hot = keras.layers.CategoryEncoding(10, output_mode="multi_hot")(x)
        used, unused = keras.layers.Dense(10, name="used"), keras.layers.Dense(3, name="unused")
        built = keras.Model(x, [used(one_hot), unused(one_hot)], name="two_heads")
        return FirstOutput(built, name="first")

    case = cases.Case(model, [("train", r".*")], CASES["two_dense"].x, CASES["two_dense"].y)
    trained = cases.train(mirrored(2), case, "adam", dtype="float32")
    assert trained.bytes_per_step == 4 * (10 * 10 + 10)
    paths = [path for path in trained.after if "unused" in path]
    assert len(paths) == 2
    for path in paths:
        assert trained.after[path].tobytes() == trained.before[path].tobytes()


class FirstOutput(keras.Model):
    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, x, training=None):
        return self.inner(x, training=training)[0]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_learns_and_keeps_float32_variables(policy, mirrored):
    keras.config.set_dtype_policy(policy)
    case = CASES["byte_transformer"]
    data = cases.batches(case, "float32")[:1] * STEPS
    trained = cases.train(mirrored(2), case, "adam", dtype="float32", data=data)
    assert trained.losses[-1] < 0.8 * trained.losses[0]
    assert {value.dtype for value in trained.after.values()} == {np.dtype("float32")}
    cases.assert_replicas_agree(trained)


def one_weight(strategy, optimizer, x, **options):
    """A step on the loss w x, with a loss scale: what is trained, and a function that makes one more step."""
    loss = lambda y, outputs: tf.reduce_sum(outputs, 1)  # noqa: E731
    with strategy.scope():
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, name="dense")])
        plan = selection.resolve([("train", ".*")], model, reductions.AllReduce())
        groups = optimizers.build(plan, optimizer)
        scale = LossScale()
        objective = cases.objective(model, x[0], x[0], loss)
    spec = StepSpec(strategy, Collectives(), model, objective, plan, groups, [{}], StepOptions(**options), scale)
    function = train_step(spec).function
    iterator = cases.worker_iterator(strategy, list(zip(x, x, strict=True)))
    return model.weights[0], groups[0].optimizer, scale, lambda: function(iterator, tf.constant(1))


@pytest.mark.parametrize("replicas", [1, 2])
def test_overflow_on_one_replica_skips_the_update_on_all(replicas, mirrored):
    """One example of the batch has an infinite loss: only the replica that has it sees the overflow itself."""
    strategy = mirrored(replicas)
    x = np.ones([4, 2, 1], np.float32)
    x[1, 1] = np.inf  # the second step, and there the last replica
    weight, optimizer, scale, one_step = one_weight(strategy, lambda: keras.optimizers.SGD(0.1, momentum=0.9), x)
    weights, scales = [], []
    for _ in range(4):
        one_step()
        weights.append([float(np.squeeze(w)) for w in strategy.experimental_local_results(weight.value)])
        scales.append(float(scale.scale.numpy()))
    assert all(len(set(copies)) == 1 for copies in weights)
    moves = np.diff([w[0] for w in weights])
    # The gradient is 1: momentum SGD moves by 0.1, then (skipped) 0, then 0.19, then 0.271.
    np.testing.assert_allclose(moves, [0.0, -0.19, -0.271], atol=1e-6)
    assert scales == [FIRST_SCALE, FIRST_SCALE / 2, FIRST_SCALE / 2, FIRST_SCALE / 2]
    assert int(optimizer.iterations.numpy()) == 3


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_scaled_gradient_is_clipped_by_its_own_norm(replicas, mirrored):
    """The gradient is 1, clipped to 0.5."""
    x = np.ones([1, 2, 1], np.float32)
    weight, _, _, one_step = one_weight(mirrored(replicas), lambda: keras.optimizers.SGD(0.1), x, clip_norm=0.5)
    before = np.array(weight)
    assert one_step()["gradient_norm"].numpy() == [1.0]
    np.testing.assert_allclose(np.array(weight) - before, [[-0.05]], rtol=1e-5)


@pytest.mark.parametrize(
    ("finite", "expected"), [([1, 1, 1, 0, 1, 1, 1], [1, 1, 2, 1, 1, 1, 2]), ([1] * 6, [1, 1, 2, 2, 2, 4])]
)
def test_loss_scale_grows_after_a_row_of_good_steps(finite, expected, monkeypatch):
    monkeypatch.setattr("dist_partial.step.loss_scale.GROW_AFTER", 3)
    scale = LossScale()
    values = []
    for good in finite:
        scale.adjust(tf.constant(bool(good)))
        values.append(float(scale.scale.numpy()) / FIRST_SCALE)
    assert values == expected


def test_loss_scale_ends_at_1():
    scale = LossScale()
    for _ in range(20):
        scale.adjust(tf.constant(False))
    assert scale.scale.numpy() == 1.0


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_probe_measures_in_inference_mode(replicas, mirrored):
    """Each replica's first micro-batch, by plain Keras; statistics keep their bits."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(2.0, size=(8, 3)).astype(np.float32), rng.integers(0, 5, 8).astype(np.int32)
    strategy = mirrored(replicas)
    with strategy.scope():
        keras.utils.set_random_seed(1)
        layers = [keras.layers.Dense(4, name="a"), keras.layers.BatchNormalization(name="norm")]
        layers += [keras.layers.Dropout(0.5), keras.layers.Dense(5, name="d")]
        model = keras.Sequential([keras.Input((3,)), *layers])
        plan = selection.resolve([("train", ".*")], model, reductions.AllReduce())
        plan = plan.divided([(name, [e.path for e in plan.trained if e.path.startswith(name)]) for name in ("a", "d")])
        objective = cases.objective(model, x, y)
    before = cases.weights(model)
    probed = probe(ProbeSpec(strategy, model, objective, plan, 2))(cases.worker_iterator(strategy, [(x, y)]))
    for name, value in cases.weights(model).items():
        assert value.tobytes() == before[name].tobytes(), name
    expected = dict.fromkeys(plan.units, 0.0)
    for part in np.split(np.arange(8), replicas):
        part = part[: len(part) // 2]
        with tf.GradientTape() as tape:
            total = tf.reduce_mean(cases.loss(y[part], model(x[part], training=False)))
        gradients = tape.gradient(total, [entry.variable.value for entry in plan.trained])
        for entry, gradient in zip(plan.trained, gradients, strict=True):
            expected[entry.unit] += float(tf.reduce_sum(gradient**2))
    np.testing.assert_allclose(probed, list(expected.values()), rtol=1e-5)


def test_statistics_of_trained_layers_are_the_mean_over_replicas(mirrored):
    cases.set_precision("float64")
    layer = keras.layers.BatchNormalization(momentum=0.0, name="norm")
    case = cases.Case(
        lambda: keras.Sequential([keras.Input((3,)), layer, keras.layers.Dense(5, name="head")], name="m"),
        [("train", ".*")],
        lambda rng, n: rng.normal(size=(n, 3)),
        CASES["two_dense"].y,
    )
    case = cases.dataclasses.replace(case, y=lambda rng, n: rng.integers(0, 5, n).astype(np.int32))
    trained = cases.train(mirrored(2), case)
    cases.assert_replicas_agree(trained)
    halves = np.split(cases.batches(case, "float64")[-1][0], 2)
    np.testing.assert_allclose(trained.after["norm/moving_mean"], np.mean([h.mean(0) for h in halves], 0), rtol=1e-12)
    np.testing.assert_allclose(trained.after["norm/moving_variance"], np.mean([h.var(0) for h in halves], 0), rtol=1e-9)
    assert trained.bytes_per_step == trained.plan.wire_bytes + 2 * 3 * 8


def test_modes_of_batch_norm():
    layers = {name: keras.layers.BatchNormalization(name=name) for name in ("chosen", "other", "frozen_by_user")}
    layers["bare"] = keras.layers.BatchNormalization(scale=False, center=False, name="bare")
    layers["frozen_by_user"].trainable = False
    model = keras.Sequential([keras.Input((3,)), *layers.values()])

    def modes(rules, everywhere=False):
        plan = selection.resolve(rules, model, reductions.AllReduce())
        batch_norm.set_modes(batch_norm.layers(model), plan, everywhere)
        return [name for name, layer in layers.items() if layer.trainable]

    assert modes([("train", ".*")]) == ["chosen", "other", "bare"]
    assert modes([("train", "chosen/gamma"), ("freeze", ".*")], everywhere=True) == ["chosen", "other", "bare"]
    assert modes([("train", "chosen/gamma"), ("freeze", ".*")]) == ["chosen"]
