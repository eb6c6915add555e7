"""`dist_partial.train`: one call that trains, and returns what came of it."""

import contextlib
import dataclasses
import inspect
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import keras
import numpy as np
import tensorflow as tf

from dist_partial import checkpoints
from dist_partial.api import given, result
from dist_partial.api.model import Model
from dist_partial.api.result import Result
from dist_partial.checkpoints.fingerprints import FROZEN_DIFFERS
from dist_partial.config import gin_text
from dist_partial.config.settings import Settings
from dist_partial.config.words import spoken
from dist_partial.distributed.cluster import read_tf_config
from dist_partial.distributed.replicas import ReplicaOptions, simulated
from dist_partial.errors import INTERRUPTED, Interrupted, UserError
from dist_partial.selection import Plan
from dist_partial.selection.paths import variable_paths
from dist_partial.step import batch_norm, outer_step
from dist_partial.synonyms import meant
from dist_partial.terminal import say, silent, without_notes
from dist_partial.train import main as command
from dist_partial.training import loop
from dist_partial.training.build import restore
from dist_partial.training.events import BEST
from dist_partial.training.state import TrainState
from dist_partial.validation import nearest, shown

_DEVICES = 8  # on the CPU, which cost nothing where they are not used
_FIRST = ("model", "data")
_OWN = ("evaluation", "folder", "replicas", "verbose", "restore_best")


def train(
    model: Any,
    data: Any,
    *more: Any,
    rules: Sequence[Any] | None = None,
    evaluation: Any = None,
    folder: str | Path | None = None,
    replicas: Any = 1,
    verbose: int = 1,
    **settings: Any,
) -> Result:
    """Trains the part of a model that the rules select, and returns the model, its history and more.

    A model that is made already has the trained weights afterwards, as after `fit`, and is trained from those that it
    has. What the function of a model makes has Keras's names of layers in a new process, however often it is called.

    Args:
        model: a Keras model, or a function without arguments that makes one.
        data: arrays (x, y) or (x, y, weight), a `Dataset`, what else `data.dataset` takes, or a function that makes
            one of these.
        *more: refused; what `fit` takes as a third argument is a part of `data`.
        rules: the table: `('train' | 'freeze', pattern)` lines or `Rule`s; needed.
        evaluation: the examples held out, as `data`; None holds a part of it out.
        folder: the run folder, from which a run goes on; None is a new one in `runs`.
        replicas: how many, simulated on the CPU; or a `ReplicaOptions`, or a function that makes `Replicas`.
        verbose: 0 shows nothing but errors; 1 the plan, a progress bar and evaluations.
        **settings: the other attributes of `Settings`, such as `steps`, `optimizer` (one, a factory or a name), `loss`,
            `metrics`. In place of these, if they are not given, is what the model was compiled with;
            `restore_best=True` gives it the weights of the best checkpoint at the end.

    Raises:
        UserError: a mistake in one of these, in one line.
        Raised: the model, the data or the loss raised an exception.
        Interrupted: the kernel was interrupted, or Ctrl-C; the run is saved, and goes on if it is called again. It is
            a KeyboardInterrupt, and its `result` is what there is so far.

    Examples:
        >>> import tempfile
        >>> import keras
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
        >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1, name="head")])
        >>> rules = [("train", "head/.*"), ("freeze", ".*")]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = train(model, (x, x.sum(1)), rules=rules, loss="mse", steps=3, folder=f"{folder}/run")
        replicas: 1, ...
        >>> [row["step"] for row in found.history if row["split"] == "train"], found.model is model
        ([1, 2, 3], True)
    """
    with spoken(), _interrupted(), without_notes(), contextlib.nullcontext() if verbose else silent():
        settings, restore_best = _checked(settings, more)
        rules = _checked_rules(rules, model)
        examples = given.Data(data, evaluation)
        made = Model(model, examples, rules, {name for name, value in settings.items() if value is not None})
        settings = settings | {"precision": made.precision(settings.get("precision"))}
        if "optimizer" in settings:
            settings["optimizer"] = given.optimizer(settings["optimizer"])
        bound = Settings(rules=rules, model=made, data=examples, replicas=given.replicas(replicas), **settings)
        with _place(folder, model) as place:
            return _run(bound, made, examples, place, restore_best)


