"""The Toronto Face Database (Susskind et al. 2010): grey faces of 48x48 pixels in `TFD_48x48.mat`.

The file's `folds` say, for each image and each of five folds, 0: unlabelled, 1: train, 2: valid, 3: test.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.errors import DataError
from pipeline.settings import DatasetSettings, check_that
from pipeline.sources.common.archives import file_stamp
from pipeline.sources.common.source import Block, Source

__all__ = ["Faces", "Settings", "open_source"]

NAME = "TFD_48x48.mat"
MAX_IMAGES = 1_000_000
UNLABELLED, TRAIN, VALID, TEST = range(4)


@dataclass(frozen=True, kw_only=True)
class Settings(DatasetSettings):
    """A row of `datasets` with `source: tfd`.

    Attributes:
        fold: Fold of the labelled images, 0 to 4.
        train_on: `unlabelled` images, as in the literature on samples, or `all` except those for validation and test.
    """

    fold: int = 0
    train_on: Literal["unlabelled", "all"] = "unlabelled"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(0 <= self.fold <= 4, "fold", "must lie in 0..4")

    @property
    def shape(self) -> tuple[int, ...]:
        """(1, 48, 48)."""
        return (1, 48, 48)


@functools.lru_cache(maxsize=1)
def _read_mat(path: Path, stamp: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 with shape (N, 48, 48), and folds with shape (N, 5); forked processes share them."""
    from scipy.io import loadmat, whosmat

    try:
        variables = {name: (shape, kind) for name, shape, kind in whosmat(path)}
        shape, kind = variables.get("images", ((), "nothing"))
        folds_shape, _ = variables.get("folds", ((), "nothing"))
        # Check the declared shapes before loading anything.
        if len(shape) != 3 or shape[1:] != (48, 48) or kind != "uint8" or not 0 < shape[0] <= MAX_IMAGES:
            raise DataError(f"{path}: expected 'images' of uint8 with shape (N, 48, 48), found {kind} {tuple(shape)}")
        if tuple(folds_shape) != (shape[0], 5):
            raise DataError(f"{path}: expected 'folds' with shape ({shape[0]}, 5), found {tuple(folds_shape)}")
        arrays = loadmat(path, variable_names=["images", "folds"])
        images, folds = arrays["images"], arrays["folds"]
    except DataError:
        raise
    except NotImplementedError:
        raise DataError(f"{path} has MATLAB's format 7.3; save it again with -v7") from None
    except Exception as error:  # scipy raises errors of many types for broken files
        raise DataError(f"{path} is damaged ({' '.join(str(error).split())}); get it again") from None
    if images.shape != shape or folds.shape != (shape[0], 5) or not np.isin(folds, range(4)).all():
        raise DataError(f"{path} is damaged: 'folds' must hold 0, 1, 2 and 3; get it again")
    return np.ascontiguousarray(images), folds


class Faces(Source):
    """The faces of a fold.

    Arguments:
        path: The .mat file.
        settings: The row of `datasets`.

    Raises:
        DataError: When the file is damaged, or a split of the fold is empty.
    """

    kind = "images"
    value_range = (0.0, 1.0)

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        fold = _read_mat(path, file_stamp(path))[1][:, settings.fold]
        to_train = (UNLABELLED,) if settings.train_on == "unlabelled" else (UNLABELLED, TRAIN)
        members = {"train": to_train, "valid": (VALID,), "test": (TEST,)}
        self.rows = {split: np.flatnonzero(np.isin(fold, kinds)) for split, kinds in members.items()}
        self.counts = {split: len(rows) for split, rows in self.rows.items()}
        for split, count in self.counts.items():
            if not count:
                raise DataError(f"{path}: split '{split}' of fold {settings.fold} has no image")

    def read(self, split: str, start: int, stop: int) -> Block:
        """Images, uint8 with shape (n, 1, 48, 48)."""
        return Block(examples=_read_mat(self.path, file_stamp(self.path))[0][self.rows[split][start:stop], None])


def open_source(settings: Settings, root: Path) -> Faces:
    """The source of a row; `root` is the .mat file or the folder that holds it.

    Raises:
        DataError: When the file is missing or damaged.
    """
    path = root / NAME if root.is_dir() else root
    if not path.is_file():
        raise DataError(f"{path} is missing; ask the University of Toronto for the Toronto Face Database and put {NAME} there")
    return Faces(path, settings)
