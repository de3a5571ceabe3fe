"""A table with missing values -> the same table without: drawn from a density, or means of draws with their spread."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.densities import Density
from pipeline.errors import DataError
from pipeline.settings import DatasetSettings
from pipeline.sources.common.tables import Table, open_table
from pipeline.storage.columns import Column, from_codes, to_codes, varying
from pipeline.system.files import atomic_file
from pipeline.system.progress import Progress
from pipeline.system.streams import stream_seed

__all__ = ["Incomplete", "complete_rows", "write_completed"]

BLOCK_ROWS = 1024
MEAN_DRAWS = 100  # behind each mean and spread


class Incomplete:
    """A table with missing values, in the columns that a density was fitted on.

    Arguments:
        path: The file: `.npy`, `.safetensors`, `.csv`, `.tsv` or Parquet.
        settings: The row of `datasets`: which columns are the dimensions, and which are labels or groups.
        dim: The number of columns that the density takes.

    Attributes:
        count: The number of rows.
        names: Names of the columns.
        copied: Labels, groups and context columns by name, as text with shape (N,) each, where the file has them.
        missing: The number of missing values of each column, with shape (D,).
        incomplete_rows: The number of rows with a missing value.

    Raises:
        DataError: When the file is missing or unreadable, has other columns, or holds infinite values.
    """

    def __init__(self, path: Path, settings: DatasetSettings, dim: int) -> None:
        self.path, self._tensor, self._wanted = path, getattr(settings, "tensor", ""), getattr(settings, "columns", ())
        named = (getattr(settings, "labels", ""), getattr(settings, "groups", ""))
        carried = (*getattr(settings, "categories", ()), *getattr(settings, "numbers", ()))
        extras = tuple(dict.fromkeys(filter(None, (*named, *carried))))
        try:
            self._extras = extras
            self.copied = {name: self._table().text(name) for name in extras}
        except DataError:  # new rows needn't have labels
            self._extras, self.copied = (), {}
        table = self._table()
        self.count = table.count
        self.names = self._wanted or tuple(name for name in table.names if name not in extras)
        if len(self.names) != dim:
            raise DataError(
                f"{path} has {len(self.names)} columns of numbers, and the density takes {dim}; name those of the data set by "
                "its setting 'columns'"
            )
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


def write_completed(
    density: Density, table: Incomplete, output: Path, draws: int = 0, seed: int = 0, columns: Sequence[Column] = ()
) -> None:
    """Writes a table without missing values, as `.csv`.

    With draws, each row is written so many times; the columns `row` and `draw` hold its number and that of the draw. Without,
    each row is written once, and the means of 100 draws take the place of missing values. Then each column with missing values
    has another one, `NAME spread`: the standard deviation of these draws, or nothing where a value was there.

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
    dims, gaps = varying(columns) or list(range(density.dim)), np.flatnonzero(table.missing)
    dimensions = [columns[number] if columns else Column(name=table.names[number]) for number in dims]
    spreads = [] if draws else [f"{table.names[column]} spread" for column in gaps]
    with atomic_file(output) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*(["row", "draw"] if draws else []), *table.copied, *table.names, *spreads])
        with Progress(table.count, f"completing {table.path.name}", unit="rows") as progress:
            for start, rows in table.blocks():
                missing = np.isnan(rows)
                incomplete = to_codes(dimensions, rows[:, dims])
                codes = complete_rows(density, incomplete, draws or MEAN_DRAWS, seed, start)  # (n, N, D)
                drawn = from_codes(columns, codes.reshape(-1, len(dims))).reshape(*codes.shape[:2], -1)
                for i, row in enumerate(rows):
                    copied = [texts[start + i] for texts in table.copied.values()]
                    if draws:
                        values = np.where(missing[i], drawn[:, i], row)  # observed ones to the bit
                        writer.writerows([start + i, number, *copied, *_cells(one)] for number, one in enumerate(values))
                        continue
                    spread = np.where(missing[i], drawn[:, i].std(axis=0, ddof=1), np.nan)[gaps]
                    writer.writerow([*copied, *_cells(np.where(missing[i], drawn[:, i].mean(axis=0), row)), *_cells(spread)])
                progress.advance(len(rows))


def _cells(values: np.ndarray) -> list[str]:
    """Numbers as text that gives them back, and nothing for NaN."""
    return ["" if np.isnan(value) else repr(float(value)) for value in values]
