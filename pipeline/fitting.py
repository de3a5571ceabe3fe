"""Codes -> density: standardise, train or estimate, score."""

from __future__ import annotations

import collections
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.contest import Contest, hold_contest
from pipeline.densities import Density, auto
from pipeline.densities.common.context import Column, Context
from pipeline.densities.common.density import Codes, build_density, build_described, random_subset
from pipeline.densities.common.transforms import FITTED_CODES, Transform, build_transform
from pipeline.errors import DataError
from pipeline.evaluation.likelihood import Block, log_likelihood, with_context
from pipeline.settings import DensitySettings
from pipeline.storage.batches import Batches
from pipeline.storage.codes import CodeReader
from pipeline.storage.columns import VectorMoments
from pipeline.system.progress import Progress
from pipeline.system.ranks import Ranks
from pipeline.system.streams import stream_seed
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.loop import train
from pipeline.training.trainable import Step, Trainable, Training

__all__ = ["cholesky_factor", "discrepancy", "fit_context", "fit_density"]

VALID_CODES = 100_000  # validation codes for the choice of the epoch, at most
DISCREPANCY_CODES = 2_000  # the same for a family without likelihood; the cost grows with their square
CONTEXTS = 4096  # different contexts that a density keeps; of more, a random subset of those of training codes
TIMED_CODES = 16  # by which the time of training is estimated
ANNOUNCED_SECONDS = 120  # of training, from which on its time is announced
ESTIMATE_CODES = 100_000  # validation codes that a family without gradient may choose on, at most


class _Fit(Trainable):
    """A density and its loss, as a `Trainable` for the training loop."""

    def __init__(self, density: Density, settings: DensitySettings) -> None:
        super().__init__()
        self.density, self.by_muon, self.muon_rate = density, settings.optimizer == "muon", settings.muon_rate

    def muon_parameters(self, phase: str) -> list[Tensor]:
        """The weights between hidden layers, if the settings choose Muon."""
        return self.density.hidden_matrices() if self.by_muon else []

    def forward(self, phase: str, batch: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        """The loss (4) in nats per dimension, of standardised codes."""
        return {"loss": self.density.loss(batch["codes"], step.generator, batch.get("context"))}


@torch.no_grad()
def discrepancy(density: Density, blocks: Iterable[np.ndarray], seed: int) -> float:
    """Squared maximum mean discrepancy between blocks of codes (n, D) and as many samples, drawn from the seed."""
    codes = torch.from_numpy(np.concatenate(list(blocks))).to(density.shift.device)
    return float(density.discrepancy(codes, torch.Generator().manual_seed(stream_seed("validation samples", seed))))


def cholesky_factor(blocks: Iterable[np.ndarray], mean: Tensor, std: Tensor | None = None) -> Tensor:
    r"""The lower triangular L with L L^T the covariance of codes.

    With standard deviations, the correlations :math:`R` of the standardised codes :math:`x_n` are shrunk to

    .. math:: (1 - a) R + a I, \quad a = \frac{\frac{1}{N^2} \sum_n \|x_n x_n^T - R\|^2}{\|R - I\|^2},

    with a at most 1, which has the least expected error.

    References:
        | A well-conditioned estimator for large-dimensional covariance matrices (Ledoit, Wolf, 2004)
        | https://doi.org/10.1016/S0047-259X(03)00096-4

    Arguments:
        blocks: Codes, each block with shape (n, D).
        mean: Their mean, float64 with shape (D,).
        std: Their standard deviation, float64 with shape (D,); None for no shrinkage.

    Returns:
        The factor, float64 with shape (D, D).

    Raises:
        DataError: When the codes lie in a subspace.
    """
    products, fourth, count = torch.zeros(len(mean), len(mean), dtype=torch.float64), 0.0, 0
    scale = torch.ones_like(mean) if std is None else std
    for block in blocks:
        deviations = (torch.from_numpy(block).double() - mean) / scale
        products += deviations.T @ deviations
        fourth += float(deviations.square().sum(dim=1).square().sum())
        count += len(block)
    matrix = products / count
    if std is not None:
        identity = torch.eye(len(mean), dtype=torch.float64)
        error = (fourth / count - float(matrix.square().sum())) / count  # (1/N^2) sum ||x x^T - R||^2
        share = min(1.0, error / max(float((matrix - identity).square().sum()), 1e-300))
        matrix = torch.lerp(matrix, identity, share)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) or not bool(torch.isfinite(factor).all()):
        raise DataError(
            "the codes vary in fewer directions than they have dimensions, so their covariance has no Cholesky factor; "
            "set shrinkage: true or standardise: dimension"
        )
    return scale[:, None] * factor


