"""The one loop for all that is trained: schedule, precision, ranks, resume. (Being written: the protocol below is fixed.)"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Step", "Trainable"]


@dataclass(frozen=True)
class Step:
    """Where training stands when a loss is computed.

    Attributes:
        index: Steps done before this one.
        epoch: Fractional epoch, index / steps an epoch.
        generator: Source of all randomness of the step. It is seeded anew from (seed, index, rank) at every step, so a resumed
            run draws the same numbers with no state to keep. It lives on the CPU.
    """

    index: int
    epoch: float
    generator: torch.Generator


class Trainable(nn.Module):
    """A network together with the losses that train it.

    Attributes:
        phases: Names of the parts of a step, each with its own optimizer, in order. Most have one.
    """

    phases: tuple[str, ...] = ("model",)

    def phase_parameters(self, phase: str) -> Iterable[nn.Parameter]:
        """The parameters that the phase's optimizer moves."""
        return self.parameters()

    def forward(self, phase: str, batch: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        """The loss of a phase under the key "loss", and what else is to be logged, each a scalar.

        Arguments:
            phase: One of `phases`.
            batch: "images" with shape (B, C, H, W) in the range of the data set, or "codes" with shape (B, D); "labels" (B,) where there are any.
            step: Where training stands.
        """
        raise NotImplementedError
