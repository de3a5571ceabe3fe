"""shards -> control scores of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.settings import ControlSettings, EvaluationSettings, Params
from stages import workspace
from stages.run import Run, stage

if TYPE_CHECKING:
    from pipeline.storage.shards import ShardReader

SHOWN = 100  # images for the page


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The control's row, the protocol of its data set and the number of samples."""

    control: ControlSettings
    evaluation: EvaluationSettings
    count: int


def _settings(params: Params, row: str) -> Settings:
    control = params.control(row)
    evaluation = params.evaluation(control.dataset, f"controls.{row}.dataset")
    return Settings(control=control, evaluation=evaluation, count=params.sampling().count)


@stage(
    settings=_settings,
    reads=lambda settings, row: [
        workspace.shards_folder(settings.control.dataset),
        *([workspace.features_folder(settings.control.dataset)] if settings.evaluation.quality else []),
    ],
    writes=lambda settings, row: [workspace.arrays_folder("control", row)],
    ranks=True,
)
def control(run: Run, settings: Settings) -> None:
    """Score training images and k-means centroids as if they were samples.

    NAME is a row of `controls`. The Parzen score is gameable (Theis et al. 2016): centroids beat true samples. So both are
    listed with the models, under the same protocol and with the same number of samples. If the settings say so, training
    images are also scored in the feature space, and the images' principal components are compared with the autoencoders' open
    dimensions.
    """
    from pipeline.evaluation.blocks import rebatch, unit_blocks
    from pipeline.evaluation.controls import kmeans_centroids, training_samples
    from pipeline.scoring import parzen_samples, parzen_score
    from pipeline.storage.shards import ShardReader
    from pipeline.system.ranks import join
    from stages.arrays import as_bytes

    ranks = join()
    reader = ShardReader(workspace.shards_folder(settings.control.dataset))
    run.read(settings.control.dataset, reader.index.digest, reader.folder, "control")
    parzen = settings.evaluation.parzen
    count = parzen_samples(settings.count, reader)
    train = unit_blocks(reader, "train")
    images = training_samples(train, count, settings.control.seed)
    run.arrays("training-images", {"images": as_bytes(next(rebatch(images(), SHOWN)))})
    if parzen is not None:
        centroids = None
        if ranks.first:
            centroids = kmeans_centroids(
                train,
                min(settings.control.kmeans_centroids or count, count),
                settings.control.seed,
                settings.control.kmeans_batch_size,
                settings.control.kmeans_epochs,
            )
        centroids = ranks.gather(centroids)[0]
        run.arrays("kmeans-centroids", {"images": as_bytes(centroids[:SHOWN])})
        controls = ("training_images", lambda: iter(images()), count), ("kmeans", lambda: iter([centroids]), len(centroids))
        for name, samples, number in controls:
            run.metrics(parzen_score(samples, number, reader, parzen, ranks).metrics(f"{name}_"))
    if settings.evaluation.quality is not None and ranks.first:
        _quality(run, settings, reader)
    if settings.control.pca_components and ranks.first:
        _principal_components(run, settings.control.pca_components, reader)
    ranks.barrier()


def _quality(run: Run, settings: Settings, reader: ShardReader) -> None:
    """Training images against test images in the feature space: the scores of samples that can't be told from real ones."""
    from pipeline.evaluation.blocks import unit_blocks
    from pipeline.evaluation.controls import training_samples
    from pipeline.evaluation.features import read_features
    from pipeline.scoring import quality_scores

    quality = settings.evaluation.quality
    assert quality is not None
    count = min(settings.count, quality.samples)
    images = training_samples(unit_blocks(reader, "train"), count, settings.control.seed)
    features = read_features(workspace.features_folder(settings.control.dataset), quality, reader)
    scores = quality_scores(images(), features, quality)
    run.metrics({f"training_images_{key}": value for key, value in scores.metrics().items()})


def _principal_components(run: Run, components: int, reader: ShardReader) -> None:
    """Test error of the first k principal components: the best that linear maps can do."""
    import numpy as np

    from pipeline.evaluation.blocks import unit_blocks
    from pipeline.evaluation.reconstruction import PrincipalComponents, opened

    pca = PrincipalComponents(components).fit(unit_blocks(reader, "train"))
    errors = pca.errors(unit_blocks(reader, "test")(), opened(components))
    run.arrays("open-dimensions", {"ks": np.array(errors.ks), "mse": errors.mse})
