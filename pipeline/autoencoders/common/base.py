"""What the objectives share: settings, network, reconstruction loss."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.autoencoders.common.incremental import IncrementalSettings, mask
from pipeline.autoencoders.common.network import (
    ONE_VALUE,
    Autoencoder,
    Decoder,
    Encoder,
    filter_side,
    fitting_blocks,
    image_side,
)
from pipeline.autoencoders.common.options import ConvolutionOptions
from pipeline.autoencoders.common.perceptual import PerceptualLoss, vgg19_weights
from pipeline.errors import SettingsError
from pipeline.settings import AutoencoderSettings, TrainingSettings, check_that, checked_path, file_setting
from pipeline.system.draws import uniform
from pipeline.system.streams import stream_seed
from pipeline.training.trainable import Step, Trainable

__all__ = ["ImageAutoencoderSettings", "ImageObjective", "Objective"]


@dataclass(frozen=True, kw_only=True)
class ImageAutoencoderSettings(TrainingSettings, AutoencoderSettings, ConvolutionOptions):
    """Keys of every objective that trains the network of Figure 9, in addition to the network's own options.

    Attributes:
        incremental: Opens the code dimension by dimension (section 3.4); null trains all of it from the start.
        perceptual_weight: Weight of the perceptual loss in (5); 0.1 in the paper, 0 leaves it out.
        perceptual_weights: Where VGG19's weights come from: a file (safetensors or state dict) with its digest,
            `PATH@sha256:HEX`, or `imagenet` for torchvision's official ones, downloaded once.
        pixel_loss: `squared`: the mean squared error of the paper; `absolute`: the mean absolute error, which blurs edges less.
        mirror: Whether each image is mirrored left to right in half of the steps: for photographs, not for letters or digits.
        compile: Whether torch compiles encoder and decoder for training, by a C++ compiler or on a GPU by Triton. It takes a
            minute first and rounds otherwise, so weights differ a little from those of a row without it.
    """

    incremental: IncrementalSettings | None = None
    perceptual_weight: float = 0.0
    perceptual_weights: str | None = file_setting()
    pixel_loss: Literal["squared", "absolute"] = "squared"
    mirror: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.pixel_loss in ("squared", "absolute"), "pixel_loss", "must be squared or absolute")
        check_that(self.perceptual_weight >= 0, "perceptual_weight", "must be 0 or more")
        check_that(
            self.perceptual_weight == 0 or self.perceptual_weights is not None,
            "perceptual_weights",
            "missing; a perceptual_weight above 0 needs VGG19's weights: a file, or 'imagenet' to download them",
        )

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuses a data set that the network can't take.

        Arguments:
            shape: Shape of an example, (C, H, W) for images.

        Raises:
            SettingsError: When it holds vectors, or images whose side isn't S * 2^(N+1).
        """
        check_that(
            len(shape) == 3,
            "dataset",
            f"'{self.dataset}' holds vectors, and the objective '{self.objective}' needs images; use the objective 'identity'",
        )
        channels, height, width = shape
        check_that(channels >= 1 and height == width, "dataset", f"images must be square, and these are {height}x{width}")
        blocks = fitting_blocks(height) if self.blocks is None else self.blocks
        if self.filter_side is None:
            unit = image_side(blocks, 1)
            check_that(
                filter_side(blocks, height) is not None,
                "blocks",
                f"with {blocks} blocks the side must be a multiple of 2^{blocks + 1} = {unit} pixels, and the "
                f"images of '{self.dataset}' are {height}x{width}",
            )
        else:
            side = image_side(blocks, self.filter_side)
            check_that(
                side == height,
                "filter_side",
                f"the side must be filter_side * 2^(blocks + 1) = {side} pixels, and the images of '{self.dataset}' are "
                f"{height}x{width}",
            )
        normalised = blocks > 0 or self.input_normalisation
        check_that(self.batch_size > 1 or not normalised or filter_side(blocks, height) != 1, "batch_size", ONE_VALUE)


class Objective(Trainable):
    """A pair of maps between examples and codes, with the losses that train them.

    Attributes:
        trained: Whether there is anything to train.
        reconstructs: Whether codes are turned back into images, so that there is an error to score.
        latent_dim: Length D of the code; None if only the data determine it.
        decoder: The network that turns codes into images; None if codes are the data themselves.
    """

    trained: bool = True
    reconstructs: bool = True
    latent_dim: int | None
    decoder: Decoder | None

    def save(self, folder: Path) -> None:
        """Writes what `extract` reads into an existing folder."""
        raise NotImplementedError

    def encode(self, examples: Tensor) -> Tensor:
        """The whole codes, with shape (B, D) and float32, of examples in the range of the data set."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """The examples, in the range of the data set, of codes with shape (B, D)."""
        raise NotImplementedError

    def divergence(self, examples: Tensor) -> Tensor | None:
        """Divergence of each example's posterior from the prior, in nats in total, with shape (B,); None without posterior."""
        return None

    def open_dimensions(self, step: Step) -> int:
        """Dimensions of the code in use at a step of training."""
        raise NotImplementedError


