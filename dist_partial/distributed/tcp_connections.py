"""Messages between all workers over their TCP connections: headers and tags, heartbeats, and who is lost.

A message is a header and bytes. One thread sends and receives all of them. It waits until a connection can be read or
written, and moves at most a slice there before the next has its turn: neither a slow worker nor a long hash holds up
the others. Data leaves from where it is, behind its header, and arrives where it belongs; what has come beyond it, the
next header as a rule, is read by the same system call and kept. A connection whose next message this worker is not
ready for is not read until `retry`.

Workers that have nothing to say send a heartbeat; one that is silent for too long, or gone, is lost to the others, and
one that ends may say why. What messages of ops mean is the caller's business (`tcp_backend`).
"""

import collections
import contextlib
import hmac
import math
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from dist_partial.distributed.handshake import Link
from dist_partial.errors import Ending, Fault, Raised, UserError

HEARTBEAT_SECONDS = 5.0  # after which a worker that has nothing to send says that it is there
_GOODBYE_SECONDS = 2.0  # for the last words to leave

_HEADER = struct.Struct("<4sBIQQQ")  # magic, kind, op, run, bytes that follow, bytes of the whole
_MAGIC = b"dpm3"
_HEARTBEAT = 2  # no op's: a sign of life
_REASONS: dict[int, type[Ending]] = {3: UserError, 4: Fault, 5: Raised}  # no op's: why the worker ends, as text
_LONGEST_REASON = 2**16  # bytes
_SLICE = 2**20  # bytes of one connection that are sent, or received, before the next has its turn
_AHEAD = 2**14  # bytes that are read beyond what is wanted


class Message(NamedTuple):
    """Describes the bytes that follow a header.

    Attributes:
        kind: of an op 0 or 1, which mean what the caller likes.
        op: number of the op.
        run: number of its run.
        size: how many they are.
        whole: of how many they are a part.
    """

    kind: int
    op: int
    run: int
    size: int
    whole: int = 0

    def header(self) -> bytes:
        return _HEADER.pack(_MAGIC, *self)


class _Peer:
    """Another worker and the connection to it; only the thread that sends and receives moves bytes."""

    def __init__(self, rank: int, address: str, link: Link) -> None:
        self.rank, self.address, self.link = rank, address, link
        link.socket.setblocking(False)
        self.lost: Ending | None = None  # why nothing more will come from it
        self.heard = self.spoke = time.monotonic()  # when a byte last came, and left; infinite while it is not read
        self.watched = 0  # events that the selector reports
        self.outbox: collections.deque[tuple[bytes, Any, Callable[[], None] | None]] = collections.deque()
        self.begun = False  # something of what was in the outbox is yet to leave
        self.full = False  # the system takes nothing more for now
        self._broken = False  # nothing can be sent
        self._pieces = self._cut()
        self._leaving: list[tuple[memoryview, Callable[[], None] | None]] = []
        self.incoming: Generator[memoryview | None, int, None]  # yields what to fill, and is sent how much of it is
        self.wanted: memoryview | None = None  # what it has yielded; None for nothing yet
        self._ahead = memoryview(bytearray(_AHEAD))
        self._kept = self._ahead[:0]  # what came beyond

    def __str__(self) -> str:
        return f"worker {self.rank} ({self.address})"

    def send(self) -> None:
        """Sends up to about a slice of what is in the outbox."""
        size, piece = sum(len(view) for view, _ in self._leaving), None
        while size < _SLICE and len(self._leaving) < 64 and (piece := next(self._pieces)):
            self._leaving.append(piece)
            size += len(piece[0])
        if not self._leaving:
            self.begun = False
            return
        try:
            # Once it is broken, messages are dropped. What that means is for `receive` to say: what the peer has sent
            # before may be all that is needed.
            count = size if self._broken else self.link.socket.sendmsg([view for view, _ in self._leaving])
            self.spoke = time.monotonic()
        except BlockingIOError:
            count = 0
        except OSError:
            self._broken, count = True, size
        self.full, self.begun = count < size, count < size or piece is not None
        for i, (view, sent) in enumerate(self._leaving):
            if count < len(view):
                self._leaving[: i + 1] = [(view[count:], sent)]
                return
            count -= len(view)
            if sent:
                sent()
        self._leaving.clear()

    def _cut(self) -> Iterator[tuple[memoryview, Callable[[], None] | None] | None]:
        """What is to leave, with what to call then; None where the outbox is empty."""
        seal = self.link.sending
        while True:
            if not self.outbox:
                yield None
                continue
            header, data, sent = self.outbox.popleft()
            records = [memoryview(each) for each in (header, data) if len(each)]
            for view in records:
                last = sent if view is records[-1] else None
                for start in range(0, len(view), _SLICE):
                    seal.update(piece := view[start : start + _SLICE])
                    yield piece, None if seal.length or start + _SLICE < len(view) else last
                if seal.length:
                    yield memoryview(seal.tag()), last

    def receive(self) -> None:
        """Takes what one system call gives; raises EOFError where the peer has closed, and what `incoming` raises."""
        assert self.wanted is not None
        try:
            count = self.link.socket.recvmsg_into([self.wanted, self._ahead])[0]
        except BlockingIOError:
            return
        if not count:
            raise EOFError("it closed the connection")
        self.heard = time.monotonic()
        filled = min(count, len(self.wanted))
        self._kept = self._ahead[: count - filled]
        self.go_on(filled)

    def go_on(self, filled: int = 0) -> None:
        """Says that so many bytes of what is wanted are there, and fills what is wanted then from what was kept."""
        self.wanted = self.incoming.send(filled)
        while self._kept and self.wanted is not None:
            count = min(len(self._kept), len(self.wanted))
            self.wanted[:count] = self._kept[:count]
            self._kept = self._kept[count:]
            self.wanted = self.incoming.send(count)

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
            raise Fault(
                f"what comes from {self} is not what it has sent: something between the workers changes it, or adds to "
                "it; see who can, and run the same command again"
            )


