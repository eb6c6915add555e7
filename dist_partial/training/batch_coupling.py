"""Whether what a model makes of an example depends on the others of its batch, of which each replica sees a part."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial import compat
from dist_partial.data import Source, fetch, looks
from dist_partial.step import batch_norm
from dist_partial.step.gradients import model_outputs
from dist_partial.step.objective import Batch, Objective
from dist_partial.training.activation_cache import largest_distance, rounding

_TRIED, _LARGE = 8, 10**7  # examples; parameters from which on two examples have to do


def own_loss_is_coupled(objective: Objective, source: Source) -> bool:
    """Tells whether the model's `compute_loss` of a batch is something else than the mean of that of its parts.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> class Sum(keras.Model):
        ...     def call(self, x):
        ...         return x
        ...     def compute_loss(self, x, y, y_pred, *others, **options):
        ...         return keras.ops.sum(y_pred)
        >>> own_loss_is_coupled(Objective(Sum()), ArraySource(np.arange(8.0)[:, None]))
        True
    """
    if not compat.overrides(objective.model, "compute_loss"):
        return False
    batch = _examples(objective.model, source)
    with _without_batch_norm(objective.model):
        return _loss_is_coupled(objective, batch)


def _examples(model: keras.Model, source: Source) -> Batch:
    count = _TRIED if sum(math.prod(variable.shape) for variable in model.variables) < _LARGE else 2
    found: Batch = tf.nest.map_structure(tf.constant, fetch(source, np.resize(looks(source), count)))
    return found


def coupling_notes(objective: Objective, source: Source, replicas: int, micro_batches: int) -> list[str]:
    """Says so if the model, or what it adds to the loss, gives something else where a batch is divided.

    Of BatchNorm layers it says nothing: the documentation does.

    Args:
        objective: the model, built, and its loss.
        source: the examples.
        replicas: how many there are.
        micro_batches: into which each cuts its part of a batch.

    Returns:
        A line, or none.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> centre = keras.layers.Lambda(lambda x: x - keras.ops.mean(x, axis=0))
        >>> objective = Objective(keras.Sequential([keras.Input([1]), centre]))
        >>> [note] = coupling_notes(objective, ArraySource(np.arange(8.0)[:, None]), replicas=2, micro_batches=1)
        >>> note[:74]
        "run.model's outputs for an example depend on the others of its batch, and "
    """
    if replicas * micro_batches == 1:
        return []
    model = objective.model
    batch = _examples(model, source)
    with _without_batch_norm(model):
        outputs, scope = _called(model, batch[0], training=True)
        if _outputs_are_coupled(model, batch[0], outputs):
            found = "run.model's outputs for an example depend on the others of its batch"
        elif (
            not objective.coupled  # which is computed of the whole batch
            and scope.losses
            and _loss_is_coupled(objective, batch)
        ):
            found = "what layers add to the loss (add_loss) is not the mean of what they add for a batch's parts"
        else:
            return []
    parts = [f"{replicas} replicas"] if replicas > 1 else []
    parts += [f"{micro_batches} micro-batches (run.accumulate)"] if micro_batches > 1 else []
    return [
        f"{found}, and each of {' x '.join(parts)} has a part of its own: weights will not be those of one device; "
        "if that matters, train it on one replica without run.accumulate"
    ]


def _outputs_are_coupled(model: keras.Model, x: Any, outputs: Sequence[Any]) -> bool:
    """Whether the outputs for the last half of some examples change with the first half, in training mode.

    Their number stays, so that layers draw the same random numbers. The first half becomes copies of the last example,
    which fill the place that an expert has.
    """
    count = len(tf.nest.flatten(x)[0])
    kept = np.arange(count // 2, count)
    others = tf.nest.map_structure(lambda each: tf.gather(each, [*[count - 1] * (count // 2), *kept]), x)
    limit = rounding(model)

    def differ(found: Sequence[Any]) -> bool:
        pairs = [
            (one, other)
            for one, other in zip(outputs, found, strict=True)
            if isinstance(one, tf.Tensor) and one.shape[:1] == [count] and one.dtype != tf.string
        ]
        return any(
            one.shape != other.shape or largest_distance(one.numpy()[kept], other.numpy()[kept]) > limit
            for one, other in pairs
        )

    # What draws random numbers outside of the model's variables gives something else each time.
    return differ(_called(model, others, True)[0]) and not differ(_called(model, x, True)[0])


def _loss_is_coupled(objective: Objective, batch: Batch) -> bool:
    """Whether the loss differs from that of two halves, in inference mode; `run.loss` has been tried before."""
    model = objective.model
    _, scope = _called(model, batch[0], training=False)
    if any(compat.is_generator(v) and id(v) in scope.state_mapping for v in model.variables):
        return False  # it draws other numbers for a batch of another size
    half = len(tf.nest.flatten(batch)[0]) // 2
    halves = [tf.nest.map_structure(lambda each, cut=cut: each[cut], batch) for cut in (slice(half), slice(half, None))]
    whole, parts = (np.array([_loss(objective, batches)]) for batches in ([batch], halves))
    # A number is nearer to that of its parts than outputs are: of a root of a mean, by the square of their differences.
    limit = rounding(model)
    return largest_distance(whole, parts) > min(limit, 64 * limit**2)


def _called(model: keras.Model, x: Any, training: bool) -> tuple[list[Any], keras.StatelessScope]:
    """The outputs, and the scope with what layers would change and add to the loss."""
    with _scope(model) as scope:
        return tf.nest.flatten(model_outputs(model, x, training)), scope


def _loss(objective: Objective, parts: Sequence[Batch]) -> float:
    """The loss of a batch from its equal parts, as a step computes it."""
    model, share, total, counts = objective.model, 1 / len(parts), 0.0, None
    if objective.counts:
        found = []
        for part in parts:
            with _scope(model):
                found.append(objective.counted(part, lambda x: model_outputs(model, x, False), False))
        counts = tf.add_n(found)
    for part in parts:
        with _scope(model):
            outputs = model_outputs(model, part[0], False)
            total += share * float(objective.loss(part, outputs, False, share, counts)[0])
    return total


def _scope(model: keras.Model) -> keras.StatelessScope:
    # Keras 3.15 has regularisers read their variables from the scope.
    start = [(variable, variable.value) for variable in model.trainable_variables if variable.regularizer is not None]
    return keras.StatelessScope(start, collect_losses=True)


@contextlib.contextmanager
def _without_batch_norm(model: keras.Model) -> Iterator[None]:
    training = batch_norm.layers(model)
    for layer in training:
        batch_norm.set_mode(layer, training=False)
    try:
        yield
    finally:
        for layer in training:
            batch_norm.set_mode(layer, training=True)
