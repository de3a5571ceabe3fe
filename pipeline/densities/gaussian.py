"""One Gaussian with full covariance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from pipeline.densities.common.density import Density, Proceed, standard_normal
from pipeline.densities.common.gaussians import GaussianComponents
from pipeline.errors import DataError
from pipeline.settings import Checked, DensitySettings, check_that

__all__ = ["Gaussian", "Options", "Settings"]


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of `Gaussian`.

    Attributes:
        ridge: Added to the variance of each standardised dimension; 0 is maximum likelihood.
    """

    ridge: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.ridge >= 0, "ridge", "must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Settings(DensitySettings, Options):
    """One Gaussian with full covariance."""


class Gaussian(Density):
    r"""A Gaussian, :math:`p(z) = \mathcal{N}(z; \mu, \Sigma)`, by maximum likelihood in one pass over the data.

    Arguments:
        dim: The number of dimensions :math:`D`.
        options: The fields of `Options`.

    Example:
        >>> density = Gaussian(2)
        >>> codes = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
        >>> density.estimate(lambda: [codes], codes)
        >>> density.covariance
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])
        >>> density.log_prob(torch.zeros(1, 2))
        tensor([-1.8379])
    """

    family = "gaussian"
    options_type = Options
    trained_by_gradient = False

    mean: Tensor
    cholesky: Tensor

    options: Options

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("cholesky", torch.eye(dim))

    @property
    def covariance(self) -> Tensor:
        """The covariance matrix of standardised codes, with shape (D, D)."""
        return self.cholesky @ self.cholesky.T

    @property
    def parameter_count(self) -> int:
        """Mean and half of the covariance, with its diagonal."""
        return self.dim + self.dim * (self.dim + 1) // 2

    def _estimate(self, blocks: Callable[[], Iterable[Tensor]], valid: Tensor, seed: int, proceed: Proceed) -> None:
        # Moments about the origin in float64 lose nothing: codes are standardised.
        count, first, second = 0, torch.zeros(self.dim).double(), torch.zeros(self.dim, self.dim).double()
        for block in blocks():
            block = block.double().cpu()
            count, first, second = count + len(block), first + block.sum(dim=0), second + block.T @ block
        if count == 0:
            raise DataError("there are no training codes")
        mean = first / count
        covariance = second / count - torch.outer(mean, mean) + self.options.ridge * torch.eye(self.dim)
        cholesky, failed = torch.linalg.cholesky_ex(covariance)
        # What is left of a dimension's variance given those before it: nothing but rounding, where it follows from them.
        if failed or not (cholesky.diagonal().square() > 1e-12 * covariance.diagonal()).all():
            raise DataError(
                f"{count} training codes of {self.dim} dimensions have a singular covariance; "
                "set `ridge` (1e-6, say) or take more codes"
            )
        self.mean.copy_(mean)
        self.cholesky.copy_(cholesky)

    def _log_prob(self, z: Tensor) -> Tensor:
        # Cholesky factor L of the covariance: (z - mean)^T Sigma^-1 (z - mean) = ||L^-1 (z - mean)||^2.
        white: Tensor = torch.linalg.solve_triangular(self.cholesky, (z - self.mean).T, upper=False)  # (D, B)
        log_det = self.cholesky.diagonal().log().sum()
        return -0.5 * white.square().sum(dim=0) - log_det - 0.5 * self.dim * math.log(2 * math.pi)

    def _sample(self, n: int, generator: Generator | None) -> Tensor:
        samples: Tensor = self.mean + standard_normal((n, self.dim), self.mean, generator) @ self.cholesky.T
        return samples

    @property
    def has_given(self) -> bool:
        """True: in closed form."""
        return True

    def _components(self) -> GaussianComponents:
        """The Gaussian of codes standardised by shift and scale alone."""
        cholesky = self.cholesky.double()
        one = GaussianComponents(cholesky.new_zeros(1), self.mean.double()[None], (cholesky @ cholesky.T)[None])
        return one if self.factor is None else one.mapped((self.factor / self.scale[:, None]).double())

    def _log_prob_given(self, z: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        return self._components().log_prob(z, given)

    def _sample_given(self, n: int, z: Tensor, given: Tensor, generator: Generator | None) -> Tensor:
        return self._components().sample(n, z, given, generator)


Model = Gaussian
