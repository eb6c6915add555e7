"""Runs whose trained set changes, against plain Keras on one device that follows the schedule by rules of its own."""

import dataclasses
import functools
import json
import os
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial.config.settings import Settings
from dist_partial.data import Dataset, train_batches
from dist_partial.distributed import replicas
from dist_partial.errors import UserError
from dist_partial.schedules.adaptive import AutoFreeze, ByteBudget
from dist_partial.schedules.fixed import Gradual, Lisa, Phases, Rotation
from dist_partial.selection.rules import Rule
from dist_partial.training import loop
from tests.helpers import cases
from tests.helpers.cases import LAYERS, dataset, mlp
from tests.helpers.files import rows, same_bits, state
from tests.helpers.marks import quick
from tests.helpers.strategies import in_process
from tests.helpers.workers import run_workers

# Nothing of tests.conftest may be imported here: the workers below run this file, too, and have one device each.

STEPS, BATCH, WIDTH = 20, 8, 6
SCHEDULES = {
    "phases": Phases([(0, "d/.*"), (3, "[cd]/.*"), (7, "[ab]/kernel"), (12, ".*"), (15, "d/bias"), (17, "[cd]/.*")]),
    "gradual": Gradual(every=4, units=["a/.*", "b/.*", "c/.*", "d/kernel", "d/bias"]),
    "rotation": Rotation(every=3),
    "lisa": Lisa(every=3, count=1),
    "autofreeze": AutoFreeze(every=2, percentile=100.0, retest=3),
    "byte_budget": ByteBudget(bytes=2 * 8 * (WIDTH * WIDTH + WIDTH), every=3),
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
    if isinstance(schedule, ByteBudget) and precision == "float32":
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


class Budget:
    """ByteBudget of the layers, all of one size: those with the largest gradients on the next batch, as many as fit."""

    def __init__(self, schedule: ByteBudget, replicas: int) -> None:
        itemsize, workers = np.dtype(keras.config.floatx()).itemsize, max(2, replicas)
        each = 2 * (workers - 1) / workers * itemsize * (WIDTH * WIDTH + WIDTH)
        self.every, self.fit = schedule.every, int(schedule.bytes // each)
        self.waits, self.taken = dict.fromkeys(LAYERS, 0), []

    def on(self, step: int, probe: Callable[[], dict[str, float]]) -> list[str]:
        if step % self.every == 0:
            norms = probe()
            late = {name: wait if wait >= len(LAYERS) else 0 for name, wait in self.waits.items()}
            self.taken = sorted(LAYERS, key=lambda name: (-late[name], -norms[name]))[: self.fit]
            self.waits = {name: 0 if name in self.taken else wait + 1 for name, wait in self.waits.items()}
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
    budget = Budget(schedule, replicas) if isinstance(schedule, ByteBudget) else None
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
@pytest.mark.parametrize("name", quick(SCHEDULES, "phases", "autofreeze"))
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
    quick([*((name, "keep") for name in SCHEDULES), ("rotation", "reset"), ("rotation", "drop")], "lisa"),
)
def test_stopped_anywhere_it_goes_on_as_if_it_never_had(name, leave, tmp_path, capsys):
    made = in_process(2)
    schedule = budget_for(SCHEDULES[name], "float32")
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    loop.run(settings(schedule, made, leave=leave, compiled_plans=2), whole)  # so few that some are compiled again
    stops = sorted({12, *random.Random(f"{name} {leave}").sample(range(1, STEPS), 2)})  # 12 is a switch of phases
    for steps in [*stops, STEPS]:
        keras.utils.clear_session(free_memory=False)
        loop.run(settings(schedule, made, steps, leave=leave, compiled_plans=2), pieces)
    assert name != "phases" or "phase 4 of 6 starts after 12 steps, and run.steps is 12" in capsys.readouterr().out
    left, right = state(whole, STEPS), state(pieces, STEPS)
    assert left.keys() == right.keys()
    assert all(same_bits([value, right[key]]) for key, value in left.items())
    metrics = [[r for r in rows(folder / "metrics.jsonl") if r["split"] != "eval"] for folder in (whole, pieces)]
    assert metrics[0] == metrics[1]


def test_what_is_recorded_and_sent(tmp_path):
    """A line a switch; between two of them each step sends what the line says, counted in the graph."""
    made = in_process(2)
    schedule = budget_for(SCHEDULES["byte_budget"], "float32")
    loop.run(settings(schedule, made), tmp_path)
    found = rows(tmp_path / "metrics.jsonl")
    plans = [row for row in found if row["split"] == "plan"]
    assert plans[0]["step"] == 1 and len({row["digest"] for row in plans}) > 1
    sent, current = 0, None
    for row in found:
        if row["split"] == "plan":
            current = row
        elif row["split"] == "train":
            assert row["wire_bytes"] - sent == current["wire_bytes_per_step"] <= schedule.bytes
            assert current["wire_bytes_per_step"] == 4 * current["trained_parameters"]
            sent = row["wire_bytes"]
    traffic = json.loads((tmp_path / "traffic.json").read_text())
    assert traffic["planned_bytes"] == traffic["counted_bytes"] == sent


@pytest.mark.slow
def test_the_budget_holds_on_more_replicas(tmp_path):
    """What was chosen among two is too much among four, where a sum costs 1.5 times the payload: chosen anew."""
    schedule = budget_for(SCHEDULES["byte_budget"], "float32")
    schedule = dataclasses.replace(schedule, bytes=2 * schedule.bytes, every=100)
    for steps, count in ((2, 2), (4, 4)):
        keras.utils.clear_session(free_memory=False)
        loop.run(settings(schedule, in_process(count), steps), tmp_path)
    lines = rows(tmp_path / "metrics.jsonl")
    plans = [row for row in lines if row["split"] == "plan"]
    assert [row["step"] for row in plans] == [1, 3]
    assert 1.5 * plans[0]["nic_bytes_per_step"] > schedule.bytes
    sent = 0
    for row in lines:
        if row["split"] == "train":
            factor = 1 if row["step"] <= 2 else 1.5
            current = plans[row["step"] > 2]
            assert row["nic_bytes"] - sent == factor * 4 * current["trained_parameters"] <= schedule.bytes
            sent = row["nic_bytes"]


def _work(folder: Path) -> None:
    """One of two workers: every schedule, each in two pieces."""
    made = replicas.create("multi_worker")
    made.backend.close = lambda reason=None: None  # which a run calls at its end; the next one here goes on with it
    for name, schedule in SCHEDULES.items():
        keras.utils.clear_session(free_memory=False)
        loop.run(settings(schedule, made, precision="float64", activation_cache="memory"), folder / name)


@pytest.mark.slow
def test_two_workers(tmp_path):
    for code, output in run_workers(
        ["-m", "tests.unit.training.test_schedule_runner", str(tmp_path)], workers=2, timeout=200
    ):
        assert code == 0, output[-3000:]
    for name, schedule in SCHEDULES.items():
        check(tmp_path / name, settings(schedule, None, precision="float64"), 2)


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
    from dist_partial.training.build import build

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
