"""tfds data sets by name, against the arrays that they were prepared from."""

import json
import shutil
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from dist_partial.data import fetch, prepared, tfds_dataset, train_batches
from dist_partial.data.quiet import quiet_tfds
from dist_partial.errors import Raised, UserError

RANDOM = np.random.default_rng(0)
COUNTS = {"train": 30, "test": 7}
IMAGES = {split: RANDOM.integers(0, 256, (count, 6, 5, 3), np.uint8) for split, count in COUNTS.items()}
TEXTS = {
    "train": [bytes(range(65, 65 + length)) for length in range(25)],
    "test": [b"", b"x", "héllo".encode()],
}


class SmallImages(tfds.core.GeneratorBasedBuilder):
    """Random images; the label is the index modulo 10."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        kinds = {
            "image": tfds.features.Image(shape=(6, 5, 3)),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        features = tfds.features.FeaturesDict(kinds)
        return self.dataset_info_from_configs(features=features, supervised_keys=("image", "label"))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in IMAGES}

    def _generate_examples(self, split):
        for index, image in enumerate(IMAGES[split]):
            yield index, {"image": image, "label": index % 10}


class SmallTexts(tfds.core.GeneratorBasedBuilder):
    """Texts of every length."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in TEXTS}

    def _generate_examples(self, split):
        for index, text in enumerate(TEXTS[split]):
            yield index, {"text": text}


class SmallNumbers(tfds.core.GeneratorBasedBuilder):
    """Neither images nor text."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"number": np.int64}))

    def _split_generators(self, dl_manager):
        return {"train": ((i, {"number": i}) for i in range(3))}

    def _generate_examples(self):
        raise NotImplementedError


FORMATS = ("array_record", "tfrecord")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Format to a tfds folder with the three data sets."""
    made = {name: tmp_path_factory.mktemp(name) for name in FORMATS}
    with quiet_tfds():
        for name, folder in made.items():
            for builder in (SmallImages, SmallTexts, SmallNumbers):
                builder(data_dir=folder).download_and_prepare(file_format=name)
    return made


def all_of(source):
    """Every example of a source: arrays [n, ...]."""
    return source.fetch(np.arange(len(source)))


@pytest.mark.parametrize("file_format", FORMATS)
def test_images(folders, file_format):
    data = tfds_dataset("small_images", data_dir=folders[file_format])
    assert (data.codec, data.unit, data.name) == (None, None, "small_images/1.0.0")
    for split, source in (("train", data.train), ("test", data.evaluation)):
        x, y = all_of(source)
        assert x.dtype == np.float32 and y.dtype == np.int32
        known = {image.tobytes(): i for i, image in enumerate(IMAGES[split])}
        where = [known[image.tobytes()] for image in np.rint(x * 255).astype(np.uint8)]
        assert sorted(where) == list(range(len(IMAGES[split])))
        np.testing.assert_allclose(x, IMAGES[split][where] / 255, rtol=1e-6)
        np.testing.assert_array_equal(y, np.array(where) % 10)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("window", [1, 10, 30])
def test_texts(folders, file_format, window):
    data = tfds_dataset("small_texts", data_dir=folders[file_format], window=window)
    assert (data.codec.decode(data.codec.encode("é")), data.unit) == ("é", "byte")
    for split, source in (("train", data.train), ("test", data.evaluation)):
        found = []
        for x, y, weight in zip(*all_of(source), strict=True):
            assert x.shape == y.shape == weight.shape == (window,)
            targets = int(weight.sum())
            np.testing.assert_array_equal(weight, [1] * targets + [0] * (window - targets))
            np.testing.assert_array_equal(x[1:targets], y[: max(targets - 1, 0)])
            found.append(bytes([x[0], *y[:targets]]) if targets else b"")
        cut = [text[: window + 1] if len(text) > 1 else b"" for text in TEXTS[split]]
        assert sorted(found) == sorted(cut)


@pytest.mark.parametrize("name", ["small_images", "small_texts"])
def test_both_formats_are_the_same_data(folders, name):
    one, other = (tfds_dataset(name, data_dir=folders[file_format]) for file_format in FORMATS)
    assert one.fingerprint == other.fingerprint
    assert one.train.spec == other.train.spec
    for array, same in zip(all_of(one.train), all_of(other.train), strict=True):
        np.testing.assert_array_equal(array, same)


def test_fingerprint_changes_with_window_and_split(folders):
    def make(**options):
        return tfds_dataset("small_texts", data_dir=folders["tfrecord"], **options).fingerprint

    assert len({make(), make(window=8), make(split_train="train[:50%]"), make(split_evaluation="train")}) == 4


