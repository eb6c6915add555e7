"""Threads and processes that read the batches of a source, several at a time."""

import atexit
import contextlib
import contextvars
import functools
import multiprocessing
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_partial.data.parallel import reads_at_once
from dist_partial.data.reading import fetch, innermost, trait
from dist_partial.errors import Ending, Fault, UserError, first_line

if TYPE_CHECKING:
    from dist_partial.data.source import Source

_THREADS = 4  # for a source that several may read; each holds a batch

Read = Callable[[np.ndarray, np.ndarray | None], tuple[Any, ...]]


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
            return functools.partial(_alone, self._locks.setdefault(id(innermost(source)), threading.Lock()), source)
        try:
            content = pickle.dumps(source)
        except Exception as error:  # pickle raises this and that
            raise UserError(
                f"run.reader_processes = {self.processes}: {type(source).__name__} of run.data cannot be sent to "
                f"another process ({first_line(error)}): make it of classes and functions that a module has by name, "
                "and open files when they are first read"
            ) from error
        if self._pool is None:
            self._pool = _Processes(self.processes, self.bound)
        return functools.partial(self._pool.read, id(source), content)

    def close(self) -> None:
        """Ends the processes."""
        if self._pool is not None:
            self._pool.close()


def _alone(lock: threading.Lock, source: "Source", indices: np.ndarray, draws: np.ndarray | None) -> tuple[Any, ...]:
    with lock:
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
    """Says how the sources are read whose batches are made within: see `Readers`. Ends the processes at the end.

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


class _Processes:
    """Reads sources in processes, each of which gets a copy of a source when it first reads from it.

    They end when the other end of their connection is gone, whatever becomes of this process.
    """

    def __init__(self, count: int, threads: int | None) -> None:
        self._what = f"run.reader_processes = {count}"
        # A copy of this process, made by fork, would hang on the locks that TensorFlow's threads hold.
        spawn = multiprocessing.get_context("spawn")
        self._started: list[Any] = []
        self._idle: queue.SimpleQueue[tuple[Any, Any, set[int]]] = queue.SimpleQueue()
        atexit.register(self.close)  # runs before multiprocessing's own, which waits for them
        for _ in range(count):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(there, threads), daemon=True, name="dist_partial reader")
            process.start()
            there.close()
            self._started.append(process)
            self._idle.put((process, here, set()))

    def read(self, number: int, content: bytes, indices: np.ndarray, draws: np.ndarray | None) -> tuple[Any, ...]:
        """Examples of a source, which has that number and is pickled, from the first process that is free."""
        process, connection, known = self._idle.get()
        try:
            connection.send((number, None if number in known else content, indices, draws))
            known.add(number)
            found = connection.recv()
        except (EOFError, OSError):
            process.join(1.0)
            if process.exitcode == 1:
                raise UserError(
                    f"{self._what}: a process could not start; what it printed says why. A script that trains must do "
                    'so under `if __name__ == "__main__":`, for each process imports it'
                ) from None
            raise Fault(f"{self._what}: a process has ended with code {process.exitcode}, out of memory?") from None
        finally:
            self._idle.put((process, connection, known))
        if isinstance(found, Ending):
            raise found
        return found

    def close(self) -> None:
        atexit.unregister(self.close)
        for process in self._started:
            process.kill()
        for process in self._started:
            process.join()


def _serve(connection: Any, threads: int | None) -> None:
    """Reads what is asked for until nobody can ask any more."""
    for number in (signal.SIGINT, signal.SIGTERM):  # which whole groups of processes get: the run stops by itself
        signal.signal(number, signal.SIG_IGN)
    sources: dict[int, Any] = {}
    with reads_at_once(threads), contextlib.suppress(EOFError, OSError):  # of the other end
        while True:
            number, content, indices, draws = connection.recv()
            try:
                if content is not None:
                    sources[number] = _made(content)
                connection.send(fetch(sources[number], indices, draws))
            except Ending as error:
                connection.send(error)


def _made(content: bytes) -> Any:
    try:
        return pickle.loads(content)
    except Exception as error:
        raise UserError(
            f"run.reader_processes: run.data cannot be made in another process ({first_line(error)}): define what it "
            "is made of in a module, and not in a notebook"
        ) from error
