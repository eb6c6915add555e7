"""Data that breaks while a run reads it: one line that names the file and the place, an exit code, and an end."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_partial import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_cluster")]

# Each function makes 400 examples, of which number 307 breaks or is broken after it was looked at.
MODULE = """
import os
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from dist_partial import data

COUNT, BAD = 400, 307
NUMBERS = np.random.default_rng(0).normal(size=(COUNT, 3)).astype(np.float32)
HELD_OUT = NUMBERS[:8, :2], NUMBERS[:8, 2]


def model():
    return keras.Sequential([keras.Input([2]), keras.layers.Dense(1, name="head")])


def changed(path, change):
    # As a disk would damage a file: it has the same size and time.
    state = os.stat(path)
    content = bytearray(Path(path).read_bytes())
    change(content)
    Path(path).write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def parse(record):
    numbers = tf.io.parse_single_example(record, {"n": tf.io.FixedLenFeature([3], tf.float32)})["n"]
    return numbers[:2], numbers[2]


def feature(row):
    if row.dtype == np.float32:
        return tf.train.Feature(float_list=tf.train.FloatList(value=row))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=row))


def records(fault):
    rows = list(NUMBERS)
    rows[BAD] = {"shape": NUMBERS[BAD, :2], "dtype": np.arange(3)}.get(fault, rows[BAD])
    for part in range(2):
        with tf.io.TFRecordWriter(f"{part}.tfrecord") as writer:
            for i, row in enumerate(rows[200 * part : 200 * part + 200], 200 * part):
                name = "m" if fault == "key" and i == BAD else "n"
                found = tf.train.Example(features=tf.train.Features(feature={name: feature(row)}))
                writer.write(found.SerializeToString())
    with tf.io.TFRecordWriter("held_out.tfrecord") as writer:
        for row in NUMBERS[:8]:
            writer.write(tf.train.Example(features=tf.train.Features(feature={"n": feature(row)})).SerializeToString())
    size = os.path.getsize("1.tfrecord") // 200
    if fault == "cut before":
        os.truncate("1.tfrecord", 107 * size + 20)
    found = data.tfrecord_dataset("?.tfrecord", parse, "held_out.tfrecord")
    if fault == "gone":
        os.remove("1.tfrecord")
    if fault == "cut":
        os.truncate("1.tfrecord", 107 * size + 20)
    if fault == "damaged":
        changed("1.tfrecord", lambda content: content.__setitem__(107 * size + 20, 99))
    return found


