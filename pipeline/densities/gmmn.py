"""Generative moment matching network: noise to codes, by maximum mean discrepancy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from pipeline.densities.common.density import Density, uniform
from pipeline.densities.common.first_order import first_order
from pipeline.settings import Checked, DensitySettings, check_that
from pipeline.system.draws import Randomness

__all__ = ["MomentMatchingNetwork", "Options", "Settings", "squared_discrepancy"]

CHUNK_EXAMPLES = 64  # rows of the kernel matrix computed at once, few enough to stay in the cache
GPU_CHUNK_EXAMPLES = 2048  # enough to keep a GPU busy


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of `MomentMatchingNetwork`.

    Attributes:
        noise_dim: Dimensions of the uniform noise.
        hidden: Units of the hidden layers.
        bandwidths: Bandwidths of the Gaussian kernels, which are added up, in units of sqrt(D) standardised units.
        output: `linear`, or `sigmoid` for codes in -10..10, of which -5..5 becomes 0.25..0.75 (with `standardise: none`).
    """

    noise_dim: int = 10
    hidden: tuple[int, ...] = (64, 256, 256, 784)
    bandwidths: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0)
    output: Literal["linear", "sigmoid"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.noise_dim >= 1, "noise_dim", "must be at least 1")
        check_that(all(h >= 1 for h in self.hidden), "hidden", "must be at least 1")
        check_that(len(self.bandwidths) > 0 and min(self.bandwidths) > 0, "bandwidths", "must be positive numbers")


@dataclass(frozen=True, kw_only=True)
class Settings(DensitySettings, Options):
    """A generative moment matching network. It has no likelihood: `discrepancy` on validation codes chooses the epoch."""

    batch_size: int = 1000  # the discrepancy is estimated within a batch


def squared_discrepancy(x: Tensor, y: Tensor, bandwidths: Sequence[float]) -> Tensor:
    r"""Squared maximum mean discrepancy of two samples, with the kernel :math:`k = \sum_h \exp(-\|x - y\|^2 / (2 h^2))`.

    .. math:: \frac{1}{N^2} \sum_{i,j} k(x_i, x_j) - \frac{2}{NM} \sum_{i,j} k(x_i, y_j) + \frac{1}{M^2} \sum_{i,j} k(y_i, y_j)

    Its gradient is first-order only.

    References:
        | Generative Moment Matching Networks (Li et al., 2015)
        | https://arxiv.org/abs/1502.02761

    Arguments:
        x: A sample, with shape (N, D).
        y: Another, with shape (M, D).
        bandwidths: The bandwidths :math:`h`.

    Returns:
        The squared discrepancy, with shape (), 0 for equal samples.

    Example:
        >>> squared_discrepancy(torch.zeros(1, 1), torch.ones(1, 1), [1.0])
        tensor(0.7869)
    """
    value: Tensor = _SquaredDiscrepancy.apply(x, y, bandwidths)
    return value


class _SquaredDiscrepancy(torch.autograd.Function):
    # Value and gradient at once, a part of the kernel matrix after another, which stays in the cache: autograd would keep the
    # whole matrix for every bandwidth.
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, bandwidths: Sequence[float]) -> Tensor:
        both = torch.cat([x, y])
        signs = torch.cat([x.new_full((len(x),), 1 / len(x)), y.new_full((len(y),), -1 / len(y))])
        squares = both.square().sum(dim=1)
        total, gradients = x.new_zeros(()), []
        needs_gradient = any(ctx.needs_input_grad)
        rows = GPU_CHUNK_EXAMPLES if x.is_cuda else CHUNK_EXAMPLES
        for part, square, sign in zip(*(value.split(rows) for value in (both, squares, signs)), strict=True):
            distances = torch.addmm(square[:, None] + squares, part, both.T, alpha=-2).clamp_min_(0)
            slopes = torch.zeros_like(distances) if needs_gradient else distances  # -2 dk / d(distance)
            for h in bandwidths:
                # e^-60 is nothing next to the 1 of a vector with itself; subnormal numbers would take many times as long.
                kernel = (distances / (-2 * h * h)).clamp_min_(-60).exp_()
                total += sign @ kernel @ signs
                if needs_gradient:
                    slopes.add_(kernel, alpha=1 / (h * h))
            if needs_gradient:
                pull = slopes @ (signs[:, None] * both) - (slopes @ signs)[:, None] * part
                gradients.append(2 * sign[:, None] * pull)
        if needs_gradient:
            ctx.save_for_backward(*torch.cat(gradients).split([len(x), len(y)]))
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        to_x, to_y = ctx.saved_tensors
        return grad * to_x, grad * to_y, None


class MomentMatchingNetwork(Density):
    r"""A generative moment matching network (GMMN), :math:`z = f(u)` with :math:`u` from :math:`\mathcal{U}(-1, 1)`.

    It is trained on the root of the squared maximum mean discrepancy, and can only be sampled from.

    References:
        | Generative Moment Matching Networks (Li et al., 2015)
        | https://arxiv.org/abs/1502.02761

    Arguments:
        dim: The number of dimensions :math:`D`.
        options: The fields of `Options`.

    Example:
        >>> MomentMatchingNetwork(8).sample(3).shape
        torch.Size([3, 8])
        >>> MomentMatchingNetwork(8).log_prob(torch.zeros(1, 8))
        Traceback (most recent call last):
        ...
        pipeline.errors.PipelineError: 'gmmn' has no likelihood; ask for a Parzen score of its samples instead
    """

    family = "gmmn"
    options_type = Options
    has_log_prob = False
    has_mean_loss = False

    options: Options

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        noise_dim, hidden = self.options.noise_dim, self.options.hidden
        self.bandwidths = [h * math.sqrt(dim) for h in self.options.bandwidths]
        self.network = nn.Sequential()
        for inputs, outputs in itertools.pairwise((noise_dim, *hidden)):
            self.network.extend([nn.Linear(inputs, outputs), nn.ReLU()])
        self.network.append(nn.Linear((noise_dim, *hidden)[-1], dim))

    def _generate(self, n: int, generator: Randomness | None) -> Tensor:
        codes: Tensor = self.network(2 * uniform((n, self.options.noise_dim), self.shift, generator) - 1)
        return 20 * (torch.sigmoid(codes) - 0.5) if self.options.output == "sigmoid" else codes

    def loss(self, z: Tensor, generator: Randomness | None = None, context: Tensor | None = None) -> Tensor:
        """Root of the squared maximum mean discrepancy between the batch and as many samples, in standardised units.

        Arguments:
            z: The codes in the units of the data, with shape (B, D).
            generator: Source of the samples' noise.
            context: None: this family takes none.
        """
        samples = self._generate(len(z), generator)
        with torch.autocast(z.device.type, enabled=False):  # a small difference of large sums
            value = squared_discrepancy(self._standardised(z), samples.to(z.dtype), self.bandwidths)
        return value.clamp_min(1e-12).sqrt()

    def discrepancy(self, z: Tensor, generator: Generator | None = None) -> Tensor:
        """Squared maximum mean discrepancy, in float64, between codes and as many samples, with the bandwidths of the loss.

        Arguments:
            z: The codes in the units of the data, with shape (B, D).
            generator: Source of the samples' noise.
        """
        return squared_discrepancy(self._standardised(z).double(), self._sample(len(z), generator).double(), self.bandwidths)

    def _sample(self, n: int, generator: Generator | None) -> Tensor:
        return self._generate(n, generator)


Model = MomentMatchingNetwork
