"""Quality of sampled images in a feature space: KID, FID, precision, recall, density, coverage, and nearest training images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluation.moments import Mean, mean_and_error
from pipeline.system.streams import stream

__all__ = ["Manifolds", "QualityScore", "fid", "kid", "kid_by_class", "kid_of_subsets", "manifolds", "nearest", "score"]

Features = NDArray[np.floating]

CHUNK = 1024  # rows of distances held at once


def kid_of_subsets(
    real: Features, samples: Features, subsets: int = 10, subset_examples: int = 1000, seed: int = 0
) -> NDArray[np.float64]:
    r"""Kernel Inception distance of each of several disjoint random subsets, with shape (subsets,).

    .. math:: \mathrm{MMD}^2_u, \quad k(x, y) = (x^T y / F + 1)^3

    The estimate is unbiased: it is comparable across set sizes, and it can be negative. The subsets are disjoint and therefore
    independent, so the standard error is valid. The usual standard deviation over overlapping subsets is not one.

    Binkowski et al., Demystifying MMD GANs, 2018, with torchmetrics's kernel

    Arguments:
        real: Features of real images with shape (n, F).
        samples: Features of samples with shape (m, F).
        subsets: Number of subsets.
        subset_examples: Examples in a subset; fewer where n or m / `subsets` is smaller.
        seed: Seed of the subsets.

    Raises:
        DataError: When there are fewer than two examples for each subset.
    """
    _check(real, samples)
    examples = min(subset_examples, len(real) // subsets, len(samples) // subsets)
    if examples < 2:
        raise DataError(f"KID: {len(real)} real images and {len(samples)} samples are too few for {subsets} subsets")
    from torchmetrics.image.kid import poly_mmd  # seconds to import

    generator = stream("subsets of KID", seed)
    orders = [generator.permutation(len(f))[: subsets * examples].reshape(subsets, examples) for f in (real, samples)]
    x, y = (torch.from_numpy(np.asarray(f, dtype=np.float64)) for f in (real, samples))
    return np.array([float(poly_mmd(x[i], y[j])) for i, j in zip(*map(torch.from_numpy, orders), strict=True)])


def kid(real: Features, samples: Features, subsets: int = 10, subset_examples: int = 1000, seed: int = 0) -> Mean:
    """Kernel Inception distance, mean over disjoint random subsets, with its standard error; see `kid_of_subsets`."""
    return mean_and_error(kid_of_subsets(real, samples, subsets, subset_examples, seed))


def kid_by_class(
    real: tuple[Features, NDArray[np.int64]], samples: tuple[Features, NDArray[np.int64]], seed: int = 0, subsets: int = 10
) -> dict[str, float]:
    """KID within each class, and its mean over classes, which sees a sample that looks like another class than its own.

    Classes with fewer than two images or samples for each subset are left out.

    Arguments:
        real: Features of real images with shape (n, F), and their labels with shape (n,).
        samples: Features of samples with shape (m, F), and their labels with shape (m,).
        seed: Seed of the subsets.
        subsets: Number of subsets of each class.

    Returns:
        `class_kid` and `class_kid_se`, and for each label `kid_of_LABEL` and `kid_of_LABEL_se`; empty if no class is left.
    """
    scores: dict[str, float] = {}
    each = []
    for label in np.unique(real[1]).tolist():
        features = [values[labels == label] for values, labels in (real, samples)]
        if min(map(len, features)) >= 2 * subsets:
            each.append(kid(features[0], features[1], subsets=subsets, seed=seed))
            scores |= {f"kid_of_{label}": each[-1].mean, f"kid_of_{label}_se": each[-1].standard_error}
    if not each:
        return {}
    error = math.sqrt(sum(score.standard_error**2 for score in each)) / len(each)
    return {"class_kid": float(np.mean([score.mean for score in each])), "class_kid_se": error} | scores


class _PassThrough(torch.nn.Module):
    """Takes the place of torchmetrics's network: returns the features that it gets."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(real: Features, samples: Features) -> float:
    r"""Frechet distance of two Gaussians with the features' moments.

    .. math:: \|\mu_r - \mu_s\|^2 + \mathrm{Tr}(\Sigma_r + \Sigma_s - 2 (\Sigma_r \Sigma_s)^{1/2})

    It is biased upwards, more so for fewer images: values at different numbers of images aren't comparable.

    Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, 2017, in torchmetrics

    Arguments:
        real: Features of real images with shape (n, F).
        samples: Features of samples with shape (m, F).
    """
    _check(real, samples)
    from torchmetrics.image.fid import FrechetInceptionDistance  # seconds to import

    metric = FrechetInceptionDistance(_PassThrough(real.shape[1]))
    # Moments are shifted by the real mean: covariances come from a difference that would cancel.
    shift = real.mean(axis=0, dtype=np.float64)
    for features, is_real in ((real, True), (samples, False)):
        metric.update(torch.from_numpy(np.asarray(features, dtype=np.float64) - shift), real=is_real)
    return float(metric.compute())


