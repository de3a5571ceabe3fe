r"""The grid density of section 4.1.1 (Figure 5): six bars that cross, of which one has a gap.

.. math:: p_0(x) = \frac{1}{6} \sum_{b \in \{0, -3, 3\}}
    \Big( U(x_1; -L, L) \, N(x_2; b, 0.1^2) + N(x_1; b, 0.1^2) \, U(x_2; -L, L) \Big)

The stretch 1.6 < x1 < 2.6 of the upper horizontal bar is dropped: nothing is drawn from the box 1.6 < x1 < 2.6,
2.5 < x2 < 3.5, and the truth is p_0 outside of it, divided by the remaining mass. All splits are drawn from the truth.

The paper writes U(-10, 10), but its "10 %" for a stretch of length 1 and its range of -5..5 fit a half length L = 5 only.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["CENTRES", "DEVIATION", "DROPPED_BOX", "dropped_box", "dropped_mass", "log_density"]

CENTRES = (0.0, -3.0, 3.0)
DEVIATION = 0.1
DROPPED_BOX = ((1.6, 2.6), (2.5, 3.5))  # bounds of x1 and of x2, both open


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
