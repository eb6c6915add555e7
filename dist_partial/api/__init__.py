"""The loop from Python and from notebooks: `dist_partial.train`, and the result that it returns."""

from dist_partial.api.result import History, Result
from dist_partial.api.training import devices, train

__all__ = ["History", "Result", "devices", "train"]
