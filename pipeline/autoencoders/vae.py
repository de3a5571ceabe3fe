"""The variational autoencoder (VAE) with a weight on its KL divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pipeline.autoencoders.common.base import ImageAutoencoderSettings, ImageObjective
from pipeline.priors import PriorName
from pipeline.settings import check_that
from pipeline.system.draws import normal
from pipeline.training.trainable import Step

__all__ = ["Settings", "VariationalObjective", "build", "kl_divergence"]


@dataclass(frozen=True, kw_only=True)
class Settings(ImageAutoencoderSettings):
    """Keys of a row with the objective `vae`.

    Attributes:
        kl_weight: Weight of the KL divergence, 0 to 1 in the paper; 1 is the evidence lower bound up to the noise scale.
        prior: Reference distribution of the divergence; not a key of the row.
    """

    kl_weight: float = 1.0
    prior: ClassVar[PriorName] = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.kl_weight >= 0, "kl_weight", "must be 0 or more")


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    r"""The divergence of a diagonal normal distribution from the standard one, in nats per dimension.

    .. math:: \mathrm{KL}\left( N(\mu, \sigma^2) \| N(0, 1) \right)
        = \tfrac{1}{2} \left( \mu^2 + \sigma^2 - 1 - \log \sigma^2 \right)

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2014), appendix B
        | https://arxiv.org/abs/1312.6114

    Arguments:
        mean: Means with shape (*).
        log_variance: Logarithms of the variances, with shape (*).

    Returns:
        The divergences, with shape (*), not summed.

    Example:
        >>> import torch
        >>> kl_divergence(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]))
        tensor([0.0000, 0.5000])
    """
    # expm1: exact near 0, where the posterior starts.
    return 0.5 * (mean.square() + log_variance.expm1() - log_variance)


class VariationalObjective(ImageObjective):
    r"""Reconstruction of noisy codes, and the divergence of the posterior from the prior.

    .. math:: L = d \left( \mathrm{MSE}(x, g(z)) + \beta_p L_\mathrm{perceptual} \right)
        + \beta \, \mathrm{KL}\left( q(z | x) \| N(0, I) \right), \quad z \sim q(z | x) = N(\mu(x), \sigma^2(x))

    with d pixel values per image. The squared error is summed over pixels and the divergence over dimensions; both are averaged
    over the batch. At :math:`\beta = 1` and without perceptual loss this is the negative evidence lower bound, up to a
    constant, of a decoder with noise of variance 1/2. Codes are posterior means. With `incremental`, neither term includes
    closed dimensions.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2014)
        | https://arxiv.org/abs/1312.6114

        | beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework (Higgins et al., 2017)
        | https://openreview.net/forum?id=Sy2fzU9gl

    Arguments:
        settings: The row's settings.
        shape: Shape (C, H, W) of an image.
        value_range: Least and greatest value of a pixel, (0, 1) or (-1, 1).

    Example:
        >>> settings = Settings(dataset="digits", objective="vae", latent_dim=2, blocks=1, kl_weight=0.1)
        >>> objective = build(settings, shape=(1, 28, 28), value_range=(0, 1))
        >>> import torch
        >>> images = torch.rand(4, 1, 28, 28)
        >>> losses = objective("model", {"images": images}, Step(0, 0.0, torch.Generator()))
        >>> sorted(losses)
        ['kl', 'loss', 'mse']
        >>> torch.allclose(losses["loss"], 784 * losses["mse"] + 0.1 * losses["kl"])
        True
    """

    settings: Settings

    def __init__(self, settings: Settings, shape: tuple[int, ...], value_range: tuple[float, float]) -> None:
        super().__init__(settings, shape, value_range, variational=True)

    def divergence(self, examples: Tensor) -> Tensor:
        """The divergence of each image's posterior from the prior, in nats in total, with shape (B,)."""
        return kl_divergence(*self.encoder.moments(examples)).sum(1)

    def forward(self, phase: str, batch: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        """The loss, in nats per image at the noise scale above, and its parts; `kl` in nats over all dimensions."""
        images = batch["images"]
        mean, log_variance = self.encoder.moments(images)
        noise = normal(mean.shape, step.generator).to(mean)
        codes = mean + (0.5 * log_variance).exp() * noise
        divergence = kl_divergence(mean, log_variance)  # (B, D)
        opened = self.mask(codes, step)
        if opened is not None:
            codes, divergence = codes * opened, divergence * opened
        kl = divergence.sum(1).mean()
        losses = self.reconstruction(images, self.decoder(codes))
        values = images[0].numel()
        return {"loss": values * losses.pop("reconstruction") + self.settings.kl_weight * kl, "kl": kl, **losses}


def build(settings: Settings, shape: tuple[int, ...], value_range: tuple[float, float]) -> VariationalObjective:
    """The objective for images of a shape (C, H, W) and a range; its weights follow from the settings' seed."""
    return VariationalObjective(settings, shape, value_range)
