"""Several workers, each of which runs `model.fit` on its own part of the data.

    workers = dist_partial.connect()  # those of TF_CONFIG, which launch/local, launch/hosts and the like set
    with workers.strategy.scope():
        model = build_model()
        model.compile(dist_partial.partial("adam", rules, model), loss=...)
    mine = [array[workers.rank :: workers.workers] for array in (x, y)]
    model.fit(*mine, callbacks=fit.on_workers([keras.callbacks.ModelCheckpoint("best.keras")], workers))

The strategy's replicas are those of one worker. The gradients of `partial` cross the workers in each step; metrics, and
what layers such as BatchNorm keep, at the end of an epoch, which all workers must reach together.
"""

import atexit
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial import compat
from dist_partial.checkpoints.fingerprints import variables
from dist_partial.config.words import spoken
from dist_partial.distributed import consistency
from dist_partial.distributed.replicas import ReplicaOptions, Replicas, collectives_of
from dist_partial.distributed.worker_backend import WorkerBackend
from dist_partial.errors import Ending, UserError, raised
from dist_partial.fit.alike import broadcast, check_alike, differing, name_losses, send, together
from dist_partial.fit.loss_scale import all_of, others_of, unwrapped
from dist_partial.validation import nearest, shown

_SAVING = (
    keras.callbacks.BackupAndRestore,
    keras.callbacks.CSVLogger,
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.OrbaxCheckpoint,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.TensorBoard,
)


def connect(**options: Any) -> Replicas:
    """Connects this worker with the others of TF_CONFIG for `model.fit`; without TF_CONFIG it is the only one.

    Call it before anything else uses TensorFlow, and make the model within `connect().strategy.scope()`.

    Args:
        **options: attributes of `ReplicaOptions`, such as `cpu`, how many simulated replicas each worker has.

    Returns:
        What has `strategy`, `rank` and `workers`.

    Raises:
        UserError: a mistake in the options or in TF_CONFIG.
        Fault: workers are missing when `start_seconds` are over.

    Examples:
        >>> workers = connect()
        >>> workers.rank, workers.workers
        (0, 1)
    """
    names = [field.name for field in dataclasses.fields(ReplicaOptions)]
    for name in options:
        if name not in names:
            raise UserError(f"connect has no argument {name!r}{nearest(name, names, always=True)}")
    if options.get("transport") == "tensorflow":
        raise UserError("connect(transport='tensorflow'): Keras's fit fails under its strategy; leave out transport")
    with spoken():
        workers = ReplicaOptions(**options).connect()
        if workers.backend is not None:
            # The last exchange is the first as well: who comes to it before all others is known for that.
            workers.backend.barrier()
    if workers.backend is not None:
        atexit.register(_leave, workers.backend)
        strategy = workers.strategy

        def watch(optimizer: keras.optimizers.Optimizer) -> None:
            if tf.distribute.get_strategy() is strategy:
                raise _sums(f"the optimizer {optimizer.name!r}", optimizer)

        compat.watch_gradient_sums(watch)
    return workers


def _sums(where: str, optimizer: keras.optimizers.Optimizer) -> UserError:
    return UserError(
        f"{where} ({type(optimizer).__name__}) knows nothing of the other workers, whose gradients would be summed and "
        "not averaged: wrap it, as in dist_partial.partial(optimizer, [('train', '.*')], model)"
    )


def _leave(backend: WorkerBackend) -> None:
    """Waits for the others, whose last words may still be on their way; after an exception they hear of it."""
    error = getattr(sys, "last_value", None)
    if error is None:
        try:
            backend.finish()
        except Ending as ending:  # which says to the others what they may not see
            error = ending
    backend.close(error if error is None or isinstance(error, Ending) else raised("", error))


