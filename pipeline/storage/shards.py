"""WebDataset shards of blocks: write, check, read.

A data set is a folder of tar files `{train,valid,test}-%06d.tar` and an `index.json`. Each tar holds blocks of at most 256
examples: `000000.examples.npy` with shape (n, C, H, W) uint8 or (n, D) float32, and `000000.labels.npy` with shape (n,) int64
where there are labels. A block a member, instead of an image a member, reads about a hundred times as fast. The index carries
counts, shape, range and a SHA-256 digest for each shard, which is checked whenever a shard is read.
"""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np

from pipeline.errors import DataError, SettingsError
from pipeline.settings import build
from pipeline.system.files import read_json, sha256_bytes, sha256_file, write_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BLOCK_EXAMPLES", "SPLITS", "Shard", "ShardIndex", "ShardReader", "ShardWriter", "scale_pixels"]

BLOCK_EXAMPLES = 256
SPLITS = ("train", "valid", "test")
MEMBERS = ("examples", "labels", "codes")  # the arrays that a block may hold

Arrays = dict[str, np.ndarray]

_AGAIN = "run the stage that writes it again"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file: its name, how many examples it holds, its length in bytes and its SHA-256 digest."""

    name: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What a folder of shards holds.

    Attributes:
        kind: `images` (uint8, or float32 in 0..1 for decoded samples) or `vectors` (float32).
        shape: Shape of an example: (C, H, W) or (D,).
        dtype: `uint8` or `float32`.
        value_range: What the pixels 0..255 stand for, (0, 1) or (-1, 1); null for vectors.
        label_names: Names of the labels; null where there are no labels or no names.
        train, valid, test, samples: The shards of each split, in order.
    """

    kind: Literal["images", "vectors"]
    shape: tuple[int, ...]
    dtype: Literal["uint8", "float32"]
    value_range: tuple[float, ...] | None = None
    label_names: tuple[str, ...] | None = None
    train: tuple[Shard, ...] = ()
    valid: tuple[Shard, ...] = ()
    test: tuple[Shard, ...] = ()
    samples: tuple[Shard, ...] = ()

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split, in order."""
        shards: tuple[Shard, ...] = getattr(self, split)
        return shards

    def count(self, split: str) -> int:
        """Number of examples of a split."""
        return sum(shard.count for shard in self.shards(split))

    @property
    def digest(self) -> str:
        """One digest for all that the folder holds, made from those of the shards."""
        names = [f"{s.name} {s.sha256}" for split in (*SPLITS, "samples") for s in self.shards(split)]
        return sha256_bytes("\n".join(names).encode())

    def as_json(self) -> dict[str, Any]:
        """The index as it's written to `index.json`."""
        values: dict[str, Any] = {"kind": self.kind, "shape": list(self.shape), "dtype": self.dtype}
        values["value_range"] = None if self.value_range is None else list(self.value_range)
        values["label_names"] = None if self.label_names is None else list(self.label_names)
        for split in (*SPLITS, "samples"):
            values[split] = [vars(shard) for shard in self.shards(split)]
        return values


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


class _Member(NamedTuple):
    """A member of a tar file: whether it's a plain file that lies within, and where."""

    name: str
    plain: bool
    start: int
    stop: int


