"""What the network of an autoregressive density is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pipeline.settings import Checked, check_that

__all__ = ["NetworkOptions"]


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(Checked):
    """Options of the network of the latent density estimator; the defaults are the paper's network.

    Attributes:
        components: Gaussians in the mixture of each conditional, K.
        activation: `leaky_relu` (slope 0.2), `relu`, `elu` or `tanh`.
        normalisation: `none`, or `batch` as in the network that the authors released.
        blocks: `plain` convolutions; `residual`, x + W act(conv(x)); `gated`, x + W (tanh(conv(x)) * sigmoid(conv'(x)));
            `separate`: no convolutions, but for each dimension a network of residual blocks, x + W act(W' act(x)), on all
            dimensions before it, which suits short codes; `attention`: no convolutions, but causal attention over pairs of a
            dimension and its value, each followed by a layer of 4 times the width.
        layers: Convolutions; 0 for ceil(log2 D), and more of them start again at dilation 1. For `separate`, residual blocks;
            0 for 2. For `attention`, blocks; 0 for 4.
        width: Filters of every layer; 0 for the paper's 16, 32, 64, ..
        heads: Heads of each `attention` block; they share its width.
        channel_cap: Filters of a layer at most; 0 for no limit.
        dropout: Share of a layer's outputs that is dropped in training.
        position_embedding: Add a learned vector of each dimension's own to what the first layer gives there, so that deep
            networks needn't count from the padding which dimension they are at.
        start: What the untrained conditionals are: `spread`, mixtures with means spread like N(0, 1) and scales of 1;
            `gaussian`, N(0, 1) whatever came before, up to a share of 1e-5, so that of whitened codes the untrained density is
            the Gaussian with their mean and covariance.
    """

    takes_context: ClassVar[bool] = True

    components: int = 30
    activation: Literal["leaky_relu", "relu", "elu", "tanh"] = "leaky_relu"
    normalisation: Literal["none", "batch"] = "none"
    blocks: Literal["plain", "residual", "gated", "separate", "attention"] = "plain"
    layers: int = 0
    width: int = 0
    heads: int = 4
    channel_cap: int = 0
    dropout: float = 0.0
    position_embedding: bool = False
    start: Literal["spread", "gaussian"] = "spread"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.components >= 1, "components", "must be at least 1")
        check_that(self.layers >= 0, "layers", "must be 0 (for as many as D asks for) or more")
        check_that(self.width >= 0, "width", "must be 0 (for the paper's) or more")
        check_that(self.channel_cap >= 0, "channel_cap", "must be 0 (for none) or more")
        check_that(0 <= self.dropout < 1, "dropout", "must lie in [0, 1)")
        check_that(self.blocks == "plain" or self.width > 0, "width", f"must be set for {self.blocks} blocks")
        check_that(self.heads >= 1, "heads", "must be at least 1")
        if self.blocks == "attention":
            check_that(self.width % self.heads == 0, "heads", f"must divide the width of {self.width}")
        if self.blocks in ("separate", "attention"):
            check_that(self.normalisation == "none", "normalisation", "is for convolutions only")
            check_that(self.channel_cap == 0, "channel_cap", "is for convolutions only")
            check_that(not self.position_embedding, "position_embedding", "is for convolutions only")
