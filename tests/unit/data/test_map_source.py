"""Objects with a length and items, against the arrays that they were made from."""

import re

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf

from dist_partial.data import ArraySource, MapSource, Part, dataset, fetch, source_of
from dist_partial.errors import Raised, UserError
from tests.helpers.orders import read

COUNT = 29
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (COUNT, 4, 5, 3), np.uint8)
IDS = RANDOM.integers(0, 1000, (COUNT, 6))
LABELS = np.arange(COUNT)


class Digits:
    """A data set in PyTorch's style."""

    def __init__(self, change=lambda index, item: item):
        self.change = change

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        assert type(index) is int and 0 <= index < COUNT
        return self.change(index, (PIL.Image.fromarray(IMAGES[index]), int(LABELS[index])))


class Batched(Digits):
    """One that reads several items at once, as PyTorch's loader asks for."""

    def __getitem__(self, index):
        raise AssertionError("one by one")

    def __getitems__(self, indices):
        return [super(Batched, self).__getitem__(index) for index in indices]


class Tensor:
    """Does as a tensor of PyTorch that has gradients."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def detach(self):
        return self

    def cpu(self):
        return self.array


@pytest.mark.parametrize("items", [Digits(), Batched()])
def test_items_are_read_in_the_order_of_arrays(items):
    """The same batches as from arrays."""
    arrays = read(ArraySource(IMAGES, LABELS), (0, 7))
    for found, wanted in zip(read(MapSource(items), (0, 7)), arrays, strict=True):
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("form", ["plain", "numpy"])
def test_rows_of_hugging_face(form):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict(
        {"ids": IDS.tolist(), "text": [f"t{i}" for i in range(COUNT)], "price": (LABELS / 2).tolist(), "label": LABELS}
    )
    rows = rows.with_format("numpy") if form == "numpy" else rows
    data = dataset(MapSource(rows, x=["ids", "text", "price"], y="label", weight="price"), held_out=0.2)
    assert (len(data.train), len(data.evaluation)) == (23, 6)
    for source in (data.train, data.evaluation):
        x, y, weight = fetch(source, np.arange(len(source)))
        np.testing.assert_array_equal(x["ids"], IDS[y])
        np.testing.assert_array_equal(x["price"], y / 2)
        assert x["text"].tolist() == [f"t{i}" for i in y] and weight.tolist() == (y / 2).tolist()
        assert x["price"].dtype == np.float32


def test_images_of_hugging_face():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [PIL.Image.fromarray(image) for image in IMAGES], "label": LABELS}
    source = MapSource(datasets.Dataset.from_dict(rows, features=features), "image", "label")
    np.testing.assert_array_equal(source.fetch(np.array([7, 3]))[0], IMAGES[[7, 3]])
    with pytest.raises(UserError, match=r"a DatasetDict that holds a Dataset: give the parts, as in dataset\(train"):
        source_of(datasets.DatasetDict(train=source.items))
    with pytest.raises(UserError, match=r"Dataset\[0\] is a dict of 'image', 'label': say which of them are x and y"):
        source_of(source.items)


@pytest.mark.parametrize(
    ("item", "wanted"),
    [
        ((Tensor(IMAGES[0]), 1), [IMAGES[0], np.int64(1)]),
        ((tf.constant([1.0, 2.0]), np.float64(3)), [np.float32([1, 2]), np.float64(3)]),
        (([1, 2.5], True), [np.float32([1, 2.5]), np.bool_(True)]),
        ((b"a\0", ["ab", "c"]), [np.array(b"a\0", object), np.array(["ab", "c"], object)]),
        (
            ({"b": [[1], [2]], "a": (1.5, "t")}, 2, 0.5),
            [np.float32(1.5), np.array("t", object), np.int64([[1], [2]]), 2, 0.5],
        ),
        (np.zeros(3), [np.zeros(3)]),
        (([np.zeros(3), np.ones(2)], 1), [np.zeros(3), np.ones(2), np.int64(1)]),
    ],
)
def test_what_items_may_hold(item, wanted):
    source = MapSource([item, item])
    found = tf.nest.flatten(fetch(source, np.array([1, 0])))
    for one, other in zip(found, wanted, strict=True):
        other = np.asarray(other)
        np.testing.assert_array_equal(one, np.stack([other, other]))
        assert one.dtype == other.dtype or other.dtype == np.float64


def changed(index, item):
    """Digits whose item of an index is another."""
    return Digits(lambda at, usual: item if at == index else usual)


def failing(index):
    def change(at, usual):
        if at == index:
            raise KeyError("no such file")
        return usual

    return Digits(change)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (
            changed(17, (IMAGES[0][:3], 1)),
            "Digits[17]: x is uint8 [3, 5, 3], and was uint8 [4, 5, 3] in the first",
        ),
        (changed(17, (IMAGES[0], 1.5)), "Digits[17]: y is float32 [], and was int64 [] in the first item"),
        (changed(17, (IMAGES[0],)), "Digits[17]: it has x, and had x, y in the first item"),
        (changed(17, ({"a": IMAGES[0]}, 1)), "Digits[17]: x is a dict, and was one array in the first item"),
        (changed(17, ([[1, 2], [3]], 1)), "Digits[17]: x is a list of several lengths: pad or cut it to one"),
        (changed(17, (None, 1)), "Digits[17]: x has no value (None): give numbers"),
        (changed(17, (object, 1)), "Digits[17]: x has a type, <class 'object'>: give numbers"),
        (failing(17), "Digits[17] raised KeyError: 'no such file' ("),
    ],
)
def test_what_changes_in_the_middle_is_named(items, words):
    """In one line, with the item's own index where a part is read, too."""

    def read_all(make):
        source = make()
        fetch(source, np.arange(len(source)))

    whole = MapSource(items)
    for make in (lambda: whole, lambda: Part(whole, 0, COUNT), lambda: dataset(items, Digits()).train):
        with pytest.raises((UserError, Raised), match=re.escape(words)) as caught:
            read_all(make)
        assert "\n" not in str(caught.value) and str(caught.value).count("Digits[") == 1


