"""What the workers of a `fit` have in common: the same program, the first one's weights, and one way to end."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial.checkpoints.fingerprints import digest, variables
from dist_partial.distributed import consistency
from dist_partial.distributed.worker_backend import WorkerBackend
from dist_partial.errors import Ending, of_graph, raised

_PACK_BYTES = 2**24  # of one message, a larger variable aside


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
    unlike = differing(backend, arrays)
    for pack in _packs(unlike, [array.nbytes for array in arrays]):
        sent = broadcast(backend, np.frombuffer(b"".join(arrays[i].tobytes() for i in pack), np.uint8))
        ends = np.cumsum([arrays[i].nbytes for i in pack])
        for i, data in zip(pack, np.split(sent, ends[:-1]), strict=True):
            chosen[i].assign(np.frombuffer(data.tobytes(), arrays[i].dtype).reshape(arrays[i].shape))
    return bool(unlike)


def differing(backend: WorkerBackend | None, arrays: Sequence[np.ndarray]) -> list[int]:
    """Finds which arrays are not the same on all workers: the same answer on each; all call it at the same point.

    Examples:
        >>> differing(None, [np.zeros(3)])  # without other workers
        []
    """
    if backend is None:
        return []
    # Without any as well: what all send to all shows where a worker has left something out.
    everyone = [text.decode().split() for text in backend.gather(" ".join(map(digest, arrays)).encode())]
    return [i for i, prints in enumerate(zip(*everyone, strict=True)) if len(set(prints)) > 1]


def together(backend: WorkerBackend | None, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Sums arrays over the workers, all of a dtype in one message; all call it at the same point.

    Examples:
        >>> [total.tolist() for total in together(None, [np.ones(2), np.zeros([1, 1])])]  # without other workers
        [[1.0, 1.0], [[0.0]]]
    """
    sums = list(arrays)
    if backend is None:
        return sums
    for dtype in sorted({array.dtype for array in arrays}, key=str):
        chosen = [i for i, array in enumerate(arrays) if array.dtype == dtype]
        total = backend.sum(np.concatenate([arrays[i].ravel() for i in chosen]))
        ends = np.cumsum([arrays[i].size for i in chosen])
        for i, part in zip(chosen, np.split(total, ends[:-1]), strict=True):
            sums[i] = part.reshape(arrays[i].shape)
    return sums


def _packs(chosen: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Divides what is chosen, in order, into what travels in one message each: a model need not fit in twice."""
    pack: list[int] = []
    for i in chosen:
        if pack and sum(sizes[k] for k in pack) + sizes[i] > _PACK_BYTES:
            yield pack
            pack = []
        pack.append(i)
    if pack:
        yield pack


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
    make = type(model).make_train_function

    def make_train_function(force: bool = False) -> None:
        make(model, force)
        if getattr(model.train_function, "func", None) is not _named:
            model.train_function = functools.partial(_named, backend, model.train_function)

    model.make_train_function = make_train_function
    if model.train_function is not None:
        model.make_train_function()


def _named(backend: WorkerBackend, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except tf.errors.OpError as error:
        if ending := backend.lost() or of_graph(error.message):
            raise ending from error
        raise
    except RuntimeError as error:  # what TensorFlow makes of Ctrl-C in a function that waits for the others
        if KeyboardInterrupt.__name__ in str(error):
            raise KeyboardInterrupt from None
        raise
