"""The budget by hand, and over random units: what is spent, who waits how long, and what is in memory."""

import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_partial.errors import UserError
from dist_partial.schedules import step_time
from dist_partial.schedules.base import Unit
from dist_partial.schedules.budget import Budget


def units_of(sizes, memory=None, kept=None):
    count = len(sizes)
    rest = zip("abcdefgh", sizes, memory or [0] * count, kept or [0] * count, strict=False)
    return [Unit(name, (f"{name}/kernel",), size, 1, own, stays) for name, size, own, stays in rest]


def drive(schedule, units, steps, norms, seconds=None, draw=None):
    """What a run trains in each interval, as (names, steps), each step charged as the units say."""
    state, step, trained = schedule.begun(schedule.initial(units), steps), 0, []
    while step < steps:
        state = schedule.observe(step, units, norms(step), state)
        on = "".join(sorted(schedule.select(step, units, 0, state)))
        length = min(schedule.every, steps - step)
        sent = sum(unit.bytes for unit in units if unit.name in on)
        if seconds is None:
            state = schedule.spent(state, length, sent)
        else:  # the first step is not timed
            times = [seconds(on) * draw.lognormal(0, 0.1) for _ in range(length)]
            state = schedule.spent(schedule.spent(state, 1, sent), length - 1, sent, sum(times[1:]))
        trained.append((on, length))
        step += length
        state = json.loads(json.dumps(state, allow_nan=False))
    return trained, state


def in_turn(schedule, units, steps, norms):
    return [on for on, _ in drive(schedule, units, steps, lambda _: np.square(norms))[0]]


def test_by_hand():
    """Norms 6, 4, 3, 1 of 300, 100, 200, 10 bytes, which is 0.02, 0.04, 0.015, 0.1 a byte: in order d, b, a, c."""
    units = units_of([300, 100, 200, 10])

    def choice(**options):
        schedule = Budget(every=10, **options)
        schedule.check(units, 100)
        return in_turn(schedule, units, 10, [6.0, 4, 3, 1])[0]

    assert choice(bytes=410) == "abd"
    assert choice(bytes=310) == "bcd"  # 'a' does not fit, 'c' does
    assert choice(bytes=309) == "bcd"  # 1 too much is closer than 199 too little
    assert choice(bytes=210) == "bcd"  # 100 too much, or too little
    assert choice(bytes=209) == "bd"
    assert choice(bytes=309, by="norm") == "ad"
    assert choice(bytes=304, by="norm") == "a"
    assert choice(bytes=610) == "abcd"
    assert choice(bytes=460, always=["c"]) == "abcd"
    assert choice(bytes=459, always=["c"]) == "bcd"
    assert choice(bytes=510, always=["c"], by="norm") == "acd"
    # Before the first probe: what fits, from the input on.
    schedule = Budget(bytes=400)
    assert schedule.select(0, units, 0, schedule.initial(units)) == {"a", "b"}


def test_what_is_left_is_carried_over():
    """Two units of 100 and a limit of 150: one and both in turn; what was spent too much counts as well."""
    units = units_of([100, 100])
    assert in_turn(Budget(bytes=150, every=10), units, 40, [2.0, 1]) == ["ab", "a", "ab", "a"]
    assert in_turn(Budget(bytes=140, every=10), units, 50, [2.0, 1]) == ["a", "ab", "a", "ab", "a"]
    # 160, 320, 480 ... of 100 and 200: 200, 300, 500, 600.
    assert in_turn(Budget(bytes=160, every=10), units, 40, [2.0, 1]) == ["ab", "a", "ab", "a"]


def test_the_last_interval_has_its_true_length():
    """150 a step: 140 for 10 steps leave 100, which is 10 a step in 10 further ones and 50 in 2."""
    units = units_of([100, 100, 40])
    assert in_turn(Budget(bytes=150, every=10), units, 20, [2.0, 1, 0]) == ["ac", "ac"]
    assert in_turn(Budget(bytes=150, every=10), units, 12, [2.0, 1, 0]) == ["ac", "ab"]


def test_who_has_waited_comes_first():
    """Equal sizes, one fits, the norms never change: after two rankings left out, the longest wait comes first."""
    schedule, units = Budget(bytes=100, every=1, starve=2), units_of([100] * 3)
    # At step 2 'b' and 'c' have both waited twice: the larger norm comes first. At step 4 it is the turn of 'a' again.
    assert "".join(in_turn(schedule, units, 9, [3.0, 2, 1])) == "aabcabcab"


def test_what_is_larger_than_the_limit_is_saved_for():
    """'a' costs 500 of 200, 'c' 50: after 3 rankings left out, 2 intervals of 'c' alone save 300."""
    units = units_of([500, 150, 50])
    assert in_turn(Budget(bytes=200, every=10, starve=3), units, 120, [9.0, 5, 1])[:7] == [
        *["bc"] * 3,
        *["c"] * 2,
        "a",
        "bc",
    ]
    # Where the run ends before there is enough, it is not saved for.
    assert in_turn(Budget(bytes=200, every=10, starve=3), units, 50, [9.0, 5, 1]) == ["bc"] * 5


