"""What layers themselves change in a training step: running statistics, counters, the states of random generators.

Keras leaves each replica with its own (`aggregation="none"`). Here every such variable follows one of these rules:

- one whose new value depends on the examples or on random numbers is averaged over the replicas, as the statistics of
  BatchNorm are;
- one whose new value depends on neither (a counter, the vectors of SpectralNormalization) is the same on all by itself;
- random generators draw other numbers on each replica, from seeds that follow from the first one's.

All of it is in the checkpoint and in what is exported. What the rules freeze no layer may change.
"""

import contextlib
import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial import compat
from dist_partial.compat import is_generator
from dist_partial.distributed import traffic
from dist_partial.distributed.per_replica import Topology
from dist_partial.errors import UserError
from dist_partial.selection.paths import paths_of
from dist_partial.selection.plan import Plan
from dist_partial.step import batch_norm
from dist_partial.step.objective import Batch, Objective

# Far apart for neighbouring replicas, and from what people choose as the seeds of neighbouring layers.
_SEED_STRIDE, _SEEDS = 0x9E3779B9, 2**31 - 1
_ASSIGNS = re.compile(r"Assign(Add|Sub)?VariableOp|Resource(Scatter|StridedSliceAssign|Apply)")


@dataclasses.dataclass(frozen=True, eq=False)
class LayerState:
    """Lists what a model's layers change in a training step.

    Attributes:
        moving: all of it that no optimizer updates: statistics, counters, states of generators.
        averaged: what replicas average after each step besides the statistics of BatchNorm layers, of which the mode
            of the layer decides.
        states: all that moves, and the random generators that no training step uses: what nothing else may move.

    Examples:
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dropout(0.5), keras.layers.Dense(1)])
        >>> model.compile(loss="mse")
        >>> example = tf.TensorSpec([2], tf.float32), tf.TensorSpec([1], tf.float32)
        >>> state = find(model, example, resolve([("train", ".*")], model, AllReduce()), Objective(model))
        >>> len(state.moving), [variable.name for variable in state.generators]
        (1, ['seed_generator_state'])
    """

    moving: tuple[Any, ...] = ()
    averaged: tuple[Any, ...] = ()
    states: tuple[Any, ...] = ()

    @property
    def generators(self) -> list[Any]:
        """States of the random generators that a step uses: int [2], a seed and a counter."""
        return [variable for variable in self.moving if is_generator(variable)]


def recurrent(model: keras.Model) -> list[Any]:
    """States of stateful recurrent layers, [examples, units]; Keras has them in no `variables` and saves none.

    Examples:
        >>> inputs = keras.Input(batch_shape=[8, 3, 2])
        >>> model = keras.Model(inputs, keras.layers.SimpleRNN(4, stateful=True)(inputs))
        >>> [tuple(state.shape) for state in recurrent(model)]
        [(8, 4)]
    """
    layers = [layer for layer in compat.layers(model) if isinstance(layer, keras.layers.RNN) and layer.stateful]
    return [state for layer in layers if layer.built for state in tf.nest.flatten(layer.states)]


def batch_size(model: keras.Model) -> int | None:
    """Finds the number of examples that a model takes at a time, if a stateful layer has fixed it.

    Examples:
        >>> inputs = keras.Input(batch_shape=[8, 3, 2])
        >>> batch_size(keras.Model(inputs, keras.layers.SimpleRNN(4, stateful=True)(inputs)))
        8
    """
    return next((state.shape[0] for state in recurrent(model)), None)


def find(model: keras.Model, example: Batch, plan: Plan, objective: Objective) -> LayerState:
    """Traces the model and its loss in training mode to see which variables it assigns; runs and changes nothing.

    Args:
        model: built, its BatchNorm layers in the modes of the run.
        example: the spec of one example.
        plan: all that is ever trained.
        objective: its loss.

    Returns:
        What its layers change.

    Raises:
        UserError: a layer changes what the rules freeze, what no checkpoint would hold, or an integer on which
            replicas could not agree.
    """
    graph, new = _traced(model, example, objective)
    inputs = {tensor.op for tensor in graph.inputs[: len(tf.nest.flatten(example[0]))]}
    _check_own(model, graph, new)
    entries = {id(entry.variable): entry for entry in plan.entries}
    shared = all(group.reduction.shared for group in plan.groups)
    of_batch_norm = {id(v) for layer in batch_norm.layers(model) for v in (layer.moving_mean, layer.moving_variance)}
    moving, averaged = [], []
    for variable in [*model.variables, *recurrent(model)]:
        if id(variable) not in new:
            continue
        entry = entries.get(id(variable))
        if entry is None:
            moving.append(variable)
        elif not entry.rule.train:
            raise UserError(
                f"{entry.path!r} is frozen ({entry.rule}), and its layer changes it in training: train it, or call "
                "the layer with training=False where the model is built"
            )
        if is_generator(variable) or id(variable) in of_batch_norm:
            continue
        seen, floats = _depends_on_data(new[id(variable)], inputs), tf.as_dtype(variable.dtype).is_floating
        if seen and not floats:
            raise UserError(
                f"{paths_of(model, [variable])[0]!r} is {variable.dtype} and a layer changes it by what each replica "
                "sees: replicas can average floats alone; give it a float dtype"
            )
        # What all replicas compute alike needs no bytes; between exchanges they compute with weights of their own.
        if seen or (floats and not shared):
            averaged.append(variable)
    unused = [v for v in model.variables if is_generator(v) and id(v) not in new]
    return LayerState(tuple(moving), tuple(averaged), (*moving, *unused))


