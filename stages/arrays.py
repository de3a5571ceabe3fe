"""Small files that a stage writes for `report`: arrays, from which it draws the pictures, and the record of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import PipelineError
from pipeline.system.files import atomic_file, read_json, sha256_file
from stages import workspace

__all__ = ["PER_EXAMPLE", "SavedArrays", "as_bytes", "check_output", "load_arrays", "read_run", "save_arrays"]

PER_EXAMPLE = "per-example"  # the arrays whose means are the metrics of the same names, to compare rows point by point


@dataclass(frozen=True)
class SavedArrays:
    """Arrays by name, with lines of text that belong to them.

    Attributes:
        values: The arrays.
        names: Names of the entries along the first axis of one of the arrays, such as pairs of images.
    """

    values: Mapping[str, NDArray[Any]]
    names: Sequence[str] = field(default=())


def as_bytes(images: ArrayLike) -> NDArray[np.uint8]:
    """Images in 0..1 as 8-bit values, to keep files small.

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


def read_run(stage: str, row: str) -> dict[str, Any]:
    """Seconds, memory and tracked run of a stage, and the digests of its small files; empty if there is no record.

    Raises:
        PipelineError: When the file is damaged; the message names the stage to run.
    """
    path = workspace.run_file(stage, row)
    if not path.exists():
        return {}
    try:
        run = read_json(path) if path.is_file() else None
    except PipelineError:
        run = None
    numbers = ("seconds", "peak_memory_mib", "parameters")
    if (
        not isinstance(run, dict)
        or not isinstance(run.get("outputs", {}), dict)
        or any(not isinstance(run.get(key, 0), (int, float)) for key in numbers)
    ):
        raise PipelineError(f"{path} is damaged; {workspace.rerun(stage, row)}")
    return dict(run)


def check_output(stage: str, row: str, path: Path) -> None:
    """Compares a small file with the digest that the stage's run recorded.

    Raises:
        PipelineError: When the file isn't what the stage wrote; the message names the stage to run.
    """
    digest = read_run(stage, row).get("outputs", {}).get(path.as_posix())
    if not path.is_file() or (digest is not None and digest != sha256_file(path)):
        raise PipelineError(f"{path} isn't what {stage} {row} wrote; {workspace.rerun(stage, row)}")


def load_arrays(stage: str, row: str, name: str) -> SavedArrays | None:
    """What `save_arrays` wrote; None if the stage wrote no file of that name.

    Raises:
        PipelineError: When the file can't be read, or isn't what the stage wrote.
    """
    from safetensors import SafetensorError, safe_open

    path = workspace.arrays_folder(stage, row) / f"{name}.safetensors"
    if not path.exists():
        return None
    check_output(stage, row, path)
    try:
        with safe_open(path, "numpy") as file:
            values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            return SavedArrays(values, json.loads((file.metadata() or {}).get("names", "[]")))
    except (SafetensorError, OSError, ValueError) as error:
        problem = " ".join(str(error).split())[:200]
        raise PipelineError(f"{path} can't be read ({problem}); {workspace.rerun(stage, row)}") from None
