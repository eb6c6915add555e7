"""Gradients of embeddings of which a batch looks up few rows: what travels, and that it trains as one device does."""

import json

import keras
import numpy as np
import pytest

from dist_partial.data import ArraySource, Dataset, fingerprint
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.reductions.quantized import Quantized
from dist_partial.selection.rules import Rule
from dist_partial.training import loop
from tests.helpers.files import rows, state
from tests.helpers.strategies import in_process
from tests.integration.test_exchanges import settings

STEPS, VOCABULARY, WIDTH, LENGTH = 4, 5000, 8, 6


def texts() -> Dataset:
    """Ids of which some come again and again, also in one example."""
    rng = np.random.default_rng(0)
    often, any_id = (rng.integers(0, most, (48, LENGTH)) for most in (5, VOCABULARY))
    x = np.where(rng.random((48, LENGTH)) < 0.5, often, any_id)
    x, y = x.astype(np.int32), rng.integers(0, 10, 48).astype(np.int32)
    return Dataset("texts", ArraySource(x, y), ArraySource(x[:12], y[:12]), fingerprint(x, y), None)


def model() -> keras.Model:
    layers = [keras.layers.Embedding(VOCABULARY, WIDTH, name="embedding"), keras.layers.Flatten()]
    return keras.Sequential([keras.Input((LENGTH,), dtype="int32"), *layers, keras.layers.Dense(10, name="head")])


def trained(folder, count, rules, **more):
    keras.utils.clear_session(free_memory=False)
    told = settings(rules, in_process(count), STEPS, **{"precision": "float64", "model": model, "data": texts} | more)
    loop.run(told, folder)
    plan = json.loads((folder / "plan.json").read_text())
    return state(folder, STEPS), {each["path"]: each for each in plan["variables"]}, rows(folder / "metrics.jsonl")


@pytest.mark.parametrize(("count", "rule"), [(2, Rule(".*")), (3, Rule(".*", reduction=AllReduce("float32")))])
def test_lookups_travel_and_are_summed(count, rule, tmp_path):
    """Adam on one device and on several: the rows of an id that comes again are added before they are squared."""
    alone, *_ = trained(tmp_path / "alone", 1, [Rule(".*")])
    found, plan, metrics = trained(tmp_path / "several", count, [rule])
    tolerance = 1e-12 if rule.reduction is None else 1e-4
    for name in (name for name in alone if name.startswith(("variables/", "slots/"))):
        np.testing.assert_allclose(found[name], alone[name], rtol=0, atol=tolerance, err_msg=name)
    ids, each = 12 // count * LENGTH, 4 if rule.reduction else 8
    embedding = ids * (4 + WIDTH * each)
    assert plan["embedding/embeddings"]["wire_bytes_per_step"] == embedding
    assert plan["embedding/embeddings"]["nic_bytes_per_step"] == (count - 1) * embedding
    assert plan["embedding/embeddings"]["reduction"].endswith(f" of {ids} rows")
    assert metrics[0]["wire_bytes"] == embedding + each * (LENGTH * WIDTH * 10 + 10)


@pytest.mark.parametrize(
    ("rule", "more"),
    [
        (Rule("embedding/.*", rows=(0, 40)), {}),
        (Rule("embedding/.*", reduction=Quantized(4)), {}),
        (Rule(".*"), {"accumulate": 2}),
        (Rule("embedding/.*"), {"model": lambda: keras.Sequential([keras.Input((LENGTH,), dtype="int32"), *_few()])}),
    ],
)
def test_what_is_sent_whole(rule, more, tmp_path):
    """Selected rows, few bits, several micro-batches, and a vocabulary that a batch looks up most of."""
    _, plan, _ = trained(tmp_path / "run", 2, [rule, Rule(".*")] if rule.match != ".*" else [rule], **more)
    entry = plan["embedding/embeddings"]
    assert " rows" not in entry["reduction"]
    sizes = {"rows": 40 * WIDTH * 8, "few": 20 * WIDTH * 8}
    if rule.rows:
        assert entry["wire_bytes_per_step"] == sizes["rows"]
    elif "model" in more:
        assert entry["wire_bytes_per_step"] == sizes["few"]
    elif rule.reduction is None:
        assert entry["wire_bytes_per_step"] == VOCABULARY * WIDTH * 8


def _few():
    return [
        keras.layers.Lambda(lambda x: x % 20, name="few"),
        keras.layers.Embedding(20, WIDTH, name="embedding"),
        keras.layers.Flatten(),
        keras.layers.Dense(10, name="head"),
    ]
