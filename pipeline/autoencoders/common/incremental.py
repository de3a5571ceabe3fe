"""Incremental learning of the latent vector: few dimensions at first, more as training goes on (section 3.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.settings import check_that
from pipeline.system import draws
from pipeline.system.draws import Randomness

__all__ = ["IncrementalSettings", "mask", "open_dimensions"]


@dataclass(frozen=True, kw_only=True)
class IncrementalSettings:
    """How the dimensions of the code open during training.

    Attributes:
        mode: `linear`: one dimension after the other, the paper's; `stepwise`: in `steps` equal parts; `nested_dropout`: each
            example keeps the first k dimensions, k drawn at every step.
        warm_up_epochs: Epochs until all are open, for `linear` and `stepwise`. In the paper 96 for MNIST, 120 for TFD.
        steps: Parts in which `stepwise` opens the code.
        cut_off: Distribution of k for `nested_dropout`: `uniform` over 1..D, or `geometric`.
        geometric_rate: Rate p of the geometric distribution, P(k) = p (1 - p)^(k-1) for k < D; the rest falls on D.
    """

    mode: Literal["linear", "stepwise", "nested_dropout"] = "linear"
    warm_up_epochs: float | None = None
    steps: int = 4
    cut_off: Literal["uniform", "geometric"] = "geometric"
    geometric_rate: float = 0.1

    def __post_init__(self) -> None:
        if self.mode == "nested_dropout":
            check_that(self.warm_up_epochs is None, "warm_up_epochs", "nested_dropout has no warm-up; leave it out")
        else:
            check_that(self.warm_up_epochs is not None, "warm_up_epochs", f"missing; '{self.mode}' needs a number of epochs")
        check_that(self.warm_up_epochs is None or self.warm_up_epochs > 0, "warm_up_epochs", "must be positive")
        check_that(self.steps >= 1, "steps", "must be at least 1")
        check_that(0 < self.geometric_rate < 1, "geometric_rate", "must lie between 0 and 1")

    def open_dimensions(self, epoch: float, latent_dim: int) -> int:
        """Dimensions open at a fractional epoch; all of them for `nested_dropout`, where each example has its own number."""
        if self.warm_up_epochs is None:
            return latent_dim
        steps = self.steps if self.mode == "stepwise" else None
        return open_dimensions(epoch, latent_dim, self.warm_up_epochs, steps)


def open_dimensions(epoch: float, latent_dim: int, warm_up: float, steps: int | None = None) -> int:
    r"""Number of open dimensions at the fractional epoch t.

    .. math:: k(t) = \min\left( D, \left\lfloor \frac{D t}{T} \right\rfloor + 1 \right)

    In m steps the share :math:`\min(m, \lfloor m t / T \rfloor + 1) / m` of the D dimensions is open, rounded up; m = D is
    the formula above.

    References:
        | Density Estimation and Incremental Learning of Latent Vector for Generative Autoencoders, section 3.4
        | https://arxiv.org/abs/1902.04294

    Arguments:
        epoch: Fractional epoch t.
        latent_dim: Length D of the code.
        warm_up: Epochs T until all dimensions are open.
        steps: Number m of steps; D when None.

    Example:
        >>> [open_dimensions(t, latent_dim=8, warm_up=96) for t in (0, 11.99, 12, 84, 96, 500)]
        [1, 1, 2, 8, 8, 8]
        >>> [open_dimensions(t, latent_dim=8, warm_up=96, steps=2) for t in (0, 47.9, 48, 96)]
        [4, 4, 8, 8]
    """
    steps = latent_dim if steps is None else steps
    step = min(steps, math.floor(steps * epoch / warm_up) + 1)
    return -(-latent_dim * step // steps)


def mask(settings: IncrementalSettings, codes: Tensor, epoch: float, generator: Randomness) -> Tensor:
    """The mask of a batch of codes: 1 where a dimension is open, 0 where it is closed.

    Masked codes are zero in the closed dimensions and get no gradient there.

    References:
        | Learning Ordered Representations with Nested Dropout (Rippel et al., 2014)
        | https://arxiv.org/abs/1402.0915

    Arguments:
        settings: How the dimensions open.
        codes: Codes with shape (B, D), whose device and type the mask takes.
        epoch: Fractional epoch.
        generator: Source of the cut-offs of nested dropout, on the CPU.

    Returns:
        The mask, with shape (1, D), or (B, D) for nested dropout.

    Example:
        >>> settings = IncrementalSettings(mode="linear", warm_up_epochs=4)
        >>> mask(settings, torch.ones(2, 4), epoch=1.5, generator=torch.Generator())
        tensor([[1., 1., 0., 0.]])
    """
    batch, latent_dim = codes.shape
    if settings.mode == "nested_dropout":
        uniform = draws.uniform((batch, 1), generator, torch.float64)
        if settings.cut_off == "uniform":
            count = (uniform * latent_dim).floor() + 1
        else:
            # The inverse of the distribution function, P(k > j) = (1 - p)^j.
            count = (torch.log1p(-uniform) / math.log1p(-settings.geometric_rate)).floor() + 1
        count = count.clamp(max=latent_dim)
    else:
        count = torch.tensor([[settings.open_dimensions(epoch, latent_dim)]])
    return (torch.arange(latent_dim) < count).to(codes)  # (B, 1) against (D,) => (B, D)
