"""The exchange of groups whose replicas train by themselves for some steps: see `reduction.LocalSGD`."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_partial.distributed import traffic
from dist_partial.distributed.collectives import Collectives, run_rounds
from dist_partial.reductions.base import mean
from dist_partial.reductions.local_sgd import LocalSGD
from dist_partial.selection.plan import Plan, VariablePlan
from dist_partial.step import optimizers
from dist_partial.step.layer_state import untouched
from dist_partial.step.optimizers import GroupOptimizer, OptimizerVariable


@dataclasses.dataclass(frozen=True, eq=False)
class Fragment:
    """One group that is exchanged every few steps.

    Attributes:
        reduction: when, and how.
        members: the group's variables, of which each replica trains its own copy.
        outer: the outer optimizer; its members are the anchors, the same on all replicas.
        states: what the reduction of the movements keeps, a dictionary a member.
    """

    reduction: LocalSGD
    members: tuple[OptimizerVariable, ...]
    outer: GroupOptimizer
    states: tuple[dict[str, tf.Variable], ...]

    def entries(self, plan: Plan) -> list[VariablePlan]:
        """The plan's entries of its members."""
        paths = {member.entry.path for member in self.members}
        return [entry for entry in plan.trained if entry.path in paths]


@dataclasses.dataclass(frozen=True, eq=False)
class Exchange:
    """The compiled exchange of one fragment.

    Attributes:
        fragment: what is exchanged.
        function: makes one exchange, after which all replicas have the same bits of it.
        sent: what one replica hands over each time.
    """

    fragment: Fragment
    function: Any
    sent: list[traffic.Collective]


def build(
    plan: Plan, groups: Sequence[GroupOptimizer], states: Sequence[dict[str, tf.Variable]]
) -> tuple[Fragment, ...]:
    """Makes the anchors, equal to the variables as they are, and their outer optimizers; in the strategy's scope.

    Args:
        plan: the plan.
        groups: from `optimizers.build`.
        states: from `reduction.states`.

    Raises:
        UserError: if an outer factory does not make a Keras optimizer.
    """
    rest = iter(states)
    fragments = []
    for number, (group, inner) in enumerate(zip(plan.groups, groups, strict=True)):
        own_states = tuple(next(rest) for _ in inner.members)
        if isinstance(group.reduction, LocalSGD):
            anchors = tuple(
                OptimizerVariable(
                    member.entry, optimizers.stand_in(member.variable, keras.ops.convert_to_numpy(member.variable))
                )
                for member in inner.members
            )
            factory = group.reduction.outer_optimizer or (lambda: keras.optimizers.SGD(1.0))
            outer = optimizers.prepare(
                f"local_sgd.outer_optimizer of rule {group.rule.match!r}", factory, anchors, number
            )
            outer.allocate()
            fragments.append(Fragment(group.reduction, inner.members, outer, own_states))
    return tuple(fragments)


def exchanges(
    strategy: tf.distribute.Strategy,
    collectives: Collectives,
    plan: Plan,
    fragments: Sequence[Fragment],
    without_gradient: Sequence[str],
    statistics: Sequence[Any],
) -> list[Exchange]:
    """Compiles the exchanges of all fragments.

    Args:
        strategy: the replicas.
        collectives: how they reach each other.
        plan: the plan.
        fragments: from `build`.
        without_gradient: paths on which the loss does not depend: they do not move.
        statistics: variables that are to be averaged; where no group is shared in every step, which would take them
            along, the first fragment does.
    """
    run_rounds = any(group.reduction.shared for group in plan.groups)
    found = []
    for i, fragment in enumerate(fragments):
        function = _exchange(strategy, collectives, fragment, without_gradient, [] if run_rounds or i else statistics)
        found.append(Exchange(fragment, function, traffic.in_call(function.get_concrete_function())))
    return found


def _exchange(
    strategy: tf.distribute.Strategy,
    collectives: Collectives,
    fragment: Fragment,
    without_gradient: Sequence[str],
    statistics: Sequence[Any],
) -> Any:
    moved = [i for i, member in enumerate(fragment.members) if member.entry.path not in without_gradient]

    def replica_means() -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        exchanges = []
        for i in reversed(moved):
            anchor, own = fragment.outer.members[i].variable.value, fragment.members[i].variable.value
            movement = tf.convert_to_tensor(anchor) - tf.convert_to_tensor(own)
            count = tf.distribute.get_replica_context().num_replicas_in_sync
            exchanges.append(fragment.reduction.window.reduce(movement / count, fragment.states[i]))
        means = run_rounds(collectives, [*exchanges, *[mean(tf.convert_to_tensor(v.value)) for v in statistics]])
        return means[: len(moved)][::-1], means[len(moved) :]

    def replica_update(means: list[tf.Tensor], averages: list[tf.Tensor]) -> None:
        if moved:
            fragment.outer.optimizer.apply(means, [fragment.outer.members[i].variable for i in moved])
        for variable, average in zip(statistics, averages, strict=True):
            variable.assign(average)

    def replica_starts() -> list[tf.Tensor]:
        """Where the next steps start: at the anchor, but for what was left out, which was divided by the replicas."""
        count = tf.distribute.get_replica_context().num_replicas_in_sync
        starts = []
        for member, state in zip(fragment.outer.members, fragment.states, strict=True):
            start = tf.convert_to_tensor(member.variable.value)
            if "residual" in state:
                start -= count * state["residual"]
                state["residual"].assign(tf.zeros_like(start))
                if member.variable.constraint is not None:  # as after any step
                    start = member.variable.constraint(start)
            starts.append(start)
        return starts

    @tf.function(autograph=False)
    def exchanged() -> None:
        if moved or statistics:
            strategy.run(replica_update, args=strategy.run(replica_means))
            _go_to(
                strategy,
                fragment,
                strategy.run(replica_starts) if fragment.reduction.keep_residual_local else _anchors(fragment),
            )

    return exchanged


def averages(strategy: tf.distribute.Strategy, collectives: Collectives, variables: Sequence[Any]) -> Any:
    """Builds the compiled function that gives all replicas the mean of what each has of some variables."""

    def replica_average() -> None:
        means = run_rounds(collectives, [mean(tf.convert_to_tensor(variable.value)) for variable in variables])
        for variable, average in zip(variables, means, strict=True):
            variable.assign(average)

    return tf.function(lambda: strategy.run(replica_average), autograph=False)


@contextlib.contextmanager
def agreed(strategy: tf.distribute.Strategy, fragments: Sequence[Fragment]) -> Iterator[None]:
    """Lets the model have the anchors, on which all replicas agree, and gives each replica its own back afterwards."""
    try:
        with untouched(strategy, [member.variable for fragment in fragments for member in fragment.members]):
            for fragment in fragments:
                _go_to(strategy, fragment, _anchors(fragment))
            yield
    finally:
        for fragment in fragments:
            optimizers.write_rows(strategy, fragment.members)


def _anchors(fragment: Fragment) -> list[Any]:
    return [member.variable.value for member in fragment.outer.members]


def _go_to(strategy: tf.distribute.Strategy, fragment: Fragment, values: Sequence[Any]) -> None:
    for member, value in zip(fragment.members, values, strict=True):
        strategy.extended.update(member.variable.value, lambda own, value: own.assign(value), args=(value,))
    optimizers.write_rows(strategy, fragment.members)
