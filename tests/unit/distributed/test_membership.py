"""Workers that are left meet again, and another comes in place of a lost one: in one process, each in its own thread.

First what the backend does then, against NumPy; then what a worker and its launcher say, whose part a test plays at the
other end of a pair of sockets; then a meeting that is given up.
"""

import contextlib
import functools
import itertools
import json
import os
import select
import socket
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

from dist_partial.distributed import handshake, membership, rendezvous
from dist_partial.distributed.cluster import CONTROL
from dist_partial.distributed.membership import Epoch, Membership
from dist_partial.distributed.tcp_backend import TCPBackend
from dist_partial.distributed.worker_backend import ALL_TO_ALL_OP, GATHER_OP, SUM_OP
from dist_partial.errors import Fault, UserError
from tests import strangers
from tests.helpers.files import same_bits
from tests.helpers.threads import at_once
from tests.helpers.workers import loopback

BFLOAT16 = tf.bfloat16.as_numpy_dtype
MIB = 2**20
SECONDS = 20.0  # for what takes a moment: far less than a test that hangs has
SIZES = {"small": 5, "middle": 3000, "large": 300_000}  # of rows, by the name of the function that exchanges them


def met(count):
    """The addresses of so many workers, and what each has got from its meeting with the others."""
    workers = loopback(count)
    return workers, at_once([functools.partial(rendezvous.connect, k, workers, 10, "secret") for k in range(count)])


def again(backends):
    """They meet by new links, in the order of their new ranks."""
    workers, links = met(len(backends))

    def come(rank):
        backends[rank].rank = rank
        backends[rank].rejoin(workers, links[rank])

    at_once([functools.partial(come, rank) for rank in range(len(backends))])


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Who meets looks more often whether it is over: most of what these tests take is that they meet."""
    monkeypatch.setattr(rendezvous, "_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(membership, "_BEGINS_SECONDS", 0.5)


@pytest.fixture
def made():
    """Backends, which are closed after the test."""
    backends = []
    yield backends
    for backend in backends:
        backend.close()


@pytest.fixture
def connected(made):
    def make(count):
        workers, links = met(count)
        made.extend(TCPBackend(k, workers, own, 60.0) for k, own in enumerate(links))
        return made[-count:]

    return make


@pytest.fixture
def newcomer(made):
    """Makes one that has met nobody yet."""

    def make(count, rank=0):
        made.append(TCPBackend(rank, loopback(count), None, 60.0))
        return made[-1]

    return make


def each(backends, function):
    """What it returns on each, all at once."""
    return at_once([functools.partial(function, backend) for backend in backends])


def raises(function):
    """The error that it ends with: in a graph it is TensorFlow's, with the text of the one that was raised there."""
    with pytest.raises((Fault, tf.errors.UnknownError)) as found:
        function()
    return str(found.value)


@contextlib.contextmanager
def at_most(seconds, backends):
    """Ends what hangs, so that a test that fails does so soon."""
    timers = [threading.Timer(seconds, backend.fail, [Fault("it waits for ever")]) for backend in backends]
    for timer in timers:
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


class Program:
    """Functions of a worker that exchange, each traced once, under its name.

    Of more than two workers they are no TensorFlow functions: each that waits holds one of the threads that TensorFlow
    has in this process, which may be two.
    """

    def __init__(self, backend, names):
        self.backend, self.traced, self.functions = backend, [], {}
        for name in names:
            with backend.tracing(name):
                self.functions[name] = self._traced(name) if backend.size <= 2 else self._added(name)

    def _traced(self, name):
        def exchange(x):
            self.traced.append(name)
            sums = [tf.reshape(x, [-1]), tf.cast(x[0], tf.bfloat16)]
            (total, half), (rows,), (columns,) = self.backend.exchange(sums, [x[0]], [x])
            return total, half, rows, columns

        function = tf.function(exchange, autograph=False)
        function.get_concrete_function(tf.TensorSpec([self.backend.size, SIZES[name]], tf.float32))
        return lambda x: [result.numpy() for result in function(tf.constant(x))]

    def _added(self, name):
        self.traced.append(name)
        size, count = self.backend.size, SIZES[name]
        what = (SUM_OP, np.float32, size * count), (SUM_OP, BFLOAT16, count), (GATHER_OP, np.float32, count)
        ops = [self.backend._add(*each) for each in (*what, (ALL_TO_ALL_OP, np.float32, size * count))]

        def exchange(x):
            arrays = x.reshape(-1), x[0].astype(BFLOAT16), x[0], x
            tickets = [self.backend._begin(op, array) for op, array in zip(ops, arrays, strict=True)]
            return [self.backend._end(op, ticket) for op, ticket in zip(ops, tickets, strict=True)]

        return exchange

    def __call__(self, name, x):
        return self.functions[name](x)


def draw(seed, rank, name, size):
    return np.random.default_rng([seed, rank]).normal(size=(size, SIZES[name])).astype(np.float32)


def expected(inputs, rank):
    """What `Program` returns on a worker."""
    halves = [x[0].astype(BFLOAT16).astype(np.float32) for x in inputs]
    total = functools.reduce(np.add, [x.reshape(-1) for x in inputs])
    return [
        total,
        functools.reduce(np.add, halves).astype(BFLOAT16),
        np.stack([x[0] for x in inputs]),
        np.stack([x[rank] for x in inputs]),
    ]


