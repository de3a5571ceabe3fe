"""Samples and densities -> scores, under the protocol of their data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.codes import CodeReader
from pipeline.densities import Density
from pipeline.evaluation.moments import GroupedMoments, Moments
from pipeline.evaluation.parzen import ParzenScore, ParzenSums, merge, partial_sums, select_bandwidth
from pipeline.fitting import score_codes
from pipeline.ranks import Ranks
from pipeline.settings import ParzenSettings
from pipeline.shards import ShardReader, scale_pixels

__all__ = ["Parzen", "grid_scores", "parzen_samples", "parzen_score", "test_log_likelihood", "unit_blocks"]

Blocks = Callable[[], Iterator[np.ndarray]]


def unit_blocks(reader: ShardReader, split: str, limit: int = 0) -> Blocks:
    """A function that gives the images of a split anew each time, as float32 in 0..1, up to `limit` in all (0 for no limit)."""

    def blocks() -> Iterator[np.ndarray]:
        left = limit or reader.index.count(split)
        for block in reader.blocks(split):
            yield scale_pixels(block["examples"], (0.0, 1.0))[:left]
            left -= len(block["examples"])
            if left <= 0:
                return

    return blocks


def parzen_samples(count: int, reader: ShardReader) -> int:
    """The number n of samples of every row of a data set: `count`, or the number of training images where there are fewer.

    Scores of different n don't compare, and the controls can't have more samples than there are training images.
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


def parzen_score(samples: Blocks, reader: ShardReader, settings: ParzenSettings, ranks: Ranks) -> Parzen:
    """Bandwidth by grid search on validation images, then the score of all test images; ranks share the samples.

    Arguments:
        samples: Gives a pass over blocks of samples in 0..1, each with shape (n, C, H, W).
        reader: Shards of the data set.
        settings: The protocol.
        ranks: This process among its peers.
    """

    def share() -> Iterator[np.ndarray]:
        return (block[ranks.rank :: ranks.world] for block in samples())

    def sums(points: Blocks, bandwidths: tuple[float, ...]) -> ParzenSums:
        mine = partial_sums(points, share, bandwidths, str(ranks.device))
        parts = ranks.gather((mine.log_sums, mine.samples))
        return merge([ParzenSums(s, n, mine.dimensions, bandwidths) for s, n in parts])

    valid = sums(unit_blocks(reader, "valid", settings.validation_count), settings.bandwidths)
    bandwidth, _ = select_bandwidth(settings.bandwidths, valid.log_likelihoods)
    test = sums(unit_blocks(reader, "test"), (bandwidth,))
    score = ParzenScore.from_log_likelihoods(settings.bandwidths, valid.log_likelihoods, test.log_likelihoods[0], valid.samples)
    return Parzen(score, settings.protocol)


def test_log_likelihood(density: Density, codes: CodeReader, by_group: bool) -> dict[str, float]:
    """Mean log-likelihood of the test codes, in nats, with its standard error.

    Arguments:
        density: The density.
        codes: The codes.
        by_group: Whether labels name groups that aren't independent, such as the image of a patch: then the standard error
            over groups is given too.
    """
    moments, groups = Moments(), GroupedMoments()
    grouped = by_group
    for block in codes.blocks("test"):
        values = np.concatenate(list(score_codes(density, [block["codes"]])))
        moments.update(values)
        grouped = grouped and "labels" in block
        if grouped:
            groups.update(values, block["labels"])
    mean, error, count = moments.result()
    scores: dict[str, float] = {"test_log_likelihood": mean, "test_log_likelihood_se": error, "test_scored": float(count)}
    scores |= {"test_log_likelihood_per_dimension": mean / codes.index.dim}
    if grouped:
        result = groups.groups()
        scores |= {"test_log_likelihood_group_se": result.standard_error, "test_groups": result.number}
    return scores


def grid_scores(samples: Iterable[np.ndarray], test: Iterable[np.ndarray], half_length: float) -> dict[str, float]:
    """The truth's own test log-likelihood in nats, and the share of samples in the dropped box, where it has no mass.

    Arguments:
        samples: Blocks of samples, each with shape (n, 2).
        test: Blocks of test points.
        half_length: Half the length of a bar.
    """
    from pipeline.sources.grid import dropped_box, log_density

    truth = Moments()
    for block in test:
        truth.update(log_density(block, half_length))
    inside = total = 0
    for block in samples:
        inside += int(dropped_box(block).sum())
        total += len(block)
    return {"truth_test_log_likelihood": truth.mean, "samples_in_dropped_box": inside / total}
