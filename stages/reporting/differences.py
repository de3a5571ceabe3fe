"""Differences of two rows' scores, with their errors: point by point where both scored the same points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.moments import grouped_mean_and_error, mean_and_error
from stages.reporting.metrics import METRICS, NETWORKS

__all__ = ["Difference", "difference", "error_key"]

Points = Mapping[str, NDArray[Any]]  # metric -> values of test points, as stages write them
COUNTS = {"test_log_likelihood": "test_scored", "parzen_test_log_likelihood": "parzen_test_points"}
SURE = 2.0  # standard errors from which a difference is called one


@dataclass(frozen=True)
class Difference:
    """How much one score is above another.

    Attributes:
        value: The difference, second less first.
        error: Its standard error; NaN where it is unknown.
        paired: Whether the error is that of differences of the same points, not of two independent means.
    """

    value: float
    error: float
    paired: bool

    @property
    def sure(self) -> bool:
        """Whether it is more than two standard errors from 0."""
        return abs(self.value) > SURE * self.error


def error_key(key: str) -> str:
    """The metric that holds a metric's standard error; empty where it has none.

    Example:
        >>> error_key("parzen_test_log_likelihood"), error_key("classifier_kid"), error_key("classifier_fid")
        ('parzen_test_se', 'classifier_kid_se', '')
    """
    names = {metric.key.replace("NETWORK", network): (metric, network) for metric in METRICS.values() for network in NETWORKS}
    metric, network = names.get(key, (None, ""))
    return metric.error.replace("NETWORK", network) if metric is not None else ""


def difference(
    key: str, first: Mapping[str, Any], second: Mapping[str, Any], first_points: Points, second_points: Points
) -> Difference:
    r"""The difference of a score, second less first.

    .. math:: \mathrm{SE}(d) = \frac{\mathrm{sd}(b_i - a_i)}{\sqrt n}

    over the points i that both scored, or over the means of groups of dependent points; without them
    :math:`\sqrt{\mathrm{SE}(a)^2 + \mathrm{SE}(b)^2}`, as if the two were independent. Two rows of a data set score the same
    points, and what makes a point hard for one makes it hard for the other, so the first error is smaller.

    Arguments:
        key: The metric.
        first: Metrics of the first row.
        second: Those of the second.
        first_points: Values of the first row's test points, in order.
        second_points: Those of the second's.
    """
    value = float(second[key]) - float(first[key])
    source = "test_log_likelihood" if key == "gap_to_truth" else key  # the gap is that score less a constant, negated
    a, b = first_points.get(source), second_points.get(source)
    groups = [np.asarray(points.get("groups", ())) for points in (first_points, second_points)]
    same = len(groups[0]) == len(groups[1]) and bool((groups[0] == groups[1]).all())
    if a is not None and b is not None and len(a) == len(b) > 1 and same:
        differences = b.astype(np.float64) - a.astype(np.float64)
        grouped = source == "test_log_likelihood" and len(groups[0]) == len(differences)
        error = (grouped_mean_and_error(differences, groups[0]) if grouped else mean_and_error(differences)).standard_error
        if math.isfinite(error):
            # Values of only the first points are kept; the error is that of all.
            scored = min(float(scores.get(COUNTS.get(source, "")) or 0) for scores in (first, second))
            return Difference(value, error * math.sqrt(min(len(a) / scored, 1)) if scored else error, True)
    errors = [scores.get(error_key(key)) for scores in (first, second)]
    known = [float(error) for error in errors if error is not None]
    return Difference(value, math.hypot(*known) if len(known) == 2 else math.nan, False)
