"""Folders of images by class, against `keras.utils.image_dataset_from_directory`."""

import os
import pickle
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial.data import Mapped, fetch, image_folder, image_index
from dist_partial.data.images import ImageFolderSource
from dist_partial.errors import Raised, UserError
from tests.helpers.files import same_bits

SIZE = (20, 24)
KINDS = (".jpg", ".jpeg", ".PNG", ".bmp", ".gif", ".png")
CLASSES = {"zebra": ("1.jpg", "0.jpeg"), "cat": ("b.PNG", "a.bmp", "c.gif"), "dog": ("deep/1.png", "2.png")}


@pytest.fixture
def folder(tmp_path):
    """Images of several kinds and sizes, and what is none."""
    rng = np.random.default_rng(0)
    for name, files in CLASSES.items():
        for file in files:
            path = tmp_path / "animals" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            size = (*rng.integers(10, 60, 2), 3)
            keras.utils.save_img(path, rng.uniform(0, 255, size), scale=False)
    for other in ("notes.txt", "cat/notes.txt", ".git/x.png"):
        (tmp_path / "animals" / other).parent.mkdir(exist_ok=True)
        (tmp_path / "animals" / other).write_text("other")
    return tmp_path / "animals"


def test_the_same_as_keras_reads(folder):
    want = keras.utils.image_dataset_from_directory(
        folder, image_size=SIZE, shuffle=False, batch_size=None, class_names=sorted(CLASSES), verbose=False
    )
    x, y = (np.stack(part) for part in zip(*want.as_numpy_iterator(), strict=True))
    data = image_folder(folder, SIZE, evaluation=folder)
    assert data.classes == ("cat", "dog", "zebra") and data.name == "animals"
    for source in (data.train, data.evaluation):
        found = source.fetch(np.arange(len(x)))
        assert same_bits([found[0], x]) and same_bits([found[1], y])


def test_augment_changes_what_is_trained_on_alone(folder):
    plain = image_folder(folder, SIZE, evaluation=folder)
    data = image_folder(folder, list(SIZE), folder, augment=lambda x, y: (x[::-1], y))
    indices = np.array([4, 0])
    assert same_bits([data.train.fetch(indices)[0], plain.train.fetch(indices)[0][:, ::-1]])
    assert same_bits([data.evaluation.fetch(indices)[0], plain.train.fetch(indices)[0]])


def test_a_part_is_held_out(folder):
    data = image_folder(folder, SIZE, held_out=0.3)
    assert (len(data.train), len(data.evaluation)) == (5, 2)
    pixels = np.concatenate([part.fetch(np.arange(len(part)))[0] for part in (data.train, data.evaluation)])
    assert len({image.tobytes() for image in pixels}) == 7
    assert data.fingerprint == image_folder(folder, SIZE, held_out=0.3).fingerprint
    assert data.fingerprint != image_folder(folder, SIZE, held_out=0.4).fingerprint


def line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_places_name_the_file(folder):
    source = ImageFolderSource(folder)
    assert [source.place(i) for i in (0, 3, 6)] == [
        f"{folder}/{name}" for name in ("cat/a.bmp", "dog/2.png", "zebra/1.jpg")
    ]


@pytest.mark.parametrize("left", [0, 400], ids=["empty", "half"])
def test_a_broken_image(folder, left):
    path, source = folder / "zebra" / "1.jpg", image_folder(folder, SIZE, evaluation=folder).train
    path.write_bytes(path.read_bytes()[:left])
    fetch(source, np.arange(6))
    with pytest.raises(UserError) as error:
        fetch(source, np.arange(7))
    assert str(path) in line(error)


def test_a_broken_image_is_named_whatever_decodes_it(folder):
    path = folder / "zebra" / "1.jpg"
    path.write_bytes(path.read_bytes()[:400])

    def mine(image, y):
        return tf.image.resize(tf.io.decode_jpeg(image, channels=3), SIZE), y

    def of_numpy(image, y):
        return tf.image.resize(tf.io.decode_jpeg(image, channels=3), SIZE).numpy(), y

    source = ImageFolderSource(folder)
    for function, numpy in ((mine, False), (of_numpy, True)):
        with pytest.raises(UserError, match=r"the image cannot be decoded \(.+\): replace or delete it") as error:
            fetch(Mapped(source, function, numpy), np.array([6]))
        assert line(error).endswith(str(path))


def test_a_function_that_fails_on_a_good_image_is_to_blame(folder):
    def fails(image, y):
        tf.debugging.assert_equal(y, 7, message="no seven")
        return tf.zeros([1]), y

    with pytest.raises(Raised, match=r"no seven"):
        fetch(Mapped(ImageFolderSource(folder), fails), np.array([6]))


def test_a_file_that_is_no_image(folder):
    (folder / "dog" / "deep" / "1.png").write_text("no image")
    with pytest.raises(UserError, match=r"dog/deep/1.png is no JPEG, PNG, GIF or BMP image: replace or delete it"):
        ImageFolderSource(folder).fetch(np.array([5, 4]))


def test_a_file_that_is_gone(folder):
    source = ImageFolderSource(folder)
    (folder / "cat" / "a.bmp").unlink()
    with pytest.raises(UserError, match=r"cannot read .*/cat/a.bmp: No such file"):
        source.fetch(np.array([0]))


