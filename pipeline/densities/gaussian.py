"""One Gaussian with full covariance, or one for each class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from pipeline.densities.common.adaptation import Gaussians, by_class, check_pseudo_codes, shrunk
from pipeline.densities.common.density import Proceed, standard_normal
from pipeline.densities.common.gaussians import GaussianComponents, GaussianDensity
from pipeline.errors import DataError
from pipeline.settings import Checked, DensitySettings, check_that

__all__ = ["Gaussian", "Options", "Settings"]


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of `Gaussian`.

    Attributes:
        ridge: Added to the variance of each standardised dimension; 0 is maximum likelihood.
        pseudo_codes: How many codes the common Gaussian counts for in that of each class: numbers to try, in ascending order;
            the best by validation likelihood is kept. Only for rows with `context`.
    """

    takes_context: ClassVar[bool] = True

    ridge: float = 0.0
    pseudo_codes: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.ridge >= 0, "ridge", "must be 0 or more")
        check_pseudo_codes(self.pseudo_codes)


@dataclass(frozen=True, kw_only=True)
class Settings(DensitySettings, Options):
    """One Gaussian with full covariance."""


class Gaussian(GaussianDensity):
    r"""A Gaussian, :math:`p(z) = \mathcal{N}(z; \mu, \Sigma)`, by maximum likelihood in one pass over the data.

    With a context of categories, a Gaussian for each class: that of its codes and of some pseudo-codes that have the moments of
    all codes, see `pipeline.densities.common.adaptation`.

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
        classes = () if self.context is None else (self.category_contexts,)
        self.register_buffer("mean", torch.zeros(*classes, dim))
        self.register_buffer("cholesky", torch.eye(dim).repeat(*classes, 1, 1))
        if self.context is not None:
            self.has_vmap = False  # each class is computed by itself
            self.candidates = len(self.options.pseudo_codes)
        self._chosen: dict[str, float] = {}

    @property
    def covariance(self) -> Tensor:
        """The covariance matrix of standardised codes, with shape (D, D); of M classes (M, D, D)."""
        return self.cholesky @ self.cholesky.mT

    @property
    def parameter_count(self) -> int:
        """Mean and half of the covariance, with its diagonal, of each class."""
        return self.mean.numel() // self.dim * (self.dim + self.dim * (self.dim + 1) // 2)

    def chosen(self) -> dict[str, float]:
        """The number of pseudo-codes, with a context."""
        return self._chosen

    def _estimate(self, blocks: Callable[[], Iterable[Tensor]], valid: Tensor, seed: int, proceed: Proceed) -> None:
        # Moments about the origin in float64 lose nothing: codes are standardised.
        classes = 1 if self.context is None else self.category_contexts
        counts, firsts = torch.zeros(classes).double(), torch.zeros(classes, self.dim).double()
        seconds = torch.zeros(classes, self.dim, self.dim).double()
        for block in blocks():
            codes, number = block[:, : self.dim].double().cpu(), self._classes(block)
            for c in number.unique().tolist():
                z = codes[number == c]
                counts[c] += len(z)
                firsts[c] += z.sum(dim=0)
                seconds[c] += z.T @ z
        count, first, second = int(counts.sum()), firsts.sum(dim=0), seconds.sum(dim=0)
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
        if self.context is None:
            self.mean.copy_(mean)
            self.cholesky.copy_(cholesky)
            return
        common, log_det = (
            Gaussians(torch.ones(1).double(), mean[None], covariance[None]),
            float(self.scale.double().log().sum()),
        )
        best_value = -math.inf
        for pseudo_codes in self.options.pseudo_codes:
            each = [shrunk(common, counts[c, None], firsts[c, None], seconds[c, None], pseudo_codes) for c in range(classes)]
            candidate = torch.cat([g.means for g in each]), torch.linalg.cholesky(torch.cat([g.covariances for g in each]))
            z, number = valid[:, : self.dim].double().cpu(), self._classes(valid)
            value = float(by_class(number, z, lambda c, rows: _log_density(rows, *(part[c] for part in candidate))).mean())  # noqa: B023
            if value > best_value:
                best_value, self._chosen = value, {"pseudo_codes": pseudo_codes}
                self.mean.copy_(candidate[0])
                self.cholesky.copy_(candidate[1])
            if not proceed(f"{pseudo_codes:g} pseudo-codes", value - log_det):
                break

    def _classes(self, joined: Tensor) -> Tensor:
        """Number of the class of codes (B, D + E) with encoded contexts, on the CPU; 0 without."""
        if self.context is None:
            return torch.zeros(len(joined), dtype=torch.long)
        return self.context.classes(joined[:, self.dim :]).cpu()

    def _log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        if context is None or self.context is None:
            return _log_density(z, self.mean, self.cholesky)
        classes = self.context.classes(context)
        return by_class(classes, z, lambda c, rows: _log_density(rows, self.mean[c], self.cholesky[c]))

    def _sample(self, n: int, generator: Generator | None, context: Tensor | None = None) -> Tensor:
        white = standard_normal((n, self.dim), self.mean, generator)
        if context is None or self.context is None:
            return self.mean + white @ self.cholesky.T
        return by_class(self.context.classes(context), white, lambda c, rows: self.mean[c] + rows @ self.cholesky[c].T)

    def _components(self, c: int | None = None) -> GaussianComponents:
        """The Gaussian of codes standardised by shift and scale alone; of a class if there are several."""
        mean, cholesky = (part.double() if c is None else part[c].double() for part in (self.mean, self.cholesky))
        one = GaussianComponents(cholesky.new_zeros(1), mean[None], (cholesky @ cholesky.T)[None])
        return one if self.factor is None else one.mapped((self.factor / self.scale[:, None]).double())


def _log_density(z: Tensor, mean: Tensor, cholesky: Tensor) -> Tensor:
    """Log-density (B,) in nats of codes (B, D) under a Gaussian."""
    # Cholesky factor L of the covariance: (z - mean)^T Sigma^-1 (z - mean) = ||L^-1 (z - mean)||^2.
    white: Tensor = torch.linalg.solve_triangular(cholesky, (z - mean).T, upper=False)  # (D, B)
    return -0.5 * white.square().sum(dim=0) - cholesky.diagonal().log().sum() - 0.5 * z.shape[1] * math.log(2 * math.pi)


Model = Gaussian
