"""Neural autoregressive flow (NAF): monotonic networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.densities.common.flows import AutoregressiveOptions, NormalisingFlow
from pipeline.settings import DensitySettings, check_that

__all__ = ["NeuralAutoregressiveFlow", "Options", "Settings"]


@dataclass(frozen=True, kw_only=True)
class Options(AutoregressiveOptions):
    """Options of `NeuralAutoregressiveFlow`.

    Attributes:
        signal: Features that an autoregressive network passes to the monotonic one.
    """

    signal: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.signal >= 1, "signal", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Settings(DensitySettings, Options):
    """Neural autoregressive flow (NAF): monotonic networks."""


class NeuralAutoregressiveFlow(NormalisingFlow):
    r"""Neural autoregressive flow (NAF): monotonic networks.

    References:
        | Neural Autoregressive Flows (Huang et al., 2018)
        | https://arxiv.org/abs/1804.00779

    Arguments:
        dim: The number of dimensions :math:`D`.
        options: The fields of `Options`.

    Example:
        >>> import torch
        >>> NeuralAutoregressiveFlow(8, transforms=2, hidden=[16]).log_prob(torch.zeros(3, 8)).shape
        torch.Size([3])
    """

    family = "naf"
    has_vmap = False  # zuko differentiates its monotonic networks on the way
    options_type = Options
    retired = frozenset({"family", "bins", "coupling"})

    options: Options

    def _flow(self, **common: Any) -> Any:
        from zuko import flows

        return flows.NAF(**common, **self._autoregressive(), signal=self.options.signal)

    @staticmethod
    def _inverse(transform: Any, y: Tensor, context: Tensor | None) -> Tensor:
        if y.shape[1] == 1 or not hasattr(transform, "hyper"):  # the latter: the soft clipping between two of them
            return NormalisingFlow._inverse(transform, y, context)
        return _columnwise_inverse(transform, y, context)


Model = NeuralAutoregressiveFlow


def _columnwise_inverse(transform: Any, y: Tensor, context: Tensor | None = None) -> Tensor:
    r"""The inverse of an autoregressive transformation of NAF, :math:`x_i = f^{-1}(y_i; s(x_{<i}))`.

    It equals zuko's, which bisects all D columns in each of D passes, where only one of them has all that it depends on.

    Arguments:
        transform: The transformation, zuko's `MaskedAutoregressiveTransform` of an `MNN`.
        y: Its outputs, with shape (n, D).
        context: The encoded contexts that its network reads behind the columns, with shape (n, E).

    Returns:
        Its inputs, with shape (n, D), to the tolerance of zuko's bisection.
    """
    from zuko.transforms import MonotonicTransform

    *hidden, last = transform.hyper
    weights = (last.mask * last.weight).unflatten(0, (y.shape[1], -1))  # (D, S, H)
    biases = last.bias.unflatten(0, (y.shape[1], -1))  # (D, S)
    x = torch.zeros_like(y)
    for column in transform.order.argsort().tolist():
        features = x if context is None else torch.cat([x, context], dim=1)
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
