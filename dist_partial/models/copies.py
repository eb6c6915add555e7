"""Copies of a Keras model: of its config, its weights, and what its layers have adapted to."""

import copy
import inspect
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from dist_partial import compat
from dist_partial.errors import UserError, first_line
from dist_partial.files import replacing


class ModelCopy:
    """Makes a model again and again, as a factory does: in another strategy's scope, with other names of its layers.

    Args:
        model: a built model, which stays as it is. Its weights are read when a copy is made.
        names: of layers, which are called otherwise in the copy.
        example: an input, by which a subclassed model makes its variables.
        weights: to have instead of the model's.

    Raises:
        UserError: Keras cannot make the model of its config.

    Examples:
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, name="dense_7")])
        >>> other = ModelCopy(model, {"dense_7": "head"})()
        >>> other.layers[0].name, bool((other.get_weights()[0] == model.get_weights()[0]).all())
        ('head', True)
    """

    def __init__(
        self,
        model: keras.Model,
        names: Mapping[str, str] | None = None,
        example: Any = None,
        weights: Sequence[Any] | None = None,
    ) -> None:
        self.model, self._names, self._example, self._weights = model, names or {}, example, weights
        self._trainable = {id(layer): layer.trainable for layer in compat.layers(model)}  # a run changes some
        self._variables = [variable.trainable for variable in model.weights]  # of which users freeze single ones
        own = {type(layer) for layer in compat.layers(model) if not type(layer).__module__.startswith("keras.")}
        self._own = {name: kind for kind in own for name in (keras.saving.get_registered_name(kind), kind.__name__)}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of lambdas, which stay in this process
                self._config = self._prepared(keras.saving.serialize_keras_object(model))
        except NotImplementedError as error:  # whose message is a page
            raise self._refused("nothing says with which arguments one of its classes was called") from error
        except Exception as error:  # Keras raises this and that, and so may the classes of the user's
            raise self._refused(first_line(error)) from error
        self._config.pop("compile_config", None)

    def __call__(self) -> keras.Model:
        """Makes the next copy, which is not compiled."""
        weights = self.model.get_weights() if self._weights is None else self._weights
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = keras.saving.deserialize_keras_object(copy.deepcopy(self._config), self._own, safe_mode=False)
            pairs = _pairs(self.model, made)
            for layer, other in pairs:
                _adapt(layer, other)
                trainable = self._trainable.get(id(layer), layer.trainable)
                if other.trainable != trainable:
                    other.trainable = trainable
            if weights and not made.weights:
                made(self._example, training=False)
            made.set_weights(weights)
            for variable, trainable in zip(made.weights, self._variables, strict=False):  # none, if it was not built
                if variable.trainable != trainable:
                    variable.trainable = trainable
        except Exception as error:
            raise self._refused(first_line(error)) from error
        for layer, other in pairs:
            wanted = self._names.get(layer.name, layer.name)
            if wanted != other.name and not (is_numbered(layer) and is_numbered(other)):
                raise self._refused(f"its layer {layer.name!r} loses its name, which __init__ takes by **kwargs alone")
        return made

    def classes(self) -> list[str]:
        """Names the classes in it that are the user's own, as `keras_file` takes them.

        Raises:
            UserError: another process cannot import one of them.
        """
        names = []
        for kind in sorted({type(layer) for layer in compat.layers(self.model)}, key=lambda kind: kind.__name__):
            module, name = kind.__module__, kind.__qualname__
            if kind is keras.layers.Lambda or module == "__main__" or not hasattr(sys.modules.get(module), name):
                raise UserError(f"it has a layer of class {kind.__name__}")
            if module.split(".")[0] not in ("keras", "keras_hub", "dist_partial"):
                names.append(f"{module}.{name}")
        return names

    def save(self, path: Path) -> None:
        """Saves a copy, for `keras_file`.

        Raises:
            UserError: Keras cannot save it, or not load it again.
        """
        try:
            with replacing(path) as partial:
                self().save(partial)
                if self.classes():  # whose configs may lack something, or have too much
                    keras.saving.load_model(partial, self._own, compile=False)
        except Exception as error:  # Keras raises this and that, and so may the classes of the user's
            raise UserError(f"Keras cannot load it: {first_line(error)}") from error

    def _prepared(self, config: Any) -> Any:
        """A config with other names of layers, and without what the constructors of the user's classes do not take."""
        if isinstance(config, dict):
            config = {key: self._prepared(value) for key, value in config.items()}
            if isinstance(name := config.get("name"), str):
                config["name"] = self._names.get(name, name)
            kind = self._own.get(config.get("registered_name") or config.get("class_name"))
            if kind and kind.get_config.__module__.startswith("keras."):  # which adds what all layers have
                parameters = inspect.signature(kind).parameters
                if all(each.kind is not each.VAR_KEYWORD for each in parameters.values()):
                    config["config"] = {name: each for name, each in config["config"].items() if name in parameters}
        elif isinstance(config, (list, tuple)):  # ["dense", 0, 0] is a link
            link = len(config) == 3 and isinstance(config[0], str) and all(type(each) is int for each in config[1:])
            head = [self._names.get(config[0], config[0])] if link else []
            config = type(config)([*head, *map(self._prepared, config[len(head) :])])
        return config

    def _refused(self, why: str) -> UserError:
        return UserError(
            f"model {self.model.name!r} ({type(self.model).__name__}) cannot be made again of its config: "
            f"{why.rstrip('.')}; give the function that makes it, and not the model, or give its classes get_config"
        )


