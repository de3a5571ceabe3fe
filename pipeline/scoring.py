"""Samples and densities -> scores, under the protocol of their data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.densities import Density
from pipeline.errors import DataError
from pipeline.evaluation import parzen
from pipeline.evaluation.features import FeatureNetwork, extract_features
from pipeline.evaluation.interpolation import InterpolationCurve, draw_pairs, log_likelihood_curve
from pipeline.evaluation.moments import GroupedMoments
from pipeline.evaluation.parzen import ParzenScore
from pipeline.evaluation.two_sample import mmd_squared, share_in_box
from pipeline.fitting import score_codes
from pipeline.settings import InterpolationSettings, ParzenSettings, QualitySettings
from pipeline.storage.codes import CodeReader
from pipeline.storage.shards import ShardReader, scale_pixels
from pipeline.system.progress import Progress, track
from pipeline.system.ranks import Ranks

__all__ = [
    "Parzen",
    "feature_network",
    "grid_scores",
    "interpolation_curves",
    "interpolation_pairs",
    "labelled_codes",
    "parzen_samples",
    "parzen_score",
    "quality_scores",
    "test_log_likelihood",
    "unit_blocks",
]

Blocks = Callable[[], Iterator[np.ndarray]]

INTERPOLATED = 20_000  # test codes that pairs are drawn from, at most, the first of the split
COMPARED = 5_000  # samples, and as many test points, whose discrepancy is taken: all pairs count
FEWEST_GROUPS = 5  # below that, a standard error over groups says nothing
SCORED_AT_ONCE = 8192  # codes, between two lines of progress
CURVE_WEIGHTS = tuple(i / 10 for i in range(11))


def unit_blocks(reader: ShardReader, split: str, limit: int = 0) -> Blocks:
    """A function that gives the examples of a split anew each time, float32, up to `limit` in all (0 for no limit).

    Images are scaled to 0..1, vectors are as they are.
    """

    def blocks() -> Iterator[np.ndarray]:
        left = limit or reader.index.count(split)
        for block in reader.blocks(split):
            examples = block["examples"][:left]
            yield scale_pixels(examples, (0.0, 1.0)) if reader.index.kind == "images" else examples
            left -= len(examples)
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


def parzen_score(samples: Blocks, count: int, reader: ShardReader, settings: ParzenSettings, ranks: Ranks) -> Parzen:
    """Bandwidth by grid search on validation examples, then the score of all test examples; ranks share the samples.

    Arguments:
        samples: Gives a pass over blocks of samples, as `unit_blocks` gives examples.
        count: Number of samples in a pass, for the progress.
        reader: Shards of the data set.
        settings: The protocol.
        ranks: This process among its peers.
    """

    def share() -> Iterator[np.ndarray]:
        blocks = track(samples(), count, "Parzen window", "samples", quiet=not ranks.first)
        return (block[ranks.rank :: ranks.world] for block in blocks)

    score = parzen.score(
        unit_blocks(reader, "valid", settings.validation_count),
        unit_blocks(reader, "test"),
        share,
        settings.bandwidths,
        str(ranks.device),
        ranks.gather,
    )
    return Parzen(score, settings.protocol)


def test_log_likelihood(density: Density, codes: CodeReader, by_group: bool, ranks: Ranks) -> dict[str, float]:
    """Mean log-likelihood of the test codes, in nats, with its standard error; ranks share the codes.

    Arguments:
        density: The density.
        codes: The codes.
        ranks: This process among its peers.
        by_group: Whether labels name groups that aren't independent, such as the image of a patch: then the standard error
            over groups is given too, where there are at least five.
    """
    mine = GroupedMoments()
    with Progress(codes.index.count("test"), "scoring test codes", unit="codes", quiet=not ranks.first) as progress:
        for number, block in enumerate(codes.blocks("test")):
            if number % ranks.world != ranks.rank:
                continue
            labels = block.get("labels", np.zeros(len(block["codes"]), np.int64))
            for start in range(0, len(labels), SCORED_AT_ONCE):
                part = slice(start, start + SCORED_AT_ONCE)
                (values,) = score_codes(density, [block["codes"][part]])
                mine.update(values, labels[part])
                progress.advance(len(values) * ranks.world)
    moments = GroupedMoments()
    for some in ranks.gather(mine):
        moments.merge(some)
    mean, error, count = moments.examples()
    if not np.isfinite(mean):
        raise DataError(f"the mean log-likelihood of the test codes is {mean}: the density has diverged; fit it again")
    scores: dict[str, float] = {"test_log_likelihood": mean, "test_log_likelihood_se": error, "test_scored": float(count)}
    scores |= {"test_log_likelihood_per_dimension": mean / codes.index.dim}
    result = moments.groups()
    if by_group and result.number >= FEWEST_GROUPS:
        scores |= {"test_log_likelihood_group_se": result.standard_error, "test_groups": result.number}
    return scores


def grid_scores(samples: np.ndarray, test: np.ndarray, half_length: float) -> dict[str, float]:
    """Scores of samples of the grid density, whose truth is known.

    Arguments:
        samples: Samples with shape (n, 2).
        test: Test points with shape (N, 2).
        half_length: Half the length of a bar.

    Returns:
        The truth's own test log-likelihood in nats; the share of samples in the dropped box, where it has no mass, with its
        standard error; and the squared maximum mean discrepancy of samples and test points.
    """
    from pipeline.sources.grid import DROPPED_BOX, log_density

    low, high = np.array(DROPPED_BOX).T
    share = share_in_box(samples, low, high)
    return {
        "truth_test_log_likelihood": float(log_density(test, half_length).mean()),
        "samples_in_dropped_box": share.mean,
        "samples_in_dropped_box_se": share.standard_error,
        "mmd_squared": mmd_squared(test[:COMPARED], samples[:COMPARED]),
    }


# Quality of images in a feature space -------------------------------------------------------------------------------


def feature_network(settings: QualitySettings, reader: ShardReader) -> FeatureNetwork:
    """The network whose features images of a data set are compared by.

    Arguments:
        settings: Which network, and where its weights come from.
        reader: Shards of the data set; the classifier is trained on its labelled training images.

    Raises:
        DataError: When there are no labels for the classifier, or no weights where they should be.
    """
    from pipeline.evaluation import features

    if settings.network == "inception":
        return features.inception_network(settings.weights or "")
    if settings.network == "vgg19":
        from pipeline.autoencoders.common.perceptual import vgg19_weights

        return features.vgg19_network(vgg19_weights(settings.weights or ""))

    def labelled() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        left = settings.classifier_examples
        for block in reader.blocks("train"):
            if "labels" not in block:
                raise DataError("quality.network: the images have no labels to train the classifier on; use vgg19 or inception")
            yield scale_pixels(block["examples"], (0.0, 1.0))[:left], block["labels"][:left]
            left -= len(block["labels"])
            if left <= 0:
                return

    classes = len(reader.index.label_names or ()) or 1 + max(int(labels.max()) for _, labels in labelled())
    classifier = features.train_classifier(labelled, classes, settings.seed, settings.classifier_epochs)
    return features.classifier_network(classifier)


def quality_scores(
    samples: Iterable[np.ndarray], reader: ShardReader, network: FeatureNetwork, settings: QualitySettings
) -> dict[str, float]:
    """KID, FID, precision, recall, density and coverage of samples against all test images.

    Memory holds a block of images, and features.

    Arguments:
        samples: Blocks of samples in 0..1, each with shape (n, C, H, W).
        reader: Shards of the data set.
        network: As made by `feature_network`.
        settings: The protocol.
    """
    from pipeline.evaluation.quality import score

    tests = track(unit_blocks(reader, "test")(), reader.index.count("test"), "features of test images")
    real = extract_features(network, tests)
    drawn = extract_features(network, track(samples, settings.samples, "features of samples", "samples"))
    return score(network.name, real, drawn, settings.seed, settings.neighbours).metrics()


# Interpolation of codes ---------------------------------------------------------------------------------------------


def labelled_codes(codes: CodeReader) -> tuple[NDArray[np.float32], NDArray[np.int64] | None]:
    """The first test codes with shape (N, D), and their labels with shape (N,).

    No labels are given where pairs can't be told apart by them: all are equal, or no two are.
    """
    blocks = list(codes.blocks("test", INTERPOLATED))
    values = np.concatenate([block["codes"] for block in blocks])
    if not all("labels" in block for block in blocks):
        return values, None
    labels = np.concatenate([block["labels"] for block in blocks])
    return values, labels if 1 < len(np.unique(labels)) < len(labels) else None


def interpolation_curves(
    density: Density,
    codes: NDArray[np.float32],
    labels: NDArray[np.int64] | None,
    settings: InterpolationSettings,
) -> dict[str, InterpolationCurve]:
    """Log-likelihood of interpolated codes against the weight (Figure 10), for pairs of the `same` and of `different` labels.

    Arguments:
        density: A density with likelihood.
        codes: Test codes with shape (N, D).
        labels: Their labels with shape (N,); without them there is one curve, `any`.
        settings: Number and seed of the pairs.
    """
    device = density.shift.device

    def log_prob(z: torch.Tensor) -> torch.Tensor:
        return density.log_prob(z.to(device))

    kinds = {"any": True} if labels is None else {"same": True, "different": False}
    values = np.zeros(len(codes), np.int64) if labels is None else labels
    return {
        kind: log_likelihood_curve(codes, draw_pairs(values, settings.pairs, same, settings.seed), log_prob, CURVE_WEIGHTS)
        for kind, same in kinds.items()
    }


def interpolation_pairs(
    count: int, labels: NDArray[np.int64] | None, names: Sequence[str], seed: int, pairs: int = 2
) -> list[tuple[str, NDArray[np.int64]]]:
    """Pairs of test examples to show (Figure 7): within each of two labels and across, or of the same and different labels.

    Arguments:
        count: Number of test examples N.
        labels: Their labels with shape (N,), or None.
        names: Names of the labels.
        seed: Seed of the draw.
        pairs: Pairs of a kind.

    Returns:
        What each pair is, and its two indices.
    """
    if labels is None:
        return [("any two", pair) for pair in draw_pairs(np.zeros(count), 2 * pairs, True, seed)]
    present = np.unique(labels).tolist()
    shown: list[tuple[str, NDArray[np.int64]]] = []
    if len(present) == 2:
        for label in present:
            members = np.flatnonzero(labels == label)
            if len(members) > 1:
                name = f"within {names[label]}" if label < len(names) else f"within {label}"
                shown += [(name, members[pair]) for pair in draw_pairs(np.zeros(len(members)), pairs, True, seed)]
    else:
        shown += [("same label", pair) for pair in draw_pairs(labels, pairs, True, seed)]
    across = draw_pairs(labels, pairs, False, seed)
    if len(present) == 2:
        # The first domain at the left throughout.
        across = np.stack([pair if labels[pair[0]] == present[0] else pair[::-1] for pair in across])
    return [*shown, *(("across" if len(present) == 2 else "different labels", pair) for pair in across)]