def on_workers(callbacks: Sequence[keras.callbacks.Callback], workers: Replicas) -> list[keras.callbacks.Callback]:
    """Makes callbacks of `fit` right for several workers.

    All workers have the same number of batches in an epoch, or none begins it. They begin with the weights, the
    optimizer and the epoch of the first, after its callbacks may have restored them. At the end of an epoch callbacks
    read the metrics of all examples of all workers, and the mean of what a `train_step` of one's own returns; what
    BatchNorm layers keep is averaged before it is evaluated or saved. Training stops on all if it stops on one, at the
    end of the epoch. Callbacks of Keras's that write (`ModelCheckpoint`, `OrbaxCheckpoint`, `BackupAndRestore`,
    `TensorBoard`, `CSVLogger`, `RemoteMonitor`) are the first worker's alone.

    Args:
        callbacks: those of one device.
        workers: from `connect`.

    Examples:
        >>> stopping = keras.callbacks.EarlyStopping()
        >>> on_workers([stopping], connect()) == [stopping]  # of one worker alone
        True
    """
    if not isinstance(workers, Replicas):
        raise UserError(f"on_workers was given {shown(workers)}: give what dist_partial.connect() has returned")
    listed = isinstance(callbacks, (list, tuple))
    if not listed or not all(isinstance(each, keras.callbacks.Callback) for each in callbacks):
        raise UserError(f"on_workers was given {shown(callbacks)}: give a list of Keras callbacks")
    if workers.backend is None:
        return list(callbacks)
    own = [each for each in callbacks if workers.is_chief or not isinstance(each, _SAVING)]
    return [_First(workers.backend), *own, _Last(workers.backend)]


class _First(keras.callbacks.Callback):
    """Does what is to be done before the other callbacks."""

    def __init__(self, backend: WorkerBackend) -> None:
        super().__init__()
        self._backend = backend
        self._logs: dict[str, Any] = {}  # of the last epoch
        self._trained: dict[str, Any] | None = {}  # metrics of the epoch's batches; None while they run

    @spoken()
    def on_train_begin(self, logs: Any = None) -> None:
        if not all_of(self.model):
            raise _sums(f"the optimizer of model {self.model.name!r}", self.model.optimizer)
        if others := others_of(self.model):
            raise _sums(f"an optimizer of model {self.model.name!r}", others[0])
        if collectives_of(self.model.distribute_strategy).backend is not self._backend:
            raise UserError(
                f"model {self.model.name!r} was made outside the workers' strategy, so that its gradients stay here: "
                "build or load it, and compile it, within connect().strategy.scope()"
            )
        if self.model.jit_compile:
            raise UserError("XLA cannot compile what crosses workers: compile the model with jit_compile=False")
        for optimizer in all_of(self.model):
            if inner := unwrapped(optimizer):
                inner.alone = False
        name_losses(self._backend, self.model)  # of a loaded model nobody has yet
        shapes = {path: [list(variable.shape), variable.dtype] for path, variable in variables(self.model).items()}
        check_alike(self._backend, {"epochs": self.params["epochs"], "model": shapes})

    @spoken()
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if len(set(consistency.everyone(self._backend, epoch))) > 1:
            check_alike(self._backend, {"initial_epoch": epoch})
        steps = consistency.everyone(self._backend, self.params["steps"] or 0)
        for rank, count in enumerate(steps):
            if count != steps[0]:
                has = [
                    f"{consistency.names(self._backend, [k])} has {steps[k] or 'an unknown number'}" for k in (rank, 0)
                ]
                raise UserError(
                    f"of batches in an epoch, {has[0]} and {has[1]}: give all workers as many, by parts of equal "
                    "length or by steps_per_epoch"
                )
        self._trained = None

    def on_test_begin(self, logs: Any = None) -> None:
        if self._trained is None:  # within an epoch: for an evaluation the metrics begin again
            self._trained = self._end_of_batches()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        exact = self._trained
        if exact is None:
            exact = self._end_of_batches()
        else:
            exact |= {f"val_{name}": value for name, value in _metrics(self._backend, self.model).items()}
        self._trained = {}
        own = {name: value for name, value in logs.items() if isinstance(value, (int, float)) and name not in exact}
        if own:
            everyone = [json.loads(each) for each in self._backend.gather(json.dumps(own).encode())]
            logs |= {name: float(np.mean([each.get(name, np.nan) for each in everyone])) for name in own}
        logs |= {name: value for name, value in exact.items() if name in logs}
        self._logs = dict(logs)

    def on_train_end(self, logs: Any = None) -> None:
        (logs or {}).update(self._logs)

    def _end_of_batches(self) -> dict[str, Any]:
        _average_layers(self._backend, self.model)
        return _metrics(self._backend, self.model)


