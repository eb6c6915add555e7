"""Each reduction of every step against a NumPy model of what its receivers reconstruct, on 1 to 3 replicas."""

import dataclasses
import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial import selection
from dist_partial.distributed import traffic
from dist_partial.distributed.collectives import Collectives
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.reductions.local_only import LocalOnly
from dist_partial.reductions.power_sgd import PowerSGD
from dist_partial.reductions.quantized import Quantized
from dist_partial.reductions.reduce_gradients import make_states, reduce_gradients
from dist_partial.reductions.top_k import TopK
from dist_partial.selection.payload import Payload, Peers, average_bytes
from dist_partial.selection.rules import Rule
from tests.helpers import cases
from tests.helpers.files import same_bits

STEPS = 12
SHAPES = [(12, 20), (3, 4, 10), (7,), (300,), (1000, 3)]
NUMPY = {name: tf.as_dtype(name).as_numpy_dtype for name in ("float64", "float32", "bfloat16", "float16")}


class Simulated:
    """A plan of one variable a reduction, whose replicas are handed given gradients.

    Args:
        strategy: the replicas.
        members: (reduction, shape) of each variable.
        dtype: of the gradients.
        wire: how the replicas reach each other.
    """

    def __init__(self, strategy, members, dtype="float64", collectives=Collectives()):  # noqa: B008 (frozen)
        rules = tuple(Rule(f"v{i}") for i in range(len(members)))
        entries = tuple(
            selection.VariablePlan(rule.match, shape, dtype, None, rule, each)
            for rule, (each, shape) in zip(rules, members, strict=True)
        )
        self.strategy, self.dtype = strategy, dtype
        # Without `among`, which wants replicas of a model: as many workers of one replica each.
        self.plan = selection.Plan(rules, entries, workers=max(2, strategy.num_replicas_in_sync))
        with strategy.scope():
            self.states = make_states(self.plan)

        @tf.function(autograph=False)
        def reduced(stacked):
            def on_replica():
                index = tf.distribute.get_replica_context().replica_id_in_sync_group
                return reduce_gradients(collectives, self.plan, [each[index] for each in stacked], self.states)[0]

            return [strategy.experimental_local_results(each) for each in strategy.run(on_replica)]

        self.function = reduced

    def residuals(self, i=0):
        """[replicas, ...]; zeros where the reduction keeps none."""
        if "residual" not in self.states[i]:
            return np.zeros((self.strategy.num_replicas_in_sync, *self.plan.entries[i].shape))
        return np.stack(cases.copies(self.strategy, self.states[i]["residual"]))

    def left(self, i):
        """All that has been left out."""
        found = self.residuals(i).sum(axis=0)
        if "sum_residual" in self.states[i]:
            chunks = np.concatenate(cases.copies(self.strategy, self.states[i]["sum_residual"]))
            found += chunks[: found.size].reshape(found.shape)
        return found

    def step(self, gradients):
        """One round: [replicas, ...] a variable -> the sum of each, after a look whether all replicas have its bits."""
        answers = self.function([tf.constant(each, self.dtype) for each in gradients])
        found = [[copy.numpy() for copy in copies] for copies in answers]
        for copies, entry in zip(found, self.plan.entries, strict=True):
            assert not entry.reduction.shared or same_bits(copies), entry
        return [copies[0] for copies in found]

    def traced(self):
        count = self.strategy.num_replicas_in_sync
        specs = [tf.TensorSpec([count, *e.shape], self.dtype) for e in self.plan.entries]
        return self.function.get_concrete_function(specs)


def draw(replicas, shape, dtype="float64", steps=STEPS, seed=0):
    """[steps, replicas, ...]; a low rank and noise, of sizes that differ from row to row."""
    rng = np.random.default_rng([seed, *shape])
    rows = np.exp(rng.normal(size=(shape[0], *[1] * (len(shape) - 1))))
    direction = rng.normal(size=shape)
    noise = rng.normal(size=(steps, replicas, *shape))
    return (rows * (direction + 0.7 * noise)).astype(dtype)


def rounded(array, name):
    """As sent in another format: TensorFlow narrows float64 by way of float32."""
    if name in ("bfloat16", "float16"):
        array = np.asarray(array, np.float32)
    return array.astype(NUMPY[name])


@pytest.mark.parametrize(
    "each", [Quantized(1, decay=0.5), TopK(1 / 16, 256, 8, decay=0.5), PowerSGD(2, decay=0.5)], ids=str
)
def test_of_what_is_left_a_part_is_added(each, mirrored):
    """After gradients of zeros, what was sent and what is left are by half of what was left less, each time."""
    simulated = Simulated(mirrored(2), [(each, (12, 20))])
    gradient = draw(2, (12, 20), steps=1)[0]
    sent = simulated.step([gradient])[0]
    left = simulated.left(0)
    np.testing.assert_allclose(sent + left, gradient.sum(axis=0), rtol=0, atol=1e-12)
    sent = simulated.step([np.zeros_like(gradient)])[0]
    np.testing.assert_allclose(sent + simulated.left(0), 0.5 * left, rtol=0, atol=1e-12)


