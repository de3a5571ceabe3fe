"""shards -> control scores of a data set."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.settings import ControlSettings, Params, ParzenSettings
from stages import workspace
from stages.run import Run, stage


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The control's row, the protocol of its data set and the number of samples."""

    control: ControlSettings
    parzen: ParzenSettings
    count: int


def _settings(params: Params, row: str) -> Settings:
    control = params.control(row)
    parzen = params.evaluation(control.dataset, f"controls.{row}.dataset").parzen
    return Settings(control=control, parzen=parzen or ParzenSettings(), count=params.sampling().count)


@stage(
    settings=_settings,
    reads=lambda settings, row: [workspace.shards_folder(settings.control.dataset)],
    writes=lambda settings, row: [workspace.figure_folder("control", row)],
)
def control(run: Run, settings: Settings) -> None:
    """Score training images and k-means centroids as if they were samples.

    NAME is a row of `controls`. The Parzen score is gameable (Theis et al. 2016): centroids beat true samples. So both stand
    beside the models, under the same protocol and with as many samples.
    """
    from pipeline import figures
    from pipeline.evaluation.controls import kmeans_centroids, training_samples
    from pipeline.ranks import join
    from pipeline.scoring import parzen_samples, parzen_score, unit_blocks
    from pipeline.shards import ShardReader

    ranks = join()
    reader = ShardReader(workspace.shards_folder(settings.control.dataset))
    run.read(settings.control.dataset, reader.index.digest, reader.folder, "control")
    count = parzen_samples(settings.count, reader)
    train = unit_blocks(reader, "train")
    images = training_samples(train, count, settings.control.seed)
    centroids = kmeans_centroids(
        train,
        min(settings.control.kmeans_centroids or count, count),
        settings.control.seed,
        settings.control.kmeans_batch_size,
        settings.control.kmeans_epochs,
    )
    for name, samples in (("training_images", lambda: iter(images())), ("kmeans", lambda: iter([centroids]))):
        run.metrics(parzen_score(samples, reader, settings.parzen, ranks).metrics(f"{name}_"))
    run.figure(figures.image_grid(next(iter(images()))[:100], columns=10), "training-images")
    run.figure(figures.image_grid(centroids[:100], columns=10), "kmeans-centroids")