def _traced(model: keras.Model, example: Batch, objective: Objective) -> tuple[Any, dict[int, tf.Tensor]]:
    """The graph of the model and its loss in training mode, and what it assigns by the identity of the variable."""
    new: dict[int, tf.Tensor] = {}

    def traced(*flat: tf.Tensor) -> None:
        batch = tf.nest.pack_sequence_as(example, flat)
        # Assignments are noted in it, and not made; Keras 3.15 has regularisers read their variables from it.
        start = [(v, v.value) for v in model.trainable_variables if v.regularizer is not None]
        with keras.StatelessScope(start, collect_losses=True) as scope:
            before = dict(scope.state_mapping)
            outputs = model(batch[0], training=True)
            _check_metrics(model, {key for key, value in scope.state_mapping.items() if value is not before.get(key)})
            new.clear()  # if TensorFlow traces twice
            new.update({key: value for key, value in scope.state_mapping.items() if value is not before.get(key)})
            new.update(objective.loss(batch, outputs, training=True)[1])

    count = batch_size(model) or 2
    specs = [tf.TensorSpec([count, *one.shape], one.dtype) for one in tf.nest.flatten(example)]
    return tf.function(traced, autograph=False).get_concrete_function(*specs).graph, new


def _check_metrics(model: keras.Model, changed: Collection[int]) -> None:
    """Raises UserError if a call of the model has updated one of its metrics."""
    for metric in model.metrics:
        if any(id(variable) in changed for variable in metric.variables):
            raise UserError(
                f"run.model updates its metric {metric.name!r} when it is called, and a run computes metrics of "
                "targets, outputs and weights: update it in the model's compute_loss, or bind run.metrics"
            )


def _check_own(model: keras.Model, graph: Any, new: Mapping[int, tf.Tensor]) -> None:
    """Raises UserError if the model changes variables that are not among its own: no checkpoint would hold them."""
    hint = "make it by self.add_weight(..., trainable=False), so that it is averaged, saved and exported"
    handles = {id(inner): outer for outer, inner in graph.captures}
    for operation in traffic.operations(graph):
        if _ASSIGNS.match(operation.type):
            handle = handles.get(id(operation.inputs[0]))
            names = [variable.name for variable in graph.variables if variable.handle is handle]
            raise UserError(f"run.model changes the tf.Variable {''.join(names[:1]) or operation.name!r}: {hint}")
    own = {id(variable) for variable in [*model.variables, *model.metrics_variables, *recurrent(model)]}
    if not set(new) <= own:
        raise UserError(
            "run.model or run.loss changes a variable that is none of the model's, such as Keras's global random "
            f"generator: give keras.random a keras.random.SeedGenerator that is an attribute of the layer; or {hint}"
        )


def _depends_on_data(value: tf.Tensor, inputs: Collection[Any]) -> bool:
    """Whether a tensor of a graph depends on the operations `inputs` or on random numbers."""
    seen: set[str] = set()
    waiting = [value.op]
    while waiting:
        operation = waiting.pop()
        if operation.name in seen:
            continue
        seen.add(operation.name)
        inner = [each for function in traffic.called(operation) for each in traffic.operations(function)]
        if operation in inputs or any("Random" in each.type for each in [operation, *inner]):
            return True
        waiting += [tensor.op for tensor in operation.inputs]
    return False


def spread(topology: Topology, generators: Sequence[Any]) -> None:
    """Gives each replica's generators seeds of their own, which follow from the first replica's.

    Call it in the cross-replica context when all replicas have the first one's state: at the start, or restored.

    Examples:
        >>> generator = keras.random.SeedGenerator(5)
        >>> spread(Topology(tf.distribute.get_strategy()), [generator.state])  # the first replica keeps its seed
        >>> generator.state.numpy().tolist()
        [5, 0]
    """
    local = topology.strategy.experimental_local_results
    for variable in generators:
        for number, copy in enumerate(local(variable.value), topology.first):
            seed, count = copy.numpy().tolist()
            # The first replica keeps the seed, so that one replica draws what plain Keras draws.
            copy.assign([(seed + number * _SEED_STRIDE) % _SEEDS if number else seed, count])


def seed_of_first(state: np.ndarray, number: int) -> np.ndarray:
    """Computes the first replica's state of a generator from that of another, as `spread` has made it.

    Args:
        state: int [2], a seed and a counter.
        number: the other replica's.

    Examples:
        >>> seed_of_first(np.array([5, 3]), number=0).tolist()
        [5, 3]
    """
    seed, count = state.tolist()
    return np.array([(seed - number * _SEED_STRIDE) % _SEEDS if number else seed, count], state.dtype)


@contextlib.contextmanager
def untouched(strategy: tf.distribute.Strategy, variables: Sequence[Any]) -> Iterator[None]:
    """Puts this worker's copies of variables back afterwards: nothing but a training step may change them.

    Examples:
        >>> variable = keras.Variable([1.0])
        >>> with untouched(tf.distribute.get_strategy(), [variable]):
        ...     _ = variable.assign([2.0])
        >>> variable.numpy().tolist()
        [1.0]
    """
    copies = [copy for v in variables for copy in strategy.experimental_local_results(v.value)]
    kept = [tf.identity(copy) for copy in copies]
    try:
        yield
    finally:
        for copy, own in zip(copies, kept, strict=True):
            copy.assign(own)
