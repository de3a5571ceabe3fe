"""Images to explore an autoencoder by on the page: truncated codes, changed codes, images in between, and a map of codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["exploration"]

REAL = 20  # test images themselves
SHOWN = 12  # of these, those with truncated codes
CHANGED, DIMENSIONS = 3, 8  # test images, and the first numbers of their codes, that are changed
PAIRED = 6  # test images with all images between two of them
STEPS = 9  # values of a changed number; images from one end to the other
SPREAD = 2.5  # standard deviations that a number is changed by, at most
TRUNCATIONS = 12  # lengths of truncated codes, at most
MAP_SIDE = 28  # pixels of an image on the map

Encode = Callable[[Tensor], Tensor]


def exploration(
    images: NDArray[np.float32], labels: NDArray[np.integer] | None, encode: Encode, decode: Encode
) -> dict[str, NDArray[Any]]:
    """What the page's sliders show of an autoencoder, decoded once and for all.

    Arguments:
        images: Test images in 0..1 with shape (M, C, H, W), the first ones of the split.
        labels: Their labels with shape (M,), if any.
        encode: Turns images into codes (M, D).
        decode: Turns codes into images in 0..1.

    Returns:
        `ks` (K,) and `truncated` (K, n, C, H, W): images decoded from the first k numbers of a code, the others zero.
        `values` (d, V) and `changed` (m, d, V, C, H, W): images decoded after one number of a code is set to another value.
        `weights` (V,) and `between` (P, V, C, H, W): images between two test images, for each pair i < j of the first ones.
        `originals` (n, C, H, W): test images. `map` (M, C, H', W'): all of them, small. `codes` (M, 2): the first two numbers
        of their codes. `components` (M, 2): the codes' first two principal components. Images are 8-bit.
    """
    codes = encode(torch.from_numpy(images)).cpu().numpy().astype(np.float32)  # (M, D)
    dim = codes.shape[1]
    shown = codes[:SHOWN]
    found: dict[str, NDArray[Any]] = {"originals": _bytes(images[:REAL])}

    found["ks"] = np.unique(np.rint(np.linspace(1, dim, min(dim, TRUNCATIONS))).astype(np.int64))
    kept = np.arange(dim) < found["ks"][:, None, None]  # (K, 1, D)
    found["truncated"] = _decoded(np.where(kept, shown, 0), decode)

    number = min(dim, DIMENSIONS)
    mean, deviation = codes.mean(0), codes.std(0)
    steps = np.linspace(-SPREAD, SPREAD, STEPS)
    values = mean[:number, None] + deviation[:number, None] * steps  # (d, V)
    changed = np.broadcast_to(codes[:CHANGED, None, None], (len(codes[:CHANGED]), number, STEPS, dim)).copy()
    for i in range(number):
        changed[:, i, :, i] = values[i]
    found |= {"values": values.astype(np.float32), "changed": _decoded(changed, decode)}

    ends = codes[:PAIRED]
    weights = np.linspace(0, 1, STEPS)
    first, last = np.triu_indices(len(ends), 1)
    between = ends[first][:, None] * (1 - weights[:, None]) + ends[last][:, None] * weights[:, None]  # (P, V, D)
    found |= {"weights": weights, "between": _decoded(between, decode)}

    centred = codes.astype(np.float64) - codes.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]  # a sign that doesn't depend on the library
    found["map"] = _small(images)
    found["codes"] = np.pad(codes[:, :2], ((0, 0), (0, max(2 - dim, 0))))
    components = centred @ axes.T
    found["components"] = np.pad(components, ((0, 0), (0, 2 - components.shape[1]))).astype(np.float32)
    if labels is not None:
        found["labels"] = labels.astype(np.int64)
    return found


def _decoded(codes: NDArray[np.floating], decode: Encode) -> NDArray[np.uint8]:
    """Images (.., C, H, W) of codes (.., D), decoded a few hundred at a time."""
    flat = torch.from_numpy(codes.reshape(-1, codes.shape[-1]).astype(np.float32))
    images = np.concatenate([_bytes(decode(part).cpu().numpy()) for part in flat.split(250)])
    return images.reshape(*codes.shape[:-1], *images.shape[1:])


def _bytes(images: NDArray[np.floating]) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = np.rint(images.clip(0, 1) * 255).astype(np.uint8)
    return pixels


def _small(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Images (M, C, H, W) as thumbnails (M, C, H', W'), at most `MAP_SIDE` pixels high and wide: means of areas."""
    side = max(images.shape[2:])
    if side <= MAP_SIDE:
        return _bytes(images)
    size = [max(1, round(length * MAP_SIDE / side)) for length in images.shape[2:]]
    return _bytes(torch.nn.functional.interpolate(torch.from_numpy(images), size, mode="area").numpy())
