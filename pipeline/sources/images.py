"""Your own images: a folder or a zip of them, at any depth.

Folders `train`, `val` (or `valid`, `validation`, `dev`) and `test`, all at one depth, are the split. Otherwise
it is drawn by seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.settings import check_that
from pipeline.sources.common.image_files import ImageFiles, SplitSettings, divide, find_images, folder_split, image_names

__all__ = ["Settings", "open_source"]


@dataclass(frozen=True, kw_only=True)
class Settings(SplitSettings):
    """A row of `datasets` with `source: images`.

    Attributes:
        fit: `crop` takes the centre square of each image, `pad` all of it on a white square.
        crop: For `crop`: side of the centre square as a share of the width, at most the height.
    """

    fit: Literal["crop", "pad"] = "crop"
    crop: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(0 < self.crop <= 1, "crop", "must be in (0, 1]")


def open_source(settings: Settings, root: Path) -> ImageFiles:
    """The source of a row; `root` is a folder of images, a zip, or a folder that holds one zip.

    Raises:
        DataError: When there are no images, or too few for an image in each split.
    """
    path = find_images(root, "put a folder or a zip of images there, or correct the row's root")
    names = image_names(path)
    own = folder_split(path, names, settings.split_seed) if settings.split == "own" else None
    return ImageFiles(path, divide(names, settings, own), settings, settings.crop if settings.fit == "crop" else None)
