"""Reads columns of CSV and Parquet files by pyarrow, the extra `tables`."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_partial.errors import UserError, first_line
from dist_partial.validation import nearest, shown

if TYPE_CHECKING:
    import pyarrow

Types = Mapping[str, Any]
_WHOLE = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
TYPES = ("string", "bool", *_WHOLE, "float32", "float64")
"""What may follow the name of a column, as in 'zip:string'."""

_DELIMITERS = ",;\t|"
_MISSING = ["", "nan", "NaN", "-nan", "-NaN"]  # and not "NA" and the like, which are texts
_NUMBER = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"
_OF_CSV = re.compile(r"In CSV column #(\d+): (?:Row #(\d+): )?(?:CSV conversion error to \w+: )?(.*)")


@dataclass(frozen=True)
class Format:
    """Holds how files of a format are read.

    Attributes:
        pattern: of their names.
        first_row: the number of the first row of data, as people count: 2 below a header.
        names: gives the names of a file's columns.
        read: reads columns of a file, by name with their types or None; in a format without types of its own those are
            then the ones found in files before.
    """

    pattern: str
    first_row: int
    names: Callable[[Path], list[str]]
    read: Callable[[Path, Types, Types], "pyarrow.Table"]


def read_columns(
    function: str, form: Format, paths: Sequence[Path], columns: Sequence[str], types: dict[str, Any]
) -> list[tuple[str, np.ndarray]]:
    """Reads columns of files into arrays [n, ...], in the order of the files.

    Args:
        function: which messages name.
        form: of the files.
        paths: the files.
        columns: their names, each perhaps with a type behind it.
        types: by name, those found in files before; what is found here is added.

    Returns:
        For each of `columns`, its name, without the type, and its values.

    Raises:
        UserError: a file is damaged; a column is not there, has another type than before, or lacks a value.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.csv")
        ...     _ = path.write_text("age,city\\n31,Rome\\n54,Oslo\\n")
        ...     read_columns("csv_dataset", CSV, [path], ["age:float32"], {})
        [('age', array([31., 54.], dtype=float32))]
    """
    parts: list[list[tuple[str, np.ndarray]]] = []
    for path in paths:
        try:
            declared = _declared(function, path, form.names(path), columns)
            table = form.read(path, {name: kind for name, kind in declared}, types)
        except ImportError as error:
            raise UserError(f"{function} reads with pyarrow: pip install 'dist_partial[tables]' ({error})") from None
        except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
            raise UserError(f"{path}: {first_line(error)}") from None
        if table.num_rows:  # else its columns have no types
            parts.append([(name, _column(path, name, kind, table[name], form, types)) for name, kind in declared])
    if not parts:
        raise UserError(f"{function}: {paths[0]} has no rows" + (", and no other file has" if paths[1:] else ""))
    found = []
    for of_files in zip(*parts, strict=True):
        name, arrays = of_files[0][0], [array for _, array in of_files]
        if len(sizes := {array.shape[1:] for array in arrays}) > 1:
            raise UserError(
                f"{function}: the lists in {name!r} have {len(sizes)} lengths in the files: pad or cut them to one"
            )
        found.append((name, np.concatenate(arrays)))
    return found


def _column(
    path: Path, name: str, kind: Any, column: "pyarrow.ChunkedArray", form: Format, types: dict[str, Any]
) -> np.ndarray:
    """The values of a column of a file, whose type is that of the files before; `kind` is what the user has written."""
    array = _array(path, name, column, form.first_row)
    if (before := types.setdefault(name, column.type)) != column.type:
        raise UserError(
            f"{path}: {name!r} is {column.type}, and {before} in the files before: write them alike, or say which it "
            f"is, as in '{name}:float32'"
        )
    return array.astype(np.float32) if kind is None and array.dtype.kind == "f" else array


def _declared(function: str, path: Path, names: Sequence[str], columns: Sequence[str]) -> list[tuple[str, Any]]:
    """The names of the columns that are wanted, each with the type that the user has written, or None."""
    import pyarrow as pa

    found: list[tuple[str, Any]] = []
    for written in columns:
        name, _, kind = written.rpartition(":")
        if written in names:
            found.append((written, None))
        elif name in names and kind in TYPES:
            found.append((name, pa.type_for_alias(kind)))
        elif name in names:
            raise UserError(f"{function}: {written!r} names no type{nearest(kind, TYPES, always=True)}")
        else:
            raise UserError(f"{path} has no column {written!r}{nearest(written, names, always=True)}")
    return found


def _array(path: Path, name: str, column: "pyarrow.ChunkedArray", first_row: int, of_row: int = 1) -> np.ndarray:
    """A column without missing values, `of_row` in a row, as an array [n], or of lists of one length [n, length]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if column.null_count:
        row = first_row + pc.index(column.is_null(), True).as_py() // of_row
        empty = ' (an empty text is "")' if pa.types.is_string(column.type) else ""
        raise UserError(f"{path}, row {row}: {name!r} has no value: fill it{empty}, or leave the row out")
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _array(path, name, column.cast(kind.value_type), first_row, of_row)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = pc.list_value_length(column).to_numpy()
        if len(other := np.flatnonzero(lengths != lengths[0])):
            row = first_row + other[0] // of_row
            raise UserError(
                f"{path}, row {row}: {name!r} is a list of {lengths[other[0]]}, and of {lengths[0]} in the first row: "
                "pad or cut the lists to one length"
            )
        values = _array(path, name, pc.list_flatten(column), first_row, of_row * int(lengths[0]))
        return values.reshape(len(column), lengths[0], *values.shape[1:])
    known = ["integer", "floating", "boolean", "string", "binary", "large_string", "large_binary"]
    if not any(getattr(pa.types, f"is_{each}")(kind) for each in known):
        raise UserError(f"{path}: {name!r} is {kind}, which no tensor is: make numbers or texts of it")
    return column.to_numpy()


