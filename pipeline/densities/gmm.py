"""A mixture of Gaussians with full covariances, by expectation maximisation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from pipeline.densities.common.density import Density, Proceed, standard_normal, uniform
from pipeline.errors import DataError
from pipeline.settings import Checked, DensitySettings, check_that

__all__ = ["GaussianMixture", "Options", "Settings"]


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of `GaussianMixture`.

    Attributes:
        components: Numbers of Gaussians to try, in ascending order, until the validation likelihood falls.
        iterations: Steps of expectation maximisation at most.
        tolerance: Gain in mean log-likelihood, in nats, below which they end.
        ridge: Added to each variance, in standardised units.
        max_examples: Training codes at most, drawn at random, since they are held in memory.
    """

    components: tuple[int, ...] = (10, 20, 50, 100, 200)
    iterations: int = 100
    tolerance: float = 1e-3
    ridge: float = 1e-6
    max_examples: int = 100_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(len(self.components) > 0, "components", "has to list at least one number")
        check_that(all(k >= 1 for k in self.components), "components", "have to be at least 1")
        check_that(list(self.components) == sorted(set(self.components)), "components", "have to ascend")
        check_that(self.iterations >= 1, "iterations", "has to be at least 1")
        check_that(self.tolerance >= 0, "tolerance", "has to be 0 or more")
        check_that(self.ridge >= 0, "ridge", "has to be 0 or more")
        check_that(self.max_examples >= 1, "max_examples", "has to be at least 1")


@dataclass(frozen=True, kw_only=True)
class Settings(DensitySettings, Options):
    """A mixture of Gaussians with full covariances; only `standardise`, `seed` and `max_minutes` of the common keys matter.

    The clock is read between two numbers of Gaussians: at least one is fitted, and the best so far is kept.
    """


class GaussianMixture(Density):
    r"""A mixture of Gaussians, :math:`p(z) = \sum_k \pi_k \, \mathcal{N}(z; \mu_k, \Sigma_k)`, fitted by scikit-learn.

    Arguments:
        dim: The number of dimensions :math:`D`.
        options: The fields of `Options`.

    Example:
        >>> density = GaussianMixture(1, components=[1, 2])
        >>> codes = torch.cat([torch.linspace(-4, -2, 100), torch.linspace(2, 4, 100)])[:, None]
        >>> density.estimate(lambda: [codes], codes)
        >>> density.means.flatten().sort().values
        tensor([-3.,  3.])
    """

    family = "gmm"
    options_type = Options
    trained_by_gradient = False

    log_weights: Tensor
    means: Tensor
    whitening: Tensor

    options: Options

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        self.candidates = len(self.options.components)
        self._set_components(self.options.components[-1])

    def _set_components(self, count: int) -> None:
        self.register_buffer("log_weights", self.shift.new_full((count,), -math.log(count)))
        self.register_buffer("means", self.shift.new_zeros(count, self.dim))
        # W_k upper triangular with Sigma_k^-1 = W_k W_k^T, so that (z - mu_k) W_k is white.
        self.register_buffer("whitening", torch.eye(self.dim).to(self.shift).repeat(count, 1, 1))
        self.chunk_examples = max(64, 2**22 // (count * self.dim))

    def arguments(self) -> dict[str, Any]:
        """The number of Gaussians that the fit has chosen; the other options matter to the fit only."""
        return {"dim": self.dim, "components": [self.components]}

    @property
    def components(self) -> int:
        """The number of Gaussians, as chosen by the fit."""
        return len(self.means)

    @property
    def parameter_count(self) -> int:
        """Weights, which sum to 1, means, and covariances."""
        return self.components * (1 + self.dim + self.dim * (self.dim + 1) // 2) - 1

    def _estimate(self, blocks: Callable[[], Iterable[Tensor]], valid: Tensor, seed: int, proceed: Proceed) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture as Estimator

        codes = _subset(blocks(), self.options.max_examples, seed).double().cpu().numpy()
        held_out = valid.double().cpu().numpy()
        best: Estimator | None = None
        best_value = -math.inf
        for count in self.options.components:
            if count > len(codes):
                break
            estimator = Estimator(
                count,
                tol=self.options.tolerance,
                reg_covar=self.options.ridge,
                max_iter=self.options.iterations,
                random_state=seed,
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # the number of iterations is a setting
                try:
                    estimator.fit(codes)
                except ValueError as error:
                    raise DataError(f"a mixture of {count} Gaussians doesn't fit ({error}); raise `ridge`") from None
            value = float(estimator.score(held_out)) if len(held_out) else -float(estimator.bic(codes))
            time_left = proceed(f"{count} Gaussians", value - float(self.scale.double().log().sum()))
            if value <= best_value:
                break
            best, best_value = estimator, value
            if not time_left:
                break
        if best is None:
            raise DataError(f"{len(codes)} training codes are too few for a mixture of {self.options.components[0]} Gaussians")
        self._set_components(len(best.weights_))
        self.log_weights.copy_(torch.from_numpy(best.weights_).log())
        self.means.copy_(torch.from_numpy(best.means_))
        self.whitening.copy_(torch.from_numpy(best.precisions_cholesky_))

    def _log_prob(self, z: Tensor) -> Tensor:
        flat = self.whitening.permute(1, 0, 2).flatten(1)  # (D, K D)
        offset = (self.means[:, None] @ self.whitening)[:, 0]  # (K, D)
        white = (z @ flat).view(len(z), *offset.shape) - offset  # (B, K, D)
        log_det = self.whitening.diagonal(dim1=1, dim2=2).log().sum(dim=1)  # (K)
        each = log_det - 0.5 * white.square().sum(dim=2) - 0.5 * self.dim * math.log(2 * math.pi)
        return torch.logsumexp(self.log_weights + each, dim=1)

    def _sample(self, n: int, generator: Generator | None) -> Tensor:
        cumulative = self.log_weights.exp().cumsum(dim=0)
        levels = uniform((n,), self.shift, generator) * cumulative[-1]
        component = torch.searchsorted(cumulative, levels, right=True).clamp_(max=len(cumulative) - 1)
        z = standard_normal((n, self.dim), self.shift, generator)
        for k in component.unique().tolist():
            chosen = component == k
            z[chosen] = self.means[k] + torch.linalg.solve_triangular(self.whitening[k], z[chosen], upper=True, left=False)
        return z


def _subset(blocks: Iterable[Tensor], limit: int, seed: int) -> Tensor:
    """At most `limit` rows, drawn evenly: those with the smallest of random keys."""
    generator = torch.Generator().manual_seed(seed)
    rows, keys = list[Tensor](), list[Tensor]()
    for block in blocks:
        rows.append(block.cpu())
        keys.append(torch.rand(len(block), generator=generator, dtype=torch.float64))
        if sum(map(len, rows)) > 2 * limit:
            rows, keys = _smallest(rows, keys, limit)
    if not rows:
        raise DataError("there are no training codes")
    return _smallest(rows, keys, limit)[0][0]


def _smallest(rows: list[Tensor], keys: list[Tensor], limit: int) -> tuple[list[Tensor], list[Tensor]]:
    joined, key = torch.cat(rows), torch.cat(keys)
    kept = key.argsort()[:limit].sort().values
    return [joined[kept]], [key[kept]]


Model = GaussianMixture
