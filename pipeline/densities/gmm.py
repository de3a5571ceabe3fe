"""A mixture of Gaussians, by expectation maximisation; or one for each class."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Generator, Tensor

from pipeline.densities.common.adaptation import Gaussians, adapted, by_class, check_pseudo_codes
from pipeline.densities.common.density import Proceed, random_subset, standard_normal, uniform
from pipeline.densities.common.gaussians import GaussianComponents, GaussianDensity
from pipeline.errors import DataError
from pipeline.settings import Checked, DensitySettings, check_that
from pipeline.system.streams import stream_seed

__all__ = ["GaussianMixture", "Options", "Settings"]

PATIENCE = 2  # numbers of Gaussians without a gain; one may be the chance of its initial values


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of `GaussianMixture`.

    Attributes:
        components: Numbers of Gaussians to try, in ascending order, until two of them in a row don't raise the validation
            likelihood.
        covariance: `full`: a matrix for each Gaussian; `tied`: one for all; `diagonal`: a variance for each dimension.
        ridge: Numbers to try, in ascending order, added to each variance in standardised units. Each number of Gaussians starts
            at the ridge that suited the one before, and tries larger and smaller ones until the validation likelihood falls.
        pooled_codes: Only `full`: how many codes the mean covariance of all Gaussians counts for in that of each, between 0 for
            `full` alone and many for `tied`.
        starts: Initial assignments by k-means; the one that ends at the highest training likelihood is kept.
        iterations: Steps of expectation maximisation at most.
        tolerance: Gain in mean log-likelihood, in nats, below which they end.
        max_examples: Training codes at most, drawn at random, since they are held in memory.
        pseudo_codes: How many codes the common mixture counts for in that of each class: numbers to try, in ascending order;
            the best by validation likelihood is kept. Only for rows with `context`.
    """

    takes_context: ClassVar[bool] = True

    components: tuple[int, ...] = (10, 20, 50, 100, 200)
    covariance: Literal["full", "tied", "diagonal"] = "full"
    ridge: tuple[float, ...] = (1e-6,)
    pooled_codes: float = 0.0
    starts: int = 1
    iterations: int = 100
    tolerance: float = 1e-3
    max_examples: int = 100_000
    pseudo_codes: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("components", "ridge"):
            values = list(getattr(self, key))
            check_that(len(values) > 0, key, "must list at least one number")
            check_that(values == sorted(set(values)), key, "must ascend")
        check_that(self.components[0] >= 1, "components", "must be at least 1")
        check_that(self.ridge[0] >= 0, "ridge", "must be 0 or more")
        check_that(self.pooled_codes >= 0, "pooled_codes", "must be 0 or more")
        check_that(
            self.pooled_codes == 0 or self.covariance == "full", "pooled_codes", "is for `covariance: full` only: leave it out"
        )
        check_that(self.starts >= 1, "starts", "must be at least 1")
        check_that(self.iterations >= 1, "iterations", "must be at least 1")
        check_that(self.tolerance >= 0, "tolerance", "must be 0 or more")
        check_that(self.max_examples >= 1, "max_examples", "must be at least 1")
        check_pseudo_codes(self.pseudo_codes)


@dataclass(frozen=True, kw_only=True)
class Settings(DensitySettings, Options):
    """A mixture of Gaussians; only `context`, `transform`, `standardise`, `seed` and `max_minutes` of the common keys matter.

    The clock is read between two fits: at least one is made, and the best so far is kept.
    """


