"""Random numbers of examples: each a function of (seed of the run, epoch, index of the example) alone.

So they are the same on any number of workers and replicas, in any number of threads and processes, and after a resume.
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def draws(seed: int, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Draws a number for each example, uint64 [b], from int64 [b] epochs and indices.

    By the finalizer of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators").

    Examples:
        >>> some, again = (draws(7, np.array([0, 0, 1]), np.array([3, 4, 3])) for _ in range(2))
        >>> len(set(some.tolist())), (some == again).all().item()
        (3, True)
    """
    return another(another(_mixed(np.uint64(seed) * np.ones(1, np.uint64)), epochs), indices)


def another(state: np.ndarray, number: np.ndarray | int) -> np.ndarray:
    """Draws from earlier draws, uint64 [b], and a number of 0 or more, one for all or int64 [b].

    Examples:
        >>> first = draws(7, np.zeros(1, np.int64), np.arange(1))
        >>> (another(first, 0) != another(first, 1)).item()
        True
    """
    with np.errstate(over="ignore"):  # it is to wrap around
        return _mixed(state + _GOLDEN * (np.asarray(number).astype(np.uint64) + np.uint64(1)))


def seeds(state: np.ndarray) -> np.ndarray:
    """Splits draws, uint64 [b], into seeds as `tf.random.stateless_uniform` takes them, int32 [b, 2].

    Examples:
        >>> seeds(draws(7, np.zeros(3, np.int64), np.arange(3))).shape
        (3, 2)
    """
    return state.view(np.int32).reshape(-1, 2)


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
