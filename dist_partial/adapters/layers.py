"""The layers of a model that have a kernel in Keras's sense: those that can have LoRA, and be quantized."""

from typing import Any

import keras

from dist_partial import compat


def layers(model: keras.Model) -> list[Any]:
    """Finds the Dense, EinsumDense and Embedding layers that are built, in the model's order.

    Examples:
        >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3, name="d"), keras.layers.Dropout(0.1)])
        >>> [layer.name for layer in layers(model)]
        ['d']
    """
    kinds = (keras.layers.Dense, keras.layers.EinsumDense, keras.layers.Embedding)
    return [layer for layer in compat.layers(model) if isinstance(layer, kinds) and layer.built]


def raw(layer: Any) -> Any:
    """Returns the variable of a layer's kernel, as it is stored.

    Examples:
        >>> layer = keras.layers.Dense(2)
        >>> layer.build([None, 3])
        >>> layer.enable_lora(1)
        >>> raw(layer).trainable, raw(layer) is layer.kernel
        (False, False)
    """
    return compat.stored_kernel(layer)


def merged(layer: Any) -> Any:
    """Returns the value with which a layer computes: the kernel with LoRA's factors.

    Examples:
        >>> layer = keras.layers.Dense(2)
        >>> layer.build([None, 3])
        >>> layer.enable_lora(1)
        >>> for factor in factors(layer):
        ...     _ = factor.assign(keras.ops.ones(factor.shape))
        >>> (merged(layer) - raw(layer)).numpy().round(3).tolist()
        [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    return layer.embeddings if isinstance(layer, keras.layers.Embedding) else layer.kernel


def factors(layer: Any) -> tuple[Any, Any]:
    """Returns the LoRA factors of a layer that has them.

    Examples:
        >>> layer = keras.layers.Embedding(10, 4)
        >>> layer.build()
        >>> layer.enable_lora(2)
        >>> [tuple(factor.shape) for factor in factors(layer)]
        [(10, 2), (2, 4)]
    """
    name = "lora_embeddings" if isinstance(layer, keras.layers.Embedding) else "lora_kernel"
    return getattr(layer, f"{name}_a"), getattr(layer, f"{name}_b")