class ImageObjective(Objective):
    """Base of the objectives that train the network of Figure 9.

    Arguments:
        settings: The row's settings.
        shape: Shape (C, H, W) of an image.
        value_range: Least and greatest value of a pixel, (0, 1) or (-1, 1).
        variational: Whether the encoder also outputs log-variances.

    Raises:
        SettingsError: When the images don't fit the network.
    """

    encoder: Encoder
    decoder: Decoder
    latent_dim: int

    def __init__(
        self,
        settings: ImageAutoencoderSettings,
        shape: tuple[int, ...],
        value_range: tuple[float, float],
        *,
        variational: bool = False,
    ) -> None:
        super().__init__()
        settings.check_shape(shape)
        self.settings = settings
        self.latent_dim = settings.latent_dim
        self.initial = torch.Generator().manual_seed(stream_seed("autoencoder weights", settings.seed))
        network = Autoencoder(settings, shape, value_range, variational=variational, generator=self.initial)
        self.encoder, self.decoder = network.encoder, network.decoder
        if settings.compile:
            self._compile()
        # In a tuple, PyTorch doesn't see it: VGG19 is not among the weights that are trained, averaged or saved.
        self._perceptual: tuple[PerceptualLoss, ...] = ()
        if settings.perceptual_weight > 0:
            weights = vgg19_weights(checked_path(settings.perceptual_weights or "", key := "perceptual_weights"), key)
            self._perceptual = (PerceptualLoss(weights, value_range, channels_last=settings.channels_last),)

    def _compile(self) -> None:
        """Replaces how encoder and decoder are called, and leaves their weights and names."""
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise SettingsError(
                f"compile: needs a C++ compiler, and there is no '{compiler}' here; install g++, or leave it out"
            )
        for network in (self.encoder, self.decoder):
            network.compile()

    def augment(self, batch: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        """The batch with half of the images mirrored, if the settings say so."""
        if not self.settings.mirror:
            return batch
        images = batch["images"]
        chosen = uniform((len(images),), step.generator).to(images.device) < 0.5
        return batch | {"images": torch.where(chosen[:, None, None, None], images.flip(3), images)}

    def save(self, folder: Path) -> None:
        """Writes encoder and decoder."""
        self.encoder.save(folder / "encoder.safetensors")
        self.decoder.save(folder / "decoder.safetensors")

    def encode(self, examples: Tensor) -> Tensor:
        """The whole codes, with shape (B, D) and float32, of images with shape (B, C, H, W)."""
        codes: Tensor = self.encoder(examples)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """The images, with shape (B, C, H, W) and float32, of codes with shape (B, D)."""
        images: Tensor = self.decoder(codes)
        return images

    def open_dimensions(self, step: Step) -> int:
        """Dimensions of the code in use at a step of training."""
        incremental = self.settings.incremental
        return self.latent_dim if incremental is None else incremental.open_dimensions(step.epoch, self.latent_dim)

    def mask(self, codes: Tensor, step: Step) -> Tensor | None:
        """The mask of closed dimensions, or None if all are open: without `incremental`, and in evaluation mode."""
        if self.settings.incremental is None or not self.training:
            return None
        return mask(self.settings.incremental, codes, step.epoch, step.generator)

    def reconstruction(self, images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        r"""The reconstruction loss (5), MSE + perceptual_weight * perceptual, and its parts, each a mean over the batch.

        With the pixel loss `absolute`, the mean absolute error takes the place of the MSE.

        Arguments:
            images: Images with shape (B, C, H, W).
            reconstructions: Their reconstructions, with the same shape.

        Returns:
            `reconstruction`; `mse`, the squared error per pixel and channel; and `perceptual`, if it has a weight.
        """
        reconstructions, images = reconstructions.float(), images.float()
        mse = nn.functional.mse_loss(reconstructions, images)
        by_pixel = mse if self.settings.pixel_loss == "squared" else nn.functional.l1_loss(reconstructions, images)
        losses = {"reconstruction": by_pixel, "mse": mse}
        for loss in self._perceptual:
            losses["perceptual"] = loss(images, reconstructions)
            losses["reconstruction"] = by_pixel + self.settings.perceptual_weight * losses["perceptual"]
        return losses
