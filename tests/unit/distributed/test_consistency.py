"""Whether all workers run the same: several in one process, each in its own thread, over loopback."""

import functools
import json
import random
import shutil

import numpy as np
import pytest

from dist_partial.distributed import consistency, rendezvous
from dist_partial.distributed.tcp_backend import TCPBackend
from dist_partial.errors import Fault, UserError
from tests import ROOT
from tests.helpers.threads import at_once
from tests.helpers.workers import loopback

FACTS = {
    "versions": {"python": "3.12.1", "dist_partial's source": "5f0c"},
    "bindings": {"run.steps": "100", "wörter/Rule.match": "'größe/.*'", "snow ☃": "'雪'"},
    "rules": ["train a/.*", "freeze .*"],
    "optimizers": [{"class": "Adam", "learning_rate": 1e-3, "decay": None, "schedule": [0, [1, 2.5]]}],
    "empty": {},
    "digest": "c0639e03e902749f",
}


@pytest.fixture
def outcomes():
    """Connects as many workers as there are facts, and gives what each of them raises or returns."""
    made = []

    def check(*facts):
        workers = loopback(len(facts))

        def work(rank):
            backend = TCPBackend(rank, workers, rendezvous.connect(rank, workers, 20), 60.0)
            made.append(backend)
            try:
                return consistency.check(backend, facts[rank])
            except UserError as error:
                return str(error)

        return workers, at_once([functools.partial(work, rank) for rank in range(len(facts))])

    yield check
    for backend in made:
        backend.close()


def copied(facts, *place_and_value):
    """The facts with another value at a place, which is then missing if no value is given."""
    *place, value = place_and_value
    facts = json.loads(json.dumps(facts))
    parent = functools.reduce(lambda each, key: each[key], place[:-1], facts)
    if value is missing:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    return facts


missing = object()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_equal_facts_pass(outcomes, count):
    reordered = dict(reversed(FACTS.items()))  # which is no difference
    assert outcomes(*[FACTS, reordered, FACTS][:count])[1] == [None] * count


def test_one_worker_that_differs_is_named_on_all_of_them(outcomes):
    workers, found = outcomes(FACTS, FACTS, copied(FACTS, "bindings", "run.steps", "200"), FACTS)
    assert len(set(found)) == 1
    assert f"worker 2 ({workers[2]}) runs something else than worker 0 ({workers[0]}): " in found[0]
    assert "bindings.run.steps: '200' against '100'" in found[0]
    assert "same files, data and versions" in found[0] and "\n" not in found[0]
    assert "worker 1" not in found[0] and "worker 3" not in found[0]


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        (copied(FACTS, "versions", "python", "3.12.2"), "versions.python: '3.12.2' against '3.12.1'"),
        (copied(FACTS, "bindings", "wörter/Rule.match", "'groß'"), "wörter/Rule.match: \"'groß'\" against \"'größe"),
        (copied(FACTS, "bindings", "snow ☃", "'氷'"), "bindings.snow ☃: \"'氷'\" against \"'雪'\""),
        (copied(FACTS, "bindings", "run.steps", missing), "bindings.run.steps: None against '100'"),
        (copied(FACTS, "bindings", "run.seed", "1"), "bindings.run.seed: '1' against None"),
        (copied(FACTS, "optimizers", 0, "schedule", 1, 1, 2.25), "optimizers.0.schedule.1.1: 2.25 against 2.5"),
        (copied(FACTS, "optimizers", 0, "decay", 0.0), "optimizers.0.decay: 0.0 against None"),
        (copied(FACTS, "rules", [*FACTS["rules"], "x"]), "rules.2: 'x' against None"),
        (copied(FACTS, "rules", FACTS["rules"][:1]), "rules.1: None against 'freeze .*'"),
        (copied(FACTS, "rules", []), "rules.0: None against 'train a/.*'; rules.1: None against"),
        (copied(FACTS, "rules", "train a/.*"), "rules: 'train a/.*' against ['train a/.*', 'freeze .*']"),
        (copied(FACTS, "empty", []), "empty: [] against {}"),
        (copied(FACTS, "digest", "55167a7fdd35c9b4"), "digest differs; start all"),
    ],
)
def test_names_and_values_are_shown(outcomes, changed, shown):
    _, (first, second) = outcomes(FACTS, changed)
    assert first == second and shown in first


@pytest.mark.parametrize(
    "changed",
    [
        copied(FACTS, "rules", [*FACTS["rules"], None]),  # None is not the same as nothing
        copied(FACTS, "optimizers", 0, "decay", missing),
        copied(FACTS, "optimizers", 0, "schedule", 0, False),  # nor is False 0, which Python calls equal
    ],
)
def test_differences_that_look_equal_are_some_too(outcomes, changed):
    _, (first, second) = outcomes(FACTS, changed)
    assert first == second and first is not None