@torch.no_grad()
def estimated_seconds(density: Density, block: Block, examples: int) -> float:
    """About how long training on so many examples takes: three times as long as scoring them, by the time of a few.

    Arguments:
        density: The density, which isn't changed.
        block: Some codes, with shape (n, D), and their contexts if there are any.
        examples: Examples in all steps.
    """
    training = density.training
    density.eval()
    parts = block if isinstance(block, tuple) else (block,)
    few = [torch.from_numpy(part[:TIMED_CODES]).to(density.shift.device) for part in parts]
    times = []
    for _ in range(2):  # the first call is slower
        started = time.monotonic()
        density.log_prob(*few)
        times.append(time.monotonic() - started)
    density.train(training)
    return 3 * min(times) / max(len(few[0]), 1) * examples


def fit_transform(
    kind: str, blocks: Callable[[], Iterable[np.ndarray]], dim: int, seed: int
) -> tuple[Transform, Tensor, Tensor]:
    """A monotone map of each column, and the moments of mapped codes, from a random subset of codes.

    Arguments:
        kind: The map's name, a value of the setting `transform`.
        blocks: Gives a new pass over the training codes, each block with shape (n, D).
        dim: The number of columns D.
        seed: Seed of the subset.

    Returns:
        The map, and mean and standard deviation of the mapped codes, float64 with shape (D,).

    Raises:
        DataError: When the map isn't defined for some of the codes.
    """
    transform = build_transform(kind, dim)
    codes = random_subset(map(torch.from_numpy, blocks()), FITTED_CODES, stream_seed("subset for a transform", seed))
    transform.fit(codes.double())
    mapped = transform(codes).double()
    return transform, mapped.mean(dim=0), mapped.std(dim=0, correction=0)


def transformed(transform: Transform, blocks: Callable[[], Iterable[np.ndarray]]) -> Callable[[], Iterable[np.ndarray]]:
    """The same passes over codes, each block mapped."""
    return lambda: (transform(torch.from_numpy(block)).numpy() for block in blocks())


def fit_context(codes: CodeReader, names: Sequence[str], seed: int) -> Context:
    """The columns that a density is conditioned on, with the contexts of the training codes and their frequencies.

    Arguments:
        codes: The codes.
        names: Names of the columns.
        seed: Seed of the subset of contexts, where they can't be listed.

    Raises:
        DataError: When the codes have no such column.
    """
    moments, levels = VectorMoments(len(names)), [set[float]() for _ in names]
    counts: collections.Counter[tuple[float, ...]] | None = collections.Counter()
    words = [codes.words(name) for name in names]
    for block in codes.blocks("train"):
        context = codes.context(block, names)
        moments.update(context)
        for known, column in zip(levels, context.T, strict=True):
            known.update(np.unique(column).tolist())
        if counts is not None and None not in words:
            rows, number = np.unique(context, axis=0, return_counts=True)
            counts.update(dict(zip(map(tuple, rows.tolist()), number.tolist(), strict=True)))
            counts = counts if len(counts) <= CONTEXTS else None
    columns = []
    for name, column_words, known in zip(names, words, levels, strict=True):
        values = tuple(sorted(known)) if column_words is not None else ()
        columns.append(Column(name=name, levels=values, words=tuple(_word(value, column_words) for value in values)))
    complete = counts is not None and None not in words
    if counts is not None and complete:
        kept = torch.tensor(sorted(counts))
        weights = torch.tensor([counts[row] for row in sorted(counts)]).double()
    else:
        blocks = (torch.from_numpy(codes.context(block, names)) for block in codes.blocks("train"))
        kept = random_subset(blocks, CONTEXTS, stream_seed("subset of contexts", seed))
        weights = torch.ones(len(kept)).double()
    result = Context(columns, len(kept), complete)
    result.rows.copy_(kept)
    result.weights.copy_(weights / weights.sum())
    result.mean.copy_(torch.from_numpy(moments.mean))
    result.std.copy_(torch.from_numpy(np.where(moments.std > 0, moments.std, 1.0)))
    return result


