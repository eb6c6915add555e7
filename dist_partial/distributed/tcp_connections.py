"""Messages between all workers over their TCP connections: headers and tags, heartbeats, and who is lost.

A message is a header and bytes. One thread sends and receives all of them. It waits until a connection can be read or
written, and moves at most a slice there (`tcp_peer`) before the next has its turn: neither a slow worker nor a long
hash holds up the others. A connection whose next message this worker is not ready for is not read until `retry`.

Workers that have nothing to say send a heartbeat; one that is silent for too long, or gone, is lost to the others, and
one that ends may say why. What messages of ops mean is the caller's business (`tcp_backend`).
"""

import contextlib
import math
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple

from dist_partial.distributed.handshake import Link
from dist_partial.distributed.tcp_peer import Peer
from dist_partial.errors import Ending, Fault, Raised, UserError

HEARTBEAT_SECONDS = 5.0  # after which a worker that has nothing to send says that it is there
_GOODBYE_SECONDS = 2.0  # for the last words to leave

_HEADER = struct.Struct("<4sBQIQQ")  # magic, kind, op, run, bytes that follow, bytes of the whole
_MAGIC = b"dpm4"
_HEARTBEAT = 2  # no op's: a sign of life
_REASONS: dict[int, type[Ending]] = {3: UserError, 4: Fault, 5: Raised}  # no op's: why the worker ends, as text
_LONGEST_REASON = 2**16  # bytes


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
        self._peers = {k: Peer(k, workers[k], link) for k, link in sorted(links.items())}
        self._deadline: float | None = None  # once it is closed, for what is queued to leave
        self._retried = False
        self._awake = False  # the thread is about to look at the outboxes
        self._selector = selectors.DefaultSelector()
        self._watched: dict[int, int] = {}  # the events that it reports, by rank
        self._bell, self._waker = socket.socketpair()  # a byte wakes the thread
        self._bell.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="connections", daemon=True)
        self._thread.start()

    def send(
        self, rank: int, message: Message, data: Any, sent: Callable[[], None] | None = None, later: bool = False
    ) -> None:
        """Queues a message to a worker; never blocks.

        Args:
            rank: the worker's.
            message: its header.
            data: its bytes.
            sent: called once the bytes are no longer needed.
            later: whether all others leave before it.
        """
        peer = self._peers[rank]
        (peer.later if later else peer.outbox).append((message.header(), data, sent))
        self._wake()

    def retry(self) -> None:
        """Has `target` asked again about what it has returned None for."""
        self._retried = True
        self._wake()

    def lost(self, ranks: Iterable[int]) -> Ending | None:
        """What has become of the first of these workers that is gone, or None."""
        return next((reason for rank in ranks if rank in self._peers and (reason := self._peers[rank].lost)), None)

    def close(self, reason: Ending | None = None, seconds: float = _GOODBYE_SECONDS) -> None:
        """Sends what is queued, and closes the connections.

        Args:
            reason: why this worker ends before the others; it is sent to them.
            seconds: how long it may take to send it.
        """
        if reason:
            text = str(reason).encode(errors="replace")[:_LONGEST_REASON]
            kind = next((number for number, of in _REASONS.items() if isinstance(reason, of)), _HEARTBEAT)
            for rank in self._peers:
                self.send(rank, Message(kind, 0, 0, len(text)), text)
        self._deadline = time.monotonic() + seconds
        self._wake()
        self._thread.join(seconds + 1)
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
        try:
            self._exchange()
        except Exception as error:  # whatever it is: what waits for the others must hear of it
            for peer in self._peers.values():
                if not peer.lost:
                    with contextlib.suppress(Exception):
                        self._lose(peer, Fault(f"the connections to the other workers have failed here ({error})"))
            raise

    def _exchange(self) -> None:
        for peer in self._peers.values():
            peer.incoming = self._incoming(peer)
            self._receive(peer, peer.go_on)  # what has come with the last of the handshake
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
                if peer.busy() and not peer.full:
                    peer.send()
                queued = queued or peer.busy()
                ready = ready or (peer.busy() and not peer.full)
                self._watch(peer)
            now = time.monotonic()
            if deadline and (not queued or now > deadline):
                return
            if now - looked >= self._interval:
                self._look(now, now - looked)
                looked = now
                continue
            reported = self._selector.select(0 if ready else self._interval)
            self._awake = True
            for key, events in reported:
                if key.data is None:
                    self._bell.recv(64)
                    continue
                if events & selectors.EVENT_WRITE:
                    key.data.full = False
                if events & selectors.EVENT_READ:
                    self._receive(key.data, key.data.receive)

    def _watch(self, peer: Peer) -> None:
        """Has the selector report what is waited for."""
        events = (0 if peer.wanted is None else selectors.EVENT_READ) | (selectors.EVENT_WRITE if peer.full else 0)
        before = self._watched.get(peer.rank, 0)
        if events == before:
            return
        if before:
            self._selector.unregister(peer.link.socket)
        if events:
            self._selector.register(peer.link.socket, events, peer)
        self._watched[peer.rank] = events

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
            if now - peer.spoke >= min(HEARTBEAT_SECONDS, self._patience / 4) and not peer.busy():
                peer.outbox.append((Message(_HEARTBEAT, 0, 0, 0).header(), b"", None))

    def _lose(self, peer: Peer, reason: Ending) -> None:
        peer.wanted = None
        peer.lost = reason
        self._on_loss(str(reason))

    def _receive(self, peer: Peer, receive: Callable[[], None]) -> None:
        try:
            receive()
        except Ending as reason:
            self._lose(peer, reason)
        except (EOFError, OSError) as error:
            self._lose(peer, Fault(f"{peer} is gone ({error}): its own output says why; run the same command again"))
        except Exception as error:  # whatever it is, the thread that waits must hear of it
            text = f"{peer} sent what does not fit ({error}): see that all workers run the same program and settings"
            self._lose(peer, UserError(text))

    def _incoming(self, peer: Peer) -> Generator[memoryview | None, int, None]:
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
