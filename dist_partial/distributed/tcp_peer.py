"""The bytes of one connection between two workers, as far as they go without waiting.

Data leaves from where it is, behind its header, and arrives where it belongs; what has come beyond it, the next header
as a rule, is read by the same system call and kept (`tcp_channel`). With tags, what is sent or received is hashed slice
by slice.
"""

import collections
import hmac
import ssl
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

from dist_partial.distributed.handshake import Link
from dist_partial.errors import Ending, Fault

_SLICE = 2**20  # bytes of one connection that are sent, or received, before the next has its turn
_PIECES = 64  # of which they are at most

_Sent = Callable[[], None] | None


class Peer:
    """Moves the bytes of the connection to another worker; for one thread, but that any may append to `outbox`.

    Attributes:
        rank: the other worker's.
        address: its 'host:port'.
        link: the connection.
        lost: why nothing more will come from it, or None.
        heard: when a byte last came; infinite while it is not read.
        spoke: when a byte last left.
        outbox: messages that are to leave: header, data, and what to call once their bytes are no longer needed.
        later: the same for those that leave only when there is nothing in the outbox.
        full: whether the system takes nothing more for now.
        incoming: reads what comes: yields what to fill, or None for nothing yet, and is sent how much of it is filled.
        wanted: what it has yielded.
    """

    def __init__(self, rank: int, address: str, link: Link) -> None:
        self.rank, self.address, self.link = rank, address, link
        link.socket.setblocking(False)
        self.lost: Ending | None = None
        self.heard = self.spoke = time.monotonic()
        self.outbox: collections.deque[tuple[bytes, Any, _Sent]] = collections.deque()
        self.later: collections.deque[tuple[bytes, Any, _Sent]] = collections.deque()
        self.full = False
        self.incoming: Generator[memoryview | None, Any, None]
        self.wanted: memoryview | None = None
        self._begun = False  # more of what was in the outbox is to come from `_pieces`
        self._broken = False  # nothing can be sent
        self._pieces = self._cut()
        self._leaving: list[tuple[memoryview, _Sent]] = []

    def __str__(self) -> str:
        return f"worker {self.rank} ({self.address})"

    def busy(self) -> bool:
        """Whether anything is to leave."""
        return bool(self._leaving or self._begun or self.outbox or self.later)

    def send(self) -> None:
        """Sends up to about a slice of what is in the outbox."""
        size = sum(len(view) for view, _ in self._leaving)
        while size < _SLICE and len(self._leaving) < _PIECES:
            piece = next(self._pieces)
            self._begun = piece is not None
            if piece is None:
                break
            self._leaving.append(piece)
            size += len(piece[0])
        if not self._leaving:
            return
        try:
            # Once it is broken, messages are dropped. What that means is for `receive` to say: what the peer has sent
            # before may be all that is needed.
            count = size if self._broken else self.link.channel.send([view for view, _ in self._leaving])
            self.spoke = time.monotonic()
        except BlockingIOError:
            count = 0
        except OSError:
            self._broken, count = True, size
        self.full = count < size
        for i, (view, sent) in enumerate(self._leaving):
            if count < len(view):
                self._leaving[: i + 1] = [(view[count:], sent)]
                return
            count -= len(view)
            if sent:
                sent()
        self._leaving.clear()

    def _cut(self) -> Iterator[tuple[memoryview, _Sent] | None]:
        """What is to leave, with what to call then; None where the outbox is empty."""
        seal = self.link.sending
        while True:
            if not (self.outbox or self.later):
                yield None
                continue
            header, data, sent = (self.outbox or self.later).popleft()
            records = [memoryview(each) for each in (header, data) if len(each)]
            for view in records:
                last = sent if view is records[-1] else None
                for start in range(0, len(view), _SLICE):
                    seal.update(piece := view[start : start + _SLICE])
                    yield piece, None if seal.length or start + _SLICE < len(view) else last
                if seal.length:
                    yield memoryview(seal.tag()), last

    def receive(self) -> None:
        """Takes what one system call gives; raises OSError where the peer has closed, and what `incoming` raises."""
        assert self.wanted is not None
        try:
            count = self.link.channel.receive(self.wanted)
        except BlockingIOError:
            return
        except ssl.SSLError:
            raise self._changed() from None
        self.heard = time.monotonic()
        self.go_on(count)

    def go_on(self, filled: int | None = None) -> None:
        """Says how many bytes of what is wanted are there, and fills what is wanted then from what was kept."""
        self.wanted = self.incoming.send(filled)
        try:
            while self.wanted is not None and (count := self.link.channel.take(self.wanted)):
                self.wanted = self.incoming.send(count)
        except ssl.SSLError:
            raise self._changed() from None

    def record(self, data: Any) -> Generator[memoryview, int, None]:
        """Fills `data`, for `incoming`; raises `Fault` where this is not what the peer has sent."""
        seal, view = self.link.receiving, memoryview(data)
        if not view:
            return
        while view:
            count = yield view[:_SLICE]
            seal.update(view[:count])
            view = view[count:]
        rest = tag = memoryview(bytearray(seal.length))
        while rest:
            rest = rest[(yield rest) :]
        if not hmac.compare_digest(tag, seal.tag()):
            raise self._changed()

    def _changed(self) -> Fault:
        return Fault(
            f"what comes from {self} is not what it has sent: something between the workers changes it, or adds to it; "
            "see who can, and run the same command again"
        )
