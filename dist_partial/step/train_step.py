"""The compiled training step: top-level functions over one frozen spec, each above the one that it calls.

One call makes several steps (`train_steps`). In each step (`one_step`) every replica computes the gradients of its
part of the batch (`replica_gradients`, `backprop`) and reduces them, and then all replicas update alike (`update`).
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_partial.distributed.backend import ALL, BETWEEN, INSIDE
from dist_partial.distributed.collectives import Collectives, run_rounds
from dist_partial.errors import calling
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.reductions.base import total as total_over_replicas
from dist_partial.reductions.reduce_gradients import reduce_gradients
from dist_partial.selection.plan import Plan, VariablePlan
from dist_partial.step import optimizers as optimizers_lib
from dist_partial.step.batch_norm import local_statistics
from dist_partial.step.gradients import (
    clip,
    local_sum,
    micro_batches,
    model_outputs,
    own_part,
    selected_rows,
    unit_squares,
)
from dist_partial.step.loss_scale import LossScale
from dist_partial.step.objective import Batch, Objective
from dist_partial.step.optimizers import GroupOptimizer, OptimizerVariable
from dist_partial.step.whole_batch import whole_batch


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """Describes how a step computes, whatever its plan is.

    Attributes:
        clip_norm: global norm to which the summed gradient is clipped, over all of the selection that replicas
            share; what each trains by itself is clipped to the same norm by itself. None clips nothing.
        accumulate: micro-batches into which each replica cuts its batch, one after the other; they are
            reduced once.
        jit_compile: whether XLA compiles the gradient computation of a replica.
        unit_norms: whether the step also returns the squared gradient norm of each unit of the plan.
        loop: whether a call may make another number of steps than one; without, it takes less time to compile.

    Examples:
        >>> StepOptions(clip_norm=1.0).accumulate
        1
    """

    clip_norm: float | None = None
    accumulate: int = 1
    jit_compile: bool = False
    unit_norms: bool = False
    loop: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class StepSpec:
    """Holds everything that a step computes with; nothing of it changes while the step is in use.

    Attributes:
        strategy: the replicas.
        collectives: how they reach each other.
        model: built in the strategy's scope.
        objective: the loss and the metrics.
        plan: what is trained and how it travels.
        optimizers: one a group, from `optimizers.build`.
        states: what the reductions keep, from `make_states`.
        options: batch size, clipping, accumulation, compilation.
        scale: the loss scale of float16 training, or None.
        outputs: (x, training) -> the model's outputs, where x is something else than the model's input; None calls
            the model.
        averaged: variables that layers change in the step and replicas average, besides BatchNorm's statistics.
        without_gradient: paths of selected variables on which the loss does not depend; tracing fills it.
        looked_up: by path of an embedding, rows that a replica looks up in a step; tracing fills it.
    """

    strategy: tf.distribute.Strategy
    collectives: Collectives
    model: keras.Model
    objective: Objective
    plan: Plan
    optimizers: Sequence[GroupOptimizer]
    states: Sequence[dict[str, tf.Variable]]
    options: StepOptions
    scale: LossScale | None = None
    outputs: Callable[[tf.Tensor, bool], tf.Tensor] | None = None
    averaged: Sequence[Any] = ()
    without_gradient: list[str] = dataclasses.field(default_factory=list)
    looked_up: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def replicas(self) -> int:
        """How many there are in all."""
        return self.collectives.backend.topology(self.strategy).replicas

    def together(self, entry: VariablePlan) -> bool:
        """Tells whether replicas of one process, which update together, train it in place of each other."""
        return entry.dealt and entry.inside is None and self.collectives.backend.topology(self.strategy).local > 1

    @property
    def statistics(self) -> Sequence[Any]:
        """The variables that this step averages, in the modes that the layers are in while it is traced.

        Where every group trains by itself a step sends nothing; the statistics travel with the exchanges.
        """
        shared = any(entry.reduction.shared for entry in self.plan.trained)
        return [*local_statistics(self.model), *self.averaged] if shared else []

    def elsewhere(self) -> set[str]:
        """Paths of what another replica, or worker, trains alone (`Plan.owners`); called in a replica context."""
        found: set[str] = set()
        for inside in {entry.inside is not None for entry in self.plan.trained if entry.dealt}:
            topology = self.collectives.at(BETWEEN if inside else ALL).topology
            found |= self.plan.elsewhere(topology.replicas, topology.rank, inside)
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """Holds the compiled step and what tracing it has shown.

    Attributes:
        function: (iterator of this worker's batches, number of steps, an int32 scalar) -> what `train_steps` returns.
        without_gradient: paths of selected variables on which the loss does not depend; tracing fills it.
        looked_up: by path of an embedding, rows that a replica looks up in a step; tracing fills it.
    """

    function: Any
    without_gradient: list[str]
    looked_up: dict[str, int]


def train_step(spec: StepSpec) -> TrainStep:
    """Compiles the function that makes several steps of one plan in a call; its first call traces it."""
    # Without autograph, as in Keras's own `fit`: a model's Python code runs as written, and tracing takes less time.
    function = tf.function(functools.partial(train_steps, spec), autograph=False)
    return TrainStep(function, spec.without_gradient, spec.looked_up)


def train_steps(spec: StepSpec, iterator: Any, steps: tf.Tensor) -> dict[str, tf.Tensor]:
    """Makes `steps` steps on the batches of an iterator; called in the cross-replica context of a graph.

    Returns:
        "loss" [steps] in Keras's float type and float64 "metrics" [steps, numbers], this worker's parts of the sums;
        float64 "waited" [steps], seconds in which it waited for its batch; float32 "gradient_norm" [steps], before
        clipping, and where replicas train by themselves that of this worker's first replica; "unit_norms" [steps,
        units], squared, in the order of the plan's units. The metrics are absent if there are none, and the units
        without `options.unit_norms`.
    """
    kinds: dict[str, tuple[tf.DType, list[int]]] = {
        "loss": (tf.as_dtype(keras.config.floatx()), []),
        "gradient_norm": (tf.float32, []),
        "waited": (tf.float64, []),
    }
    if size := spec.objective.size(training=True):
        kinds["metrics"] = (tf.float64, [size])
    if spec.options.unit_norms:
        kinds["unit_norms"] = (tf.float32, [len(spec.plan.units)])
    arrays = {name: tf.TensorArray(dtype, steps, element_shape=shape) for name, (dtype, shape) in kinds.items()}
    step = functools.partial(one_step, spec, iterator)
    if spec.options.loop:
        _, arrays = tf.while_loop(lambda i, _: i < steps, step, (0, arrays), parallel_iterations=1)
    else:
        _, arrays = step(0, arrays)
    return {name: array.stack() for name, array in arrays.items()}


def one_step(spec: StepSpec, iterator: Any, i: tf.Tensor, arrays: dict[str, tf.TensorArray]) -> Any:
    """Makes step `i` of a call: gradients on all replicas, then the update; returns the loop's next state."""
    strategy = spec.strategy
    batch, waited = next_batch(iterator)
    sums, norm, squares, gradients, means = strategy.run(replica_gradients, args=(spec, batch))
    strategy.run(replica_statistics, args=(spec, means))
    norm, squares = (strategy.experimental_local_results(value)[0] for value in (norm, squares))
    if spec.scale is None:
        update(spec, gradients)
    else:
        # An update cannot be skipped inside `strategy.run`, where Keras's optimizers leave the replica
        # context to assign; that is why a step is two calls of it.
        finite = tf.math.is_finite(norm)
        tf.cond(finite, lambda: update(spec, gradients), lambda: None)
        spec.scale.adjust(finite)
    loss, metrics = (local_sum(strategy, value) for value in sums)
    values = {"loss": loss, "metrics": metrics, "gradient_norm": norm, "unit_norms": squares, "waited": waited}
    return i + 1, {name: array.write(i, tf.cast(values[name], array.dtype)) for name, array in arrays.items()}


