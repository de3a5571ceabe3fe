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
    from pipeline.evaluation.quality import QualityScore
    from pipeline.storage.codes import CodeReader
    from pipeline.storage.shards import ShardReader

SHOWN = 10  # samples with their nearest training images
SHOWN_CODES = 100  # codes without a decoder, as the training images whose codes are nearest
SHOWN_POINTS = 5000  # of the grid density, in a panel
SHOWN_PATCHES = 50


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
        *([workspace.features_folder(settings.density.dataset)] if settings.evaluation.quality else []),
    ],
    writes=lambda settings, row: [workspace.arrays_folder("evaluate", row)],
    ranks=True,
)
def evaluate(run: Run, settings: Settings) -> None:
    """Score samples and density under the protocol of their data set.

    NAME is a row of `densities`. Images: Parzen-window log-likelihood and log-likelihood on the decoder's manifold; if the
    settings say so, quality in a feature space and interpolated codes. Vectors: test log-likelihood; if the settings say so,
    the Parzen-window log-likelihood of the samples. The grid density adds the gap to the truth, the share of samples in the
    dropped box, and the discrepancy (MMD).
    With `context: labels`, also log p(z | label), and how well the density classifies codes by Bayes' rule.
    """
    import numpy as np

    from pipeline.autoencoders.common.network import Decoder
    from pipeline.densities import load_density
    from pipeline.evaluation.likelihood import test_log_likelihood
    from pipeline.evaluation.manifold import manifold_scores
    from pipeline.evaluation.posterior import conditional_scores, reference_scores
    from pipeline.evaluation.two_sample import grid_scores
    from pipeline.scoring import parzen_samples, parzen_score
    from pipeline.storage.codes import CodeReader
    from pipeline.storage.shards import ShardReader
    from pipeline.system.ranks import join
    from stages.arrays import PER_EXAMPLE

    ranks = join()
    reader = ShardReader(workspace.shards_folder(settings.density.dataset))
    samples = ShardReader(workspace.samples_folder(run.row))
    codes = CodeReader(workspace.codes_folder(settings.density.codes))
    density = load_density(workspace.density_file(run.row)).to(ranks.device)
    run.read(settings.density.dataset, reader.index.digest, reader.folder, "evaluation")
    run.read(f"samples {run.row}", samples.index.digest, samples.folder, "samples")
    workspace.arrays_folder("evaluate", run.row).mkdir(parents=True, exist_ok=True)

    values: dict[str, np.ndarray] = {}  # of test points, to compare rows by
    if density.has_log_prob:
        # Labels without names count the images that patches come from.
        by_group = reader.index.kind == "vectors"
        if density.has_marginal:
            likelihoods = test_log_likelihood(density, codes, by_group, ranks)
            run.metrics(likelihoods.metrics)
            values |= {"test_log_likelihood": likelihoods.values, "groups": likelihoods.groups}
        if density.context is not None:
            run.metrics(scores := conditional_scores(density, codes, ranks))
            if "class_accuracy" in scores:
                run.metrics(reference_scores(density, codes))

    decoded = samples.index.kind == reader.index.kind  # images of an encoder alone have no decoded samples
    array = "examples" if reader.index.kind == "images" else "codes"  # in the units of the shards
    if settings.evaluation.parzen is not None and decoded:
        count = parzen_samples(samples.index.count("samples"), reader)
        result = parzen_score(
            lambda: _first(samples, "samples", count, array), count, reader, settings.evaluation.parzen, ranks
        )
        run.metrics(result.metrics())
        values["parzen_test_log_likelihood"] = result.score.test_values
        curve = {"bandwidths": np.array(result.score.bandwidths), "valid_log_likelihood": np.array(result.score.valid_curve)}
        run.arrays("parzen-bandwidth", curve, [result.protocol])

    if reader.index.kind == "images" and ranks.first:
        if decoded:
            _nearest(run, reader, samples)
        else:
            _nearest_by_code(run, reader, samples, codes)
        if settings.evaluation.quality is not None and decoded:
            classes = "labels" in settings.density.context_names
            quality = _quality(settings.evaluation.quality, reader, samples, settings.density.dataset, classes)
            run.metrics(quality.metrics())
            values |= quality.values()
        if density.has_marginal and codes.decoder_path is not None and codes.decoder_path.suffix == ".safetensors":
            decoder = Decoder.load(codes.decoder_path, ranks.device)
            run.metrics(manifold_scores(density, decoder, codes))
        if settings.evaluation.interpolation is not None:
            _interpolation(run, settings.evaluation.interpolation, density, codes, reader)

    if settings.dataset.source == "grid":
        half_length = float(getattr(settings.dataset, "half_length", 5.0))
        points = np.concatenate(list(_first(samples, "samples")))
        scores = grid_scores(points, np.concatenate(list(_first(reader, "test"))), half_length)
        if "test_log_likelihood" in run.scores:
            scores["gap_to_truth"] = scores["truth_test_log_likelihood"] - run.scores["test_log_likelihood"]
        run.metrics(scores)
        arrays = {"target": np.concatenate(list(_first(reader, "train", SHOWN_POINTS))), "samples": points[:SHOWN_POINTS]}
        if density.has_marginal:
            arrays |= _log_density_maps(density, half_length)
        run.arrays("grid", arrays)
    elif settings.dataset.drawn_as == "patches":
        real, drawn = (next(shards.blocks(split))["examples"] for shards, split in ((reader, "test"), (samples, "samples")))
        run.arrays("patches", {"real": real[:SHOWN_PATCHES], "samples": drawn[:SHOWN_PATCHES]})
    kept = {name: _compact(of_points) for name, of_points in values.items() if len(of_points)}
    if kept:
        run.arrays(PER_EXAMPLE, kept)
    ranks.barrier()


