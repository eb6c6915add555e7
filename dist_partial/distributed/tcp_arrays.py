"""Memory for what the workers exchange, and the sum of what has come."""

from collections.abc import Sequence

import numpy as np

_BLOCK = 2**15  # elements that are widened at a time, so that they stay in the cache


def aligned(count: int, dtype: np.dtype) -> np.ndarray:
    """Makes an empty array that TensorFlow takes over as it is: one that is not aligned to 64 bytes it copies.

    Examples:
        >>> array = aligned(3, np.dtype(np.float32))
        >>> array.shape, array.ctypes.data % 64
        ((3,), 0)
    """
    size = count * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype)


@np.errstate(all="ignore")  # an overflow under a loss scale is no news, and nobody sees the warnings of threads
def add_up(parts: Sequence[np.ndarray], total: np.ndarray) -> None:
    """Writes the sum of the parts, added in their order, to `total`; half precision is added in float32.

    Examples:
        >>> total = np.empty(2, np.float32)
        >>> add_up([np.float32([1, 2]), np.float32([3, 4])], total)
        >>> total.tolist()
        [4.0, 6.0]
    """
    if total.dtype.itemsize > 2 or np.issubdtype(total.dtype, np.integer):
        first, *rest = parts
        for part in rest:
            first = np.add(first, part, out=total)
        if first is not total:  # the only one
            total[:] = first
        return
    for start in range(0, len(total), _BLOCK):
        block = slice(start, start + _BLOCK)
        wide = parts[0][block].astype(np.float32)
        for part in parts[1:]:
            wide += part[block].astype(np.float32)
        total[block] = wide
