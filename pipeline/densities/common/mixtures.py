"""Mixtures of univariate Gaussians, the heads of autoregressive densities: log-likelihood with its gradient, and draws."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.densities.common.first_order import first_order

__all__ = ["draw", "initial_bias", "initialise_head", "log_likelihood", "unpack"]

BLOCK_NUMBERS = 2**17  # of outputs that a thread works on at once: they stay in its cache, and torch does share them out


def unpack(outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, means and log standard deviations, each with shape (*, K), of outputs with shape (*, 3K)."""
    logits, means, log_scales = outputs.chunk(3, dim=-1)
    return logits, means, log_scales


SHARE = 1e-5  # of all Gaussians but the first where a mixture starts at N(0, 1); Adam's steps soon make them larger


def initial_bias(components: int, start: str = "spread") -> Tensor:
    """Outputs (3K) of a mixture that standardised codes resemble, with means spread like N(0, 1).

    Arguments:
        components: The number of Gaussians K.
        start: `spread` for equal weights and scales of 1; `gaussian` for N(0, 1), with a share of 1e-5 for Gaussians of scale
            1/2. K equal Gaussians would be N(0, 1) exactly, but have equal gradients too and never learn apart.
    """
    if start == "spread":
        levels = (torch.arange(components) + 0.5) / components
        return torch.cat([torch.zeros(components), torch.special.ndtri(levels), torch.zeros(components)])
    others = components - 1
    means = torch.special.ndtri((torch.arange(others) + 0.5) / max(others, 1))
    logits = torch.full((others,), math.log(SHARE / max(others, 1)))
    first = torch.zeros(1)
    return torch.cat([first, logits, first, means, first, torch.full((others,), math.log(0.5))])


def initialise_head(head: nn.Linear, components: int, start: str) -> None:
    """Sets the bias of the layer that gives outputs, and where it starts at the Gaussian, weights of 0."""
    head.bias.data = initial_bias(components, start)
    if start == "gaussian":
        nn.init.zeros_(head.weight)


def _softmax(x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of x (R, K), written to `out`, and logsumexp (R), with one exponential for both."""
    top = x.amax(dim=1, keepdim=True).clamp_min_(torch.finfo(x.dtype).min)
    total = torch.sub(x, top, out=out).exp_().sum(dim=1, keepdim=True)
    out.div_(total)
    return out, total.log_().add_(top)[:, 0]


class _LogLikelihood(torch.autograd.Function):
    # The forward pass computes the gradient too, while the block is in the cache: with responsibilities
    # r = softmax(log pi + log N) and u = (x - mu) / sigma it is r - pi for the logits, r u / sigma for the means and
    # r (u^2 - 1) for log sigma.

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, x: Tensor) -> Tensor:
        rows = len(x) if x.is_cuda else BLOCK_NUMBERS * torch.get_num_threads() // outputs.shape[1]
        rows = max(1, rows)
        value = torch.empty_like(x)
        needs_gradient = any(ctx.needs_input_grad)
        gradient = torch.empty_like(outputs) if needs_gradient else None
        x_gradient = torch.empty_like(x) if needs_gradient else None
        for start in range(0, len(x), rows):
            block = slice(start, start + rows)
            logits, means, log_scales = unpack(outputs[block])  # (R, K) each
            inverse_scales = torch.exp(-log_scales)
            u = torch.sub(x[block, None], means).mul_(inverse_scales)
            square = u * u
            joint = torch.add(logits, square, alpha=-0.5).sub_(log_scales)
            responsibilities, log_joint = _softmax(joint, out=joint)
            # Where no gradient is wanted its place is taken by a scratch.
            weights, log_total = _softmax(
                logits, out=gradient[block, : logits.shape[1]] if gradient is not None else torch.empty_like(u)
            )
            torch.sub(log_joint, log_total, out=value[block])
            if gradient is not None and x_gradient is not None:
                _, to_means, to_log_scales = unpack(gradient[block])
                torch.sub(responsibilities, weights, out=weights)
                torch.mul(u.mul_(inverse_scales), responsibilities, out=to_means)
                torch.mul(square.sub_(1), responsibilities, out=to_log_scales)
                torch.sum(to_means, dim=1, out=x_gradient[block]).neg_()
        if gradient is not None and x_gradient is not None:
            ctx.save_for_backward(gradient, x_gradient)
        return value.sub_(0.5 * math.log(2 * math.pi))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gradient, x_gradient = ctx.saved_tensors
        return gradient * grad[:, None], x_gradient * grad


def log_likelihood(outputs: Tensor, x: Tensor) -> Tensor:
    r"""Log-density of numbers under mixtures of Gaussians, in nats.

    .. math:: \log \sum_k \pi_k \, \mathcal{N}(x; \mu_k, \sigma_k^2), \quad \pi = \operatorname{softmax}(\text{logits})

    Exact: by logsumexp, without a floor inside the logarithm. The gradient is first-order only.

    Arguments:
        outputs: Logits, means and log standard deviations, with shape (*, 3K).
        x: The numbers, with shape (*,).

    Returns:
        The log-densities, with shape (*,).

    Example:
        >>> log_likelihood(torch.zeros(1, 6), torch.tensor([1.0]))
        tensor([-1.4189])
    """
    outputs = outputs.to(x.dtype)  # mixed precision ends here
    if torch.compiler.is_exporting():  # other formats know no blocks
        logits, means, log_scales = unpack(outputs)
        u = (x[..., None] - means) * torch.exp(-log_scales)
        joint = torch.log_softmax(logits, dim=-1) - 0.5 * u * u - log_scales
        return torch.logsumexp(joint, dim=-1) - 0.5 * math.log(2 * math.pi)
    value: Tensor = _LogLikelihood.apply(outputs.reshape(-1, outputs.shape[-1]), x.reshape(-1))
    return value.view(x.shape)


def draw(outputs: Tensor, uniforms: Tensor, normals: Tensor) -> Tensor:
    r"""A draw from mixtures of Gaussians: :math:`\mu_k + \sigma_k \epsilon`, with k from the inverse of the cumulative weights.

    Arguments:
        outputs: Logits, means and log standard deviations, with shape (B, 3K).
        uniforms: Numbers in [0, 1) that choose the component, with shape (B,).
        normals: Numbers :math:`\epsilon` from N(0, 1), with shape (B,).

    Returns:
        The draws, with shape (B,).

    Example:
        >>> outputs = torch.tensor([[0.0, 0.0, -5.0, 5.0, -9.0, -9.0]]).expand(2, 6)
        >>> draw(outputs, torch.tensor([0.3, 0.6]), torch.zeros(2))
        tensor([-5.,  5.])
    """
    logits, means, log_scales = unpack(outputs)
    cumulative = torch.softmax(logits, dim=1).cumsum(dim=1)
    # The last of the cumulative weights is 1 up to rounding; u < 1 times it can't pass it.
    component = (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(dim=1, keepdim=True).clamp_(max=logits.shape[1] - 1)
    return torch.addcmul(means.gather(1, component)[:, 0], log_scales.gather(1, component)[:, 0].exp(), normals)