@pytest.fixture
def large(folder, monkeypatch, tmp_path):
    """The folder, for one of so many images that what is found is kept."""
    monkeypatch.setattr(image_index, "KEPT_FROM", 7)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for path in (folder, *folder.rglob("*")):  # nothing was changed lately
        os.utime(path, ns=(0, 10**9))
    return folder


def everything(source):
    return [source.place(i) for i in range(len(source))], *source.fetch(np.arange(len(source)))


def same(one, other) -> bool:
    return one[0] == other[0] and one[1].tolist() == other[1].tolist() and one[2].tolist() == other[2].tolist()


def test_a_large_folder_is_listed_once(large, monkeypatch):
    listed = everything(ImageFolderSource(large))
    (kept,) = large.parent.rglob("*.npy")
    assert kept.parent == large.parent / ".dist_partial"  # other programs would take it for a class
    monkeypatch.setattr(image_index, "_listed", None)
    source = ImageFolderSource(large)
    assert same(everything(source), listed)
    assert isinstance(source._index.content.base, np.memmap) and len(pickle.dumps(source)) < 1000
    assert same(everything(pickle.loads(pickle.dumps(source))), listed)


def test_what_is_kept_of_a_folder_in_memory_is_sent_along(folder):
    source = ImageFolderSource(folder)
    assert not list(folder.parent.rglob("*.npy"))  # a small one is listed each time
    assert same(everything(pickle.loads(pickle.dumps(source))), everything(source))


@pytest.mark.parametrize("change", ["a file", "a file deep inside", "a file less", "a class", "a class less"])
def test_a_folder_that_has_changed_is_listed_again(change, large):
    ImageFolderSource(large)
    names = {"a file": "cat/1.png", "a file deep inside": "dog/deep/0.png", "a class": "eel/1.png"}
    if name := names.get(change):
        (large / name).parent.mkdir(exist_ok=True)
        shutil.copy(large / "dog" / "2.png", large / name)
    elif change == "a file less":
        (large / "zebra" / "0.jpeg").unlink()
    else:
        shutil.rmtree(large / "cat")
    found = {str(path) for path in large.rglob("*.*") if path.parent != large and path.suffix in {*KINDS}}
    source = ImageFolderSource(large)
    assert {source.place(i) for i in range(len(source))} == found - {str(large / ".git" / "x.png")}


def test_nothing_is_kept_of_a_folder_that_was_changed_just_now(large):
    os.utime(large / "dog" / "deep")
    ImageFolderSource(large)
    assert not list(large.parent.rglob("*.npy"))


@pytest.mark.parametrize("left", [0, 100, 200, -1])
def test_a_damaged_index_is_made_again(left, large):
    listed = everything(ImageFolderSource(large))
    (kept,) = large.parent.rglob("*.npy")
    kept.write_bytes(kept.read_bytes()[:left])
    assert same(everything(ImageFolderSource(large)), listed)


def test_an_index_is_kept_elsewhere_or_not_at_all(large, tmp_path):
    listed = everything(ImageFolderSource(large))
    shutil.rmtree(large.parent / ".dist_partial")
    (large.parent / ".dist_partial").write_text("not a folder")
    assert same(everything(ImageFolderSource(large)), listed)
    assert len(list((tmp_path / "cache" / "dist_partial" / "images").rglob("*.npy"))) == 1
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("not a folder either")
    assert same(everything(ImageFolderSource(large)), listed)


def test_a_folder_that_cannot_be_read(folder):
    with pytest.raises(UserError, match=r"cannot read the folder .*/animals/gone: No such file or directory"):
        image_index._images(os.fsencode(folder / "gone"))  # which a folder without permissions is to all but root


def test_folders_that_are_no_classes(folder, tmp_path):
    (folder / "empty").mkdir()
    (folder / "empty" / ".hidden.png").write_text("")
    with pytest.raises(UserError, match="animals/empty is a class without images: it has no files"):
        image_folder(folder, SIZE)
    (folder / "empty" / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"animals/empty is a class without images: it has files that end in '\.txt'"):
        image_folder(folder, SIZE)
    (folder / "empty" / "a.webp").write_text("")
    with pytest.raises(UserError, match=r"animals/empty/a.webp is of a kind that TensorFlow cannot decode: convert"):
        image_folder(folder, SIZE)
    with pytest.raises(UserError, match="animals/zebra has no subfolders, which are the classes, but '0"):
        image_folder(folder / "zebra", SIZE)
    with pytest.raises(UserError, match=r"cannot read the folder .*/animal: No such file.*; nearest: '.*/animals'"):
        image_folder(tmp_path / "animal", SIZE)


def test_classes_that_differ(folder, tmp_path):
    other = tmp_path / "other"
    for name in ("cat", "dogs", "zebra"):
        (other / name).mkdir(parents=True)
        keras.utils.save_img(other / name / "0.png", np.zeros([3, 3, 3]))
    with pytest.raises(UserError, match=r"animals has a class 'dog', and .*/other has none; nearest: 'dogs'"):
        image_folder(folder, SIZE, evaluation=other)


@pytest.mark.parametrize("size", [224, (224,), (0, 5), (1.5, 2), "large"])
def test_sizes(folder, size):
    with pytest.raises(UserError, match=r"image_folder.size is .*: write \(height, width\) in pixels"):
        image_folder(folder, size)
