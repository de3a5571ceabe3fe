"""Random streams, one for each purpose, none of which coincides with another."""

from __future__ import annotations

import hashlib
import typing
from typing import Literal

import numpy as np

__all__ = ["Purpose", "stream", "stream_seed"]

Purpose = Literal[
    "autoencoder weights",
    "density weights",
    "classifier weights",
    "classifier batches",
    "order of parts",
    "order of examples",
    "step",
    "step of a process",
    "validation samples",
    "subset for a transform",
    "subset for a mixture",
    "subset for kernels",
    "subset for boxes",
    "clusters for boxes",
    "batches for boxes",
    "subset of contexts",
    "mixture components",
    "averaged orders",
    "samples",
    "completions",
    "control images",
    "control centroids",
    "pairs of one label",
    "pairs of two labels",
    "subsets of KID",
    "median distance",
    "folds",
    "parts of held-out codes",
    "validation rows",
    "bootstrap of detections",
    "probes of a volume",
    "dry run of given networks",
    "noise of new rows",
]


def _entropy(purpose: Purpose, seed: int, place: tuple[int, ...]) -> int:
    # By a hash of all of it: a seed sequence of numbers pads with zeros, so that (seed, 3) is the same stream as (seed, 3, 0).
    if purpose not in typing.get_args(Purpose):
        raise ValueError(f"no purpose of a random stream: {purpose!r}")
    return int.from_bytes(hashlib.sha256(repr((purpose, int(seed), *map(int, place))).encode()).digest()[:16], "little")


def stream(purpose: Purpose, seed: int, *place: int) -> np.random.Generator:
    """A random generator of NumPy.

    Arguments:
        purpose: What is drawn from it.
        seed: The row's seed.
        *place: Which of the streams of this purpose, for example the epoch and the rank.

    Example:
        >>> [int(stream("order of parts", 0, *place).integers(1000)) for place in ((3,), (3, 0), (3,))]
        [90, 901, 90]
    """
    return np.random.default_rng(_entropy(purpose, seed, place))


def stream_seed(purpose: Purpose, seed: int, *place: int, bits: int = 63) -> int:
    """The seed of a generator of another library, see `stream`.

    Arguments:
        purpose: What is drawn from it.
        seed: The row's seed.
        *place: Which of the streams of this purpose.
        bits: Its length.
    """
    return _entropy(purpose, seed, place) >> (128 - bits)
