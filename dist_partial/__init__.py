"""Train a rule-selected part of a Keras model on several replicas, and send only that part's gradients."""

import importlib
from typing import Any

_HOMES = {
    "AllReduce": "reductions",
    "ArraySource": "data",
    "Base": "export.delta",
    "Dataset": "data",
    "Delta": "export.delta",
    "LocalOnly": "reductions",
    "LocalSGD": "reductions",
    "MapSource": "data",
    "Plan": "selection",
    "PowerSGD": "reductions",
    "Quantized": "reductions",
    "Rule": "selection",
    "Sampling": "config.settings",
    "Settings": "config.settings",
    "TopK": "reductions",
    "UserError": "errors",
    "csv_dataset": "data",
    "dataset": "data",
    "image_folder": "data",
    "parquet_dataset": "data",
    "partial": "fit",
    "tfrecord_dataset": "data",
}


def __getattr__(name: str) -> Any:
    # Importing the package must not import TensorFlow: that takes seconds, and the commands set it up first.
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOMES)