def test_what_does_not_fit_is_trained_on_credit():
    """More workers: 'a' and 'b' cost 100 each for 15 steps, and then 300, more than the limit."""
    schedule, few, many = Budget(bytes=200, every=10), units_of([100, 100]), units_of([300, 310])
    state = schedule.observe(0, few, np.ones(2), schedule.begun(schedule.initial(few), 60))
    state = schedule.spent(state, 15, 200)
    assert not schedule.outdated(few, state) and schedule.outdated(many, state)
    state = schedule.observe(15, many, np.ones(2), state)
    assert not schedule.outdated(many, state)
    assert schedule.select(15, many, 0, state) == {"a"}


RUNS = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.integers(1, 1000), min_size=2, max_size=8),
        "share": st.floats(0.01, 0.99),
        "every": st.integers(1, 9),
        "starve": st.one_of(st.none(), st.integers(1, 9)),
        "short": st.integers(0, 8),
        "by": st.sampled_from(["norm", "norm_per_byte"]),
        "seed": st.integers(0, 999),
        "fixed": st.booleans(),
        "always": st.booleans(),
    }
)


def made(run, **more):
    """Units, a limit that some of them exceed, and norms, which in half of the runs never change."""
    units, always = units_of(run["sizes"]), ["a"] if run["always"] else []
    least = run["sizes"][0] if always else min(run["sizes"])
    limit = least + 1 + int(run["share"] * (sum(run["sizes"]) - least))
    limit = max(limit, max(run["sizes"]) // 4)
    names = {name: run[name] for name in ("every", "starve", "by")}
    draw, fixed = np.random.default_rng(run["seed"]), np.random.default_rng(run["seed"]).gamma(0.3, size=len(units))
    norms = (lambda _: fixed) if run["fixed"] else (lambda _: draw.gamma(0.3, size=len(units)))
    return Budget(**{"bytes": limit, "always": always} | names | more), units, least, norms


@settings(max_examples=60, deadline=None)
@given(RUNS)
def test_bytes_are_held_within_one_percent_and_nobody_starves(run):
    schedule, units, least, norms = made(run)
    limit, every, sizes = schedule.bytes, schedule.every, run["sizes"]
    # Half of the largest unit, for an interval, is 1 % of so many.
    intervals = math.ceil(50 * max(sizes) / limit) + 1
    steps = every * intervals - run["short"] % every
    schedule.check(units, steps)
    trained, _ = drive(schedule, units, steps, norms)
    sent = [length * sum(unit.bytes for unit in units if unit.name in on) for on, length in trained]
    allowed = min(limit, sum(sizes)) * steps
    assert abs(sum(sent) - allowed) <= max(sizes) / 2 * every + steps  # the limit may be above what everything sends
    assert abs(sum(sent) - allowed) <= 0.01 * limit * steps + steps
    assert all(on and on.startswith("a" if schedule.always else "") for on, _ in trained)

    def to_save(size):
        charged = least if schedule.always else 0
        return math.ceil(max(0, charged + size + max(sizes) / 2 - limit) / (limit - least)) if limit > least else 0

    bound = (schedule.starve or len(units)) + len(units) + sum(map(to_save, sizes))
    ends = max(map(to_save, sizes)) + 2  # near the end there may not be enough left to save
    for name in [unit.name for unit in units]:
        at = [-1, *(k for k, (on, _) in enumerate(trained) if name in on), len(trained) - ends]
        assert max(np.diff(at)) - 1 <= bound


@settings(max_examples=40, deadline=None)
@given(RUNS, st.lists(st.tuples(st.integers(2, 99), st.integers(0, 50)), min_size=8, max_size=8), st.booleans())
def test_memory_is_never_exceeded(run, taken, alone):
    sizes = run["sizes"]
    memory, kept = ([each[place] for each in taken[: len(sizes)]] for place in (0, 1))
    units = units_of(sizes, memory, kept)
    first = memory[0] if run["always"] else 0
    cap = sum(kept) + first + max(memory[1:] if run["always"] else memory)
    schedule, _, _, norms = made(run, memory=cap, **{"bytes": None} if alone else {})
    schedule.check(units, 300)
    trained, _ = drive(schedule, units, 40 * schedule.every, norms)
    for on, _ in trained:
        held = sum(kept) + sum(unit.memory for unit in units if unit.name in on)
        assert on and held <= cap
        if alone:  # nothing that fits is left out
            assert all(held + unit.memory > cap for unit in units if unit.name not in on)
    with pytest.raises(UserError, match=rf"^budget\.memory is {cap - 1:,}: .* would never be trained"):
        Budget(memory=cap - 1, always=schedule.always).check(units, 300)


def test_what_stays_of_what_is_off_is_named():
    units = units_of([1, 1], memory=[10, 20], kept=[100, 0])
    with pytest.raises(UserError, match=r"'b' would .* up to 120 bytes, 100 of them for what is off .*leave = 'drop'"):
        Budget(memory=119).check(units, 10)


@pytest.mark.parametrize("seed", range(12))
def test_seconds_are_held_within_one_percent(seed):
    """Steps whose time follows from the selection in a way of its own, with noise: the schedule sees times alone."""
    draw = np.random.default_rng(seed)
    count = int(draw.integers(2, 8))
    base, way, own = draw.uniform(0.5, 3) * count, draw.uniform(0.1, 3, count), draw.uniform(0.1, 3, count)

    def seconds(on):
        numbers = ["abcdefgh".index(name) for name in on]
        return 1e-3 * (base + way[min(numbers) :].sum() + own[numbers].sum())

    units = units_of([1000] * count)
    names = [unit.name for unit in units]
    least, most = min(map(seconds, names)), seconds("".join(names))
    schedule = Budget(seconds=float(least + draw.uniform(0.2, 0.9) * (most - least)), every=20)
    steps = 20 * 80 - seed
    trained, state = drive(schedule, units, steps, lambda _: draw.gamma(0.3, size=count), seconds, draw)
    spent = sum(length * seconds(on) for on, length in trained) * math.exp(0.1**2 / 2)  # the mean of the noise
    assert spent == pytest.approx(schedule.seconds * steps, rel=0.01)
    assert len({on for on, _ in trained}) > 1 and schedule.notes(units, state) == []
    line = schedule.summary(units, state, steps)[0]
    said = float(line.removeprefix("budget: a step took ").split(" of ")[0])
    assert said == pytest.approx(schedule.seconds, rel=0.015) and line.endswith(" s on average")


def test_the_first_interval_of_a_limit_in_seconds_is_the_cheapest_and_what_is_not_timed_is_charged():
    units, schedule = units_of([3, 3, 3]), Budget(seconds=1.0, every=4)
    state = schedule.observe(0, units, np.array([9.0, 1, 1]), schedule.begun(schedule.initial(units), 40))
    assert schedule.select(0, units, 0, state) == {"c"}
    state = schedule.spent(schedule.spent(state, 1, 0), 2, 0, 1.0)
    before = copy.deepcopy(state)
    assert schedule.summary(units, state, 3) == ["budget: a step took 0.5 of 1 s on average"]
    state = schedule.agreed(state, lambda own: 2 * own)  # the other worker took three times as long
    assert schedule.observe(4, units, np.ones(3), state)["seconds"] == 3.0
    assert before["interval"] == [3, 2, 1.0]
    # Forward in 3 parts, backward to 'c' in 2: 0.5 s are 5 parts, and everything takes 9 of them.
    assert step_time.predicted(schedule.observe(4, units, np.ones(3), before)["times"], {0, 1, 2}) == pytest.approx(0.9)
    # An interval of which nothing was timed is charged as predicted.
    state = schedule.spent(schedule.observe(4, units, np.ones(3), before), 4, 0)
    assert schedule.observe(8, units, np.ones(3), state)["seconds"] == pytest.approx(1.5 + 4 * 0.9)


def test_a_time_that_cannot_be_held_is_said():
    units, schedule = units_of([3, 3]), Budget(seconds=0.25, every=4)
    state = schedule.observe(0, units, np.ones(2), schedule.begun(schedule.initial(units), 40))
    assert schedule.notes(units, state) == []
    state = schedule.observe(4, units, np.ones(2), schedule.spent(state, 4, 0, 2.0))
    assert schedule.notes(units, state) == [
        "budget.seconds is 0.25: a step takes 0.5 s with the least that can be trained"
    ]
    assert schedule.select(4, units, 0, state) == {"b"}


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(0, 999))
def test_learning_against_numpy(count, seed):
    """Normalised least mean squares, with the features of a step written out."""
    draw = np.random.default_rng(seed)
    weights = draw.uniform(1, 2, 1 + 2 * count)
    on = sorted(draw.choice(count, size=int(draw.integers(1, count + 1)), replace=False).tolist())
    features = np.concatenate([[1], np.arange(count) >= on[0], np.isin(np.arange(count), on)])
    assert step_time.predicted(weights.tolist(), set(on)) == pytest.approx(weights @ features)
    seconds = float(draw.uniform(0, 10))
    expected = weights + 0.5 * (seconds - weights @ features) * features / (features @ features)
    assert step_time.learnt(weights.tolist(), set(on), seconds) == pytest.approx(np.maximum(expected, 0))


def test_what_sends_nothing_is_taken_and_an_overflow_is_survived():
    schedule, units = Budget(bytes=100), units_of([0, 100, 100])
    schedule.check(units, 100)
    for norms in ([0.0, 1, 2], [np.nan, np.inf, 1]):
        state = schedule.observe(0, units, np.array(norms), schedule.begun(schedule.initial(units), 100))
        assert schedule.select(0, units, 0, state) == {"a", "c"}


def test_layers_that_send_more_than_their_units_say():
    """As synchronised BatchNorm does: an error where even the least that can be trained is too much."""
    schedule, units = Budget(bytes=100), units_of([90, 150])
    schedule.check_sent(units, {"b"}, 160)
    with pytest.raises(UserError, match=r"budget\.bytes is 100, and b send 161 bytes with what synchronised"):
        schedule.check_sent(units, {"b"}, 161)
