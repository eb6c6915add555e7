"""Runs whose trained set changes, against plain Keras on one device that trains the same variables in each step."""

import dataclasses
import functools
import json
import os
import random
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial import replicas, run
from dist_partial.data import ArraySource, Dataset, fingerprint, train_batches
from dist_partial.errors import UserError
from dist_partial.replicas import Replicas
from dist_partial.schedule import AutoFreeze, ByteBudget, Gradual, Lisa, Phases, Rotation
from dist_partial.selection import Rule
from dist_partial.settings import Settings
from dist_partial.wire import Wire
from tests import cases
from tests.cases import rows, same_bits, state
from tests.workers import run_workers

# Nothing of tests.conftest may be imported here: the workers below run this file, too, and have one device each.

STEPS, BATCH, WIDTH = 20, 8, 6
LAYERS = ("a", "b", "c", "d")
SCHEDULES = {
    "phases": Phases([(0, "d/.*"), (3, "[cd]/.*"), (7, "[ab]/kernel"), (12, ".*"), (15, "d/bias"), (17, "[cd]/.*")]),
    "gradual": Gradual(every=4, units=["a/.*", "b/.*", "c/.*", "d/kernel", "d/bias"]),
    "rotation": Rotation(every=3),
    "lisa": Lisa(every=3, count=1),
    "autofreeze": AutoFreeze(every=2, percentile=100.0, retest=3),
    "byte_budget": ByteBudget(bytes=2 * 8 * (WIDTH * WIDTH + WIDTH), every=3),
}


def mlp() -> keras.Model:
    layers = [keras.layers.Dense(WIDTH, "tanh" if name != "d" else None, name=name) for name in LAYERS]
    return keras.Sequential([keras.Input((WIDTH,)), *layers])


def points() -> Dataset:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, WIDTH)).astype(keras.config.floatx())
    y = np.argmax(x @ rng.normal(size=(WIDTH, WIDTH)), axis=1).astype(np.int32)
    source = ArraySource(x, y)
    return Dataset("points", source, source, fingerprint(x, y))


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


def legs(folder: Path) -> dict[int, list[str]]:
    """The paths that are trained from a step on, from 0, as the run has recorded them."""
    units = {row["step"] - 1: row["units"] for row in rows(folder / "metrics.jsonl") if row["split"] == "plan"}
    return {step: [path for unit in names for path in unit_paths(unit)] for step, names in units.items()}


def unit_paths(unit: str) -> list[str]:
    every = [f"{layer}/{name}" for layer in LAYERS for name in ("kernel", "bias")]
    known = {path: path for path in every} | {layer: layer for layer in LAYERS}
    return [path for path in every if unit in (path, path.split("/")[0])] if unit in known else PHASES[unit]


def partition(schedule) -> dict[str, tuple[str, ...]]:
    every = [f"{layer}/{name}" for layer in LAYERS for name in ("kernel", "bias")]
    return dict(schedule.partition(every))


PHASES = {name: list(paths) for name, paths in partition(SCHEDULES["phases"]).items()} | {
    name: list(paths) for name, paths in partition(SCHEDULES["gradual"]).items()
}


def reference(told: Settings, folder: Path, resets: bool = False) -> dict[str, np.ndarray]:
    """Plain Keras, one device, one optimizer a unit; each leaves alone what its unit does not train at that step."""
    keras.utils.set_random_seed(told.seed)
    model, data = mlp(), points()
    variables = dict(zip([v.path.split("/", 1)[1] for v in model.variables], model.variables, strict=True))
    units = {path: name for name, paths in partition(told.schedule).items() for path in paths}
    optimizers = {}
    context = tf.distribute.InputContext(1, 0, 1)
    batches = iter(train_batches(data.train, first_step=0, global_batch=BATCH, seed=told.seed, context=context))
    selected, before = legs(folder), []
    for step in range(told.steps):
        trained = selected.get(step, before)
        if resets:
            for unit in {units[path] for path in before} - {units[path] for path in trained}:
                optimizers.pop(unit)
        before = trained
        x, y = next(batches)[:2]
        values = [variables[path] for path in trained]
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(cases.loss(y, model(x, training=True)))
        gradients = tape.gradient(loss, [v.value for v in values])
        gradients, _ = tf.clip_by_global_norm(gradients, told.clip_norm)
        for unit in dict.fromkeys(units[path] for path in trained):
            own = [i for i, path in enumerate(trained) if units[path] == unit]
            if unit not in optimizers:
                optimizers[unit] = told.optimizer()
                optimizers[unit].build([v for path, v in variables.items() if units[path] == unit])
            optimizers[unit].apply([gradients[i] for i in own], [values[i] for i in own])
    return {f"variables/{path}": keras.ops.convert_to_numpy(v) for path, v in variables.items()}


def trained(folder: Path, steps: int = STEPS) -> dict[str, np.ndarray]:
    return {name: value for name, value in state(folder, steps).items() if name.startswith("variables/")}


@pytest.mark.parametrize(("precision", "counts"), [("float64", (1, 2, 4)), ("float32", (2,))])
@pytest.mark.parametrize("name", SCHEDULES)
def test_equals_one_device_that_trains_the_same(name, precision, counts, mirrored, tmp_path):
    schedule = budget_for(SCHEDULES[name], precision)
    for count in counts:
        keras.utils.clear_session(free_memory=False)
        folder = tmp_path / str(count)
        made = Replicas(mirrored(count), Wire(), str(count))
        told = settings(schedule, made, precision=precision)
        run.run(told, folder)
        assert len(legs(folder)) > 4, legs(folder)
        keras.utils.clear_session(free_memory=False)
        cases.set_precision(precision)
        cases.assert_equal(trained(folder), reference(told, folder), {"float64": 1e-10, "float32": 1e-5}[precision])


