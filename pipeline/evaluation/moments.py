"""Means and standard errors of streams that needn't fit in memory, over examples and over groups of examples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["KEPT", "GroupedMoments", "Mean", "Moments", "grouped_mean_and_error", "mean_and_error"]

KEPT = 100_000  # scores of single test points that are kept to compare two rows by: the first ones


class Mean(NamedTuple):
    """A mean with its standard error.

    Attributes:
        mean: The mean.
        standard_error: Sample standard deviation / sqrt(count); NaN for fewer than two values.
        number: Number of values.
    """

    mean: float
    standard_error: float
    number: int


@dataclass
class Moments:
    r"""Mean and spread of a stream of numbers, in float64, and of several streams merged.

    .. math:: M_{ab} = M_a + M_b + (\mu_b - \mu_a)^2 \frac{n_a n_b}{n_a + n_b}

    where M is the sum of squared deviations. Unlike a sum of squares, it doesn't suffer from cancellation.

    Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979

    Arguments:
        count: Number of values so far.
        mean: Their mean.
        squares: Sum of their squared deviations from it.

    Example:
        >>> moments = Moments()
        >>> moments.update([1.0, 2.0, 3.0])
        >>> moments.update([4.0])
        >>> moments.result()
        Mean(mean=2.5, standard_error=0.6454972243679028, number=4)
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, values: ArrayLike) -> None:
        """Adds values, with any shape."""
        block = np.asarray(values, dtype=np.float64)
        if block.size:
            mean = float(block.mean())
            self.merge(Moments(block.size, mean, float(np.square(block - mean).sum())))

    def merge(self, other: Moments) -> None:
        """Adds what another rank has seen."""
        total = self.count + other.count
        if other.count == 0:
            return
        shift = other.mean - self.mean
        self.squares += other.squares + shift * shift * self.count * other.count / total
        self.mean += shift * other.count / total
        self.count = total

    @property
    def standard_deviation(self) -> float:
        """Sample standard deviation, with the divisor n - 1."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else math.nan

    def result(self) -> Mean:
        """The mean and its standard error."""
        if self.count == 0:
            return Mean(math.nan, math.nan, 0)
        return Mean(self.mean, self.standard_deviation / math.sqrt(self.count), self.count)


class GroupedMoments:
    """Mean and spread over groups, for examples that aren't independent, such as the patches of one image.

    The standard error over groups is that of the groups' means: their sample standard deviation / sqrt(number of groups).
    Memory grows with the number of groups only.

    Example:
        >>> moments = GroupedMoments()
        >>> moments.update([1.0, 3.0, 6.0], groups=[0, 0, 1])
        >>> moments.examples().mean, moments.groups()
        (3.3333333333333335, Mean(mean=4.0, standard_error=2.0, number=2))
    """

    def __init__(self) -> None:
        self._all = Moments()
        self._sums: dict[int, tuple[float, int]] = {}

    def update(self, values: ArrayLike, groups: ArrayLike) -> None:
        """Adds values with shape (n,) and the group of each, integers with shape (n,)."""
        values, groups = np.asarray(values, dtype=np.float64), np.asarray(groups)
        if values.shape != groups.shape:
            raise ValueError(f"values have shape {values.shape}, groups {groups.shape}")
        self._all.update(values)
        names, index = np.unique(groups, return_inverse=True)
        sums, counts = np.bincount(index, values), np.bincount(index)
        for name, total, count in zip(names.tolist(), sums.tolist(), counts.tolist(), strict=True):
            self._add(name, total, count)

    def merge(self, other: GroupedMoments) -> None:
        """Adds what another rank has seen; a group may be spread over ranks."""
        self._all.merge(other._all)
        for name, (total, count) in other._sums.items():
            self._add(name, total, count)

    def _add(self, name: int, total: float, count: int) -> None:
        old_total, old_count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (old_total + total, old_count + count)

    def examples(self) -> Mean:
        """Mean and standard error over examples."""
        return self._all.result()

    def groups(self) -> Mean:
        """Mean of the groups' means, and its standard error."""
        moments = Moments()
        moments.update([total / count for _, (total, count) in sorted(self._sums.items())])
        return moments.result()


def mean_and_error(values: ArrayLike) -> Mean:
    """Mean and standard error over the values of an array."""
    moments = Moments()
    moments.update(values)
    return moments.result()


def grouped_mean_and_error(values: ArrayLike, groups: ArrayLike) -> Mean:
    """Mean of the groups' means and standard error over groups; see `GroupedMoments`."""
    moments = GroupedMoments()
    moments.update(values, groups)
    return moments.groups()