def _quality(settings: QualitySettings, reader: ShardReader, samples: ShardReader, dataset: str, classes: bool) -> QualityScore:
    """Scores of the samples in a feature space, and if they have labels those of each class."""
    import numpy as np

    from pipeline.evaluation.features import read_features
    from pipeline.scoring import quality_scores

    real = read_features(workspace.features_folder(dataset), settings, reader)
    labels = None
    if classes:
        real_labels = np.concatenate([block["labels"] for block in reader.blocks("test")])
        drawn = np.concatenate([block["labels"] for block in samples.blocks("samples")])
        labels = real_labels, drawn[: settings.samples]
    return quality_scores(_first(samples, "samples", settings.samples), real, settings, labels)


def _compact(values: np.ndarray) -> np.ndarray:
    """Numbers in half the bytes, truth values in one each."""
    return values.astype({"f": "float32", "b": "uint8", "i": "int32"}[values.dtype.kind])


def _nearest(run: Run, reader: ShardReader, samples: ShardReader) -> None:
    """The training images nearest to the first samples."""
    import numpy as np

    from pipeline.evaluation.blocks import unit_blocks
    from pipeline.evaluation.quality import nearest
    from pipeline.system.progress import track
    from stages.arrays import as_bytes

    first = np.concatenate(list(_first(samples, "samples", SHOWN)))
    train = track(unit_blocks(reader, "train")(), reader.index.count("train"), "nearest training images")
    neighbours, distances = nearest(first, train)
    run.metrics({"nearest_training_rmse": float(distances.mean())})
    images = {"samples": as_bytes(first), "neighbours": as_bytes(neighbours)}
    run.arrays("nearest-training-images", {**images, "distances": distances})


def _nearest_by_code(run: Run, reader: ShardReader, samples: ShardReader, codes: CodeReader) -> None:
    """The training images whose codes are nearest to those of the first samples, in units of the codes' deviations."""
    import numpy as np

    drawn = samples.first("samples", SHOWN_CODES)["codes"]  # (n, D)
    scale = np.maximum(np.array(codes.index.std), np.finfo(np.float32).tiny)
    best, images = np.full(len(drawn), np.inf), np.zeros((len(drawn), *reader.index.shape), np.uint8)
    for number, block in enumerate(codes.blocks("train")):
        squares = np.square((drawn[:, None] - block["codes"][None]) / scale).mean(axis=2)  # (n, codes of the file)
        chosen = squares.argmin(axis=1)
        nearer = squares[np.arange(len(drawn)), chosen] < best
        best = np.minimum(best, squares.min(axis=1))
        images[nearer] = reader.load("train", number)["examples"][chosen[nearer]]
    run.arrays("nearest-by-code", {"images": images, "distances": np.sqrt(best)})


