"""What tells functions on the examples apart: each change that changes what they compute, and nothing else."""

import functools
import importlib
import os
import re
import subprocess
import sys

import gin
import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial.config import gin_files
from dist_partial.data.functions import described, nameless, other_python
from tests import ROOT

MODULE = '''
import functools
import keras
import numpy as np
import tensorflow as tf
import {helper} as helper
SIZE = 32
CONFIG = {{"flip": True, "scales": [0.5, 1.0]}}
layer = keras.layers.RandomRotation(0.1)

def blur(x, radius=2):
    """Blurs."""
    return x * radius if "a" in {{"a", "b", "c"}} else x

def crop(x, y, seed=0, strength=0.1):
    """Crops."""
    # a comment
    x = blur(x[:SIZE]) + layer(x) + helper.shift(x)
    return [each + strength for each in x], (lambda one: one - 1)(y), CONFIG

class Noise:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, x, y):
        return x * self.scale, y

def make(table):
    def looked_up(x, y):
        return table[x], y
    return looked_up

functions = {{
    "crop": crop,
    "partial": functools.partial(crop, strength=0.1),
    "object": Noise(0.1),
    "method": Noise(0.1).__call__,
    "closure": make(np.arange(3)),
    "traced": tf.function(crop),
    "layer": layer,
}}
'''
HELPER = """
SHIFT = 1

def shift(x):
    return x + SHIFT
"""


@pytest.fixture
def of(tmp_path, monkeypatch):
    """What the functions of the module compute with, after a change of its text."""

    def described_after(name, old="", new="", helper=("", "")):
        assert old in MODULE and helper[0] in HELPER
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "changed_helper.py").write_text(HELPER.replace(*helper))
        (folder / "changed_module.py").write_text(MODULE.replace(old, new).format(helper="changed_helper"))
        monkeypatch.syspath_prepend(str(folder))
        for each in ("changed_helper", "changed_module"):
            monkeypatch.delitem(sys.modules, each, raising=False)
        return described(importlib.import_module("changed_module").functions[name])

    yield described_after
    for each in ("changed_helper", "changed_module"):
        sys.modules.pop(each, None)


CHANGES = [
    ("crop", "x[:SIZE]", "x[SIZE:]", "code"),
    ("crop", "one - 1", "one - 2", "code"),
    ("crop", "each + strength", "each - strength", "code"),
    ("crop", "SIZE = 32", "SIZE = 64", "SIZE"),
    ("crop", "[0.5, 1.0]", "[0.5, 2.0]", "CONFIG"),
    ("crop", "strength=0.1):", "strength=0.2):", "default of strength"),
    ("crop", "x * radius", "x + radius", "blur.code"),
    ("crop", '{{"a", "b", "c"}}', '{{"a", "b", "d"}}', "blur.code"),
    ("crop", "radius=2", "radius=3", "blur.default of radius"),
    ("crop", "RandomRotation(0.1)", "RandomRotation(0.2)", "layer"),
    ("partial", "crop, strength=0.1", "crop, strength=0.2", "argument strength"),
    ("partial", "SIZE = 32", "SIZE = 64", "SIZE"),
    ("object", "Noise(0.1),", "Noise(0.2),", "scale"),
    ("object", "x * self.scale", "x + self.scale", "class Noise"),
    ("method", "Noise(0.1).__call__", "Noise(0.2).__call__", "self"),
    ("method", "x * self.scale", "x + self.scale", "code"),
    ("closure", "np.arange(3)", "np.arange(4)", "table"),
    ("closure", "table[x]", "table[-x]", "code"),
    ("traced", "one - 1", "one - 2", "code"),
    ("layer", "RandomRotation(0.1)", "RandomRotation(0.2)", "factor"),
]


@pytest.mark.parametrize(("name", "old", "new", "key"), CHANGES)
def test_what_changes_is_named(name, old, new, key, of):
    before, after = of(name), of(name, old, new)
    changed = {key for key in {*before, *after} if before.get(key) != after.get(key)}
    assert key in changed and changed <= {key, "class Noise"}


