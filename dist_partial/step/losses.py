"""Losses of a batch that is divided among replicas and micro-batches: Keras's own, with the divisors of the whole.

A loss is a sum over elements by a divisor. Where Keras divides by a number that the shapes give, the mean of the
parts' losses is the loss of the whole. Where it divides by what a mask, `ignore_class` or weights leave, the divisor is
counted over all parts first.
"""

import contextlib
import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial import compat
from dist_partial.errors import UserError
from dist_partial.models.output_logits import activation_op, adds_up, logits_behind
from dist_partial.step.keras_configs import remade
from dist_partial.step.keras_names import names_in
from dist_partial.validation import nearest

_LARGEST = 2**22  # elements of a target and its output, up to which a loss is tried out


@dataclasses.dataclass(eq=False)
class Part:
    """Describes the part of a batch whose loss is computed.

    Attributes:
        share: its share of the examples of the whole batch.
        counts: what the losses divide by over the whole batch, in the order in which they are called, of those whose
            divisor depends on the data; None divides each by the part's own.
        found: the part's own, noted as the losses are called.
    """

    share: Any = 1.0
    counts: Iterator[tf.Tensor] | None = None
    found: list[tf.Tensor] = dataclasses.field(default_factory=list)


_current = threading.local()  # each replica is traced in a thread of its own


@contextlib.contextmanager
def computing(part: Part) -> Iterator[Part]:
    """Has the losses that are called within it compute what they are of one part; as on one device otherwise."""
    before = getattr(_current, "part", None)
    _current.part = part
    try:
        with compat.as_one_device():
            yield part
    finally:
        _current.part = before


@contextlib.contextmanager
def looking(look: Callable[[Any, Any, Any], None]) -> Iterator[None]:
    """Has losses that are called within it first show what they take: to `look(loss, targets, outputs)`."""
    _current.look = look
    try:
        yield
    finally:
        _current.look = None


