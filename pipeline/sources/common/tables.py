"""Tables of numbers in files: `.npy`, `.safetensors`, Parquet (a file or a folder of them), `.csv` and `.tsv`, read by rows."""

from __future__ import annotations

import contextlib
import csv
import functools
import gzip
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.sources.common.archives import file_stamp
from pipeline.storage.columns import are_named

__all__ = ["ENDINGS", "Table", "open_table", "shared_names"]

MAX_TEXT_BYTES = 2**31  # of an unpacked text file, since its numbers are kept in memory
MISSING = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "?"]
SAFETENSORS_DTYPES = {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16", "BOOL": "bool"}
SAFETENSORS_DTYPES |= {
    f"{kind}{bits}": f"{word}{bits}" for kind, word in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}


class Table(ABC):
    """An open file with shape (N, D), read by rows.

    Attributes:
        path: The file.
        count: Number of rows, N.
        names: Names of the D columns.
        dtype: Type of the file's numbers, for messages.
        ignored: Names of columns that are an index, not a dimension.
    """

    path: Path
    count: int
    names: tuple[str, ...]
    dtype: str
    ignored: tuple[str, ...] = ()

    @abstractmethod
    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start, .., stop - 1, with shape (stop - start, D); missing values are NaN."""

    def text(self, name: str) -> np.ndarray:
        """A column as strings, with shape (N,).

        Raises:
            DataError: When there is no such column.
        """
        _check_names(self.path, self.names, [name])
        values: np.ndarray = self.rows(0, self.count)[:, self.names.index(name)].astype(str)
        return values

    def _set_shape(self, dtype: str, shape: Sequence[int], names: Sequence[str] = ()) -> None:
        if dtype not in ("float16", "float32", "float64", "bool") and not dtype.startswith(("int", "uint")):
            raise DataError(f"{self.path} holds {dtype}; expected floats, integers or booleans")
        if len(shape) == 2 and shape[0] == 0:
            raise DataError(f"{self.path} has no rows")
        if len(shape) != 2 or min(shape) < 1:
            raise DataError(f"{self.path} has shape {tuple(shape)}; expected (N, D), one vector per row")
        self.dtype, self.count = dtype, int(shape[0])
        self.names = tuple(names) or tuple(str(i) for i in range(shape[1]))


class _Npy(Table):
    def __init__(self, path: Path, tensor: str, columns: tuple[str, ...], extras: tuple[str, ...]) -> None:
        # Memory-mapped: NumPy refuses a declared length beyond the file's, and reads only the requested rows.
        self.path, self.array = path, np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(self.array, np.ndarray):
            raise DataError(f"{path} isn't a single .npy array")
        self._set_shape(self.array.dtype.name, self.array.shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self.array[start:stop])


class _Safetensors(Table):
    def __init__(self, path: Path, tensor: str, columns: tuple[str, ...], extras: tuple[str, ...]) -> None:
        from safetensors import safe_open

        self.path, self.file = path, safe_open(path, framework="np")
        names = list(self.file.keys())
        if not tensor and len(names) != 1:
            raise DataError(f"{path} holds {len(names)} tensors; name one of them by the setting 'tensor': {', '.join(names)}")
        if tensor and tensor not in names:
            raise DataError(f"{path} has no tensor '{tensor}'; it holds {', '.join(names)}")
        self.slice = self.file.get_slice(tensor or names[0])
        dtype = self.slice.get_dtype()
        self._set_shape(SAFETENSORS_DTYPES.get(dtype, dtype), self.slice.get_shape())

    def rows(self, start: int, stop: int) -> np.ndarray:
        rows: np.ndarray = self.slice[start:stop]
        return rows


def _check_names(path: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Rejects names of columns that a file doesn't have."""
    for name in wanted:
        if name not in names:
            raise DataError(f"{path} has no column '{name}'; it has {', '.join(names)}")


def _index_columns(schema: Any) -> set[str]:
    """Names of the columns that pandas wrote for its index."""
    described = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))
    index_names = {column for column in described.get("index_columns", []) if isinstance(column, str)}
    return index_names | {name for name in schema.names if name.startswith("__index_level_")}