def _csv_names(path: Path) -> list[str]:
    import pyarrow.csv as csv

    with csv.open_csv(path, parse_options=_separated(path, invalid_row_handler=lambda row: "skip")) as file:
        return file.schema.names


def _separated(path: Path, **options: Any) -> Any:
    """The options for a file, which have the character that separates its columns, by its header."""
    import pyarrow as pa
    import pyarrow.csv as csv

    with pa.input_stream(str(path)) as file:
        start = file.read(10_000)
    if b"\0" in start:
        form = "a Parquet file: take parquet_dataset" if start.startswith(b"PAR1") else "no text in UTF-8"
        raise UserError(f"{path} is {form}")
    header = start.partition(b"\n")[0]
    return csv.ParseOptions(delimiter=max(_DELIMITERS, key=lambda each: header.count(each.encode())), **options)


def _csv(path: Path, columns: Types, found: Types) -> "pyarrow.Table":
    import pyarrow as pa
    import pyarrow.csv as csv

    types = {**found, **{name: kind for name, kind in columns.items() if kind is not None}}
    options = {
        "parse_options": _separated(path),
        "convert_options": csv.ConvertOptions(
            include_columns=list(columns),
            column_types=types,
            null_values=_MISSING,
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    }
    try:
        table = csv.read_csv(path, **options)
    except pa.ArrowInvalid:
        try:
            table = csv.read_csv(path, csv.ReadOptions(use_threads=False), **options)  # which knows the row
        except pa.ArrowInvalid as error:
            raise UserError(_of_csv(path, str(error).splitlines()[0], types)) from None
    for name in columns:
        if name not in types and pa.types.is_string(table[name].type):
            _check_texts(path, name, table[name])
    return table


def _check_texts(path: Path, name: str, column: "pyarrow.ChunkedArray") -> None:
    """Raises UserError if most values of a column that was guessed to be text are numbers: one has changed its type.

    pyarrow guesses by the first block of a file. Beyond that, it refuses such a value itself.
    """
    import pyarrow.compute as pc

    numbers = pc.match_substring_regex(column, _NUMBER)
    count, values = pc.sum(numbers).as_py() or 0, len(column)
    if values / 2 < count < values - column.null_count:
        index = pc.index(numbers, False).as_py()
        raise UserError(
            f"{path}, row {index + 2}: {name!r} is {shown(column[index].as_py())}, and {count:,} of {values:,} are "
            f"numbers: correct it, or say that the column has texts, as in '{name}:string'"
        )


def _of_csv(path: Path, message: str, types: Types) -> str:
    """pyarrow's message on a value, with the name of its column."""
    match = _OF_CSV.match(message)
    if match is None:
        return f"{path}: {message}"
    name = _csv_names(path)[int(match[1])]
    row = f", row {match[2]}" if match[2] else ""
    return (
        f"{path}{row}: {name!r} is {types.get(name)}, and has an {match[3]}: correct it, or say which type the column "
        f"has, as in '{name}:float32' or '{name}:string'"
    )


def _parquet_names(path: Path) -> list[str]:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        return file.schema_arrow.names


def _parquet(path: Path, columns: Types, found: Types) -> "pyarrow.Table":
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path, page_checksum_verification=True) as file:  # of those that have checksums
        try:
            table = file.read(columns=list(columns))
        except (OSError, ValueError) as error:
            raise UserError(f"{_damaged_rows(path, file, columns)}: {first_line(error)}") from None
    for name, kind in columns.items():
        if kind is not None:
            table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))
    return table


def _damaged_rows(path: Path, file: Any, columns: Types) -> str:
    """Where a file cannot be read: the rows of the first such row group."""
    first = 1
    for number in range(file.num_row_groups):
        last = first + file.metadata.row_group(number).num_rows - 1
        try:
            file.read_row_group(number, columns=list(columns))
        except (OSError, ValueError):
            return f"{path}, in rows {first} to {last}"
        first = last + 1
    return str(path)


CSV = Format("*.csv*", 2, _csv_names, _csv)
PARQUET = Format("*.parquet", 1, _parquet_names, _parquet)
