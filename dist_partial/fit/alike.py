"""What the workers of a `fit` have in common: the same program, the first one's weights, and one way to end."""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial.checkpoints.fingerprints import digest, variables
from dist_partial.distributed import consistency
from dist_partial.distributed.worker_backend import WorkerBackend
from dist_partial.errors import Ending, raised


def broadcast(backend: WorkerBackend | None, array: np.ndarray) -> np.ndarray:
    """Gives all workers the first one's array, of any shape and dtype that is the same on all; all call it.

    Examples:
        >>> broadcast(None, np.arange(3)).tolist()  # without other workers
        [0, 1, 2]
    """
    if backend is None:
        return array
    data = np.frombuffer(array.tobytes().ljust(-(-array.nbytes // 8) * 8, b"\0"), np.int64)
    total = backend.sum(data if backend.rank == 0 else np.zeros_like(data))
    return np.frombuffer(total.tobytes()[: array.nbytes], array.dtype).reshape(array.shape)


def send(backend: WorkerBackend | None, chosen: Sequence[Any]) -> bool:
    """Gives all workers the first one's values of variables where they differ; all call it at the same point.

    Returns:
        Whether any did.

    Examples:
        >>> send(None, [keras.Variable([1.0])])  # without other workers
        False
    """
    if backend is None:
        return False
    arrays = [keras.ops.convert_to_numpy(variable) for variable in chosen]
    whole = hashlib.sha256("".join(digest(array) for array in arrays).encode()).digest()
    if len(set(backend.gather(whole))) == 1:
        return False
    for variable, array in zip(chosen, arrays, strict=True):
        variable.assign(broadcast(backend, array))
    return True


@contextlib.contextmanager
def joined(backend: WorkerBackend | None) -> Iterator[None]:
    """Sends the other workers what has been raised here, with which they end as well.

    Examples:
        >>> with joined(None):
        ...     pass
    """
    try:
        yield
    except Exception as error:
        if backend is not None:
            backend.close(error if isinstance(error, Ending) else raised("", error))
        raise


def begin_alike(backend: WorkerBackend | None, model: keras.Model) -> None:
    """Gives all workers' models the first one's weights, if they are of the same shapes; all call it.

    Random seeds stay each worker's own: by them dropout differs.

    Examples:
        >>> begin_alike(None, keras.Sequential([keras.Input([2]), keras.layers.Dense(1)]))  # without other workers
    """
    shapes = {path: [list(variable.shape), variable.dtype] for path, variable in variables(model).items()}
    check_alike(backend, {"versions": consistency.versions(), "model": shapes})
    send(backend, model.weights)


def check_alike(backend: WorkerBackend | None, facts: dict[str, Any]) -> None:
    """Raises UserError, the same on every worker, if the facts of the workers differ; all call it.

    Examples:
        >>> check_alike(None, {"accumulate": 2})  # without other workers
    """
    if backend is not None:
        consistency.check(backend, facts)


def name_losses(backend: WorkerBackend | None, model: keras.Model) -> None:
    """Has `fit` and `train_on_batch` raise what has become of a worker in place of TensorFlow's error about it.

    Examples:
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        >>> name_losses(None, model)  # without other workers
    """
    if backend is None:
        return
    make = model.make_train_function

    def make_train_function(force: bool = False) -> None:
        make(force)
        if getattr(model.train_function, "func", None) is not _named:
            model.train_function = functools.partial(_named, backend, model.train_function)

    model.make_train_function = make_train_function


def _named(backend: WorkerBackend, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except tf.errors.OpError as error:
        if lost := backend.lost():
            raise lost from error
        raise
