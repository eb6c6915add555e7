"""Sums and gathers over TCP connections between all workers: the transport of workers with one CPU replica each.

TensorFlow's own collectives on the CPU send over gRPC, tensor by tensor. Here every worker has a connection to every
other. A tensor to be summed is cut into one chunk a worker; worker j is sent every chunk j, adds them in rank order
and sends the sum to all: 2(N-1)/N of the tensor leave each worker, as in a ring, but in two hops whatever N is.
"""

import contextlib
import dataclasses
import functools
import hmac
import itertools
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

# Names of the graph ops that hand a tensor over; `traffic` counts bytes by them.
SUM_OP = "dist_partial_sum"
GATHER_OP = "dist_partial_gather"

START_SECONDS = 60.0  # in which all workers must have connected
IDLE_SECONDS = 600.0  # without a byte from or to a worker that is waited for, until it is given up

_CARD = struct.Struct("<H16s")  # port; token, of which rank 0's counts
_HELLO = struct.Struct("<16sI")  # token, rank
_HEADER = struct.Struct("<4sBIQQ")  # magic, kind, op, run, bytes that follow
_MAGIC = b"dpm1"
_PART, _FINAL = 0, 1  # a chunk yet to be summed; bytes of the result. In this order: what a sum waits for first
_SLICE = 2**20  # bytes a socket call, after which progress is noted
_PIECE = 2**19  # bytes of a tensor that are summed while others travel
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
    host: str
    connection: socket.socket
    outbox: queue.SimpleQueue = dataclasses.field(default_factory=queue.SimpleQueue)
    lost: str | None = None  # why nothing more will come from it
    moved: float = 0.0  # when a byte last went either way, time.monotonic()

    def __str__(self) -> str:
        return f"worker {self.rank} ({self.host})"

    def send(self, header: bytes, data: Any) -> None:
        view = memoryview(data)
        self.connection.sendall(header, getattr(socket, "MSG_MORE", 0) if len(view) else 0)
        for start in range(0, len(view), _SLICE):
            self.connection.sendall(view[start : start + _SLICE])
            self.moved = time.monotonic()

    def receive(self, data: Any) -> None:
        """Fills `data`; raises EOFError where the peer has closed."""
        view = memoryview(data)
        while len(view):
            count = self.connection.recv_into(view[:_SLICE], 0, socket.MSG_WAITALL)
            if not count:
                raise EOFError("it closed the connection")
            self.moved = time.monotonic()
            view = view[count:]


class Mesh:
    """TCP connections between all workers, and the collectives over them; made by `connect`.

    Attributes:
        size: number of workers.
        rank: which of them this is, from 0.
        failure: what ended the exchange, as text for the user, or None.
    """

    def __init__(self, rank: int, hosts: Sequence[str], connections: dict[int, socket.socket]) -> None:
        self.rank, self.size = rank, len(hosts)
        self.failure: str | None = None
        self._closed = False
        self._ops: list[_Op] = []
        # Guards all ops, runs and `lost`; notified when an op is added, a run is done, or a peer is lost.
        self._changed = threading.Condition()
        self._peers = {k: _Peer(k, hosts[k], connection) for k, connection in sorted(connections.items())}
        for peer in self._peers.values():
            threading.Thread(target=self._send_all, args=(peer,), name=f"send to {peer}", daemon=True).start()
            threading.Thread(target=self._receive_all, args=(peer,), name=f"receive from {peer}", daemon=True).start()

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

    def lost(self) -> str | None:
        """What has become of a worker that is gone, whether it was waited for or not; text for the user, or None."""
        return self.failure or next((peer.lost for peer in self._peers.values() if peer.lost), None)

    def close(self) -> None:
        """Closes the connections: what is waited for fails."""
        with self._changed:
            self._closed = True
            self.failure = self.failure or "this worker has closed its connections to the others"
            self._changed.notify_all()
        for peer in self._peers.values():
            peer.outbox.put(None)
            with contextlib.suppress(OSError):  # the peer was first
                peer.connection.shutdown(socket.SHUT_RDWR)  # wakes the threads, which closing does not
            peer.connection.close()

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
        start = time.monotonic()
        with self._changed:
            for op in tensor.ops:
                run = op.runs[int(number)]
                while not run.done():
                    self.failure = self.failure or self._find_failure(run, start)
                    if self.failure:
                        raise ConnectionError(self.failure)
                    self._changed.wait(IDLE_SECONDS / 10)
                del op.runs[run.number]
            result = tensor.results.pop(int(number))
        return result.reshape(self.size, -1) if tensor.gathers else result

    def _find_failure(self, run: _Run, start: float) -> str | None:
        waiting = sorted(pair for pair in run.waiting if pair[1] != self.rank)
        late = [self._peers[rank] for _, rank in waiting]
        for peer in late:
            if peer.lost:
                return peer.lost
        peers = late or list(self._peers.values())  # all is here: what is left has yet to be sent
        if time.monotonic() - max([start, *[peer.moved for peer in peers]]) > IDLE_SECONDS:
            return (
                f"{peers[0]} has sent and taken nothing for {IDLE_SECONDS:g} s: look whether it hangs or the network "
                "between the workers is down, then start all workers again"
            )
        return None

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
        while (message := peer.outbox.get()) is not None:
            run, header, data = message
            try:
                # Once it is broken, messages are dropped. What that means is for the receiver to say: what the
                # peer has sent before may be all that is needed.
                if not broken:
                    peer.send(header, data)
            except OSError:
                broken = True
            with self._changed:
                run.unsent -= 1
                if run.done():
                    self._changed.notify_all()

    def _receive_all(self, peer: _Peer) -> None:
        header = bytearray(_HEADER.size)
        try:
            while True:
                peer.receive(header)
                run, kind, target = self._target(peer.rank, *_HEADER.unpack(header))
                peer.receive(target.view(np.uint8))
                self._arrived(run, kind, peer.rank, target)
        except (EOFError, OSError) as error:
            lost = f"{peer} is gone ({error}): its own output says why; start all workers again"
        except Exception as error:  # whatever it is, the thread that waits must hear of it
            lost = f"{peer} sent what does not fit ({error}): see that all workers run the same program and settings"
        with self._changed:
            peer.lost = lost
            self._changed.notify_all()

    def _target(
        self, rank: int, magic: bytes, kind: int, number: int, run_number: int, size: int
    ) -> tuple[_Run, int, np.ndarray]:
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
        return run, kind, np.empty_like(target) if kind == _PART else target


