"""The model that `train` is given, as a factory: copies of one that is made already, or the user's function."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial import compat, session
from dist_partial.api.given import Data, optimizer
from dist_partial.config.bindings import only_in_python
from dist_partial.config.gin_text import has_name
from dist_partial.config.settings import PRECISIONS
from dist_partial.data import fetch, looks
from dist_partial.errors import UserError, calling
from dist_partial.models import ModelCopy, inputs, keras_file, numbered_names
from dist_partial.selection.paths import variable_paths
from dist_partial.selection.rules import first_match, parse_rules
from dist_partial.step import layer_state
from dist_partial.step.losses import DividedLoss
from dist_partial.validation import shown


class Model:
    """Makes the model of a run, of one that the user has made already, or by the user's function.

    Attributes:
        given: the user's.
        compiled: what the one that the user has made was compiled with, as settings of the run, but for those that
            are given; see `build`, which takes it.
        notes: lines to say of it.

    Args:
        given: a model, or a function without arguments that makes one.
        data: of the run, an example of which makes the variables of a model that has none.
        rules: the table.
        settings: names of those that are given.
    """

    def __init__(self, given: Any, data: Data, rules: Sequence[Any], settings: Collection[str] = ()) -> None:
        self.given, self._settings = given, settings
        self.notes: tuple[str, ...] = ()
        self._copy: ModelCopy | None = None
        self._lost = ""
        self.compiled = _compiled(given, settings)
        if not isinstance(given, keras.Model):
            if not callable(given) or isinstance(given, keras.Layer):
                how = "; keras.saving.load_model reads a file" if isinstance(given, str) else ""
                raise UserError(f"model is {shown(given)}: give a Keras model, or a function that makes one{how}")
            self.__wrapped__ = given  # for `session.numbered_afresh`
            return
        with calling("run.data"):
            source = data().train
            x = fetch(source, np.resize(looks(source), layer_state.batch_size(given) or 2))[0]
            x = tf.nest.map_structure(tf.constant, x)
        inputs.check_inputs(given, data().name, source.spec[0])
        with calling("run.model"):
            if not given.weights:
                given(x, training=False)
            names = _names(given, rules)
            parts = {part for path in variable_paths(given) for part in path.split("/")}
            if renamed := ", ".join(f"{old} is {new!r}" for old, new in names.items() if old in parts):
                self.notes = (f"layers that Keras has numbered have the names of a new process here: {renamed}",)
            self._copy = ModelCopy(given, names, x)
            _check_same(given, self._copy(), x)

    def __call__(self) -> Any:
        if self._copy is not None and self.of_instance:
            return self._copy()
        made = self.given()
        self.compiled = _compiled(made, self._settings)
        if isinstance(made, keras.Model) and not self._named:
            try:
                self._copy = ModelCopy(made, weights=[array.copy() for array in made.get_weights()])
            except UserError as error:
                self._lost = str(error)
        return made

    @property
    def of_instance(self) -> bool:
        """Whether the user has made it."""
        return isinstance(self.given, keras.Model)

    @property
    def _named(self) -> bool:
        return not self.of_instance and has_name(self.given)

    def precision(self, wanted: str | None) -> str:
        """The precision of the run, which is that of a model that is made already.

        Raises:
            UserError: another is wanted.
        """
        if not self.of_instance:
            return wanted or "float32"
        policy = self.given.dtype_policy.name
        if wanted not in (None, policy):
            raise UserError(
                f"precision is {wanted!r}, and model {self.given.name!r} was made in {policy!r}: give the function "
                f"that makes it, and not the model, or call keras.config.set_dtype_policy({wanted!r}) before it is made"
            )
        return policy if policy in PRECISIONS else "float32"

    def kept(self, folder: Path, going_on: bool) -> Callable[..., Any]:
        """A factory that another process can name; it may read the model, as it was at first, from the folder.

        Args:
            folder: the run folder.
            going_on: whether the run has gone on from a checkpoint, so that it is there.
        """
        if self._named:
            return self.given
        path = folder / "model.keras"
        try:
            if self._copy is None:
                raise UserError(self._lost)
            classes = self._copy.classes()
            if not (going_on and path.exists()):
                with session.numbered_afresh():
                    self._copy.save(path)
        except UserError as error:  # the run goes on
            name = getattr(self.given, "name", getattr(self.given, "__name__", "one"))
            return functools.partial(only_in_python, what=f"run.model is {name!r} ({error})")
        return functools.partial(keras_file, path=str(path.absolute()), **({"classes": classes} if classes else {}))

    def give_back(self, weights: Sequence[Any]) -> bool:
        """Gives the user's own model the trained weights; returns whether that works."""
        if not self.of_instance:
            return False
        forms = [(tuple(variable.shape), variable.dtype) for variable in self.given.weights]
        if forms != [(array.shape, array.dtype.name) for array in weights]:
            return False
        self.given.set_weights(weights)
        return True


def _compiled(model: Any, given: Collection[str]) -> dict[str, Any]:
    """What a model was compiled with, as settings of a run, but for those that are given."""
    if not isinstance(model, keras.Model) or not model.compiled:
        return {}
    loss, weights = compat.compiled_loss(model) or (None, None)
    found = {"loss": keras.tree.map_structure(lambda each: getattr(each, "inner", each), loss)}
    if "loss" not in given:
        found["loss_weights"] = weights
    if "optimizer" not in given and (one := model.optimizer) is not None:
        found["optimizer"] = optimizer(getattr(one, "inner_optimizer", one))
    if not any(isinstance(each, DividedLoss) for each in keras.tree.flatten(loss)):  # as a run compiles its model
        found["metrics"], found["weighted_metrics"] = compat.user_metrics(model)
    return {name: value for name, value in found.items() if value is not None and name not in given}


def _check_same(model: keras.Model, other: keras.Model, x: Any) -> None:
    """Raises UserError if a copy computes something else than the model: what was set on it later is in no config."""
    try:
        found = [tf.nest.flatten(each(x, training=False)) for each in (model, model, other)]
    except (ValueError, TypeError, tf.errors.InvalidArgumentError):  # it does not take the data, which is said later
        return
    for ours, again, theirs in zip(*found, strict=True):
        same, steady = (np.allclose(ours, each, rtol=1e-3, atol=1e-5, equal_nan=True) for each in (theirs, again))
        if steady and not same:  # or else it draws random numbers in inference, too
            raise UserError(
                f"model {model.name!r} computes something else when it is made again of its config, as each run does: "
                "give the function that makes it, and not the model"
            )


def _names(model: keras.Model, rules: Sequence[Any]) -> Mapping[str, str]:
    """Other names for layers that Keras has numbered, so that a cell may be run twice; none where rules need the old.

    Raises:
        UserError: the rules select something else by the old names than by the new.
    """
    names = numbered_names(model)
    paths = variable_paths(model)
    renamed = ["/".join(names.get(part, part) for part in path.split("/")) for path in paths]
    old, new = (_selection(rules, each) for each in (paths, renamed))
    if old is None or new is None or old == new:
        return names if old is None or new is not None else {}
    different = next(number for number, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
    raise UserError(
        f"Keras has numbered layers of {model.name}: {paths[different]!r} would be {renamed[different]!r} in a new "
        "process, and the rules select something else by these names than by those: give the layers names, such as "
        "Dense(10, name='head')"
    )


def _selection(rules: Sequence[Any], paths: Sequence[str]) -> list[int | None] | None:
    """The number of the rule of each path; None if the table does not fit them."""
    table = parse_rules(rules)
    found = [first_match(table, path) for path in paths]
    if None in found or len(set(found)) < len(table):
        return None
    return found
