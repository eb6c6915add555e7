"""Several readers, in threads and processes: the same batches in the same order, and an end in any case."""

import gc
import itertools
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import psutil
import pytest
import tensorflow as tf

from dist_partial.data import (
    ArraySource,
    Dataset,
    Mapped,
    Stream,
    faster,
    hold_out,
    mix,
    reading,
    started,
    train_batches,
)
from dist_partial.data.parallel import read_parts
from dist_partial.data.readers import readers
from dist_partial.errors import Fault, UserError, of_graph
from tests import ROOT
from tests.unit.data.test_batches import contexts, elements

X = np.random.default_rng(0).normal(size=(29, 3)).astype(np.float32)
Y = np.arange(29, dtype=np.int32)


def batches(source, first_step=0):
    return train_batches(source, first_step=first_step, global_batch=12, seed=3, context=contexts(1, 1)[0])


def same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        for array, its in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, its)


class Together(ArraySource):
    """Gives its first batches once three threads ask for some at the same time; later ones sooner."""

    def fetch(self, indices):
        if len(indices) == 12 and next(self.__dict__.setdefault("calls", itertools.count())) < 9:
            place = self.__dict__.setdefault("barrier", threading.Barrier(3)).wait(timeout=60)
            time.sleep(0.01 * place)
        return super().fetch(indices)


@pytest.mark.parametrize("function", [None, lambda x, y: (x, y)])
def test_threads_read_several_batches_at_once_in_the_same_order(function):
    source = Together(X, Y)
    with reading(threads=3):
        found = elements(batches(Mapped(source, function) if function else source), 12)
    same(found, elements(batches(ArraySource(X, Y)), 12))


class Alone(ArraySource):
    """Cannot be read by two at a time."""

    def fetch(self, indices):
        lock = self.__dict__.setdefault("lock", threading.Lock())
        assert lock.acquire(blocking=False)
        time.sleep(0.01)
        lock.release()
        return super().fetch(indices)


class Safe(Together):
    thread_safe = True


def test_by_itself_only_what_says_so_is_read_by_several():
    same(elements(batches(Alone(X, Y)), 6), elements(batches(ArraySource(X, Y)), 6))
    assert readers().threads(Safe(X, Y)) == readers().threads(Mapped(Safe(X, Y), lambda x, y: x)) == 4
    same(elements(batches(Safe(X, Y)), 6), elements(batches(ArraySource(X, Y)), 6))


def test_training_and_evaluation_do_not_read_one_source_at_the_same_time():
    """By itself, and through a function of the user's in NumPy, even where the source allows it."""
    whole = Alone(X, Y)
    train, held_out = hold_out(whole, 0.5)
    mixed = mix([(Dataset("n", train, held_out, "1"), 1), (Dataset("n", held_out, train, "2"), 1)])
    with reading():
        made = [iter(batches(each)) for each in (train, held_out, mixed.train, Mapped(held_out, lambda x, y: (x, y)))]
        for _ in range(6):
            for each in made:
                next(each)
    assert readers().threads(Mapped(Safe(X, Y), lambda x, y: (x, y), numpy=True)) == 1


def test_what_is_traced_stays_here():
    source = Mapped(ArraySource(X, Y), halved)
    assert source.spec[0].shape == [3]
    again = pickle.loads(pickle.dumps(source))
    same([again.fetch(np.arange(4))], [source.fetch(np.arange(4))])


class Slots:
    """A source of which no weak reference can be made."""

    __slots__ = ()
    spec = (tf.TensorSpec([], tf.int64),)

    def __len__(self):
        return 29

    def fetch(self, indices):
        return (indices,)


def test_a_source_with_slots_is_read():
    assert sorted(np.concatenate([batch[0] for batch in elements(batches(Slots()), 2)])) != []


def test_what_cannot_be_sent_to_a_process_is_named():
    source = Dataset("n", ArraySource(X, Y), ArraySource(X, Y), "1").map(lambda x, y: (x, y), numpy=True).train
    with reading(processes=1), pytest.raises(UserError, match=r"Mapped of run\.data cannot be .*<lambda>") as caught:
        batches(source)
    assert "\n" not in str(caught.value)


