"""Reads the parts of a batch at once, since what takes time is waiting for a disk or a network."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dist_partial.errors import Fault, UserError
from dist_partial.files import MISTAKES

_reads = 8  # at once, in a process, where `run.readers` is not bound


@functools.cache
def _pool(reads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(reads, "dist_partial read")  # starts no thread before it is used


@contextlib.contextmanager
def reads_at_once(count: int | None) -> Iterator[None]:
    """Sets how many reads `read_parts` makes at a time, of all batches together; None leaves it at 8.

    Examples:
        >>> with reads_at_once(2):
        ...     read_parts(lambda indices: [b"%d" % len(indices)] * len(indices), np.arange(4)).tolist()
        [b'2', b'2', b'2', b'2']
    """
    global _reads
    before, _reads = _reads, count or _reads
    try:
        yield
    finally:
        _reads = before


def read_parts(read: Callable[[np.ndarray], list[bytes]], indices: np.ndarray) -> np.ndarray:
    """Reads bytes of examples by several threads, each a part of them in ascending order.

    Args:
        read: gives the bytes of the examples `indices`, int64 [part].
        indices: int64 [b].

    Returns:
        Bytes, object [b].

    Raises:
        Exception: what `read` raises first.

    Examples:
        >>> read_parts(lambda indices: [bytes([i]) for i in indices], np.array([66, 65])).tolist()
        [b'B', b'A']
    """
    order, reads = np.argsort(indices), _reads
    parts = np.array_split(indices[order], min(reads, max(len(order), 1)))
    found = np.empty(len(order), object)
    for place, content in zip(order, (each for part in _pool(reads).map(read, parts) for each in part), strict=True):
        found[place] = content
    return found


def unreadable(place: str, error: OSError) -> UserError | Fault:
    """Makes the ending of a run in which a file of the data cannot be read.

    Examples:
        >>> import errno
        >>> unreadable("a.jpg", FileNotFoundError(errno.ENOENT, "No such file or directory"))
        UserError('cannot read a.jpg: No such file or directory')
    """
    return (UserError if error.errno in MISTAKES else Fault)(f"cannot read {place}: {error.strerror or error}")
