"""Threads and processes that read the batches of a source, several at a time."""

import atexit
import collections
import contextlib
import contextvars
import functools
import multiprocessing
import os
import queue
import signal
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.reduction import recv_handle, send_handle
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from dist_partial.data.parallel import reads_at_once
from dist_partial.data.reading import fetch, innermost, trait
from dist_partial.data.shared import SharedArrays, restored
from dist_partial.data.stream_position import begun
from dist_partial.errors import Ending, Fault, UserError, first_line
from dist_partial.terminal import say

if TYPE_CHECKING:
    from dist_partial.data.source import Source

_THREADS = 4  # for a source that several may read; each holds a batch
_PATIENCE = 5.0  # seconds until a process whose connection is gone has ended
_NAMED = 8  # examples, of those that were read when a process ended

Read = Callable[[np.ndarray, np.ndarray | None], tuple[Any, ...]]


# What was read last for functions of TensorFlow, whose errors do not say on which example.
recent: collections.deque[tuple[Any, np.ndarray, np.ndarray]] = collections.deque(maxlen=64)


class Readers:
    """Says by how many threads and processes sources are read.

    Args:
        threads: batches that are read at a time, and reads of TFRecords and image files in all; None: 4 where a source
            has `thread_safe = True`, else 1, and 8 such reads.
        processes: that read in place of the threads; 0 lets the threads read.
    """

    def __init__(self, threads: int | None = None, processes: int = 0) -> None:
        self.bound, self.processes = threads, processes
        self._pool: _Processes | None = None
        self._sources: list[Source] = []  # kept, so that no other one gets the id of one
        self._locks: dict[int, threading.Lock] = {}
        self._started: list[weakref.ref[Any]] = []

    def threads(self, source: "Source") -> int:
        """How many threads read a source, of a batch each."""
        return max(self.bound or (_THREADS if trait(source, "thread_safe", False) else 1), self.processes)

    def reader(self, source: "Source") -> Read:
        """What reads a source: `fetch`, or processes, which the first call starts."""
        self._sources.append(source)
        if not self.processes:
            if self.bound or trait(source, "thread_safe", False):
                return functools.partial(fetch, source)
            # Training and evaluations read at the same time, often parts of one source.
            bases = sorted({id(base) for base in innermost(source)})  # in one order, or two might wait for each other
            return functools.partial(_alone, [self._locks.setdefault(i, threading.Lock()) for i in bases], source)
        if self._pool is None:
            self._pool = _Processes(self.processes, self.bound)
        return self._pool.reader(source)

    def start(self, batches: tf.data.Dataset) -> Iterator[Any]:
        """Begins to read batches, which `close` ends."""
        iterator = iter(batches)
        self._started.append(weakref.ref(iterator))
        return iterator

    def close(self) -> None:
        """Ends what reads ahead, and the processes."""
        if self._pool is not None:
            self._pool.kill()  # or a reading that waits for one of them would be waited for
        try:
            for known in self._started:
                if (iterator := known()) is not None:
                    _end(iterator)
        finally:
            if self._pool is not None:
                self._pool.close()


def _end(iterator: Any) -> None:
    """Ends the threads that read ahead for an iterator of tf.data.

    Its destructor would do so, and waits for them: never to return, where the garbage collector calls it from one of
    them. An iterator that an exception refers to is in a cycle of references, which only that collector finds.
    """
    nothing = tf.nest.map_structure(lambda one: tf.zeros([0, *one.shape], one.dtype), iterator.element_spec)
    (handle,) = tf.nest.flatten(iterator, expand_composites=True)
    empty = tf.data.experimental.to_variant(tf.data.Dataset.from_tensor_slices(nothing))
    tf.raw_ops.MakeIterator(dataset=empty, iterator=handle)


def _alone(
    locks: Sequence[threading.Lock], source: "Source", indices: np.ndarray, draws: np.ndarray | None
) -> tuple[Any, ...]:
    with contextlib.ExitStack() as held:
        for lock in locks:
            held.enter_context(lock)
        return fetch(source, indices, draws)


def faster(source: "Source") -> str:
    """Says what would have the examples of a source come faster, by how it is read now.

    Examples:
        >>> from dist_partial.data import Stream
        >>> import tensorflow as tf
        >>> faster(Stream(tf.data.Dataset.range(3)))
        'in the tf.data.Dataset of run.data, give map and interleave num_parallel_calls=tf.data.AUTOTUNE, and end it ...
    """
    if trait(source, "streamed", False):
        return (
            "in the tf.data.Dataset of run.data, give map and interleave num_parallel_calls=tf.data.AUTOTUNE, and end "
            "it with prefetch(tf.data.AUTOTUNE)"
        )
    now = readers()
    if now.processes:
        return f"bind run.reader_processes to more than {now.processes}"
    if now.bound or trait(source, "thread_safe", False):
        return f"bind run.readers to more than {now.threads(source)}, or run.reader_processes where Python computes"
    return "bind run.reader_processes where Python computes, or run.readers if several threads may read at once"


_current: contextvars.ContextVar[Readers] = contextvars.ContextVar("readers")


@contextlib.contextmanager
def reading(threads: int | None = None, processes: int = 0) -> Iterator[None]:
    """Says how the sources are read whose batches are made within: see `Readers`. Ends all reading at the end.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> with reading(threads=3):
        ...     print(readers().threads(ArraySource(np.arange(3))))
        3
        >>> readers().threads(ArraySource(np.arange(3)))
        1
    """
    with contextlib.closing(Readers(threads, processes)) as made, reads_at_once(threads):
        token = _current.set(made)
        recent.clear()  # or an error would be looked for in what an earlier run has read
        begun.clear()
        try:
            yield
        finally:
            _current.reset(token)


