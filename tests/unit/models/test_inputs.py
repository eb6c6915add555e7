"""What a model takes and data gives: refused where Keras refuses it, or would mix the inputs up."""

import itertools

import keras
import numpy as np
import pytest

from dist_partial.config.settings import Settings
from dist_partial.data import ArraySource, Dataset
from dist_partial.distributed.replicas import create
from dist_partial.errors import UserError
from dist_partial.models.inputs import check_inputs
from dist_partial.training.build import build

NAMES = "abc"


def model_of(structure: type) -> keras.Model:
    inputs = [keras.Input([1], name=name) for name in NAMES]
    taken = dict(zip(NAMES, inputs, strict=True)) if structure is dict else structure(inputs)
    return keras.Model(taken, keras.layers.concatenate(inputs))


def given(keys: str) -> dict[str, np.ndarray]:
    return {key: np.full([2, 1], float(ord(key)), np.float32) for key in keys}


@pytest.mark.parametrize("structure", [dict, list, tuple])
def test_names_are_refused_where_keras_raises_or_takes_others(structure):
    """Keras feeds a dict of inputs in the order of the keys that there are: 'aa' for 'b'."""
    model, refused = model_of(structure), set()
    expected = model(list(given(NAMES).values()) if structure is not dict else given(NAMES)).numpy()
    for keys in [set(keys) for n in range(1, 6) for keys in itertools.combinations([*NAMES, "d", "aa"], n)]:
        x = {key: np.full([2, 1], float(ord(key[0])) + len(key) - 1, np.float32) for key in sorted(keys)}
        try:
            good = np.array_equal(model(x).numpy(), expected)
        except (ValueError, TypeError):
            good = False
        try:
            check_inputs(model, "mine", x)
        except UserError:
            refused.add(frozenset(keys))
            assert not good, keys
        else:
            assert good, keys
    assert frozenset("ab") in refused and frozenset(NAMES) not in refused


@pytest.mark.parametrize("structure", [dict, list, tuple])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_numbers_are_refused_where_keras_raises(structure, count):
    model, x = model_of(structure), tuple(np.ones([2, 1], np.float32) for _ in range(count))
    x = x if count > 1 else x[0]
    if count == len(NAMES):
        model(x)
        check_inputs(model, "mine", x)
        return
    with pytest.raises((ValueError, TypeError)):
        model(x)
    with pytest.raises(UserError):
        check_inputs(model, "mine", x)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (given("ab"), "has the inputs 'a', 'b', 'c', and mine's examples have no 'c'; give each input under its name"),
        ({**given("ab"), "cc": 0}, "and mine's examples have no 'c'; nearest: 'cc'; give"),
        (given("abz"), "and mine's examples have no 'c', but 'z'; give"),
        (given("az"), "and mine's examples have no 'b', 'c', but 'z'; give"),
        ({**given("abc"), "aa": 0}, "and mine's examples have 'aa' as well; leave out what it does not take"),
        (tuple("ab"), "have 2 without a name: 'c' is missing; give x as {'a': ..., 'b': ..., 'c': ...}"),
        ("a", "have 1 without a name: 'b', 'c' are missing; give"),
        (list("abcd"), "have 4 without a name: 1 too many; give"),
    ],
)
def test_what_is_missing_is_named(x, words):
    with pytest.raises(UserError) as raised:
        check_inputs(model_of(dict), "mine", x)
    assert str(raised.value).startswith("run.model ") and words in str(raised.value), raised.value


def test_a_long_list_is_cut():
    inputs = {f"x{i:02}": keras.Input([1], name=f"x{i:02}") for i in range(50)}
    with pytest.raises(
        UserError, match=r"inputs 'x00', .* 'x07' and 42 more, and mine's examples have no 'x01', .* and"
    ):
        check_inputs(keras.Model(inputs, keras.layers.concatenate(list(inputs.values()))), "mine", {"x00": ...})


def test_optional_inputs_and_nested_ones_are_left_to_keras():
    a, b, c = (keras.Input([1], name=name, optional=name == "b") for name in NAMES)
    check_inputs(keras.Model({"a": a, "b": b}, a * 2), "mine", given("a"))
    check_inputs(keras.Model({"a": a, "more": [c]}, a + c), "mine", given("a"))
    check_inputs(keras.Sequential([keras.layers.Dense(1)]), "mine", given("ab"))


class Asking(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def call(self, x):
        return self.dense(x["height"])


def built(model, x) -> None:
    source = ArraySource(x, np.ones([8, 1], np.float32))
    data = Dataset("mine", source, source, "0")
    build(Settings([("train", ".*")], model, lambda: data, loss="mse", global_batch=8), create("default"))


@pytest.mark.filterwarnings("ignore")
def test_a_run_names_them_too():
    x = np.ones([8, 1], np.float32)
    with pytest.raises(
        UserError, match=r"^run\.model has the inputs 'a', 'b', 'c', and mine's examples have no 'c'; give"
    ):
        built(lambda: model_of(list), {"a": x, "b": x})
    with pytest.raises(
        UserError,
        match=r"^run\.model asks for 'height' \(.*test_inputs.py, line \d+\), .* have 'hight'; nearest: 'hight'$",
    ):
        built(Asking, {"hight": x})
