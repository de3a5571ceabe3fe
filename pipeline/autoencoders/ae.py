"""The plain autoencoder (AE), and with `incremental` the paper's IAE."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pipeline.autoencoders.common.base import ImageAutoencoderSettings, ImageObjective
from pipeline.training.trainable import Step

__all__ = ["AutoencoderObjective", "Settings", "build"]


@dataclass(frozen=True, kw_only=True)
class Settings(ImageAutoencoderSettings):
    """Keys of a row with the objective `ae`; none beyond the common ones."""


class AutoencoderObjective(ImageObjective):
    r"""Reconstruction alone.

    .. math:: L = \mathrm{MSE}(x, g(m \odot f(x))) + \beta L_\mathrm{perceptual}

    where m is the mask of the open dimensions, 1 everywhere without `incremental`.

    References:
        | Density Estimation and Incremental Learning of Latent Vector for Generative Autoencoders, (5) and section 3.4
        | https://arxiv.org/abs/1902.04294

    Arguments:
        settings: The row's settings.
        shape: Shape (C, H, W) of an image.
        value_range: Least and greatest value of a pixel, (0, 1) or (-1, 1).

    Example:
        >>> import torch
        >>> settings = Settings(dataset="digits", objective="ae", latent_dim=8, blocks=1)
        >>> objective = build(settings, shape=(1, 28, 28), value_range=(0, 1))
        >>> images = torch.rand(4, 1, 28, 28)
        >>> objective.encode(images).shape
        torch.Size([4, 8])
        >>> sorted(objective("model", {"images": images}, Step(0, 0.0, torch.Generator())))
        ['loss', 'mse']
    """

    def forward(self, phase: str, batch: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        """The loss, a mean over pixels, and its parts."""
        images = batch["images"]
        codes = self.encoder(images)
        opened = self.mask(codes, step)
        losses = self.reconstruction(images, self.decoder(codes if opened is None else codes * opened))
        return {"loss": losses.pop("reconstruction"), **losses}


def build(settings: Settings, shape: tuple[int, ...], value_range: tuple[float, float]) -> AutoencoderObjective:
    """The objective for images of a shape (C, H, W) and a range; its weights follow from the settings' seed."""
    return AutoencoderObjective(settings, shape, value_range)
