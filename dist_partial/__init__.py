"""Train a rule-selected part of a Keras model on several replicas, and send only that part's gradients."""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_partial.api import train as train

_HOMES = {
    "AllReduce": "reductions",
    "ArraySource": "data",
    "Base": "export.delta",
    "Dataset": "data",
    "Delta": "export.delta",
    "Fault": "errors",
    "Interrupted": "errors",
    "LocalOnly": "reductions",
    "LocalSGD": "reductions",
    "MapSource": "data",
    "Plan": "selection",
    "PowerSGD": "reductions",
    "Quantized": "reductions",
    "Raised": "errors",
    "ReplicaOptions": "distributed.replicas",
    "Result": "api",
    "Rule": "selection",
    "Sampling": "config.settings",
    "Settings": "config.settings",
    "Stream": "data",
    "TopK": "reductions",
    "UserError": "errors",
    "connect": "fit",
    "csv_dataset": "data",
    "dataset": "data",
    "delta": "export.delta",  # the module
    "devices": "api",
    "image_folder": "data",
    "mix": "data",
    "parquet_dataset": "data",
    "partial": "fit",
    "tfrecord_dataset": "data",
    "train": "api",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Importing the package must not import TensorFlow: that takes seconds, and the commands set it up first.
    if name in _HOMES:
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
        return module if _HOMES[name].endswith(f".{name}") else getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


class _Package(types.ModuleType):
    """A package whose `train` stays the function: to import the command `dist_partial.train` would replace it."""

    @property
    def train(self) -> Any:
        return __getattr__("train")

    @train.setter
    def train(self, command: types.ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
