"""What no config of a Keras object has: attributes that were set later, and exclusions from weight decay."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_partial import compat

# What makes one of each kind, whose attributes are Keras's own: in the config, or of no other object.
_KINDS: dict[type, Callable[[], Any]] = {
    keras.optimizers.Optimizer: lambda: keras.optimizers.Optimizer(0.0),
    keras.optimizers.schedules.LearningRateSchedule: keras.optimizers.schedules.LearningRateSchedule,
    keras.losses.Loss: keras.losses.Loss,
    keras.metrics.Metric: keras.metrics.Metric,
}


def left_out(one: Any, other: Any = None) -> dict[str, Any]:
    """Finds the attributes of a Keras object that one which is made of its config lacks, or has otherwise.

    The variables of its state are none of them: slots of an optimizer, the sums of a metric.

    Args:
        one: an optimizer, a schedule of its learning rate, a loss or a metric.
        other: made of its config; None makes it.

    Examples:
        >>> class Scaled(keras.losses.Loss):
        ...     def __init__(self, scale=1.0, **kwargs):
        ...         super().__init__(**kwargs)
        ...         self.scale = scale
        >>> left_out(Scaled(2.0)), left_out(Scaled())
        ({'scale': 2.0}, {})
    """
    make = next((make for kind, make in _KINDS.items() if isinstance(one, kind)), None)
    if make is None:
        return {}
    if other is None:
        config = one.get_config()
        # Keras reads no function back, and no schedule of a class that is not registered.
        config |= {"learning_rate": 0.0} if isinstance(one, keras.optimizers.Optimizer) else {}
        other = type(one).from_config(config)
    found, used = {}, getattr(one, "built", True)
    for name in vars(one).keys() - {*vars(make()), *compat.OPTIMIZER_ATTRIBUTES}:
        value, default = vars(one)[name], vars(other).get(name)
        state = _holds_variables(default) or (used and _holds_variables(value))
        if not state and (name not in vars(other) or not _equal(value, default)):
            found[name] = value
    return found


def remade(one: Any, **config: Any) -> Any:
    """Makes a loss or a metric again, with some of its config changed, and with what its config leaves out.

    Examples:
        >>> float(remade(keras.losses.Huber(delta=2.0))([[0.0]], [[3.0]]))  # whose config lacks delta in Keras 3.15
        4.0
    """
    other = type(one).from_config(one.get_config() | config)
    for name, value in left_out(one, other).items():
        setattr(other, name, value)
    return other


def exclusions(optimizer: Any, members: Sequence[Any]) -> dict[str, Any]:
    """Finds what `exclude_from_weight_decay` was given, which is in no config; empty if nothing was.

    Args:
        optimizer: a Keras optimizer.
        members: the `OptimizerVariable`s that it updates.

    Returns:
        "paths" of the members that it was given one by one, and the "pattern" of names, or None.

    Examples:
        >>> optimizer = keras.optimizers.AdamW()
        >>> exclusions(optimizer, members=())
        {}
        >>> optimizer.exclude_from_weight_decay(var_names=["gamma", "bias"])
        >>> exclusions(optimizer, members=())
        {'paths': [], 'pattern': 'bias|gamma'}
    """
    given, pattern = compat.weight_decay_exclusions(optimizer)
    paths = [m.entry.path for m in members if compat.variable_key(optimizer, m.entry.variable) in given]
    # Keras joins the names of a set, whose order is another in each process.
    names = "|".join(sorted(pattern.pattern.split("|"))) if pattern else None
    return {"paths": paths, "pattern": names} if paths or names else {}


def exclude_from_weight_decay(
    optimizer: Callable[..., Any], names: Sequence[str], learning_rate: Any = None
) -> keras.optimizers.Optimizer:
    """Makes an optimizer that excludes variables from weight decay: those whose names have one of these parts.

    Args:
        optimizer: makes it.
        names: such as ["bias", "gamma"].
        learning_rate: of a rule; None is the optimizer's own.

    Examples:
        >>> made = exclude_from_weight_decay(keras.optimizers.AdamW, ["bias"], learning_rate=0.5)
        >>> exclusions(made, members=())["pattern"], float(made.learning_rate)
        ('bias', 0.5)
    """
    made = optimizer() if learning_rate is None else optimizer(learning_rate=learning_rate)
    made.exclude_from_weight_decay(var_names=list(names))
    return made


def _holds_variables(value: Any) -> bool:
    return any(isinstance(part, (keras.Variable, tf.Variable)) for part in tf.nest.flatten(value))


def _equal(value: Any, other: Any) -> bool:
    if type(value) is type(other) and hasattr(value, "get_config"):  # each constructor makes its own
        value, other = value.get_config(), other.get_config()
    try:
        return bool(value == other)
    except ValueError:  # of arrays, which may as well be set again
        return False