def check_functions(programs, names, seed):
    size = len(programs)
    for name in names:
        inputs = [draw(seed, rank, name, size) for rank in range(size)]
        results = at_once([functools.partial(p, name, x) for p, x in zip(programs, inputs, strict=True)])
        for rank, result in enumerate(results):
            for found, wanted in zip(result, expected(inputs, rank), strict=True):
                assert same_bits([found, wanted])


def check_outside(backends, seed, count=7):
    """All that can be exchanged outside of functions."""
    size = len(backends)
    inputs = [np.random.default_rng([seed, rank]).normal(size=(size, count)).astype(np.float32) for rank in range(size)]

    def work(backend):
        own = inputs[backend.rank]
        backend.barrier()
        return backend.sum(own[0]), backend.gather(own.tobytes()[: backend.rank]), backend.all_to_all(own)

    for rank, (total, gathered, columns) in enumerate(each(backends, work)):
        assert same_bits([total, functools.reduce(np.add, [x[0] for x in inputs])])
        assert gathered == [x.tobytes()[:k] for k, x in enumerate(inputs)]
        assert same_bits([columns, np.stack([x[rank] for x in inputs])])


def lose(backend, messages):
    """Has it send so many messages more, and then be gone without a word, as a process that is killed."""
    send, sent = backend._connections.send, itertools.count()

    def last(*message, **options):
        number = next(sent)
        if number < messages:
            send(*message, **options)
        if number == messages:
            threading.Timer(0.1, backend.leave).start()

    backend._connections.send = last


@pytest.mark.parametrize("messages", [0, 5])
@pytest.mark.parametrize("count", [2, 3])
def test_functions_go_on_without_being_traced_again_with_one_in_place_of_one_lost_in_an_exchange(
    connected, newcomer, count, messages
):
    backends = connected(count)
    programs = [Program(backend, SIZES) for backend in backends]
    check_functions(programs, SIZES, 1)
    check_outside(backends, 2)
    # One has begun what the others know nothing of: nothing of it may be left where they meet again.
    lose(backends[1], messages)
    ones = np.ones((count, SIZES["large"]), np.float32)
    at_once([functools.partial(raises, functools.partial(program, "large", ones)) for program in programs])
    raises(lambda: backends[0].sum(np.ones(7, np.float32)))
    each([backend for backend in backends if backend.rank != 1], TCPBackend.leave)
    backends[1] = newcomer(count, rank=count - 1)  # of three, it was to be another
    programs[1] = Program(backends[1], ["large", "small", "middle"])
    again(backends)
    assert [(b.rank, b.failure, b.lost()) for b in backends] == [(k, None, None) for k in range(count)]
    check_outside(backends, 3)
    check_functions(programs, ["middle", "large", "small", "large"], 4)
    check_outside(backends, 5, count=4000)
    assert [sorted(program.traced) for program in programs] == [sorted(SIZES)] * count


def test_they_meet_again_as_often_as_one_is_lost_whoever_it_is(connected, newcomer):
    backends = connected(2)
    programs = [Program(backend, ["small", "middle"]) for backend in backends]
    for epoch, lost in enumerate([1, 0, 0, 1]):
        check_functions(programs, ["small", "middle"][: 1 + epoch % 2], epoch)
        for _ in range(epoch):  # each has begun another number of runs than the one that comes
            check_outside(backends, epoch)
        backends[lost].leave()
        stays = backends[1 - lost]
        raises(stays.barrier)
        assert stays.lost()
        stays.leave()
        stays.leave()  # as where the loss was heard of while it left
        backends[lost] = newcomer(2, rank=1 - lost)
        programs[lost] = Program(backends[lost], ["middle", "small"])
        again(backends)
    check_functions(programs, ["middle", "small"], 9)
    assert [sorted(program.traced) for program in programs] == [["middle", "small"]] * 2


def test_what_is_not_traced_yet_where_they_meet_again_is_waited_for(connected, newcomer):
    backends = connected(2)
    backends[1].leave()
    backends[0].leave()
    backends[1] = newcomer(2)
    again(backends)

    def work(backend):
        time.sleep(0.3 * backend.rank)
        return Program(backend, ["small"])("small", draw(1, backend.rank, "small", 2))

    inputs = [draw(1, rank, "small", 2) for rank in range(2)]
    for rank, result in enumerate(each(backends, work)):
        assert all(same_bits(pair) for pair in zip(result, expected(inputs, rank), strict=True))


def test_functions_that_run_beside_others_go_on_as_well(connected, newcomer):
    backends = connected(2)

    def program(backend):
        with backend.tracing("beside"), backend.traced_apart():
            function = tf.function(lambda x: backend.exchange([x], [])[0][0], autograph=False)
            function.get_concrete_function(tf.TensorSpec([9], tf.float32))
        return function

    functions = [program(backend) for backend in backends]
    threading.Timer(0.2, backends[1].leave).start()
    raises(lambda: functions[0](tf.ones([9])))
    backends[0].leave()
    backends[1] = newcomer(2)
    functions[1] = program(backends[1])
    again(backends)
    for _ in range(3):
        for total in at_once([functools.partial(f, tf.fill([9], k + 1.0)) for k, f in enumerate(functions)]):
            assert total.numpy().tolist() == [3.0] * 9


