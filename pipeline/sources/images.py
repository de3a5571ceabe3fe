"""A person's own images: a folder or a zip of them, at any depth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.settings import check_that
from pipeline.sources.common.image_files import ImageFiles, ImageSettings, find_images, image_names, seeded_split

__all__ = ["Settings", "open_source"]


@dataclass(frozen=True, kw_only=True)
class Settings(ImageSettings):
    """A row of `datasets` with `source: images`.

    Attributes:
        fit: `crop` takes the centre square of each image, `pad` all of it on a white square.
        crop: For `crop`: side of the centre square as a share of the width, at most the height.
        valid_share: Share of the images for validation.
        test_share: Share of the images for the test.
    """

    fit: Literal["crop", "pad"] = "crop"
    crop: float = 1.0
    valid_share: float = 0.1
    test_share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(0 < self.crop <= 1, "crop", "has to lie in (0, 1]")
        check_that(0 < self.valid_share < 1, "valid_share", "has to lie in (0, 1)")
        check_that(0 < self.test_share < 1 - self.valid_share, "test_share", "has to be positive and leave some to train on")


def open_source(settings: Settings, root: Path) -> ImageFiles:
    """The source of a row; `root` is a folder of images, a zip, or a folder that holds one zip.

    Raises:
        DataError: When there are no images, or too few for an image in each split.
    """
    path = find_images(root, "put a folder or a zip of images there, or mend the row's root")
    names = image_names(path)
    valid, test = (max(1, round(share * len(names))) for share in (settings.valid_share, settings.test_share))
    parts = seeded_split(len(names), valid, test, settings.split_seed)
    chosen = {split: [names[i] for i in numbers] for split, numbers in parts.items()}
    return ImageFiles(path, chosen, settings, settings.crop if settings.fit == "crop" else None)
