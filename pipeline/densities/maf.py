"""Masked autoregressive flow (MAF)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.densities.common.flows import AutoregressiveOptions, NormalisingFlow
from pipeline.settings import DensitySettings

__all__ = ["MaskedAutoregressiveFlow", "Options", "Settings"]


@dataclass(frozen=True, kw_only=True)
class Options(AutoregressiveOptions):
    """Options of `MaskedAutoregressiveFlow`."""


@dataclass(frozen=True, kw_only=True)
class Settings(DensitySettings, Options):
    """Masked autoregressive flow (MAF)."""


class MaskedAutoregressiveFlow(NormalisingFlow):
    r"""Masked autoregressive flow (MAF).

    References:
        | Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017)
        | https://arxiv.org/abs/1705.07057

    Arguments:
        dim: The number of dimensions :math:`D`.
        options: The fields of `Options`.

    Example:
        >>> import torch
        >>> MaskedAutoregressiveFlow(8, transforms=2, hidden=[16]).log_prob(torch.zeros(3, 8)).shape
        torch.Size([3])
    """

    family = "maf"
    options_type = Options
    retired = frozenset({"family", "bins", "coupling", "signal"})

    options: Options

    def _flow(self, **common: Any) -> Any:
        from zuko import flows

        return flows.MAF(**common, **self._autoregressive())


Model = MaskedAutoregressiveFlow