@pytest.mark.parametrize("count", [9, 10**6])  # so much that some of it has not left when the worker does
def test_what_was_under_way_is_used_by_nothing_that_comes_later(connected, newcomer, count):
    """Although it has the op, the run and the size of what is exchanged then."""
    backends = connected(3)

    def adding(backend):
        with backend.tracing("sum"):
            return backend._add(SUM_OP, np.float32, count)

    old = adding(backends[0])  # the others have not traced it yet: what comes for it waits there
    backends[0]._begin(old, np.full(count, 1000, np.float32))
    time.sleep(0.2)
    backends[2].leave()
    each(backends[:2], TCPBackend.leave)
    now = [*backends[:2], newcomer(3)]
    again(now)

    def work(backend):
        op = old if backend is backends[0] else adding(backend)
        return [backend._end(op, backend._begin(op, np.full(count, 10.0**k, np.float32))) for k in range(2)]

    for first, second in each(now, work):
        assert (first == 3).all() and (second == 30).all()
    assert not any(op.runs for backend in now for op in backend._ops.values())


def test_a_worker_that_is_taken_for_lost_and_is_not_gets_nothing_in(connected, newcomer):
    backends = connected(3)
    check_outside(backends, 1)
    old = {k: peer.link.socket for k, peer in backends[2]._connections._peers.items()}
    each(backends[:2], TCPBackend.leave)
    now = [*backends[:2], newcomer(3, rank=2)]
    again(now)
    # It knows of nothing, and takes part in what the others exchange: they have closed their ends of what it has.
    reason = raises(lambda: backends[2].sum(np.full(7, 1000, np.float32)))
    assert "is gone" in reason
    for connection in old.values():
        connection.setblocking(True)
        with pytest.raises(OSError):
            for _ in range(3):  # the first may be taken before its end is known
                connection.sendall(b"x" * 100)
                time.sleep(0.05)
    check_outside(now, 2)
    check_outside(now, 3)


WAITS = {
    "sum": lambda backend: backend.sum(np.ones(5, np.float32)),
    "large sum": lambda backend: backend.sum(np.ones(10**7, np.float32)),
    "gather": lambda backend: backend.gather(b"x"),
    "all-to-all": lambda backend: backend.all_to_all(np.ones((2, 3), np.float32)),
    "barrier": lambda backend: backend.barrier(),
    "getting a copy": lambda backend: backend.copy(b"", 9, 1, [0]),
    "sending a copy": lambda backend: backend.copy(bytes(64 * MIB), 64 * MIB, 0, [1]),  # which nobody reads
    "function": lambda backend: tf.function(lambda: backend.exchange([tf.ones([5])], []))(),
}


@pytest.mark.parametrize("what", WAITS)
def test_whatever_waits_fails_with_the_reason_that_is_given(connected, what):
    backends = connected(2)
    threading.Timer(0.2, backends[0].fail, [Fault("another worker is lost")]).start()
    [reason] = at_once([lambda: raises(lambda: WAITS[what](backends[0]))])
    assert "another worker is lost" in reason
    backends[0].fail(Fault("for another reason"))
    for later in ("barrier", "getting a copy"):  # until they meet again, and for the first reason
        assert raises(lambda later=later: WAITS[later](backends[0])) == "another worker is lost"
    assert str(backends[0].lost()) == "another worker is lost"
    each(backends, TCPBackend.leave)
    again(backends)
    assert backends[0].failure is None
    check_outside(backends, 1)


def test_all_threads_that_wait_fail(connected):
    backend, _ = connected(2)
    threading.Timer(0.3, backend.fail, [Fault("another worker is lost")]).start()
    what = [functools.partial(WAITS[each], backend) for each in ("sum", "barrier", "getting a copy", "all-to-all")]
    assert at_once([functools.partial(raises, one) for one in what]) == ["another worker is lost"] * 4


def test_to_leave_wakes_up_what_waits_on_both_sides(connected):
    backends = connected(3)
    threading.Timer(0.2, backends[0].leave).start()
    # Of the other, each waits for what it has yet to begin: who has sent its part may end.
    what = [lambda: backends[0].copy(b"", 9, 2, [0]), backends[1].barrier]
    own, others = at_once([functools.partial(raises, one) for one in what])
    assert "this worker has left" in own and "worker 0 (" in others and "is gone" in others


def test_to_close_after_leaving_is_no_mistake(connected):
    for reason in (None, Fault("nobody has come")):
        backends = connected(2)
        each(backends, TCPBackend.leave)
        each(backends, lambda backend, reason=reason: backend.close(reason))


def test_one_that_has_met_nobody_yet_has_lost_nobody(newcomer):
    """As it is asked where an error ends it while it compiles."""
    backend = newcomer(3, rank=1)
    assert backend.lost() is None
    backend.close(Fault("it does not compile"))


@pytest.mark.parametrize("size", [0, 1, 5 * MIB + 3])
@pytest.mark.parametrize(("source", "to"), [(0, [1]), (2, [0, 3]), (1, [0, 2, 3])])
def test_a_copy_reaches_those_that_are_named_and_needs_nobody_else(connected, size, source, to):
    backends = connected(4)
    data = np.random.default_rng(size).bytes(size)

    def work(backend):
        found = None
        if backend.rank in (source, *to):
            found = backend.copy(data if backend.rank == source else b"", size, source, to)
        return found, backend.gather(bytes([backend.rank]))  # which comes next, on all

    for rank, (found, ranks) in enumerate(each(backends, work)):
        assert found == (data if rank in (source, *to) else None)
        assert ranks == [bytes([k]) for k in range(4)]