def test_many_differences_are_shortened(outcomes):
    many = {"initial values": {f"{i} layer_{i}/kernel": f"{i:016x}" for i in range(500)}}
    others = {"initial values": {name: value[::-1] + "!" for name, value in many["initial values"].items()}}
    _, (first, second) = outcomes(many, others)
    assert first == second and first.count("layer_") == 3 and "and 497 more" in first


def test_a_long_value_is_shortened(outcomes):
    """As of a model whose configuration one worker has and the other one lacks."""
    _, (first, second) = outcomes({"model_config": None}, {"model_config": {str(i): i for i in range(10**4)}})
    assert first == second and "model_config" in first and len(first) < 2000


def test_facts_of_some_megabytes(outcomes):
    generator = random.Random(0)
    facts = {f"{i}": generator.randbytes(500).hex() for i in range(3000)}
    assert outcomes(facts, facts, facts)[1] == [None] * 3
    _, found = outcomes(facts, facts, copied(facts, "2999", "x"))
    assert len(set(found)) == 1 and "2999: 'x' against" in found[0]


def test_what_ends_a_worker_before_it_compares_is_told_to_the_others():
    workers = loopback(3)

    def work(rank):
        backend = TCPBackend(rank, workers, rendezvous.connect(rank, workers, 20), 60.0)
        if rank == 1:
            return backend.close(UserError("run.rules match nothing"))
        try:
            with pytest.raises(UserError) as raised:
                consistency.check(backend, FACTS)
            return str(raised.value)
        finally:
            backend.close()

    expected = f"worker 1 ({workers[1]}): run.rules match nothing"
    assert at_once([functools.partial(work, rank) for rank in range(3)]) == [expected, None, expected]


def test_everyone_s_value_in_rank_order():
    workers = loopback(3)

    def work(rank):
        backend = TCPBackend(rank, workers, rendezvous.connect(rank, workers, 20), 60.0)
        try:
            return consistency.everyone(backend, (-1, 10**12, 0)[rank]), consistency.names(backend, [0, 2])
        finally:
            backend.close()

    named = f"worker 0 ({workers[0]}), worker 2 ({workers[2]})"
    assert at_once([functools.partial(work, rank) for rank in range(3)]) == [([-1, 10**12, 0], named)] * 3
    assert consistency.everyone(None, 7) == [7]


def test_what_workers_swap_in_every_step_is_not_kept():
    workers = loopback(2)

    def work(rank):
        backend = TCPBackend(rank, workers, rendezvous.connect(rank, workers, 20), 60.0)
        try:
            sizes = []
            for step in range(200):
                consistency.everyone(backend, step)
                backend.sum(np.ones(4, np.float32))
                sizes.append(len(backend._ops))
            return sizes[100], sizes[-1]
        finally:
            backend.close()

    for before, after in at_once([functools.partial(work, rank) for rank in range(2)]):
        assert after <= before + 10  # the values' lengths may differ


def test_a_worker_that_is_lost_meanwhile_is_a_fault():
    workers = loopback(2)

    def work(rank):
        backend = TCPBackend(rank, workers, rendezvous.connect(rank, workers, 20), 60.0)
        try:
            if rank == 0:
                with pytest.raises(Fault, match=r"worker 1 \(127\.0\.0\.1:\d+\) is gone"):
                    consistency.check(backend, FACTS)
        finally:
            backend.close()

    at_once([functools.partial(work, rank) for rank in range(2)])


def test_versions_change_with_the_source(tmp_path, monkeypatch):
    """With any line of any file; what Python itself writes beside them does not count."""
    package = tmp_path / "dist_partial"
    shutil.copytree(ROOT / "dist_partial", package, ignore=shutil.ignore_patterns("__pycache__"))
    here = consistency.versions()
    assert {"python", "tensorflow", "keras", "numpy"} < set(here)
    monkeypatch.setattr(consistency, "__file__", str(package / "distributed" / "consistency.py"))
    assert consistency.versions() == here
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "consistency.cpython-311.pyc").write_bytes(b"x")
    assert consistency.versions() == here
    seen = [here]
    for path in (package / "run.py", package / "data" / "batches.py", package / "models" / "more.py"):
        with open(path, "a") as file:
            file.write("# another line\n")
        seen.append(consistency.versions())
        assert {name for name in here if seen[-1][name] != here[name]} == {"dist_partial's source"}
    assert len({tuple(each.items()) for each in seen}) == 4