class _Last(keras.callbacks.Callback):
    """Does what is to be done after the other callbacks."""

    def __init__(self, backend: WorkerBackend) -> None:
        super().__init__()
        self._backend = backend
        self._stops = False  # whether a callback has wished so amid an epoch

    @spoken()
    def on_train_begin(self, logs: Any = None) -> None:
        optimizers = all_of(self.model)
        inner = [found for each in optimizers if (found := unwrapped(each))]
        if send(self._backend, [*self.model.weights, *(v for each in optimizers for v in each.variables)]):
            for each in inner:
                each.begin_sums()
        for each in inner:
            each.schedule_state = json.loads(self._backend.gather(json.dumps(each.schedule_state).encode())[0])
        epoch = np.array([compat.initial_epoch(self.model)])
        compat.set_initial_epoch(self.model, int(broadcast(self._backend, epoch)[0]))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # The others go on to the end of the epoch, and this one with them.
        self._stops |= self.model.stop_training
        self.model.stop_training = False

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        stops = self._stops or self.model.stop_training
        self._stops, self.model.stop_training = False, any(consistency.everyone(self._backend, int(stops)))


def metrics(workers: Replicas, model: keras.Model) -> dict[str, Any]:
    """Computes a model's metrics over the examples of all workers, after each has called `evaluate`; all call it.

    Examples:
        >>> model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1, use_bias=False)])
        >>> model.set_weights([np.ones([1, 1])])
        >>> model.compile(loss="mse")
        >>> _ = model.evaluate(np.ones([2, 1]), np.zeros([2, 1]), verbose=0)
        >>> metrics(connect(), model)
        {'loss': 1.0}
    """
    return _metrics(workers.backend, model)


def _metrics(backend: WorkerBackend | None, model: keras.Model) -> dict[str, Any]:
    if backend is not None:
        backend.barrier()  # at which one that does not come is named: of a sum, who adds up sends nothing before
    used = [variable for metric in model.metrics for variable in metric.variables]
    values = {id(variable): keras.ops.convert_to_numpy(variable) for variable in used}
    summed = [key for variable in used if variable.aggregation == "sum" for key in [id(variable)]]
    values |= zip(summed, together(backend, [values[key] for key in summed]), strict=True)
    found: dict[str, Any] = {}
    for metric in model.metrics:
        own = [values[id(variable)] for variable in metric.variables]
        if own and not any(np.any(value) for value in own):
            continue  # a `train_step` of the model's own leaves it out: nobody has counted an example
        result = metric.stateless_result(own) if own else metric.result()
        for name, value in (result if isinstance(result, dict) else {metric.name: result}).items():
            found |= value if isinstance(value, dict) else {name: value}  # as Keras has it in logs
    return {name: value.item() if value.ndim == 0 else value for name, value in _as_arrays(found).items()}


def _as_arrays(values: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: keras.ops.convert_to_numpy(value) for name, value in values.items()}


def _average_layers(backend: WorkerBackend, model: keras.Model) -> None:
    """Averages over all replicas what layers such as BatchNorm keep, of which Keras leaves each with its own."""
    frozen = {id(entry.variable) for optimizer in all_of(model) for entry in optimizer.plan.frozen}
    kept = [v for v in model.non_trainable_weights if id(v) not in frozen and "float" in v.dtype]
    local = model.distribute_strategy.experimental_local_results
    means = [np.mean([copy.numpy() for copy in local(v.value)], axis=0) for v in kept]
    unlike = differing(backend, means)
    for i, total in zip(unlike, together(backend, [means[i] for i in unlike]), strict=True):
        kept[i].assign(total / backend.size)
