"""What every backend of the collectives promises, against NumPy: TensorFlow's, TCP's, and that of the documentation."""

import functools
import itertools
import time

import numpy as np
import pytest
import tensorflow as tf

from dist_partial.config.settings import Settings
from dist_partial.data import stdlib_shapes
from dist_partial.distributed import rendezvous, traffic
from dist_partial.distributed.backend import ALL, BETWEEN, INSIDE
from dist_partial.distributed.replicas import over
from dist_partial.distributed.tcp_backend import TCPBackend
from dist_partial.distributed.tensorflow_backend import TensorFlowBackend
from dist_partial.distributed.worker_backend import WorkerBackend
from dist_partial.errors import Ending, Fault, UserError, of_graph
from dist_partial.models import two_dense
from dist_partial.training import loop
from tests.helpers.files import same_bits
from tests.helpers.snippets import page_module
from tests.helpers.strategies import mirrored
from tests.helpers.threads import at_once
from tests.helpers.workers import loopback

DTYPES = (np.float32, np.float64, tf.bfloat16.as_numpy_dtype, np.float16)
STEPS = 3


@pytest.fixture
def joined(tmp_path):
    """Makes what calls a function with the backend and the rank of each of `count` replicas, by the kind of backend.

    Functions of two workers are compiled. Those of more are not: one that waits holds a thread of TensorFlow, which all
    have to share in one process, and it has as many as there are cores.
    """
    closing = []

    def tcp(count):
        workers = loopback(count)
        links = at_once([functools.partial(rendezvous.connect, k, workers, 10) for k in range(count)])
        return [TCPBackend(k, workers, links[k], 60.0) for k in range(count)]

    def folder(count):
        make = page_module("explanation/collectives.md", "shared_folder", tmp_path).SharedFolder
        return [make(tmp_path / "exchange", k, [f"of thread {k}" for k in range(count)]) for k in range(count)]

    def make(kind, count):
        if kind == "tensorflow":
            strategy = mirrored(count)
            backend = TensorFlowBackend()

            def run(work):
                def replica():
                    return work(backend, tf.distribute.get_replica_context().replica_id_in_sync_group)

                found = tf.function(lambda: strategy.run(replica), autograph=False)()
                rows = [strategy.experimental_local_results(each) for each in tf.nest.flatten(found)]
                return [[row[k].numpy() for row in rows] for k in range(count)]

            return run
        made = {"tcp": tcp, "folder": folder}[kind](count)
        closing.extend(made)

        def run(work):
            functions = [functools.partial(work, each, each.rank) for each in made]
            functions = [tf.function(each, autograph=False) for each in functions] if count == 2 else functions
            return [[each.numpy() for each in tf.nest.flatten(found)] for found in at_once(functions)]

        return run

    yield make
    for backend in closing:
        backend.close()


def drawn(rank, dtype, step=0):
    values = 8 * np.random.default_rng(100 * step + rank).normal(size=1000)
    return values.astype(np.float32).astype(dtype)


@pytest.mark.parametrize(("kind", "count"), [("tensorflow", 2), ("tcp", 2), ("tcp", 3), ("folder", 2), ("folder", 3)])
def test_sums_and_gathers(joined, kind, count):
    def work(backend, rank):
        mine = [tf.gather(np.stack([drawn(k, dtype) for k in range(count)]), rank) for dtype in DTYPES]
        words = [tf.fill([n], tf.cast(10 * rank + n, tf.int32)) for n in (1, 5)]
        return backend.over_replicas(mine, words)

    found = joined(kind, count)(work)
    assert all(same_bits([results[i] for results in found]) for i in range(len(DTYPES) + 2))
    for dtype, total in zip(DTYPES, found[0], strict=False):
        wide = np.float32 if np.dtype(dtype).itemsize == 2 else dtype
        expected = functools.reduce(np.add, [drawn(k, dtype).astype(wide) for k in range(count)]).astype(dtype)
        assert total.dtype == expected.dtype and total.tobytes() == expected.tobytes(), dtype
    for n, rows in zip((1, 5), found[0][len(DTYPES) :], strict=True):
        assert rows.tolist() == [[10 * rank + n] * n for rank in range(count)]


@pytest.mark.parametrize("kind", ["tcp", "folder"])
def test_rounds_that_do_not_wait_for_each_other(joined, kind):
    """In a loop: one worker is late with what it sums, and the other one with what it gathers."""

    def work(backend, rank):
        def late(array):
            time.sleep(0.05)
            return array

        def step(i, total, gathered):
            mine = [tf.fill([4], tf.cast(rank + i, tf.float32)), tf.fill([4], rank + i)]
            mine[rank] = tf.ensure_shape(tf.numpy_function(late, [mine[rank]], mine[rank].dtype, stateful=False), [4])
            sums, *_ = backend.over_replicas([mine[0]], [])
            _, rows, _ = backend.over_replicas([], [mine[1]])
            return i + 1, total + sums[0], gathered + rows[0]

        start = (tf.constant(0), tf.zeros([4]), tf.zeros([2, 4], tf.int32))
        return tf.while_loop(lambda i, *_: i < STEPS, step, start, parallel_iterations=1)[1:]

    found = joined(kind, 2)(work)
    for total, gathered in found:
        assert total.tolist() == [9] * 4 and gathered.tolist() == [[3] * 4, [6] * 4]


