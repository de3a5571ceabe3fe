"""Causal attention over pairs of a dimension and its value, in whatever order these are read."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.densities.common import mixtures
from pipeline.densities.common.density import dropout_mask
from pipeline.densities.common.options import NetworkOptions
from pipeline.densities.common.products import ACTIVATIONS, Activation, apply_linear, linear
from pipeline.system.draws import Randomness

__all__ = ["AttentionNetwork", "as_pairs"]

LAYERS = 4  # if the options name no number
EXPANSION = 4  # width of a block's hidden layer, in those of the block


def as_pairs(z: Tensor, orders: Tensor) -> Tensor:
    """Values and dimensions in the order in which they are read.

    Arguments:
        z: The codes, with shape (B, D).
        orders: The dimension that is read at each place, with shape (D,), or (B, D) for other orders in each code.

    Returns:
        The pairs (value, dimension), with shape (B, D, 2).

    Example:
        >>> as_pairs(torch.tensor([[0.5, 0.7]]), torch.tensor([1, 0]))
        tensor([[[0.7000, 1.0000],
                 [0.5000, 0.0000]]])
    """
    orders = orders.expand(len(z), -1)
    return torch.stack([z.gather(1, orders), orders.to(z.dtype)], dim=2)


class _Block(nn.Module):
    """x + W attention(norm(x)), then x + V a(U norm(x))."""

    def __init__(self, options: NetworkOptions) -> None:
        super().__init__()
        width, self.heads, self.dropout = options.width, options.heads, options.dropout
        self.activation: Activation = ACTIVATIONS[options.activation]
        self.before_attention, self.before_layer = nn.LayerNorm(width), nn.LayerNorm(width)
        # One matrix each for queries, keys and values.
        self.projections = nn.Parameter(torch.empty(3, width, width).normal_(std=1 / math.sqrt(width)))
        self.offsets = nn.Parameter(torch.zeros(3 * width))
        self.mix, self.into, self.back = (
            nn.Linear(width, width),
            nn.Linear(width, EXPANSION * width),
            nn.Linear(EXPANSION * width, width),
        )
        for module, gain in ((self.mix, 0.1), (self.into, self.activation.gain), (self.back, 0.1)):
            nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
            nn.init.zeros_(module.bias)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the heads (B, H, T, C / H), from the inputs (B, T, C)."""
        joined = linear(self.before_attention(x), self.projections.flatten(0, 1), self.offsets)  # (B, T, 3C)
        queries, keys, values = joined.view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return queries, keys, values

    def finish(self, x: Tensor, attended: Tensor, generator: Randomness | None = None) -> Tensor:
        """The block's outputs (B, T, C), from its inputs (B, T, C) and what the heads attend to (B, H, T, C / H)."""
        x = x + self._dropped(apply_linear(self.mix, attended.transpose(1, 2).flatten(2)), generator)
        hidden = apply_linear(self.into, self.before_layer(x), self.activation)
        return x + self._dropped(apply_linear(self.back, hidden), generator)

    def _dropped(self, x: Tensor, generator: Randomness | None) -> Tensor:
        return x * dropout_mask(x, self.dropout, generator) if self.dropout and self.training else x

    def forward(self, x: Tensor, generator: Randomness | None) -> Tensor:
        """Outputs (B, T, C), each of the inputs (B, T, C) up to its place."""
        return self.finish(x, F.scaled_dot_product_attention(*self.projected(x), is_causal=True), generator)


