"""What makes a run another than its folder's: a key of the fingerprint, or a setting, without a case here fails."""

import dataclasses
import functools
import json
import re

import keras
import numpy as np
import pytest

from dist_partial.checkpoints import fingerprints
from dist_partial.config.settings import Settings
from dist_partial.errors import UserError
from dist_partial.models import two_dense
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.schedules.fixed import Constant, Rotation
from dist_partial.selection.rules import Rule
from dist_partial.training.build import build
from tests.helpers.cases import dataset
from tests.helpers.strategies import in_process

RULES = [("train", "dense1/.*"), ("train", "dense2/kernel"), ("freeze", "dense2/bias")]


def ids(seed=0, name="ids"):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 10, (8, 16)).astype(np.int32), rng.integers(0, 10, 8).astype(np.int32)
    return dataset(name, x, y)


def shifted(shift, x, y):
    return x + shift, y


def mapped(shift, evaluation=0):
    return ids().map(functools.partial(shifted, shift), evaluation=functools.partial(shifted, evaluation))


def model(hidden=8, **changed):
    """`changed` are attributes of layers; a bias is moved by one."""
    made = two_dense(hidden=hidden)
    for name, value in changed.items():
        layer = made.get_layer(name)
        if value == "bias":
            layer.bias.assign(layer.bias + 1)
        else:
            layer.activation = value
    return made


def adam(rate=0.1, excluded=()):
    made = keras.optimizers.AdamW(rate)
    if excluded:
        made.exclude_from_weight_decay(var_names=excluded)
    return made


def a_function():
    return keras.losses.sparse_categorical_crossentropy


def of_own():
    return lambda y, outputs: keras.losses.sparse_categorical_crossentropy(y, outputs, from_logits=True)


CASES = [
    ("rules", {"rules": [("train", "dense1/kernel"), ("train", "dense2/kernel"), ("freeze", ".*bias")]}),
    ("rules", {"rules": [Rule("dense1/.*", reduction=AllReduce("bfloat16")), *RULES[1:]]}),
    ("rules", {"rules": [Rule("dense1/.*", between_hosts=AllReduce("bfloat16")), *RULES[1:]]}),
    ("reduction", {"reduction": AllReduce("bfloat16")}),
    ("reduction", {"between_hosts": AllReduce("bfloat16")}),
    ("seed", {"seed": 1}),
    ("global_batch", {"global_batch": 8}),
    ("precision", {"precision": "float64"}),
    ("clip_norm", {"clip_norm": 1.0}),
    ("statistics", {"statistics": "all"}),
    ("loss", {"loss": keras.losses.SparseCategoricalCrossentropy}),
    ("loss", {"loss": a_function}),
    ("loss", {"loss_weights": 0.5}),
    ("code", {"loss": of_own}),
    ("class_weight", {"class_weight": {1: 2.0}}),
    ("data", {"data": functools.partial(ids, seed=1)}),
    ("data", {"data": functools.partial(ids, name="others")}),
    ("data", {"data": functools.partial(mapped, 1)}),
    ("model", {"model": functools.partial(model, hidden=9)}),
    ("model_config", {"model": functools.partial(model, dense1=keras.activations.sigmoid)}),
    ("optimizers", {"optimizer": keras.optimizers.SGD}),
    ("optimizers", {"optimizer": functools.partial(adam, 0.2)}),
    ("optimizers", {"optimizer": functools.partial(adam, excluded=["kernel"])}),
    ("frozen", {"model": functools.partial(model, dense2="bias")}),
    ("frozen", {"frozen_dtype": "bfloat16"}),
    ("initial values", {"model": functools.partial(model, dense1="bias")}),
    ("schedule", {"schedule": Rotation(every=3)}),
    ("leave", {"leave": "drop"}),
]
# How long, how fast, how often and where: what may change while a run goes on.
FREE = {
    "steps",
    "eval_first",
    "eval_every",
    "eval_examples",
    "save_every",
    "save_async",
    "keep",
    "accumulate",
    "steps_per_loop",
}
FREE |= {"metrics", "weighted_metrics", "callbacks", "trackers", "profile", "best", "patience"}
FREE |= {"jit_compile", "compiled_plans", "activation_cache", "readers", "reader_processes", "replicas", "sampling"}
FREE |= {"prefetch_to_device"}


