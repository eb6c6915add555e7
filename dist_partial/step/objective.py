"""What a model is trained on and measured by: its `compute_loss` and its metrics, as Keras compiles them.

Both are computed without changing a variable of a metric: what a batch adds to the metrics' variables is a tensor,
which is summed over parts, replicas and workers like a loss.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial import compat
from dist_partial.errors import Raised, UserError, calling
from dist_partial.step import losses
from dist_partial.step.metrics import as_in_new_process

# (x,), (x, y) or (x, y, weight), each a nest of tensors with the batch axis first.
Batch = tuple[Any, ...]
# Numbers of a metric's variables up to which it is computed in every step, too.
_CHEAP = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Measure:
    """Holds a metric with the values that its variables have before the first batch.

    Attributes:
        name: of its result.
        metric: a Keras metric.
        initial: the values of its variables, in their order.
        training: whether it is computed in training, too.
        by_loss: whether the model's `compute_loss` updates it, and `compute_metrics` does not.
        of_batch: whether a batch adds one number to it, to which a part adds its share.
        coupled: whether what parts of a batch add is neither: it is computed of the whole batch.
    """

    name: str
    metric: keras.metrics.Metric
    initial: tuple[np.ndarray, ...]
    training: bool
    by_loss: bool = False
    of_batch: bool = False
    coupled: bool = False

    @property
    def size(self) -> int:
        """Numbers in its variables."""
        return sum(math.prod(value.shape) for value in self.initial)


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """Computes the loss and the metrics of a compiled model on one part of a batch.

    Attributes:
        model: compiled.
        counts: how many of its losses divide by a number that the data decides on, see `losses.Part`.
        measures: its metrics.
        coupled: whether its loss of an example depends on the others of the batch: it is computed of the whole batch.
    """

    model: keras.Model
    counts: int = 0
    measures: Sequence[Measure] = ()
    coupled: bool = False

    def chosen(self, training: bool) -> list[Measure]:
        """The metrics that are computed: in training the cheap ones."""
        return [each for each in self.measures if each.training or not training]

    def needs_whole(self, training: bool) -> bool:
        """Whether the loss, or a metric that is computed, needs the whole batch."""
        return self.coupled or any(each.coupled for each in self.chosen(training))

    def size(self, training: bool) -> int:
        """Numbers that `values` gives of the metrics."""
        return sum(each.size for each in self.chosen(training))

    def counted(self, batch: Batch, outputs_of: Callable[[Any], Any], training: bool) -> tf.Tensor:
        """Counts what one part of a batch adds to the divisors: [counts].

        It is a pass of its own through the model, before that of the loss. It depends on the data and its masks:
        TensorFlow leaves out all else of it.

        Args:
            batch: the part.
            outputs_of: x -> the model's outputs.
            training: the mode, for the model's `compute_loss`.
        """
        with keras.StatelessScope():  # no layer counts this pass, and none adds to the loss
            outputs = outputs_of(batch[0])
        with _scope(self.model), losses.computing(losses.Part()) as part:
            self._loss(batch, outputs, training)
        return tf.stack([tf.reshape(count, []) for count in part.found])

    def loss(
        self, batch: Batch, outputs: Any, training: bool, share: Any = 1.0, counts: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, Mapping[Any, Any]]:
        """Computes the loss of one part of a batch.

        Args:
            batch: the part.
            outputs: the model's.
            training: the mode, for the model's `compute_loss`.
            share: the part's share of the whole batch; the sum over the parts of share times loss is the loss.
            counts: [counts], summed over the parts; None divides by the part's own.

        Returns:
            A scalar, and what it has changed, for `added` and `assign`.
        """
        separate = None if counts is None else iter(tf.unstack(counts))
        with _scope(self.model, self._start()) as scope, losses.computing(losses.Part(share, separate)):
            return self._loss(batch, outputs, training), scope.state_mapping

    def assign(self, changed: Mapping[Any, Any]) -> None:
        """Gives the model's variables what `loss` has changed them to: a `compute_loss` may draw random numbers."""
        for variable in self.model.variables:
            if id(variable) in changed:
                variable.assign(changed[id(variable)])

    def added(
        self,
        batch: Batch,
        outputs: Any,
        training: bool,
        changed: Mapping[Any, Any],
        share: float,
        whole: tuple[Batch, Any] | None = None,
    ) -> tf.Tensor:
        """Computes what a part adds to the variables of the metrics: float64 [size(training)].

        Args:
            batch: the part.
            outputs: the model's.
            training: the mode.
            changed: from `loss`.
            share: the part's share of the whole batch.
            whole: the whole batch and its outputs, if `needs_whole`, of which every part then adds its share.
        """
        chosen = self.chosen(training)
        if not chosen:
            return tf.zeros([0], tf.float64)
        start = [(variable, changed.get(id(variable), value)) for variable, value in self._start()]
        scope = self._measured(*(whole or (batch, outputs)), start)
        parts = []
        for each in chosen:
            # A loss of the whole batch updates its metrics by the whole, too.
            shared = each.of_batch or (whole is not None and (self.coupled or not each.by_loss))
            for variable, initial in zip(each.metric.variables, each.initial, strict=True):
                new = tf.cast(scope.get_current_value(variable), tf.float64)
                new = (new - tf.constant(initial, tf.float64)) * (share if shared else 1.0)
                parts.append(tf.reshape(new, [-1]))
        return tf.concat(parts, axis=0)

    def results(self, sums: np.ndarray, training: bool) -> dict[str, float]:
        """Computes the metrics.

        Args:
            sums: [size(training)], `added` up over whatever is measured.
            training: as for `added`.

        Returns:
            The results by name; those of several numbers by name and place, `f1_score_0`.
        """
        found: dict[str, float] = {}
        place = 0
        for each in self.chosen(training):
            values = []
            for variable, initial in zip(each.metric.variables, each.initial, strict=True):
                size = math.prod(initial.shape)
                value = initial + sums[place : place + size].reshape(initial.shape)
                values.append((variable, tf.constant(value, variable.dtype)))
                place += size
            with keras.StatelessScope(values), calling("run.metrics"):
                found |= _named(each.name, each.metric.result())
        return found

    def grows(self, name: str) -> bool:
        """Tells whether more is better of a number of an evaluation."""
        found = [each.metric for each in self.measures if name == each.name or name.startswith(f"{each.name}_")]
        return bool(found) and compat.grows(found[0])

    def _start(self) -> list[tuple[Any, tf.Tensor]]:
        return [
            (variable, tf.constant(value, variable.dtype))
            for each in self.measures
            for variable, value in zip(each.metric.variables, each.initial, strict=True)
        ]

    def _measured(self, batch: Batch, outputs: Any, start: Sequence[tuple[Any, Any]]) -> keras.StatelessScope:
        """Updates the metrics by a batch, from these values of their variables on, in the scope that it returns."""
        x, y, weight = unpacked(batch)
        with keras.StatelessScope(start) as scope, compat.as_one_device(), calling("run.metrics"):
            self.model.compute_metrics(x, y, outputs, weight)
        return scope

    def _loss(self, batch: Batch, outputs: Any, training: bool) -> tf.Tensor:
        x, y, weight = unpacked(batch)
        with calling("run.loss"):
            return compat.compute_loss(self.model, x, y, outputs, weight, training)


