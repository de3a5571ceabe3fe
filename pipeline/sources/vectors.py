"""Your own vectors, such as the codes of another model or a table: `.npy`, `.safetensors`, Parquet, `.csv` or `.tsv`.

The file is read in stretches and split by seed: the same shares of every 1,000 consecutive rows go to validation and test, or,
with `groups`, whole groups of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.errors import DataError
from pipeline.settings import DatasetSettings, check_that
from pipeline.sources.common.source import Block, BlockwiseSplit, Source, generator
from pipeline.sources.common.tables import Table, open_table
from pipeline.storage.parts import ContextColumn

__all__ = ["GroupSplit", "Settings", "Vectors", "open_source"]

SCAN_ROWS = 8192
PROBE_ROWS = 20_000  # the first rows, in which repeated values of a column are counted


@dataclass(frozen=True, kw_only=True)
class Settings(DatasetSettings):
    """A row of `datasets` with `source: vectors`; `root` is the file, or a folder of Parquet files.

    Attributes:
        valid_share: Share of the rows for validation.
        test_share: Share of the rows for the test.
        tensor: Name of the tensor in a `.safetensors` file; may be left out if there is only one.
        columns: Names of the columns that are the dimensions, in order; by default all. Columns without names are called
            0, 1, ..
        labels: Name of the column that holds labels, numbers or text; by default none.
        categories: Names of columns of categories that are carried with the vectors, for the `context` of densities.
        numbers: Names of columns of numbers that are carried in the same way.
        groups: Name of a column whose equal values belong together: rows of a group go to the same split.
        drop_constant: Leave out the columns that hold one value.
        centre: Subtract the mean of each column, in float64, before the values become float32: for timestamps and the like.
            Likelihoods don't change; codes and samples are relative to the means, which the stage's run file holds.
    """

    valid_share: float = 0.1
    test_share: float = 0.1
    tensor: str = ""
    columns: tuple[str, ...] = ()
    labels: str = ""
    categories: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    groups: str = ""
    drop_constant: bool = False
    centre: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(0.001 <= self.valid_share < 1, "valid_share", "must be in [0.001, 1)")
        check_that(0.001 <= self.test_share < 1, "test_share", "must be in [0.001, 1)")
        check_that(self.valid_share + self.test_share < 0.9995, "test_share", "leaves nothing to train on")
        check_that(len(set(self.columns)) == len(self.columns), "columns", "names one twice")
        carried = [*self.categories, *self.numbers]
        check_that(len(set(carried)) == len(carried), "categories", "names one twice, or one that is among the numbers")
        check_that("labels" not in carried, "categories", "may not hold a column named labels; name it by `labels`")

    @property
    def shape(self) -> tuple[int, ...]:
        """(0,): only the file determines it."""
        return (0,)


@dataclass(frozen=True, kw_only=True)
class GroupSplit:
    """A seeded split of rows that keeps groups together: groups in random order fill test, validation and training.

    Arguments:
        groups: Group of each row, with shape (N,).
        valid_share: Approximate share of the rows for validation.
        test_share: Approximate share of the rows for the test.
        seed: Seed of the order.

    Raises:
        DataError: When there are too few groups for one in each split.

    Example:
        >>> split = GroupSplit(groups=np.array(["a", "a", "b", "c", "c", "c"]), valid_share=0.2, test_share=0.2, seed=0)
        >>> sorted(split.counts.values())
        [1, 2, 3]
    """

    groups: np.ndarray
    valid_share: float
    test_share: float
    seed: int
    rows: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        names, members = np.unique(self.groups, return_inverse=True)
        if len(names) < 3:
            raise DataError(f"{len(names)} groups are too few for one in each split")
        order = generator(self.seed, "groups").permutation(len(names))
        before = np.cumsum(np.bincount(members)[order]) / len(members)  # share of the rows up to and with each group
        # At least one group in each split.
        test = min(max(1, int(np.searchsorted(before, self.test_share))), len(names) - 2)
        valid = max(1, int(np.searchsorted(before, self.test_share + self.valid_share)) - test)
        valid = min(valid, len(names) - 1 - test)
        parts = {"train": order[test + valid :], "valid": order[test : test + valid], "test": order[:test]}
        object.__setattr__(self, "rows", {split: np.flatnonzero(np.isin(members, part)) for split, part in parts.items()})

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows of each split."""
        return {split: len(rows) for split, rows in self.rows.items()}

    def locate(self, split: str, start: int, stop: int) -> np.ndarray:
        """Row numbers in the file, ascending, of the examples start, .., stop - 1 of a split."""
        return self.rows[split][start:stop]


