"""Rules against models: what a table selects, what it costs, and every way in which it is wrong."""

import dataclasses
import json
import xml.etree.ElementTree

import keras
import numpy as np
import pytest

from dist_partial.errors import UserError
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.reductions.local_sgd import LocalSGD
from dist_partial.reductions.quantized import Quantized
from dist_partial.selection.paths import own_names, paths_of
from dist_partial.selection.payload import Payload, Peers
from dist_partial.selection.resolve import resolve
from dist_partial.selection.rules import Rule, parse_rules
from dist_partial.selection.table import plan_table
from dist_partial.step import optimizers
from tests.helpers.user_module import Twins

PATHS = ["dense1/kernel", "dense1/bias", "dense2/kernel", "dense2/bias"]


def sequential(name: str = "net", wide: int = 6) -> keras.Model:
    layers = [keras.Input((3,)), keras.layers.Dense(wide, name="dense1"), keras.layers.Dense(2, name="dense2")]
    return keras.Sequential(layers, name=name)


def functional() -> keras.Model:
    x = keras.Input((3,))
    return keras.Model(x, keras.layers.Dense(2, name="dense2")(keras.layers.Dense(6, name="dense1")(x)), name="net")


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.one = keras.layers.Dense(6, name="dense1")
        self.two = keras.layers.Dense(2, name="dense2")

    def call(self, x):
        return self.two(self.one(x))


def around() -> keras.Model:
    """A Sequential around a functional model, before whose paths Keras does not put the Sequential's name."""
    x = keras.Input((3,))
    inner = keras.Model(x, keras.layers.Dense(6, name="dense1")(x), name="inner")
    return keras.Sequential([keras.Input((3,)), inner, keras.layers.Dense(2, name="dense2")])


def called(model: keras.Model) -> keras.Model:
    model(np.zeros([1, 3], np.float32))
    return model


def plan_of(table, model=None):
    return resolve(table, model or sequential(), AllReduce())


def trained_paths(table, model=None) -> set[str]:
    return {entry.path for entry in plan_of(table, model).trained}


@pytest.mark.parametrize(
    "make",
    [sequential, lambda: sequential(name=None), functional, lambda: called(Subclassed()), around],
    ids=["sequential", "unnamed", "functional", "subclassed", "around a functional"],
)
def test_paths_are_without_the_models_own_name(make):
    assert [entry.path for entry in plan_of([("train", ".*")], make()).entries] == PATHS


@pytest.mark.parametrize(
    ("table", "trained"),
    [
        ([("train", r"dense[12]/kernel"), ("freeze", r".*")], {"dense1/kernel", "dense2/kernel"}),
        ([("train", r"dense1/kernel:0"), ("freeze", r".*")], {"dense1/kernel"}),
        ([("train", r"dense1/kernel:0|dense2/bias"), ("freeze", r".*:0")], {"dense1/kernel", "dense2/bias"}),
        ([("freeze", r"dense1/.*"), ("train", r".*")], {"dense2/kernel", "dense2/bias"}),
        ([("freeze", r".*/bias"), ("train", r"dense1/.*"), ("freeze", r".*")], {"dense1/kernel"}),
        ([("train", r"(?!dense1).*"), ("freeze", r".*")], {"dense2/kernel", "dense2/bias"}),
        ([Rule(r"dense2/bias"), ("freeze", r".*")], {"dense2/bias"}),
        ((["train", r".*"],), set(PATHS)),
    ],
)
def test_first_match_wins(table, trained):
    assert trained_paths(table) == trained


