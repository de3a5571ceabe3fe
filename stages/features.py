"""shards -> the feature network and the features of test images, once per data set."""

from __future__ import annotations

from pipeline.settings import EvaluationSettings, Params
from stages import workspace
from stages.run import Run, stage


@stage(
    settings=Params.evaluation,
    reads=lambda settings, row: [workspace.shards_folder(row)],
    writes=lambda settings, row: [workspace.features_folder(row)],
)
def features(run: Run, settings: EvaluationSettings) -> None:
    """Train the classifier in whose features images are compared, and compute the features of all test images.

    NAME is a row of `evaluations`, named like its data set. The controls and all densities of the data set use them. Without
    `quality` this stage does nothing.
    """
    from pipeline.evaluation.features import write_features
    from pipeline.storage.shards import ShardReader

    reader = ShardReader(workspace.shards_folder(run.row))
    run.read(run.row, reader.index.digest, reader.folder, "features")
    shape = write_features(workspace.features_folder(run.row), settings.quality, reader)
    if shape is not None:
        run.metrics({"test_images": shape[0], "features": shape[1]})