def _word(value: float, words: Sequence[str] | None) -> str:
    """What a level is called: its name, or its number if there are no names."""
    return words[int(value)] if words and 0 <= value < len(words) else f"{value:g}"


def fit_density(
    settings: DensitySettings,
    codes: CodeReader,
    ranks: Ranks,
    label: str = "fitting",
    checkpoint: Checkpoint | None = None,
    quiet: bool = False,
) -> tuple[Density, Training]:
    """Fits a density on cached codes: the family `auto` by a contest, any other by its row's settings.

    Training by gradient keeps the weights of the best validation: the highest mean log-likelihood of validation codes,
    `valid_log_likelihood`. For a family without likelihood it is the lowest squared discrepancy between validation codes and as
    many samples, always of the same noise; it is recorded with the opposite sign as `valid_minus_squared_mmd`.

    Arguments:
        settings: A row of `densities`.
        codes: The codes.
        ranks: This process among its peers.
        label: Prefix of progress messages.
        checkpoint: Where to save and look for the resume state.
        quiet: Whether a contest doesn't print each new best.

    Raises:
        DataError: When the codes are damaged or a dimension doesn't vary.
        TrainingError: When the loss isn't finite.
    """
    if isinstance(settings, auto.Settings):
        return _fit_by_contest(settings, codes, ranks, label, quiet)
    torch.manual_seed(stream_seed("density weights", settings.seed))
    context = fit_context(codes, settings.context_names, settings.seed) if settings.context_names else None
    density = build_density(settings, codes.index.dim, context)
    mean, std = torch.tensor(codes.index.mean, dtype=torch.float64), torch.tensor(codes.index.std, dtype=torch.float64)
    blocks: Callable[[], Iterable[np.ndarray]] = codes.stream("train")
    if settings.transform != "none":
        density.transform, mean, std = fit_transform(settings.transform, blocks, codes.index.dim, settings.seed)
        blocks = transformed(density.transform, blocks)
    if settings.standardise == "dimension":
        density.standardise(mean, std)
    elif settings.standardise == "scalar":
        # One scale for all dimensions: the root of the mean variance around the common mean.
        density.standardise(mean.mean(), (std.square() + (mean - mean.mean()).square()).mean().sqrt())
    elif settings.standardise == "cholesky":
        density.standardise(mean, cholesky_factor(blocks(), mean, std if settings.shrinkage else None))
    density.to(ranks.device)
    if not density.trained_by_gradient:
        return density, _estimate(density, codes, settings, ranks, label)

    batches = Batches(
        lambda number: codes.load("train", number),
        codes.counts("train"),
        settings.batch_size,
        settings.seed,
        window=settings.shuffle_examples,
        rank=ranks.rank if density.has_mean_loss else 0,
        world=ranks.world if density.has_mean_loss else 1,
    )

    def prepare(arrays: dict[str, Any]) -> dict[str, Tensor]:
        batch = {"codes": arrays["codes"]}
        if settings.context_names:
            batch["context"] = codes.context(arrays, settings.context_names)
        return {name: torch.from_numpy(array).to(ranks.device, non_blocking=True) for name, array in batch.items()}

    if ranks.first and not quiet and density.has_log_prob:
        few = next(with_context(density, codes, codes.blocks("valid", TIMED_CODES)))
        seconds = estimated_seconds(density, few, settings.epochs * batches.steps_per_epoch * len(batches.places))
        seconds = min(seconds, settings.max_minutes * 60 or math.inf)
        if seconds > ANNOUNCED_SECONDS:
            size = f"{density.parameter_count:,} parameters in {codes.index.dim} dimensions"
            print(f"{label}: {size}: about {seconds / 60:.0f} minutes, or less with patience", file=sys.stderr, flush=True)

    best = f"valid_{density.likelihood}" if density.has_log_prob else "valid_minus_squared_mmd"

    def validate() -> dict[str, float]:
        if density.has_log_prob:
            blocks = with_context(density, codes, codes.blocks("valid", VALID_CODES))
            return {best: log_likelihood(density, blocks, ranks, codes.index.log_volume).mean}
        return {best: -discrepancy(density, _first(codes, "valid", DISCREPANCY_CODES), settings.seed)}

    training = train(
        _Fit(density, settings),
        batches,
        settings,
        ranks,
        prepare=prepare,
        label=label,
        checkpoint=checkpoint,
        validate=validate,
        best=best,
        validate_steps=settings.validate_steps,
        max_minutes=settings.max_minutes,
        patience=settings.patience,
    )
    return density, training


