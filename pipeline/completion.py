"""A table with missing values -> the same table without: drawn from a density, or means of draws with their spread."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.densities import Density
from pipeline.errors import DataError
from pipeline.settings import DatasetSettings
from pipeline.sources.common.tables import Table, open_table, shared_names
from pipeline.storage.columns import Column, from_codes, on_levels, to_codes, varying
from pipeline.system.files import atomic_file
from pipeline.system.progress import Progress
from pipeline.system.streams import stream_seed

__all__ = ["MEAN_DRAWS", "Incomplete", "complete_rows", "complete_table", "means_of", "write_completed"]

BLOCK_ROWS = 1024
MEAN_DRAWS = 100  # behind each mean and spread


class Incomplete:
    """A table with missing values, in the columns that a density was fitted on.

    Arguments:
        path: The file: `.npy`, `.safetensors`, `.csv`, `.tsv` or Parquet.
        settings: The row of `datasets`: which columns are the dimensions, and which are labels or groups.
        dim: The number of columns that the density takes.
        columns: Their names. Where they and those of the file have names, these count, in any order; else the order.

    Attributes:
        count: The number of rows.
        names: Names of the columns.
        copied: Labels, groups and context columns by name, as text with shape (N,) each, where the file has them.
        missing: The number of missing values of each column, with shape (D,).
        incomplete_rows: The number of rows with a missing value.

    Raises:
        DataError: When the file is missing or unreadable, has other columns, or holds infinite values.
    """

    def __init__(self, path: Path, settings: DatasetSettings, dim: int, columns: Sequence[str] = ()) -> None:
        self.path, self._tensor = path, getattr(settings, "tensor", "")
        named = (getattr(settings, "labels", ""), getattr(settings, "groups", ""))
        carried = (*getattr(settings, "categories", ()), *getattr(settings, "numbers", ()))
        extras = tuple(dict.fromkeys(filter(None, (*named, *carried))))
        self._wanted = getattr(settings, "columns", ()) or shared_names(path, self._tensor, columns, extras)
        self.copied: dict[str, np.ndarray] = {}
        for names in (extras, *((name,) for name in extras)):
            with contextlib.suppress(DataError):  # new rows needn't have all of them
                table = open_table(path, self._tensor, self._wanted, names)
                self.copied |= {name: table.text(name) for name in names if name not in self.copied}
        self._extras = tuple(self.copied)
        table = self._table()
        self.count = table.count
        self.names = self._wanted or tuple(name for name in table.names if name not in extras)
        if len(self.names) != dim:
            remedy = "; name those of the data set by its setting 'columns'" if len(self.names) > dim else ""
            raise DataError(f"{path} has {len(self.names)} columns of numbers, and the density takes {dim}{remedy}")
        self.missing, self.incomplete_rows = np.zeros(dim, np.int64), 0
        for start, rows in self.blocks():
            with np.errstate(over="ignore"):
                infinite = np.argwhere(np.isinf(rows.astype(np.float32)))
            if len(infinite):
                row, column = infinite[0]
                raise DataError(f"{path}: row {start + row}, column '{self.names[column]}' is infinite in float32")
            self.missing += np.isnan(rows).sum(axis=0)
            self.incomplete_rows += int(np.isnan(rows).any(axis=1).sum())

    def _table(self) -> Table:
        return open_table(self.path, self._tensor, self._wanted, self._extras)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """The first row's number and the rows, float64 with shape (n, D), block after block; missing values are NaN."""
        table = self._table()
        columns = [table.names.index(name) for name in self.names]
        for start in range(0, self.count, BLOCK_ROWS):
            rows = table.rows(start, min(start + BLOCK_ROWS, self.count))
            yield start, rows[:, columns].astype(np.float64)


def complete_rows(density: Density, rows: np.ndarray, draws: int, seed: int = 0, start: int = 0) -> np.ndarray:
    """Rows with their missing values drawn, given the others.

    Arguments:
        density: A density whose `has_given` is true.
        rows: The rows, with shape (N, D), NaN where a value is missing.
        draws: How many times each row is completed, n.
        seed: Seed of the draws.
        start: The number of the first row; draws of a block are of its own.

    Returns:
        The completed rows, float64 with shape (n, N, D); observed values are those of `rows`.

    Example:
        >>> from pipeline.densities.gaussian import Gaussian
        >>> complete_rows(Gaussian(2), np.array([[0.5, np.nan]]), draws=3)[:, 0, 0].tolist()
        [0.5, 0.5, 0.5]
    """
    completed = np.repeat(rows[None].astype(np.float64), draws, axis=0)
    incomplete = np.isnan(rows).any(axis=1)
    if incomplete.any():
        generator = torch.Generator().manual_seed(stream_seed("completions", seed, start))
        given = torch.from_numpy(rows[incomplete]).to(density.shift)
        drawn = density.sample(draws, generator, given=given).double().cpu().numpy()
        completed[:, incomplete] = np.where(np.isnan(rows[incomplete]), drawn, rows[incomplete])
    return completed