def test_a_pipeline_that_meets_a_broken_item_ends():
    with pytest.raises(tf.errors.OpError, match=re.escape("Digits[17] raised KeyError: 'no such file' (")):
        read(MapSource(failing(17)), (0, 3))


ROWS = [{"text": "to be", "label": 1}, {"text": "or not"}]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MapSource(ROWS, "tex", "label"), "list[0] has no column 'tex'; nearest: 'text'"),
        (lambda: MapSource(ROWS, ["text"], "lable"), "list[0] has no column 'lable'; nearest: 'label'"),
        (
            lambda: MapSource(ROWS, "text", "label").fetch(np.array([1])),
            "list[1] has no column 'label'",
        ),
        (lambda: MapSource(ROWS), "list[0] is a dict of 'text', 'label': say which of them are x and y"),
        (
            lambda: MapSource(Digits(), "image"),
            "Digits[0] is a tuple, and no dict of columns: leave x,",
        ),
        (lambda: MapSource(ROWS, y="label"), "MapSource got y or weight and no x"),
        (lambda: MapSource(ROWS, "text", weight="label"), "MapSource got a weight and no y"),
        (lambda: MapSource([]), "list is empty"),
        (lambda: MapSource([(1, 2, 3, 4)]), "list[0] is a tuple of 4: give (x,), (x, y) or (x, y, weight)"),
        (lambda: MapSource([np.array("2020", "datetime64[Y]")]), "list[0] has the type datetime64[Y]: make a number"),
        (lambda: MapSource(5), "len(int) raised TypeError"),
    ],
)
def test_mistakes_are_named_in_one_line(make, words):
    with pytest.raises((UserError, Raised), match=re.escape(words)) as caught:
        make()
    assert "\n" not in str(caught.value)
