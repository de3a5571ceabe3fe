"""BSDS300 (Martin et al. 2001): 8x8 grey patches of natural images, in the two published splits (section 4.1.2).

`rnade` draws patches from the images: 180 of the 200 training images to train, the other 20 to validate, the 100 test images
to test. Patch i of a split is from image i modulo their number. Its position and noise depend only on seed, split and i, so
the patches of a split are fixed, and none is kept in memory. The shards hold the patches: choose `train_count` so large that
training takes one or a few epochs, which amounts to fresh patches throughout. Another seed gives other patches.

`maf` reads the patches that Papamakarios et al. (2017) prepared, from BSDS300.hdf5. Scores of the two aren't comparable.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from pipeline.errors import DataError
from pipeline.settings import DatasetSettings, check_that
from pipeline.sources.common.archives import Files, FolderFiles, TarFiles, file_stamp
from pipeline.sources.common.image_files import decode, seeded_split
from pipeline.sources.common.patches import PatchPool, preprocess, to_grey
from pipeline.sources.common.source import GROUP, Block, Source, generator, read_in_groups

__all__ = ["DrawnPatches", "PreparedPatches", "Settings", "open_source"]

ARCHIVE, FOLDER, TABLE = "BSDS300-images.tgz", "BSDS300", "BSDS300.hdf5"
TABLE_NAMES = {"train": "train", "valid": "validation", "test": "test"}
DIM = 63
MAX_DEFLATE = 1032  # highest possible compression ratio
CACHE_BYTES = 2**20  # of h5py, for a table's chunks
MAX_CHUNK_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Settings(DatasetSettings):
    """A row of `datasets` with `source: bsds300`.

    Attributes:
        split: `rnade` draws patches from the images, `maf` reads BSDS300.hdf5, whose counts are fixed.
        train_count: For `rnade`: patches to train on; the paper's authors drew 2,700,000.
        valid_count: For `rnade`: patches to validate with.
        test_count: For `rnade`: patches to test with.
        valid_images: For `rnade`: number of training images for validation.
    """

    split: Literal["rnade", "maf"] = "rnade"
    train_count: int = 2_700_000
    valid_count: int = 20_000
    test_count: int = 1_000_000
    valid_images: int = 20
    drawn_as: ClassVar[str] = "patches"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.train_count >= 1, "train_count", "must be at least 1")
        check_that(self.valid_count >= 1, "valid_count", "must be at least 1")
        check_that(self.test_count >= 1, "test_count", "must be at least 1")
        check_that(self.valid_images >= 1, "valid_images", "must be at least 1")

    @property
    def shape(self) -> tuple[int, ...]:
        """(63,)."""
        return (DIM,)


# Split rnade --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _images(path: Path, stamp: tuple[int, int]) -> tuple[Files, dict[str, tuple[str, ...]]]:
    """The files, and the names of those in `images/train` and `images/test`."""
    ends = (".jpg", ".jpeg", ".png")
    files: Files = FolderFiles(path) if path.is_dir() else TarFiles(path, ends)
    names = {
        part: tuple(n for n in files.names if n.lower().endswith(ends) and f"/images/{part}/" in f"/{n}")
        for part in ("train", "test")
    }
    return files, names


@functools.lru_cache(maxsize=3)
def _pool(path: Path, stamp: tuple[int, int], names: tuple[str, ...]) -> PatchPool:
    """The named images, grey, in memory: 30 MB for 200 of them."""
    files, _ = _images(path, stamp)
    images = []
    for name in names:
        try:
            images.append(to_grey(np.asarray(decode(files.read(name)).convert("RGB"))))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: {name} can't be read ({' '.join(str(error).split())}); get the data set again") from None
    return PatchPool(images, [f"{path}: {name}" for name in names])


class DrawnPatches(Source):
    """Patches drawn from the images; the label of a patch is the number of its image within the split.

    Arguments:
        path: BSDS300-images.tgz, or the folder that it unpacks to.
        settings: The row of `datasets`.

    Raises:
        DataError: When it's damaged or holds too few images.
    """

    kind = "vectors"

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.seed = path, settings.split_seed
        names = _images(path, file_stamp(path))[1]
        if len(names["train"]) <= settings.valid_images or not names["test"]:
            raise DataError(
                f"{path} holds {len(names['train'])} images in images/train and {len(names['test'])} in images/test; "
                f"expected more than valid_images ({settings.valid_images}) and at least one (200 and 100 in BSDS300)"
            )
        parts = seeded_split(len(names["train"]), settings.valid_images, 0, settings.split_seed)
        # In the order of their names, which defines an image's number.
        self.names = {split: tuple(names["train"][i] for i in np.sort(parts[split])) for split in ("train", "valid")}
        self.names["test"] = names["test"]
        self.counts = {"train": settings.train_count, "valid": settings.valid_count, "test": settings.test_count}

    def _draw(self, split: str, group: int) -> np.ndarray:
        random = generator(self.seed, "bsds300", split, group)
        pool = _pool(self.path, file_stamp(self.path), self.names[split])
        members = (group * GROUP + np.arange(GROUP)) % len(self.names[split])
        return preprocess(pool.draw(members, random), random)

    def read(self, split: str, start: int, stop: int) -> Block:
        """Vectors, float32 with shape (n, 63), and the number of the image of each."""
        vectors = read_in_groups(lambda g: self._draw(split, g), start, stop)
        return Block(examples=vectors, labels=np.arange(start, stop) % len(self.names[split]))


# Split maf ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _open_tables(path: Path, stamp: tuple[int, int], process: int) -> dict[str, Any]:
    """The open tables of the hdf5 file, by name, for each process."""
    import h5py

    try:
        file = h5py.File(path, "r")
        for name in TABLE_NAMES.values():
            # Neither links nor tables with data in other files are followed.
            if not isinstance(file.get(name, getlink=True), h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
                raise DataError(f"{path} holds no dataset '{name}'; expected train, validation and test")
            _check_table(file[name], f"{path}: '{name}'")
        # The cache must hold a chunk; otherwise each read would inflate it again.
        chunk_bytes = max(_chunk_bytes(file[name]) for name in TABLE_NAMES.values())
        if chunk_bytes > CACHE_BYTES:
            file.close()
            file = h5py.File(path, "r", rdcc_nbytes=chunk_bytes)
        tables = {name: file[name] for name in TABLE_NAMES.values()}  # stay open, since a cache belongs to an open table
    except DataError:
        raise
    except Exception as error:  # h5py raises whatever it came across in a broken file
        raise DataError(f"{path} isn't a whole hdf5 file ({' '.join(str(error).split())}); get it again") from None
    return tables


def _check_table(table: Any, where: str) -> None:
    if table.is_virtual or table.external:
        raise DataError(f"{where} keeps its data in another file; get it again")
    if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] != DIM or table.dtype.kind != "f":
        raise DataError(f"{where} has shape {table.shape} and type {table.dtype}; expected float32 with {DIM} columns")
    if table.nbytes > MAX_DEFLATE * table.id.get_storage_size():
        raise DataError(f"{where} declares {table.shape[0]} rows and stores far fewer; get it again")
    if _chunk_bytes(table) > MAX_CHUNK_BYTES:
        raise DataError(f"{where} has chunks of more than {MAX_CHUNK_BYTES >> 20} MiB; write it again with smaller ones")


def _chunk_bytes(table: Any) -> int:
    """Length of a table's chunk after inflating."""
    return math.prod(table.chunks) * int(table.dtype.itemsize) if table.chunks else 0


