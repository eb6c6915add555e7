"""Encodes values in few bits."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

SCALED = 256  # values that share a scale
FLOATS = {32: tf.float32, 16: tf.bfloat16}
LEVELS = {8: 256, 4: 16, 2: 4, 1.6: 3, 1: 2}  # by bits: how many there are
# The outermost level, over the mean magnitude: what errs least for normal values (Max 1960, "Quantizing for minimum
# distortion", uniform case). With more levels the largest value is the outermost.
OUTERMOST = {2: 1.872, 1.6: 1.534, 1: 1.0}


def encode_values(values: tf.Tensor, bits: float) -> tf.Tensor:
    """Encodes flat floating [n] as uint8 [`value_bytes(n, bits)`].

    Examples:
        >>> encode_values(tf.constant([1.0, -1.0, 1.0, 1.0]), bits=1).numpy().tolist()  # the scale 1, then 0b1101
        [128, 63, 13]
    """
    if bits in FLOATS:
        return bytes_of(tf.cast(values, FLOATS[int(bits)]))
    count, top, in_byte = values.shape[0], LEVELS[bits] - 1, int(8 / bits)
    groups = ceil(count, SCALED)
    cut = tf.reshape(tf.pad(values, [[0, groups * SCALED - count]]), [groups, SCALED])
    if bits in OUTERMOST:
        members = np.minimum(SCALED, count - SCALED * np.arange(groups))
        outermost = tf.reduce_sum(tf.abs(cut), axis=1) * (OUTERMOST[bits] / members)
    else:
        outermost = tf.reduce_max(tf.abs(cut), axis=1)
    scales = tf.cast(outermost, tf.bfloat16)
    scale = tf.cast(scales, values.dtype)[:, tf.newaxis]
    level = tf.clip_by_value(tf.round((tf.math.divide_no_nan(cut, scale) + 1) * (top / 2)), 0, top)
    size = ceil(count, in_byte)
    levels = tf.reshape(tf.cast(level, tf.int32), [-1])[:count]
    # Several values share a byte, the first as its lowest digit.
    digits = tf.reshape(tf.pad(levels, [[0, size * in_byte - count]]), [size, in_byte])
    packed = tf.reduce_sum(digits * [[LEVELS[bits] ** i for i in range(in_byte)]], axis=1)
    return tf.concat([bytes_of(scales), tf.cast(packed, tf.uint8)], axis=0)


def decode_values(message: tf.Tensor, count: int, bits: float, dtype: tf.DType) -> tf.Tensor:
    """Inverts `encode_values`; bytes beyond those of `count` values are ignored.

    Examples:
        >>> message = encode_values(tf.constant([0.5, -0.5, 0.5]), bits=1)
        >>> decode_values(message, 3, 1, tf.float32).numpy().tolist()
        [0.5, -0.5, 0.5]
    """
    if bits in FLOATS:
        kind = FLOATS[int(bits)]
        return tf.cast(tf.bitcast(tf.reshape(message[: count * kind.size], [count, kind.size]), kind), dtype)
    groups, top, in_byte = ceil(count, SCALED), LEVELS[bits] - 1, int(8 / bits)
    scales = tf.cast(tf.bitcast(tf.reshape(message[: 2 * groups], [groups, 2]), tf.bfloat16), dtype)
    packed = tf.cast(message[2 * groups : value_bytes(count, bits)], tf.int32)
    levels = packed[:, tf.newaxis] // [[LEVELS[bits] ** i for i in range(in_byte)]] % LEVELS[bits]
    unit = tf.cast(2 * tf.reshape(levels, [-1])[:count] - top, dtype) / top
    return unit * tf.repeat(scales, SCALED)[:count]


def value_bytes(count: int, bits: float) -> int:
    """Counts the bytes that `encode_values` makes of `count` values.

    Examples:
        >>> value_bytes(256, bits=4), value_bytes(256, bits=16)  # a scale takes two
        (130, 512)
    """
    if bits in FLOATS:
        return count * int(bits) // 8
    return 2 * ceil(count, SCALED) + ceil(count, int(8 / bits))


def bytes_of(tensor: tf.Tensor) -> tf.Tensor:
    """Views a tensor as flat uint8.

    Examples:
        >>> bytes_of(tf.constant([[1], [256]], tf.int32)).numpy().tolist()
        [1, 0, 0, 0, 0, 1, 0, 0]
    """
    return tf.reshape(tensor if tensor.dtype == tf.uint8 else tf.bitcast(tensor, tf.uint8), [-1])


def index_dtype(block: int) -> tf.DType:
    """Chooses the smallest dtype that indexes a block.

    Examples:
        >>> index_dtype(256), index_dtype(257)
        (tf.uint8, tf.uint16)
    """
    return tf.uint8 if block <= 256 else tf.uint16 if block <= 65536 else tf.int32


def padded(message: tf.Tensor) -> tf.Tensor:
    """Pads flat uint8 to whole words of 4 bytes.

    Examples:
        >>> padded(tf.constant([1, 2, 3, 4, 5], tf.uint8)).numpy().tolist()
        [1, 2, 3, 4, 5, 0, 0, 0]
    """
    return tf.pad(message, [[0, words(message.shape[0]) - message.shape[0]]])


def words(size: int) -> int:
    """Rounds a number of bytes up to whole words of 4.

    Examples:
        >>> words(4), words(5)
        (4, 8)
    """
    return ceil(size, 4) * 4


def ceil(a: int, b: int) -> int:
    """Divides and rounds up.

    Examples:
        >>> ceil(6, 3), ceil(7, 3)
        (2, 3)
    """
    return -(-a // b)


def zeros(shape: Sequence[int], dtype: str) -> np.ndarray:
    """Makes an array of zeros in a TensorFlow dtype's name.

    Examples:
        >>> zeros([2], "bfloat16").tolist(), zeros([2], "bfloat16").dtype.name
        ([0.0, 0.0], 'bfloat16')
    """
    return np.zeros(shape, numpy_dtype(dtype))


def numpy_dtype(dtype: str) -> Any:
    """Translates the name of a TensorFlow dtype.

    Examples:
        >>> np.dtype(numpy_dtype("bfloat16")).itemsize
        2
    """
    return tf.as_dtype(dtype).as_numpy_dtype
