"""Builds one Keras optimizer a group, and applies them to gradients that are reduced already."""

import contextlib
import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial import compat
from dist_partial.errors import UserError, first_line
from dist_partial.reductions.encoding import zeros
from dist_partial.selection.plan import Group, Plan, VariablePlan
from dist_partial.step.keras_configs import left_out
from dist_partial.step.layer_state import untouched
from dist_partial.validation import shown


@dataclasses.dataclass(frozen=True, eq=False)
class OptimizerVariable:
    """Pairs a trained entry with the variable that its optimizer updates.

    That is the model's variable itself, or, where rows are selected, a stand-in of those rows alone, so that
    the optimizer holds slots for nothing else; `write_rows` copies it into the model after the update.

    Examples:
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import Rule, resolve
        >>> model = keras.Sequential([keras.Input([8]), keras.layers.Dense(2, use_bias=False, name="head")])
        >>> plan = resolve([Rule("head/kernel", rows=(0, 3))], model, AllReduce())
        >>> [group] = build(plan, keras.optimizers.SGD)
        >>> [(member.entry.path, tuple(member.variable.shape)) for member in group.members]
        [('head/kernel', (3, 2))]
    """

    entry: VariablePlan
    variable: Any
    elsewhere: bool = False  # whether another worker alone updates it (`Plan.owners`): then its slots have no rows here


@dataclasses.dataclass(eq=False)
class GroupOptimizer:
    """Holds one group's optimizer, whose slots can come and go.

    Attributes:
        members: the group's variables, in the group's order.
        number: of the group, for the names of what is no slot.
        make: makes a new optimizer, without slots.
        optimizer: the current one, for exactly the members.
        state: its variables by names that a new process gives them again: `<path>/<slot>` for slots; empty while
            there are none.

    Examples:
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([8]), keras.layers.Dense(2, use_bias=False, name="head")])
        >>> [group] = build(resolve([("train", ".*")], model, AllReduce()), keras.optimizers.Adam)
        >>> [name for name in group.state if name.startswith("head/")]
        ['head/kernel/momentum', 'head/kernel/velocity']
        >>> group.drop()
        >>> group.state
        {}
    """

    members: tuple[OptimizerVariable, ...]
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
        for name, value in _build_slots(self.number, self._renewed(), self.members).items():
            self.state[name].assign(value)

    def drop(self) -> None:
        """Forgets the slots, whose memory is free once no compiled function uses them."""
        self.optimizer, self.state = self._renewed(), {}

    def _renewed(self) -> keras.optimizers.Optimizer:
        """A new optimizer with the rate of this one, which a callback may have set since it was made."""
        made = self.make()
        if not callable(compat.learning_rate(made)):
            made.learning_rate = float(keras.ops.convert_to_numpy(self.optimizer.learning_rate))
        return made


def build(
    plan: Plan, factory: Callable[..., Any], slots: bool = True, elsewhere: Collection[str] = ()
) -> tuple[GroupOptimizer, ...]:
    """Builds one optimizer a group, with slots for the selected variables only.

    Call it inside `strategy.scope()`: Keras optimizers remember the strategy in which they are made.

    Args:
        plan: the plan.
        factory: makes the optimizer of the rules that name none, such as `keras.optimizers.Adam`.
        slots: whether their slots are allocated at once.
        elsewhere: paths of what other workers update alone.

    Raises:
        UserError: if a factory does not make a Keras optimizer, or makes one that accumulates, scales or
            averages by itself (`run.accumulate` and `run.precision` do the first two, in the order the sum needs);
            if the constraint of a variable of which rows are selected looks at its other rows.

    Examples:
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import Rule, resolve
        >>> model = keras.Sequential([keras.Input([8]), keras.layers.Dense(2, name="head")])
        >>> plan = resolve([Rule(".*/bias", optimizer=keras.optimizers.SGD), ("train", ".*")], model, AllReduce())
        >>> groups = build(plan, keras.optimizers.Adam)
        >>> [(group.members[0].entry.path, type(group.optimizer).__name__) for group in groups]
        [('head/bias', 'SGD'), ('head/kernel', 'Adam')]
    """
    groups = tuple(_build_group(number, group, factory, elsewhere) for number, group in enumerate(plan.groups))
    for group in groups if slots else ():
        group.allocate()
    return groups


