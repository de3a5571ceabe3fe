"""The prior distributions of AAE and VAE, which their codes are matched to and sampled from."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from pipeline.system.draws import Randomness, integers, normal

__all__ = ["Prior", "PriorName"]

PriorName = Literal["normal", "two_normals"]


class Prior:
    r"""A fixed density of codes: one normal distribution, or an equal mixture of two.

    .. math::
        p(z) & = N(z; 0, I) & \text{normal} \\
        p(z) & = \tfrac{1}{2} N(z; -3, I) + \tfrac{1}{2} N(z; 3, I) & \text{two normals}

    The second is the paper's prior for two domains (section 4.2.2).

    References:
        | Density Estimation and Incremental Learning of Latent Vector for Generative Autoencoders, section 4.2.2
        | https://arxiv.org/abs/1902.04294

    Arguments:
        name: `normal` or `two_normals`.
        latent_dim: Length D of the code.

    Example:
        >>> prior = Prior("two_normals", latent_dim=2)
        >>> prior.log_prob(torch.tensor([[3.0, 3.0], [0.0, 0.0]]))
        tensor([ -2.5310, -10.8379])
    """

    def __init__(self, name: PriorName, latent_dim: int) -> None:
        self.name = name
        self.latent_dim = latent_dim
        self.means = torch.tensor([0.0] if name == "normal" else [-3.0, 3.0])

    def log_prob(self, codes: Tensor) -> Tensor:
        """Log-densities, in nats and over all D dimensions, with shape (B,), of codes with shape (B, D)."""
        distances = (codes[:, None, :] - self.means.to(codes)[:, None]).square().sum(2)  # (B, means)
        logs = -0.5 * distances - 0.5 * self.latent_dim * math.log(2 * math.pi)
        return logs.logsumexp(1) - math.log(len(self.means))

    def sample(self, count: int, generator: Randomness) -> Tensor:
        """Draws with shape (count, D), on the CPU."""
        components = integers(len(self.means), (count, 1), generator)
        return self.means[components] + normal((count, self.latent_dim), generator)
