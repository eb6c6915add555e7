"""Objects for other processes: the same arrays, in memory that is shared."""

import os
import pickle

import numpy as np
import pytest

from dist_partial.data.shared import SharedArrays, restored

LARGE = np.random.default_rng(0).normal(size=(100, 300))

ARRAYS = {
    "plain": (LARGE, LARGE.nbytes),
    "view": (LARGE[10:], LARGE[10:].nbytes),
    "columns": (LARGE[:, ::2], LARGE[:, ::2].nbytes),
    "fortran": (np.asfortranarray(LARGE), LARGE.nbytes),
    "bytes": (np.array([b"ab", b"c"] * 40_000), 160_000),
    "text": (np.array(["Ada", "Grace"] * 9000), 18000 * 20),
    "read only": (np.frombuffer(bytes(range(256)) * 300, np.uint8), 76800),
    "small": (np.arange(5), 0),
    "scalar": (np.array(3.0), 0),
    "empty": (np.zeros([0, 3]), 0),
    "objects": (np.array(["a", None] * 9000, object), 0),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_is_the_same_and_its_data_is_not_in_the_pickle(name):
    array, size = ARRAYS[name]
    shared = SharedArrays()
    content, places = shared.pickled({"it": array, "again": array})
    assert sum(size for _, size in {*places}) == size
    assert len(content) < 1000 or name == "objects"
    for found in restored(shared.file, content, places).values():
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    shared.close()


def test_one_array_of_several_objects_is_there_once():
    shared = SharedArrays()
    first, second = shared.pickled([LARGE]), shared.pickled({"x": LARGE})
    assert first[1] == second[1] and os.fstat(shared.file).st_size == LARGE.nbytes
    _, other = shared.pickled(LARGE + 1)
    assert other[0] != first[1][0] and os.fstat(shared.file).st_size > 2 * LARGE.nbytes - 1


def test_what_is_written_into_an_array_stays_where_it_was_written():
    shared = SharedArrays()
    content = shared.pickled(LARGE)
    found, other = (restored(shared.file, *content) for _ in range(2))
    found[:] = 0
    np.testing.assert_array_equal(other, LARGE)


@pytest.mark.parametrize("of", [lambda a: a, lambda a: a[7:], np.asarray, lambda a: np.asarray(a)[3:50]])
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_an_array_of_a_file_is_sent_as_its_place_in_it(mode, of, tmp_path):
    """But for one that may differ from its file."""
    np.save(tmp_path / "it.npy", LARGE)
    array = of(np.load(tmp_path / "it.npy", mmap_mode=mode))
    shared = SharedArrays()
    content, places = shared.pickled(array)
    assert len(content) < 1000 and bool(places) == (mode == "c")
    found = restored(shared.file, content, places)
    np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(array, pickle.loads(pickle.dumps(array)))
