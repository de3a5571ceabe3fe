"""Parzen-window log-likelihood of test points under a Gaussian kernel on each sample, streamed and exact."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluation.blocks import Blocks
from pipeline.evaluation.moments import KEPT, Moments

__all__ = ["Blocks", "ParzenScore", "ParzenSums", "chunk_sums", "log_likelihoods", "merge", "score"]

POINT_BYTES = 256 * 2**20  # points in memory; the samples are read once for each such chunk of points
POINT_TILE, SAMPLE_TILE = 512, 2048  # a tile of distances fits in the cache of a core
# exp(x) for x < -87 is a denormal float32, ten times as slow. A term of e^-80 times the largest is lost in rounding anyway.
SMALLEST_EXPONENT = -80.0


@dataclass(frozen=True)
class ParzenSums:
    """Contribution of one share of the samples to the window estimate of each point. `merge` joins the shares of several ranks.

    Attributes:
        log_sums: log sum_j exp(-||x - s_j||^2 / (2 h^2)), float64, with shape (H, N); -inf if the share is empty.
        samples: Number of samples in the share.
        dimensions: Length d of a point.
        bandwidths: Bandwidths h, H of them.
    """

    log_sums: NDArray[np.float64]
    samples: int
    dimensions: int
    bandwidths: tuple[float, ...]

    @property
    def log_likelihoods(self) -> NDArray[np.float64]:
        """Log-likelihood log p(x) of each point, in nats, with shape (H, N).

        Raises:
            DataError: When there are no samples.
        """
        if self.samples == 0:
            raise DataError("Parzen score: there are no samples")
        widths = np.asarray(self.bandwidths)[:, None]
        normaliser = math.log(self.samples) + self.dimensions * np.log(widths * math.sqrt(2 * math.pi))
        result: NDArray[np.float64] = self.log_sums - normaliser
        return result


def merge(shares: Sequence[ParzenSums]) -> ParzenSums:
    """The sums over all samples, from the sums over disjoint shares of them at the same points and bandwidths."""
    first = shares[0]
    if any(s.bandwidths != first.bandwidths or s.log_sums.shape != first.log_sums.shape for s in shares):
        raise ValueError("shares differ in points or bandwidths")
    log_sums = np.logaddexp.reduce(np.stack([s.log_sums for s in shares]), axis=0)
    return ParzenSums(log_sums, sum(s.samples for s in shares), max(s.dimensions for s in shares), first.bandwidths)


def _rows(blocks: Iterable[np.ndarray], what: str, dimensions: int = 0) -> Iterator[Tensor]:
    """Blocks as float32 tensors with shape (n, d), checked."""
    for block in blocks:
        if len(block) == 0:
            continue
        rows = torch.from_numpy(np.ascontiguousarray(block, dtype=np.float32)).flatten(1)  # (n, C, H, W) -> (n, d)
        dimensions = dimensions or rows.shape[1]
        if rows.shape[1] != dimensions:
            raise DataError(f"Parzen score: {what} have {rows.shape[1]} dimensions where {dimensions} were expected")
        if not bool(torch.isfinite(rows).all()):
            raise DataError(f"Parzen score: {what} hold NaN or infinite values")
        yield rows


def _chunks(blocks: Iterable[np.ndarray]) -> Iterator[Tensor]:
    """Points joined into chunks of at most POINT_BYTES (but whole blocks)."""
    chunk: list[Tensor] = []
    for rows in _rows(blocks, "points"):
        if chunk and sum(r.nbytes for r in chunk) + rows.nbytes > POINT_BYTES:
            yield torch.cat(chunk)
            chunk = []
        chunk.append(rows)
    if chunk:
        yield torch.cat(chunk)


def _half_squares(rows: Tensor) -> Tensor:
    """||x||^2 / 2 of each row, with shape (n,)."""
    return rows.square().sum(1, dtype=torch.float64).div_(2).float()


def _tile_log_sums(
    points: Tensor, points_half: Tensor, samples: Tensor, samples_half: Tensor, bandwidths: Sequence[float]
) -> NDArray[np.float64]:
    """One tile of log sum_j exp(-||x_i - s_j||^2 / (2 h^2)), with shape (H, n); norms are half the squared norms."""
    # exponent = -||x - s||^2 / 2 = x.s - ||s||^2 / 2 - ||x||^2 / 2; rounding can make it positive where x = s.
    exponent = torch.addmm(samples_half, points, samples.T, beta=-1)  # (n, m)
    exponent.sub_(points_half[:, None]).clamp_(max=0)
    largest = exponent.amax(1)  # the nearest sample, whatever the bandwidth
    exponent.sub_(largest[:, None])
    terms = torch.empty_like(exponent)
    sums = torch.empty(len(bandwidths), len(points), dtype=torch.float64, device=points.device)
    for row, h in zip(sums, bandwidths, strict=True):
        torch.mul(exponent, 1 / h**2, out=terms)
        row.copy_(terms.clamp_(min=SMALLEST_EXPONENT).exp_().sum(1))
    precision = torch.tensor([1 / h**2 for h in bandwidths], dtype=torch.float64, device=points.device)
    log_sums: NDArray[np.float64] = (sums.log() + largest.double() * precision[:, None]).cpu().numpy()
    return log_sums


def _add_block(
    log_sums: NDArray[np.float64],
    points: Tensor,
    points_half: Tensor,
    samples: Tensor,
    samples_half: Tensor,
    bandwidths: Sequence[float],
    first: int,
) -> None:
    """Adds a block of samples to the tile of points that begins at `first`."""
    p = slice(first, first + POINT_TILE)
    for j in range(0, len(samples), SAMPLE_TILE):
        s = slice(j, j + SAMPLE_TILE)
        tile = _tile_log_sums(points[p], points_half[p], samples[s], samples_half[s], bandwidths)
        np.logaddexp(log_sums[:, p], tile, out=log_sums[:, p])


@contextlib.contextmanager
def _mapper(device: str) -> Iterator[Callable[..., Iterable[object]]]:
    """`map` over the cores, one tile per core.

    Threads within each of the many small operations would wait for one another, which is ten times as slow on a busy machine.
    One tile per core also makes the result independent of the number of threads.
    """
    threads = torch.get_num_threads() if device == "cpu" else 1
    if threads == 1:
        yield map
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool.map
        finally:
            torch.set_num_threads(threads)  # which new threads would inherit


@torch.no_grad()
def chunk_sums(points: Blocks, samples: Blocks, bandwidths: Sequence[float], device: str = "cpu") -> Iterator[ParzenSums]:
    """The sums of kernels over one share of the samples, for several bandwidths at once, chunk by chunk of points.

    Distances are float32, from ||x||^2 + ||s||^2 - 2 x.s of centred vectors, clamped at 0. The exponentials of a tile are
    relative to its largest term; tiles are added in float64. Memory holds 256 MiB of points and one block of samples.

    Arguments:
        points: Gives a pass over blocks of points, each with shape (n, d) or (n, C, H, W).
        samples: Gives a pass over blocks of samples of the same shape; it is called once for every 256 MiB of points.
        bandwidths: Standard deviations h of the kernel, in the units of the points.
        device: Where distances are computed.

    Raises:
        DataError: When there are no points, or shapes differ, or a value isn't finite.
    """
    bandwidths = tuple(float(h) for h in bandwidths)
    if not bandwidths or min(bandwidths) <= 0:
        raise ValueError(f"bandwidths must be positive: {bandwidths}")
    dimensions = 0
    first_count: int | None = None
    centre: Tensor | None = None
    for chunk in _chunks(points()):
        if dimensions and chunk.shape[1] != dimensions:
            raise DataError(f"Parzen score: points have {chunk.shape[1]} dimensions where {dimensions} were expected")
        dimensions = chunk.shape[1]
        # A shift leaves distances unchanged, and rounding errors shrink with the norms.
        centre = chunk.double().mean(0).float() if centre is None else centre
        chunk = chunk.sub_(centre).to(device)
        half = _half_squares(chunk)
        log_sums = np.full((len(bandwidths), len(chunk)), -np.inf)
        count = 0
        with _mapper(device) as over:
            for rows in _rows(samples(), "samples", dimensions):
                count += len(rows)
                block = (rows - centre).to(device)
                add = functools.partial(_add_block, log_sums, chunk, half, block, _half_squares(block), bandwidths)
                for _ in over(add, range(0, len(chunk), POINT_TILE)):
                    pass
        first_count = count if first_count is None else first_count
        if count != first_count:
            raise DataError(f"Parzen score: two passes over the samples gave {first_count} and {count} of them")
        yield ParzenSums(log_sums, count, dimensions, bandwidths)
    if first_count is None:
        raise DataError("Parzen score: there are no points to score")


def log_likelihoods(points: Blocks, samples: Blocks, bandwidths: Sequence[float], device: str = "cpu") -> NDArray[np.float64]:
    r"""Parzen-window log-likelihood of each point, in nats in total, with shape (H, N).

    .. math:: \log p(x) = \log \frac{1}{n} \sum_{j=1}^n \exp \frac{-\|x - s_j\|^2}{2 h^2} - d \log(h \sqrt{2 \pi})

    Breuleux, Bengio and Vincent, Quickly Generating Representative Samples from an RBM-Derived Process, 2011

    Arguments:
        points: Gives a pass over blocks of points x, each with shape (n, d) or (n, C, H, W).
        samples: Gives a pass over blocks of samples s of the same shape.
        bandwidths: Standard deviations h of the kernel, H of them.
        device: Where distances are computed.

    Raises:
        DataError: When there are no points or no samples, or shapes differ, or a value isn't finite.

    Example:
        >>> points, samples = np.zeros((1, 2), np.float32), np.array([[0, 0], [3, 4]], np.float32)
        >>> log_likelihoods(lambda: [points], lambda: [samples], [1.0, 5.0]).round(4)
        array([[-2.531 ],
               [-5.2758]])
    """
    return np.concatenate([sums.log_likelihoods for sums in chunk_sums(points, samples, bandwidths, device)], axis=1)


@dataclass(frozen=True)
class ParzenScore:
    """A Parzen-window score. Scores at different numbers of samples aren't comparable.

    Attributes:
        bandwidth: The bandwidth chosen on the validation points.
        bandwidths: The grid.
        valid_curve: Mean validation log-likelihood at each bandwidth of the grid, in nats.
        valid_mean: The same at the chosen bandwidth.
        test_mean: Mean log-likelihood of a test point, in nats.
        test_standard_error: Sample standard deviation over test points / sqrt(number of test points).
        samples: Number of samples.
        valid_points: Number of validation points.
        test_points: Number of test points.
        at_edge: Whether the chosen bandwidth is the first or last of the grid, which is then too narrow.
        test_values: Log-likelihood of each of the first test points, in nats, to compare two sets of samples point by point.
    """

    bandwidth: float
    bandwidths: tuple[float, ...]
    valid_curve: tuple[float, ...]
    valid_mean: float
    test_mean: float
    test_standard_error: float
    samples: int
    valid_points: int
    test_points: int
    at_edge: bool
    test_values: NDArray[np.float64] = field(compare=False, repr=False)


def score(
    valid: Blocks,
    test: Blocks,
    samples: Blocks,
    bandwidths: Sequence[float],
    device: str = "cpu",
    gather: Callable[[ParzenSums], Sequence[ParzenSums]] = lambda mine: [mine],
) -> ParzenScore:
    """Chooses the bandwidth on the validation points and scores the test points with it.

    Memory is independent of the numbers of points and samples: only the moments of each chunk of points are kept, and the
    values of the first test points.

    Arguments:
        valid: Gives a pass over blocks of validation points, each with shape (n, d) or (n, C, H, W).
        test: Gives a pass over blocks of test points.
        samples: Gives a pass over blocks of samples: those of this rank's share.
        bandwidths: The grid, in ascending order.
        device: Where distances are computed.
        gather: Gives the sums of all ranks' shares, from this rank's.

    Raises:
        DataError: When there are no points or no samples, or shapes differ, or a value isn't finite.
    """

    def moments(points: Blocks, widths: Sequence[float], most: int = 0) -> tuple[list[Moments], int, NDArray[np.float64]]:
        moments, count, kept = [Moments() for _ in widths], 0, np.empty((len(widths), 0))
        for rank_sums in chunk_sums(points, samples, widths, device):
            sums = merge(gather(rank_sums))
            count, of_points = sums.samples, sums.log_likelihoods
            for of_width, values in zip(moments, of_points, strict=True):
                of_width.update(values)
            kept = np.concatenate([kept, of_points[:, : most - kept.shape[1]]], axis=1)
        return moments, count, kept

    searched, count, _ = moments(valid, bandwidths)
    curve = tuple(of_width.mean for of_width in searched)
    best = int(np.argmax(curve))
    bandwidth, at_edge = float(bandwidths[best]), len(bandwidths) > 1 and best in (0, len(bandwidths) - 1)
    if at_edge:
        warnings.warn(
            f"Parzen score: the best bandwidth, {bandwidth:g}, is at an end of the grid; widen the grid", stacklevel=2
        )
    (final,), _, (test_values,) = moments(test, [bandwidth], KEPT)
    mean, error, points = final.result()
    return ParzenScore(
        bandwidth=bandwidth,
        bandwidths=tuple(float(h) for h in bandwidths),
        valid_curve=curve,
        valid_mean=curve[best],
        test_mean=mean,
        test_standard_error=error,
        samples=count,
        valid_points=searched[0].count,
        test_points=points,
        at_edge=at_edge,
        test_values=test_values,
    )
