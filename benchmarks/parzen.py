"""Seconds and peak memory of the Parzen score: 10,000 samples, 10,000 validation and 10,000 test points of 784 pixels.

Run with `python benchmarks/parzen.py [samples] [points] [dimensions]`. Samples are drawn block by block, never held.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch

from pipeline.evaluation import parzen


def blocks(count: int, dimensions: int, seed: int, block: int = 2000) -> Iterator[np.ndarray]:
    """Images of 0..1 around a few prototypes, so that distances spread as those of digits do."""
    prototypes = np.random.default_rng(0).random((10, dimensions), dtype=np.float32) ** 4
    generator = np.random.default_rng(seed)
    for start in range(0, count, block):
        n = min(block, count - start)
        noise = generator.standard_normal((n, dimensions), dtype=np.float32) * 0.15
        yield (prototypes[generator.integers(10, size=n)] + noise).clip(0, 1)


def main(samples: int = 10_000, points: int = 10_000, dimensions: int = 784) -> None:
    """Prints one line of figures."""
    torch.set_num_threads(2)
    bandwidths = np.linspace(0.10, 0.29, 20).tolist()
    x, s = torch.rand(2048, dimensions), torch.rand(2048, dimensions)
    start = time.perf_counter()
    for _ in range(5):
        x @ s.T
    rate = 5 * 2 * 2048 * 2048 * dimensions / (time.perf_counter() - start) / 1e9
    start = time.perf_counter()
    result = parzen.score(
        lambda: blocks(points, dimensions, 1),
        lambda: blocks(points, dimensions, 2),
        lambda: blocks(samples, dimensions, 3),
        bandwidths,
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{samples:,} samples, {points:,} + {points:,} points, {dimensions} dimensions: {seconds:.1f} s, peak {peak:.0f} MiB, "
        f"score {result.test_mean:.2f} +- {result.test_standard_error:.2f} at {result.bandwidth:g}; "
        f"matmul {rate:.0f} GFLOP/s, distances alone would take {2 * 2 * samples * points * dimensions / rate / 1e9:.1f} s"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