def complete_table(
    density: Density, rows: np.ndarray, columns: Sequence[Column], draws: int, seed: int = 0, start: int = 0
) -> np.ndarray:
    """Rows of a table with their missing values drawn, in the table's units.

    Arguments:
        density: A density whose `has_given` is true.
        rows: The rows, with shape (N, C), NaN where a value is missing.
        columns: The columns of the table that the density was fitted to; empty if codes are the rows.
        draws: How many times each row is completed, n.
        seed: Seed of the draws.
        start: The number of the first row.

    Returns:
        The completed rows, float64 with shape (n, N, C); observed values are those of `rows`, to the bit.
    """
    dims = varying(columns) or list(range(density.dim))
    dimensions = [columns[number] if columns else Column(name=str(number)) for number in dims]
    codes = complete_rows(density, to_codes(dimensions, rows[:, dims]), draws, seed, start)  # (n, N, D)
    drawn = from_codes(columns, codes.reshape(-1, len(dims))).reshape(draws, len(rows), -1)
    return np.where(np.isnan(rows), drawn, rows)


def means_of(completed: np.ndarray, rows: np.ndarray, columns: Sequence[Column]) -> tuple[np.ndarray, np.ndarray]:
    """Means of draws in place of missing values, on the nearest level of columns that have levels, and the draws' spread.

    Arguments:
        completed: The draws, with shape (n, N, C), as `complete_table` gives them.
        rows: The rows, with shape (N, C), NaN where a value is missing.
        columns: The columns of the table; empty if codes are the rows.

    Returns:
        The rows with means, and the standard deviations of the draws, NaN where a value was there, each with shape (N, C).
    """
    missing = np.isnan(rows)
    means = on_levels(columns, completed.mean(axis=0))
    return np.where(missing, means, rows), np.where(missing, completed.std(axis=0, ddof=1), np.nan)


def write_completed(
    density: Density, table: Incomplete, output: Path, draws: int = 0, seed: int = 0, columns: Sequence[Column] = ()
) -> None:
    """Writes a table without missing values, as `.csv`.

    With draws, each row is written so many times; the columns `row` and `draw` hold its number and that of the draw. Without,
    each row is written once, and the means of 100 draws take the place of missing values, rounded to the nearest level of a
    dequantised column. Then each column with missing values has another one, `NAME spread`: the standard deviation of these
    draws, or nothing where a value was there.

    Arguments:
        density: The density of the rows.
        table: The rows.
        output: The file to write.
        draws: How many times each row is completed; 0 for means.
        seed: Seed of the draws.
        columns: The columns of the table that the density was fitted to, by which its rows become codes.

    Raises:
        PipelineError: When the family can't predict some dimensions from others.
    """
    gaps = np.flatnonzero(table.missing)
    spreads = [] if draws else [f"{table.names[column]} spread" for column in gaps]
    with atomic_file(output) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*(["row", "draw"] if draws else []), *table.copied, *table.names, *spreads])
        with Progress(table.count, f"completing {table.path.name}", unit="rows") as progress:
            for start, rows in table.blocks():
                completed = complete_table(density, rows, columns, draws or MEAN_DRAWS, seed, start)  # (n, N, C)
                means, deviations = means_of(completed, rows, columns) if not draws else (rows, rows)
                for i in range(len(rows)):
                    copied = [texts[start + i] for texts in table.copied.values()]
                    if draws:
                        writer.writerows([start + i, n, *copied, *_cells(values)] for n, values in enumerate(completed[:, i]))
                    else:
                        writer.writerow([*copied, *_cells(means[i]), *_cells(deviations[i, gaps])])
                progress.advance(len(rows))


def _cells(values: np.ndarray) -> list[str]:
    """Numbers as text that gives them back, and nothing for NaN."""
    return ["" if np.isnan(value) else repr(float(value)) for value in values]