def next_batch(iterator: Any) -> tuple[Batch, tf.Tensor]:
    """Takes the next batch of an iterator; returns it and the seconds that this took, float64."""
    began = tf.timestamp()
    with tf.control_dependencies([began]):
        batch = next(iterator)
    with tf.control_dependencies(tf.nest.flatten(batch)):
        return batch, tf.timestamp() - began


def replica_gradients(spec: StepSpec, batch: Batch) -> tuple[Any, tf.Tensor, tf.Tensor, list[Any], list[Any]]:
    """Computes, sums over the replicas and clips the gradients of the selection; called in a replica context.

    Returns:
        This replica's parts of the loss and of the metrics' sums, the norm before clipping, squared norms of the units,
        the gradients in the order of `plan.trained`, and the means of `spec.statistics`.
    """
    options, trained = spec.options, spec.plan.trained
    loss_scale = tf.constant(1.0) if spec.scale is None else spec.scale.value()
    first, *others = parts = micro_batches(own_part(spec.collectives.topology, batch), options.accumulate)
    elsewhere = spec.elsewhere()
    compute = functools.partial(backprop, spec, elsewhere)
    if options.jit_compile:
        compute = tf.function(compute, jit_compile=True, autograph=False)
    counts = divisors(spec, parts)
    total, metrics, gradients = compute(first, loss_scale, counts)
    for part in others:
        # The control dependency keeps the executor from running all micro-batches at once, which would hold all of
        # their activations. A tf.while_loop would do the same, but a model that reduces in its forward pass
        # (synchronised BatchNorm) cannot leave the replica context from inside one.
        with tf.control_dependencies([total, *[g for g in gradients if g is not None]]):
            loss, added, more = compute(tf.nest.map_structure(tf.identity, part), loss_scale, counts)
            total += loss
            metrics += added
            gradients = [g if g is None else g + m for g, m in zip(gradients, more, strict=True)]
    # Of what is dealt out each replica knows its own share alone.
    spec.without_gradient[:] = [e.path for e, g in zip(trained, gradients, strict=True) if g is None and not e.dealt]
    statistics = [tf.convert_to_tensor(variable.value) for variable in spec.statistics]
    gradients, means = reduce_gradients(spec.collectives, spec.plan, gradients, spec.states, statistics)
    # Only now, on the sum that all replicas share bit for bit, may anything depend on the gradient's values:
    # what one replica decided by its own part alone would set it apart from the others.
    if spec.scale is not None:
        gradients = [g if g is None else g / tf.cast(loss_scale, g.dtype) for g in gradients]
    squares = unit_squares(spec.plan, gradients) if options.unit_norms else tf.zeros([0])
    gradients, norm = clip(gradients, [(e.reduction.shared, e.inside is not None) for e in trained], options.clip_norm)
    for i, entry in enumerate(trained):
        if entry.path in elsewhere and spec.together(entry):
            gradients[i] = tf.zeros(entry.trained_shape, entry.dtype)
    return (total, metrics), norm, squares, gradients, means


