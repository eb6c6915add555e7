"""The collectives over TCP, against NumPy: several workers in one process, each in its own thread, over loopback."""

import functools
import operator
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

from dist_partial.distributed import rendezvous, tcp_backend, tcp_connections, traffic
from dist_partial.distributed.tcp_backend import TCPBackend
from dist_partial.distributed.tcp_connections import Message
from dist_partial.distributed.worker_backend import GATHER_OP, SUM_OP
from dist_partial.errors import Fault, UserError
from tests.helpers.certificates import GUARDS
from tests.helpers.files import same_bits
from tests.helpers.threads import at_once
from tests.helpers.workers import loopback

BFLOAT16 = tf.bfloat16.as_numpy_dtype
SIZES = [0, 1, 2, 3, 7, 10**6 + 3]


@pytest.fixture
def connected():
    """Makes `count` backends, and closes them after the test."""
    made = []

    def make(count, patience=60.0, on_loss=lambda reason: None, guard="plain"):
        workers = loopback(count)
        connect = functools.partial(rendezvous.connect, workers=workers, seconds=10, **GUARDS[guard]())
        found = at_once([functools.partial(connect, k) for k in range(count)])
        made.extend(TCPBackend(k, workers, sockets, patience, on_loss) for k, sockets in enumerate(found))
        return made[-count:]

    yield make
    for backend in made:
        backend.close()


def exchange(backend, sums, gathers=(), order=None):
    """One exchange of NumPy arrays, whose tensors become ready in `order`."""
    arrays = [*sums, *gathers]
    ops = [backend._add(GATHER_OP if i >= len(sums) else SUM_OP, a.dtype, a.size) for i, a in enumerate(arrays)]
    return run(backend, ops, arrays, order)


def run(backend, ops, arrays, order=None):
    tickets = [0] * len(ops)
    for i in order if order is not None else range(len(ops)):
        tickets[i] = backend._begin(ops[i], arrays[i])
    return [backend._end(op, ticket) for op, ticket in zip(ops, tickets, strict=True)]


def draw(seed, size, dtype):
    generator = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.integer):
        return generator.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, size, dtype, endpoint=True)
    return generator.normal(size=size).astype(np.float32).astype(dtype)


def expected_sum(arrays):
    """In rank order; half precision in float32, rounded once."""
    dtype = arrays[0].dtype
    if dtype in (BFLOAT16, np.float16):
        arrays = [a.astype(np.float32) for a in arrays]
    return functools.reduce(operator.add, arrays).astype(dtype)


@pytest.mark.parametrize(
    ("count", "guard"), [(1, "plain"), (2, "plain"), (2, "sealed"), (3, "sealed"), (3, "tls"), (4, "plain")]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, BFLOAT16, np.float16, np.int32, np.int64, np.uint8])
def test_sums_are_those_of_numpy(connected, count, guard, dtype):
    backends = connected(count, guard=guard)
    inputs = [[draw(100 * k + i, size, dtype) for i, size in enumerate(SIZES)] for k in range(count)]
    results = at_once([functools.partial(exchange, m, own) for m, own in zip(backends, inputs, strict=True)])
    for i in range(len(SIZES)):
        expected = expected_sum([own[i] for own in inputs])
        for result in results:
            assert same_bits([result[i], expected])


def test_half_precision_is_rounded_once(connected):
    # Rounded after each addition, 256 + 1 + 1 is 256 in bfloat16, which has no 257.
    backends = connected(3)
    inputs = [np.full(5, value, BFLOAT16) for value in (256, 1, 1)]
    for (result,) in at_once([functools.partial(exchange, m, [a]) for m, a in zip(backends, inputs, strict=True)]):
        assert result.astype(np.float32).tolist() == [258.0] * 5


def test_what_is_not_finite_stays_so_and_warns_of_nothing(connected, recwarn):
    backends = connected(2)
    values = np.array([np.inf, np.inf, np.nan, 3e38, -0.0], np.float32)
    others = np.array([-np.inf, 1, 1, 3e38, -0.0], np.float32)
    for dtype in (np.float32, BFLOAT16):
        inputs = [values.astype(dtype), others.astype(dtype)]
        for (result,) in at_once([functools.partial(exchange, m, [a]) for m, a in zip(backends, inputs, strict=True)]):
            np.testing.assert_array_equal(result.astype(np.float32), [np.nan, np.inf, np.nan, np.inf, -0.0])
    assert not recwarn.list