@pytest.mark.parametrize(("old", "key"), [("SHIFT = 1", "helper.shift.SHIFT"), ("x + SHIFT", "helper.shift.code")])
def test_what_changes_in_another_module_of_the_users_is_named(old, key, of):
    before, after = of("crop"), of("crop", helper=(old, old.replace("1", "2").replace("+", "-")))
    assert [key for key in before if before[key] != after[key]] == [key]


SAME = [
    ("", ""),
    ("# a comment", "# another one"),
    ('"""Crops."""', '"""Crops at random."""'),
    ("SIZE = 32\n", "\n\nOTHER = 7\nSIZE = 32\n"),
    ("def make", "def unused(x):\n    return x\n\n\ndef make"),
]


@pytest.mark.parametrize(("old", "new"), SAME)
@pytest.mark.parametrize("name", ["crop", "partial", "object", "method", "closure", "traced", "layer"])
def test_what_computes_the_same_is_the_same(name, old, new, of):
    assert of(name) == of(name, old, new)


def test_code_that_has_run_is_the_same():
    """CPython rewrites the bytecode of what it runs often."""

    def often(x):
        total = 0
        for each in range(x):
            total += each * 2
        return total

    before = described(often)
    for _ in range(200):
        often(20)
    assert described(often) == before and before["code"].startswith("code ")


def test_code_of_installed_packages_counts_by_its_name():
    assert described(tf.image.flip_left_right) == {"code": "tensorflow.python.ops.image_ops_impl.flip_left_right"}

    def calls(x):
        return tf.nest.flatten(np.sum(x))

    assert list(described(calls)) == ["code"]


def test_nothing_that_an_object_does_can_fail():
    class Odd:
        def __getattr__(self, name):
            raise RuntimeError(name)

        def __repr__(self):
            raise RuntimeError

    odd, itself = Odd(), []
    itself.append(itself)

    def function(x):
        return odd, itself, missing  # noqa: F821

    assert {"odd", "itself"} < described(function).keys()


def test_a_function_that_calls_itself():
    def down(x):
        return down(x - 1) if x else x

    assert list(described(down)) == ["code"]


def test_what_two_versions_of_python_made_is_not_compared():
    code = described(lambda x: x)["code"]
    ours = re.search(r"Python (\S+)$", code)[1]
    assert other_python(code, code.replace(ours, "3.99")) and not other_python(code, code)
    assert not other_python(code, None) and not other_python("1", "2")


def test_a_lambda_of_keras_is_compared_without_its_line():
    first = keras.layers.Lambda(lambda x: x * 2)
    again = keras.layers.Lambda(lambda x: x * 2)
    other = keras.layers.Lambda(lambda x: x * 3)
    configs = [nameless(layer.get_config()) for layer in (first, again, other)]
    assert configs[0] == configs[1] != configs[2]


def test_what_gin_binds_to_a_function_counts():
    @gin.configurable("bound_noise", module="test_functions")
    def noise(x, scale=1.0, other=2.0):
        return x * scale * other

    def plain(x, scale=1.0, other=2.0):
        return x * scale * other

    try:
        with gin.unlock_config():
            gin.parse_config("bound_noise.scale = 0.5\nsome/bound_noise.other = 3.0")
        assert described(noise)["default of scale"] == "1.0" and "name" not in described(noise)
        assert gin_files.bound(functools.partial(noise, 3)) == {
            "test_functions.bound_noise.scale": "0.5",
            "some/test_functions.bound_noise.other": "3.0",
        }
        assert gin_files.bound(plain) == {}
    finally:
        gin.clear_config()


@pytest.mark.slow
def test_another_process_says_the_same(tmp_path):
    """Where strings have other hashes, and the script is piped in and has no file."""
    script = MODULE.format(helper="helper") + (
        "from dist_partial.data.functions import described\n"
        "print([described(function) for function in functions.values()])"
    )
    (tmp_path / "helper.py").write_text(HELPER)
    said = set()
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
        done = subprocess.run(
            [sys.executable, "-"], input=script, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        said.add(done.stdout)
    assert len(said) == 1 and "code " in said.pop()
