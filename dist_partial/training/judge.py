"""What follows from evaluations: the best checkpoint, Keras's callbacks, and an early end of the run."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from dist_partial.errors import UserError, calling
from dist_partial.training.build import Trainer
from dist_partial.training.state import TrainState
from dist_partial.validation import nearest

# These write files, and would write the same on every worker.
_WRITERS = (keras.callbacks.ModelCheckpoint, keras.callbacks.CSVLogger, keras.callbacks.TensorBoard)
# Keras changes its sign when it first compares, which it does again after a stop.
_NOT_KEPT = {"min_delta"}
_KEPT = (bool, int, float, str, type(None))


class Judge:
    """Follows the evaluations of a run: knows the best, calls Keras's callbacks, and says when to stop early.

    An evaluation ends an epoch of the callbacks, and a call of the compiled step is their batch. All workers call all
    callbacks, but those of Keras that write files, which the first worker calls; what callbacks set on the first worker
    (learning rates, a stop) holds on all.

    Attributes:
        reason: why the run stops early; empty if it does not.

    Args:
        trainer: of the run.
        state: with which the run begins.

    Raises:
        UserError: a callback is none, or one that cannot work here.
    """

    def __init__(self, trainer: Trainer, state: TrainState) -> None:
        self._trainer, self._settings = trainer, trainer.settings
        kept = state.judged or {}
        self.reason: str = kept.get("stopped", "")
        self._best: dict[str, Any] = kept.get("best", {})
        self._epoch: int = kept.get("epoch", 0)
        size = trainer.objective.size(training=True)
        # Steps of the epoch so far, and the sums of their losses and of what they add to the metrics.
        self._sums = np.array(kept.get("sums", [0.0] * (2 + size)))
        self._states: list[dict[str, Any]] = kept.get("callbacks", [])
        self._callbacks = [each for each in self._settings.callbacks if trainer.replicas.is_chief or not _writes(each)]
        _check(self._settings.callbacks)

    def to_json(self) -> dict[str, Any]:
        """What a run needs to go on exactly from here, as JSON values."""
        states = [
            {name: _plain(value) for name, value in vars(each).items() if isinstance(_plain(value), _KEPT)}
            for each in self._settings.callbacks
        ]
        states = [{name: value for name, value in each.items() if name not in _NOT_KEPT} for each in states]
        content = {"epoch": self._epoch, "sums": self._sums.tolist(), "callbacks": states, "best": self._best}
        return content | ({"stopped": self.reason} if self.reason else {})

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Tells the callbacks of the beginning and the end of the run."""
        model = self._trainer.model
        model.optimizer = _Optimizers([group.optimizer for group in self._trainer.optimizers])
        model.stop_training = False
        for each in self._callbacks:
            each.set_model(model)
            each.set_params({"epochs": None, "steps": None, "verbose": 0})
        self._call("on_train_begin")
        for each, kept in zip(self._settings.callbacks, self._states, strict=False):
            for name, value in kept.items():
                setattr(each, name, value)
        self._call("on_epoch_begin", self._epoch)
        yield
        self._call("on_train_end")

    def made_steps(self, losses: np.ndarray, sums: np.ndarray, results: Sequence[Mapping[str, float]]) -> None:
        """Takes what consecutive steps gave: losses [steps], what they add to the metrics [steps, numbers], results."""
        self._sums += [len(losses), losses.sum(), *sums.sum(axis=0)]
        if self._callbacks and len(losses):
            self._call("on_train_batch_end", int(self._sums[0]) - 1, {"loss": float(losses[-1]), **results[-1]})

    @property
    def wants_to_stop(self) -> bool:
        """Whether a callback has asked for the end of the run on this worker."""
        return bool(self._callbacks) and bool(self._trainer.model.stop_training)

    def stop(self) -> None:
        """Notes that a callback has ended the run."""
        self.reason = self.reason or "a callback has stopped it"

    def evaluated(self, step: int, held_out: Mapping[str, float]) -> bool:
        """Takes an evaluation; all workers call it with the same; returns whether it is the best so far.

        Raises:
            UserError: `run.best` is none of its numbers.
        """
        if self._callbacks:
            steps, loss, *metrics = self._sums.tolist()
            own = {"loss": loss / max(steps, 1), **self._trainer.objective.results(np.array(metrics), training=True)}
            own |= {f"val_{name}": value for name, value in held_out.items() if name != "examples"}
            self._call("on_epoch_end", self._epoch, own)
            self._agree()
            if self.wants_to_stop:
                self.stop()
        self._epoch += 1
        self._sums = np.zeros_like(self._sums)
        better = self._settings.best is not None and self._is_better(step, held_out)
        if not self.reason:
            self._call("on_epoch_begin", self._epoch)
        return better

    def _is_better(self, step: int, held_out: Mapping[str, float]) -> bool:
        name, patience = str(self._settings.best), self._settings.patience
        if name not in held_out or name == "examples":
            known = [each for each in held_out if each != "examples"]
            raise UserError(f"run.best = {name!r} is no number of an evaluation{nearest(name, known, always=True)}")
        value = held_out[name]
        sign = -1 if self._trainer.objective.grows(name) else 1
        if not self._best or sign * value < sign * self._best["value"]:
            self._best = {"step": step, "value": value, "waited": 0}
            return True
        self._best["waited"] += 1
        if patience is not None and self._best["waited"] >= patience:
            self.reason = f"{name} was best at step {self._best['step']}, {patience} evaluations ago (run.patience)"
        return False

    def _agree(self) -> None:
        """Has all workers do what the callbacks of the first have set."""
        replicas, model = self._trainer.replicas, self._trainer.model
        optimizers = [each for each in model.optimizer.optimizers if _is_settable(each)]
        own = [float(model.stop_training), *(float(each.learning_rate) for each in optimizers)]
        if replicas.workers > 1:
            stop, *rates = replicas.sum(np.array(own if replicas.is_chief else [0.0] * len(own))).tolist()
            model.stop_training = bool(stop)
            for each, rate, before in zip(optimizers, rates, own[1:], strict=True):
                if rate != before:
                    each.learning_rate = rate

    def _call(self, name: str, *arguments: Any) -> None:
        with calling("run.callbacks"):
            for each in self._callbacks:
                getattr(each, name)(*arguments)


