"""How much two sets of vectors differ, for densities without likelihood: MMD, and the share within a box."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluation.moments import Mean, mean_and_error
from pipeline.sources.common.bars import DROPPED_BOX, log_density
from pipeline.system.streams import stream

__all__ = ["RELATIVE_BANDWIDTHS", "grid_scores", "median_distance", "mmd_squared", "share_in_box"]

RELATIVE_BANDWIDTHS = (0.05, 0.1, 0.2, 0.5, 1.0)  # of the median distance: fine and coarse structure count equally
TILE = 1024
COMPARED = 5_000  # samples, and as many test points, in the discrepancy: its cost grows with their square
SMALLEST_EXPONENT = -80.0


def median_distance(points: NDArray[np.floating], seed: int = 0, count: int = 2000) -> float:
    """Median distance between points, from `count` of them drawn at random."""
    chosen = stream("median distance", seed).permutation(len(points))[:count]
    return float(torch.pdist(torch.from_numpy(np.asarray(points[chosen], dtype=np.float64))).median())


def _kernel_sum(x: Tensor, y: Tensor, bandwidths: Sequence[float]) -> float:
    """Sum of sum_h k_h(x_i, y_j) over all pairs, a tile at a time."""
    total = 0.0
    for a in x.split(TILE):
        for b in y.split(TILE):
            # Distances in float64; their exponentials need no more than float32, and none of its slow denormal numbers.
            squares = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_(min=0).float()
            for h in bandwidths:
                kernel = squares.mul(-0.5 / h**2).clamp_(min=SMALLEST_EXPONENT).exp_()
                total += float(kernel.sum(1).sum(dtype=torch.float64))
    return total


def mmd_squared(x: NDArray[np.floating], y: NDArray[np.floating], bandwidths: Sequence[float] = ()) -> float:
    r"""Unbiased squared maximum mean discrepancy under a mean of Gaussian kernels.

    .. math:: \mathrm{MMD}^2_u = \frac{\sum_{i \ne j} k(x_i, x_j)}{n (n-1)} + \frac{\sum_{i \ne j} k(y_i, y_j)}{m (m-1)}
        - \frac{2 \sum_{i,j} k(x_i, y_j)}{n m}

    It is 0 on average if the two sets follow one distribution, so it can be negative.

    Gretton et al., A Kernel Two-Sample Test, 2012

    Arguments:
        x: Points of the reference, with shape (n, D).
        y: Samples with shape (m, D).
        bandwidths: Standard deviations of the kernels in the units of the points; by default `RELATIVE_BANDWIDTHS` times
            the median distance within x.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> x, y = generator.normal(size=(2, 500, 2))
        >>> mmd_squared(x, y) < 0.005 < mmd_squared(x, y + 1)
        True
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise DataError(f"MMD needs two sets of vectors of one length, not shapes {x.shape} and {y.shape}")
    if not bandwidths:
        median = median_distance(x)
        bandwidths = [median * r for r in RELATIVE_BANDWIDTHS]
    shift = x.mean(axis=0, dtype=np.float64)
    a, b = (torch.from_numpy(np.asarray(v, dtype=np.float64) - shift) for v in (x, y))
    n, m, kernels = len(a), len(b), len(bandwidths)
    # Each kernel is 1 on the diagonal.
    within = (_kernel_sum(a, a, bandwidths) - kernels * n) / (n * (n - 1)) + (_kernel_sum(b, b, bandwidths) - kernels * m) / (
        m * (m - 1)
    )
    return (within - 2 * _kernel_sum(a, b, bandwidths) / (n * m)) / kernels


def share_in_box(points: NDArray[np.floating], lower: ArrayLike, upper: ArrayLike) -> Mean:
    """Share of points strictly within a box, with its standard error.

    Arguments:
        points: Points with shape (n, D).
        lower: Lower corner with shape (D,); -inf leaves a side open.
        upper: Upper corner with shape (D,).

    Example:
        >>> share_in_box(np.array([[2.0, 3.0], [2.0, 4.0]]), lower=[1.6, 2.5], upper=[2.6, 3.5]).mean
        0.5
    """
    inside = ((points > np.asarray(lower)) & (points < np.asarray(upper))).all(axis=1)
    return mean_and_error(inside)


def grid_scores(samples: np.ndarray, test: np.ndarray, half_length: float) -> dict[str, float]:
    """Scores of samples of the grid density, whose true density is known.

    Arguments:
        samples: Samples with shape (n, 2).
        test: Test points with shape (N, 2).
        half_length: Half the length of a bar.

    Returns:
        The test log-likelihood of the true density in nats; the share of samples in the dropped box, where it has no mass, with
        its standard error; and the squared maximum mean discrepancy of samples and test points.
    """
    low, high = np.array(DROPPED_BOX).T
    share = share_in_box(samples, low, high)
    return {
        "truth_test_log_likelihood": float(log_density(test, half_length).mean()),
        "samples_in_dropped_box": share.mean,
        "samples_in_dropped_box_se": share.standard_error,
        "mmd_squared": mmd_squared(test[:COMPARED], samples[:COMPARED]),
    }
