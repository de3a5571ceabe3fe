"""Latent codes on disk: write, check, stream.

`data/codes/<name>` is self-contained. It holds one safetensors file per shard, `{train,valid,test}-%06d.safetensors`, with
"codes" (n, D) float32, "labels" (n,) int64 if there are any, and "context" (n, C) float32 if there are columns to condition on;
an `index.json` with counts, digests, and the training codes' mean and standard deviation; and `decoder.safetensors` or
`decoder.onnx`, which turns codes back into images. Codes of vectors and of an encoder alone have no decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import DataError
from pipeline.storage.columns import Column, VectorMoments, log_volume, varying
from pipeline.storage.parts import Arrays, ContextColumn, Part, PartIndex, PartReader, part_name, part_of
from pipeline.system.files import atomic_file, sha256_file

__all__ = ["ArrayCodes", "CodeIndex", "CodeReader", "write_part"]


@dataclass(frozen=True, kw_only=True)
class CodeIndex(PartIndex):
    """Index of a folder of codes.

    Attributes:
        dim: Length D of a code.
        mean: Mean of the training codes, D numbers.
        std: Standard deviation of the training codes, D numbers.
        source_digest: Digest of the encoded shards.
        decoder_sha256: Digest of the decoder's file; null without a decoder.
        value_range: Range of the decoded pixels; null for vectors.
        label_names: Names of the labels; null if there are none.
        context: Columns that belong to each code; left out of the file if there are none.
        columns: The columns of the table that the codes are rows of.
        train, valid, test: The files of each split, in order.
    """

    dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source_digest: str
    decoder_sha256: str | None = None
    value_range: tuple[float, ...] | None = None
    label_names: tuple[str, ...] | None = None
    context: tuple[ContextColumn, ...] = ()
    columns: tuple[Column, ...] = ()
    train: tuple[Part, ...] = ()
    valid: tuple[Part, ...] = ()
    test: tuple[Part, ...] = ()

    @property
    def log_volume(self) -> float:
        """What turns a log-likelihood of codes, in nats, into one in the units of the table; 0 for other codes."""
        return log_volume(self.columns)

    def _digests(self) -> list[str]:
        return [*super()._digests(), str(self.decoder_sha256)]


def write_part(
    folder: str | Path,
    split: str,
    number: int,
    codes: np.ndarray,
    labels: np.ndarray | None = None,
    context: np.ndarray | None = None,
) -> Part:
    """Writes one file of codes.

    Arguments:
        folder: An existing folder.
        split: The split, the first part of the file name.
        number: Number of the file.
        codes: Codes, with shape (n, D).
        labels: Labels, with shape (n,), or None.
        context: Columns to condition on, with shape (n, C), or None.

    Raises:
        DataError: When a code isn't finite.
    """
    from safetensors.numpy import save_file

    if not np.isfinite(codes).all():
        raise DataError(f"codes of split {split} aren't finite; the autoencoder that made them has diverged: train it again")
    arrays = {"codes": np.ascontiguousarray(codes, np.float32)}
    if labels is not None:
        arrays["labels"] = np.ascontiguousarray(labels, np.int64)
    if context is not None:
        arrays["context"] = np.ascontiguousarray(context, np.float32)
    path = Path(folder) / part_name(split, number, "safetensors")
    with atomic_file(path) as temporary:
        save_file(arrays, temporary)
    return part_of(path, len(codes))


class CodeReader(PartReader[CodeIndex]):
    """Reads a folder of codes.

    Arguments:
        folder: The folder with `index.json`.

    Raises:
        DataError: When the index or, on reading, a file is missing, truncated, changed or holds something unexpected.
    """

    index_type = CodeIndex
    ending = "safetensors"
    remedy = "run extract again"

    def _impossible(self, index: CodeIndex) -> str:
        if index.dim < 1 or not len(index.mean) == len(index.std) == index.dim or min(index.std) < 0:
            return "dim, mean and std don't agree"
        if index.columns and len(varying(index.columns)) != index.dim:
            return "dim isn't that of its columns"
        if index.value_range is not None and len(index.value_range) != 2:
            return "value_range isn't a pair"
        return next((f"split {split} has no codes" for split in index.splits if not index.parts(split)), "")

    def _example_bytes(self, index: CodeIndex) -> int:
        return 4 * index.dim

    @property
    def decoder_path(self) -> Path | None:
        """Path of the decoder, after checking its digest; None for vectors."""
        if self.index.decoder_sha256 is None:
            return None
        path, given = self.folder / "decoder.safetensors", self.folder / "decoder.onnx"
        path = given if given.exists() else path
        if not path.is_file() or sha256_file(path) != self.index.decoder_sha256:
            raise self._error(f"{path} is missing or doesn't match the digest in its index")
        return path

    def load(self, split: str, number: int) -> Arrays:
        """One file: "codes" with shape (n, D), and "labels" (n,) and "context" (n, C) if there are any."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        part = self.index.parts(split)[number]
        path = self.folder / part.name
        data = self._bytes(part)
        try:
            arrays = load(data)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise self._error(f"{path} isn't a safetensors file ({error})") from None
        codes = arrays.get("codes")
        if codes is None or codes.shape != (part.count, self.index.dim) or codes.dtype != np.float32:
            description = "no codes" if codes is None else f"codes of shape {codes.shape} and type {codes.dtype}"
            raise self._error(f"{path}: expected float32 codes of shape ({part.count}, {self.index.dim}), got {description}")
        if not np.isfinite(codes).all():
            raise self._error(f"{path} holds codes that aren't finite")
        labels = arrays.get("labels", np.empty(part.count, np.int64))
        context = arrays.get("context", np.empty((part.count, 0), np.float32))
        wrong = arrays.keys() - {"codes", "labels", "context"} or labels.shape != (part.count,) or labels.dtype != np.int64
        if wrong or context.shape != (part.count, len(self.index.context)) or context.dtype != np.float32:
            raise self._error(f"{path} holds unexpected arrays")
        return arrays

    def blocks(self, split: str, limit: int | None = None) -> Iterator[Arrays]:
        """The files of a split, one after another, up to `limit` codes in all."""
        remaining = math.inf if limit is None else limit
        for number in range(len(self.index.parts(split))):
            if remaining <= 0:
                return
            arrays = self.load(split, number)
            if len(arrays["codes"]) > remaining:
                arrays = {name: array[: int(remaining)] for name, array in arrays.items()}
            remaining -= len(arrays["codes"])
            yield arrays

    def context(self, arrays: Arrays, names: Sequence[str]) -> np.ndarray:
        """Columns that belong to the codes of a block, such as `labels`, float32 with shape (n, C).

        Raises:
            DataError: When the codes have no column of a name.
        """
        columns = {column.name: arrays["context"][:, i] for i, column in enumerate(self.index.context)}
        columns |= {"labels": arrays["labels"]} if "labels" in arrays else {}
        for name in names:
            if name not in columns:
                known = ", ".join(columns) or "none"
                raise DataError(f"the codes in {self.folder} have no column '{name}' to condition on; they have {known}")
        return np.stack([columns[name].astype(np.float32) for name in names], axis=1)

    def words(self, name: str) -> tuple[str, ...] | None:
        """What the levels of a column of categories are called, () for numbers as names; None for a column of numbers."""
        if name == "labels":
            return self.index.label_names or ()
        return next((column.words for column in self.index.context if column.name == name), None)

    def stream(self, split: str) -> Callable[[], Iterator[np.ndarray]]:
        """A function that gives a new pass over the codes of a split, file by file."""
        return lambda: (block["codes"] for block in self.blocks(split))


class ArrayCodes(CodeReader):
    """Codes in memory, with the interface of a folder of codes.

    Arguments:
        train: Training codes, float32 with shape (N, D).
        valid: Validation codes, float32 with shape (M, D).
    """

    def __init__(self, train: np.ndarray, valid: np.ndarray) -> None:
        self._arrays = {"train": train, "valid": valid}
        moments = VectorMoments(train.shape[1])
        moments.update(train)
        parts = [(Part(name=split, count=len(array), bytes=0, sha256=""),) for split, array in self._arrays.items()]
        mean, std = tuple(moments.mean), tuple(moments.std)
        self.index = CodeIndex(dim=len(mean), mean=mean, std=std, source_digest="", train=parts[0], valid=parts[1])

    def load(self, split: str, number: int) -> dict[str, np.ndarray]:
        """The codes of a split."""
        return {"codes": self._arrays[split]}