class PreparedPatches(Source):
    """The patches of BSDS300.hdf5, in its order.

    Arguments:
        path: The file.

    Raises:
        DataError: When it's damaged, or hasn't datasets train, validation and test with 63 columns.
    """

    kind = "vectors"

    def __init__(self, path: Path) -> None:
        self.path = path
        tables = self._tables()
        self.counts = {split: int(tables[name].shape[0]) for split, name in TABLE_NAMES.items()}

    def _tables(self) -> dict[str, Any]:
        return _open_tables(self.path, file_stamp(self.path), os.getpid())

    def read(self, split: str, start: int, stop: int) -> Block:
        """Vectors, float32 with shape (n, 63)."""
        name = TABLE_NAMES[split]
        try:
            vectors: np.ndarray = self._tables()[name][start:stop].astype(np.float32)
        except DataError:
            raise
        except Exception as error:  # h5py raises whatever it came across in a broken file
            raise DataError(f"{self.path}: '{name}' can't be read ({' '.join(str(error).split())}); get it again") from None
        wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if wrong.size:
            raise DataError(f"{self.path}: row {start + wrong[0]} of '{name}' isn't finite; get it again")
        return Block(examples=vectors)


def open_source(settings: Settings, root: Path) -> DrawnPatches | PreparedPatches:
    """The source of a row; `root` is the archive, the unpacked folder or the hdf5 file, or a folder that holds it.

    Raises:
        DataError: When the file that the split needs is missing or damaged.
    """
    if settings.split == "maf":
        path = root / TABLE if root.is_dir() else root
        if not path.is_file():
            raise DataError(
                f"{path} is missing; download data.tar.gz of Papamakarios et al. (doi.org/10.5281/zenodo.1161203) "
                f"and put its BSDS300/{TABLE} there"
            )
        return PreparedPatches(path)
    for path in (root,) if root.is_file() else (root / ARCHIVE, root / FOLDER, root):
        if path.is_file() or (path / "images").is_dir():
            return DrawnPatches(path, settings)
    raise DataError(
        f"{root} holds neither {ARCHIVE} nor the folder {FOLDER}; download {ARCHIVE} of the Berkeley Segmentation Dataset "
        "(www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds) and put it there"
    )
