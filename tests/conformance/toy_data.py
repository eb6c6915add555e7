"""Small data that can be learned: ROWS rows each, drawn by NumPy."""

import numpy as np

from tests.conformance.case import ROWS


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def features(seed: int, *shape: int) -> np.ndarray:
    """float64 [ROWS, *shape], normally distributed."""
    return rng(seed).normal(size=(ROWS, *shape))


def ids(seed: int, most: int, *shape: int, least: int = 0) -> np.ndarray:
    """int32 [ROWS, *shape] in [least, most)."""
    return rng(seed).integers(least, most, (ROWS, *shape)).astype(np.int32)


def classes(x: np.ndarray, count: int, seed: int = 90) -> np.ndarray:
    """int32 [ROWS]: the class of each row, by a random linear map."""
    flat = x.reshape(ROWS, -1)
    return np.argmax(flat @ rng(seed).normal(size=(flat.shape[1], count)), axis=1).astype(np.int32)


def targets(x: np.ndarray, count: int = 1, seed: int = 91) -> np.ndarray:
    """float64 [ROWS, count]: a bent linear map of each row."""
    flat = x.reshape(ROWS, -1)
    return np.tanh(flat @ rng(seed).normal(size=(flat.shape[1], count)) / np.sqrt(flat.shape[1]))


def one_hot(labels: np.ndarray, count: int) -> np.ndarray:
    return np.eye(count)[labels]


def lengths(seed: int, most: int, least: int = 2) -> np.ndarray:
    """int32 [ROWS] in [least, most], the lengths of sequences."""
    return ids(seed, most + 1, least=least)


def padded(values: np.ndarray, count: np.ndarray, pad: float = 0) -> np.ndarray:
    """Writes `pad` behind the first `count` steps of each row; a copy."""
    result = values.copy()
    result[np.arange(values.shape[1]) >= count[:, None]] = pad
    return result


def words(seed: int, vocabulary: list[str], *shape: int) -> np.ndarray:
    """Object array [ROWS, *shape] of words."""
    return np.array(vocabulary, dtype=object)[ids(seed, len(vocabulary), *shape)]


def images(seed: int, size: int = 8, channels: int = 1) -> np.ndarray:
    """float64 [ROWS, size, size, channels]: a bright square somewhere, and noise."""
    draw = rng(seed)
    result = 0.1 * draw.normal(size=(ROWS, size, size, channels))
    for row, (top, left) in enumerate(draw.integers(0, size - 3, (ROWS, 2))):
        result[row, top : top + 3, left : left + 3] += 1
    return result


def quadrants(image: np.ndarray) -> np.ndarray:
    """int32 [ROWS]: in which quarter of the image the light is."""
    half = image.shape[1] // 2
    parts = [image[:, a : a + half, b : b + half].sum((1, 2, 3)) for a in (0, half) for b in (0, half)]
    return np.argmax(np.stack(parts, axis=1), axis=1).astype(np.int32)
