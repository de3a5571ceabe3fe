"""Matrix products with an activation, and their gradients, by the library that is fastest on this processor in float32."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.densities.common.first_order import first_order

__all__ = ["ACTIVATIONS", "Activation", "add_product", "affine", "apply_linear", "autocast", "inner", "linear"]

SLOPE = 0.2


class Activation(NamedTuple):
    """An activation whose derivative can be told from its output, so that it may overwrite its input.

    Attributes:
        apply: From inputs to outputs, in place.
        backward: From the gradient of the outputs, and the outputs, to the gradient of the inputs.
        gain: Standard deviation of initial weights, times the square root of the number of inputs.
        fused: What oneDNN calls it, and its arguments; none when it must be applied by itself.
    """

    apply: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    gain: float
    fused: tuple[str, list[float]] | None


def _leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu_(x, SLOPE)


def _leaky_relu_backward(grad: Tensor, y: Tensor) -> Tensor:
    to_x: Tensor = torch.ops.aten.leaky_relu_backward(grad, y, SLOPE, True)
    return to_x


def _relu_backward(grad: Tensor, y: Tensor) -> Tensor:
    to_x: Tensor = torch.ops.aten.threshold_backward(grad, y, 0.0)
    return to_x


def _elu_backward(grad: Tensor, y: Tensor) -> Tensor:
    to_x: Tensor = torch.ops.aten.elu_backward(grad, 1.0, 1.0, 1.0, True, y)
    return to_x


def _tanh_backward(grad: Tensor, y: Tensor) -> Tensor:
    to_x: Tensor = torch.ops.aten.tanh_backward(grad, y)
    return to_x


# Functions with names, since a density that holds one of them can be pickled.
ACTIVATIONS = {
    "leaky_relu": Activation(_leaky_relu, _leaky_relu_backward, math.sqrt(2 / (1 + SLOPE**2)), ("leaky_relu", [SLOPE])),
    "relu": Activation(torch.relu_, _relu_backward, math.sqrt(2), ("relu", [])),
    "elu": Activation(F.elu_, _elu_backward, 1.25, None),
    "tanh": Activation(torch.tanh_, _tanh_backward, 5 / 3, ("tanh", [])),
}


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "GenuineIntel" in platform.processor()


# torch sends float32 products to MKL, which leaves AVX-512 unused on AMD processors. oneDNN, which torch uses for its
# convolutions, is twice as fast there, and applies activations on the way; torch.compile calls it by this same operator. On
# Intel processors MKL is as fast, costs less on small matrices, and adds to what is there. Both are float32 throughout.
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_prefers_mkl = torch.backends.mkl.is_available() and _is_intel()


def _by_onednn(x: Tensor) -> bool:
    wanted = _onednn is not None and not _prefers_mkl and not torch.compiler.is_exporting()
    return wanted and x.dtype == torch.float32 and x.device.type == "cpu"


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
    if _by_onednn(x) and x.numel() > 0:
        # Any other strides would silently take a path that is a thousand times as slow.
        if not (weight.is_contiguous() or weight.T.is_contiguous()):
            weight = weight.contiguous()
        fused = activation.fused if activation is not None else None
        y: Tensor = _onednn(x, weight, bias, *(fused or ("none", [])), "")  # type: ignore[misc]
        return y if activation is None or fused else activation.apply(y)
    y = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
    return activation.apply(y) if activation is not None else y


def add_product(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Adds x W^T to y in place, without a gradient.

    Arguments:
        y: What is added to, with shape (N, C').
        x: The inputs, with shape (N, C).
        weight: The matrix W, with shape (C', C).
    """
    if _by_onednn(x) and x.numel() > 0:
        y += affine(x, weight)
    else:
        y.addmm_(x, weight.T)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The product a^T b, with shape (A, B), of two matrices with shapes (N, A) and (N, B), without a gradient."""
    if _by_onednn(a):
        # The smaller matrix first: it is the one that is copied.
        return affine(a.T, b.T) if a.shape[1] <= b.shape[1] else affine(b.T, a.T).T
    return a.T @ b


def autocast(*tensors: Tensor) -> Iterator[Tensor]:
    """The tensors in the type that mixed precision asks for, where it is on."""
    device = tensors[0].device.type
    autocast = torch.is_autocast_enabled(device)
    return (tensor.to(torch.get_autocast_dtype(device)) if autocast else tensor for tensor in tensors)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, activation: Activation | None) -> Tensor:
        y = affine(x, weight, bias, activation)
        ctx.activation = activation
        ctx.save_for_backward(x, weight, y if activation is not None else None)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        grad = grad.contiguous()
        if ctx.activation is not None:
            grad = ctx.activation.backward(grad, y)
        to_x = affine(grad, weight.T) if ctx.needs_input_grad[0] else None
        return to_x, inner(grad, x), grad.sum(dim=0), None


def apply_linear(module: nn.Module, x: Tensor, activation: Activation | None = None) -> Tensor:
    """`linear` with the weights of a `torch.nn.Linear`."""
    assert isinstance(module, nn.Linear)
    return linear(x, module.weight, module.bias, activation)


def linear(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation | None = None) -> Tensor:
    """The activation of `torch.nn.functional.linear`; its gradient is first-order only.

    Arguments:
        x: The inputs, with shape (*, C).
        weight: The matrix, with shape (C', C).
        bias: The bias, with shape (C').
        activation: None for none.

    Returns:
        The outputs, with shape (*, C').

    Example:
        >>> linear(torch.ones(2, 3), torch.ones(1, 3), torch.zeros(1))
        tensor([[3.],
                [3.]])
    """
    shape = x.shape[:-1]
    x, weight, bias = autocast(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, activation)
    return y.view(*shape, len(bias))
