"""A person's own vectors, such as the codes of another model: a `.npy`, `.safetensors` or Parquet file with shape (N, D).

The file is read in stretches, never as a whole, and split by seed: the same shares of every 1,000 consecutive rows go to
validation and test.
"""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.settings import DatasetSettings, check_that
from pipeline.sources.common.archives import file_stamp
from pipeline.sources.common.source import Block, BlockwiseSplit, Source

__all__ = ["Settings", "Vectors", "open_source"]


@dataclass(frozen=True, kw_only=True)
class Settings(DatasetSettings):
    """A row of `datasets` with `source: vectors`; `root` is the file.

    Attributes:
        valid_share: Share of the rows for validation.
        test_share: Share of the rows for the test.
        tensor: Name of the tensor in a `.safetensors` file; may be left out where there is only one.
    """

    valid_share: float = 0.1
    test_share: float = 0.1
    tensor: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(0.001 <= self.valid_share < 1, "valid_share", "has to lie in [0.001, 1)")
        check_that(0.001 <= self.test_share < 1, "test_share", "has to lie in [0.001, 1)")
        check_that(self.valid_share + self.test_share < 0.9995, "test_share", "leaves nothing to train on")

    @property
    def shape(self) -> tuple[int, ...]:
        """(0,): the file tells."""
        return (0,)