def gram_schmidt(matrix):
    columns = []
    for column in matrix.T:
        for _ in range(2):  # twice, against cancellation
            for done in columns:
                column = column - done * (done @ column)
        columns.append(column / np.linalg.norm(column))
    return np.stack(columns, axis=1)


def added(terms):
    """In the dtype of the terms: `sum` begins with Python's 0, which NumPy 2.0 adds to bfloat16 in float32."""
    return functools.reduce(np.add, terms)


class PowerModel:
    """Algorithms 1 and 2 of the paper; the signs of columns do not change the result."""

    def __init__(self, rank, sent_as, shape, replicas, dtype, right):
        rows, columns = {(12, 20): (12, 20), (3, 4, 10): (12, 10), (1000, 3): (1000, 3)}.get(shape, (0, 0))
        self.sent_as, self.shape, self.dense = (
            sent_as or dtype,
            shape,
            rank * (rows + columns) >= rows * columns,
        )
        self.error, self.right, self.matrix = np.zeros((replicas, *shape), dtype), right, (rows, columns)

    def step(self, gradients):
        dtype = gradients.dtype
        if self.dense:
            return added([rounded(g, self.sent_as) for g in gradients]).astype(dtype)
        wholes = [(g + e).reshape(self.matrix) for g, e in zip(gradients, self.error, strict=True)]
        left = gram_schmidt(added([rounded(whole @ self.right, self.sent_as) for whole in wholes]).astype(dtype))
        rights = [rounded(whole.T @ left, self.sent_as) for whole in wholes]
        for error, whole, right in zip(self.error, wholes, rights, strict=True):
            error[:] = (whole - left @ right.astype(dtype).T).reshape(self.shape)
        self.right = added(rights).astype(dtype)
        return (left @ self.right.T).reshape(self.shape)


# By bits: how many levels there are, and the outermost over the mean magnitude, or None where it is the largest value.
LEVELS = {8: (256, None), 4: (16, None), 2: (4, 1.872), 1.6: (3, 1.534), 1: (2, 1.0)}


def nearest_levels(values, bits):
    """Each value's nearest of evenly spaced numbers that lie symmetric to zero, by the scale of its 256."""
    found = np.zeros_like(values)
    count, over_mean = LEVELS[bits]
    for start in range(0, len(values), 256):
        part = values[start : start + 256]
        scale = np.abs(part).max() if over_mean is None else over_mean * np.abs(part).mean()
        scale = rounded(scale, "bfloat16").astype(values.dtype)
        levels = np.linspace(-scale, scale, count, dtype=values.dtype)
        found[start : start + 256] = levels[np.abs(part[:, np.newaxis] - levels).argmin(axis=1)]
    return found


class QuantizedModel:
    def __init__(self, bits, shape, replicas, dtype):
        self.bits, self.error = bits, np.zeros((replicas, *shape), dtype)

    def step(self, gradients):
        whole = gradients + self.error
        sent = np.stack([nearest_levels(each.ravel(), self.bits).reshape(each.shape) for each in whole])
        self.error = whole - sent
        return sent.sum(axis=0)


class TwoHopModel:
    """What each replica has left out of its part of every chunk, and the chunk's owner of what it sends of the sum."""

    def __init__(self, sent, chunk, shape, replicas):
        self.sent, self.chunk, self.size = sent, chunk, int(np.prod(shape))
        self.error, self.sum_error = np.zeros((replicas, *shape)), np.zeros((replicas, chunk))

    def _sent(self, chunks):
        """What is received of each chunk; what fills the last ones up is none of it."""
        filled = [min(max(self.size - i * self.chunk, 0), self.chunk) for i in range(len(chunks))]
        parts = [self.sent(chunk[:count]) if count else chunk[:0] for chunk, count in zip(chunks, filled, strict=True)]
        return np.stack([np.pad(part, (0, self.chunk - len(part))) for part in parts])

    def step(self, gradients, actual):
        """`actual` decides where a sum lies in the middle between two levels: then either is the nearest."""
        replicas, filled = len(gradients), len(gradients) * self.chunk - self.size
        assert filled >= 0
        flat = np.pad((gradients + self.error).reshape(replicas, -1), [(0, 0), (0, filled)])
        whole = flat.reshape(replicas, replicas, self.chunk)  # replica, chunk, value
        sent = np.stack([self._sent(own) for own in whole])
        self.error = (whole - sent).reshape(replicas, -1)[:, : self.size].reshape(gradients.shape)
        totals = sent.sum(axis=0) + self.sum_error
        found = self._sent(totals)
        actual = np.pad(actual.ravel(), (0, filled)).reshape(found.shape)
        between = np.isclose(np.abs(totals - actual), np.abs(totals - found), rtol=1e-9, atol=0)
        found = np.where(between, actual, found)
        self.sum_error = totals - found
        return found.ravel()[: self.size].reshape(gradients.shape[1:])


