"""A mixture of Gaussians for each class, shrunk to the mixture that all classes have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.settings import check_that

__all__ = ["Gaussians", "adapted", "by_class", "check_pseudo_codes", "shrunk"]

Covariance = Literal["full", "tied", "diagonal"]


@dataclass(frozen=True)
class Gaussians:
    """A mixture of K Gaussians, in float64.

    Attributes:
        weights: Their weights, with shape (K,).
        means: Their means, with shape (K, D).
        covariances: Their covariances, with shape (K, D, D); `tied`, one of all, with shape (D, D); `diagonal`, the variances,
            with shape (K, D).
        kind: `full`, `tied` or `diagonal`.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    kind: Covariance = "full"

    @property
    def whitening(self) -> Tensor:
        """The upper triangular W with inverse covariance W W^T, in the shape of `covariances`; `diagonal`, 1 / deviation."""
        if self.kind == "diagonal":
            return self.covariances.rsqrt()
        factor = torch.linalg.cholesky(self.covariances)
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype).expand(factor.shape)
        inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
        return inverse.mT.contiguous()

    def joint(self, z: Tensor) -> Tensor:
        """Log of weight times density (B, K) of codes (B, D), in nats."""
        whitening, deviations = self.whitening, z[:, None] - self.means  # (B, K, D)
        if self.kind == "diagonal":
            white, log_det = deviations * whitening, whitening.log().sum(dim=1)
        elif self.kind == "tied":
            white, log_det = deviations @ whitening, whitening.diagonal().log().sum()
        else:
            white = torch.einsum("bkd,kde->bke", deviations, whitening)
            log_det = whitening.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        constant = 0.5 * z.shape[1] * math.log(2 * math.pi)
        return self.weights.log() + log_det - 0.5 * white.square().sum(dim=2) - constant


def shrunk(common: Gaussians, counts: Tensor, first: Tensor, second: Tensor, pseudo_codes: float) -> Gaussians:
    r"""The Gaussians of a class, from its codes and as many pseudo-codes of the common mixture.

    With :math:`r` pseudo-codes, of which :math:`r \pi_k` are of the k-th Gaussian and have its moments, and with codes that
    belong to it by :math:`\gamma_{nk}`,

    .. math::
        \pi'_k = \frac{n_k + r \pi_k}{n + r}, \quad \mu'_k = \frac{\sum_n \gamma_{nk} z_n + r \pi_k \mu_k}{n_k + r \pi_k}, \quad
        \Sigma'_k = \frac{\sum_n \gamma_{nk} z_n z_n^T + r \pi_k (\Sigma_k + \mu_k \mu_k^T)}{n_k + r \pi_k} - \mu'_k \mu_k'^T

    References:
        | Maximum a posteriori estimation for multivariate Gaussian mixture observations of Markov chains (Gauvain, Lee, 1994)
        | https://doi.org/10.1109/89.279278

    Arguments:
        common: The common mixture.
        counts: The numbers :math:`n_k = \sum_n \gamma_{nk}`, with shape (K,).
        first: The sums of :math:`\gamma_{nk} z_n`, with shape (K, D).
        second: The sums of :math:`\gamma_{nk} z_n z_n^T`, with shape (K, D, D); `diagonal`, of the squares, (K, D); not read
            where `tied`, since that covariance is common to all classes.
        pseudo_codes: Their number :math:`r`, above 0.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> common = Gaussians(one, torch.zeros(1, 1, dtype=torch.float64), one.view(1, 1, 1))
        >>> shrunk(common, 3 * one, 6 * one.view(1, 1), 12 * one.view(1, 1, 1), pseudo_codes=1.0).means
        tensor([[1.5000]], dtype=torch.float64)
    """
    prior = pseudo_codes * common.weights
    total = counts + prior  # (K)
    means = (first + prior[:, None] * common.means) / total[:, None]
    covariances = common.covariances
    if common.kind == "diagonal":
        squares = second + prior[:, None] * (common.covariances + common.means.square())
        covariances = squares / total[:, None] - means.square()
    elif common.kind == "full":
        outer = common.means[:, :, None] * common.means[:, None]
        products = second + prior[:, None, None] * (common.covariances + outer)
        covariances = products / total[:, None, None] - means[:, :, None] * means[:, None]
    return Gaussians(total / total.sum(), means, covariances, common.kind)


def adapted(common: Gaussians, z: Tensor, pseudo_codes: float, iterations: int, tolerance: float) -> Gaussians:
    """The mixture of a class by expectation maximisation, from the common one and with its pseudo-codes, see `shrunk`.

    Arguments:
        common: The common mixture.
        z: The codes of the class, float64 with shape (N, D).
        pseudo_codes: How many codes the common mixture counts for.
        iterations: Steps at most.
        tolerance: Gain in mean log-likelihood, in nats, below which they end.
    """
    mixture, before = common, -math.inf
    for _ in range(iterations):
        joint = mixture.joint(z)  # (N, K)
        total = torch.logsumexp(joint, dim=1)
        value = float(total.mean())
        if value - before < tolerance:
            break
        before, shares = value, (joint - total[:, None]).exp()
        if common.kind == "full":
            second = torch.einsum("nk,nd,ne->kde", shares, z, z)
        else:
            second = shares.T @ z.square()
        mixture = shrunk(common, shares.sum(dim=0), shares.T @ z, second, pseudo_codes)
    return mixture


def by_class(classes: Tensor, z: Tensor, function: Callable[[int, Tensor], Tensor]) -> Tensor:
    """A function of a class and its rows of z, applied class by class; the results are in the order of z.

    Arguments:
        classes: Number of the class of each row, with shape (B,).
        z: The rows, with shape (B, ...).
        function: From the number of a class and its rows to a result for each row.
    """
    order = classes.argsort(stable=True)
    present, counts = classes[order].unique_consecutive(return_counts=True)
    parts = zip(present.tolist(), z[order].split(counts.tolist()), strict=True)
    return torch.cat([function(number, rows) for number, rows in parts])[order.argsort()]


def check_pseudo_codes(values: tuple[float, ...]) -> None:
    """Rejects numbers of pseudo-codes that aren't positive, or not in ascending order."""
    check_that(len(values) > 0 and min(values) > 0, "pseudo_codes", "must list numbers above 0")
    check_that(list(values) == sorted(set(values)), "pseudo_codes", "must ascend")
