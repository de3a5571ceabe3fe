"""density, autoencoder, shards of two data sets -> how well outliers are told from inliers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.settings import DatasetSettings, DetectionSettings, Params
from stages import workspace
from stages.run import Run, stage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.detection import Extremes, Scores
    from pipeline.storage.shards import ShardReader

SHOWN = 10  # examples of each kind for the page
BINS = 60


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The detection's row, and the data set of the outliers."""

    detection: DetectionSettings
    other: DatasetSettings


def _settings(params: Params, row: str) -> Settings:
    detection = params.detection(row)
    return Settings(detection=detection, other=params.dataset(detection.outliers))


@stage(
    settings=_settings,
    reads=lambda settings, row: [
        workspace.shards_folder(settings.detection.dataset),
        workspace.shards_folder(settings.detection.outliers),
        workspace.autoencoder_folder(settings.detection.codes),
        workspace.density_file(settings.detection.density),
    ],
    writes=lambda settings, row: [workspace.arrays_folder("detect", row)],
)
def detect(run: Run, settings: Settings) -> None:
    """Tell outliers from inliers by a density.

    NAME is a row of `detections`. The inliers are the test examples of the density's own data set, the outliers those of
    another. Each is scored by the log-likelihood of its code, by the error of its reconstruction, and by both joined.
    Validation examples say what is usual, and set the threshold.
    """
    from pipeline.detection import calibrated, fitted, load_scorer, recoded, scored
    from pipeline.evaluation.detection import detect as detection_of
    from pipeline.storage.shards import ShardReader
    from pipeline.system.ranks import join

    chosen = settings.detection
    own, other = (ShardReader(workspace.shards_folder(name)) for name in (chosen.dataset, chosen.outliers))
    run.read(chosen.dataset, own.index.digest, own.folder, "inliers")
    run.read(chosen.outliers, other.index.digest, other.folder, "outliers")
    files = workspace.density_file(chosen.density), workspace.autoencoder_folder(chosen.codes)
    scorer = load_scorer(*files, own, join().device, relative_error=chosen.error == "relative")
    calibration, _ = calibrated(scorer, own)
    threshold = calibration.threshold(chosen.false_alarms)

    patches = settings.other.drawn_as == "patches"
    blocks = {
        "inliers": (block["examples"] for block in own.blocks("test")),
        "outliers": (
            fitted(
                recoded(examples, other.index.columns, own.index.columns, chosen.outliers, number),
                own.index.shape,
                chosen.outliers,
                patches,
            )
            for number, examples in enumerate(_outliers(other, chosen.outlier_classes))
        ),
    }
    totals = {"inliers": own.index.count("test"), "outliers": other.index.count("test")}
    found = {kind: scored(scorer, calibration, blocks[kind], totals[kind], kind, SHOWN) for kind in blocks}
    (inliers, strange_inliers), (outliers, strange_outliers) = found["inliers"], found["outliers"]
    run.metrics(detection_of(inliers["strangeness"], outliers["strangeness"], chosen.seed).metrics())
    for name, sign in _signs(inliers).items():
        single = detection_of(sign * inliers[name], sign * outliers[name], chosen.seed)
        run.metrics({f"{name}_auroc": single.auroc, f"{name}_auroc_se": single.auroc_se})
    taken = {kind: scores["strangeness"] > threshold for kind, (scores, _) in found.items()}
    run.metrics({"threshold": threshold, "threshold_false_alarms": float(taken["inliers"].mean())})
    run.metrics({"threshold_detected": float(taken["outliers"].mean())})
    run.metrics({f"{kind}_scored": len(scores["strangeness"]) for kind, (scores, _) in found.items()})
    run.metrics({"calibrating": len(calibration.joined)})
    _arrays(run, inliers, outliers, threshold)
    _examples(run, strange_inliers, strange_outliers)


def _signs(scores: Scores) -> dict[str, int]:
    """Single scores -> the sign that makes larger ones stranger."""
    from pipeline.detection import JOINED

    return {name: sign for name, sign in JOINED.items() if name in scores}


def _outliers(reader: ShardReader, classes: tuple[int, ...]) -> Iterator[NDArray[np.generic]]:
    """The test examples of some labels, or all."""
    import numpy as np

    from pipeline.errors import DataError

    for block in reader.blocks("test"):
        if classes and "labels" not in block:
            raise DataError(f"{reader.folder}: its examples have no labels for outlier_classes; leave that out")
        examples = block["examples"]
        examples = examples[np.isin(block["labels"], classes)] if classes else examples
        if len(examples):
            yield examples


def _arrays(run: Run, inliers: Scores, outliers: Scores, threshold: float) -> None:
    """Histograms of the scores, and the ROC curve of each."""
    import numpy as np

    from pipeline.evaluation.detection import roc_curve

    signs = {"strangeness": 1, **_signs(inliers)}
    histograms, curves = {}, {}
    for name, sign in signs.items():
        both = np.concatenate([inliers[name], outliers[name]])
        low, high = np.quantile(both[np.isfinite(both)], [0.005, 0.995]).tolist()
        edges = np.linspace(low, high, BINS + 1)
        histograms[f"{name}_edges"] = edges
        for kind, scores in (("inliers", inliers), ("outliers", outliers)):
            histograms[f"{name}_{kind}"] = np.histogram(scores[name].clip(edges[0], edges[-1]), edges)[0] / len(scores[name])
        curves[f"{name}_alarms"], curves[f"{name}_detected"] = roc_curve(sign * inliers[name], sign * outliers[name])
    run.arrays("scores", histograms | {"threshold": np.array([threshold])}, list(signs))
    run.arrays("roc", curves, list(signs))


def _examples(run: Run, inliers: Extremes, outliers: Extremes) -> None:
    """The strangest and the most ordinary examples of either kind, in bytes, with their strangeness in nats."""
    import numpy as np

    from stages.arrays import as_bytes

    values: dict[str, NDArray[np.generic]] = {}
    names: list[str] = []
    for kind, kept in (("inliers", inliers), ("outliers", outliers)):
        for name, examples in (("most ordinary", kept.ordinary), ("strangest", kept.strangest)):
            key = f"{len(names)}"
            names.append(f"{name} {kind}")
            stacked = np.stack([example for _, example, _ in examples])
            images = stacked.ndim == 4 and stacked.dtype != np.uint8
            values[f"{key}_examples"] = as_bytes(stacked) if images else stacked
            values[f"{key}_strangeness"] = np.array([value for value, _, _ in examples])
    run.arrays("strangest", values, names)