@pytest.mark.parametrize(("count", "guard"), [(1, "plain"), (2, "sealed"), (2, "tls"), (3, "plain"), (4, "sealed")])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, BFLOAT16, np.bool_, np.int64])
def test_gathers_hold_every_worker_s_tensor_in_rank_order(connected, count, guard, dtype):
    backends = connected(count, guard=guard)
    inputs = [[draw(100 * k + i, size, np.uint8).astype(dtype) for i, size in enumerate(SIZES)] for k in range(count)]
    results = at_once([functools.partial(exchange, m, [], own) for m, own in zip(backends, inputs, strict=True)])
    for i in range(len(SIZES)):
        expected = np.stack([own[i] for own in inputs])
        for result in results:
            assert same_bits([result[i], expected])


def test_tensors_become_ready_in_another_order_on_each_worker(connected):
    backends, tensors, runs = connected(3), 6, 30

    def work(backend):
        shuffled = np.random.default_rng(backend.rank)
        ops = [backend._add(SUM_OP if i else GATHER_OP, np.float32, 1000 + i) for i in range(tensors)]
        history = []
        for step in range(runs):
            arrays = [draw(1000 * step + 10 * i + backend.rank, 1000 + i, np.float32) for i in range(tensors)]
            history.append(run(backend, ops, arrays, shuffled.permutation(tensors)))
        return history

    histories = at_once([functools.partial(work, m) for m in backends])
    for step in range(runs):
        for i in range(tensors):
            inputs = [draw(1000 * step + 10 * i + k, 1000 + i, np.float32) for k in range(3)]
            expected = np.stack(inputs) if i == 0 else expected_sum(inputs)
            for history in histories:
                assert same_bits([history[step][i], expected])
    assert not any(op.runs for m in backends for op in m._ops.values())  # nothing is kept


def test_a_worker_that_traces_later_finds_what_has_arrived(connected):
    backends = connected(2)

    def work(backend):
        time.sleep(0.3 * backend.rank)
        return exchange(backend, [np.arange(9, dtype=np.float32)])

    for (result,) in at_once([functools.partial(work, m) for m in backends]):
        assert result.tolist() == (2.0 * np.arange(9)).tolist()


def test_in_a_loop_of_a_traced_function(connected):
    backends = connected(2)

    def work(backend):
        @tf.function(autograph=False)
        def loop(x, y):
            def body(i, x, y):
                (total, half), (rows, twin), _ = backend.exchange([x, tf.cast(x, tf.bfloat16)], [y, y])
                return i + 1, total + tf.cast(half, tf.float32), tf.reduce_sum(rows + twin, axis=0)

            return tf.while_loop(lambda i, *_: i < 3, body, [0, x, y], parallel_iterations=1)

        def two():  # a second function, and a second trace of the first
            x = tf.constant([1.0, 2.0, 3.0]) * (backend.rank + 1)
            first = loop(x, tf.constant([1, 2], tf.int32))
            second = loop(x[:2], tf.constant([1, 2, 3], tf.int32))
            again = tf.function(lambda: backend.exchange([x], [])[0][0])()
            return [t.numpy().tolist() for t in (*first[1:], *second[1:], again)]

        traced = loop.get_concrete_function(tf.zeros([3]), tf.zeros([2], tf.int32))
        return two(), two(), sorted(handed_over(traced.graph))

    base = [1.0, 2.0, 3.0]
    expected = [
        [3 * 2 * 16 * v for v in base],  # the first loop's sum is 2 * 3 v; each later one doubles twice
        [64 * v for v in (1, 2)],
        [3 * 2 * 16 * v for v in base[:2]],
        [64 * v for v in (1, 2, 3)],
        [3 * v for v in base],
    ]
    for first, second, names in at_once([functools.partial(work, m) for m in backends]):
        assert first == second == expected
        assert names == [
            (tcp_backend.GATHER_OP, 8),
            (tcp_backend.GATHER_OP, 8),  # the same tensor twice is sent twice
            (tcp_backend.SUM_OP, 6),
            (tcp_backend.SUM_OP, 12),
        ]


