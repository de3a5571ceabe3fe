"""Muon: steps of orthogonalised momentum, for the weights between hidden layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pipeline.system.devices import has_bfloat16

__all__ = ["Muon", "orthogonalised"]

# Of the quintic x -> a x + b x^3 + c x^5, chosen by Jordan to raise small singular values as fast as possible. Five rounds
# bring most of them into [0.7, 1.2], which trains as well as 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """Roughly the nearest matrices with orthogonal rows or columns: the same singular vectors, singular values close to 1.

    Arguments:
        matrices: A stack of matrices, with shape (N, A, B). The computation is in bfloat16 if the device supports it.

    Returns:
        Matrices of the same shape and type.

    Example:
        >>> orthogonalised(torch.tensor([[[3.0, 0.0], [0.0, -5.0]]])).round()
        tensor([[[ 1.,  0.],
                 [ 0., -1.]]])
    """
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = wide.to(torch.bfloat16 if has_bfloat16(matrices.device) else torch.float32)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)  # no singular value above 1
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if matrices.shape[1] > matrices.shape[2] else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    r"""Muon for parameters that are matrices or stacks of them; matrices of one shape are orthogonalised together.

    .. math:: B \leftarrow \mu B + (1 - \mu) G, \quad W \leftarrow (1 - \eta \lambda) W - 0.2 \, \eta \sqrt{\max(A, B)} \,
        \mathrm{orth}((1 - \mu) G + \mu B)

    A step is about as long as one of Adam, so learning rates are similar. `torch.optim.Muon` with
    `adjust_lr_fn="match_rms_adamw"` takes the same steps, but only for single matrices, one after another.

    References:
        | Muon: An optimizer for hidden layers in neural networks (Jordan et al., 2024)
        | https://kellerjordan.github.io/posts/muon/
        | Muon is Scalable for LLM Training (Liu et al., 2025), for the length of a step
        | https://arxiv.org/abs/2502.16982

    Raises:
        ValueError: For a parameter that isn't a matrix.

    Arguments:
        parameters: Weights between hidden layers, each with shape (\*, A, B), or groups of them. Use AdamW for others.
        lr: The learning rate :math:`\eta`.
        momentum: The decay :math:`\mu` of the mean of gradients.
        weight_decay: The decoupled weight decay :math:`\lambda`.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.ndim < 2:
                raise ValueError(f"Muon moves matrices, not a parameter with shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Takes one step, after a call of the closure, if any; returns its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            of_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    of_shape.setdefault(parameter.shape[-2:], []).append(parameter)
            for shape, parameters in of_shape.items():
                self._move(parameters, shape, group)
        return loss

    def _move(self, parameters: list[Tensor], shape: torch.Size, group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["mean"] = torch.zeros_like(parameter)
        means = [self.state[parameter]["mean"] for parameter in parameters]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, means, group["momentum"])  # Nesterov's
        steps = orthogonalised(torch.cat([value.reshape(-1, *shape) for value in ahead]))
        parts = steps.split([math.prod(parameter.shape[:-2]) for parameter in parameters])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(
            parameters,
            [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)],
            alpha=-0.2 * group["lr"] * math.sqrt(max(shape)),
        )