class _Optimizers:
    """Shows the optimizers of a run to callbacks as `model.optimizer`."""

    def __init__(self, optimizers: Sequence[keras.optimizers.Optimizer]) -> None:
        self.optimizers = list(optimizers)

    @property
    def learning_rate(self) -> Any:
        return self.optimizers[0].learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        for each in self.optimizers:
            each.learning_rate = value


def learning_rates(optimizers: Sequence[keras.optimizers.Optimizer]) -> dict[str, float]:
    """Reads the learning rates of optimizers, by number where they differ.

    Examples:
        >>> learning_rates([keras.optimizers.SGD(0.5), keras.optimizers.SGD(0.25)])
        {'learning_rate_0': 0.5, 'learning_rate_1': 0.25}
    """
    rates = [float(keras.ops.convert_to_numpy(each.learning_rate)) for each in optimizers]
    if len(set(rates)) == 1:
        return {"learning_rate": rates[0]}
    return {f"learning_rate_{number}": rate for number, rate in enumerate(rates)}


def _is_settable(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether the learning rate is a number, and not a schedule."""
    try:
        optimizer.learning_rate = float(optimizer.learning_rate)
    except TypeError:
        return False
    return True


def _writes(callback: Any) -> bool:
    return isinstance(callback, _WRITERS)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _check(callbacks: Sequence[Any]) -> None:
    for each in callbacks:
        name = type(each).__name__
        if not isinstance(each, keras.callbacks.Callback):
            raise UserError(f"run.callbacks has a {name}: give Keras callbacks, such as @keras.callbacks.CSVLogger()")
        if isinstance(each, keras.callbacks.BackupAndRestore):
            raise UserError(f"run.callbacks has {name}: the run folder goes on by itself; leave it out")
        if getattr(each, "restore_best_weights", False):
            raise UserError(
                f"run.callbacks has {name} with restore_best_weights, which a checkpoint does not hold: bind run.best "
                "and run.patience, and export with --step=best"
            )
