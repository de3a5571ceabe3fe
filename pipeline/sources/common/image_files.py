"""Image files of any kind -> pixels of one size: decoding, fitting to a square, and a source over a folder or zip of them."""

from __future__ import annotations

import collections
import functools
import io
import os
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.errors import DataError, printable
from pipeline.settings import DatasetSettings, check_that
from pipeline.sources.common.archives import Files, open_files
from pipeline.sources.common.source import Block, Source, generator
from pipeline.storage.parts import SPLITS

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "ENDINGS",
    "ImageFiles",
    "ImageSettings",
    "OwnSplit",
    "SplitSettings",
    "decode",
    "divide",
    "find_images",
    "fit",
    "folder_split",
    "image_names",
    "kept_side",
    "seeded_split",
]

# Only these, since Pillow hands some others (EPS) to outside programs.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "PPM": (".pbm", ".pgm", ".ppm", ".pnm"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "ICO": (".ico",),
    "TGA": (".tga",),
}
ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)
# Of files without an ending, the first bytes.
SIGNATURES = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"),
    *(b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
)
MAX_PIXELS = 100_000_000
WHITE = 65_535
DARK = 16  # of 255: white of 12 bits in 16
SPLIT_FOLDERS = {"train": ("train", "training"), "valid": ("valid", "val", "validation", "dev"), "test": ("test", "testing")}
TIFF_BITS, TIFF_PHOTOMETRIC = 258, 262  # tags; photometric 0 is white-is-zero