def handed_over(graph):
    """(name, bytes) of every tensor that the graph hands over, with static shapes."""
    for op in traffic.operations(graph):
        for name in (tcp_backend.SUM_OP, tcp_backend.GATHER_OP):
            if op.type == "PyFunc" and op.name.rpartition("/")[2].startswith(name):
                yield name, traffic._payload(op)


def test_results_may_be_overwritten_at_once(connected):
    # TensorFlow reuses the memory of results. A slow reader must not get what was written there since.
    backends = connected(3)

    def work(backend):
        op = backend._add(SUM_OP, np.float32, 3 * 10**6)
        totals = []
        for step in range(5):
            (result,) = run(backend, [op], [np.full(3 * 10**6, step + backend.rank, np.float32)])
            totals.append((result.min(), result.max()))
            result[:] = -1
        return totals

    for totals in at_once([functools.partial(work, m) for m in backends]):
        assert totals == [(3.0 * step + 3, 3.0 * step + 3) for step in range(5)]


def test_a_result_is_not_given_before_a_slow_reader_has_it(connected, monkeypatch):
    first, second, _ = backends = connected(3)
    opened, send = threading.Event(), first._connections.send

    def late(rank, message, *more, **options):
        """Sends a result, kind 1, to the last only when it reads again."""
        if (rank, message.kind) != (2, 1):
            return send(rank, message, *more, **options)
        threading.Thread(target=lambda: opened.wait(10) and send(rank, message, *more, **options), daemon=True).start()

    monkeypatch.setattr(first._connections, "send", late)

    def work(backend):
        (result,) = exchange(backend, [np.ones(9, np.float32)])
        if backend is second:  # by now the first has all that it waits for
            threading.Timer(0.3, opened.set).start()
        found = result.tolist()
        result[:] = -1  # as TensorFlow does with memory that is said to be free
        return found, opened.is_set()

    (_, had_waited), *_ = found = at_once([functools.partial(work, m) for m in backends])
    assert [result for result, _ in found] == [[3.0] * 9] * 3 and had_waited


def test_a_worker_that_is_gone_is_named_at_once_and_ever_after(connected):
    losses = []
    backends = connected(3, on_loss=losses.append)
    at_once([functools.partial(exchange, m, [np.ones(4, np.float32)]) for m in backends])
    assert all(m.failure is None and m.lost() is None for m in backends)
    start = time.monotonic()
    timer = threading.Timer(0.2, backends[1].close)
    timer.start()

    def work(backend):
        for _ in range(2):
            with pytest.raises(Fault, match=r"worker 1 \(127\.0\.0\.1:\d+\) is gone"):
                exchange(backend, [np.ones(4, np.float32)])
        return backend.failure

    for failure in at_once([functools.partial(work, backends[k]) for k in (0, 2)]):
        assert "worker 1" in str(failure)
    assert time.monotonic() - start < 5
    assert len(losses) == 2 and all("worker 1" in loss for loss in losses)


def test_a_worker_that_is_gone_is_known_where_nothing_waits_for_it(connected):
    told = threading.Event()
    backends = connected(2, on_loss=lambda reason: told.set())
    backends[1].close()
    assert told.wait(10)
    assert backends[0].failure is None and "worker 1" in str(backends[0].lost())


@pytest.mark.parametrize("reason", [UserError("run.steps is 'x'"), Fault("the disk is full")])
def test_why_a_worker_ends_is_told_to_the_others(connected, reason):
    backends = connected(3)
    threading.Timer(0.2, backends[1].close, [reason]).start()

    def work(backend):
        with pytest.raises(type(reason), match=rf"worker 1 \(127\.0\.0\.1:\d+\): {reason}$"):
            backend.gather(b"x")

    at_once([functools.partial(work, backends[k]) for k in (0, 2)])


def test_the_function_that_waits_for_a_lost_worker_fails_with_the_reason(connected):
    backends = connected(2)
    threading.Timer(0.2, backends[1].close).start()
    with pytest.raises(tf.errors.UnknownError, match=r"worker 1 .* is gone"):
        tf.function(lambda: backends[0].exchange([tf.ones([5])], [])[0][0])()
    assert "worker 1" in str(backends[0].lost())