class _Parquet(Table):
    """D columns of numbers, or one column of lists of D floats. Memory holds one row group."""

    def __init__(self, path: Path, tensor: str, columns: tuple[str, ...], extras: tuple[str, ...]) -> None:
        from pyarrow import types
        from pyarrow.parquet import ParquetFile

        self.path = path
        # Partitioned writers leave a folder; the parts of a path such as year=2024 aren't columns.
        paths = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        self.files = [ParquetFile(part) for part in paths]
        if not self.files:
            raise DataError(f"{path} holds no .parquet file")
        schema = self.files[0].schema_arrow
        for part, file in zip(paths, self.files, strict=True):
            if file.schema_arrow.names != schema.names:
                raise DataError(f"{part} has other columns than {paths[0]}")
        self.groups = [(file, i) for file in self.files for i in range(file.metadata.num_row_groups)]
        self.starts = np.cumsum([0, *(file.metadata.row_group(i).num_rows for file, i in self.groups)])
        index = _index_columns(schema)
        self.ignored = tuple(name for name in schema.names if name in index)
        _check_names(path, schema.names, (*columns, *extras))
        dims = columns or [name for name in schema.names if name not in index and name not in extras]
        fields = [schema.field(name) for name in dims]
        self.columns = [field.name for field in fields]
        kinds = [field.type for field in fields]
        self.is_list = len(kinds) == 1 and (
            types.is_list(kinds[0]) or types.is_large_list(kinds[0]) or types.is_fixed_size_list(kinds[0])
        )
        if self.is_list:
            kinds = [kinds[0].value_type]
        for name, kind in zip(self.columns, kinds, strict=True):
            if not (types.is_floating(kind) or types.is_integer(kind) or types.is_boolean(kind)):
                raise DataError(
                    f"{path}: column '{name}' holds {kind}; name the columns of numbers by 'columns', or it as 'labels'"
                )
        self.dim = 0  # not known yet
        self._cached: tuple[int, np.ndarray] | None = None
        dim = len(kinds)
        if self.is_list and self.starts[-1] > 0:
            dim = self._group(0).shape[1]
        dtypes = {"bool" if types.is_boolean(kind) else str(kind.to_pandas_dtype().__name__) for kind in kinds}
        self._set_shape(min(dtypes) if len(dtypes) == 1 else "float64", (int(self.starts[-1]), dim))
        self.names = self.names if self.is_list else tuple(self.columns)
        self.dim = dim

    def _group(self, number: int) -> np.ndarray:
        if self._cached is None or self._cached[0] != number:
            import pyarrow as pa
            import pyarrow.compute as pc

            file, group = self.groups[number]
            table: Any = file.read_row_group(group, columns=self.columns, use_threads=False)  # a forked process has no threads
            if self.is_list:
                column = table.column(0).combine_chunks()
                if column.null_count:
                    raise DataError(f"{self.path}: column '{self.columns[0]}' has empty cells; take such rows out")
                lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
                dim = self.dim or int(lengths[0])
                if np.any(lengths != dim):
                    raise DataError(f"{self.path}: its lists differ in length")
                # Empty cells inside a list become NaN, which is rejected on reading the vectors.
                values = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
            else:
                numbers = [pc.cast(column, pa.float64()) if column.null_count else column for column in table.columns]
                values = np.stack([column.to_numpy() for column in numbers], axis=1)
            self._cached = (number, values)
        return self._cached[1]

    def rows(self, start: int, stop: int) -> np.ndarray:
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, stop, side="left"))
        parts = [self._group(g)[max(start - self.starts[g], 0) : stop - self.starts[g]] for g in range(first, last)]
        return np.concatenate(parts)

    def text(self, name: str) -> np.ndarray:
        columns = [file.read(columns=[name], use_threads=False).column(0).to_pylist() for file in self.files]
        return np.array([str(value) for column in columns for value in column])


