"""The exchange of groups whose replicas train by themselves for some steps: see `reductions.LocalSGD`."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_partial.distributed.collectives import BETWEEN, Collectives, run_rounds
from dist_partial.reductions.base import mean
from dist_partial.reductions.block_parallel import BlockParallel
from dist_partial.reductions.encoding import zeros
from dist_partial.reductions.local_sgd import LocalSGD
from dist_partial.reductions.reduce_gradients import own_variable
from dist_partial.reductions.together import Term, reduce_together
from dist_partial.selection.plan import Plan, VariablePlan
from dist_partial.step import optimizers
from dist_partial.step.gradients import clip
from dist_partial.step.layer_state import untouched
from dist_partial.step.optimizers import GroupOptimizer, OptimizerVariable


@dataclasses.dataclass(frozen=True, eq=False)
class Fragment:
    """Holds one group that is exchanged every few steps.

    Attributes:
        reduction: when, and how.
        members: the group's variables, of which each replica trains its own copy.
        outer: the outer optimizer; its members are the anchors, the same on all replicas.
        states: what the reduction of the movements keeps, a dictionary a member.
        plan: by which the members are dealt out, where they are.
        moving: with a delay, what travels of each member: its movement, and once it has arrived the mean of all.
        begun: with a delay whose progress is kept, where each member was when the exchange began.
    """

    reduction: LocalSGD
    members: tuple[OptimizerVariable, ...]
    outer: GroupOptimizer
    states: tuple[dict[str, tf.Variable], ...]
    plan: Plan
    moving: tuple[tf.Variable, ...] = ()
    begun: tuple[tf.Variable, ...] = ()

    def over(self, collectives: Collectives) -> Collectives:
        """How those reach each other that exchange: all replicas, or, of each worker, one for all."""
        return collectives if self.members[0].entry.inside is None else collectives.at(BETWEEN)

    def entries(self, plan: Plan) -> list[VariablePlan]:
        """The plan's entries of its members."""
        paths = {member.entry.path for member in self.members}
        return [entry for entry in plan.trained if entry.path in paths]


@dataclasses.dataclass(frozen=True, eq=False)
class ExchangeSpec:
    """Holds everything that the exchange of one fragment computes with.

    Attributes:
        strategy: the replicas.
        collectives: how they reach each other.
        fragment: what is exchanged.
        moved: numbers of the members that move, those on which the loss depends.
        statistics: variables that travel with it and are averaged.
    """

    strategy: tf.distribute.Strategy
    collectives: Collectives
    fragment: Fragment
    moved: Sequence[int]
    statistics: Sequence[Any] = ()


def build(
    plan: Plan, groups: Sequence[GroupOptimizer], states: Sequence[dict[str, tf.Variable]]
) -> tuple[Fragment, ...]:
    """Makes the anchors, equal to the variables as they are, and their outer optimizers; in the strategy's scope.

    Args:
        plan: the plan.
        groups: from `optimizers.build`.
        states: from `make_states`.

    Raises:
        UserError: if an outer factory does not make a Keras optimizer.

    Examples:
        >>> from dist_partial.reductions.reduce_gradients import make_states
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([1]), keras.layers.Dense(2)])
        >>> plan = resolve([("train", ".*/bias"), ("freeze", ".*")], model, LocalSGD(sync_every=10))
        >>> [fragment] = build(plan, optimizers.build(plan, keras.optimizers.SGD), make_states(plan))
        >>> fragment.outer.members[0].variable is model.layers[0].bias, float(fragment.outer.optimizer.learning_rate)
        (False, 1.0)
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
            moving = _zeros("moving", anchors if group.reduction.delay else ())
            begun = _zeros("begun", anchors if group.reduction.keep_progress else ())  # with a delay alone
            fragments.append(Fragment(group.reduction, inner.members, outer, own_states, plan, moving, begun))
    return tuple(fragments)


def _zeros(name: str, anchors: Sequence[OptimizerVariable]) -> tuple[tf.Variable, ...]:
    """A variable of each replica's own for each anchor."""
    return tuple(own_variable(name, zeros(anchor.variable.shape, anchor.entry.dtype)) for anchor in anchors)