@dataclass(frozen=True, kw_only=True)
class ImageSettings(DatasetSettings):
    """Keys that all sources of image files have in common.

    Attributes:
        image_px: Side of the square that each image becomes.
        channels: 3 for colour, 1 for grey.
        pixel_range: Range that the pixels 0..255 are scaled to: [0, 1] or [-1, 1].
        train_limit: Images to train on at most; 0 for all.
        valid_limit: Images to validate with at most; 0 for all.
        test_limit: Images to test with at most; 0 for all.
        white_level: Level of 16-bit grey images that becomes white; 4095 for those that hold 12 bits.
        unreadable_share: Share of the files that may be unreadable; beyond it, the stage fails.
    """

    image_px: int = 64
    channels: int = 3
    pixel_range: tuple[float, ...] = (0.0, 1.0)
    train_limit: int = 0
    valid_limit: int = 0
    test_limit: int = 0
    white_level: int = WHITE
    unreadable_share: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(1 <= self.image_px <= 4096, "image_px", "must lie between 1 and 4096")
        check_that(self.channels in (1, 3), "channels", "must be 1 or 3")
        check_that(self.pixel_range in ((0, 1), (-1, 1)), "pixel_range", "must be [0, 1] or [-1, 1]")
        for key in ("train_limit", "valid_limit", "test_limit"):
            check_that(getattr(self, key) >= 0, key, "must be 0 or more")
        check_that(1 <= self.white_level <= WHITE, "white_level", f"must be between 1 and {WHITE}")
        check_that(0 <= self.unreadable_share <= 1, "unreadable_share", "must lie in 0..1")

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, image_px, image_px)."""
        return (self.channels, self.image_px, self.image_px)

    @property
    def value_range(self) -> tuple[float, float] | None:
        """Range that the pixels 0..255 are scaled to."""
        return self.pixel_range[0], self.pixel_range[1]


@dataclass(frozen=True, kw_only=True)
class SplitSettings(ImageSettings):
    """Keys of sources whose files may include a split.

    Attributes:
        split: `own` uses the split that the data include, if any; `seeded` always draws one from all images.
        valid_share: Share of the images for validation, if it is drawn.
        test_share: Share of the images for the test, if it is drawn.
    """

    split: Literal["own", "seeded"] = "own"
    valid_share: float = 0.1
    test_share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(0 < self.valid_share < 1, "valid_share", "must be between 0 and 1")
        check_that(0 < self.test_share < 1 - self.valid_share, "test_share", "must be positive and leave some to train on")


def decode(data: bytes, name: str = "", white_level: int = WHITE) -> Image:
    """The first picture of an image file, upright, as 8-bit RGB or grey.

    EXIF orientation is honoured, alpha composited on white, CMYK converted, grey of more than 8 bit scaled to 8 bit:
    round(255 * level / white).

    Arguments:
        data: The bytes of the file.
        name: Name of the file. Only the ending identifies .tga files, since that format can't be recognised by its content.
        white_level: Level that becomes white in 16-bit grey images whose format doesn't define one.

    Returns:
        An image of mode RGB or L.

    Raises:
        ValueError: When it isn't a whole image of a known kind, has more than 100 million pixels, or pixels of 32 bit.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    formats = [form for form in FORMATS if form != "TGA" or name.lower().endswith(FORMATS["TGA"])]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = Image.open(io.BytesIO(data), formats=formats)
            width, height = file.size
            # Check the declared size before decoding anything.
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width}x{height} pixels are more than {MAX_PIXELS}")
            file.load()
            picture: Image.Image = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I;16") or (picture.mode == "I" and file.format == "PPM"):
                tags = getattr(file, "tag_v2", {})
                if file.format in ("PPM", "JPEG2000"):
                    white_level = WHITE  # the decoder has scaled the levels by the file's own maximum
                elif tags.get(TIFF_BITS) == (12,):
                    white_level = 4095
                picture = _eight_bit(picture, white_level, inverted=tags.get(TIFF_PHOTOMETRIC) == 0)
            if picture.mode in ("I", "F"):
                raise ValueError("its pixels have 32 bit or a sign; save it with 8 or 16 bit, unsigned")
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            if picture.mode not in ("L", "RGB"):
                picture = picture.convert("L" if picture.mode == "1" else "RGB")
            return picture
    except ValueError:
        raise
    except UnidentifiedImageError:  # its own message names an address in memory
        raise ValueError(f"it is damaged or none of {', '.join(formats)}") from None
    except Exception as error:  # broken files raise errors of many types
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def _eight_bit(picture: Image, white_level: int, inverted: bool) -> Image:
    """Grey of up to 16 bit as mode L, a transparent level composited on white."""
    from PIL import Image

    levels = np.asarray(picture).astype(np.int64).clip(0, white_level)  # (H, W)
    if inverted:
        levels = white_level - levels
    grey = ((levels * 255 + white_level // 2) // white_level).astype(np.uint8)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey[np.asarray(picture) == transparent] = 255
    return Image.fromarray(grey)


def kept_side(picture: Image, crop: float | None = None) -> int:
    """Side in pixels of the square before `fit` resizes it.

    Arguments:
        picture: An image.
        crop: Side of the centre square that is kept, as a share of the width, at most the height; None pads instead.
    """
    width, height = picture.size
    return max(width, height) if crop is None else max(1, min(round(crop * width), width, height))


def fit(picture: Image, image_px: int, crop: float | None = None) -> Image:
    """A picture as a square: its centre, or all of it padded on white.

    Arguments:
        picture: An image of mode RGB or L.
        image_px: Side of the square that it's resized to (bicubic, antialiased).
        crop: Side of the centre square that is kept, as a share of the width, at most the height; None pads instead.
    """
    from PIL import Image

    (width, height), side = picture.size, kept_side(picture, crop)
    if crop is None:
        square = Image.new(picture.mode, (side, side), "white")
        square.paste(picture, ((side - width) // 2, (side - height) // 2))
        picture, box = square, (0, 0, side, side)
    else:
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
    return picture.resize((image_px, image_px), Image.Resampling.BICUBIC, box=box)


def _ending(name: str) -> str:
    """The ending of a file name, in lower case; empty if there is none."""
    ending = os.path.splitext(name)[1].lower()
    return ending if 1 < len(ending) <= 12 and ending[1:].isalnum() else ""


def _is_signature(head: bytes) -> bool:
    """Whether a file that starts so is an image."""
    boxed = (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or (head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"))
    bitmap = head[:2] == b"BM" and head[6:10] == bytes(4)
    return head.startswith(SIGNATURES) or boxed or bitmap or bool(re.match(rb"P[1-6]\s", head))


@functools.lru_cache(maxsize=8)
def _image_names(files: Files) -> tuple[str, ...]:
    """Names of the files with an image's ending, or without any ending and with an image's first bytes."""

    def is_image(name: str) -> bool:
        return name.lower().endswith(ENDINGS) or (not _ending(name) and _is_signature(files.head(name)))

    return tuple(name for name in files.names if is_image(name))


def _skipped(path: Path) -> dict[str, int]:
    """Number of files of each ending that isn't an image's, the most frequent first."""
    files = open_files(path)
    images = set(_image_names(files))
    endings = collections.Counter(_ending(name) for name in files.names if name not in images)
    return dict(sorted(endings.items(), key=lambda item: (-item[1], item[0])))


def _no_image(path: Path, wanted: str) -> DataError:
    """The error for a folder or zip without images; it lists the endings of the other files."""
    seen = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in list(_skipped(path).items())[:10])
    return DataError(f"{path} holds no image ({f'but files: {seen}' if seen else 'nor any other file'}); {wanted}")


def image_names(path: Path) -> tuple[str, ...]:
    """Names of the image files in a folder or zip, in order.

    Raises:
        DataError: When there are none.
    """
    names = _image_names(open_files(path))
    if not names:
        raise _no_image(path, f"known endings: {', '.join(ENDINGS)}")
    return names


def find_images(root: Path, wanted: str, preferred: Sequence[str] = ()) -> Path:
    """The folder or zip of images that a root means.

    Arguments:
        root: A zip, a folder of images, or a folder that holds one of them.
        wanted: What to do if it's missing: what to download, and where from.
        preferred: Paths below the root that are tried first.

    Raises:
        DataError: When it's missing, or when there are several zips, or a zip and images.
    """
    if not root.exists():
        raise DataError(f"{root} is missing; {wanted}")
    if root.is_file():
        # A link such as data/raw/mine often lacks the ending of what it leads to.
        if root.suffix.lower() != ".zip" and not zipfile.is_zipfile(root):
            raise DataError(f"{root} is no zip; {wanted}")
        return root
    for below in preferred:
        if (root / below).exists():
            return root / below
    zips = sorted(p for p in root.iterdir() if p.suffix.lower() == ".zip" and p.is_file())
    if not zips:
        if not _image_names(open_files(root)):
            raise _no_image(root, wanted)
        return root
    if len(zips) > 1:
        raise DataError(f"{root} holds {zips[0].name} and {zips[1].name}; let the row's root name one of them")
    if _image_names(open_files(root)):
        raise DataError(f"{root} holds both {zips[0].name} and images; let the row's root name one of them")
    return zips[0]


def seeded_split(count: int, valid: int, test: int, seed: int) -> dict[str, np.ndarray]:
    """The numbers 0, .., count - 1 in random order, cut into test, validation and training.

    Example:
        >>> {split: len(numbers) for split, numbers in seeded_split(10, valid=1, test=2, seed=0).items()}
        {'train': 7, 'valid': 1, 'test': 2}
    """
    order = generator(seed, "images").permutation(count)
    return {"train": order[valid + test :], "valid": order[test : test + valid], "test": order[:test]}


@dataclass(frozen=True, kw_only=True)
class OwnSplit:
    """The split that a data set includes.

    Attributes:
        names: Names of the files of each split; any split but `train` may be empty.
        origin: Description of where it comes from.
    """

    names: Mapping[str, Sequence[str]]
    origin: str


def folder_split(path: Path, names: Sequence[str], seed: int) -> OwnSplit | None:
    """The split by folders such as `train`, `val` and `test`, all at one depth; None if there are no such folders.

    Arguments:
        path: Name of the images in messages.
        names: Names of the image files.
        seed: Seed of the order within each split; with it, limits take images of every folder.

    Raises:
        DataError: When there are images outside such folders.
    """
    split_of = {folder: split for split, folders in SPLIT_FOLDERS.items() for folder in folders}
    paths = [name.lower().split("/")[:-1] for name in names]
    for depth in range(max(map(len, paths))):
        splits = [split_of.get(folders[depth]) if len(folders) > depth else None for folders in paths]
        if "train" not in splits or not {"valid", "test"} & set(splits):
            continue
        if None in splits:
            raise DataError(
                f"{path}: {names[splits.index(None)]} is outside the folders train and "
                f"{'test' if 'test' in splits else 'valid'}; take it out, or draw a split from all images by 'split: seeded'"
            )
        chosen: dict[str, list[str]] = {}
        for split in SPLITS:
            members = [name for name, its_split in zip(names, splits, strict=True) if its_split == split]
            chosen[split] = [members[i] for i in generator(seed, "images", split).permutation(len(members))]
        folders = sorted({name.split("/")[depth] for name in names}, key=lambda f: SPLITS.index(split_of[f.lower()]))
        return OwnSplit(names=chosen, origin=f"the folders {', '.join(folders)}")
    return None


def divide(names: Sequence[str], settings: SplitSettings, own: OwnSplit | None) -> OwnSplit:
    """The split of a row: the data's own or a seeded one. Parts that the data's own lacks are drawn from its training images.

    Arguments:
        names: Names of all image files.
        settings: The row of `datasets`.
        own: The split that the data include, if any.
    """
    if own is None or settings.split == "seeded":
        own = OwnSplit(names={"train": names, "valid": (), "test": ()}, origin="")
    lacking = [split for split in ("valid", "test") if not own.names[split]]
    if not lacking:
        return own
    train = own.names["train"]
    shares = {"valid": settings.valid_share, "test": settings.test_share}
    counts = {split: max(1, round(share * len(train))) if split in lacking else 0 for split, share in shares.items()}
    parts = seeded_split(len(train), counts["valid"], counts["test"], settings.split_seed)
    drawn = {split: [train[i] for i in parts[split]] for split in ("train", *lacking)}
    seeded = f"split_seed {settings.split_seed}"
    origin = f"{own.origin}; {' and '.join(lacking)} drawn from train by {seeded}" if own.origin else f"drawn by {seeded}"
    return OwnSplit(names={**own.names, **drawn}, origin=origin)


class ImageFiles(Source):
    """Image files of a folder or a zip, decoded on reading.

    Arguments:
        path: The folder or zip.
        split: Names of the files of each split, and its origin.
        settings: Size, channels and range.
        crop: Side of the centre square as a share of the width; None pads to a square on white.
        labels: Labels of the files of each split, if any.
        label_names: Names of the labels.

    Attributes:
        carried: Columns to condition on of the files of each split, float32 with shape (n, C), if `context` names any.

    Raises:
        DataError: When a split has no image.
    """

    kind: Literal["images"] = "images"

    def __init__(
        self,
        path: Path,
        split: OwnSplit,
        settings: ImageSettings,
        crop: float | None,
        labels: Mapping[str, np.ndarray] | None = None,
        label_names: tuple[str, ...] | None = None,
    ) -> None:
        limits = {"train": settings.train_limit, "valid": settings.valid_limit, "test": settings.test_limit}
        self.path, self.settings, self.crop = path, settings, crop
        self.names = {part: tuple(split.names[part])[: limits[part] or None] for part in SPLITS}
        self.labels = None if labels is None else {part: np.asarray(labels[part], np.int64) for part in SPLITS}
        self.counts = {part: len(self.names[part]) for part in SPLITS}
        self.value_range = settings.value_range
        self.label_names = label_names
        self.carried: dict[str, np.ndarray] = {}
        self.split_origin, self.skipped = split.origin, _skipped(path)
        for part in SPLITS:
            if not self.counts[part]:
                total = sum(self.counts.values())
                raise DataError(f"{path}: split '{part}' ({split.origin}) has no image; there are {total} in all")

    def read(self, split: str, start: int, stop: int) -> Block:
        """Images, uint8 with shape (n, C, H, W); files that can't be decoded are skipped and listed."""
        files = open_files(self.path)
        mode, side = "L" if self.settings.channels == 1 else "RGB", self.settings.image_px
        images, kept, unreadable, enlarged, dark = [], [], [], 0, 0
        for i in range(start, stop):
            name = self.names[split][i]
            try:
                decoded = decode(files.read(name), name, self.settings.white_level)
                picture = fit(decoded, side, self.crop).convert(mode)
            except (OSError, ValueError, KeyError, MemoryError) as error:
                unreadable.append(printable(f"{self.path}: {name}: {str(error) or type(error).__name__}"))
                continue
            images.append(np.asarray(picture).reshape(side, side, -1).transpose(2, 0, 1))  # HWC -> CHW
            kept.append(i)
            dark += int(images[-1].max()) <= DARK
            enlarged += kept_side(decoded, self.crop) < side
        examples = np.stack(images) if images else np.empty((0, *self.settings.shape), np.uint8)
        labels = None if self.labels is None else self.labels[split][kept]
        context = self.carried[split][kept] if self.carried else None
        return Block(
            examples=examples, labels=labels, context=context, unreadable=tuple(unreadable), enlarged=enlarged, dark=dark
        )
