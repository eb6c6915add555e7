"""TFRecord files by random access, against what tf.data reads of them one after the other."""

import gzip
import os
import pickle
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from dist_partial.data import TFRecordSource, fetch, record_index, tfrecord_dataset
from dist_partial.errors import Raised, UserError
from tests.helpers.files import same_bits
from tests.helpers.orders import read

SIZES = (0, 7, 3, 12)  # records of each file, one of which has none


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dist_partial" / "tfrecords"


@pytest.fixture
def folder(tmp_path):
    """Files of records of many lengths: shorter and longer than what is read at once, and empty ones."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for number, count in enumerate(SIZES):
        with tf.io.TFRecordWriter(str(folder / f"set.tfrecord-{number:05}")) as writer:
            for _ in range(count):
                writer.write(rng.bytes(int(rng.choice([0, 1, 300, 70_000, 200_000]))))
    return folder


def read_by_tf(folder: Path) -> list[bytes]:
    return [record.numpy() for record in tf.data.TFRecordDataset(sorted(map(str, folder.glob("set*"))))]


def kept(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.npy"))


def test_records_in_any_order(folder):
    records, source = read_by_tf(folder), TFRecordSource(folder)
    indices = np.random.default_rng(1).permutation(len(records))
    assert len(source) == len(records) == sum(SIZES)
    assert source.fetch(indices)[0].tolist() == [records[i] for i in indices]
    assert source.fetch(np.array([5, 5]))[0].tolist() == [records[5]] * 2


@pytest.mark.parametrize(
    "files",
    [lambda f: f"{f}/set*", lambda f: sorted(f.glob("set*"), reverse=True), lambda f: [f, f"{f}/set.tfrecord-00001"]],
    ids=["pattern", "list", "twice"],
)
def test_ways_to_name_files(folder, files):
    assert TFRecordSource(files(folder)).fetch(np.arange(22))[0].tolist() == read_by_tf(folder)


def test_place_is_where_the_record_is(folder):
    source = TFRecordSource(folder)
    for index, name, record in ((0, "00001", 0), (6, "00001", 6), (7, "00002", 0), (21, "00003", 11)):
        place = source.place(index)
        assert place.startswith(f"{folder}/set.tfrecord-{name}, record {record} (byte ")
        with open(folder / f"set.tfrecord-{name}", "rb") as file:
            file.seek(int(place.rpartition("byte ")[2].removesuffix(")")))
            length = int.from_bytes(file.read(8), "little")
        assert length == len(source.fetch(np.array([index]))[0][0])


def test_the_index_is_made_once(folder, monkeypatch):
    records = TFRecordSource(folder).fetch(np.arange(22))[0].tolist()
    assert [path.parent for path in kept(folder)] == [folder / ".dist_partial"]
    shutil.move(folder, moved := folder.with_name("moved"))  # files keep their times
    monkeypatch.setattr(record_index, "scan", None)
    source = TFRecordSource(moved)
    assert source.fetch(np.arange(22))[0].tolist() == records
    assert isinstance(source._index.table.base, np.memmap)
    assert pickle.loads(pickle.dumps(source)).fetch(np.arange(22))[0].tolist() == records
    assert len(pickle.dumps(source)) < 2000


def test_a_changed_file_is_indexed_again(folder):
    TFRecordSource(folder)
    (old,) = kept(folder)
    with tf.io.TFRecordWriter(str(folder / "set.tfrecord-00000")) as writer:
        writer.write("more")
    assert TFRecordSource(folder).fetch(np.arange(23))[0].tolist() == [b"more", *read_by_tf(folder)[1:]]
    assert len(kept(folder)) == 1 and kept(folder) != [old]


@pytest.mark.parametrize("left", [0, 100, 300], ids=["empty", "header", "part"])
def test_a_damaged_index_is_made_again(folder, left):
    TFRecordSource(folder)
    (index,) = kept(folder)
    whole = index.read_bytes()
    index.write_bytes(whole[:left] + bytes(len(whole) - left) if left else b"")
    assert TFRecordSource(folder).fetch(np.arange(22))[0].tolist() == read_by_tf(folder)
    assert index.read_bytes() == whole


def test_folders_that_cannot_be_written(folder, tmp_path, cache):
    (folder / ".dist_partial").write_text("not a folder")
    assert len(TFRecordSource(folder)) == 22
    assert len(kept(cache)) == 1
    shutil.rmtree(cache)
    cache.write_text("not a folder either")
    with pytest.raises(
        UserError, match=r"cannot keep the index of .* in .*\.dist_partial \(.*\) or .*: give cache_dir"
    ):
        TFRecordSource(folder)
    assert len(TFRecordSource(folder, cache_dir=tmp_path / "mine")) == 22
    assert len(kept(tmp_path / "mine")) == 1


def flipped(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x10
    path.write_bytes(content)


def offset(folder: Path, index: int) -> int:
    return int(TFRecordSource(folder)._index.locate(np.array([index]))[1][0])


@pytest.mark.parametrize("byte", [0, 3, 7, 9])
def test_damaged_lengths(folder, byte):
    begin = offset(folder, 4)
    flipped(folder / "set.tfrecord-00001", begin + byte)
    with pytest.raises(UserError, match=rf"-00001, record 4 \(byte {begin}\) is damaged: its length fails") as error:
        TFRecordSource(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("more", [b"", b"abc", bytes(12)], ids=["data", "header", "zeros"])
def test_cut_and_filled_up_files(folder, more):
    path = folder / "set.tfrecord-00002"
    begin = offset(folder, 9)
    record, at = (3, path.stat().st_size) if more else (2, begin)
    path.write_bytes(path.read_bytes() + more if more else path.read_bytes()[:-1])
    what = "is damaged" if len(more) == 12 else f"is cut off: the file ends within it, at byte {path.stat().st_size}"
    with pytest.raises(UserError, match=rf"-00002, record {record} \(byte {at}\) {what}"):
        TFRecordSource(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(b"x" * 99, mtime=0), "is compressed by GZIP"),
        (zlib.compress(bytes(range(99))), "is compressed by ZLIB"),
        (b'{"an": "object"}\n' * 9, "is not a TFRecord file"),
        (b"", "holds no record"),
    ],
)
def test_other_files(tmp_path, content, words):
    (tmp_path / "a.tfrecord").write_bytes(content)
    with pytest.raises(UserError, match=f"a.tfrecord {words}"):
        TFRecordSource(tmp_path)


@pytest.mark.parametrize("written", ["set.tfrecord-0001", "sets-*"])
def test_missing_files(folder, written):
    with pytest.raises(UserError, match=f"{written.replace('*', '.')}'; nearest: '{folder}/set.tfrecord-0000"):
        TFRecordSource(folder / written)


@pytest.mark.parametrize("byte", [0, -1], ids=["data", "checksum"])
def test_damaged_data_is_found_when_it_is_read(folder, byte):
    path = folder / "set.tfrecord-00003"
    begin, source = offset(folder, 12), TFRecordSource(folder)
    length = len(source.fetch(np.array([12]))[0][0])
    flipped(path, begin + 12 + (byte if byte >= 0 else length + 4 + byte))
    source = TFRecordSource(folder)  # whose index is new, as the time of the file is
    source.fetch(np.array([11, 13]))
    with pytest.raises(UserError, match=rf"-00003, record 2 \(byte {begin}\) is damaged: its data fails its checksum"):
        source.fetch(np.array([11, 12, 13]))


def test_files_that_change_during_a_run(folder):
    source = TFRecordSource(folder)
    path = folder / "set.tfrecord-00001"
    os.utime(path, ns=(0, 0))
    with pytest.raises(UserError, match="-00001 was changed since the run began"):
        source.fetch(np.array([3]))
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read .*-00001, record 3 \(byte \d+\): No such file"):
        source.fetch(np.array([3]))
    assert len(source.fetch(np.array([8]))[0]) == 1


FEATURES = {"jpeg": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}


def parse(record):
    example = tf.io.parse_single_example(record, FEATURES)
    image = tf.io.decode_jpeg(example["jpeg"], channels=3)
    return tf.ensure_shape(image, [16, 20, 3]), tf.cast(example["label"], tf.int32)


def serialized(jpeg: bytes, label: int) -> bytes:
    feature = {
        "jpeg": tf.train.Feature(bytes_list=tf.train.BytesList(value=[jpeg])),
        "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
    }
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


@pytest.fixture
def pictures(tmp_path):
    """Two files of JPEG images, whose labels count them."""
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    folder.mkdir()
    for part in range(2):
        with tf.io.TFRecordWriter(str(folder / f"{part}.tfrecord")) as writer:
            for label in range(part * 20, part * 20 + 20):
                image = rng.integers(0, 256, (16, 20, 3)).astype(np.uint8)
                writer.write(serialized(tf.io.encode_jpeg(image).numpy(), label))
    return folder


def test_examples_are_those_of_tf_data(pictures):
    """Each record once an epoch, cropped and packed by numbers that differ from epoch to epoch."""
    files = sorted(map(str, pictures.glob("*.tfrecord")))
    images = {int(y): x for x, y in tf.data.TFRecordDataset(files).map(parse).as_numpy_iterator()}
    data = tfrecord_dataset(pictures, parse, evaluation=[pictures / "1.tfrecord"], augment=lambda x, y: (255 - x, y))
    x, y = (np.concatenate(part) for part in zip(*read(data.train, (0, 9)), strict=True))
    assert [sorted(epoch) for epoch in y.reshape(3, 40).tolist()] == [list(range(40))] * 3
    assert same_bits([255 - x, np.stack([images[label] for label in y.tolist()])])
    held_out, labels = data.evaluation.fetch(np.arange(20))  # not augmented
    assert labels.tolist() == list(range(20, 40))
    assert same_bits([held_out, np.stack([images[label] for label in labels.tolist()])])


def test_fingerprints(pictures, tmp_path):
    made = [tfrecord_dataset(pictures, parse, held_out=share).fingerprint for share in (0.1, 0.1, 0.2)]
    assert made[0] == made[1] != made[2]
    shutil.copytree(pictures, tmp_path / "copy", copy_function=shutil.copyfile)  # with other times
    assert tfrecord_dataset(tmp_path / "copy", parse, name="pictures").fingerprint == made[0]
    assert tfrecord_dataset(f"{pictures}/0*", parse).fingerprint != made[0]


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({"jpg": tf.io.FixedLenFeature([], tf.string)}, r"no feature 'jpg' \(.*, line \d+\); nearest: 'jpeg'"),
        ({"label": tf.io.FixedLenFeature([], tf.float32)}, r"'label' of the record .*Data type: int64 .*float\)"),
        ({"label": tf.io.VarLenFeature(tf.float32)}, r"'label' of the record .*Expected type: float"),
        ({"label": tf.io.FixedLenFeature([2], tf.int64)}, r"'label' of the record "),
    ],
)
@pytest.mark.parametrize("batched", [False, True])
def test_a_function_that_asks_for_other_features_is_shown_those_of_the_record(pictures, features, words, batched):
    def asks(record):
        read = tf.io.parse_example if batched else tf.io.parse_single_example
        (value,) = read(record[None] if batched else record, features).values()
        return tf.strings.length(tf.io.serialize_tensor(getattr(value, "values", value)))

    data = tfrecord_dataset(pictures, asks)
    with pytest.raises(UserError, match=rf"^asks of run\.data: .*{words}") as error:
        fetch(data.train, np.array([3]))
    said = str(error.value)
    assert re.search(r"; it has 'jpeg' \(bytes\), 'label' \(int64\); it is .*\.tfrecord, record \d+ ", said)
    assert "\n" not in said


def test_a_record_that_does_not_parse_is_named(pictures):
    with tf.io.TFRecordWriter(str(pictures / "2.tfrecord")) as writer:
        writer.write(serialized(tf.io.encode_jpeg(np.zeros([16, 20, 3], np.uint8)).numpy(), 40))
        writer.write(serialized(b"no image", 41))
    data = tfrecord_dataset(pictures, parse, evaluation=pictures / "0.tfrecord")
    with pytest.raises(Raised, match=r"^parse of run\.data raised .*2\.tfrecord, record 1 \(byte \d+\)") as error:
        fetch(data.train, np.array([40, 41, 3]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"parse": None}, r"tfrecord_dataset.parse is None: give a function of a record"),
        ({"augment": 5}, r"tfrecord_dataset.augment is 5: give a function of \(x, y, seed\)"),
        ({"augment": lambda x: x}, r"<lambda>\(x\) does not take an example"),
        ({"held_out": 1.0}, r"tfrecord_dataset.held_out is 1.0: it must be a number above 0 and below 1"),
        ({"evaluation": "nowhere*"}, r"tfrecord_dataset.evaluation: no file matches 'nowhere\*'"),
    ],
)
def test_arguments(pictures, arguments, words):
    with pytest.raises(UserError, match=words):
        tfrecord_dataset(**{"train": pictures, "parse": parse, **arguments})
