"""The compiled training step."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_partial.distributed.collectives import Collectives
from dist_partial.errors import calling
from dist_partial.reductions.base import reduce
from dist_partial.selection.plan import Plan
from dist_partial.step import optimizers as optimizers_lib
from dist_partial.step.batch_norm import local_statistics
from dist_partial.step.gradients import (
    Batch,
    accumulate,
    added_losses,
    batch_losses,
    clip,
    local_sum,
    model_outputs,
    own_part,
    selected_rows,
    unit_squares,
)
from dist_partial.step.loss_scale import LossScale
from dist_partial.step.losses import Loss
from dist_partial.step.optimizers import GroupOptimizer


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What a step does besides the plan.

    Attributes:
        global_batch: examples in a step over all replicas; the loss is the mean over them.
        clip_norm: global norm to which the summed gradient is clipped, over all of the selection that replicas
            share; what each trains by itself is clipped to the same norm by itself. None clips nothing.
        accumulate: micro-batches into which each replica cuts its batch, one after the other; they are
            reduced once.
        jit_compile: whether XLA compiles the gradient computation of a replica.
        unit_norms: whether the step also returns the squared gradient norm of each unit of the plan.
        loop: whether a call may make another number of steps than one; without, it takes less time to compile.
    """

    global_batch: int
    clip_norm: float | None = None
    accumulate: int = 1
    jit_compile: bool = False
    unit_norms: bool = False
    loop: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """The compiled step and what tracing it has shown.

    Attributes:
        function: (iterator of this worker's batches, number of steps, an int32 scalar) -> {"loss": [steps],
            "gradient_norm": [steps]}, float32. The losses are this worker's part of the sum. The norm
            is of the gradient before clipping; where replicas train by themselves, this worker's first replica's.
            With `unit_norms` also "unit_norms" [steps, units], in the order of the plan's units.
        without_gradient: paths of selected variables on which the loss does not depend; filled by tracing.
    """

    function: Any
    without_gradient: list[str]


def train_step(
    strategy: tf.distribute.Strategy,
    collectives: Collectives,
    model: keras.Model,
    loss: Loss,
    plan: Plan,
    optimizers: Sequence[GroupOptimizer],
    states: Sequence[dict[str, tf.Variable]],
    options: StepOptions,
    scale: LossScale | None = None,
    outputs: Callable[[tf.Tensor, bool], tf.Tensor] | None = None,
    averaged: Sequence[Any] = (),
) -> TrainStep:
    """Builds the function that makes several steps of one plan in a call.

    Args:
        strategy: the replicas.
        collectives: how they reach each other.
        model: built in the strategy's scope.
        loss: (y, outputs) -> losses, the batch axis first.
        plan: what is trained and how it travels.
        optimizers: one a group, from `optimizers.build`.
        states: what the reductions keep, from `reduction.states`.
        options: batch size, clipping, accumulation, compilation.
        scale: the loss scale of float16 training, or None.
        outputs: (x, training) -> the model's outputs, where x is something else than the model's input.
        averaged: variables that layers change in the step, besides BatchNorm's statistics, and replicas average.
    """
    outputs = outputs or (lambda x, training: model_outputs(model, x, training))
    trained = plan.trained
    values = [entry.variable.value for entry in trained]
    without_gradient: list[str] = []
    parts = strategy.num_replicas_in_sync * options.accumulate
    shared = [entry.reduction.shared for entry in trained]
    # Where every group trains by itself nothing is sent in a step; the statistics travel with the exchanges.
    statistics = [*local_statistics(model), *averaged] if any(shared) else []

    def backprop(batch: Batch, loss_scale: tf.Tensor) -> tuple[tf.Tensor, list[Any]]:
        # Watching the selection alone lets TensorFlow leave out all of the backward pass that it does not need.
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            losses = batch_losses(loss, batch, outputs(batch[0], True))
            # Every part of the batch adds its share of the one penalty.
            total = tf.reduce_sum(losses) / options.global_batch + added_losses(model, losses.dtype) / parts
            scaled = total * tf.cast(loss_scale, total.dtype)
        gradients = tape.gradient(scaled, values)
        return total, [selected_rows(g, e.rule.rows) for g, e in zip(gradients, trained, strict=True)]

    def replica_gradients(batch: Batch) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, list[Any], list[tf.Tensor]]:
        loss_scale = tf.constant(1.0) if scale is None else scale.value()
        batch = own_part(strategy, batch)
        compute = tf.function(backprop, jit_compile=True, autograph=False) if options.jit_compile else backprop
        total, gradients = accumulate(compute, batch, loss_scale, options.accumulate)
        without_gradient[:] = [e.path for e, g in zip(trained, gradients, strict=True) if g is None]
        gradients, means = reduce(
            collectives, plan, gradients, states, [tf.convert_to_tensor(v.value) for v in statistics]
        )
        # Only now, on the sum that all replicas share bit for bit, may anything depend on the gradient's values:
        # what one replica decided by its own part alone would set it apart from the others.
        if scale is not None:
            gradients = [g if g is None else g / tf.cast(loss_scale, g.dtype) for g in gradients]
        squares = unit_squares(plan, gradients) if options.unit_norms else tf.zeros([0])
        gradients, norm = clip(gradients, shared, options.clip_norm)
        return total, norm, squares, gradients, means

    def replica_update(gradients: list[Any]) -> None:
        with calling("run.optimizer"):
            optimizers_lib.apply(optimizers, gradients)

    def replica_statistics(means: list[tf.Tensor]) -> None:
        for variable, mean in zip(statistics, means, strict=True):
            variable.assign(mean)

    def update(gradients: Any) -> None:
        strategy.run(replica_update, args=(gradients,))
        for group in optimizers:
            optimizers_lib.write_rows(strategy, group.members)

    # Without autograph, as in Keras's own `fit`: a model's Python code runs as written, and tracing takes less time.
    @tf.function(autograph=False)
    def train(iterator: Any, steps: tf.Tensor) -> dict[str, tf.Tensor]:
        def one_step(i: tf.Tensor, losses: tf.TensorArray, norms: tf.TensorArray, units: tf.TensorArray) -> Any:
            total, norm, squares, gradients, means = strategy.run(replica_gradients, args=(next(iterator),))
            strategy.run(replica_statistics, args=(means,))
            norm, squares = (strategy.experimental_local_results(value)[0] for value in (norm, squares))
            if scale is None:
                update(gradients)
            else:
                # An update cannot be skipped inside `strategy.run`, where Keras's optimizers leave the replica
                # context to assign; that is why a step is two calls of it.
                finite = tf.math.is_finite(norm)
                tf.cond(finite, lambda: update(gradients), lambda: None)
                scale.adjust(finite)
            losses = losses.write(i, tf.cast(local_sum(strategy, total), tf.float32))
            return i + 1, losses, norms.write(i, tf.cast(norm, tf.float32)), units.write(i, squares)

        shapes = [[], [], [len(plan.units) if options.unit_norms else 0]]
        arrays = [tf.TensorArray(tf.float32, steps, element_shape=shape) for shape in shapes]
        state = [0, *arrays]
        if options.loop:
            state = tf.while_loop(lambda i, *_: i < steps, one_step, state, parallel_iterations=1)
        else:
            state = one_step(*state)
        _, losses, norms, units = state
        return {"loss": losses.stack(), "gradient_norm": norms.stack(), "unit_norms": units.stack()}

    return TrainStep(train, without_gradient)
