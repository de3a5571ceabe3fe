"""Shards -> latent codes on disk, streamed and split over ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from pipeline.errors import DataError
from pipeline.storage.codes import CodeIndex, CodeReader, VectorMoments, write_part
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
        autoencoder: Folder with `encoder.safetensors` and `decoder.safetensors`, or neither for vectors.
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
        from pipeline.autoencoders.common.network import Encoder

        encoder = Encoder.load(autoencoder / "encoder.safetensors").to(ranks.device)
    with shared_folder(folder, ranks) as temporary:
        work = [(split, number) for split in SPLITS for number in range(len(reader.index.parts(split)))]
        rank_parts = {}
        with Progress(len(work), f"encoding {folder.name}", unit="shards", quiet=not ranks.first) as progress:
            for i in ranks.share(len(work)):
                split, number = work[i]
                codes, labels = [], []
                for block in reader.blocks(split, [number]):
                    examples = block["examples"]
                    if encoder is not None:
                        images = torch.from_numpy(scale_pixels(examples, reader.index.value_range)).to(ranks.device)
                        examples = encoder(images).float().cpu().numpy()
                    codes.append(examples)
                    labels.append(block.get("labels"))
                joined = None if labels[0] is None else np.concatenate([label for label in labels if label is not None])
                rank_parts[f"{split}/{number}"] = vars(write_part(temporary, split, number, np.concatenate(codes), joined))
                progress.advance(ranks.world)
        parts: dict[str, dict[str, object]] = {}
        for gathered in ranks.gather(rank_parts):
            parts |= gathered
        if ranks.first:
            index = _write_index(temporary, reader, autoencoder, parts)
    return (index if ranks.first else CodeReader(folder).index), reader.index


def _write_index(folder: Path, reader: ShardReader, autoencoder: Path, parts: dict[str, dict[str, object]]) -> CodeIndex:
    by_split = {
        split: tuple(Part(**parts[f"{split}/{n}"]) for n in range(len(reader.index.parts(split))))  # type: ignore[arg-type]
        for split in SPLITS
    }
    decoder = autoencoder / "decoder.safetensors"
    if reader.index.kind == "images":
        if not decoder.is_file():
            raise DataError(f"{decoder} is missing; run train again")
        shutil.copyfile(decoder, folder / "decoder.safetensors")
    dim = int(reader.index.shape[0])
    from safetensors.numpy import load_file

    # The moments are over the finished files in order, so they don't depend on the number of ranks.
    moments: VectorMoments | None = None
    for part in by_split["train"]:
        codes = load_file(folder / part.name)["codes"]
        dim = codes.shape[1]
        moments = moments or VectorMoments(dim)
        moments.update(codes)
    assert moments is not None
    index = CodeIndex(
        dim=dim,
        mean=tuple(moments.mean.tolist()),
        std=tuple(moments.std.tolist()),
        source_digest=reader.index.digest,
        decoder_sha256=sha256_file(decoder) if reader.index.kind == "images" else None,
        value_range=reader.index.value_range,
        label_names=reader.index.label_names,
        **by_split,
    )
    write_index(folder, index)
    return index