def test_what_is_swapped_outside_of_functions(connected):
    backends = connected(3)

    def work(backend):
        return (
            backend.gather(b"ab" * backend.rank),
            backend.gather(b""),
            backend.sum(np.float32([1, backend.rank])).tolist(),
        )

    for lengths, nothing, total in at_once([functools.partial(work, m) for m in backends]):
        assert (lengths, nothing, total) == ([b"", b"ab", b"abab"], [b""] * 3, [3, 3])


def test_a_worker_that_closes_after_its_last_op_disturbs_nobody(connected):
    backends = connected(3)
    for _ in range(5):

        def work(backend):
            result = exchange(backend, [np.ones(10**6, np.float32)], [np.ones(10**5, np.float32)])
            backend.close()
            return result[0].sum(), result[1].sum()

        for total, rows in at_once([functools.partial(work, m) for m in backends]):
            assert (total, rows) == (3e6, 3e5)
        backends = connected(3)


def test_a_silent_worker_is_given_up_and_one_that_only_has_nothing_to_say_is_not(connected, monkeypatch):
    monkeypatch.setattr(tcp_connections, "HEARTBEAT_SECONDS", 0.1)
    backends = connected(2, patience=0.5)

    def work(backend):
        time.sleep(1.5 * backend.rank)
        return exchange(backend, [np.ones(4, np.float32)])

    for (result,) in at_once([functools.partial(work, m) for m in backends]):
        assert result.tolist() == [2.0] * 4
    monkeypatch.setattr(backends[1]._connections, "_look", lambda *times: None)
    for size in (4, 10**7):  # more than the system keeps of what nobody reads
        with pytest.raises(Fault, match=r"worker 1 \(127\.0\.0\.1:\d+\) has been silent for 0\.5 s"):
            exchange(backends[0], [np.ones(size, np.float32)])


@pytest.mark.parametrize("message", [Message(0, 0, 1, 2**60), Message(0, 0, 2**30, 8), Message(7, 0, 1, 8)])
def test_a_message_that_fits_no_op_is_a_failure(connected, message):
    """By its bytes, its run and its kind."""
    backends = connected(2)
    at_once([functools.partial(exchange, each, [np.ones(4, np.float32)]) for each in backends])
    [number] = backends[0]._ops
    backends[1]._connections.send(0, message._replace(op=number), b"")
    with pytest.raises(UserError, match=r"worker 1 \(127\.0\.0\.1:\d+\) sent what does not fit"):
        exchange(backends[0], [np.ones(4, np.float32)])


@pytest.mark.parametrize("counts", [(4, 8), (0, 4), (1024, 2048)])  # the last in chunks of 4 KiB, by one and by two
def test_programs_that_differ_are_told_apart_by_size(connected, counts):
    backends = connected(2)

    def work(backend):
        with pytest.raises(UserError, match="same program") as raised:
            exchange(backend, [np.ones(counts[backend.rank], np.float32)])
        backend.close(raised.value)  # as a run does: whoever takes no part in adding up hears of it so

    at_once([functools.partial(work, m) for m in backends])


def test_small_tensors_are_summed_by_some_of_the_workers_and_not_by_the_same_ones(connected):
    backends = connected(4)
    counts = [1, 1023, 2048, 3000, 4096, 10**6]  # the last in two pieces
    inputs = [[draw(10 * k + i, count, np.float32) for i, count in enumerate(counts)] for k in range(4)]
    results = at_once([functools.partial(exchange, m, own) for m, own in zip(backends, inputs, strict=True)])
    for i, expected in enumerate(map(expected_sum, zip(*inputs, strict=True))):
        assert all(same_bits([result[i], expected]) for result in results)
    owners = [sorted(op.places) for op in backends[0]._ops.values()]
    assert owners == [[0], [1], [2, 3], [0, 3], *[[0, 1, 2, 3]] * 3]
    assert all(
        [op.places for op in m._ops.values()] == [op.places for op in backends[0]._ops.values()] for m in backends
    )
