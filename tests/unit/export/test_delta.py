"""The delta file against NumPy and plain Keras, hostile bytes, and several deltas on one base."""

import json
import struct
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import keras
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dist_partial import Base, Delta, Rule
from dist_partial.errors import UserError
from dist_partial.export import delta
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.selection.resolve import resolve
from tests.helpers import user_module
from tests.helpers.cases import convolutional

FUZZED = 4000

RULES = [
    Rule("embedding/.*", rows=(2, 6)),
    ("train", "half/kernel"),
    ("train", "norm/.*"),
    ("freeze", ".*"),
]


def small(seed: int = 0) -> keras.Model:
    """Rows, bfloat16, moving statistics, a generator and a frozen head."""
    keras.utils.set_random_seed(seed)
    layers = [
        keras.Input((3,), dtype="int32"),
        keras.layers.Embedding(8, 4, name="embedding"),
        keras.layers.Flatten(),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(5, dtype="bfloat16", name="half"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Dense(2, name="head"),
    ]
    return keras.Sequential(layers, name="small")


def values(model: keras.Model) -> dict[str, np.ndarray]:
    return {v.path.removeprefix("small/"): np.array(v) for v in model.variables if v.name != "seed_generator_state"}


def trained(seed: int, rules=RULES) -> tuple[Delta, dict[str, np.ndarray]]:
    """A delta of the model after some training, and all of the model's values then."""
    model = small()
    base = delta.model_fingerprints(model)
    plan = resolve(rules, model, AllReduce())
    rng = np.random.default_rng(seed)
    variables = {v.path.removeprefix("small/"): v for v in model.variables}
    for path in ("half/kernel", "norm/gamma", "norm/beta", "norm/moving_mean"):
        noise = rng.normal(size=variables[path].shape).astype(variables[path].dtype)
        variables[path].assign(variables[path].numpy() + noise)
    rows = variables["embedding/embeddings"].numpy()
    rows[2:6] += rng.normal(size=(4, 4))
    variables["embedding/embeddings"].assign(rows)
    model(np.ones((2, 3), np.int32), training=True)  # the generator's state moves, and so do the statistics
    return delta.of(model, plan, base, step=seed), values(model)


@pytest.fixture(scope="module")
def first() -> Delta:
    return trained(1)[0]


@pytest.fixture(scope="module")
def content(first, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("delta") / "first.safetensors"
    delta.write(path, first)
    return path.read_bytes()


def same(one: Delta, other: Delta) -> bool:
    arrays = one.arrays.keys() == other.arrays.keys() and all(
        (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        for a, b in ((one.arrays[key], other.arrays[key]) for key in one.arrays)
    )
    return arrays and all(getattr(one, name) == getattr(other, name) for name in delta._FIELDS)


def test_a_file_holds_what_was_trained_and_nothing_else(first, content):
    """By the bytes of the format: a length, a JSON header, the arrays."""
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    metadata = header.pop("__metadata__")
    assert {key: (entry["dtype"], entry["shape"]) for key, entry in header.items()} == {
        "embedding/embeddings[2:6]": ("F32", [4, 4]),
        "half/kernel": ("BF16", [12, 5]),
        "norm/gamma": ("F32", [5]),
        "norm/beta": ("F32", [5]),
        "norm/moving_mean": ("F32", [5]),
        "norm/moving_variance": ("F32", [5]),
    }
    assert all(isinstance(text, str) for text in metadata.values())
    assert json.loads(metadata["rules"]) == ["train embedding/.* rows 2:6", "train half/kernel", *first.rules[2:]]
    assert json.loads(metadata["step"]) == 1 and json.loads(metadata["versions"])["keras"] == keras.__version__
    assert json.loads(metadata["base"]).keys() == values(small()).keys()


def test_a_hundredth_of_a_model_is_a_hundredth_of_its_bytes(tmp_path):
    layers = [keras.Input((400,)), *(keras.layers.Dense(400, name=f"body_{i}") for i in range(4))]
    model = keras.Sequential([*layers, keras.layers.Dense(10, name="head")])
    base = delta.model_fingerprints(model)
    plan = resolve([("train", "head/.*"), ("freeze", ".*")], model, AllReduce())
    delta.write(tmp_path / "a.safetensors", delta.of(model, plan, base, 1))
    assert (tmp_path / "a.safetensors").stat().st_size < 4 * model.count_params() / 100


def test_what_is_read_is_what_was_written(first, content, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    again = delta.read(path)
    assert same(again, first) and again.arrays["half/kernel"].dtype == ml_dtypes.bfloat16 and again.name == str(path)


def test_swapped_and_back_bit_for_bit(tmp_path):
    (one, one_values), (two, two_values) = trained(1), trained(2)
    model = small()
    before = values(model)
    base = Base(model)
    kernel = model.get_layer("half").kernel
    for deltas, expected in (
        (one, one_values),
        (two, two_values),
        ({one: 1.0}, one_values),
        (None, before),
        ({two: 1}, two_values),
        ({}, before),
    ):
        base.use(deltas)
        found = values(model)
        assert all(found[path].tobytes() == value.tobytes() for path, value in expected.items())
    assert model.get_layer("half").kernel is kernel
    assert base._values.keys() == set(before) - {"half/bias", "head/kernel", "head/bias"}


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, -2.0), (1.0, 1.0), (2.0, 0.0)])
def test_averages_are_numpys(weights):
    (one, one_values), (two, two_values) = trained(1), trained(2)
    model = small()
    before = values(model)
    Base(model).use(dict(zip((one, two), weights, strict=True)))
    for path, found in values(model).items():
        base, *others = (v[path].astype(np.float64) for v in (before, one_values, two_values))
        expected = base + sum(w * (other - base) for w, other in zip(weights, others, strict=True))
        tolerance = 2.0**-7 if found.dtype == ml_dtypes.bfloat16 else 1e-6
        np.testing.assert_allclose(found.astype(np.float64), expected, rtol=tolerance, atol=1e-7)


def test_a_path_that_a_delta_lacks_counts_as_the_base():
    one, one_values = trained(1)
    two, _ = trained(2, [("train", "norm/.*"), ("freeze", ".*")])
    assert "half/kernel" not in two.arrays
    model = small()
    before = values(model)["half/kernel"].astype(np.float64)
    Base(model).use({one: 0.25, two: 0.75})
    expected = before + 0.25 * (one_values["half/kernel"].astype(np.float64) - before)
    np.testing.assert_allclose(values(model)["half/kernel"].astype(np.float64), expected, rtol=2.0**-7)


def test_on_mirrored_replicas(mirrored):
    one, one_values = trained(1)
    strategy = mirrored(2)
    with strategy.scope():
        model = small()
    before = values(model)
    base = Base(model)
    for deltas, expected in ((one, one_values), (None, before)):
        base.use(deltas)
        for variable in model.variables:
            for copy in strategy.experimental_local_results(variable.value):
                path = variable.path.removeprefix("small/")
                assert path not in expected or np.asarray(copy).tobytes() == expected[path].tobytes(), path


def test_the_model_may_have_been_frozen_since():
    """Flags are no part of the base: a model for inference takes the delta of one in training."""
    one, one_values = trained(1)
    model = small()
    model.get_layer("norm").trainable = False
    Base(model).use(one)
    assert values(model)["norm/gamma"].tobytes() == one_values["norm/gamma"].tobytes()


def changed(one: Delta, **fields) -> Delta:
    return Delta(**{name: getattr(one, name) for name in ("arrays", *delta._FIELDS, "name")} | fields)


def array(one: Delta, key: str, value: np.ndarray) -> Delta:
    return changed(one, arrays={**one.arrays, key: value})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda d: changed(d, base={**d.base, "head/bias": "0"}), r"another base: 'head/bias' differ; make the model"),
        (lambda d: changed(d, base={**d.base, "neck/bias": "0"}), r"another base: 'neck/bias' are not in the model"),
        (lambda d: changed(d, base={p: x for p, x in d.base.items() if p != "head/bias"}), r"'head/bias' are not in"),
        (lambda d: array(d, "nrm/gamma", np.ones(5)), r"holds 'nrm/gamma', which is no variable.*'norm/gamma'"),
        (lambda d: array(d, "norm/gamma", np.ones(4, "f4")), r"'norm/gamma' is float32\[4\] and the model's.*\[5\]"),
        (lambda d: array(d, "norm/gamma", np.ones(5)), r"'norm/gamma' is float64\[5\] and the model's is float32"),
        (lambda d: array(d, "norm/gamma", np.full(5, np.nan, "f4")), r"'norm/gamma' is not finite"),
        (lambda d: changed(d, rows={k: (p, 6, 10) for k, (p, _, _) in d.rows.items()}), r"lie beyond 'embedding"),
        (lambda d: {d: np.inf}, r"the weight of the delta is inf"),
        (lambda d: {d: True}, r"the weight of the delta is True"),
        (lambda d: {d: 1e39}, r"the weighted sum: .* is not finite"),
        (lambda d: "first.safetensors", r"'first.safetensors' is no delta: read it first"),
        (lambda d: {"first.safetensors": 1.0}, r"'first.safetensors' is no delta: read it first"),
    ],
)
def test_nothing_is_assigned_of_what_is_refused(wrong, words, first):
    model = small()
    base = Base(model)
    base.use(first)
    before = values(model)
    with pytest.raises(UserError, match=words) as error:
        base.use(wrong(first))
    assert "\n" not in str(error.value)
    assert all(before[path].tobytes() == value.tobytes() for path, value in values(model).items())
    base.use(None)
    assert all(value.tobytes() == values(model)[path].tobytes() for path, value in values(small()).items())


