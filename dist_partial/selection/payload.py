"""What is sent for one gradient, and how many bytes that is."""

import fractions
import re
from collections.abc import Sequence
from typing import Any, NamedTuple


class Payload(NamedTuple):
    """Describes what one replica hands over to a 'sum' or 'gather' after the steps s, s % every == offset % every.

    Examples:
        >>> Payload("sum", bytes=100, every=10).times(first=0, last=25)
        2
    """

    kind: str
    bytes: int
    every: int = 1
    offset: int = 0

    def times(self, first: int, last: int) -> int:
        """How often it travels after the steps first + 1 to last."""
        return (last - self.offset) // self.every - (first - self.offset) // self.every


def nic_bytes(kind: str, payload: int | fractions.Fraction, workers: int) -> fractions.Fraction:
    """Counts the bytes that leave the network interface of each of N workers when each hands over a payload.

    Of a sum 2 (N-1)/N of the payload, by a ring or by our own connections (Patarasuk & Yuan 2009, "Bandwidth optimal
    all-reduce algorithms"); of a gather N-1 times the payload, which is N/2 times what a sum costs.

    Args:
        kind: 'sum' or 'gather'.
        payload: bytes that one worker hands over.
        workers: how many there are, with one replica each.

    Examples:
        >>> [int(nic_bytes(kind, 100, workers=4)) for kind in ("sum", "gather")]
        [150, 300]
    """
    factors = {"sum": fractions.Fraction(2 * (workers - 1), workers), "gather": fractions.Fraction(workers - 1)}
    return factors[kind] * payload


def average_bytes(payloads: Sequence[Any], workers: int | None = None) -> int | float:
    """Averages the bytes a step of payloads that travel every so many steps, or what each worker's interface sends.

    Examples:
        >>> payloads = [Payload("sum", 100), Payload("gather", 40, every=10)]
        >>> average_bytes(payloads), average_bytes(payloads, workers=4)
        (104, 162)
    """
    sizes = [m.bytes if workers is None else nic_bytes(m.kind, m.bytes, workers) for m in payloads]
    return exact_number(sum(fractions.Fraction(size, m.every) for size, m in zip(sizes, payloads, strict=True)))


def exact_number(value: fractions.Fraction | int) -> int | float:
    """Returns an int where the value is whole, else a float.

    Examples:
        >>> exact_number(fractions.Fraction(6, 2)), exact_number(fractions.Fraction(1, 2))
        (3, 0.5)
    """
    return int(value) if value == int(value) else float(value)


def itemsize(dtype: str) -> int:
    """Returns the bytes of one element; `bfloat16` is not a NumPy name, so the size is read off the name.

    Examples:
        >>> itemsize("bfloat16"), itemsize("float32")
        (2, 4)
    """
    return int(re.sub(r"\D", "", dtype.replace("bfloat", "float"))) // 8
