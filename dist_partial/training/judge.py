"""What follows from evaluations: the best checkpoint, Keras's callbacks, and an early end of the run."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from dist_partial import compat
from dist_partial.errors import UserError, calling
from dist_partial.step.optimizers import averaged
from dist_partial.training.build import Trainer
from dist_partial.training.state import TrainState
from dist_partial.validation import nearest

# These write files, and would write the same on every worker.
_WRITERS = (keras.callbacks.ModelCheckpoint, keras.callbacks.CSVLogger, keras.callbacks.TensorBoard)
_REFUSED = {
    keras.callbacks.BackupAndRestore: "the run folder goes on by itself",
}
# Keras changes its sign when it first compares, which it does again after a stop.
_SIGNED = {"min_delta"}
_KEPT = (bool, int, float, str, type(None))


class Judge:
    """Follows the evaluations of a run: knows the best, calls Keras's callbacks, and says when to stop early.

    An evaluation ends an epoch of the callbacks, and a call of the compiled step is their batch. All workers call all
    callbacks, but those of Keras that write files, which the first worker calls; what callbacks set on the first worker
    (learning rates, a stop) holds on all, and what those that write hold, for another may become the first. A
    checkpoint keeps what callbacks hold in numbers and texts. A CSVLogger adds to the file of a run that goes on.

    Attributes:
        reason: why the run stops early; empty if it does not.
        broke_off: whether a callback has ended it for a loss that is not finite: the weights are not to be kept.

    Args:
        trainer: of the run.
        state: with which the run begins.

    Raises:
        UserError: a callback is none, or one that cannot work here, or `run.best` or what a callback monitors is none
            of the numbers of an evaluation.
    """

    def __init__(self, trainer: Trainer, state: TrainState) -> None:
        self._trainer, self._settings = trainer, trainer.settings
        objective = trainer.objective
        sizes = [objective.size(training) for training in (True, False)]
        own, held_out = (
            ["loss", *objective.results(np.zeros(size), training)]
            for size, training in zip(sizes, (True, False), strict=True)
        )
        _check(self._settings.callbacks, [*own, *(f"val_{name}" for name in held_out), "learning_rate"])
        _check_rates(self._settings.callbacks, self._optimizers)
        best = self._settings.best
        # Callbacks say `val_loss` for the `loss` of an evaluation.
        self._number = best if best is None or best in held_out else best.removeprefix("val_")
        if self._number is not None and self._number not in held_out:
            raise UserError(
                f"run.best is {best!r}, which is no number of an evaluation"
                f"{nearest(self._number, held_out, always=True)}"
            )
        self._kept = kept = state.judged or {}
        self.reason: str = kept.get("stopped", "")
        self.broke_off = False
        self._stopped_by: list[Any] = kept.get("stopped_by", [])
        found = kept.get("best", {})
        self._best: dict[str, Any] = dict(found) if found.get("name") == best else {}  # run.best may change
        self._epoch: int = kept.get("epoch", 0)
        # Steps of the epoch so far, and the sums of their losses and of what they add to the metrics.
        self._sums = np.array(kept.get("sums", [0.0] * (2 + sizes[0])))
        if len(self._sums) != 2 + sizes[0]:  # other metrics are bound by now
            self._sums = np.zeros(2 + sizes[0])
        self._swaps, self._goes_on = _swaps(trainer), state.step > 0
        self._callbacks = [
            each
            for each in self._settings.callbacks
            if not isinstance(each, keras.callbacks.SwapEMAWeights) and (trainer.replicas.is_chief or not _writes(each))
        ]
        self._made = [_values(each) for each in self._settings.callbacks]
        self._new: list[dict[str, Any]] = []  # what the callbacks hold at the beginning of a run
        self._stopper: Any = None

    def to_json(self) -> dict[str, Any] | None:
        """What a run needs to go on exactly from here, as JSON values; None if nothing is judged."""
        if not self._settings.callbacks and self._settings.best is None:
            return None
        content: dict[str, Any] = {"epoch": self._epoch, "sums": self._sums.tolist(), "best": dict(self._best)}
        if self._settings.callbacks:
            content["callbacks"] = [
                # What is as at the beginning may be changed between two starts, such as the patience.
                [type(each).__name__, {name: value for name, value in _values(each).items() if new.get(name) != value}]
                for each, new in zip(self._settings.callbacks, self._new, strict=True)
            ]
            content["rates"] = [_rate(each) if _is_settable(each) else None for each in self._optimizers]
        if self.wants_to_stop and not self.reason:  # which the next call votes on
            content["asked"] = True
        return content | ({"stopped": self.reason, "stopped_by": self._stopped_by} if self.reason else {})

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Tells the callbacks of the beginning and the end of the run."""
        model = self._trainer.model
        model.stop_training = False
        for each in self._callbacks:
            each.set_model(model)
            if isinstance(each, keras.callbacks.CSVLogger) and self._goes_on:
                each.append = True
            steps, period = self._settings.steps, self._settings.eval_every or self._settings.steps
            each.set_params({"epochs": math.ceil(steps / period), "steps": min(period, steps), "verbose": 0})
        self._call("on_train_begin")
        self._new = [_values(each) for each in self._settings.callbacks]
        self._call("on_epoch_begin", self._epoch)
        # A run that goes on has begun this epoch before.
        callbacks = zip(self._settings.callbacks, self._new, self._kept.get("callbacks", []), strict=False)
        for each, new, (name, kept) in callbacks:
            for attribute, value in (new | kept).items() if name == type(each).__name__ else ():
                if attribute not in _SIGNED:
                    setattr(each, attribute, value)
        for optimizer, rate in zip(self._optimizers, self._kept.get("rates", []), strict=False):
            if rate is not None and _is_settable(optimizer):
                optimizer.learning_rate = rate
        model.stop_training = self._kept.get("asked", False)
        yield
        self._call("on_train_end")
        model.optimizer = None

    def weights(self) -> contextlib.AbstractContextManager[None]:
        """Gives the model the weights to evaluate, and to keep as the best: with Keras's SwapEMAWeights the averages.

        That is what Keras makes of it with `swap_on_epoch`, which other callbacks see as well.
        """
        if not self._swaps:
            return contextlib.nullcontext()
        return averaged(self._trainer.replicas.strategy, self._trainer.optimizers)

    @contextlib.contextmanager
    def testing(self, found: dict[str, float]) -> Iterator[None]:
        """Tells the callbacks of the beginning of an evaluation, and of its end, when its numbers are in `found`."""
        self._call("on_test_begin")
        yield
        self._call("on_test_end", {name: value for name, value in found.items() if name != "examples"})

    def begin_steps(self) -> None:
        """Notes that the next call of the compiled step begins."""
        self._call("on_train_batch_begin", int(self._sums[0]))

    def made_steps(self, losses: np.ndarray, sums: np.ndarray, results: Sequence[Mapping[str, float]]) -> bool:
        """Takes what consecutive steps gave: losses [steps], what they add to the metrics [steps, numbers], results.

        Returns:
            Whether a callback ends the run for a loss that is not finite: there are more losses than results.
        """
        good = len(results)
        self._sums += [good, losses[:good].sum(), *sums.sum(axis=0)]
        if self._callbacks and good:
            self._call("on_train_batch_end", int(self._sums[0]) - 1, {"loss": float(losses[good - 1]), **results[-1]})
        if self._callbacks and good < len(losses) and not self.wants_to_stop:
            self._call("on_train_batch_end", int(self._sums[0]), {"loss": float(losses[good])})
            if self.wants_to_stop:
                self.stop()
                self.broke_off = True
        return self.broke_off

    @property
    def wants_to_stop(self) -> bool:
        """Whether a callback has asked for the end of the run on this worker."""
        return bool(self._callbacks) and bool(self._trainer.model.stop_training)

    def stop(self) -> None:
        """Notes that a callback has ended the run; if this worker does not know which, any of them may have."""
        name = "a callback" if self._stopper is None else type(self._stopper).__name__
        self.reason = self.reason or f"{name} has stopped it"
        self._stopped_by = [
            # What was given, and does not count or remember.
            [type(each).__name__, dict(made.items() & new.items() & _values(each).items())]
            for each, made, new in zip(self._settings.callbacks, self._made, self._new, strict=True)
            if self._stopper in (None, each)
        ]

    def evaluated(self, step: int, held_out: Mapping[str, float]) -> bool:
        """Takes an evaluation; all workers call it with the same; returns whether it is the best so far."""
        if self._settings.callbacks:  # of which this worker may have none to call
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
        sign = -1 if self._trainer.objective.grows(str(self._number)) else 1
        value = held_out[str(self._number)]
        if math.isnan(value):  # which nothing would be better than
            value = sign * math.inf
        if not self._best or sign * value < sign * self._best["value"]:
            self._best = {"name": name, "step": step, "value": value, "waited": 0}
            return True
        self._best["waited"] += 1
        if patience is not None and self._best["waited"] >= patience:
            self.reason = f"{name} was best at step {self._best['step']}, {patience} evaluations ago (run.patience)"
        return False

    def _agree(self) -> None:
        """Has all workers do what the callbacks of the first have set."""
        replicas, model = self._trainer.replicas, self._trainer.model
        if replicas.workers == 1:
            return
        optimizers = [each for each in self._optimizers if _is_settable(each)]
        own = [float(model.stop_training), *map(_rate, optimizers)]
        stop, *rates = replicas.sum(np.array(own if replicas.is_chief else [0.0] * len(own))).tolist()
        model.stop_training = bool(stop)
        for each, rate, before in zip(optimizers, rates, own[1:], strict=True):
            if rate != before:
                each.learning_rate = rate
        if writers := [each for each in self._settings.callbacks if _writes(each)]:
            held = replicas.gather(json.dumps([_values(each) for each in writers]).encode())[0]
            for writer, values in zip(writers, json.loads(held), strict=True):
                vars(writer).update(values)

    @property
    def _optimizers(self) -> list[keras.optimizers.Optimizer]:
        """Those of this moment: a schedule may make others."""
        return [group.optimizer for group in self._trainer.optimizers]

    def _call(self, name: str, *arguments: Any) -> None:
        model = self._trainer.model
        for each in self._callbacks:
            optimizers = self._optimizers
            alone = len(optimizers) == 1 and self._trainer.replicas.topology.replicas == 1
            model.optimizer = optimizers[0] if alone else _Optimizers(optimizers)
            with calling("run.callbacks"):
                getattr(each, name)(*arguments)
            if model.stop_training and self._stopper is None:
                self._stopper = each


