"""What the convolutional network of the image objectives is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.settings import Checked, check_that

__all__ = ["ConvolutionOptions"]


@dataclass(frozen=True, kw_only=True)
class ConvolutionOptions(Checked):
    """Options of the network of Figure 9.

    Attributes:
        latent_dim: Length D of the code.
        blocks: Convolution blocks N. Images are S * 2^(N+1) pixels wide and high; when null, as many as leave S >= 4.
        filter_side: Filter side S of the encoder's last convolution, in pixels; follows from the images when null.
        base_channels: Filters of the outermost convolutions.
        batch_norm_gain: Initial gains: `paper`: normal with mean 0 and standard deviation 0.02; `ones`.
        input_normalisation: Whether BatchNorm and LeakyReLU follow the decoder's first layer, as they don't in the paper.
        channels_last: Whether the channels lie last in memory, faster on most machines.
    """

    latent_dim: int
    blocks: int | None = None
    filter_side: int | None = None
    base_channels: int = 64
    batch_norm_gain: Literal["paper", "ones"] = "paper"
    input_normalisation: bool = False
    channels_last: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.latent_dim >= 1, "latent_dim", "must be at least 1")
        check_that(self.blocks is None or 0 <= self.blocks <= 10, "blocks", "must lie in 0..10")
        check_that(self.filter_side is None or self.filter_side >= 1, "filter_side", "must be at least 1")
        check_that(self.base_channels >= 1, "base_channels", "must be at least 1")
