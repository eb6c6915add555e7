"""What a failed run leaves behind."""

import traceback

import keras
import pytest

from dist_partial.errors import Raised
from dist_partial.training import loop
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
