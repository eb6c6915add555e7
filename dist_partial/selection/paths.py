"""The names of a model's variables: one each, everywhere."""

from collections.abc import Sequence
from typing import Any

from dist_partial import compat


def variable_paths(model: Any) -> list[str]:
    """Paths of the model's trainable variables without the model's own leading name."""
    return paths_of(model, model.trainable_variables)


def paths_of(model: Any, variables: Sequence[Any]) -> list[str]:
    """Paths of some of a model's variables without the model's own leading name: what they are called everywhere.

    They are Keras's, `variable.path`. Functional submodels are missing from these, so that those of two towers may be
    the same: then all are made of the names of the layers, one inside the other, as `left/hidden/kernel`.
    """
    weights = {id(v): v.path for layer in compat.layers(model) for v in compat.own_weights(layer)}
    if len(set(weights.values())) == len(weights):
        return _strip_root(model.name, [variable.path for variable in variables])
    placed: dict[int, str] = {}
    _place(model, "", placed)
    return [placed.get(id(variable), variable.path) for variable in variables]


def _place(layer: Any, prefix: str, placed: dict[int, str]) -> None:
    """Notes the paths of a layer's variables, and of those of the layers in it, by the names of the layers."""
    for variable in compat.own_variables(layer):
        placed.setdefault(id(variable), f"{prefix}{variable.name}")
    for inner in compat.direct_layers(layer):
        _place(inner, f"{prefix}{inner.name}/", placed)


def _strip_root(root: str, paths: Sequence[str]) -> list[str]:
    # Keras puts the model's name before some models' paths (subclassed, Sequential) and not before others'
    # (functional); a layer may bear the model's name, so it is stripped only where all paths begin with it.
    if all(path.startswith(f"{root}/") for path in paths):
        return [path[len(root) + 1 :] for path in paths]
    return list(paths)


def own_names(model: Any, variables: Sequence[Any]) -> list[str]:
    """`paths_of`; of several that are the same all but the first end in ` (2)`, ` (3)`, ..."""
    names: dict[str, None] = {}
    for path in paths_of(model, variables):
        name, number = path, 1
        while name in names:
            number += 1
            name = f"{path} ({number})"
        names[name] = None
    return list(names)


def frozen_by_code(model: Any) -> list[str]:
    """Paths of the weights that are out of the rules' reach because of `trainable = False`; no statistics."""
    trainable = {id(variable) for variable in model.trainable_variables}
    weights = {id(v): v for layer in compat.layers(model) for v in compat.own_weights(layer)}
    return paths_of(model, [variable for key, variable in weights.items() if key not in trainable])
