"""What is sent for one gradient, and how many bytes that is."""

import fractions
import re
from collections.abc import Sequence
from typing import Any, NamedTuple


class Payload(NamedTuple):
    """Describes what one replica hands over after the steps s with s % every == offset % every.

    Its kind is 'sum', 'gather', or 'all-to-all': of its bytes every replica gets an equal part.

    Examples:
        >>> Payload("sum", bytes=100, every=10).times(first=0, last=25)
        2
    """

    kind: str
    bytes: int | fractions.Fraction  # of what one of the replicas sends for all, each its part
    every: int = 1
    offset: int = 0
    warm_up: int = 0  # steps at the beginning, after each of which it travels

    def of_worker(self, local: int) -> "Payload":
        """What a worker of so many replicas hands over: of a sum its own total, else what each of them gives."""
        return self if self.kind == "sum" else self._replace(bytes=self.bytes * local)

    def times(self, first: int, last: int) -> int:
        """How often it travels after the steps first + 1 to last."""
        warm = min(last, self.warm_up) - min(first, self.warm_up)
        first, last = max(first, self.warm_up), max(last, self.warm_up)
        return warm + (last - self.offset) // self.every - (first - self.offset) // self.every


class Peers(NamedTuple):
    """Says who exchange gradients.

    Attributes:
        replicas: how many.
        local: how many of them share a network interface.
        all_to_all: whether each can send every other something of its own.

    Examples:
        >>> several = Peers(replicas=4, local=2)  # two workers; each sends a sum once, and what is gathered twice
        >>> several.cost([Payload("sum", 100)]), several.cost([Payload("gather", 100)])
        (100, 200)
    """

    replicas: int = 2
    local: int = 1
    all_to_all: bool = True

    def cost(self, payloads: Sequence[Payload]) -> int | float:
        """Counts the bytes that leave each worker when each of its replicas hands over these payloads."""
        # Two workers are the fewest between which anything travels.
        return average_bytes([each.of_worker(self.local) for each in payloads], max(2, self.replicas // self.local))


PAIR = Peers()


def nic_bytes(kind: str, payload: int | fractions.Fraction, workers: int) -> fractions.Fraction:
    """Counts the bytes that leave the network interface of each of N workers when each hands over a payload.

    Of a sum 2 (N-1)/N of the payload, by a ring or by our own connections (Patarasuk & Yuan 2009, "Bandwidth optimal
    all-reduce algorithms"); of a gather N-1 times the payload, which is N/2 times what a sum costs; all of what is
    handed over for all but the worker's own part.

    Args:
        kind: 'sum', 'gather' or 'all-to-all'.
        payload: bytes that one worker hands over.
        workers: how many there are, with one replica each.

    Examples:
        >>> [int(nic_bytes(kind, 100, workers=4)) for kind in ("sum", "gather", "all-to-all")]
        [150, 300, 75]
    """
    parts_of_each = {"sum": 2, "gather": workers, "all-to-all": 1}  # of a payload cut into one part a worker
    return fractions.Fraction(parts_of_each[kind] * (workers - 1), workers) * payload


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
