"""The latent density estimator: a mixture density network on dilated causal convolutions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from pipeline.densities import mixtures
from pipeline.densities.convolution import ACTIVATIONS, affine, causal_convolution, linear
from pipeline.densities.density import Density, own_settings, standard_normal, uniform
from pipeline.errors import SettingsError
from pipeline.settings import DensitySettings, check_that

__all__ = ["LatentDensityEstimator", "Settings", "build"]


@dataclass(frozen=True, kw_only=True)
class Settings(DensitySettings):
    """The latent density estimator; the defaults are the paper's network.

    Attributes:
        components: Gaussians in the mixture of each conditional, K.
        activation: `leaky_relu` (slope 0.2), `relu`, `elu` or `tanh`.
        normalisation: `none`, or `batch` as in the network that the authors released.
        blocks: `plain` convolutions; `residual`, x + W act(conv(x)); `gated`, x + W (tanh(conv(x)) * sigmoid(conv'(x))).
        layers: Convolutions; 0 for ceil(log2 D). More of them start again at dilation 1.
        width: Filters of every layer; 0 for the paper's 16, 32, 64, ..
        channel_cap: Filters of a layer at most; 0 for no limit.
        dropout: Share of a layer's outputs that is dropped in training.
        min_log_scale: Soft floor on the log standard deviations, in standardised units; null for none.
    """

    components: int = 30
    activation: Literal["leaky_relu", "relu", "elu", "tanh"] = "leaky_relu"
    normalisation: Literal["none", "batch"] = "none"
    blocks: Literal["plain", "residual", "gated"] = "plain"
    layers: int = 0
    width: int = 0
    channel_cap: int = 0
    dropout: float = 0.0
    min_log_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.components >= 1, "components", "has to be at least 1")
        check_that(self.layers >= 0, "layers", "has to be 0 (for ceil(log2 D)) or more")
        check_that(self.width >= 0, "width", "has to be 0 (for the paper's) or more")
        check_that(self.channel_cap >= 0, "channel_cap", "has to be 0 (for none) or more")
        check_that(0 <= self.dropout < 1, "dropout", "has to lie in [0, 1)")
        check_that(self.blocks == "plain" or self.width > 0, "width", f"has to be set for {self.blocks} blocks")


class _Layer(nn.Module):
    """A causal convolution with kernel 2, and what its block adds to it."""

    def __init__(
        self, inputs: int, filters: int, dilation: int, activation: str, normalisation: str, blocks: str, dropout: float
    ) -> None:
        super().__init__()
        self.filters, self.dilation, self.blocks, self.dropout = filters, dilation, blocks, dropout
        self.activation = ACTIVATIONS[activation]
        self.shortcut = blocks != "plain" and inputs == filters
        outputs = 2 * filters if blocks == "gated" else filters
        # weight[0] is the tap on the past, weight[1] on the present: each contiguous, unlike nn.Conv1d's (C', C, 2).
        self.weight = nn.Parameter(torch.empty(2, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.norm = nn.BatchNorm1d(outputs) if normalisation == "batch" else None
        self.mix = nn.Linear(filters, filters) if blocks != "plain" else None
        if self.norm is not None:
            nn.init.normal_(self.weight, std=0.02)  # as in the authors' network
        else:
            nn.init.normal_(self.weight, std=self.activation.gain / math.sqrt(2 * inputs))

    def affine(self) -> tuple[Tensor, Tensor]:
        """Weight and bias, with batch norm's running statistics folded in."""
        if self.norm is None:
            return self.weight, self.bias
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        factor = self.norm.weight / torch.sqrt(self.norm.running_var + self.norm.eps)
        return self.weight * factor[:, None], (self.bias - self.norm.running_mean) * factor + self.norm.bias

    def _normalised(self, x: Tensor, padding: Tensor, padded: int) -> tuple[Tensor, Tensor]:
        # Batch norm in training mode over all that a padded convolution computes: `padded` columns of padding for each
        # example, all alike, and the real ones.
        assert self.norm is not None
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        share = padded / (padded + len(x))  # of padding among the columns
        mean = share * padding + (1 - share) * (x.mean(dim=(0, 1)) if len(x) else 0)
        deviation, padding_deviation = x - mean, padding - mean
        variance = share * padding_deviation.square()
        if len(x):
            variance = variance + (1 - share) * deviation.square().mean(dim=(0, 1))
        with torch.no_grad():
            count = (padded + len(x)) * x.shape[1]
            momentum = self.norm.momentum or 0.0
            self.norm.running_mean.lerp_(mean, momentum)
            self.norm.running_var.lerp_(variance * count / max(count - 1, 1), momentum)
            if self.norm.num_batches_tracked is not None:
                self.norm.num_batches_tracked.add_(1)
        factor = self.norm.weight * torch.rsqrt(variance + self.norm.eps)
        return deviation * factor + self.norm.bias, padding_deviation * factor + self.norm.bias

    def finish(self, h: Tensor, x: Tensor, activated: bool = False, kept: Tensor | None = None) -> Tensor:
        """The block's outputs, from its convolution's (*, C') and its inputs (*, C)."""
        if self.blocks == "gated":
            filtered, gate = h.chunk(2, dim=-1)
            h = torch.tanh(filtered) * torch.sigmoid(gate)
        elif not activated:
            h = self.activation.apply(h)
        if kept is not None:
            h = h * kept
        if self.mix is not None:
            h = linear(h, self.mix.weight, self.mix.bias)
        return x + h if self.shortcut else h

    def forward(self, x: Tensor, padding: Tensor, padded: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Outputs at the real positions (T, B, C') and the one vector (C') at all `padded` positions."""
        training_norm = self.norm is not None and self.training
        weight, bias = (self.weight, self.bias) if training_norm else self.affine()
        activated = not training_norm and self.blocks != "gated"
        h: Tensor = causal_convolution(x, padding, weight, bias, self.dilation, self.activation if activated else None)
        h_padding = bias + weight.sum(dim=0) @ padding
        if training_norm:
            h, h_padding = self._normalised(h, h_padding, padded)
        kept = None
        if self.dropout and self.training:  # of real positions: the vector at padded ones is shared by the whole batch
            shape = (len(x), x.shape[1], self.filters)
            kept = (uniform(shape, x, generator) >= self.dropout).to(x.dtype) / (1 - self.dropout)
        return self.finish(h, x, activated, kept), self.finish(h_padding, padding)


class _Walk:
    """A layer in evaluation mode that is given one position after another and keeps the inputs that it will need again.

    Arguments:
        layer: The layer.
        padding: Its input at padded positions, with shape (C).
    """

    def __init__(self, layer: _Layer, padding: Tensor) -> None:
        weight, self.bias = layer.affine()
        past, self.present = weight
        self.both = torch.cat([past, self.present], dim=1)  # (C', 2C)
        self.start = torch.addmv(self.bias, past, padding)  # for positions whose past is padding
        self.layer, self.ring, self.position = layer, list[Tensor](), 0
        self.padding = layer.finish(torch.addmv(self.start, self.present, padding), padding)

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's outputs (n, C') at the next position, from its inputs (n, C)."""
        layer, place = self.layer, self.position % self.layer.dilation
        self.position += 1
        activation = None if layer.blocks == "gated" else layer.activation
        if len(self.ring) < layer.dilation:
            self.ring.append(x)
            h = affine(x, self.present, self.start, activation)
        else:
            h = affine(torch.cat([self.ring[place], x], dim=1), self.both, self.bias, activation)
            self.ring[place] = x
        return layer.finish(h, x, activated=activation is not None)


class LatentDensityEstimator(Density):
    r"""The latent density estimator (LDE).

    .. math:: \log p(z) = \sum_{i=1}^D \log \sum_{k=1}^K \pi_{ik} \, \mathcal{N}(z_i; \mu_{ik}, \sigma_{ik}^2)

    The parameters of the i-th conditional come from features :math:`h_i` of :math:`z_{<i}`. They are made by
    :math:`L = \lceil \log_2 D \rceil` causal convolutions with kernel 2, dilations 1, 2, 4, .. and 16, 32, 64, .. filters, from
    the values and a mask that is 1 on values and 0 on the padding before them. It is exact: no floor inside the logarithm.

    On padding a layer computes the same vector at every position. It is computed once, which leaves out more than a quarter
    of the work. Drawing keeps what the convolutions have seen, so that all D dimensions cost about as much as one `log_prob`.

    With batch norm, `log_prob` is a density in evaluation mode only: in training mode it mixes the examples of a batch.
    Padded positions count in its statistics, as they do where they are computed.

    References:
        | Unpriortized Autoencoder For Image Generation (Yoo et al., 2019), section 3.3
        | https://arxiv.org/abs/1902.04294

    Arguments:
        dim: The number of dimensions :math:`D`.
        components: The number of Gaussians in a mixture :math:`K`.
        activation: `leaky_relu`, `relu`, `elu` or `tanh`.
        normalisation: `none` or `batch`.
        blocks: `plain`, `residual` or `gated`.
        layers: The number of convolutions; 0 for :math:`L`.
        width: The number of filters of every layer; 0 for the paper's.
        channel_cap: The number of filters of a layer at most; 0 for no limit.
        dropout: The share of a layer's outputs that is dropped in training.
        min_log_scale: A soft floor on :math:`\log \sigma`, in standardised units.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> density = LatentDensityEstimator(dim=63, components=10)
        >>> density.parameter_count
        365646
        >>> z = density.sample(2, torch.Generator().manual_seed(0))
        >>> z.shape
        torch.Size([2, 63])
        >>> density.log_prob(z)
        tensor([-117.2049, -128.1442], grad_fn=<SubBackward0>)
    """

    family = "lde"

    def __init__(
        self,
        dim: int,
        components: int = 30,
        *,
        activation: str = "leaky_relu",
        normalisation: str = "none",
        blocks: str = "plain",
        layers: int = 0,
        width: int = 0,
        channel_cap: int = 0,
        dropout: float = 0.0,
        min_log_scale: float | None = None,
    ) -> None:
        super().__init__(
            dim,
            components=components,
            activation=activation,
            normalisation=normalisation,
            blocks=blocks,
            layers=layers,
            width=width,
            channel_cap=channel_cap,
            dropout=dropout,
            min_log_scale=min_log_scale,
        )
        if blocks != "plain" and width == 0:
            raise SettingsError(f"width: has to be set for {blocks} blocks")
        self.components, self.min_log_scale = components, min_log_scale
        cycle = math.ceil(math.log2(dim))
        channels = [2]  # the value and the mask
        for layer in range(layers or cycle):
            filters = width or 2 ** (layer + 4)
            channels.append(min(filters, channel_cap or filters))
        self.layers = nn.ModuleList(
            _Layer(inputs, filters, 2 ** (layer % max(cycle, 1)), activation, normalisation, blocks, dropout)
            for layer, (inputs, filters) in enumerate(itertools.pairwise(channels))
        )
        self.head = nn.Linear(channels[-1], 3 * components)
        self.head.bias.data = mixtures.initial_bias(components)
        # Few enough to stay in the cache between two layers (8 MB each); while drawing, as many as make good matrix products
        # of one position at a time, with at most 256 MB of inputs kept.
        self.chunk_examples = max(32, 2**21 // (dim * channels[-1]))
        kept = sum(layer.dilation * inputs for layer, inputs in zip(self._layers(), channels, strict=False))
        self.sample_chunk_examples = min(1024, max(32, 2**26 // max(kept, 1)))

    # Features of the conditionals: h_1 is one vector, since it sees padding only; the others go by time, D - 1 of them.

    def _features(self, z: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        values = z[:, :-1].T  # (D - 1, B): nothing depends on the last dimension
        x = torch.stack([values, torch.ones_like(values)], dim=2)  # (D - 1, B, 2)
        padding = x.new_zeros(2)
        padded = 1 + sum(layer.dilation for layer in self._layers())  # positions of padding that the first convolution sees
        for layer in self._layers():
            padded -= layer.dilation
            x, padding = layer(x, padding, padded, generator)
        return padding, x

    def _layers(self) -> Iterator[_Layer]:
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            yield layer

    def _outputs(self, h: Tensor) -> Tensor:
        outputs = linear(h, self.head.weight, self.head.bias)
        if self.min_log_scale is None:
            return outputs
        logits, means, log_scales = mixtures.unpack(outputs)
        return torch.cat([logits, means, self.min_log_scale + F.softplus(log_scales - self.min_log_scale)], dim=-1)

    def _log_prob(self, z: Tensor, generator: Generator | None = None) -> Tensor:
        first, others = self._features(z, generator)
        value = mixtures.log_likelihood(self._outputs(first).expand(len(z), -1), z[:, 0])
        return value + mixtures.log_likelihood(self._outputs(others), z[:, 1:].T).sum(dim=0)

    def loss(self, z: Tensor, generator: Generator | None = None) -> Tensor:
        """The loss of equation 4, see `Density.loss`; dropout is drawn from the generator."""
        return -self._log_prob(self._standardised(z), generator).mean() / self.dim

    def conditionals(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, means and standard deviations of the mixtures that the dimensions of z are drawn from, given those before.

        Arguments:
            z: The codes, with shape (B, D).

        Returns:
            Three tensors with shape (B, D, K), in the units of the data.
        """
        first, others = self._features(self._standardised(z))
        outputs = torch.cat([self._outputs(first).expand(1, len(z), -1), self._outputs(others)]).transpose(0, 1)  # (B, D, 3K)
        logits, means, log_scales = mixtures.unpack(outputs)
        shift, scale = self.shift[:, None], self.scale[:, None]
        return torch.softmax(logits, dim=-1), shift + scale * means, scale * log_scales.exp()

    def _sample(self, n: int, generator: Generator | None) -> Tensor:
        # In this order: which component each dimension is drawn from, then the noise within it.
        return self._ancestral(
            uniform((n, self.dim), self.shift, generator), standard_normal((n, self.dim), self.shift, generator)
        )

    def _ancestral(self, uniforms: Tensor, normals: Tensor) -> Tensor:
        """Standardised samples (n, D) from noise of the same shape."""
        z = torch.empty_like(uniforms)
        padding, walks = z.new_zeros(2), list[_Walk]()
        for layer in self._layers():
            walks.append(_Walk(layer, padding))
            padding = walks[-1].padding
        outputs = self._outputs(padding).expand(len(z), -1)
        for i in range(self.dim):
            z[:, i] = mixtures.draw(outputs, uniforms[:, i], normals[:, i])
            if i + 1 < self.dim:
                x = torch.stack([z[:, i], torch.ones_like(z[:, i])], dim=1)
                for walk in walks:
                    x = walk(x)
                outputs = self._outputs(x)
        return z


Model = LatentDensityEstimator


def build(settings: Settings, dim: int) -> LatentDensityEstimator:
    """The density that a row of `densities` describes."""
    return LatentDensityEstimator(dim, **own_settings(settings))
