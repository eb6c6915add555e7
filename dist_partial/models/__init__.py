"""The models that come with the package: factories that return a built `keras.Model`."""

from dist_partial.models.byte_transformer import byte_transformer
from dist_partial.models.copies import ModelCopy, numbered_names
from dist_partial.models.hub import hub_model, hub_tokenizer
from dist_partial.models.keras_file import keras_file
from dist_partial.models.smollm2 import smollm2, smollm2_tokenizer
from dist_partial.models.two_dense import two_dense

__all__ = [
    "ModelCopy",
    "byte_transformer",
    "hub_model",
    "hub_tokenizer",
    "keras_file",
    "numbered_names",
    "smollm2",
    "smollm2_tokenizer",
    "two_dense",
]
