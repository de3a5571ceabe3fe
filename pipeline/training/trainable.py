"""The training loop's model, current step, and record."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from pipeline.system.draws import Randomness

__all__ = ["Step", "Trainable", "Training"]


@dataclass(frozen=True)
class Step:
    """The current step of training, when a loss is computed.

    Attributes:
        index: Steps done before this one.
        epoch: Fractional epoch, index / steps per epoch.
        generator: Source of all randomness of the step, on the CPU. Draw from it by the functions of `pipeline.system.draws`.
            Its numbers follow from (seed, index) and an example's place in the batch. So a resumed run draws the same numbers
            without saved state, on any number of processes.
    """

    index: int
    epoch: float
    generator: Randomness


class Trainable(nn.Module):
    """A network together with the losses that train it.

    Attributes:
        phases: Names of the parts of a step, each with its own optimizers, in order. Most have one.
        muon_rate: Muon's learning rate, as a multiple of AdamW's.
    """

    phases: tuple[str, ...] = ("model",)
    muon_rate: float = 1.0

    def phase_parameters(self, phase: str) -> Iterable[nn.Parameter]:
        """The parameters that the phase's optimizers update."""
        return self.parameters()

    def muon_parameters(self, phase: str) -> Iterable[Tensor]:
        """The phase's parameters that Muon updates; AdamW updates the others."""
        return ()

    def augment(self, batch: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        """The batch that a step trains on, before its first phase; by default as it is."""
        return batch

    def forward(self, phase: str, batch: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        """The loss of a phase under the key "loss", and other values to log, each a scalar.

        Arguments:
            phase: One of `phases`.
            batch: "images" with shape (B, C, H, W) in the range of the data set, or "codes" with shape (B, D); "labels" (B,)
                if there are any.
            step: The current step.
        """
        raise NotImplementedError


@dataclass
class Training:
    """Record of a training run, in addition to the weights.

    Attributes:
        curve: Rows of the training curve: step, epoch, learning_rate, the means of the logged losses since the row before.
        validations: One row per validation: step, epoch, and the numbers of `validate`.
        validation_seconds: When each validation ended, in seconds of the loop; separate, since the rows don't vary across runs.
        best: Step and value of the best validation, if a key was given.
        steps: Steps taken in all.
        seconds: Time spent in the loop, over all pieces of a resumed run.
        seconds_before: Those of them that passed in earlier processes.
        examples: Examples seen.
        resumed_at: Step of the checkpoint that this process resumed from; None for a fresh start.
        ended_by: `epochs`, `max_minutes` or `patience`.
        contest: For the family `auto`, one row per contestant: family, held-out score, seconds, weight in the result.
    """

    curve: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)
    validation_seconds: list[float] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    seconds_before: float = 0.0
    examples: int = 0
    resumed_at: int | None = None
    ended_by: str = "epochs"
    contest: list[dict[str, float | str]] = field(default_factory=list)

    def table(self) -> list[dict[str, float]]:
        """Curve and validations as one table by step: a loss and a validation at the same step share a row."""
        rows = {int(row["step"]): row for row in self.curve}
        validations = {int(row["step"]): row for row in self.validations}
        return [rows.get(step, {"step": step}) | validations.get(step, {}) for step in sorted({*rows, *validations})]
