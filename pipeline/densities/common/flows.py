"""Normalising flows, by zuko: MAF, Real NVP, NSF and NAF."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from pipeline.densities.common.density import Density, own_settings, standard_normal
from pipeline.errors import DataError
from pipeline.settings import DensitySettings, check_that

__all__ = ["NormalisingFlow", "Settings", "build"]


@dataclass(frozen=True, kw_only=True)
class Settings(DensitySettings):
    """A normalising flow: `maf`, `realnvp`, `nsf` or `naf`.

    Attributes:
        transforms: Transformations, one after another.
        hidden: Units of the hidden layers of each transformation's network.
        residual: Whether layers of equal width become residual blocks (not for `realnvp`).
        bins: Bins of the splines (`nsf`).
        coupling: Whether splines are coupled, which makes sampling fast, instead of autoregressive (`nsf`).
        signal: Features that an autoregressive network passes to the monotonic one (`naf`).
    """

    transforms: int = 5
    hidden: tuple[int, ...] = (256, 256)
    residual: bool = False
    bins: int = 8
    coupling: bool = False
    signal: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("maf", "naf", "nsf", "realnvp")
        check_that(self.family in known, "family", f"has to be one of {', '.join(known)}")
        check_that(self.transforms >= 1, "transforms", "has to be at least 1")
        check_that(len(self.hidden) > 0 and min(self.hidden) >= 1, "hidden", "has to list numbers of at least 1")
        check_that(self.bins >= 2, "bins", "has to be at least 2")
        check_that(self.signal >= 1, "signal", "has to be at least 1")


class NormalisingFlow(Density):
    r"""A normalising flow, :math:`\log p(z) = \log \mathcal{N}(f(z); 0, I) + \log |\det \partial f / \partial z|`.

    References:
        | Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017)
        | https://arxiv.org/abs/1705.07057
        | Density estimation using Real NVP (Dinh et al., 2016)
        | https://arxiv.org/abs/1605.08803
        | Neural Spline Flows (Durkan et al., 2019)
        | https://arxiv.org/abs/1906.04032
        | Neural Autoregressive Flows (Huang et al., 2018)
        | https://arxiv.org/abs/1804.00779

    Arguments:
        dim: The number of dimensions :math:`D`.
        family: `maf`, `realnvp`, `nsf` or `naf`.
        transforms: The number of transformations.
        hidden: The numbers of units of the hidden layers.
        residual: Whether layers of equal width become residual blocks.
        bins: The number of bins of splines.
        coupling: Whether splines are coupled instead of autoregressive.
        signal: The number of features passed to a monotonic network.

    Example:
        >>> import torch
        >>> NormalisingFlow(8, "nsf", transforms=2, hidden=[16]).log_prob(torch.zeros(3, 8)).shape
        torch.Size([3])
    """

    has_meta = False  # masks are computed from values

    def __init__(
        self,
        dim: int,
        family: str = "maf",
        transforms: int = 5,
        hidden: Sequence[int] = (256, 256),
        residual: bool = False,
        bins: int = 8,
        coupling: bool = False,
        signal: int = 16,
    ) -> None:
        from zuko import flows

        super().__init__(
            dim,
            family=family,
            transforms=transforms,
            hidden=list(hidden),
            residual=residual,
            bins=bins,
            coupling=coupling,
            signal=signal,
        )
        self.family = family
        common: dict[str, Any] = {"features": dim, "transforms": transforms, "hidden_features": tuple(hidden)}
        if family == "realnvp":
            if dim == 1:
                raise DataError("'realnvp' couples dimensions, and these codes have only one; choose another family")
            self.flow = flows.RealNVP(**common)
        elif family == "nsf":
            self.flow = flows.NSF(**common, residual=residual, bins=bins, passes=2 if coupling else None)
        elif family == "naf":
            self.flow = flows.NAF(**common, residual=residual, signal=signal)
        else:
            self.flow = flows.MAF(**common, residual=residual)
        self.chunk_examples = self.sample_chunk_examples = 1024

    def _log_prob(self, z: Tensor) -> Tensor:
        value: Tensor = self.flow().log_prob(z)
        return value

    def _sample(self, n: int, generator: Generator | None) -> Tensor:
        z = standard_normal((n, self.dim), self.shift, generator)
        inverse = _columnwise_inverse if self.family == "naf" and self.dim > 1 else _inverse
        for transform in reversed(self.flow.transform.transforms):
            z = inverse(transform, z)
        return z


def _inverse(transform: Any, y: Tensor) -> Tensor:
    x: Tensor = transform().inv(y)
    return x


def _columnwise_inverse(transform: Any, y: Tensor) -> Tensor:
    r"""The inverse of an autoregressive transformation of NAF, :math:`x_i = f^{-1}(y_i; s(x_{<i}))`.

    It equals zuko's, which bisects all D columns in each of D passes, where only one of them has all that it depends on.

    Arguments:
        transform: The transformation, zuko's `MaskedAutoregressiveTransform` of an `MNN`.
        y: Its outputs, with shape (n, D).

    Returns:
        Its inputs, with shape (n, D), to the tolerance of zuko's bisection.
    """
    from zuko.transforms import MonotonicTransform

    if not hasattr(transform, "hyper"):  # the soft clipping between two of them
        return _inverse(transform, y)
    *hidden, last = transform.hyper
    weights = (last.mask * last.weight).unflatten(0, (y.shape[1], -1))  # (D, S, H)
    biases = last.bias.unflatten(0, (y.shape[1], -1))  # (D, S)
    x = torch.zeros_like(y)
    for column in transform.order.argsort().tolist():
        features = x
        for layer in hidden:
            features = layer(features)
        signal = F.linear(features, weights[column], biases[column])  # (n, S)
        f = _monotonic(transform.univariate.network, column, signal)
        x[:, column] = MonotonicTransform(f).inv(y[:, column])
    return x


def _monotonic(network: Any, column: int, signal: Tensor) -> Callable[[Tensor], Tensor]:
    """The function of one column, (n) -> (n), from a stack of D monotonic networks, given its signal (n, S)."""
    first, *rest = (
        (layer.weight[column].abs(), layer.bias[column]) if hasattr(layer, "weight") else layer for layer in network
    )
    weight, bias = first
    start = F.linear(signal, weight[:, 1:], bias)  # (n, H): what doesn't depend on the column's value

    def f(x: Tensor) -> Tensor:
        h = torch.addcmul(start, x[:, None], weight[:, 0])
        for layer in rest:
            h = F.linear(h, *layer) if isinstance(layer, tuple) else layer(h)
        return h[:, 0]

    return f


Model = NormalisingFlow


def build(settings: Settings, dim: int) -> NormalisingFlow:
    """The density that a row of `densities` describes."""
    return NormalisingFlow(dim, family=settings.family, **own_settings(settings))
