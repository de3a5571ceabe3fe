"""Dilated causal convolutions as matrix products, time first, with nothing computed on padding."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.densities.common import mixtures
from pipeline.densities.common.density import dropout_mask
from pipeline.densities.common.first_order import first_order
from pipeline.densities.common.options import NetworkOptions
from pipeline.densities.common.products import ACTIVATIONS, Activation, add_product, affine, apply_linear, autocast, inner
from pipeline.system.draws import Randomness
from pipeline.system.ranks import batch_mean

__all__ = ["CausalNetwork", "causal_convolution"]


class _CausalConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, padding: Tensor, weight: Tensor, bias: Tensor, dilation: int, activation: Activation | None
    ) -> Tensor:
        time, batch, channels = x.shape
        split = min(dilation, time) * batch  # rows whose past is padding
        rows = x.reshape(-1, channels)
        past, present = weight
        y = affine(rows, present, bias)
        y[:split] += past @ padding
        add_product(y[split:], rows[: len(rows) - split], past)
        if activation is not None:
            y = activation.apply(y)
        ctx.save_for_backward(rows, padding, weight, y if activation is not None else None)
        ctx.shape, ctx.split, ctx.activation = x.shape, split, activation
        return y.view(time, batch, len(bias))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, padding, weight, y = ctx.saved_tensors
        split, (past, present) = ctx.split, weight
        grad = grad.reshape(len(rows), weight.shape[1])
        if ctx.activation is not None:
            grad = ctx.activation.backward(grad, y)
        early, late = grad[:split], grad[split:]
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = affine(grad, present.T)
            add_product(to_x[: len(late)], late, past.T)
            to_x = to_x.view(ctx.shape)
        from_padding = early.sum(dim=0)
        to_past = inner(late, rows[: len(late)]).addr(from_padding, padding)
        to_weight = torch.stack([to_past, inner(grad, rows)])
        return to_x, past.T @ from_padding, to_weight, from_padding + late.sum(dim=0), None, None


def causal_convolution(
    x: Tensor, padding: Tensor, weight: Tensor, bias: Tensor, dilation: int, activation: Activation | None = None
) -> Tensor:
    r"""A causal convolution with kernel 2, over columns that have the same vector before their start at all times.

    .. math:: y_t = a(W_0 x_{t - d} + W_1 x_t + b), \quad x_t = p \text{ for } t \leq 0

    Its gradient is first-order only.

    Arguments:
        x: The columns :math:`x_1, \ldots, x_T`, time first, with shape (T, B, C).
        padding: What precedes them, :math:`p`, with shape (C).
        weight: The taps :math:`W_0` on the past and :math:`W_1` on the present, with shape (2, C', C).
        bias: The bias :math:`b`, with shape (C').
        dilation: The dilation :math:`d`.
        activation: The activation :math:`a`.

    Returns:
        The columns :math:`y_1, \ldots, y_T`, with shape (T, B, C').

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
        >>> causal_convolution(x, torch.tensor([-1.0]), torch.ones(2, 1, 1), torch.zeros(1), dilation=2).flatten()
        tensor([0., 1., 4.])
    """
    x, padding, weight, bias = autocast(x, padding, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _CausalConvolution.apply(x, padding, weight, bias, dilation, activation)
    return y


class _Layer(nn.Module):
    """A causal convolution with kernel 2, and what its block adds to it."""

    def __init__(self, inputs: int, filters: int, dilation: int, options: NetworkOptions) -> None:
        super().__init__()
        blocks = options.blocks
        self.filters, self.dilation, self.blocks, self.dropout = filters, dilation, blocks, options.dropout
        self.activation = ACTIVATIONS[options.activation]
        self.shortcut = blocks != "plain" and inputs == filters
        outputs = 2 * filters if blocks == "gated" else filters
        # weight[0] is the tap on the past, weight[1] on the present: each contiguous, unlike nn.Conv1d's (C', C, 2).
        self.weight = nn.Parameter(torch.empty(2, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.norm = nn.BatchNorm1d(outputs) if options.normalisation == "batch" else None
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
        # example, all equal, and the real ones; where the norm is synchronised, over the examples of all ranks.
        assert self.norm is not None
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        share = padded / (padded + len(x))  # of padding among the columns
        count: Tensor | int = x.shape[1] * (padded + len(x))
        mean = share * padding
        if len(x):
            real, vectors = batch_mean(self.norm, x)
            count, mean = vectors // len(x) * (padded + len(x)), mean + (1 - share) * real
        deviation, padding_deviation = x - mean, padding - mean
        variance = share * padding_deviation.square()
        if len(x):
            variance = variance + (1 - share) * batch_mean(self.norm, deviation.square())[0]
        with torch.no_grad():
            momentum = self.norm.momentum or 0.0
            self.norm.running_mean.lerp_(mean, momentum)
            self.norm.running_var.lerp_(
                variance * count / (count - 1 if isinstance(count, Tensor) else max(count - 1, 1)), momentum
            )
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
            h = apply_linear(self.mix, h)
        return x + h if self.shortcut else h

    def forward(self, x: Tensor, padding: Tensor, padded: int, generator: Randomness | None) -> tuple[Tensor, Tensor]:
        """Outputs at the real positions (T, B, C') and the one vector (C') at all `padded` positions."""
        training_norm = self.norm is not None and self.training
        weight, bias = (self.weight, self.bias) if training_norm else self.affine()
        activated = not training_norm and self.blocks != "gated"
        h: Tensor = causal_convolution(x, padding, weight, bias, self.dilation, self.activation if activated else None)
        h_padding = bias + weight.sum(dim=0) @ padding
        if training_norm:
            h, h_padding = self._normalised(h, h_padding, padded)
        mask = None
        if self.dropout and self.training:  # of real positions: the vector at padded ones is shared by the whole batch
            mask = dropout_mask(h[..., : self.filters], self.dropout, generator, dim=1)
        return self.finish(h, x, activated, mask), self.finish(h_padding, padding)


class _LayerWalk:
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


class CausalNetwork(nn.Module):
    """From codes to the outputs of all conditionals, by dilated causal convolutions and a 1x1 convolution.

    Arguments:
        dim: The number of dimensions D.
        options: Those of the density that says what the network is made of.
        context: Length E of encoded contexts; 0 for none.

    Attributes:
        features: Features that the outputs are made of.
        kept: Numbers that a walk keeps for an example.
    """

    def __init__(self, dim: int, options: NetworkOptions, context: int = 0) -> None:
        super().__init__()
        cycle = math.ceil(math.log2(dim))
        channels = [2]  # the value and the mask
        for layer in range(options.layers or cycle):
            filters = options.width or 2 ** (layer + 4)
            channels.append(min(filters, options.channel_cap or filters))
        self.layers = nn.ModuleList(
            _Layer(inputs, filters, 2 ** (layer % max(cycle, 1)), options)
            for layer, (inputs, filters) in enumerate(itertools.pairwise(channels))
        )
        embedded = options.position_embedding and dim > 1
        self.positions = nn.Parameter(torch.zeros(dim - 1, channels[1])) if embedded else None
        self.head = nn.Linear(channels[-1], 3 * options.components)
        mixtures.initialise_head(self.head, options.components, options.start)
        # A vector for each label and each number of the context, added where those of positions are; of the first conditional,
        # which has no features but those of the padding, added to the outputs. All are 0 at first.
        self.contexts = nn.Parameter(torch.zeros(context, channels[1])) if context and dim > 1 else None
        self.first_contexts = nn.Parameter(torch.zeros(context, 3 * options.components)) if context else None
        self.features = channels[-1]
        self.kept = sum(layer.dilation * inputs for layer, inputs in zip(self._layers(), channels, strict=False))

    def _layers(self) -> list[_Layer]:
        return [layer for layer in self.layers if isinstance(layer, _Layer)]

    def hidden_matrices(self) -> list[Tensor]:
        """The taps (2, C', C) of all layers but the first, and the matrices (C, C) within blocks."""
        taps = [layer.weight for layer in self._layers()[1:]]
        return taps + [layer.mix.weight for layer in self._layers() if layer.mix is not None]

    def forward(self, z: Tensor, generator: Randomness | None = None, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs of the first conditional, one vector or one for each context, and of the others.

        Arguments:
            z: The codes, with shape (B, D).
            generator: Source of dropout.
            context: Their encoded contexts, with shape (B, E).

        Returns:
            The outputs, with shapes (3K), or (B, 3K) with contexts, and (D - 1, B, 3K).
        """
        values = z[:, :-1].T  # (D - 1, B): nothing depends on the last dimension
        x = torch.stack([values, torch.ones_like(values)], dim=2)  # (D - 1, B, 2)
        padding = x.new_zeros(2)
        padded = 1 + sum(layer.dilation for layer in self._layers())  # positions of padding that the first convolution sees
        for number, layer in enumerate(self._layers()):
            padded -= layer.dilation
            x, padding = layer(x, padding, padded, generator)
            if number == 0 and self.positions is not None:
                x = x + self.positions[:, None].to(x.dtype)
            if number == 0 and context is not None and self.contexts is not None:
                x = x + (context @ self.contexts).to(x.dtype)
        return self._first(padding, context), apply_linear(self.head, x)

    def _first(self, padding: Tensor, context: Tensor | None) -> Tensor:
        """Outputs of the first conditional, with shape (3K), or (B, 3K) with contexts."""
        outputs = apply_linear(self.head, padding)
        if context is None or self.first_contexts is None:
            return outputs
        return outputs + (context @ self.first_contexts).to(outputs.dtype)

    def walk(self, context: Tensor | None = None) -> _Walk:
        """A walk along the dimensions, for drawing, with encoded contexts (n, E)."""
        return _Walk(self, context)


class _Walk:
    """Outputs of one conditional after another, without a gradient.

    Attributes:
        first: Outputs of the first conditional, with shape (3K), or (n, 3K) with contexts.
    """

    def __init__(self, network: CausalNetwork, context: Tensor | None) -> None:
        padding = network.head.weight.new_zeros(2)
        self.head, self.positions, self.layers = network.head, network.positions, list[_LayerWalk]()
        for layer in network._layers():
            self.layers.append(_LayerWalk(layer, padding))
            padding = self.layers[-1].padding
        self.first = network._first(padding, context)
        self.added = None if context is None or network.contexts is None else context @ network.contexts  # (n, C)

    def __call__(self, z: Tensor) -> Tensor:
        """Outputs (n, 3K) of the next conditional, from all dimensions before it (n, i)."""
        x = torch.stack([z[:, -1], torch.ones_like(z[:, -1])], dim=1)
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number == 0 and self.positions is not None:
                x = x + self.positions[z.shape[1] - 1]
            if number == 0 and self.added is not None:
                x = x + self.added
        return affine(x, self.head.weight, self.head.bias)
