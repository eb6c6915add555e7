"""Schedules against what was worked out by hand, against independent rules, and over many steps and seeds."""

import collections
import copy
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from dist_partial.errors import UserError
from dist_partial.schedules.adaptive import AutoFreeze
from dist_partial.schedules.base import Unit, observes
from dist_partial.schedules.budget import Budget
from dist_partial.schedules.fixed import Constant, Gradual, Lisa, Phases, Rotation

BLOCKS = ["block_0", "block_1", "block_2"]
LAYERS = ["embedding", *BLOCKS, "final_norm", "head"]
PATHS = [
    "embedding/embeddings",
    *[f"{block}/{part}/kernel" for block in BLOCKS for part in ("attention/query", "mlp/up")],
    "final_norm/scale",
    "head/kernel",
]
SIZES = [400, 300, 300, 300, 10, 200]  # of LAYERS
PHASES = Phases([(0, r"head/.*|final_norm/.*"), (7, r"(block_2|head)/.*"), (20, r".*")])
SEEDS = (0, 1, 2**32 - 1)
SCHEDULES = {
    "constant": Constant(),
    "phases": PHASES,
    "gradual": Gradual(every=5),
    "gradual by two": Gradual(every=5, count=2),
    "rotation": Rotation(every=3, order="random"),
    "rotation ascending": Rotation(every=4, order="ascending", always=[r"head", r"final.*"]),
    "lisa": Lisa(every=4),
    "lisa patterns": Lisa(
        every=4, count=1, units=[r"(embedding|block_0)/.*", r"block_[12]/.*", r"final.*", r"head/.*"]
    ),
    "autofreeze": AutoFreeze(every=3),
    "autofreeze retest": AutoFreeze(every=3, percentile=75, keep=2, retest=3),
    "budget": Budget(bytes=510, every=4),
    "budget norm": Budget(bytes=610, every=4, by="norm", always=["head", "final_norm"], starve=2),
    "budget memory": Budget(bytes=610, memory=700, every=4, starve=2),
}


