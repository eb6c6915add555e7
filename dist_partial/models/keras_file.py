"""A model that Keras has saved, to go on from."""

from pathlib import Path

import keras

from dist_partial.errors import UserError, first_line


def keras_file(path: str) -> keras.Model:
    """Loads what `model.save` or `dist_partial.export --format=keras` has written.

    What was saved with `trainable = False` stays frozen, and is no candidate of the rules. A file from elsewhere runs
    no code: Keras refuses lambdas, and classes that are not registered.

    Args:
        path: of the .keras file.

    Raises:
        UserError: there is no such file, or Keras cannot load a model from it.
    """
    if not isinstance(path, str):
        raise UserError(f"keras_file.path is {path!r}: write the path of a .keras file")
    if not Path(path).is_file():
        near = ", ".join(sorted(p.name for p in Path(path).parent.glob("*.keras")))
        raise UserError(f"no file {path}" + (f"; in that folder there is {near}" if near else ""))
    try:
        model = keras.saving.load_model(path, compile=False)
    except Exception as error:  # Keras raises whatever the file leads to
        raise UserError(f"Keras cannot load {path}: {first_line(error)}") from error
    if not isinstance(model, keras.Model):
        raise UserError(f"{path} holds a {type(model).__name__} and no model")
    return model