def test_another_seed_is_another_base(first):
    with pytest.raises(UserError, match="'embedding/embeddings', 'half/kernel', 'head/kernel' differ"):
        Base(small(seed=1)).use(first)


def test_a_base_that_was_trained_on_is_none_any_more(first):
    model = small()
    base = Base(model)
    model.get_layer("norm").gamma.assign(np.full(5, 2.0))
    with pytest.raises(UserError, match="norm/gamma has been changed since"):
        base.use(first)


def test_paths_that_repeat_are_told_apart():
    model = user_module.Twins()
    model(np.ones((1, 2)))
    assert list(delta.variables(model)) == ["same/kernel", "same/bias", "same/kernel (2)", "same/bias (2)"]


def test_moving_statistics_of_a_frozen_layer_are_left_out():
    model = convolutional(synchronized=False)
    base = delta.model_fingerprints(model)
    plan = resolve([("train", "head/.*"), ("freeze", ".*")], model, AllReduce())
    model(np.ones((2, 8, 8, 3)), training=False)
    assert delta.of(model, plan, base, 1).arrays.keys() == {"head/kernel", "head/bias"}


def written(path: Path, arrays: dict[str, np.ndarray], **metadata: str) -> Path:
    """A safetensors file with a right checksum and whatever else."""
    metadata["sha256"] = delta._checksum(arrays, metadata)
    safetensors.numpy.save_file(arrays, path, metadata)
    return path


