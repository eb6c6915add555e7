"""Loss scaling around the optimizer that `fit.partial` makes."""

from collections.abc import Sequence
from typing import Any

import keras

from dist_partial import compat
from dist_partial.fit.optimizer import Partial
from dist_partial.selection.plan import Plan


@keras.saving.register_keras_serializable(package="dist_partial")
class PartialLossScale(keras.optimizers.LossScaleOptimizer):
    """Scales the loss around `Partial` as Keras does dynamically, which `compile` does not wrap again.

    Keras 3.15 decides about an overflow by the first replica's gradient alone, so that another one's overflow would
    reach the weights; here it sees the sum, which is the same on all of them.

    Examples:
        >>> from dist_partial.fit import saved_plan
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, name="head")])
        >>> plan = resolve([("train", ".*/bias"), ("freeze", ".*")], model, AllReduce())
        >>> sgd = keras.optimizers.SGD(0.5)
        >>> inner = Partial([sgd], saved_plan.with_optimizers(plan, [sgd]))
        >>> optimizer = PartialLossScale(inner, initial_scale=8.0)
        >>> optimizer.build(model.trainable_variables)
        >>> optimizer.apply([keras.ops.array([2.0])], [model.layers[0].bias])  # of a loss that is 8 times as large
        >>> model.layers[0].bias.numpy().tolist()
        [-0.125]
    """

    def __init__(self, inner_optimizer: Partial, *args: Any, **kwargs: Any) -> None:
        super().__init__(inner_optimizer, *args, **kwargs)
        inner_optimizer.reduces = False

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Reduces, unscales and applies the gradients of a step; called in a replica context."""
        if not self.built:
            self.build(list(trainable_variables or ()))
        update = super().apply
        self.inner_optimizer.reduce(
            grads, trainable_variables, lambda sums: update(sums, self.inner_optimizer.selected)
        )

    @property
    def plan(self) -> Plan:
        """What is trained, and how it travels."""
        return self.inner_optimizer.plan

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    @property
    def optimizers(self) -> list[keras.optimizers.Optimizer]:
        return self.inner_optimizer.optimizers


def of(model: keras.Model) -> Partial | None:
    """Finds the optimizer from `partial` with which a model is compiled; None if it is another one.

    Examples:
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> print(of(model))
        None
    """
    return unwrapped(getattr(model, "optimizer", None))


def all_of(model: keras.Model) -> list[Any]:
    """Lists the optimizers from `partial` that a model, or a model in it, holds: a `train_step` may use several.

    Examples:
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        >>> all_of(model)
        []
    """
    return [each for each in _optimizers(model) if unwrapped(each) is not None]


def others_of(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """Lists the optimizers of a model's own `train_step` that are not from `partial`.

    Examples:
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        >>> model.of_the_judge = keras.optimizers.SGD()
        >>> [type(each).__name__ for each in others_of(model)]
        ['SGD']
    """
    # `compile` without an optimizer makes one that nobody uses where the model has others.
    held = [each for each in _optimizers(model) if each is not getattr(model, "optimizer", None)]
    return [each for each in held if unwrapped(each) is None]


def _optimizers(model: keras.Model) -> list[Any]:
    """Those in attributes of the model, in lists and dicts of it, and with which models in it are compiled."""
    waiting = [*vars(model).values(), *(getattr(layer, "optimizer", None) for layer in compat.layers(model))]
    seen: dict[int, Any] = {}
    while waiting:
        value = waiting.pop(0)
        if id(value) in seen:
            continue
        seen[id(value)] = value
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [each for each in seen.values() if isinstance(each, keras.optimizers.Optimizer)]


def unwrapped(optimizer: Any) -> Partial | None:
    """Takes the loss scale off an optimizer from `partial`; None of one that is not from it.

    Examples:
        >>> print(unwrapped(keras.optimizers.SGD()))
        None
    """
    inner = optimizer.inner_optimizer if isinstance(optimizer, PartialLossScale) else optimizer
    return inner if isinstance(inner, Partial) else None
