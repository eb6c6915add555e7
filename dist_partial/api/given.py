"""What `train` is given, as the factories that a run is made of: models, data, optimizers, replicas."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial import compat, session
from dist_partial.api.words import in_python
from dist_partial.config.bindings import only_in_python
from dist_partial.config.gin_text import has_name
from dist_partial.config.settings import PRECISIONS
from dist_partial.data import Dataset, dataset, fetch, keep_examples, kept_examples, looks
from dist_partial.data.adapt import makes_data
from dist_partial.distributed.replicas import ReplicaOptions, Replicas
from dist_partial.errors import UserError, calling, first_line
from dist_partial.files import replacing
from dist_partial.models import ModelCopy, keras_file, numbered_names
from dist_partial.selection.paths import variable_paths
from dist_partial.selection.rules import first_match, parse_rules
from dist_partial.step import layer_state
from dist_partial.step.optimizers import another
from dist_partial.validation import nearest, shown


class Data:
    """Makes the data set of a run of whatever holds the examples, once.

    Args:
        given: a `Dataset`, what `data.dataset` takes, or a function without arguments that makes one of these.
        evaluation: the examples held out, if `given` does not hold them.

    Examples:
        >>> x, y = np.zeros([40, 2], np.float32), np.zeros([40], np.int32)
        >>> data = Data((x, y), None)()
        >>> len(data.train), len(data.evaluation)
        (36, 4)
    """

    def __init__(self, given: Any, evaluation: Any) -> None:
        self.given, self._evaluation = given, evaluation
        self._made: Dataset | None = None
        self._named = False

    def __call__(self) -> Dataset:
        if self._made is None:
            self._named = makes_data(self.given) and self._evaluation is None and has_name(self.given)
            # A function is given as it is, for a tf.data.Dataset is made again by it at each beginning.
            self._made = dataset(self.given, self._evaluation, name=getattr(self.given, "__name__", "data"))
        return self._made

    def kept(self, folder: Path) -> Callable[..., Any]:
        """A factory that another process can name; it may read a few examples from the folder."""
        if self._named:
            return self.given
        path = folder / "examples.npz"
        try:
            keep_examples(path, self())
        except Exception as error:  # of examples that no file of NumPy holds; the run goes on
            return functools.partial(only_in_python, what=f"run.data is {self().name!r} ({first_line(error)})")
        return functools.partial(kept_examples, path=str(path.absolute()))


class Model:
    """Makes the model of a run, of one that the user has made already, or by the user's function.

    Attributes:
        given: the user's.
        made: the one that is trained; None before.
        notes: lines to say of it.

    Args:
        given: a model, or a function without arguments that makes one.
        data: of the run, an example of which makes the variables of a model that has none.
        rules: the table.
    """

    def __init__(self, given: Any, data: Data, rules: Sequence[Any]) -> None:
        self.given = given
        self.made: keras.Model | None = None
        self.notes: tuple[str, ...] = ()
        self._copy: ModelCopy | None = None
        self._lost = ""
        if not isinstance(given, keras.Model):
            self.__wrapped__ = given  # for `session.numbered_afresh`
            return
        with calling("run.data"):
            source = data().train
            x = fetch(source, np.resize(looks(source), layer_state.batch_size(given) or 2))[0]
            x = tf.nest.map_structure(tf.constant, x)
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
            self.made = self._copy()
            return self.made
        self.made = made = self.given()
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

    def compiled(self) -> dict[str, Any]:
        """What it was compiled with, as arguments of the run."""
        if not self.of_instance or not self.given.compiled:
            return {}
        loss, weights = compat.compiled_loss(self.given) or (None, None)
        loss = keras.tree.map_structure(lambda each: getattr(each, "inner", each), loss)  # of an earlier run
        one = self.given.optimizer
        return {"optimizer": getattr(one, "inner_optimizer", one), "loss": loss, "loss_weights": weights}

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
        lost = self._lost
        if self._copy is not None and not lost:
            kinds = {type(layer) for layer in compat.layers(self._copy.model)}
            here = [kind.__name__ for kind in kinds if kind.__module__ == "__main__" or "<" in kind.__qualname__]
            here += ["Lambda"] if keras.layers.Lambda in kinds else []
            lost = f"it has a layer of class {here[0]}" if here else ""
        if self._copy is not None and not lost and not (going_on and path.exists()):
            try:
                with replacing(path) as partial, session.numbered_afresh():
                    self._copy().save(partial)
            except Exception as error:  # of a class of the user's; the run goes on
                lost = first_line(error)
        if self._copy is None or lost:
            name = getattr(self.given, "name", getattr(self.given, "__name__", "one"))
            return functools.partial(only_in_python, what=f"run.model is {name!r} ({lost})")
        return functools.partial(keras_file, path=str(path.absolute()))

    def give_back(self, weights: Sequence[Any]) -> bool:
        """Gives the user's own model the trained weights; returns whether that works."""
        if not self.of_instance:
            return False
        forms = [(tuple(variable.shape), variable.dtype) for variable in self.given.weights]
        if forms != [(array.shape, array.dtype.name) for array in weights]:
            return False
        self.given.set_weights(weights)
        return True


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


