"""Runs whose trained set changes, against plain Keras on one device that follows the schedule by rules of its own."""

import dataclasses
import functools
import json
import os
import random
import re
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial.config.settings import Settings
from dist_partial.data import Dataset, train_batches
from dist_partial.distributed import replicas
from dist_partial.errors import Interrupted, UserError
from dist_partial.reductions.top_k import TopK
from dist_partial.schedules.adaptive import AutoFreeze
from dist_partial.schedules.budget import Budget
from dist_partial.schedules.fixed import Gradual, Lisa, Phases, Rotation
from dist_partial.selection.rules import Rule
from dist_partial.training import loop, schedule_runner
from dist_partial.training.build import build
from dist_partial.training.schedule_runner import ScheduleRunner
from tests.helpers import cases
from tests.helpers.cases import LAYERS, dataset, mlp
from tests.helpers.files import rows, same_bits, state
from tests.helpers.marks import in_turns, quick
from tests.helpers.strategies import in_process
from tests.helpers.workers import assert_all_end, run_workers

# Nothing of tests.conftest may be imported here: the workers below run this file, too, and have one device each.

STEPS, BATCH, WIDTH = 20, 8, 6
SCHEDULES = {
    "phases": Phases([(0, "d/.*"), (3, "[cd]/.*"), (7, "[ab]/kernel"), (12, ".*"), (15, "d/bias"), (17, "[cd]/.*")]),
    "gradual": Gradual(every=4, units=["a/.*", "b/.*", "c/.*", "d/kernel", "d/bias"]),
    "rotation": Rotation(every=3),
    "lisa": Lisa(every=3, count=1),
    "autofreeze": AutoFreeze(every=2, percentile=100.0, retest=3),
    "budget": Budget(bytes=int(1.7 * 8 * (WIDTH * WIDTH + WIDTH)), every=3),
}


def points() -> Dataset:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, WIDTH)).astype(keras.config.floatx())
    y = np.argmax(x @ rng.normal(size=(WIDTH, WIDTH)), axis=1).astype(np.int32)
    return dataset("points", x, y)


def settings(schedule, made, steps=STEPS, precision="float32", **more) -> Settings:
    given = {
        "rules": [("train", ".*")],
        "model": mlp,
        "data": points,
        "optimizer": functools.partial(keras.optimizers.Adam, 0.02),
        "schedule": schedule,
        "steps": steps,
        "global_batch": BATCH,
        "precision": precision,
        "replicas": lambda: made,
        "clip_norm": 0.5,
        "steps_per_loop": 4,
    }
    return Settings(**{**given, **more})