class Vectors(Source):
    """The rows of a file.

    Arguments:
        path: The file.
        settings: The row of `datasets`.

    Raises:
        DataError: When the file is missing, isn't of a known kind, has the wrong type or shape, or missing values.
    """

    kind = "vectors"

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.tensor, self.names = path, settings.tensor, settings.columns
        self.extras = tuple(dict.fromkeys(name for name in self._carried(settings) if name))
        table = self._table()
        dims = [name for name in table.names if name not in self.extras]
        for name in settings.columns:
            if name not in dims:
                raise DataError(f"{path} has no column '{name}' of numbers; it has {', '.join(dims)}")
        self.columns = [table.names.index(name) for name in settings.columns or dims]
        if not self.columns:
            raise DataError(f"{path} has no column but {', '.join(self.extras)}")
        try:
            shares = {"valid_share": settings.valid_share, "test_share": settings.test_share, "seed": settings.split_seed}
            self.split: BlockwiseSplit | GroupSplit = (
                GroupSplit(groups=table.text(settings.groups), **shares)  # type: ignore[arg-type]
                if settings.groups
                else BlockwiseSplit(rows=table.count, **shares)  # type: ignore[arg-type]
            )
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        self.counts = dict(self.split.counts)
        self.labels: np.ndarray | None = None
        if settings.labels:
            names, self.labels = np.unique(table.text(settings.labels), return_inverse=True)
            self.label_names = tuple(names.tolist())
        self.context, self.carried = self._read_context(table, settings)
        self.offset: np.ndarray | None = None  # (D,)
        varies = self._scan(table, settings)
        if settings.drop_constant:
            self.columns = [column for column, kept in zip(self.columns, varies, strict=True) if kept]
            if self.offset is not None:
                self.offset = self.offset[varies]
            if not self.columns:
                raise DataError(f"{path}: every column holds one value; there is nothing to learn")
        self.means = () if self.offset is None else tuple(self.offset.tolist())
        self.dim = len(self.columns)

    @staticmethod
    def _carried(settings: Settings) -> tuple[str, ...]:
        return (settings.labels, settings.groups, *settings.categories, *settings.numbers)

    def _read_context(self, table: Table, settings: Settings) -> tuple[tuple[ContextColumn, ...], np.ndarray | None]:
        """The columns to condition on, and their values for all rows, float32 with shape (N, C)."""
        columns, values = [], []
        for name in settings.categories:
            words, numbers = np.unique(table.text(name), return_inverse=True)
            columns.append(ContextColumn(name=name, words=tuple(words.tolist())))
            values.append(numbers.astype(np.float32))
        for name in settings.numbers:
            column = np.array([_number(word) for word in table.text(name)], dtype=np.float32)
            if not np.isfinite(column).all():
                row = int(np.flatnonzero(~np.isfinite(column))[0])
                raise DataError(f"{self.path}: row {row}, column '{name}' is no finite number; list it among the categories")
            columns.append(ContextColumn(name=name))
            values.append(column)
        return tuple(columns), np.stack(values, axis=1) if values else None

    def _table(self) -> Table:
        return open_table(self.path, self.tensor, self.names, self.extras)

    def _scan(self, table: Table, settings: Settings) -> np.ndarray:
        """Which columns vary, with shape (D,); missing values and those that float32 can't distinguish are rejected."""
        total = np.zeros(len(self.columns))
        low, high = np.full(len(self.columns), np.inf), np.full(len(self.columns), -np.inf)
        wrong_count, first = 0, ""
        for start in range(0, table.count, SCAN_ROWS):
            wide = self._read(table, start, min(start + SCAN_ROWS, table.count)).astype(np.float64)
            with np.errstate(over="ignore", invalid="ignore"):
                wrong = ~np.isfinite(wide.astype(np.float32))
            if wrong.any():
                row, column = np.argwhere(wrong)[0]
                first = first or f"row {start + row}, column '{table.names[self.columns[column]]}'"
                wrong_count += int(wrong.sum())
            total += np.where(wrong, 0, wide).sum(0)
            low, high = np.fmin(low, wide.min(0)), np.fmax(high, wide.max(0))
        if wrong_count:
            others = f", and so are {wrong_count - 1} other values" if wrong_count > 1 else ""
            raise DataError(
                f"{self.path}: {first} is missing or not finite in float32{others}; take such rows out, or fit a density to "
                "the others and fill these in: `python -m stages complete ROW FILE`"
            )
        if settings.centre:
            self.offset = total / table.count
        probe = self._centred(self._read(table, 0, min(PROBE_ROWS, table.count)))
        repeating = []
        for column, values in zip(self.columns, probe.T, strict=True):
            distinct, kept = len(np.unique(values)), len(np.unique(values.astype(np.float32)))
            if kept < distinct / 2:
                raise DataError(
                    f"{self.path}: column '{table.names[column]}' has {distinct} different values in its first {len(values)} "
                    f"rows, of which float32 can tell {kept} apart; 'centre: true' subtracts the mean of each column before"
                )
            if 1 < kept < len(values) / 2:
                repeating.append(f"'{table.names[column]}' ({kept} of {len(values)} values differ)")
        varies: np.ndarray = low < high
        names = [f"'{table.names[column]}'" for column, kept in zip(self.columns, varies, strict=True) if not kept]
        self.notes = (
            *([f"{table.dtype} became float32"] if table.dtype != "float32" else []),
            *(["each column is less its mean; reports/runs/prepare holds the means"] if settings.centre else []),
            *([f"no dimension, since they are an index: {_truncated_list(table.ignored)}"] if table.ignored else []),
            *([f"columns that hold one value {_constant_words(settings)}: {_truncated_list(names)}"] if names else []),
            *(
                [f"columns whose values repeat, for which likelihoods are unbounded: {_truncated_list(repeating)}"]
                if repeating
                else []
            ),
        )
        return varies

    def _centred(self, rows: np.ndarray) -> np.ndarray:
        return rows if self.offset is None else rows - self.offset

    def _read(self, table: Table, start: int, stop: int) -> np.ndarray:
        """Rows start, .., stop - 1 of the chosen columns."""
        try:
            rows = table.rows(start, stop)
            return rows if self.columns == list(range(len(table.names))) else rows[:, self.columns]
        except DataError:
            raise
        except Exception as error:  # each library has its own errors
            raise DataError(f"{self.path} can't be read ({' '.join(str(error).split())})") from None

    def read(self, split: str, start: int, stop: int) -> Block:
        """Vectors, float32 with shape (n, D), and labels if there are any."""
        if start >= stop:
            return Block(examples=np.empty((0, self.dim), np.float32))
        numbers, table = self.split.locate(split, start, stop), self._table()
        parts = []
        # In stretches, since the rows of a group may lie far apart.
        for first in range(int(numbers[0]), int(numbers[-1]) + 1, SCAN_ROWS):
            members = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, first + SCAN_ROWS)]
            if members.size:
                parts.append(self._read(table, int(members[0]), int(members[-1]) + 1)[members - members[0]])
        with np.errstate(over="ignore", invalid="ignore"):
            vectors = self._centred(np.concatenate(parts)).astype(np.float32)
        wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if wrong.size:
            raise DataError(
                f"{self.path}: row {numbers[wrong[0]]} isn't finite in float32; it has changed since it was checked"
            )
        labels = None if self.labels is None else self.labels[numbers].astype(np.int64)
        return Block(examples=vectors, labels=labels, context=None if self.carried is None else self.carried[numbers])


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return float("nan")


def _constant_words(settings: Settings) -> str:
    return "were left out" if settings.drop_constant else "(drop_constant: true leaves them out)"


def _truncated_list(names: Sequence[str]) -> str:
    """The first ten names."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def open_source(settings: Settings, root: Path) -> Vectors:
    """The source of a row.

    Raises:
        DataError: When the file is missing or of the wrong kind, type or shape.
    """
    return Vectors(root, settings)