def reopened(trainer: Trainer, state: TrainState) -> TrainState:
    """Lets a run that has stopped early go on if what stopped it has changed since; all workers call it.

    That is `run.patience` or `run.best`, or the callback: it is gone, or was made with other numbers or texts.

    Returns:
        The state, as one that has not stopped if so.
    """
    judged, settings = state.judged or {}, trainer.settings
    if not state.stopped:
        return state
    best = judged.get("best", {})
    waits = best.get("name") != settings.best or settings.patience is None or best["waited"] < settings.patience
    callbacks = [(type(each).__name__, _values(each).items()) for each in settings.callbacks]
    by = [
        any(name == other and given.items() <= values for other, values in callbacks)
        for name, given in judged.get("stopped_by", [])
    ]
    stays = not waits or (bool(by) and all(by))
    # Callbacks of the first worker decide, as they have done when they stopped it.
    if trainer.replicas.sum(np.array([float(stays and trainer.replicas.is_chief)]))[0]:
        return state
    trainer.replicas.say(f"step {state.step}: {state.stopped}; that has changed since, and the run goes on")
    kept = {name: value for name, value in judged.items() if name not in ("stopped", "stopped_by")}
    return dataclasses.replace(state, judged=kept)


class _Rate(float):
    """A learning rate as a number, which can be assigned to as Keras's variable can."""

    def __new__(cls, value: float, _: Any) -> "_Rate":
        return super().__new__(cls, value)

    def __init__(self, value: float, optimizers: "_Optimizers") -> None:
        self._optimizers = optimizers

    def assign(self, value: Any) -> None:
        self._optimizers.learning_rate = value

    def numpy(self) -> np.ndarray:
        return np.array(self, np.float32)