class GaussianMixture(GaussianDensity):
    r"""A mixture of Gaussians, :math:`p(z) = \sum_k \pi_k \, \mathcal{N}(z; \mu_k, \Sigma_k)`, fitted by scikit-learn.

    A row says how many there may be, and how much their variances may be raised; validation codes choose. With a context of
    categories, each class has a mixture of as many, which expectation maximisation adapts from the common one to the codes of
    the class, see `pipeline.densities.common.adaptation`; a `tied` covariance is common to all classes.

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
        if self.context is not None:
            self.has_vmap = False  # each class is computed by itself
            self.candidates += len(self.options.pseudo_codes)
        self._pseudo_codes: dict[str, float] = {}
        self._set_components(self.options.components[-1])

    def _set_components(self, count: int) -> None:
        classes = () if self.context is None else (self.category_contexts,)  # of the first dimension of what follows
        self.register_buffer("log_weights", self.shift.new_full((*classes, count), -math.log(count)))
        self.register_buffer("means", self.shift.new_zeros(*classes, count, self.dim))
        # W_k upper triangular with Sigma_k^-1 = W_k W_k^T, so that (z - mu_k) W_k is white: (K, D, D); tied, one W (D, D); of
        # diagonal covariances the diagonals (K, D).
        white = torch.eye(self.dim) if self.options.covariance != "diagonal" else torch.ones(count, self.dim)
        white = white.to(self.shift)
        white = white.repeat(count, 1, 1) if self.options.covariance == "full" else white
        shared = self.options.covariance == "tied"
        self.register_buffer("whitening", white if shared else white.repeat(*classes, *(1,) * white.ndim))
        self.chunk_examples = max(64, 2**22 // (count * self.dim))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # The fit that wrote it has chosen the number of Gaussians.
        weights = state_dict.get(prefix + "log_weights")
        if weights is not None and weights.ndim == self.log_weights.ndim:
            self._set_components(weights.shape[-1])
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def arguments(self) -> dict[str, Any]:
        """The number of Gaussians that the fit has chosen, and their kind; the other options matter to the fit only."""
        arguments = {"dim": self.dim, "components": [self.components]}
        covariance = self.options.covariance  # left out where it is the default, as in files of earlier versions
        return arguments if covariance == "full" else arguments | {"covariance": covariance}

    @property
    def components(self) -> int:
        """The number of Gaussians, as chosen by the fit."""
        return self.log_weights.shape[-1]

    @property
    def parameter_count(self) -> int:
        """Weights, which sum to 1, means, and covariances, of each class."""
        matrix, diagonals = self.dim * (self.dim + 1) // 2, self.components * self.dim
        classes = self.log_weights.numel() // self.components
        covariances = {"full": classes * self.components * matrix, "tied": matrix, "diagonal": classes * diagonals}
        return classes * (self.components * (1 + self.dim) - 1) + covariances[self.options.covariance]

    def _estimate(self, blocks: Callable[[], Iterable[Tensor]], valid: Tensor, seed: int, proceed: Proceed) -> None:
        subset = random_subset(blocks(), self.options.max_examples, stream_seed("subset for a mixture", seed))
        codes = subset[:, : self.dim].double().cpu().numpy()
        held_out = valid[:, : self.dim].double().cpu().numpy()
        log_det = float(self.scale.double().log().sum())
        several = len(self.options.ridge) > 1
        best, best_value, number, time_left, missed = None, -math.inf, 0, True, 0
        for count in self.options.components:
            if count > len(codes) or not time_left or missed == PATIENCE:
                break
            previous, values = best_value, dict[int, float]()  # by index of the ridge
            waiting = [number]
            while waiting and time_left:
                number = waiting[0]
                ridge = self.options.ridge[number]
                estimator = self._expectation_maximisation(codes, count, ridge, seed)
                value = float(estimator.score(held_out)) if len(held_out) else -float(estimator.bic(codes))
                time_left = proceed(f"{count} Gaussians" + f" of ridge {ridge:g}" * several, value - log_det)
                values[number] = value
                if value > best_value:
                    best, best_value = estimator, value
                number = max(values, key=lambda tried: values[tried])  # the next count starts here
                beside = (number + 1, number - 1)
                waiting = [n for n in beside if 0 <= n < len(self.options.ridge) and n not in values]
            missed = 0 if best_value > previous else missed + 1
        if best is None:
            raise DataError(f"{len(codes)} training codes are too few for a mixture of {self.options.components[0]} Gaussians")
        self._set_components(len(best.weights_))
        if self.context is not None:
            weights, means, covariances = map(torch.from_numpy, (best.weights_, best.means_, best.covariances_))
            common = Gaussians(weights, means, covariances, self.options.covariance)
            self._adapt(common, subset.cpu(), valid.cpu(), proceed)
            return
        self.log_weights.copy_(torch.from_numpy(best.weights_).log())
        self.means.copy_(torch.from_numpy(best.means_))
        self.whitening.copy_(torch.from_numpy(best.precisions_cholesky_))

    def _adapt(self, common: Gaussians, joined: Tensor, valid: Tensor, proceed: Proceed) -> None:
        """The mixture of each class, from codes (N, D + E) with their encoded contexts."""
        assert self.context is not None
        log_det, best_value = float(self.scale.double().log().sum()), -math.inf
        held_out, held_out_classes = valid[:, : self.dim].double(), self.context.cpu().classes(valid[:, self.dim :])
        codes, classes = joined[:, : self.dim].double(), self.context.classes(joined[:, self.dim :])
        self.context.to(self.shift.device)
        for pseudo_codes in self.options.pseudo_codes:
            each = [
                adapted(common, codes[classes == c], pseudo_codes, self.options.iterations, self.options.tolerance)
                for c in range(self.category_contexts)
            ]
            value = float(by_class(held_out_classes, held_out, lambda c, z: each[c].joint(z).logsumexp(dim=1)).mean())  # noqa: B023
            if value > best_value:
                best_value, self._pseudo_codes = value, {"pseudo_codes": pseudo_codes}
                self.log_weights.copy_(torch.stack([mixture.weights for mixture in each]).log())
                self.means.copy_(torch.stack([mixture.means for mixture in each]))
                tied = self.options.covariance == "tied"
                self.whitening.copy_(common.whitening if tied else torch.stack([mixture.whitening for mixture in each]))
            if not proceed(f"{pseudo_codes:g} pseudo-codes", value - log_det):
                break

    def chosen(self) -> dict[str, float]:
        """The number of Gaussians K, and with a context of pseudo-codes."""
        return {"components": self.components, **self._pseudo_codes}

    def _expectation_maximisation(self, codes: np.ndarray, count: int, ridge: float, seed: int) -> Any:
        """The estimator of scikit-learn, fitted with so many Gaussians."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture as Estimator

        options = {
            "tol": self.options.tolerance,
            "reg_covar": ridge,
            "max_iter": self.options.iterations,
            "n_init": self.options.starts,
            "random_state": stream_seed("mixture components", seed, bits=32),
        }
        if self.options.pooled_codes:
            from pipeline.densities.common.pooled import PooledMixture

            estimator = PooledMixture(count, **options)
            estimator.pooled_codes = self.options.pooled_codes
        else:
            kind = {"diagonal": "diag"}.get(self.options.covariance, self.options.covariance)
            estimator = Estimator(count, covariance_type=kind, **options)
        with warnings.catch_warnings():
            # The number of iterations is a setting, and repeated codes may leave k-means with fewer clusters.
            warnings.simplefilter("ignore", ConvergenceWarning)
            try:
                return estimator.fit(codes)
            except ValueError as error:
                raise DataError(f"a mixture of {count} Gaussians doesn't fit ({error}); raise `ridge`") from None

    def _mixture(self, c: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights (K), means (K, D) and whitening of a class."""
        return self.log_weights[c], self.means[c], self.whitening if self.options.covariance == "tied" else self.whitening[c]

    def _log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        if context is None or self.context is None:
            return self._log_density(z, self.log_weights, self.means, self.whitening)
        return by_class(self.context.classes(context), z, lambda c, rows: self._log_density(rows, *self._mixture(c)))

    def _log_density(self, z: Tensor, log_weights: Tensor, means: Tensor, w: Tensor) -> Tensor:
        if self.options.covariance == "full":
            flat = w.permute(1, 0, 2).flatten(1)  # (D, K D)
            offset = (means[:, None] @ w)[:, 0]  # (K, D)
            white = (z @ flat).view(len(z), *offset.shape) - offset  # (B, K, D)
            log_det = w.diagonal(dim1=1, dim2=2).log().sum(dim=1)  # (K)
        elif self.options.covariance == "tied":
            white = (z @ w)[:, None] - means @ w
            log_det = w.diagonal().log().sum()
        else:
            white = (z[:, None] - means) * w
            log_det = w.log().sum(dim=1)
        each = log_det - 0.5 * white.square().sum(dim=2) - 0.5 * self.dim * math.log(2 * math.pi)
        return torch.logsumexp(log_weights + each, dim=1)

    def _sample(self, n: int, generator: Generator | None, context: Tensor | None = None) -> Tensor:
        levels = uniform((n,), self.shift, generator)
        z = standard_normal((n, self.dim), self.shift, generator)
        if context is None or self.context is None:
            return self._coloured(levels, z, self.log_weights, self.means, self.whitening)
        noise = torch.cat([levels[:, None], z], dim=1)
        classes = self.context.classes(context)
        return by_class(classes, noise, lambda c, rows: self._coloured(rows[:, 0], rows[:, 1:], *self._mixture(c)))

    def _coloured(self, levels: Tensor, z: Tensor, log_weights: Tensor, means: Tensor, whitening: Tensor) -> Tensor:
        """Samples of a mixture from uniform numbers (n), which choose the Gaussian, and normal ones (n, D)."""
        cumulative = log_weights.exp().cumsum(dim=0)
        component = torch.searchsorted(cumulative, levels * cumulative[-1], right=True).clamp_(max=len(cumulative) - 1)
        if self.options.covariance == "diagonal":
            return means[component] + z / whitening[component]
        if self.options.covariance == "tied":
            return means[component] + _coloured(z, whitening)
        samples = torch.empty_like(z)
        for k in component.unique().tolist():
            chosen = component == k
            samples[chosen] = means[k] + _coloured(z[chosen], whitening[k])
        return samples

    def _components(self, c: int | None = None) -> GaussianComponents:
        """The mixture of codes standardised by shift and scale alone; of a class if there are several."""
        parts = (self.log_weights, self.means, self.whitening) if c is None else self._mixture(c)
        log_weights, means, whitening = (part.double() for part in parts)
        if self.options.covariance == "diagonal":
            whitening = torch.diag_embed(whitening)
        colouring = torch.linalg.inv(whitening).expand(self.components, -1, -1)  # V_k with Sigma_k = V_k^T V_k
        mixture = GaussianComponents(log_weights, means, colouring.mT @ colouring)
        return mixture if self.factor is None else mixture.mapped((self.factor / self.scale[:, None]).double())


def _coloured(white: Tensor, whitening: Tensor) -> Tensor:
    """The inverse of a whitening: x with x W = white."""
    x: Tensor = torch.linalg.solve_triangular(whitening, white, upper=True, left=False)
    return x


Model = GaussianMixture