def test_a_copy_from_each_to_the_next_all_at_once(connected):
    backends = connected(3)

    def work(backend):
        found = []
        for source in range(3):
            to = (source + 1) % 3
            if backend.rank in (source, to):
                found.append(backend.copy(bytes([source]) * MIB, MIB, source, [to]))
        return found

    for rank, found in enumerate(each(backends, work)):
        assert found == [bytes([source]) * MIB for source in sorted({rank, (rank - 1) % 3})]


def test_copies_before_and_after_they_meet_again(connected, newcomer):
    backends = connected(3)
    for epoch in range(3):
        for turn, size in enumerate([4, 0, 4, 3 * MIB, 4]):

            def work(backend, size=size, data=bytes([epoch, turn, 7, 9]) * (size // 4)):
                found = backend.copy(data if backend.rank == 0 else b"", size, 0, [1, 2]) == data
                backend.barrier()
                return found

            assert all(each(backends, work))
        # One has been sent what it has not asked for when they part.
        backends[0].copy(b"old!", 4, 0, [1, 2])
        each(backends[: 2 + epoch % 2], TCPBackend.leave)
        backends = [*backends[:2], newcomer(3, rank=2)]
        again(backends)


@pytest.mark.parametrize("sizes", [[5, 5, 5], [5, 6, 5, 6, 5], [0, 0, 0], [3 * MIB] * 3])
@pytest.mark.parametrize("before", [0, 1])
def test_copies_in_a_row_reach_one_that_asks_for_them_late(connected, sizes, before):
    """Whoever sends a copy waits for nobody: all may have come before the first is asked for."""
    backends = connected(2)

    def copies(backend, count, late):
        found = []
        for turn, size in enumerate(sizes[:count]):
            time.sleep(late * backend.rank)
            found.append(backend.copy(bytes([turn]) * size if backend.rank == 0 else b"", size, 0, [1]))
        return found

    for count, late in ((before, 0.0), (len(sizes), 0.1)):
        wanted = [bytes([turn]) * size for turn, size in enumerate(sizes[:count])]
        with at_most(3.0, backends):
            assert each(backends, functools.partial(copies, count=count, late=late)) == [wanted] * 2
            each(backends, TCPBackend.barrier)


def test_ops_have_the_same_numbers_in_whatever_order_functions_are_traced(connected):
    backends = connected(3)
    kinds = {"a": [SUM_OP] * 3, "b": [GATHER_OP, SUM_OP], "a 1": [ALL_TO_ALL_OP], "": [SUM_OP], "c": []}

    def trace(backend, names):
        numbers = {}
        for name in names:
            with backend.tracing(name):
                added = [backend._add(kind, np.float32, 3 * 10**6) for kind in kinds[name]]  # of several pieces
            numbers[name] = [[(op.number, op.places) for op in tensor.ops] for tensor in added]
        return numbers

    orders = [["a", "b", "a 1", "", "c"], ["c", "", "a 1", "b", "a"], ["b", "c", "a", "", "a 1"]]
    first, *others = [trace(backend, order) for backend, order in zip(backends, orders, strict=True)]
    assert others == [first] * 2
    numbers = [number for tensors in first.values() for ops in tensors for number, _ in ops]
    assert len(set(numbers)) == len(numbers) > 8 and all(0 <= number < 2**64 for number in numbers)


def test_a_function_that_is_traced_within_another_name_ends_there(connected):
    def trace(backend, within):
        with backend.tracing("outer"):
            first = backend._add(SUM_OP, np.float32, 3)
            if within:
                with backend.tracing("inner"):
                    backend._add(SUM_OP, np.float32, 3)
            second = backend._add(SUM_OP, np.float32, 3)
        return [tensor.ops[0].number for tensor in (first, second)]

    backends = connected(2)
    assert trace(backends[0], True) == trace(backends[1], False)


def test_what_is_traced_again_by_a_name_replaces_what_had_it(connected):
    backends = connected(2)
    programs = [Program(backend, ["small", "middle"]) for backend in backends]
    check_functions(programs, ["small", "middle", "small"], 1)
    count = len(backends[0]._ops)
    programs = [Program(backend, ["small"]) for backend in backends]
    check_functions(programs, ["small", "small"], 2)
    # With others of its ops than before.
    with contextlib.ExitStack() as names:
        for backend in backends:
            names.enter_context(backend.tracing("middle"))
        ops = [[backend._add(kind, np.float32, 3) for kind in (GATHER_OP, SUM_OP)] for backend in backends]
    assert len(backends[0]._ops) == count

    def work(backend):
        tickets = [backend._begin(op, np.full(3, 1.0 + backend.rank, np.float32)) for op in ops[backend.rank]]
        return [backend._end(op, t).tolist() for op, t in zip(ops[backend.rank], tickets, strict=True)]

    assert each(backends, work) == [[[[1.0] * 3, [2.0] * 3], [3.0] * 3]] * 2


@pytest.mark.parametrize("runs", [0, 3])
def test_a_function_that_is_traced_again_later_than_elsewhere_finds_what_has_arrived(connected, runs):
    """As one does that is traced for the first time."""
    backends = connected(2)
    programs = [Program(backend, ["small"]) for backend in backends]
    check_functions(programs, ["small"] * runs, 1)
    for backend in backends:
        backend.forget("small")
    each(backends, TCPBackend.barrier)
    inputs = [draw(2, rank, "small", 2) for rank in range(2)]

    def work(backend):
        time.sleep(0.5 * backend.rank)
        return Program(backend, ["small"])("small", inputs[backend.rank])

    with at_most(3.0, backends):
        results = each(backends, work)
    for rank, result in enumerate(results):
        assert all(same_bits(pair) for pair in zip(result, expected(inputs, rank), strict=True))


class Launcher:
    """The launcher's end of the socket to a worker."""

    def __init__(self):
        self.own, self.worker = socket.socketpair()
        self.own.settimeout(SECONDS)
        self._lines = self.own.makefile("rb")

    def tell(self, **message):
        self.own.sendall(json.dumps(message).encode() + b"\n")

    def epoch(self, number, rank=0, workers=("127.0.0.1:1", "127.0.0.1:2"), secret="of this epoch"):
        self.tell(epoch=number, rank=rank, workers=workers, secret=secret)

    def hears(self):
        return self._lines.readline().decode()

    def hears_nothing(self):
        """What was said before would come before the answer."""
        self.tell(ask=True)
        return self.hears() == '{"answers": true}\n'

    def close(self):
        self._lines.close()
        self.own.close()


@pytest.fixture
def launchers():
    made = []

    def make():
        made.append(Launcher())
        return made[-1]

    yield make
    for launcher in made:
        launcher.close()


@pytest.fixture
def launcher(launchers):
    return launchers()


def give_up(epoch, abandoned):
    """A meeting to which nobody comes."""
    until = time.monotonic() + SECONDS
    while not abandoned():
        assert time.monotonic() < until, "nobody has said that it is over"
        time.sleep(0.01)
    raise Fault("given up")


def meeting(backend):
    """As `replicas` has it."""

    def meet(epoch, abandoned):
        return rendezvous.connect(backend.rank, epoch.workers, SECONDS, epoch.secret, abandoned=abandoned)

    return meet


def in_thread(function):
    """What it returns or raises, once it is waited for."""
    found = []

    def call():
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()

    def wait(seconds=SECONDS):
        thread.join(seconds)
        assert found, "hangs"
        return found[0]

    return wait


def test_the_socket_to_the_launcher_is_taken_once(monkeypatch, launcher):
    monkeypatch.setenv(CONTROL, str(os.dup(launcher.worker.fileno())))
    with membership.control() as control:
        control.sendall(b"{}\n")
    assert launcher.hears() == "{}\n"
    assert CONTROL not in os.environ and membership.control() is None


def test_each_message_is_a_line_of_json_as_it_is_documented(launcher, newcomer):
    workers, links = met(2)
    backend = newcomer(2, rank=1)
    member = Membership(launcher.worker, backend, lambda epoch, abandoned: links[0], SECONDS, joins=False)
    member.stay([1, 2])
    assert launcher.hears() == '{"stays": true, "fewer": [1, 2]}\n'
    member.ready()
    assert launcher.hears() == '{"ready": true}\n'
    member.leave(None)
    assert launcher.hears() == '{"left": 0, "step": null}\n'
    launcher.epoch(4, workers=workers)
    member.rejoin()
    member.went(120)
    assert launcher.hears() == '{"went": 4, "step": 120}\n'
    member.leave(120)
    assert launcher.hears() == '{"left": 4, "step": 120}\n'
    launcher.tell(ask=True)
    assert launcher.hears() == '{"answers": true}\n'
    member.end()
    assert launcher.hears() == '{"ends": true}\n'
    for message in ("stays", "ready", "answers", "left", "waited", "went", "ends", "leave", "ask", "epoch", "end"):
        assert f'{{"{message}": ' in membership.__doc__
    links[1][0].socket.close()


def test_what_two_threads_say_at_once_stays_apart(launcher, newcomer):
    member = Membership(launcher.worker, newcomer(2), give_up, SECONDS, joins=False)

    def ask():
        for _ in range(200):
            launcher.tell(ask=True)

    def say():
        for _ in range(200):
            member.stay()

    asking, saying = in_thread(ask), in_thread(say)
    lines = sorted(launcher.hears() for _ in range(400))
    assert lines == ['{"answers": true}\n'] * 200 + ['{"stays": true, "fewer": []}\n'] * 200
    assert asking() is saying() is None


def test_a_worker_that_waits_answers_and_is_woken_up_when_it_is_to_leave(launcher, connected):
    backend, _ = connected(2)
    member = Membership(launcher.worker, backend, give_up, SECONDS, joins=False)
    waiting = in_thread(lambda: backend.sum(np.ones(3, np.float32)))
    for _ in range(3):
        assert launcher.hears_nothing()
    assert backend.failure is None
    launcher.tell(leave=0)
    error = waiting()
    assert isinstance(error, Fault) and str(error) == "another worker is lost"
    assert str(backend.lost()) == "another worker is lost"
    member.leave(7)
    assert launcher.hears() == '{"left": 0, "step": 7}\n'


def test_a_function_is_woken_up_as_well(launcher, connected):
    backend, _ = connected(2)
    Membership(launcher.worker, backend, give_up, SECONDS, joins=False)
    waiting = in_thread(lambda: tf.function(lambda: backend.exchange([tf.ones([3])], []))())
    time.sleep(0.2)
    launcher.tell(leave=0)
    assert "another worker is lost" in str(waiting())


def test_the_end_of_an_epoch_that_was_left_does_not_end_the_next(launcher, newcomer):
    """It is told to those that have heard of the loss themselves, too."""
    workers, links = met(2)
    backend = newcomer(2)
    member = Membership(launcher.worker, backend, lambda epoch, abandoned: links[0], SECONDS, joins=False)
    member.leave(7)
    launcher.tell(leave=0)
    launcher.epoch(1, workers=workers)
    member.rejoin()
    assert backend.failure is None
    launcher.tell(leave=0)
    assert launcher.hears() == '{"left": 0, "step": 7}\n' and launcher.hears_nothing()
    assert backend.failure is None
    links[1][0].socket.close()


def test_the_next_epoch_is_waited_for_and_says_who_meets_and_how(launcher, newcomer):
    workers, links = met(2)
    backend = newcomer(2, rank=0)
    seen = []

    def meet(epoch, abandoned):
        seen.append((epoch, backend.rank, abandoned()))
        return links[1]

    member = Membership(launcher.worker, backend, meet, SECONDS, joins=False)
    member.leave(7)
    rejoined = in_thread(member.rejoin)
    time.sleep(0.3)
    assert not seen and backend.failure
    launcher.epoch(3, 1, workers, "a secret")
    assert rejoined() is None
    assert seen == [(Epoch(3, 1, workers, "a secret"), 1, False)]
    assert (backend.rank, backend.workers, backend.failure) == (1, workers, None)
    links[0][1].socket.close()


def test_one_that_is_to_leave_while_it_meets_says_so_and_waits_for_the_next_epoch(launcher, newcomer):
    workers, links = met(2)
    backend = newcomer(2)
    begun = threading.Event()

    def meet(epoch, abandoned):
        begun.set()
        return links[1] if epoch.number == 6 else give_up(epoch, abandoned)

    member = Membership(launcher.worker, backend, meet, SECONDS, joins=False)
    member.leave(120)
    assert launcher.hears() == '{"left": 0, "step": 120}\n'
    rejoined = in_thread(member.rejoin)
    for number in (4, 5):
        launcher.epoch(number)
        assert begun.wait(SECONDS)
        begun.clear()
        assert launcher.hears_nothing()
        launcher.tell(leave=number)
        assert launcher.hears() == f'{{"left": {number}, "step": 120}}\n'
    launcher.epoch(6, 1, workers)
    assert rejoined() is None
    assert (backend.rank, backend.failure) == (1, None)
    member.went(120)
    assert launcher.hears() == '{"went": 6, "step": 120}\n'
    links[0][1].socket.close()


def test_one_that_is_to_leave_before_it_has_begun_to_meet_meets_nobody(launcher, newcomer):
    member = Membership(launcher.worker, newcomer(2), give_up, SECONDS, joins=False)
    member.leave(3)
    launcher.epoch(4)
    launcher.tell(leave=4)
    rejoining = in_thread(member.rejoin)
    assert launcher.hears() == '{"left": 0, "step": 3}\n'
    assert launcher.hears() == '{"left": 4, "step": 3}\n'
    launcher.tell(end=True)
    assert isinstance(rejoining(), Fault)


def test_one_that_is_to_leave_when_it_has_just_met_waits_for_nobody_there(launcher, newcomer):
    workers, links = met(2)
    backend = newcomer(2)

    def meet(epoch, abandoned):
        launcher.tell(leave=4)
        with contextlib.suppress(Fault):
            give_up(epoch, abandoned)
        return links[0]

    member = Membership(launcher.worker, backend, meet, SECONDS, joins=False)
    member.leave(3)
    launcher.epoch(4, workers=workers)
    assert in_thread(member.rejoin)() is None
    assert raises(backend.barrier) == "another worker is lost"
    member.leave(3)
    assert launcher.hears() == '{"left": 0, "step": 3}\n'
    assert launcher.hears() == '{"left": 4, "step": 3}\n'
    links[1][0].socket.close()


def test_a_mistake_that_shows_where_they_meet_ends_the_worker(launcher, newcomer):
    def meet(epoch, abandoned):
        raise UserError("this address is not of this host")

    member = Membership(launcher.worker, newcomer(2), meet, SECONDS, joins=False)
    launcher.epoch(4)
    assert isinstance(in_thread(member.rejoin)(), UserError)


@pytest.mark.parametrize("before", [False, True])
def test_no_epoch_in_time_is_a_fault_that_names_the_binding(launcher, newcomer, before):
    """Counted from the loss on, whether the others were met in vain since then or not."""
    member = Membership(launcher.worker, newcomer(2), give_up, 0.5, joins=False)
    member.leave(3)
    rejoined = in_thread(member.rejoin)
    if before:
        launcher.epoch(1)
        launcher.tell(leave=1)
    error = rejoined()
    assert isinstance(error, Fault) and "within 0.5 s (replicas.rejoin_seconds)" in str(error)


def test_one_that_has_waited_long_enough_says_so_and_comes_to_fewer(launcher, connected, newcomer):
    """And then to more, of which one has met nobody yet."""
    first, second, _ = connected(3)
    assert each([first, second], lambda backend: backend.size) == [3, 3]
    workers, links = met(2)
    member = Membership(launcher.worker, first, lambda epoch, abandoned: links[0], 0.2, joins=False)
    member.leave(3)
    second.leave()
    rejoined = in_thread(member.rejoin)
    assert [launcher.hears() for _ in range(2)] == ['{"left": 0, "step": 3}\n', '{"waited": true}\n']
    launcher.epoch(1, 0, workers)
    assert rejoined() is None
    second.rejoin(workers, links[1])
    for backends in ([first, second], [first, second, newcomer(3, rank=2)]):
        if len(backends) == 3:
            for backend in backends[:2]:
                backend.leave()
            again(backends)
        count = len(backends)
        for size in SIZES.values():  # of which some were exchanged by another number before
            rows = [np.arange(size, dtype=np.float32) * (k + 1) for k in range(count)]
            sums = each(backends, lambda backend, rows=rows: backend.sum(rows[backend.rank]))
            gathered = each(backends, lambda backend: backend.gather(bytes([backend.rank]) * (backend.rank + 1)))
            assert all(same_bits([row, sum(rows)]) for row in sums)
            assert gathered == [[bytes([k]) * (k + 1) for k in range(count)]] * count
            assert each(backends, lambda backend: backend.size) == [count] * count


def test_one_that_has_got_the_state_waits_no_longer_than_the_others(launcher, newcomer):
    """Though it has not gone on yet: it may be the last that has the state."""
    workers, links = met(2)
    member = Membership(launcher.worker, newcomer(2), lambda epoch, abandoned: links[0], 0.2, joins=True)
    launcher.epoch(1, 0, workers)
    member.rejoin()
    member.leave(7)
    error = in_thread(member.rejoin)()
    assert isinstance(error, Fault) and "within 0.2 s (replicas.rejoin_seconds)" in str(error)
    links[1][0].socket.close()


def test_a_meeting_that_fails_when_the_time_is_over_is_a_fault(launcher, newcomer):
    def meet(epoch, abandoned):
        time.sleep(0.5)
        raise Fault("missing after 0.5 s: worker 1")

    member = Membership(launcher.worker, newcomer(2), meet, 0.2, joins=False)
    launcher.epoch(1)
    error = in_thread(member.rejoin)()
    assert isinstance(error, Fault) and "worker 1" in str(error)


@pytest.mark.parametrize("joins", [False, True])
def test_no_other_epoch_is_a_fault(launcher, newcomer, joins):
    member = Membership(launcher.worker, newcomer(2), give_up, SECONDS, joins)
    rejoined = in_thread(member.rejoin)
    launcher.tell(end=True)
    error = rejoined()
    assert isinstance(error, Fault) and "run the same command again" in str(error)


@pytest.mark.parametrize("meets", [False, True])
@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("reads", [True, False])
def test_a_launcher_that_is_gone_is_a_fault(launcher, newcomer, joins, meets, reads):
    """Whether it has read what was said to it, or not: then its end of the socket is reset."""
    begun = threading.Event()

    def meet(epoch, abandoned):
        begun.set()
        return give_up(epoch, abandoned)

    member = Membership(launcher.worker, newcomer(2), meet, SECONDS, joins)
    member.stay()
    if meets:
        launcher.epoch(1)
    rejoined = in_thread(member.rejoin)
    assert begun.wait(SECONDS) if meets else not begun.wait(0.2)
    if reads:
        assert launcher.hears() == '{"stays": true, "fewer": []}\n'
    else:
        assert select.select([launcher.own], [], [], SECONDS)[0]
    launcher.close()
    assert isinstance(rejoined(3.0), Fault)  # and not for the time being over


def test_what_is_said_to_a_launcher_that_is_gone_ends_nothing(launcher, newcomer):
    member = Membership(launcher.worker, newcomer(2), give_up, SECONDS, joins=False)
    launcher.close()
    member.stay()
    member.leave(3)
    member.end()


def test_one_that_joins_waits_longer_and_after_it_has_gone_on_no_longer_than_the_others(launcher, newcomer):
    workers, links = met(2)
    backend = newcomer(2)
    failed = threading.Event()

    def meet(epoch, abandoned):
        if epoch.number == 2:
            return links[1]
        failed.set()
        raise Fault("missing: worker 0")

    member = Membership(launcher.worker, backend, meet, 0.2, joins=True)
    rejoined = in_thread(member.rejoin)
    time.sleep(0.6)
    launcher.epoch(1)
    assert failed.wait(SECONDS)  # which is not its fault either, and it waits for the next
    assert launcher.hears() == '{"left": 1, "step": null}\n'
    time.sleep(0.4)
    launcher.epoch(2, 1, workers)
    assert rejoined() is None and member.joins
    member.went(8)
    assert not member.joins
    member.leave(8)
    error = in_thread(member.rejoin)()
    assert isinstance(error, Fault) and "replicas.rejoin_seconds" in str(error)
    links[0][1].socket.close()


def test_workers_meet_again_as_their_launchers_have_it(connected, newcomer, launchers):
    """The first time one comes that does not know the secret; it is not let in, and the others meet once more."""
    backends = connected(3)
    check_outside(backends, 1)
    made = [launchers() for _ in range(4)]

    def member(k, backend):
        return Membership(made[k].worker, backend, meeting(backend), SECONDS, joins=k == 3)

    members = [member(k, backend) for k, backend in enumerate(backends)]

    def stays(k):
        raises(lambda: backends[k].sum(np.ones(7, np.float32)))
        members[k].leave(40)
        members[k].rejoin()
        members[k].went(40)

    staying = [in_thread(functools.partial(stays, k)) for k in (0, 2)]
    backends[1].leave()
    for k in (0, 2):
        made[k].tell(leave=0)
        assert made[k].hears() == '{"left": 0, "step": 40}\n'
    workers = loopback(3)
    for k in (0, 2):
        made[k].epoch(1, k, workers, "the first")
    over = threading.Event()
    stranger = functools.partial(rendezvous.connect, 1, workers, SECONDS, "another", abandoned=over.is_set)
    other = in_thread(stranger)
    time.sleep(0.7)
    for k in (0, 2):
        made[k].tell(leave=1)
        assert made[k].hears() == '{"left": 1, "step": 40}\n'
    over.set()
    assert isinstance(other(), Fault)
    come = newcomer(3, rank=0)
    members.append(member(3, come))
    joining = in_thread(members[3].rejoin)
    ranks = {0: 2, 2: 0, 3: 1}  # by launcher
    workers = loopback(3)
    for k, rank in ranks.items():
        made[k].epoch(2, rank, workers, "the second")
    assert [wait() for wait in (*staying, joining)] == [None] * 3
    assert [made[k].hears() for k in (0, 2)] == ['{"went": 2, "step": 40}\n'] * 2
    now = [backends[2], come, backends[0]]
    assert [backend.rank for backend in now] == [0, 1, 2]
    check_outside(now, 2)


def sockets():
    """Those of this process that are open."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            found.add(os.readlink(f"/proc/self/fd/{number}"))
    return {each for each in found if each.startswith("socket:")}


@contextlib.contextmanager
def nothing_is_left():
    """No socket and no thread more than before."""
    threads = set(threading.enumerate())
    before = sockets()
    yield
    assert not set(threading.enumerate()) - threads
    assert not sockets() - before


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="no /proc")


def abandon(ranks, workers, after=0.3):
    """They meet until it is said that it is over, which is soon; why each has failed."""
    until = time.monotonic() + after

    def come(rank):
        abandoned = lambda: time.monotonic() > until  # noqa: E731 - it is one
        with pytest.raises(Fault) as found:
            rendezvous.connect(rank, workers, 25, "secret", abandoned=abandoned)
        assert time.monotonic() - until < 3
        return str(found.value)

    return at_once([functools.partial(come, rank) for rank in ranks])


@needs_proc
@pytest.mark.parametrize("ranks", [[0], [2], [0, 2], [0, 1]])
def test_a_meeting_that_is_given_up_leaves_nothing(ranks):
    workers = loopback(3)
    with nothing_is_left():
        reasons = abandon(ranks, workers)
    for rank, reason in zip(ranks, reasons, strict=True):
        missing = [k for k in range(3) if k not in ranks]
        assert reason.startswith("given up: ") and all(f"worker {k} ({workers[k]}" in reason for k in missing)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(rendezvous.split(workers[rank]))


@needs_proc
def test_one_that_has_met_some_closes_their_connections_when_it_gives_up():
    """And the other, which goes on, hears of it and meets it when it comes again."""
    workers = loopback(3)
    stays = in_thread(lambda: rendezvous.connect(0, workers, SECONDS, "secret"))
    abandon([1], workers, after=0.8)
    links = at_once([functools.partial(rendezvous.connect, k, workers, SECONDS, "secret") for k in (1, 2)])
    for found in (stays(), *links):
        assert len(found) == 2
        for link in found.values():
            link.socket.close()


@needs_proc
def test_silent_strangers_do_not_delay_that_it_is_given_up():
    workers = loopback(2)
    with nothing_is_left(), contextlib.ExitStack() as strange:
        giving_up = in_thread(lambda: abandon([0], workers, after=1.0))
        strange.enter_context(strangers.await_call(workers[0]))
        calls = [strange.enter_context(strangers.call(workers[0])) for _ in range(5)]
        [reason] = giving_up()
        assert reason.startswith("given up: ")
        for connection in calls:
            assert connection.recv(1) == b""


@needs_proc
def test_one_that_answers_nothing_delays_it_by_no_more_than_a_handshake(monkeypatch):
    monkeypatch.setattr(handshake, "SECONDS", 1.0)
    workers = loopback(2)
    with socket.create_server(rendezvous.split(workers[0])), nothing_is_left():
        [reason] = abandon([1], workers)
    assert reason.startswith("given up: ")


@needs_proc
def test_one_whose_port_is_taken_gives_up_as_well():
    workers = loopback(2)
    with socket.create_server(rendezvous.split(workers[0])) as taken, nothing_is_left():
        freed = threading.Timer(3.5, taken.close)  # so that a test that fails does so soon
        freed.start()
        try:
            found = in_thread(lambda: abandon([0], workers))()
        finally:
            freed.cancel()
            freed.join()
    assert not isinstance(found, BaseException), found


def test_what_is_not_given_up_ends_as_before():
    asked = []
    workers = loopback(2)
    with pytest.raises(Fault, match=r"missing after 0\.5 s: worker 1"):
        rendezvous.connect(0, workers, 0.5, "secret", abandoned=lambda: bool(asked.append(1)))
    assert asked