def of(**more):
    """The fingerprint of a run in which all that there is has a value."""
    given = {"rules": RULES, "model": model, "data": ids, "optimizer": adam, "steps": 20, "global_batch": 4}
    made = in_process()
    return build(Settings(**{**given, "schedule": Rotation(every=2), **more}), made).fingerprint


@pytest.fixture(scope="module")
def base():
    return of()


def test_there_is_a_case_for_every_key_and_every_setting(base):
    assert {key for key, _ in CASES} == set(base)
    assert {name for _, more in CASES for name in more} | FREE == {each.name for each in dataclasses.fields(Settings)}
    assert set(base) - set(of(schedule=Constant())) == {"schedule", "leave"}  # which then mean nothing


@pytest.mark.parametrize(("key", "more"), CASES)
def test_another_value_of_it_is_another_run(key, more, base, tmp_path):
    """Which the difference in this key alone tells; but of the initial values a checkpoint takes the place."""
    (tmp_path / fingerprints.RUN_FILE).write_text(json.dumps(base))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-0000000001.safetensors").touch()
    assert fingerprints.check_run(tmp_path, of())
    other = of(**more)
    assert other[key] != base[key]
    only = base | {key: other[key]}
    if key == "initial values":
        assert fingerprints.check_run(tmp_path, only)
    else:
        words = {"frozen": "the frozen variable 'dense2/bias'", "data": "(the data has other examples|data.name was)"}
        words["code"] = "the code of the loss function has changed"
        said = words.get(key, rf"{key}\b")
        with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))} belongs to another run: {said}"):
            fingerprints.check_run(tmp_path, only)


def test_another_function_of_the_data_is_another_run(tmp_path):
    """By what it computes with, and not by its name alone; also on the examples held out."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-0000000001.safetensors").touch()
    (tmp_path / fingerprints.RUN_FILE).write_text(json.dumps(of(data=functools.partial(mapped, 1))))
    assert fingerprints.check_run(tmp_path, of(data=functools.partial(mapped, 1)))
    said = r"belongs to another run: shifted of run\.data: argument 0 was 1 and is now 2; choose another"
    with pytest.raises(UserError, match=said):
        fingerprints.check_run(tmp_path, of(data=functools.partial(mapped, 2)))
    said = r"belongs to another run: shifted \(2\) of run\.data: argument 0 was 0 and is now 3; choose another"
    with pytest.raises(UserError, match=said):
        fingerprints.check_run(tmp_path, of(data=functools.partial(mapped, 1, 3)))


CELL = """
import keras

SCALE = 2.0

def scaled(x):
    return SCALE * x

class Block(keras.layers.Layer):
    rate = 1.0

    def call(self, x):
        return self.rate * self.shifted(scaled(x))

    def shifted(self, x):
        return x + 1

def loss(y, outputs):
    return keras.ops.mean(outputs, -1) + 0.0 * y

class Loss(keras.losses.Loss):
    def call(self, y, outputs):
        return loss(y, outputs)

class Adam(keras.optimizers.Adam):
    def update_step(self, gradient, variable, learning_rate):
        return super().update_step(gradient, variable, learning_rate)

