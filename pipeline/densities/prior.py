"""Priors that an autoencoder's codes are matched to, sampled as they are: nothing is fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Generator, Tensor

from pipeline import priors
from pipeline.densities.common.density import Density, Proceed, standard_normal, uniform
from pipeline.errors import PipelineError
from pipeline.settings import Checked, DensitySettings, check_that

__all__ = ["Options", "PriorDensity", "Settings"]


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of `PriorDensity`.

    Attributes:
        prior: `normal` for N(0, I), `two_normals` for the equal mixture of N(-3, I) and N(3, I) (section 4.2.2).
    """

    prior: priors.PriorName = "normal"


@dataclass(frozen=True, kw_only=True)
class Settings(DensitySettings, Options):
    """A fixed prior; codes aren't standardised."""

    standardise: Literal["dimension", "scalar", "none"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.standardise == "none", "standardise", "must be 'none': a prior is fixed in the units of the codes")


class PriorDensity(Density):
    r"""A fixed prior: :math:`\mathcal{N}(0, I)`, or :math:`\frac{1}{2} \mathcal{N}(-3, I) + \frac{1}{2} \mathcal{N}(3, I)`.

    References:
        | Density Estimation and Incremental Learning of Latent Vector for Generative Autoencoders, section 4.2.2
        | https://arxiv.org/abs/1902.04294

    Arguments:
        dim: The number of dimensions :math:`D`.
        options: The fields of `Options`.

    Example:
        >>> import torch
        >>> PriorDensity(3).log_prob(torch.zeros(1, 3))
        tensor([-2.7568])
        >>> PriorDensity(1, prior="two_normals").log_prob(torch.tensor([[3.0]]))
        tensor([-1.6121])
    """

    family = "prior"
    options_type = Options
    trained_by_gradient = False

    options: Options

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        self.prior = priors.Prior(self.options.prior, dim)

    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Refused: a prior is fixed in the units of the codes."""
        raise PipelineError("a prior is fixed in the units of the codes: set `standardise: none`")

    def _estimate(self, blocks: Callable[[], Iterable[Tensor]], valid: Tensor, seed: int, proceed: Proceed) -> None:
        pass

    def _log_prob(self, z: Tensor) -> Tensor:
        return self.prior.log_prob(z)

    def _sample(self, n: int, generator: Generator | None) -> Tensor:
        chosen = (uniform((n,), self.shift, generator) * len(self.prior.means)).long()
        return self.prior.means.to(self.shift)[chosen, None] + standard_normal((n, self.dim), self.shift, generator)


Model = PriorDensity
