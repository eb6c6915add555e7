"""The training step and the evaluation step, as compiled functions over (strategy, model, plan)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_partial import optimizers as optimizers_lib
from dist_partial.batch_norm import local_statistics
from dist_partial.distributed import per_replica
from dist_partial.distributed.collectives import Wire
from dist_partial.errors import calling
from dist_partial.loss_scale import LossScale
from dist_partial.losses import Loss, class_ids, element_weights, example_losses, full_precision
from dist_partial.optimizers import GroupOptimizer
from dist_partial.reductions.base import reduce
from dist_partial.selection.plan import Plan

# (x, y) or (x, y, weight), each with the batch axis first.
Batch = tuple[tf.Tensor, ...]


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
    wire: Wire,
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
        wire: how they reach each other.
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
    outputs = outputs or (lambda x, training: _outputs(model, x, training))
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
            losses = _example_losses(loss, batch, outputs(batch[0], True))
            # Every part of the batch adds its share of the one penalty.
            total = tf.reduce_sum(losses) / options.global_batch + _added(model, losses.dtype) / parts
            scaled = total * tf.cast(loss_scale, total.dtype)
        gradients = tape.gradient(scaled, values)
        return total, [_selected_rows(g, e.rule.rows) for g, e in zip(gradients, trained, strict=True)]

    def replica_gradients(batch: Batch) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, list[Any], list[tf.Tensor]]:
        loss_scale = tf.constant(1.0) if scale is None else scale.value()
        batch = _own_part(strategy, batch)
        compute = tf.function(backprop, jit_compile=True, autograph=False) if options.jit_compile else backprop
        total, gradients = _accumulate(compute, batch, loss_scale, options.accumulate)
        without_gradient[:] = [e.path for e, g in zip(trained, gradients, strict=True) if g is None]
        gradients, means = reduce(wire, plan, gradients, states, [tf.convert_to_tensor(v.value) for v in statistics])
        # Only now, on the sum that all replicas share bit for bit, may anything depend on the gradient's values:
        # what one replica decided by its own part alone would set it apart from the others.
        if scale is not None:
            gradients = [g if g is None else g / tf.cast(loss_scale, g.dtype) for g in gradients]
        squares = _unit_squares(plan, gradients) if options.unit_norms else tf.zeros([0])
        gradients, norm = _clip(gradients, shared, options.clip_norm)
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
            losses = losses.write(i, tf.cast(_local_sum(strategy, total), tf.float32))
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


def evaluation_step(strategy: tf.distribute.Strategy, model: keras.Model, loss: Loss) -> Any:
    """Builds the compiled evaluation pass.

    Returns:
        A function (iterator of this worker's (x, y, weight), number of steps, number of examples) -> float64 [5]: this
        worker's sums of the examples' losses, as in training; of what layers add to the loss, for each example; of
        weighted losses of elements; of weighted correct predictions (NaN if `y` is no class); and of weights. What the
        last batch has beyond the examples has weight 0.
    """

    def replica_sums(batch: Batch, step: tf.Tensor, examples: tf.Tensor) -> tf.Tensor:
        x, y, weight = batch = _own_part(strategy, batch)
        outputs = full_precision(_outputs(model, x, False))
        with calling("run.loss"):
            losses = tf.cast(loss(y, outputs), tf.float64)
        weights = tf.cast(element_weights(weight, losses), tf.float64)
        right = tf.fill(tf.shape(losses), tf.constant(float("nan"), tf.float64))
        if (ids := class_ids(y, outputs)) is not None:
            right = tf.cast(tf.argmax(outputs, axis=-1, output_type=tf.int64) == tf.cast(ids, tf.int64), tf.float64)
        context: Any = tf.distribute.get_replica_context()
        first = (step * strategy.num_replicas_in_sync + context.replica_id_in_sync_group) * y.shape[0]
        real = tf.cast(tf.clip_by_value(examples - first, 0, y.shape[0]), tf.float64)
        sums = [example_losses(losses, weight), losses * weights, right * weights, weights]
        total, elements, correct, weight = (tf.reduce_sum(each) for each in sums)
        return tf.stack([total, _added(model, tf.float64) * real, elements, correct, weight])

    @tf.function(autograph=False)
    def evaluate(iterator: Any, steps: tf.Tensor, examples: tf.Tensor) -> tf.Tensor:
        def one_step(i: tf.Tensor, sums: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return i + 1, sums + _local_sum(strategy, strategy.run(replica_sums, args=(next(iterator), i, examples)))

        start = [tf.constant(0), tf.zeros([5], tf.float64)]
        return tf.while_loop(lambda i, _: i < steps, one_step, start, parallel_iterations=1)[1]

    return evaluate


def _outputs(model: keras.Model, x: tf.Tensor, training: bool) -> tf.Tensor:
    with calling("run.model"):
        return model(x, training=training)


def _example_losses(loss: Loss, batch: Batch, outputs: tf.Tensor) -> tf.Tensor:
    with calling("run.loss"):
        losses = loss(batch[1], full_precision(outputs))
    return example_losses(losses, batch[2] if len(batch) == 3 else None)


def _added(model: keras.Model, dtype: tf.DType) -> tf.Tensor:
    """What layers add to the loss of the batch that the model was called on last: regularisers, `add_loss`."""
    return tf.add_n([tf.cast(each, dtype) for each in model.losses] or [tf.zeros([], dtype)])


def _clip(
    gradients: Sequence[Any], shared: Sequence[bool], clip_norm: float | None
) -> tuple[list[tf.Tensor | None], tf.Tensor]:
    """Clips what replicas share by its norm, the same everywhere, and the rest by its; returns the whole norm, too."""
    clipped: list[Any] = list(gradients)
    norms = []
    for kind in sorted(set(shared)):
        # Variables may have dtypes of their own, as LoRA's factors do under float64.
        places: dict[tf.DType, list[int]] = {}
        for i, gradient in enumerate(gradients):
            if gradient is not None and shared[i] == kind:
                places.setdefault(gradient.dtype, []).append(i)
        norm = _joint([tf.linalg.global_norm([gradients[i] for i in own]) for own in places.values()])
        norms.append(norm)
        for dtype, own in places.items() if clip_norm is not None else ():
            part = [gradients[i] for i in own]
            part, _ = tf.clip_by_global_norm(part, clip_norm, use_norm=tf.cast(norm, dtype))
            for i, gradient in zip(own, part, strict=True):
                clipped[i] = gradient
    return clipped, _joint(norms)


def _joint(norms: Sequence[tf.Tensor]) -> tf.Tensor:
    """The norm of parts from the norms of each, in the widest of their dtypes."""
    if len(norms) < 2:
        return norms[0] if norms else tf.zeros([])
    widest = max((norm.dtype for norm in norms), key=lambda dtype: dtype.size)
    return tf.sqrt(tf.add_n([tf.cast(norm, widest) ** 2 for norm in norms]))


def _unit_squares(plan: Plan, gradients: Sequence[Any]) -> tf.Tensor:
    """The squared norm of the gradients of each of the plan's units, float32."""
    squares = {unit: [tf.zeros([])] for unit in plan.units}
    for entry, gradient in zip(plan.trained, gradients, strict=True):
        if gradient is not None:
            squares[entry.unit].append(tf.reduce_sum(tf.cast(gradient, tf.float32) ** 2))
    return tf.stack([tf.add_n(parts) for parts in squares.values()])


def probe(
    strategy: tf.distribute.Strategy,
    model: keras.Model,
    loss: Loss,
    plan: Plan,
    parts: int,
) -> Any:
    """Builds the function that differentiates every unit of a plan and trains nothing.

    Each replica takes the first of the `parts` micro-batches of its batch, and no gradient travels: that alone would
    cost more than a budget saves.

    Returns:
        A function (iterator of this worker's batches) -> float32 [units]: the sum over this worker's replicas of the
        squared norms of each unit's gradient, each of the mean loss of its own examples.
    """
    values = [entry.variable.value for entry in plan.trained]

    def replica_squares(batch: Batch) -> tf.Tensor:
        batch = tuple(tensor[: tensor.shape[0] // parts] for tensor in _own_part(strategy, batch))
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            # In inference mode: dropout draws nothing and BatchNorm's statistics stay as they are.
            losses = _example_losses(loss, batch, _outputs(model, batch[0], False))
            total = tf.reduce_mean(losses) + _added(model, losses.dtype)
        gradients = tape.gradient(total, values)
        return _unit_squares(
            plan, [_selected_rows(g, e.rule.rows) for g, e in zip(gradients, plan.trained, strict=True)]
        )

    @tf.function(autograph=False)
    def squares(iterator: Any) -> tf.Tensor:
        return _local_sum(strategy, strategy.run(replica_squares, args=(next(iterator),)))

    return squares


def _own_part(strategy: tf.distribute.Strategy, batch: Batch) -> Batch:
    """The slice of this replica of its worker's batch; called in a replica context."""
    context: Any = tf.distribute.get_replica_context()
    local = per_replica.local_count(strategy)
    index = context.replica_id_in_sync_group % local
    with tf.device("CPU"):  # so that a GPU is sent its slice and no more
        return tuple(tf.reshape(t, [local, t.shape[0] // local, *t.shape[1:]])[index] for t in batch)


def _local_sum(strategy: tf.distribute.Strategy, value: Any) -> tf.Tensor:
    return tf.add_n(strategy.experimental_local_results(value))


def _selected_rows(gradient: Any, rows: tuple[int, int] | None) -> Any:
    if gradient is None:
        return None
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient if rows is None else gradient[rows[0] : rows[1]]
    # An embedding's gradient holds a row a lookup, the same row many times: summed here, what travels has a size
    # that does not depend on the batch. Indices outside [0, rows) are dropped.
    start, stop = rows or (0, tf.cast(gradient.dense_shape[0], gradient.indices.dtype))  # of int64 ids, int64
    inside = (gradient.indices >= start) & (gradient.indices < stop)
    indices = tf.where(inside, gradient.indices - start, -1)
    return tf.math.unsorted_segment_sum(gradient.values, indices, stop - start)


def _accumulate(
    compute: Callable[[Batch, tf.Tensor], tuple[tf.Tensor, list[Any]]], batch: Batch, loss_scale: tf.Tensor, parts: int
) -> tuple[tf.Tensor, list[Any]]:
    """Sums loss and gradients over `parts` micro-batches of a replica's batch."""
    if parts == 1:
        return compute(batch, loss_scale)
    pieces = list(zip(*[tf.split(tensor, parts) for tensor in batch], strict=True))
    total, gradients = compute(pieces[0], loss_scale)
    for piece in pieces[1:]:
        # The control dependency keeps the executor from running all micro-batches at once, which would hold all of
        # their activations. A tf.while_loop would do the same, but a model that reduces in its forward pass
        # (synchronised BatchNorm) cannot leave the replica context from inside one.
        with tf.control_dependencies([total, *[g for g in gradients if g is not None]]):
            piece = tuple(tf.identity(tensor) for tensor in piece)
            part, more = compute(piece, loss_scale)
            total += part
            gradients = [g if g is None else g + m for g, m in zip(gradients, more, strict=True)]
    return total, gradients