@pytest.mark.parametrize("leave", ["reset", "drop"])
def test_slots_of_what_is_left(leave, mirrored, tmp_path):
    """Reset and dropped slots begin anew; dropped ones are not in the checkpoint either."""
    made = Replicas(mirrored(2), Wire(), "two")
    told = settings(SCHEDULES["rotation"], made, precision="float64", leave=leave)
    run.run(told, tmp_path / "run")
    cases.set_precision("float64")
    cases.assert_equal(trained(tmp_path / "run"), reference(told, tmp_path / "run", resets=True), 1e-10)
    last = {path.split("/")[0] for path in [*legs(tmp_path / "run").values()][-1]}
    slots = {name.split("/")[1] for name in state(tmp_path / "run", STEPS) if name.startswith("slots/")}
    assert {name for name in slots if name in LAYERS} == (last if leave == "drop" else set(LAYERS))


@pytest.mark.parametrize(
    ("name", "leave"), [*((name, "keep") for name in SCHEDULES), ("rotation", "reset"), ("rotation", "drop")]
)
def test_stopped_anywhere_it_goes_on_as_if_it_never_had(name, leave, mirrored, tmp_path, capsys):
    made = Replicas(mirrored(2), Wire(), "two")
    schedule = budget_for(SCHEDULES[name], "float32")
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    run.run(settings(schedule, made, leave=leave, compiled_plans=2), whole)  # so few that some are compiled again
    stops = sorted(random.Random(f"{name} {leave}").sample(range(1, STEPS), 5))
    for steps in [*stops, STEPS]:
        keras.utils.clear_session(free_memory=False)
        run.run(settings(schedule, made, steps, leave=leave, compiled_plans=2), pieces)
    assert name != "phases" or "phase 4 of 6 starts after 12 steps, and run.steps is 12" in capsys.readouterr().out
    left, right = state(whole, STEPS), state(pieces, STEPS)
    assert left.keys() == right.keys()
    assert all(same_bits([value, right[key]]) for key, value in left.items())
    metrics = [[r for r in rows(folder / "metrics.jsonl") if r["split"] != "eval"] for folder in (whole, pieces)]
    assert metrics[0] == metrics[1]


def test_what_is_recorded_and_sent(mirrored, tmp_path):
    """A line a switch; between two of them each step sends what the line says, counted in the graph."""
    made = Replicas(mirrored(2), Wire(), "two")
    schedule = budget_for(SCHEDULES["byte_budget"], "float32")
    run.run(settings(schedule, made), tmp_path)
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


def test_the_budget_holds_on_more_replicas(mirrored, tmp_path):
    """What was chosen among two is too much among four, where a sum costs 1.5 times the payload: chosen anew."""
    schedule = budget_for(SCHEDULES["byte_budget"], "float32")
    schedule = dataclasses.replace(schedule, bytes=2 * schedule.bytes, every=100)
    for steps, count in ((2, 2), (4, 4)):
        keras.utils.clear_session(free_memory=False)
        run.run(settings(schedule, Replicas(mirrored(count), Wire(), str(count)), steps), tmp_path)
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
    made.mesh.close = lambda reason=None: None  # which a run calls at its end; the next one here goes on with it
    for name, schedule in SCHEDULES.items():
        keras.utils.clear_session(free_memory=False)
        run.run(settings(schedule, made, precision="float64", cache="memory"), folder / name)


def test_two_workers(tmp_path):
    for code, output in run_workers(["-m", "tests.test_course", str(tmp_path)], workers=2, timeout=200):
        assert code == 0, output[-3000:]
    for name, schedule in SCHEDULES.items():
        assert len(legs(tmp_path / name)) > 4
        keras.utils.clear_session(free_memory=False)
        cases.set_precision("float64")
        told = settings(schedule, None, precision="float64")
        cases.assert_equal(trained(tmp_path / name), reference(told, tmp_path / name), 1e-10)


class Odd(Rotation):
    """A schedule that is no function of step and seed: the second worker goes its own way from step 6 on."""

    def select(self, step, units, seed, state):
        index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        return super().select(step + 3 * (index if step >= 6 else 0), units, seed, state)


def _disagree(folder: Path) -> None:
    made = replicas.create("multi_worker")
    try:
        run.run(settings(Odd(every=3, order="ascending"), made), folder)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def test_workers_that_disagree_both_stop_before_the_switch(tmp_path):
    for code, output in run_workers(["-m", "tests.test_course", str(tmp_path), "odd"], workers=2, timeout=100):
        assert code == 2, output[-3000:]
        assert "what is trained from step 7 on" in output and "'d'" in output, output[-1000:]
    assert max(row["step"] for row in rows(tmp_path / "metrics.jsonl") if row["split"] == "train") == 6


def test_what_is_not_reduced_in_every_step_cannot_be_switched():
    from dist_partial.build import build
    from dist_partial.reduction import LocalSGD

    made = Replicas(tf.distribute.get_strategy(), Wire(), "one")
    told = settings(SCHEDULES["lisa"], made, rules=[Rule(".*", reduction=LocalSGD(4))])
    with pytest.raises(UserError, match=r"run\.schedule switches .*every 4 steps.* of rule '\.\*'"):
        build(told, made)


@pytest.mark.parametrize(("binding", "value"), [("schedule", Lisa), ("schedule", 3), ("leave", "go")])
def test_bad_settings(binding, value):
    with pytest.raises(UserError, match=rf"run\.{binding} is"):
        settings(**{"schedule": SCHEDULES["lisa"], "made": None, binding: value})


if __name__ == "__main__":
    (_disagree if sys.argv[2:] else _work)(Path(sys.argv[1]))
