"""The interface of data sources: examples by split, read by range.

A source is cheap to make and to pickle: each process of a pool gets its own copy, with its own cache, and reads its own
ranges. The examples of a split have fixed numbers 0, 1, .., and `read` gives the same bytes however the ranges are cut:
randomness is derived from the split seed and the example's number, never from the order of calls.
"""

from __future__ import annotations

import importlib.util
import types
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.errors import DataError
from pipeline.storage.columns import Column
from pipeline.storage.parts import SPLITS, ContextColumn
from pipeline.system.files import sha256_bytes

__all__ = ["Block", "BlockwiseSplit", "Source", "check_digest", "generator", "packaged_file", "read_in_groups"]

GROUP = 256  # consecutive drawn examples that share a generator


@dataclass(frozen=True, kw_only=True)
class Block:
    """Consecutive examples of a split.

    Attributes:
        examples: Raw pixels 0..255, uint8 with shape (n, C, H, W), or vectors, float32 with shape (n, D).
        labels: Labels, int64 with shape (n,); None if there are none.
        context: The columns that the source's `context` names, float32 with shape (n, C); None if there are none.
        unreadable: One line per file of the range that can't be read and was skipped: its name and why.
        enlarged: Images that were enlarged from fewer pixels.
        dark: Images that are nearly black everywhere.
        undisturbed: What `examples` were before noise was added, by which duplicates are found; None if there is no noise.
    """

    examples: np.ndarray
    labels: np.ndarray | None = None
    context: np.ndarray | None = None
    unreadable: tuple[str, ...] = ()
    enlarged: int = 0
    dark: int = 0
    undisturbed: np.ndarray | None = None


class Source(ABC):
    """Examples by split, read by range.

    Attributes:
        counts: Number of examples of each split `train`, `valid`, `test`; an upper bound if files may be unreadable.
        kind: `images` or `vectors`.
        value_range: Range that the pixels 0..255 are scaled to, (0, 1) or (-1, 1); None for vectors.
        label_names: Names of the labels 0, 1, ..; None if there are no labels, or no names for them.
        context: Columns that belong to each example, for densities that are conditioned on them.
        split_origin: Description of where the split comes from; empty if the source's documentation says it.
        notes: Further remarks on how the data were read, one line each.
        columns: The columns of the table that vectors are rows of; empty for images and for vectors that no table gave.
        skipped: Number of files of each ending that isn't an image's, which were skipped.
    """

    counts: dict[str, int]
    kind: Literal["images", "vectors"]
    value_range: tuple[float, float] | None = None
    label_names: tuple[str, ...] | None = None
    context: tuple[ContextColumn, ...] = ()
    split_origin: str = ""
    notes: tuple[str, ...] = ()
    columns: tuple[Column, ...] = ()
    skipped: Mapping[str, int] = types.MappingProxyType({})

    @abstractmethod
    def read(self, split: str, start: int, stop: int) -> Block:
        """The examples number start, .., stop - 1 of a split, with 0 <= start <= stop <= counts[split].

        Raises:
            DataError: When a file is missing, corrupt or of the wrong shape; the message names it.
        """


def generator(seed: int, *key: int | str) -> np.random.Generator:
    """A separate random generator for each seed and key, for example `generator(seed, "grid", "train", 7)`.

    Example:
        >>> generator(0, "digits").integers(1000, size=3).tolist() == generator(0, "digits").integers(1000, size=3).tolist()
        True
        >>> generator(0, "digits").integers(1000, size=3).tolist() == generator(1, "digits").integers(1000, size=3).tolist()
        False
    """
    return np.random.default_rng([seed, *(zlib.crc32(k.encode()) if isinstance(k, str) else k for k in key)])


def read_in_groups(draw: Callable[[int], np.ndarray], start: int, stop: int, group: int = GROUP) -> np.ndarray:
    """Rows start, .., stop - 1 of an endless table that is drawn by groups of rows.

    Arguments:
        draw: Gives group g, rows g * group, .., (g + 1) * group - 1, with shape (group, ...); always the same for one g.
        start: First row.
        stop: Row after the last.
        group: Rows per group.

    Example:
        >>> read_in_groups(lambda g: 10 * g + np.arange(4), 2, 6, group=4)
        array([ 2,  3, 10, 11])
    """
    first, last = start // group, max(-(-stop // group), start // group + 1)
    rows = np.concatenate([draw(g) for g in range(first, last)])
    return rows[start - first * group : stop - first * group]


