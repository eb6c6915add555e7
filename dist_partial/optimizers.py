"""One Keras optimizer a group, applied to gradients that are reduced already.

The one place where a private name of Keras is replaced is `_apply_reduced_already`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_partial.errors import UserError, first_line
from dist_partial.selection import Entry, Group, Plan


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """One trained entry and the variable that its optimizer updates.

    That is the model's variable itself, or, where rows are selected, a variable of those rows alone, so that
    the optimizer holds slots for nothing else; `write_rows` copies it into the model after the update.
    """

    entry: Entry
    variable: Any


@dataclasses.dataclass(eq=False)
class GroupOptimizer:
    """One group's optimizer, whose slots can come and go.

    Attributes:
        members: the group's variables, in the group's order.
        number: of the group, for the names of what is no slot.
        make: makes a new optimizer, without slots.
        optimizer: the current one, for exactly the members.
        state: its variables by names that a new process gives them again: `<path>/<slot>` for slots; empty while
            there are none.
    """

    members: tuple[Trained, ...]
    number: int
    make: Callable[[], keras.optimizers.Optimizer]
    optimizer: keras.optimizers.Optimizer
    state: dict[str, Any] = dataclasses.field(default_factory=dict)

    def allocate(self) -> None:
        """Makes the slots, if there are none; call it inside `strategy.scope()`."""
        if not self.state:
            self.state = _build_slots(self.number, self.optimizer, self.members)

    def reset(self) -> None:
        """Gives all of its state the values of a new optimizer; call it inside `strategy.scope()`."""
        for name, value in _build_slots(self.number, self.make(), self.members).items():
            self.state[name].assign(value)

    def drop(self) -> None:
        """Forgets the slots, whose memory is free once no compiled function uses them."""
        self.optimizer, self.state = self.make(), {}


def build(plan: Plan, factory: Callable[..., Any], slots: bool = True) -> tuple[GroupOptimizer, ...]:
    """Builds one optimizer a group, with slots for the selected variables only.

    Call it inside `strategy.scope()`: Keras optimizers remember the strategy in which they are made.

    Args:
        plan: the plan.
        factory: makes the optimizer of the rules that name none, such as `keras.optimizers.Adam`.
        slots: whether their slots are allocated at once.

    Raises:
        UserError: if a factory does not make a Keras optimizer, or makes one that accumulates, scales or
            averages by itself (`run.accumulate` and `run.precision` do the first two, in the order the sum needs).
    """
    groups = tuple(_build_group(number, group, factory) for number, group in enumerate(plan.groups))
    for group in groups if slots else ():
        group.allocate()
    return groups


def _build_group(number: int, group: Group, default: Callable[..., Any]) -> GroupOptimizer:
    factory = group.rule.optimizer or default
    rate = group.rule.learning_rate
    if rate is not None:
        factory = functools.partial(factory, learning_rate=float(rate) if isinstance(rate, int) else rate)
    members = tuple(Trained(entry, _trained_variable(entry)) for entry in group.entries)
    return prepare(f"the optimizer of rule {group.rule.match!r}", factory, members, number)


def prepare(where: str, factory: Callable[..., Any], members: tuple[Trained, ...], number: int) -> GroupOptimizer:
    """Makes one optimizer, yet without slots, that is handed gradients which are reduced already.

    Args:
        where: what it is, for errors.
        factory: makes it.
        members: the variables that it updates.
        number: of the group, for the names of what is no slot.
    """
    make = functools.partial(_make, where, factory)
    return GroupOptimizer(members, number, make, make())


def _make(where: str, factory: Callable[..., Any]) -> keras.optimizers.Optimizer:
    try:
        optimizer = factory()
    except (TypeError, ValueError) as error:  # an argument that this optimizer does not have, or a value it refuses
        raise UserError(f"{where} cannot be made: {first_line(error)}") from error
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise UserError(
            f"{where} is {optimizer!r}: give a factory, such as keras.optimizers.Adam (in a gin file "
            "@keras.optimizers.Adam) without ()"
        )
    check(where, optimizer)
    _apply_reduced_already(optimizer)
    return optimizer


def check(where: str, optimizer: keras.optimizers.Optimizer) -> None:
    """Raises UserError if a Keras optimizer accumulates, averages or scales by itself; `where` says which it is."""
    if optimizer.gradient_accumulation_steps:
        raise UserError(
            f"{where} accumulates gradients by itself, which Keras 3.15 cannot do on several replicas: leave out "
            "gradient_accumulation_steps; dist_partial.train has run.accumulate"
        )
    if optimizer.use_ema:
        raise UserError(f"{where} averages weights (use_ema), which is not done for a selection: leave out use_ema")
    if optimizer.loss_scale_factor or isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise UserError(
            f"{where} scales the loss by itself: give it without; under mixed_float16 the loss is scaled for all "
            "optimizers together (dist_partial.train: run.precision = 'mixed_float16')"
        )


def _trained_variable(entry: Entry) -> Any:
    if entry.rule.rows is None:
        return entry.variable
    start, stop = entry.rule.rows
    rows = keras.ops.convert_to_numpy(entry.variable)[start:stop]
    return keras.Variable(rows, dtype=entry.dtype, name=entry.variable.name)


def _build_slots(number: int, optimizer: Any, members: Sequence[Trained]) -> dict[str, Any]:
    # Keras names a slot by its variable's path with "/" turned into "_", which is not unique, and lists slots by
    # index, which a changed selection shifts. The method below is where every slot learns its variable.
    paths = {id(member.variable): member.entry.path for member in members}
    slots: dict[str, Any] = {}
    add_slot = optimizer.add_variable_from_reference

    def recorded(reference_variable: Any, name: str | None = None, **kwargs: Any) -> Any:
        slot = add_slot(reference_variable, name=name, **kwargs)
        slots[f"{paths[id(reference_variable)]}/{name}"] = slot
        return slot

    optimizer.add_variable_from_reference = recorded
    optimizer.build([member.variable for member in members])
    del optimizer.add_variable_from_reference
    known = {id(slot) for slot in slots.values()}
    # Some have slots of other shapes, which they make by another method and give names that are not unique, or that
    # Keras numbers through the process (`variable_7`): those go by their place, too.
    for place, variable in enumerate(optimizer.variables):
        if id(variable) not in known:
            slots[f"group_{number}/{place}_{re.sub(r'_[0-9]+$', '', variable.name)}"] = variable
    assert len(slots) == len(optimizer.variables)
    return slots


def _apply_reduced_already(optimizer: Any) -> None:
    # Keras 3.15's `apply` sums what it is handed over the replicas, with no option not to; after our own
    # reduction that would be a second sum: an update as many times too large, and twice the bytes.
    if not hasattr(optimizer, "_all_reduce_sum_gradients"):
        raise RuntimeError(
            f"Keras {keras.__version__} has no Optimizer._all_reduce_sum_gradients: gradients would be summed twice"
        )
    optimizer._all_reduce_sum_gradients = lambda grads_and_vars: grads_and_vars


def apply(optimizers: Sequence[GroupOptimizer], gradients: Sequence[tf.Tensor | None]) -> None:
    """Updates every group; called in a replica context with reduced gradients in the order of `plan.trained`.

    A variable whose gradient is None stays as it is.
    """
    rest = iter(gradients)
    for group in optimizers:
        pairs = [(gradient, member.variable) for member in group.members if (gradient := next(rest)) is not None]
        if pairs:
            group.optimizer.apply(*zip(*pairs, strict=True))


def write_rows(strategy: tf.distribute.Strategy, members: Sequence[Trained]) -> None:
    """Copies the rows that were updated into the model's variables; called in the cross-replica context."""
    for member in members:
        if member.entry.rule.rows is not None:
            start, stop = member.entry.rule.rows
            strategy.extended.update(
                member.entry.variable.value,
                lambda whole, rows, start=start, stop=stop: whole[start:stop].assign(rows),
                args=(member.variable.value,),
            )