def test_only_trainable_variables_are_candidates():
    layers = [keras.Input((3,)), keras.layers.BatchNormalization(name="norm"), keras.layers.Dropout(0.5)]
    model = keras.Sequential([*layers, keras.layers.Dense(2, name="head")])
    paths = [entry.path for entry in plan_of([("train", r".*")], model).entries]
    assert paths == ["norm/gamma", "norm/beta", "head/kernel", "head/bias"]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([("train", r"dense1/kernal"), ("freeze", r".*")], ["rule 1", "no variable", "'dense1/kernel'"]),
        ([("train", r"dense1"), ("freeze", r".*")], ["rule 1", "'dense1'", "no variable", "'dense1/bias'"]),
        ([("train", r"net/dense1/kernel"), ("freeze", r".*")], ["rule 1", "no variable", "'dense1/kernel'"]),
        ([("train", r"dense1/kernel"), ("freeze", r"dense2/.*")], ["'dense1/bias'", "no rule", "'dense1/kernel'"]),
        ([("freeze", r".*")], ["nothing", "4 variables"]),
        ([("train", r"dense(1/kernel"), ("freeze", r".*")], ["rule 1", "'dense(1/kernel'", "regular expression"]),
        ([("freeze", r".*"), ("train", r"dense1/kernel")], ["rule 2", "rule 1 ('.*')", "first match"]),
        ([("train", r"dense1/.*"), ("train", r"dense1/bias"), ("freeze", r".*")], ["rule 2", "'dense1/bias'"]),
        ([], ["rules is []", "write a list such as [('train'"]),
        ("train .*", ["rules is 'train .*'", "a str and no list", "[('train'"]),
        ([("learn", r".*")], ["rule 1", "'learn'", "'train'", "'freeze'"]),
        ([("train",)], ["rule 1", "('train',)"]),
        ([("train", 3)], ["rule 1", "3", "string"]),
        ([Rule(r".*", rows=(0, 3))], ["rule 1", "(0, 3)", "'dense2/bias'", "(2,)"]),
    ],
)  # fmt: skip
def test_errors_name_the_rule_and_what_is_near(table, words):
    with pytest.raises(UserError) as raised:
        plan_of(table)
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message, (word, message)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"match": 3}, ["rule 3: match is 3", "text"]),
        ({"match": "dense(1"}, ["Rule.match", "'dense(1'", "regular expression"]),
        ({"train": "no"}, ["train is 'no'", "True or False"]),
        ({"train": False, "learning_rate": 0.1}, ["freezes", "learning_rate"]),
        ({"train": False, "rows": (0, 1)}, ["freezes", "rows"]),
        ({"learning_rate": 0.0}, ["learning_rate is 0.0", "above 0"]),
        ({"learning_rate": float("nan")}, ["learning_rate is nan", "above 0"]),
        ({"learning_rate": True}, ["learning_rate is True", "above 0"]),
        ({"learning_rate": "a"}, ["learning_rate is 'a'", "above 0", "schedule"]),
        ({"learning_rate": keras.optimizers.schedules.CosineDecay}, ["learning_rate is <class", "schedule"]),
        ({"optimizer": "adam"}, ["'adam'", "without ()"]),
        ({"optimizer": keras.optimizers.SGD()}, ["optimizer is <", "without ()"]),
        ({"reduction": "every step"}, ["reduction is 'every step'", "AllReduce()"]),
        ({"reduction": AllReduce}, ["reduction is <class", "()"]),
        ({"rows": (2, 2)}, ["(2, 2)", "start < stop"]),
        ({"rows": (-1, 2)}, ["(-1, 2)"]),
        ({"rows": (0, 1.5)}, ["rows is (0, 1.5)"]),
        ({"rows": 3}, ["rows is 3", "(start, stop)"]),
        ({"rows": np.zeros([9, 9])}, ["rows is array("]),
        ({"lora": 0}, ["lora is 0", "rank"]),
        ({"lora": 2, "rows": (0, 2)}, ["lora", "rows has no use"]),
    ],
)
def test_a_rule_is_checked_where_it_is_made(arguments, words):
    with pytest.raises(UserError) as raised:
        Rule(**{"match": "dense1/.*", **arguments})
    message = str(raised.value)
    assert "\n" not in message and message.startswith("Rule.match" if "Rule.match" in words else "rule ")
    for word in words:
        assert word in message, (word, message)


def test_the_number_of_variables_is_in_the_singular_where_there_is_one():
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1, use_bias=False)])
    with pytest.raises(UserError, match=r"the rules train nothing: 1 variable frozen; add"):
        plan_of([("freeze", ".*")], model)


def test_an_unmatched_rule_shows_the_nearest_paths_first():
    with pytest.raises(UserError) as raised:
        plan_of([("train", r"dense2/kernal"), ("freeze", r".*")])
    assert str(raised.value).index("'dense2/kernel'") < str(raised.value).index("'dense1/kernel'")


def test_two_variables_with_one_path():
    with pytest.raises(UserError, match=r"2 variables have the path 'same/kernel'"):
        plan_of([("train", r".*")], called(Twins()))


def test_a_model_without_trainable_variables():
    model = sequential()
    model.trainable = False
    with pytest.raises(UserError, match="'net' has no trainable variables"):
        plan_of([("train", r".*")], model)


