"""What Keras and TensorFlow keep for a process: a run begins as in a new one, and leaves it as it was."""

import collections
import contextlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_partial import compat

_NUMBERED = re.compile(r"(.+?)(?:_(\d+))?")


@contextlib.contextmanager
def put_back() -> Iterator[None]:
    """Puts Keras's floatx and dtype policy back, also after an error, and TensorFlow's seed; other seeds stay.

    By TensorFlow's seed a `tf.data.Dataset` shuffles: what a notebook's cell makes is the same after a run.

    Examples:
        >>> with put_back():
        ...     keras.config.set_floatx("float64")
        >>> keras.config.floatx()
        'float32'
    """
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    seed = compat.tensorflow_seed()
    try:
        yield
    finally:
        compat.set_tensorflow_seed(seed)
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Sets TensorFlow's seed, and puts it back: what is made within does not depend on what was made before.

    Examples:
        >>> def drawn():
        ...     with seeded(1):
        ...         return float(tf.random.uniform([]))
        >>> drawn() == drawn()
        True
    """
    before = compat.tensorflow_seed()
    tf.random.set_seed(seed)
    try:
        yield
    finally:
        compat.set_tensorflow_seed(before)


@contextlib.contextmanager
def numbered_afresh(*factories: Callable[..., Any]) -> Iterator[None]:
    """Has layers without a name called as in a new process (`dense`, `dense_1`), whatever this one has made before.

    Keras counts them through the process, and rules, run folders and deltas go by these names. What the process counts
    itself goes on afterwards as if nothing had been made.

    Args:
        factories: what makes the layers; those that their modules and they themselves hold already keep their numbers.

    Examples:
        >>> _ = keras.layers.Dense(1)
        >>> with numbered_afresh():
        ...     [keras.layers.Dense(1).name for _ in range(2)]
        ['dense', 'dense_1']
    """
    before = compat.name_counts()
    counts: dict[str, int] = collections.defaultdict(int)
    for layer in _found_made(factories):
        name, number = _NUMBERED.fullmatch(layer.name).groups()  # type: ignore[union-attr]
        counts[name] = max(counts[name], int(number or 0) + 1)
    compat.set_name_counts(counts)
    try:
        yield
    finally:
        compat.set_name_counts(before)


def _found_made(factories: Sequence[Callable[..., Any]]) -> Iterator[keras.Layer]:
    """Layers, and those in them, that functions, others that they call, and the modules of these have made before.

    What a notebook or a script has made beside its functions is no module's: only what these name counts.
    """
    waiting: list[Any] = [inspect.unwrap(factory) for factory in factories]
    seen = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, keras.Layer):
            yield from compat.layers(value)
        elif inspect.ismodule(value) and value.__name__ != "__main__":
            waiting += [held for held in vars(value).values() if isinstance(held, keras.Layer)]
        elif inspect.isclass(value) or inspect.isfunction(value):
            waiting.append(sys.modules.get(value.__module__))
        if inspect.isfunction(value):
            with contextlib.suppress(ValueError):  # a variable of a function around it that is not set yet
                found = inspect.getclosurevars(value)
                waiting += [*found.nonlocals.values(), *found.globals.values()]
