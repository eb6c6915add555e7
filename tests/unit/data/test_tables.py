"""CSV and Parquet files, against the columns that they were written from."""

import csv
import gzip
import re

import numpy as np
import pytest
import tensorflow as tf

from dist_partial.data import csv_dataset, fetch, parquet_dataset
from dist_partial.errors import UserError

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as parquet  # noqa: E402

COUNT = 31
COLUMNS = {
    "age": list(range(20, 20 + COUNT)),
    "price": [i / 4 for i in range(COUNT)],
    "city": [f"Göteborg, {i}" for i in range(COUNT)],
    "member": [i % 3 == 0 for i in range(COUNT)],
    "label": list(range(COUNT)),
}


def rows(part=slice(None)):
    return [list(row) for row in zip(*COLUMNS.values(), strict=True)][part]


def write(path, table, names=tuple(COLUMNS), delimiter=","):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([names, *table])


def write_all(folder, kind):
    """All rows, in two files of the order of their names."""
    for name, part in (("b", slice(20, None)), ("a", slice(0, 20))):
        if kind == "csv":
            write(folder / f"{name}.csv", rows(part))
        else:
            table = pa.table({key: values[part] for key, values in COLUMNS.items()})
            parquet.write_table(table, folder / f"{name}.parquet", row_group_size=7)


READ = {"csv": csv_dataset, "parquet": parquet_dataset}


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("how", ["folder", "pattern", "list"])
def test_columns_become_arrays(kind, how, tmp_path):
    write_all(tmp_path, kind)
    given = {
        "folder": tmp_path,
        "pattern": f"{tmp_path}/*.{kind}",
        "list": [tmp_path / f"b.{kind}", tmp_path / f"a.{kind}"],
    }
    data = READ[kind](
        given[how], x=["age", "price", "city", "member"], y="label", weight="price", evaluation=given[how]
    )
    for source in (data.train, data.evaluation):
        x, y, weight = fetch(source, np.arange(COUNT))
        for name, dtype in (("age", np.int64), ("price", np.float32), ("city", object), ("member", bool)):
            assert x[name].tolist() == COLUMNS[name] and x[name].dtype == dtype
        assert y.tolist() == COLUMNS["label"] and weight.tolist() == COLUMNS["price"]
    assert data.train.spec[0]["city"] == tf.TensorSpec([], tf.string)


@pytest.mark.parametrize("kind", READ)
def test_a_part_is_held_out_and_other_columns_are_another_data_set(kind, tmp_path):
    write_all(tmp_path, kind)
    data = READ[kind](tmp_path, x=["age"], y="label", held_out=0.2)
    assert (len(data.train), len(data.evaluation)) == (25, 6)
    again, other = (READ[kind](tmp_path, x=["age"], y=y, held_out=0.2).fingerprint for y in ("label", "price"))
    assert data.fingerprint == again != other


@pytest.mark.parametrize("kind", READ)
def test_numbers_side_by_side_are_a_matrix(kind, tmp_path):
    write_all(tmp_path, kind)
    data = READ[kind](tmp_path, x=["price", "age", "member"], y=["label", "price"], evaluation=tmp_path, stacked=True)
    x, y = fetch(data.train, np.arange(COUNT))
    np.testing.assert_array_equal(x, np.stack([COLUMNS[name] for name in ("price", "age", "member")], 1))
    assert x.dtype == np.float32 and list(y) == ["label", "price"]
    with pytest.raises(UserError, match="stacked makes one matrix of numbers, and 'city' has texts"):
        READ[kind](tmp_path, x=["age", "city"], stacked=True)


@pytest.mark.parametrize("kind", READ)
def test_a_name_may_end_in_a_type(kind, tmp_path):
    write_all(tmp_path, kind)
    data = READ[kind](tmp_path, x=["age:string", "price:float64"], y="label:int32", evaluation=tmp_path)
    x, y = fetch(data.train, np.arange(2))
    assert (x["age"].tolist(), x["price"].dtype, y.dtype) == (["20", "21"], np.float64, np.int32)
    with pytest.raises(UserError, match="'age:strin' names no type; nearest: 'string'"):
        READ[kind](tmp_path, x="age:strin")


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a;.csv", "a\t.csv", "a|.csv"])
def test_how_csv_files_are_written(name, tmp_path):
    write(tmp_path / name, rows(), delimiter=next((mark for mark in ";\t|" if mark in name), ","))
    source = csv_dataset(tmp_path, x="city", y="label", evaluation=tmp_path).train
    assert fetch(source, np.arange(COUNT))[0].tolist() == COLUMNS["city"]


