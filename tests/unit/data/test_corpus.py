"""The embedded corpus: its content, its split and its cache."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest

from dist_partial.data import stdlib_corpus, stdlib_shapes
from dist_partial.data.codecs import SHAPES, ByteCodec, ShapeCodec
from dist_partial.data.corpus import BLOCK
from dist_partial.errors import UserError
from tests import ROOT


def all_of(source):
    """Every example of a source: arrays [n, ...]."""
    return source.fetch(np.arange(len(source)))


def run_python(code, *arguments, **options):
    """Starts a Python of its own, which finds the package."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def code(tmp_path_factory):
    """A folder of source files: 20 blocks and 100 bytes of random printable bytes in 3 files."""
    root = tmp_path_factory.mktemp("code")
    text = np.random.default_rng(0).integers(32, 127, 20 * BLOCK + 100).astype(np.uint8).tobytes()
    (root / "package").mkdir()
    (root / "tests").mkdir()
    (root / "a.py").write_bytes(text[:1000])
    (root / "package" / "b.py").write_bytes(text[1000:50_000])
    (root / "z.py").write_bytes(text[50_000:])
    (root / "tests" / "skipped.py").write_text("skipped" * BLOCK)
    (root / "skipped.txt").write_text("skipped" * BLOCK)
    return root


@pytest.fixture(scope="session")
def text(code):
    names = ["a.py", "package/b.py", "z.py"]
    return np.frombuffer(b"".join((code / name).read_bytes() for name in names), np.uint8)