class Connections:
    """Sends and receives messages over the connections to all other workers."""

    def __init__(
        self,
        workers: Sequence[str],
        links: dict[int, Link],
        patience_seconds: float,
        target: Callable[[int, Message], tuple[Any, Callable[[], None]] | None],
        on_loss: Callable[[str], None],
    ) -> None:
        """Starts the thread that sends and receives.

        Args:
            workers: 'host:port' of each, in rank order.
            links: to the other workers, by rank; closed by `close`.
            patience_seconds: how long another worker may be silent until it is given up.
            target: called with a worker's rank and a message of kind 0 or 1, by the thread; returns the buffer to be
                filled, and what to call then, or None to be asked again after `retry`. What it raises loses the worker.
            on_loss: called with the reason when a worker is lost, by the thread.
        """
        self._patience, self._target, self._on_loss = patience_seconds, target, on_loss
        self._interval = min(1.0, HEARTBEAT_SECONDS, patience_seconds / 4)  # between two looks at the clock
        self._peers = {k: _Peer(k, workers[k], link) for k, link in sorted(links.items())}
        self._deadline: float | None = None  # once it is closed, for what is queued to leave
        self._retried = False
        self._awake = False  # the thread is about to look at the outboxes
        self._selector = selectors.DefaultSelector()
        self._bell, self._waker = socket.socketpair()  # a byte wakes the thread
        self._bell.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="connections", daemon=True)
        self._thread.start()

    def send(self, rank: int, message: Message, data: Any, sent: Callable[[], None] | None = None) -> None:
        """Queues a message to a worker; never blocks. `sent` is called once its bytes are no longer needed."""
        self._peers[rank].outbox.append((message.header(), data, sent))
        self._wake()

    def retry(self) -> None:
        """Has `target` asked again about what it has returned None for."""
        self._retried = True
        self._wake()

    def lost(self, ranks: Iterable[int]) -> Ending | None:
        """What has become of the first of these workers that is gone, or None."""
        return next((reason for rank in ranks if (reason := self._peers[rank].lost)), None)

    def close(self, reason: Ending | None = None) -> None:
        """Sends what is queued, and closes the connections.

        Args:
            reason: why this worker ends before the others; it is sent to them.
        """
        if reason:
            text = str(reason).encode(errors="replace")[:_LONGEST_REASON]
            kind = next((number for number, of in _REASONS.items() if isinstance(reason, of)), _HEARTBEAT)
            for rank in self._peers:
                self.send(rank, Message(kind, 0, 0, len(text)), text)
        self._deadline = time.monotonic() + _GOODBYE_SECONDS
        self._wake()
        self._thread.join(_GOODBYE_SECONDS + 1)
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # the peer was first
                peer.link.socket.shutdown(socket.SHUT_RDWR)
            peer.link.socket.close()
        self._selector.close()
        self._bell.close()
        self._waker.close()

    def _wake(self) -> None:
        if not self._awake:
            self._awake = True
            with contextlib.suppress(OSError):  # closed
                self._waker.send(b"\0")

    def _run(self) -> None:
        for peer in self._peers.values():
            peer.incoming = self._incoming(peer)
            peer.wanted = next(peer.incoming)
        looked = time.monotonic()
        while True:
            # Before the outboxes are looked at: what comes later wakes it.
            self._awake, deadline = False, self._deadline
            if self._retried:
                self._retried = False
                for peer in self._peers.values():
                    if peer.wanted is None and not peer.lost:
                        self._receive(peer, peer.go_on)
            queued = ready = False
            for peer in self._peers.values():
                if (peer.begun or peer.outbox) and not peer.full:
                    peer.send()
                more = peer.begun or bool(peer.outbox)
                queued, ready = queued or more, ready or (more and not peer.full)
                self._watch(peer)
            now = time.monotonic()
            if deadline and (not queued or now > deadline):
                return
            if now - looked >= self._interval:
                self._look(now, now - looked)
                looked = now
                continue
            for key, events in self._selector.select(0 if ready else self._interval):
                self._awake = True
                if key.data is None:
                    self._bell.recv(64)
                    continue
                if events & selectors.EVENT_WRITE:
                    key.data.full = False
                if events & selectors.EVENT_READ:
                    self._receive(key.data, key.data.receive)

    def _watch(self, peer: _Peer) -> None:
        """Has the selector report what is waited for."""
        events = (0 if peer.wanted is None else selectors.EVENT_READ) | (selectors.EVENT_WRITE if peer.full else 0)
        if events == peer.watched:
            return
        if not events:
            self._selector.unregister(peer.link.socket)
        elif peer.watched:
            self._selector.modify(peer.link.socket, events, peer)
        else:
            self._selector.register(peer.link.socket, events, peer)
        peer.watched = events

    def _look(self, now: float, passed: float) -> None:
        """Gives up whoever is silent for too long, and says to the others that this worker is there."""
        # This worker itself was stopped, and what came is yet to be read.
        stopped = passed > self._interval + self._patience / 4
        for peer in self._peers.values():
            if stopped:
                peer.heard = max(peer.heard, now)
            if now - peer.heard > self._patience and not peer.lost:
                text = (
                    f"{peer} has been silent for {self._patience:g} s: it is stopped, or the network between the "
                    "workers is down; run the same command again to go on"
                )
                self._lose(peer, Fault(text))
                with contextlib.suppress(OSError):
                    peer.link.socket.shutdown(socket.SHUT_RDWR)  # what is yet to be sent to it is dropped
            if now - peer.spoke >= min(HEARTBEAT_SECONDS, self._patience / 4) and not (peer.begun or peer.outbox):
                peer.outbox.append((Message(_HEARTBEAT, 0, 0, 0).header(), b"", None))

    def _lose(self, peer: _Peer, reason: Ending) -> None:
        peer.wanted = None
        peer.lost = reason
        self._on_loss(str(reason))

    def _receive(self, peer: _Peer, receive: Callable[[], None]) -> None:
        try:
            receive()
        except Ending as reason:
            self._lose(peer, reason)
        except (EOFError, OSError) as error:
            self._lose(peer, Fault(f"{peer} is gone ({error}): its own output says why; run the same command again"))
        except Exception as error:  # whatever it is, the thread that waits must hear of it
            text = f"{peer} sent what does not fit ({error}): see that all workers run the same program and settings"
            self._lose(peer, UserError(text))

    def _incoming(self, peer: _Peer) -> Generator[memoryview | None, int, None]:
        """Reads messages; raises why there will be no more."""
        header = bytearray(_HEADER.size)
        while True:
            yield from peer.record(header)
            magic, *fields = _HEADER.unpack(header)
            message = Message(*fields)
            if message.kind == _HEARTBEAT:
                continue
            if message.kind in _REASONS and message.size <= _LONGEST_REASON:
                words = bytearray(message.size)
                yield from peer.record(words)
                raise _REASONS[message.kind](f"{peer}: {words.decode(errors='replace')}")
            if magic != _MAGIC:
                raise ValueError("not a header")
            while (found := self._target(peer.rank, message)) is None:
                peer.heard = math.inf  # this worker has yet to trace what the peer has sent
                yield None
            peer.heard = time.monotonic()
            buffer, arrived = found
            yield from peer.record(buffer)
            arrived()