@dataclass(frozen=True)
class Manifolds:
    """How samples and real images overlap. Standard errors are those of a mean over samples or real images, all else fixed.

    Attributes:
        precision: Share of samples within the k-th neighbour's distance of some real image.
        recall: Share of real images within the k-th neighbour's distance of some sample.
        density: Number of real images' balls that contain a sample, over k; 1 if the two distributions agree; it may exceed 1.
        coverage: Share of real images whose ball holds a sample.
        recalled: Whether each real image is within that distance, with shape (n,).
        covered: Whether its ball holds a sample, with shape (n,).
    """

    precision: Mean
    recall: Mean
    density: Mean
    coverage: Mean
    recalled: NDArray[np.bool_] = field(compare=False, repr=False)
    covered: NDArray[np.bool_] = field(compare=False, repr=False)


def _squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances of rows of x to all of y, a chunk (r, m) at a time."""
    y_squares = y.square().sum(1)
    for i in range(0, len(x), CHUNK):
        rows = slice(i, min(i + CHUNK, len(x)))
        part = x[rows]
        yield rows, (part.square().sum(1)[:, None] + y_squares - 2 * part @ y.T).clamp_(min=0)


def _radii(x: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """Squared distance of each row to its k-th nearest other row, with shape (n,), for each k."""
    distances = torch.empty(len(x), max(ks), dtype=x.dtype)
    for rows, squares in _squared_distances(x, x):
        squares[torch.arange(len(squares)), torch.arange(rows.start, rows.stop)] = math.inf
        distances[rows] = squares.topk(max(ks), largest=False).values
    return [distances[:, k - 1] for k in ks]


def manifolds(real: Features, samples: Features, neighbours: int = 3, density_neighbours: int = 5) -> Manifolds:
    """Precision, recall, density and coverage; memory holds 1024 rows of distances.

    Kynkaanniemi et al., Improved Precision and Recall Metric for Assessing Generative Models, 2019 (k = 3)
    Naeem et al., Reliable Fidelity and Diversity Metrics for Generative Models, 2020 (k = 5)

    Arguments:
        real: Features of real images with shape (n, F).
        samples: Features of samples with shape (m, F); recall is fair only at m = n.
        neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.

    Raises:
        DataError: When there aren't more images than neighbours.

    Example:
        >>> line = np.arange(10.0)[:, None]
        >>> same, far = manifolds(line, line), manifolds(line, line + 100)
        >>> same.precision.mean, same.recall.mean, same.coverage.mean, far.precision.mean, far.coverage.mean
        (1.0, 1.0, 1.0, 0.0, 0.0)
    """
    _check(real, samples)
    most = max(neighbours, density_neighbours)
    if min(len(real), len(samples)) <= most:
        raise DataError(
            f"precision and recall: {len(real)} real images and {len(samples)} samples are too few for {most} neighbours"
        )
    # Shifted: otherwise distances lose digits to a large common mean.
    shift = real.mean(axis=0, dtype=np.float64)
    x, y = (torch.from_numpy(np.asarray(f, dtype=np.float64) - shift) for f in (real, samples))
    real_radii, density_radii = _radii(x, (neighbours, density_neighbours))
    sample_radii = _radii(y, (neighbours,))[0]
    precise, dense = torch.zeros(len(y), dtype=torch.bool), torch.zeros(len(y))
    recalled, covered = torch.zeros(len(x), dtype=torch.bool), torch.zeros(len(x), dtype=torch.bool)
    for rows, squares in _squared_distances(y, x):  # (r, n): samples to real images
        precise[rows] = (squares <= real_radii).any(1)
        inside = squares <= density_radii
        dense[rows] = inside.sum(1) / density_neighbours
        covered |= inside.any(0)
        recalled |= (squares <= sample_radii[rows, None]).any(0)
    precision, recall, density, coverage = (mean_and_error(v.double().numpy()) for v in (precise, recalled, dense, covered))
    return Manifolds(precision, recall, density, coverage, recalled.numpy(), covered.numpy())


@dataclass(frozen=True)
class QualityScore:
    """Scores of samples in the features of one network.

    Attributes:
        network: Name of the feature network.
        kid: Kernel distance and its standard error.
        fid: Frechet distance.
        manifolds: Precision, recall, density and coverage.
        real: Number of real images.
        samples: Number of samples.
        kid_values: Kernel distance of each subset; those of two sets of samples have the same real images.
        by_class: What `kid_by_class` gives, of samples with labels.
    """

    network: str
    kid: Mean
    fid: float
    manifolds: Manifolds
    real: int
    samples: int
    kid_values: NDArray[np.float64] = field(compare=False, repr=False)
    by_class: Mapping[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Flat metrics, each name starting with the network's, since scores of two networks aren't comparable."""
        values = {"kid": self.kid.mean, "kid_se": self.kid.standard_error, "fid": self.fid}
        for name in ("precision", "recall", "density", "coverage"):
            result: Mean = getattr(self.manifolds, name)
            values |= {name: result.mean, f"{name}_se": result.standard_error}
        values |= {"real_images": self.real, "samples": self.samples, **self.by_class}
        return {f"{self.network}_{name}": value for name, value in values.items()}

    def values(self) -> dict[str, NDArray[Any]]:
        """What metrics are means of, by their names: those that two sets of samples can be compared by, pair by pair."""
        kept = {"kid": self.kid_values, "recall": self.manifolds.recalled, "coverage": self.manifolds.covered}
        return {f"{self.network}_{name}": values for name, values in kept.items()}


