"""Sums, gathers and all-to-alls over TCP connections between all workers.

TensorFlow's own collectives on the CPU send over gRPC, tensor by tensor. Here every worker has a connection to every
other (`rendezvous`), over which messages travel (`tcp_connections`). A tensor to be summed is cut into one chunk a
worker; worker j is sent every chunk j, adds them in rank order and sends the sum to all: 2(N-1)/N of the tensor leave
each worker, as in a ring, but in two hops whatever N is. What is so small that its chunks would cost more than their
bytes is summed by fewer workers, by others for each tensor.

An op has the same number on all workers, whatever else each has traced before: it follows from the name of what is
traced (`tracing`) and the op's place in it. So a worker that comes later joins those that have long been at it.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.distributed.backend import Exchanged
from dist_partial.distributed.handshake import Link
from dist_partial.distributed.tcp_arrays import add_up, aligned
from dist_partial.distributed.tcp_connections import Connections, Message
from dist_partial.distributed.worker_backend import ALL_TO_ALL_OP, GATHER_OP, SUM_OP, WorkerBackend
from dist_partial.errors import Ending, Fault, UserError

_PART, _FINAL = 0, 1  # a chunk yet to be summed; bytes of the result. In this order: what a sum waits for first
_COPY = "dist_partial_copy"  # the kind of what one worker sends to some
_SMALLEST, _LARGEST = 2**12, 2**19  # bytes of a chunk; the next piece of a tensor travels while one is summed


@dataclasses.dataclass(eq=False)
class _Tensor:
    """One tensor of the graph, exchanged piece by piece."""

    kind: str  # the name of its op
    dtype: np.dtype
    size: int  # of its result
    outside: bool = False  # of functions
    apart: bool = False  # in a function that runs beside others
    to: tuple[int, ...] | None = None  # whom the first of `places` sends it; None is all others
    ops: list["_Op"] = dataclasses.field(default_factory=list)
    results: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)  # by run

    @property
    def bytes(self) -> int:
        return self.size * self.dtype.itemsize


@dataclasses.dataclass(eq=False)
class _Op:
    """One piece of a tensor; `places` are those, in the whole result, of what each worker sends of the result."""

    number: int
    tensor: _Tensor
    places: dict[int, slice]
    name: str = ""  # of what was traced
    begun: int = 0
    runs: dict[int, "_Run"] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class _Run:
    """One run of an op on this worker."""

    op: _Op
    number: int
    result: np.ndarray  # of the whole tensor
    waiting: set[tuple[int, int]]  # (kind, rank) yet to come, this worker's own among them
    parts: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    unsent: int = 0  # messages in the queues: TensorFlow may overwrite the result once it has it

    def done(self) -> bool:
        return not self.waiting and not self.unsent


class TCPBackend(WorkerBackend):
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
        links: dict[int, Link] | None,
        patience_seconds: float,
        on_loss: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Starts the thread that sends and receives.

        Args:
            rank: this worker's.
            workers: 'host:port' of each, in rank order.
            links: from `rendezvous.connect`; closed by `close`. None: there are none before `rejoin`.
            patience_seconds: how long another worker may be silent until it is given up.
            on_loss: called with the reason when a worker is lost, by the thread.
        """
        self.rank, self.size, self.workers = rank, len(workers), list(workers)
        self.failure: Ending | None = None
        self._on_loss, self._patience = on_loss, patience_seconds
        self._closed = False
        self._epoch = 0  # counts the times that these workers have met
        self._ops: dict[int, _Op] = {}
        self._apart = False
        self._name, self._added = "", 0  # of what is traced, and how many ops it has so far
        self._copies: collections.Counter[str] = collections.Counter()
        self._outside: dict[tuple[str, np.dtype, int], _Tensor] = {}  # of what is exchanged outside of functions
        # By worker: the run outside of functions that was last heard of, and the op that is not known here yet.
        self._ahead: dict[int, _Run] = {}
        self._unknown: dict[int, int] = {}
        # Of parts that were added up, by their bytes: fresh memory costs more than to fill it.
        self._spare: dict[int, list[np.ndarray]] = collections.defaultdict(list)
        # Guards all ops and runs; notified when a run is done, or a worker is lost.
        self._changed = threading.Condition()
        self._connections = Connections(workers, links or {}, patience_seconds, self._target, self._lost)

    has_all_to_all = concurrent = True

    def exchange(
        self, sums: Sequence[tf.Tensor], gathers: Sequence[tf.Tensor], swaps: Sequence[tf.Tensor] = ()
    ) -> Exchanged:
        """Exchanges tensors between the workers.

        Called while a tf.function is traced, by all workers in the same order. A tensor travels as soon as it is
        computed. Running it raises a TensorFlow error with the text of `failure` if a worker is lost. Called outside
        of functions it exchanges at once, and raises `failure` itself.

        Args:
            sums: [n] each, of static size; float32, float64, bfloat16, float16 or integers. Half precision is added in
                float32 and rounded once.
            gathers: [n] each, of static size and any fixed-size dtype.
            swaps: [size, n] each, likewise; row j is for worker j.

        Returns:
            The sums [n], the same bits on all workers, the gathered [size, n], in rank order, and of each swap what the
            workers have sent to this one [size, n].
        """
        tensors = [*sums, *gathers, *swaps]
        kinds = [SUM_OP] * len(sums) + [GATHER_OP] * len(gathers) + [ALL_TO_ALL_OP] * len(swaps)

        def sorted_out(results: list[Any]) -> Exchanged:
            ends = len(sums), len(sums) + len(gathers)
            return results[: ends[0]], results[ends[0] : ends[1]], results[ends[1] :]

        if tf.executing_eagerly():
            found = [self._once(kind, t.numpy()) for kind, t in zip(kinds, tensors, strict=True)]
            return sorted_out([tf.constant(each, t.dtype) for each, t in zip(found, tensors, strict=True)])
        added = [
            self._add(kind, t.dtype.as_numpy_dtype, t.shape.num_elements())
            for kind, t in zip(kinds, tensors, strict=True)
        ]
        tickets = [
            tf.numpy_function(functools.partial(self._begin, own), [t], tf.int64, name=own.kind)
            for own, t in zip(added, tensors, strict=True)
        ]
        # Only one of them waits at a time, and none before all tensors are on their way: TensorFlow may have few
        # threads. What has arrived is put to use while the rest still travels.
        results: list[Any] = []
        for own, ticket, t in zip(added, tickets, tensors, strict=True):
            end = functools.partial(self._end, own)
            with tf.control_dependencies([*tickets, *results[-1:]]):
                result = tf.numpy_function(end, [ticket], t.dtype, name="dist_partial_end")
            result.set_shape([self.size, *t.shape] if own.kind == GATHER_OP else t.shape)
            results.append(result)
        return sorted_out(results)

    @property
    def others(self) -> list[int]:
        """The ranks of the other workers."""
        return [k for k in range(self.size) if k != self.rank]

    @contextlib.contextmanager
    def traced_apart(self) -> Iterator[None]:
        """What is traced within runs beside other functions: where it waits, others may well have gone on."""
        self._apart = True
        try:
            yield
        finally:
            self._apart = False

    @contextlib.contextmanager
    def tracing(self, name: str) -> Iterator[None]:
        """Names what is traced within, as all workers do; what had the name before was forgotten, see `forget`."""
        before, self._name, self._added = (self._name, self._added), name, 0
        try:
            yield
        finally:
            self._name, self._added = before

    def forget(self, name: str) -> None:
        """Forgets what was traced by a name and is no longer called; all do so before one of them uses it again."""
        with self._changed:
            self._ops = {number: op for number, op in self._ops.items() if op.name != name or op.tensor.outside}

    def sum(self, array: np.ndarray) -> np.ndarray:
        """The sum of an array [n] over the workers, outside of any function; all call it at the same point."""
        return self._once(SUM_OP, array)

    def all_to_all(self, array: np.ndarray) -> np.ndarray:
        """Sends row j of an array [size, n] to worker j; row i of the result comes from worker i; called as `sum`."""
        return self._once(ALL_TO_ALL_OP, array)

    def gather(self, data: bytes) -> list[bytes]:
        """Every worker's bytes, of any length each, in rank order; called as `sum` is."""
        length = np.array([len(data)], np.int64)
        lengths = self._once(GATHER_OP, length)[:, 0]
        rows = self._once(GATHER_OP, np.frombuffer(data.ljust(int(lengths.max()), b"\0"), np.uint8))
        return [row[:count].tobytes() for row, count in zip(rows, lengths, strict=True)]

    def copy(self, data: bytes, size: int, source: int, to: Sequence[int]) -> bytes:
        """Sends bytes from one worker to some others; those alone call it, at the same point.

        Args:
            data: what the source sends.
            size: how many bytes that is.
            source: who has them.
            to: who gets them.

        Returns:
            The bytes, on the source as well.
        """
        return self._end_copy(*self._begin_copy(data, size, source, to))

    def _begin_copy(self, data: bytes, size: int, source: int, to: Sequence[int]) -> tuple[_Op, bytes]:
        # The source waits for nobody, and may be some copies ahead: each has an op of its own.
        key = f"{_COPY} {source} {list(to)}"
        self._copies[key] += 1
        tensor = _Tensor(_COPY, np.dtype(np.uint8), size, outside=True, to=tuple(to))
        op = _Op(_number(f"{key} {self._copies[key]}"), tensor, {source: slice(0, size)})
        self._add_op(op)
        if self.rank == source:
            self._begin(tensor, np.frombuffer(data, np.uint8))
        else:
            with self._changed:
                self._run(op, 0)
                op.begun = 1
        return op, data if self.rank == source else b""

    def _end_copy(self, op: _Op, data: bytes) -> bytes:
        result = self._end(op.tensor, np.int64(0))
        with self._changed:
            del self._ops[op.number]
        return data or result.tobytes()

    def shift(self, data: bytes) -> bytes:
        """Sends bytes, as many as the others do, to the next worker, the last one to the first; all call it.

        Returns:
            What the worker before this one sends.
        """
        begun = [self._begin_copy(data, len(data), rank, [(rank + 1) % self.size]) for rank in self._around()]
        return [self._end_copy(*each) for each in begun][-1]

    def _around(self) -> list[int]:
        """This worker, and the one before it."""
        return [self.rank, (self.rank - 1) % self.size]

    def barrier(self) -> None:
        """Waits until all workers call it."""
        # An op of its own: no other exchange is taken for it.
        self._once(GATHER_OP, np.zeros(1, np.float32))

    def finish(self) -> None:
        """Waits until all workers call it; from then on one that is gone is not reported to `on_loss`."""
        self._on_loss = lambda reason: None  # on all of them, before any can end
        self.barrier()

    def lost(self) -> Ending | None:
        """What has become of a worker that is gone, whether it was waited for or not, or None."""
        return self.failure or self._connections.lost(self.others)

    def fail(self, reason: Fault) -> None:
        """Has everything fail that waits for other workers, now and until `rejoin`; called from any thread."""
        with self._changed:
            self.failure = self.failure or reason
            self._changed.notify_all()

    def leave(self) -> None:
        """Closes the connections without a word: to meet again, see `rejoin`."""
        self.fail(Fault("this worker has left the others, to meet them again"))
        self._connections.close(seconds=0.0)

    def rejoin(self, workers: Sequence[str], links: dict[int, Link]) -> None:
        """Goes on over other connections; all call it, after `leave`.

        What was under way is forgotten. Functions that were traced go on, if there are as many workers as before.

        Args:
            workers: 'host:port' of each, in rank order.
            links: from `rendezvous.connect`.
        """
        with self._changed:
            self._epoch += 1
            if len(workers) != self.size:
                self.size, self.knows_rank = len(workers), False
                self._ops.clear()
                self._outside.clear()
            for op in self._ops.values():
                op.begun = 0
                op.runs.clear()
                op.tensor.results.clear()
            self._ahead.clear()
            self._unknown.clear()
            self._copies.clear()
            self.workers, self.failure = list(workers), None
            self._connections = Connections(workers, links, self._patience, self._target, self._lost)

    def close(self, reason: Ending | None = None) -> None:
        """Closes the connections: what is waited for fails.

        Args:
            reason: why this worker ends before the others; it is sent to them.
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._on_loss = lambda reason: None  # to lose the others is now as it should be
            self.failure = self.failure or Fault("this worker has closed its connections to the others")
            self._changed.notify_all()
        self._connections.close(reason)

    def _once(self, kind: str, array: np.ndarray) -> np.ndarray:
        # One op serves all exchanges of a kind and size, or a long run would make one a step.
        key = kind, array.dtype, array.size
        if key not in self._outside:
            self._outside[key] = self._add(kind, array.dtype, array.size, outside=True)
        tensor = self._outside[key]
        return self._end(tensor, self._begin(tensor, np.ascontiguousarray(array)))

    def _add(self, kind: str, dtype: Any, count: int, outside: bool = False) -> _Tensor:
        dtype, sums = np.dtype(dtype), kind == SUM_OP
        tensor = _Tensor(kind, dtype, self.size * count if kind == GATHER_OP else count, outside, self._apart)
        piece = self.size * _LARGEST // dtype.itemsize if sums else tensor.size
        for i, start in enumerate(range(0, max(1, tensor.size), max(1, piece))):
            length = min(piece, tensor.size - start)
            share = min(self.size, max(1, length * dtype.itemsize // _SMALLEST)) if sums else self.size
            bounds = [start + k * length // share for k in range(share + 1)]
            number = _number(f"outside {kind} {dtype} {count} {i}" if outside else f"{self._name} {self._added}")
            first = (number if outside else self._added) if sums else 0
            places = {(first + k) % self.size: slice(bounds[k], bounds[k + 1]) for k in range(share)}
            self._add_op(_Op(number, tensor, places, self._name))
            self._added += not outside
        return tensor

    def _add_op(self, op: _Op) -> None:
        with self._changed:
            op.tensor.ops.append(op)
            self._ops[op.number] = op
        self._connections.retry()

    def _begin(self, tensor: _Tensor, array: np.ndarray) -> np.int64:
        """Queues what is to be sent of an array; returns its run's number. Never blocks: it holds a thread of few."""
        number = tensor.ops[0].begun
        for op in tensor.ops:
            with self._changed:
                run = self._run(op, op.begun)
                op.begun += 1
            if tensor.kind != SUM_OP:
                self._finish(run, array)
                break
            for rank, place in op.places.items():
                if rank == self.rank:
                    self._arrived(run, _PART, rank, array[place])
                else:
                    self._put(rank, run, _PART, array[place])
        return np.int64(number)

    def _end(self, tensor: _Tensor, number: np.int64) -> np.ndarray:
        """Waits for the result of a run."""
        with self._changed:
            epoch = self._epoch
            for op in tensor.ops:
                run = op.runs[int(number)]
                while not run.done():
                    if self._epoch != epoch:
                        raise Fault("the workers have met again meanwhile")
                    # Whoever is not waited for may have ended as it should, after its last part.
                    late = [rank for _, rank in sorted(run.waiting) if rank != self.rank]
                    self.failure = self.failure or self._connections.lost(late)
                    self.failure = self.failure or (None if tensor.apart else self._gone_on(late))
                    if self.failure:
                        raise self.failure
                    began = time.monotonic()
                    self._changed.wait()
                    if not tensor.apart:  # beside which steps go on
                        self.waited += time.monotonic() - began
                del op.runs[run.number]
            result = tensor.results.pop(int(number))
        return result if tensor.kind in (SUM_OP, _COPY) else result.reshape(self.size, -1)

    def _gone_on(self, late: Sequence[int]) -> Ending | None:
        """What to say if one of those that are waited for has left out what is waited for, and goes on beyond it.

        What a worker exchanges outside of functions it begins only after all that it has begun before has ended.
        """
        for rank in late:
            run = self._ahead.get(rank)
            unknown = rank in self._unknown and self._unknown[rank] not in self._ops
            if unknown or (run and run.number >= run.op.begun):
                return UserError(
                    f"worker {rank} ({self.workers[rank]}) has gone on where worker {self.rank} "
                    f"({self.workers[self.rank]}) waits for its part: all workers must take the same number of steps, "
                    "of batches of the same shapes, and evaluate and read metrics at the same points"
                )
        return None

    def _run(self, op: _Op, number: int) -> _Run:
        if number not in op.runs:
            # A peer is at most one run ahead: to end one it needs this worker's part of it.
            if number != op.begun:
                raise ValueError(f"run {number} of op {op.number}, where run {op.begun} is next")
            tensor = op.tensor
            if number not in tensor.results:
                tensor.results[number] = aligned(tensor.size, tensor.dtype)
            waiting = {(_FINAL, rank) for rank in op.places}
            if self.rank in op.places and tensor.kind == SUM_OP:
                waiting |= {(_PART, rank) for rank in range(self.size)}
            op.runs[number] = _Run(op, number, tensor.results[number], waiting)
        return op.runs[number]

    def _put(self, rank: int, run: _Run, kind: int, array: np.ndarray) -> None:
        data = array.view(np.uint8)
        with self._changed:
            run.unsent += 1
        message = Message(kind, run.op.number, run.number, len(data), run.op.tensor.bytes)
        # What steps wait for overtakes what travels meanwhile.
        self._connections.send(rank, message, data, functools.partial(self._sent, run), later=run.op.tensor.apart)

    def _sent(self, run: _Run) -> None:
        with self._changed:
            run.unsent -= 1
            if run.done():
                self._changed.notify_all()

    def _arrived(self, run: _Run, kind: int, rank: int, part: np.ndarray) -> None:
        """Notes what is complete; the last part's thread adds them up."""
        with self._changed:
            if kind == _PART:
                run.parts[rank] = part
            if kind == _FINAL or len(run.parts) < self.size:
                return self._tick(run, kind, rank)
        place = run.result[run.op.places[self.rank]]
        add_up([run.parts[k] for k in range(self.size)], place)
        del run.parts[self.rank]
        self._spare[place.nbytes] += run.parts.values()
        run.parts.clear()
        self._finish(run, place)
        with self._changed:
            self._tick(run, kind, rank)

    def _tick(self, run: _Run, kind: int, rank: int) -> None:
        run.waiting.remove((kind, rank))
        if outside := run.op.tensor.outside:
            self._ahead[rank] = run
        if outside or run.done():
            self._changed.notify_all()

    def _finish(self, run: _Run, array: np.ndarray) -> None:
        """Sends this worker's place of the result to all, and fills it here; of an all-to-all, each its own row."""
        kind = run.op.tensor.kind
        for rank in self.others if run.op.tensor.to is None else run.op.tensor.to:
            self._put(rank, run, _FINAL, array[rank] if kind == ALL_TO_ALL_OP else array)
        if kind != SUM_OP:
            run.result[run.op.places[self.rank]] = array[self.rank] if kind == ALL_TO_ALL_OP else array
        self._arrived(run, _FINAL, self.rank, array)

    def _target(self, rank: int, message: Message) -> tuple[np.ndarray, Callable[[], None]] | None:
        """Where the bytes of a message go, and what to do once they are there; None where that is not known yet."""
        kind, number, run_number, size, whole = message
        with self._changed:
            if self._closed:
                raise EOFError("closed here")
            if number not in self._ops:
                self._unknown[rank] = number
                self._changed.notify_all()
                return None  # the peer has traced a function, and begun it, before this worker has
            self._unknown.pop(rank, None)
            op = self._ops[number]
            # Workers that differ may divide a tensor among others, and into chunks of the same size.
            if whole != op.tensor.bytes:
                raise ValueError(f"a part of {whole} bytes for op {number}, which has {op.tensor.bytes}")
            run = self._run(op, run_number)
            if (kind, rank) not in run.waiting or (kind == _PART and rank in run.parts):
                raise ValueError(f"message {kind} of op {number} was not expected")
            target = run.result[op.places[self.rank if kind == _PART else rank]]
            if size != target.nbytes:
                raise ValueError(f"{size} bytes for op {number}, which takes {target.nbytes}")
        if kind == _PART:
            spare = self._spare[target.nbytes]
            target = spare.pop().view(target.dtype) if spare else np.empty_like(target)
        return target.view(np.uint8), functools.partial(self._arrived, run, kind, rank, target)

    def _lost(self, reason: str) -> None:
        with self._changed:
            self._changed.notify_all()
        self._on_loss(reason)


def _number(name: str) -> int:
    """The number of an op, of 8 bytes, by which no two of a run are the same."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
