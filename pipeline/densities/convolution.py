"""Causal convolutions as matrix products, time first, with nothing computed on padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["ACTIVATIONS", "Activation", "affine", "causal_convolution", "linear"]

SLOPE = 0.2


class Activation(NamedTuple):
    """An activation whose derivative can be told from its output, so that it may overwrite its input.

    Attributes:
        apply: From inputs to outputs, in place.
        backward: From the gradient of the outputs, and the outputs, to the gradient of the inputs.
        gain: Standard deviation of initial weights, times the square root of the number of inputs.
        fused: What oneDNN calls it, and its arguments; none when it has to be applied by itself.
    """

    apply: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    gain: float
    fused: tuple[str, list[float]] | None


ACTIVATIONS = {
    "leaky_relu": Activation(
        lambda x: F.leaky_relu_(x, SLOPE),
        lambda grad, y: torch.ops.aten.leaky_relu_backward(grad, y, SLOPE, True),
        math.sqrt(2 / (1 + SLOPE**2)),
        ("leaky_relu", [SLOPE]),
    ),
    "relu": Activation(
        torch.relu_, lambda grad, y: torch.ops.aten.threshold_backward(grad, y, 0.0), math.sqrt(2), ("relu", [])
    ),
    "elu": Activation(F.elu_, lambda grad, y: torch.ops.aten.elu_backward(grad, 1.0, 1.0, 1.0, True, y), 1.25, None),
    "tanh": Activation(torch.tanh_, lambda grad, y: torch.ops.aten.tanh_backward(grad, y), 5 / 3, ("tanh", [])),
}


# torch sends float32 products to MKL, which leaves AVX-512 unused on AMD processors; oneDNN, which torch uses for its
# convolutions, is twice as fast there, as fast elsewhere, and applies activations on the way. torch.compile calls it by this
# same operator. Both are float32 throughout.
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def _by_onednn(x: Tensor) -> bool:
    return _onednn is not None and x.dtype == torch.float32 and x.device.type == "cpu"


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation | None = None) -> Tensor:
    """The activation of x W^T + b, without a gradient.

    Arguments:
        x: The inputs, with shape (N, C).
        weight: The matrix W, with shape (C', C).
        bias: The vector b, with shape (C').
        activation: None for none.

    Returns:
        The outputs, with shape (N, C').
    """
    if _by_onednn(x) and len(x) > 0:
        # Any other strides would silently take a path that is a thousand times as slow.
        if not (weight.is_contiguous() or weight.T.is_contiguous()):
            weight = weight.contiguous()
        fused = activation.fused if activation is not None else None
        y: Tensor = _onednn(x, weight, bias, *(fused or ("none", [])), "")  # type: ignore[misc]
        return y if activation is None or fused else activation.apply(y)
    y = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
    return activation.apply(y) if activation is not None else y


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The product a^T b (A, B) of two matrices with shapes (N, A) and (N, B)."""
    if _by_onednn(a) and len(a) > 0:
        # The smaller matrix first: it is the one that is copied.
        return affine(a.T, b.T) if a.shape[1] <= b.shape[1] else affine(b.T, a.T).T
    return a.T @ b


def _autocast(*tensors: Tensor) -> Iterator[Tensor]:
    """The tensors in the type that mixed precision asks for, where it is on."""
    device = tensors[0].device.type
    asked = torch.is_autocast_enabled(device)
    return (tensor.to(torch.get_autocast_dtype(device)) if asked else tensor for tensor in tensors)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return affine(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        to_x = affine(grad, weight.T) if ctx.needs_input_grad[0] else None
        return to_x, _inner(grad, x), grad.sum(dim=0)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same as `torch.nn.functional.linear`, by the faster library; its gradient is first-order only.

    Example:
        >>> linear(torch.ones(2, 3), torch.ones(1, 3), torch.zeros(1))
        tensor([[3.],
                [3.]])
    """
    x, weight, bias = _autocast(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], len(bias))


class _CausalConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, padding: Tensor, weight: Tensor, bias: Tensor, dilation: int, activation: Activation | None
    ) -> Tensor:
        time, batch, channels = x.shape
        split = min(dilation, time) * batch  # rows whose past is padding
        rows = x.reshape(-1, channels)
        past, present = weight
        y = rows.new_empty(len(rows), len(bias))
        y[:split] = affine(rows[:split], present, torch.addmv(bias, past, padding), activation)
        if split < len(rows):
            both = torch.cat([rows[: len(rows) - split], rows[split:]], dim=1)  # (N, 2C)
            y[split:] = affine(both, torch.cat([past, present], dim=1), bias, activation)
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
        early, late, earlier_rows = grad[:split], grad[split:], rows[: len(rows) - split]
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = affine(grad, present.T)
            to_x[: len(earlier_rows)] += affine(late, past.T)
            to_x = to_x.view(ctx.shape)
        from_padding = early.sum(dim=0)
        to_past = _inner(late, earlier_rows).addr(from_padding, padding)
        to_weight = torch.stack([to_past, _inner(grad, rows)])
        return to_x, past.T @ from_padding, to_weight, from_padding + late.sum(dim=0), None, None


def causal_convolution(
    x: Tensor, padding: Tensor, weight: Tensor, bias: Tensor, dilation: int, activation: Activation | None = None
) -> Tensor:
    r"""A causal convolution with kernel 2, over columns that have the same vector before their start at all times.

    .. math:: y_t = a(W_0 x_{t - d} + W_1 x_t + b), \quad x_t = p \text{ for } t \leq 0

    Its gradient is first-order only.

    Arguments:
        x: The columns :math:`x_1, \ldots, x_T`, time first, with shape (T, B, C).
        padding: What stands before them, :math:`p`, with shape (C).
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
    x, padding, weight, bias = _autocast(x, padding, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _CausalConvolution.apply(x, padding, weight, bias, dilation, activation)
    return y
