"""The adversarial autoencoder (AAE): a discriminator holds the codes to a prior."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.autoencoders.common.base import ImageAutoencoderSettings, ImageObjective
from pipeline.priors import Prior, PriorName
from pipeline.settings import check_that
from pipeline.training.trainable import Step

__all__ = ["AdversarialObjective", "Settings", "build"]


@dataclass(frozen=True, kw_only=True)
class Settings(ImageAutoencoderSettings):
    """Keys of a row with the objective `aae`.

    Attributes:
        prior: `normal`: N(0, I); `two_normals`: N(-3, I) and N(3, I) in equal parts.
        discriminator_width: Units of a hidden layer of the discriminator.
        discriminator_layers: Hidden layers of the discriminator.
    """

    prior: PriorName = "normal"
    discriminator_width: int = 1000
    discriminator_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.discriminator_width >= 1, "discriminator_width", "must be at least 1")
        check_that(self.discriminator_layers >= 1, "discriminator_layers", "must be at least 1")


class AdversarialObjective(ImageObjective):
    r"""Reconstruction, and a game between the encoder and a discriminator of codes.

    .. math::
        L_\mathrm{autoencoder} & = \mathrm{MSE}(x, g(f(x))) + \beta L_\mathrm{perceptual} \\
        L_\mathrm{discriminator} & = -\tfrac{1}{2} \log D(z) - \tfrac{1}{2} \log\left( 1 - D(f(x)) \right), \quad z \sim p(z) \\
        L_\mathrm{generator} & = -\log D(f(x))

    Each phase trains only its own part: encoder and decoder, discriminator, encoder. With `incremental`, closed dimensions
    are zero for the discriminator too, in codes and in draws from the prior.

    References:
        | Adversarial Autoencoders (Makhzani et al., 2016)
        | https://arxiv.org/abs/1511.05644

    Arguments:
        settings: The row's settings.
        shape: Shape (C, H, W) of an image.
        value_range: Least and greatest value of a pixel, (0, 1) or (-1, 1).

    Example:
        >>> settings = Settings(dataset="digits", objective="aae", latent_dim=8, blocks=1)
        >>> objective = build(settings, shape=(1, 28, 28), value_range=(0, 1))
        >>> batch, step = {"images": torch.rand(4, 1, 28, 28)}, Step(0, 0.0, torch.Generator())
        >>> {phase: sorted(objective(phase, batch, step)) for phase in objective.phases}
        {'autoencoder': ['loss', 'mse'], 'discriminator': ['accuracy', 'loss'], 'generator': ['loss']}
    """

    settings: Settings
    phases = ("autoencoder", "discriminator", "generator")

    def __init__(self, settings: Settings, shape: tuple[int, ...], value_range: tuple[float, float]) -> None:
        super().__init__(settings, shape, value_range)
        widths = [settings.latent_dim, *[settings.discriminator_width] * settings.discriminator_layers]
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=self.initial)))
            for inputs, outputs in zip(widths, widths[1:], strict=False):  # noqa: RUF007 (pairs of layers)
                layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(0.2)]
            layers.append(nn.Linear(widths[-1], 1))
        self.discriminator = nn.Sequential(*layers)

    def phase_parameters(self, phase: str) -> Iterable[nn.Parameter]:
        """The parameters that the phase's optimizer updates."""
        modules: dict[str, tuple[nn.Module, ...]] = {
            "autoencoder": (self.encoder, self.decoder),
            "discriminator": (self.discriminator,),
            "generator": (self.encoder,),
        }
        return [parameter for module in modules[phase] for parameter in module.parameters()]

    def forward(self, phase: str, batch: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        """The phase's loss; `accuracy` is the share of codes and draws that the discriminator tells apart."""
        images = batch["images"]
        if phase == "discriminator":
            with torch.no_grad():
                codes = self.encoder(images)
        else:
            codes = self.encoder(images)
        opened = self.mask(codes, step)
        if opened is not None:
            codes = codes * opened
        if phase == "autoencoder":
            losses = self.reconstruction(images, self.decoder(codes))
            return {"loss": losses.pop("reconstruction"), **losses}
        if phase == "generator":
            # Detached weights: the gradient passes through the discriminator without changing it.
            frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
            scores = torch.func.functional_call(self.discriminator, frozen, (codes,)).float()
            return {"loss": nn.functional.softplus(-scores).mean()}
        draws = Prior(self.settings.prior, self.latent_dim).sample(len(codes), step.generator).to(codes)
        if opened is not None:
            draws = draws * opened
        real, coded = self.discriminator(draws).float(), self.discriminator(codes).float()
        # softplus(-s) = -log sigmoid(s), and softplus(s) = -log(1 - sigmoid(s))
        loss = 0.5 * (nn.functional.softplus(-real).mean() + nn.functional.softplus(coded).mean())
        accuracy = 0.5 * ((real > 0).float().mean() + (coded < 0).float().mean())
        return {"loss": loss, "accuracy": accuracy}


def build(settings: Settings, shape: tuple[int, ...], value_range: tuple[float, float]) -> AdversarialObjective:
    """The objective for images of a shape (C, H, W) and a range; its weights follow from the settings' seed."""
    return AdversarialObjective(settings, shape, value_range)