def _fit_by_contest(
    settings: auto.Settings, codes: CodeReader, ranks: Ranks, label: str, quiet: bool
) -> tuple[Density, Training]:
    """The first rank runs the contest; the others get its result."""
    contest, density = Contest(), auto.Mixture(codes.index.dim)
    if ranks.first:
        alone = Ranks(0, 1, ranks.device)
        density, contest = hold_contest(
            settings, codes, lambda row, part, name: fit_density(row, part, alone, name)[0], label, quiet
        )
    description, contest = ranks.gather((density.description(), contest.without_densities()))[0]
    if not ranks.first:
        rebuilt = build_described(description)
        assert isinstance(rebuilt, auto.Mixture)
        density = rebuilt.to(ranks.device)
    ranks.take_from_first(density.state_dict().values())
    training = Training(steps=len(contest.contestants), examples=codes.index.count("train"), seconds=contest.seconds)
    training.ended_by, training.contest = contest.ended_by, contest.table()
    training.validations = [{"step": 1, "epoch": 1.0, "valid_log_likelihood": contest.score.mean}]
    training.best = training.validations[0] | {
        "valid_log_likelihood_se": contest.score.standard_error,
        "valid_scored": contest.score.number,
    }
    return density.eval(), training


def _first(codes: CodeReader, split: str, limit: int) -> Iterator[np.ndarray]:
    return (block["codes"] for block in codes.blocks(split, limit))


def _estimate(density: Density, codes: CodeReader, settings: DensitySettings, ranks: Ranks, label: str) -> Training:
    started = time.monotonic()
    device = density.shift.device
    tried: dict[str, float] = {}
    over = False
    limit = settings.max_minutes * 60 or math.inf
    with Progress(density.candidates, label, unit="fits", quiet=not ranks.first, seconds=limit) as progress:

        def proceed(name: str, value: float) -> bool:
            nonlocal over
            tried[f"valid_{density.likelihood} of {name}"] = value + codes.index.log_volume
            progress.advance(1, **tried)
            over = bool(ranks.greatest(time.monotonic() - started >= limit))  # all ranks stop at the same candidate
            return not over

        def blocks(split: str, limit: int | None = None) -> Iterator[Codes]:
            for block in with_context(density, codes, codes.blocks(split, limit)):
                if isinstance(block, tuple):
                    z, context = (torch.from_numpy(part).to(device) for part in block)
                    yield z, context
                else:
                    yield torch.from_numpy(block).to(device)

        parts = list(blocks("valid", ESTIMATE_CODES))
        pairs = [part for part in parts if isinstance(part, tuple)]
        alone = [part for part in parts if isinstance(part, Tensor)]
        valid = torch.cat(alone) if alone else (torch.cat([z for z, _ in pairs]), torch.cat([c for _, c in pairs]))
        density.estimate(lambda: blocks("train"), valid, settings.seed, proceed)
    density.eval()
    training = Training(steps=1, examples=codes.index.count("train"), seconds=time.monotonic() - started)
    if over and len(tried) < density.candidates:
        training.ended_by = "max_minutes"
    if density.has_log_prob:
        scored = with_context(density, codes, codes.blocks("valid", VALID_CODES))
        value = log_likelihood(density, scored, log_volume=codes.index.log_volume).mean
        training.validations = [{"step": 1, "epoch": 1.0, f"valid_{density.likelihood}": value}]
        training.best = training.validations[0] if math.isfinite(value) else {}
    return training
