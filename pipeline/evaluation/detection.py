"""How strange an example is, the threshold beyond which it is an outlier, and how well outliers are told from inliers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import DataError
from pipeline.system.streams import stream

__all__ = ["Calibration", "Detection", "Surprise", "detect", "roc_curve"]

TAIL = 0.05  # share of the reference values that the tail is estimated from
DETECTED = 0.95  # share of the outliers that are detected where false alarms are counted

Values = NDArray[np.float64]


class Surprise:
    r"""Surprise of a value among reference values, in nats; the larger the value, the more surprising.

    .. math:: s(v) = -\log S(v), \qquad S(r_{(i)}) = \frac{n - i + 1/2}{n}, \quad i = 1, \dots, n

    S is the share of the reference values :math:`r_{(1)} \leq \dots \leq r_{(n)}` above v, its logarithm linear between them.
    Beyond the largest 5 % an exponential tail goes on, :math:`s(v) = s(u) + (v - u) / m`, where u is where it starts and m
    the mean excess of the values beyond u. So values that no reference value reaches are still told apart.

    Arguments:
        reference: Values of examples that belong, with shape (n,).

    Raises:
        DataError: When there are none, or one isn't finite.

    Example:
        >>> surprise = Surprise(np.arange(100.0))
        >>> surprise(np.array([0.0, 50.0, 94.0, 99.0, 200.0])).round(2).tolist()
        [0.01, 0.7, 2.9, 4.57, 38.23]
    """

    def __init__(self, reference: ArrayLike) -> None:
        ordered = np.sort(np.asarray(reference, dtype=np.float64))
        count = len(ordered)
        if not count or not np.isfinite(ordered).all():
            raise DataError("the scores of the validation examples aren't finite: the density or the decoder has diverged")
        in_tail = max(1, round(TAIL * count)) if count > 1 else 0
        self._values = ordered[: count - in_tail]
        self._surprises = -np.log((count - np.arange(1, count - in_tail + 1) + 0.5) / count)
        excess = float((ordered[count - in_tail :] - self._values[-1]).mean()) if in_tail else 0.0
        self._excess = excess or float(np.std(ordered)) or 1.0

    def __call__(self, values: ArrayLike) -> Values:
        """The surprise of values with shape (n,)."""
        values = np.asarray(values, dtype=np.float64)
        within = np.interp(values, self._values, self._surprises)
        return np.asarray(within + np.maximum(values - self._values[-1], 0) / self._excess, dtype=np.float64)


class Calibration:
    r"""Joins the scores of an example into one, and says at which the wished share of examples that belong is exceeded.

    The joined score is the sum of the surprises of the single scores (Fisher's method, with tails that go on): in nats, larger
    is stranger. Half of the validation examples, every other one, tell how surprising a single score is; the others, which the
    joined score is independent of, calibrate it. With one score all do both, since the order is that of the score.

    An example is an outlier where its conformal p-value is at most the wished share a of false alarms:

    .. math:: p = \frac{1 + |\{i : c_i \geq s\}|}{n + 1} \leq a

    with the joined scores :math:`c_1, \dots, c_n` of the calibrating examples. Of examples that are exchangeable with these, at
    most a share a is taken for outliers, on average over calibrations: :math:`\lfloor a (n + 1) \rfloor / (n + 1)`.

    References:
        | Algorithmic Learning in a Random World (Vovk, Gammerman and Shafer, 2005)

    Arguments:
        scores: By name, scores of validation examples with shape (N,), larger is stranger.

    Attributes:
        joined: Joined scores of the calibrating examples, ascending, with shape (n,).

    Raises:
        DataError: When there are no examples, or a score isn't finite.

    Example:
        >>> calibration = Calibration({"error": np.arange(99.0)})
        >>> calibration.p_values(calibration.join({"error": np.array([-1.0, 98.0, 99.0])})).tolist()
        [1.0, 0.02, 0.01]
    """

    def __init__(self, scores: dict[str, Values]) -> None:
        single = len(scores) == 1
        self._surprises = {name: Surprise(values if single else values[::2]) for name, values in scores.items()}
        calibrating = scores if single else {name: values[1::2] for name, values in scores.items()}
        self.joined = np.sort(self.join(calibrating))

    def join(self, scores: dict[str, Values]) -> Values:
        """The joined scores (n,) in nats of examples, from their single ones; larger is stranger."""
        terms = [surprise(scores[name]) for name, surprise in self._surprises.items()]
        return np.asarray(np.sum(terms, axis=0), dtype=np.float64)

    def p_values(self, joined: Values) -> Values:
        """Conformal p-values (n,) of joined scores."""
        count = len(self.joined)
        as_strange = count - np.searchsorted(self.joined, joined, side="left")
        return np.asarray((1 + as_strange) / (count + 1), dtype=np.float64)

    @property
    def least_false_alarms(self) -> float:
        """The least share of false alarms, in thousandths, that there are enough examples for."""
        return math.ceil(1000 / (len(self.joined) + 1)) / 1000

    def threshold(self, false_alarms: float) -> float:
        """The joined score above which an example is an outlier: there its p-value is at most `false_alarms`.

        Raises:
            DataError: When there are too few examples to calibrate so small a share on.
        """
        count = len(self.joined)
        rank = math.floor(false_alarms * (count + 1) + 1e-9)
        if rank < 1:
            raise DataError(
                f"a share of false alarms of {false_alarms:g} takes at least {math.ceil(1 / false_alarms - 1e-9) - 1} "
                f"validation examples to calibrate on, and there are {count}; ask for a share of at least "
                f"{self.least_false_alarms:g}"
            )
        return float(self.joined[count - rank])


def roc_curve(inliers: ArrayLike, outliers: ArrayLike, points: int = 200) -> tuple[Values, Values]:
    """Share of false alarms and share of outliers detected, each with shape (K,), at descending thresholds.

    Arguments:
        inliers: Scores of examples that belong, with shape (n,); larger is stranger.
        outliers: Scores of examples that don't, with shape (m,).
        points: Number K of points, at most; both ends are among them.
    """
    curve = _Curve(inliers, outliers)
    alarms, detected = curve.shares(np.ones(len(curve.is_outlier)))
    chosen = np.unique(np.linspace(0, len(alarms) - 1, min(points - 1, len(alarms))).round().astype(int))
    return np.r_[0.0, alarms[chosen]], np.r_[0.0, detected[chosen]]


class _Curve:
    """Examples in descending order of their scores; equal scores are passed by a threshold together."""

    def __init__(self, inliers: ArrayLike, outliers: ArrayLike) -> None:
        scores = np.concatenate([np.asarray(inliers, np.float64), np.asarray(outliers, np.float64)])
        if np.isnan(scores).any():
            raise DataError("a score isn't a number: the density or the decoder has diverged")
        order = np.argsort(-scores, kind="stable")
        self.order, ordered = order, scores[order]
        self.is_outlier = order >= len(np.asarray(inliers))
        self.last = np.flatnonzero(np.r_[ordered[1:] != ordered[:-1], True])  # of each run of equal scores

    def shares(self, weights: Values) -> tuple[Values, Values]:
        """Shares of the weight of inliers and of outliers at or above each distinct score."""
        outliers = np.cumsum(weights * self.is_outlier)[self.last]
        inliers = np.cumsum(weights * ~self.is_outlier)[self.last]
        return inliers / inliers[-1], outliers / outliers[-1]

    def average_precision(self, weights: Values) -> float:
        """Mean precision over the outliers, where each is the last one that is detected."""
        outliers = np.cumsum(weights * self.is_outlier)[self.last]
        alarms = np.cumsum(weights)[self.last]
        gained = np.diff(outliers, prepend=0.0)
        return float((gained * outliers / np.maximum(alarms, 1e-300)).sum() / outliers[-1])

    def false_alarms(self, weights: Values) -> float:
        """Share of the inliers at or above the highest threshold that detects 95 % of the outliers."""
        alarms, detected = self.shares(weights)
        return float(alarms[np.searchsorted(detected, DETECTED - 1e-12)])


@dataclass(frozen=True)
class Detection:
    """How well a score tells outliers from inliers, with standard errors.

    Attributes:
        auroc: Probability that an outlier is stranger than an inlier, ties by half; its error is DeLong's.
        average_precision: Area under precision against recall of the outliers; it depends on their share.
        false_alarms: Share of the inliers taken for outliers where 95 % of the outliers are detected.
        auroc_se: Standard error over inliers and outliers.
        average_precision_se: The same, by bootstrap.
        false_alarms_se: The same, by bootstrap.
    """

    auroc: float
    auroc_se: float
    average_precision: float
    average_precision_se: float
    false_alarms: float
    false_alarms_se: float

    def metrics(self) -> dict[str, float]:
        """Flat metrics."""
        names = {"false_alarms": "false_alarms_at_95", "false_alarms_se": "false_alarms_at_95_se"}
        return {names.get(name, name): value for name, value in vars(self).items()}


def detect(inliers: ArrayLike, outliers: ArrayLike, seed: int = 0, replicates: int = 200) -> Detection:
    r"""How well a score tells outliers from inliers.

    .. math:: \text{AUROC} = \frac{1}{nm} \sum_{ij} \left[ o_j > s_i \right] + \tfrac{1}{2} \left[ o_j = s_i \right], \qquad
        \text{var} = \frac{\text{var}_i(V_i)}{n} + \frac{\text{var}_j(V_j)}{m}

    where :math:`V_i` is the share of the outliers that are stranger than inlier i, and :math:`V_j` that of the inliers that
    outlier j is stranger than.

    References:
        | Comparing the Areas under Two or More Correlated Receiver Operating Characteristic Curves (DeLong et al., 1988)

    Arguments:
        inliers: Scores of examples that belong, with shape (n,); larger is stranger.
        outliers: Scores of examples that don't, with shape (m,).
        seed: Seed of the bootstrap.
        replicates: Its replicates.

    Raises:
        DataError: When there are none of either, or a score isn't a number.

    Example:
        >>> found = detect([0.0, 1.0, 2.0, 3.0], [2.5, 4.0, 5.0, 6.0])
        >>> round(found.auroc, 4), round(found.auroc_se, 4), found.average_precision, found.false_alarms
        (0.9375, 0.0884, 0.95, 0.25)
    """
    inliers, outliers = np.asarray(inliers, np.float64), np.asarray(outliers, np.float64)
    if not len(inliers) or not len(outliers):
        raise DataError(f"there are {len(inliers)} inliers and {len(outliers)} outliers to compare; both are needed")
    curve = _Curve(inliers, outliers)
    of_inlier = 1 - _share_below(outliers, inliers)  # (n,)
    of_outlier = _share_below(inliers, outliers)  # (m,)
    variance = sum(float(shares.var(ddof=1)) / len(shares) for shares in (of_inlier, of_outlier) if len(shares) > 1)
    scores: Sequence[Callable[[Values], float]] = (curve.average_precision, curve.false_alarms)
    drawn = np.array([[score(weights) for score in scores] for weights in _resampled(curve, len(inliers), seed, replicates)])
    every = np.ones(len(curve.is_outlier))
    precision_se, alarms_se = drawn.std(axis=0, ddof=1)
    return Detection(
        auroc=float(of_outlier.mean()),
        auroc_se=math.sqrt(variance),
        average_precision=curve.average_precision(every),
        average_precision_se=float(precision_se),
        false_alarms=curve.false_alarms(every),
        false_alarms_se=float(alarms_se),
    )


def _share_below(reference: Values, values: Values) -> Values:
    """Share of the reference below each value, equal ones by half."""
    ordered = np.sort(reference)
    below, up_to = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    return np.asarray((below + up_to) / (2 * len(ordered)), dtype=np.float64)


def _resampled(curve: _Curve, inliers: int, seed: int, replicates: int) -> list[Values]:
    """How often each example is in a replicate: inliers and outliers are drawn apart, as many as there are."""
    random, total = stream("bootstrap of detections", seed), len(curve.order)
    weights = []
    for _ in range(replicates):
        counts = [np.bincount(random.integers(0, n, n), minlength=n) for n in (inliers, total - inliers)]
        weights.append(np.concatenate(counts)[curve.order].astype(np.float64))
    return weights