class Decay(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.1 / (step + 1)

    def get_config(self):
        return {}

functions = [loss, lambda y, outputs: keras.ops.mean(outputs, -1) + 0.0 * y]
"""


def of_cell(code, loss=0):
    """The fingerprint of a run whose classes and functions were typed into a notebook."""
    names = {"__name__": "__main__"}
    exec(compile(code, "<cell>", "exec"), names)

    def make():
        made = two_dense()
        return keras.Sequential([*made.layers, names["Block"]()])

    losses = [*names["functions"], names["Loss"]()]
    return of(model=make, loss=lambda: losses[loss], optimizer=functools.partial(names["Adam"], names["Decay"]()))


@pytest.mark.parametrize(
    ("number", "old", "new", "words"),
    [
        (0, "scaled(x))", "x * x)", "the code of Block.call has changed"),
        (0, "SCALE = 2.0", "SCALE = 3.0", "Block.call.scaled.SCALE was 2.0 and is now 3.0"),
        (0, "rate = 1.0", "rate = 2.0", "Block.rate was 1.0 and is now 2.0"),
        (0, "x + 1", "x + 2", "the code of Block.shifted has changed"),
        (0, "-1) + 0.0 * y\n\nclass", "-1) * 9.0 + 0.0 * y\n\nclass", "the code of the loss function has changed"),
        (1, "-1) + 0.0 * y]", "-1) * 9.0 + 0.0 * y]", "the code of the loss function has changed"),
        (2, "return loss(y, outputs)", "return -loss(y, outputs)", "the code of Loss.call has changed"),
        (0, "(gradient, variable, learning_rate)\n\n", "(-gradient, variable, learning_rate)\n\n", "the code of Adam"),
        (0, "0.1 / (step + 1)", "0.1 / (step + 2)", r"the code of Decay.__call__ has changed"),
        (0, "SCALE = 2.0", "# moved\n\nSCALE = 2.0", ""),
        (1, "SCALE = 2.0", "# moved\n\nSCALE = 2.0", ""),
        (0, "    rate = 1.0", "    def of_no_use(self):\n        pass\n\n    rate = 1.0", ""),
    ],
)
def test_other_code_is_another_run(number, old, new, words, tmp_path):
    """By what it computes: where it is and what it is called make no difference."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-0000000001.safetensors").touch()
    (tmp_path / fingerprints.RUN_FILE).write_text(json.dumps(of_cell(CELL, number)))
    assert old in CELL
    changed = of_cell(CELL.replace(old, new), number)
    if words:
        with pytest.raises(UserError, match=f"belongs to another run: {re.escape(words)}"):
            fingerprints.check_run(tmp_path, changed)
    else:
        assert fingerprints.check_run(tmp_path, changed)


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("frozen.a/kernel", None, "55167a7fdd35c9b4", "'a/kernel' is frozen now"),
        ("frozen.a/kernel", "55167a7fdd35c9b4", None, "'a/kernel' is no longer frozen"),
        ("frozen.a/kernel", "55167a7fdd35c9b4", "0", "the frozen variable 'a/kernel' has other values"),
        ("data.fingerprint", "55167a7fdd35c9b4", "0", "the data has other examples"),
        ("data.functions.crop.SIZE", "32", "64", "crop of run.data: SIZE was 32 and is now 64"),
        ("data.functions.crop.code", "code 1 of Python 3", "code 2 of Python 3", "crop of run.data has other code"),
        ("data.functions.crop.f.code", "code 1 of Python 3", None, "crop of run.data has other code (f)"),
        ("code.Block.call.code", "code 1 of Python 3", "code 2 of Python 3", "the code of Block.call has changed"),
        ("code.Block.call.code", None, "code 2 of Python 3", "the code of Block.call is new"),
        ("code.Block.call.SCALE", "2", "3", "Block.call.SCALE was 2 and is now 3"),
        ("model.a/kernel", None, "float32[3]", "model.a/kernel, 'float32[3]', is new"),
        ("model.a/kernel", "float32[3]", None, "model.a/kernel, 'float32[3]', is gone"),
        ("model.a/kernel", "float32[3]", "float32[4]", "model.a/kernel was 'float32[3]' and is now 'float32[4]'"),
        ("rules.1", "freeze .*", None, "rules.1, 'freeze .*', is gone"),
        ("clip_norm", None, 1.0, "clip_norm was None and is now 1.0"),
    ],
)
def test_a_difference_is_said_in_words(name, old, new, words, tmp_path):
    """And not by digests, which mean nothing to a reader."""
    part, _, key = name.partition(".")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-0000000001.safetensors").touch()
    keys = key.split(".", 2) if part == "data" else [key]  # within functions.crop
    before, now = (
        {
            part: functools.reduce(
                lambda inner, each: {each: inner}, keys[-2::-1], {} if value is None else {keys[-1]: value}
            )
        }
        if key
        else {part: value}
        for value in (old, new)
    )
    (tmp_path / fingerprints.RUN_FILE).write_text(json.dumps(before))
    with pytest.raises(UserError, match=re.escape(f"belongs to another run: {words}; choose another --run_dir, or")):
        fingerprints.check_run(tmp_path, now)
