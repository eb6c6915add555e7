"""Encodes values in few bits."""

import functools
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


def encode_values(rows: Sequence[tf.Tensor], bits: float, filled: Sequence[Sequence[int]] | None = None) -> tf.Tensor:
    """Encodes tensors [parts, n], each with an n of its own, in one message: uint8 [parts, the sum of `value_bytes`].

    All are encoded by the same few operations, whose number would else be what many small tensors cost.

    Args:
        rows: the tensors, floating, of one dtype.
        bits: of each value.
        filled: of each tensor, how many values each part has before zeros that are none; None is all.

    Examples:
        >>> rows = [tf.constant([[1.0, -1.0, 1.0, 1.0]]), tf.constant([[-2.0]])]
        >>> encode_values(rows, bits=1).numpy().tolist()  # the scales 1 and 2, then 0b1101 and 0b0
        [[128, 63, 0, 64, 13, 0]]
    """
    if bits in FLOATS:
        return bytes_of(tf.cast(_side_by_side(rows), FLOATS[int(bits)]))
    counts = [each.shape[-1] for each in rows]
    parts, whole = rows[0].shape[0], [ceil(count, SCALED) * SCALED for count in counts]
    top, in_byte = LEVELS[bits] - 1, int(8 / bits)
    cut = [padded(each, length) for each, length in zip(rows, whole, strict=True)]
    cut = tf.reshape(_side_by_side(cut), [parts, sum(whole) // SCALED, SCALED])
    if bits in OUTERMOST:
        members = _values_of_scales(counts if filled is None else filled, whole)
        outermost = tf.reduce_sum(tf.abs(cut), axis=-1) * (OUTERMOST[bits] / np.maximum(members, 1))
    else:
        outermost = tf.reduce_max(tf.abs(cut), axis=-1)
    scales = tf.cast(outermost, tf.bfloat16)
    scale = tf.cast(scales, cut.dtype)[..., tf.newaxis]
    level = tf.clip_by_value(tf.round((tf.math.divide_no_nan(cut, scale) + 1) * (top / 2)), 0, top)
    digits = _relaid(tf.reshape(level, [parts, sum(whole)]), whole, counts, _digits(counts, bits))
    if in_byte > 1:
        # Several values share a byte, the first as its lowest digit. A product is exact, and faster than a sum.
        weights = tf.constant([[LEVELS[bits] ** i] for i in range(in_byte)], tf.float32)
        digits = tf.reshape(tf.reshape(tf.cast(digits, tf.float32), [-1, in_byte]) @ weights, [parts, -1])
    return tf.concat([bytes_of(scales), tf.cast(digits, tf.uint8)], axis=-1)


def decode_values(messages: tf.Tensor, counts: Sequence[int], bits: float, dtype: tf.DType) -> list[tf.Tensor]:
    """Inverts `encode_values`: uint8 [parts, bytes] -> [parts, count] a count; what follows in a message is ignored.

    Examples:
        >>> messages = encode_values([tf.constant([[0.5, -0.5, 0.5]]), tf.constant([[2.0]])], bits=1)
        >>> [each.numpy().tolist() for each in decode_values(messages, [3, 1], 1, tf.float32)]
        [[[0.5, -0.5, 0.5]], [[2.0]]]
    """
    parts = messages.shape[0]
    if bits in FLOATS:
        kind = FLOATS[int(bits)]
        values = tf.reshape(messages[:, : sum(counts) * kind.size], [parts, sum(counts), kind.size])
        return _apart(tf.cast(tf.bitcast(values, kind), dtype), counts, counts)
    whole, digits = [ceil(count, SCALED) * SCALED for count in counts], _digits(counts, bits)
    groups, size = sum(whole) // SCALED, sum(digits) // int(8 / bits)
    scales = tf.bitcast(tf.reshape(messages[:, : 2 * groups], [parts, groups, 2]), tf.bfloat16)
    units = tf.gather(tf.constant(_units(bits), dtype), tf.cast(messages[:, 2 * groups : 2 * groups + size], tf.int32))
    units = _relaid(tf.reshape(units, [parts, sum(digits)]), digits, counts, whole)
    values = tf.reshape(units, [parts, groups, SCALED]) * tf.cast(scales, dtype)[..., tf.newaxis]
    return _apart(tf.reshape(values, [parts, sum(whole)]), whole, counts)


def _values_of_scales(filled: Sequence[Any], whole: Sequence[int]) -> np.ndarray:
    """Counts the values that share each scale: [parts, scales], or [1, scales] of tensors that are all filled alike.

    Args:
        filled: of each tensor, how many values there are: of each part, or of all alike.
        whole: of each, how many there are with what fills its last scale up.
    """
    found = [
        np.clip(np.reshape(each, [-1, 1]) - SCALED * np.arange(length // SCALED), 0, SCALED)
        for each, length in zip(filled, whole, strict=True)
    ]
    return np.concatenate(found, axis=1)


def _digits(counts: Sequence[int], bits: float) -> list[int]:
    """How many levels the bytes of each of so many values hold."""
    in_byte = int(8 / bits)
    return [ceil(count, in_byte) * in_byte for count in counts]


@functools.cache
def _units(bits: float) -> np.ndarray:
    """What each byte holds, [256, values]: levels from -1 to 1."""
    top, in_byte = LEVELS[bits] - 1, int(8 / bits)
    levels = np.arange(256)[:, np.newaxis] // LEVELS[bits] ** np.arange(in_byte) % LEVELS[bits]
    return (2 * levels - top) / top


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
    digits = tf.reshape(padded(tf.reshape(each, [*rows, count * bits]), 8 * size), [*rows, size, 8])
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


def padded(rows: tf.Tensor, length: int) -> tf.Tensor:
    """Pads rows [..., n] with zeros up to a length.

    Examples:
        >>> padded(tf.constant([1, 2, 3, 4, 5], tf.uint8), words(5)).numpy().tolist()
        [1, 2, 3, 4, 5, 0, 0, 0]
    """
    missing = length - rows.shape[-1]
    return tf.pad(rows, [[0, 0]] * (rows.shape.rank - 1) + [[0, missing]]) if missing else rows


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


def _side_by_side(rows: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.concat(rows, axis=-1) if len(rows) > 1 else rows[0]


def _apart(rows: tf.Tensor, lengths: Sequence[int], counts: Sequence[int]) -> list[tf.Tensor]:
    """Cuts rows [parts, n] into pieces of these lengths, and keeps of each so many values."""
    pieces = tf.split(rows, lengths, axis=-1) if len(lengths) > 1 else [rows]
    return [
        piece if length == count else piece[:, :count]
        for piece, length, count in zip(pieces, lengths, counts, strict=True)
    ]


def _relaid(rows: tf.Tensor, lengths: Sequence[int], counts: Sequence[int], wanted: Sequence[int]) -> tf.Tensor:
    """Gives the pieces of rows [parts, n], of which so many values count, other lengths, with zeros to fill them."""
    if list(lengths) == list(wanted):
        return rows
    pieces = zip(_apart(rows, lengths, counts), wanted, strict=True)
    return _side_by_side([padded(piece, length) for piece, length in pieces])
