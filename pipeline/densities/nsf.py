"""Neural spline flow (NSF): monotonic rational-quadratic splines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.densities.common.flows import AutoregressiveOptions, NormalisingFlow
from pipeline.settings import DensitySettings, check_that

__all__ = ["NeuralSplineFlow", "Options", "Settings"]


@dataclass(frozen=True, kw_only=True)
class Options(AutoregressiveOptions):
    """Options of `NeuralSplineFlow`.

    Attributes:
        bins: Bins of the splines.
        coupling: Whether splines are coupled, which makes sampling fast, instead of autoregressive.
    """

    bins: int = 8
    coupling: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.bins >= 2, "bins", "must be at least 2")


@dataclass(frozen=True, kw_only=True)
class Settings(DensitySettings, Options):
    """Neural spline flow (NSF): monotonic rational-quadratic splines."""


class NeuralSplineFlow(NormalisingFlow):
    r"""Neural spline flow (NSF): monotonic rational-quadratic splines.

    References:
        | Neural Spline Flows (Durkan et al., 2019)
        | https://arxiv.org/abs/1906.04032

    Arguments:
        dim: The number of dimensions :math:`D`.
        options: The fields of `Options`.

    Example:
        >>> import torch
        >>> NeuralSplineFlow(8, transforms=2, hidden=[16]).log_prob(torch.zeros(3, 8)).shape
        torch.Size([3])
    """

    family = "nsf"
    options_type = Options
    retired = frozenset({"family", "signal"})

    options: Options

    def _flow(self, **common: Any) -> Any:
        from zuko import flows

        options = self.options
        passes = 2 if options.coupling else None
        return flows.NSF(**common, **self._autoregressive(), bins=options.bins, passes=passes)


Model = NeuralSplineFlow
