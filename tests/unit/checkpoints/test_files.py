"""Checkpoints: what they hold, and by what two values are known to be the same."""

import hashlib

import numpy as np
import pytest
import tensorflow as tf

from dist_partial import checkpoints
from dist_partial.errors import UserError


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_enough_to_save_nothing(bad):
    good, spoilt = tf.Variable([1.0, 2.0]), tf.Variable([1.0, bad])

    def read(**state):
        return checkpoints.read(state, 7, lambda data: [data])

    np.testing.assert_array_equal(read(a=good)["a"], [1.0, 2.0])
    with pytest.raises(UserError, match="b is not finite at step 7; nothing is saved of it"):
        read(a=good, b=spoilt)


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
    (tmp_path / "step-0000000004.npz").write_bytes(b"damaged")
    warned = []
    assert checkpoints.newest(tmp_path, warned.append).step == 2 and len(warned) == 1
    checkpoints.save(tmp_path, 3, {"a": np.full(3, 3)}, {}, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000000002.npz", "step-0000000003.npz"]
