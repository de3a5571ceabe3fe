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

    def __init__(self, inputs: int, options: NetworkOptions) -> None:
        super().__init__()
        self.activation, self.dropout = ACTIVATIONS[options.activation], options.dropout
        gain, width, layers = self.activation.gain, options.width, options.layers or 2
        self.start = _linear(inputs, width, gain, bias=0.5)
        self.into = nn.ModuleList(_linear(width, width, gain) for _ in range(layers))
        self.back = nn.ModuleList(_linear(width, width, 0.1) for _ in range(layers))
        self.head = nn.Linear(width, 3 * options.components)
        mixtures.initialise_head(self.head, options.components, options.start)

    def hidden_matrices(self) -> list[Tensor]:
        """The matrices W and V of all blocks."""
        return [module.weight for modules in (self.into, self.back) for module in modules if isinstance(module, nn.Linear)]

    def forward(self, z: Tensor, generator: Randomness | None = None) -> Tensor:
        """Outputs (B, 3K) of a conditional, from the dimensions before it (B, i)."""
        x = apply_linear(self.start, z)
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

    Attributes:
        features: Features that the outputs are made of.
        kept: Numbers that a walk keeps for an example.
    """

    def __init__(self, dim: int, options: NetworkOptions) -> None:
        super().__init__()
        self.first = nn.Parameter(mixtures.initial_bias(options.components, options.start))
        self.networks = nn.ModuleList(_Network(i, options) for i in range(1, dim))
        self.features, self.kept = options.width, dim

    def hidden_matrices(self) -> list[Tensor]:
        """The matrices (C, C) of all blocks."""
        return [weight for network in self.networks for weight in network.hidden_matrices()]  # type: ignore[operator]

    def forward(self, z: Tensor, generator: Randomness | None = None) -> tuple[Tensor, Tensor]:
        """Outputs of the first conditional, one vector, and of the others.

        Arguments:
            z: The codes, with shape (B, D).
            generator: Source of dropout.

        Returns:
            The outputs, with shapes (3K) and (D - 1, B, 3K).
        """
        others = [network(z[:, : i + 1], generator) for i, network in enumerate(self.networks)]
        return self.first, torch.stack(others) if others else self.first.new_zeros(0, len(z), len(self.first))

    def walk(self) -> _Walk:
        """A walk along the dimensions, for drawing."""
        return _Walk(self)


class _Walk:
    """Outputs of one conditional after another.

    Attributes:
        first: Outputs of the first conditional, with shape (3K).
    """

    def __init__(self, networks: SeparateNetworks) -> None:
        self.first, self.networks = networks.first, networks.networks

    def __call__(self, z: Tensor) -> Tensor:
        """Outputs (n, 3K) of the next conditional, from all dimensions before it (n, i)."""
        outputs: Tensor = self.networks[z.shape[1] - 1](z)
        return outputs
