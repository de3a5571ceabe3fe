"""Vectors as their own codes, for fitting a density on data that need no autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pipeline.autoencoders.common.base import Objective
from pipeline.settings import AutoencoderSettings, check_that
from pipeline.training.trainable import Step

__all__ = ["IdentityObjective", "Settings", "build"]


@dataclass(frozen=True, kw_only=True)
class Settings(AutoencoderSettings):
    """Keys of a row with the objective `identity`; none beyond the common ones."""

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuses images.

        Arguments:
            shape: Shape of an example, (D,) for vectors, (0,) if only the file determines it.

        Raises:
            SettingsError: When the data set holds images.
        """
        check_that(
            len(shape) == 1, "dataset", f"'{self.dataset}' holds images, and the objective 'identity' takes vectors; use 'ae'"
        )


class IdentityObjective(Objective):
    """The identity map: nothing to train, no decoder.

    Arguments:
        settings: The row's settings.
        shape: Shape (D,) of a vector, (0,) if only the data determine it.

    Example:
        >>> import torch
        >>> objective = build(Settings(dataset="grid", objective="identity"), shape=(2,), value_range=(-5, 5))
        >>> objective.encode(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 2.]])
    """

    trained = False
    reconstructs = False
    phases = ()

    def __init__(self, settings: Settings, shape: tuple[int, ...]) -> None:
        super().__init__()
        settings.check_shape(shape)
        self.settings = settings
        self.latent_dim = shape[0] or None
        self.decoder = None

    def save(self, folder: Path) -> None:
        """Says why there is neither encoder nor decoder."""
        (folder / "identity").write_text("Vectors are their own codes: there is nothing to encode or decode.\n")

    def encode(self, examples: Tensor) -> Tensor:
        """The vectors themselves, with shape (B, D), as float32."""
        return examples.float()

    def decode(self, codes: Tensor) -> Tensor:
        """The codes themselves, with shape (B, D)."""
        return codes

    def open_dimensions(self, step: Step) -> int:
        """All D dimensions; 0 if only the data determine D."""
        return self.latent_dim or 0


def build(settings: Settings, shape: tuple[int, ...], value_range: tuple[float, float]) -> IdentityObjective:
    """The objective for vectors of a shape (D,)."""
    return IdentityObjective(settings, shape)