def test_types_of_later_csv_files_are_those_of_the_first(tmp_path):
    write(tmp_path / "a.csv", [], ["price", "zip"])  # a header alone tells no types
    write(tmp_path / "b.csv", [[1.5, "02134"]], ["price", "zip"])
    write(tmp_path / "c.csv", [["x", 3, 99]], ["other", "price", "zip"])
    x = fetch(csv_dataset(tmp_path, x=["zip:string", "price"], evaluation=tmp_path).train, np.arange(2))[0]
    assert (x["price"].tolist(), x["zip"].tolist()) == ([1.5, 3.0], ["02134", "99"])


def test_columns_of_parquet_of_other_types(tmp_path):
    table = {
        "vector": pa.array([[1, 2], [3, 4]], pa.list_(pa.int16())),
        "fixed": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float64(), 2)),
        "kind": pa.array(["a", "b"]).dictionary_encode(),
        "image": [b"\0\0", b"x\0"],
    }
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    x = fetch(parquet_dataset(tmp_path, x=list(table), evaluation=tmp_path).train, np.array([1, 0]))[0]
    assert (x["vector"].tolist(), x["vector"].dtype) == ([[3, 4], [1, 2]], np.int16)
    assert (x["fixed"].tolist(), x["fixed"].dtype) == ([[3.0, 4.0], [1.0, 2.0]], np.float32)
    assert (x["kind"].tolist(), x["image"].tolist()) == (["b", "a"], [b"x\0", b"\0\0"])


NAMES = ("age", "city")
GOOD = [[31, "Rome"], [54, "Oslo"]]


@pytest.mark.parametrize(
    ("tables", "x", "words"),
    [
        ({"a": [[31, "Rome"], ["", "Oslo"]]}, "age", "a.csv, row 3: 'age' has no value: fill it, or leave the row out"),
        ({"a": GOOD, "b": [["", "Oslo"]]}, ["age"], "b.csv, row 2: 'age' has no value"),
        ({"a": GOOD}, ["agee"], "a.csv has no column 'agee'; nearest: 'age'"),
        (
            {"a": GOOD, "b": [*GOOD, ["old", "Oslo"]]},
            "age",
            "b.csv, row 4: 'age' is int64, and has an invalid value 'old'",
        ),
        (
            {"a": GOOD, "b": [*GOOD, [31.5, "Oslo"]]},
            ["city", "age"],
            "invalid value '31.5': correct it, or say which type ",
        ),
        (
            {"a": [*GOOD, ["old", "Oslo"]]},
            "age",
            "a.csv, row 4: 'age' is 'old', and 2 of 3 are numbers: correct it, or say that the column has texts, as in",
        ),
        ({"a": [["old", "Oslo"], *GOOD]}, "age", "a.csv, row 2: 'age' is 'old', and 2 of 3 are numbers"),
        ({"a": [*GOOD, ["NA", "Oslo"], *GOOD]}, "age", "a.csv, row 4: 'age' is 'NA', and 4 of 5 are numbers"),
        ({"a": [*GOOD, ["nan", "Oslo"], *GOOD]}, "age", "a.csv, row 4: 'age' has no value"),
        ({"a": [*GOOD, [12, ""]]}, "city", "a.csv, row 4: 'city' has no value: fill it (an empty text is \"\"), or"),
        ({"a": [*GOOD, [12, ""]]}, "city:string", "a.csv, row 4: 'city' has no value: fill it"),
        ({"a": [*GOOD, [31]]}, "age", "a.csv: CSV parse error: Row #4: Expected 2 columns, got 1"),
        ({"a": []}, "age", "a.csv has no rows"),
        ({"a": [["2020-01-01", ""], ["2020-01-02", ""]]}, "age", "a.csv: 'age' is date32[day], which no tensor is"),
        ({"a": GOOD}, [], "csv_dataset.x is []: name a column, or a list of columns"),
        ({}, "age", "csv_dataset.files: no file '*.csv*' in"),
    ],
)
def test_mistakes_in_csv_files_are_named(tables, x, words, tmp_path):
    for name, table in tables.items():
        write(tmp_path / f"{name}.csv", table, NAMES)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        csv_dataset(tmp_path, x=x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tables", "x", "words"),
    [
        ({"a": {"age": [1, None]}}, "age", "a.parquet, row 2: 'age' has no value: fill it"),
        (
            {"a": {"age": ["1", None]}},
            "age",
            "a.parquet, row 2: 'age' has no value: fill it (an empty text is \"\"), or",
        ),
        (
            {"a": {"age": [1, 2]}, "b": {"age": ["1"]}},
            "age",
            "b.parquet: 'age' is string, and int64 in the files before",
        ),
        ({"a": {"age": [1, 2]}, "b": {"city": ["1"]}}, "age", "b.parquet has no column 'age'; nearest: 'city'"),
        ({"a": {"age": ["1", "x"]}}, "age:int32", "a.parquet: Failed to parse string: 'x' as a scalar of type int32"),
        (
            {"a": {"age": [[1, 2], [3]]}},
            "age",
            "a.parquet, row 2: 'age' is a list of 1, and of 2 in the first row: pad",
        ),
        ({"a": {"age": [[1, 2]]}, "b": {"age": [[3]]}}, "age", "the lists in 'age' have 2 lengths in the files"),
        ({"a": {"age": [[1, None]]}}, "age", "a.parquet, row 1: 'age' has no value"),
        ({"a": {"age": [{"x": 1}]}}, "age", "a.parquet: 'age' is struct<x: int64>, which no tensor is"),
    ],
)
def test_mistakes_in_parquet_files_are_named(tables, x, words, tmp_path):
    for name, table in tables.items():
        parquet.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        parquet_dataset(tmp_path, x=x)
    assert "\n" not in str(caught.value)


