"""What a failed run leaves behind, and says."""

import traceback

import keras
import pytest
import tensorflow as tf

from dist_partial.errors import Raised, UserError
from dist_partial.training import failures, loop
from tests.helpers import against_fit


def test_the_exception_of_a_run_holds_none_of_its_iterators(tmp_path):
    """One that is destroyed while Python shuts down could wait for ever."""

    class Broken(keras.optimizers.SGD):
        def update_step(self, *args):
            raise RuntimeError("no update")

    features = against_fit.features
    settings = against_fit.settings(
        against_fit.one_output,
        (features(7), features(1)),
        keras.losses.MeanSquaredError,
        replicas=1,
        optimizer=lambda: Broken(0.1),
    )
    with pytest.raises(Raised, match="no update") as caught:
        loop.run(settings, tmp_path)
    frames = {frame.f_code: frame for frame, _ in traceback.walk_tb(caught.tb)}
    assert "runner" in loop.run.__wrapped__.__code__.co_varnames
    assert not frames[loop.run.__wrapped__.__code__].f_locals


def test_what_xla_cannot_compile_is_one_line():
    lengths = tf.function(tf.strings.length, jit_compile=True)
    said = pytest.raises(UserError, match=r"^run\.jit_compile: XLA cannot compile .*: leave out run\.jit_compile$")
    with said, failures.explained():
        lengths(tf.constant(["one", "three"]))
