"""States that are held in memory, against checkpoints of the same."""

import keras
import numpy as np
import pytest

from dist_partial import checkpoints
from dist_partial.config.settings import Settings
from dist_partial.data import ArraySource, Dataset, fingerprint
from dist_partial.distributed.per_replica import PerReplica
from dist_partial.distributed.replicas import create
from dist_partial.errors import Fault
from dist_partial.reductions import TopK
from dist_partial.training import state
from dist_partial.training.build import build
from dist_partial.training.snapshots import Snapshots
from tests.helpers.files import same_bits


def data():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 4)).astype(np.float32), rng.integers(0, 2, 8).astype(np.int32)
    return Dataset("points", ArraySource(x, y), ArraySource(x, y), fingerprint(x, y))


def model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.5), keras.layers.Dense(3)], name="model")


@pytest.fixture
def trainer():
    """Of two replicas, whose values are all different from each other."""
    settings = Settings([("train", ".*")], model, data, reduction=TopK(0.5), global_batch=4)
    trainer = build(settings, create("mirrored", cpu=2))
    draw(trainer, 0)
    return trainer


def draw(trainer, seed):
    rng = np.random.default_rng(seed)
    with trainer.replicas.strategy.scope():
        for name, variable in trainer.state().variables.items():
            if not name.startswith("generators/"):
                variable.assign(rng.normal(size=variable.shape).astype(np.float32))


def saved(trainer):
    return checkpoints.read(trainer.state().variables, trainer.replicas.gather)


def same(found, expected):
    return found.keys() == expected.keys() and all(same_bits([found[name], expected[name]]) for name in expected)


def test_a_snapshot_is_gone_back_to(trainer):
    snapshots, before = Snapshots(trainer), saved(trainer)
    snapshot = snapshots.take(trainer.state(), np.zeros(2))
    draw(trainer, 1)
    assert not same(saved(trainer), before)
    snapshots.go_back(snapshot)
    assert same(saved(trainer), before)


def test_arrays_are_those_of_a_checkpoint(trainer):
    snapshots = Snapshots(trainer)
    snapshot = snapshots.take(trainer.state(), np.zeros(2))
    assert same(snapshots.arrays(snapshot, {0: snapshots.own()}, workers=1, rank=0), saved(trainer))


@pytest.mark.parametrize("kind", ["sum", "chunks"])
@pytest.mark.parametrize("lost", [0, 1])
def test_of_a_lost_worker_only_the_chunks_keep_their_place(trainer, lost, kind, monkeypatch):
    """What is kept in chunks is one array, of which each replica has a part: the lost part is zeros."""
    monkeypatch.setattr(state, "WHEN_FEWER", {"residual": kind})
    snapshots, whole = Snapshots(trainer), saved(trainer)
    snapshot = snapshots.take(trainer.state(), np.zeros(2))
    found = snapshots.arrays(snapshot, {1 - lost: snapshots.own()}, workers=2, rank=0)
    kinds = {}
    for name, variable in trainer.state().variables.items():
        kinds[name] = variable.when_fewer if isinstance(variable, PerReplica) else ""
        expected = whole[name]
        if kinds[name] == "chunks":
            rows = [np.zeros_like(expected), expected]
            expected = np.concatenate(rows if lost == 0 else rows[::-1])
        if not name.startswith("generators/"):
            assert same_bits([found[name], expected]), name
    assert {*kinds.values()} == {kind, ""}


def test_what_a_worker_alone_has_is_given_back(trainer):
    snapshots, before = Snapshots(trainer), saved(trainer)
    own = snapshots.own()
    draw(trainer, 1)
    snapshots.take_own(b"")
    drawn = saved(trainer)
    snapshots.take_own(own)
    for name, variable in trainer.state().variables.items():
        expected = before if isinstance(variable, PerReplica) else drawn
        assert same_bits([saved(trainer)[name], expected[name]]), name


def test_another_worker_takes_a_snapshot(trainer):
    """Of what the other alone had it has zeros: it was not sent yet."""
    snapshots, before = Snapshots(trainer), saved(trainer)
    rows = [{"step": 5, "split": "train", "loss": 0.5}]
    packed = snapshots.packed(snapshots.take(trainer.state(), np.array([1.0, 0.0]), np.arange(3.0), rows), rank=0)
    draw(trainer, 1)
    found = snapshots.unpacked(packed)
    assert found.votes.tolist() == [1, 0] and found.sums.tolist() == [0, 1, 2] and found.rows == rows
    for name, variable in trainer.state().variables.items():
        expected = np.zeros_like(before[name]) if isinstance(variable, PerReplica) else before[name]
        assert same_bits([saved(trainer)[name], expected]), name
    assert snapshots.packed(found, rank=0) == packed


def test_another_state_is_refused(trainer):
    snapshots = Snapshots(trainer)
    packed = snapshots.packed(snapshots.take(trainer.state(), np.zeros(2)), rank=0)
    with pytest.raises(Fault, match="another state"):
        snapshots.unpacked(packed.replace(b"model", b"medel").replace(b"dense", b"danse"))
