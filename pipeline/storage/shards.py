"""WebDataset shards of blocks: write, check, read.

A data set is a folder of tar files `{train,valid,test}-%06d.tar` and an `index.json`. Each tar holds blocks of at most 256
examples: `000000.examples.npy` with shape (n, C, H, W) uint8 or (n, D) float32, `000000.labels.npy` with shape (n,) int64
if there are labels, and `000000.context.npy` with shape (n, C) float32 if there are columns to condition on. One block per
member, instead of one image per member, reads about a hundred times as fast. The index has counts, shape, range and a SHA-256
digest per shard, which is checked whenever a shard is read.
"""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, overload

import numpy as np

from pipeline.storage.columns import Column, varying
from pipeline.storage.parts import SPLITS, Arrays, ContextColumn, Part, PartIndex, PartReader, part_name, part_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BLOCK_EXAMPLES", "ShardIndex", "ShardReader", "ShardWriter", "from_unit", "scale_pixels", "to_unit"]

BLOCK_EXAMPLES = 256
MEMBERS = ("examples", "labels", "context", "codes")  # the arrays that a block may hold


@dataclass(frozen=True, kw_only=True)
class ShardIndex(PartIndex):
    """Index of a folder of shards.

    Attributes:
        kind: `images` (uint8, or float32 in 0..1 for decoded samples) or `vectors` (float32).
        shape: Shape of an example: (C, H, W) or (D,).
        dtype: `uint8`, `float32`, or `float64` for samples in the units of a table.
        value_range: Range that the pixels 0..255 are scaled to, (0, 1) or (-1, 1); null for vectors.
        label_names: Names of the labels; null if there are no labels or no names.
        context: Columns that belong to each example; left out of the file if there are none.
        columns: The columns of the table that vectors are rows of.
        train, valid, test, samples: The shards of each split, in order.
    """

    splits: ClassVar = (*SPLITS, "samples")

    kind: Literal["images", "vectors"]
    shape: tuple[int, ...]
    dtype: Literal["uint8", "float32", "float64"]
    value_range: tuple[float, ...] | None = None
    label_names: tuple[str, ...] | None = None
    context: tuple[ContextColumn, ...] = ()
    columns: tuple[Column, ...] = ()
    train: tuple[Part, ...] = ()
    valid: tuple[Part, ...] = ()
    test: tuple[Part, ...] = ()
    samples: tuple[Part, ...] = ()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


class _Member(NamedTuple):
    """A member of a tar file: its position, and whether it's a plain file within it."""

    name: str
    plain: bool
    start: int
    stop: int


class ShardWriter:
    """Writes the shards of one split into a folder; the same arrays give the same bytes.

    Arguments:
        folder: An existing folder, preferably a temporary one that is renamed when everything is written.
        split: The split, the first part of each file name.
        shard_examples: Examples per shard, at most.
        first: Number of the first shard; several writers (ranks) may each write their own.

    Example:
        >>> import tempfile
        >>> with ShardWriter(tempfile.mkdtemp(), "train", shard_examples=300) as writer:
        ...     writer.write(examples=np.zeros((400, 2), np.float32))
        >>> [(shard.name, shard.count) for shard in writer.shards]
        [('train-000000.tar', 300), ('train-000001.tar', 100)]
    """

    def __init__(self, folder: str | Path, split: str, shard_examples: int = 4096, first: int = 0) -> None:
        self.folder, self.split, self.shard_examples, self.first = Path(folder), split, shard_examples, first
        self.shards: list[Part] = []
        self._pending: list[Arrays] = []
        self._pending_count = 0
        self._tar: Any = None
        self._tar_count = self._tar_blocks = 0

    def write(self, **arrays: np.ndarray) -> None:
        """Appends examples: `examples`, and `labels`, `context` and `codes` in every call or in none, all of equal length."""
        count = len(arrays["examples"])
        start = 0
        while start < count:
            # Blocks are cut at fixed positions: the bytes don't depend on how the examples arrive.
            room = min(BLOCK_EXAMPLES, self.shard_examples - self._tar_count) - self._pending_count
            stop = min(start + room, count)
            self._pending.append({name: array[start:stop] for name, array in arrays.items() if array is not None})
            self._pending_count += stop - start
            start = stop
            if self._pending_count == min(BLOCK_EXAMPLES, self.shard_examples - self._tar_count):
                self._write_block()

    def _path(self) -> Path:
        return self.folder / part_name(self.split, self.first + len(self.shards), "tar")

    def _write_block(self) -> None:
        if self._tar is None:
            import webdataset

            # mtime: otherwise the bytes differ in each run, and everything downstream reruns.
            self._tar = webdataset.TarWriter(str(self._path()), mtime=0, encoder=False)
        block = {name: np.concatenate([part[name] for part in self._pending]) for name in self._pending[0]}
        self._tar.write({"__key__": f"{self._tar_blocks:06d}"} | {f"{n}.npy": _npy(block[n]) for n in MEMBERS if n in block})
        self._tar_count += self._pending_count
        self._tar_blocks += 1
        self._pending, self._pending_count = [], 0
        if self._tar_count == self.shard_examples:
            self._close_shard()

    def _close_shard(self) -> None:
        self._tar.close()
        self.shards.append(part_of(self._path(), self._tar_count))
        self._tar, self._tar_count, self._tar_blocks = None, 0, 0

    def close(self) -> None:
        """Writes the remaining examples. No shard is ever empty."""
        if self._pending_count:
            self._write_block()
        if self._tar is not None:
            self._close_shard()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None:
            self._tar.close()