class _Optimizers:
    """Shows the optimizers of a run to callbacks as `model.optimizer`; Keras's own set the rate of each.

    Its learning rate is that of the first. Where one is set the others follow in proportion, so that rates which rules
    have apart stay apart. What replicas hold is shown as numbers, of which Keras 3.15 makes none by itself.
    """

    def __init__(self, optimizers: Sequence[keras.optimizers.Optimizer]) -> None:
        self.optimizers = list(optimizers)

    def __getattr__(self, name: str) -> Any:  # whatever else an optimizer has, of the first
        if name == "optimizers":  # while a copy is made
            raise AttributeError(name)
        return getattr(self.optimizers[0], name)

    @property
    def iterations(self) -> int:
        return int(keras.ops.convert_to_numpy(self.optimizers[0].iterations))

    @property
    def learning_rate(self) -> _Rate:
        return _Rate(_rate(self.optimizers[0]), self)

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        first = _rate(self.optimizers[0])
        new = float(keras.ops.convert_to_numpy(value))
        for each in self.optimizers:
            each.learning_rate = new if _rate(each) == first else _rate(each) * (new / first)


def learning_rates(optimizers: Sequence[keras.optimizers.Optimizer]) -> dict[str, float]:
    """Reads the learning rates of optimizers, by number where they differ.

    Examples:
        >>> learning_rates([keras.optimizers.SGD(0.5), keras.optimizers.SGD(0.25)])
        {'learning_rate_0': 0.5, 'learning_rate_1': 0.25}
    """
    rates = [_rate(each) for each in optimizers]
    if len(set(rates)) == 1:
        return {"learning_rate": rates[0]}
    return {f"learning_rate_{number}": rate for number, rate in enumerate(rates)}


