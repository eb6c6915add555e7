"""Examples that are decoded on their way, and augmented where they are trained on."""

from collections.abc import Callable
from typing import Annotated, Any

from dist_partial.data.source import Dataset
from dist_partial.validation import Has

Augment = Annotated[
    Callable[..., Any] | None,
    Has("__call__", "give a function of (x, y, seed), such as augment, in a gin file @my_module.augment without ()"),
]


def decoded(data: Dataset, decode: Callable[..., Any], augment: Callable[..., Any] | None) -> Dataset:
    """Has all examples go through `decode`, and those that are trained on through `augment` then.

    Examples:
        >>> import numpy as np
        >>> import tensorflow as tf
        >>> from dist_partial.data import ArraySource
        >>> source = ArraySource(np.array(["1", "2"]))
        >>> number = decoded(Dataset("mine", source, source, ""), tf.strings.to_number, lambda x: -x)
        >>> [part.fetch(np.arange(2))[0].tolist() for part in (number.train, number.evaluation)]
        [[-1.0, -2.0], [1.0, 2.0]]
    """
    data = data.map(decode)
    return data if augment is None else data.map(augment, evaluation=lambda *parts: parts)