class ShardReader(PartReader[ShardIndex]):
    """Reads a folder of shards.

    Arguments:
        folder: The folder with `index.json`.

    Raises:
        DataError: When the index or, on reading, a shard is missing, truncated, changed or holds something unexpected.
    """

    index_type = ShardIndex
    ending = "tar"
    remedy = "run the stage that writes it again"

    def _impossible(self, index: ShardIndex) -> str:
        if len(index.shape) not in (1, 3) or (len(index.shape) == 3) != (index.kind == "images") or min(index.shape) < 1:
            return f"impossible shape {list(index.shape)[:8]} of {index.kind}"
        low, high = index.value_range if index.value_range and len(index.value_range) == 2 else (0.0, 0.0)
        if (low >= high) if index.kind == "images" else index.value_range is not None:
            return f"impossible value_range of {index.kind}"
        if index.columns and index.shape != (len(index.columns if index.samples else varying(index.columns)),):
            return "the shape isn't that of its columns"
        if not index.samples and not all(index.parts(split) for split in SPLITS):
            return "a split has no shards"
        return ""

    def _example_bytes(self, index: ShardIndex) -> int:
        return math.prod(index.shape) * np.dtype(index.dtype).itemsize

    def load(self, split: str, number: int) -> Arrays:
        """All examples of one shard: "examples" (n, ...), and "labels" (n,) or "codes" (n, D) if there are any."""
        blocks = list(self.blocks(split, [number]))
        return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

    def first(self, split: str, count: int) -> Arrays:
        """The first `count` examples of a split, or all if there are fewer."""
        blocks: list[Arrays] = []
        for block in self.blocks(split):
            blocks.append(block)
            if sum(len(part["examples"]) for part in blocks) >= count:
                break
        return {name: np.concatenate([part[name] for part in blocks])[:count] for name in blocks[0]}

    def blocks(self, split: str, numbers: Iterable[int] | None = None) -> Iterator[Arrays]:
        """The blocks of a split, or of some of its shards, in order.

        Memory holds one shard.
        """
        shards = self.index.parts(split)
        for number in range(len(shards)) if numbers is None else numbers:
            shard = shards[number]
            path = self.folder / shard.name
            data = self._bytes(shard)
            total, names = 0, None
            for block in self._blocks(path, data):
                names = names or block.keys()
                total += len(block["examples"])
                if block.keys() != names or total > shard.count:
                    total = -1
                    break
                yield block
            if total != shard.count:
                raise self._error(f"{path} doesn't hold the {shard.count} examples that its index says")

    def _blocks(self, path: Path, data: bytes) -> Iterator[Arrays]:
        """The blocks of a shard. Only plain files with `ShardWriter`'s names are accepted, and only as arrays."""
        block: Arrays = {}
        number = 0
        for member in self._members(path, data):
            key, _, ending = member.name.partition(".")
            name = ending.removesuffix(".npy")
            if not member.plain or name not in MEMBERS or not ending.endswith(".npy"):
                raise self._error(f"{path} holds an unexpected member {member.name[:80]!r}")
            if block and key == f"{number + 1:06d}":
                yield self._whole(block, path)
                block, number = {}, number + 1
            if key != f"{number:06d}" or name in block:
                raise self._error(f"{path} holds {member.name[:80]!r} out of order")
            block[name] = self._array(name, data[member.start : member.stop], path)
        if block:
            yield self._whole(block, path)

    def _members(self, path: Path, data: bytes) -> Iterator[_Member]:
        # By offsets, uncompressed: a compressed or sparse member could expand to more memory than the file has bytes.
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                for info in tar:
                    plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not info.issparse() and not info.pax_headers
                    stop = info.offset_data + info.size
                    yield _Member(info.name, plain and info.size >= 0 and stop <= len(data), info.offset_data, stop)
        except (tarfile.TarError, ValueError, OSError, EOFError, OverflowError, RecursionError) as error:
            raise self._error(f"{path} isn't a readable shard ({type(error).__name__}: {error})") from None

    def _whole(self, block: Arrays, path: Path) -> Arrays:
        if "examples" not in block or len({len(array) for array in block.values()}) != 1:
            raise self._error(f"{path} holds a block whose arrays don't belong together")
        return block

    def _array(self, name: str, data: bytes, path: Path) -> np.ndarray:
        dtype, shape = {
            "examples": (self.index.dtype, self.index.shape),
            "labels": ("int64", ()),
            "context": ("float32", (len(self.index.context),)),
            "codes": ("float32", None),
        }[name]
        stream = io.BytesIO(data)
        try:
            if np.lib.format.read_magic(stream) != (1, 0):
                raise ValueError("not version 1.0")
            header_shape, fortran, header_dtype = np.lib.format.read_array_header_1_0(stream)
        except Exception as error:  # NumPy parses the header as Python literals, which can raise errors of many types
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise self._error(f"{path}: {name} isn't a plain .npy array ({reason})") from None
        right = header_dtype == np.dtype(dtype) and not fortran and len(header_shape) >= 1 and min(header_shape) >= 1
        right = right and (header_shape[1:] == shape if shape is not None else len(header_shape) == 2)
        # Check the declared size against the actual one before allocating anything.
        right = right and math.prod(header_shape) * header_dtype.itemsize == len(data) - stream.tell()
        if not right:
            raise self._error(f"{path}: {name} has type {header_dtype} and shape {header_shape}")
        # A copy: torch warns of read-only arrays.
        array = np.frombuffer(data, header_dtype, offset=stream.tell()).reshape(header_shape).copy()
        if array.dtype in (np.float32, np.float64) and not np.isfinite(array).all():
            raise self._error(f"{path}: {name} aren't finite")
        return array


