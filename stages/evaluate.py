"""samples, density, codes, shards -> scores."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.settings import DatasetSettings, DensitySettings, EvaluationSettings, Params
from stages import workspace
from stages.run import Run, stage

if TYPE_CHECKING:
    import numpy as np

    from pipeline.densities import Density
    from pipeline.shards import ShardReader


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The density's row, its data set's, and the protocol."""

    density: DensitySettings
    dataset: DatasetSettings
    evaluation: EvaluationSettings


def _settings(params: Params, row: str) -> Settings:
    density = params.density(row)
    return Settings(
        density=density,
        dataset=params.dataset(density.dataset),
        evaluation=params.evaluation(density.dataset, f"densities.{row}.dataset"),
    )


@stage(
    settings=_settings,
    reads=lambda settings, row: [
        workspace.samples_folder(row),
        workspace.density_file(row),
        workspace.codes_folder(settings.density.codes),
        workspace.shards_folder(settings.density.dataset),
    ],
    writes=lambda settings, row: [workspace.figure_folder("evaluate", row)],
    ranks=True,
)
def evaluate(run: Run, settings: Settings) -> None:
    """Score samples and density under the protocol of their data set.

    NAME is a row of `densities`. Images: Parzen-window log-likelihood. Vectors: test log-likelihood; for the grid density also
    the gap to the truth and the share of samples that fall into the dropped box.
    """
    import numpy as np

    from pipeline import figures
    from pipeline.codes import CodeReader
    from pipeline.densities import load_density
    from pipeline.patches import restore
    from pipeline.ranks import join
    from pipeline.scoring import grid_scores, parzen_samples, parzen_score, test_log_likelihood
    from pipeline.shards import ShardReader

    ranks = join()
    reader = ShardReader(workspace.shards_folder(settings.density.dataset))
    samples = ShardReader(workspace.samples_folder(run.row))
    codes = CodeReader(workspace.codes_folder(settings.density.codes))
    density = load_density(workspace.density_file(run.row)).to(ranks.device)
    run.read(settings.density.dataset, reader.index.digest, reader.folder, "evaluation")
    run.read(f"samples {run.row}", samples.index.digest, samples.folder, "samples")
    figure_folder = workspace.figure_folder("evaluate", run.row)
    figure_folder.mkdir(parents=True, exist_ok=True)

    if density.has_log_prob:
        # Labels without names count the images that patches come from.
        by_group = reader.index.kind == "vectors"
        run.metrics(test_log_likelihood(density, codes, by_group))

    if settings.evaluation.parzen is not None and reader.index.kind == "images":
        count = parzen_samples(samples.index.count("samples"), reader)

        result = parzen_score(lambda: _first(samples, "samples", count), reader, settings.evaluation.parzen, ranks)
        run.metrics(result.metrics())
        figure = figures.parzen_curves(result.score.bandwidths, {run.row: result.score.valid_curve}, result.protocol)
        run.figure(figure, "parzen-bandwidth")

    if settings.dataset.source == "grid":
        half_length = float(getattr(settings.dataset, "half_length", 5.0))
        scores = grid_scores(_first(samples, "samples"), _first(reader, "test"), half_length)
        if "test_log_likelihood" in run.scores:
            scores["gap_to_truth"] = scores["truth_test_log_likelihood"] - run.scores["test_log_likelihood"]
        run.metrics(scores)
        drawn_points = np.concatenate(list(_first(samples, "samples", 5000)))
        target_points = np.concatenate(list(_first(reader, "train", 5000)))
        run.figure(figures.density_panels(target_points, {run.row: drawn_points}), "samples-beside-target")
        if density.has_log_prob:
            _log_density_map(run, density, half_length)
    elif reader.index.kind == "vectors" and codes.index.dim == 63:
        real = next(reader.blocks("test"))["examples"][:50]
        drawn_vectors = next(samples.blocks("samples"))["examples"][:50]
        run.figure(figures.patches_beside_real(restore(real), restore(drawn_vectors)), "patches-beside-real")


def _first(reader: ShardReader, split: str, count: int = sys.maxsize) -> Iterator[np.ndarray]:
    """The first examples of a split, block by block."""
    for block in reader.blocks(split):
        yield block["examples"][:count]
        count -= len(block["examples"])
        if count <= 0:
            return


def _log_density_map(run: Run, density: Density, half_length: float) -> None:
    import numpy as np

    from pipeline import figures
    from pipeline.fitting import score_codes
    from pipeline.sources.grid import log_density

    limit = half_length + 1
    axis = np.linspace(-limit, limit, 221, dtype=np.float32)
    points = np.stack(np.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)  # rows along x2
    model = np.concatenate(list(score_codes(density, np.array_split(points, 16)))).reshape(len(axis), len(axis))
    truth = log_density(points, half_length).reshape(len(axis), len(axis))
    run.figure(figures.log_density_maps({"truth": truth, run.row: model}, limit=limit), "log-density")
