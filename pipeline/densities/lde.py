"""The latent density estimator: a mixture density network on dilated causal convolutions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.densities import mixtures
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


class _Activation(NamedTuple):
    """An activation whose derivative can be told from its output, so that it overwrites its input."""

    forward: Callable[[Tensor], Tensor]  # in place
    backward: Callable[[Tensor, Tensor], Tensor]  # from the gradient and the output
    gain: float  # of the initial weights


_SLOPE = 0.2
_ACTIVATIONS = {
    "leaky_relu": _Activation(
        lambda x: F.leaky_relu_(x, _SLOPE),
        lambda g, y: torch.ops.aten.leaky_relu_backward(g, y, _SLOPE, True),
        math.sqrt(2 / 1.04),
    ),
    "relu": _Activation(torch.relu_, lambda g, y: torch.ops.aten.threshold_backward(g, y, 0.0), math.sqrt(2)),
    "elu": _Activation(F.elu_, lambda g, y: torch.ops.aten.elu_backward(g, 1.0, 1.0, 1.0, True, y), 1.25),
    "tanh": _Activation(torch.tanh_, lambda g, y: torch.ops.aten.tanh_backward(g, y), 5 / 3),
}


class _Convolution(torch.autograd.Function):
    # Arguments: x (T, B, C), what stands before its start (C,), weight (2, C', C), bias (C'). As matrix products over
    # contiguous slices, time first: the tap on the present takes x, the tap on the past takes x[:T - d], and the first d
    # columns take the same vector from the padding.

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        padding: Tensor,
        weight: Tensor,
        bias: Tensor,
        dilation: int,
        activation: _Activation | None,
    ) -> Tensor:
        time, batch, channels = x.shape
        split = min(dilation, time) * batch  # rows whose past is padding
        past, present = weight
        rows = x.reshape(-1, channels)
        y = rows.new_empty(time * batch, weight.shape[1])
        torch.addmm(torch.addmv(bias, past, padding), rows[:split], present.T, out=y[:split])
        torch.addmm(bias, rows[split:], present.T, out=y[split:])
        y[split:].addmm_(rows[: len(rows) - split], past.T)
        if activation is not None:
            activation.forward(y)
        ctx.save_for_backward(rows, padding, weight, y if activation is not None else None)
        ctx.shape, ctx.split, ctx.activation = x.shape, split, activation
        return y.view(time, batch, len(bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, padding, weight, y = ctx.saved_tensors
        split, (past, present) = ctx.split, weight
        grad = grad.reshape(len(rows), weight.shape[1])
        if ctx.activation is not None:
            grad = ctx.activation.backward(grad, y)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = grad @ present
            to_x[: len(rows) - split].addmm_(grad[split:], past)
            to_x = to_x.view(ctx.shape)
        from_padding = grad[:split].sum(dim=0)
        to_weight = torch.empty_like(weight)
        torch.mm(grad[split:].T, rows[: len(rows) - split], out=to_weight[0])
        to_weight[0].addr_(from_padding, padding)
        torch.mm(grad.T, rows, out=to_weight[1])
        to_bias = from_padding + grad[split:].sum(dim=0)
        return to_x, past.T @ from_padding, to_weight, to_bias, None, None


class _Layer(nn.Module):
    """A causal convolution with kernel 2, and what its block adds to it."""

    def __init__(
        self, inputs: int, filters: int, dilation: int, activation: str, normalisation: str, blocks: str, dropout: float
    ) -> None:
        super().__init__()
        self.filters, self.dilation, self.blocks, self.dropout = filters, dilation, blocks, dropout
        self.activation = _ACTIVATIONS[activation]
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

    def _finish(self, h: Tensor, x: Tensor, activated: bool = False, kept: Tensor | None = None) -> Tensor:
        # From the convolution's outputs (*, C') and the block's inputs (*, C) to the block's outputs.
        if self.blocks == "gated":
            filtered, gate = h.chunk(2, dim=-1)
            h = torch.tanh(filtered) * torch.sigmoid(gate)
        elif not activated:
            h = self.activation.forward(h)
        if kept is not None:
            h = h * kept
        if self.mix is not None:
            h = self.mix(h)
        return x + h if self.shortcut else h

    def forward(self, x: Tensor, padding: Tensor, padded: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Outputs at the real positions (T, B, C') and the one vector (C') at all `padded` positions."""
        training_norm = self.norm is not None and self.training
        weight, bias = (self.weight, self.bias) if training_norm else self.affine()
        activated = not training_norm and self.blocks != "gated"
        h: Tensor = _Convolution.apply(x, padding, weight, bias, self.dilation, self.activation if activated else None)
        h_padding = bias + weight.sum(dim=0) @ padding
        if training_norm:
            h, h_padding = self._normalised(h, h_padding, padded)
        kept = None
        if self.dropout and self.training:  # of real positions: the vector at padded ones is shared by the whole batch
            shape = (len(x), x.shape[1], self.filters)
            kept = (uniform(shape, x, generator) >= self.dropout).to(x.dtype) / (1 - self.dropout)
        return self._finish(h, x, activated, kept), self._finish(h_padding, padding)

    def step(self, x: Tensor, past: Tensor | None, start: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Outputs at one position (n, C') in evaluation mode.

        Arguments:
            x: The layer's input at this position, with shape (n, C).
            past: Its input `dilation` positions before, with the same shape; None for padding.
            start: The bias together with the contribution of padding, with shape (C',).
            weight: From `affine`.
            bias: From `affine`.
        """
        if past is None:
            return self._finish(torch.addmm(start, x, weight[1].T), x)
        return self._finish(torch.addmm(bias, x, weight[1].T).addmm_(past, weight[0].T), x)


class LatentDensityEstimator(Density):
    r"""The latent density estimator (LDE).

    .. math:: \log p(z) = \sum_{i=1}^D \log \sum_{k=1}^K \pi_{ik} \, \mathcal{N}(z_i; \mu_{ik}, \sigma_{ik}^2)

    The parameters of the i-th conditional come from features :math:`h_i` of :math:`z_{<i}`. They are made by
    :math:`L = \lceil \log_2 D \rceil` causal convolutions with kernel 2, dilations 1, 2, 4, .. and 16, 32, 64, .. filters, from
    the values and a mask that is 1 on values and 0 on the padding before them. It is exact: nothing is added inside the logarithm.

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
        with torch.no_grad():  # means spread like N(0, 1), which standardised codes resemble
            levels = (torch.arange(components) + 0.5) / components
            self.head.bias.copy_(torch.cat([torch.zeros(components), torch.special.ndtri(levels), torch.zeros(components)]))
        # Features of some 2 MB a layer stay in the cache between two layers.
        self.chunk_examples = max(16, 2**19 // (dim * channels[-1]))

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
        outputs = F.linear(h, self.head.weight, self.head.bias)
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
        padding = z.new_zeros(2)
        steps: list[tuple[_Layer, list[Tensor], Tensor, Tensor, Tensor]] = []  # with the ring of inputs that are still needed
        for layer in self._layers():
            weight, bias = layer.affine()
            start = bias + weight[0] @ padding
            steps.append((layer, [], start, weight, bias))
            padding = layer._finish(start + weight[1] @ padding, padding)
        outputs = self._outputs(padding).expand(len(z), -1)
        for i in range(self.dim):
            z[:, i] = mixtures.draw(outputs, uniforms[:, i], normals[:, i])
            if i + 1 == self.dim:
                break
            x = torch.stack([z[:, i], torch.ones_like(z[:, i])], dim=1)
            for layer, ring, start, weight, bias in steps:
                past = ring[i % layer.dilation] if i >= layer.dilation else None
                if past is None:
                    ring.append(x)
                else:
                    ring[i % layer.dilation] = x
                x = layer.step(x, past, start, weight, bias)
            outputs = self._outputs(x)
        return z


Model = LatentDensityEstimator


def build(settings: Settings, dim: int) -> LatentDensityEstimator:
    """The density that a row of `densities` describes."""
    return LatentDensityEstimator(dim, **own_settings(settings))
