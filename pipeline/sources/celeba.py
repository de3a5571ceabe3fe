"""CelebA: 202,599 aligned faces (Liu et al. 2015, "Deep Learning Face Attributes in the Wild"), as a zip or a folder.

The official split is used if its list, `list_eval_partition.txt` or Kaggle's `.csv`, is next to the images or inside their
zip; otherwise the split is drawn by seed. Attributes of `list_attr_celeba.txt`, or Kaggle's `.csv`, can be carried along.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.errors import DataError
from pipeline.settings import check_that
from pipeline.sources.common.archives import open_files
from pipeline.sources.common.image_files import ImageFiles, OwnSplit, SplitSettings, divide, find_images, image_names
from pipeline.storage.parts import SPLITS, ContextColumn

__all__ = ["Settings", "download", "open_source"]

PARTITIONS = ("list_eval_partition.txt", "list_eval_partition.csv")
ATTRIBUTES = ("list_attr_celeba.txt", "list_attr_celeba.csv")
WANTED = (
    "download img_align_celeba.zip and list_eval_partition.txt of CelebA (mmlab.ie.cuhk.edu.hk/projects/CelebA.html, "
    "Align&Cropped Images) and put them there, or run prepare with --download"
)


@dataclass(frozen=True, kw_only=True)
class Settings(SplitSettings):
    """A row of `datasets` with `source: celeba`.

    Attributes:
        crop: Side of the centre square as a share of the width, for copies of any size; 0.79 is 140 of the official 178 pixels.
        attributes: Names of attributes to carry with each image, such as `Smiling`, for the `context` of densities; each is
            `yes` or `no`.
    """

    pixel_range: tuple[float, ...] = (-1.0, 1.0)
    crop: float = 0.79
    attributes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(0 < self.crop <= 1, "crop", "must be in (0, 1]")
        check_that(len(set(self.attributes)) == len(self.attributes), "attributes", "names one twice")


def _find_list(root: Path, path: Path, lists: tuple[str, ...]) -> tuple[str, bytes] | None:
    """A list file and its name in messages: next to the images, below the root, or among the images."""
    folders = dict.fromkeys([path.parent, *([root, root / "Eval", root / "Anno", path] if root.is_dir() else [])])
    for list_file in (folder / name for folder in folders for name in lists):
        if list_file.is_file():
            try:
                return str(list_file), list_file.read_bytes()
            except OSError as error:
                raise DataError(f"{list_file} can't be read ({error.strerror}); download it again") from None
    files = open_files(path)
    for name in files.names:
        if PurePosixPath(name).name in lists:
            try:
                return f"{path}: {name}", files.read(name)
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: {name} can't be read ({error}); download it again") from None
    return None


def _read_partition(where: str, data: bytes) -> dict[str, str]:
    """Split of each file name, from lines such as `000001.jpg 0`, or `000001.jpg,0` below a heading."""
    try:
        lines = data.decode("ascii").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} can't be read ({error}); download it again") from None
    partition = {}
    for number, line in enumerate(lines, start=1):
        words = line.replace(",", " ").split()
        if not words or (number == 1 and words == ["image_id", "partition"]):
            continue
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise DataError(f"{where}, line {number}: expected a file name and 0, 1 or 2, got '{line[:80]}'; download it again")
        partition[words[0]] = SPLITS[int(words[1])]
    return partition


def _official_split(root: Path, path: Path, names: tuple[str, ...]) -> OwnSplit | None:
    location = _find_list(root, path, PARTITIONS)
    if location is None:
        return None
    where, partition = location[0], _read_partition(*location)
    chosen: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in names:
        split = partition.get(PurePosixPath(name).name)
        if split is None:
            raise DataError(f"{where} doesn't name {name} of {path}; 'split: seeded' draws a split without the list")
        chosen[split].append(name)
    for split in SPLITS:
        if not chosen[split]:
            raise DataError(f"{where} puts no image of {path} into '{split}'; 'split: seeded' draws a split without the list")
    return OwnSplit(names=chosen, origin=os.path.basename(where))


def _read_attributes(where: str, data: bytes, attributes: tuple[str, ...]) -> dict[str, list[float]]:
    """The attributes of each file name, 1 or 0, from lines such as `000001.jpg -1 1 ..` below a line of names."""
    try:
        lines = [line.replace(",", " ").split() for line in data.decode("ascii").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{where} can't be read ({error}); download it again") from None
    heading = next((i for i, words in enumerate(lines) if len(words) > 1), 0)  # the official list begins with a count
    names = [word for word in (lines[heading] if lines else []) if word != "image_id"]
    unknown = [name for name in attributes if name not in names]
    if unknown:
        raise DataError(f"{where} has no attribute '{unknown[0]}'; it has {', '.join(names)}"[:500])
    places = [1 + names.index(name) for name in attributes]
    values = {}
    for number, words in enumerate(lines[heading + 1 :], start=heading + 2):
        if words and (len(words) != len(names) + 1 or not {words[i] for i in places} <= {"-1", "0", "1"}):
            raise DataError(f"{where}, line {number}: expected a file name and {len(names)} times -1 or 1; download it again")
        if words:
            values[words[0]] = [float(words[i] == "1") for i in places]
    return values


def _carry_attributes(source: ImageFiles, root: Path, attributes: tuple[str, ...]) -> None:
    location = _find_list(root, source.path, ATTRIBUTES)
    if location is None:
        raise DataError(f"{root}: attributes are listed in {ATTRIBUTES[0]}, which is missing; put CelebA's next to the images")
    values = _read_attributes(*location, attributes)
    for split, names in source.names.items():
        missing = next((name for name in names if PurePosixPath(name).name not in values), None)
        if missing is not None:
            raise DataError(f"{location[0]} doesn't name {missing} of {source.path}; download it again")
        rows = [values[PurePosixPath(name).name] for name in names]
        source.carried[split] = np.array(rows, dtype=np.float32)
    source.context = tuple(ContextColumn(name=name, words=("no", "yes")) for name in attributes)


def open_source(settings: Settings, root: Path) -> ImageFiles:
    """The source of a row; `root` holds `img_align_celeba` or `img_align_celeba.zip`, or is one of them.

    Raises:
        DataError: When the images are missing, or a list of the split or of attributes doesn't match them.
    """
    places = [f"{folder}{name}" for folder in ("", "celeba/") for name in ("img_align_celeba.zip", "img_align_celeba")]
    path = find_images(root, WANTED, places)
    names = image_names(path)
    own = _official_split(root, path, names) if settings.split == "own" else None
    source = ImageFiles(path, divide(names, settings, own), settings, settings.crop)
    if settings.attributes:
        _carry_attributes(source, root, settings.attributes)
    return source


def download(settings: Settings, root: Path) -> None:
    """Downloads the images through torchvision into `root/celeba`.

    Raises:
        DataError: When the download fails.
    """
    from torchvision.datasets import CelebA

    try:
        CelebA(str(root), download=True)
    except Exception as error:  # gdown, network and archives each raise their own errors
        raise DataError(f"{root}: CelebA can't be downloaded ({' '.join(str(error).split())}); {WANTED}") from None
