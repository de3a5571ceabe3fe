"""Log-likelihoods of codes under a density, with their standard errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.densities import Density
from pipeline.errors import DataError
from pipeline.evaluation.moments import KEPT, GroupedMoments, Mean, Moments
from pipeline.storage.codes import CodeReader
from pipeline.storage.parts import Arrays
from pipeline.system.progress import Progress
from pipeline.system.ranks import Ranks

__all__ = ["Block", "CodeScores", "log_likelihood", "score_codes", "test_log_likelihood", "with_context"]

Block = np.ndarray | tuple[np.ndarray, np.ndarray]  # codes (n, D), or with their contexts (n, C)

FEWEST_GROUPS = 5  # with fewer, a standard error over groups is meaningless
SCORED_AT_ONCE = 8192  # codes between two progress messages


def with_context(density: Density, codes: CodeReader, blocks: Iterable[Arrays]) -> Iterator[Block]:
    """Codes of blocks, with their contexts if the density is conditioned; without those that no training code has."""
    for block in blocks:
        if density.context is None:
            yield block["codes"]
            continue
        context = codes.context(block, density.context.names)
        known = density.context.known(torch.from_numpy(context).to(density.shift.device)).cpu().numpy()
        yield block["codes"][known], context[known]


@torch.no_grad()
def score_codes(density: Density, blocks: Iterable[Block]) -> Iterator[np.ndarray]:
    """Log-likelihoods (n,) in nats, float64, of blocks of codes (n, D), given their contexts if there are any."""
    for block in blocks:
        arrays = (torch.from_numpy(part).to(density.shift.device) for part in (block if isinstance(block, tuple) else (block,)))
        yield density.log_prob(*arrays).double().cpu().numpy()


def log_likelihood(density: Density, blocks: Iterable[Block], ranks: Ranks | None = None, log_volume: float = 0.0) -> Mean:
    """Mean log-likelihood of codes in nats, with its standard error; each rank scores its share of the blocks.

    Arguments:
        density: The density.
        blocks: Codes, each block with shape (n, D), with their contexts if there are any.
        ranks: This process among its peers, if there are any.
        log_volume: What is added to each, for the units of a table: `CodeIndex.log_volume`.
    """
    moments = Moments()
    rank_blocks = (b for i, b in enumerate(blocks) if ranks is None or i % ranks.world == ranks.rank)
    for values in score_codes(density, rank_blocks):
        moments.update(values + log_volume)
    if ranks is not None and ranks.world > 1:
        merged = Moments()
        for count, mean, squares in ranks.gather((moments.count, moments.mean, moments.squares)):
            merged.merge(Moments(count, mean, squares))
        moments = merged
    return moments.result()


class CodeScores(NamedTuple):
    """The scores of test codes.

    Attributes:
        metrics: Mean log-likelihood in nats and its standard errors, flat.
        values: Log-likelihood of each of the first test codes, in nats, to compare two densities code by code.
        groups: The group of each; empty where they are independent.
    """

    metrics: dict[str, float]
    values: NDArray[np.float64]
    groups: NDArray[np.int64]


def test_log_likelihood(density: Density, codes: CodeReader, by_group: bool, ranks: Ranks) -> CodeScores:
    """Mean log-likelihood of the test codes, in nats, with its standard error; ranks share the codes.

    Arguments:
        density: The density.
        codes: The codes.
        ranks: This process among its peers.
        by_group: Whether labels name groups of dependent examples, such as the patches of one image. If there are at least
            five groups, the standard error over groups is given too.
    """
    rank_moments = GroupedMoments()
    most = min(codes.index.count("test"), KEPT)
    kept, groups = np.full(most, np.nan), np.zeros(most, np.int64)
    first = 0  # place of the block's first code in the split
    with Progress(codes.index.count("test"), "scoring test codes", unit="codes", quiet=not ranks.first) as progress:
        for number, block in enumerate(codes.blocks("test")):
            before, first = first, first + len(block["codes"])
            if number % ranks.world != ranks.rank:
                continue
            labels = block.get("labels", np.zeros(len(block["codes"]), np.int64))
            groups[before:first] = labels[: max(most - before, 0)]
            for start in range(0, len(labels), SCORED_AT_ONCE):
                part = slice(start, start + SCORED_AT_ONCE)
                (values,) = score_codes(density, [block["codes"][part]])
                values = values + codes.index.log_volume
                rank_moments.update(values, labels[part])
                kept[before + start : before + start + len(values)] = values[: max(most - before - start, 0)]
                progress.advance(len(values) * ranks.world)
    moments = GroupedMoments()
    for gathered, rank_kept, rank_groups in ranks.gather((rank_moments, kept, groups)):
        moments.merge(gathered)
        scored = ~np.isnan(rank_kept)
        kept[scored], groups[scored] = rank_kept[scored], rank_groups[scored]
    mean, error, count = moments.examples()
    if not np.isfinite(mean):
        raise DataError(f"the mean log-likelihood of the test codes is {mean}: the density has diverged; fit it again")
    scores: dict[str, float] = {"test_log_likelihood": mean, "test_log_likelihood_se": error, "test_scored": float(count)}
    scores |= {"test_log_likelihood_per_dimension": mean / codes.index.dim}
    result = moments.groups()
    grouped = by_group and result.number >= FEWEST_GROUPS
    if grouped:
        scores |= {"test_log_likelihood_group_se": result.standard_error, "test_groups": result.number}
    return CodeScores(scores, kept, groups if grouped else groups[:0])