def _interpolation(run: Run, settings: InterpolationSettings, density: Density, codes: CodeReader, reader: ShardReader) -> None:
    """Figures 7 and 10: images and log-likelihood of interpolated test codes, as metrics and arrays."""
    import numpy as np
    import torch

    from pipeline.autoencoders.common.foreign import load_decoder
    from pipeline.evaluation.interpolation import (
        CURVE_WEIGHTS,
        WEIGHTS,
        interpolated_images,
        interpolation_curves,
        interpolation_pairs,
        labelled_codes,
    )
    from pipeline.storage.shards import scale_pixels, to_unit
    from stages.arrays import as_bytes

    values, labels = labelled_codes(codes)
    if len(values) < 2:
        print(f"evaluate {run.row}: interpolation is skipped: it needs two test images, and there is one", file=sys.stderr)
        return
    arrays: dict[str, np.ndarray] = {"curve_weights": np.array(CURVE_WEIGHTS)}
    names: list[str] = []
    if density.has_marginal:
        curves = interpolation_curves(density, values, labels, settings)
        for kind, curve in curves.items():
            fall = {"fall": curve.fall.mean, "fall_se": curve.fall.standard_error, "pairs": curve.pairs}
            run.metrics({f"interpolation_{kind}_{key}": value for key, value in fall.items()})
            arrays |= {f"{kind}_{edge}": getattr(curve, edge) for edge in ("mean", "lower", "upper")}
            percents = [round(100 * weight) for weight in CURVE_WEIGHTS]
            run.tracked_curve(f"interpolation_{kind}_log_likelihood", percents, curve.mean)
    if codes.decoder_path is not None:
        decoder = load_decoder(codes.decoder_path, density.shift.device)

        def decode(z: torch.Tensor) -> torch.Tensor:
            return to_unit(decoder(z.to(density.shift.device)), decoder.value_range)

        pairs = interpolation_pairs(len(values), labels, reader.index.label_names or (), settings.seed)
        names = [name for name, _ in pairs]
        between = torch.from_numpy(np.stack([values[pair] for _, pair in pairs]))  # (P, 2, D)
        images = [interpolated_images(first, last, decode) for first, last in between]
        originals = {int(i): np.empty(0) for _, pair in pairs for i in pair}
        start = 0
        for block in reader.blocks("test"):
            for i in originals:
                if start <= i < start + len(block["examples"]):
                    originals[i] = scale_pixels(block["examples"][i - start], (0.0, 1.0))
            start += len(block["examples"])
        ends = [np.stack([originals[int(i)] for i in pair]) for _, pair in pairs]
        arrays |= {"weights": np.array(WEIGHTS), "images": as_bytes(np.stack(images)), "originals": as_bytes(np.stack(ends))}
    run.arrays("interpolation", arrays, names)


def _first(reader: ShardReader, split: str, count: int = sys.maxsize, name: str = "examples") -> Iterator[np.ndarray]:
    """The first examples, or codes, of a split, block by block."""
    for block in reader.blocks(split):
        yield block[name][:count]
        count -= len(block[name])
        if count <= 0:
            return


def _log_density_maps(density: Density, half_length: float) -> dict[str, np.ndarray]:
    """Log-densities (221, 221) in nats of the `truth` and the `model` on a square, rows along x2."""
    import numpy as np

    from pipeline.evaluation.likelihood import score_codes
    from pipeline.sources.common.bars import log_density

    axis = np.linspace(-half_length - 1, half_length + 1, 221, dtype=np.float32)
    points = np.stack(np.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
    model = np.concatenate(list(score_codes(density, np.array_split(points, 16))))
    maps = {"truth": log_density(points, half_length), "model": model}
    return {name: values.astype(np.float32).reshape(len(axis), len(axis)) for name, values in maps.items()}
