"""A density given labels as a classifier of codes, next to classifiers that learn nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.densities import Density
from pipeline.densities.common.context import LABELS
from pipeline.evaluation.likelihood import log_likelihood, with_context
from pipeline.evaluation.moments import Mean, mean_and_error
from pipeline.storage.codes import CodeReader
from pipeline.system.ranks import Ranks

__all__ = ["Classification", "classify", "conditional_scores", "reference_scores"]

BINS = 15  # of confidence, for the calibration error
REFERENCE_CODES = 60_000  # training codes of the reference classifiers, at most, the first of the split
NEIGHBOURS = (1, 5, 15, 45)
INVERSE_PENALTIES = (0.01, 1.0, 100.0)  # of the logistic regression


@dataclass(frozen=True)
class Classification:
    """How well probabilities of classes fit the classes.

    Attributes:
        accuracy: Share of examples whose most probable class is the right one.
        log_loss: Mean of minus the logarithm of the right class's probability, in nats.
        calibration_error: Expected calibration error, see `classify`.
    """

    accuracy: Mean
    log_loss: Mean
    calibration_error: float

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Flat metrics."""
        return {
            f"{prefix}class_accuracy": self.accuracy.mean,
            f"{prefix}class_accuracy_se": self.accuracy.standard_error,
            f"{prefix}class_log_loss": self.log_loss.mean,
            f"{prefix}class_log_loss_se": self.log_loss.standard_error,
            f"{prefix}class_calibration_error": self.calibration_error,
        }


def classify(log_probabilities: NDArray[np.float64], classes: NDArray[np.int64]) -> Classification:
    r"""Accuracy, log-loss and calibration of probabilities of classes.

    The expected calibration error is :math:`\sum_b \frac{n_b}{N} |a_b - c_b|` over 15 bins of equal width, with the accuracy
    :math:`a_b` and the mean confidence :math:`c_b`, the highest probability, of the examples of a bin.

    Guo et al., On Calibration of Modern Neural Networks, 2017

    Arguments:
        log_probabilities: Their logarithms, with shape (N, M); rows that aren't normalised are normalised.
        classes: The right classes, with shape (N,).

    Example:
        >>> certain = np.log([[0.9, 0.1], [0.2, 0.8]])
        >>> classify(certain, np.array([0, 1])).accuracy.mean, round(classify(certain, np.array([0, 1])).calibration_error, 3)
        (1.0, 0.15)
    """
    normalised = log_probabilities - np.logaddexp.reduce(log_probabilities, axis=1, keepdims=True)
    right = normalised.argmax(axis=1) == classes
    confidence = np.exp(normalised.max(axis=1))
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, right - confidence, BINS)  # n_b (a_b - c_b)
    return Classification(
        accuracy=mean_and_error(right),
        log_loss=mean_and_error(-normalised[np.arange(len(classes)), classes]),
        calibration_error=float(np.abs(gaps).sum() / len(classes)),
    )


def _with_labels(
    density: Density, codes: CodeReader, split: str, limit: int | None = None
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Codes (n, D) of a split with their labels (n, 1), but for labels that no training code has."""
    for block in with_context(density, codes, codes.blocks(split, limit)):
        assert isinstance(block, tuple)
        yield block


@torch.no_grad()
def conditional_scores(density: Density, codes: CodeReader, ranks: Ranks) -> dict[str, float]:
    """Mean log-likelihood of test codes given their contexts, in nats; given labels, also how well it classifies by Bayes.

    Codes with a label that no training code has are left out; `class_scored` and `test_conditional_scored` count the others.

    Arguments:
        density: A density that is conditioned.
        codes: The codes; ranks share the test codes.
        ranks: This process among its peers.
    """
    assert density.context is not None
    blocks = with_context(density, codes, codes.blocks("test"))
    mean, error, count = log_likelihood(density, blocks, ranks, codes.index.log_volume)
    scores: dict[str, float] = {"test_conditional_log_likelihood": mean, "test_conditional_log_likelihood_se": error}
    scores["test_conditional_scored"] = float(count)
    if density.context.names != (LABELS,) or not density.context.complete or not ranks.first:
        return scores
    joint, classes = [], []
    for block in _with_labels(density, codes, "test"):
        z, labels = (torch.from_numpy(part).to(density.shift.device) for part in block)
        joint.append(density.joint_log_prob(z).double().cpu().numpy())
        classes.append(density.context.classes(density.context.encode(labels)).cpu().numpy())
    scored = np.concatenate(classes)
    return scores | classify(np.concatenate(joint), scored).metrics() | {"class_scored": float(len(scored))}


def reference_scores(density: Density, codes: CodeReader) -> dict[str, float]:
    """Accuracy and calibration of two classifiers of the same test codes: nearest neighbours and logistic regression.

    Both are fitted on standardised training codes. Their number of neighbours and penalty are those of the lowest log-loss on
    validation codes; the shares of k neighbours are smoothed by one of each class, so that none is 0.

    Arguments:
        density: A density that is conditioned on labels, for the classes that training codes have.
        codes: The codes.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    assert density.context is not None
    levels = density.context.rows[:, 0].double().cpu().numpy()
    mean, std = np.array(codes.index.mean), np.maximum(codes.index.std, 1e-12)

    def labelled(split: str, limit: int | None = None) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        pairs = list(_with_labels(density, codes, split, limit))
        z, labels = (np.concatenate([pair[i] for pair in pairs]).astype(np.float64) for i in (0, 1))
        return (z - mean) / std, np.searchsorted(levels, labels[:, 0])

    train, valid, test = labelled("train", REFERENCE_CODES), labelled("valid"), labelled("test")
    neighbours = KNeighborsClassifier(min(max(NEIGHBOURS), len(train[0]))).fit(*train)

    def shares(z: NDArray[np.float64], k: int) -> NDArray[np.float64]:
        nearest = train[1][neighbours.kneighbors(z, k, return_distance=False)]  # (N, k)
        counts = (nearest[:, :, None] == np.arange(len(levels))).sum(axis=1)
        smoothed: NDArray[np.float64] = np.log((counts + 1 / len(levels)) / (k + 1))
        return smoothed

    best: dict[str, float] = {}
    tested: dict[str, Classification] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        candidates: list[tuple[str, float]] = [("knn_", k) for k in NEIGHBOURS if k <= len(train[0])]
        candidates += [("logistic_", penalty) for penalty in INVERSE_PENALTIES if len(levels) > 1]
        for name, value in candidates:
            if name == "knn_":
                log_probabilities = [shares(z, int(value)) for z, _ in (valid, test)]
            else:
                model = LogisticRegression(C=value, max_iter=500).fit(*train)
                log_probabilities = [model.predict_log_proba(z) for z, _ in (valid, test)]
            loss = classify(log_probabilities[0], valid[1]).log_loss.mean
            if loss < best.get(name, np.inf):
                best[name], tested[name] = loss, classify(log_probabilities[1], test[1])
    return {key: value for name, result in tested.items() for key, value in result.metrics(name).items()}