class Remote(ArraySource):
    """Says in which process it is; some examples cannot be read."""

    def place(self, index):
        return f"row {index}"

    def fetch(self, indices):
        if 17 in indices:
            ends = {28: _raises, 27: lambda: os._exit(9), 26: lambda: os._exit(1), 25: _killed, 24: _busy}
            ends.get(len(self), lambda: None)()
        x, y = super().fetch(indices)
        return np.full_like(x, os.getpid()), y


def _raises():
    raise RuntimeError("no such colour")


def _killed():
    os.kill(os.getpid(), signal.SIGKILL)


def _busy():
    time.sleep(600)


class Weighed(ArraySource):
    """Says how much of the memory of its process is shared, having read all of its array."""

    def fetch(self, indices):
        assert self.x.sum() > 0
        lines = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()
        shared = next(line for line in lines if line.startswith("Pss_Shmem"))
        return np.zeros([len(indices), 3], np.float32), np.full(len(indices), int(shared.split()[1]))

    spec = (tf.TensorSpec([3], tf.float32), tf.TensorSpec([], tf.int64))


def halved(x, y):
    return x / 2, y


def where(x, y, rng):
    time.sleep(0.05)
    return x, rng.normal(), np.float32(os.getpid())


def noisy(x, y, rng):
    return x, y, rng.normal()


@pytest.mark.slow
def test_processes_read_the_same_in_the_same_order_and_end(capsys):
    """One test of all, for each process imports TensorFlow."""
    source = Mapped(ArraySource(X, Y), noisy, numpy=True)
    wanted = elements(batches(source), 6)
    with reading(threads=4):
        same(elements(batches(source), 6), wanted)
    with reading(processes=2):
        same(elements(batches(source), 6), wanted)
        computed = elements(batches(Mapped(ArraySource(X, Y), where, numpy=True)), 8)
        assert len({pid for *_, pids in computed for pid in pids.tolist()}) == 2  # functions run there, too
        same([batch[1:2] for batch in computed[:6]], [batch[2:] for batch in wanted])
        plain = Mapped(Remote(X, Y), lambda x, y: (x, y))  # of which the processes read what is below
        found = elements(batches(plain), 8)
        pids = {int(number) for x, _ in found for number in np.unique(x)}
        assert len(pids) == 2 and os.getpid() not in pids
        with pytest.raises(tf.errors.OpError) as caught:
            elements(batches(Remote(X[:28], Y[:28])), 8)
        assert (error := of_graph(caught.value.message)) is not None and "\n" not in str(error)
        assert str(error).startswith("run.data raised RuntimeError: no such colour")
        assert str(error).endswith("it is row 17")
        assert 'raise RuntimeError("no such colour")' in caught.value.message  # with the traceback of that process
    assert not any(psutil.pid_exists(pid) for pid in pids)
    said = "run.reader_processes = 2: the processes start, each of which imports TensorFlow"
    assert capsys.readouterr().out.splitlines().count(said) == 1


ENDS = {
    27: (Fault, r"a process has ended with code 9 while it read the examples 3, 17; what it printed may say why"),
    26: (Fault, r"a process has ended with code 1 while it read the examples 3, 17; what it printed may say why"),
    25: (Fault, r"ended by signal 9 \(SIGKILL\) while it read the examples 3, 17: is the memory full\?"),
}


@pytest.mark.slow
def test_what_ends_a_process_is_said():
    for rows, (kind, words) in ENDS.items():
        with reading(processes=1):
            read = readers().reader(Remote(X[:rows], Y[:rows]))
            assert len(read(np.arange(3), None)[0]) == 3
            for _ in range(2):  # whoever else asks
                with pytest.raises(kind, match=rf"^run\.reader_processes = 1: .*{words}") as caught:
                    read(np.array([3, 17]), None)
                assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_arrays_are_in_memory_once():
    """In one segment, of which both parts of the data are."""
    x = np.ones([2**23])
    source = Weighed(x, np.arange(2**23))
    train, held_out = hold_out(source, 0.5)
    with reading(processes=1):
        sizes = [readers().reader(part)(np.arange(2), None)[1].max() for part in (train, held_out)]
    assert all(x.nbytes / 1024 <= size < 1.2 * x.nbytes / 1024 for size in sizes)


