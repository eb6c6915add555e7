"""Functions on examples that give something else each time, which no resume and no other number of workers repeats."""

import functools
import time

import tensorflow as tf

from dist_partial.data.batches import looks
from dist_partial.data.mapped import Mapped, functions_of
from dist_partial.data.randomness import varies
from dist_partial.data.source import Dataset
from dist_partial.errors import Ending

_EXAMPLES = 8
_SECONDS = 1.0  # after which no further example is tried


def notes_on_repeats(data: Dataset) -> list[str]:
    """Makes a line for each function of a data set that gives something else another time for the same example.

    Functions of NumPy, and those that call Python, are tried on a few examples. In TensorFlow's own operations nothing
    is left to find: see `Mapped`.

    Examples:
        >>> import numpy as np
        >>> from dist_partial.data import ArraySource
        >>> source = ArraySource(np.arange(9.0))
        >>> data = Dataset("mine", source, source, "").map(lambda x: x + np.random.normal(), numpy=True)
        >>> print(*notes_on_repeats(data))
        <lambda> of run.data gives something else each time for the same example, so no run can ...
    """
    lines = {}
    for source in (data.train, data.evaluation):
        for function in functions_of(source):
            if function.calls_python and _varies(function):
                advice = (
                    "draw from a parameter rng, which Dataset.map gives it"
                    if function.numpy
                    else "draw by tf.random.stateless_uniform and the like, from a parameter seed"
                )
                lines[function.name] = (
                    f"{function.name} of run.data gives something else each time for the same example, so no run can "
                    f"repeat this one, nor go on with it to the bit: {advice}"
                )
    return list(lines.values())


def _varies(function: Mapped) -> bool:
    until = time.monotonic() + _SECONDS
    try:
        parts, own = function.inputs(looks(function.source)[:_EXAMPLES], None)
        for i in range(len(own)):
            one = tf.nest.map_structure(lambda array, i=i: array[i : i + 1], parts)
            if varies(functools.partial(function.of_batch, one, own[i : i + 1])):
                return True
            if time.monotonic() > until:
                break
    except Ending:  # the reading of a batch says it, and on which example
        pass
    return False