RIGHT = {
    "dist_partial_delta": "1",
    "base": '{"a": "0"}',
    "rules": '["train .*"]',
    "rows": "{}",
    "step": "3",
    "versions": "{}",
}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"dist_partial_delta": "2"}, "has the delta format '2', and this version"),
        ({"base": "[]"}, "is malformed"),
        ({"base": '{"a": 1}'}, "is malformed: a value is of another type"),
        ({"base": "{"}, "is malformed"),
        ({"rules": '"train"'}, "is malformed"),
        ({"step": "true"}, "is malformed"),
        ({"step": "9" * 5000}, "is malformed"),
        ({"rows": "[" * 100_000}, "is malformed"),
        ({"rows": '{"a": ["b", 0, 3]}'}, "is malformed: 'a' has the shape"),
        ({"rows": '{"a": ["b", -1, 1]}'}, "is malformed: the rows of 'a' are"),
        ({"rows": '{"c": ["b", 0, 2]}'}, "is malformed: 'c'"),
        ({"rows": '{"a": ["b", 0, 2]}'}, "is malformed: it holds one variable twice"),
        ({"versions": "null"}, "is malformed"),
    ],
)
def test_metadata_that_is_malformed(wrong, words, tmp_path):
    arrays = {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}
    path = written(tmp_path / "a.safetensors", arrays, **RIGHT)
    assert delta.read(path).step == 3
    with pytest.raises(UserError, match=words) as error:
        delta.read(written(path, arrays, **RIGHT | wrong))
    assert "\n" not in str(error.value)


