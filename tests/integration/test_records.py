"""Whole runs on TFRecords, as a user's module and gin file."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from dist_partial import train
from dist_partial.data import TFRecordSource
from tests.helpers.files import assert_same_state

pytestmark = pytest.mark.slow

MODULE = """
import keras, tensorflow as tf

def parse(record):
    numbers = tf.ensure_shape(tf.io.decode_raw(record, tf.float32), [5])
    return numbers[:4], tf.cast(numbers[4], tf.int32)

def augment(x, y, seed):
    return x + tf.random.stateless_normal([4], seed), y

def dense():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="head")])
"""
GIN = """
import records_module
run.data = @tfrecord_dataset
tfrecord_dataset.train = 'numbers/*'
tfrecord_dataset.parse = @records_module.parse
tfrecord_dataset.augment = @records_module.augment
run.model = @records_module.dense
run.rules = [('train', '.*')]
run.global_batch = 24
run.steps_per_loop = 2
replicas.cpu = 2
"""
COUNT = 400


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Trains in a folder with two files of records; returns the exit code."""
    (tmp_path / "records_module.py").write_text(MODULE)
    (tmp_path / "mine.gin").write_text(GIN)
    (tmp_path / "numbers").mkdir()
    numbers = np.random.default_rng(0).normal(size=(COUNT, 5)).astype(np.float32)
    numbers[:, 4] = np.arange(COUNT) % 3
    for part in range(2):
        with tf.io.TFRecordWriter(str(tmp_path / "numbers" / f"{part}.tfrecord")) as writer:
            for row in numbers[part::2]:
                writer.write(row.tobytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda run, *params: train.main(
        ["--gin_file=mine.gin", f"--run_dir={run}", *(f"--gin_param=run.{param}" for param in params)]
    )
    sys.modules.pop("records_module", None)


def test_a_run_that_is_resumed_goes_on_with_the_same_examples(start):
    assert start("whole", "steps = 24") == 0
    for steps in (10, 24):  # the second begins in the second epoch's first batches, too
        assert start("parts", f"steps = {steps}") == 0
    assert_same_state(Path("whole"), Path("parts"), 24)


def ending(start, capsys) -> str:
    """The line with which a run of two epochs ends, which the user's mistake must end."""
    assert start("run", "steps = 40") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_a_damaged_record_ends_the_run(start, capsys):
    source, path = TFRecordSource("numbers"), Path("numbers/1.tfrecord")
    state = path.stat()
    content = bytearray(path.read_bytes())
    offset = int(source._index.locate(np.array([307]))[1][0])
    content[offset + 20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # as a disk would damage it
    assert f"numbers/1.tfrecord, record 107 (byte {offset}) is damaged: its data fails" in ending(start, capsys)


def test_a_file_of_other_records_ends_the_run(start, capsys):
    with tf.io.TFRecordWriter("numbers/2.tfrecord") as writer:
        writer.write(np.zeros(6, np.float32).tobytes())
    assert start("run", "steps = 40") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: parse of run.data raised ") and "numbers/2.tfrecord, record 0 (byte 0)" in line
