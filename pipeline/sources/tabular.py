"""The tables that flow papers score on, POWER, GAS, HEPMASS and MINIBOONE, prepared as Papamakarios et al. (2017) did.

`root` is the table's folder in their data.tar.gz (doi.org/10.5281/zenodo.1161203). Their fifth table is `source: bsds300` with
`split: maf`. Each step below is that of the authors' code (github.com/gpapamak/maf, folder datasets), including its accidents,
since published scores are of these rows and these columns. The split is fixed: the last tenth is the test, the last tenth of
the others is for validation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.errors import DataError
from pipeline.settings import DatasetSettings
from pipeline.sources.common.source import Block, Source
from pipeline.storage.parts import SPLITS

__all__ = ["PublishedTable", "Settings", "open_source"]

ORIGIN = "download data.tar.gz of Papamakarios et al. (doi.org/10.5281/zenodo.1161203) and put its folder there"
CORRELATED = 0.98  # GAS: of two columns with a higher correlation the first is left out
REPEATED = 5  # HEPMASS: columns whose lowest value occurs more often are left out

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]  # training, validation and test rows, float64


@dataclass(frozen=True, kw_only=True)
class Settings(DatasetSettings):
    """A row of `datasets` with `source: tabular`; `root` is the folder of the table.

    Attributes:
        table: `power` (6 columns), `gas` (8), `hepmass` (21) or `miniboone` (43).
    """

    table: Literal["power", "gas", "hepmass", "miniboone"] = "power"

    @property
    def shape(self) -> tuple[int, ...]:
        """(0,): only the file determines it."""
        return (0,)


def _tail(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All rows but the last tenth, and the last tenth."""
    count = len(rows) // 10
    return rows[: len(rows) - count], rows[len(rows) - count :]


def _split(rows: np.ndarray) -> Parts:
    rest, test = _tail(rows)
    return (*_tail(rest), test)


def _standardised(parts: Parts) -> Parts:
    """Rows less the mean of training and validation rows, in units of their standard deviation."""
    known = np.concatenate(parts[:2])
    mean, std = known.mean(axis=0), known.std(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):  # what isn't finite is rejected afterwards
        train, valid, test = ((part - mean) / std for part in parts)
    return train, valid, test


def _numbers(path: Path) -> np.ndarray:
    """A table in an .npy file, float64."""
    rows: np.ndarray = np.load(path, allow_pickle=False)
    if rows.ndim != 2 or rows.dtype.kind not in "fiu":
        raise DataError(f"{path} has shape {rows.shape} and type {rows.dtype}; expected a table of numbers")
    return rows.astype(np.float64)


def _power(folder: Path) -> Parts:
    """POWER: shuffled, without reactive power and intensity, with noise as wide as the rounding of what was measured."""
    rows = _numbers(folder / "data.npy")
    if rows.shape[1] != 8:
        raise DataError(f"{folder / 'data.npy'} has {rows.shape[1]} columns; expected the 8 of POWER")
    random = np.random.RandomState(42)
    random.shuffle(rows)
    rows = np.delete(rows, [1, 3], axis=1)  # what is left: active power, voltage, three meters, time
    voltage, active, meters = (random.rand(len(rows), width) for width in (1, 1, 3))  # in the order of the authors' draws
    rows += np.hstack([0.001 * active, 0.01 * voltage, meters, np.zeros((len(rows), 1))])
    return _standardised(_split(rows))


def _gas(folder: Path) -> Parts:
    """GAS: sensors alone, in the order of time; while two columns are nearly the same, the first of them is left out."""
    import pandas as pd

    path = folder / "ethylene_CO.parquet"
    if not path.is_file() and (folder / "ethylene_CO.pickle").is_file():
        raise DataError(
            f"{folder / 'ethylene_CO.pickle'} is a pickle, which may run code, so it isn't read; turn it into a table once: "
            "pandas.read_pickle('ethylene_CO.pickle').to_parquet('ethylene_CO.parquet')"
        )
    if not path.is_file():
        raise DataError(f"{path} is missing; {ORIGIN}")
    table = pd.read_parquet(path)
    absent = [name for name in ("Meth", "Eth", "Time") if name not in table.columns]
    if absent:
        raise DataError(f"{path} has no column {', '.join(absent)}; expected those of GAS")
    table = table.drop(columns=["Meth", "Eth", "Time"]).astype(np.float64)
    while (repeated := (table.corr().to_numpy() > CORRELATED).sum(axis=1) > 1).any():
        table = table.drop(columns=table.columns[int(repeated.argmax())])
    return _split(((table - table.mean()) / table.std()).to_numpy())  # in units of all rows, test rows included


def _hepmass(folder: Path) -> Parts:
    """HEPMASS: the signal alone, in units of the training file, without columns whose lowest value repeats."""
    import pandas as pd

    files = [pd.read_csv(folder / f"1000_{name}.csv", index_col=False) for name in ("train", "test")]
    train, test = (file[file.iloc[:, 0] == 1].iloc[:, 1:].to_numpy(np.float64) for file in files)
    test = test[:, :-1]  # a column that the training file hasn't
    if train.shape[1] != test.shape[1]:
        raise DataError(f"{folder}: the test file has {test.shape[1]} columns and the training file {train.shape[1]}")
    lowest = (train == train.min(axis=0)).sum(axis=0)
    train, test = train[:, lowest <= REPEATED], test[:, lowest <= REPEATED]
    mean, std = train.mean(axis=0), train.std(axis=0, ddof=1)
    return (*_tail((train - mean) / std), (test - mean) / std)


def _miniboone(folder: Path) -> Parts:
    """MINIBOONE: as in the archive, which is without outliers and without columns whose lowest value repeats."""
    return _standardised(_split(_numbers(folder / "data.npy")))


PREPARED: dict[str, Callable[[Path], Parts]] = {"power": _power, "gas": _gas, "hepmass": _hepmass, "miniboone": _miniboone}


class PublishedTable(Source):
    """The prepared rows of one of the tables.

    Arguments:
        folder: The table's folder.
        table: Its name.

    Raises:
        DataError: When a file is missing or damaged.
    """

    kind = "vectors"
    split_origin = "that of Papamakarios et al. (2017)"

    def __init__(self, folder: Path, table: str) -> None:
        try:
            parts = PREPARED[table](folder)
        except DataError:
            raise
        except FileNotFoundError as error:
            raise DataError(f"{error.filename or folder} is missing; {ORIGIN}") from None
        except Exception as error:  # NumPy, pandas and pyarrow each have their own errors
            raise DataError(f"{folder} can't be read as {table} ({' '.join(str(error).split())}); get it again") from None
        # In memory: 150 MB for the largest.
        self._rows = {split: part.astype(np.float32) for split, part in zip(SPLITS, parts, strict=True)}
        for split, rows in self._rows.items():
            if not len(rows) or not np.isfinite(rows).all():
                problem = "isn't finite" if len(rows) else "is empty"
                raise DataError(f"{folder}: split '{split}' {problem} once it is prepared as {table}; get it again")
        self.counts = {split: len(rows) for split, rows in self._rows.items()}

    def read(self, split: str, start: int, stop: int) -> Block:
        """Vectors, float32 with shape (n, D)."""
        return Block(examples=self._rows[split][start:stop])


def open_source(settings: Settings, root: Path) -> PublishedTable:
    """The source of a row.

    Raises:
        DataError: When a file of the table is missing or damaged.
    """
    if not root.is_dir():
        raise DataError(f"{root} is no folder; {ORIGIN}")
    return PublishedTable(root, settings.table)
