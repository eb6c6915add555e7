"""Which BatchNorm layers run in training mode, and their moving statistics."""

from typing import Any

import keras

from dist_partial.selection import Plan


def set_modes(model: keras.Model, plan: Plan, everywhere: bool) -> None:
    """Puts each BatchNorm layer of which nothing is trained into inference mode, and the others out of it.

    In training mode its moving statistics would be updated and averaged over the replicas in every step,
    though the user selected nothing of it. A layer without variables that a rule could name (neither scale
    nor centre) trains when all of the model does; one that the user froze stays frozen.

    Args:
        model: the model; the layers' `trainable` flags are set.
        plan: what is trained.
        everywhere: True leaves all of them in training mode.
    """
    trained = {id(entry.variable) for entry in plan.trained}
    for layer in _layers(model):
        if not layer.trainable:  # the user froze it
            continue
        own = [v for v in (layer.gamma, layer.beta) if v is not None]
        training = any(id(v) in trained for v in own) if own else not plan.frozen
        layer.trainable = everywhere or training


def local_statistics(model: keras.Model) -> list[Any]:
    """Moving means and variances that each replica updates from its own part of the batch."""
    # Keras 3.15 updates these on each replica from its own part of the batch and never brings them together:
    # replicas would evaluate, and save, different models. (Synchronised layers see the same numbers everywhere.)
    training = [layer for layer in _layers(model) if layer.trainable and not layer.synchronized]
    return [variable for layer in training for variable in (layer.moving_mean, layer.moving_variance)]


def _layers(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
