"""density, codes (for the decoder) -> samples."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.settings import DensitySettings, SamplingSettings
from stages import workspace
from stages.run import Run, stage

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from pipeline.autoencoders.common.network import Decoder

SHOWN = 100  # samples in the figure, the first in the order drawn
SIDE_BY_SIDE = 36  # samples that `report` sets beside those of other rows
LARGE_PIXELS = 128  # images from this side on: fewer of them
TRUNCATED = 10  # samples decoded from their first numbers alone


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """The density's row and the section `sampling`."""

    density: DensitySettings
    sampling: SamplingSettings


@stage(
    settings=lambda params, row: SampleSettings(density=params.density(row), sampling=params.sampling()),
    reads=lambda settings, row: [workspace.density_file(row), workspace.codes_folder(settings.density.codes)],
    writes=lambda settings, row: [
        workspace.samples_folder(row),
        workspace.figure_folder("sample", row),
        workspace.arrays_folder("sample", row),
    ],
    ranks=True,
)
def sample(run: Run, settings: SampleSettings) -> None:
    """Draw codes from a density and decode them.

    NAME is a row of `densities`. The number of samples is `sampling.count`; the figure shows the first 100 in the order drawn.
    A warning says so where samples lie far outside the range of the training codes.
    """
    from pipeline import figures
    from pipeline.autoencoders.common.network import Decoder
    from pipeline.densities import load_density
    from pipeline.sampling import range_remark, write_samples
    from pipeline.sources.common.patches import restore
    from pipeline.storage.codes import CodeReader
    from pipeline.storage.shards import ShardReader
    from pipeline.system.ranks import join
    from stages.arrays import as_bytes, save_arrays

    ranks = join()
    codes = CodeReader(workspace.codes_folder(settings.density.codes))
    run.read(settings.density.codes, codes.index.digest, codes.folder, "decoder")
    density = load_density(workspace.density_file(run.row)).to(ranks.device)
    decoder = None if codes.decoder_path is None else Decoder.load(codes.decoder_path, ranks.device)
    index = write_samples(density, decoder, settings.sampling, workspace.samples_folder(run.row), ranks)
    run.metrics({"samples": index.count("samples")})
    run.details(digest=index.digest, processes=ranks.world)
    if ranks.first:
        workspace.arrays_folder("sample", run.row).mkdir(parents=True, exist_ok=True)
        samples = ShardReader(workspace.samples_folder(run.row))
        remark = range_remark(samples, codes)
        if remark:
            print(f"warning: sample {run.row}: {remark}", file=sys.stderr)
        drawn = samples.first("samples", SHOWN)
        first = drawn["examples"]
        if index.kind == "images":
            run.figure(figures.image_grid(first, columns=10), "samples")
            few = 9 if index.shape[1] >= LARGE_PIXELS else SIDE_BY_SIDE
            save_arrays(run, "samples", {"samples": as_bytes(first[:few])})
            assert decoder is not None
            if density.dim > 1:
                run.figure(_truncated(drawn["codes"][:TRUNCATED], decoder), "truncated")
        elif run.params.dataset(settings.density.dataset).drawn_as == "patches":
            run.figure(figures.image_grid(0.5 + restore(first), columns=10), "samples")
        else:
            run.figure(figures.density_panels(next(codes.blocks("train"))["codes"], {run.row: first}), "samples")
    ranks.barrier()


def _truncated(codes: np.ndarray, decoder: Decoder) -> Figure:
    """The first samples decoded from the first k numbers of their codes, the others being zero, for some k."""
    import numpy as np
    import torch

    from pipeline import figures
    from pipeline.storage.shards import to_unit

    dim = codes.shape[1]
    ks = range(1, dim + 1) if dim <= 10 else sorted({round(float(k)) for k in np.geomspace(1, dim, 8)})
    rows = {}
    for k in ks:
        kept = torch.from_numpy(np.where(np.arange(dim) < k, codes, 0).astype(np.float32))
        with torch.no_grad():
            images = to_unit(decoder(kept.to(next(decoder.parameters()).device)), decoder.value_range)
        rows[f"first {k}" if k < dim else f"all {k}"] = images.cpu().numpy()
    return figures.image_rows(rows)