@pytest.mark.parametrize("file_format", FORMATS)
def test_batches(folders, file_format):
    context = tf.distribute.InputContext(1, 0, 1)
    data = tfds_dataset("small_texts", split_train="train[:20]", data_dir=folders[file_format], window=12)
    assert len(data.train) == 20
    batches = train_batches(data.train, first_step=0, global_batch=4, seed=0, context=context)
    rows = [row.tobytes() for x, _, _ in batches.take(5).as_numpy_iterator() for row in x]
    assert sorted(rows) == sorted(row.tobytes() for row in all_of(data.train)[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"name": "mnist"},
            r"'mnist' is not prepared in .*tfds\.builder\('mnist', data_dir='.*'\)\.download_and",
        ),
        ({"name": "smal_images"}, "'smal_images': is neither prepared in .* nearest: 'small_images'"),
        ({"name": "mnist/none"}, "BuilderConfig none not found"),
        ({"name": "mnist:9.9.9"}, "cannot be loaded at version 9.9.9"),
        (
            {"name": "small_images", "split_train": "training"},
            "split_train='training' .* take one of train, test",
        ),
        ({"name": "small_images", "split_evaluation": "test[:x%]"}, "split_evaluation='test"),
        ({"name": "small_numbers", "split_evaluation": "train"}, "features number"),
        ({"name": "small_texts", "window": 0}, "window is 0"),
    ],
)
def test_mistakes_are_named_in_one_line(folders, options, words):
    with pytest.raises(UserError, match=words) as caught:
        tfds_dataset(**{"data_dir": folders["array_record"], **options})
    assert "\n" not in str(caught.value)


def test_large_split_without_random_access(folders, monkeypatch):
    monkeypatch.setattr(prepared, "MEMORY_LIMIT", 1000)
    with pytest.raises(UserError, match=r"without random access.*file_format='array_record'"):
        tfds_dataset("small_images", data_dir=folders["tfrecord"])
    tfds_dataset("small_images", data_dir=folders["array_record"])


def test_says_nothing(folders, capfd):
    tfds_dataset("small_images", data_dir=folders["array_record"])
    assert capfd.readouterr() == ("", "")


IMAGE = "tensorflow_datasets.core.features.image_feature.Image"


@pytest.mark.parametrize(
    ("file_format", "words"),
    [
        ("array_record", r"; it is example \d+ of small_images/1\.0\.0, split 'train'$"),
        ("tfrecord", r"DataLossError: .*; it is example \d+ of small_images/1\.0\.0, split 'train'$"),
    ],
)
def test_a_damaged_file_says_which_example(folders, tmp_path, file_format, words):
    folder = shutil.copytree(folders[file_format], tmp_path / "data")
    (file,) = folder.glob("small_images/1.0.0/*train*record*0*")
    content = bytearray(file.read_bytes())
    content[400:464] = bytes(64)
    file.write_bytes(content)
    with pytest.raises(Raised, match=words) as caught:
        source = tfds_dataset("small_images", data_dir=folder).train
        fetch(source, np.arange(len(source)))
    assert "\n" not in str(caught.value)


def foreign_class(file):
    """features.json names a class of the data set's own."""
    file.write_text(file.read_text().replace(IMAGE, "evil.Image"))


def foreign_class_in_text(file):
    """Content that is JSON within JSON, as older versions of tfds wrote it."""
    inner = json.dumps({"image": {"type": "evil.Image", "content": {}}})
    name = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    file.write_text(json.dumps({"pythonClassName": name, "jsonFeature": {"json": inner}}))


def foreign_class_in_info(file):
    """The description of the data set may hold the features, too."""
    features, info = json.loads(file.read_text()), file.with_name("dataset_info.json")
    features["featuresDict"]["features"]["image"]["pythonClassName"] = "evil.Image"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"features": features}))


def linked(file):
    """A folder that is a link."""
    foreign_class(file)
    moved = file.parents[3] / "elsewhere"
    shutil.move(file.parent, moved)
    file.parent.symlink_to(moved, target_is_directory=True)


@pytest.mark.parametrize("name", ["foreign_images", "ForeignImages"])
@pytest.mark.parametrize("change", [foreign_class, foreign_class_in_text, foreign_class_in_info, linked])
def test_a_data_set_names_no_code(folders, tmp_path, change, name, monkeypatch):
    """tfds imports the classes that its files name: nothing but its own is let in, wherever it is named."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text("")
    folder = tmp_path / "data"
    shutil.copytree(folders["tfrecord"] / "small_images", folder / "foreign_images")  # a name without code of its own
    info = folder / "foreign_images" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("small_images", "foreign_images"))
    change(info.with_name("features.json"))
    with pytest.raises(UserError, match=r"names the class 'evil\.Image'"):
        tfds_dataset(name, data_dir=folder)
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    "name", ["huggingface:mnist", "kaggle:small_images/1.0.0", "mnist/data_dir=x", "a/b/c", "..", ""]
)
def test_names_that_tfds_would_look_for_elsewhere(folders, name):
    with pytest.raises(UserError, match=r"tfds_dataset\.name=.*without a namespace or arguments"):
        tfds_dataset(name, data_dir=folders["tfrecord"])