def images(fault):
    for part, count in (("train", COUNT), ("held_out", 8)):
        for i in range(count):
            path = Path(part, f"{i % 2}", f"{i:03}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tf.io.encode_png(np.full([1, 2, 3], i % 256, np.uint8)).numpy())
    found = data.image_folder("train", (1, 2), "held_out")
    bad = Path("train", "1", f"{BAD}.png")
    if fault == "gone":
        bad.unlink()
    if fault == "cut":
        bad.write_bytes(bad.read_bytes()[:40])
    if fault == "other":
        bad.write_text("no image")
    return found.map(lambda x, y: (x[0, :, 0], tf.cast(y, tf.float32)))


def csv(fault):
    lines = [["a", "b", "y"], *NUMBERS.tolist()]
    lines[BAD + 1] = {"dtype": [0.5, "old", 1], "cut": [0.5], "empty": [0.5, "", 1]}.get(fault, lines[BAD + 1])
    Path("a.csv").write_text("".join(",".join(map(str, line)) + "\\n" for line in lines))
    return data.csv_dataset("b.csv" if fault == "gone" else "a.csv", ["a", "b"], "y", stacked=True)


def parquet(fault):
    import pyarrow as pa
    import pyarrow.parquet

    rows = NUMBERS.tolist()
    rows[BAD] = [None, 0.5, 1.0] if fault == "empty" else rows[BAD]
    for part in range(2):
        columns = [list(each) for each in zip(*rows[200 * part : 200 * part + 200])]
        if fault == "dtype" and part:
            columns[1] = list(map(str, columns[1]))
        table = pa.table(dict(zip("aby", columns)))
        options = {"row_group_size": 50, "write_page_checksum": True, "compression": "none"}
        pa.parquet.write_table(table, f"{part}.parquet", use_dictionary=False, **options)
    if fault == "cut":
        os.truncate("1.parquet", os.path.getsize("1.parquet") // 2)
    if fault == "damaged":
        changed("1.parquet", lambda content: content.__setitem__(len(content) // 2, content[len(content) // 2] ^ 255))
    files = ["0.parquet", "2.parquet" if fault == "gone" else "1.parquet"]
    return data.parquet_dataset(files, ["a", "b"], "y", stacked=True)


def broken(fault, x, y):
    # What one example is in place of x and y.
    if fault == "gone":
        return np.load(f"{BAD}.npy"), y
    return {"dtype": (x.astype(np.float64), y), "shape": (x[:1], y), "parts": (x,)}[fault]


class Items:
    def __init__(self, fault):
        self.fault = fault

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        x, y = NUMBERS[index, :2], NUMBERS[index, 2]
        return broken(self.fault, x, y) if index == BAD else (x, y)


def items(fault):
    return data.dataset(Items(fault), HELD_OUT)


class Batches(keras.utils.PyDataset):
    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def __len__(self):
        return COUNT // 10

    def __getitem__(self, index):
        x, y = (part[10 * index : 10 * index + 10] for part in (NUMBERS[:, :2], NUMBERS[:, 2]))
        if index != BAD // 10:
            return x, y
        return (x[:9], y[:9]) if self.fault == "short" else broken(self.fault, x, y)


def batches(fault):
    return data.dataset(Batches(fault), HELD_OUT)


def grain(fault):
    from grain import MapDataset

    items = Items(fault)
    return data.dataset(MapDataset.source(range(COUNT)).map(items.__getitem__), HELD_OUT)


def stream(fault):
    def element(i):
        def one(i):
            x, y = NUMBERS[i, :2], NUMBERS[i, 2]
            return broken(fault, x, y) if i == BAD else (x, y)

        x, y = tf.numpy_function(one, [i], [tf.float32, tf.float32])
        return tf.ensure_shape(x, [2]), tf.ensure_shape(y, [])

    return data.dataset(tf.data.Dataset.range(COUNT).map(element), HELD_OUT)
"""
GIN = """
import broken_data
run.model = @broken_data.model
run.rules = [('train', '.*')]
run.loss = @keras.losses.MeanSquaredError
run.steps = 100
run.global_batch = 12
"""
RECORD = r"1\.tfrecord, record 107 \(byte \d+\)"
LINE = r"\(.*broken_data\.py, line \d+\)"
ITEM = r"Items\[307\]"
CASES = {  # what is read, and what is wrong with it: the exit code, and the line
    "records-gone": (2, r"cannot read 1\.tfrecord, record \d+ \(byte \d+\): No such file"),
    "records-cut": (2, r"1\.tfrecord was changed since the run began: "),
    "records-cut before": (2, rf"{RECORD} is cut off: the file ends within it, at byte \d+; "),
    "records-damaged": (2, rf"{RECORD} is damaged: its data fails its checksum"),
    "records-shape": (2, rf"parse of run\.data: the feature 'n' of .* {LINE}; it has 'n' \(float\); it is {RECORD}$"),
    "records-dtype": (2, rf"parse of run\.data: the feature 'n' of .* {LINE}; it has 'n' \(int64\); it is {RECORD}$"),
    "records-key": (
        2,
        rf"parse of run\.data: the record has no feature 'n' {LINE}; it has 'm' \(float\); it is {RECORD}",
    ),
    "images-gone": (2, r"cannot read train/1/307\.png: No such file or directory"),
    "images-cut": (2, r"decode of run\.data: the image cannot be decoded \(.+\): .* it is train/1/307\.png$"),
    "images-other": (2, r"train/1/307\.png is no JPEG, PNG, GIF or BMP image"),
    "csv-gone": (2, r"csv_dataset\.files: no file 'b\.csv'; nearest: 'a\.csv'"),
    "csv-cut": (2, r"a\.csv: .*Row #309: Expected 3 columns, got 1"),
    "csv-dtype": (2, r"a\.csv, row 309: 'b' is 'old', and 399 of 400 are numbers: correct it, or say that"),
    "csv-empty": (2, r"a\.csv, row 309: 'b' has no value"),
    "parquet-gone": (2, r"parquet_dataset\.files: no file '2\.parquet'; nearest: '1\.parquet', '0\.parquet'"),
    "parquet-cut": (2, r"1\.parquet: "),
    "parquet-damaged": (2, r"1\.parquet, in rows (51 to 100|101 to 150): .*CRC checksum verification failed"),
    "parquet-dtype": (2, r"1\.parquet: 'b' is string, and double in the files before"),
    "parquet-empty": (2, r"1\.parquet, row 108: 'a' has no value"),
    "items-gone": (1, rf"{ITEM} raised FileNotFoundError: .*307\.npy.* \(.*broken_data\.py, line \d+\)"),
    "items-dtype": (2, rf"{ITEM}: x is float64 \[2\], and was float32 \[2\] in the first item"),
    "items-shape": (2, rf"{ITEM}: x is float32 \[1\], and was float32 \[2\] in the first item"),
    "items-parts": (2, rf"{ITEM}: it has x, and had x, y in the first item"),
    "batches-gone": (1, r"Batches\[30\] raised FileNotFoundError: .*307\.npy.* \(.*broken_data\.py, line \d+\)"),
    "batches-dtype": (2, r"Batches\[30\]: x is float64 \[2\], and was float32 \[2\] in the first batch"),
    "batches-shape": (2, r"Batches\[30\] has shapes \(1, 2\), \(10,\): axis 0 counts the examples"),
    "batches-parts": (2, r"Batches\[30\]: it has x, and had x, y in the first batch"),
    "batches-short": (2, r"Batches\[30\] has 9 examples, and the first batch has 10: give all one size"),
    "grain-gone": (1, r"MapMapDataset\[307\] raised FileNotFoundError: .*307\.npy.* \(.*broken_data\.py, line \d+\)"),
    "grain-dtype": (2, r"MapMapDataset\[307\]: x is float64 \[2\], and was float32 \[2\] in the first item"),
    "stream-gone": (1, r"run\.data raised .*307\.npy"),
    "stream-dtype": (1, r"run\.data raised .*"),
    "stream-shape": (1, r"run\.data raised .*"),
}


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Trains on one of the cases in a folder of its own."""
    (tmp_path / "broken_data.py").write_text(MODULE)
    (tmp_path / "mine.gin").write_text(GIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def run(case: str, *params: str) -> int:
        kind, fault = case.split("-")
        bound = [f"run.data = @broken_data.{kind}", f"broken_data.{kind}.fault = {fault!r}", *params]
        return train.main(["--gin_file=mine.gin", "--run_dir=run", *(f"--gin_param={each}" for each in bound)])

    yield run
    sys.modules.pop("broken_data", None)


def line(stderr: str) -> str:
    """The only line of an error, below which there is at most a traceback."""
    (found,) = [each for each in re.split(r"[\r\n]+", stderr) if each.startswith("error: ")]
    return found.removeprefix("error: ")


@pytest.mark.parametrize("case", CASES)
def test_a_run_ends_with_one_line_on_what_is_broken_and_where(case, start, capfd):
    code, words = CASES[case]
    found = start(case)
    said = line(capfd.readouterr().err)
    assert re.match(words, said), said
    assert found == code


@pytest.mark.parametrize("param", ["run.readers = 3", "run.reader_processes = 2"])
@pytest.mark.parametrize("case", ["records-damaged", "images-gone", "items-gone", "items-dtype", "batches-shape"])
def test_several_readers_say_the_same(case, param, start, capfd):
    code, words = CASES[case]
    found = start(case, param)
    said = line(capfd.readouterr().err)
    assert re.match(words, said), said
    assert found == code
