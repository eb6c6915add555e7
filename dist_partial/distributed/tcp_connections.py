"""Messages between all workers over their TCP connections: headers and tags, heartbeats, and who is lost.

A message is a header and bytes. Each connection has a thread that sends and one that receives. Workers that have
nothing to say send a heartbeat; one that is silent for too long, or gone, is lost to the others, and one that ends may
say why. What messages of ops mean is the caller's business (`tcp_backend`).
"""

import contextlib
import dataclasses
import hmac
import math
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from dist_partial.distributed.handshake import Link
from dist_partial.errors import Ending, Fault, Raised, UserError

HEARTBEAT_SECONDS = 5.0  # after which a worker that has nothing to send says that it is there
_GOODBYE_SECONDS = 2.0  # for the last words to leave

_HEADER = struct.Struct("<4sBIQQ")  # magic, kind, op, run, bytes that follow
_MAGIC = b"dpm2"
_HEARTBEAT = 2  # no op's: a sign of life
_REASONS: dict[int, type[Ending]] = {3: UserError, 4: Fault, 5: Raised}  # no op's: why the worker ends, as text
_LONGEST_REASON = 2**16  # bytes
_SLICE = 2**20  # bytes a socket call, after which progress is noted
_MORE = getattr(socket, "MSG_MORE", 0)  # more follows: a packet need not be sent before it is full


class Message(NamedTuple):
    """Describes the bytes that follow a header.

    Attributes:
        kind: of an op 0 or 1, which mean what the caller likes.
        op: number of the op.
        run: number of its run.
        size: how many they are.
    """

    kind: int
    op: int
    run: int
    size: int

    def header(self) -> bytes:
        return _HEADER.pack(_MAGIC, *self)


@dataclasses.dataclass(eq=False)
class _Peer:
    """Another worker and the connection to it."""

    rank: int
    address: str
    link: Link
    outbox: queue.SimpleQueue = dataclasses.field(default_factory=queue.SimpleQueue)
    lost: Ending | None = None  # why nothing more will come from it
    heard: float = math.inf  # when a byte last came; infinite while this worker itself is not listening

    def __str__(self) -> str:
        return f"worker {self.rank} ({self.address})"

    def send(self, header: bytes, data: Any) -> None:
        seal = self.link.sending
        records = [memoryview(each) for each in (header, data) if len(each)]
        for view in records:
            more = 0 if view is records[-1] else _MORE
            for start in range(0, len(view), _SLICE):
                seal.update(piece := view[start : start + _SLICE])
                last = start + _SLICE >= len(view) and not seal.length
                self.link.socket.sendall(piece, more if last else _MORE)
            self.link.socket.sendall(seal.tag(), more)

    def receive(self, data: Any) -> None:
        """Fills `data`; raises EOFError where the peer has closed, and `Fault` where this is not what it sent."""
        self.heard = time.monotonic()
        if not len(data):
            return
        seal = self.link.receiving
        self._fill(memoryview(data), seal.update)
        self._fill(memoryview(tag := bytearray(seal.length)))
        if not hmac.compare_digest(tag, seal.tag()):
            raise Fault(
                f"what comes from {self} is not what it has sent: something between the workers changes it, or adds to "
                "it; see who can, and run the same command again"
            )

    def _fill(self, view: memoryview, also: Callable[[memoryview], Any] = lambda piece: None) -> None:
        while len(view):
            count = self.link.socket.recv_into(view[:_SLICE], 0, socket.MSG_WAITALL)
            if not count:
                raise EOFError("it closed the connection")
            self.heard = time.monotonic()
            also(view[:count])
            view = view[count:]


