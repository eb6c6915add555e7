"""The layers of a model that have a kernel in Keras's sense: those that can have LoRA, and be quantized."""

from typing import Any

import keras

from dist_partial import compat


def layers(model: keras.Model) -> list[Any]:
    """The Dense, EinsumDense and Embedding layers that are built, in the model's order."""
    kinds = (keras.layers.Dense, keras.layers.EinsumDense, keras.layers.Embedding)
    return [layer for layer in compat.layers(model) if isinstance(layer, kinds) and layer.built]


def raw(layer: Any) -> Any:
    """The variable of one's kernel, as it is stored."""
    return compat.stored_kernel(layer)


def merged(layer: Any) -> Any:
    """The value with which one computes: with LoRA's factors."""
    return layer.embeddings if isinstance(layer, keras.layers.Embedding) else layer.kernel


def factors(layer: Any) -> tuple[Any, Any]:
    """The variables of LoRA of a layer that has it."""
    name = "lora_embeddings" if isinstance(layer, keras.layers.Embedding) else "lora_kernel"
    return getattr(layer, f"{name}_a"), getattr(layer, f"{name}_b")