class DividedLoss(keras.losses.Loss):
    """Computes a Keras loss of one part of a batch so that the parts' values, weighted by share, add up to the whole's.

    A loss of logits is given those behind the model's probabilities. Keras looks for a softmax or sigmoid, too, but a
    Cast (mixed precision) or a Reshape hides it from Keras, which then takes the softmax of a softmax.

    Attributes:
        inner: the loss.
        probabilities: what outputs were found to be where the loss takes logits: 'softmax', 'sigmoid' or ''.
        seen: the targets and outputs of the last call.

    Examples:
        >>> loss = DividedLoss(keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0))
        >>> y, outputs = tf.constant([0, 0, 0, 1, 1, 1]), tf.random.stateless_normal([6, 3], [0, 0])
        >>> whole = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)(y, outputs)
        >>> counts = [tf.constant(3.0)]
        >>> with computing(Part(4 / 6, iter(counts))):
        ...     first = loss(y[:4], outputs[:4])
        >>> with computing(Part(2 / 6, iter(counts))):
        ...     second = loss(y[4:], outputs[4:])
        >>> bool(abs(first * 4 / 6 + second * 2 / 6 - whole) < 1e-6)
        True
    """

    def __init__(self, inner: keras.losses.Loss) -> None:
        super().__init__(inner.name, inner.reduction, inner.dtype)
        self.inner = inner
        self.probabilities = ""
        self.seen: tuple[Any, Any] | None = None

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        part = getattr(_current, "part", None)
        y_pred = self._logits(y_pred)
        self.seen = y_true, y_pred
        if (look := getattr(_current, "look", None)) is not None:
            look(self.inner, y_true, y_pred)
        if part is None:
            return self.inner(y_true, y_pred, sample_weight)
        summed = self.reduction in ("sum", "none", None)  # `fit` trains on the sum of the last two as well
        if type(self.inner).__call__ is not keras.losses.Loss.__call__:  # it reduces by itself
            value = self.inner(y_true, y_pred, sample_weight)
            return keras.ops.sum(value) / part.share if summed else value
        values = self._values(y_true, y_pred)
        if summed:
            return keras.ops.sum(_Given(values, self)(y_true, y_pred, sample_weight)) / part.share
        return self._mean(values, y_true, y_pred, sample_weight, part)

    def _mean(self, values: Any, y_true: Any, y_pred: Any, sample_weight: Any, part: Part) -> Any:
        """The mean of losses; where the data decides on its divisor, with that of all parts."""
        mask = compat.mask(values)
        masked = mask is not None or compat.mask(y_pred) is not None
        if sample_weight is None and not masked and values.shape.rank and (size := values.shape.num_elements()):
            return tf.reduce_sum(values) / size  # as Keras's, in fewer operations
        value = _Given(values, self)(y_true, y_pred, sample_weight)
        if sample_weight is not None and not values.shape.rank and part.share != 1.0:
            raise UserError(
                "run.loss gives one number for a batch, and run.data gives weights, which its parts cannot share out: "
                "have it give one loss an example, or train it on one replica without run.accumulate"
            )
        weight = sample_weight if self.reduction == "mean_with_sample_weight" else None
        if not masked and weight is None:
            return value  # divided by what the shapes give
        ones = keras.ops.ones_like(values)
        if mask is not None:
            compat.set_mask(ones, mask)
        # Keras's own sum of ones brings mask and weights to one shape as its sum of losses does.
        count = _Given(ones, self, "sum")(y_true, y_pred, weight)
        part.found.append(count)
        if part.counts is None:
            return value
        return tf.math.divide_no_nan(value * count, next(part.counts) * part.share)

    def _logits(self, y_pred: Any) -> Any:
        if not getattr(self.inner, "from_logits", False) or not tf.is_tensor(y_pred):
            return y_pred
        if isinstance(self.inner, (keras.losses.BinaryCrossentropy, keras.losses.BinaryFocalCrossentropy)):
            kind, found = "Sigmoid", activation_op(y_pred, "Sigmoid") is not None
        else:
            kind = "Softmax"
            found = activation_op(y_pred, kind) is not None or self.probabilities == "softmax"
            if tf.executing_eagerly() and y_pred.dtype.is_floating:  # by value
                found = found or bool(adds_up(y_pred))
        if not found:
            return y_pred
        self.probabilities = kind.lower()
        logits = logits_behind(y_pred, kind)
        if (mask := compat.mask(y_pred)) is not None:
            compat.set_mask(logits, mask)
        return logits

    def elements(self, y_true: Any, y_pred: Any) -> Any:
        """Computes the losses that `__call__` reduces."""
        return self._values(y_true, self._logits(y_pred))

    def _values(self, y_true: Any, y_pred: Any) -> Any:
        y_true, y_pred = keras.tree.map_structure(
            lambda each: keras.ops.convert_to_tensor(each, dtype=self.dtype), (y_true, y_pred)
        )
        return self.inner.call(y_true, y_pred)

    def get_config(self) -> dict[str, Any]:
        raise NotImplementedError("it is made for one run")


class _Given(keras.losses.Loss):
    """Reduces values that are computed already, with masks and weights, as Keras does."""

    def __init__(self, values: Any, loss: keras.losses.Loss, reduction: str | None = None) -> None:
        super().__init__(loss.name, reduction or loss.reduction, loss.dtype)
        self._values = values

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self._values


