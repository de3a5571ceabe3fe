"""Backward passes written by hand, which have no derivative of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.errors import PipelineError

__all__ = ["first_order"]


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a backward pass, so that a second derivative is refused where PyTorch would take the gradient for a constant."""
    once = once_differentiable(backward)

    def checked(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # as create_graph=True has it
            raise PipelineError("this density has first derivatives only: leave out create_graph=True")
        return once(ctx, *gradients)

    return checked
