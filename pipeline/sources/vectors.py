"""Your own vectors, such as the codes of another model or a table: `.npy`, `.safetensors`, Parquet, `.csv` or `.tsv`.

The file is read in stretches and split by seed: the same shares of every 1,000 consecutive rows go to validation and test, or,
with `groups`, whole groups of rows.

Columns of float64 that float32 would blur, such as timestamps, are standardised before they become float32. Samples and
likelihoods are in the units of the table, see `pipeline.storage.columns`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.errors import DataError
from pipeline.settings import DatasetSettings, check_that
from pipeline.sources.common.source import GROUP, Block, BlockwiseSplit, Source, generator, read_in_groups
from pipeline.sources.common.tables import Table, open_table
from pipeline.storage.columns import Column, VectorMoments, to_codes
from pipeline.storage.parts import ContextColumn

__all__ = ["GroupSplit", "Settings", "Vectors", "open_source"]

SCAN_ROWS = 8192
PROBE_ROWS = 20_000  # the first rows, in which repeated values of a column are counted
KEPT_SHARE = 0.99  # of a column's different values, that float32 must tell apart; of as many Gaussian numbers it does
FEW_VALUES = 10  # of a column that is discrete, whatever their frequencies
HALF, HALF_VALUES = ("float16", "bfloat16"), 100  # types of which continuous columns repeat; so many differ at least
MAX_LEVELS = 10_000  # distinct values of a column that is dequantised
SAME_LEVEL = 1e-8  # of a column's range: values this close are one, such as 0.3 and 0.1 + 0.2
REPEATED_SHARE = 0.1  # of the rows, that may hold one value of a continuous column


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
        drop_constant: Leave out the columns that hold one value; they return in samples.
        discrete: Columns whose values repeat, so that fewer than half of them differ, make a likelihood infinite, since a
            density may narrow around each value. `keep` names them; `dequantise` adds uniform noise as wide as the smallest gap
            between their values, so that likelihoods are those of the discrete values (a lower bound) and samples are rounded
            to them; `refuse` ends the stage.
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
    discrete: Literal["keep", "dequantise", "refuse"] = "keep"

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
        DataError: When the file is missing, isn't of a known kind, has the wrong type or shape, missing values, or columns that
            the settings refuse.
    """

    kind = "vectors"

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.tensor, self.names, self.seed = path, settings.tensor, settings.columns, settings.split_seed
        self.extras = tuple(dict.fromkeys(name for name in self._carried(settings) if name))
        table = self._table()
        dims = [name for name in table.names if name not in self.extras]
        for name in settings.columns:
            if name not in dims:
                raise DataError(f"{path} has no column '{name}' of numbers; it has {', '.join(dims)}")
        self.numbers = [table.names.index(name) for name in settings.columns or dims]  # of the dimensions, in the file
        if not self.numbers:
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
        self.columns = tuple(Column(name=table.names[number]) for number in self.numbers)
        self._describe(table, settings)
        self.numbers = [n for n, column in zip(self.numbers, self.columns, strict=True) if column.constant is None]
        self.dimensions = [column for column in self.columns if column.constant is None]
        if not self.dimensions:
            raise DataError(f"{path}: every column holds one value; there is nothing to learn")

    @property
    def dim(self) -> int:
        """Length D of a vector."""
        return len(self.dimensions)

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

    def _describe(self, table: Table, settings: Settings) -> None:
        """Decides how each column is stored, and notes what is remarkable."""
        moments, low, high = self._scan(table)
        probe = self._read(table, 0, min(PROBE_ROWS, table.count)).astype(np.float64)
        constant, dequantised, discrete, blurred, dominated = (list[str]() for _ in range(5))
        repeat = [number for number, values in enumerate(probe.T) if _repeats(values, table.dtype)]
        levels = self._levels(table, repeat) if settings.discrete == "dequantise" else {}
        described = []
        for number, (column, values) in enumerate(zip(self.columns, probe.T, strict=True)):
            distinct, counts = np.unique(values, return_counts=True)
            if low[number] == high[number]:
                constant.append(f"'{column.name}'")
                if settings.drop_constant:
                    described.append(replace(column, constant=float(low[number])))
                    continue
            elif number in repeat:
                names = dequantised if number in levels else discrete
                names.append(f"'{column.name}' ({len(distinct)} of {len(values)} values differ)")
                if number in levels:
                    column = replace(column, levels=levels[number])
                    values = values + column.step * (generator(0, "probe").random(len(values)) - 0.5)
            elif counts.max() > max(REPEATED_SHARE * len(values), 2):
                dominated.append(f"'{column.name}' ({distinct[counts.argmax()]:g} in {counts.max()} of {len(values)} rows)")
            kept = len(np.unique(values.astype(np.float32)))
            if kept < KEPT_SHARE * len(np.unique(values)) and moments.std[number] > 0:
                blurred.append(f"'{column.name}'")
                column = replace(column, shift=float(moments.mean[number]), scale=float(moments.std[number]))
            described.append(column)
        if settings.discrete == "refuse" and discrete + dominated:
            raise DataError(
                f"{self.path}: columns whose values repeat: {_truncated_list(discrete + dominated)}; leave them out, or set "
                "discrete: dequantise"
            )
        self.columns = tuple(described)
        hint = "too many to dequantise" if settings.discrete == "dequantise" else "discrete: dequantise helps"
        left_out = "were left out and return in samples" if settings.drop_constant else "(drop_constant: true leaves them out)"
        self.notes = (
            *([f"{table.dtype} became float32"] if table.dtype != "float32" else []),
            *([f"columns that float32 would blur are standardised before: {_truncated_list(blurred)}"] if blurred else []),
            *([f"no dimension, since they are an index: {_truncated_list(table.ignored)}"] if table.ignored else []),
            *([f"columns that hold one value {left_out}: {_truncated_list(constant)}"] if constant else []),
            *([f"columns whose values repeat were dequantised: {_truncated_list(dequantised)}"] if dequantised else []),
            *(
                [f"columns whose values repeat make likelihoods infinite ({hint}): {_truncated_list(discrete)}"]
                if discrete
                else []
            ),
            *(
                [f"columns in which one value is frequent make likelihoods infinite: {_truncated_list(dominated)}"]
                if dominated
                else []
            ),
        )

    def _scan(self, table: Table) -> tuple[VectorMoments, np.ndarray, np.ndarray]:
        """Moments, least and greatest value of each column; missing values are rejected."""
        moments = VectorMoments(len(self.numbers))
        low, high = np.full(len(self.numbers), np.inf), np.full(len(self.numbers), -np.inf)
        wrong_count, first = 0, ""
        for start in range(0, table.count, SCAN_ROWS):
            wide = self._read(table, start, min(start + SCAN_ROWS, table.count)).astype(np.float64)
            with np.errstate(over="ignore", invalid="ignore"):
                wrong = ~np.isfinite(wide.astype(np.float32))
            if wrong.any():
                row, column = np.argwhere(wrong)[0]
                first = first or f"row {start + row}, column '{self.columns[column].name}'"
                wrong_count += int(wrong.sum())
            elif not wrong_count:
                moments.update(wide)
                low, high = np.minimum(low, wide.min(0)), np.maximum(high, wide.max(0))
        if wrong_count:
            others = f", and so are {wrong_count - 1} other values" if wrong_count > 1 else ""
            raise DataError(
                f"{self.path}: {first} is missing or not finite in float32{others}; take such rows out, or fit a density to "
                "the others and fill these in: `python -m stages complete ROW FILE`"
            )
        return moments, low, high

    def _levels(self, table: Table, numbers: Sequence[int]) -> dict[int, tuple[float, ...]]:
        """All distinct values of some columns, in ascending order; without columns that have too many."""
        found = {number: np.empty(0) for number in numbers}
        for start in range(0, table.count, SCAN_ROWS):
            if not found:
                break
            rows = self._read(table, start, min(start + SCAN_ROWS, table.count)).astype(np.float64)
            found = {number: np.union1d(values, rows[:, number]) for number, values in found.items()}
            found = {number: values for number, values in found.items() if len(values) <= MAX_LEVELS}
        apart = {n: np.diff(values, prepend=-np.inf) > SAME_LEVEL * (values[-1] - values[0]) for n, values in found.items()}
        return {number: tuple(values[apart[number]].tolist()) for number, values in found.items()}

    def _read(self, table: Table, start: int, stop: int) -> np.ndarray:
        """Rows start, .., stop - 1 of the chosen columns."""
        try:
            rows = table.rows(start, stop)
            return rows if self.numbers == list(range(len(table.names))) else rows[:, self.numbers]
        except DataError:
            raise
        except Exception as error:  # each library has its own errors
            raise DataError(f"{self.path} can't be read ({' '.join(str(error).split())})") from None

    def _noise(self, start: int, stop: int) -> np.ndarray:
        """Numbers in [0, 1) with shape (stop - start, D), the same for a row of the file however it is read."""
        return read_in_groups(lambda group: generator(self.seed, "noise", group).random((GROUP, self.dim)), start, stop)

    def read(self, split: str, start: int, stop: int) -> Block:
        """Vectors, float32 with shape (n, D), and labels if there are any."""
        if start >= stop:
            return Block(examples=np.empty((0, self.dim), np.float32))
        numbers, table = self.split.locate(split, start, stop), self._table()
        noisy = any(column.levels for column in self.dimensions)
        vectors, raw = [], []
        # In stretches, since the rows of a group may lie far apart.
        for first in range(int(numbers[0]), int(numbers[-1]) + 1, SCAN_ROWS):
            members = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, first + SCAN_ROWS)]
            if members.size:
                low, high = int(members[0]), int(members[-1]) + 1
                rows = self._read(table, low, high)[members - low]
                noise = self._noise(low, high)[members - low] if noisy else None
                vectors.append(to_codes(self.dimensions, rows, noise))
                raw.append(rows)
        examples = np.concatenate(vectors)
        wrong = np.flatnonzero(~np.isfinite(examples).all(axis=1))
        if wrong.size:
            raise DataError(
                f"{self.path}: row {numbers[wrong[0]]} isn't finite in float32; it has changed since it was checked"
            )
        return Block(
            examples=examples,
            labels=None if self.labels is None else self.labels[numbers].astype(np.int64),
            context=None if self.carried is None else self.carried[numbers],
            undisturbed=np.concatenate(raw) if noisy else None,
        )


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return float("nan")


def _repeats(values: np.ndarray, dtype: str) -> bool:
    """Whether values (n,) repeat beyond one frequent value, and beyond what the precision of their type explains."""
    counts = np.unique(values, return_counts=True)[1]
    others = len(values) - counts.max()
    few = len(counts) - 1 < max(others / 2, min(FEW_VALUES, len(values) / 2))
    return bool(len(counts) > 1 and few and (dtype not in HALF or len(counts) < HALF_VALUES))


def _truncated_list(names: Sequence[str]) -> str:
    """The first ten names."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def open_source(settings: Settings, root: Path) -> Vectors:
    """The source of a row.

    Raises:
        DataError: When the file is missing or of the wrong kind, type or shape.
    """
    return Vectors(root, settings)
