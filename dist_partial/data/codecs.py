"""Text to symbol ids and back."""

from typing import Protocol

import numpy as np

SHAPES = 'aA0 \n_"(=.'
"""One symbol for each shape of a byte: letter, capital, digit, space, newline, underscore, quote, bracket,
operator, and other punctuation."""


class Codec(Protocol):
    """Turns a prompt into ids and ids into text, for sampling.

    Examples:
        >>> class Cases:
        ...     size = 2
        ...     def encode(self, text):
        ...         return np.array([character.isupper() for character in text], np.int32)
        ...     def decode(self, ids):
        ...         return "".join("aA"[i] for i in ids)
        >>> from dist_partial.data import tokenized_text
        >>> data = tokenized_text(Cases, window=32, limit=500_000, evaluation_share=0.1)
        >>> set(data.codec.decode(data.train.fetch(np.arange(100))[0].reshape(-1))) == set("aA")
        True
    """

    @property
    def size(self) -> int:
        """How many symbols there are; ids are in [0, size)."""

    def encode(self, text: str) -> np.ndarray:
        """Text to int32 ids [n]."""

    def decode(self, ids: np.ndarray) -> str:
        """Integer ids [n] to text."""


class ByteCodec:
    """Encodes text as UTF-8 bytes: 256 symbols.

    Examples:
        >>> codec = ByteCodec()
        >>> codec.decode(codec.encode("def f"))
        'def f'
    """

    size = 256

    def encode(self, text: str) -> np.ndarray:
        """Text to its UTF-8 bytes, int32 [n]; what UTF-8 cannot say becomes '?'."""
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """Bytes [n] to text; invalid UTF-8, such as half a character, becomes U+FFFD."""
        return np.asarray(ids).astype(np.uint8).tobytes().decode("utf-8", "replace")


class ShapeCodec:
    """Encodes each UTF-8 byte as its shape: ten symbols, so `def f(x1):` reads `aaa a(a0(.`.

    Examples:
        >>> codec = ShapeCodec()
        >>> codec.decode(codec.encode("def f(x1):"))
        'aaa a(a0(.'
    """

    size = len(SHAPES)

    def encode(self, text: str) -> np.ndarray:
        """Text to the shapes of its UTF-8 bytes, int32 [n]."""
        return SHAPE_OF_BYTE[ByteCodec().encode(text)].astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """Shapes [n] to the symbols that stand for them."""
        return "".join(SHAPES[i] for i in np.asarray(ids).tolist())


def _shape_of_byte() -> np.ndarray:
    """The table of `SHAPE_OF_BYTE`."""
    kinds = {" ": " \t\r\v\f", "\n": "\n", "_": "_", '"': "\"'`", "(": "()[]{}", "=": "=+-*/%<>&|^~!@"}
    table = np.full(256, SHAPES.index("."), np.uint8)
    for byte in range(256):
        character = chr(byte)
        if character.islower() or byte >= 128:  # a part of a longer character, in most texts a letter
            table[byte] = SHAPES.index("a")
        elif character.isupper():
            table[byte] = SHAPES.index("A")
        elif character.isdigit():
            table[byte] = SHAPES.index("0")
    for symbol, characters in kinds.items():
        table[[ord(c) for c in characters]] = SHAPES.index(symbol)
    return table


SHAPE_OF_BYTE = _shape_of_byte()
"""uint8 [256]: the shape, an index into `SHAPES`, of each byte."""