def exchange(spec: ExchangeSpec) -> None:
    """Makes one exchange; called in the cross-replica context of a graph."""
    if not spec.moved and not spec.statistics:
        return
    means, statistics = spec.strategy.run(replica_means, args=(spec,))
    _apply(spec, means, statistics)


def begin(spec: ExchangeSpec) -> None:
    """Notes how far each replica's members have moved, and averages the statistics; what `travel` sends."""
    spec.strategy.run(replica_begin, args=(spec,))


def travel(spec: ExchangeSpec) -> None:
    """Puts the mean of all replicas in the place of each movement; touches nothing that steps touch."""
    spec.strategy.run(replica_travel, args=(spec,))


def arrive(spec: ExchangeSpec) -> None:
    """Applies what has travelled."""
    means = spec.strategy.run(replica_arrived, args=(spec,))
    _apply(dataclasses.replace(spec, statistics=()), means, [])


def _apply(spec: ExchangeSpec, means: list[tf.Tensor], statistics: list[tf.Tensor]) -> None:
    spec.strategy.run(replica_update, args=(spec, means, statistics))
    local = spec.fragment.reduction.keep_residual_local or spec.fragment.begun
    starts = spec.strategy.run(replica_starts, args=(spec,)) if local else _anchors(spec.fragment)
    _go_to(spec.strategy, spec.fragment, starts, spec.fragment.reduction.mix)


def replica_begin(spec: ExchangeSpec) -> None:
    """Notes this replica's movements; called in a replica context."""
    for i in spec.moved:
        spec.fragment.moving[i].assign(_movement(spec.fragment, i))
    for member, begun in zip(spec.fragment.members, spec.fragment.begun, strict=False):
        begun.assign(member.variable.value)
    _assign(spec.statistics, run_rounds(spec.collectives, _means(spec.statistics)))


def replica_travel(spec: ExchangeSpec) -> None:
    """Averages the noted movements over the replicas; called in a replica context."""
    fragment, collectives = spec.fragment, spec.fragment.over(spec.collectives)
    noted = {i: tf.convert_to_tensor(fragment.moving[i]) for i in reversed(spec.moved)}
    means, _ = _over_replicas(fragment, collectives, noted)
    _assign([fragment.moving[i] for i in noted], means)


def replica_arrived(spec: ExchangeSpec) -> list[tf.Tensor]:
    """Reads the means that have arrived; called in a replica context."""
    return [tf.convert_to_tensor(spec.fragment.moving[i]) for i in spec.moved]