@pytest.mark.parametrize(("kind", "count"), [("tensorflow", 3), ("tcp", 2), ("tcp", 3), ("folder", 3)])
def test_all_to_all(joined, kind, count):
    """Row j of worker i comes to worker j as row i; twice, with a sum in between."""

    def work(backend, rank):
        rows = tf.reshape(100 * tf.cast(rank, tf.int32) + tf.range(count * 5), [count, 5])
        _, _, first = backend.over_replicas([], [], [rows])
        sums, _, second = backend.over_replicas([tf.ones([3])], [], [rows + 7, first[0]])
        return first[0], *second, sums[0]

    for rank, (first, second, back, total) in enumerate(joined(kind, count)(work)):
        expected = [[100 * k + 5 * rank + i for i in range(5)] for k in range(count)]
        assert first.tolist() == expected and (second - 7).tolist() == expected
        assert back.ravel().tolist() == [100 * rank + i for i in range(5 * count)] and total.tolist() == [count] * 3


class Twins(WorkerBackend):
    """Two workers of which the other one has all that this one has."""

    rank, size, workers = 0, 2, ("this one", "its twin")

    def gather(self, data):
        return [data, data]


def test_levels():
    """Two workers of two replicas each: a sum and a gather over all of them, those of one, or one of each worker."""
    made = over(Twins(), cpu=2)

    def replica(level):
        rank = tf.distribute.get_replica_context().replica_id_in_sync_group
        like = 7 if level == BETWEEN else rank  # there the replicas of a worker have the same
        sums, gathered, swapped = made.collectives.backend.over_replicas(
            [tf.fill([2], tf.cast(like, tf.float32) + 1)],
            [tf.fill([1], tf.cast(like, tf.int32))],
            [tf.reshape(100 * tf.cast(like, tf.int32) + tf.range(2 if level != ALL else 4), [-1, 1])],
            level,
        )
        return sums[0], gathered[0], swapped[0]

    # What is swapped is 100 times who sends it, and for whom: the twin, too, gives this worker what is for it.
    for level, total, rows, received in (
        (ALL, 6, [0, 1, 0, 1], [[0, 100, 0, 100], [1, 101, 1, 101]]),
        (INSIDE, 3, [0, 1], [[0, 100], [1, 101]]),
        (BETWEEN, 16, [7, 7], [[700, 700], [700, 700]]),
    ):
        function = tf.function(lambda level=level: made.strategy.run(replica, args=(level,)), autograph=False)
        sums, gathered, swapped = function()
        local = made.strategy.experimental_local_results
        assert [each.numpy()[:, 0].tolist() for each in local(swapped)] == received, level
        for each in made.strategy.experimental_local_results(sums):
            assert each.numpy().tolist() == [total] * 2, level
        for each in made.strategy.experimental_local_results(gathered):
            assert each.numpy()[:, 0].tolist() == rows, level
    assert (made.topology.replicas, made.topology.local, made.workers, made.is_chief) == (4, 2, 2, True)
    mean = tf.function(
        lambda: made.strategy.run(lambda: tf.distribute.get_replica_context().all_reduce("MEAN", tf.constant([3.0])))
    )()
    assert made.strategy.experimental_local_results(mean)[0].numpy().tolist() == [3]


def test_ops_in_the_graph_are_counted_and_run_in_order():
    backend = Twins()

    @tf.function(autograph=False)
    def two(x):
        first = backend.over_replicas([x], [tf.ones([5], tf.int32)], [tf.ones([2, 3], tf.int32)])
        return first, backend.over_replicas([tf.ones([3], tf.float16)], [])

    traced = two.get_concrete_function(tf.TensorSpec([10], tf.float32))
    assert [(each.kind, each.bytes) for each in traffic.in_call(traced)] == [
        ("sum", 40),
        ("gather", 20),
        ("gather", 24),  # of which a gather makes an all-to-all
        ("sum", 6),
    ]
    ops = [op for op in traced.graph.get_operations() if op.type == "PyFunc"]
    for before, after in itertools.pairwise(ops):
        assert before in after.control_inputs


def test_rows_that_are_not_those_of_all():
    class Short(Twins):
        def gather(self, data):
            return [data]

    with pytest.raises(
        UserError, match=r"^Short\.gather returned rows of \[12\] bytes, where each of 2 workers sends 12"
    ):
        Short().sum(np.ones(3, np.float32))


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (Twins, r"^run\.replicas made <.*Twins.*>: return Replicas"),
        (lambda: {}["TF_CONFIG"], r"^run\.replicas raised KeyError: 'TF_CONFIG'"),
    ],
)
def test_a_function_that_makes_no_replicas(make, line, tmp_path):
    settings = Settings([("train", ".*")], two_dense, stdlib_shapes, replicas=make)
    with pytest.raises(Ending, match=line):
        loop.run(settings, tmp_path / "run")


def test_a_worker_that_is_missing_is_an_error_with_its_name(tmp_path):
    """Of the documentation's backend: the compiled function fails, with the line that ends a run."""
    make = page_module("explanation/collectives.md", "shared_folder", tmp_path).SharedFolder
    backend = make(tmp_path / "exchange", 0, ["a:1", "b:2"], patience_seconds=0.2)
    begin = time.monotonic()
    with pytest.raises(tf.errors.UnknownError) as raised:
        tf.function(lambda: backend.over_replicas([tf.ones([3])], []), autograph=False)()
    reason = of_graph(raised.value.message)
    assert isinstance(reason, Fault) and str(reason) == "worker 1 (b:2) has sent nothing for 0.2 s"
    assert time.monotonic() - begin < 20


def test_what_is_said_outside_of_functions():
    backend = Twins()
    assert backend.gather(b"ab") == [b"ab", b"ab"] and backend.lost() is None
    assert backend.sum(np.float32([1, 2])).tolist() == [2, 4]
    backend.finish()
    backend.close(Fault("the disk is full"))
