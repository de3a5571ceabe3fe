"""Interpolated codes: their log-likelihood within and across labels (Figure 10), and their images (Figure 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pipeline.densities import Density
from pipeline.errors import DataError
from pipeline.evaluation.moments import Mean, Moments, mean_and_error
from pipeline.settings import InterpolationSettings
from pipeline.storage.codes import CodeReader
from pipeline.system.streams import stream

__all__ = [
    "CURVE_WEIGHTS",
    "WEIGHTS",
    "InterpolationCurve",
    "draw_pairs",
    "interpolate",
    "interpolated_images",
    "interpolation_curves",
    "interpolation_pairs",
    "labelled_codes",
    "log_likelihood_curve",
]

WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # section 4.2.2
CURVE_WEIGHTS = tuple(i / 10 for i in range(11))
INTERPOLATED = 20_000  # test codes that pairs are drawn from, at most, the first of the split


def interpolate(first: Tensor, last: Tensor, weights: Sequence[float] = WEIGHTS) -> Tensor:
    r"""Points on the straight lines between codes.

    .. math:: z_a = (1 - a) z_0 + a z_1

    Arguments:
        first: Codes z_0 with shape (n, D).
        last: Codes z_1 with shape (n, D).
        weights: Weights a, A of them.

    Returns:
        Interpolated codes with shape (A, n, D).

    Example:
        >>> interpolate(torch.zeros(1, 2), torch.ones(1, 2), [0.0, 0.5, 1.0])[:, 0, 0]
        tensor([0.0000, 0.5000, 1.0000])
    """
    a = torch.as_tensor(weights, dtype=first.dtype, device=first.device)[:, None, None]
    return (1 - a) * first + a * last


def draw_pairs(labels: ArrayLike, count: int, same: bool, seed: int) -> NDArray[np.int64]:
    """Random pairs of distinct examples, of the same label or of different ones.

    The first of each pair is drawn uniformly, the second uniformly among its possible partners.

    Arguments:
        labels: Label of each example with shape (N,); in section 4.2.2 the domain.
        count: Number of pairs.
        same: Whether both have the same label.
        seed: Seed of the draw.

    Returns:
        Indices with shape (count, 2).

    Raises:
        DataError: When no example has a partner.

    Example:
        >>> labels = np.array([0, 0, 0, 1, 1, 1])
        >>> pairs = draw_pairs(labels, 100, same=False, seed=0)
        >>> bool((labels[pairs[:, 0]] != labels[pairs[:, 1]]).all())
        True
    """
    values = np.asarray(labels)
    order = np.argsort(values, kind="stable")  # puts examples of one label next to each other
    names, starts, counts = np.unique(values[order], return_index=True, return_counts=True)
    enough = counts > 1 if same else len(values) - counts > 0
    group = np.searchsorted(names, values)
    candidates = np.flatnonzero(enough[group])
    if not len(candidates):
        raise DataError(f"no two examples have {'the same label' if same else 'different labels'}: pairs can't be drawn")
    generator = stream("pairs of one label" if same else "pairs of two labels", seed)
    first = generator.choice(candidates, size=count)
    start, length = starts[group[first]], counts[group[first]]
    place = np.empty(len(values), dtype=np.int64)
    place[order] = np.arange(len(values))
    if same:
        # One of the other length - 1 positions in the group: skip the first example's position.
        step = generator.integers(1, length)
        second = start + (place[first] - start + step) % length
    else:
        # One of the positions outside the group; they start where it ends and wrap around.
        step = generator.integers(0, len(values) - length)
        second = (start + length + step) % len(values)
    return np.stack([first, order[second]], axis=1).astype(np.int64)


@dataclass(frozen=True)
class InterpolationCurve:
    """Log-likelihood of interpolated codes against the weight, over many pairs; all in nats, in the units of the codes.

    Attributes:
        weights: Weights a, A of them.
        mean: Mean over pairs with shape (A,).
        standard_error: Standard error of the mean over pairs, with shape (A,).
        lower: First quartile over pairs, with shape (A,).
        upper: Third quartile over pairs, with shape (A,).
        fall: Mean at the two ends minus the mean over 0.4 <= a <= 0.6, over pairs. Unlike the likelihoods, it is comparable
            across encoders, whose codes have different units.
        pairs: Number of pairs.
    """

    weights: tuple[float, ...]
    mean: NDArray[np.float64]
    standard_error: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    fall: Mean
    pairs: int


@torch.no_grad()
def log_likelihood_curve(
    codes: NDArray[np.floating],
    pairs: NDArray[np.int64],
    log_prob: Callable[[Tensor], Tensor],
    weights: Sequence[float] = WEIGHTS,
    batch_size: int = 4096,
) -> InterpolationCurve:
    """Log-likelihoods of the codes between pairs (Figure 10).

    Arguments:
        codes: Codes of test examples with shape (N, D).
        pairs: Indices with shape (P, 2); see `draw_pairs`.
        log_prob: Codes with shape (n, D), float32 -> log-likelihoods in nats with shape (n,).
        weights: Weights a.
        batch_size: Codes scored at once.
    """
    values = torch.from_numpy(np.asarray(codes, dtype=np.float32))
    ends = values[torch.from_numpy(pairs[:, 0])], values[torch.from_numpy(pairs[:, 1])]
    between = interpolate(*ends, weights).flatten(0, 1)  # (A, P, D) -> (A P, D)
    parts = [log_prob(part).double().cpu() for part in between.split(batch_size)]
    scores = torch.cat(parts).reshape(len(weights), len(pairs)).numpy()  # (A, P)
    moments = [Moments() for _ in weights]
    for m, row in zip(moments, scores, strict=True):
        m.update(row)
    a = np.asarray(weights)
    middle = (a > 0.4 - 1e-9) & (a < 0.6 + 1e-9)
    fall = (scores[0] + scores[-1]) / 2 - scores[middle].mean(axis=0) if middle.any() else np.empty(0)
    lower, upper = np.quantile(scores, [0.25, 0.75], axis=1)
    return InterpolationCurve(
        weights=tuple(float(w) for w in weights),
        mean=np.array([m.mean for m in moments]),
        standard_error=np.array([m.result().standard_error for m in moments]),
        lower=lower,
        upper=upper,
        fall=mean_and_error(fall),
        pairs=len(pairs),
    )


@torch.no_grad()
def interpolated_images(
    first: Tensor, last: Tensor, decode: Callable[[Tensor], Tensor], weights: Sequence[float] = WEIGHTS
) -> NDArray[np.float32]:
    """Decoded images between two codes (a row of Figure 7), with shape (A, C, H, W).

    Arguments:
        first: Code z_0 with shape (D,).
        last: Code z_1 with shape (D,).
        decode: Codes with shape (n, D) -> images in 0..1 with shape (n, C, H, W).
        weights: Weights a.
    """
    images = decode(interpolate(first[None], last[None], weights)[:, 0])
    return images.float().cpu().numpy()


def labelled_codes(codes: CodeReader) -> tuple[NDArray[np.float32], NDArray[np.int64] | None]:
    """The first test codes with shape (N, D), and their labels with shape (N,).

    Labels are None if they can't distinguish pairs: all are equal, or no two are.
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
        labels: Their labels with shape (N,); without labels there is one curve, `any`.
        settings: Number and seed of the pairs.
    """
    device = density.shift.device

    def log_prob(z: Tensor) -> Tensor:
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
        pairs: Pairs per kind.

    Returns:
        What each pair is, and its two indices.
    """
    if labels is None:
        return [("any two", pair) for pair in draw_pairs(np.zeros(count), 2 * pairs, True, seed)]
    present = np.unique(labels).tolist()
    named_pairs: list[tuple[str, NDArray[np.int64]]] = []
    if len(present) == 2:
        for label in present:
            members = np.flatnonzero(labels == label)
            if len(members) > 1:
                name = f"within {names[label]}" if label < len(names) else f"within {label}"
                named_pairs += [(name, members[pair]) for pair in draw_pairs(np.zeros(len(members)), pairs, True, seed)]
    else:
        named_pairs += [("same label", pair) for pair in draw_pairs(labels, pairs, True, seed)]
    across = draw_pairs(labels, pairs, False, seed)
    if len(present) == 2:
        # The first domain is always on the left.
        across = np.stack([pair if labels[pair[0]] == present[0] else pair[::-1] for pair in across])
    return [*named_pairs, *(("across" if len(present) == 2 else "different labels", pair) for pair in across)]
