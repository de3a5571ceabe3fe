"""RNADE: autoregressive mixtures of Gaussians with one shared hidden layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from pipeline.densities.common import mixtures
from pipeline.densities.common.density import Density, standard_normal, uniform
from pipeline.settings import Checked, DensitySettings, check_that

__all__ = ["Options", "Rnade", "Settings"]


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of `Rnade`.

    Attributes:
        components: Gaussians in the mixture of each conditional, K; 10 in its paper.
        hidden: Units of the hidden layer; 512 in its paper, on BSDS300.
    """

    components: int = 10
    hidden: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.components >= 1, "components", "must be at least 1")
        check_that(self.hidden >= 1, "hidden", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Settings(DensitySettings, Options):
    """RNADE with mixtures of Gaussians."""


class Rnade(Density):
    r"""The real-valued neural autoregressive density estimator (RNADE), with mixtures of Gaussians.

    .. math:: h_i = \operatorname{relu}\left(\rho_i \left(c + \sum_{j < i} z_j W_j\right)\right)

    The logits, means and log standard deviations of the i-th conditional are affine in :math:`h_i`, each with its own weights.

    References:
        | RNADE: The real-valued neural autoregressive density-estimator (Uria et al., 2013)
        | https://arxiv.org/abs/1306.0186

    Arguments:
        dim: The number of dimensions :math:`D`.
        options: The fields of `Options`.

    Example:
        >>> Rnade(8, components=2, hidden=16).log_prob(torch.zeros(3, 8)).shape
        torch.Size([3])
    """

    family = "rnade"
    has_vmap = False  # gradients are computed by hand
    options_type = Options

    options: Options

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        components, hidden = self.options.components, self.options.hidden
        self.weight = nn.Parameter(torch.randn(dim, hidden) / math.sqrt(dim))  # W; its last row reaches nothing
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.rescaling = nn.Parameter(torch.ones(dim, 1, 1))
        self.heads = nn.Parameter(torch.randn(dim, hidden, 3 * components) * 0.1 / math.sqrt(hidden))
        self.head_biases = nn.Parameter(mixtures.initial_bias(components).repeat(dim, 1, 1))
        self.chunk_examples = self.sample_chunk_examples = max(64, 2**22 // (dim * hidden))

    def _log_prob(self, z: Tensor) -> Tensor:
        terms = z.T[:-1, :, None] * self.weight[:-1, None]  # (D - 1, B, H)
        start = self.bias.expand(1, len(z), -1)
        sums = torch.cat([start, terms]).cumsum(dim=0)  # (D, B, H)
        outputs = torch.baddbmm(self.head_biases, torch.relu(self.rescaling * sums), self.heads)  # (D, B, 3K)
        return mixtures.log_likelihood(outputs, z.T).sum(dim=0)

    def _sample(self, n: int, generator: Generator | None) -> Tensor:
        uniforms = uniform((n, self.dim), self.shift, generator)
        normals = standard_normal((n, self.dim), self.shift, generator)
        z, sums = torch.empty_like(normals), self.bias.repeat(n, 1)
        for i in range(self.dim):
            outputs = torch.addmm(self.head_biases[i], torch.relu(self.rescaling[i] * sums), self.heads[i])
            z[:, i] = mixtures.draw(outputs, uniforms[:, i], normals[:, i])
            sums.addr_(z[:, i], self.weight[i])
        return z


Model = Rnade
