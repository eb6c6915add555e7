"""Which BatchNorm layers run in training mode, and their moving statistics."""

from collections.abc import Sequence
from typing import Any

import keras

from dist_partial import compat
from dist_partial.selection.plan import Plan


def layers(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    """Finds the layers whose mode `set_modes` sets: those that the user has not frozen.

    Examples:
        >>> frozen = keras.layers.BatchNormalization(trainable=False)
        >>> model = keras.Sequential([keras.Input([2]), frozen, keras.layers.BatchNormalization(name="norm")])
        >>> [layer.name for layer in layers(model)]
        ['norm']
    """
    return [layer for layer in _layers(model) if layer.trainable]


def set_modes(layers: Sequence[keras.layers.BatchNormalization], plan: Plan, everywhere: bool) -> None:
    """Puts each BatchNorm layer of which nothing is trained into inference mode, and the others out of it.

    In training mode its moving statistics would be updated and averaged over the replicas in every step,
    though the user selected nothing of it. A layer without variables that a rule could name (neither scale
    nor centre) trains when all of the model does.

    Args:
        layers: from `layers`, before the first call of this; their own `trainable` flags are set.
        plan: what is trained.
        everywhere: True leaves all of them in training mode.

    Examples:
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> norms = [keras.layers.BatchNormalization(name=name) for name in ("a", "b")]
        >>> model = keras.Sequential([keras.Input([2]), *norms])
        >>> plan = resolve([("train", "b/.*"), ("freeze", ".*")], model, AllReduce())
        >>> set_modes(norms, plan, everywhere=False)
        >>> [layer.trainable for layer in norms]
        [False, True]
    """
    trained = {id(entry.variable) for entry in plan.trained}
    for layer in layers:
        own = [v for v in (layer.gamma, layer.beta) if v is not None]
        training = any(id(v) in trained for v in own) if own else not plan.frozen
        set_mode(layer, everywhere or training)


def set_mode(layer: keras.layers.BatchNormalization, training: bool) -> None:
    """Sets the mode alone: which of its variables are trainable stays, such as one that the user has frozen.

    Examples:
        >>> layer = keras.layers.BatchNormalization()
        >>> layer.build([None, 2])
        >>> set_mode(layer, training=False)
        >>> layer.trainable, layer.gamma.trainable
        (False, True)
    """
    flags = [(variable, variable.trainable) for variable in layer.variables]
    layer.trainable = training  # Keras sets those of all its variables, too
    for variable, trainable in flags:
        variable.trainable = trainable


def local_statistics(model: keras.Model) -> list[Any]:
    """Finds moving means and variances that each replica updates from its own part of the batch.

    Examples:
        >>> norms = [keras.layers.BatchNormalization(synchronized=name == "b", name=name) for name in ("a", "b")]
        >>> [variable.path for variable in local_statistics(keras.Sequential([keras.Input([2]), *norms], name="m"))]
        ['m/a/moving_mean', 'm/a/moving_variance']
    """
    # Keras 3.15 updates these on each replica from its own part of the batch and never brings them together:
    # replicas would evaluate, and save, different models. (Synchronised layers see the same numbers everywhere.)
    return unsynchronised_statistics([layer for layer in _layers(model) if layer.trainable])


def unsynchronised_statistics(layers: Sequence[keras.layers.BatchNormalization]) -> list[Any]:
    """Finds moving means and variances of those layers whose replicas do not normalise together.

    Examples:
        >>> layer = keras.layers.BatchNormalization()
        >>> layer.build([None, 2])
        >>> [variable.name for variable in unsynchronised_statistics([layer])]
        ['moving_mean', 'moving_variance']
    """
    own = [layer for layer in layers if not layer.synchronized]
    return [variable for layer in own for variable in (layer.moving_mean, layer.moving_variance)]


def _layers(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    return [layer for layer in compat.layers(model) if isinstance(layer, keras.layers.BatchNormalization)]
