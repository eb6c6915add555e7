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


def encode_values(values: tf.Tensor, bits: float, filled: Sequence[int] | None = None) -> tf.Tensor:
    """Encodes rows of floating [..., n] as uint8 [..., `value_bytes(n, bits)`].

    Args:
        values: the rows.
        bits: of each value.
        filled: of rows [rows, n], how many values each has before zeros that are none; None is all.

    Examples:
        >>> encode_values(tf.constant([1.0, -1.0, 1.0, 1.0]), bits=1).numpy().tolist()  # the scale 1, then 0b1101
        [128, 63, 13]
    """
    if bits in FLOATS:
        return bytes_of(tf.cast(values, FLOATS[int(bits)]))
    rows, count = values.shape[:-1].as_list(), values.shape[-1]
    top, in_byte = LEVELS[bits] - 1, int(8 / bits)
    groups = ceil(count, SCALED)
    cut = tf.reshape(_filled(values, groups * SCALED), [*rows, groups, SCALED])
    if bits in OUTERMOST:
        whole = np.array(count if filled is None else filled)[..., np.newaxis]
        members = np.clip(whole - SCALED * np.arange(groups), 1, SCALED)
        outermost = tf.reduce_sum(tf.abs(cut), axis=-1) * (OUTERMOST[bits] / members)
    else:
        outermost = tf.reduce_max(tf.abs(cut), axis=-1)
    scales = tf.cast(outermost, tf.bfloat16)
    scale = tf.cast(scales, values.dtype)[..., tf.newaxis]
    level = tf.clip_by_value(tf.round((tf.math.divide_no_nan(cut, scale) + 1) * (top / 2)), 0, top)
    size = ceil(count, in_byte)
    levels = tf.reshape(tf.cast(level, tf.int32), [*rows, -1])[..., :count]
    # Several values share a byte, the first as its lowest digit.
    digits = tf.reshape(_filled(levels, size * in_byte), [*rows, size, in_byte])
    packed = tf.reduce_sum(digits * [LEVELS[bits] ** i for i in range(in_byte)], axis=-1)
    return tf.concat([bytes_of(scales), tf.cast(packed, tf.uint8)], axis=-1)


def decode_values(message: tf.Tensor, count: int, bits: float, dtype: tf.DType) -> tf.Tensor:
    """Inverts `encode_values`: uint8 [..., bytes] -> [..., count]; bytes beyond those of `count` values are ignored.

    Examples:
        >>> message = encode_values(tf.constant([0.5, -0.5, 0.5]), bits=1)
        >>> decode_values(message, 3, 1, tf.float32).numpy().tolist()
        [0.5, -0.5, 0.5]
    """
    rows = message.shape[:-1].as_list()
    if bits in FLOATS:
        kind = FLOATS[int(bits)]
        return tf.cast(
            tf.bitcast(tf.reshape(message[..., : count * kind.size], [*rows, count, kind.size]), kind), dtype
        )
    groups, top, in_byte = ceil(count, SCALED), LEVELS[bits] - 1, int(8 / bits)
    scales = tf.cast(tf.bitcast(tf.reshape(message[..., : 2 * groups], [*rows, groups, 2]), tf.bfloat16), dtype)
    packed = tf.cast(message[..., 2 * groups : value_bytes(count, bits)], tf.int32)
    levels = packed[..., tf.newaxis] // [LEVELS[bits] ** i for i in range(in_byte)] % LEVELS[bits]
    unit = tf.cast(2 * tf.reshape(levels, [*rows, -1])[..., :count] - top, dtype) / top
    return unit * tf.repeat(scales, SCALED, axis=-1)[..., :count]


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
    """Views rows [..., n] as uint8 [..., bytes].

    Examples:
        >>> bytes_of(tf.constant([[1], [256]], tf.int32)).numpy().tolist()
        [[1, 0, 0, 0], [0, 1, 0, 0]]
    """
    return tf.reshape(tf.bitcast(tensor, tf.uint8), [*tensor.shape[:-1], tensor.shape[-1] * tensor.dtype.size])


def encode_places(places: tf.Tensor, bits: int) -> tf.Tensor:
    """Encodes rows of integers below 2**bits, [..., n], as uint8 [..., `place_bytes(n, bits)`].

    Examples:
        >>> encode_places(tf.constant([1, 2, 3]), bits=4).numpy().tolist()  # the first as the lowest bits
        [33, 3]
    """
    if bits in (8, 16):
        return bytes_of(tf.cast(places, {8: tf.uint8, 16: tf.uint16}[bits]))
    rows, count = places.shape[:-1].as_list(), places.shape[-1]
    each = tf.bitwise.right_shift(places[..., tf.newaxis], tf.range(bits)) % 2
    size = place_bytes(count, bits)
    digits = tf.reshape(_filled(tf.reshape(each, [*rows, count * bits]), 8 * size), [*rows, size, 8])
    return tf.cast(tf.reduce_sum(digits * [2**i for i in range(8)], axis=-1), tf.uint8)


def decode_places(message: tf.Tensor, count: int, bits: int) -> tf.Tensor:
    """Inverts `encode_places`: uint8 [..., bytes] -> int32 [..., count].

    Examples:
        >>> decode_places(tf.constant([33, 3], tf.uint8), count=3, bits=4).numpy().tolist()
        [1, 2, 3]
    """
    rows = message.shape[:-1].as_list()
    if bits == 16:
        return tf.cast(tf.bitcast(tf.reshape(message, [*rows, count, 2]), tf.uint16), tf.int32)
    found = tf.cast(message, tf.int32)
    if bits == 8:
        return found
    each = tf.bitwise.right_shift(found[..., tf.newaxis], tf.range(8)) % 2
    digits = tf.reshape(tf.reshape(each, [*rows, -1])[..., : count * bits], [*rows, count, bits])
    return tf.reduce_sum(digits * [2**i for i in range(bits)], axis=-1)


def place_bits(block: int) -> int:
    """Counts the bits that tell the places of a block apart.

    Examples:
        >>> place_bits(256), place_bits(257), place_bits(1)
        (8, 9, 1)
    """
    return max(1, (block - 1).bit_length())


def place_bytes(count: int, bits: int) -> int:
    """Counts the bytes that `encode_places` makes of `count` places.

    Examples:
        >>> place_bytes(3, bits=4)
        2
    """
    return ceil(count * bits, 8)


def padded(message: tf.Tensor) -> tf.Tensor:
    """Pads rows of uint8 to whole words of 4 bytes.

    Examples:
        >>> padded(tf.constant([1, 2, 3, 4, 5], tf.uint8)).numpy().tolist()
        [1, 2, 3, 4, 5, 0, 0, 0]
    """
    return _filled(message, words(message.shape[-1]))


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


def _filled(rows: tf.Tensor, length: int) -> tf.Tensor:
    """Fills rows [..., n] with zeros up to a length."""
    return tf.pad(rows, [[0, 0]] * (rows.shape.rank - 1) + [[0, length - rows.shape[-1]]])
