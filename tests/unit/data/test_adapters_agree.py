"""All that data can come from: the same examples in the same order on any workers, and after a resume at any step."""

import csv
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial.data import (
    Dataset,
    MapSource,
    Stream,
    csv_dataset,
    dataset,
    image_folder,
    mix,
    parquet_dataset,
    reading,
    tfds_dataset,
    tfrecord_dataset,
)
from dist_partial.data.quiet import quiet_tfds
from tests.helpers.marks import quick
from tests.helpers.orders import assert_same, read, read_held_out

COUNT, HELD_OUT = 29, 17  # of which neither is a multiple of the batch, nor of those of a PyDataset
TRAIN, EVALUATION = np.arange(COUNT), np.arange(100, 100 + HELD_OUT)
OTHERS = np.arange(40, 53), np.arange(140, 143)  # of a second set
STEPS = 9  # of 12 examples: into the fourth epoch
LAYOUTS = ((1, 2), (2, 1), (2, 2), (3, 1), (3, 2))  # workers, and replicas of each


def vector(i: int) -> np.ndarray:
    """x of example i."""
    return np.array([i, i / 4], np.float32)


@dataclass(frozen=True)
class Case:
    """A data set, and what it was made of.

    Attributes:
        data: the data set.
        example: gives the arrays of example i, flat; of those that are random, without what is drawn.
        parts: of mixed sets the numbers of the examples of each; of all others those that are trained on.
        orders: for each part, what gives the numbers of its examples at positions of its own; None: it is shuffled.
        held_out: the numbers of those held out, in order.
        drawn: which arrays have a whole number from 1 to 9 added to them, another one for each example and epoch.
    """

    data: Dataset
    example: Callable[[int], Sequence[Any]] = lambda i: (vector(i), np.int32(i))
    parts: Sequence[np.ndarray] = (TRAIN,)
    orders: Sequence[Callable[[np.ndarray], np.ndarray] | None] = (None,)
    held_out: Sequence[int] = tuple(EVALUATION.tolist())
    drawn: tuple[int, ...] = ()


def again_and_again(positions: np.ndarray) -> np.ndarray:
    return positions % COUNT


