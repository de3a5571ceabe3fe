"""Fashion-MNIST: 70,000 grey images of 28x28 pixels in four IDX files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.sources.common.classes import of_classes
from pipeline.sources.common.idx import IdxImages, IdxSettings, download_by_torchvision
from pipeline.sources.common.source import Source

__all__ = ["Settings", "download", "open_source"]

LABEL_NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
TORCHVISION = "FashionMNIST"


@dataclass(frozen=True, kw_only=True)
class Settings(IdxSettings):
    """A row of `datasets` with `source: fashion_mnist`."""


def open_source(settings: Settings, root: Path) -> Source:
    """The source of a row; `root` is the folder with the four files, or the one given to torchvision.

    Raises:
        DataError: When a file is missing or damaged, or holds too few images.
    """
    return of_classes(IdxImages(root, settings, LABEL_NAMES, TORCHVISION), settings)


def download(settings: Settings, root: Path) -> None:
    """Downloads the files through torchvision into `root/FashionMNIST/raw`.

    Raises:
        DataError: When they can't be had.
    """
    download_by_torchvision(root, TORCHVISION)
