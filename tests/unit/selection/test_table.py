"""The plan of a large model in a terminal: short, narrow, and nothing lost; and the names of what is trained."""

import dataclasses
import fnmatch
import random
import re

import pytest

from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.selection.payload import Payload
from dist_partial.selection.plan import Plan, VariablePlan
from dist_partial.selection.rules import Rule, parse_rules
from dist_partial.selection.table import plan_summary, plan_table, trained_layers

RESNET = [
    f"{layer}/{name}"
    for layer in [
        "conv1_conv",
        *(f"conv{n}_block{i}_{k}_conv" for n, c in ((2, 3), (3, 4), (4, 6)) for i in range(c) for k in (1, 2)),
        "predictions",
    ]
    for name in ("kernel", "bias")
]


def transformer(count: int) -> list[str]:
    inside = ["attention/query/kernel", "attention/value/kernel", "mlp/kernel", "norm/scale"]
    layers = [f"layer_{i}/{name}" for i in range(count) for name in inside]
    return ["embedding/embeddings", *layers, "final_norm/scale"]


FLAT = [f"{random.Random(i).getrandbits(40):x}/{name}" for i in range(60) for name in ("kernel", "bias")]
MODELS = {
    "resnet": RESNET,
    "transformer": transformer(12),
    "deep": transformer(48),
    "flat": FLAT,
    "inside": [f"outer/{path}" for path in transformer(12)],
    "long": [f"{'a_very_long_name_of_a_layer' * 3}_{i}/dense/kernel" for i in range(25)],
    "one": [f"only/kernel_{i}" for i in range(30)],
}
TABLES = {
    "all": [("train", ".*")],
    "some": [("train", ".*(value|block1_1|predictions|[02468]/).*"), ("freeze", ".*")],
    "long": [("freeze", f"nothing|{'x' * 200}"), ("train", ".*")],
}


def plan_of(paths, table) -> Plan:
    rules = parse_rules(table)
    found = {path: next(rule for rule in rules if re.fullmatch(rule.match, path)) for path in paths}
    entries = [VariablePlan(p, (i + 1, 2), "float32", None, found[p], AllReduce()) for i, p in enumerate(paths)]
    return Plan(rules, tuple(entries))


@pytest.mark.parametrize("table", sorted(TABLES))
@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_summary_is_short_and_nothing_is_lost(model, table):
    plan = plan_of(MODELS[model], TABLES[table])
    lines = plan_summary(plan, hosts=1).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) <= 2 + 32 + len(plan.rules) + 4
    columns = [match.span() for match in re.finditer("-+", lines[1])]
    rows = [[line[start:end].strip() for start, end in columns] for line in lines[2 : -len(plan.rules) - 4]]
    left = list(plan.entries)
    for path, variables, parameters, trained, rule, size in rows:
        # Of rows that begin alike, what each has follows from how it is treated.
        of = [e for e in left if e.trained == (trained == "yes") and plan.rules[int(rule) - 1] is e.rule]
        of = [e for e in of if fnmatch.fnmatchcase(e.path, path) or (path.endswith("...") and path[:-3] in e.path)]
        of = of[: int(variables)]
        left = [entry for entry in left if entry not in of]
        if not path.endswith("..."):
            assert sum(entry.parameters for entry in of) == int(parameters.replace(",", ""))
            assert sum(plan.bytes_of(entry) for entry in of) == int(size.replace(",", ""))
    assert left == []
    assert sum(int(row[2].replace(",", "")) for row in rows) == sum(entry.parameters for entry in plan.entries)
    assert sum(int(row[5].replace(",", "")) for row in rows) == plan.wire_bytes
    assert f"{len(plan.entries)} variables, one a line in plan.txt of the run folder" in lines
    assert len(plan_table(plan, hosts=1).splitlines()) == len(plan.entries) + 2 + 3
    assert lines[-3:] == plan_table(plan, hosts=1).splitlines()[-3:]
    shown = [line for line in lines if line.startswith("rule ")]
    for number, (rule, line) in enumerate(zip(plan.rules, shown, strict=True), 1):
        used = any(entry.rule is rule and entry.trained for entry in plan.entries)
        assert line.startswith(f"rule {number}: {'train' if rule.train else 'freeze'} ")
        assert line.endswith(": all-reduce") == used


def test_blocks_are_rows():
    def rows(model):
        return [line.split()[:2] for line in plan_summary(plan_of(MODELS[model], TABLES["all"]), 1).splitlines()[2:-5]]

    assert rows("transformer")[:2] == [["embedding/embeddings", "1"], ["layer_0/*", "4"]]
    assert [row[0] for row in rows("resnet")][1:4] == ["conv2_block0_*", "conv2_block1_*", "conv2_block2_*"]
    assert ["layer_*", "192"] in rows("deep")
    assert rows("inside")[1] == ["outer/layer_0/*", "4"]


def test_a_small_model_is_shown_whole():
    for count, whole in ((20, True), (21, False)):
        plan = plan_of([f"layer_{i}/kernel" for i in range(count)], TABLES["all"])
        assert (plan_summary(plan, 1) == plan_table(plan, 1)) == whole


def test_statistics_are_in_the_summary():
    plan = plan_of(MODELS["transformer"], TABLES["all"])
    plan = dataclasses.replace(plan, statistics=(Payload("sum", 100), Payload("sum", 40, every=10)))
    lines = [line.split() for line in plan_summary(plan, 1).splitlines()]
    assert ["(statistics)", "every", "step", "100"] in lines
    assert ["(statistics)", "every", "10", "steps", "4"] in lines


@pytest.mark.parametrize(
    ("paths", "pattern", "names"),
    [
        (["a/kernel", "a/bias", "b/kernel"], "a/.*", "a"),
        (["a/kernel", "a/bias", "b/kernel"], "a/bias|b/.*", "a (in part), b"),
        (["a/kernel", "a/bias", "b/kernel"], ".*", "a, b"),
        (["net/a/kernel", "net/b/kernel"], "net/b/.*", "b"),
        (transformer(12), "layer_1[01]/.*|final_norm/.*", "layer_10, layer_11, final_norm"),
        (transformer(12), ".*", "all 14 layers"),
        (
            transformer(12),
            "layer_.*",
            "layer_0, layer_1, layer_2, layer_3, layer_4, layer_5 and 6 more of 14 layers",
        ),
        ([f"{'x' * 90}_{i}/kernel" for i in range(3)], f"{'x' * 90}_[01]/.*", f"{'x' * 90}_0 and 1 more of 3 layers"),
    ],
)
def test_layers_are_named(paths, pattern, names):
    assert trained_layers(plan_of(paths, [Rule(pattern), ("freeze", ".*")])) == names


def test_a_phase_names_the_layers_that_are_on():
    plan = plan_of(transformer(3), TABLES["all"])
    units = [("phases 1+2", ["final_norm/scale"]), ("phase 2", [p for p in transformer(3) if "layer_2" in p])]
    assert trained_layers(plan.divided(units).only(["phases 1+2"])) == "final_norm"
    assert trained_layers(plan.divided(units).only(["phases 1+2", "phase 2"])) == "layer_2, final_norm"
