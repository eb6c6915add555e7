"""The names of a model's variables: one each, everywhere."""

from collections.abc import Sequence
from typing import Any

from dist_partial import compat


def variable_paths(model: Any) -> list[str]:
    """Lists the paths of the model's trainable variables without the model's own leading name.

    Examples:
        >>> import keras
        >>> variable_paths(keras.Sequential([keras.Input([2]), keras.layers.Dense(1, name="head")]))
        ['head/kernel', 'head/bias']
    """
    return paths_of(model, model.trainable_variables)


def paths_of(model: Any, variables: Sequence[Any]) -> list[str]:
    """Names some of a model's variables: their paths without the model's own leading name, the same everywhere.

    They are Keras's, `variable.path`. Functional submodels are missing from these, so that those of two towers may be
    the same: then all are made of the names of the layers, one inside the other, as `left/hidden/kernel`.

    Examples:
        >>> import keras
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, name="head")])
        >>> paths_of(model, model.weights[:1])
        ['head/kernel']
    """
    weights = {id(v): v.path for layer in compat.layers(model) for v in compat.own_weights(layer)}
    if len(set(weights.values())) == len(weights):
        return _strip_root(model, [variable.path for variable in variables])
    placed: dict[int, str] = {}
    _place(model, "", placed)
    return [placed.get(id(variable), variable.path) for variable in variables]


def _place(layer: Any, prefix: str, placed: dict[int, str]) -> None:
    """Notes the paths of a layer's variables, and of those of the layers in it, by the names of the layers."""
    for variable in compat.own_variables(layer):
        placed.setdefault(id(variable), f"{prefix}{variable.name}")
    for inner in compat.direct_layers(layer):
        _place(inner, f"{prefix}{inner.name}/", placed)


def _strip_root(model: Any, paths: Sequence[str]) -> list[str]:
    # Keras puts the model's name before the paths of some models (subclassed, Sequential, but not before those of a
    # functional model in them) and not before those of others (functional). It stays where a layer bears it, too.
    root = f"{model.name}/"
    borne = any(layer is not model and layer.name == model.name for layer in compat.layers(model))
    if borne and not all(path.startswith(root) for path in paths):
        return list(paths)
    return [path.removeprefix(root) for path in paths]


def own_names(model: Any, variables: Sequence[Any]) -> list[str]:
    """Makes `paths_of` unique: equal paths but the first end in ` (2)`, ` (3)`, ...

    Examples:
        >>> import keras
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, name="head")])
        >>> own_names(model, [model.weights[0], model.weights[0]])
        ['head/kernel', 'head/kernel (2)']
    """
    names: dict[str, None] = {}
    for path in paths_of(model, variables):
        name, number = path, 1
        while name in names:
            number += 1
            name = f"{path} ({number})"
        names[name] = None
    return list(names)


def frozen_by_code(model: Any) -> list[str]:
    """Lists the paths of weights that rules cannot reach because of `trainable = False`; no statistics.

    Examples:
        >>> import keras
        >>> layers = [keras.layers.Dense(2, trainable=False, name="body"), keras.layers.Dense(1, name="head")]
        >>> frozen_by_code(keras.Sequential([keras.Input([2]), *layers]))
        ['body/kernel', 'body/bias']
    """
    trainable = {id(variable) for variable in model.trainable_variables}
    weights = {id(v): v for layer in compat.layers(model) for v in compat.own_weights(layer)}
    return paths_of(model, [variable for key, variable in weights.items() if key not in trainable])