@pytest.mark.parametrize("window", [64, 100, BLOCK])
def test_windows_are_cut_from_the_text(cache, code, text, window):
    """Each example is found in the text at a multiple of the window inside a block, and no target twice."""
    data = stdlib_corpus(window, cache, evaluation_share=0.2, root=code)
    starts = [block * BLOCK + i * window for block in range(20) for i in range(BLOCK // window)]
    expected = {text[s : s + window + 1].tobytes() for s in starts}
    found = []
    for source in (data.train, data.evaluation):
        x, y = all_of(source)
        assert x.dtype == y.dtype == np.int32 and x.shape == y.shape == (len(source), window)
        np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
        found += [bytes([*row, last]) for row, last in zip(x.tolist(), y[:, -1].tolist(), strict=True)]
    assert len(found) == len(expected) and set(found) == expected


def test_split_is_by_blocks_and_the_same_for_every_window(cache, code, text):
    held_out = np.concatenate([text[b * BLOCK : (b + 1) * BLOCK] for b in (4, 9, 14, 19)])  # one in 5
    for window in (64, 128, BLOCK):
        x, _ = all_of(stdlib_corpus(window, cache, evaluation_share=0.2, root=code).evaluation)
        np.testing.assert_array_equal(np.sort(x.reshape(-1)), np.sort(held_out))


def test_a_short_evaluation_sees_the_whole_text(cache, code, text):
    x, _ = stdlib_corpus(64, cache, evaluation_share=0.2, root=code).evaluation.fetch(np.arange(4))
    np.testing.assert_array_equal(x, [text[b * BLOCK : b * BLOCK + 64] for b in (4, 9, 14, 19)])


def test_shapes_are_every_position_of_the_same_text(cache, code, text):
    data = stdlib_shapes(16, cache, evaluation_share=0.2, root=code)
    shapes = ShapeCodec().encode(text.tobytes().decode())
    x, y = all_of(data.evaluation)
    starts = [block * BLOCK + i for i in range(BLOCK - 15) for block in (4, 9, 14, 19)]
    np.testing.assert_array_equal(x, [shapes[s : s + 16] for s in starts])
    np.testing.assert_array_equal(y, [shapes[s + 16] for s in starts])
    assert len(data.train) == 16 * (BLOCK - 15)


def test_fingerprint_changes_with_content_window_and_share(cache, tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n" * BLOCK)

    def make(**options):
        return stdlib_corpus(cache_dir=cache, root=tmp_path, **options).fingerprint

    first = make(evaluation_share=0.5)
    assert first == make(evaluation_share=0.5)
    others = {make(evaluation_share=0.25), make(evaluation_share=0.5, window=64)}
    others.add(stdlib_shapes(128, cache, evaluation_share=0.5, root=tmp_path).fingerprint)
    (tmp_path / "a.py").write_text("x = 1\n" * (BLOCK - 1) + "x = 2\n")
    others.add(make(evaluation_share=0.5))
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    others.add(make(evaluation_share=0.5))
    assert len(others - {first}) == 5 and all(len(other) == 64 for other in others)


def test_prepared_folder_is_a_tfds_data_set_that_records_its_hash(cache, code):
    import tensorflow_datasets as tfds

    stdlib_corpus(cache_dir=cache, evaluation_share=0.2, root=code)
    for folder in (cache / "stdlib_corpus").iterdir():
        info = tfds.builder_from_directory(folder / "1.0.0").info
        assert info.metadata["sha256"] == folder.name and len(folder.name) == 64
        assert info.file_format == tfds.core.FileFormat.ARRAY_RECORD


def test_the_standard_library_of_this_machine(cache, capfd):
    data = stdlib_corpus(cache_dir=cache)
    assert capfd.readouterr() == ("", "")  # tfds is chatty by itself
    assert len(data.train) > 20 * len(data.evaluation) > 10_000
    assert (data.name, data.unit, data.codec.size) == ("stdlib_corpus", "byte", 256)
    library = b"".join(path.read_bytes() for path in Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    x, y = data.train.fetch(np.arange(2000))
    rows = [bytes([*row, last]) for row, last in zip(x.tolist(), y[:, -1].tolist(), strict=True)]
    assert sum(row in library for row in rows) > 200  # the rest is in packages


def test_codecs():
    text = "def f(x_1: int) -> 'é\t∞':\n    return [A+1, \"b\"]  # \\\r\n"
    assert ByteCodec().decode(ByteCodec().encode(text)) == text
    assert ByteCodec().encode(text).dtype == ShapeCodec().encode(text).dtype == np.int32
    assert ByteCodec().decode([0xC3]) == "�"
    silhouette = ShapeCodec().decode(ShapeCodec().encode(text))
    expected = 'aaa a(a_0. aaa( == "aa aaa".\n    aaaaaa (A=0. "a"(  . . \n'
    assert silhouette == expected
    assert ShapeCodec().decode(ShapeCodec().encode(silhouette)) == silhouette
    assert len(SHAPES) == len(set(SHAPES)) == ShapeCodec().size == 10


BUILD = """
import sys
import tensorflow_datasets
from dist_partial.data import stdlib_corpus
print("ready", flush=True)
print(stdlib_corpus(cache_dir=sys.argv[1], evaluation_share=0.2, root=sys.argv[2]).fingerprint)
"""

BUILD_AND_DIE = """
import os, signal, sys
from dist_partial.data import corpus_builder, stdlib_corpus
whole = corpus_builder.StdlibCorpus._generate_examples
def dying(self):
    yield next(whole(self))
    os.kill(os.getpid(), signal.SIGKILL)
corpus_builder.StdlibCorpus._generate_examples = dying
stdlib_corpus(cache_dir=sys.argv[1], evaluation_share=0.2, root=sys.argv[2])
"""

BUILD_ON_A_FULL_DISK = """
import resource, signal, sys
import tensorflow_datasets
from dist_partial.data import stdlib_corpus
from dist_partial.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # files stop growing, as on a full disk
try:
    stdlib_corpus(cache_dir=sys.argv[1], evaluation_share=0.2, root=sys.argv[2])
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_two_processes_build_at_once_and_after_a_killed_one(code, tmp_path):
    killed = run_python(BUILD_AND_DIE, tmp_path, code)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("stdlib_corpus/*/incomplete*"))

    with (tmp_path / "stdlib_corpus.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        both = [run_python(BUILD, tmp_path, code) for _ in range(2)]
        assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
        time.sleep(1)  # what is left to do takes a tenth of that, were there no lock
        assert [process.poll() for process in both] == [None, None]
        assert not list(tmp_path.glob("stdlib_corpus/*/1.0.0"))
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert [path.name for path in tmp_path.glob("stdlib_corpus/*/*")] == ["1.0.0"]


@pytest.mark.slow
def test_full_cache_folder(code, tmp_path):
    process = run_python(BUILD_ON_A_FULL_DISK, tmp_path, code)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert str(tmp_path) in output and "stdlib_corpus.cache_dir" in output and output.count("\n") == 1


def test_unusable_cache_folder(code, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/cache .*stdlib_corpus\.cache_dir") as caught:
        stdlib_corpus(cache_dir=tmp_path / "file" / "cache", evaluation_share=0.2, root=code)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "another", "deleted"])
def test_damaged_cache_is_noticed(code, tmp_path, damage):
    stdlib_corpus(cache_dir=tmp_path, evaluation_share=0.2, root=code)
    (records,) = tmp_path.glob("stdlib_corpus/*/1.0.0/*array_record*")
    if damage == "cut":
        records.write_bytes(records.read_bytes()[:40_000])
    elif damage == "another":
        shutil.copytree(code, tmp_path / "code")
        (tmp_path / "code" / "a.py").write_text("another")
        stdlib_corpus(cache_dir=tmp_path / "other", evaluation_share=0.2, root=tmp_path / "code")
        (other,) = (tmp_path / "other").glob("stdlib_corpus/*/1.0.0/*array_record*")
        shutil.copyfile(other, records)
    else:
        records.unlink()
    with pytest.raises(UserError, match=str(records.parent)) as caught:
        stdlib_corpus(cache_dir=tmp_path, evaluation_share=0.2, root=code)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "window is 0: .* at least 1 and at most 4,096"),
        ({"window": 5000}, "window is 5000"),
        ({"evaluation_share": 0.0}, "evaluation_share is 0.0"),
        ({"evaluation_share": 1.0}, "evaluation_share is 1.0"),
        ({"evaluation_share": 0.001}, "20 blocks"),
        ({"root": ROOT / "launch" / "none"}, "no .py files under"),
    ],
)
def test_mistakes_are_named(cache, code, options, words):
    with pytest.raises(UserError, match=words):
        stdlib_corpus(**{"cache_dir": cache, "root": code, "evaluation_share": 0.2, **options})
