"""Samples -> scores against the images of their data set, by its protocol."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from pipeline.evaluation import parzen, quality
from pipeline.evaluation.blocks import unit_blocks
from pipeline.evaluation.features import RealFeatures, extract_features
from pipeline.evaluation.parzen import ParzenScore
from pipeline.evaluation.quality import QualityScore
from pipeline.settings import ParzenSettings, QualitySettings
from pipeline.storage.columns import log_volume
from pipeline.storage.shards import ShardReader
from pipeline.system.progress import track
from pipeline.system.ranks import Ranks

__all__ = ["Parzen", "parzen_samples", "parzen_score", "quality_scores"]


def parzen_samples(count: int, reader: ShardReader) -> int:
    """The number n of samples of every row of a data set: `count`, or the number of training images if there are fewer.

    Scores at different n aren't comparable, and the controls can't have more samples than there are training images.
    """
    return min(count, reader.index.count("train"))


@dataclass(frozen=True)
class Parzen:
    """A Parzen score and its protocol."""

    score: ParzenScore
    protocol: str

    def metrics(self, prefix: str = "") -> dict[str, float | int | str]:
        """Flat metrics; log-likelihoods are means over points, in nats."""
        return {
            f"{prefix}parzen_test_log_likelihood": self.score.test_mean,
            f"{prefix}parzen_test_se": self.score.test_standard_error,
            f"{prefix}parzen_valid_log_likelihood": self.score.valid_mean,
            f"{prefix}parzen_bandwidth": self.score.bandwidth,
            f"{prefix}parzen_bandwidth_at_edge": int(self.score.at_edge),
            f"{prefix}parzen_samples": self.score.samples,
            f"{prefix}parzen_valid_points": self.score.valid_points,
            f"{prefix}parzen_test_points": self.score.test_points,
            f"{prefix}parzen_protocol": self.protocol,
        }


def parzen_score(
    samples: Callable[[], Iterator[np.ndarray]], count: int, reader: ShardReader, settings: ParzenSettings, ranks: Ranks
) -> Parzen:
    """Bandwidth by grid search on validation examples, then the score of all test examples; ranks share the samples.

    Arguments:
        samples: Gives a pass over blocks of samples, as `unit_blocks` gives examples.
        count: Number of samples per pass, for progress messages.
        reader: Shards of the data set.
        settings: The protocol.
        ranks: This process among its peers.
    """

    def share() -> Iterator[np.ndarray]:
        blocks = track(samples(), count, "Parzen window", "samples", quiet=not ranks.first)
        return (block[ranks.rank :: ranks.world] for block in blocks)

    volume = log_volume(reader.index.columns)
    score = parzen.score(
        unit_blocks(reader, "valid", settings.validation_count),
        unit_blocks(reader, "test"),
        share,
        settings.bandwidths,
        str(ranks.device),
        ranks.gather,
    )
    score = replace(
        score,
        test_mean=score.test_mean + volume,
        valid_mean=score.valid_mean + volume,
        valid_curve=tuple(value + volume for value in score.valid_curve),
        test_values=score.test_values + volume,
    )
    return Parzen(score, settings.protocol)


def quality_scores(
    samples: Iterable[np.ndarray],
    real: RealFeatures,
    settings: QualitySettings,
    labels: tuple[np.ndarray, np.ndarray] | None = None,
) -> QualityScore:
    """KID, FID, precision, recall, density and coverage of samples against all test images; with labels, KID of each class.

    Memory holds one block of images, and all features.

    Arguments:
        samples: Blocks of samples in 0..1, each with shape (n, C, H, W).
        real: The network, and the features of the test images.
        settings: The protocol.
        labels: Labels of the test images, with shape (N,), and of the samples, with shape (n,).
    """
    drawn = extract_features(real.network, track(samples, settings.samples, "features of samples", "samples"))
    score = quality.score(real.network.name, real.values, drawn, settings.seed, settings.neighbours)
    if labels is None:
        return score
    by_class = quality.kid_by_class((real.values, labels[0]), (drawn, labels[1]), settings.seed)
    return dataclasses.replace(score, by_class=by_class)