def test_texts_that_look_like_something_missing_are_texts(tmp_path):
    texts = ["NA", "null", "None", "", "N/A", "12"]
    (tmp_path / "a.csv").write_text("country,n\n" + "".join(f'"{each}",1\n' for each in texts))
    source = csv_dataset(tmp_path, x="country", evaluation=tmp_path).train
    assert source.fetch(np.arange(len(texts)))[0].tolist() == texts
    (tmp_path / "a.csv").write_text("country,n\nNA,1\nnull,2\n")
    source = csv_dataset(tmp_path, x="country", evaluation=tmp_path).train
    assert source.fetch(np.arange(2))[0].tolist() == ["NA", "null"]


def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path, capfd):
    parquet.write_table(pa.table({"age": [1.5, 2.0] * 50}), tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"a\.csv is a Parquet file: take parquet_dataset$"):
        csv_dataset(tmp_path, x="age")
    (tmp_path / "a.csv").write_bytes("age,city\n31,Rome\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"a\.csv is no text in UTF-8$"):
        csv_dataset(tmp_path, x="age")
    assert "ignored" not in capfd.readouterr().err


def test_a_column_of_texts_and_numbers_is_said_to_be_text(tmp_path):
    for name, table in (("a", [["12", ""], ["12b", ""]]), ("b", [["b", ""], ["12", ""]])):
        write(tmp_path / f"{name}.csv", table, NAMES)
    source = csv_dataset([tmp_path / "a.csv", tmp_path / "b.csv"], x="age:string", evaluation=tmp_path).train
    assert fetch(source, np.arange(4))[0].tolist() == ["12", "12b", "b", "12"]
    assert fetch(csv_dataset(tmp_path / "b.csv", x="age", evaluation=tmp_path).train, np.arange(2))[0][0] == "b"


def test_a_damaged_page_of_parquet_is_found_by_its_checksum(tmp_path):
    options = {"row_group_size": 10, "write_page_checksum": True, "compression": "none", "use_dictionary": False}
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"age": np.arange(30) + 0x5A5A5A5A}), path, **options)
    content = path.read_bytes()
    at = content.index((0x5A5A5A5A + 17).to_bytes(8, "little"))
    path.write_bytes(content[:at] + b"\0" + content[at + 1 :])
    with pytest.raises(UserError, match=r"a\.parquet, in rows 11 to 20: .*CRC checksum verification failed"):
        parquet_dataset(tmp_path, x="age")


@pytest.mark.parametrize(("kind", "words"), [("csv", "Empty CSV file"), ("parquet", "Parquet file size is 0 bytes")])
def test_a_file_that_is_empty_or_damaged(kind, words, tmp_path):
    (tmp_path / f"a.{kind}").write_text("")
    with pytest.raises(UserError, match=rf"a\.{kind}: {words}"):
        READ[kind](tmp_path, x="age")


def test_pyarrow_is_an_extra(tmp_path, monkeypatch):
    import builtins

    write_all(tmp_path, "csv")
    usual = builtins.__import__

    def without(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(f"No module named {name!r}")
        return usual(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"csv_dataset reads with pyarrow: pip install 'dist_partial\[tables\]'"):
        csv_dataset(tmp_path, x="age")
