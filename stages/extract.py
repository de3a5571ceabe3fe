"""shards, autoencoder -> codes."""

from __future__ import annotations

from pipeline.settings import AutoencoderSettings, Params
from stages import workspace
from stages.run import Run, stage


@stage(
    settings=Params.autoencoder,
    reads=lambda settings, row: [workspace.shards_folder(settings.dataset), workspace.autoencoder_folder(row)],
    writes=lambda settings, row: [workspace.codes_folder(row)],
    ranks=True,
)
def extract(run: Run, settings: AutoencoderSettings) -> None:
    """Encode every split, and put the codes on disk with the decoder that turns them back.

    NAME is a row of `autoencoders`. Codes are streamed, a file a shard; later stages never load the encoder.
    """
    from pipeline.extraction import extract_codes
    from pipeline.system.ranks import join

    ranks = join()
    shards = workspace.shards_folder(settings.dataset)
    index, source = extract_codes(shards, workspace.autoencoder_folder(run.row), workspace.codes_folder(run.row), ranks)
    run.read(settings.dataset, source.digest, shards, "encoding")
    run.metrics({f"{split}_codes": index.count(split) for split in ("train", "valid", "test")})
    run.metrics({"dimensions": index.dim})
    run.details(digest=index.digest, processes=ranks.world)
