"""density, codes (for the decoder) -> samples."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.settings import DensitySettings, SamplingSettings
from stages import workspace
from stages.run import Run, stage

SHOWN = 100  # samples in the figure, the first in the order drawn


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """The density's row and the section `sampling`."""

    density: DensitySettings
    sampling: SamplingSettings


@stage(
    settings=lambda params, row: SampleSettings(density=params.density(row), sampling=params.sampling()),
    reads=lambda settings, row: [workspace.density_file(row), workspace.codes_folder(settings.density.codes)],
    writes=lambda settings, row: [workspace.samples_folder(row), workspace.figure_folder("sample", row)],
    ranks=True,
)
def sample(run: Run, settings: SampleSettings) -> None:
    """Draw codes from a density and decode them.

    NAME is a row of `densities`. The number of samples is `sampling.count`; the figure shows the first 100 in the order drawn.
    """
    from pipeline import figures
    from pipeline.autoencoders.network import Decoder
    from pipeline.codes import CodeReader
    from pipeline.densities import load_density
    from pipeline.patches import restore
    from pipeline.ranks import join
    from pipeline.sampling import write_samples
    from pipeline.shards import ShardReader

    ranks = join()
    codes = CodeReader(workspace.codes_folder(settings.density.codes))
    run.read(settings.density.codes, codes.index.digest, codes.folder, "decoder")
    density = load_density(workspace.density_file(run.row)).to(ranks.device)
    decoder = None if codes.decoder_path is None else Decoder.load(codes.decoder_path, ranks.device)
    index = write_samples(density, decoder, settings.sampling, workspace.samples_folder(run.row), ranks)
    run.metrics({"samples": index.count("samples")})
    run.details(digest=index.digest, processes=ranks.world)
    if ranks.first:
        first = next(ShardReader(workspace.samples_folder(run.row)).blocks("samples"))["examples"][:SHOWN]
        if index.kind == "images":
            run.figure(figures.image_grid(first, columns=10), "samples")
        elif density.dim == 63:
            run.figure(figures.image_grid(0.5 + restore(first), columns=10), "samples")
        else:
            run.figure(figures.density_panels(next(codes.blocks("train"))["codes"], {run.row: first}), "samples")
    ranks.barrier()
