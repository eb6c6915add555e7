"""What a model was compiled with, by the user or by the function that makes it: all of it counts in a run."""

import keras
import numpy as np
import pytest

from dist_partial import train
from tests.helpers.people import HEAD, X, Y, person


def compiled() -> keras.Model:
    model = person()
    model.compile(keras.optimizers.SGD(0.05), "mae", metrics=["mse"], weighted_metrics=["mape"])
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", [compiled.__name__, "<lambda>", "instance"])
def test_all_of_compile_is_taken_from_a_function_and_a_model_alike(name, capsys):
    """Compared with Keras's own fit; the rest of a run in the folder goes on with it, too."""
    keras.utils.set_random_seed(0)
    other = compiled()
    given = {"<lambda>": lambda: compiled(), "instance": keras.models.clone_model(other)}.get(name, compiled)
    if name == "instance":
        given.set_weights(other.get_weights())
        given.compile(keras.optimizers.SGD(0.05), "mae", metrics=["mse"], weighted_metrics=["mape"])
    found = train(given, (X, Y), rules=HEAD, evaluation=(X, Y), steps=2, global_batch=24)
    said = "of model.compile: optimizer SGD, learning rate 0.05; loss 'mae'; metrics ['mse']; weighted_metrics ['mape']"
    assert said in capsys.readouterr().out
    other.layers[0].trainable = False
    other.fit(X, Y, batch_size=24, epochs=2, verbose=0)
    for ours, theirs in zip(found.model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    expected = other.evaluate(X, Y, verbose=0)
    np.testing.assert_allclose([found.metrics[each] for each in ("loss", "mse", "mape")], expected, rtol=1e-4)
    text = (found.folder / "operative_config.gin").read_text()
    assert "SGD.learning_rate = 0.05" in text and "run.loss = 'mae'" in text
    changed = train(given, (X, Y), rules=HEAD, steps=1, global_batch=24, optimizer="adam", loss="mse")
    assert changed.history[0]["learning_rate"] == pytest.approx(0.001)
    assert "of model.compile: metrics ['mse']; weighted" in capsys.readouterr().out
