r"""Patches of natural images as vectors: the preprocessing of BSDS300 (section 4.1.2), and its way back.

A patch of 8x8 grey pixels g in 0..255 becomes 63 numbers, as in Uria, Murray and Larochelle, "RNADE: the real-valued neural
autoregressive density-estimator", NIPS 2013 (natural image patches; after Zoran and Weiss, 2011), and in all work that
reports on BSDS300 since:

.. math:: v_i = \frac{g_i + u_i}{256}, \quad u_i \sim U(0, 1), \qquad
    x_i = v_i - \frac{1}{64} \sum_{j=1}^{64} v_j, \quad i = 1, \dots, 63

in raster order, without the last pixel (bottom right), which is minus the sum of the others. A log-likelihood in this space
is in nats and belongs to the 63 numbers x.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.errors import DataError

__all__ = ["PATCH_PX", "PatchPool", "dequantise", "preprocess", "restore", "to_grey"]

PATCH_PX = 8


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """Grey levels 0.299 R + 0.587 G + 0.114 B, rounded to integers (halves up): noise in [0, 1) then dequantises them.

    Arguments:
        pixels: RGB pixels, uint8 with shape (H, W, 3).

    Returns:
        Grey levels, uint8 with shape (H, W).

    Example:
        >>> to_grey(np.array([[[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8))
        array([[255,  76, 150,  29]], dtype=uint8)
    """
    # In integers: the halves that three decimals allow are then rounded the same way on every machine.
    sums = pixels.astype(np.int32) @ np.array([299, 587, 114], np.int32)
    grey: np.ndarray = ((sums + 500) // 1000).astype(np.uint8)
    return grey


class PatchPool:
    """Grey images, of any sizes, from which patches are drawn at uniform positions.

    Arguments:
        images: Grey images, each uint8 with shape (H, W).
        names: Name of each image in messages.

    Raises:
        DataError: When an image is smaller than 8x8; the message names it.

    Example:
        >>> pool = PatchPool([np.arange(64, dtype=np.uint8).reshape(8, 8)], ["ramp"])
        >>> pool.draw(np.array([0, 0]), np.random.default_rng(0)).shape
        (2, 8, 8)
    """

    def __init__(self, images: Sequence[np.ndarray], names: Sequence[str]) -> None:
        for image, name in zip(images, names, strict=True):
            if min(image.shape) < PATCH_PX:
                raise DataError(f"{name}: {image.shape[0]}x{image.shape[1]} pixels are too few for a patch of 8x8")
        # All images as one array of pixels, to gather patches of many images in one step.
        self.pixels = np.concatenate([image.ravel() for image in images])  # (sum of H * W,)
        self.starts = np.cumsum([0, *(image.size for image in images)])[:-1]
        self.heights = np.array([image.shape[0] for image in images])
        self.widths = np.array([image.shape[1] for image in images])

    def draw(self, members: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """One patch per image number, at independent uniform positions.

        Arguments:
            members: Numbers of the images, with shape (N,).
            generator: Source of the positions.

        Returns:
            Patches, uint8 with shape (N, 8, 8).
        """
        tops = generator.integers(self.heights[members] - PATCH_PX + 1)
        lefts = generator.integers(self.widths[members] - PATCH_PX + 1)
        return self.extract(members, tops, lefts)

    def extract(self, members: np.ndarray, tops: np.ndarray, lefts: np.ndarray) -> np.ndarray:
        """The patches at given positions.

        Arguments:
            members: Numbers of the images, with shape (N,).
            tops: Rows of the top left pixels, with shape (N,).
            lefts: Columns of the top left pixels, with shape (N,).

        Returns:
            Patches, uint8 with shape (N, 8, 8).
        """
        side = np.arange(PATCH_PX)
        widths = self.widths[members]
        rows = (self.starts[members] + tops * widths + lefts)[:, None] + side * widths[:, None]  # (N, 8)
        patches: np.ndarray = self.pixels[rows[:, :, None] + side]  # (N, 8, 8)
        return patches


def dequantise(patches: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Patches with noise in [0, 1) added to the grey levels, as 63 numbers each; the formula is in the module's docstring.

    Arguments:
        patches: Grey levels 0..255 with shape (N, 8, 8).
        noise: Noise in [0, 1) with shape (N, 8, 8).

    Returns:
        Vectors, float32 with shape (N, 63).

    Example:
        >>> vectors = dequantise(np.full((1, 8, 8), 100, np.uint8), np.zeros((1, 8, 8)))
        >>> vectors.shape, float(abs(vectors).max())
        ((1, 63), 0.0)
    """
    values = (patches + noise).reshape(-1, PATCH_PX * PATCH_PX) / 256.0  # (N, 8, 8) -> (N, 64)
    values -= values.mean(axis=1, keepdims=True)
    vectors: np.ndarray = values[:, :-1].astype(np.float32)
    return vectors


def preprocess(patches: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Patches as vectors, with noise from `generator`.

    Arguments:
        patches: Grey levels 0..255 with shape (N, 8, 8).
        generator: Source of the noise.

    Returns:
        Vectors, float32 with shape (N, 63).
    """
    return dequantise(patches, generator.random(patches.shape))


def restore(vectors: np.ndarray) -> np.ndarray:
    """Vectors as patches of mean 0; the last pixel is minus the sum of the others.

    Arguments:
        vectors: Vectors with shape (N, 63).

    Returns:
        Patches with shape (N, 8, 8), in units of 256 grey levels.

    Example:
        >>> restore(np.ones((1, 63)))[0, -1]
        array([  1.,   1.,   1.,   1.,   1.,   1.,   1., -63.])
    """
    patches = np.concatenate([vectors, -vectors.sum(axis=1, keepdims=True)], axis=1)
    return patches.reshape(-1, PATCH_PX, PATCH_PX)  # (N, 64) -> (N, 8, 8)