def _is_settable(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether the learning rate is a number, and not a schedule."""
    return not callable(compat.learning_rate(optimizer))


def _rate(optimizer: keras.optimizers.Optimizer) -> float:
    # Keras 3.15 cannot make a float of a variable that several replicas hold.
    return float(keras.ops.convert_to_numpy(optimizer.learning_rate))


def notes_on_averages(trainer: Trainer) -> list[str]:
    """Says what `run.best` keeps where an optimizer averages weights: a line, or none."""
    averages = any(group.optimizer.use_ema for group in trainer.optimizers)
    if trainer.settings.best is None or not averages or _swaps(trainer):
        return []
    return [
        "run.best evaluates and keeps the weights themselves, as fit does, and not the averages of use_ema: for those "
        "put @SwapEMAWeights() into run.callbacks"
    ]


def notes_on_clipping(trainer: Trainer) -> list[str]:
    """Says that the optimizers of several rules limit the norm of their own gradients: a line, or none."""
    groups = [group for group in trainer.optimizers if group.optimizer.global_clipnorm is not None]
    if not groups or len(trainer.optimizers) == 1:
        return []
    return [
        f"global_clipnorm of an optimizer limits the norm of its own rule's gradients, and {len(trainer.optimizers)} "
        "optimizers are at work: run.clip_norm limits that of all together"
    ]


def _swaps(trainer: Trainer) -> bool:
    """Whether evaluations are of averages; raises UserError if they are to be, and there are none."""
    found = any(isinstance(each, keras.callbacks.SwapEMAWeights) for each in trainer.settings.callbacks)
    if found and not any(group.optimizer.use_ema for group in trainer.optimizers):
        raise UserError(
            "run.callbacks has SwapEMAWeights, and no optimizer averages weights: make one with use_ema=True, "
            "or leave it out"
        )
    return found


def _writes(callback: Any) -> bool:
    return isinstance(callback, _WRITERS)


def _values(callback: Any) -> dict[str, Any]:
    """What a callback holds in numbers, texts and None, which a checkpoint keeps."""
    found = {name: value.item() if isinstance(value, np.generic) else value for name, value in vars(callback).items()}
    found |= {name: abs(found[name]) for name in _SIGNED & found.keys()}
    return {name: value for name, value in found.items() if isinstance(value, _KEPT)}


def _check_rates(callbacks: Sequence[Any], optimizers: Sequence[keras.optimizers.Optimizer]) -> None:
    setting = (keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau)
    for each in callbacks:
        if isinstance(each, setting) and not all(map(_is_settable, optimizers)):
            raise UserError(
                f"run.callbacks has {type(each).__name__}, which sets learning rates, and run.optimizer has a schedule "
                "for one: leave one of the two out"
            )


def _check(callbacks: Sequence[Any], names: Sequence[str]) -> None:
    for each in callbacks:
        name = type(each).__name__
        if not isinstance(each, keras.callbacks.Callback):
            raise UserError(f"run.callbacks has a {name}: give Keras callbacks, such as @keras.callbacks.CSVLogger()")
        for kind, words in _REFUSED.items():
            if isinstance(each, kind):
                raise UserError(f"run.callbacks has {name}: {words}; leave it out")
        if getattr(each, "restore_best_weights", False):
            raise UserError(
                f"run.callbacks has {name} with restore_best_weights, which a checkpoint does not hold: bind run.best "
                "and run.patience, and export with --step=best"
            )
        monitor = getattr(each, "monitor", None)
        # Other callbacks may add numbers of their own.
        of_keras = all(type(one).__module__.startswith("keras.") for one in callbacks)
        if of_keras and isinstance(monitor, str) and monitor not in names:
            raise UserError(
                f"run.callbacks has {name} with monitor={monitor!r}, which is no number of this run"
                f"{nearest(monitor, names, always=True)}"
            )
