"""Reads the parts of a batch at once, since what takes time is waiting for a disk or a network."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dist_partial.errors import Fault, UserError
from dist_partial.files import MISTAKES

READS = 8  # at once, in a process

_pool = ThreadPoolExecutor(READS, "dist_partial read")  # starts no thread before it is used


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
    order = np.argsort(indices)
    parts = np.array_split(indices[order], min(READS, max(len(order), 1)))
    found = np.empty(len(order), object)
    for place, content in zip(order, (each for part in _pool.map(read, parts) for each in part), strict=True):
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
