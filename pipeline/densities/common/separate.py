"""A residual network for each dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipeline.densities.common import mixtures
from pipeline.densities.common.density import dropout_mask
from pipeline.densities.common.options import NetworkOptions
from pipeline.densities.common.products import ACTIVATIONS, apply_linear
from pipeline.system.draws import Randomness

__all__ = ["SeparateNetworks"]


def _linear(inputs: int, outputs: int, gain: float, bias: float = 0.0) -> nn.Linear:
    module = nn.Linear(inputs, outputs)
    nn.init.normal_(module.weight, std=gain / math.sqrt(inputs))
    nn.init.normal_(module.bias, std=bias)
    return module


class _Network(nn.Module):
    """Residual blocks, x + V a(W a(x) + b) + c, between two linear layers."""

    def __init__(self, inputs: int, options: NetworkOptions, context: int) -> None:
        super().__init__()
        self.activation, self.dropout = ACTIVATIONS[options.activation], options.dropout
        gain, width, layers = self.activation.gain, options.width, options.layers or 2
        self.start = _linear(inputs, width, gain, bias=0.5)
        self.into = nn.ModuleList(_linear(width, width, gain) for _ in range(layers))
        self.back = nn.ModuleList(_linear(width, width, 0.1) for _ in range(layers))
        self.head = nn.Linear(width, 3 * options.components)
        mixtures.initialise_head(self.head, options.components, options.start)
        self.contexts = nn.Parameter(torch.zeros(context, width)) if context else None

    def hidden_matrices(self) -> list[Tensor]:
        """The matrices W and V of all blocks."""
        return [module.weight for modules in (self.into, self.back) for module in modules if isinstance(module, nn.Linear)]

    def forward(self, z: Tensor, generator: Randomness | None = None, context: Tensor | None = None) -> Tensor:
        """Outputs (B, 3K) of a conditional, from the dimensions before it (B, i) and encoded contexts (B, E)."""
        x = apply_linear(self.start, z)
        if context is not None and self.contexts is not None:
            x = x + (context @ self.contexts).to(x.dtype)
        for into, back in zip(self.into, self.back, strict=True):
            h = apply_linear(into, self.activation.apply(x.clone()), self.activation)
            if self.dropout and self.training:
                h = h * dropout_mask(h, self.dropout, generator)
            x = x + apply_linear(back, h)
        return apply_linear(self.head, self.activation.apply(x))


class SeparateNetworks(nn.Module):
    """From codes to the outputs of all conditionals, by a residual network for each.

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
        self.first = nn.Parameter(mixtures.initial_bias(options.components, options.start))
        self.networks = nn.ModuleList(_Network(i, options, context) for i in range(1, dim))
        self.first_contexts = nn.Parameter(torch.zeros(context, 3 * options.components)) if context else None
        self.features, self.kept = options.width, dim

    def hidden_matrices(self) -> list[Tensor]:
        """The matrices (C, C) of all blocks."""
        return [weight for network in self.networks for weight in network.hidden_matrices()]  # type: ignore[operator]

    def forward(self, z: Tensor, generator: Randomness | None = None, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs of the first conditional, one vector or one for each context, and of the others.

        Arguments:
            z: The codes, with shape (B, D).
            generator: Source of dropout.
            context: Their encoded contexts, with shape (B, E).

        Returns:
            The outputs, with shapes (3K), or (B, 3K) with contexts, and (D - 1, B, 3K).
        """
        others = [network(z[:, : i + 1], generator, context) for i, network in enumerate(self.networks)]
        return self._first(context), torch.stack(others) if others else self.first.new_zeros(0, len(z), len(self.first))

    def _first(self, context: Tensor | None) -> Tensor:
        """Outputs of the first conditional, with shape (3K), or (B, 3K) with contexts."""
        return self.first if context is None or self.first_contexts is None else self.first + context @ self.first_contexts

    def walk(self, context: Tensor | None = None) -> _Walk:
        """A walk along the dimensions, for drawing, with encoded contexts (n, E)."""
        return _Walk(self, context)


class _Walk:
    """Outputs of one conditional after another.

    Attributes:
        first: Outputs of the first conditional, with shape (3K), or (n, 3K) with contexts.
    """

    def __init__(self, networks: SeparateNetworks, context: Tensor | None) -> None:
        self.first, self.networks, self.context = networks._first(context), networks.networks, context

    def __call__(self, z: Tensor) -> Tensor:
        """Outputs (n, 3K) of the next conditional, from all dimensions before it (n, i)."""
        outputs: Tensor = self.networks[z.shape[1] - 1](z, context=self.context)
        return outputs
