"""Small arrays that a stage leaves, of which `report` draws the page's pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import PipelineError
from pipeline.system.files import atomic_file
from stages import workspace

__all__ = ["Arrays", "as_bytes", "load_arrays", "save_arrays"]


@dataclass(frozen=True)
class Arrays:
    """Arrays by name, and lines of text that belong to them.

    Attributes:
        values: The arrays.
        names: Names of what lies along the first axis of some array, such as pairs of images.
    """

    values: Mapping[str, NDArray[Any]]
    names: Sequence[str] = field(default=())


def as_bytes(images: ArrayLike) -> NDArray[np.uint8]:
    """Images in 0..1 as 8 bits a value, to be kept small.

    Example:
        >>> as_bytes([0.0, 0.5, 1.0]).tolist()
        [0, 128, 255]
    """
    pixels: NDArray[np.uint8] = np.rint(np.asarray(images, dtype=np.float64).clip(0, 1) * 255).astype(np.uint8)
    return pixels


def save_arrays(stage: str, row: str, name: str, values: Mapping[str, NDArray[Any]], names: Sequence[str] = ()) -> Path:
    """Writes arrays as `NAME.safetensors` into the folder of a stage's row; the same arrays give the same bytes."""
    from safetensors.numpy import save_file

    path = workspace.arrays_folder(stage, row) / f"{name}.safetensors"
    with atomic_file(path) as temporary:
        # One entry of metadata: the order of several isn't fixed.
        save_file(
            {key: np.ascontiguousarray(array) for key, array in values.items()}, temporary, {"names": json.dumps([*names])}
        )
    return path


def load_arrays(stage: str, row: str, name: str) -> Arrays | None:
    """What `save_arrays` wrote; None where the stage left nothing of that name.

    Raises:
        PipelineError: When the file can't be read.
    """
    from safetensors import SafetensorError, safe_open

    path = workspace.arrays_folder(stage, row) / f"{name}.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            return Arrays(values, json.loads((file.metadata() or {}).get("names", "[]")))
    except (SafetensorError, OSError, ValueError) as error:
        raise PipelineError(f"{path} can't be read ({error}); run `dvc repro -f {stage}@{row}`") from None
