"""UT Zappos50K: photographs of shoes on white (Yu and Grauman 2014), as a zip or a folder with one folder per category.

The images are padded to a square on white, like their background. The test images are balanced over the categories; the label
is the category.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import DataError
from pipeline.settings import check_that
from pipeline.sources.common.archives import open_files
from pipeline.sources.common.image_files import ImageFiles, ImageSettings, OwnSplit, find_images, image_names
from pipeline.sources.common.source import generator

__all__ = ["Settings", "open_source"]

WANTED = "download ut-zap50k-images.zip of UT Zappos50K (vision.cs.utexas.edu/projects/finegrained/utzap50k) and put it there"


@dataclass(frozen=True, kw_only=True)
class Settings(ImageSettings):
    """A row of `datasets` with `source: shoes`.

    Attributes:
        valid_count: Images for validation, drawn from all that aren't test images.
        test_count: Images for the test, balanced over the categories; 2,000 in the paper.
    """

    pixel_range: tuple[float, ...] = (-1.0, 1.0)
    valid_count: int = 1000
    test_count: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.valid_count >= 1, "valid_count", "must be at least 1")
        check_that(self.test_count >= 1, "test_count", "must be at least 1")


def _categories(names: tuple[str, ...], folders: tuple[str, ...], path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """The category of each file, with shape (N,), and their names: the first folders below those that all files share."""
    folders_of_files = [name.split("/")[:-1] for name in names]
    depth = 0
    while all(len(f) > depth for f in folders_of_files) and len({f[depth] for f in folders_of_files}) == 1:
        # A single folder with all files is a category if there is another folder, without files, next to it.
        shared = "/".join(folders_of_files[0][:depth])
        if sum(_is_below(folder, shared, depth) for folder in folders) > 1:
            break
        depth += 1
    for name, parts in zip(names, folders_of_files, strict=True):
        if len(parts) <= depth:
            raise DataError(f"{path}: {name} lies in no category; expected a folder for each category")
    shared = "/".join(folders_of_files[0][:depth])
    labels = sorted({f[depth] for f in folders_of_files})
    for folder in folders:
        if _is_below(folder, shared, depth) and folder.split("/")[depth] not in labels:
            raise DataError(f"{path}: category '{folder}' holds no image; take it out, or get the archive again")
    number = {label: i for i, label in enumerate(labels)}
    return np.array([number[f[depth]] for f in folders_of_files]), tuple(labels)


def _is_below(folder: str, parent: str, depth: int) -> bool:
    parts = folder.split("/")
    return len(parts) == depth + 1 and "/".join(parts[:depth]) == parent


def open_source(settings: Settings, root: Path) -> ImageFiles:
    """The source of a row; `root` is a zip, a folder that holds one, or a folder of category folders at any depth.

    Raises:
        DataError: When the images are missing, or a category holds none or too few.
    """
    path = find_images(root, WANTED, ["ut-zap50k-images.zip", "ut-zap50k-images"])
    names = image_names(path)
    labels, categories = _categories(names, open_files(path).folders, path)
    random = generator(settings.split_seed, "shoes")
    test: list[int] = []
    for i, category in enumerate(categories):
        members = np.flatnonzero(labels == i)
        share = settings.test_count // len(categories) + (i < settings.test_count % len(categories))
        if len(members) <= share:
            raise DataError(
                f"{path}: category '{category}' holds {len(members)} images, too few for its {share} of {settings.test_count} "
                "test images; take it out or lower test_count"
            )
        test += random.permutation(members)[:share].tolist()
    rest = random.permutation(np.setdiff1d(np.arange(len(names)), test))
    if len(rest) <= settings.valid_count:
        raise DataError(f"{path}: {len(names)} images leave none to train on; lower valid_count or test_count")
    parts = {"train": rest[settings.valid_count :], "valid": rest[: settings.valid_count], "test": random.permutation(test)}
    return ImageFiles(
        path,
        OwnSplit(
            names={split: [names[i] for i in numbers] for split, numbers in parts.items()},
            origin=f"balanced over categories, drawn by split_seed {settings.split_seed}",
        ),
        settings,
        crop=None,
        labels={split: labels[numbers] for split, numbers in parts.items()},
        label_names=categories,
    )