def replica_means(spec: ExchangeSpec) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Averages the movements of the members, and the statistics, over the replicas; called in a replica context."""
    collectives = spec.fragment.over(spec.collectives)
    movements = {i: _movement(spec.fragment, i) for i in reversed(spec.moved)}
    statistics = _means(spec.statistics)
    if collectives is spec.collectives:
        means, averages = _over_replicas(spec.fragment, collectives, movements, statistics)
        return means[::-1], averages
    means, _ = _over_replicas(spec.fragment, collectives, movements)
    with tf.control_dependencies(means):  # one after the other, as in `reduce_gradients`
        return means[::-1], run_rounds(spec.collectives, statistics)


def _movement(fragment: Fragment, i: int) -> tf.Tensor:
    anchor, own = fragment.outer.members[i].variable.value, fragment.members[i].variable.value
    return tf.convert_to_tensor(anchor) - tf.convert_to_tensor(own)


def _over_replicas(
    fragment: Fragment, collectives: Collectives, movements: Mapping[int, tf.Tensor], more: Sequence[Any] = ()
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """The mean of movements, each by the number of its member, or those of their owners; and what others return."""
    replicas, states = collectives.topology.replicas, [fragment.states[i] for i in movements]
    if isinstance(fragment.reduction, BlockParallel):
        paths = [fragment.members[i].entry.path for i in movements]
        owners = fragment.plan.owners(replicas)
        gathered = fragment.reduction.gather([*movements.values()], states, [owners[path] for path in paths])
        found, *others = run_rounds(collectives, [gathered, *more])
        return found, others
    window = fragment.reduction.window
    terms = [
        Term(window, own / replicas, state, own.shape) for own, state in zip(movements.values(), states, strict=True)
    ]
    found = reduce_together(collectives, terms, more)
    return found[: len(terms)], found[len(terms) :]


def _means(variables: Sequence[Any]) -> list[Any]:
    return [mean(tf.convert_to_tensor(variable.value)) for variable in variables]


def _assign(variables: Sequence[Any], values: Sequence[tf.Tensor]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def replica_update(spec: ExchangeSpec, means: list[tf.Tensor], statistics: list[tf.Tensor]) -> None:
    """Moves the anchors by the outer optimizer, and assigns the statistics; called in a replica context."""
    if spec.moved:
        if spec.fragment.reduction.clip_norm is not None:
            means, _ = clip(means, [True] * len(means), spec.fragment.reduction.clip_norm)
        spec.fragment.outer.optimizer.apply(means, [spec.fragment.outer.members[i].variable for i in spec.moved])
    _assign(spec.statistics, statistics)


def replica_starts(spec: ExchangeSpec) -> list[tf.Tensor]:
    """Computes where the replica's next steps start: at the anchors, but for what stays its own.

    That is what the exchange left out, of a mean a residual divided by the number of replicas, and how far the replica
    has moved since the exchange began.
    """
    fragment = spec.fragment
    count = 1 if fragment.reduction.divided else fragment.over(spec.collectives).topology.replicas
    starts = []
    for i, (anchor, state) in enumerate(zip(fragment.outer.members, fragment.states, strict=True)):
        start = at = tf.convert_to_tensor(anchor.variable.value)
        if fragment.begun:
            start += tf.convert_to_tensor(fragment.members[i].variable.value) - fragment.begun[i]
        if fragment.reduction.keep_residual_local and "residual" in state:
            start -= count * state["residual"]
            state["residual"].assign(tf.zeros_like(start))
        if start is not at and anchor.variable.constraint is not None:  # as after any step
            start = anchor.variable.constraint(start)
        starts.append(start)
    return starts


def averages(strategy: tf.distribute.Strategy, collectives: Collectives, variables: Sequence[Any]) -> Any:
    """Compiles the function that gives all replicas the mean of what each has of some variables."""
    return tf.function(functools.partial(_average, strategy, collectives, variables), autograph=False)


def _average(strategy: tf.distribute.Strategy, collectives: Collectives, variables: Sequence[Any]) -> None:
    strategy.run(replica_average, args=(collectives, variables))


def replica_average(collectives: Collectives, variables: Sequence[Any]) -> None:
    """Averages variables over the replicas; called in a replica context."""
    _assign(variables, run_rounds(collectives, _means(variables)))


@contextlib.contextmanager
def agreed(strategy: tf.distribute.Strategy, fragments: Sequence[Fragment]) -> Iterator[None]:
    """Lets the model have the anchors, on which all replicas agree, and gives each replica its own back afterwards.

    Examples:
        >>> from dist_partial.reductions.reduce_gradients import make_states
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([1]), keras.layers.Dense(2)])
        >>> plan = resolve([("train", ".*/bias"), ("freeze", ".*")], model, LocalSGD(sync_every=10))
        >>> fragments = build(plan, optimizers.build(plan, keras.optimizers.SGD), make_states(plan))
        >>> _ = model.layers[0].bias.assign([1.0, 2.0])
        >>> with agreed(tf.distribute.get_strategy(), fragments):
        ...     model.layers[0].bias.numpy().tolist()
        [0.0, 0.0]
        >>> model.layers[0].bias.numpy().tolist()
        [1.0, 2.0]
    """
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


def _go_to(strategy: tf.distribute.Strategy, fragment: Fragment, values: Sequence[Any], mix: float = 1.0) -> None:
    for member, value in zip(fragment.members, values, strict=True):

        def go(own: Any, value: Any, constraint: Any = member.variable.constraint) -> Any:
            if mix == 1:
                return own.assign(value)
            mixed = own + mix * (tf.convert_to_tensor(value) - own)
            return own.assign(mixed if constraint is None else constraint(mixed))

        strategy.extended.update(member.variable.value, go, args=(value,))
    optimizers.write_rows(strategy, fragment.members)