@overload
def scale_pixels(examples: np.ndarray, value_range: tuple[float, ...] | None) -> np.ndarray: ...
@overload
def scale_pixels(examples: Tensor, value_range: tuple[float, ...] | None) -> Tensor: ...
def scale_pixels(examples: Any, value_range: tuple[float, ...] | None) -> Any:
    """Pixels as float32 in a range: x = low + (high - low) * pixel / 255 for uint8; other types are returned unchanged.

    Arrays and tensors give the same numbers.

    Example:
        >>> scale_pixels(np.array([0, 255], np.uint8), (-1.0, 1.0)).tolist()
        [-1.0, 1.0]
    """
    if not str(examples.dtype).endswith("uint8") or value_range is None:
        return examples
    low, high = value_range
    step = np.float32((high - low) / 255)
    if isinstance(examples, np.ndarray):
        return np.float32(low) + examples.astype(np.float32) * step
    return float(np.float32(low)) + examples.float() * float(step)


def to_unit(images: Tensor, value_range: tuple[float, ...]) -> Tensor:
    """Images in a range as images in 0..1: (x - low) / (high - low).

    Example:
        >>> import torch
        >>> to_unit(torch.tensor([-1.0, 0.0, 1.0]), (-1.0, 1.0))
        tensor([0.0000, 0.5000, 1.0000])
    """
    low, high = value_range
    return (images - low) / (high - low)


def from_unit(images: Tensor, value_range: tuple[float, ...]) -> Tensor:
    """Images in 0..1 as images in a range: low + (high - low) * x, the inverse of `to_unit`."""
    low, high = value_range
    return low + (high - low) * images