class Connections:
    """Sends and receives messages over the connections to all other workers."""

    def __init__(
        self,
        workers: Sequence[str],
        links: dict[int, Link],
        patience_seconds: float,
        target: Callable[[int, Message], tuple[Any, Callable[[], None]]],
        on_loss: Callable[[str], None],
    ) -> None:
        """Starts the threads that send and receive.

        Args:
            workers: 'host:port' of each, in rank order.
            links: to the other workers, by rank; closed by `close`.
            patience_seconds: how long another worker may be silent until it is given up.
            target: called with a worker's rank and a message of kind 0 or 1, by the thread that receives from it, which
                may wait there; returns the buffer to be filled, and what to call then. What it raises loses the worker.
            on_loss: called with the reason when a worker is lost, by a thread.
        """
        self._patience, self._target, self._on_loss = patience_seconds, target, on_loss
        self._closed = False
        self._losing = threading.Lock()
        self._peers = {k: _Peer(k, workers[k], link) for k, link in sorted(links.items())}
        self._senders = []
        for peer in self._peers.values():
            sender = threading.Thread(target=self._send_all, args=(peer,), name=f"send to {peer}", daemon=True)
            self._senders.append(sender)
            sender.start()
            threading.Thread(target=self._receive_all, args=(peer,), name=f"receive from {peer}", daemon=True).start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def send(self, rank: int, message: Message, data: Any, sent: Callable[[], None] | None = None) -> None:
        """Queues a message to a worker; never blocks. `sent` is called once its bytes are no longer needed."""
        self._peers[rank].outbox.put((message.header(), data, sent))

    def lost(self, ranks: Iterable[int]) -> Ending | None:
        """What has become of the first of these workers that is gone, or None."""
        return next((reason for rank in ranks if (reason := self._peers[rank].lost)), None)

    def close(self, reason: Ending | None = None) -> None:
        """Sends what is queued, and closes the connections.

        Args:
            reason: why this worker ends before the others; it is sent to them.
        """
        self._closed = True
        text = str(reason).encode(errors="replace")[:_LONGEST_REASON] if reason else b""
        kind = next((number for number, of in _REASONS.items() if isinstance(reason, of)), _HEARTBEAT)
        for peer in self._peers.values():
            if reason:
                peer.outbox.put((Message(kind, 0, 0, len(text)).header(), text, None))
            peer.outbox.put(None)
        deadline = time.monotonic() + _GOODBYE_SECONDS
        for sender in self._senders:
            sender.join(max(0.0, deadline - time.monotonic()))
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # the peer was first
                peer.link.socket.shutdown(socket.SHUT_RDWR)  # wakes the threads, which closing does not
            peer.link.socket.close()

    def _watch(self) -> None:
        """Gives up whoever is silent for too long."""
        interval = min(1.0, self._patience / 4)
        while not self._closed:
            before = time.monotonic()
            time.sleep(interval)
            now = time.monotonic()
            # This worker itself was stopped, and what came is yet to be read.
            stopped = now - before > interval + self._patience / 4
            for peer in self._peers.values():
                if stopped and peer.heard < now:
                    peer.heard = now
                if now - peer.heard > self._patience and not peer.lost:
                    text = (
                        f"{peer} has been silent for {self._patience:g} s: it is stopped, or the network between the "
                        "workers is down; run the same command again to go on"
                    )
                    self._lose(peer, Fault(text))
                    with contextlib.suppress(OSError):
                        peer.link.socket.shutdown(socket.SHUT_RDWR)  # what is yet to be sent to it is dropped

    def _lose(self, peer: _Peer, reason: Ending) -> None:
        with self._losing:
            if peer.lost:
                return
            peer.lost = reason
        self._on_loss(str(reason))

    def _send_all(self, peer: _Peer) -> None:
        broken = False
        heartbeat = (Message(_HEARTBEAT, 0, 0, 0).header(), b"", None)
        while True:
            try:
                message = peer.outbox.get(timeout=min(HEARTBEAT_SECONDS, self._patience / 4))
            except queue.Empty:
                message = heartbeat
            if message is None:
                return
            header, data, sent = message
            try:
                # Once it is broken, messages are dropped. What that means is for the receiver to say: what the
                # peer has sent before may be all that is needed.
                if not broken:
                    peer.send(header, data)
            except OSError:
                broken = True
            if sent:
                sent()

    def _receive_all(self, peer: _Peer) -> None:
        header = bytearray(_HEADER.size)
        try:
            while True:
                peer.receive(header)
                magic, *fields = _HEADER.unpack(header)
                message = Message(*fields)
                if message.kind == _HEARTBEAT:
                    continue
                if message.kind in _REASONS and message.size <= _LONGEST_REASON:
                    words = bytearray(message.size)
                    peer.receive(words)
                    ended = f"{peer}: {words.decode(errors='replace')}"
                    return self._lose(peer, _REASONS[message.kind](ended))
                peer.heard = math.inf  # it may have to wait until this worker has traced what the peer has sent
                if magic != _MAGIC:
                    raise ValueError("not a header")
                buffer, arrived = self._target(peer.rank, message)
                peer.receive(buffer)
                arrived()
        except Fault as fault:
            self._lose(peer, fault)
        except (EOFError, OSError) as error:
            self._lose(peer, Fault(f"{peer} is gone ({error}): its own output says why; run the same command again"))
        except Exception as error:  # whatever it is, the thread that waits must hear of it
            text = f"{peer} sent what does not fit ({error}): see that all workers run the same program and settings"
            self._lose(peer, UserError(text))
