"""Points of the grid density of section 4.1.1 (Figure 5), whose truth is in `common/bars.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from pipeline.settings import DatasetSettings, check_that
from pipeline.sources.common.bars import CENTRES, DEVIATION, log_density
from pipeline.sources.common.source import GROUP, Block, Source, generator, read_in_groups

__all__ = ["Grid", "Settings", "open_source"]


@dataclass(frozen=True, kw_only=True)
class Settings(DatasetSettings):
    """A row of `datasets` with `source: grid`.

    Attributes:
        half_length: Half the length L of each bar, which reaches from -L to L.
        train_count: Points to train on; 50,000 in the paper.
        valid_count: Points to validate with.
        test_count: Points to test with.
    """

    half_length: float = 5.0
    train_count: int = 50_000
    valid_count: int = 5_000
    test_count: int = 10_000
    drawn_as: ClassVar[str] = "grid"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.half_length >= 4, "half_length", "must be at least 4; otherwise the bars don't cross")
        check_that(self.train_count >= 1, "train_count", "must be at least 1")
        check_that(self.valid_count >= 1, "valid_count", "must be at least 1")
        check_that(self.test_count >= 1, "test_count", "must be at least 1")

    @property
    def shape(self) -> tuple[int, ...]:
        """(2,)."""
        return (2,)


class Grid(Source):
    """Points of the grid density.

    Arguments:
        settings: The row of `datasets`.
    """

    kind = "vectors"

    def __init__(self, settings: Settings) -> None:
        self.half_length, self.seed = settings.half_length, settings.split_seed
        self.counts = {"train": settings.train_count, "valid": settings.valid_count, "test": settings.test_count}

    def _draw(self, split: str, group: int) -> np.ndarray:
        """256 points of the truth, by rejection, float32 with shape (256, 2)."""
        random = generator(self.seed, "grid", split, group)
        accepted: list[np.ndarray] = []
        while sum(map(len, accepted)) < GROUP:
            along = random.uniform(-self.half_length, self.half_length, GROUP)
            across = random.choice(CENTRES, GROUP) + DEVIATION * random.standard_normal(GROUP)
            horizontal = random.random(GROUP) < 0.5
            points = np.stack([np.where(horizontal, along, across), np.where(horizontal, across, along)], axis=1)
            # Rounded before the test, since rounding may move a point across an edge, where the truth is zero.
            points = points.astype(np.float32)
            accepted.append(points[np.isfinite(log_density(points, self.half_length))])
        return np.concatenate(accepted)[:GROUP]

    def read(self, split: str, start: int, stop: int) -> Block:
        """Points, float32 with shape (n, 2)."""
        return Block(examples=read_in_groups(lambda g: self._draw(split, g), start, stop))


def open_source(settings: Settings, root: Path) -> Grid:
    """The source of a row; `root` isn't read, since the points are drawn from the formula."""
    return Grid(settings)