@contextlib.contextmanager
def _scope(model: keras.Model, start: Sequence[tuple[Any, Any]] = ()) -> Iterator[keras.StatelessScope]:
    """Opens a scope in which no variable changes, with the losses that layers have added before."""
    with compat.fixed_losses(model), keras.StatelessScope(start) as scope:
        yield scope


def unpacked(batch: Batch) -> tuple[Any, Any, Any]:
    """Gives x, y and weight of a batch, None for what it lacks.

    Examples:
        >>> unpacked((1, 2))
        (1, 2, None)
    """
    x, y, weight = (*batch, None, None)[:3]
    return x, y, weight


def prepare(
    model: keras.Model, batch: Batch, outputs: Any, compiled: Mapping[str, Any], quiet: Collection[str] = ()
) -> Objective:
    """Compiles a model and tries its loss and metrics on some examples; changes nothing else.

    Called in the strategy's scope, eagerly.

    Args:
        model: built.
        batch: some examples.
        outputs: the model's for them.
        compiled: what `Model.compile` takes: loss (of `losses.made`), loss_weights, metrics, weighted_metrics.
        quiet: names of metrics that are computed in evaluation only, as are those that are not cheap.

    Raises:
        UserError: a metric cannot be summed over parts of the data.
        Raised: Keras or the user's code raised an exception.
    """
    # The class's own `compile` may take and do something else.
    keras.Model.compile(model, optimizer=None, **compiled)
    compat.forget_compilation(model)
    x, y, weight = unpacked(batch)
    # The variables of metrics are made here.
    with _scope(model) as scope, losses.computing(losses.Part()) as part:
        with calling("run.loss"), compat.noting_single_values() as single:
            compat.compute_loss(model, x, y, outputs, weight, False)
        by_loss = dict(scope.state_mapping)
        with calling("run.metrics"):
            results = model.compute_metrics(x, y, outputs, weight)
            metrics = compat.compiled_metrics(model)
            _check_own(model, results, {name: metric.result() for name, metric in metrics})
    measures = []
    for _, metric in metrics:
        metric.reset_state()  # it may have counted before
    local = tf.distribute.get_strategy().experimental_local_results
    for name, metric in as_in_new_process(metrics):
        # Of this worker's first replica: a sum over all is what else a variable of a metric gives.
        initial = tuple(local(variable.value)[0].numpy() for variable in metric.variables)
        cheap = sum(value.size for value in initial) <= _CHEAP
        updated = any(id(variable) in by_loss for variable in metric.variables)
        measures.append(
            Measure(name, metric, initial, cheap and name not in quiet, updated, updated and id(metric) in single)
        )
    objective = Objective(model, len(part.found), measures)
    _check_sums(objective, batch, outputs)
    return dataclasses.replace(objective, measures=_tried_on_parts(objective, batch, outputs))


