r"""The grid density of section 4.1.1 (Figure 5): six bars that cross, of which one has a gap.

.. math:: p_0(x) = \frac{1}{6} \sum_{b \in \{0, -3, 3\}}
    \Big( U(x_1; -L, L) \, N(x_2; b, 0.1^2) + N(x_1; b, 0.1^2) \, U(x_2; -L, L) \Big)

The stretch 1.6 < x1 < 2.6 of the upper horizontal bar is dropped: nothing is drawn from the box 1.6 < x1 < 2.6,
2.5 < x2 < 3.5, and the truth is p_0 outside of it, divided by the mass that is left. All splits are drawn from the truth.

The paper writes U(-10, 10), but its "10 %" for a stretch of length 1 and its range of -5..5 fit a half length L = 5 only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from pipeline.settings import DatasetSettings, check_that
from pipeline.sources.common.source import GROUP, Block, Source, generator, read_in_groups

__all__ = ["DROPPED_BOX", "Grid", "Settings", "dropped_box", "dropped_mass", "log_density", "open_source"]

CENTRES = (0.0, -3.0, 3.0)
DEVIATION = 0.1
DROPPED_BOX = ((1.6, 2.6), (2.5, 3.5))  # bounds of x1 and of x2, both open


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
        check_that(self.half_length >= 4, "half_length", "has to be at least 4, so that the bars cross")
        check_that(self.train_count >= 1, "train_count", "has to be at least 1")
        check_that(self.valid_count >= 1, "valid_count", "has to be at least 1")
        check_that(self.test_count >= 1, "test_count", "has to be at least 1")

    @property
    def shape(self) -> tuple[int, ...]:
        """(2,)."""
        return (2,)


def dropped_box(points: np.ndarray) -> np.ndarray:
    """Whether each point lies in the dropped box.

    Arguments:
        points: Points with shape (N, 2).

    Returns:
        Booleans with shape (N,).

    Example:
        >>> dropped_box(np.array([[2.0, 3.0], [2.0, 0.0], [2.6, 3.0]]))
        array([ True, False, False])
    """
    low, high = np.array(DROPPED_BOX).T
    inside: np.ndarray = np.all((points > low) & (points < high), axis=1)
    return inside


def _normal_mass(low: float, high: float, centre: float) -> float:
    """Mass of N(centre, 0.1^2) between low and high."""
    scale = DEVIATION * math.sqrt(2)
    return 0.5 * (math.erf((high - centre) / scale) - math.erf((low - centre) / scale))


def dropped_mass(half_length: float = 5.0) -> float:
    r"""Mass of p_0 in the dropped box, which the truth gives to the rest.

    Arguments:
        half_length: Half the length L of each bar.

    Example:
        >>> round(dropped_mass(5.0), 6)
        0.016667
    """
    (left, right), (bottom, top) = DROPPED_BOX
    across = sum(_normal_mass(bottom, top, b) for b in CENTRES) * (min(right, half_length) - left) / (2 * half_length)
    upward = sum(_normal_mass(left, right, b) for b in CENTRES) * (min(top, half_length) - bottom) / (2 * half_length)
    return (across + upward) / 6


def log_density(points: np.ndarray, half_length: float = 5.0) -> np.ndarray:
    """Log-density of the truth in closed form, in nats.

    Arguments:
        points: Points with shape (N, 2).
        half_length: Half the length L of each bar.

    Returns:
        Log-densities with shape (N,), float64; -inf in the dropped box and beyond the ends of the bars.

    Example:
        >>> log_density(np.array([[1.0, 3.0], [2.0, 3.0], [9.0, 9.0]])).round(4)
        array([-2.6939,    -inf,    -inf])
    """
    points = np.asarray(points, dtype=np.float64)
    centres = np.array(CENTRES)
    normal = -0.5 * ((points[:, :, None] - centres) / DEVIATION) ** 2 - math.log(DEVIATION * math.sqrt(2 * math.pi))
    inside = np.where(np.abs(points) <= half_length, 0.0, -np.inf)  # (N, 2)
    # Along one axis uniform, across it normal.
    bars = np.concatenate([inside[:, :1] + normal[:, 1], inside[:, 1:] + normal[:, 0]], axis=1)  # (N, 6)
    bars -= math.log(6 * 2 * half_length) + math.log1p(-dropped_mass(half_length))
    values: np.ndarray = np.logaddexp.reduce(bars, axis=1)
    values[dropped_box(points)] = -np.inf
    return values


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
        kept: list[np.ndarray] = []
        while sum(map(len, kept)) < GROUP:
            along = random.uniform(-self.half_length, self.half_length, GROUP)
            across = random.choice(CENTRES, GROUP) + DEVIATION * random.standard_normal(GROUP)
            horizontal = random.random(GROUP) < 0.5
            points = np.stack([np.where(horizontal, along, across), np.where(horizontal, across, along)], axis=1)
            # Rounded before the test, since rounding may carry a point over an edge, where the truth is zero.
            points = points.astype(np.float32)
            kept.append(points[np.isfinite(log_density(points, self.half_length))])
        return np.concatenate(kept)[:GROUP]

    def read(self, split: str, start: int, stop: int) -> Block:
        """Points, float32 with shape (n, 2)."""
        return Block(examples=read_in_groups(lambda g: self._draw(split, g), start, stop))


def open_source(settings: Settings, root: Path) -> Grid:
    """The source of a row; `root` isn't read, since the points are drawn from the formula."""
    return Grid(settings)