def _build_group(number: int, group: Group, default: Callable[..., Any], elsewhere: Collection[str]) -> GroupOptimizer:
    factory = group.rule.optimizer or default
    rate = group.rule.learning_rate
    if rate is not None:
        factory = functools.partial(factory, learning_rate=float(rate) if isinstance(rate, int) else rate)
    members = tuple(
        OptimizerVariable(entry, _trained_variable(entry), entry.path in elsewhere) for entry in group.entries
    )
    made = prepare(f"the optimizer of rule {group.rule.match!r}", factory, members, number)
    if made.optimizer.use_ema and any(entry.dealt for entry in group.entries):
        raise UserError(
            f"the optimizer of rule {group.rule.match!r} averages weights (use_ema), which "
            f"{type(group.reduction).__name__} deals out: each replica would average its own alone; leave it out"
        )
    return made


def prepare(
    where: str, factory: Callable[..., Any], members: tuple[OptimizerVariable, ...], number: int
) -> GroupOptimizer:
    """Makes one optimizer, yet without slots, that is handed gradients which are reduced already.

    Args:
        where: what it is, for errors.
        factory: makes it.
        members: the variables that it updates.
        number: of the group, for the names of what is no slot.

    Examples:
        >>> prepare("the optimizer of mine", keras.optimizers.Adam, members=(), number=0).state
        {}
        >>> prepare("the optimizer of mine", lambda: "adam", members=(), number=0)
        Traceback (most recent call last):
        dist_partial.errors.UserError: the optimizer of mine is 'adam': give a factory, such as ...
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
            f"{where} is {shown(optimizer)}: give a factory, such as keras.optimizers.Adam (in a gin file "
            "@keras.optimizers.Adam) without ()"
        )
    check(where, optimizer)
    compat.sum_no_gradients(optimizer)  # they come reduced
    return optimizer


def another(optimizer: keras.optimizers.Optimizer, learning_rate: Any) -> keras.optimizers.Optimizer:
    """Makes another optimizer of the same kind, which differs in the learning rate alone.

    It has what no config has, too: exclusions from weight decay, attributes that were set later, and what a class of
    the user's leaves out of `get_config`.

    Args:
        optimizer: whose slots and steps, if it has been used, the other one does not have.
        learning_rate: of the other one.

    Raises:
        UserError: a method was set on the object, which may hold on to it.

    Examples:
        >>> one = keras.optimizers.SGD(0.5, momentum=0.9)
        >>> other = another(one, 0.25)
        >>> float(other.learning_rate), other.momentum, float(one.learning_rate)
        (0.25, 0.9, 0.5)
    """
    config, current = optimizer.get_config(), compat.learning_rate(optimizer)
    # Keras refuses to read a function back from a config.
    rates = (current if callable(current) else config["learning_rate"], learning_rate)
    usual, other = (type(optimizer).from_config(config | {"learning_rate": rate}) for rate in rates)
    if not optimizer.built:
        other.iterations.assign(optimizer.iterations)
    for name, value in left_out(optimizer, usual).items():
        if callable(value) and hasattr(type(optimizer), name):
            raise UserError(
                f"the optimizer {optimizer.name!r} has {name!r} set on the object, which a rule's learning_rate cannot "
                "take along: define it in a class, or give the rule an optimizer of its own"
            )
        setattr(other, name, value)
    return other


def check(where: str, optimizer: keras.optimizers.Optimizer) -> None:
    """Raises UserError if an optimizer accumulates, scales or delegates; `where` says which it is.

    Examples:
        >>> check("mine", keras.optimizers.SGD())
        >>> check("mine", keras.optimizers.SGD(loss_scale_factor=2.0))
        Traceback (most recent call last):
        dist_partial.errors.UserError: mine scales the loss by itself: ...
    """
    if optimizer.gradient_accumulation_steps:
        raise UserError(
            f"{where} accumulates gradients by itself, which Keras 3.15 cannot do on several replicas: leave out "
            "gradient_accumulation_steps; dist_partial.train has run.accumulate"
        )
    if optimizer.ema_overwrite_frequency and tf.distribute.has_strategy():
        raise UserError(
            f"{where} overwrites weights by their averages every few steps (ema_overwrite_frequency), which Keras 3.15 "
            "cannot do on several replicas: leave it out; with use_ema alone the last weights are the averages"
        )
    if optimizer.loss_scale_factor or isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise UserError(
            f"{where} scales the loss by itself: give it without; under mixed_float16 the loss is scaled for all "
            "optimizers together (dist_partial.train: run.precision = 'mixed_float16')"
        )
    several = isinstance(optimizer, keras.optimizers.MultiOptimizer)
    if several or any(isinstance(value, keras.optimizers.Optimizer) for value in vars(optimizer).values()):
        raise UserError(  # which would sum what they are handed over the replicas
            f"{where} hands gradients to other optimizers: name those in the rules, "
            "Rule(match, optimizer=keras.optimizers.SGD)"
        )


def _trained_variable(entry: VariablePlan) -> Any:
    if entry.rule.rows is None:
        return entry.variable
    _check_constraint(entry, entry.rule.rows)
    return stand_in(entry.variable, keras.ops.convert_to_numpy(entry.variable)[slice(*entry.rule.rows)])


def stand_in(variable: Any, value: np.ndarray) -> Any:
    """Makes a variable of another value in which an optimizer finds all that it may read of the given one.

    Its path, name and constraint decide on weight decay, on the kind of update (Muon) and on what follows it.

    Examples:
        >>> layer = keras.layers.Dense(2, name="head")
        >>> layer.build([None, 8])
        >>> rows = stand_in(layer.kernel, np.zeros([3, 2], np.float32))
        >>> rows.path, tuple(rows.shape), tuple(layer.kernel.shape)
        ('head/kernel', (3, 2), (8, 2))
    """
    # No constructor takes a path, a layer's options or a mark of the user's: they are copied with the object.
    other = copy.copy(variable)
    # Keras asks TensorFlow's variable for its name where it decides on weight decay: `<scopes>/<name>:0`.
    scope = variable.value.name.rpartition("/")[0]
    with tf.name_scope(f"{scope}/" if scope else ""):
        compat.initialize(other, value)
    return other


def _check_constraint(entry: VariablePlan, selected: tuple[int, int]) -> None:
    """Raises UserError if the constraint gives the selected rows other values beside other rows, which must stay."""
    constraint, rows = entry.variable.constraint, slice(*selected)
    if constraint is None or entry.trained_shape == entry.shape:
        return
    values = np.random.default_rng(0).normal(size=entry.shape)
    whole = 1e3 * values  # so that the other rows weigh more in whatever both are in
    whole[rows] = values[rows]
    for scale in (1e-6, 1e-3, 1.0, 1e3):  # a bound may lie anywhere
        value = keras.ops.cast(scale * whole, entry.dtype)
        try:
            both = constraint(value)[rows], constraint(value[rows])
            beside, alone = (keras.ops.cast(each, "float64") for each in both)
            alike = np.allclose(beside, alone, rtol=1e-3, atol=0, equal_nan=True)
        except (ValueError, TypeError, tf.errors.OpError):  # it takes all rows only
            alike = False
        if not alike:
            name = getattr(constraint, "__name__", type(constraint).__name__)
            raise UserError(
                f"rule {entry.rule.match!r}: rows {selected[0]}:{selected[1]} of {entry.path!r} cannot be trained "
                f"alone under its constraint {name}, in which its other rows count: leave out rows, or constrain each "
                "row by itself, as UnitNorm(axis=1) does"
            )


def _build_slots(number: int, optimizer: Any, members: Sequence[OptimizerVariable]) -> dict[str, Any]:
    # Keras names a slot by its variable's path with "/" turned into "_", which is not unique, and lists slots by
    # index, which a changed selection shifts. The method below is where every slot learns its variable.
    updated = [_without_rows(member) if member.elsewhere else member.variable for member in members]
    paths = {id(variable): member.entry.path for variable, member in zip(updated, members, strict=True)}
    slots: dict[str, Any] = {}
    add_slot = optimizer.add_variable_from_reference

    def recorded(reference_variable: Any, name: str | None = None, **kwargs: Any) -> Any:
        slot = add_slot(reference_variable, name=name, **kwargs)
        slots[f"{paths[id(reference_variable)]}/{name}"] = slot
        return slot

    aliases = [(variable, member.entry.variable) for variable, member in zip(updated, members, strict=True)]
    compat.alias_variables(optimizer, aliases)
    optimizer.add_variable_from_reference = recorded
    optimizer.build(updated)
    del optimizer.add_variable_from_reference
    known = {id(slot) for slot in slots.values()}
    # Some have slots of other shapes, which they make by another method and give names that are not unique, or that
    # Keras numbers through the process (`variable_7`): those go by their place, too.
    for place, variable in enumerate(optimizer.variables):
        if id(variable) not in known:
            slots[f"group_{number}/{place}_{re.sub(r'_[0-9]+$', '', variable.name)}"] = variable
    assert len(slots) == len(optimizer.variables)
    return slots


def _without_rows(member: OptimizerVariable) -> Any:
    """A stand-in of a variable whose slots take no memory."""
    shape = member.variable.shape
    return stand_in(member.variable, zeros([0, *shape[1:]], member.variable.dtype)) if shape else member.variable


def apply(optimizers: Sequence[GroupOptimizer], gradients: Sequence[tf.Tensor | None]) -> None:
    """Updates every group; called in a replica context with reduced gradients in the order of `plan.trained`.

    A variable whose gradient is None stays as it is.

    Examples:
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([1]), keras.layers.Dense(2, name="head")])
        >>> plan = resolve([("train", ".*/bias"), ("freeze", ".*")], model, AllReduce())
        >>> apply(build(plan, lambda: keras.optimizers.SGD(0.5)), [tf.constant([1.0, -1.0])])
        >>> model.layers[0].bias.numpy().tolist()
        [-0.5, 0.5]
    """
    rest = iter(gradients)
    for group in optimizers:
        pairs = [(gradient, member.variable) for member in group.members if (gradient := next(rest)) is not None]
        if pairs:
            group.optimizer.apply(*zip(*pairs, strict=True))
        elif any(member.entry.dealt for member in group.members):  # to others, whose steps it counts
            group.optimizer.iterations.assign_add(1)


def finalize(strategy: tf.distribute.Strategy, optimizers: Sequence[GroupOptimizer]) -> None:
    """Gives the variables their last values, as Keras does at the end of `fit`: with `use_ema` their averages.

    Called in the cross-replica context.
    """
    for group in optimizers:
        if group.optimizer.use_ema and group.state:
            group.optimizer.finalize_variable_values([member.variable for member in group.members])
            write_rows(strategy, group.members)


@contextlib.contextmanager
def averaged(strategy: tf.distribute.Strategy, optimizers: Sequence[GroupOptimizer]) -> Iterator[None]:
    """Gives the variables the averages of `use_ema` and their own values back afterwards.

    Called in the cross-replica context. Before the first step there are no averages.

    Examples:
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1, name="head")])
        >>> plan = resolve([("train", ".*/bias"), ("freeze", ".*")], model, AllReduce())
        >>> groups = build(plan, lambda: keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.5))
        >>> for gradient in (0.0, -1.0):
        ...     apply(groups, [tf.constant([gradient])])
        >>> with averaged(tf.distribute.get_strategy(), groups):
        ...     model.layers[0].bias.numpy().tolist()
        [0.5]
        >>> model.layers[0].bias.numpy().tolist()
        [1.0]
    """
    begun = [
        group for group in optimizers if group.state and int(keras.ops.convert_to_numpy(group.optimizer.iterations))
    ]
    try:
        with untouched(strategy, [member.variable for group in begun for member in group.members]):
            finalize(strategy, begun)
            yield
    finally:
        for group in begun:
            write_rows(strategy, group.members)


def write_rows(strategy: tf.distribute.Strategy, members: Sequence[OptimizerVariable]) -> None:
    """Copies the rows that were updated into the model's variables; called in the cross-replica context.

    Examples:
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import Rule, resolve
        >>> model = keras.Sequential([keras.Input([1]), keras.layers.Dense(3, name="head")])
        >>> plan = resolve([Rule(".*/bias", rows=(1, 3)), ("freeze", ".*")], model, AllReduce())
        >>> [group] = build(plan, keras.optimizers.SGD)
        >>> _ = group.members[0].variable.assign([5.0, 6.0])
        >>> write_rows(tf.distribute.get_strategy(), group.members)
        >>> model.layers[0].bias.numpy().tolist()
        [0.0, 5.0, 6.0]
    """
    for member in members:
        if member.entry.rule.rows is not None:
            start, stop = member.entry.rule.rows
            strategy.extended.update(
                member.entry.variable.value,
                lambda whole, rows, start=start, stop=stop: whole[start:stop].assign(rows),
                args=(member.variable.value,),
            )
