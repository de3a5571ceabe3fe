"""CelebA: 202,599 aligned faces (Liu et al. 2015, "Deep Learning Face Attributes in the Wild"), as a zip or a folder.

The official split is taken where `list_eval_partition.txt` lies beside the images; else a seeded one of the same shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.errors import DataError
from pipeline.settings import check_that
from pipeline.sources.common.image_files import ImageFiles, ImageSettings, find_images, image_names, seeded_split
from pipeline.storage.parts import SPLITS

__all__ = ["Settings", "download", "open_source"]

PARTITION = "list_eval_partition.txt"
WANTED = (
    "download img_align_celeba.zip and list_eval_partition.txt of CelebA (mmlab.ie.cuhk.edu.hk/projects/CelebA.html, "
    "Align&Cropped Images) and put them there, or run prepare with --download"
)


@dataclass(frozen=True, kw_only=True)
class Settings(ImageSettings):
    """A row of `datasets` with `source: celeba`.

    Attributes:
        crop: Side of the centre square as a share of the width, so that copies of another size work; 0.79 is 140 of the
            official 178 pixels.
        valid_share: Share of the images for validation, where there is no list_eval_partition.txt.
        test_share: Share of the images for the test, where there is no list_eval_partition.txt.
    """

    pixel_range: tuple[float, ...] = (-1.0, 1.0)
    crop: float = 0.79
    valid_share: float = 0.1
    test_share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(0 < self.crop <= 1, "crop", "has to lie in (0, 1]")
        check_that(0 < self.valid_share < 1, "valid_share", "has to lie in (0, 1)")
        check_that(0 < self.test_share < 1 - self.valid_share, "test_share", "has to be positive and leave some to train on")


def _read_partition(path: Path) -> dict[str, str]:
    """Split of each file name, from lines such as `000001.jpg 0`."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read ({error}); download it anew") from None
    partition = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise DataError(f"{path}, line {number}: expected a file name and 0, 1 or 2, got '{line[:80]}'; download it anew")
        partition[words[0]] = SPLITS[int(words[1])]
    return partition


def open_source(settings: Settings, root: Path) -> ImageFiles:
    """The source of a row; `root` holds `img_align_celeba` or `img_align_celeba.zip`, or is one of them.

    Raises:
        DataError: When the images are missing, or the partition doesn't fit to them.
    """
    places = [f"{folder}{name}" for folder in ("", "celeba/") for name in ("img_align_celeba.zip", "img_align_celeba")]
    path = find_images(root, WANTED, places)
    names = image_names(path)
    found = [folder / PARTITION for folder in (path.parent, path) if (folder / PARTITION).is_file()]
    if not found:
        valid, test = (max(1, round(share * len(names))) for share in (settings.valid_share, settings.test_share))
        parts = seeded_split(len(names), valid, test, settings.split_seed)
        chosen = {split: [names[i] for i in numbers] for split, numbers in parts.items()}
    else:
        partition = _read_partition(found[0])
        chosen = {split: [] for split in SPLITS}
        for name in names:
            split = partition.get(PurePosixPath(name).name)
            if split is None:
                raise DataError(f"{found[0]} doesn't name {name} of {path}; take it away for a seeded split")
            chosen[split].append(name)
        for split in SPLITS:
            if not chosen[split]:
                raise DataError(f"{found[0]} puts no image of {path} into '{split}'; take it away for a seeded split")
    return ImageFiles(path, chosen, settings, settings.crop)


def download(settings: Settings, root: Path) -> None:
    """Downloads the images through torchvision into `root/celeba`.

    Raises:
        DataError: When they can't be had.
    """
    from torchvision.datasets import CelebA

    try:
        CelebA(str(root), download=True)
    except Exception as error:  # gdown, network and archives each raise errors of their own
        raise DataError(f"{root}: CelebA can't be downloaded ({' '.join(str(error).split())}); {WANTED}") from None
