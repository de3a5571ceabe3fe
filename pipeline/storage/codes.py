"""Latent codes on disk: write, check, stream.

`data/codes/<name>` is complete in itself: a safetensors file a shard, `{train,valid,test}-%06d.safetensors`, with "codes" (n,
D) float32 and, where there are any, "labels" (n,) int64; an `index.json` with counts and digests; the mean and the standard
deviation of the training codes; and `decoder.safetensors`, which turns codes back into images. Codes that are vectors to begin
with have no decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError, SettingsError
from pipeline.settings import build
from pipeline.storage.shards import SPLITS
from pipeline.system.files import atomic_file, read_json, sha256_bytes, sha256_file, write_json

__all__ = ["CodeIndex", "CodePart", "CodeReader", "Moments", "write_part"]


@dataclass(frozen=True, kw_only=True)
class CodePart:
    """One file of codes: its name, number of codes, length in bytes and SHA-256 digest."""

    name: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CodeIndex:
    """What a folder of codes holds.

    Attributes:
        dim: Length D of a code.
        mean: Mean of the training codes, D numbers.
        std: Standard deviation of the training codes, D numbers.
        source_digest: Digest of the shards that were encoded.
        decoder_sha256: Digest of `decoder.safetensors`; null for vectors.
        value_range: Range of the decoded pixels; null for vectors.
        label_names: Names of the labels; null where there are none.
        train, valid, test: The files of each split, in order.
    """

    dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source_digest: str
    decoder_sha256: str | None = None
    value_range: tuple[float, ...] | None = None
    label_names: tuple[str, ...] | None = None
    train: tuple[CodePart, ...] = ()
    valid: tuple[CodePart, ...] = ()
    test: tuple[CodePart, ...] = ()

    def parts(self, split: str) -> tuple[CodePart, ...]:
        """The files of a split, in order."""
        parts: tuple[CodePart, ...] = getattr(self, split)
        return parts

    def count(self, split: str) -> int:
        """Number of codes of a split."""
        return sum(part.count for part in self.parts(split))

    @property
    def digest(self) -> str:
        """One digest for all that the folder holds."""
        names = [f"{p.name} {p.sha256}" for split in SPLITS for p in self.parts(split)]
        return sha256_bytes("\n".join([*names, str(self.decoder_sha256)]).encode())

    def as_json(self) -> dict[str, Any]:
        """The index as it's written to `index.json`."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        return values | {split: [vars(part) for part in self.parts(split)] for split in SPLITS}


class Moments:
    """Mean and variance of a stream of vectors, in float64, by the pairwise update of Chan, Golub and LeVeque (1979).

    Example:
        >>> moments = Moments(1)
        >>> moments.update(np.array([[1.0], [3.0]]))
        >>> moments.mean.tolist(), moments.std.tolist()
        ([2.0], [1.0])
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = np.zeros(dim)
        self._squares = np.zeros(dim)

    def update(self, vectors: np.ndarray) -> None:
        """Takes in vectors with shape (n, D)."""
        n = len(vectors)
        if n == 0:
            return
        wide = vectors.astype(np.float64)
        mean = wide.mean(0)
        delta = mean - self.mean
        total = self.count + n
        self._squares += ((wide - mean) ** 2).sum(0) + delta**2 * (self.count * n / total)
        self.mean = self.mean + delta * (n / total)
        self.count = total

    @property
    def std(self) -> np.ndarray:
        """Standard deviation (the population's, divided by n), with shape (D,)."""
        return np.sqrt(self._squares / max(self.count, 1))


def write_part(folder: str | Path, split: str, number: int, codes: np.ndarray, labels: np.ndarray | None) -> CodePart:
    """Writes one file of codes.

    Arguments:
        folder: An existing folder.
        split: The split, which is the first part of the file name.
        number: Number of the file.
        codes: Codes, with shape (n, D).
        labels: Labels, with shape (n,), or none.

    Raises:
        DataError: When a code isn't finite.
    """
    from safetensors.numpy import save_file

    if not np.isfinite(codes).all():
        raise DataError(f"codes of split {split} aren't finite; the autoencoder that made them has diverged: train it again")
    arrays = {"codes": np.ascontiguousarray(codes, np.float32)}
    if labels is not None:
        arrays["labels"] = np.ascontiguousarray(labels, np.int64)
    path = Path(folder) / f"{split}-{number:06d}.safetensors"
    with atomic_file(path) as temporary:
        save_file(arrays, temporary)
    return CodePart(name=path.name, count=len(codes), bytes=path.stat().st_size, sha256=sha256_file(path))


def write_index(folder: str | Path, index: CodeIndex) -> None:
    """Writes `index.json` beside the codes."""
    write_json(Path(folder) / "index.json", index.as_json())


def _check_length(path: Path, part: CodePart) -> None:
    try:
        length = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}); run extract again") from None
    if length != part.bytes:
        raise DataError(f"{path} has {length} bytes instead of {part.bytes}: truncated or changed; run extract again")