def budget_for(schedule, precision):
    """The same budget in variables, whatever a variable's size."""
    if isinstance(schedule, Budget) and precision == "float32":
        return dataclasses.replace(schedule, bytes=schedule.bytes // 2)
    return schedule


def phases(folder: Path) -> dict[int, set[str]]:
    """The paths that are trained from a step on, from 0, as the run has recorded them."""
    units = {v["path"]: v["unit"] for v in json.loads((folder / "plan.json").read_text())["variables"]}
    lines = [row for row in rows(folder / "metrics.jsonl") if row["split"] == "plan"]
    return {row["step"] - 1: {path for path, unit in units.items() if unit in row["units"]} for row in lines}


PATHS = [f"{layer}/{name}" for layer in LAYERS for name in ("kernel", "bias")]


def unit(schedule, path: str) -> object:
    """What is switched together with a path."""
    if isinstance(schedule, Phases):
        return tuple(bool(re.fullmatch(pattern, path)) for _, pattern in schedule.table)
    return path if isinstance(schedule, Gradual) and path.startswith("d/") else path.split("/")[0]


def drawn(count: int, seed: int, number: int) -> list[int]:
    return np.argsort(np.random.PCG64([seed, number]).random_raw(count), kind="stable").tolist()


def by_step(schedule, step: int, seed: int) -> list[object]:
    """The units that a schedule without a memory trains after so many steps."""
    number = step // getattr(schedule, "every", 1)
    if isinstance(schedule, Phases):
        phase = max(n for n, (start, _) in enumerate(schedule.table) if start <= step)
        return [each for each in {unit(schedule, path) for path in PATHS} if each[phase]]
    if isinstance(schedule, Gradual):
        return ["d/bias", "d/kernel", "c", "b", "a"][: number + 1]
    if isinstance(schedule, Rotation):
        return [LAYERS[drawn(4, seed, number // 4)[number % 4]]]
    return ["a", "bc"[drawn(2, seed, number)[0]], "d"]  # LISA


class Frozen:
    """AutoFreeze of the layers, by the norms of the gradients of each interval."""

    def __init__(self, schedule: AutoFreeze) -> None:
        self.schedule, self.first, self.last, self.squares = schedule, 0, np.zeros(4), np.zeros(4)

    def on(self, step: int) -> list[str]:
        number, within = divmod(step, self.schedule.every)
        if step and not within:
            now, first, frozen = np.sqrt(self.squares), self.first, 0
            if number > 1:
                changes = np.abs(self.last - now)[first:] / self.last[first:]
                moved = np.flatnonzero(changes >= np.percentile(changes, self.schedule.percentile))
                frozen = min(first + moved[0], 3)
            self.last, self.squares = np.where(now > 0, now, self.last), np.zeros(4)
            self.first = 0 if number % self.schedule.retest == 0 else frozen
        return list(LAYERS[self.first :])


class Ranking:
    """Budget of layers of one size: those with the largest gradients, as many as come closest to what may be sent."""

    def __init__(self, schedule: Budget, replicas: int, steps: int) -> None:
        itemsize, workers = np.dtype(keras.config.floatx()).itemsize, max(2, replicas)
        self.each = 2 * (workers - 1) / workers * itemsize * (WIDTH * WIDTH + WIDTH)
        self.every, self.limit, self.steps = schedule.every, schedule.bytes, steps
        self.waits, self.taken, self.sent = dict.fromkeys(LAYERS, 0), [], 0.0

    def on(self, step: int, probe: Callable[[], dict[str, float]]) -> list[str]:
        if step % self.every == 0:
            norms, end = probe(), min(step + self.every, self.steps)
            left = self.limit * end - self.sent
            fit = [n for n in range(1, 5) if n == 1 or (2 * n - 1) * self.each * (end - step) <= 2 * left]
            late = {name: wait if wait >= len(LAYERS) else 0 for name, wait in self.waits.items()}
            self.taken = sorted(LAYERS, key=lambda name: (-late[name], -norms[name]))[: fit[-1]]
            self.waits = {name: 0 if name in self.taken else wait + 1 for name, wait in self.waits.items()}
        self.sent += len(self.taken) * self.each
        return self.taken


def reference(told: Settings, replicas: int, resets: bool = False) -> tuple[dict[str, np.ndarray], dict[int, set[str]]]:
    """Plain Keras, one device, one optimizer a unit; each leaves alone what its unit does not train at that step.

    Returns:
        The weights, and the paths that were trained from a step on, as the schedule's own words have it.
    """
    keras.utils.set_random_seed(told.seed)
    model, schedule = mlp(), told.schedule
    variables = dict(zip(PATHS, model.variables, strict=True))
    frozen = Frozen(schedule) if isinstance(schedule, AutoFreeze) else None
    budget = Ranking(schedule, replicas, told.steps) if isinstance(schedule, Budget) else None
    context = tf.distribute.InputContext(1, 0, 1)
    order = {"first_step": 0, "global_batch": BATCH, "seed": told.seed, "context": context}
    batches, optimizers, found, before = iter(train_batches(points().train, **order)), {}, {}, []

    def gradients(x, y, values):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(cases.loss(y, model(x, training=True)))
        return tape.gradient(loss, [v.value for v in values])

    def squares(gradients, paths):
        sums = dict.fromkeys(LAYERS, 0.0)
        for path, gradient in zip(paths, gradients, strict=True):
            sums[path[0]] += float(tf.reduce_sum(gradient**2))
        return sums

    def probe(x, y):
        parts = [
            gradients(*part, model.variables) for part in zip(np.split(x, replicas), np.split(y, replicas), strict=True)
        ]
        return {name: sum(squares(part, PATHS)[name] for part in parts) for name in LAYERS}

    for step in range(told.steps):
        x, y = (each.numpy() for each in next(batches)[:2])
        if frozen or budget:
            on = frozen.on(step) if frozen else budget.on(step, lambda x=x, y=y: probe(x, y))
        else:
            on = by_step(schedule, step, told.seed)
        if set(on) != set(before):
            found[step] = {path for path in PATHS if unit(schedule, path) in on}
        for left in set(before) - set(on) if resets else ():
            optimizers.pop(left)
        before = on
        own = [path for path in PATHS if unit(schedule, path) in on]
        summed = gradients(x, y, [variables[path] for path in own])
        if frozen:
            frozen.squares += list(squares(summed, own).values())
        summed, _ = tf.clip_by_global_norm(summed, told.clip_norm)
        for each in on:
            if each not in optimizers:
                optimizers[each] = told.optimizer()
                optimizers[each].build([v for path, v in variables.items() if unit(schedule, path) == each])
            pairs = [(g, variables[p]) for g, p in zip(summed, own, strict=True) if unit(schedule, p) == each]
            optimizers[each].apply(*zip(*pairs, strict=True))
    return {f"variables/{path}": keras.ops.convert_to_numpy(v) for path, v in variables.items()}, found


def check(folder: Path, told: Settings, replicas: int, resets: bool = False) -> None:
    """Whether a run has trained what the schedule says, to the weights of plain Keras."""
    keras.utils.clear_session(free_memory=False)
    cases.set_precision(told.precision)
    weights, selections = reference(told, replicas, resets)
    assert len(selections) > 4 and phases(folder) == selections
    cases.assert_equal(trained(folder), weights, {"float64": 1e-10, "float32": 1e-5}[told.precision])


def trained(folder: Path, steps: int = STEPS) -> dict[str, np.ndarray]:
    return {name: value for name, value in state(folder, steps).items() if name.startswith("variables/")}


@pytest.mark.parametrize(("precision", "counts"), quick([("float64", (1, 4)), ("float32", (2,))], "float32"))
@pytest.mark.parametrize("name", in_turns(quick(SCHEDULES, "phases", "autofreeze")))
def test_equals_one_device_that_trains_the_same(name, precision, counts, tmp_path):
    schedule = budget_for(SCHEDULES[name], precision)
    for count in counts:
        keras.utils.clear_session(free_memory=False)
        folder = tmp_path / str(count)
        made = in_process(count)
        told = settings(schedule, made, precision=precision)
        loop.run(told, folder)
        check(folder, told, count)


@pytest.mark.slow
@pytest.mark.parametrize("leave", ["reset", "drop"])
def test_slots_of_what_is_left(leave, tmp_path):
    """Reset and dropped slots begin again; dropped ones are not in the checkpoint either."""
    made = in_process(2)
    told = settings(SCHEDULES["rotation"], made, precision="float64", leave=leave)
    loop.run(told, tmp_path / "run")
    check(tmp_path / "run", told, 2, resets=True)
    last = {path.split("/")[0] for path in [*phases(tmp_path / "run").values()][-1]}
    slots = {name.split("/")[1] for name in state(tmp_path / "run", STEPS) if name.startswith("slots/")}
    assert {name for name in slots if name in LAYERS} == (last if leave == "drop" else set(LAYERS))


@pytest.mark.parametrize(
    ("name", "leave"),
    in_turns(quick([*((name, "keep") for name in SCHEDULES), ("rotation", "reset"), ("rotation", "drop")], "lisa")),
)
def test_stopped_anywhere_it_goes_on_as_if_it_never_had(name, leave, tmp_path, capsys):
    made = in_process(2)
    schedule = budget_for(SCHEDULES[name], "float32")
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    loop.run(settings(schedule, made, leave=leave, compiled_plans=2), whole)  # so few that some are compiled again
    # 12 is a switch of phases; the last interval of a budget is as long as the run is.
    stops = sorted({12, *random.Random(f"{name} {leave}").sample(range(1, STEPS) if name != "budget" else [3, 9], 2)})
    for steps in [*stops, STEPS]:
        keras.utils.clear_session(free_memory=False)
        loop.run(settings(schedule, made, steps, leave=leave, compiled_plans=2), pieces)
    assert name != "phases" or "phase 4 of 6 starts after 12 steps, and run.steps is 12" in capsys.readouterr().out
    left, right = state(whole, STEPS), state(pieces, STEPS)
    assert left.keys() == right.keys()
    assert all(same_bits([value, right[key]]) for key, value in left.items())
    metrics = [[r for r in rows(folder / "metrics.jsonl") if r["split"] != "eval"] for folder in (whole, pieces)]
    assert metrics[0] == metrics[1]


class Stopping(keras.callbacks.Callback):
    """A signal in the middle of an interval, as a scheduler sends it."""

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 13:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_budget_that_is_interrupted_goes_on_as_if_it_never_had(tmp_path):
    made, each = in_process(), 4 * (WIDTH * WIDTH + WIDTH)
    schedule = Budget(bytes=int(2.7 * each), every=4, units=["[ab]/.*", "[cd]/.*"])
    loop.run(settings(schedule, made, steps_per_loop=1), tmp_path / "whole")
    keras.utils.clear_session(free_memory=False)
    with pytest.raises(Interrupted, match="step 14 of 20"):
        loop.run(settings(schedule, made, callbacks=[Stopping()], steps_per_loop=1), tmp_path / "pieces")
    keras.utils.clear_session(free_memory=False)
    loop.run(settings(schedule, made, steps_per_loop=1), tmp_path / "pieces")
    left, right = (state(tmp_path / name, STEPS) for name in ("whole", "pieces"))
    assert left.keys() == right.keys()
    assert all(same_bits([value, right[key]]) for key, value in left.items())
    assert len(phases(tmp_path / "whole")) > 2 and phases(tmp_path / "whole") == phases(tmp_path / "pieces")


def sent(folder: Path) -> np.ndarray:
    """Bytes that have left the interface of a worker after each step."""
    return np.array([row["nic_bytes"] for row in rows(folder / "metrics.jsonl") if row["split"] == "train"])


def test_bytes_of_a_run_are_within_one_percent_and_each_switch_is_recorded(tmp_path, monkeypatch, capsys):
    """A line a switch; between two of them each step sends what the line says, counted in the graph."""
    made, steps, norms = in_process(2), 91, np.random.default_rng(0)
    monkeypatch.setattr(ScheduleRunner, "_probed", lambda *_: norms.gamma(0.3, size=4))
    each = 4 * (WIDTH * WIDTH + WIDTH)
    schedule = Budget(bytes=int(2.4 * each), every=2, always=["d"])
    loop.run(settings(schedule, made, steps), tmp_path)
    found = rows(tmp_path / "metrics.jsonl")
    plans = {row["step"]: row for row in found if row["split"] == "plan"}
    assert 1 in plans and len({row["digest"] for row in plans.values()}) > 2
    current = None
    for step, bytes_ in enumerate(np.diff(sent(tmp_path), prepend=0), 1):
        current = plans.get(step, current)
        assert bytes_ == current["nic_bytes_per_step"] == 4 * current["trained_parameters"]
    total = sent(tmp_path)[-1]
    assert total == pytest.approx(schedule.bytes * steps, rel=0.01)
    traffic = json.loads((tmp_path / "traffic.json").read_text())
    assert traffic["planned_bytes"] == traffic["counted_bytes"] == total
    said = f"budget: a step took {total / steps:,.0f} of {schedule.bytes:,} bytes on average"
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_the_budget_holds_on_more_replicas(tmp_path):
    """What was chosen among two is too much among four, where a sum costs 1.5 times the payload: chosen anew."""
    each = 4 * (WIDTH * WIDTH + WIDTH)
    schedule = Budget(bytes=2 * each, every=100)
    for steps, count in ((2, 2), (60, 4)):
        keras.utils.clear_session(free_memory=False)
        loop.run(settings(schedule, in_process(count), steps), tmp_path)
    plans = [row for row in rows(tmp_path / "metrics.jsonl") if row["split"] == "plan"]
    assert [row["step"] for row in plans] == [1, 3]
    assert abs(sent(tmp_path)[-1] - 60 * schedule.bytes) <= 58 * 1.5 * each / 2  # half a unit of the second interval


MS = {frozenset({"[ab]/.*"}): 7, frozenset({"[cd]/.*"}): 4, frozenset({"[ab]/.*", "[cd]/.*"}): 8}


class Clock:
    """A clock of which steps take what this says: milliseconds by selection, with noise."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.draw, self.calls = 0.0, np.random.default_rng(0), []
        advance = ScheduleRunner.advance

        def timed(runner, count):
            seconds = 1e-3 * count * MS[runner.phase.units] * self.draw.lognormal(0, 0.05)
            self.calls.append((count, seconds, runner.phase.units))
            self.times = iter([self.now, self.now + seconds])
            self.now += seconds + 100  # for what is no step
            return advance(runner, count)

        monkeypatch.setattr(ScheduleRunner, "advance", timed)
        monkeypatch.setattr(schedule_runner, "time", self)

    def perf_counter(self) -> float:
        return next(self.times)


def test_seconds_of_a_run_are_within_one_percent(tmp_path, monkeypatch):
    """The first step of a selection, in which it may be compiled, is a call by itself, and counts as the others."""
    clock, every, steps = Clock(monkeypatch), 5, 302
    norms = np.random.default_rng(1)
    monkeypatch.setattr(ScheduleRunner, "_probed", lambda *_: norms.gamma(0.3, size=2))
    schedule = Budget(seconds=0.0055, every=every, units=["[ab]/.*", "[cd]/.*"])
    loop.run(settings(schedule, in_process(), 152), tmp_path)
    keras.utils.clear_session(free_memory=False)
    loop.run(settings(schedule, in_process(), steps), tmp_path)  # it goes on from what was spent
    assert {on for *_, on in clock.calls} == set(MS) and sum(count for count, *_ in clock.calls) == steps
    seen: set[object] = set()
    for count, _, on in clock.calls:
        assert count == 1 or on in seen
        seen.add(on)
    total = sum(seconds for _, seconds, _ in clock.calls)
    assert total == pytest.approx(schedule.seconds * steps, rel=0.01)


@pytest.mark.parametrize("leave", ["keep", "drop"])
def test_memory_of_units_is_that_of_what_is_made(leave, tmp_path):
    """Gradients, slots and residuals, counted in what the run holds; the slots of what is off stay or go."""
    made = in_process(2)
    rules = [Rule("a/.*", reduction=TopK(0.5)), Rule(".*", optimizer=functools.partial(keras.optimizers.SGD, 0.1))]
    told = settings(Budget(memory=10**6, every=2), made, 4, rules=rules, leave=leave)
    trainer = build(told, made)
    size = 4 * (WIDTH * WIDTH + WIDTH)
    kept = [sum(np.prod(v.shape) * 4 for v in each.values()) for each in trainer.reduction_states]
    assert not any(group.state for group in trainer.optimizers)
    with made.strategy.scope():
        for group in trainer.optimizers:
            group.allocate()
    slots = {
        group.members[0].entry.unit: sum(keras.ops.convert_to_numpy(v).nbytes for v in group.state.values())
        for group in trainer.optimizers
    }
    assert slots["a"] > 2 * size > slots["b"]
    for unit in trainer.units:
        residuals = sum(kept) if unit.name == "a" else 0
        stays = slots[unit.name] if leave == "keep" else 0
        assert (unit.memory, unit.kept) == (size + slots[unit.name] - stays, residuals + stays)


def test_memory_is_held_by_what_is_dropped(tmp_path):
    """Of four layers with Adam two at a time, whose slots alone are there after each step."""
    made, size = in_process(), 4 * (WIDTH * WIDTH + WIDTH)
    schedule = Budget(memory=2 * (3 * size + 100), every=2, starve=1)
    loop.run(settings(schedule, made, 6, leave="drop", save_every=2), tmp_path)
    on = [sorted({path[0] for path in each}) for each in phases(tmp_path).values()]
    assert len(on) > 1 and all(len(each) == 2 for each in on)
    held = {name.split("/")[1] for name in state(tmp_path, 6) if name.startswith("slots/")} & set(LAYERS)
    assert sorted(held) == on[-1]
    with pytest.raises(UserError, match=r"budget\.memory is .* run\.leave = 'drop'"):
        build(settings(schedule, made, 6), made)


def _work(folder: Path) -> None:
    """One of two workers: every schedule, each in two pieces."""
    made = replicas.create("multi_worker")
    made.backend.close = lambda reason=None: None  # which a run calls at its end; the next one here goes on with it
    for name, schedule in SCHEDULES.items():
        keras.utils.clear_session(free_memory=False)
        loop.run(settings(schedule, made, precision="float64", activation_cache="memory"), folder / name)
    keras.utils.clear_session(free_memory=False)
    # The second worker's clock is fast: by it alone a step takes too long.
    clock, fast = time.perf_counter, 1.0 + 1e6 * json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    schedule_runner.time = types.SimpleNamespace(perf_counter=lambda: fast * clock())
    loop.run(settings(Budget(seconds=60.0, every=2), made), folder / "seconds")


@pytest.mark.slow
def test_two_workers(tmp_path):
    assert_all_end(
        run_workers(["-m", "tests.unit.training.test_schedule_runner", str(tmp_path)], workers=2, timeout=200)
    )
    for name, schedule in SCHEDULES.items():
        check(tmp_path / name, settings(schedule, None, precision="float64"), 2)
    # By its own clock the first would train everything: what is trained was checked to be the same on both.
    assert all(len(on) == 2 for on in phases(tmp_path / "seconds").values())
    assert rows(tmp_path / "seconds" / "metrics.jsonl")[-1]["step"] == STEPS


class Odd(Rotation):
    """A schedule that is no function of step and seed: the second worker goes its own way from step 6 on."""

    def select(self, step, units, seed, state):
        index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        return super().select(step + 3 * (index if step >= 6 else 0), units, seed, state)


def _disagree(folder: Path) -> None:
    made = replicas.create("multi_worker")
    try:
        loop.run(settings(Odd(every=3, order="ascending"), made), folder)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


@pytest.mark.slow
def test_workers_that_disagree_both_stop_before_the_switch(tmp_path):
    for code, output in run_workers(
        ["-m", "tests.unit.training.test_schedule_runner", str(tmp_path), "odd"], workers=2, timeout=100
    ):
        assert code == 2, output[-3000:]
        assert "what is trained from step 7 on" in output and "'d'" in output, output[-1000:]
    assert max(row["step"] for row in rows(tmp_path / "metrics.jsonl") if row["split"] == "train") == 6


def test_what_is_not_reduced_in_every_step_cannot_be_switched():
    from dist_partial.reductions.local_sgd import LocalSGD

    made = in_process()
    told = settings(SCHEDULES["lisa"], made, rules=[Rule(".*", reduction=LocalSGD(4))])
    with pytest.raises(UserError, match=r"run\.schedule switches .*every 4 steps.* of rule '\.\*'"):
        build(told, made)


@pytest.mark.parametrize(("binding", "value"), [("schedule", Lisa), ("schedule", 3), ("leave", "go")])
def test_bad_settings(binding, value):
    with pytest.raises(UserError, match=rf"run\.{binding} is"):
        settings(**{"schedule": SCHEDULES["lisa"], "made": None, binding: value})


if __name__ == "__main__":
    (_disagree if sys.argv[2:] else _work)(Path(sys.argv[1]))
