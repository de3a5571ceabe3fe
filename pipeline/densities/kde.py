"""A kernel density estimate: a Gaussian around each training code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from pipeline.densities.common.density import Density, Proceed, random_subset, standard_normal, uniform
from pipeline.densities.common.gaussians import GaussianComponents
from pipeline.errors import DataError
from pipeline.settings import Checked, DensitySettings, check_that
from pipeline.system.streams import stream_seed

__all__ = ["KernelDensity", "Options", "Settings"]

BANDWIDTHS = (0.01, 0.014, 0.02, 0.028, 0.04, 0.056, 0.08, 0.11, 0.16, 0.22, 0.32, 0.45, 0.64, 0.9, 1.3)
BLOCK = 2**22  # distances in memory
SMALLEST_EXPONENT = -80.0


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of `KernelDensity`.

    Attributes:
        bandwidths: Standard deviations to try, in ascending order, in standardised units; from the middle, in the direction in
            which the validation likelihood grows.
        sensitivity: How much wider kernels are where codes are rare: numbers to try, in ascending order, from 0 for kernels
            that are alike to 1.
        max_examples: Training codes at most, drawn at random, since all are held in memory and saved with the density.
    """

    bandwidths: tuple[float, ...] = BANDWIDTHS
    sensitivity: tuple[float, ...] = (0.0, 0.5)
    max_examples: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("bandwidths", "sensitivity"):
            values = list(getattr(self, key))
            check_that(len(values) > 0, key, "must list at least one number")
            check_that(values == sorted(set(values)), key, "must ascend")
        check_that(self.bandwidths[0] > 0, "bandwidths", "must be positive")
        check_that(self.sensitivity[0] >= 0 and self.sensitivity[-1] <= 1, "sensitivity", "must be from 0 to 1")
        check_that(self.max_examples >= 1, "max_examples", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Settings(DensitySettings, Options):
    """A kernel density estimate; only `transform`, `standardise`, `seed` and `max_minutes` of the common keys matter.

    The clock is read between two bandwidths: at least one is scored, and the best so far is kept.
    """


class KernelDensity(Density):
    r"""A kernel density estimate: a mixture of Gaussians around all training codes.

    .. math:: p(z) = \frac{1}{N} \sum_n \mathcal{N}(z; z_n, h_n^2 I), \qquad
        h_n = h \left(\frac{\tilde{p}(z_n)}{g}\right)^{-s}

    with one bandwidth h for sensitivity s = 0; else kernels are wider where a pilot estimate :math:`\tilde{p}` with the
    bandwidth h finds few codes, compared to its geometric mean g over the training codes. Validation codes choose h and s. With
    `standardise: cholesky` kernels have the shape of the covariance of all codes.

    References:
        | On bandwidth variation in kernel estimates: a square root law (Abramson, 1982)
        | https://doi.org/10.1214/aos/1176345986

    Arguments:
        dim: The number of dimensions :math:`D`.
        options: The fields of `Options`.

    Attributes:
        points: The training codes :math:`z_n`, standardised, with shape (N, D).
        log_widths: The logarithms of :math:`h_n`, with shape (N,).

    Example:
        >>> density = KernelDensity(1, bandwidths=[0.5], sensitivity=[0.0])
        >>> density.estimate(lambda: [torch.zeros(1, 1)], torch.zeros(1, 1))
        >>> density.log_prob(torch.zeros(1, 1))
        tensor([-0.2258])
    """

    family = "kde"
    options_type = Options
    trained_by_gradient = False

    points: Tensor
    log_widths: Tensor

    options: Options

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        self.candidates = len(self.options.bandwidths) * len(self.options.sensitivity)
        self._chosen = dict[str, float]()
        count = self.options.max_examples  # until the fit says otherwise
        self._set(self.shift.new_zeros(count, dim), self.shift.new_zeros(count))

    def _set(self, points: Tensor, log_widths: Tensor) -> None:
        self.register_buffer("points", points.to(self.shift))
        self.register_buffer("log_widths", log_widths.to(self.shift))
        self.chunk_examples = self.sample_chunk_examples = max(1, min(4096, BLOCK // len(points)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # The fit that wrote it has chosen the points.
        points, log_widths = (state_dict.get(prefix + name) for name in ("points", "log_widths"))
        if points is not None and log_widths is not None and points.ndim == 2 and log_widths.ndim == 1:
            self._set(torch.zeros_like(points), torch.zeros_like(log_widths))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def arguments(self) -> dict[str, Any]:
        """The number of kernels; the other options matter to the fit only."""
        return {"dim": self.dim, "max_examples": len(self.points)}

    @property
    def parameter_count(self) -> int:
        """The numbers of all points, and their widths."""
        return self.points.numel() + self.log_widths.numel()

    def chosen(self) -> dict[str, float]:
        """The bandwidth and the sensitivity."""
        return self._chosen

    def _estimate(self, blocks: Callable[[], Iterable[Tensor]], valid: Tensor, seed: int, proceed: Proceed) -> None:
        points = random_subset(blocks(), self.options.max_examples, stream_seed("subset for kernels", seed)).to(self.shift)
        if not len(points):
            raise DataError("there are no training codes for kernels")
        if not len(valid):
            raise DataError("a bandwidth is chosen on validation codes, and there are none")
        log_det = float(self.scale.double().log().sum())
        best_value, best, time_left = -math.inf, self.shift.new_zeros(len(points)), True

        def score(h: float, s: float) -> float:
            nonlocal best_value, best, time_left
            widths = self._widths(points, h, s)
            value = float(self._mixed(valid.to(points), points, widths).double().mean())
            time_left = proceed(f"bandwidth {h:g}" + f" of sensitivity {s:g}" * (s > 0), value - log_det)
            if value > best_value:
                best_value, best, self._chosen = value, widths, {"bandwidth": h, "sensitivity": s}
            return value

        widths, start = self.options.bandwidths, len(self.options.bandwidths) // 2
        for s in self.options.sensitivity:
            values = {start: score(widths[start], s)} if time_left else {}
            for step in (-1, 1):
                number = start + step
                while time_left and 0 <= number < len(widths):
                    values[number] = score(widths[number], s)
                    if values[number] <= values[number - step]:
                        break
                    number += step
                if max(values, default=start, key=lambda number: values[number]) != start:
                    break  # the likelihood has one peak, which is on this side
        self._set(points, best)

    def _widths(self, points: Tensor, h: float, sensitivity: float) -> Tensor:
        """Logarithms of the kernels' widths (N,)."""
        log_widths = points.new_full((len(points),), math.log(h))
        if sensitivity == 0:
            return log_widths
        pilot = self._mixed(points, points, log_widths)
        return log_widths - sensitivity * (pilot - pilot.mean())

    def _mixed(self, z: Tensor, points: Tensor, log_widths: Tensor) -> Tensor:
        """Log-density (B,) of codes under kernels around points."""
        constant = self.dim * (log_widths + 0.5 * math.log(2 * math.pi)) + math.log(len(points))
        results = list[Tensor]()
        for part in z.split(max(1, BLOCK // len(points))):
            each = -0.5 * _squared_distances(part, points) * torch.exp(-2 * log_widths) - constant  # (b, N)
            largest = each.amax(dim=1, keepdim=True)
            # The terms left out are lost in rounding; as subnormal numbers they would cost ten times as much.
            total = (each - largest).clamp(min=SMALLEST_EXPONENT).exp().sum(dim=1)
            results.append(total.log() + largest[:, 0])
        return torch.cat(results) if results else z.new_zeros(0)

    def _log_prob(self, z: Tensor) -> Tensor:
        return self._mixed(z, self.points, self.log_widths)

    def _sample(self, n: int, generator: Generator | None) -> Tensor:
        chosen = (uniform((n,), self.shift, generator) * len(self.points)).long().clamp_(max=len(self.points) - 1)
        noise = standard_normal((n, self.dim), self.shift, generator)
        return self.points[chosen] + noise * self.log_widths[chosen].exp()[:, None]

    @property
    def has_given(self) -> bool:
        """True: kernels are Gaussians."""
        return True

    def _components(self) -> GaussianComponents:
        """The kernels around codes that are standardised by shift and scale alone."""
        matrix = torch.diag(torch.ones_like(self.scale)) if self.factor is None else self.factor / self.scale[:, None]
        matrix, variances = matrix.double(), torch.exp(2 * self.log_widths.double())
        covariances = variances[:, None, None] * (matrix @ matrix.T)
        return GaussianComponents(
            torch.full_like(variances, -math.log(len(self.points))), self.points.double() @ matrix.T, covariances
        )

    def _few(self, z: Tensor) -> tuple[Tensor, ...]:
        """Numbers of rows, few at a time: each is compared with every kernel in every dimension."""
        rows: tuple[Tensor, ...] = torch.arange(len(z), device=z.device).split(max(1, BLOCK // self.points.numel()))
        return rows

    def _log_prob_given(self, z: Tensor, given: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        components = self._components()
        parts = [torch.stack(components.log_prob(z[rows], given[rows])) for rows in self._few(z)]
        observed, missing = torch.cat(parts, dim=1)
        return observed, missing

    def _sample_given(
        self, n: int, z: Tensor, given: Tensor, generator: Generator | None, context: Tensor | None = None
    ) -> Tensor:
        components = self._components()
        return torch.cat([components.sample(n, z[rows], given[rows], generator) for rows in self._few(z)], dim=1)


def _squared_distances(z: Tensor, points: Tensor) -> Tensor:
    """Squares of the distances (B, N)."""
    if torch.is_grad_enabled():  # derivatives of distances of 0, and second ones, exist for squares only
        return (z[:, None] - points).square().sum(dim=2)
    # By differences: in products, float32 loses what narrow kernels need.
    return torch.cdist(z, points, compute_mode="donot_use_mm_for_euclid_dist").square()


Model = KernelDensity
