"""A model that Keras has saved, to go on from."""

import sys
from collections.abc import Sequence

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
        model = keras.saving.load_model(
            file, {name.rpartition(".")[2]: _found(name) for name in classes}, compile=False
        )
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