def test_equal_lines_are_lines_of_their_own():
    """A table may hold one Rule object twice: the second is unreachable, and not mistaken for the first."""
    rule = Rule(r".*")
    with pytest.raises(UserError, match=r"rule 2 .* never applies: rule 1"):
        plan_of([rule, rule])
    assert len({id(parsed) for parsed in parse_rules([rule, rule])}) == 2


def test_groups_follow_the_table_and_each_has_its_optimizer_and_rate():
    table = [
        Rule(r"dense2/kernel", optimizer=keras.optimizers.SGD, learning_rate=0.5),
        Rule(r"dense2/bias", learning_rate=keras.optimizers.schedules.ExponentialDecay(0.25, 10, 0.5)),
        Rule(r"dense1/kernel", optimizer=lambda: keras.optimizers.SGD(0.125, momentum=0.9)),
        Rule(r"dense1/bias", train=False),
    ]
    plan = plan_of(table)
    assert [entry.path for entry in plan.trained] == ["dense2/kernel", "dense2/bias", "dense1/kernel"]
    groups = optimizers.build(plan, lambda **kw: keras.optimizers.Adam(**{"learning_rate": 1.0, **kw}))
    assert [type(group.optimizer).__name__ for group in groups] == ["SGD", "Adam", "SGD"]
    assert [float(group.optimizer.learning_rate) for group in groups] == [0.5, 0.25, 0.125]
    slots = {name for group in groups for name in group.state if not name.startswith("group_")}
    assert slots == {"dense2/bias/momentum", "dense2/bias/velocity", "dense1/kernel/momentum"}
    before = [entry.variable.numpy() for entry in plan.trained]
    gradients = [np.full(entry.shape, 2.0, np.float32) for entry in plan.trained]
    optimizers.apply(groups, gradients)
    # Plain SGD moves by rate x gradient, Adam's first step by the rate, momentum's first step as plain SGD's.
    moved = [old - entry.variable.numpy() for old, entry in zip(before, plan.trained, strict=True)]
    for move, expected in zip(moved, [0.5 * 2, 0.25, 0.125 * 2], strict=True):
        np.testing.assert_allclose(move, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (lambda: None, "None"),
        (lambda: keras.optimizers.Adam(lr=0.1), "lr"),
        (lambda: keras.optimizers.SGD(gradient_accumulation_steps=2), "run.accumulate"),
        (lambda: keras.optimizers.SGD(loss_scale_factor=2.0), "run.precision"),
    ],
)
def test_optimizers_that_cannot_be_used(factory, words):
    plan = plan_of([Rule(r"dense2/.*", optimizer=factory), ("freeze", r".*")])
    with pytest.raises(UserError, match=r"the optimizer of rule 'dense2/\.\*'") as raised:
        optimizers.build(plan, keras.optimizers.Adam)
    assert words in str(raised.value)


def test_rows_have_slots_and_bytes_of_their_own():
    plan = plan_of([Rule(r"dense1/kernel", rows=(1, 3)), ("freeze", r".*")])
    (entry,) = plan.trained
    assert (entry.trained_shape, entry.trained_parameters, entry.payloads(Peers())[0].bytes) == ((2, 6), 12, 48)
    (group,) = optimizers.build(plan, keras.optimizers.Adam)
    assert {tuple(v.shape) for name, v in group.state.items() if name.startswith("dense1")} == {(2, 6)}
    assert [tuple(member.variable.shape) for member in group.members] == [(2, 6)]


