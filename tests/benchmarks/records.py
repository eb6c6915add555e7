"""TFRecord files: JPEG images with augmentation against tf.data's own pipeline, and the start far into a large set.

python -m tests.benchmarks.records

Writes tests/benchmarks/results/records.json.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from dist_partial.data import tfrecord_dataset, train_batches
from tests.benchmarks import tables

COMMAND = "python -m tests.benchmarks.records"
RESULTS = Path(__file__).parent / "results" / "records.json"
SETTING = "2 CPU cores, shared with other work; files in the page cache; medians of interleaved rounds"
FILES, IMAGES, STORED, SIZE, BATCH = 8, 2048, 256, 224, 64
ROUNDS, STEPS = 9, 24  # of one side and then the other
RECORDS, FIRST_STEP, STARTS = 10**7, 10**6, 5
FEATURES = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}


def write_images(folder: str) -> None:
    """Blurred noise, which JPEG packs about as tightly as photographs: some 15 kB a picture."""
    rng = np.random.default_rng(0)
    for number in range(FILES):
        with tf.io.TFRecordWriter(f"{folder}/images-{number:05}.tfrecord") as writer:
            for label in range(IMAGES // FILES):
                noise = tf.image.resize(rng.uniform(0, 255, (STORED // 4, STORED // 4, 3)), (STORED, STORED), "bicubic")
                jpeg = tf.io.encode_jpeg(tf.cast(tf.clip_by_value(noise, 0, 255), tf.uint8), quality=90).numpy()
                feature = {
                    "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[jpeg])),
                    "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label % 10])),
                }
                writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())


def parse(serialized: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    record = tf.io.parse_single_example(serialized, FEATURES)
    image = tf.ensure_shape(tf.io.decode_jpeg(record["image"], channels=3), [STORED, STORED, 3])
    return image, tf.cast(record["label"], tf.int32)


def augment(image: tf.Tensor, label: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    image = tf.image.stateless_random_crop(image, (SIZE, SIZE, 3), seed)
    image = tf.image.stateless_random_flip_left_right(image, seed)
    image = tf.image.stateless_random_brightness(tf.cast(image, tf.float32), 32.0, seed)
    return image / 255, label


def centre(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return tf.cast(tf.image.resize_with_crop_or_pad(image, SIZE, SIZE), tf.float32) / 255, label


def of_tf_data(folder: str, shuffled: int = 0) -> Iterator[Any]:
    """What people write: in the order of the files, perhaps through a buffer, with a thread a core."""
    records = tf.data.TFRecordDataset(sorted(map(str, Path(folder).glob("*.tfrecord")))).repeat()
    if shuffled:
        records = records.shuffle(shuffled, seed=0)

    def example(number: tf.Tensor, serialized: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return augment(*parse(serialized), seed=tf.stack([number, 0]))

    return iter(records.enumerate().map(example, num_parallel_calls=2).batch(BATCH, drop_remainder=True).prefetch(4))


def of_dist_partial(folder: str) -> Iterator[Any]:
    """Shuffled over all files, each record found by its number."""
    data = tfrecord_dataset(folder, parse, held_out=0.01).map(augment, evaluation=centre)
    alone = tf.distribute.InputContext()
    return iter(train_batches(data.train, first_step=0, global_batch=BATCH, seed=0, context=alone))


def rates(sides: dict[str, Callable[[str], Iterator[Any]]]) -> list[dict[str, Any]]:
    """Examples a second, and microseconds of all CPUs an example."""
    with tempfile.TemporaryDirectory() as folder:
        write_images(folder)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(ROUNDS):
            for name, make in sides.items():
                batches = make(folder)
                for _ in range(6):  # more than are made ahead
                    next(batches)
                begun, used = time.perf_counter(), time.process_time()
                for _ in range(STEPS):
                    next(batches)
                seconds, used = time.perf_counter() - begun, time.process_time() - used
                found[name].append((STEPS * BATCH / seconds, used / (STEPS * BATCH) * 1e6))
                del batches
    rows = []
    for name, rounds in found.items():
        rate, cpu = zip(*rounds, strict=True)
        row = {
            "median": statistics.median(rate),
            "least": min(rate),
            "most": max(rate),
            "cpu_us": statistics.median(cpu),
        }
        rows.append({"pipeline": name, **row})
    return rows


def write_numbers(folder: str) -> None:
    """Records of 8 to 24 bytes."""
    for number in range(FILES):
        with tf.io.TFRecordWriter(f"{folder}/numbers-{number:05}.tfrecord") as writer:
            for i in range(RECORDS // FILES):
                writer.write(i.to_bytes(8, "little") * (1 + i % 3))


def number(serialized: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    x = tf.io.decode_raw(tf.strings.substr(serialized, 0, 8), tf.int64)
    return tf.ensure_shape(tf.cast(x, tf.float32), [1]), tf.cast(x[0] % 10, tf.int32)


def start(folder: str) -> tuple[float, float]:
    """Seconds from the names of the files to the first batch, and those of all CPUs."""
    begun, used = time.perf_counter(), time.process_time()
    data = tfrecord_dataset(folder, number)
    alone = tf.distribute.InputContext()
    batches = train_batches(data.train, first_step=FIRST_STEP, global_batch=BATCH, seed=0, context=alone)
    next(iter(batches))
    return time.perf_counter() - begun, time.process_time() - used


def starts() -> list[list[float]]:
    """Of new processes, the first of which makes the index."""
    with tempfile.TemporaryDirectory() as folder:
        write_numbers(folder)
        command = [sys.executable, "-m", "tests.benchmarks.records", folder]
        started = [subprocess.run(command, capture_output=True, check=True, text=True) for _ in range(1 + STARTS)]
    return [json.loads(each.stdout.splitlines()[-1]) for each in started]


def main() -> None:
    sides = {
        "tf.data, in order": of_tf_data,
        "tf.data, shuffle(1000)": functools.partial(of_tf_data, shuffled=1000),
        "dist_partial, shuffled": of_dist_partial,
    }
    found = rates(sides)
    (first, _), *later = starts()
    seconds, cpu = zip(*later, strict=True)
    far = {"records": RECORDS, "step": FIRST_STEP, "without_index_s": first, "median_s": statistics.median(seconds)}
    far |= {"most_s": max(seconds), "cpu_s": statistics.median(cpu)}
    result = {"command": COMMAND, "setting": SETTING, "rates": found, "start": far}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(tables.text("records"))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(start(sys.argv[1])), flush=True)
        os._exit(0)  # an iterator that is alive would hold the process up
    main()
    os._exit(0)