def divisors(spec: StepSpec, parts: Sequence[Batch]) -> tf.Tensor | None:
    """Counts what the losses of a step divide by, over all replicas and micro-batches, where the data decides on it.

    Known before any gradient, for several losses, regularisers and what a reduction keeps need it then. Where each
    replica trains by itself, it counts its own.

    Returns:
        [objective.counts], or None.
    """
    objective = spec.objective
    if not objective.counts or objective.coupled or (len(parts) == 1 and spec.replicas == 1):
        return None
    own = tf.add_n([objective.counted(part, functools.partial(outputs_of, spec), True) for part in parts])
    if not any(entry.reduction.shared for entry in spec.plan.trained):
        if all(entry.inside for entry in spec.plan.trained):
            inside = run_rounds(spec.collectives.at(INSIDE), [total_over_replicas(own)])[0]
            return inside * spec.collectives.at(BETWEEN).topology.replicas
        return own * spec.replicas
    return run_rounds(spec.collectives, [total_over_replicas(own)])[0]


def outputs_of(spec: StepSpec, x: Any) -> Any:
    """Computes the model's outputs in training mode, from its inputs or from what is kept in their place."""
    return spec.outputs(x, True) if spec.outputs else model_outputs(spec.model, x, True)


def backprop(
    spec: StepSpec, elsewhere: Collection[str], batch: Batch, loss_scale: tf.Tensor, counts: tf.Tensor | None
) -> tuple[tf.Tensor, tf.Tensor, list[Any]]:
    """Differentiates the loss of one micro-batch of one replica by what it trains, and by nothing else."""
    trained = spec.plan.trained
    here = [i for i, entry in enumerate(trained) if entry.path not in elsewhere]
    values = [trained[i].variable.value for i in here]
    # Watching the selection alone lets TensorFlow leave out all of the backward pass that it does not need.
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        outputs = outputs_of(spec, batch[0])
        share = 1 / (spec.replicas * spec.options.accumulate)
        whole = None
        if spec.replicas > 1 and spec.objective.needs_whole(training=True):
            whole = whole_batch(spec.collectives, spec.objective, batch, outputs, share)
        if whole and spec.objective.coupled:
            loss, changed = spec.objective.loss(*whole, True)
        else:
            loss, changed = spec.objective.loss(batch, outputs, True, share, counts)
        loss *= share
        scaled = loss * tf.cast(loss_scale, loss.dtype)
    spec.objective.assign(changed)
    gradients: list[Any] = [None] * len(trained)
    for i, gradient in zip(here, tape.gradient(scaled, values), strict=True):
        gradients[i] = gradient
    metrics = spec.objective.added(batch, outputs, True, changed, share, whole)
    return loss, metrics, [_as_sent(spec, g, e) for g, e in zip(gradients, trained, strict=True)]