def test_files_that_are_no_delta(content, tmp_path):
    path = tmp_path / "cats.safetensors"
    with pytest.raises(UserError, match=r"no file .*/cats\.safetensors"):
        delta.read(path)
    safetensors.numpy.save_file({"a": np.ones(2)}, path)
    with pytest.raises(UserError, match="is a safetensors file but no delta"):
        delta.read(path)
    with pytest.raises(UserError, match=rf"no file .*; nearest: '{tmp_path}/cats\.safetensors'"):
        delta.read(tmp_path / "cat.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        delta.read(tmp_path)
    with pytest.raises(UserError, match="is not finite"):
        delta.read(written(path, {"a": np.array([np.inf])}, **RIGHT))
    for number in range(len(content)):
        if number % 97 == 0:
            path.write_bytes(content[:number])
            with pytest.raises(UserError, match="is damaged"):
                delta.read(path)


def test_a_delta_that_is_not_finite_is_not_written(first, tmp_path):
    with pytest.raises(UserError, match="'norm/gamma' is not finite"):
        delta.write(tmp_path / "a.safetensors", array(first, "norm/gamma", np.full(5, np.inf, "f4")))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*/file/a\.safetensors"):
        delta.write(tmp_path / "file" / "a.safetensors", first)


def mutated(content: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for start, length, new in changes:
        start %= len(content) + 1
        content = content[:start] + new + content[start + length :]
    return content


def lying(content: bytes, numbers: list[tuple[int, int]]) -> bytes:
    """Numbers in the header replaced, and its length made right again."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + length].decode(), content[8 + length :]
    for place, number in numbers:
        digits = [i for i, letter in enumerate(header) if letter.isdigit()]
        i = digits[place % len(digits)]
        header = header[:i] + str(number) + header[i + 1 :]
    return struct.pack("<Q", len(header.encode())) + header.encode() + data


place, number = st.integers(0, 10_000), st.integers(0, 2**70)


@hypothesis.settings(max_examples=FUZZED, deadline=None, database=None, derandomize=True)
@hypothesis.given(
    st.one_of(
        st.binary(max_size=200).map(lambda new: lambda content: new),
        st.lists(st.tuples(place, st.integers(0, 3), st.binary(max_size=3)), min_size=1, max_size=4).map(
            lambda changes: lambda content: mutated(content, changes)
        ),
        st.lists(st.tuples(place, number), min_size=1, max_size=3).map(
            lambda numbers: lambda content: lying(content, numbers)
        ),
        number.map(lambda size: lambda content: struct.pack("<Q", size % 2**64) + content[8:]),
    )
)
def fuzz(path, content, first, counts, change):
    new = change(content)
    path.write_bytes(new)
    try:
        read = delta.read(path)
    except UserError as error:
        assert "\n" not in str(error)
        counts["refused"] += 1
    else:
        assert same(read, first)
        counts["read"] += 1


def test_hostile_bytes_are_refused_or_the_same_delta(content, first, tmp_path):
    counts = {"refused": 0, "read": 0}
    fuzz(tmp_path / "fuzzed.safetensors", content, first, counts)
    assert sum(counts.values()) >= 3000, counts


@pytest.mark.parametrize("path", ["", "a" * 300, ".", "~nobody-of-this-name/x", "\0"])
def test_paths_that_are_no_file(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        delta.read(path)
    assert "\n" not in str(caught.value)
    made = delta.Delta({"a": np.ones(2, np.float32)}, {}, {"a": "0"}, ("train a",), 1, {})
    with pytest.raises(UserError, match="cannot write") as caught:
        delta.write(path, made)
    assert "\n" not in str(caught.value) and not any(tmp_path.iterdir())
    delta.write("new/folder/a.safetensors", made)  # which is made
    assert delta.read("new/folder/a.safetensors").step == 1