TABLES = {
    "kernels": ([("train", r"dense[12]/kernel"), ("freeze", r".*")], [3 * 6, 0, 6 * 2, 0], [4, 0, 4, 0]),
    "all": ([("train", r".*")], [18, 6, 12, 2], [4, 4, 4, 4]),
    "rows": ([Rule(r"dense2/kernel", rows=(4, 6)), ("freeze", r".*")], [0, 0, 2 * 2, 0], [0, 0, 4, 0]),
    "wire dtype": (
        [Rule(r"dense1/.*", reduction=AllReduce("bfloat16")), Rule(r".*/kernel"), ("freeze", r".*")],
        [18, 6, 12, 0],
        [2, 2, 4, 0],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_plan_json_and_table(name):
    """Parameters and bytes against counts made by hand for kernels 3 x 6 and 6 x 2 in float32."""
    table, parameters, element = TABLES[name]
    plan = plan_of(table)
    wire = [count * size for count, size in zip(parameters, element, strict=True)]
    content = json.loads(json.dumps(plan.to_json()))
    assert [v["path"] for v in content["variables"]] == PATHS
    assert [v["shape"] for v in content["variables"]] == [[3, 6], [6], [6, 2], [2]]
    assert (
        {v["dtype"] for v in content["variables"]} == {v["stored_dtype"] for v in content["variables"]} == {"float32"}
    )
    assert {v["unit"] for v in content["variables"]} == {None}
    assert [v["trained"] for v in content["variables"]] == [count > 0 for count in parameters]
    assert [v["reduction"] is not None for v in content["variables"]] == [count > 0 for count in parameters]
    assert [v["wire_bytes_per_step"] for v in content["variables"]] == wire
    assert content["trained_parameters"] == sum(parameters)
    assert content["total_parameters"] == 38
    assert content["wire_bytes_per_step"] == sum(wire)
    assert content["full_wire_bytes_per_step"] == 38 * 4

    header, _, *lines, trained, payload, total = plan_table(plan, hosts=1).splitlines()
    assert header.split()[:3] == ["path", "shape", "trained"]
    assert [line.split()[0] for line in lines] == PATHS
    assert [line.split()[1] for line in lines] == ["3x6", "6", "6x2", "2"]
    assert [int(line.split()[-1]) for line in lines] == wire
    assert trained == f"trained: {sum(parameters)} of 38 parameters ({sum(parameters) / 38:.2%})"
    assert payload == f"payload: {sum(wire)} of 152 bytes a step and replica"
    would = "nothing is sent here; each of 2 workers would send"
    assert total == f"{would} {sum(wire)} of 152 bytes a step ({sum(wire) / 152:.2%})"
    rules = {v["path"]: v["rule"] for v in content["variables"]}
    assert all(rules[line.split()[0]] in line for line in lines)


def test_plan_json_has_the_units_of_what_is_trained():
    plan = plan_of([("train", r".*/kernel"), ("freeze", r".*")])
    content = plan.divided([("low", ["dense1/kernel"]), ("high", ["dense2/kernel"])]).to_json()
    assert [v["unit"] for v in content["variables"]] == ["low", None, "high", None]


def test_what_tracing_shows_is_in_the_plan():
    plan = plan_of([("train", r".*")]).traced(["dense1/bias"], [Payload("sum", 100)])
    content = plan.to_json()
    assert content["wire_bytes_per_step"] == (38 - 6) * 4 + 100
    assert content["statistics_wire_bytes_per_step"] == 100
    assert content["variables"][1]["wire_bytes_per_step"] == 0
    table = plan_table(plan, hosts=2).splitlines()
    assert "no gradient" in table[3]
    assert table[6].split() == ["(statistics)", "every", "step", "100"]


class Gathered:
    """Says that it gathers 12 bytes."""

    shared = True

    def payloads(self, shape, dtype, peers):
        return (Payload("gather", 12),)


@pytest.mark.parametrize("workers", [2, 3, 16])
def test_bytes_at_the_network_interface(workers):
    """By arithmetic: of a sum 2 (N-1)/N of the payload leave each worker, of a gather N-1 times the payload."""
    table = [Rule("dense1/kernel", reduction=Gathered()), Rule("dense1/bias", reduction=LocalSGD(3)), Rule(".*")]
    plan = dataclasses.replace(plan_of(table), workers=workers)
    gathered = 12
    summed = 6 * 4 / 3 + (12 + 2) * 4
    of_sum = 2 * (workers - 1) / workers
    content = plan.to_json()
    assert content["wire_bytes_per_step"] == gathered + summed
    assert content["workers"] == workers
    assert content["nic_bytes_per_step"] == pytest.approx((workers - 1) * gathered + of_sum * summed, rel=1e-15)
    assert content["full_nic_bytes_per_step"] == pytest.approx(of_sum * 152, rel=1e-15)
    share = f"{content['nic_bytes_per_step'] / content['full_nic_bytes_per_step']:.2%}"
    last = plan_table(plan, hosts=workers).splitlines()[-1]
    assert last.startswith(f"at the network interface of each of {workers} workers: ") and share in last


@pytest.mark.parametrize(("workers", "share"), [(2, 12.7), (4, 12.7), (16, 12.7)])
def test_four_bits_among_many_workers(workers, share):
    """4 bits a value and 16 a scale for 256 of them, of 32 bits, among any number: against a sum of everything."""
    model = keras.Sequential([keras.Input((256,)), keras.layers.Dense(1000, use_bias=False)])
    plan = dataclasses.replace(resolve([("train", ".*")], model, Quantized(4)), workers=workers)
    assert 100 * plan.nic_bytes / plan.full_nic_bytes == pytest.approx(share, abs=0.05)


def test_a_last_line_that_freezes_the_rest_may_find_nothing_left():
    """As where the factory has frozen the base already; any other line that never applies is a mistake."""
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, name="base"), keras.layers.Dense(1, name="head")]
    )
    model.layers[0].trainable = False
    plan = plan_of([("train", r"head/.*"), ("freeze", r".*")], model)
    assert [entry.path for entry in plan.trained] == ["head/kernel", "head/bias"]
    for table in ([("train", r"head/.*"), ("freeze", r"head/bias")], [("train", ".*"), ("train", ".*")]):
        with pytest.raises(UserError, match="never applies"):
            plan_of(table, model)