def units_of(schedule, sizes=None):
    """Units as a run makes them."""
    partition = schedule.partition(PATHS)
    sizes = sizes or [100 * len(members) for _, members in partition]
    return [Unit(name, members, size, size // 4) for (name, members), size in zip(partition, sizes, strict=True)]


def layers(names=LAYERS, sizes=SIZES):
    return [Unit(name, (f"{name}/kernel",), size, size // 4, size) for name, size in zip(names, sizes, strict=True)]


def statistics(schedule, step, units, on, seed=0):
    """Squared norms as a run would hand them over."""
    norms = np.random.default_rng([seed, step]).gamma(0.5, size=len(units)).astype(np.float32)
    return norms if schedule.statistics == "probe" else norms * [unit.name in on for unit in units]


def drive(schedule, units, steps, seed, measured=statistics, state=None, start=0):
    """What a run trains, as (names, state) of each step: it asks at switches alone."""
    state = schedule.initial(units) if state is None else state
    step, on, trained = start, frozenset(), []
    while step < steps:
        if observes(schedule, step) and (step > start or start == 0):
            state = schedule.observe(step, units, measured(schedule, step, units, on), state)
        on = schedule.select(step, units, seed, state)
        switch = schedule.next_switch(step)
        end = steps if switch is None else min(switch, steps)
        trained += [(on, state)] * (end - step)
        step = end
    return trained


def in_order(on, units):
    return [unit.name for unit in units if unit.name in on]


def selected(schedule, steps, units, seed=0, state=None):
    """Names by step, in the units' order."""
    return [in_order(schedule.select(step, units, seed, state or {}), units) for step in steps]


# What holds of all of them.


@pytest.mark.parametrize("name", SCHEDULES)
def test_units_partition_the_paths(name):
    members = [path for _, paths in SCHEDULES[name].partition(PATHS) for path in paths]
    assert sorted(members) == sorted(PATHS)
    assert len({unit for unit, _ in SCHEDULES[name].partition(PATHS)}) == len(SCHEDULES[name].partition(PATHS))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_any_step_in_any_order_is_what_a_run_from_the_start_trains(name, seed):
    """Also that no change is missed by next_switch, that something is always trained, and that nothing is mutated."""
    schedule = SCHEDULES[name]
    units = units_of(schedule)
    schedule.check(units, 60)
    trained = drive(schedule, units, 60, seed)
    known = {unit.name for unit in units}
    for step in np.random.default_rng(3).permutation(60).tolist():
        on, state = trained[step]
        before = copy.deepcopy(state)
        assert schedule.select(step, units, seed, state) == schedule.select(step, units, seed, state) == on
        assert schedule.select(step, units, seed, json.loads(json.dumps(state))) == on
        assert state == before
        assert on and on <= known
        switch = schedule.next_switch(step)
        assert switch is None or switch > step
        assert all(trained[s] == trained[step] for s in range(step, min(switch or 60, 60)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_that_goes_on_from_any_step_trains_the_same(name):
    schedule = SCHEDULES[name]
    units = units_of(schedule)
    whole = drive(schedule, units, 60, 7)
    for start in range(1, 60):
        # What is saved at a switch may be the state before `observe` or after it; here it is after.
        state = json.loads(json.dumps(whole[start][1]))
        assert drive(schedule, units, 60, 7, state=state, start=start) == whole[start:], start


@pytest.mark.parametrize("name", ["autofreeze", "autofreeze retest", "budget", "budget norm"])
def test_observing_is_pure(name):
    schedule = SCHEDULES[name]
    units = units_of(schedule, SIZES)
    for step in range(schedule.every, 60, schedule.every):
        on, state = drive(schedule, units, step, 0)[-1]
        norms = statistics(schedule, step, units, on)
        kept = copy.deepcopy(state), norms.copy()
        new = schedule.observe(step, units, norms, state)
        assert new == schedule.observe(step, units, norms, json.loads(json.dumps(state)))
        assert json.loads(json.dumps(new, allow_nan=False)) == new
        assert (state, norms.tolist()) == (kept[0], kept[1].tolist())


def test_when_statistics_are_due():
    assert [s for s in range(13) if observes(SCHEDULES["budget"], s)] == [0, 4, 8, 12]
    assert [s for s in range(13) if observes(SCHEDULES["autofreeze"], s)] == [3, 6, 9, 12]
    for name in ("constant", "phases", "gradual", "rotation", "lisa"):
        schedule = SCHEDULES[name]
        assert schedule.statistics is None and schedule.initial(layers()) == {}
        assert not any(observes(schedule, s) for s in range(30))


def test_only_those_that_draw_depend_on_the_seed():
    for name, schedule in SCHEDULES.items():
        units = units_of(schedule)
        runs = [[on for on, _ in drive(schedule, units, 60, seed)] for seed in range(4)]
        assert (len({tuple(run) for run in runs}) > 1) == (name in ("rotation", "lisa", "lisa patterns")), name


def test_neither_tensorflow_nor_keras_is_imported():
    code = "import sys, dist_partial.schedules; print({'tensorflow', 'keras', 'gin'} & set(sys.modules) or 'none')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "none"


# Units.


def test_units_are_top_layers_by_default():
    assert Gradual().partition(PATHS) == [
        ("embedding", ("embedding/embeddings",)),
        ("block_0", ("block_0/attention/query/kernel", "block_0/mlp/up/kernel")),
        ("block_1", ("block_1/attention/query/kernel", "block_1/mlp/up/kernel")),
        ("block_2", ("block_2/attention/query/kernel", "block_2/mlp/up/kernel")),
        ("final_norm", ("final_norm/scale",)),
        ("head", ("head/kernel",)),
    ]
    assert Lisa().partition(["a/x", "scale", "b/x", "a/y"]) == [
        ("a", ("a/x", "a/y")),
        ("scale", ("scale",)),
        ("b", ("b/x",)),
    ]


def test_units_by_patterns_stand_in_their_order_and_the_first_match_wins():
    schedule = Rotation(units=[r"head/.*", r"block_0/.*", r".*/mlp/.*", r"embedding/embeddings:0", r".*"])
    assert schedule.partition(PATHS) == [
        (r"head/.*", ("head/kernel",)),
        (r"block_0/.*", ("block_0/attention/query/kernel", "block_0/mlp/up/kernel")),
        (r".*/mlp/.*", ("block_1/mlp/up/kernel", "block_2/mlp/up/kernel")),
        (r"embedding/embeddings:0", ("embedding/embeddings",)),
        (r".*", ("block_1/attention/query/kernel", "block_2/attention/query/kernel", "final_norm/scale")),
    ]


def test_a_unit_made_by_a_pattern_is_named_by_it():
    """As text: a pattern with a set in it does not match itself."""
    schedule = Rotation(every=1, order="ascending", units=[r"block_[0-2]/.*", r"final_norm/.*", r".*"])
    units = units_of(schedule)
    always = Rotation(every=1, order="ascending", units=schedule.units, always=[r"block_[0-2]/.*"])
    assert selected(always, [0, 1], units) == [[r"block_[0-2]/.*", r"final_norm/.*"], [r"block_[0-2]/.*", r".*"]]
    # The ends of LISA are units, whatever their names would match as patterns: here '.*' would match all.
    assert len(Lisa(count=1).select(0, units, 0, {})) == 3


# Those that follow from the step.


def test_constant():
    assert Constant().partition(PATHS) == [("", tuple(PATHS))]
    units = units_of(Constant())
    assert [Constant().select(step, units, 0, {}) for step in (0, 10**9)] == [frozenset([""])] * 2
    assert Constant().next_switch(0) is None
    assert Constant().check(units, 1) == []


def test_phases():
    units = units_of(PHASES)
    assert [(unit.name, unit.paths) for unit in units] == [
        ("phase 3", tuple(PATHS[:5])),
        ("phases 2+3", tuple(PATHS[5:7])),
        ("phases 1+3", ("final_norm/scale",)),
        ("phases 1+2+3", ("head/kernel",)),
    ]
    first, second = ["phases 1+3", "phases 1+2+3"], ["phases 2+3", "phases 1+2+3"]
    everything = [unit.name for unit in units]
    assert selected(PHASES, [0, 6, 7, 19, 20, 10**9], units) == [first] * 2 + [second] * 2 + [everything] * 2
    assert [PHASES.next_switch(step) for step in (0, 6, 7, 19, 20, 999)] == [7, 7, 20, 20, None, None]


@pytest.mark.parametrize("seed", SEEDS)
def test_phases_train_the_paths_that_match(seed):
    """Patterns drawn at random, against matching each path at each step."""
    draw = np.random.default_rng(seed)
    layers = [sorted(draw.choice(6, size=draw.integers(1, 6), replace=False)) for _ in range(4)] + [range(6)]
    starts = [0, *sorted(draw.choice(range(1, 50), size=4, replace=False).tolist())]
    schedule = Phases([(s, "|".join(f"{LAYERS[i]}/.*" for i in on)) for s, on in zip(starts, layers, strict=True)])
    units = units_of(schedule)
    for step in range(60):
        on = schedule.select(step, units, 0, {})
        paths = {path for unit in units if unit.name in on for path in unit.paths}
        phase = max(n for n, s in enumerate(starts) if s <= step)
        assert paths == {path for path in PATHS if LAYERS.index(path.split("/")[0]) in layers[phase]}


def test_gradual_unfreezing():
    units = layers()
    assert selected(Gradual(every=10), [0, 9, 10, 49, 50, 10**6], units) == [
        LAYERS[5:],
        LAYERS[5:],
        LAYERS[4:],
        LAYERS[1:],
        LAYERS,
        LAYERS,
    ]
    assert selected(Gradual(every=10, count=4), [0, 9, 10, 99], units) == [LAYERS[2:]] * 2 + [LAYERS] * 2
    assert [Gradual(every=10).next_switch(step) for step in (0, 9, 10)] == [10, 10, 20]


def test_rotation_needs_two():
    units = layers()
    with pytest.raises(UserError, match=r"block_rotation has one unit to turn to, 'head': bind"):
        Rotation(every=2, always=["(?!head).*"]).check(units, 60)


@pytest.mark.parametrize("overflowed", [np.inf, np.nan])
def test_autofreeze_does_not_freeze_what_overflowed(overflowed):
    """In the first interval, and in one after others: what is not finite does not say that nothing has changed."""
    schedule, units = AutoFreeze(every=10), layers()
    first = schedule.observe(10, units, np.array([overflowed, overflowed, 1, 1, 1, 1.0]), schedule.initial(units))
    assert first["frozen"] == 0
    steady = schedule.observe(20, units, np.array([4, 4, 4, 4, 4, 4.0]), first)
    after = schedule.observe(30, units, np.array([overflowed, 4, 4, 4, 9, 9.0]), steady)
    assert after["frozen"] == 0 and after["norms"][0] == 2.0


@pytest.mark.parametrize("count", [1, 2, 3, 6, 9])
def test_gradual_is_nested_and_check_is_exact(count):
    schedule, units = Gradual(every=7, count=count), layers()
    on = [schedule.select(step, units, 0, {}) for step in range(60)]
    assert all(one <= other for one, other in itertools.pairwise(on))
    complete = next(step for step in range(60) if len(on[step]) == 6)
    if not complete:
        with pytest.raises(UserError, match=r"gradual_unfreezing\.count is \d: all units, 'embed.*at once: bind less"):
            schedule.check(units, 60)
        return
    assert schedule.check(units, complete + 1) == []
    assert schedule.check(units, complete)[0].startswith("gradual_unfreezing.every")


def test_rotation():
    units = layers()
    ascending = selected(Rotation(every=2, order="ascending"), range(14), units)
    assert ascending == [[name] for name in [*LAYERS, LAYERS[0]] for _ in range(2)]
    descending = selected(Rotation(every=2, order="descending"), range(14), units)
    assert descending == [[name] for name in [*LAYERS[::-1], LAYERS[-1]] for _ in range(2)]
    always = Rotation(every=1, order="ascending", always=[r"head", r"(embed|final).*"])
    ends = [("embedding", block, "final_norm", "head") for block in BLOCKS]
    assert selected(always, range(4), units) == [list(on) for on in [*ends, ends[0]]]


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
@pytest.mark.parametrize("seed", SEEDS)
def test_each_round_gives_each_unit_one_turn(order, seed):
    schedule, units = Rotation(every=3, order=order, always=["head"]), layers()
    rounds = []
    for number in range(40):
        turns = selected(schedule, range(15 * number, 15 * (number + 1)), units, seed)
        count = collections.Counter(name for on in turns for name in on)
        assert count == {**dict.fromkeys(LAYERS[:-1], 3), "head": 15}
        assert all(turns[i] == turns[i + 1] == turns[i + 2] for i in range(0, 15, 3))
        rounds.append(str(turns))
    assert (len(set(rounds)) > 20) == (order == "random")  # of 120 orders


def test_lisa():
    """The counts; that each pair comes as often as any other; and that draws do not follow from one another."""
    schedule, units = Lisa(every=5), layers()
    draws = collections.Counter()
    for seed in range(100):
        for interval in range(30):
            on = {schedule.select(step, units, seed, {}) for step in range(5 * interval, 5 * interval + 5)}
            assert len(on) == 1
            (names,) = on
            assert {"embedding", "head"} < names and len(names) == 4
            draws[names] += 1
    assert len(draws) == 6  # pairs of the four between
    assert all(400 < count < 600 for count in draws.values())  # 500 expected; 5 standard deviations are 102
    assert {len(Lisa(count=2, always=[]).select(step, units, 0, {})) for step in range(99)} == {2}
    assert Lisa(count=1, always=["block.*"]).select(0, units, 0, {}) > {*BLOCKS}


def test_draws_are_the_same_on_every_machine():
    """Written down once: a change would let runs that go on train something else."""
    units = layers()
    rotation = [LAYERS.index(on[0]) for on in selected(Rotation(every=1), range(12), units, seed=1)]
    assert rotation == [2, 4, 5, 0, 3, 1, 5, 3, 0, 2, 1, 4]
    lisa = [[LAYERS.index(name) for name in on[1:-1]] for on in selected(Lisa(every=1), range(4), units)]
    assert lisa == [[3, 4], [2, 3], [1, 4], [3, 4]]


# Those that adapt.


def test_autofreeze():
    """Four units, percentile 50, by hand: changes are of the norms, which are the roots of what is handed over."""
    schedule, units = AutoFreeze(every=10), layers("abcd", [1] * 4)
    state = schedule.initial(units)
    assert selected(schedule, [0, 9], units, state=state) == [["a", "b", "c", "d"]] * 2
    state = schedule.observe(10, units, np.square([10.0, 10, 10, 10]), state)
    assert selected(schedule, [10], units, state=state) == [["a", "b", "c", "d"]]  # nothing to compare with yet
    # Changes 0.1, 0.4, 0.2, 0.3; the median is 0.25: 'a' is below, 'b' is not and keeps 'c' from being frozen.
    state = schedule.observe(20, units, np.square([11.0, 14, 8, 7]), state)
    assert selected(schedule, [20, 29], units, state=state) == [["b", "c", "d"]] * 2
    # Of the three, changes 0.5, 0, 1: 'b' is the median itself, and not below it.
    state = schedule.observe(30, units, np.square([0.0, 7, 8, 14]), state)
    assert selected(schedule, [30], units, state=state) == [["b", "c", "d"]]
    # Changes 0, 0.5, 0.5: the median is 0.5.
    state = schedule.observe(40, units, np.square([0.0, 7, 4, 7]), state)
    assert selected(schedule, [40], units, state=state) == [["c", "d"]]
    # Changes 0, 1: 'c' goes; 'd' is kept for good.
    state = schedule.observe(50, units, np.square([0.0, 0, 4, 14]), state)
    assert selected(schedule, [50], units, state=state) == [["d"]]
    state = schedule.observe(60, units, np.square([0.0, 0, 0, 14]), state)
    assert selected(schedule, [60], units, state=state) == [["d"]]
    assert state == {"frozen": 3, "norms": [11, 7, 4, 14]}  # each of the last interval in which it was on


def test_autofreeze_tests_again_what_it_froze():
    schedule, units = AutoFreeze(every=10, retest=3), layers("abcd", [1] * 4)
    state = schedule.initial(units)
    state = schedule.observe(10, units, np.square([10.0, 10, 10, 10]), state)
    state = schedule.observe(20, units, np.square([10.0, 10, 20, 20]), state)
    assert selected(schedule, [20, 29], units, state=state) == [["c", "d"]] * 2
    # Changes 1, 0: 'c' stays. Interval 3 is a test: everything is on.
    state = schedule.observe(30, units, np.square([0.0, 0, 40, 20]), state)
    assert state == {"frozen": 2, "norms": [10, 10, 40, 20]}
    assert selected(schedule, [30, 39], units, state=state) == [["a", "b", "c", "d"]] * 2
    # Since the last interval of each, changes 0, 0.5, 0, 1; the median is 0.25: 'a' has still stopped, 'b' has not.
    state = schedule.observe(40, units, np.square([10.0, 15, 40, 40]), state)
    assert selected(schedule, [40], units, state=state) == [["b", "c", "d"]]
    assert state == {"frozen": 1, "norms": [10, 15, 40, 40]}
    # The next test is of interval 6.
    state = {"frozen": 3, "norms": [10, 15, 40, 40]}
    assert [len(on) for on in selected(schedule, range(40, 100, 10), units, state=state)] == [1, 1, 4, 1, 1, 4]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("percentile", [10, 37.5, 50, 90, 100])
@pytest.mark.parametrize(("keep", "retest"), [(1, None), (2, 4)])
def test_autofreeze_against_numpys_percentile(seed, percentile, keep, retest):
    schedule, units = AutoFreeze(every=2, percentile=percentile, keep=keep, retest=retest), layers()
    draw = np.random.default_rng(seed)
    state, last, first = schedule.initial(units), np.zeros(6), 0
    for interval in range(1, 40):
        norms = draw.gamma(1.0, size=6) + 0.1
        norms[:first] = 0
        state = schedule.observe(2 * interval, units, norms**2, state)
        if interval > 1:
            changes = np.abs(last - norms)[first:] / last[first:]
            below = changes < np.percentile(changes, percentile)
            stopped = first + next((n for n, low in enumerate(below) if not low), len(below))
            frozen = min(stopped, 6 - keep)
        else:
            frozen = 0
        last = np.where(norms > 0, norms, last)
        first = 0 if retest and interval % retest == 0 else frozen
        assert selected(schedule, [2 * interval, 2 * interval + 1], units, state=state) == [LAYERS[first:]] * 2


def test_autofreeze_without_tests_never_thaws():
    schedule, units = SCHEDULES["autofreeze"], layers()
    on = [names for names, _ in drive(schedule, units, 60, 0)]
    assert all(other <= one for one, other in itertools.pairwise(on))
    assert len(on[-1]) < 6


def test_autofreeze_without_a_gradient_or_with_one_that_overflowed():
    """A unit on which the loss does not depend is frozen; what overflowed is not taken for convergence."""
    schedule, units = AutoFreeze(every=10), layers("abcd", [1] * 4)
    state = schedule.observe(10, units, np.array([0.0, 1, 1, 1]), schedule.initial(units))
    assert state["frozen"] == 1
    state = {"frozen": 0, "norms": [1.0] * 4}
    for value in (np.inf, np.nan):
        state = schedule.observe(30, units, np.array([value, 1.1, 1.2, 1.3]), {"frozen": 0, "norms": [1.0] * 4})
        assert state["frozen"] == 0
        assert json.loads(json.dumps(state, allow_nan=False)) == state
        assert schedule.observe(40, units, np.array([1.0, 1.1, 1.2, 1.3]), state)["frozen"] == 0
    state = schedule.observe(20, units, np.full(4, np.inf), {"frozen": 0, "norms": [1.0] * 4})
    assert state["frozen"] == 0


# Mistakes.


def message(call):
    with pytest.raises(UserError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Phases([]), ["phases.table is []", "write a list"]),
        (lambda: Phases("head"), ["phases.table is 'head'", "write a list"]),
        (lambda: Phases([[[0] * 99] * 9]), ["phase 1 is [[0", "...: write"]),
        (lambda: Phases([(0,)]), ["phases.table, phase 1", "(0,)"]),
        (lambda: Phases([(0.5, r".*")]), ["phase 1", "0.5"]),
        (lambda: Phases([(0, 3)]), ["phase 1", "3", "string"]),
        (lambda: Phases([(0, r".*"), (3, r"head(")]), ["phase 2", "'head('", "regular expression"]),
        (lambda: Phases([(1, r".*")]), ["phase 1", "step 1", "start at 0"]),
        (lambda: Phases([(0, r".*"), (5, r"a"), (5, r"b")]), ["phase 3", "step 5", "overlaps phase 2"]),
        (lambda: Phases([(0, r".*"), (5, r"a"), (4, r"b")]), ["phase 3", "step 4", "overlaps phase 2", "at 5"]),
        (lambda: Gradual(every=0), ["gradual_unfreezing.every is 0: it must be a whole number of at least 1"]),
        (lambda: Gradual(every=None), ["gradual_unfreezing.every is None"]),
        (lambda: Gradual(count=1.0), ["gradual_unfreezing.count is 1.0"]),
        (lambda: Gradual(units=[]), ["gradual_unfreezing.units is []"]),
        (lambda: Gradual(units=r"head/.*"), ["gradual_unfreezing.units is 'head/.*'", "list"]),
        (lambda: Gradual(units=[r"head(", r".*"]), ["gradual_unfreezing.units", "'head('", "regular expression"]),
        (lambda: Gradual(units=[3]), ["gradual_unfreezing.units", "3", "string"]),
        (lambda: Rotation(every=True), ["block_rotation.every is True"]),
        (lambda: Rotation(order="up"), ["block_rotation.order is 'up'", "'ascending', 'descending' or 'random'"]),
        (lambda: Rotation(always=None), ["block_rotation.always is None"]),
        (lambda: Rotation(always="head"), ["block_rotation.always is 'head'", "list"]),
        (lambda: Lisa(every=-1), ["lisa.every is -1"]),
        (lambda: Lisa(every=0), ["lisa.every is 0: it must be a whole number of at least 1"]),
        (lambda: Lisa(count=0), ["lisa.count is 0"]),
        (lambda: Lisa(always=["*"]), ["lisa.always", "'*'", "regular expression"]),
        (lambda: AutoFreeze(every="3"), ["autofreeze.every is '3'"]),
        (lambda: AutoFreeze(keep=0), ["autofreeze.keep is 0"]),
        (lambda: AutoFreeze(retest=0), ["autofreeze.retest is 0"]),
        (lambda: AutoFreeze(retest=1), ["autofreeze.retest is 1", "at least 2"]),
        (lambda: AutoFreeze(percentile=0), ["autofreeze.percentile is 0"]),
        (lambda: AutoFreeze(percentile=100.5), ["autofreeze.percentile is 100.5"]),
        (lambda: AutoFreeze(percentile=float("nan")), ["autofreeze.percentile is nan"]),
        (lambda: AutoFreeze(percentile="50"), ["autofreeze.percentile is '50'"]),
        (lambda: Budget(bytes=0), ["budget.bytes is 0"]),
        (lambda: Budget(bytes=1e6), ["budget.bytes is 1000000.0", "whole number"]),
        (lambda: Budget(seconds=0), ["budget.seconds is 0: it must be a number above 0"]),
        (lambda: Budget(memory=0), ["budget.memory is 0"]),
        (lambda: Budget(), ["budget limits nothing: bind budget.bytes, budget.seconds or budget.memory"]),
        (lambda: Budget(seconds=1.0, every=1), ["budget.every is 1", "not timed", "at least 2"]),
        (lambda: Budget(bytes=9, every=0), ["budget.every is 0"]),
        (lambda: Budget(bytes=9, starve=0), ["budget.starve is 0"]),
        (lambda: Budget(bytes=9, by="size"), ["budget.by is 'size'", "'norm' or 'norm_per_byte'"]),
    ],
)  # fmt: skip
def test_bindings_that_are_wrong_by_themselves(make, words):
    text = message(make)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (Phases([(0, r"head/.*"), (3, r".*"), (5, r"haed/.*")]), ["phase 3 ('haed/.*')", "nothing", "'head/kernel'"]),
        (Phases([(0, r"head/.*"), (3, r"blok.*")]), ["phase 2 ('blok.*') selects nothing", "nearest: "]),
        (Phases([(0, r"head/.*"), (3, r"block.*")]), ["never trains 'embedding/embeddings'", "run.rules"]),
        (Gradual(units=[r"block.*", r"head/.*"]), ["gradual_unfreezing.units", "'embedding/embeddings'", "'head/.*'"]),
        (Lisa(units=[r"blok_0/.*", r".*"]), ["lisa.units", "'blok_0/.*' matches nothing", "'block_0/mlp/up/kernel'"]),
        (Rotation(units=[r".*", r"head/.*"]), ["block_rotation.units", "'head/.*' matches nothing", "before it"]),
        (AutoFreeze(units=[r"head.*", r"head.*", r".*"]), ["autofreeze.units", "'head.*' matches nothing"]),
        (Budget(bytes=1, units=[r"head"]), ["budget.units", "'embedding/embeddings'", "'head'"]),
    ],
)  # fmt: skip
def test_bindings_that_do_not_fit_the_paths(schedule, words):
    text = message(lambda: schedule.partition(PATHS))
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (Rotation(always=[r".*"]), ["block_rotation.always", "'head'", "always on"]),
        (Rotation(every=1, always=["haed"]), ["block_rotation.always", "'haed'", "nearest: 'head'"]),
        (Lisa(count=2, always=["head", "[ef].*", "block_[01]"]), ["lisa.count is 2: it draws from 1 unit, 'block_2'"]),
        (Lisa(count=5), ["lisa.count is 5", "4 units", "'final_norm'", "'embedding', 'head'"]),
        (Lisa(always=["embed", "head"]), ["lisa.always", "'embed'", "nearest: 'embedding'"]),
        (AutoFreeze(every=10, keep=6), ["autofreeze.keep is 6", "'embedding'", "'head'"]),
        (Budget(bytes=9), ["budget.bytes is 9", "smallest unit, 'final_norm'", "10 bytes"]),
        (Budget(bytes=599, always=["head", "embedding"]), ["is 599", "'embedding', 'head'", "600 bytes"]),
        (Budget(bytes=600, always=["head", "embedding"]), ["is 600", "'block_0', 'block_1'", "alone sends as much"]),
        (Budget(bytes=10), ["is 10", "'embedding', 'block_0', ", "would never be trained", "'final_norm' alone"]),
        (Budget(bytes=9999, always=["heads"]), ["budget.always", "'heads'", "nearest: 'head'"]),
        (Budget(memory=399), ["budget.memory is 399: 'embedding' would never be trained", "400 bytes:", "run.rules"]),
        (Budget(memory=599, always=["head"]), ["is 599: 'embedding' would", "600 bytes with what is always on"]),
    ],
)  # fmt: skip
def test_schedules_that_do_not_fit_the_units(schedule, words):
    units = units_of(schedule) if isinstance(schedule, Phases) else layers()
    text = message(lambda: schedule.check(units, 100))
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (Phases([(0, r".*"), (99, r"head.*")]), []),
        (Phases([(0, r".*"), (100, r"head.*")]), ["phases.table, phase 2", "100 steps", "run.steps is 100"]),
        (Phases([(0, r"h.*"), (9, r".*"), (200, r".*"), (300, r"h.*")]), ["phase 3 of 4 starts after 200 steps"]),
        (Gradual(every=30), ["gradual_unfreezing.every is 30: 'embedding', 'block_0' stay", "150", "steps is 100"]),
        (Rotation(every=20), ["block_rotation.every is 20", "6 units", "100 steps"]),
        (Lisa(every=100), ["lisa.every is 100", "100 steps"]),
        (AutoFreeze(every=50), ["autofreeze.every is 50", "100 steps"]),
        (AutoFreeze(every=10, retest=10), ["autofreeze.retest is 10", "100 steps"]),
        (Budget(bytes=399, every=100), ["is 399: enough is saved for 'embedding'", "100 steps, and run.steps is 100"]),
        (Budget(bytes=75, every=20, always=["final_norm"]), ["'embedding'", "120 steps"]),
    ],
)  # fmt: skip
def test_what_a_run_does_not_reach_is_said_and_no_mistake(schedule, words):
    units = units_of(schedule) if isinstance(schedule, Phases) else layers()
    lines = schedule.check(units, 100)
    assert len(lines) == bool(words) and all(word in lines[0] for word in words), lines


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (Gradual(every=20), 101),
        (Rotation(every=20), 101),
        (Lisa(every=100), 101),
        (AutoFreeze(every=50), 101),
        (Budget(bytes=400), 1),
        (Budget(bytes=600, always=["head"]), 1),
        (Budget(bytes=399, every=99), 100),
        (Budget(memory=600, always=["head"]), 1),
        (Lisa(count=4), 100),
    ],
)
def test_what_just_fits(schedule, steps):
    assert schedule.check(layers(), steps) == []
