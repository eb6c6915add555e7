"""The names by which Keras knows losses and metrics."""

import re
from typing import Any


def names_in(module: Any) -> list[str]:
    """Lists the names that `get` of `keras.losses` or `keras.metrics` takes, but for short forms such as 'mse'.

    Examples:
        >>> import keras
        >>> {"mean_squared_error", "huber", "kl_divergence"} <= set(names_in(keras.losses))
        True
    """
    names = {snake_case(name) for name, each in vars(module).items() if callable(each)}
    return sorted(name for name in names - {"get", "loss", "metric"} if _takes(module, name))


def _takes(module: Any, name: str) -> bool:
    try:
        module.get(name)
    except ValueError:
        return False
    except TypeError:  # it needs more than its name
        return True
    return True


def snake_case(name: str) -> str:
    """Writes the name of a class as Keras does in names.

    Examples:
        >>> snake_case("SparseCategoricalAccuracy"), snake_case("AUC"), snake_case("F1Score")
        ('sparse_categorical_accuracy', 'auc', 'f1_score')
    """
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()
