"""What `train` is given, as the factories that a run is made of: models, data, optimizers, replicas."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial import compat, session
from dist_partial.config.bindings import only_in_python
from dist_partial.config.gin_text import has_name
from dist_partial.config.settings import PRECISIONS
from dist_partial.data import Dataset, dataset, fetch, keep_examples, kept_examples, looks
from dist_partial.data.adapt import makes_data
from dist_partial.distributed.replicas import ReplicaOptions
from dist_partial.errors import UserError, calling, first_line
from dist_partial.models import ModelCopy, keras_file, numbered_names
from dist_partial.selection.paths import variable_paths
from dist_partial.selection.rules import first_match, parse_rules
from dist_partial.step import layer_state
from dist_partial.step.losses import DividedLoss
from dist_partial.step.optimizers import another
from dist_partial.terminal import say
from dist_partial.validation import shown

_LONGEST = 10_000  # characters in which a configuration holds what a codec keeps


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
            codec = keep_examples(path, self())
        except Exception as error:  # of examples that no file of NumPy holds; the run goes on
            return functools.partial(only_in_python, what=f"run.data is {self().name!r} ({first_line(error)})")
        kept = functools.partial(kept_examples, path=str(path.absolute()))
        if codec is None:
            return kept
        taken = codec.keywords.keys() <= inspect.signature(codec.func).parameters.keys()
        if taken and has_name(codec) and len(str(codec.keywords)) < _LONGEST:
            return functools.partial(kept, codec=codec)
        say(
            f"run.data: no other process can make its codec {codec.func.__name__}, so that dist-partial sample has no "
            "text here: give a class of a module, whose __init__ takes what it keeps, or a function that makes the data"
        )
        return kept


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
        one = self.given.optimizer
        found = {"optimizer": getattr(one, "inner_optimizer", one), "loss_weights": weights}
        found["loss"] = keras.tree.map_structure(lambda each: getattr(each, "inner", each), loss)
        if not any(isinstance(each, DividedLoss) for each in keras.tree.flatten(loss)):  # as a run compiles its model
            found["metrics"], found["weighted_metrics"] = compat.user_metrics(self.given)
        return {name: value for name, value in found.items() if value is not None}

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
        return another(one, rate)


def optimizer(given: Any) -> Any:
    """Makes the factory of an optimizer: of a factory, an optimizer, or the name of one.

    Raises:
        UserError: Keras has no optimizer of that name; single variables are excluded from weight decay.

    Examples:
        >>> type(optimizer("adam")()).__name__, optimizer(keras.optimizers.SGD) is keras.optimizers.SGD
        ('Adam', True)
    """
    if isinstance(given, str):
        try:
            given = keras.optimizers.get(given)
        except ValueError:
            raise UserError(
                f"optimizer: Keras has none called {given!r}; write a name such as 'adam', or give one"
            ) from None
    if not isinstance(given, keras.optimizers.Optimizer):
        return given
    if compat.weight_decay_exclusions(given)[0]:
        raise UserError(
            f"optimizer {given.name!r} excludes single variables from weight decay (var_list), and a run trains a copy "
            "of the model, which has others: name them, such as exclude_from_weight_decay(var_names=['bias'])"
        )
    return Optimizer(given)


def replicas(given: Any) -> Callable[[], Any]:
    """Makes the factory of the replicas: of their number on the CPU, of `ReplicaOptions`, or of a factory.

    Examples:
        >>> replicas(1)().strategy.num_replicas_in_sync
        1
    """
    if type(given) is int:
        given = ReplicaOptions(cpu=given)
    if isinstance(given, ReplicaOptions):
        return given.connect
    if callable(given):
        return given
    raise UserError(f"replicas is {shown(given)}: write a number, or give a ReplicaOptions(...)")
