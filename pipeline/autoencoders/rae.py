"""The regularised autoencoder (RAE): short codes and a smooth decoder, with a density fitted afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.autoencoders.common.base import ImageAutoencoderSettings, ImageObjective
from pipeline.settings import check_that
from pipeline.system.draws import integers
from pipeline.training.trainable import Step

__all__ = ["RegularisedObjective", "Settings", "build"]


@dataclass(frozen=True, kw_only=True)
class Settings(ImageAutoencoderSettings):
    """Keys of a row with the objective `rae`.

    Attributes:
        code_weight: Weight of half the squared norm of the codes.
        decoder_penalty: `l2`: squared norm of the decoder's parameters (RAE-L2 in the paper); `gradient`: squared norm of its
            Jacobian (RAE-GP).
        decoder_weight: Weight of that penalty.
    """

    code_weight: float = 1e-4
    decoder_penalty: Literal["l2", "gradient"] = "l2"
    decoder_weight: float = 1e-7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.code_weight >= 0, "code_weight", "must be 0 or more")
        check_that(self.decoder_weight >= 0, "decoder_weight", "must be 0 or more")
        check_that(
            not self.compile or self.decoder_penalty != "gradient",
            "compile",
            "compiled networks have no second derivatives, which `decoder_penalty: gradient` takes: leave out one of them",
        )


class RegularisedObjective(ImageObjective):
    r"""Reconstruction, the squared norm of the codes, and a penalty on the decoder.

    .. math:: L = \mathrm{MSE}(x, g(z)) + \beta_p L_\mathrm{perceptual} + \tfrac{\beta}{2} \|z\|^2 + \lambda R, \quad z = f(x)

    with :math:`R = \|\theta_g\|^2`, or :math:`R = \|\partial g / \partial z\|_F^2 / d` for images of d pixel values. The
    squared norms of code and Jacobian are averaged over the batch. The error is a mean over pixels, as for `ae`: with both
    weights at 0 this is the plain autoencoder. The paper sums over pixels, so its weights are d times ours.

    The Jacobian's norm is estimated without bias as :math:`E_v \|v^T \partial g / \partial z\|^2` over random signs v.

    References:
        | From Variational to Deterministic Autoencoders (Ghosh et al., 2020)
        | https://arxiv.org/abs/1903.12436

    Arguments:
        settings: The row's settings.
        shape: Shape (C, H, W) of an image.
        value_range: Least and greatest value of a pixel, (0, 1) or (-1, 1).

    Example:
        >>> settings = Settings(dataset="digits", objective="rae", latent_dim=8, blocks=1)
        >>> objective = build(settings, shape=(1, 28, 28), value_range=(0, 1))
        >>> images = torch.rand(4, 1, 28, 28)
        >>> sorted(objective("model", {"images": images}, Step(0, 0.0, torch.Generator())))
        ['code_norm', 'decoder_penalty', 'loss', 'mse']
    """

    settings: Settings

    def forward(self, phase: str, batch: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        """The loss and its parts; `code_norm` is half the squared norm of a code."""
        images = batch["images"]
        codes = self.encoder(images)
        opened = self.mask(codes, step)
        if opened is not None:
            codes = codes * opened
        reconstructions = self.decoder(codes)
        losses = self.reconstruction(images, reconstructions)
        code_norm = 0.5 * codes.square().sum(1).mean()
        penalty = self._penalty(codes, opened, reconstructions, step)
        loss = losses.pop("reconstruction") + self.settings.code_weight * code_norm + self.settings.decoder_weight * penalty
        return {"loss": loss, "code_norm": code_norm, "decoder_penalty": penalty, **losses}

    def _penalty(self, codes: Tensor, opened: Tensor | None, reconstructions: Tensor, step: Step) -> Tensor:
        if self.settings.decoder_penalty == "l2":
            return torch.stack([parameter.square().sum() for parameter in self.decoder.parameters()]).sum()
        if not codes.requires_grad:  # in validation, where gradients are off
            return codes.new_zeros(())
        signs = integers(2, reconstructions.shape, step.generator).to(reconstructions) * 2 - 1
        (gradient,) = torch.autograd.grad(reconstructions, codes, signs, create_graph=True)  # (B, D)
        if opened is not None:
            gradient = gradient * opened
        return gradient.float().square().sum(1).mean() / reconstructions[0].numel()


def build(settings: Settings, shape: tuple[int, ...], value_range: tuple[float, float]) -> RegularisedObjective:
    """The objective for images of a shape (C, H, W) and a range; its weights follow from the settings' seed."""
    return RegularisedObjective(settings, shape, value_range)
