"""Checkpoints: what they hold, and by what two values are known to be the same."""

import hashlib
import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors
import tensorflow as tf

from dist_partial import checkpoints
from dist_partial.errors import UserError


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_enough_to_save_nothing(tmp_path, bad):
    variables = {"a": tf.Variable([1.0, 2.0]), "b": tf.Variable([1.0, bad])}
    state = checkpoints.read(variables, lambda data: [data])
    np.testing.assert_array_equal(state["a"], [1.0, 2.0])
    with pytest.raises(UserError, match="b is not finite at step 7; nothing is saved of it"):
        checkpoints.save(tmp_path, 7, state, {}, 2)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("array", "head"),
    [
        (np.zeros(4, np.float32), b"(dtype('float32'), (4,))"),
        (np.zeros((2, 2), np.float32), b"(dtype('float32'), (2, 2))"),
        (np.zeros(2, np.float64), b"(dtype('float64'), (2,))"),
        (np.zeros((4, 1), np.int32).T, b"(dtype('int32'), (1, 4))"),
        (np.zeros(16, np.bool_), b"(dtype('bool'), (16,))"),
    ],
)
def test_a_digest_is_of_dtype_shape_and_values(array, head):
    """All of these have the same bytes; run folders hold such digests, so that they must stay what they are."""
    assert checkpoints.digest(array) == hashlib.sha256(head + bytes(16)).hexdigest()[:16]


def test_a_damaged_checkpoint_of_a_later_step_goes_with_the_next_that_is_saved(tmp_path):
    for step in (2, 4):
        checkpoints.save(tmp_path, step, {"a": np.full(3, step)}, {}, 3)
    (tmp_path / "step-0000000004.safetensors").write_bytes(b"damaged")
    warned = []
    assert checkpoints.newest(tmp_path, warned.append).step == 2 and len(warned) == 1
    checkpoints.save(tmp_path, 3, {"a": np.full(3, 3)}, {}, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-0000000002.safetensors",
        "step-0000000003.safetensors",
    ]


ARRAYS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "a": (np.random.default_rng(0).normal(size=50)).astype(ml_dtypes.bfloat16),
    "c": np.array(7, np.int64),
    "d": np.zeros((0, 3), np.uint32),
    "e": np.array([True, False, True]),
    "f": np.array([1.5, np.finfo(np.float16).tiny], np.float16),
}


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    path = checkpoints.save(tmp_path, 5, ARRAYS, {"wire_bytes": 3}, 2)
    found = checkpoints.newest(tmp_path, pytest.fail)
    assert found.path == path and found.step == 5 and found.metadata == {"step": 5, "wire_bytes": 3}
    assert found.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found.arrays[name].dtype == array.dtype and found.arrays[name].shape == array.shape, name
        assert found.arrays[name].tobytes() == array.tobytes(), name


def test_a_bfloat16_variable_is_restored_bit_for_bit(tmp_path):
    before = tf.Variable(tf.cast(tf.random.normal([20]), tf.bfloat16))
    state = checkpoints.read({"a": before}, lambda data: [data])
    checkpoints.save(tmp_path, 1, state, {}, 1)
    after = tf.Variable(tf.zeros([20], tf.bfloat16))
    checkpoints.restore(checkpoints.newest(tmp_path, pytest.fail), {"a": after})
    assert after.numpy().tobytes() == before.numpy().tobytes()


def test_a_checkpoint_is_a_plain_safetensors_file(tmp_path):
    """Whose arrays are aligned, whose bytes depend on the content alone, and which others may read as any file."""
    path = checkpoints.save(tmp_path / "one", 5, ARRAYS, {"a": 1, "b": 2}, 2)
    content = path.read_bytes()
    shuffled = dict(reversed(ARRAYS.items()))
    assert checkpoints.save(tmp_path / "two", 5, shuffled, {"a": 1, "b": 2}, 2).read_bytes() == content
    with safetensors.safe_open(path, framework="np") as file:
        assert set(file.keys()) == ARRAYS.keys() and list(file.metadata()) == ["dist_partial_checkpoint"]
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert size % 8 == 0
    for name, array in ARRAYS.items():
        assert header[name]["data_offsets"][0] % array.itemsize == 0
    (tmp_path / "plain").touch()
    assert os.stat(path).st_mode == os.stat(tmp_path / "plain").st_mode


def test_checkpoints_of_an_earlier_version_are_not_taken_for_none(tmp_path):
    (tmp_path / "step-0000000004.npz").touch()
    with pytest.raises(UserError, match=r"step-0000000004\.npz is a checkpoint of an earlier version of dist_partial"):
        checkpoints.newest(tmp_path, pytest.fail)
