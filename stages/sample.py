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
    import torch

    from pipeline.autoencoders.common.network import Decoder
    from pipeline.densities import Density
    from pipeline.densities.common.context import Context
    from pipeline.storage.shards import ShardReader

SHOWN = 100  # samples for the page, the first in the order drawn
LARGE_PIXELS, SHOWN_LARGE = 128, 36  # from this side length on, fewer images are shown
TARGET_POINTS = 4096  # training points drawn behind samples of points
CLASSES, OF_CLASS = 20, 10  # classes of the page, the first ones, and samples of each, the first in the order drawn
TRUNCATED = 10  # samples that are also decoded from only their first numbers


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
        workspace.arrays_folder("sample", row),
    ],
    ranks=True,
)
def sample(run: Run, settings: SampleSettings) -> None:
    """Draw codes from a density and decode them.

    NAME is a row of `densities`. The number of samples is `sampling.count`; the page shows the first 100 in the order drawn.
    With `context: labels`, labels are drawn at the frequencies of the training codes, and the page shows a row per class. A
    warning is printed if samples lie far outside the range of the training codes.
    """
    from pipeline.autoencoders.common.foreign import load_decoder
    from pipeline.densities import load_density
    from pipeline.sampling import range_remark, write_samples
    from pipeline.storage.codes import CodeReader
    from pipeline.storage.columns import from_codes, varying
    from pipeline.storage.shards import ShardReader
    from pipeline.system.ranks import join
    from stages.arrays import as_bytes

    ranks = join()
    codes = CodeReader(workspace.codes_folder(settings.density.codes))
    run.read(settings.density.codes, codes.index.digest, codes.folder, "decoder")
    density = load_density(workspace.density_file(run.row)).to(ranks.device)
    decoder = None if codes.decoder_path is None else load_decoder(codes.decoder_path, ranks.device)
    columns = codes.index.columns
    index = write_samples(density, decoder, settings.sampling, workspace.samples_folder(run.row), ranks, columns)
    run.metrics({"samples": index.count("samples")})
    run.details(digest=index.digest, processes=ranks.world)
    if ranks.first:
        samples = ShardReader(workspace.samples_folder(run.row))
        remark = range_remark(samples, codes)
        if remark:
            print(f"warning: sample {run.row}: {remark}", file=sys.stderr)
        drawn = samples.first("samples", SHOWN)
        if index.kind == "images":
            assert decoder is not None
            count = SHOWN if index.shape[1] < LARGE_PIXELS else SHOWN_LARGE
            likelihoods = {"log_prob": _log_prob(density, drawn["codes"][:count])} if density.has_marginal else {}
            run.arrays("samples", {"samples": as_bytes(drawn["examples"][:count]), **likelihoods})
            if density.context is not None and density.context.complete:
                images, names = _by_class(samples, density.context)
                run.arrays("samples-by-class", {"samples": as_bytes(images)}, names)
            if density.dim > 1:
                run.arrays("truncated", _truncated(drawn["codes"][:TRUNCATED], decoder, ranks.device))
        elif run.params.dataset(settings.density.dataset).drawn_as == "patches":
            run.arrays("samples", {"samples": drawn["examples"]})
        else:
            target = from_codes(columns, next(codes.blocks("train"))["codes"][:TARGET_POINTS])
            first = varying(columns)[:2] or slice(2)
            run.arrays("samples", {"samples": drawn["examples"][:, first], "target": target[:, first]})
    ranks.barrier()


def _log_prob(density: Density, codes: np.ndarray) -> np.ndarray:
    """Log-density (n,) of codes, in nats."""
    import numpy as np
    import torch

    with torch.no_grad():
        values = density.log_prob(torch.from_numpy(codes).to(density.shift.device))
    return values.cpu().numpy().astype(np.float32)


def _by_class(samples: ShardReader, context: Context) -> tuple[np.ndarray, list[str]]:
    """The first samples of each class, with shape (classes, 10, C, H, W), and what the classes are called.

    A class of which fewer were drawn has blank images.
    """
    import numpy as np

    from pipeline.densities.common.context import LABELS

    rows, names = context.rows[:CLASSES].cpu().numpy(), [context.title(row) for row in context.rows[:CLASSES].tolist()]
    images = np.ones((len(rows), OF_CLASS, *samples.index.shape), np.float32)
    counts = np.zeros(len(rows), int)
    for block in samples.blocks("samples"):
        columns = {column.name: block["context"][:, i] for i, column in enumerate(samples.index.context)}
        columns |= {LABELS: block[LABELS]} if LABELS in block else {}
        contexts = np.stack([columns[name] for name in context.names], axis=1)
        for number in np.flatnonzero(counts < OF_CLASS):
            found = block["examples"][(contexts == rows[number]).all(axis=1)][: OF_CLASS - counts[number]]
            images[number, counts[number] : counts[number] + len(found)] = found
            counts[number] += len(found)
        if counts.min() == OF_CLASS:
            break
    return images, names


def _truncated(codes: np.ndarray, decoder: Decoder, device: torch.device) -> dict[str, np.ndarray]:
    """The first samples decoded from the first k numbers of their codes, for some k; the other numbers are zero.

    Arguments:
        codes: Codes with shape (n, D).
        decoder: Their decoder.
        device: Where it computes.

    Returns:
        `ks` with shape (K,), ascending to D, and `images` in 8 bits with shape (K, n, C, H, W).
    """
    import numpy as np
    import torch

    from pipeline.storage.shards import to_unit
    from stages.arrays import as_bytes

    dim = codes.shape[1]
    ks = list(range(1, dim + 1)) if dim <= 10 else sorted({round(float(k)) for k in np.geomspace(1, dim, 8)})
    images = []
    for k in ks:
        truncated = torch.from_numpy(np.where(np.arange(dim) < k, codes, 0).astype(np.float32))
        with torch.no_grad():
            decoded = to_unit(decoder(truncated.to(device)), decoder.value_range)
        images.append(as_bytes(decoded.cpu().numpy()))
    return {"ks": np.array(ks), "images": np.stack(images)}
