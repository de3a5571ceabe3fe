"""8x8 grey patches of the two photographs that scikit-learn holds, by the preprocessing of BSDS300.

Each photograph (427x640) is cut into 10 x 16 tiles of 42x40 pixels. Tile (r, c) takes turn (2 r + c) mod 5: 0, 1 and 2
train, 3 validates, 4 tests. A patch is within one tile, so the splits share no pixel, and each covers every part of the scene.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from pipeline.errors import DataError
from pipeline.settings import DatasetSettings, check_that
from pipeline.sources.common.patches import PatchPool, preprocess, to_grey
from pipeline.sources.common.source import GROUP, Block, Source, check_digest, generator, packaged_file, read_in_groups

__all__ = ["PhotoPatches", "Settings", "open_source"]

# By name, the SHA-256 of the file: another release of the package can't change the data unnoticed.
PHOTOGRAPHS = {
    "china": "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
    "flower": "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
}
TILE_ROWS, TILE_COLUMNS = 10, 16
TILE_PX = (42, 40)  # height, width
TURNS = {"train": (0, 1, 2), "valid": (3,), "test": (4,)}


@dataclass(frozen=True, kw_only=True)
class Settings(DatasetSettings):
    """A row of `datasets` with `source: patches`.

    Attributes:
        train_count: Patches to train on.
        valid_count: Patches to validate with.
        test_count: Patches to test with.
    """

    train_count: int = 50_000
    valid_count: int = 2_000
    test_count: int = 5_000
    drawn_as: ClassVar[str] = "patches"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.train_count >= 1, "train_count", "must be at least 1")
        check_that(self.valid_count >= 1, "valid_count", "must be at least 1")
        check_that(self.test_count >= 1, "test_count", "must be at least 1")

    @property
    def shape(self) -> tuple[int, ...]:
        """(63,)."""
        return (63,)


def _places(split: str) -> list[tuple[int, int]]:
    """Row and column of each tile of a split."""
    places = [(r, c) for r in range(TILE_ROWS) for c in range(TILE_COLUMNS)]
    return [(r, c) for r, c in places if (2 * r + c) % 5 in TURNS[split]]


@functools.lru_cache(maxsize=3)
def _tiles(split: str) -> PatchPool:
    """The tiles of a split: those of the first photograph, then those of the second."""
    from PIL import Image, UnidentifiedImageError

    images, names = [], []
    for photograph, digest in PHOTOGRAPHS.items():
        path = packaged_file("sklearn", "datasets", "images", f"{photograph}.jpg")
        try:
            check_digest(path.read_bytes(), digest, path, "scikit-learn==1.9.1", "patches")
            with Image.open(path) as file:
                grey = to_grey(np.asarray(file.convert("RGB")))
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{path} can't be read ({error}); install scikit-learn again") from None
        height, width = TILE_PX
        images += [grey[height * r : height * (r + 1), width * c : width * (c + 1)] for r, c in _places(split)]
        names += [f"{path}, tile {r}, {c}" for r, c in _places(split)]
    return PatchPool(images, names)


class PhotoPatches(Source):
    """Patches of the packaged photographs, drawn by seed; patch i lies in tile i modulo their number.

    Arguments:
        settings: The row of `datasets`.
    """

    kind = "vectors"
    label_names = tuple(PHOTOGRAPHS)

    def __init__(self, settings: Settings) -> None:
        self.seed = settings.split_seed
        self.counts = {"train": settings.train_count, "valid": settings.valid_count, "test": settings.test_count}

    def _draw(self, split: str, group: int) -> np.ndarray:
        random = generator(self.seed, "patches", split, group)
        members = (group * GROUP + np.arange(GROUP)) % (len(PHOTOGRAPHS) * len(_places(split)))
        return preprocess(_tiles(split).draw(members, random), random)

    def read(self, split: str, start: int, stop: int) -> Block:
        """Vectors, float32 with shape (n, 63), and the number of the photograph of each."""
        tiles = np.arange(start, stop) % (len(PHOTOGRAPHS) * len(_places(split)))
        vectors = read_in_groups(lambda g: self._draw(split, g), start, stop)
        return Block(examples=vectors, labels=tiles // len(_places(split)))


def open_source(settings: Settings, root: Path) -> PhotoPatches:
    """The source of a row; `root` isn't read, since the package holds the photographs."""
    return PhotoPatches(settings)
