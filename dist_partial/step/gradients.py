"""What a training step, an evaluation step and a probe compute alike: outputs, losses, gradients of the selection."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_partial.distributed.per_replica import Topology
from dist_partial.errors import calling
from dist_partial.selection.plan import Plan
from dist_partial.step.objective import Batch


def model_outputs(model: keras.Model, x: Any, training: bool) -> Any:
    """Calls the model; an exception of its code names `run.model`.

    Examples:
        >>> def broken(x, training):
        ...     raise ValueError("no such id")
        >>> model_outputs(broken, tf.zeros([1]), training=True)
        Traceback (most recent call last):
        dist_partial.errors.Raised: run.model raised ValueError: no such id...
    """
    with calling("run.model"):
        return model(x, training=training)


def own_part(topology: Topology, batch: Batch) -> Batch:
    """Slices out this replica's part of its worker's batch; called in a replica context.

    Examples:
        >>> x, y = own_part(Topology(tf.distribute.get_strategy()), (tf.constant([[1.0], [2.0]]), tf.constant([1, 2])))
        >>> x.shape, y.numpy().tolist()  # of one replica the whole
        (TensorShape([2, 1]), [1, 2])
    """
    local, index = topology.local, topology.index
    if local == 1:
        return batch
    with tf.device("CPU"):  # so that a GPU is sent its slice and no more
        return tf.nest.map_structure(lambda t: tf.reshape(t, [local, t.shape[0] // local, *t.shape[1:]])[index], batch)


def local_sum(strategy: tf.distribute.Strategy, value: Any) -> tf.Tensor:
    """Adds up a value over this worker's replicas.

    Examples:
        >>> float(local_sum(tf.distribute.get_strategy(), tf.constant(2.0)))  # of one replica
        2.0
    """
    return tf.add_n(strategy.experimental_local_results(value))


def selected_rows(gradient: Any, rows: tuple[int, int] | None) -> Any:
    """Reduces a gradient to the selected rows, and sums repeated rows of an embedding.

    Examples:
        >>> values, ids = tf.constant([[1.0], [2.0], [5.0]]), tf.constant([3, 3, 0])
        >>> looked_up = tf.IndexedSlices(values, ids, tf.constant([4, 1]))
        >>> selected_rows(looked_up, None).numpy().tolist(), selected_rows(looked_up, (2, 4)).numpy().tolist()
        ([[5.0], [0.0], [0.0], [3.0]], [[0.0], [3.0]])
    """
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


def unit_squares(plan: Plan, gradients: Sequence[Any]) -> tf.Tensor:
    """Computes the squared norm of the gradients of each of the plan's units, float32.

    Examples:
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> plan = resolve([("train", ".*")], keras.Sequential([keras.Input([2]), keras.layers.Dense(1)]), AllReduce())
        >>> unit_squares(plan, [tf.constant([[3.0], [4.0]]), None]).numpy().tolist()
        [25.0]
    """
    squares = {unit: [tf.zeros([])] for unit in plan.units}
    for entry, gradient in zip(plan.trained, gradients, strict=True):
        if gradient is not None:
            squares[entry.unit].append(tf.reduce_sum(tf.cast(gradient, tf.float32) ** 2))
    return tf.stack([tf.add_n(parts) for parts in squares.values()])


def clip(
    gradients: Sequence[Any], shared: Sequence[Any], clip_norm: float | None
) -> tuple[list[tf.Tensor | None], tf.Tensor]:
    """Clips what is shared alike by its joint norm, the same wherever it is; returns the whole norm, too.

    Examples:
        >>> gradients, norm = clip([tf.constant([3.0, 4.0])], [True], 1.0)
        >>> float(norm), gradients[0].numpy().round(2).tolist()
        (5.0, [0.6..., 0.8...])
    """
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


def micro_batches(batch: Batch, parts: int) -> list[Batch]:
    """Cuts a replica's batch into `parts` equal parts, in order.

    Examples:
        >>> [x.numpy().tolist() for (x,) in micro_batches((tf.constant([1, 2, 3, 4]),), 2)]
        [[1, 2], [3, 4]]
    """
    if parts == 1:
        return [batch]
    flat = [tf.split(tensor, parts) for tensor in tf.nest.flatten(batch)]
    return [tf.nest.pack_sequence_as(batch, part) for part in zip(*flat, strict=True)]
