"""CSV and Parquet files, by pyarrow (the extra `tables`): columns become arrays in memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from dist_partial.data.adapt import dataset
from dist_partial.data.file_lists import Files, find_files
from dist_partial.data.map_source import Columns
from dist_partial.data.source import ArraySource, Dataset
from dist_partial.data.table_files import CSV, PARQUET, Format, read_columns
from dist_partial.errors import UserError
from dist_partial.validation import Above, Below, check_arguments, shown


def csv_dataset(
    files: Files,
    x: Columns,
    y: Columns | None = None,
    weight: Columns | None = None,
    evaluation: Files | None = None,
    held_out: Annotated[float, Above(0), Below(1)] = 0.1,
    stacked: bool = False,
) -> Dataset:
    """Reads columns of CSV files, with a header each, into memory.

    A file may be compressed (`.csv.gz`), and separated by commas, semicolons, tabs or bars. Types are guessed from the
    first file: whole numbers are int64, others float32, texts tf.string. A name may end in another type, as
    in 'zip:string' or 'price:float32'.

    Args:
        files: a path, a pattern such as `data/train-*.csv`, a folder (its files `*.csv*`), or a list of these.
        x: a column, which makes x one array [n]; or a list of columns, which makes x a dict of arrays by name.
        y: likewise; None where the model needs no targets.
        weight: likewise.
        evaluation: files of the examples held out; None: a part of `files`.
        held_out: the share of the examples that is held out if there is no `evaluation`; see `dataset`.
        stacked: whether x is one matrix, float32 [n, columns], in place of a dict.

    Raises:
        UserError: pyarrow is not installed; there is no such file or column; a value is missing, or not of the type of
            its column.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.csv").write_text("age,city,label\\n31,Rome,1\\n54,Oslo,0\\n")
        ...     data = csv_dataset(f"{folder}/*.csv", x=["age", "city"], y="label", held_out=0.5)
        >>> data.train.spec[0]["age"].dtype, data.train.spec[0]["city"].dtype, data.train.spec[1].dtype
        (tf.int64, tf.string, tf.int64)
    """
    check_arguments(csv_dataset, locals())
    table = _Table("csv_dataset", CSV, x, y, weight, stacked)
    return table.dataset(files, evaluation, held_out)


def parquet_dataset(
    files: Files,
    x: Columns,
    y: Columns | None = None,
    weight: Columns | None = None,
    evaluation: Files | None = None,
    held_out: Annotated[float, Above(0), Below(1)] = 0.1,
    stacked: bool = False,
) -> Dataset:
    """Reads columns of Parquet files into memory.

    Numbers with a fraction become float32, other numbers keep their type, texts and bytes become tf.string; lists of
    one length become an axis. A name may end in another type, as in 'price:float64'.

    Args:
        files: a path, a pattern such as `data/train-*.parquet`, a folder (its files `*.parquet`), or a list of these.
        x: as for `csv_dataset`.
        y: likewise.
        weight: likewise.
        evaluation: files of the examples held out; None: a part of `files`.
        held_out: the share of the examples that is held out if there is no `evaluation`; see `dataset`.
        stacked: whether x is one matrix, float32 [n, columns], in place of a dict.

    Raises:
        UserError: as for `csv_dataset`; a column has different types in two files.

    Examples:
        >>> import pyarrow as pa, pyarrow.parquet, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pa.parquet.write_table(pa.table({"a": [0.5, 2.0], "b": [1, 2], "y": [0, 1]}), f"{folder}/1.parquet")
        ...     data = parquet_dataset(folder, x=["a", "b"], y="y", held_out=0.5, stacked=True)
        >>> data.train.spec[0]
        TensorSpec(shape=(2,), dtype=tf.float32, name=None)
    """
    check_arguments(parquet_dataset, locals())
    table = _Table("parquet_dataset", PARQUET, x, y, weight, stacked)
    return table.dataset(files, evaluation, held_out)


@dataclass(frozen=True)
class _Table:
    """What is read of files, and how.

    Attributes:
        function: which messages name.
        form: of the files.
        x: as for `csv_dataset`, and so on.
    """

    function: str
    form: Format
    x: Columns
    y: Columns | None
    weight: Columns | None
    stacked: bool

    def __post_init__(self) -> None:
        for name in ("x", "y", "weight"):
            value = getattr(self, name)
            texts = [value] if isinstance(value, str) else value
            if value is None and name != "x":
                continue
            if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(each, str) for each in texts):
                raise UserError(f"{self.function}.{name} is {shown(value)}: name a column, or a list of columns")
        if self.y is None and self.weight is not None:
            raise UserError(f"{self.function} got a weight and no y: name the column of the targets that it weighs")

    def dataset(self, files: Files, evaluation: Files | None, held_out: float) -> Dataset:
        """The columns of files as a data set."""
        types: dict[str, Any] = {}  # of columns; files read later must have the same
        paths = self._paths("files", files)
        train = self._source(paths, types)
        other = None if evaluation is None else self._source(self._paths("evaluation", evaluation), types)
        name = Path(files).name if isinstance(files, (str, Path)) else paths[0].name
        return dataset(train, other, held_out, name)

    def _paths(self, name: str, files: Files) -> list[Path]:
        return find_files(f"{self.function}.{name}", files, self.form.pattern)

    def _source(self, paths: list[Path], types: dict[str, Any]) -> ArraySource:
        """The examples of files; `types` gets the types of the columns."""
        written = [names for names in (self.x, self.y, self.weight) if names is not None]
        wanted = [name for names in written for name in ([names] if isinstance(names, str) else names)]
        read = dict(zip(wanted, read_columns(self.function, self.form, paths, wanted, types), strict=True))
        x, *others = (read[each][1] if isinstance(each, str) else dict(read[name] for name in each) for each in written)
        return ArraySource(self._matrix(x) if self.stacked else x, *others)

    def _matrix(self, x: Any) -> np.ndarray:
        """The columns of x side by side."""
        columns = x if isinstance(x, dict) else {self.x: x}
        for name, array in columns.items():
            if array.dtype.kind not in "biuf":
                raise UserError(
                    f"{self.function}.stacked makes one matrix of numbers, and {name!r} has texts: leave the column "
                    "out of x, or stacked"
                )
        return np.concatenate([array.reshape(len(array), -1) for array in columns.values()], 1, dtype=np.float32)
