"""A mixture of boxes with soft edges: what codes between bounds need, and Gaussians round off."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import logsigmoid

from pipeline.densities.common.density import Density, Proceed, random_subset, uniform
from pipeline.errors import DataError
from pipeline.settings import Checked, DensitySettings, check_that
from pipeline.system.streams import stream_seed

__all__ = ["BoxMixture", "Options", "Settings"]

BATCH = 512
LEARNING_RATE, BETAS, WARM_UP = 0.05, (0.9, 0.99), 20  # of Adam; a cosine brings the rate to zero
SOFTNESS = 0.3  # of the first edges, as a share of half a side
LEAST_SIDE = 1e-4  # of the first boxes, in standardised units
CANDIDATES = 10  # times at which the boxes so far are scored
REMOVAL_STEPS = 25  # between two searches for boxes that hold too few codes


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of `BoxMixture`.

    Attributes:
        components: Boxes at the start, around clusters of training codes; those that lose their codes to others are removed.
        least_codes: Codes that a box must hold more than others to grow: they compete, so that few large ones stay.
        steps: Gradient steps of 512 codes.
        max_examples: Training codes at most, drawn at random, since they are held in memory.
    """

    components: int = 64
    least_codes: float = 25.0
    steps: int = 1_000
    max_examples: int = 100_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.components >= 1, "components", "must be at least 1")
        check_that(self.least_codes >= 0, "least_codes", "must be 0 or more")
        check_that(self.steps >= 1, "steps", "must be at least 1")
        check_that(self.max_examples >= 1, "max_examples", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Settings(DensitySettings, Options):
    """A mixture of boxes; only `transform`, `standardise`, `seed` and `max_minutes` of the common keys matter.

    The boxes are scored on validation codes ten times, when the clock is read as well, and the best so far are kept.
    """


class BoxMixture(Density):
    r"""A mixture of boxes whose edges are soft: uniform distributions convolved with logistic ones.

    .. math:: p(z) = \sum_k \pi_k \prod_i \frac{1}{2 h_{ki}}
        \left[\sigma\left(\frac{z_i - c_{ki} + h_{ki}}{s_{ki}}\right)
        - \sigma\left(\frac{z_i - c_{ki} - h_{ki}}{s_{ki}}\right)\right]

    with centres c, half sides h and widths s of the edges. Gradient steps maximise the likelihood of training codes. A prior
    :math:`\prod_k \pi_k^{-m}`, with m for `least_codes`, makes boxes compete: one whose share of the codes is below m shrinks,
    and is removed.

    References:
        | Unsupervised learning of finite mixture models (Figueiredo, Jain, 2002), for the prior
        | https://doi.org/10.1109/34.990138

    Arguments:
        dim: The number of dimensions :math:`D`.
        options: The fields of `Options`.

    Attributes:
        log_weights: The logarithms of :math:`\pi_k`, with shape (K,).
        centres: The centres c, standardised, with shape (K, D).
        log_sides: The logarithms of the half sides h, with shape (K, D).
        log_edges: The logarithms of the widths s, with shape (K, D).

    Example:
        >>> density = BoxMixture(1, components=1)
        >>> codes = torch.linspace(-1, 1, 1000)[:, None]
        >>> density.estimate(lambda: [codes], codes)
        >>> density.log_prob(torch.tensor([[0.0], [2.0]])).exp() > torch.tensor([0.49, 0.01])
        tensor([ True, False])
    """

    family = "boxes"
    options_type = Options
    trained_by_gradient = False

    log_weights: Tensor
    centres: Tensor
    log_sides: Tensor
    log_edges: Tensor

    options: Options

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        self.candidates = CANDIDATES
        boxes = self.shift.new_zeros(self.options.components, dim)
        self._set(boxes[:, 0] - math.log(len(boxes)), boxes, boxes, boxes + math.log(SOFTNESS))

    def _set(self, log_weights: Tensor, centres: Tensor, log_sides: Tensor, log_edges: Tensor) -> None:
        self.register_buffer("log_weights", log_weights.to(self.shift, copy=True))
        self.register_buffer("centres", centres.to(self.shift, copy=True))
        self.register_buffer("log_sides", log_sides.to(self.shift, copy=True))
        self.register_buffer("log_edges", log_edges.to(self.shift, copy=True))
        self.chunk_examples = max(64, 2**20 // centres.numel())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # The fit that wrote it has chosen the number of boxes.
        weights = state_dict.get(prefix + "log_weights")
        if weights is not None and weights.ndim == 1:
            boxes = weights.new_zeros(len(weights), self.dim)
            self._set(weights, boxes, boxes, boxes)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def arguments(self) -> dict[str, Any]:
        """The number of boxes that the fit has left; the other options matter to the fit only."""
        return {"dim": self.dim, "components": len(self.log_weights)}

    @property
    def parameter_count(self) -> int:
        """Weights, which sum to 1, centres, sides and edges."""
        return len(self.log_weights) - 1 + 3 * self.centres.numel()

    def chosen(self) -> dict[str, float]:
        """The number of boxes."""
        return {"components": len(self.log_weights)}

    def _estimate(self, blocks: Callable[[], Iterable[Tensor]], valid: Tensor, seed: int, proceed: Proceed) -> None:
        codes = random_subset(blocks(), self.options.max_examples, stream_seed("subset for boxes", seed)).to(self.shift)
        if not len(codes):
            raise DataError("there are no training codes for boxes")
        steps, log_det = self.options.steps, float(self.scale.double().log().sum())
        parameters = _first_boxes(
            codes, min(self.options.components, len(codes)), stream_seed("clusters for boxes", seed, bits=32)
        )
        optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, betas=BETAS)
        generator = torch.Generator(codes.device).manual_seed(stream_seed("batches for boxes", seed))
        least = self.options.least_codes / len(codes)
        best, best_value = parameters, -math.inf
        for step in range(1, steps + 1):
            rate = min(1.0, step / WARM_UP) * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
            batch = codes[torch.randint(len(codes), (min(BATCH, len(codes)),), generator=generator, device=codes.device)]
            with torch.enable_grad():
                log_weights = torch.log_softmax(parameters[0], dim=0)
                each = _log_boxes(batch, *parameters[1:])
                loss = least * log_weights.sum() - torch.logsumexp(log_weights + each, dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % REMOVAL_STEPS == 0 and least > 0:
                kept = torch.softmax(parameters[0], dim=0) > least
                if not kept.all() and kept.any():
                    parameters, optimizer = _kept(kept, parameters, optimizer)
            if step * CANDIDATES // steps > (step - 1) * CANDIDATES // steps:
                scored = valid if len(valid) else codes
                value = float(_log_density(scored.to(codes), *parameters).double().mean())
                if value > best_value:
                    best, best_value = [parameter.detach().clone() for parameter in parameters], value
                if not proceed(f"{len(parameters[0])} boxes after {step} steps", value - log_det):
                    break
        if not math.isfinite(best_value):
            raise DataError("boxes don't fit these codes: their likelihood isn't finite")
        self._set(torch.log_softmax(best[0], dim=0), *best[1:])

    def _log_prob(self, z: Tensor) -> Tensor:
        return _log_density(z, self.log_weights, self.centres, self.log_sides, self.log_edges)

    def _sample(self, n: int, generator: Generator | None) -> Tensor:
        levels = uniform((n,), self.shift, generator)
        return self._drawn(_component(levels, self.log_weights.softmax(dim=0).expand(n, -1)), generator)

    def _drawn(self, component: Tensor, generator: Generator | None) -> Tensor:
        """Points (.., D) of the boxes with these numbers (..): uniform between the edges, plus logistic noise."""
        shape = (*component.shape, self.dim)
        place, noise = (uniform(shape, self.shift, generator) for _ in range(2))
        smallest = torch.finfo(noise.dtype).tiny
        logistic = noise.clamp(min=smallest).log() - (1 - noise).clamp(min=smallest).log()
        sides, edges = self.log_sides.exp()[component], self.log_edges.exp()[component]
        return self.centres[component] + (2 * place - 1) * sides + edges * logistic

    @property
    def has_given(self) -> bool:
        """Whether no matrix mixes the dimensions: within a box they are independent."""
        return self.factor is None

    def _log_prob_given(self, z: Tensor, given: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        each = _log_sides(z, self.centres, self.log_sides, self.log_edges)  # (B, K, D)
        observed = self.log_weights.log_softmax(dim=0) + torch.where(given[:, None], each, 0).sum(dim=2)
        evidence = torch.logsumexp(observed, dim=1)
        missing = torch.where(given[:, None], 0, each).sum(dim=2)
        return evidence, torch.logsumexp(observed - evidence[:, None] + missing, dim=1)

    def _sample_given(
        self, n: int, z: Tensor, given: Tensor, generator: Generator | None, context: Tensor | None = None
    ) -> Tensor:
        each = _log_sides(z, self.centres, self.log_sides, self.log_edges)
        observed = self.log_weights + torch.where(given[:, None], each, 0).sum(dim=2)  # (B, K)
        levels = uniform((n, len(z)), self.shift, generator)
        component = torch.stack([_component(level, observed.softmax(dim=1)) for level in levels])
        return torch.where(given, z, self._drawn(component, generator))


def _log_sides(z: Tensor, centres: Tensor, log_sides: Tensor, log_edges: Tensor) -> Tensor:
    """Log-densities (B, K, D) of codes (B, D) in each dimension of each box (K, D)."""
    edges = log_edges.exp()
    place, half = (z[:, None] - centres) / edges, log_sides.exp() / edges
    # sigma(t + a) - sigma(t - a) = sigma(t + a) sigma(a - t) (1 - exp(-2 a)), which loses nothing far from the box.
    inside = torch.log(-torch.expm1(-2 * half)) - log_sides - math.log(2)
    return _log_sigmoid(half + place) + _log_sigmoid(half - place) + inside


def _log_sigmoid(x: Tensor) -> Tensor:
    if torch.compiler.is_exporting():  # other formats take the logarithm of a sigmoid, which loses digits far from a box
        return x.clamp(max=0) - torch.log1p(torch.exp(-x.abs()))
    return logsigmoid(x)


def _log_boxes(z: Tensor, centres: Tensor, log_sides: Tensor, log_edges: Tensor) -> Tensor:
    return _log_sides(z, centres, log_sides, log_edges).sum(dim=2)


def _log_density(z: Tensor, log_weights: Tensor, centres: Tensor, log_sides: Tensor, log_edges: Tensor) -> Tensor:
    """Log-density (B,) of codes (B, D), by weights (K,) that needn't sum to 1."""
    each = _log_boxes(z, centres, log_sides, log_edges)
    return torch.logsumexp(torch.log_softmax(log_weights, dim=0) + each, dim=1)


def _component(levels: Tensor, weights: Tensor) -> Tensor:
    """Numbers (B,) drawn by uniform levels (B,) with probabilities (B, K)."""
    cumulative = weights.cumsum(dim=1)
    chosen = torch.searchsorted(cumulative, (levels * cumulative[:, -1])[:, None], right=True)[:, 0]
    return chosen.clamp(max=weights.shape[1] - 1)


def _first_boxes(codes: Tensor, count: int, seed: int) -> list[Tensor]:
    """Weights, centres, sides and edges, to be trained: a box around each cluster of k-means, as wide as its codes vary."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # repeated codes leave fewer clusters
        clusters = KMeans(count, n_init=1, max_iter=10, random_state=seed).fit(codes.cpu().numpy())
    label = torch.from_numpy(clusters.labels_).long().to(codes.device)
    sizes = torch.bincount(label, minlength=count).to(codes)
    means = torch.zeros(count, codes.shape[1]).to(codes).index_add_(0, label, codes) / sizes.clamp(min=1)[:, None]
    squares = torch.zeros_like(means).index_add_(0, label, (codes - means[label]).square()) / sizes.clamp(min=1)[:, None]
    log_sides = (3 * squares).sqrt().clamp(min=LEAST_SIDE).log()  # a uniform distribution's variance is h^2 / 3
    parts = [(sizes.clamp(min=0.5) / len(codes)).log(), means, log_sides, log_sides + math.log(SOFTNESS)]
    return [part.requires_grad_() for part in parts]


def _kept(kept: Tensor, parameters: list[Tensor], optimizer: torch.optim.Adam) -> tuple[list[Tensor], torch.optim.Adam]:
    """The same without the boxes that aren't kept, (K,) booleans, and with the optimizer's memory of the others."""
    fewer = [parameter.detach()[kept].clone().requires_grad_() for parameter in parameters]
    successor = torch.optim.Adam(fewer, lr=LEARNING_RATE, betas=BETAS)
    for old, new in zip(parameters, fewer, strict=True):
        state = optimizer.state[old]
        successor.state[new] = {key: value[kept].clone() if value.ndim else value for key, value in state.items()}
    return fewer, successor


Model = BoxMixture