def connect(
    rank: int, hosts: Sequence[str], swap: Callable[[bytes], list[bytes]], congestion: str | None = None
) -> Mesh:
    """Connects this worker to all others; all workers call it.

    Each listens on a free port of its own host only, and takes in nobody without the token that rank 0 has drawn.

    Args:
        rank: this worker's.
        hosts: name or address of each worker's host, in rank order.
        swap: gives every worker's bytes, in rank order; each hands over equally many.
        congestion: the kernel's congestion control for these connections, such as 'cubic'; where it is not to be had,
            or None, that of the system.

    Raises:
        ConnectionError: a worker cannot be reached; the message names its address.
    """
    try:
        family = socket.getaddrinfo(hosts[rank], 0, type=socket.SOCK_STREAM)[0][0]
        server = socket.create_server((hosts[rank], 0), family=family, backlog=len(hosts))
    except OSError as error:
        raise ConnectionError(
            f"worker {rank} cannot listen on {hosts[rank]} ({error}): TF_CONFIG must name it by an address of its own"
        ) from error
    connections: dict[int, socket.socket] = {}
    try:
        with server:
            swapped = swap(_CARD.pack(server.getsockname()[1], secrets.token_bytes(16)))
            ports = [_CARD.unpack(each)[0] for each in swapped]
            _, token = _CARD.unpack(swapped[0])
            deadline = time.monotonic() + START_SECONDS
            for other in range(rank):
                connections[other] = _call(rank, other, (hosts[other], ports[other]), token, deadline)
            _take_in(server, rank, hosts, token, deadline, connections)
        for connection in connections.values():
            _set_up(connection, congestion)
    except BaseException:
        for connection in connections.values():
            connection.close()
        raise
    return Mesh(rank, hosts, connections)


def _call(rank: int, other: int, address: tuple[str, int], token: bytes, deadline: float) -> socket.socket:
    try:
        connection = socket.create_connection(address, timeout=max(0.1, deadline - time.monotonic()))
        connection.sendall(_HELLO.pack(token, rank))
        if _greeting(connection, token) != other:
            raise ConnectionError("another worker answers there")
    except OSError as error:
        raise ConnectionError(
            f"worker {rank} cannot reach worker {other} at {address[0]}:{address[1]} ({error}): a firewall may block "
            "it; workers need TCP to each other on all ports"
        ) from error
    return connection


def _take_in(
    server: socket.socket,
    rank: int,
    hosts: Sequence[str],
    token: bytes,
    deadline: float,
    connections: dict[int, socket.socket],
) -> None:
    """Waits until all workers of a higher rank have connected, and adds their connections."""
    arrivals: queue.SimpleQueue = queue.SimpleQueue()

    def answer(connection: socket.socket) -> None:
        try:
            connection.settimeout(max(0.1, deadline - time.monotonic()))
            other = _greeting(connection, token)
            connection.sendall(_HELLO.pack(token, rank))
            arrivals.put((other, connection))
        except OSError:
            connection.close()  # a stranger; if it was a worker, its absence is reported

    server.settimeout(0.05)
    while missing := [k for k in range(rank + 1, len(hosts)) if k not in connections]:
        if time.monotonic() > deadline:
            address = f"{hosts[rank]}:{server.getsockname()[1]}"
            raise ConnectionError(
                f"worker {rank} was not reached at {address} by worker "
                f"{', '.join(f'{k} ({hosts[k]})' for k in missing)} in {START_SECONDS:g} s: a firewall may block it; "
                "workers need TCP to each other on all ports"
            )
        with contextlib.suppress(TimeoutError):
            # In a thread each: one that is silent must not keep the others waiting.
            threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()
        while not arrivals.empty():
            other, connection = arrivals.get()
            if other in missing and other not in connections:
                connections[other] = connection
            else:
                connection.close()


def _greeting(connection: socket.socket, token: bytes) -> int:
    """The rank in the greeting of the other side."""
    greeting = b""
    while len(greeting) < _HELLO.size:
        received = connection.recv(_HELLO.size - len(greeting))
        if not received:
            raise ConnectionError("it closed the connection")
        greeting += received
    theirs, rank = _HELLO.unpack(greeting)
    if not hmac.compare_digest(theirs, token):
        raise ConnectionError("wrong token")
    return rank


def _set_up(connection: socket.socket, congestion: str | None) -> None:
    connection.settimeout(None)
    if congestion and hasattr(socket, "TCP_CONGESTION"):
        with contextlib.suppress(OSError):  # the kernel has no such module
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in [("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)]:
        if hasattr(socket, name):  # Linux has all three
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


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