class CodeReader:
    """Reads a folder of codes.

    Arguments:
        folder: The folder with `index.json`.

    Raises:
        DataError: When the index or, on reading, a file is missing, truncated, changed or holds something unexpected.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "index.json"
        values = read_json(path)
        if not isinstance(values, dict):
            raise DataError(f"{path} isn't an index of codes; run extract again")
        try:
            self.index = build(CodeIndex, values, str(path))
        except SettingsError as error:
            raise DataError(f"{error}; run extract again") from None
        dim = self.index.dim
        if dim < 1 or not len(self.index.mean) == len(self.index.std) == dim or min(self.index.std) < 0:
            raise DataError(f"{path}: dim, mean and std don't agree; run extract again")
        if self.index.value_range is not None and len(self.index.value_range) != 2:
            raise DataError(f"{path}: value_range isn't a pair; run extract again")
        for split in SPLITS:
            for number, part in enumerate(self.index.parts(split)):
                if part.name != f"{split}-{number:06d}.safetensors":
                    raise DataError(f"{path}: {part.name[:80]!r} is no file of codes; run extract again")
                if part.count < 1 or part.bytes < 4 * dim * part.count:
                    raise DataError(
                        f"{path}: {part.name} can't hold {str(part.count)[:30]} codes in {str(part.bytes)[:30]} bytes; "
                        "run extract again"
                    )
                _check_length(self.folder / part.name, part)
            if not self.index.parts(split):
                raise DataError(f"{path}: split {split} has no codes; run extract again")
        self._checked: set[str] = set()

    @property
    def decoder_path(self) -> Path | None:
        """Where the decoder lies, its digest checked; none for vectors."""
        if self.index.decoder_sha256 is None:
            return None
        path = self.folder / "decoder.safetensors"
        if not path.is_file() or sha256_file(path) != self.index.decoder_sha256:
            raise DataError(f"{path} is missing or doesn't match the digest in its index; run extract again")
        return path

    def counts(self, split: str) -> list[int]:
        """Number of codes in each file of a split."""
        return [part.count for part in self.index.parts(split)]

    def load(self, split: str, number: int) -> dict[str, np.ndarray]:
        """One file: "codes" with shape (n, D), and "labels" (n,) where there are any. The digest is checked the first time."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        part = self.index.parts(split)[number]
        path = self.folder / part.name
        _check_length(path, part)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} can't be read ({error.strerror}); run extract again") from None
        if part.name not in self._checked and sha256_bytes(data) != part.sha256:
            raise DataError(f"{path} doesn't match the digest in its index; run extract again")
        self._checked.add(part.name)
        try:
            arrays = load(data)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise DataError(f"{path} isn't a safetensors file ({error}); run extract again") from None
        codes = arrays.get("codes")
        if codes is None or codes.shape != (part.count, self.index.dim) or codes.dtype != np.float32:
            found = "no codes" if codes is None else f"codes of shape {codes.shape} and type {codes.dtype}"
            raise DataError(
                f"{path}: expected float32 codes of shape ({part.count}, {self.index.dim}), got {found}; run extract again"
            )
        if not np.isfinite(codes).all():
            raise DataError(f"{path} holds codes that aren't finite; run extract again")
        labels = arrays.get("labels", np.empty(part.count, np.int64))
        if arrays.keys() - {"codes", "labels"} or labels.shape != (part.count,) or labels.dtype != np.int64:
            raise DataError(f"{path} holds unexpected arrays; run extract again")
        return arrays

    def blocks(self, split: str, limit: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """The files of a split, one after another, up to `limit` codes in all."""
        left = math.inf if limit is None else limit
        for number in range(len(self.index.parts(split))):
            if left <= 0:
                return
            arrays = self.load(split, number)
            if len(arrays["codes"]) > left:
                arrays = {name: array[: int(left)] for name, array in arrays.items()}
            left -= len(arrays["codes"])
            yield arrays

    def stream(self, split: str) -> Callable[[], Iterator[np.ndarray]]:
        """A function that gives the codes of a split anew each time, file by file."""
        return lambda: (block["codes"] for block in self.blocks(split))
