"""The optimizers of a plan that `fit` trains, and what each replica has of its own."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_partial import compat
from dist_partial.selection.plan import Plan, VariablePlan
from dist_partial.step import optimizers


def build(plan: Plan, excluded: Sequence[dict[str, Any]] = ()) -> tuple[optimizers.GroupOptimizer, ...]:
    """Makes the slots of each optimizer, for all groups that it trains; called in the strategy's scope.

    Args:
        plan: from `saved_plan.with_optimizers`, with its variables.
        excluded: of each optimizer, what is excluded from weight decay: see `keras_configs.exclusions`.

    Examples:
        >>> from dist_partial.fit.saved_plan import with_optimizers
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([8]), keras.layers.Dense(2, name="head")])
        >>> plan = resolve([("train", ".*/bias"), ("train", ".*")], model, AllReduce())
        >>> [group] = build(with_optimizers(plan, 2 * [keras.optimizers.SGD(momentum=0.9)]))
        >>> [name for name in group.state if name.startswith("head/")]
        ['head/bias/momentum', 'head/kernel/momentum']
    """
    groups: dict[int, optimizers.GroupOptimizer] = {}
    for group in optimizers.build(plan, lambda: None, slots=False):  # each rule names its own
        first = dataclasses.replace(group, members=(), make=functools.partial(_new, group.optimizer))
        groups.setdefault(id(group.optimizer), first).members += group.members
    variable_at = {entry.path: entry.variable for entry in plan.trained}
    for group, out in zip(groups.values(), excluded, strict=False):
        if out:
            listed, pattern = [variable_at[path] for path in out["paths"]], out["pattern"]
            group.optimizer.exclude_from_weight_decay(listed, pattern and [pattern])
    for group in groups.values():
        group.allocate()
    return tuple(groups.values())


def sum_of(entry: VariablePlan) -> tf.Variable:
    """Makes the variable in which each replica adds up its own gradients; called in the strategy's scope.

    Examples:
        >>> from dist_partial.selection import Rule
        >>> sum_of(VariablePlan("head/kernel", (8, 2), "float32", None, Rule(".*", rows=(0, 3)))).shape
        TensorShape([3, 2])
    """
    return tf.Variable(
        tf.zeros(entry.trained_shape, entry.dtype),
        trainable=False,
        name="accumulated",
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.NONE,
    )


def read_rows(strategy: tf.distribute.Strategy, members: Sequence[optimizers.OptimizerVariable]) -> None:
    """Reads the rows that are trained out of the model's variables; called in the cross-replica context.

    Examples:
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import Rule, resolve
        >>> model = keras.Sequential([keras.Input([1]), keras.layers.Dense(3, name="head")])
        >>> plan = resolve([Rule(".*/bias", rows=(1, 3)), ("freeze", ".*")], model, AllReduce())
        >>> [group] = optimizers.build(plan, keras.optimizers.SGD)
        >>> _ = model.layers[0].bias.assign([4.0, 5.0, 6.0])
        >>> read_rows(tf.distribute.get_strategy(), group.members)
        >>> group.members[0].variable.numpy().tolist()
        [5.0, 6.0]
    """
    for member in members:
        strategy.extended.update(
            member.variable.value,
            lambda rows, whole, at=member.entry.rule.rows: rows.assign(whole[slice(*at)]),
            args=(member.entry.variable.value,),
        )


def _new(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Makes one without slots of the same config, with the learning rate that callbacks have set since."""
    rate = compat.learning_rate(optimizer)
    # Keras refuses to read a function back from a config.
    given = {"learning_rate": rate} if callable(rate) else {}
    return type(optimizer).from_config(optimizer.get_config() | given)