def _as_sent(spec: StepSpec, gradient: Any, entry: VariablePlan) -> Any:
    """A gradient of the selected rows; that of an embedding as it is, where its lookups are sent."""
    lookups = isinstance(gradient, tf.IndexedSlices) and gradient.indices.shape.is_fully_defined()
    several = spec.options.accumulate > 1 or spec.options.jit_compile
    if not lookups or several or entry.inside or entry.rule.rows or not isinstance(entry.reduction, AllReduce):
        return selected_rows(gradient, entry.rule.rows)
    ids = spec.looked_up[entry.path] = gradient.indices.shape[0]
    sent = entry.reduction.lookup_payloads(ids, entry.shape, entry.dtype, spec.plan.peers(entry))
    return gradient if sent and spec.replicas > 1 else selected_rows(gradient, None)


def replica_statistics(spec: StepSpec, means: list[tf.Tensor]) -> None:
    """Gives the averaged variables their means; called in a replica context."""
    for variable, mean in zip(spec.statistics, means, strict=True):
        variable.assign(mean)


def update(spec: StepSpec, gradients: Any) -> None:
    """Updates all groups on all replicas by reduced gradients; called in the cross-replica context."""
    dealt = [member for group in spec.optimizers for member in group.members if spec.together(member.entry)]
    before, own = spec.strategy.run(replica_dealt, args=(spec, dealt)) if dealt else ([], [])
    spec.strategy.run(replica_update, args=(spec, gradients))
    # Without a gradient there may be weight decay; what another replica trains stays until the exchange.
    for member, value, mine in zip(dealt, before, own, strict=True):
        spec.strategy.extended.update(
            member.variable.value,
            lambda variable, value, mine: variable.assign(tf.where(mine, variable, value)),
            args=(value, mine),
        )
    for group in spec.optimizers:
        optimizers_lib.write_rows(spec.strategy, group.members)


def replica_dealt(spec: StepSpec, dealt: Sequence[OptimizerVariable]) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Reads what is dealt out, and says of each whether this replica trains it; called in a replica context."""
    elsewhere = spec.elsewhere()
    return (
        [tf.identity(member.variable.value) for member in dealt],
        [tf.constant(member.entry.path not in elsewhere) for member in dealt],
    )


def replica_update(spec: StepSpec, gradients: list[Any]) -> None:
    """Applies the optimizers; called in a replica context."""
    with calling("run.optimizer"):
        optimizers_lib.apply(spec.optimizers, gradients)
