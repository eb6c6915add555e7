"""A model that Keras has saved, to go on from."""

import keras

from dist_partial.errors import UserError, first_line
from dist_partial.files import existing
from dist_partial.validation import check_arguments


def keras_file(path: str) -> keras.Model:
    """Loads what `model.save` or `dist_partial.export --format=keras` has written.

    What was saved with `trainable = False` stays frozen, and is no candidate of the rules. A file from elsewhere runs
    no code: Keras refuses lambdas, and classes that are not registered.

    Args:
        path: of the .keras file; `~` is the home folder.

    Raises:
        UserError: there is no such file, or Keras cannot load a model from it.

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
        model = keras.saving.load_model(file, compile=False)
    except Exception as error:  # Keras raises whatever the file leads to
        raise UserError(f"Keras cannot load {path}: {first_line(error)}") from error
    if not isinstance(model, keras.Model):
        raise UserError(f"{path} holds a {type(model).__name__} and no model")
    return model