class _Text(Table):
    """Numbers in columns, with or without a heading; all in memory as float64."""

    def __init__(self, path: Path, tensor: str, columns: tuple[str, ...], extras: tuple[str, ...]) -> None:
        import pyarrow as pa
        from pyarrow.csv import ConvertOptions, ParseOptions, ReadOptions, read_csv

        self.path = path
        data = _unpacked(path)
        lines = io.StringIO(data[: 2**20].decode("utf-8", "replace"))
        first_line = next(lines, "").rstrip("\r\n")
        self.delimiter = "\t" if ".tsv" in path.name.lower() else max(",;\t", key=first_line.count)
        first = next(csv.reader([first_line], delimiter=self.delimiter), [])
        heading = any(not _is_number(cell) for cell in first)
        names = (
            [cell.strip() or f"column {i}" for i, cell in enumerate(first)] if heading else [str(i) for i in range(len(first))]
        )
        if len(set(names)) < len(names):
            raise DataError(f"{path} has two columns of the same name; rename one: {', '.join(names)}")
        _check_names(path, names, (*columns, *extras))
        self.ignored = (names[0],) if heading and not first[0].strip() else ()  # the index that pandas writes has no name
        dims = columns or [name for name in names if name not in extras and name not in self.ignored]
        try:
            table: Any = read_csv(
                io.BytesIO(data),
                read_options=ReadOptions(column_names=names, skip_rows=int(heading), use_threads=False),
                parse_options=ParseOptions(delimiter=self.delimiter),
                convert_options=ConvertOptions(
                    column_types={name: pa.float64() if name in dims else pa.string() for name in names},
                    null_values=MISSING,
                    include_columns=[*dims, *extras],
                ),
            )
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: {self._wrong_cell(data, names, dims, heading) or error}") from None
        self._set_shape("float64", (table.num_rows, len(dims)), dims)
        self.values = np.stack([table.column(name).to_numpy() for name in dims], axis=1)
        self.texts = {name: np.array(table.column(name).to_pylist(), dtype=object).astype(str) for name in extras}

    def _wrong_cell(self, data: bytes, names: Sequence[str], dims: Sequence[str], heading: bool) -> str:
        """What is wrong in the first line that can't be read, if any."""
        reader = csv.reader(io.StringIO(data.decode("utf-8", "replace")), delimiter=self.delimiter)
        for cells in reader:
            if (reader.line_num == 1 and heading) or not cells:
                continue
            if len(cells) != len(names):
                return f"line {reader.line_num} has {len(cells)} cells, and the first line {len(names)}"
            for name, cell in zip(names, cells, strict=True):
                if name in dims and cell not in MISSING and not _is_number(cell):
                    return (
                        f"line {reader.line_num}, column '{name}': '{cell[:40]}' is no number; name the columns of numbers by "
                        "'columns', or this one as 'labels'"
                    )
        return ""

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.values[start:stop]

    def text(self, name: str) -> np.ndarray:
        texts: np.ndarray = self.texts[name]
        return texts


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _unpacked(path: Path) -> bytes:
    with open(path, "rb") as raw, gzip.open(raw) if path.suffix.lower() == ".gz" else raw as file:
        data: bytes = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise DataError(f"{path} holds more than {MAX_TEXT_BYTES >> 30} GiB of text; write it as .parquet or .npy")
    if not data.strip():
        raise DataError(f"{path} is empty")
    return data.removeprefix(b"\xef\xbb\xbf")


READERS: dict[str, type[Any]] = {
    ".npy": _Npy,
    ".safetensors": _Safetensors,
    ".parquet": _Parquet,
    ".csv": _Text,
    ".tsv": _Text,
    ".csv.gz": _Text,
    ".tsv.gz": _Text,
}
ENDINGS = tuple(READERS)


def open_table(path: Path, tensor: str = "", columns: tuple[str, ...] = (), extras: tuple[str, ...] = ()) -> Table:
    """An open table, one for each process.

    Arguments:
        path: The file, or a folder of .parquet files.
        tensor: Name of the tensor in a .safetensors file.
        columns: Columns that are the dimensions, all if empty; others may hold anything.
        extras: Columns that aren't dimensions, such as labels; they may hold text.

    Raises:
        DataError: When it's missing, of an unknown kind, or incomplete.
    """
    if path.is_dir():
        if not any(path.rglob("*.parquet")):
            raise DataError(f"{path} is a folder without .parquet files; expected a file that ends in {', '.join(ENDINGS)}")
    elif not path.name.lower().endswith(ENDINGS):
        raise DataError(f"{path}: expected a file that ends in {', '.join(ENDINGS)}")
    elif not path.is_file():
        raise DataError(f"{path} is missing; expected a file of vectors with shape (N, D) ({', '.join(ENDINGS)})")
    return _open_table(path, tensor, columns, extras, file_stamp(path), os.getpid())


def shared_names(path: Path, tensor: str, columns: Sequence[str], extras: tuple[str, ...]) -> tuple[str, ...]:
    """The names by which a new file holds the columns of a data set, in any order; none where either has no names.

    Arguments:
        path: The new file.
        tensor: Name of the tensor in a .safetensors file.
        columns: Names of the data set's columns.
        extras: Columns that aren't dimensions; the file needn't have them.
    """
    if not are_named(columns):
        return ()
    for carried in dict.fromkeys((extras, ())):
        with contextlib.suppress(DataError):
            return tuple(columns) if are_named(open_table(path, tensor, (), carried).names) else ()
    return tuple(columns)  # text among other columns: only a file with names has any


@functools.lru_cache(maxsize=4)
def _open_table(
    path: Path, tensor: str, columns: tuple[str, ...], extras: tuple[str, ...], stamp: tuple[int, int], process: int
) -> Table:
    ending = ".parquet" if path.is_dir() else next(e for e in ENDINGS if path.name.lower().endswith(e))
    try:
        table: Table = READERS[ending](path, tensor, columns, extras)
    except DataError:
        raise
    except Exception as error:  # four libraries, each with its own errors
        raise DataError(f"{path} can't be read as {ending} ({' '.join(str(error).split())})") from None
    return table