class AttentionNetwork(nn.Module):
    r"""From codes to the outputs of all conditionals, by causal attention.

    At each place the network is told the pair that was read last and the dimension that is asked for next:

    .. math:: x_t = W \, a(z_{o_{t-1}} u_{o_{t-1}} + v_{o_{t-1}}) + q_{o_t}

    where :math:`o_t` is the dimension at place t, and u, v and q are learned vectors of each dimension. At the start the first
    term is a learned vector. Nothing else tells the place, so one network serves all orders.

    References:
        | DEformer: an order-agnostic distribution estimating transformer (Alcorn, Nguyen, 2021)
        | https://arxiv.org/abs/2106.06989
        | GIVT: generative infinite-vocabulary transformers (Tschannen et al., 2024)
        | https://arxiv.org/abs/2312.02116

    Arguments:
        dim: The number of dimensions D.
        options: Those of the density that says what the network is made of.
        context: Length E of encoded contexts, which are projected and added at every place; 0 for none.

    Attributes:
        features: Features that the outputs are made of.
        kept: Numbers that a walk keeps for an example.
    """

    def __init__(self, dim: int, options: NetworkOptions, context: int = 0) -> None:
        super().__init__()
        width, layers = options.width, options.layers or LAYERS
        self.activation = ACTIVATIONS[options.activation]
        self.slopes, self.offsets = (nn.Parameter(torch.randn(dim, width) / math.sqrt(2)) for _ in range(2))
        self.embed = nn.Linear(width, width)
        nn.init.normal_(self.embed.weight, std=self.activation.gain / math.sqrt(width))
        self.asked, self.start = nn.Parameter(torch.randn(dim, width)), nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(_Block(options) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3 * options.components)
        mixtures.initialise_head(self.head, options.components, options.start)
        self.contexts = nn.Parameter(torch.zeros(context, width)) if context else None
        self.dim, self.features, self.kept = dim, width, 2 * layers * dim * width

    def hidden_matrices(self) -> list[Tensor]:
        """The matrices within all blocks, those of queries, keys and values as a stack (3, C, C)."""
        return [
            matrix
            for block in self._blocks()
            for matrix in (block.projections, block.mix.weight, block.into.weight, block.back.weight)
        ]

    def _blocks(self) -> list[_Block]:
        return [block for block in self.blocks if isinstance(block, _Block)]

    def _read(self, values: Tensor, dimensions: Tensor) -> Tensor:
        """Vectors (*, C) of values (*), and of the dimensions that they are of."""
        hidden = self.activation.apply(torch.addcmul(self.offsets[dimensions], values[..., None], self.slopes[dimensions]))
        return apply_linear(self.embed, hidden)

    def forward(self, z: Tensor, generator: Randomness | None = None, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs of the first conditional and of the others.

        Arguments:
            z: The codes, with shape (B, D), or in any orders, as `as_pairs` gives them, with shape (B, D, 2).
            generator: Source of dropout.
            context: Their encoded contexts, with shape (B, E).

        Returns:
            The outputs, with shapes (B, 3K) and (D - 1, B, 3K).
        """
        values, dimensions = (z, torch.arange(self.dim, device=z.device)) if z.ndim == 2 else (z[..., 0], z[..., 1].long())
        read = self._read(values[:, :-1], dimensions[..., :-1])  # (B, D - 1, C)
        x = torch.cat([self.start.expand(len(z), 1, -1).to(read), read], dim=1) + self.asked[dimensions]
        if context is not None and self.contexts is not None:
            x = x + (context @ self.contexts).to(x.dtype)[:, None]
        for block in self._blocks():
            x = block(x, generator)
        outputs = apply_linear(self.head, self.norm(x))
        return outputs[:, 0], outputs[:, 1:].transpose(0, 1)

    def walk(self, orders: Tensor | None = None, context: Tensor | None = None) -> _Walk:
        """A walk along the dimensions, for drawing, in their own order or in others (n, D), with encoded contexts (n, E)."""
        own = torch.arange(self.dim, device=self.start.device)[None]
        return _Walk(self, own if orders is None else orders, context)


class _Walk:
    """Outputs of one conditional after another, without a gradient; keys and values are kept.

    Attributes:
        first: Outputs of the first conditional, with shape (n, 3K), or (1, 3K) where all read in the same order.
    """

    def __init__(self, network: AttentionNetwork, orders: Tensor, context: Tensor | None) -> None:
        self.network, self.orders = network, orders
        self.added = None if context is None or network.contexts is None else context @ network.contexts  # (n, C)
        self.kept: list[list[Tensor]] = []  # of each block, keys and values (n, H, D, C / H)
        self.first = self._outputs(network.start + network.asked[orders[:, 0]], place=0)

    def __call__(self, z: Tensor) -> Tensor:
        """Outputs (n, 3K) of the next conditional, from all numbers before it in the order of reading (n, i)."""
        place = z.shape[1]
        if place == 1:  # what was kept so far is the same for all that read in the same order
            self.kept = [[kept.repeat(len(z) // len(kept), 1, 1, 1) for kept in of_block] for of_block in self.kept]
        last, asked = self.orders[:, place - 1], self.orders[:, place]
        return self._outputs(self.network._read(z[:, -1], last) + self.network.asked[asked], place)

    def _outputs(self, x: Tensor, place: int) -> Tensor:
        x = x if self.added is None else x + self.added
        x = x[:, None]  # (n, 1, C)
        for number, block in enumerate(self.network._blocks()):
            queries, *new = block.projected(x)
            if place == 0:
                self.kept.append([one.new_empty(len(x), block.heads, self.network.dim, one.shape[-1]) for one in new])
            for kept, one in zip(self.kept[number], new, strict=True):
                kept[:, :, place] = one[:, :, 0]
            keys, values = (kept[:, :, : place + 1] for kept in self.kept[number])
            x = block.finish(x, F.scaled_dot_product_attention(queries, keys, values))
        return apply_linear(self.network.head, self.network.norm(x[:, 0]))