def readers() -> Readers:
    """Gives the readers of the `reading` around the call.

    Examples:
        >>> with reading(threads=3):
        ...     inner = readers()
        >>> inner is readers()
        False
    """
    return _current.get(None) or Readers()


def started(batches: tf.data.Dataset) -> Iterator[Any]:
    """Begins to read batches, by threads that end with the `reading` around the call.

    Args:
        batches: of static shapes.

    Examples:
        >>> with reading():
        ...     numbers = started(tf.data.Dataset.counter().prefetch(2))
        ...     print(next(numbers).numpy())
        0
        >>> list(numbers)
        []
    """
    return readers().start(batches)


class _Processes:
    """Reads sources in processes, each of which makes a source when it first reads from it; arrays are shared.

    They end when the process that has started them does, whatever becomes of it.
    """

    def __init__(self, count: int, threads: int | None) -> None:
        self._what = f"run.reader_processes = {count}"
        # A copy of this process, made by fork, would hang on the locks that TensorFlow's threads hold.
        self._spawn = multiprocessing.get_context("spawn")
        self._shared = SharedArrays()
        self._started: list[_Process] = []
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        atexit.register(self.close)  # runs before multiprocessing's own, which waits for them
        self._count, self._threads = count, threads

    def reader(self, source: "Source") -> Read:
        """What reads a source, by the first process that is free."""
        try:
            content = self._shared.pickled(source)
        except Exception as error:  # pickle raises this and that
            raise UserError(
                f"{self._what}: {type(source).__name__} of run.data cannot be sent to another process "
                f"({first_line(error)}): make it of classes and functions that a module has by name, and open files "
                "when they are first read"
            ) from error
        if not self._started:
            say(f"{self._what}: the processes start, each of which imports TensorFlow")
        while len(self._started) < self._count:
            self._started.append(_Process(self._spawn, self._shared.file, self._threads))
            self._idle.put(self._started[-1])
        return functools.partial(self._read, id(source), content)

    def _read(self, number: int, content: Any, indices: np.ndarray, draws: np.ndarray | None) -> tuple[Any, ...]:
        process = self._idle.get()
        try:
            return process.read(number, content, indices, draws)
        except (EOFError, OSError):
            raise process.ending(self._what, indices) from None
        finally:
            self._idle.put(process)

    def kill(self) -> None:
        for process in self._started:
            process.kill()

    def close(self) -> None:
        atexit.unregister(self.close)
        self.kill()
        for process in self._started:
            process.join()
        self._shared.close()


class _Process:
    """A process that reads, the connection to it, and what has passed through that."""

    def __init__(self, context: Any, file: int, threads: int | None) -> None:
        self._connection, there = context.Pipe()
        self._known: set[int] = set()
        self._ready = False
        self._process = context.Process(target=_serve, args=(there, threads), daemon=True, name="dist_partial reader")
        self._process.start()
        there.close()
        send_handle(self._connection, file, self._process.pid)
        self.kill, self.join = self._process.kill, self._process.join

    def read(self, number: int, content: Any, indices: np.ndarray, draws: np.ndarray | None) -> tuple[Any, ...]:
        """Examples of a source, which has that number and is made of `content`, see `SharedArrays`."""
        if not self._ready:
            self._ready = self._connection.recv()
        self._connection.send((number, None if number in self._known else content, indices, draws))
        self._known.add(number)
        found: Any = self._connection.recv()
        if isinstance(found, _Failed):
            raise found.ending from found
        return found

    def ending(self, what: str, indices: np.ndarray) -> UserError | Fault:
        """What ends the run after the end of the process, while it read examples."""
        self._process.join(_PATIENCE)
        code = self._process.exitcode
        if code is not None and code > 0 and not self._ready:
            return UserError(
                f"{what}: a process could not start; what it printed says why. A script that trains must do so under "
                '`if __name__ == "__main__":`, for each process imports it'
            )
        some = ", ".join(map(str, indices[:_NAMED])) + (", ..." if len(indices) > _NAMED else "")
        doing = f"while it read the examples {some}" if self._ready else "while it started"
        if code is None or code >= 0:
            return Fault(f"{what}: a process has ended with code {code} {doing}; what it printed may say why")
        name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
        why = (
            "is the memory full? bind fewer processes"
            if -code == signal.SIGKILL
            else "code that is not Python's failed"
        )
        return Fault(f"{what}: a process was ended by signal {-code} ({name}) {doing}: {why}")


class _Failed(Exception):
    """What has ended the reading in another process, with its traceback as text, for that of this process."""

    def __init__(self, ending: Ending, text: str) -> None:
        super().__init__(ending, text)
        self.ending, self._text = ending, text

    def __str__(self) -> str:
        return f"\n{self._text}"


def _serve(connection: Any, threads: int | None) -> None:
    """Reads what is asked for until nobody can ask any more."""
    for number in (signal.SIGINT, signal.SIGTERM):  # which whole groups of processes get: the run stops by itself
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sources: dict[int, Any] = {}
    with reads_at_once(threads), contextlib.suppress(EOFError, OSError):  # of the other end
        file = recv_handle(connection)
        connection.send(True)
        while True:
            number, content, indices, draws = connection.recv()
            try:
                if content is not None:
                    sources[number] = _made(file, content)
                found: Any = fetch(sources[number], indices, draws)
            except Ending as error:
                found = _Failed(error, traceback.format_exc())
            connection.send(found)


def _end_with_parent() -> None:
    """Ends this process when that which has started it is gone, though it may read for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _made(file: int, content: Any) -> Any:
    try:
        return restored(file, *content)
    except Exception as error:
        raise UserError(
            f"run.reader_processes: run.data cannot be made in another process ({first_line(error)}): define what it "
            "is made of in a module, and not in a notebook"
        ) from error