@dataclass(frozen=True, kw_only=True)
class BlockwiseSplit:
    """A seeded split of the rows of a long file that needs no memory and reads the file nearly in order.

    Of every 1,000 consecutive rows the same share, chosen at random, goes to validation and test. So the split is stratified
    over the file, and any range of a split is within a short stretch of it.

    Arguments:
        rows: Number of rows of the file.
        valid_share: Share of the rows for validation.
        test_share: Share of the rows for the test.
        seed: Seed of the choice.

    Raises:
        DataError: When there are too few rows for an example in each split.

    Example:
        >>> split = BlockwiseSplit(rows=2500, valid_share=0.1, test_share=0.2, seed=0)
        >>> split.counts
        {'train': 1750, 'valid': 250, 'test': 500}
        >>> split.locate("valid", 98, 102).tolist()
        [969, 991, 1001, 1013]
    """

    rows: int
    valid_share: float
    test_share: float
    seed: int
    counts: dict[str, int] = field(init=False)

    BLOCK = 1000

    def __post_init__(self) -> None:
        whole, rest = divmod(self.rows, self.BLOCK)
        counts = {s: whole * self._bounds(self.BLOCK)[s][1] + self._bounds(rest)[s][1] for s in SPLITS}
        if min(counts.values()) < 1:
            raise DataError(f"{self.rows} rows are too few for a split with an example in each part: {counts}")
        object.__setattr__(self, "counts", counts)

    def _bounds(self, rows: int) -> dict[str, tuple[int, int]]:
        """Start and count of each split in the shuffled order of a block of `rows` rows."""
        valid, test = round(rows * self.valid_share), round(rows * self.test_share)
        return {"valid": (0, valid), "test": (valid, test), "train": (valid + test, rows - valid - test)}

    def locate(self, split: str, start: int, stop: int) -> np.ndarray:
        """Row numbers in the file, ascending, of the examples start, .., stop - 1 of a split, with shape (stop - start,)."""
        each = self._bounds(self.BLOCK)[split][1]
        whole = self.rows // self.BLOCK
        # each == 0 if the split has examples only in the incomplete last block.
        first = min(start // each, whole) if each else whole
        last = min(max(stop - 1, start) // each, whole) if each else whole
        parts = []
        for block in range(first, last + 1):
            rows = min(self.BLOCK, self.rows - block * self.BLOCK)
            place, count = self._bounds(rows)[split]
            order = generator(self.seed, "blockwise split", block).permutation(rows)
            parts.append(block * self.BLOCK + np.sort(order[place : place + count]))
        return np.concatenate(parts)[start - first * each : stop - first * each]


def packaged_file(package: str, *parts: str) -> Path:
    """Path of a data file inside an installed package, without importing the package.

    Raises:
        DataError: When the package or the file is missing.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(f"package {package} is missing; install it: pip install {package}")
    path = Path(spec.origin).parent.joinpath(*parts)
    if not path.is_file():
        raise DataError(f"{path} is missing from package {package}; install another version of it")
    return path


def check_digest(data: bytes, digest: str, path: Path, package: str, module: str) -> None:
    """Rejects packaged data other than those that a source was written for.

    The digest is in the source's module, which is the row's `root`, so DVC notices when the bytes change.

    Arguments:
        data: The bytes.
        digest: The SHA-256 digest in the source's module.
        path: The packaged file.
        package: The package with its version, in pip's notation.
        module: Name of the source.

    Raises:
        DataError: When the digests differ.
    """
    if sha256_bytes(data) != digest:
        raise DataError(
            f"{path} holds other data than pipeline/sources/{module}.py was written for; pip install {package}, or, to use the "
            f"new data, write {sha256_bytes(data)} into that file as their digest"
        )
