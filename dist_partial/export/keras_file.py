"""Writes a whole model as a .keras file, and checks that it loads as the same model."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial import compat
from dist_partial.adapters import lora, quantization
from dist_partial.data import fetch
from dist_partial.errors import UserError, first_line
from dist_partial.models.keras_file import load_uncompiled
from dist_partial.step import layer_state
from dist_partial.training.build import Trainer


def write_keras(path: Path, built: Trainer) -> str:
    """Writes a .keras file, and loads it again to see that it is the model; the model is not for training any more.

    Raises:
        UserError: the model cannot be written, or is another one when it is loaded.

    Examples:
        >>> import tempfile
        >>> from dist_partial import data, models
        >>> from dist_partial.config.settings import Settings
        >>> from dist_partial.distributed import replicas
        >>> from dist_partial.training.build import build
        >>> settings = Settings([("train", ".*")], models.two_dense, data.stdlib_shapes)
        >>> trainer = build(settings, replicas.create("default"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = write_keras(Path(folder, "mine.keras"), trainer)
        ...     keras.saving.load_model(Path(folder, "mine.keras")).name
        'two_dense'
    """

    def policies(model: Any) -> list[str]:
        return [layer.dtype_policy.name for layer in compat.layers(model)]

    model, policy, floatx = built.model, keras.config.dtype_policy(), keras.config.floatx()
    quantization.widen(built.plan)  # or else what training has moved would be rounded away in the kernels
    lora.merge(model)  # or else the file would have factors of zero beside kernels that stay frozen
    hint = "give its classes get_config and keras.saving.register_keras_serializable, or write --format=savedmodel"
    if any(getattr(layer, "quantization_mode", None) for layer in compat.layers(model)):
        hint = "Keras 3.15 cannot load all models with layers in int8: write --format=savedmodel or safetensors"
    name = f"model {model.name!r}"
    own = {kind.__name__: kind for kind in _kinds(model) if keras.saving.get_registered_name(kind) == kind.__name__}
    notes = ""
    try:
        model.save(path)
        keras.config.set_floatx("float32")  # as in a new process
        keras.config.set_dtype_policy("float32")
        # What a Lambda layer holds is this process's own code.
        loaded = load_uncompiled(path, own, safe_mode=False)
        if policies(loaded) != policies(model):
            keras.config.set_floatx(floatx)
            keras.config.set_dtype_policy(policy)
            loaded = load_uncompiled(path, own, safe_mode=False)
            notes = f"; call keras.config.set_dtype_policy({policy.name!r}) before loading it"
            if floatx != "float32":
                notes = f"; call keras.config.set_floatx({floatx!r}) and" + notes.removeprefix("; call")
    except OSError:
        raise
    except Exception as error:  # Keras raises this and that, and so may the classes of the user's
        raise UserError(f"{name} cannot be written as a .keras file: {first_line(error)}; {hint}") from error
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)
    if policies(loaded) != policies(model) or not _same_outputs(built, loaded):
        raise UserError(f"{name} is another model when its .keras file is loaded; {hint}")
    if lost := sorted({v.dtype for v in model.variables} - {v.dtype for v in loaded.variables}):
        notes += f"; what it holds in {', '.join(lost)} loads in the layers' own dtype"
    return notes + _before_loading(model, own)


def _kinds(model: Any) -> set[type]:
    """The classes of its layers that are not Keras's."""
    return {type(layer) for layer in compat.layers(model) if type(layer).__module__.split(".")[0] != "keras"}


def _before_loading(model: Any, own: dict[str, type]) -> str:
    """What whoever loads the file has to do first, for classes that are not registered by those names, too."""
    modules = {kind.__module__.split(".src.")[0] for kind in _kinds(model)}
    note = f"; import {', '.join(sorted(modules))} before loading it" if modules else ""
    places = ", ".join(f"{name!r}: {own[name].__module__}.{name}" for name in sorted(own))
    return note + (f", and give load_model custom_objects={{{places}}}" if own else "")


def _same_outputs(built: Trainer, loaded: Any) -> bool:
    """Whether two models give the same on held-out examples."""
    for state in layer_state.recurrent(built.model):  # Keras saves none
        state.assign(np.zeros(state.shape))
    count = layer_state.batch_size(built.model) or min(4, len(built.data.evaluation))
    x = fetch(built.data.evaluation, np.arange(count))[0]
    ours, theirs = (model(x, training=False) for model in (built.model, loaded))
    rounding = 1e-2 if "16" in built.model.compute_dtype else 1e-4  # factors that were merged are rounded elsewhere

    def same(a: Any, b: Any) -> bool:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return a.shape == b.shape and bool(np.abs(a - b).max() <= rounding * np.abs(a).max())

    try:
        return all(tf.nest.flatten(tf.nest.map_structure(same, ours, theirs)))
    except (ValueError, TypeError):  # another nest
        return False
