"""samples, density, codes, shards -> scores."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.settings import (
    DatasetSettings,
    DensitySettings,
    EvaluationSettings,
    InterpolationSettings,
    Params,
    QualitySettings,
)
from stages import workspace
from stages.run import Run, stage

if TYPE_CHECKING:
    import numpy as np

    from pipeline.densities import Density
    from pipeline.storage.codes import CodeReader
    from pipeline.storage.shards import ShardReader

SHOWN = 10  # samples beside their nearest training images
SHOWN_POINTS = 5000  # of the grid density, in a panel


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
    writes=lambda settings, row: [workspace.figure_folder("evaluate", row), workspace.arrays_folder("evaluate", row)],
    ranks=True,
)
def evaluate(run: Run, settings: Settings) -> None:
    """Score samples and density under the protocol of their data set.

    NAME is a row of `densities`. Images: Parzen-window log-likelihood; where the settings say so, quality in a feature space
    and interpolated codes. Vectors: test log-likelihood, and where the settings say so a Parzen-window one of the samples; for
    the grid density also the gap to the truth, the share of samples that fall into the dropped box, and the discrepancy (MMD).
    """
    import numpy as np

    from pipeline import figures
    from pipeline.densities import load_density
    from pipeline.scoring import grid_scores, parzen_samples, parzen_score, test_log_likelihood
    from pipeline.sources.common.patches import restore
    from pipeline.storage.codes import CodeReader
    from pipeline.storage.shards import ShardReader
    from pipeline.system.ranks import join
    from stages.arrays import save_arrays

    ranks = join()
    reader = ShardReader(workspace.shards_folder(settings.density.dataset))
    samples = ShardReader(workspace.samples_folder(run.row))
    codes = CodeReader(workspace.codes_folder(settings.density.codes))
    density = load_density(workspace.density_file(run.row)).to(ranks.device)
    run.read(settings.density.dataset, reader.index.digest, reader.folder, "evaluation")
    run.read(f"samples {run.row}", samples.index.digest, samples.folder, "samples")
    for folder in (workspace.figure_folder("evaluate", run.row), workspace.arrays_folder("evaluate", run.row)):
        folder.mkdir(parents=True, exist_ok=True)

    if density.has_log_prob:
        # Labels without names count the images that patches come from.
        by_group = reader.index.kind == "vectors"
        run.metrics(test_log_likelihood(density, codes, by_group, ranks))

    if settings.evaluation.parzen is not None:
        count = parzen_samples(samples.index.count("samples"), reader)

        result = parzen_score(lambda: _first(samples, "samples", count), count, reader, settings.evaluation.parzen, ranks)
        run.metrics(result.metrics())
        figure = figures.parzen_curves(result.score.bandwidths, {run.row: result.score.valid_curve}, result.protocol)
        run.figure(figure, "parzen-bandwidth")

    if reader.index.kind == "images" and ranks.first:
        _nearest(run, reader, samples)
        if settings.evaluation.quality is not None:
            _quality(run, settings.evaluation.quality, reader, samples)
        if settings.evaluation.interpolation is not None:
            _interpolation(run, settings.evaluation.interpolation, density, codes, reader, settings.dataset.label)

    if settings.dataset.source == "grid":
        from pipeline.sources.grid import DROPPED_BOX

        half_length = float(getattr(settings.dataset, "half_length", 5.0))
        drawn_points = np.concatenate(list(_first(samples, "samples")))
        scores = grid_scores(drawn_points, np.concatenate(list(_first(reader, "test"))), half_length)
        if "test_log_likelihood" in run.scores:
            scores["gap_to_truth"] = scores["truth_test_log_likelihood"] - run.scores["test_log_likelihood"]
        run.metrics(scores)
        target_points = np.concatenate(list(_first(reader, "train", SHOWN_POINTS)))
        arrays = {"target": target_points, "samples": drawn_points[:SHOWN_POINTS]}
        figure = figures.density_panels(arrays["target"], {run.row: arrays["samples"]}, half_length + 1, DROPPED_BOX)
        run.figure(figure, "samples-beside-target")
        if density.has_log_prob:
            arrays |= _log_density_maps(run, density, half_length)
        save_arrays(run, "grid", arrays)
    elif settings.dataset.drawn_as == "patches":
        real = next(reader.blocks("test"))["examples"][:50]
        drawn_vectors = next(samples.blocks("samples"))["examples"][:50]
        run.figure(figures.patches_beside_real(restore(real), restore(drawn_vectors)), "patches-beside-real")
    ranks.barrier()


def _quality(run: Run, settings: QualitySettings, reader: ShardReader, samples: ShardReader) -> None:
    """Scores of the samples in a feature space."""
    from pipeline.scoring import feature_network, quality_scores

    network = feature_network(settings, reader)
    run.metrics(quality_scores(_first(samples, "samples", settings.samples), reader, network, settings))


def _nearest(run: Run, reader: ShardReader, samples: ShardReader) -> None:
    """The training images nearest to the first samples."""
    import numpy as np

    from pipeline import figures
    from pipeline.evaluation.quality import nearest
    from pipeline.scoring import unit_blocks
    from pipeline.system.progress import track

    first = np.concatenate(list(_first(samples, "samples", SHOWN)))
    train = track(unit_blocks(reader, "train")(), reader.index.count("train"), "nearest training images")
    found, distances = nearest(first, train)
    run.metrics({"nearest_training_rmse": float(distances.mean())})
    names = [f"RMSE {distance:.3f}" for distance in distances]
    run.figure(figures.image_rows({"sample": first, "nearest": found}, column_names=names), "nearest-training-images")


def _interpolation(
    run: Run, settings: InterpolationSettings, density: Density, codes: CodeReader, reader: ShardReader, label: str
) -> None:
    """Figures 7 and 10: images and log-likelihood of interpolated test codes, as metrics, pictures and arrays."""
    import numpy as np
    import torch

    from pipeline import figures
    from pipeline.autoencoders.common.network import Decoder
    from pipeline.evaluation.interpolation import WEIGHTS, interpolated_images
    from pipeline.scoring import CURVE_WEIGHTS, interpolation_curves, interpolation_pairs, labelled_codes
    from pipeline.storage.shards import scale_pixels, to_unit
    from stages.arrays import as_bytes, save_arrays

    values, labels = labelled_codes(codes)
    if len(values) < 2:
        print(f"evaluate {run.row}: interpolation is skipped: it needs two test images, and there is one", file=sys.stderr)
        return
    arrays: dict[str, np.ndarray] = {"curve_weights": np.array(CURVE_WEIGHTS)}
    if density.has_log_prob:
        curves = interpolation_curves(density, values, labels, settings)
        for kind, curve in curves.items():
            run.metrics({f"interpolation_{kind}_{a:g}": float(m) for a, m in zip(curve.weights, curve.mean, strict=True)})
            fall = {"fall": curve.fall.mean, "fall_se": curve.fall.standard_error, "pairs": curve.pairs}
            run.metrics({f"interpolation_{kind}_{key}": value for key, value in fall.items()})
            arrays |= {f"{kind}_{edge}": getattr(curve, edge) for edge in ("mean", "lower", "upper")}
        panel = {kind: (curve.mean, np.stack([curve.lower, curve.upper])) for kind, curve in curves.items()}
        labelled = {figures.pair_kinds(label)[kind]: line for kind, line in panel.items()}
        figure = figures.curve_panels(
            {run.row: labelled}, CURVE_WEIGHTS, "weight a of the second code", "log-likelihood of the code (nats)"
        )
        run.figure(figure, "interpolation-log-likelihood")
    if codes.decoder_path is not None:
        decoder = Decoder.load(codes.decoder_path, density.shift.device)

        def decode(z: torch.Tensor) -> torch.Tensor:
            return to_unit(decoder(z.to(density.shift.device)), decoder.value_range)

        pairs = interpolation_pairs(len(values), labels, reader.index.label_names or (), settings.seed)
        between = torch.from_numpy(np.stack([values[pair] for _, pair in pairs]))  # (P, 2, D)
        images = [interpolated_images(first, last, decode) for first, last in between]
        wanted = {int(i): np.empty(0) for _, pair in pairs for i in pair}
        start = 0
        for block in reader.blocks("test"):
            for i in wanted:
                if start <= i < start + len(block["examples"]):
                    wanted[i] = scale_pixels(block["examples"][i - start], (0.0, 1.0))
            start += len(block["examples"])
        ends = [np.stack([wanted[int(i)] for i in pair]) for _, pair in pairs]
        arrays |= {"weights": np.array(WEIGHTS), "images": as_bytes(np.stack(images)), "originals": as_bytes(np.stack(ends))}
        panels = [("", e[0], e[1], {name: shown}) for (name, _), e, shown in zip(pairs, ends, images, strict=True)]
        run.figure(figures.interpolation_panels(panels, WEIGHTS), "interpolations")
        save_arrays(run, "interpolation", arrays, [name for name, _ in pairs])


def _first(reader: ShardReader, split: str, count: int = sys.maxsize) -> Iterator[np.ndarray]:
    """The first examples of a split, block by block."""
    for block in reader.blocks(split):
        yield block["examples"][:count]
        count -= len(block["examples"])
        if count <= 0:
            return


def _log_density_maps(run: Run, density: Density, half_length: float) -> dict[str, np.ndarray]:
    """Log-densities (221, 221) in nats of the `truth` and the `model` on a square, rows along x2."""
    import numpy as np

    from pipeline import figures
    from pipeline.fitting import score_codes
    from pipeline.sources.grid import log_density

    limit = half_length + 1
    axis = np.linspace(-limit, limit, 221, dtype=np.float32)
    points = np.stack(np.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
    model = np.concatenate(list(score_codes(density, np.array_split(points, 16))))
    maps = {"truth": log_density(points, half_length), "model": model}
    maps = {name: values.astype(np.float32).reshape(len(axis), len(axis)) for name, values in maps.items()}
    run.figure(figures.log_density_maps({"truth": maps["truth"], run.row: maps["model"]}, limit=limit), "log-density")
    return maps