class TopKModel:
    """Of each block the k largest; the values that share a scale are the same in any order within a block here."""

    def __init__(self, density, block, bits, shape, replicas, dtype):
        size = int(np.prod(shape))
        self.block = min(block or size, size)
        self.k = max(1, round(density * self.block))
        self.bits, self.error = bits, np.zeros((replicas, *shape), dtype)
        assert 256 % self.k == 0 or -(-size // self.block) * self.k <= 256, "the order within a block would matter"

    def sent(self, flat):
        places = []
        for start in range(0, len(flat), self.block):
            part = flat[start : start + self.block]
            kept = np.argsort(-np.abs(part), kind="stable")[: self.k]
            places += [start + i for i in kept] + [None] * (self.k - len(kept))  # a short last block is filled up
        values = np.array([0 if i is None else flat[i] for i in places], flat.dtype)
        if self.bits in (16, 32):
            values = rounded(values, "bfloat16" if self.bits == 16 else "float32").astype(flat.dtype)
        else:
            values = nearest_levels(values, self.bits)
        dense = np.zeros_like(flat)
        for i, value in zip(places, values, strict=True):
            if i is not None:
                dense[i] = value
        return dense

    def step(self, gradients):
        whole = gradients + self.error
        sent = np.stack([self.sent(each.ravel()).reshape(each.shape) for each in whole])
        self.error = whole - sent
        return sent.sum(axis=0)


# By reduction: the shape, and the values of a chunk among 3 and among 4 replicas, counted by hand.
TWO_HOPS = [
    (Quantized(8), (1000, 3), {3: 1000, 4: 750}),
    (Quantized(4), (12, 20), {3: 80, 4: 60}),
    (Quantized(2), (300,), {3: 100, 4: 75}),
    (Quantized(1.6), (1001,), {3: 334, 4: 251}),  # of which the last has fewer
    (Quantized(1), (3, 4, 10), {3: 40, 4: 30}),
    (TopK(1 / 16, 16, 32), (300,), {3: 112, 4: 80}),  # 19 blocks of 16
    (TopK(1 / 16, 256, 16), (1000, 3), {3: 1024, 4: 768}),  # 12 of 256
    (TopK(1 / 8, 16, 4), (12, 20), {3: 80, 4: 64}),  # 15 of 16
]


@pytest.mark.parametrize("replicas", [3, 4])
def test_two_hops_are_those_of_numpy(replicas, mirrored):
    members = [(each, shape) for each, shape, _ in TWO_HOPS]
    simulated = Simulated(mirrored(replicas), members)
    models = []
    for each, shape, chunks in TWO_HOPS:
        if isinstance(each, Quantized):
            sent = functools.partial(nearest_levels, bits=each.bits)
        else:
            sent = TopKModel(each.density, each.block, each.bits, shape, replicas, "float64").sent
        models.append(TwoHopModel(sent, chunks[replicas], shape, replicas))
    assert [state["sum_residual"].shape[0] for state in simulated.states] == [model.chunk for model in models]
    gradients = [draw(replicas, shape, steps=10) for _, shape in members]
    for t in range(10):
        for i, result in enumerate(simulated.step([g[t] for g in gradients])):
            expected, where = models[i].step(gradients[i][t], result), f"step {t}, {members[i]}"
            limit = 1e-12 * np.abs(gradients[i]).max()
            np.testing.assert_allclose(result, expected, rtol=0, atol=limit, err_msg=where)
            np.testing.assert_allclose(simulated.residuals(i), models[i].error, rtol=0, atol=limit, err_msg=where)
            chunks = cases.copies(simulated.strategy, simulated.states[i]["sum_residual"])
            left, model_left = [np.concatenate(each)[: result.size] for each in (chunks, models[i].sum_error)]
            np.testing.assert_allclose(left, model_left, rtol=0, atol=limit, err_msg=where)


@pytest.mark.parametrize("replicas", [3, 4])
def test_two_hops_lose_nothing(replicas, mirrored):
    """All that was applied and all that is left are together what there was, also where nothing but zeros follow."""
    members = [(each, shape) for each, shape, _ in TWO_HOPS]
    simulated = Simulated(mirrored(replicas), members)
    gradients = [draw(replicas, shape, steps=10) for _, shape in members]
    sent = [0.0] * len(members)
    for t in range(14):
        given = [g[t] if t < 10 else np.zeros_like(g[0]) for g in gradients]
        sent = [before + result for before, result in zip(sent, simulated.step(given), strict=True)]
    for i in range(len(members)):
        whole = gradients[i].sum(axis=(0, 1))
        np.testing.assert_allclose(sent[i] + simulated.left(i), whole, rtol=0, atol=1e-10, err_msg=f"{members[i]}")
        assert np.linalg.norm(sent[i] - whole) < np.linalg.norm(whole), members[i]


def test_a_residual_that_decays(mirrored):
    """With one gradient and then zeros, what is left decays by half a step beyond what is sent."""
    each, shape = Quantized(1, decay=0.5), (300,)
    simulated = Simulated(mirrored(2), [(each, shape)])
    gradient = draw(2, shape, steps=1)[0]
    error = np.zeros_like(gradient)
    for t in range(4):
        given = gradient if t == 0 else np.zeros_like(gradient)
        whole = given + 0.5 * error
        sent = np.stack([nearest_levels(part, 1) for part in whole])
        error = whole - sent
        np.testing.assert_allclose(simulated.step([given])[0], sent.sum(axis=0), rtol=0, atol=1e-12)
        np.testing.assert_allclose(simulated.residuals(), error, rtol=0, atol=1e-12)


@pytest.mark.parametrize("workers", [2, 3, 4, 8, 16, 64])
def test_bytes_of_the_cheapest_way(workers):
    """Of a sum of float32, a gather and two hops; 4 bits of a large tensor are at most 1/7.5 of float32."""
    peers = Peers(workers)
    large = Quantized(4).payloads([1024, 1024], "float32", peers)
    dense = AllReduce().payloads([1024, 1024], "float32", peers)
    assert average_bytes(dense, workers) > 7.5 * average_bytes(large, workers)
    assert [m.kind for m in large] == (["gather"] if workers == 2 else ["all-to-all", "gather"])
    for each, shape in itertools.product((Quantized(4), TopK(1 / 16)), ([1], [3], [64], [300], [1024, 64])):
        size = int(np.prod(shape))
        message, rounded = each.message_bytes, each.rounded
        part = message(rounded(-(-size // workers), size))
        ways = {
            "sum": 2 * (workers - 1) / workers * 4 * size,
            "gather": (workers - 1) * message(rounded(size, size)),
            "all-to-all": 2 * (workers - 1) * part,
        }
        found = each.payloads(shape, "float32", peers)
        assert average_bytes(found, workers) == min(ways.values()) == ways[found[0].kind], (each, shape)


def test_a_tensor_of_few_values_goes_whole_where_that_is_less(mirrored):
    """And with it what was left out on fewer replicas, so that nothing is lost."""
    each, shape = Quantized(4), (2,)
    simulated = Simulated(mirrored(4), [(each, shape)], "float32")
    assert list(simulated.states[0]) == ["residual"]
    [found] = traffic.in_call(simulated.traced())
    assert (found.kind, found.bytes) == ("sum", 8)
    residuals = simulated.strategy.experimental_local_results(simulated.states[0]["residual"])
    for copy, value in zip(residuals, range(4), strict=True):
        copy.assign(np.full(shape, value, np.float32))
    assert simulated.step([np.ones((4, 2))])[0].tolist() == [10, 10]
    assert simulated.step([np.ones((4, 2))])[0].tolist() == [4, 4]


def assert_follows(simulated, models, gradients, tolerance):
    """Every step's sums and every residual are the model's, and nothing is lost; relative to the largest value."""
    sent = [0.0] * len(models)
    for t in range(len(gradients[0])):
        results = simulated.step([g[t] for g in gradients])
        for i, (result, model) in enumerate(zip(results, models, strict=True)):
            expected = model.step(gradients[i][t])
            where = f"step {t}, {simulated.plan.entries[i].reduction} of {simulated.plan.entries[i].shape}"
            limit = tolerance * np.abs(gradients[i]).max()
            np.testing.assert_allclose(result, expected, rtol=0, atol=limit, err_msg=where)
            np.testing.assert_allclose(simulated.residuals(i), model.error, rtol=0, atol=limit, err_msg=where)
            sent[i] = sent[i] + result
    for i, entry in enumerate(simulated.plan.entries):
        # Half precision rounds the sum itself, which no replica can know of before.
        if getattr(entry.reduction, "dtype", None) is None:
            assert_nothing_lost(simulated, i, sent[i], gradients[i], 10 * tolerance)


def assert_nothing_lost(simulated, i, sent, gradients, tolerance=1e-10):
    """What was sent and what is left are together what there was."""
    where = f"{simulated.plan.entries[i].reduction} of {simulated.plan.entries[i].shape}"
    whole = gradients.sum(axis=(0, 1))
    limit = tolerance * max(1.0, np.abs(whole).max())
    np.testing.assert_allclose(sent + simulated.left(i), whole, rtol=0, atol=limit, err_msg=where)
    if simulated.states[i]:
        assert np.abs(sent - whole).max() > 1e-6, f"{where} left nothing out"


@pytest.mark.parametrize(
    ("replicas", "sent_as", "dtype", "tolerance"),
    [
        (1, None, "float64", 1e-10),
        (2, None, "float64", 1e-10),
        (3, None, "float64", 1e-10),
        (2, None, "float32", 2e-4),
        # Three terms are summed in bfloat16 in an order that is the transport's: compared for fewer.
        (1, "bfloat16", "float64", 1e-10),
        (2, "bfloat16", "float64", 1e-10),
    ],
)
def test_power_sgd_is_the_papers(replicas, sent_as, dtype, tolerance, mirrored):
    members = [(PowerSGD(rank, sent_as), shape) for rank in (1, 2, 4) for shape in SHAPES]
    simulated = Simulated(mirrored(replicas), members, dtype)
    models = []
    for (each, shape), state in zip(members, simulated.states, strict=True):
        rights = cases.copies(simulated.strategy, state["right"]) if state else [None]
        assert state == {} or same_bits(rights)
        models.append(PowerModel(each.rank, sent_as, shape, replicas, dtype, rights[0]))
        assert models[-1].dense == (state == {})
    assert_follows(simulated, models, [draw(replicas, shape, dtype) for _, shape in members], tolerance)


@pytest.mark.parametrize(
    ("replicas", "members"),
    [
        (1, [(8, (300,)), (1, (1000, 3))]),
        (2, [(8, (1000, 3)), (4, (300,)), (4, (7,)), (2, (3, 4, 10)), (1.6, (12, 20)), (1.6, (1000, 3)), (1, (300,))]),
    ],
)
def test_quantized_takes_the_nearest_level(replicas, members, mirrored):
    models = [QuantizedModel(bits, shape, replicas, "float64") for bits, shape in members]
    gradients = [draw(replicas, shape) for _, shape in members]
    simulated = Simulated(mirrored(replicas), [(Quantized(bits), shape) for bits, shape in members])
    assert_follows(simulated, models, gradients, 1e-12)


TOP_K = [
    (TopK(1 / 16, 16, 32), (300,)),
    (TopK(1 / 16, 16, 2), (300,)),
    (TopK(1 / 8, 256, 16), (1000, 3)),
    (TopK(1 / 8, 256, 8), (1000, 3)),
    (TopK(1 / 16, 256, 1), (12, 20)),  # a tensor smaller than a block
    (TopK(1 / 30, 300, 8), (1000, 3)),  # places of 9 bits
    (TopK(1 / 500, 40_000, 16), (70_000,)),  # of 16
    (TopK(1 / 64, 300, 4), (3, 4, 10)),
    (TopK(1 / 2, 256, 16), (7,)),
    (TopK(1.0, 16, 1.6), (3, 4, 10)),  # everything, and what fills the last block up
    (TopK(0.001, None, 16), (70_000,)),  # places of 17 bits
]


@pytest.mark.parametrize(
    ("replicas", "members", "dtype"),
    [
        (1, TOP_K[3:5], "float64"),
        pytest.param(2, TOP_K, "float64", marks=pytest.mark.slow),
        # In float32 a value within rounding of the middle of two levels may go to either, so it has none of these.
        (2, [TOP_K[0], TOP_K[2]], "float32"),
    ],
)
def test_top_k_sends_the_largest_of_each_block(replicas, members, dtype, mirrored):
    models = [TopKModel(each.density, each.block, each.bits, shape, replicas, dtype) for each, shape in members]
    gradients = [draw(replicas, shape, dtype) for _, shape in members]
    simulated = Simulated(mirrored(replicas), members, dtype)
    assert_follows(simulated, models, gradients, 1e-12 if dtype == "float64" else 1e-6)


def test_a_block_of_more_than_a_byte_has_places_beyond_it(mirrored):
    """What is sent is the last of 257 values, at place 256."""
    gradient = np.zeros(257)
    gradient[256] = 7
    for block in (257, None):
        (total,) = Simulated(mirrored(2), [(TopK(1 / 257, block=block, bits=32), (257,))]).step([[gradient, gradient]])
        np.testing.assert_array_equal(total, 2 * gradient)


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_every_step_sums_what_the_wire_carries(replicas, mirrored):
    members = [(AllReduce(name), shape) for name in (None, "float32", "bfloat16", "float16") for shape in SHAPES]
    simulated = Simulated(mirrored(replicas), members)
    gradients = [draw(replicas, shape, steps=10) for _, shape in members]
    for t in range(10):
        for result, (each, shape), g in zip(simulated.step([g[t] for g in gradients]), members, gradients, strict=True):
            sent = [rounded(part, each.dtype or "float64") for part in g[t]]
            # The order of a sum is the transport's, and each addition rounds.
            orders = [sum(order[1:], start=order[0]) for order in itertools.permutations(sent)]
            assert np.any([result == order.astype("float64") for order in orders], axis=0).all(), (each, shape)


def test_error_feedback_catches_up_on_three_replicas(mirrored):
    """With one gradient for ever, what has been sent comes ever nearer to what there was."""
    members = [(PowerSGD(1), (12, 20)), (Quantized(1), (300,)), (TopK(1 / 16, 16, 2), (300,))]
    simulated = Simulated(mirrored(3), members)
    gradients = [np.repeat(draw(3, shape, steps=1), 40, axis=0) for _, shape in members]
    sent = [0.0] * len(members)
    for t in range(40):
        for i, result in enumerate(simulated.step([g[t] for g in gradients])):
            sent[i] = sent[i] + result
    for i in range(len(members)):
        assert_nothing_lost(simulated, i, sent[i], gradients[i])
        whole = gradients[i].sum(axis=(0, 1))
        assert np.linalg.norm(sent[i] - whole) < 0.5 * np.linalg.norm(whole), members[i]


def _always_factors(self, shape):
    folds = [(int(np.prod(shape[:i])), int(np.prod(shape[i:]))) for i in range(1, len(shape))]
    return min(folds, key=sum)


@pytest.mark.parametrize("bypassed", [False, True])
def test_power_sgd_of_full_rank_is_dense(bypassed, mirrored, monkeypatch):
    """By the short cut, and by factors that lose nothing."""
    if bypassed:
        monkeypatch.setattr(PowerSGD, "matrix", _always_factors)
    members = [(PowerSGD(12), (12, 20)), (PowerSGD(10), (3, 4, 10)), (PowerSGD(3), (1000, 3))]
    simulated = Simulated(mirrored(2), members)
    assert all(bool(state) == bypassed for state in simulated.states)
    gradients = [draw(2, shape) for _, shape in members]
    for t in range(STEPS):
        for i, result in enumerate(simulated.step([g[t] for g in gradients])):
            np.testing.assert_allclose(result, gradients[i][t].sum(axis=0), rtol=0, atol=1e-10)
            np.testing.assert_allclose(simulated.residuals(i).sum(axis=0), 0, atol=1e-10)


def test_power_sgd_sends_what_has_no_more_than_its_rank(mirrored):
    """Fewer directions than columns: what is left over of the orthonormal basis adds nothing."""
    simulated = Simulated(mirrored(2), [(PowerSGD(4), (12, 20)), (PowerSGD(2), (1000, 3))])
    assert all(simulated.states)
    rng = np.random.default_rng(1)
    for _ in range(3):  # the warm start is of the rank of the step before: one
        gradients = [
            np.stack([np.outer(rng.normal(size=rows), rng.normal(size=columns))] * 2)
            for rows, columns in ((12, 20), (1000, 3))
        ]
        for result, gradient in zip(simulated.step(gradients), gradients, strict=True):
            np.testing.assert_allclose(result, gradient.sum(axis=0), atol=1e-10)


def test_power_sgd_does_not_depend_on_who_has_which_gradient(mirrored):
    shapes = [(12, 20), (3, 4, 10), (1000, 3)]
    members = [(PowerSGD(2), shape) for shape in shapes]
    totals = [draw(1, shape)[:, 0] for shape in shapes]
    rng = np.random.default_rng(2)
    outcomes = []
    for replicas in (1, 2, 3):
        simulated = Simulated(mirrored(replicas), members)
        results = []
        for t in range(STEPS):
            parts = [rng.normal(size=(replicas, *shape)) for shape in shapes]
            for part, total in zip(parts, totals, strict=True):
                part[0] = total[t] - part[1:].sum(axis=0)
            results.append(simulated.step(parts))
        outcomes.append([*map(np.stack, zip(*results, strict=True))])
        outcomes[-1] += [simulated.residuals(i).sum(axis=0) for i in range(len(shapes))]
    for other in outcomes[1:]:
        for left, right in zip(outcomes[0], other, strict=True):
            np.testing.assert_allclose(left, right, rtol=0, atol=1e-10)


def test_gradients_of_zero_are_no_nan_and_end_nothing(mirrored):
    members = [
        *[(each, (12, 20)) for each in (PowerSGD(2), PowerSGD(2, "bfloat16"), AllReduce("float16"))],
        *[(Quantized(bits), (300,)) for bits in (1, 1.6)],
        *[(TopK(1 / 16, 16, bits), (300,)) for bits in (16, 4)],
    ]
    simulated = Simulated(mirrored(2), members)
    for _ in range(2):
        for result in simulated.step([np.zeros((2, *shape)) for _, shape in members]):
            assert np.array_equal(result, np.zeros_like(result))
    # Some rows alone are zero afterwards, as an embedding's are; what was sent tends to what there was.
    gradients = [draw(2, shape, steps=1)[0] for _, shape in members]
    for gradient in gradients:
        gradient[:, ::3] = 0
    sent = [np.zeros(shape) for _, shape in members]
    for _ in range(STEPS):
        for total, result in zip(sent, simulated.step(gradients), strict=True):
            assert np.isfinite(result).all()
            total += result
    for i, (each, _) in enumerate(members):
        whole = STEPS * gradients[i].sum(axis=0)
        assert np.linalg.norm(sent[i] - whole) < 0.9 * np.linalg.norm(whole), each
        if getattr(each, "dtype", None) is None:
            np.testing.assert_allclose(sent[i] + simulated.residuals(i).sum(axis=0), whole, atol=1e-10)


@pytest.mark.parametrize(
    ("each", "shape"),
    [
        (PowerSGD(1), (7,)),
        (PowerSGD(1), ()),
        (PowerSGD(1), (2, 2)),
        (PowerSGD(4), (1000, 3)),
        (PowerSGD(2, "bfloat16"), (3, 4)),
        (TopK(1 / 64, 256, 32), (1,)),
        (TopK(0.9, 256, 32), (300,)),
        (TopK(0.9, None, 32), (300, 4)),
    ],
)
def test_what_gains_nothing_is_sent_whole(each, shape, mirrored):
    simulated = Simulated(mirrored(2), [(each, shape)], "float32")
    assert simulated.states == [{}]
    size = 2 if getattr(each, "dtype", None) else 4
    assert each.payloads(shape, "float32") == (Payload("sum", size * int(np.prod(shape))),)
    gradient = np.random.default_rng(0).normal(size=(2, *shape)).astype("float32")
    np.testing.assert_allclose(simulated.step([gradient])[0], gradient.sum(axis=0), rtol=0.05 if size == 2 else 1e-6)


# Counted by hand: places, scales of 2 bytes, values; a message is filled up to whole words.
MESSAGES = [
    (Quantized(8), (300,), [("gather", 2 * 2 + 300)]),
    (Quantized(4), (300,), [("gather", 2 * 2 + 150 + 2)]),
    (Quantized(2), (300,), [("gather", 2 * 2 + 75 + 1)]),
    (Quantized(1.6), (300,), [("gather", 2 * 2 + 60)]),  # five values of three levels a byte
    (Quantized(1), (300,), [("gather", 2 * 2 + 38 + 2)]),
    (Quantized(8), (7,), [("gather", 2 + 7 + 3)]),
    (TopK(1 / 16, 256, 16), (1000, 3), [("gather", 12 * 16 * (1 + 2))]),
    (TopK(1 / 8, 16, 8), (300,), [("gather", 19 * 2 // 2 + 2 + 19 * 2 + 1)]),  # places of 4 bits
    (TopK(1 / 30, 300, 32), (1000, 3), [("gather", 10 * 10 * 9 // 8 + 1 + 10 * 10 * 4 + 3)]),
    (TopK(1 / 50, None, 4), (1000, 3), [("gather", 60 * 12 // 8 + 2 + 30 + 2)]),
    (TopK(1 / 16, 256, 2), (12, 20), [("gather", 15 + 2 + 4 + 3)]),
    (TopK(0.001, None, 16), (70_000,), [("gather", 149 + 70 * 2 + 3)]),  # places of 17 bits
    (TopK(1 / 16, 256, 1.6), (12, 20), [("gather", 15 + 2 + 3)]),
    (PowerSGD(2), (12, 20), [("sum", 2 * 12 * 8), ("sum", 2 * 20 * 8)]),
    (PowerSGD(2, "bfloat16"), (3, 4, 10), [("sum", 2 * 12 * 2), ("sum", 2 * 10 * 2)]),
    (AllReduce("float16"), (3, 4, 10), [("sum", 120 * 2)]),
    (AllReduce(), (7,), [("sum", 7 * 8)]),
    (LocalOnly(), (7,), []),
]


@pytest.mark.parametrize("i", range(len(MESSAGES)))
def test_messages_are_as_long_as_said(i, mirrored):
    each, shape, expected = MESSAGES[i]
    assert each.payloads(shape, "float64") == tuple(Payload(*pair) for pair in expected)
    found = traffic.in_call(Simulated(mirrored(2), [(each, shape)]).traced())
    assert [(c.kind, c.bytes) for c in found] == expected


def mixed():
    """A model whose every variable travels in another way."""
    reductions = {
        "a/kernel": PowerSGD(2),
        "a/bias": Quantized(4),
        "b/kernel": PowerSGD(3, "bfloat16"),
        "b/bias": AllReduce("bfloat16"),
        "c/kernel": TopK(1 / 16, 256, 8),
        "c/bias": LocalOnly(),
        "d/kernel": AllReduce(),
        "d/bias": PowerSGD(2),  # sent whole
    }
    sizes = zip("abcd", (40, 50, 60, 5), strict=True)
    layers = [keras.layers.Dense(n, name=name) for name, n in sizes]
    model = keras.Sequential([keras.Input((30,)), *layers], name="mixed")
    return selection.resolve([Rule(path, reduction=each) for path, each in reductions.items()], model, AllReduce())


# Round one: sums in float32 (PowerSGD's left factor, d) and in bfloat16 (left factor, b/bias), a gather (a/bias) and an
# all-to-all (c/kernel, of 12 blocks); round two: the right factors, and the sum of 4 blocks.
ROUNDS = [
    ("sum", 4 * (2 * 30 + 60 * 5 + 5)),
    ("sum", 2 * (3 * 40 + 50)),
    ("gather", 2 + 20 + 2),
    ("all-to-all", 3 * (4 * 16 + 2 + 4 * 16 + 2)),
    ("gather", 4 * 16 + 2 + 4 * 16 + 2),
    ("sum", 4 * 2 * 40),
    ("sum", 2 * 3 * 50),
]


def _of_plan(plan, strategy, collectives=Collectives()):  # noqa: B008 (frozen)
    return Simulated(strategy, [(e.reduction, e.shape) for e in plan.trained], "float32", collectives)


def test_a_mixed_plan_shares_rounds_and_sends_what_it_predicts(mirrored):
    strategy = mirrored(3)
    with strategy.scope():
        plan = mixed()
    found = traffic.in_call(_of_plan(plan, strategy).traced())
    assert sorted((c.kind, c.bytes) for c in found) == sorted(ROUNDS)
    plan = dataclasses.replace(plan, workers=3)
    for kind in ("sum", "gather", "all-to-all"):
        predicted = [m for m in plan.payloads if m.kind == kind]
        assert traffic.total(predicted) == traffic.total([c for c in found if c.kind == kind])
    # A pack that holds nothing more: one collective a message.
    alone = traffic.in_call(_of_plan(plan, strategy, Collectives(pack_bytes=1)).traced())
    assert sorted((c.kind, c.bytes) for c in alone) == sorted((m.kind, m.bytes) for m in plan.payloads)
    assert traffic.in_call(_of_plan(plan, mirrored(1)).traced()) == []


def test_packs_change_no_bit(mirrored):
    with (strategy := mirrored(2)).scope():
        plan = mixed()
    gradients = [draw(2, entry.shape, "float32") for entry in plan.trained]
    outcomes = []
    for pack_bytes in (300, 2**21):
        simulated = _of_plan(plan, strategy, Collectives(pack_bytes=pack_bytes))
        outcomes.append([simulated.step([g[t] for g in gradients]) for t in range(5)])
    for other in outcomes[1:]:
        for left, right in zip(outcomes[0], other, strict=True):
            assert all(same_bits(pair) for pair in zip(left, right, strict=True))


def test_a_gradient_that_is_none_sends_nothing(mirrored):
    strategy = mirrored(2)
    simulated = Simulated(strategy, [(Quantized(8), (300,)), (PowerSGD(2), (12, 20))])

    @tf.function(autograph=False)
    def reduced():
        gradients = [None, tf.ones([12, 20], tf.float64)]
        results, _ = strategy.run(
            lambda: reduce_gradients(Collectives(), simulated.plan, gradients, simulated.states),
        )
        assert results[0] is None
        return results[1]

    found = traffic.in_call(reduced.get_concrete_function())
    assert [(c.kind, c.bytes) for c in found] == [("sum", 192), ("sum", 320)]


def test_first_right_factors_differ_between_variables():
    """Drawn from the path: the same in every process, and not the same for every variable."""
    first, again, other = (PowerSGD(2).state(path, (12, 20), "float64")["right"] for path in ("a", "a", "b"))
    assert same_bits([first, again])
    assert not np.allclose(first, other)
    assert dataclasses.replace(PowerSGD(2), rank=4).state("a", (12, 20), "float32")["right"].dtype == np.float32
