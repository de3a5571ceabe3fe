"""MNIST's format: 70,000 grey images of 28x28 pixels in four IDX files, gzipped or not.

The first images of the training file are for training, the last ones for validation.
"""

from __future__ import annotations

import functools
import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np

from pipeline.errors import DataError
from pipeline.settings import check_that
from pipeline.sources.common.archives import file_stamp
from pipeline.sources.common.classes import ClassSettings
from pipeline.sources.common.source import Block, Source

__all__ = ["IdxImages", "IdxSettings", "download_by_torchvision", "read_idx"]

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MAX_IMAGES = 1_000_000
CHUNK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class IdxSettings(ClassSettings):
    """Keys of a row of `datasets` in this format.

    Attributes:
        train_count: Images to train on, the first of the training file.
        valid_count: Images to validate with, the last of the training file.
    """

    train_count: int = 50_000
    valid_count: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.train_count >= 1, "train_count", "must be at least 1")
        check_that(self.valid_count >= 1, "valid_count", "must be at least 1")
        check_that(
            self.train_count + self.valid_count <= 60_000, "valid_count", "and train_count must be 60000 together at most"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """(1, 28, 28)."""
        return (1, 28, 28)


def _find(root: Path, name: str, torchvision_name: str) -> Path:
    """An IDX file, gzipped or not, in the root or in torchvision's folder."""
    for folder in (root, root / torchvision_name / "raw"):
        for written in (name, name.replace("-idx", ".idx")):
            for ending in ("", ".gz"):
                if (folder / (written + ending)).is_file():
                    return folder / (written + ending)
    raise DataError(
        f"{root} holds no {name} (or {name}.gz); download {', '.join(f'{n}.gz' for n in FILES)} of {torchvision_name} "
        "and put them there, or run prepare with --download"
    )


@functools.lru_cache(maxsize=8)
def read_idx(path: Path, dims: int, stamp: tuple[int, int]) -> np.ndarray:
    """An IDX file of bytes as an array of `dims` dimensions; forked processes share it."""
    try:
        with open(path, "rb") as raw, gzip.open(raw, "rb") if path.suffix == ".gz" else raw as file:
            return _parse(cast(IO[bytes], file), path, dims)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); download it again") from None


def _parse(file: IO[bytes], path: Path, dims: int) -> np.ndarray:
    header = file.read(4 + 4 * dims)
    if len(header) < 4 + 4 * dims or header[:4] != bytes([0, 0, 8, dims]):
        raise DataError(f"{path} isn't an IDX file of bytes with {dims} dimensions; download it again")
    shape = struct.unpack(f">{dims}I", header[4:])
    if shape[0] > MAX_IMAGES or (dims == 3 and shape[1:] != (28, 28)):
        raise DataError(f"{path} declares shape {shape}; expected {'(N, 28, 28)' if dims == 3 else '(N,)'}; download it again")
    # In chunks, so memory is bounded by what the file holds, not by what it declares.
    data = bytearray()
    length = int(np.prod(shape))
    while len(data) <= length and (chunk := file.read(CHUNK_BYTES)):
        data += chunk
    if len(data) != length:
        what = "fewer" if len(data) < length else "more"
        raise DataError(f"{path} holds {what} bytes than the {length} of its shape {shape}; download it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


class IdxImages(Source):
    """The images and labels of four IDX files.

    Arguments:
        root: The folder.
        settings: The row of `datasets`.
        label_names: Names of the labels 0, 1, ..
        torchvision_name: torchvision's name for the data set, and for the folder that it downloads to.

    Raises:
        DataError: When a file is missing or damaged, or holds too few images.
    """

    kind = "images"
    value_range = (0.0, 1.0)
    label_names: tuple[str, ...]

    def __init__(self, root: Path, settings: IdxSettings, label_names: tuple[str, ...], torchvision_name: str) -> None:
        self.label_names = label_names
        self.paths = {name: _find(root, name, torchvision_name) for name in FILES}
        train, test = (len(self._arrays(part)[0]) for part in ("train", "t10k"))
        if train < settings.train_count + settings.valid_count:
            raise DataError(
                f"{self.paths[FILES[0]]} holds {train} images, fewer than train_count {settings.train_count} "
                f"and valid_count {settings.valid_count} together"
            )
        self.counts = {"train": settings.train_count, "valid": settings.valid_count, "test": test}
        self.offsets = {"train": 0, "valid": train - settings.valid_count, "test": 0}

    def _arrays(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        images_path, labels_path = self.paths[f"{part}-images-idx3-ubyte"], self.paths[f"{part}-labels-idx1-ubyte"]
        images = read_idx(images_path, 3, file_stamp(images_path))
        labels = read_idx(labels_path, 1, file_stamp(labels_path))
        if len(images) != len(labels) or not len(images):
            raise DataError(f"{labels_path} holds {len(labels)} labels for the {len(images)} images of {images_path}")
        if labels.max() >= len(self.label_names):
            raise DataError(f"{labels_path} holds label {labels.max()}; expected 0 to {len(self.label_names) - 1}")
        return images, labels

    def read(self, split: str, start: int, stop: int) -> Block:
        """Images, uint8 with shape (n, 1, 28, 28), and labels."""
        images, labels = self._arrays("t10k" if split == "test" else "train")
        rows = slice(self.offsets[split] + start, self.offsets[split] + stop)
        return Block(examples=images[rows, None], labels=labels[rows].astype(np.int64))


def download_by_torchvision(root: Path, name: str) -> None:
    """Downloads the files of a data set of torchvision into `root/NAME/raw`.

    Raises:
        DataError: When the download fails.
    """
    from torchvision import datasets

    try:
        getattr(datasets, name)(str(root), download=True)
    except Exception as error:  # network, archives and files each raise their own errors
        raise DataError(f"{root}: {name} can't be downloaded ({' '.join(str(error).split())})") from None
