"""A mixture of Gaussians, by expectation maximisation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor

from pipeline.densities.common.density import Density, Proceed, random_subset, standard_normal, uniform
from pipeline.densities.common.gaussians import GaussianComponents
from pipeline.errors import DataError
from pipeline.settings import Checked, DensitySettings, check_that
from pipeline.system.streams import stream_seed

__all__ = ["GaussianMixture", "Options", "Settings"]


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of `GaussianMixture`.

    Attributes:
        components: Numbers of Gaussians to try, in ascending order, until the validation likelihood falls.
        covariance: `full`: a matrix for each Gaussian; `tied`: one for all; `diagonal`: a variance for each dimension.
        ridge: Numbers to try, in ascending order, added to each variance in standardised units. Each number of Gaussians starts
            at the ridge that suited the one before, and tries larger ones until the validation likelihood falls.
        starts: Initial assignments by k-means; the one that ends at the highest training likelihood is kept.
        iterations: Steps of expectation maximisation at most.
        tolerance: Gain in mean log-likelihood, in nats, below which they end.
        max_examples: Training codes at most, drawn at random, since they are held in memory.
    """

    components: tuple[int, ...] = (10, 20, 50, 100, 200)
    covariance: Literal["full", "tied", "diagonal"] = "full"
    ridge: tuple[float, ...] = (1e-6,)
    starts: int = 1
    iterations: int = 100
    tolerance: float = 1e-3
    max_examples: int = 100_000

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("components", "ridge"):
            values = list(getattr(self, key))
            check_that(len(values) > 0, key, "must list at least one number")
            check_that(values == sorted(set(values)), key, "must ascend")
        check_that(self.components[0] >= 1, "components", "must be at least 1")
        check_that(self.ridge[0] >= 0, "ridge", "must be 0 or more")
        check_that(self.starts >= 1, "starts", "must be at least 1")
        check_that(self.iterations >= 1, "iterations", "must be at least 1")
        check_that(self.tolerance >= 0, "tolerance", "must be 0 or more")
        check_that(self.max_examples >= 1, "max_examples", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Settings(DensitySettings, Options):
    """A mixture of Gaussians; only `transform`, `standardise`, `seed` and `max_minutes` of the common keys matter.

    The clock is read between two fits: at least one is made, and the best so far is kept.
    """


class GaussianMixture(Density):
    r"""A mixture of Gaussians, :math:`p(z) = \sum_k \pi_k \, \mathcal{N}(z; \mu_k, \Sigma_k)`, fitted by scikit-learn.

    A row says how many there may be, and how much their variances may be raised; validation codes choose.

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
        self.candidates = len(self.options.components) * len(self.options.ridge)
        self._set_components(self.options.components[-1])

    def _set_components(self, count: int) -> None:
        self.register_buffer("log_weights", self.shift.new_full((count,), -math.log(count)))
        self.register_buffer("means", self.shift.new_zeros(count, self.dim))
        # W_k upper triangular with Sigma_k^-1 = W_k W_k^T, so that (z - mu_k) W_k is white: (K, D, D); tied, one W (D, D); of
        # diagonal covariances the diagonals (K, D).
        white = torch.eye(self.dim) if self.options.covariance != "diagonal" else torch.ones(count, self.dim)
        white = white.to(self.shift)
        self.register_buffer("whitening", white.repeat(count, 1, 1) if self.options.covariance == "full" else white)
        self.chunk_examples = max(64, 2**22 // (count * self.dim))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # The fit that wrote it has chosen the number of Gaussians.
        weights = state_dict.get(prefix + "log_weights")
        if weights is not None and weights.ndim == 1:
            self._set_components(len(weights))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def arguments(self) -> dict[str, Any]:
        """The number of Gaussians that the fit has chosen, and their kind; the other options matter to the fit only."""
        arguments = {"dim": self.dim, "components": [self.components]}
        covariance = self.options.covariance  # left out where it is the default, as in files of earlier versions
        return arguments if covariance == "full" else arguments | {"covariance": covariance}

    @property
    def components(self) -> int:
        """The number of Gaussians, as chosen by the fit."""
        return len(self.means)

    @property
    def parameter_count(self) -> int:
        """Weights, which sum to 1, means, and covariances."""
        matrix, diagonals = self.dim * (self.dim + 1) // 2, self.components * self.dim
        covariances = {"full": self.components * matrix, "tied": matrix, "diagonal": diagonals}[self.options.covariance]
        return self.components * (1 + self.dim) - 1 + covariances

    def _estimate(self, blocks: Callable[[], Iterable[Tensor]], valid: Tensor, seed: int, proceed: Proceed) -> None:
        subset = random_subset(blocks(), self.options.max_examples, stream_seed("subset for a mixture", seed))
        codes = subset.double().cpu().numpy()
        held_out = valid.double().cpu().numpy()
        log_det = float(self.scale.double().log().sum())
        several = len(self.options.ridge) > 1
        best, best_value, first, time_left = None, -math.inf, 0, True
        for count in self.options.components:
            if count > len(codes) or not time_left:
                break
            previous, of_count = best_value, -math.inf
            for number, ridge in enumerate(self.options.ridge[first:], first):
                estimator = self._expectation_maximisation(codes, count, ridge, seed)
                value = float(estimator.score(held_out)) if len(held_out) else -float(estimator.bic(codes))
                time_left = proceed(f"{count} Gaussians" + f" of ridge {ridge:g}" * several, value - log_det)
                if value > best_value:
                    best, best_value, first = estimator, value, number
                if value <= of_count or not time_left:
                    break
                of_count = value
            if best_value <= previous:
                break
        if best is None:
            raise DataError(f"{len(codes)} training codes are too few for a mixture of {self.options.components[0]} Gaussians")
        self._set_components(len(best.weights_))
        self.log_weights.copy_(torch.from_numpy(best.weights_).log())
        self.means.copy_(torch.from_numpy(best.means_))
        self.whitening.copy_(torch.from_numpy(best.precisions_cholesky_))

    def chosen(self) -> dict[str, int]:
        """The number of Gaussians K."""
        return {"components": self.components}

    def _expectation_maximisation(self, codes: np.ndarray, count: int, ridge: float, seed: int) -> Any:
        """The estimator of scikit-learn, fitted with so many Gaussians."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture as Estimator

        estimator = Estimator(
            count,
            covariance_type={"diagonal": "diag"}.get(self.options.covariance, self.options.covariance),
            tol=self.options.tolerance,
            reg_covar=ridge,
            max_iter=self.options.iterations,
            n_init=self.options.starts,
            random_state=stream_seed("mixture components", seed, bits=32),
        )
        with warnings.catch_warnings():
            # The number of iterations is a setting, and repeated codes may leave k-means with fewer clusters.
            warnings.simplefilter("ignore", ConvergenceWarning)
            try:
                return estimator.fit(codes)
            except ValueError as error:
                raise DataError(f"a mixture of {count} Gaussians doesn't fit ({error}); raise `ridge`") from None

    def _log_prob(self, z: Tensor) -> Tensor:
        w = self.whitening
        if self.options.covariance == "full":
            flat = w.permute(1, 0, 2).flatten(1)  # (D, K D)
            offset = (self.means[:, None] @ w)[:, 0]  # (K, D)
            white = (z @ flat).view(len(z), *offset.shape) - offset  # (B, K, D)
            log_det = w.diagonal(dim1=1, dim2=2).log().sum(dim=1)  # (K)
        elif self.options.covariance == "tied":
            white = (z @ w)[:, None] - self.means @ w
            log_det = w.diagonal().log().sum()
        else:
            white = (z[:, None] - self.means) * w
            log_det = w.log().sum(dim=1)
        each = log_det - 0.5 * white.square().sum(dim=2) - 0.5 * self.dim * math.log(2 * math.pi)
        return torch.logsumexp(self.log_weights + each, dim=1)

    def _sample(self, n: int, generator: Generator | None) -> Tensor:
        cumulative = self.log_weights.exp().cumsum(dim=0)
        levels = uniform((n,), self.shift, generator) * cumulative[-1]
        component = torch.searchsorted(cumulative, levels, right=True).clamp_(max=len(cumulative) - 1)
        z = standard_normal((n, self.dim), self.shift, generator)
        if self.options.covariance == "diagonal":
            return self.means[component] + z / self.whitening[component]
        if self.options.covariance == "tied":
            return self.means[component] + _coloured(z, self.whitening)
        for k in component.unique().tolist():
            chosen = component == k
            z[chosen] = self.means[k] + _coloured(z[chosen], self.whitening[k])
        return z

    @property
    def has_given(self) -> bool:
        """True: in closed form."""
        return True

    def _components(self) -> GaussianComponents:
        """The mixture of codes standardised by shift and scale alone."""
        whitening = self.whitening.double()
        if self.options.covariance == "diagonal":
            whitening = torch.diag_embed(whitening)
        colouring = torch.linalg.inv(whitening).expand(self.components, -1, -1)  # V_k with Sigma_k = V_k^T V_k
        mixture = GaussianComponents(self.log_weights.double(), self.means.double(), colouring.mT @ colouring)
        return mixture if self.factor is None else mixture.mapped((self.factor / self.scale[:, None]).double())

    def _log_prob_given(self, z: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        return self._components().log_prob(z, given)

    def _sample_given(self, n: int, z: Tensor, given: Tensor, generator: Generator | None) -> Tensor:
        return self._components().sample(n, z, given, generator)


def _coloured(white: Tensor, whitening: Tensor) -> Tensor:
    """The inverse of a whitening: x with x W = white."""
    x: Tensor = torch.linalg.solve_triangular(whitening, white, upper=True, left=False)
    return x


Model = GaussianMixture
