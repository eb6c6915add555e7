"""Sums and gathers over TCP connections between all workers: the transport of workers with one CPU replica each.

TensorFlow's own collectives on the CPU send over gRPC, tensor by tensor. Here every worker has a connection to every
other (`rendezvous`). A tensor to be summed is cut into one chunk a worker; worker j is sent every chunk j, adds them in
rank order and sends the sum to all: 2(N-1)/N of the tensor leave each worker, as in a ring, but in two hops whatever N
is. Workers that have nothing to say send a heartbeat; one that is silent for too long, or gone, is lost to the others.
"""

import contextlib
import dataclasses
import functools
import hmac
import itertools
import math
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.distributed.handshake import Link
from dist_partial.errors import Ending, Fault, Raised, UserError

# Names of the graph ops that hand a tensor over; `traffic` counts bytes by them.
SUM_OP = "dist_partial_sum"
GATHER_OP = "dist_partial_gather"

HEARTBEAT_SECONDS = 5.0  # after which a worker that has nothing to send says that it is there
_GOODBYE_SECONDS = 2.0  # for the last words to leave

_HEADER = struct.Struct("<4sBIQQ")  # magic, kind, op, run, bytes that follow
_MAGIC = b"dpm2"
_PART, _FINAL = 0, 1  # a chunk yet to be summed; bytes of the result. In this order: what a sum waits for first
_HEARTBEAT = 2  # no op's: a sign of life
_REASONS: dict[int, type[Ending]] = {3: UserError, 4: Fault, 5: Raised}  # no op's: why the worker ends, as text
_LONGEST_REASON = 2**16  # bytes
_SLICE = 2**20  # bytes a socket call, after which progress is noted
_PIECE = 2**19  # bytes of a tensor that are summed while others travel
_MORE = getattr(socket, "MSG_MORE", 0)  # more follows: a packet need not be sent before it is full
_BLOCK = 2**15  # elements that are widened at a time, so that they stay in the cache


@dataclasses.dataclass(eq=False)
class _Tensor:
    """One tensor of the graph, exchanged piece by piece."""

    gathers: bool
    dtype: np.dtype
    size: int  # of its result
    ops: list["_Op"] = dataclasses.field(default_factory=list)
    results: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)  # by run


@dataclasses.dataclass(eq=False)
class _Op:
    """One piece of a tensor, `[start, start + bounds[-1])`; its place `[bounds[k], bounds[k + 1])` worker k sends."""

    number: int
    tensor: _Tensor
    start: int
    bounds: list[int]
    begun: int = 0
    runs: dict[int, "_Run"] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class _Run:
    """One run of an op on this worker."""

    op: _Op
    number: int
    result: np.ndarray
    waiting: set[tuple[int, int]]  # (kind, rank) yet to come, this worker's own among them
    parts: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    unsent: int = 0  # messages in the queues: TensorFlow may overwrite the result once it has it

    def done(self) -> bool:
        return not self.waiting and not self.unsent


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


