"""MADE with mixtures of Gaussians: a masked multi-layer perceptron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from zuko.nn import MaskedMLP

from pipeline.densities.common import mixtures
from pipeline.densities.common.density import Density, standard_normal, uniform
from pipeline.settings import Checked, DensitySettings, check_that

__all__ = ["MadeMog", "Options", "Settings"]


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of `MadeMog`.

    Attributes:
        components: Gaussians in the mixture of each conditional, K.
        hidden: Units of the hidden layers.
        residual: Whether layers of equal width become residual blocks.
    """

    components: int = 10
    hidden: tuple[int, ...] = (512, 512)
    residual: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.components >= 1, "components", "must be at least 1")
        check_that(len(self.hidden) > 0 and min(self.hidden) >= 1, "hidden", "must list numbers of at least 1")


@dataclass(frozen=True, kw_only=True)
class Settings(DensitySettings, Options):
    """A masked multi-layer perceptron with mixtures of Gaussians."""


class MadeMog(Density):
    r"""The masked autoencoder for distribution estimation (MADE), with mixtures of Gaussians.

    Masks leave the outputs of the i-th conditional the paths from :math:`z_{<i}` only.

    References:
        | MADE: Masked Autoencoder for Distribution Estimation (Germain et al., 2015)
        | https://arxiv.org/abs/1502.03509
        | Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017)
        | https://arxiv.org/abs/1705.07057

    Arguments:
        dim: The number of dimensions :math:`D`.
        options: The fields of `Options`.

    Example:
        >>> MadeMog(8, components=2, hidden=[16]).log_prob(torch.zeros(3, 8)).shape
        torch.Size([3])
    """

    family = "made_mog"
    has_vmap = False  # gradients are computed by hand
    options_type = Options
    has_meta = False  # masks are computed from values

    options: Options

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        components = self.options.components
        self.bias = nn.Parameter(mixtures.initial_bias(components).repeat(dim, 1))
        self.network: MaskedMLP | None = None
        if dim > 1:  # the first conditional depends on nothing: it is its bias
            earlier = torch.ones(dim, dim, dtype=torch.bool).tril(-1)[1:, :-1]
            self.network = MaskedMLP(
                earlier.repeat_interleave(3 * components, dim=0), self.options.hidden, residual=self.options.residual
            )
        self.chunk_examples = self.sample_chunk_examples = max(64, 2**22 // (3 * components * dim))

    def _outputs(self, z: Tensor) -> Tensor:
        outputs = self.bias.expand(len(z), -1, -1)  # (B, D, 3K)
        if self.network is None:
            return outputs
        others = self.network(z[:, :-1]).to(z.dtype).view(len(z), self.dim - 1, -1)
        return torch.cat([outputs[:, :1], outputs[:, 1:] + others], dim=1)

    def _log_prob(self, z: Tensor) -> Tensor:
        return mixtures.log_likelihood(self._outputs(z), z).sum(dim=1)

    def _sample(self, n: int, generator: Generator | None) -> Tensor:
        uniforms = uniform((n, self.dim), self.shift, generator)
        normals = standard_normal((n, self.dim), self.shift, generator)
        z = torch.zeros_like(normals)
        for i in range(self.dim):
            z[:, i] = mixtures.draw(self._outputs(z)[:, i], uniforms[:, i], normals[:, i])
        return z


Model = MadeMog
