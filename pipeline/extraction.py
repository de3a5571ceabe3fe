"""Shards -> latent codes on disk, streamed and split over ranks."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import torch

from pipeline.storage.codes import CodeIndex, CodeReader, write_part
from pipeline.storage.columns import VectorMoments
from pipeline.storage.parts import SPLITS, Part, write_index
from pipeline.storage.shards import ShardIndex, ShardReader, scale_pixels
from pipeline.system.files import sha256_file
from pipeline.system.progress import Progress
from pipeline.system.ranks import Ranks, shared_folder

__all__ = ["extract_codes"]


@torch.no_grad()
def extract_codes(
    shards: str | Path, autoencoder: str | Path, folder: str | Path, ranks: Ranks
) -> tuple[CodeIndex, ShardIndex]:
    """Writes the codes of every split, with the decoder.

    Each rank encodes its share of the shards, always in the same blocks, so the codes don't depend on the number of ranks.

    Arguments:
        shards: Folder of shards.
        autoencoder: Folder with encoder and decoder, an encoder alone, or neither for vectors.
        folder: Where the codes go; replaced as a whole.
        ranks: This process among its peers.

    Returns:
        The index of the codes, and that of the shards.

    Raises:
        DataError: When an input is damaged, or a code isn't finite.
    """
    reader = ShardReader(shards)
    autoencoder, folder = Path(autoencoder), Path(folder)
    encoder = None
    if reader.index.kind == "images":
        from pipeline.autoencoders.common.foreign import load_encoder

        encoder = load_encoder(autoencoder).to(ranks.device)
    with shared_folder(folder, ranks) as temporary:
        work = [(split, number) for split in SPLITS for number in range(len(reader.index.parts(split)))]
        rank_parts: dict[str, dict[str, object]] = {}
        rank_moments: dict[int, VectorMoments] = {}  # of each file of training codes
        with Progress(len(work), f"encoding {folder.name}", unit="shards", quiet=not ranks.first) as progress:
            for i in ranks.share(len(work)):
                split, number = work[i]
                codes, kept = [], collections.defaultdict[str, list[np.ndarray]](list)
                for block in reader.blocks(split, [number]):
                    examples = block["examples"]
                    if encoder is not None:
                        images = torch.from_numpy(scale_pixels(examples, reader.index.value_range)).to(ranks.device)
                        examples = encoder(images).float().cpu().numpy()
                    codes.append(examples)
                    for name in ("labels", "context"):
                        if name in block:
                            kept[name].append(block[name])
                carried = {name: np.concatenate(arrays) for name, arrays in kept.items()}
                vectors = np.concatenate(codes)
                rank_parts[f"{split}/{number}"] = vars(write_part(temporary, split, number, vectors, **carried))
                if split == "train":
                    rank_moments[number] = VectorMoments(vectors.shape[1])
                    rank_moments[number].update(vectors)
                progress.advance(ranks.world)
        parts: dict[str, dict[str, object]] = {}
        moments: dict[int, VectorMoments] = {}
        for other_parts, other_moments in ranks.gather((rank_parts, rank_moments)):
            parts |= other_parts
            moments |= other_moments
        if ranks.first:
            index = _write_index(temporary, reader, autoencoder, parts, moments)
    return (index if ranks.first else CodeReader(folder).index), reader.index


def _write_index(
    folder: Path,
    reader: ShardReader,
    autoencoder: Path,
    parts: dict[str, dict[str, object]],
    moments_of: dict[int, VectorMoments],
) -> CodeIndex:
    by_split = {
        split: tuple(Part(**parts[f"{split}/{n}"]) for n in range(len(reader.index.parts(split))))  # type: ignore[arg-type]
        for split in SPLITS
    }
    decoder = None
    if reader.index.kind == "images":
        from pipeline.autoencoders.common.foreign import copy_decoder

        decoder = copy_decoder(autoencoder, folder)
    # Merged in the order of the files, so they don't depend on the number of ranks.
    moments = VectorMoments(len(moments_of[0].mean))
    for number in sorted(moments_of):
        moments.merge(moments_of[number])
    index = CodeIndex(
        dim=len(moments.mean),
        mean=tuple(moments.mean.tolist()),
        std=tuple(moments.std.tolist()),
        source_digest=reader.index.digest,
        decoder_sha256=None if decoder is None else sha256_file(decoder),
        value_range=reader.index.value_range,
        label_names=reader.index.label_names,
        context=reader.index.context,
        columns=reader.index.columns,
        **by_split,
    )
    write_index(folder, index)
    return index
