r"""Columns of a table as codes: how values are stored in float32, and how samples and scores return to the table's units.

A value x of a column is stored as

.. math:: z = \frac{x + u - \text{shift}}{\text{scale}}

in float64 before it becomes float32. u is 0, or for a column of few distinct values a draw from U(-s/2, s/2), where s is the
smallest gap between two of them. Then

.. math:: \log P(x) \geq \mathbb{E}_u \log p(z) + \log s - \log \text{scale}

which no density can raise above 0 by narrowing, as it could the density of values that repeat.

References:
    | A note on the evaluation of generative models (Theis, van den Oord, Bethge, 2016), section 3.1
    | https://arxiv.org/abs/1511.01844
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import DataError, SettingsError
from pipeline.settings import build, check_that
from pipeline.system.files import read_json, write_json

__all__ = [
    "Column",
    "VectorMoments",
    "are_named",
    "from_codes",
    "load_columns",
    "log_volume",
    "on_levels",
    "save_columns",
    "to_codes",
    "varying",
]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table.

    Attributes:
        name: Its name.
        shift: What is subtracted from its values.
        scale: What they are then divided by.
        levels: Its distinct values in ascending order, if it is dequantised; empty for a continuous column.
        constant: The value of a column that holds only one and is no dimension; null for a dimension.
    """

    name: str
    shift: float = 0.0
    scale: float = 1.0
    levels: tuple[float, ...] = ()
    constant: float | None = None

    def __post_init__(self) -> None:
        check_that(self.scale > 0, "scale", "must be positive")
        check_that(len(self.levels) != 1 and sorted(set(self.levels)) == [*self.levels], "levels", "must ascend")

    @property
    def step(self) -> float:
        """The smallest gap between two levels; 0 for a continuous column."""
        return float(np.diff(self.levels).min()) if self.levels else 0.0

    @property
    def plain(self) -> bool:
        """Whether its values are stored as they are."""
        return (self.shift, self.scale, self.levels, self.constant) == (0.0, 1.0, (), None)


def are_named(names: Sequence[str]) -> bool:
    """Whether columns have names, not only the numbers that columns without names are called by.

    Example:
        >>> are_named(["age", "height"]), are_named(["0", "1"])
        (True, False)
    """
    return any(name != str(number) for number, name in enumerate(names))


def to_codes(columns: Sequence[Column], rows: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
    """Codes, float32 with shape (n, D), of the rows of a table.

    Arguments:
        columns: The columns of `rows`, dimensions only.
        rows: Their values, with shape (n, D).
        noise: Numbers in [0, 1) with shape (n, D), for columns with levels; None adds nothing.
    """
    wide = rows.astype(np.float64)
    if noise is not None:
        wide += (noise - 0.5) * np.array([column.step for column in columns])
    shift, scale = np.array([column.shift for column in columns]), np.array([column.scale for column in columns])
    with np.errstate(over="ignore", invalid="ignore"):
        codes: np.ndarray = ((wide - shift) / scale).astype(np.float32)
    return codes


def from_codes(columns: Sequence[Column], codes: np.ndarray) -> np.ndarray:
    """Rows of a table of codes: in its units, constant columns put back, values of columns with levels on the nearest one.

    Arguments:
        columns: All columns of the table; without any, codes are returned unchanged.
        codes: Codes with shape (n, D), D the number of columns that aren't constant.

    Returns:
        The rows, float64 with shape (n, C); float32 if all columns are stored as they are.

    Example:
        >>> columns = [Column(name="when", shift=1.7e9, scale=100.0), Column(name="one", constant=1.0)]
        >>> from_codes([*columns, Column(name="sex", levels=(0.0, 1.0))], np.array([[0.5, 0.7]], np.float32)).tolist()
        [[1700000050.0, 1.0, 1.0]]
    """
    if all(column.plain for column in columns):
        return codes
    rows = np.empty((len(codes), len(columns)))
    dimension = 0
    for number, column in enumerate(columns):
        if column.constant is not None:
            rows[:, number] = column.constant
            continue
        rows[:, number] = column.shift + column.scale * codes[:, dimension].astype(np.float64)
        dimension += 1
    return on_levels(columns, rows)


def on_levels(columns: Sequence[Column], rows: np.ndarray) -> np.ndarray:
    """Rows (n, C) with the values of columns that have levels on the nearest one.

    Example:
        >>> on_levels([Column(name="die", levels=(1.0, 2.0, 4.0)), Column(name="x")], np.array([[2.9, 0.5]])).tolist()
        [[2.0, 0.5]]
    """
    rows = rows.copy()
    for number, column in enumerate(columns):
        if column.levels:
            levels = np.array(column.levels)
            rows[:, number] = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, rows[:, number])]
    return rows


def varying(columns: Sequence[Column]) -> list[int]:
    """Numbers of the columns of a table that are dimensions, D of them."""
    return [number for number, column in enumerate(columns) if column.constant is None]


def log_volume(columns: Sequence[Column]) -> float:
    r"""What turns a log-likelihood of codes into one of rows, in nats: :math:`\sum_i \log s_i - \log \text{scale}_i`.

    Example:
        >>> log_volume([Column(name="metres", scale=1000.0), Column(name="one", constant=1.0)])
        -6.907755278982137
    """
    dimensions = [column for column in columns if column.constant is None]
    return math.fsum((math.log(column.step) if column.levels else 0.0) - math.log(column.scale) for column in dimensions)


def save_columns(columns: Sequence[Column], path: Path) -> None:
    """Writes the columns of a table as JSON."""
    write_json(path, [asdict(column) for column in columns])


def load_columns(path: Path) -> tuple[Column, ...]:
    """Reads what `save_columns` wrote.

    Raises:
        DataError: When the file is missing, damaged or holds something else.
    """
    try:
        return tuple(build(Column, values, str(path)) for values in read_json(path))
    except (SettingsError, AttributeError, TypeError) as error:
        raise DataError(f"{path} holds no columns ({' '.join(str(error).split())[:200]}); export the row again") from None


class VectorMoments:
    """Mean and variance of a stream of vectors, in float64, by the pairwise update of Chan, Golub and LeVeque (1979).

    Example:
        >>> moments = VectorMoments(1)
        >>> moments.update(np.array([[1.0], [3.0]]))
        >>> moments.mean.tolist(), moments.std.tolist()
        ([2.0], [1.0])
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = np.zeros(dim)
        self._squares = np.zeros(dim)

    def update(self, vectors: np.ndarray) -> None:
        """Adds vectors with shape (n, D)."""
        if len(vectors) == 0:
            return
        wide = vectors.astype(np.float64)
        added = VectorMoments(len(self.mean))
        added.count, added.mean = len(vectors), wide.mean(0)
        added._squares = ((wide - added.mean) ** 2).sum(0)
        self.merge(added)

    def merge(self, other: VectorMoments) -> None:
        """Adds the vectors of other moments; the same numbers as `update` with them gives."""
        if other.count == 0:
            return
        delta = other.mean - self.mean
        total = self.count + other.count
        self._squares += other._squares + delta**2 * (self.count * other.count / total)
        self.mean = self.mean + delta * (other.count / total)
        self.count = total

    @property
    def std(self) -> np.ndarray:
        """Population standard deviation (divisor n), with shape (D,)."""
        return np.sqrt(self._squares / max(self.count, 1))
