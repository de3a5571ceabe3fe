"""Real NVP: affine coupling layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.densities.common.flows import FlowOptions, NormalisingFlow
from pipeline.errors import DataError
from pipeline.settings import DensitySettings

__all__ = ["Options", "RealNVP", "Settings"]


@dataclass(frozen=True, kw_only=True)
class Options(FlowOptions):
    """Options of `RealNVP`."""


@dataclass(frozen=True, kw_only=True)
class Settings(DensitySettings, Options):
    """Real NVP: affine coupling layers."""


class RealNVP(NormalisingFlow):
    r"""Real NVP: affine coupling layers.

    References:
        | Density Estimation using Real NVP (Dinh et al., 2016)
        | https://arxiv.org/abs/1605.08803

    Arguments:
        dim: The number of dimensions :math:`D`.
        options: The fields of `Options`.

    Raises:
        DataError: When there is only one dimension.

    Example:
        >>> import torch
        >>> RealNVP(8, transforms=2, hidden=[16]).log_prob(torch.zeros(3, 8)).shape
        torch.Size([3])
    """

    family = "realnvp"
    options_type = Options
    retired = frozenset({"family", "residual", "bins", "coupling", "signal"})

    options: Options

    def _flow(self, **common: Any) -> Any:
        from zuko import flows

        if self.dim == 1:
            raise DataError("'realnvp' couples dimensions, and these codes have only one; choose another family")
        return flows.RealNVP(**common)


Model = RealNVP
