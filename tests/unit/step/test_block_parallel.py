"""Variables that are dealt out to the replicas, against as many plain Keras models, each of which trains its share."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial import selection
from dist_partial.errors import UserError
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.reductions.block_parallel import BlockParallel
from dist_partial.reductions.local_sgd import nesterov
from dist_partial.reductions.power_sgd import PowerSGD
from dist_partial.reductions.quantized import Quantized
from dist_partial.reductions.top_k import TopK
from dist_partial.selection.plan import even_shares
from dist_partial.selection.rules import Rule
from dist_partial.step import optimizers
from tests.helpers import cases
from tests.helpers.cases import copies
from tests.helpers.files import same_bits
from tests.unit.step.test_outer_step import DENSE, Local

SHARES = {2: [0, 1, 1, 1], 3: [0, 1, 1, 2], 4: [0, 1, 2, 3]}  # of kernel, bias, kernel, bias; the first is the largest


def adamw():
    return keras.optimizers.AdamW(0.01, weight_decay=0.1)  # which moves what has no gradient as well


class Reference:
    """Models that take, every few steps, of each variable the value that its owner has."""

    def __init__(self, replicas, every, clip_norm=None):
        self.replicas, self.every, self.clip_norm = replicas, every, clip_norm
        self.models = [cases.build(DENSE) for _ in range(replicas)]
        self.data = cases.batches(DENSE, "float64", 12)
        self.owners = dict(zip(selection.variable_paths(self.models[0]), SHARES[replicas], strict=True))
        self.optimizers = [adamw() for _ in self.models]
        self.moved = {}

    def variables(self, k):
        return dict(zip(self.owners, self.models[k].trainable_variables, strict=True))

    def step(self, number):
        x, y = self.data[number - 1]
        for k, model in enumerate(self.models):
            mine = [v for path, v in self.variables(k).items() if self.owners[path] == k]
            with tf.GradientTape() as tape:
                own_x, own_y = np.split(x, self.replicas)[k], np.split(y, self.replicas)[k]
                total = tf.reduce_mean(cases.loss(tf.constant(own_y), model(tf.constant(own_x), training=True)))
            gradients = tape.gradient(total, [v.value for v in mine])
            if self.clip_norm:
                gradients, _ = tf.clip_by_global_norm(gradients, self.clip_norm)
            self.optimizers[k].apply(gradients, mine)
        if number % self.every == 0:
            for path, owner in self.owners.items():
                value = self.variables(owner)[path].numpy()
                for k in range(self.replicas):
                    self.variables(k)[path].assign(value)


def local_of(strategy, reduction, **options):
    case = dataclasses.replace(DENSE, rules=[Rule(".*", optimizer=adamw, reduction=reduction)])
    return Local(strategy, case, "momentum", **options)


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_each_trains_its_share_beside_what_the_others_had(replicas, mirrored):
    cases.set_precision("float64")
    local = local_of(mirrored(replicas), BlockParallel(3), clip_norm=0.05)
    assert list(local.plan.owners(replicas).values()) == SHARES[replicas]
    reference = Reference(replicas, 3, clip_norm=0.05)
    for done in range(1, 8):
        local.go(1)
        reference.step(done)
        for path, values in local.own().items():
            for k, value in enumerate(values):
                np.testing.assert_allclose(value, reference.variables(k)[path].numpy(), rtol=1e-9, err_msg=path)
            assert same_bits(values) == (done % 3 == 0), (path, done)
    for name, slot in local.groups[0].state.items():  # what a replica does not own takes no part
        path, _, kind = name.rpartition("/")
        if kind == "velocity":
            for k, value in enumerate(copies(local.strategy, slot)):
                assert value.any() == (local.plan.owners(replicas)[path] == k), name


def test_owners_movements_reach_all_in_few_bits(mirrored):
    """What an owner has moved, and not sent yet, is its residual; an outer optimizer moves the anchors."""
    cases.set_precision("float64")
    for compressor in (Quantized(2), TopK(1 / 8, 16, 8)):
        local = local_of(mirrored(3), BlockParallel(2, compressor=compressor))
        start, moved = local.anchors(), dict.fromkeys(local.own(), 0.0)
        owners = local.plan.owners(3)
        for _ in range(3):
            local.step()
            assert local.step() == [0]
            before, own = local.anchors(), local.own()
            local.exchanges[0]()
            for path, k in owners.items():
                moved[path] = moved[path] + before[path][0] - own[path][k]
        for state, entry in zip(local.states, local.plan.trained, strict=True):
            anchors, residuals = local.anchors()[entry.path], copies(local.strategy, state["residual"])
            assert same_bits([*anchors, *local.own()[entry.path]])
            gone = start[entry.path][0] - anchors[0]
            np.testing.assert_allclose(gone + residuals[owners[entry.path]], moved[entry.path], rtol=0, atol=1e-12)
            assert not any(each.any() for k, each in enumerate(residuals) if k != owners[entry.path])


def test_outer_optimizer_and_delay_take_what_was_gathered(mirrored):
    cases.set_precision("float64")
    plain = local_of(mirrored(2), BlockParallel(2))
    outer = local_of(mirrored(2), BlockParallel(2, outer_optimizer=lambda: nesterov(0.5, 0.9)))
    late = local_of(mirrored(2), BlockParallel(2, delay=1))
    start = plain.anchors()
    for each in (plain, outer):
        each.go(2)
    late.go(3)
    for path, values in plain.anchors().items():
        whole = start[path][0] - values[0]
        np.testing.assert_allclose(start[path][0] - outer.anchors()[path][0], 0.95 * whole, rtol=1e-6)
        np.testing.assert_allclose(late.anchors()[path][0], values[0], rtol=1e-12)


def test_each_sends_as_many_bytes_as_the_largest_share(mirrored):
    cases.set_precision("float32")
    strategy = mirrored(2)
    local = local_of(strategy, BlockParallel(5), dtype="float32")
    plan = local.plan.on(hosts=1, devices=2)
    sizes = [int(np.prod(entry.shape)) for entry in plan.entries]
    largest = 4 * max(sizes[0], sum(sizes[1:]))
    [sent] = local.compiled[0].sent
    assert (sent.kind, sent.bytes) == ("gather", largest)
    assert plan.wire_bytes == plan.nic_bytes == largest / 5


@pytest.mark.parametrize(
    ("sizes", "count", "shares"),
    [
        ([], 3, []),
        ([5], 1, [0]),
        ([1, 1, 1], 3, [0, 1, 2]),
        ([9, 1, 1], 3, [0, 1, 2]),
        ([1, 1, 9], 2, [0, 0, 1]),
        ([0, 0, 0, 4], 4, [0, 1, 2, 3]),
        ([3, 3, 3, 3, 3], 2, [0, 0, 0, 1, 1]),
    ],
)
def test_shares(sizes, count, shares):
    assert even_shares(sizes, count) == shares


def test_what_cannot_be_dealt_out(mirrored):
    cases.set_precision("float32")
    with pytest.raises(UserError, match="BlockParallel deals 4 variables out to 5 replicas"):
        local_of(mirrored(2), BlockParallel(5)).plan.owners(5)
    with pytest.raises(UserError, match=r"block_parallel.compressor is PowerSGD.*a share is sent by one replica alone"):
        BlockParallel(5, compressor=PowerSGD(1))
    with pytest.raises(UserError, match=r"block_parallel\.sync_every is 0"):
        BlockParallel(0)
    with pytest.raises(UserError, match=r"block_parallel\.mix is 0\.5"):
        BlockParallel(4, delay=2, mix=0.5)

    def averaging():
        return keras.optimizers.SGD(0.1, use_ema=True)

    model = cases.build(DENSE)
    plan = selection.resolve([Rule(".*", optimizer=averaging, reduction=BlockParallel(5))], model, AllReduce())
    with pytest.raises(UserError, match=r"averages weights \(use_ema\), which BlockParallel deals out"):
        optimizers.build(plan, averaging)