class TCPBackend:
    """Connects all workers by TCP and computes collectives over the connections.

    Attributes:
        size: number of workers.
        rank: which of them this is, from 0.
        workers: 'host:port' of each.
        failure: what ended the exchange, or None.
    """

    def __init__(
        self,
        rank: int,
        workers: Sequence[str],
        links: dict[int, Link],
        patience_seconds: float,
        on_loss: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Starts the threads that send and receive.

        Args:
            rank: this worker's.
            workers: 'host:port' of each, in rank order.
            links: from `rendezvous.connect`; closed by `close`.
            patience_seconds: how long another worker may be silent until it is given up.
            on_loss: called with the reason when a worker is lost, by a thread of the backend.
        """
        self.rank, self.size, self.workers = rank, len(workers), list(workers)
        self.failure: Ending | None = None
        self._patience, self._on_loss = patience_seconds, on_loss
        self._closed = False
        self._ops: list[_Op] = []
        self._outside: dict[tuple[bool, str, int], _Tensor] = {}  # of what is exchanged outside of functions
        # Guards all ops, runs and `lost`; notified when an op is added, a run is done, or a peer is lost.
        self._changed = threading.Condition()
        self._peers = {k: _Peer(k, workers[k], link) for k, link in sorted(links.items())}
        self._senders = []
        for peer in self._peers.values():
            sender = threading.Thread(target=self._send_all, args=(peer,), name=f"send to {peer}", daemon=True)
            self._senders.append(sender)
            sender.start()
            threading.Thread(target=self._receive_all, args=(peer,), name=f"receive from {peer}", daemon=True).start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def exchange(
        self, sums: Sequence[tf.Tensor], gathers: Sequence[tf.Tensor]
    ) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """Sums and gathers tensors over the workers.

        Called while a tf.function is traced, by all workers in the same order. A tensor travels as soon as it is
        computed. Running it raises a TensorFlow error with the text of `failure` if a worker is lost.

        Args:
            sums: [n] each, of static size; float32, float64, bfloat16, float16 or integers. Half precision is added in
                float32 and rounded once.
            gathers: [n] each, of static size and any fixed-size dtype.

        Returns:
            The sums [n], the same bits on all workers, and the gathered [size, n], in rank order.
        """
        tensors = [*sums, *gathers]
        if not tensors:
            return [], []
        added = [
            self._add(i >= len(sums), t.dtype.as_numpy_dtype, t.shape.num_elements()) for i, t in enumerate(tensors)
        ]
        tickets = [
            tf.numpy_function(
                functools.partial(self._begin, own), [t], tf.int64, name=GATHER_OP if own.gathers else SUM_OP
            )
            for own, t in zip(added, tensors, strict=True)
        ]
        # Only one of them waits at a time, and none before all tensors are on their way: TensorFlow may have few
        # threads. What has arrived is put to use while the rest still travels.
        results: list[Any] = []
        for own, ticket, t in zip(added, tickets, tensors, strict=True):
            end = functools.partial(self._end, own)
            with tf.control_dependencies([*tickets, *results[-1:]]):
                result = tf.numpy_function(end, [ticket], t.dtype, name="dist_partial_end")
            result.set_shape([self.size, *t.shape] if own.gathers else t.shape)
            results.append(result)
        return results[: len(sums)], results[len(sums) :]

    def sum(self, array: np.ndarray) -> np.ndarray:
        """The sum of an array [n] over the workers, outside of any function; all call it at the same point."""
        return self._once(False, array)

    def gather(self, data: bytes) -> list[bytes]:
        """Every worker's bytes, of any length each, in rank order; called as `sum` is."""
        length = np.array([len(data)], np.int64)
        lengths = self._once(True, length)[:, 0]
        rows = self._once(True, np.frombuffer(data.ljust(int(lengths.max()), b"\0"), np.uint8))
        return [row[:count].tobytes() for row, count in zip(rows, lengths, strict=True)]

    def finish(self) -> None:
        """Waits until all workers call it; from then on one that is gone is not reported to `on_loss`."""
        self._on_loss = lambda reason: None  # on all of them, before any can end
        self.sum(np.zeros(1, np.float32))

    def lost(self) -> Ending | None:
        """What has become of a worker that is gone, whether it was waited for or not, or None."""
        return self.failure or next((peer.lost for peer in self._peers.values() if peer.lost), None)

    def close(self, reason: Ending | None = None) -> None:
        """Closes the connections: what is waited for fails.

        Args:
            reason: why this worker ends before the others; it is sent to them.
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self.failure = self.failure or Fault("this worker has closed its connections to the others")
            self._changed.notify_all()
        text = str(reason).encode(errors="replace")[:_LONGEST_REASON] if reason else b""
        kind = next((number for number, of in _REASONS.items() if isinstance(reason, of)), _HEARTBEAT)
        for peer in self._peers.values():
            if reason:
                peer.outbox.put((None, _HEADER.pack(_MAGIC, kind, 0, 0, len(text)), text))
            peer.outbox.put(None)
        deadline = time.monotonic() + _GOODBYE_SECONDS
        for sender in self._senders:
            sender.join(max(0.0, deadline - time.monotonic()))
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # the peer was first
                peer.link.socket.shutdown(socket.SHUT_RDWR)  # wakes the threads, which closing does not
            peer.link.socket.close()

    def _once(self, gathers: bool, array: np.ndarray) -> np.ndarray:
        # One op serves all exchanges of a kind and size, or a long run would make one a step.
        key = gathers, array.dtype.str, array.size
        if key not in self._outside:
            self._outside[key] = self._add(gathers, array.dtype, array.size)
        tensor = self._outside[key]
        return self._end(tensor, self._begin(tensor, np.ascontiguousarray(array)))

    def _add(self, gathers: bool, dtype: Any, count: int) -> _Tensor:
        tensor = _Tensor(gathers, np.dtype(dtype), self.size * count if gathers else count)
        step = count if gathers else max(1, _PIECE // tensor.dtype.itemsize)
        with self._changed:
            for start in range(0, max(1, count), max(1, step)):
                piece = min(step, count - start)
                bounds = [k * piece if gathers else k * piece // self.size for k in range(self.size + 1)]
                tensor.ops.append(_Op(len(self._ops), tensor, start, bounds))
                self._ops.append(tensor.ops[-1])
            self._changed.notify_all()
        return tensor

    def _begin(self, tensor: _Tensor, array: np.ndarray) -> np.int64:
        """Puts an array to the senders and returns its run's number. Never blocks: it holds a thread of few."""
        number = tensor.ops[0].begun
        for op in tensor.ops:
            with self._changed:
                run = self._run(op, op.begun)
                op.begun += 1
            if tensor.gathers:
                self._finish(run, array)
                break
            piece = array[op.start : op.start + op.bounds[-1]]
            for peer in self._peers.values():
                self._put(peer, run, _PART, piece[op.bounds[peer.rank] : op.bounds[peer.rank + 1]])
            self._arrived(run, _PART, self.rank, piece[op.bounds[self.rank] : op.bounds[self.rank + 1]])
        return np.int64(number)

    def _end(self, tensor: _Tensor, number: np.int64) -> np.ndarray:
        """Waits for the result of a run."""
        with self._changed:
            for op in tensor.ops:
                run = op.runs[int(number)]
                while not run.done():
                    # Whoever is not waited for may have ended as it should, after its last part.
                    late = [self._peers[rank] for _, rank in sorted(run.waiting) if rank != self.rank]
                    self.failure = self.failure or next((peer.lost for peer in late if peer.lost), None)
                    if self.failure:
                        raise self.failure
                    self._changed.wait()
                del op.runs[run.number]
            result = tensor.results.pop(int(number))
        return result.reshape(self.size, -1) if tensor.gathers else result

    def _watch(self) -> None:
        """Gives up whoever is silent for too long."""
        interval = min(1.0, self._patience / 4)
        while not self._closed:
            before = time.monotonic()
            time.sleep(interval)
            now = time.monotonic()
            stopped = (
                now - before > interval + self._patience / 4
            )  # this worker itself, and what came is yet to be read
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
        with self._changed:
            if peer.lost or self._closed:
                return
            peer.lost = reason
            self._changed.notify_all()
        self._on_loss(str(reason))

    def _run(self, op: _Op, number: int) -> _Run:
        if number not in op.runs:
            # A peer is at most one run ahead: to end one it needs this worker's part of it.
            if number != op.begun:
                raise ValueError(f"run {number} of op {op.number}, where run {op.begun} is next")
            tensor = op.tensor
            if number not in tensor.results:
                tensor.results[number] = _aligned(tensor.size, tensor.dtype)
            kinds = [_FINAL] if tensor.gathers else [_PART, _FINAL]
            waiting = set(itertools.product(kinds, range(self.size)))
            result = tensor.results[number][op.start : op.start + op.bounds[-1]]
            op.runs[number] = _Run(op, number, result, waiting)
        return op.runs[number]

    def _put(self, peer: _Peer, run: _Run, kind: int, array: np.ndarray) -> None:
        data = array.view(np.uint8)
        with self._changed:
            run.unsent += 1
        peer.outbox.put((run, _HEADER.pack(_MAGIC, kind, run.op.number, run.number, len(data)), data))

    def _arrived(self, run: _Run, kind: int, rank: int, part: np.ndarray) -> None:
        """Notes what is complete; the last part's thread adds them up."""
        with self._changed:
            if kind == _PART:
                run.parts[rank] = part
            if kind == _FINAL or len(run.parts) < self.size:
                return self._tick(run, kind, rank)
        place = run.result[run.op.bounds[self.rank] : run.op.bounds[self.rank + 1]]
        _add_up([run.parts.pop(k) for k in range(self.size)], place)
        self._finish(run, place)
        with self._changed:
            self._tick(run, kind, rank)

    def _tick(self, run: _Run, kind: int, rank: int) -> None:
        run.waiting.remove((kind, rank))
        if run.done():
            self._changed.notify_all()

    def _finish(self, run: _Run, array: np.ndarray) -> None:
        """Sends this worker's place of the result to all, and fills it here."""
        for peer in self._peers.values():
            self._put(peer, run, _FINAL, array)
        if run.op.tensor.gathers:
            run.result[run.op.bounds[self.rank] : run.op.bounds[self.rank + 1]] = array
        self._arrived(run, _FINAL, self.rank, array)

    def _send_all(self, peer: _Peer) -> None:
        broken = False
        heartbeat = (None, _HEADER.pack(_MAGIC, _HEARTBEAT, 0, 0, 0), b"")
        while True:
            try:
                message = peer.outbox.get(timeout=min(HEARTBEAT_SECONDS, self._patience / 4))
            except queue.Empty:
                message = heartbeat
            if message is None:
                return
            run, header, data = message
            try:
                # Once it is broken, messages are dropped. What that means is for the receiver to say: what the
                # peer has sent before may be all that is needed.
                if not broken:
                    peer.send(header, data)
            except OSError:
                broken = True
            if run is not None:
                with self._changed:
                    run.unsent -= 1
                    if run.done():
                        self._changed.notify_all()

    def _receive_all(self, peer: _Peer) -> None:
        header = bytearray(_HEADER.size)
        try:
            while True:
                peer.receive(header)
                magic, kind, number, run_number, size = _HEADER.unpack(header)
                if kind == _HEARTBEAT:
                    continue
                if kind in _REASONS and size <= _LONGEST_REASON:
                    words = bytearray(size)
                    peer.receive(words)
                    ended = f"{peer}: {words.decode(errors='replace')}"
                    return self._lose(peer, _REASONS[kind](ended))
                peer.heard = math.inf  # it may have to wait until this worker has traced what the peer has sent
                run, target = self._target(peer.rank, magic, kind, number, run_number, size)
                peer.receive(target.view(np.uint8))
                self._arrived(run, kind, peer.rank, target)
        except Fault as fault:
            self._lose(peer, fault)
        except (EOFError, OSError) as error:
            self._lose(peer, Fault(f"{peer} is gone ({error}): its own output says why; run the same command again"))
        except Exception as error:  # whatever it is, the thread that waits must hear of it
            text = f"{peer} sent what does not fit ({error}): see that all workers run the same program and settings"
            self._lose(peer, UserError(text))

    def _target(
        self, rank: int, magic: bytes, kind: int, number: int, run_number: int, size: int
    ) -> tuple[_Run, np.ndarray]:
        """Where the bytes that follow a header go."""
        if magic != _MAGIC:
            raise ValueError("not a header")
        with self._changed:
            # The peer may have traced a function, and begun it, before this worker has.
            self._changed.wait_for(lambda: number < len(self._ops) or self._closed)
            if self._closed:
                raise EOFError("closed here")
            op = self._ops[number]
            run = self._run(op, run_number)
            if (kind, rank) not in run.waiting or (kind == _PART and rank in run.parts):
                raise ValueError(f"message {kind} of op {number} was not expected")
            place = self.rank if kind == _PART else rank
            target = run.result[op.bounds[place] : op.bounds[place + 1]]
            if size != target.nbytes:
                raise ValueError(f"{size} bytes for op {number}, which takes {target.nbytes}")
        return run, np.empty_like(target) if kind == _PART else target


def _aligned(count: int, dtype: np.dtype) -> np.ndarray:
    """An empty array that TensorFlow takes over as it is: one that is not aligned to 64 bytes it copies."""
    size = count * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype)


@np.errstate(all="ignore")  # an overflow under a loss scale is no news, and nobody sees the warnings of threads
def _add_up(parts: Sequence[np.ndarray], total: np.ndarray) -> None:
    """Writes the sum of the parts, added in their order, to `total`."""
    if total.dtype.itemsize > 2 or np.issubdtype(total.dtype, np.integer):
        total[:] = parts[0]
        for part in parts[1:]:
            np.add(total, part, out=total)
        return
    for start in range(0, len(total), _BLOCK):
        block = slice(start, start + _BLOCK)
        wide = parts[0][block].astype(np.float32)
        for part in parts[1:]:
            wide += part[block].astype(np.float32)
        total[block] = wide
