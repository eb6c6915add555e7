"""What workers of a `fit` exchange outside of steps: by backends of one process, against NumPy."""

import functools

import keras
import numpy as np
import pytest

from dist_partial.distributed import rendezvous
from dist_partial.distributed.tcp_backend import TCPBackend
from dist_partial.fit import alike
from tests.helpers.fit_inputs import messages
from tests.helpers.threads import at_once
from tests.helpers.workers import loopback

WORKERS = 3
RNG = np.random.default_rng(0)


@pytest.fixture
def backends():
    workers = loopback(WORKERS)
    connect = functools.partial(rendezvous.connect, workers=workers, seconds=10)
    found = at_once([functools.partial(connect, rank) for rank in range(WORKERS)])
    made = [TCPBackend(rank, workers, links, 60.0) for rank, links in enumerate(found)]
    yield made
    for backend in made:
        backend.close()


def on_all(function, backends, arguments):
    return at_once([functools.partial(function, *each) for each in zip(backends, arguments, strict=True)])


def test_many_arrays_of_two_dtypes_are_summed_in_two_messages(backends):
    shapes = [(), (3,), (2, 5), (0,), (1000,)] * 4
    dtypes = [np.float32, np.int64] * 10
    own = [
        [np.asarray(100 * RNG.normal(size=shape)).astype(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        for _ in range(WORKERS)
    ]
    for sums in on_all(alike.together, backends, own):
        for number, total in enumerate(sums):
            expected = sum(each[number] for each in own)
            assert (total.dtype, total.shape) == (expected.dtype, expected.shape)
            np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-4)
    assert [messages(backend) for backend in backends] == [2] * WORKERS


def test_what_differs_is_found_in_one_gather(backends):
    own = [[np.zeros(4), np.full(2, rank // 2), np.arange(3.0), np.full([], rank)] for rank in range(WORKERS)]
    assert on_all(alike.differing, backends, own) == [[1, 3]] * WORKERS
    assert messages(backends[0]) == 2  # the lengths, and what has them
    assert on_all(alike.differing, backends, [[]] * WORKERS) == [[]] * WORKERS  # which all hear


@pytest.mark.parametrize("size", [2**24, 30], ids=["one message", "three messages"])
def test_all_get_the_first_ones_values_of_what_differs(backends, size, monkeypatch):
    monkeypatch.setattr(alike, "_PACK_BYTES", size)
    kinds = [((2, 3), "float32"), ((), "int64"), ((4,), "float32"), ((5,), "bfloat16"), ((3,), "float64")]
    first = [keras.ops.convert_to_numpy(keras.Variable(RNG.normal(size=shape), dtype=dtype)) for shape, dtype in kinds]
    own = [[keras.Variable(value, dtype=kind[1]) for value, kind in zip(first, kinds, strict=True)] for _ in backends]
    own[1][2].assign(np.ones(4))
    own[2][0].assign(np.ones([2, 3]))
    for variable in own[1][3], own[1][4]:
        variable.assign(variable + 1)
    assert on_all(alike.send, backends, own) == [True] * WORKERS
    for variables in own:
        for variable, value in zip(variables, first, strict=True):
            assert keras.ops.convert_to_numpy(variable).tobytes() == value.tobytes()
    before = messages(backends[0])
    assert before == 2 + (1 if size > 30 else 3)
    assert on_all(alike.send, backends, own) == [False] * WORKERS
    assert messages(backends[0]) == before + 2