@contextlib.contextmanager
def _interrupted() -> Iterator[None]:
    """Turns an interrupt while a run is built, or a second one, into one line."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped before anything new was saved; run the same command again to begin, or to go on", INTERRUPTED
        ) from None


def _run(settings: Settings, model: Model, data: given.Data, folder: Path, restore_best: bool) -> Result:
    going_on = any((folder / "checkpoints").glob("step-*"))

    def operative() -> str:
        kept: dict[str, Any] = {"model": model.kept(folder, going_on), "data": data.kept(folder)}
        return gin_text.text(dataclasses.replace(settings, **model.compiled, **kept))

    for note in model.notes:
        say(note)
    try:
        trainer = loop.run(settings, folder, operative)
    except Interrupted as interrupted:
        state, interrupted.state = interrupted.state, None  # which a notebook would keep with the exception
        model.give_back(_agreed(state))
        found = _read(state.model, folder, state.plan, settings)
        interrupted.result = dataclasses.replace(found, _trained=(state.model, state.step))
        raise
    except UserError as error:
        if model.of_instance and FROZEN_DIFFERS in str(error):  # of one that is made again with other random weights
            raise UserError(
                f"{error}; where a cell makes {model.given.name!r} again, write keras.utils.set_random_seed(0) above "
                "it, or give the function that makes it"
            ) from error
        raise
    made, step = trainer.model, max(checkpoints.steps(folder / "checkpoints"), default=0)
    if restore_best and checkpoints.steps(folder / BEST):
        alone = dataclasses.replace(trainer.replicas, backend=None)  # whose connections have been closed
        step = restore(dataclasses.replace(trainer, replicas=alone), folder, say, place=BEST).step
    for layer in trainer.batch_norms:
        batch_norm.set_mode(layer, True)  # as it was made: the run alone had put it into inference mode
    weights = _agreed(trainer.state())
    made.set_weights(weights)
    if model.give_back(weights):
        made = model.given
    elif model.of_instance:
        say(
            f"model {made.name!r} keeps its weights, for the rules have given the trained one other variables "
            "(LoRA, a lower precision): it is the result's .model"
        )
    return dataclasses.replace(_read(made, folder, trainer.plan, settings), _trained=(trainer.model, step))


def _read(model: Any, folder: Path, plan: Plan, settings: Settings) -> Result:
    found = result.read(model, folder, plan, settings.steps)
    return found if settings.best else dataclasses.replace(found, best=None)


def _agreed(state: TrainState) -> list[Any]:
    """The weights on which all replicas agree."""
    with outer_step.agreed(state.topology.strategy, state.fragments):
        return state.model.get_weights()


def devices(count: int = _DEVICES) -> None:
    """Makes devices on the CPU that can act as replicas; call it before anything else uses TensorFlow.

    The first use of `dist_partial.train` makes eight, if TensorFlow has not started: `from dist_partial import train`
    above the first model is enough.

    Raises:
        UserError: TensorFlow has started with fewer.

    Examples:
        >>> devices(1)
    """
    with spoken():
        simulated(ReplicaOptions(cpu=count).cpu)


def _some_devices() -> None:
    if tf.config.get_logical_device_configuration(tf.config.list_physical_devices("CPU")[0]) is None:
        with contextlib.suppress(UserError):  # TensorFlow has started; then there is one
            simulated(_DEVICES)


@contextlib.contextmanager
def _place(folder: str | Path | None, model: Any) -> Iterator[Path]:
    """The run folder: the one that is given, or the next free one for a model of that name, if anything is written."""
    if folder is not None:
        if not isinstance(folder, (str, os.PathLike)):
            raise UserError(f"folder is {shown(folder)}: write a path, such as 'runs/mine'")
        yield Path(folder).expanduser()
        return
    if read_tf_config(os.environ.get("TF_CONFIG", "")):
        raise UserError("folder is None, and the workers of TF_CONFIG write one together: give folder='runs/mine'")
    name = getattr(model, "name", getattr(model, "__name__", "model"))
    name = re.sub(r"\W+", "_", re.sub(r"_\d+$", "", name)).strip("_") or "model"
    for number in itertools.count(1):
        place = Path("runs") / f"{name}-{number}"
        with contextlib.suppress(FileExistsError):
            place.mkdir(parents=True)
            break
    try:
        yield place
    finally:
        with contextlib.suppress(OSError):
            place.rmdir()  # which is empty after a mistake


def _checked_rules(rules: Sequence[Any] | None, model: Any) -> Sequence[Any]:
    """The rules; without any, those that train the last layer of the model are the example in the message."""
    if rules is not None:
        return rules
    paths = variable_paths(model) if isinstance(model, keras.Model) and model.weights else ["head/kernel"]
    example = f"rules=[('train', '{paths[-1].rpartition('/')[0] or paths[-1]}/.*'), ('freeze', '.*')]"
    raise UserError(
        "train has no rules: give lines of ('train' or 'freeze', pattern of paths), of which the first that fits a "
        f"variable counts, such as {example}; rules=[('train', '.*')] trains all"
    )


def _checked(settings: dict[str, Any], more: tuple[Any, ...]) -> tuple[dict[str, Any], bool]:
    """The settings, in values that a configuration can hold, and `restore_best`."""
    if more:
        raise UserError("train takes model and data without a name, and no more: give inputs and targets as (x, y)")
    restore_best = settings.pop("restore_best", False)
    fields = {field.name: field.default for field in dataclasses.fields(Settings)}
    for name in settings.keys() - fields.keys():
        words = meant(name) or nearest(name, [*_FIRST, *_OWN, *fields], always=True)
        raise UserError(f"train has no argument {name!r}{words}")
    if restore_best and settings.get("best") is None:
        raise UserError("restore_best without best: give the number that has to get better, such as best='loss'")
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in settings.items()}
    # None where that is no value is as with Keras's `fit`, such as `callbacks=None`.
    return {name: value for name, value in plain.items() if value is not None or fields[name] is None}, restore_best


def _signature() -> inspect.Signature:
    """That of `train`, with each of the settings, for help and completion."""
    own, plain = inspect.signature(train), get_type_hints(Settings)  # without the checks that annotate them
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [each for each in own.parameters.values() if each.kind not in several]
    for each in inspect.signature(Settings).parameters.values():
        if each.name not in own.parameters:
            parameters.append(each.replace(kind=each.KEYWORD_ONLY, annotation=plain[each.name]))
    best = inspect.Parameter("restore_best", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    return own.replace(parameters=[*parameters, best])


train.main = command  # type: ignore[attr-defined]  # for those who have `from dist_partial import train` for it
train.__signature__ = _signature()  # type: ignore[attr-defined]
_some_devices()
