"""Image files of any kind -> pixels of one size: decoding, fitting to a square, and a source over a folder or zip of them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.errors import DataError
from pipeline.settings import DatasetSettings, check_that
from pipeline.sources.common.archives import open_files
from pipeline.sources.common.source import Block, Source, generator
from pipeline.storage.parts import SPLITS

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ENDINGS", "ImageFiles", "ImageSettings", "decode", "find_images", "fit", "image_names", "kept_side", "seeded_split"]

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
# Only these, since Pillow hands some others (EPS) to outside programs.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
MAX_PIXELS = 100_000_000


@dataclass(frozen=True, kw_only=True)
class ImageSettings(DatasetSettings):
    """Keys that all sources of image files have in common.

    Attributes:
        image_px: Side of the square that each image becomes.
        channels: 3 for colour, 1 for grey.
        pixel_range: What the pixels 0..255 stand for: [0, 1] or [-1, 1].
        train_limit: Images to train on at most; 0 for all.
        valid_limit: Images to validate with at most; 0 for all.
        test_limit: Images to test with at most; 0 for all.
        unreadable_share: Share of the files that may be unreadable; beyond it, the stage fails.
    """

    image_px: int = 64
    channels: int = 3
    pixel_range: tuple[float, ...] = (0.0, 1.0)
    train_limit: int = 0
    valid_limit: int = 0
    test_limit: int = 0
    unreadable_share: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(1 <= self.image_px <= 4096, "image_px", "has to lie between 1 and 4096")
        check_that(self.channels in (1, 3), "channels", "has to be 1 or 3")
        check_that(self.pixel_range in ((0, 1), (-1, 1)), "pixel_range", "has to be [0, 1] or [-1, 1]")
        for key in ("train_limit", "valid_limit", "test_limit"):
            check_that(getattr(self, key) >= 0, key, "has to be 0 or more")
        check_that(0 <= self.unreadable_share <= 1, "unreadable_share", "has to lie in 0..1")

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, image_px, image_px)."""
        return (self.channels, self.image_px, self.image_px)

    @property
    def value_range(self) -> tuple[float, float] | None:
        """What the pixels 0..255 stand for."""
        return self.pixel_range[0], self.pixel_range[1]


def decode(data: bytes) -> Image:
    """The first picture of an image file, upright, as 8-bit RGB or grey.

    EXIF orientation is honoured, alpha composited on white, CMYK converted, 16-bit grey scaled to 8 bit.

    Arguments:
        data: The bytes of the file.

    Returns:
        An image of mode RGB or L.

    Raises:
        ValueError: When it isn't a whole image of a known kind, has more than 100 million pixels, or pixels of 32 bit.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = picture.size
            # The declared size is looked at before anything is decoded.
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width}x{height} pixels are more than {MAX_PIXELS}")
            picture.load()
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I;16"):
                levels = np.asarray(picture).astype(np.uint32)
                picture = Image.fromarray(((levels + 128) // 257).astype(np.uint8))  # 65535 / 257 = 255
            if picture.mode in ("I", "F"):
                raise ValueError("its pixels have 32 bit; save it with 8 or 16")
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            if picture.mode not in ("L", "RGB"):
                picture = picture.convert("L" if picture.mode == "1" else "RGB")
            return picture
    except ValueError:
        raise
    except UnidentifiedImageError:  # its own words name an address in memory
        raise ValueError(f"it is damaged or none of {', '.join(FORMATS)}") from None
    except Exception as error:  # broken files raise whatever the decoder came across
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def kept_side(picture: Image, crop: float | None = None) -> int:
    """Side in pixels of the square that `fit` resizes.

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


def image_names(path: Path) -> tuple[str, ...]:
    """Names of the image files in a folder or zip, in order.

    Raises:
        DataError: When there are none.
    """
    names = tuple(name for name in open_files(path).names if name.lower().endswith(ENDINGS))
    if not names:
        raise DataError(f"{path} holds no image; known endings: {', '.join(ENDINGS)}")
    return names