class Optimizer:
    """Makes new optimizers like one.

    Attributes:
        instance: that one.

    Examples:
        >>> make = Optimizer(keras.optimizers.SGD(0.5, momentum=0.9))
        >>> make().momentum, float(make().learning_rate), float(make(learning_rate=0.25).learning_rate)
        (0.9, 0.5, 0.25)
    """

    def __init__(self, instance: keras.optimizers.Optimizer) -> None:
        self.instance = instance

    def __call__(self, learning_rate: Any = None) -> keras.optimizers.Optimizer:
        one, rate = self.instance, learning_rate
        if rate is None:
            current = compat.learning_rate(one)
            rate = current if callable(current) else float(one.get_config()["learning_rate"])
        # One that has been used has slots, which a new one shall not have.
        return type(one).from_config(one.get_config() | {"learning_rate": rate}) if one.built else another(one, rate)


def optimizer(given: Any) -> Any:
    """Makes the factory of an optimizer: of a factory, an optimizer, or the name of one.

    Raises:
        UserError: Keras has no optimizer of that name.

    Examples:
        >>> type(optimizer("adam")()).__name__, optimizer(keras.optimizers.SGD) is keras.optimizers.SGD
        ('Adam', True)
    """
    if isinstance(given, str):
        try:
            given = keras.optimizers.get(given)
        except ValueError:
            names = [name.lower() for name in vars(keras.optimizers) if name[0].isupper()]
            raise UserError(
                f"optimizer: Keras has none called {given!r}{nearest(given, names)}; write a name such as 'adam', or "
                "give one"
            ) from None
    return Optimizer(given) if isinstance(given, keras.optimizers.Optimizer) else given


class _SpokenReplicas(Replicas):
    def say(self, line: str) -> None:
        super().say(in_python(line))


class _Speaking:
    """A factory of replicas, whose lines are in the words of Python."""

    def __init__(self, factory: Callable[[], Replicas], options: ReplicaOptions | None = None) -> None:
        self._factory, self.options = factory, options

    def __call__(self) -> Replicas:
        made = self._factory()
        return _SpokenReplicas(**{field.name: getattr(made, field.name) for field in dataclasses.fields(Replicas)})


def replicas(given: Any) -> Callable[[], Any]:
    """Makes the factory of the replicas: of their number on the CPU, of `ReplicaOptions`, or of a factory.

    Examples:
        >>> replicas(1)().strategy.num_replicas_in_sync
        1
    """
    if type(given) is int:
        given = ReplicaOptions(cpu=given)
    if isinstance(given, ReplicaOptions):
        return _Speaking(given.connect, given)
    if callable(given):
        return _Speaking(given)
    raise UserError(f"replicas is {shown(given)}: write a number, or give a ReplicaOptions(...)")
