"""A model that Keras has saved, to go on from."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from dist_partial.errors import UserError, first_line
from dist_partial.files import existing
from dist_partial.validation import check_arguments


def keras_file(path: str, classes: Sequence[str] = ()) -> keras.Model:
    """Loads what `model.save` or `dist_partial.export --format=keras` has written.

    What was saved with `trainable = False` stays frozen, and is no candidate of the rules. A file from elsewhere runs
    no code: Keras refuses lambdas, and classes that are neither registered nor given.

    Args:
        path: of the .keras file; `~` is the home folder.
        classes: your own in it, such as ["my_layers.Scale"], of modules that are imported.

    Raises:
        UserError: there is no such file, a class is not there, or Keras cannot load a model from it.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     keras.Sequential([keras.Input([4]), keras.layers.Dense(1, name="head")]).save(f"{folder}/mine.keras")
        ...     print([layer.name for layer in keras_file(f"{folder}/mine.keras").layers])
        ['head']
    """
    check_arguments(keras_file, locals())
    file = existing("keras_file.path", path, "*.keras")
    if file.suffix not in (".keras", ".h5"):
        raise UserError(f"keras_file.path is {path!r}: Keras reads files that end in .keras or .h5, which it has saved")
    try:
        model = load_uncompiled(file, {name.rpartition(".")[2]: _found(name) for name in classes})
    except UserError:
        raise
    except Exception as error:  # Keras raises whatever the file leads to
        raise UserError(f"Keras cannot load {path}: {first_line(error)}") from error
    if not isinstance(model, keras.Model):
        raise UserError(f"{path} holds a {type(model).__name__} and no model")
    return model


def _found(name: str) -> type:
    module, _, kind = name.rpartition(".")
    found: type | None = getattr(sys.modules.get(module), kind, None)
    if found is None:
        raise UserError(f"keras_file.classes has {name!r}, which is not there: write import {module or 'its module'}")
    return found


def load_uncompiled(path: Path, classes: Mapping[str, Any] = {}, safe_mode: bool = True) -> Any:
    """Loads a model without its optimizer, and without Keras's warning that the optimizer lacks variables.

    A task of KerasHub compiles itself when it is made, so that Keras finds an optimizer in spite of `compile=False`.

    Args:
        path: of the .keras file.
        classes: of the user's, by the names that the file has.
        safe_mode: whether Keras refuses lambdas.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     keras.Sequential([keras.Input([4]), keras.layers.Dense(1)], name="m").save(f"{folder}/mine.keras")
        ...     load_uncompiled(Path(folder, "mine.keras")).name
        'm'
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
        return keras.saving.load_model(path, dict(classes), compile=False, safe_mode=safe_mode)