def tower(name: str, inner: str | None = None) -> keras.Model:
    x = keras.Input((3,))
    y = tower(inner)(x) if inner else keras.layers.BatchNormalization(name="norm")(x)
    return keras.Model(x, keras.layers.Dense(3, name="out")(y), name=name)


def towers(*made: keras.Model) -> keras.Model:
    x = keras.Input((3,))
    return keras.Model(x, keras.layers.Dense(1, name="head")(keras.layers.Add()([each(x) for each in made])))


def test_two_towers_of_functional_layers_are_told_apart():
    """Keras gives both the same paths; one tower alone keeps those that it has always had."""
    alone = towers(tower("left"), keras.Sequential([keras.layers.Dense(3, name="out")], name="right"))
    assert [entry.path for entry in plan_of([("train", ".*")], alone).entries] == [
        *("norm/gamma", "norm/beta", "out/kernel", "out/bias"),
        *("right/out/kernel", "right/out/bias", "head/kernel", "head/bias"),
    ]
    model = towers(tower("left"), tower("right", inner="deep"))
    assert trained_paths([("train", r"right/deep/.*"), ("freeze", r".*")], model) == {
        f"right/deep/{name}" for name in ("norm/gamma", "norm/beta", "out/kernel", "out/bias")
    }
    means = [v for v in model.variables if v.name == "moving_mean"]
    assert paths_of(model, means) == ["left/norm/moving_mean", "right/deep/norm/moving_mean"]
    model.get_layer("left").trainable = False  # changes no name
    assert plan_of([("train", ".*")], model).entries[-1].path == "head/bias"
    assert paths_of(model, means) == ["left/norm/moving_mean", "right/deep/norm/moving_mean"]


def test_variables_that_no_path_tells_apart_are_numbered():
    model = called(Twins())
    assert own_names(model, model.variables) == ["same/kernel", "same/bias", "same/kernel (2)", "same/bias (2)"]


def test_rules_about_what_the_models_own_code_has_frozen():
    model = sequential()
    model.get_layer("dense1").trainable = False
    head = ("train", r"dense2/.*")
    for freezes in (("freeze", r"dense1/.*"), ("freeze", r"dense1/kernel")):  # it is
        assert trained_paths([freezes, head], model) == {"dense2/kernel", "dense2/bias"}
    words = r"rule 1 \('dense1/.\*'\) would train 'dense1/kernel', .* by trainable = False: take that out"
    with pytest.raises(UserError, match=words):
        plan_of([("train", r"dense1/.*"), ("freeze", ".*")], model)
    with pytest.raises(UserError, match="matches no variable; nearest: 'dense2/bias'"):
        plan_of([("freeze", r"dense3/.*"), head], model)
    model.trainable = False
    with pytest.raises(UserError, match=r"no trainable variables: .*; its own code has set trainable = False"):
        plan_of([head], model)


def test_a_plan_prints_as_the_table_and_never_a_variable():
    """In Python, in notebooks, and where something that holds it is shown."""
    plan = resolve([("train", "<&|dense2/.*"), ("freeze", ".*")], sequential(), AllReduce())
    assert str(plan) == plan_table(plan, 1)
    for each in (plan, plan.entries[0], plan.groups[0], [plan]):
        assert len(repr(each)) < 120 and "\n" not in repr(each)
    page = xml.etree.ElementTree.fromstring(f"<div>{plan._repr_html_().replace('<br>', '<br/>')}</div>")
    cells = [[cell.text for cell in row] for row in page.find("table")]
    assert [row[0] for row in cells] == ["path", *(entry.path for entry in plan.entries)]
    assert cells[-1] == ["dense2/bias", "2", "yes", "train <&|dense2/.*", "all-reduce", "8"]
    assert list(page.find("p").itertext()) == str(plan).splitlines()[-3:]
