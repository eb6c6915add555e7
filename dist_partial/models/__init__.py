"""The models that come with the package: factories that return a built `keras.Model`."""

from dist_partial.models.byte_transformer import byte_transformer
from dist_partial.models.two_dense import two_dense

__all__ = ["byte_transformer", "two_dense"]
