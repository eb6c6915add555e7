"""What `train` is given, as the factories that a run is made of: data, optimizers, replicas; see also `model`."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from dist_partial import compat
from dist_partial.config.bindings import only_in_python
from dist_partial.config.gin_text import has_name
from dist_partial.data import Dataset, dataset, keep_examples, kept_examples
from dist_partial.data.adapt import makes_data
from dist_partial.distributed.replicas import ReplicaOptions
from dist_partial.errors import UserError, first_line
from dist_partial.step.optimizers import another
from dist_partial.terminal import say
from dist_partial.validation import nearest, shown

_LONGEST = 10_000  # characters in which a configuration holds what a codec keeps


class Data:
    """Makes the data set of a run of whatever holds the examples, once.

    Args:
        given: a `Dataset`, what `data.dataset` takes, or a function without arguments that makes one of these.
        evaluation: the examples held out, if `given` does not hold them.

    Examples:
        >>> import numpy as np
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
            names = [name.lower() for name in vars(keras.optimizers) if name[0].isupper()]
            raise UserError(
                f"optimizer: Keras has none called {given!r}{nearest(given, names)}; write a name such as 'adam', or "
                "give one"
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
    raise UserError(
        f"replicas is {shown(given)}: write a number, or give a ReplicaOptions(...), or a function that makes Replicas"
    )