class ShardWriter:
    """Writes the shards of one split into a folder; the same arrays give the same bytes.

    Arguments:
        folder: An existing folder, best a temporary one that is renamed when all is written.
        split: The split, which is the first part of each file name.
        shard_examples: Examples in a shard at most.
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
        self.shards: list[Shard] = []
        self._pending: list[Arrays] = []
        self._pending_count = 0
        self._tar: Any = None
        self._tar_count = self._tar_blocks = 0

    def write(self, **arrays: np.ndarray) -> None:
        """Appends examples: `examples` and, for all or none, `labels` and `codes`, of equal length."""
        count = len(arrays["examples"])
        start = 0
        while start < count:
            # Blocks are cut at fixed places, whatever pieces the examples come in, so that the bytes are the same.
            room = min(BLOCK_EXAMPLES, self.shard_examples - self._tar_count) - self._pending_count
            stop = min(start + room, count)
            self._pending.append({name: array[start:stop] for name, array in arrays.items() if array is not None})
            self._pending_count += stop - start
            start = stop
            if self._pending_count == min(BLOCK_EXAMPLES, self.shard_examples - self._tar_count):
                self._write_block()

    def _path(self) -> Path:
        return self.folder / f"{self.split}-{self.first + len(self.shards):06d}.tar"

    def _write_block(self) -> None:
        if self._tar is None:
            import webdataset

            # mtime: else the bytes differ in each run, and everything downstream reruns.
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
        path = self._path()
        self.shards.append(Shard(name=path.name, count=self._tar_count, bytes=path.stat().st_size, sha256=sha256_file(path)))
        self._tar, self._tar_count, self._tar_blocks = None, 0, 0

    def close(self) -> None:
        """Writes what is left. No shard is ever empty."""
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


def write_index(folder: str | Path, index: ShardIndex) -> None:
    """Writes `index.json` beside the shards."""
    write_json(Path(folder) / "index.json", index.as_json())


def read_index(folder: str | Path) -> ShardIndex:
    """Reads and checks `index.json`.

    Raises:
        DataError: When it's missing, isn't JSON, or says something impossible.
    """
    path = Path(folder) / "index.json"
    values = read_json(path)
    if not isinstance(values, dict):
        raise DataError(f"{path} isn't an index of shards; {_AGAIN}")
    try:
        index = build(ShardIndex, values, str(path))
    except SettingsError as error:
        raise DataError(f"{error}; {_AGAIN}") from None
    if len(index.shape) not in (1, 3) or (len(index.shape) == 3) != (index.kind == "images") or min(index.shape) < 1:
        raise DataError(f"{path}: impossible shape {list(index.shape)[:8]} of {index.kind}; {_AGAIN}")
    low, high = index.value_range if index.value_range and len(index.value_range) == 2 else (0.0, 0.0)
    if (low >= high) if index.kind == "images" else index.value_range is not None:
        raise DataError(f"{path}: impossible value_range of {index.kind}; {_AGAIN}")
    if not index.samples and not all(index.shards(split) for split in SPLITS):
        raise DataError(f"{path}: a split has no shards; {_AGAIN}")
    example_bytes = math.prod(index.shape) * np.dtype(index.dtype).itemsize
    for split in (*SPLITS, "samples"):
        for number, shard in enumerate(index.shards(split)):
            if shard.name != f"{split}-{number:06d}.tar":
                raise DataError(f"{path}: {shard.name[:80]!r} stands where {split}-{number:06d}.tar should; {_AGAIN}")
            if shard.count < 1 or shard.bytes < shard.count * example_bytes:
                counts = f"{str(shard.count)[:30]} examples in {str(shard.bytes)[:30]} bytes"
                raise DataError(f"{path}: {shard.name} can't hold {counts}; {_AGAIN}")
            _check_length(Path(folder) / shard.name, shard)
    return index


def _check_length(path: Path, shard: Shard) -> None:
    try:
        length = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}); {_AGAIN}") from None
    if length != shard.bytes:
        raise DataError(f"{path} has {length} bytes instead of {shard.bytes}: truncated or changed; {_AGAIN}")


class ShardReader:
    """Reads a folder of shards.

    Arguments:
        folder: The folder with `index.json`.

    Raises:
        DataError: When the index or, on reading, a shard is missing, truncated, changed or holds something unexpected.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = read_index(folder)

    def counts(self, split: str) -> list[int]:
        """Number of examples in each shard of a split."""
        return [shard.count for shard in self.index.shards(split)]

    def load(self, split: str, number: int) -> Arrays:
        """All examples of one shard: "examples" (n, ...), and "labels" (n,) or "codes" (n, D) where there are any."""
        blocks = list(self.blocks(split, [number]))
        return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

    def blocks(self, split: str, numbers: Iterable[int] | None = None) -> Iterator[Arrays]:
        """The blocks of a split in order, or of some of its shards.

        Memory holds one shard.
        """
        shards = self.index.shards(split)
        for number in range(len(shards)) if numbers is None else numbers:
            shard = shards[number]
            path = self.folder / shard.name
            data = self._checked_bytes(path, shard)
            total, names = 0, None
            for block in self._blocks(path, data):
                names = names or block.keys()
                total += len(block["examples"])
                if block.keys() != names or total > shard.count:
                    total = -1
                    break
                yield block
            if total != shard.count:
                raise DataError(f"{path} doesn't hold the {shard.count} examples that its index says; {_AGAIN}")

    def _checked_bytes(self, path: Path, shard: Shard) -> bytes:
        _check_length(path, shard)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} can't be read ({error.strerror}); {_AGAIN}") from None
        if sha256_bytes(data) != shard.sha256:
            raise DataError(f"{path} doesn't match the digest in its index; {_AGAIN}")
        return data

    def _blocks(self, path: Path, data: bytes) -> Iterator[Arrays]:
        """The blocks of a shard. Only plain files with the names that `ShardWriter` gives are understood, only as arrays."""
        block: Arrays = {}
        number = 0
        for member in self._members(path, data):
            key, _, ending = member.name.partition(".")
            name = ending.removesuffix(".npy")
            if not member.plain or name not in MEMBERS or not ending.endswith(".npy"):
                raise DataError(f"{path} holds an unexpected member {member.name[:80]!r}; {_AGAIN}")
            if block and key == f"{number + 1:06d}":
                yield self._whole(block, path)
                block, number = {}, number + 1
            if key != f"{number:06d}" or name in block:
                raise DataError(f"{path} holds {member.name[:80]!r} out of order; {_AGAIN}")
            block[name] = self._array(name, data[member.start : member.stop], path)
        if block:
            yield self._whole(block, path)

    @staticmethod
    def _members(path: Path, data: bytes) -> Iterator[_Member]:
        # By offsets, uncompressed: a compressed or sparse member could claim more memory than the file has bytes.
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                for info in tar:
                    plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not info.issparse() and not info.pax_headers
                    stop = info.offset_data + info.size
                    yield _Member(info.name, plain and info.size >= 0 and stop <= len(data), info.offset_data, stop)
        except (tarfile.TarError, ValueError, OSError, EOFError, OverflowError, RecursionError) as error:
            raise DataError(f"{path} isn't a readable shard ({type(error).__name__}: {error}); {_AGAIN}") from None

    @staticmethod
    def _whole(block: Arrays, path: Path) -> Arrays:
        if "examples" not in block or len({len(array) for array in block.values()}) != 1:
            raise DataError(f"{path} holds a block whose arrays don't belong together; {_AGAIN}")
        return block

    def _array(self, name: str, data: bytes, path: Path) -> np.ndarray:
        dtype, shape = {
            "examples": (self.index.dtype, self.index.shape),
            "labels": ("int64", ()),
            "codes": ("float32", None),
        }[name]
        stream = io.BytesIO(data)
        try:
            if np.lib.format.read_magic(stream) != (1, 0):
                raise ValueError("not version 1.0")
            header_shape, fortran, header_dtype = np.lib.format.read_array_header_1_0(stream)
        except Exception as error:  # NumPy parses the header as Python literals, and passes on whatever that raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise DataError(f"{path}: {name} isn't a plain .npy array ({reason}); {_AGAIN}") from None
        right = header_dtype == np.dtype(dtype) and not fortran and len(header_shape) >= 1 and min(header_shape) >= 1
        right = right and (header_shape[1:] == shape if shape is not None else len(header_shape) == 2)
        # The declared size is checked against what is there before anything is allocated.
        right = right and math.prod(header_shape) * header_dtype.itemsize == len(data) - stream.tell()
        if not right:
            raise DataError(f"{path}: {name} has type {header_dtype} and shape {header_shape}; {_AGAIN}")
        # A copy of its own: torch warns of arrays that can't be written to.
        array = np.frombuffer(data, header_dtype, offset=stream.tell()).reshape(header_shape).copy()
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise DataError(f"{path}: {name} aren't finite; {_AGAIN}")
        return array


@overload
def scale_pixels(examples: np.ndarray, value_range: tuple[float, ...] | None) -> np.ndarray: ...
@overload
def scale_pixels(examples: Tensor, value_range: tuple[float, ...] | None) -> Tensor: ...
def scale_pixels(examples: Any, value_range: tuple[float, ...] | None) -> Any:
    """Pixels as float32 in a range: x = low + (high - low) * pixel / 255 for uint8; anything else is returned as it is.

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