def arrays(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([vector(i) for i in numbers]), numbers.astype(np.int32)


def plain() -> Dataset:
    return dataset(arrays(TRAIN), arrays(EVALUATION))


def of_arrays(folder: Path) -> Case:
    return Case(plain())


def of_nests(folder: Path) -> Case:
    """x a dict with texts, y a tuple, and a weight."""

    def made(numbers: np.ndarray) -> Any:
        x, y = arrays(numbers)
        return {"v": x, "text": np.array([f"ö{i}" for i in numbers])}, (y, x[:, 1:]), x[:, 0]

    def example(i: int) -> Sequence[Any]:
        return f"ö{i}".encode(), vector(i), np.int32(i), vector(i)[1:], np.float32(i)

    return Case(dataset(made(TRAIN), made(EVALUATION)), example)


def of_a_tuple(folder: Path) -> Case:
    def made(numbers: np.ndarray) -> Any:
        x, y = arrays(numbers)
        return (x, y), y

    return Case(dataset(made(TRAIN), made(EVALUATION)), lambda i: (vector(i), np.int32(i), np.int32(i)))


def of_a_list(folder: Path) -> Case:
    lists = [[(vector(i), np.int32(i)) for i in numbers] for numbers in (TRAIN, EVALUATION)]
    return Case(dataset(*lists))


class Items:
    """A data set in PyTorch's style."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Any:
        i = int(self.numbers[index])
        return vector(i), i


def of_items(folder: Path) -> Case:
    return Case(dataset(Items(TRAIN), Items(EVALUATION)), lambda i: (vector(i), np.int64(i)))


def of_rows(folder: Path) -> Case:
    """Columns of Hugging Face's."""
    datasets = pytest.importorskip("datasets")

    def made(numbers: np.ndarray) -> MapSource:
        columns = {"v": [vector(i).tolist() for i in numbers], "text": [f"ö{i}" for i in numbers], "i": numbers}
        return MapSource(datasets.Dataset.from_dict(columns), x=["v", "text"], y="i")

    return Case(dataset(made(TRAIN), made(EVALUATION)), lambda i: (f"ö{i}".encode(), vector(i), np.int64(i)))


def of_grain(folder: Path) -> Case:
    """Shuffled by grain, with another order in each epoch."""
    grain = pytest.importorskip("grain")

    def made(numbers: np.ndarray) -> Any:
        return grain.MapDataset.source(numbers)

    items, wanted = (made(TRAIN).seed(7).shuffle() for _ in range(2))
    data = dataset(*(each.map(lambda i: (vector(i), np.int32(i))) for each in (items, made(EVALUATION))))
    return Case(data, orders=[lambda positions: np.array([wanted[int(position)] for position in positions])])


class Batches(keras.utils.PyDataset):
    """Batches of 5, whose last has fewer."""

    def __init__(self, numbers: np.ndarray, **options: Any) -> None:
        super().__init__(**options)
        self.numbers = numbers

    def __len__(self) -> int:
        return -(-len(self.numbers) // 5)

    def __getitem__(self, index: int) -> Any:
        return arrays(self.numbers[5 * index : 5 * index + 5])


def of_batches(folder: Path, **options: Any) -> Case:
    return Case(dataset(Batches(TRAIN, **options), Batches(EVALUATION, **options)), orders=[again_and_again])


def of_batches_in_threads(folder: Path) -> Case:
    return of_batches(folder, workers=3)


def tensors(numbers: np.ndarray) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(arrays(numbers))


def of_a_stream(folder: Path) -> Case:
    return Case(dataset(tensors(TRAIN), tensors(EVALUATION)), orders=[again_and_again])


def of_a_stream_of_batches(folder: Path) -> Case:
    data = dataset(*(tensors(each).batch(5).prefetch(2) for each in (TRAIN, EVALUATION)))
    return Case(data, orders=[again_and_again])


def of_a_shuffled_stream(folder: Path) -> Case:
    """Of a function, which makes it again where a run goes on."""

    def made() -> tf.data.Dataset:
        return tensors(TRAIN).shuffle(COUNT, seed=1)

    return Case(Dataset("shuffled", Stream(made), Stream(tensors(EVALUATION)), "1"))


def of_a_mapped_stream(folder: Path) -> Case:
    case = of_a_stream(folder)
    return Case(case.data.map(noisy), orders=[again_and_again], drawn=(0,))


def write_records(path: Path, numbers: np.ndarray) -> None:
    with tf.io.TFRecordWriter(str(path)) as writer:
        for i in numbers:
            writer.write(np.append(vector(i), np.float32(i)).tobytes())


def parse(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    found = tf.ensure_shape(tf.io.decode_raw(record, tf.float32), [3])
    return found[:2], tf.cast(found[2], tf.int32)


def of_records(folder: Path, augment: Any = None) -> Case:
    write_records(folder / "a.tfrecord", TRAIN[:20])
    write_records(folder / "b.tfrecord", TRAIN[20:])
    write_records(folder / "held_out.tfrecord", EVALUATION)
    data = tfrecord_dataset([folder / "a.tfrecord", folder / "b.tfrecord"], parse, folder / "held*", augment=augment)
    return Case(data, drawn=(0,) if augment else ())


def of_records_through_a_function(folder: Path) -> Case:
    return of_records(folder, noisy)


def pixels(i: int) -> np.ndarray:
    return np.full([4, 5, 3], i, np.uint8)


def of_images(folder: Path) -> Case:
    """Two classes, even and odd; files in the order of their names."""
    for part, numbers in (("train", TRAIN), ("held_out", EVALUATION)):
        for i in numbers:
            (folder / part / f"{i % 2}").mkdir(parents=True, exist_ok=True)
            path = folder / part / f"{i % 2}" / f"{i:03}.png"
            path.write_bytes(tf.io.encode_png(pixels(i)).numpy())
    data = image_folder(folder / "train", (4, 5), folder / "held_out")
    by_class = [*EVALUATION[::2], *EVALUATION[1::2]]
    return Case(data, lambda i: (pixels(i).astype(np.float32), np.int32(i % 2)), held_out=by_class)


def of_csv(folder: Path) -> Case:
    for name, numbers in (("a", TRAIN[:20]), ("b", TRAIN[20:]), ("held_out", EVALUATION)):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([["i", "price", "text"], *([i, i / 4, f"ö{i}"] for i in numbers)])
    data = csv_dataset(f"{folder}/?.csv", ["price", "text"], "i", evaluation=folder / "held_out.csv")
    return Case(data, lambda i: (np.float32(i / 4), f"ö{i}".encode(), np.int64(i)))


def of_parquet(folder: Path) -> Case:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    for name, numbers in (("a", TRAIN[:20]), ("b", TRAIN[20:]), ("held_out", EVALUATION)):
        table = pa.table({"i": numbers, "v": [vector(i).tolist() for i in numbers]})
        parquet.write_table(table, folder / f"{name}.parquet", row_group_size=6)
    data = parquet_dataset(f"{folder}/?.parquet", "v", "i", evaluation=folder / "held_out.parquet")
    return Case(data, lambda i: (vector(i), np.int64(i)))


def of_tfds(folder: Path, file_format: str = "array_record") -> Case:
    tfds = pytest.importorskip("tensorflow_datasets")
    image = tfds.features.Image(shape=(4, 5, 3))
    features = tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=256)})
    parts = {
        split: tf.data.Dataset.from_tensor_slices({"image": np.stack([*map(pixels, numbers)]), "label": numbers})
        for split, numbers in (("train", TRAIN), ("test", EVALUATION))
    }
    with quiet_tfds():
        options = {"data_dir": folder, "file_format": file_format, "disable_shuffling": True}
        tfds.dataset_builders.store_as_tfds_dataset("mine", "1.0.0", features, parts, **options)
    data = tfds_dataset("mine", data_dir=folder)
    return Case(data, lambda i: (pixels(i).astype(np.float32) / np.float32(255), np.int32(i)))


