"""An encoder, and a decoder where there is one, of any make: ONNX files that are run as they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.autoencoders.common.base import Objective
from pipeline.autoencoders.common.foreign import OnnxDecoder, OnnxEncoder, Pixels, save_onnx
from pipeline.errors import DataError, SettingsError
from pipeline.settings import AutoencoderSettings, NamedFile, check_that, checked_path, file_setting
from pipeline.system.streams import stream_seed
from pipeline.training.trainable import Step

__all__ = ["OnnxObjective", "Settings", "build"]

DRY_RUN = 2  # images
TOLERANCE = 0.01  # by how much a decoded pixel may leave its range, as a share of it


@dataclass(frozen=True, kw_only=True)
class Settings(AutoencoderSettings):
    """Keys of a row with the objective `onnx`.

    Attributes:
        encoder: The encoder, `PATH@sha256:HEX`: one input of float32 images (N, C, H, W); the first output, flattened, is the
            code.
        decoder: The decoder, `PATH@sha256:HEX`: from codes (N, D) to images in the data set's range. Without it, nearest
            training images take the place of decoded ones.
        pixel_mean: What the encoder wants subtracted from each channel of an image in 0..1; one number for all, or one each.
        pixel_std: What it wants that divided by.
    """

    encoder: str = file_setting("")
    decoder: str | None = file_setting()
    pixel_mean: tuple[float, ...] = (0.0,)
    pixel_std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(bool(self.encoder), "encoder", "missing; it must name an ONNX file, PATH@sha256:HEX")
        for key, file in {"encoder": self.encoder, "decoder": self.decoder}.items():
            ends = file is None or NamedFile.of(file).path.suffix == ".onnx"
            check_that(ends, key, f"must name a file that ends in .onnx, not '{file}'")
        check_that(all(value > 0 for value in self.pixel_std), "pixel_std", "must be positive")

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuses vectors, and a mean or deviation of another number of channels.

        Arguments:
            shape: Shape of an example, (C, H, W) for images.

        Raises:
            SettingsError: When it isn't supported.
        """
        check_that(len(shape) == 3, "dataset", f"'{self.dataset}' holds vectors, and the objective 'onnx' takes images")
        for key in ("pixel_mean", "pixel_std"):
            count = len(getattr(self, key))
            check_that(count in (1, shape[0]), key, f"has {count} numbers, and the images have {shape[0]} channels")


class OnnxObjective(Objective):
    """Networks that are given: nothing to train.

    Arguments:
        settings: The row's settings.
        shape: Shape (C, H, W) of an image.
        value_range: Range of the data set's pixels.

    Raises:
        SettingsError: When a file's digest is another, or in a dry run shapes or ranges don't fit the data set.
        DataError: When a file can't be run.
    """

    trained = False
    phases = ()

    def __init__(self, settings: Settings, shape: tuple[int, ...], value_range: tuple[float, float]) -> None:
        super().__init__()
        settings.check_shape(shape)
        mean, std = ((values * shape[0])[: shape[0]] for values in (settings.pixel_mean, settings.pixel_std))
        self.pixels = Pixels(image_shape=shape, value_range=value_range, mean=mean, std=std)
        self._paths = {"encoder": Path(checked_path(settings.encoder, "encoder"))}
        self._encoder = OnnxEncoder(self._paths["encoder"], self.pixels)
        self._decoder: OnnxDecoder | None = None
        if settings.decoder is not None:
            self._paths["decoder"] = Path(checked_path(settings.decoder, "decoder"))
            self._decoder = OnnxDecoder(self._paths["decoder"], self.pixels)
        self.decoder = None  # none that is trained
        self.reconstructs = self._decoder is not None
        self.latent_dim = self._dry_run()

    def _dry_run(self) -> int:
        """Encodes and decodes random images; the length of the code."""
        low, high = self.pixels.value_range
        generator = torch.Generator().manual_seed(stream_seed("dry run of given networks", 0))
        images = low + (high - low) * torch.rand(DRY_RUN, *self.pixels.image_shape, generator=generator)
        codes = self._encoder(images)
        if len(codes) != DRY_RUN or not torch.isfinite(codes).all():
            raise SettingsError(
                f"encoder: for {DRY_RUN} images it gives {list(codes.shape)} numbers, or some that aren't finite"
            )
        if self._decoder is not None:
            try:
                decoded = self._decoder(codes)
            except RuntimeError:
                shape = list(self.pixels.image_shape)
                raise SettingsError(f"decoder: what it gives doesn't have the images' shape {shape}") from None
            least, most, slack = float(decoded.min()), float(decoded.max()), TOLERANCE * (high - low)
            if not low - slack <= least <= most <= high + slack:
                raise SettingsError(
                    f"decoder: it gives pixels in {least:.3g}..{most:.3g}, and the data set's lie in {low:g}..{high:g}"
                )
        return int(codes.shape[1])

    def save(self, folder: Path) -> None:
        """Copies the files into the autoencoder's folder."""
        save_onnx(folder, self._paths["encoder"], self._paths.get("decoder"), self.pixels)

    def encode(self, examples: Tensor) -> Tensor:
        """The codes, with shape (B, D), of images with shape (B, C, H, W)."""
        codes: Tensor = self._encoder(examples)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """The images of codes with shape (B, D).

        Raises:
            DataError: When there is no decoder.
        """
        if self._decoder is None:
            raise DataError("there is no decoder")
        images: Tensor = self._decoder(codes)
        return images

    def open_dimensions(self, step: Step) -> int:
        """All D dimensions."""
        return self.latent_dim or 0


def build(settings: Settings, shape: tuple[int, ...], value_range: tuple[float, float]) -> OnnxObjective:
    """The objective for images of a shape (C, H, W)."""
    return OnnxObjective(settings, shape, value_range)
