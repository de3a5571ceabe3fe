"""Priors that an autoencoder's codes are matched to, sampled as they are: nothing is fitted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from pipeline.densities.common.density import Density, Proceed, own_settings, standard_normal, uniform
from pipeline.errors import PipelineError
from pipeline.settings import DensitySettings, check_that

__all__ = ["Prior", "Settings", "build"]


@dataclass(frozen=True, kw_only=True)
class Settings(DensitySettings):
    """A fixed prior; codes aren't standardised.

    Attributes:
        prior: `normal` for N(0, I), `two_normals` for the equal mixture of N(-3, I) and N(3, I) (section 4.2.2).
    """

    standardise: Literal["dimension", "scalar", "none"] = "none"
    prior: Literal["normal", "two_normals"] = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.standardise == "none", "standardise", "has to be 'none': a prior is fixed in the units of the codes")


class Prior(Density):
    r"""A fixed prior: :math:`\mathcal{N}(0, I)`, or :math:`\frac{1}{2} \mathcal{N}(-3, I) + \frac{1}{2} \mathcal{N}(3, I)`.

    References:
        | Unpriortized Autoencoder For Image Generation (Yoo et al., 2019), section 4.2.2
        | https://arxiv.org/abs/1902.04294

    Arguments:
        dim: The number of dimensions :math:`D`.
        prior: `normal` or `two_normals`.

    Example:
        >>> Prior(3).log_prob(torch.zeros(1, 3))
        tensor([-2.7568])
        >>> Prior(1, prior="two_normals").log_prob(torch.tensor([[3.0]]))
        tensor([-1.6121])
    """

    family = "prior"
    trained_by_gradient = False

    def __init__(self, dim: int, prior: str = "normal") -> None:
        super().__init__(dim, prior=prior)
        self.offset = {"normal": 0.0, "two_normals": 3.0}[prior]

    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Refused: a prior is fixed in the units of the codes."""
        raise PipelineError("a prior is fixed in the units of the codes: set `standardise: none`")

    def _estimate(self, blocks: Callable[[], Iterable[Tensor]], valid: Tensor, seed: int, proceed: Proceed) -> None:
        pass

    def _log_prob(self, z: Tensor) -> Tensor:
        sides = torch.stack([(z - self.offset).square().sum(dim=1), (z + self.offset).square().sum(dim=1)])  # (2, B)
        return torch.logsumexp(-0.5 * sides, dim=0) - math.log(2) - 0.5 * self.dim * math.log(2 * math.pi)

    def _sample(self, n: int, generator: Generator | None) -> Tensor:
        side = torch.where(uniform((n, 1), self.shift, generator) < 0.5, -self.offset, self.offset)
        return side + standard_normal((n, self.dim), self.shift, generator)


Model = Prior


def build(settings: Settings, dim: int) -> Prior:
    """The density that a row of `densities` describes."""
    return Prior(dim, **own_settings(settings))