def find_images(root: Path, wanted: str, preferred: Sequence[str] = ()) -> Path:
    """The folder or zip of images that a root means.

    Arguments:
        root: A zip, a folder of images, or a folder that holds one of them.
        wanted: What to say when it's missing: what to download, and where from.
        preferred: Paths below the root that are taken first, when they exist.

    Raises:
        DataError: When it's missing, or when there are several zips or a zip beside images.
    """
    if not root.exists():
        raise DataError(f"{root} is missing; {wanted}")
    if root.is_file():
        if root.suffix.lower() != ".zip":
            raise DataError(f"{root}: expected a folder or a .zip; {wanted}")
        return root
    for below in preferred:
        if (root / below).exists():
            return root / below
    zips = sorted(p for p in root.iterdir() if p.suffix.lower() == ".zip" and p.is_file())
    if not zips:
        if not any(name.lower().endswith(ENDINGS) for name in open_files(root).names):
            raise DataError(f"{root} holds no image; {wanted}")
        return root
    if len(zips) > 1:
        raise DataError(f"{root} holds {zips[0].name} and {zips[1].name}; let the row's root name one of them")
    if any(name.lower().endswith(ENDINGS) for name in open_files(root).names):
        raise DataError(f"{root} holds {zips[0].name} and images beside it; let the row's root name one of them")
    return zips[0]


def seeded_split(count: int, valid: int, test: int, seed: int) -> dict[str, np.ndarray]:
    """The numbers 0, .., count - 1 in random order, cut into test, validation and training.

    Example:
        >>> {split: len(numbers) for split, numbers in seeded_split(10, valid=1, test=2, seed=0).items()}
        {'train': 7, 'valid': 1, 'test': 2}
    """
    order = generator(seed, "images").permutation(count)
    return {"train": order[valid + test :], "valid": order[test : test + valid], "test": order[:test]}


class ImageFiles(Source):
    """Image files of a folder or a zip, decoded when they're read.

    Arguments:
        path: The folder or zip.
        names: Names of the files of each split.
        settings: Size, channels and range.
        crop: Side of the centre square as a share of the width; None pads to a square on white.
        labels: Labels of the files of each split, if any.
        label_names: Names of the labels.

    Raises:
        DataError: When a split has no image.
    """

    kind: Literal["images"] = "images"

    def __init__(
        self,
        path: Path,
        names: Mapping[str, Sequence[str]],
        settings: ImageSettings,
        crop: float | None,
        labels: Mapping[str, np.ndarray] | None = None,
        label_names: tuple[str, ...] | None = None,
    ) -> None:
        limits = {"train": settings.train_limit, "valid": settings.valid_limit, "test": settings.test_limit}
        self.path, self.settings, self.crop = path, settings, crop
        self.names = {split: tuple(names[split])[: limits[split] or None] for split in SPLITS}
        self.labels = None if labels is None else {split: np.asarray(labels[split], np.int64) for split in SPLITS}
        self.counts = {split: len(self.names[split]) for split in SPLITS}
        self.value_range = settings.value_range
        self.label_names = label_names
        for split in SPLITS:
            if not self.counts[split]:
                raise DataError(f"{path}: split '{split}' has no image; there are {sum(self.counts.values())} in all")

    def read(self, split: str, start: int, stop: int) -> Block:
        """Images, uint8 with shape (n, C, H, W); a file that can't be decoded is left out and named."""
        files = open_files(self.path)
        mode, side = "L" if self.settings.channels == 1 else "RGB", self.settings.image_px
        images, kept, unreadable, enlarged = [], [], [], 0
        for i in range(start, stop):
            name = self.names[split][i]
            try:
                decoded = decode(files.read(name))
                picture = fit(decoded, side, self.crop).convert(mode)
            except (OSError, ValueError, KeyError, MemoryError) as error:
                unreadable.append(f"{self.path}: {name}: {' '.join(str(error).split()) or type(error).__name__}")
                continue
            images.append(np.asarray(picture).reshape(side, side, -1).transpose(2, 0, 1))  # HWC -> CHW
            kept.append(i)
            enlarged += kept_side(decoded, self.crop) < side
        examples = np.stack(images) if images else np.empty((0, *self.settings.shape), np.uint8)
        labels = None if self.labels is None else self.labels[split][kept]
        return Block(examples=examples, labels=labels, unreadable=tuple(unreadable), enlarged=enlarged)