class _Table(ABC):
    """An open file with shape (N, D), read by rows."""

    shape: tuple[int, ...]

    @abstractmethod
    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start, .., stop - 1, with shape (stop - start, D)."""


def _check(path: Path, dtype: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if dtype not in ("float16", "float32", "float64"):
        raise DataError(f"{path} holds {dtype}; the vectors have to be float16, float32 or float64")
    if len(shape) != 2 or min(shape) < 1:
        raise DataError(f"{path} has shape {tuple(shape)}; expected (N, D): a row a vector")
    return shape[0], shape[1]


class _Npy(_Table):
    def __init__(self, path: Path, tensor: str) -> None:
        # Memory-mapped: a declared length beyond the file's is refused, and only the rows asked for are read.
        self.array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(self.array, np.ndarray):
            raise DataError(f"{path} isn't a single .npy array")
        self.shape = _check(path, self.array.dtype.name, self.array.shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self.array[start:stop])


SAFETENSORS_DTYPES = {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16"}


class _Safetensors(_Table):
    def __init__(self, path: Path, tensor: str) -> None:
        from safetensors import safe_open

        self.file = safe_open(path, framework="np")
        names = list(self.file.keys())
        if not tensor and len(names) != 1:
            raise DataError(f"{path} holds {len(names)} tensors; name one of them by the setting 'tensor': {', '.join(names)}")
        if tensor and tensor not in names:
            raise DataError(f"{path} has no tensor '{tensor}'; it holds {', '.join(names)}")
        self.slice = self.file.get_slice(tensor or names[0])
        dtype = self.slice.get_dtype()
        self.shape = _check(path, SAFETENSORS_DTYPES.get(dtype, dtype), tuple(self.slice.get_shape()))

    def rows(self, start: int, stop: int) -> np.ndarray:
        rows: np.ndarray = self.slice[start:stop]
        return rows


class _Parquet(_Table):
    """D columns of floats, or one column of lists of D floats. A row group at a time is in memory."""

    def __init__(self, path: Path, tensor: str) -> None:
        from pyarrow import types
        from pyarrow.parquet import ParquetFile

        self.path = path
        self.file = ParquetFile(path)
        schema = self.file.schema_arrow
        counts = [self.file.metadata.row_group(i).num_rows for i in range(self.file.metadata.num_row_groups)]
        self.starts = np.cumsum([0, *counts])
        kinds = [field.type for field in schema]
        self.is_list = len(kinds) == 1 and (
            types.is_list(kinds[0]) or types.is_large_list(kinds[0]) or types.is_fixed_size_list(kinds[0])
        )
        if self.is_list:
            kinds = [kinds[0].value_type]
        for name, kind in zip(schema.names, kinds, strict=True):
            if not types.is_floating(kind):
                raise DataError(f"{path}: column '{name}' holds {kind}; expected floats, a column a dimension")
        self.shape = ()  # not known yet
        self._cached: tuple[int, np.ndarray] | None = None
        dim = len(kinds)
        if self.is_list and self.starts[-1] > 0:
            dim = self._group(0).shape[1]
        self.shape = _check(path, "float32", (int(self.starts[-1]), dim))

    def _group(self, number: int) -> np.ndarray:
        if self._cached is None or self._cached[0] != number:
            import pyarrow.compute as pc

            table: Any = self.file.read_row_group(number, use_threads=False)  # a forked process has none
            for name, column in zip(table.column_names, table.columns, strict=True):
                if column.null_count:
                    raise DataError(f"{self.path}: column '{name}' has empty cells")
            if self.is_list:
                column = table.column(0).combine_chunks()
                lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
                dim = self.shape[1] if self.shape else int(lengths[0])
                if np.any(lengths != dim):
                    raise DataError(f"{self.path}: its lists differ in length")
                # Empty cells inside a list become NaN, which is refused where the vectors are read.
                values = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
            else:
                values = np.stack([column.to_numpy() for column in table.columns], axis=1)
            self._cached = (number, values)
        return self._cached[1]

    def rows(self, start: int, stop: int) -> np.ndarray:
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, stop, side="left"))
        parts = [self._group(g)[max(start - self.starts[g], 0) : stop - self.starts[g]] for g in range(first, last)]
        return np.concatenate(parts)


READERS: dict[str, type[Any]] = {".npy": _Npy, ".safetensors": _Safetensors, ".parquet": _Parquet}


@functools.lru_cache(maxsize=4)
def _open(path: Path, tensor: str, stamp: tuple[int, int], process: int) -> _Table:
    """The open file, one for each process; `stamp` tells one version of it from another."""
    try:
        table: _Table = READERS[path.suffix.lower()](path, tensor)
    except DataError:
        raise
    except Exception as error:  # three libraries, each with errors of its own
        raise DataError(f"{path} can't be read as {path.suffix} ({' '.join(str(error).split())})") from None
    return table


class Vectors(Source):
    """The rows of a file.

    Arguments:
        path: The file.
        settings: The row of `datasets`.

    Raises:
        DataError: When the file is missing, isn't of a known kind, or has the wrong dtype or shape.
    """

    kind = "vectors"

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.tensor = path, settings.tensor
        if path.suffix.lower() not in READERS:
            raise DataError(f"{path}: expected a file that ends in {', '.join(READERS)}")
        rows, self.dim = self._table().shape
        try:
            self.split = BlockwiseSplit(
                rows=rows, valid_share=settings.valid_share, test_share=settings.test_share, seed=settings.split_seed
            )
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        self.counts = dict(self.split.counts)

    def _table(self) -> _Table:
        if not self.path.is_file():
            raise DataError(
                f"{self.path} is missing; put vectors with shape (N, D) there (.npy, .safetensors or .parquet) or mend 'root'"
            )
        return _open(self.path, self.tensor, file_stamp(self.path), os.getpid())

    def read(self, split: str, start: int, stop: int) -> Block:
        """Vectors, float32 with shape (n, D)."""
        if start >= stop:
            return Block(examples=np.empty((0, self.dim), np.float32))
        numbers = self.split.locate(split, start, stop)
        first = int(numbers[0])
        try:
            rows = self._table().rows(first, int(numbers[-1]) + 1)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{self.path} can't be read ({' '.join(str(error).split())})") from None
        with np.errstate(over="ignore", invalid="ignore"):
            vectors = rows[numbers - first].astype(np.float32)
        wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if wrong.size:
            raise DataError(f"{self.path}: row {numbers[wrong[0]]} isn't finite in float32; take such rows out")
        return Block(examples=vectors)


def open_source(settings: Settings, root: Path) -> Vectors:
    """The source of a row.

    Raises:
        DataError: When the file is missing or of the wrong kind, dtype or shape.
    """
    return Vectors(root, settings)