def score(network: str, real: Features, samples: Features, seed: int = 0, neighbours: int = 3) -> QualityScore:
    """All scores of samples at once.

    Precision, recall, density and coverage use equal numbers, the first of the longer set; KID and FID use all.

    Arguments:
        network: Name of the feature network.
        real: Features of real images with shape (n, F).
        samples: Features of samples with shape (m, F).
        seed: Seed of KID's subsets.
        neighbours: k of precision and recall.
    """
    both = min(len(real), len(samples))
    kid_values = kid_of_subsets(real, samples, seed=seed)
    return QualityScore(
        network=network,
        kid=mean_and_error(kid_values),
        fid=fid(real, samples),
        manifolds=manifolds(real[:both], samples[:both], neighbours),
        real=len(real),
        samples=len(samples),
        kid_values=kid_values,
    )


def nearest(queries: NDArray[np.floating], blocks: Iterable[np.ndarray]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The nearest row of a stream to each query, in pixels: the training image that a sample may have copied.

    Arguments:
        queries: The first samples, with shape (q, ...).
        blocks: Blocks of training images, each with shape (n, ...).

    Returns:
        The nearest images with shape (q, ...), and their root mean squared distances over pixels with shape (q,).
    """
    x = torch.from_numpy(np.asarray(queries, dtype=np.float32)).flatten(1)
    best = torch.full((len(x),), math.inf, dtype=torch.float64)
    distances = np.zeros(queries.shape, dtype=np.float32)
    for block in blocks:
        rows = torch.from_numpy(np.ascontiguousarray(block, dtype=np.float32)).flatten(1)
        if not len(rows):
            continue
        if rows.shape[1] != x.shape[1]:
            raise DataError(f"nearest images: {rows.shape[1]} pixels where the samples have {x.shape[1]}")
        index = torch.cdist(x, rows).argmin(1)
        squares = (x - rows[index]).double().square().mean(1)  # exact for the nearest one
        closer = squares < best
        best[closer] = squares[closer]
        distances[closer.numpy()] = rows[index[closer]].numpy().reshape(-1, *queries.shape[1:])
    if not bool(torch.isfinite(best).all()):
        raise DataError("nearest images: there are no training images")
    return distances, best.sqrt().numpy()


def _check(real: Features, samples: Features) -> None:
    for name, features in (("real images", real), ("samples", samples)):
        if features.ndim != 2 or not len(features):
            raise DataError(f"features of {name} have shape {features.shape}, expected (n, F)")
        if not np.isfinite(features).all():
            raise DataError(f"features of {name} hold NaN or infinite values")
    if real.shape[1] != samples.shape[1]:
        raise DataError(f"real images have {real.shape[1]} features, samples {samples.shape[1]}")