def made(loss: Any) -> Any:
    """Makes what `run.loss` describes: a `DividedLoss`, None, or a dict or list of such, by output.

    Args:
        loss: a factory of it, the name of a loss of Keras's, a Keras loss, a function (y, outputs) -> losses, or None.

    Raises:
        UserError: it is something else.

    Examples:
        >>> losses = made({"label": keras.losses.BinaryCrossentropy, "box": "mse", "mask": None})
        >>> losses["label"].name, losses["box"].name, losses["mask"]
        ('binary_crossentropy', 'mse', None)
    """
    if loss is None:
        return None
    if isinstance(loss, dict):
        return {name: made(each) for name, each in loss.items()}
    if isinstance(loss, (list, tuple)):
        return [made(each) for each in loss]
    name = None
    if isinstance(loss, str):
        name = loss
        try:
            loss = keras.losses.get(loss)
        except ValueError as error:
            near = nearest(loss, names_in(keras.losses))
            raise UserError(
                f"run.loss: Keras has no loss {loss!r}{near}; write a name such as 'mse', or a class"
            ) from error
    elif callable(loss) and not isinstance(loss, keras.losses.Loss) and not takes_targets(loss):
        loss = loss()
        if isinstance(loss, (dict, list, tuple, str)):
            return made(loss)
    if not callable(loss):
        raise UserError(f"run.loss made a {type(loss).__name__}: its factory must return a Keras loss or a function")
    if not isinstance(loss, keras.losses.Loss):
        loss = compat.loss_function(loss, name)
    elif loss.dtype != keras.config.floatx():  # made before the run's precision was known
        with contextlib.suppress(TypeError):  # a class of the user's need not be made of its config
            loss = remade(loss)
    return DividedLoss(loss)


def takes_targets(function: Callable[..., Any]) -> bool:
    """Tells a function of targets and outputs from a factory: by the arguments that it needs.

    Examples:
        >>> takes_targets(keras.losses.mean_squared_error), takes_targets(keras.losses.MeanSquaredError)
        (True, False)
    """
    if inspect.isclass(function):
        return False
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len([p for p in parameters if p.kind in kinds and p.default is p.empty]) >= 2


def is_coupled(loss: DividedLoss, y: np.ndarray) -> bool:
    """Tells whether the loss of an example depends on the others of its batch: Keras's Circle, contrastive losses.

    Tried on random outputs: the loss of a batch is then something else than the mean of those of its parts.

    Args:
        loss: which has been called on some of the model's outputs.
        y: some targets, [n, ...].

    Examples:
        >>> loss = DividedLoss(keras.losses.CosineSimilarity(axis=0))
        >>> y = tf.constant([[1.0], [2.0]])
        >>> _ = loss(y, y)
        >>> is_coupled(loss, y.numpy())
        True
    """
    assert loss.seen is not None
    outputs = loss.seen[1]
    if not tf.is_tensor(outputs) or np.prod(outputs.shape[1:]) * 4 > _LARGEST:
        return False
    rng = np.random.default_rng(0)
    count = 12 if np.prod(outputs.shape[1:]) < 2**16 else 4
    half = count // 2
    some = tf.constant(y[rng.integers(0, len(y), count)])
    shape = (count, *outputs.shape[1:])
    # As probabilities are, and as embeddings are; examples differ as wholes, for elements of large ones average out.
    level = rng.uniform(0.05, 0.95, [count, *[1] * (len(shape) - 1)])
    for values in ((level + rng.uniform(0.05, 0.95, shape)) / 2, level * rng.normal(scale=0.1, size=shape)):
        predicted = tf.cast(tf.constant(values), outputs.dtype)
        try:
            whole = loss_of(loss, [(some, predicted)])
            apart = loss_of(loss, [(some[:half], predicted[:half]), (some[half:], predicted[half:])])
        except (ValueError, TypeError, UserError, tf.errors.OpError):  # it takes no such values, or not so many
            return False
        if not np.allclose(whole, apart, rtol=1e-3, equal_nan=True):
            return True
    return False


def loss_of(loss: Callable[..., Any], parts: Sequence[tuple[Any, Any]]) -> float:
    """Computes a `DividedLoss` of a batch from its equal parts, pairs of targets and outputs.

    Examples:
        >>> y, outputs = tf.constant([[0.0], [1.0]]), tf.constant([[1.0], [3.0]])
        >>> loss_of(DividedLoss(keras.losses.MeanSquaredError()), [(y[:1], outputs[:1]), (y[1:], outputs[1:])])
        2.5
    """
    found = []
    for y, outputs in parts:
        with computing(Part()) as part:
            loss(y, outputs)
        found.append(part.found)
    counts = [tf.add_n(each) for each in zip(*found, strict=True)]
    total = 0.0
    for y, outputs in parts:
        with computing(Part(1 / len(parts), iter(counts))):
            total += float(loss(y, outputs)) / len(parts)
    return total
