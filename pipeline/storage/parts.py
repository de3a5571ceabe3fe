"""Common to shards and codes: numbered files by split, and an `index.json` with count, length and digest of each."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from pipeline.errors import DataError, SettingsError
from pipeline.settings import build
from pipeline.storage.columns import Column
from pipeline.storage.stores import current_store
from pipeline.system.files import read_json, sha256_bytes, sha256_file, write_json

__all__ = [
    "SPLITS",
    "Arrays",
    "ContextColumn",
    "Part",
    "PartIndex",
    "PartReader",
    "part_name",
    "part_of",
    "spread",
    "write_index",
]

SPLITS = ("train", "valid", "test")

Arrays = dict[str, np.ndarray]  # by name, examples along the first axis of each


def part_name(split: str, number: int, ending: str) -> str:
    """Name of file `number` of a split.

    Example:
        >>> part_name("train", 3, "tar")
        'train-000003.tar'
    """
    return f"{split}-{number:06d}.{ending}"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file: its name, number of examples, length in bytes and SHA-256 digest."""

    name: str
    count: int
    bytes: int
    sha256: str


def part_of(path: Path, count: int) -> Part:
    """The entry of a finished file that holds `count` examples. With a STORE, the file moves there."""
    part = Part(name=path.name, count=count, bytes=path.stat().st_size, sha256=sha256_file(path))
    store = current_store()
    if store is not None:
        store.put(path, part.sha256)
        path.unlink()
    return part


def spread(counts: Sequence[int], most: int) -> list[int]:
    """Numbers of the files of a split that hold about `most` of its examples, evenly spaced; all files if it holds fewer.

    The first files would not do: where raw files are sorted, they hold some classes only.

    Arguments:
        counts: Number of examples in each file.
        most: Examples at most, rounded up to whole files.

    Example:
        >>> spread([10, 10, 10, 10, 10, 4], 25), spread([10, 10, 4], 24)
        ([0, 2, 4], [0, 1, 2])
    """
    if sum(counts) <= most:
        return list(range(len(counts)))
    taken = math.ceil(len(counts) * most / sum(counts))
    return [i * len(counts) // taken for i in range(taken)]


@dataclass(frozen=True, kw_only=True)
class ContextColumn:
    """A column that belongs to each example and that a density may be conditioned on.

    Attributes:
        name: Its name.
        words: Of categories, what the values 0, 1, .. are called; null for numbers.
    """

    name: str
    words: tuple[str, ...] | None = None


class PartIndex:
    """Base of indexes, dataclasses with a field of files, `tuple[Part, ...]`, for each split.

    Attributes:
        splits: Names of those fields.
        columns: The columns of the table that the examples are rows of; empty for images and for vectors that no table gave.
    """

    splits: ClassVar[tuple[str, ...]] = SPLITS

    columns: tuple[Column, ...]

    def parts(self, split: str) -> tuple[Part, ...]:
        """The files of a split, in order."""
        parts: tuple[Part, ...] = getattr(self, split)
        return parts

    def counts(self, split: str) -> list[int]:
        """Number of examples in each file of a split."""
        return [part.count for part in self.parts(split)]

    def count(self, split: str) -> int:
        """Number of examples of a split."""
        return sum(self.counts(split))

    @property
    def digest(self) -> str:
        """Digest of the folder's content, made from those of its files."""
        return sha256_bytes("\n".join(self._digests()).encode())

    def _digests(self) -> list[str]:
        columns = [json.dumps(asdict(column), sort_keys=True) for column in self.columns]
        return [*columns, *(f"{part.name} {part.sha256}" for split in self.splits for part in self.parts(split))]

    def as_json(self) -> dict[str, Any]:
        """The index as written to `index.json`."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        columns = {"columns": [asdict(column) for column in self.columns]} if values.pop("columns") else {}
        context = values.pop("context", [])
        columns |= {"context": [vars(column) for column in context]} if context else {}
        return values | columns | {split: [vars(part) for part in self.parts(split)] for split in self.splits}


def write_index(folder: str | Path, index: PartIndex) -> None:
    """Writes `index.json` next to the files."""
    write_json(Path(folder) / "index.json", index.as_json())


Index = TypeVar("Index", bound=PartIndex)


class PartReader(Generic[Index]):
    """Base of readers of a folder with an `index.json`.

    Arguments:
        folder: The folder.

    Attributes:
        index: What the folder holds.
        index_type: The class of the index.
        ending: Ending of the files' names.
        remedy: What to do about a damaged file; the end of every message.

    Raises:
        DataError: When the index is missing or inconsistent, or a file is missing or has another length.
    """

    index_type: type[Index]
    ending: ClassVar[str]
    remedy: ClassVar[str]

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "index.json"
        values = read_json(path)
        if not isinstance(values, dict):
            raise self._error(f"{path} isn't an index")
        try:
            self.index = build(self.index_type, values, str(path))
        except SettingsError as error:
            raise self._error(str(error)) from None
        wrong = self._impossible(self.index)
        if wrong:
            raise self._error(f"{path}: {wrong}")
        example_bytes = self._example_bytes(self.index)
        for split in self.index.splits:
            for number, part in enumerate(self.index.parts(split)):
                expected = part_name(split, number, self.ending)
                if part.name != expected:
                    raise self._error(f"{path}: expected {expected}, got {part.name[:80]!r}")
                if part.count < 1 or part.bytes < part.count * example_bytes:
                    counts = f"{str(part.count)[:30]} examples in {str(part.bytes)[:30]} bytes"
                    raise self._error(f"{path}: {part.name} can't hold {counts}")
                self._check_length(part)

    # To be implemented for each kind of files

    def _impossible(self, index: Index) -> str:
        """What is wrong with an index, apart from its files; empty if nothing is."""
        raise NotImplementedError

    def _example_bytes(self, index: Index) -> int:
        """Least number of bytes per example."""
        raise NotImplementedError

    def load(self, split: str, number: int) -> Arrays:
        """All examples of one file.

        Raises:
            DataError: When the file is missing, truncated, changed or holds something unexpected.
        """
        raise NotImplementedError

    # Common to all kinds

    def counts(self, split: str) -> list[int]:
        """Number of examples in each file of a split."""
        return self.index.counts(split)

    def _bytes(self, part: Part) -> bytes:
        """The content of a file, here or in the STORE, after checking its length and digest."""
        path = self.folder / part.name
        store = current_store()
        if store is not None and not path.exists():
            try:
                return store.get(str(path), part.sha256, part.bytes)
            except DataError as error:
                raise self._error(str(error)) from None
        self._check_length(part)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise self._error(f"{path} can't be read ({error.strerror})") from None
        if sha256_bytes(data) != part.sha256:
            raise self._error(f"{path} doesn't match the digest in its index")
        return data

    def _check_length(self, part: Part) -> None:
        path = self.folder / part.name
        try:
            length = path.stat().st_size
        except OSError as error:
            if isinstance(error, FileNotFoundError) and current_store() is not None:
                return  # the store is asked when it is read
            raise self._error(f"{path} can't be read ({error.strerror})") from None
        if not path.is_file():
            raise self._error(f"{path} isn't a regular file")
        if length != part.bytes:
            raise self._error(f"{path} has {length} bytes instead of {part.bytes}: truncated or changed")

    def _error(self, message: str) -> DataError:
        return DataError(f"{message}; {self.remedy}")