UNGUARDED = """
from dist_partial.data.readers import started
from tests.unit.data.test_readers import Remote, X, Y, batches, reading
with reading(processes=1):
    next(started(batches(Remote(X, Y))))
"""


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_from_a_process_that_died(tmp_path):
    (tmp_path / "script.py").write_text(UNGUARDED)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode and "UserError: run.reader_processes = 1: a process could not start" in done.stderr


SCRIPT = """
import os, sys, threading, time
import numpy as np
from dist_partial.data import reading
from dist_partial.data.readers import readers, started
from tests.unit.data.test_readers import Remote, X, Y, batches

if __name__ == "__main__":
    with reading(processes=2):
        found = started(batches(Remote(X, Y)))
        pids = {int(next(found)[0][0, 0]) for _ in range(8)}
        source = Remote(X[:24], Y[:24])
        read = readers().reader(source)
        for _ in pids:  # both read for ever
            threading.Thread(target=read, args=(np.array([17]), None), daemon=True).start()
        time.sleep(1.0)
        print(*pids, flush=True)
        if sys.argv[1] == "error":
            raise RuntimeError("no such luck")
        time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, None], ids=["killed", "interrupted", "error"])
def test_processes_end_with_the_one_that_started_them(number, tmp_path):
    """Though they read for ever."""
    path = pathlib.Path(tmp_path / "script.py")
    path.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, str(path), "sleep" if number else "error"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    ) as process:
        line = next(line for line in process.stdout if "run." not in line)  # that they start is said first
        pids = [int(pid) for pid in line.split()]
        assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
        if number:
            process.send_signal(number)
        process.wait(timeout=60)
    until = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(psutil.pid_exists(pid) for pid in pids)


class Cluttered(ArraySource):
    """Leaves garbage behind, so that the collector runs in the thread that reads; slow, so that it reads on."""

    def fetch(self, indices):
        for _ in range(2000):
            clutter = []
            clutter.append(clutter)
        time.sleep(0.02)
        return super().fetch(indices)


class Cycle:
    def __init__(self, content=None):
        self.self, self.content = self, content


def collected():
    """Whether the garbage collector still works."""
    known = weakref.ref(Cycle())
    for _ in range(20):
        if gc.collect() and known() is None:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("end", ["error", "last batch"])
def test_the_garbage_collector_survives_a_dropped_iterator(end):
    """Called in a thread that reads, it would wait for that thread, for ever, and collect nothing any more."""
    for _ in range(3):
        try:
            with reading():
                dropped = Cycle(started(batches(Cluttered(X, Y))))
                next(dropped.content)
                if end == "error":
                    raise KeyError
        except KeyError as error:
            dropped.error = error
        del dropped
        time.sleep(0.1)
    assert collected()


@pytest.mark.parametrize("reads", [1, 12])
def test_as_many_parts_of_records_are_read_at_once_as_are_bound(reads):
    together = threading.Barrier(reads)

    def read(indices):
        together.wait(timeout=30)
        return [b"%d" % index for index in indices]

    with reading(threads=reads):
        assert read_parts(read, np.arange(24)).tolist() == [b"%d" % index for index in range(24)]


def test_what_would_help_fits_what_reads():
    class Safe(ArraySource):
        thread_safe = True

    stream, safe, plain = Stream(tf.data.Dataset.range(3)), Safe(X, Y), ArraySource(X, Y)
    with reading():
        assert "num_parallel_calls" in faster(stream) and "run." not in faster(stream).replace("run.data", "")
        assert faster(Mapped(safe, lambda x, y: (x, y))).startswith("bind run.readers to more than 4, or ")
        assert faster(plain).startswith("bind run.reader_processes where Python computes")
    with reading(threads=6):
        assert faster(plain).startswith("bind run.readers to more than 6, or ")
    with reading(processes=2):
        assert faster(safe) == "bind run.reader_processes to more than 2"
