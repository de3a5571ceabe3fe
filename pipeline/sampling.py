"""Density -> samples as shards: codes and, with a decoder, images. They don't depend on the number of ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.autoencoders.common.network import Decoder
from pipeline.densities import Density
from pipeline.densities.common.context import LABELS, Context
from pipeline.errors import DataError
from pipeline.settings import SamplingSettings
from pipeline.storage.codes import CodeReader
from pipeline.storage.columns import Column, from_codes
from pipeline.storage.parts import ContextColumn, Part, write_index
from pipeline.storage.shards import ShardIndex, ShardReader, ShardWriter, to_unit
from pipeline.system.progress import Progress
from pipeline.system.ranks import Ranks, shared_folder
from pipeline.system.streams import stream_seed

__all__ = ["Samples", "draw", "range_remark", "write_samples"]

DECODED = 250  # codes decoded at a time
OVERFLOW_SHARE = 0.01  # of the codes of a shard that may overflow float32; these are drawn again
OVERFLOW_ROUNDS = 10
COMPARED = 100_000  # training codes, the first of the split, that give the range to compare samples with
FAR = 10  # a code this many ranges outside is far


class Samples(NamedTuple):
    """Samples of one shard, float32; rows of a table may be float64.

    Attributes:
        examples: Images in 0..1, with shape (n, C, H, W), rows of a table, or the codes themselves.
        codes: The codes, with shape (n, D).
        context: Their contexts, with shape (n, columns), if the density is conditioned.
    """

    examples: np.ndarray
    codes: np.ndarray
    context: np.ndarray | None


@torch.no_grad()
def draw(
    density: Density,
    decoder: Decoder | None,
    count: int,
    seed: int,
    number: int = 0,
    context: Tensor | None = None,
    columns: Sequence[Column] = (),
) -> Samples:
    """Draws one shard of samples.

    Arguments:
        density: The density of the codes.
        decoder: The decoder from codes to images; None if codes are the data.
        count: Number of samples n.
        seed: Seed of all draws.
        number: Number of the shard; each shard has its own generator, seeded by (seed, number).
        context: One context for all samples of a density that is conditioned, with shape (columns,); by default contexts are
            drawn at the frequencies of the training codes.
        columns: Columns of the table that the codes are rows of.
    """
    device = density.shift.device
    generator = torch.Generator().manual_seed(stream_seed("samples", seed, number))
    contexts = None
    if density.context is not None:
        contexts = density.context.draw(count, generator) if context is None else context.to(device).expand(count, -1)
    codes = _finite_codes(density, count, generator, contexts)
    drawn = codes.cpu().numpy(), None if contexts is None else contexts.float().cpu().numpy()
    if decoder is None:
        return Samples(from_codes(columns, drawn[0]), *drawn)
    images = [to_unit(decoder(part.to(device)), decoder.value_range).cpu().numpy() for part in codes.split(DECODED)]
    return Samples(np.concatenate(images), *drawn)


def _finite_codes(density: Density, count: int, generator: torch.Generator, contexts: Tensor | None) -> Tensor:
    # Far from its data a mixture may have a standard deviation so large that what is drawn overflows float32. Such a code has
    # no place in a file; a few are drawn again, with a message. If there are many, the density has diverged and is refused.
    codes = density.sample(count, generator, contexts).float()
    bad = ~torch.isfinite(codes).all(dim=1)
    overflowed = int(bad.sum())
    if 0 < overflowed <= OVERFLOW_SHARE * count:
        print(f"{overflowed} of {count} codes overflowed float32 and were drawn again", file=sys.stderr)
        for _ in range(OVERFLOW_ROUNDS):
            codes[bad] = density.sample(int(bad.sum()), generator, None if contexts is None else contexts[bad]).float()
            bad = ~torch.isfinite(codes).all(dim=1)
            if not bad.any():
                break
    return codes


def write_samples(
    density: Density,
    decoder: Decoder | None,
    settings: SamplingSettings,
    folder: str | Path,
    ranks: Ranks,
    columns: Sequence[Column] = (),
) -> ShardIndex:
    """Writes shards of samples; each rank draws its share of them. Labels and other contexts are next to their samples.

    Arguments:
        density: The density of the codes.
        decoder: The decoder from codes to images; None if codes are the data.
        settings: The section `sampling`.
        folder: Where the shards go; replaced as a whole.
        ranks: This process among its peers.
        columns: Columns of the table that the codes are rows of.

    Raises:
        DataError: When a sample isn't finite.
    """
    folder = Path(folder)
    sizes = list(_sizes(settings.count, settings.shard_examples))
    dtype: Literal["float32", "float64"] = "float32" if all(column.plain for column in columns) else "float64"
    with shared_folder(folder, ranks) as temporary:
        rank_parts: dict[int, dict[str, object]] = {}
        with Progress(settings.count, f"sampling {folder.name}", unit="samples", quiet=not ranks.first) as progress:
            for number in ranks.share(len(sizes)):
                examples, codes, contexts = draw(density, decoder, sizes[number], settings.seed, number, columns=columns)
                if not np.isfinite(examples).all():
                    unbounded = getattr(density.options, "max_log_scale", 0.0) is None
                    remedy = "max_log_scale: 2.0 or a lower learning_rate" if unbounded else "a lower learning_rate"
                    raise DataError(f"samples of {folder.name} aren't finite: the density has diverged; fit it with {remedy}")
                if settings.rounding == "8-bit" and decoder is not None:
                    examples = np.rint(examples * np.float32(255)) / np.float32(255)
                with ShardWriter(temporary, "samples", settings.shard_examples, first=number) as writer:
                    writer.write(examples=examples.astype(dtype), codes=codes, **_carried(density.context, contexts))
                rank_parts[number] = vars(writer.shards[0])
                progress.advance(sizes[number] * ranks.world)
        shards: dict[int, dict[str, object]] = {}
        for parts in ranks.gather(rank_parts):
            shards |= parts
        kind, shape, value_range = "vectors", (len(columns) or density.dim,), None
        if decoder is not None:
            kind, shape, value_range = "images", decoder.image_shape, (0.0, 1.0)  # type: ignore[assignment]
        index = ShardIndex(
            kind=kind,  # type: ignore[arg-type]
            shape=shape,
            dtype=dtype,
            value_range=value_range,
            label_names=_words(density.context, LABELS),
            columns=tuple(columns),
            context=tuple(ContextColumn(name=name, words=_words(density.context, name)) for name in _columns(density.context)),
            samples=tuple(Part(**shards[i]) for i in range(len(sizes))),  # type: ignore[arg-type]
        )
        if ranks.first:
            write_index(temporary, index)
    return index


def _columns(context: Context | None) -> list[str]:
    """Names of the columns of a context without the labels, which shards hold by themselves."""
    return [] if context is None else [name for name in context.names if name != LABELS]


def _carried(context: Context | None, contexts: np.ndarray | None) -> dict[str, np.ndarray]:
    """Labels (n,) and other columns (n, C) of contexts, as shards hold them."""
    if context is None or contexts is None:
        return {}
    by_name = dict(zip(context.names, contexts.T, strict=True))
    arrays = {"labels": by_name[LABELS].astype(np.int64)} if LABELS in by_name else {}
    others = [by_name[name] for name in _columns(context)]
    return arrays | ({"context": np.stack(others, axis=1)} if others else {})


def _words(context: Context | None, name: str) -> tuple[str, ...] | None:
    """What the values 0, 1, .. of a column of categories are called; None for numbers, or without the column."""
    column = next((column for column in (context.columns if context else ()) if column.name == name), None)
    if column is None or not column.levels:
        return None
    return tuple(column.word(float(value)) for value in range(int(column.levels[-1]) + 1))


def range_remark(samples: ShardReader, codes: CodeReader) -> str:
    """A one-line warning if sampled codes are far outside the range of the training codes, otherwise an empty string.

    Arguments:
        samples: Shards of samples, with their codes.
        codes: The training codes of the density.
    """
    blocks = [block["codes"] for block in codes.blocks("train", COMPARED)]
    low, high = np.min([b.min(0) for b in blocks], axis=0), np.max([b.max(0) for b in blocks], axis=0)  # (D) each
    margin = FAR * (high.astype(np.float64) - low)
    far, furthest = 0, (0.0, 0, 0.0)  # excess in units of the margin, dimension, value
    for block in samples.blocks("samples"):
        drawn = block["codes"].astype(np.float64)  # (n, D)
        excess = np.maximum(drawn - high, low - drawn) / np.maximum(margin, np.finfo(np.float32).tiny)
        far += int((excess > 1).any(1).sum())
        row, dimension = np.unravel_index(excess.argmax(), excess.shape)
        furthest = max(furthest, (float(excess[row, dimension]), int(dimension), float(drawn[row, dimension])))
    if not far:
        return ""
    _, dimension, value = furthest
    return (
        f"{far} of {samples.index.count('samples')} codes lie far outside the range of the training codes, the furthest at "
        f"{value:.2g} in dimension {dimension} (counted from 0), where those lie in {low[dimension]:.2g}..{high[dimension]:.2g}"
        ": the density has diverged there; fit it with a lower learning_rate, or an lde with max_log_scale: 2.0"
    )


def _sizes(count: int, most: int) -> Iterator[int]:
    while count > 0:
        yield min(count, most)
        count -= most