def of_tfds_from_memory(folder: Path) -> Case:
    return of_tfds(folder, "tfrecord")


def noisy(x: tf.Tensor, y: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return x + tf.cast(tf.random.stateless_uniform([2], seed, 1, 10, tf.int32), tf.float32), y


def noisy_numpy(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return x + rng.integers(1, 10, 2).astype(np.float32), y


def through_tensorflow(folder: Path) -> Case:
    return Case(plain().map(noisy), drawn=(0,))


def through_numpy(folder: Path) -> Case:
    return Case(plain().map(noisy_numpy, numpy=True), drawn=(0,))


def through_keras(folder: Path) -> Case:
    """A random layer of Keras's, whose noise is scaled to whole numbers."""
    noise = keras.layers.GaussianNoise(1.0)

    def function(x: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return x + 1.0 + tf.math.floormod(tf.floor(100 * noise(tf.zeros_like(x), training=True)), 9.0), y

    return Case(plain().map(function), drawn=(0,))


def of_batches_through_numpy(folder: Path) -> Case:
    return Case(of_batches(folder).data.map(noisy_numpy, numpy=True), orders=[again_and_again], drawn=(0,))


def in_order(folder: Path) -> Case:
    return Case(plain().in_order(), orders=[again_and_again])


def mixed(folder: Path) -> Case:
    """Of two, one of which draws."""
    other = dataset(*map(arrays, OTHERS)).map(lambda x, y: (x + 1, y))
    data = mix([(plain().map(noisy, lambda x, y: (x + 1, y)), 2), (other, 1)])
    return Case(data, parts=(TRAIN, OTHERS[0]), orders=(None, None), held_out=[*EVALUATION, *OTHERS[1]], drawn=(0,))


def mixed_records_and_batches(folder: Path) -> Case:
    """The batches come in their own order, whatever comes between them."""
    data = mix([(of_records(folder).data, 3), (dataset(*map(Batches, OTHERS)), 1)])
    orders = None, lambda positions: OTHERS[0][positions % len(OTHERS[0])]
    return Case(data, parts=(TRAIN, OTHERS[0]), orders=orders, held_out=[*EVALUATION, *OTHERS[1]])


CASES: dict[str, Callable[[Path], Case]] = {
    made.__name__: made
    for made in (
        of_arrays,
        of_nests,
        of_a_tuple,
        of_a_list,
        of_items,
        of_rows,
        of_grain,
        of_batches,
        of_batches_in_threads,
        of_a_stream,
        of_a_stream_of_batches,
        of_a_shuffled_stream,
        of_a_mapped_stream,
        of_records,
        of_records_through_a_function,
        of_images,
        of_csv,
        of_parquet,
        of_tfds,
        of_tfds_from_memory,
        through_tensorflow,
        through_numpy,
        through_keras,
        of_batches_through_numpy,
        in_order,
        mixed,
        mixed_records_and_batches,
    )
}


def key(row: Sequence[Any], drawn: Sequence[int] = ()) -> tuple[Any, ...]:
    """What tells an example from another, to the last bit: its arrays, but for those that are random."""
    return tuple(
        (each.dtype.str, each.shape, each.tobytes()) if isinstance(each, (np.ndarray, np.generic)) else each
        for number, each in enumerate(row)
        if number not in drawn
    )


def numbers_of(case: Case, batches: Sequence[Any], known: np.ndarray) -> np.ndarray:
    """Which examples batches hold, one after the other; fails where one is none of them."""
    by_key = {key(case.example(i), case.drawn): i for i in known.tolist()}
    assert len(by_key) == len(known)
    return np.array([by_key[key(row, case.drawn)] for batch in batches for row in zip(*batch, strict=True)])


def assert_drawn(case: Case, batches: Sequence[Any], numbers: np.ndarray) -> None:
    """What is added to the examples is a whole number from 1 to 9, and another one in each epoch."""
    for place in case.drawn:
        rows = [row for batch in batches for row in batch[place]]
        added = np.stack([row - case.example(i)[place] for row, i in zip(rows, numbers.tolist(), strict=True)])
        assert np.isin(added, np.arange(1, 10)).all()
        drew = added[np.isin(numbers, case.parts[0])]
        assert len(np.unique(drew[: len(case.parts[0])], axis=0)) > 9
        assert not np.array_equal(drew[numbers[: len(drew)] == 0][:1], drew[numbers[: len(drew)] == 0][1:2])


@pytest.mark.parametrize("name", quick(CASES, "of_nests", "of_batches", "of_records_through_a_function", "mixed"))
def test_one_order_on_any_workers_and_from_any_step(name: str, tmp_path: Path) -> None:
    """Against what the data was made of, and bit for bit against one worker that reads from the beginning."""
    case = CASES[name](tmp_path)
    whole = read(case.data.train, (0, STEPS - 1))
    numbers = numbers_of(case, whole, np.concatenate(case.parts))
    assert_drawn(case, whole, numbers)
    for part, order in zip(case.parts, case.orders, strict=True):
        own = numbers[np.isin(numbers, part)]
        epochs = own[: len(own) // len(part) * len(part)].reshape(-1, len(part))
        assert len(epochs) >= 2
        if order is not None:
            np.testing.assert_array_equal(own, order(np.arange(len(own))))
        else:
            np.testing.assert_array_equal(np.sort(epochs), np.broadcast_to(part, epochs.shape))
            assert not np.array_equal(epochs[0], epochs[1])
    for workers, each in LAYOUTS:
        assert_same(read(case.data.train, (0, STEPS - 1), workers, each), whole)
    random = np.random.default_rng(zlib.crc32(name.encode()))
    for workers in (1, 2, 3):
        step, each = int(random.integers(1, STEPS)), int(random.integers(1, 3))
        assert_same(read(case.data.train, (step, STEPS - 1), workers, each), whole[step:])
    with reading(threads=3):
        assert_same(read(case.data.train, (2, STEPS - 1)), whole[2:])


@pytest.mark.parametrize("name", quick(CASES, "of_nests", "of_batches", "of_records_through_a_function", "mixed"))
def test_held_out_examples_come_once_each_on_any_workers(name: str, tmp_path: Path) -> None:
    """In order; of the last batch replicas take their share, and a worker fills it up with its last example."""
    case = CASES[name](tmp_path)
    count = len(case.held_out)
    steps = -(-count // 12)
    for workers, each in ((1, 1), (2, 2), (3, 1)):
        found = read_held_out(case.data.evaluation, steps, workers, each, examples=count, global_batch=12)
        room = -(-(count - 12 * (steps - 1)) // (workers * each)) * each  # of a worker, in the last batch
        last = [
            12 * (steps - 1) + worker * room + min(i, room - 1)
            for worker in range(workers)
            for i in range(12 // workers)
        ]
        places = np.minimum([*range(12 * (steps - 1)), *last], count - 1)
        np.testing.assert_array_equal(numbers_of(case, found, np.array(case.held_out)), np.array(case.held_out)[places])