def is_numbered(layer: Any) -> bool:
    """Tells whether a layer may have its name from Keras, which counts them: `dense`, `dense_1`.

    Examples:
        >>> [is_numbered(keras.layers.Dense(1, name=name)) for name in ("dense_4", "dense", "head", None)]
        [True, True, False, True]
    """
    return _base(layer.name).replace("_", "") == type(layer).__name__.lower()


def numbered_names(model: keras.Model) -> dict[str, str]:
    """Gives the names that layers which Keras has numbered have where a process makes them first.

    Returns:
        The names of those that are called otherwise now, with the others.

    Examples:
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(2), keras.layers.Dense(1)])
        >>> now = [layer.name for layer in model.layers]
        >>> names = numbered_names(model)
        >>> [names.get(name, name) for name in now]
        ['dense', 'dense_1']
    """
    groups: dict[str, set[str]] = {}
    for layer in compat.layers(model):
        if is_numbered(layer):
            groups.setdefault(_base(layer.name), set()).add(layer.name)
    found = {}
    for base, names in groups.items():
        for number, name in enumerate(sorted(names, key=lambda name: int(name[len(base) + 1 :] or 0))):
            found[name] = f"{base}_{number}" if number else base
    return {name: other for name, other in found.items() if name != other}


def _base(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def _pairs(model: Any, made: Any) -> list[tuple[Any, Any]]:
    """A model and the layers in it, each with that of a copy.

    The copy lacks what a layer makes in its first call, as preprocessors of KerasHub do, until its own first call.

    Raises:
        ValueError: it lacks something that has weights or a vocabulary, or has something more.
    """
    found, seen = [(model, made)], {id(model)}
    for layer, other in found:  # which grows
        ours, theirs = compat.direct_layers(layer), compat.direct_layers(other)
        for late in ours[len(theirs) :]:
            if late.weights or any(hasattr(each, "save_assets") for each in compat.layers(late)):
                raise ValueError(f"its layer {late.name!r} is not made by __init__")
        for pair in zip(ours[: len(theirs)], theirs, strict=True):
            if id(pair[0]) not in seen:  # layers may be shared
                seen.add(id(pair[0]))
                found.append(pair)
    return found


def _adapt(layer: Any, other: Any) -> None:
    """Hands on what no config and no weight has, such as an adapted vocabulary."""
    if hasattr(layer, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            layer.save_assets(folder)
            other.load_assets(folder)
