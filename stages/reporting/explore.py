"""What the page's sliders show: sprites of the images that stages decoded, and the numbers that go with them."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.settings import Params
from stages.arrays import load_arrays

__all__ = ["Sprite", "explorations", "ordered_samples", "sprite"]

MOST_BYTES = 3_000_000  # of one data set on the page
TILES_ACROSS = 24
PHOTOGRAPH_PX = 32  # from this side length on, images are written as JPEG
QUALITY = 82  # of JPEG
PARTS = ("truncated", "changed", "between")


@dataclass(frozen=True)
class Sprite:
    """Images of one size in one picture, row after row.

    Attributes:
        data: The picture, as a data URI.
        columns: Images in a row.
        width: Pixels of one image across.
        height: Pixels of one image from top to bottom.
        gap: Pixels between two images.
        count: Number of images.
    """

    data: str
    columns: int
    width: int
    height: int
    gap: int
    count: int

    @property
    def pixels(self) -> tuple[int, int]:
        """Width and height of the picture."""
        rows = -(-self.count // self.columns)
        return self.columns * (self.width + self.gap) - self.gap, rows * (self.height + self.gap) - self.gap


def sprite(images: NDArray[np.uint8], columns: int = TILES_ACROSS, gap: int = 0) -> Sprite:
    """A sprite of 8-bit images (n, C, H, W), C = 1 or 3: PNG if they are small, JPEG otherwise. Gaps are grey."""
    from PIL import Image

    n, channels, height, width = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 128, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)  # CHW => HWC
    picture = Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas)
    kind = "jpeg" if max(height, width) >= PHOTOGRAPH_PX else "png"
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": QUALITY} if kind == "jpeg" else {"optimize": True}))
    data = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    return Sprite(data, columns, width, height, gap, n)


def _tiles(picture: Sprite) -> dict[str, Any]:
    """A sprite as the page's script reads it."""
    return {"data": picture.data, "columns": picture.columns, "width": picture.width, "height": picture.height}


def explorations(params: Params, rows: list[str], most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """What can be explored of the autoencoders of a data set, as the page's script reads it; empty if nothing can.

    Arguments:
        params: All tables.
        rows: Rows of `autoencoders` of one data set: the first plain one and the first incremental one come first.
        most_bytes: Bytes of all sprites; rows that don't fit are left out.
    """
    found: dict[str, Any] = {}
    left = most_bytes
    for row in _in_order(params, rows):
        arrays = load_arrays("train", row, "exploration")
        if arrays is None:
            continue
        values = arrays.values
        sprites = {name: sprite(values[name].reshape(-1, *values[name].shape[-3:])) for name in PARTS}
        shared = {} if found else {"originals": sprite(values["originals"]), "map": sprite(values["map"])}
        size = sum(len(picture.data) for picture in (*sprites.values(), *shared.values()))
        if size > left:
            continue
        left -= size
        if not found:
            labels = {"labels": values["labels"].tolist()} if "labels" in values else {}
            shown = {name: int(values[name].shape[0]) for name in ("changed",)}
            found = {name: _tiles(picture) for name, picture in shared.items()} | labels | {"rows": {}, "shown": shown}
        found["rows"][row] = {
            **{name: _tiles(picture) for name, picture in sprites.items()},
            "ks": values["ks"].tolist(),
            "truncated_images": int(values["truncated"].shape[1]),
            "values": _rounded(values["values"]),
            "steps": len(values["weights"]),
            "ends": round((1 + math.sqrt(1 + 8 * len(values["between"]))) / 2),  # n (n - 1) / 2 pairs
            "codes": _rounded(values["codes"]),
            "components": _rounded(values["components"]),
        }
    return found


def _in_order(params: Params, rows: list[str]) -> list[str]:
    """The first plain autoencoder, the first incremental one, then the others."""
    kinds: dict[bool, list[str]] = {False: [], True: []}
    for row in rows:
        kinds[getattr(params.autoencoder(row), "incremental", None) is not None].append(row)
    first = [group[0] for group in kinds.values() if group]
    return first + [row for row in rows if row not in first]


def ordered_samples(row: str, count: int = 100) -> dict[str, Any]:
    """The first samples of a row with their places by likelihood, highest first; empty if it has no images or no likelihood."""
    arrays = load_arrays("sample", row, "samples")
    values: Mapping[str, NDArray[Any]] = arrays.values if arrays is not None else {}
    if "log_prob" not in values or values["samples"].dtype != "uint8":
        return {}
    likelihoods = values["log_prob"][:count].astype(np.float64)
    order = np.argsort(-likelihoods, kind="stable").tolist()
    return {**_tiles(sprite(values["samples"][:count])), "order": order, "log_prob": [round(float(v), 2) for v in likelihoods]}


def _rounded(values: NDArray[Any]) -> list[Any]:
    """Numbers with few digits, as nested lists."""
    rounded: list[Any] = np.round(values.astype(np.float64), 3).tolist()
    return rounded
