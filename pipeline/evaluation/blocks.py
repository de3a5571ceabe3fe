"""Streams of examples in blocks: repeatable passes, blocks of another length, and the examples of a split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from pipeline.storage.shards import ShardReader, scale_pixels

__all__ = ["Blocks", "count_rows", "rebatch", "unit_blocks"]

Blocks = Callable[[], Iterable[np.ndarray]]  # gives a fresh pass over blocks of rows, each with shape (n, ...)


def count_rows(blocks: Blocks) -> int:
    """Number of rows in a pass over blocks."""
    return sum(len(block) for block in blocks())


def rebatch(blocks: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The same rows in blocks of exactly `rows`, but for the last.

    Example:
        >>> [len(b) for b in rebatch([np.zeros(3), np.zeros(4)], 2)]
        [2, 2, 2, 1]
    """
    pieces: list[np.ndarray] = []
    count = 0
    for block in blocks:
        while len(block):
            part, block = block[: rows - count], block[rows - count :]
            pieces.append(part)
            count += len(part)
            if count == rows:
                yield np.concatenate(pieces)
                pieces, count = [], 0
    if pieces:
        yield np.concatenate(pieces)


def unit_blocks(reader: ShardReader, split: str, limit: int = 0) -> Callable[[], Iterator[np.ndarray]]:
    """A function that gives a new pass over the examples of a split, float32, up to `limit` in all (0 for no limit).

    Images are scaled to 0..1, vectors are as they are.
    """

    def blocks() -> Iterator[np.ndarray]:
        remaining = limit or reader.index.count(split)
        for block in reader.blocks(split):
            examples = block["examples"][:remaining]
            yield scale_pixels(examples, (0.0, 1.0)) if reader.index.kind == "images" else examples
            remaining -= len(examples)
            if remaining <= 0:
                return

    return blocks