def _check_own(model: keras.Model, results: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises UserError if a `compute_metrics` of the model's own gives something else than its metrics."""
    if not compat.overrides(model, "compute_metrics"):
        return
    for name, value in results.items():
        if name != "loss" and (name not in ours or not np.allclose(_numbers(value), _numbers(ours[name]))):
            raise UserError(
                f"run.model has a compute_metrics of its own ({type(model).__name__}) that gives {name!r}, and a run "
                "adds up what metrics keep over replicas: make it a keras.metrics.Metric for run.metrics, or train the "
                "model by model.fit with dist_partial.partial"
            )


def _numbers(result: Any) -> list[Any]:
    return [keras.ops.convert_to_numpy(each) for each in keras.tree.flatten(result)]


def _tried_on_parts(objective: Objective, batch: Batch, outputs: Any) -> list[Measure]:
    """The metrics with what parts of a batch add to them, tried on random outputs."""
    rng, count, cut = np.random.default_rng(0), 12, 5
    flat = tf.nest.flatten(outputs)
    if any(each.shape.rank == 0 or each.shape[0] != flat[0].shape[0] for each in flat):
        return list(objective.measures)
    rows = np.resize(np.arange(flat[0].shape[0]), count)
    examples = tf.nest.map_structure(lambda each: tf.gather(each, rows), batch)
    added, of_batch = ({each.name: True for each in objective.measures} for _ in range(2))
    # As probabilities are, and as other outputs are.
    for draw in (lambda shape: rng.uniform(0.05, 0.95, shape), lambda shape: rng.normal(size=shape)):
        made = [
            tf.constant(draw([count, *each.shape[1:]]), each.dtype) if each.dtype.is_floating else tf.gather(each, rows)
            for each in flat
        ]
        every = (*examples, tf.nest.pack_sequence_as(outputs, made))
        parts = [
            tf.nest.map_structure(lambda each, part=part: each[part], every) for part in (slice(cut), slice(cut, None))
        ]
        try:
            whole, one, other = (_adds(objective, each[:-1], each[-1]) for each in (every, *parts))
        except (ValueError, TypeError, UserError, Raised, tf.errors.OpError):  # it takes no such values, or so many
            continue
        for name, value in whole.items():
            weighed = (cut * one[name] + (count - cut) * other[name]) / count
            for found, total in ((added, one[name] + other[name]), (of_batch, weighed)):
                found[name] &= np.allclose(value, total, rtol=1e-4, atol=1e-6, equal_nan=True)
    return [
        each
        if each.by_loss or added[each.name]
        else dataclasses.replace(each, of_batch=of_batch[each.name], coupled=not of_batch[each.name])
        for each in objective.measures
    ]


def _adds(objective: Objective, batch: Batch, outputs: Any) -> dict[str, np.ndarray]:
    """What a batch adds to the variables of each metric, flat."""
    scope = objective._measured(batch, outputs, objective._start())
    return {
        each.name: np.concatenate(
            [
                np.ravel(np.asarray(keras.ops.convert_to_numpy(scope.get_current_value(variable)), float) - initial)
                for variable, initial in zip(each.metric.variables, each.initial, strict=True)
            ]
            or [np.zeros(0)]
        )
        for each in objective.measures
    }


def _check_sums(objective: Objective, batch: Batch, outputs: Any) -> None:
    """Raises UserError unless a metric of two batches follows from what each of them adds."""
    start = objective._start()
    once = objective._measured(batch, outputs, start)
    twice = objective._measured(batch, outputs, [(v, once.get_current_value(v)) for v, _ in start])
    for each in objective.measures:
        for variable, initial in zip(each.metric.variables, each.initial, strict=True):
            first, second = (keras.ops.convert_to_numpy(scope.get_current_value(variable)) for scope in (once, twice))
            if not np.allclose(second - first, first - initial, rtol=1e-3, atol=1e-6, equal_nan=True):
                raise UserError(
                    f"run.metrics: {each.name!r} keeps numbers that are no sums over batches, so that replicas cannot "
                    "add them up: make it a keras.metrics.Metric whose variables only grow by what a batch adds"
                )


def _named(name: str, result: Any) -> dict[str, float]:
    if isinstance(result, Mapping):
        return {key: value for own, each in result.items() for key, value in _named(own, each).items()}
    values = keras.ops.convert_to_numpy(result)
    if values.ndim == 0:
        return {name: float(values)}
    return {f"{name}_{i}": float(value) for i, value in enumerate(values.ravel())}
