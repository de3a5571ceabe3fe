"""The Parzen score against a literal float64 twin, closed forms, and its own parts."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch

from pipeline.errors import DataError
from pipeline.evaluation import parzen


def naive(points, samples, bandwidths):
    """log mean_j prod_d N(x_d; s_jd, h^2), term by term in float64."""
    points, samples = np.asarray(points, np.float64), np.asarray(samples, np.float64)
    squares = ((points[:, None] - samples[None]) ** 2).sum(-1)
    rows = []
    for h in bandwidths:
        log_terms = -squares / (2 * h**2) - points.shape[1] * math.log(h * math.sqrt(2 * math.pi))
        rows.append(np.logaddexp.reduce(log_terms, axis=1) - math.log(len(samples)))
    return np.stack(rows)


def images(count, seed, dimensions=64):
    generator = np.random.default_rng(seed)
    prototypes = np.random.default_rng(0).random((5, dimensions))
    return (prototypes[generator.integers(5, size=count)] + 0.1 * generator.normal(size=(count, dimensions))).astype(np.float32)


def split(array, rows):
    return lambda: iter(np.split(array, range(rows, len(array), rows)))


def test_equals_naive_float64():
    points, samples, grid = images(40, 1), images(300, 2), [0.05, 0.1, 0.16, 0.3, 3.0]
    got = parzen.log_likelihoods(split(points, 17), split(samples, 41), grid)
    assert got.dtype == np.float64
    assert got.shape == (5, 40)
    np.testing.assert_allclose(got, naive(points, samples, grid), atol=2e-3, rtol=0)


def test_tiles_cover_all_pairs(monkeypatch):
    monkeypatch.setattr(parzen, "POINT_TILE", 7)
    monkeypatch.setattr(parzen, "SAMPLE_TILE", 11)
    monkeypatch.setattr(parzen, "POINT_BYTES", 10 * 64 * 4)
    points, samples = images(40, 1), images(100, 2)
    got = parzen.log_likelihoods(split(points, 6), split(samples, 33), [0.2])
    np.testing.assert_allclose(got, naive(points, samples, [0.2]), atol=1e-3, rtol=0)


def test_result_does_not_depend_on_threads(monkeypatch):
    monkeypatch.setattr(parzen, "POINT_TILE", 7)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(parzen.log_likelihoods(split(images(40, 1), 40), split(images(100, 2), 30), [0.1, 0.2]))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(*found)


def test_one_sample_is_a_gaussian_and_images_are_flattened():
    point, sample, h = np.full((1, 1, 2, 2), 0.5, np.float32), np.zeros((1, 1, 2, 2), np.float32), 0.7
    expected = -4 * 0.25 / (2 * h**2) - 4 * math.log(h * math.sqrt(2 * math.pi))
    got = parzen.log_likelihoods(lambda: [point], lambda: [sample], [h])
    assert got[0, 0] == pytest.approx(expected, abs=1e-6)


def test_gaussian_samples_give_the_widened_gaussian():
    # Samples of N(0, 1) under a kernel of width h estimate N(0, 1 + h^2).
    samples = np.random.default_rng(0).normal(size=(200_000, 1)).astype(np.float32)
    points, h = np.linspace(-2, 2, 9, dtype=np.float32)[:, None], 0.3
    variance = 1 + h**2
    expected = -(points[:, 0] ** 2) / (2 * variance) - 0.5 * math.log(2 * math.pi * variance)
    got = parzen.log_likelihoods(lambda: [points], split(samples, 50_000), [h])[0]
    np.testing.assert_allclose(got, expected, atol=0.03)


def assert_same_score(got, expected):
    # Matrix products of other shapes round differently: 1e-6 relative for the score, a little more for one point.
    np.testing.assert_allclose(got.mean(axis=1), expected.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(got, expected, rtol=5e-6)


def test_shares_merge_to_the_whole():
    points, samples, grid = images(30, 1), images(101, 2), [0.1, 0.2]

    def sums(blocks):
        return next(parzen.chunk_sums(split(points, 30), blocks, grid))

    whole = sums(split(samples, 101))
    shares = [sums(split(samples[r::3], 10)) for r in range(3)]
    shares.append(sums(lambda: []))  # a rank without any samples
    merged = parzen.merge(shares)
    assert merged.samples == whole.samples == 101
    assert_same_score(merged.log_likelihoods, whole.log_likelihoods)


def test_a_score_takes_the_samples_of_all_ranks():
    points, samples, grid = images(20, 1), images(30, 2), [0.1, 0.2, 0.4]
    halves = [split(samples[r::2], 10) for r in range(2)]
    whole = parzen.score(split(points, 20), split(points, 20), split(samples, 30), grid)
    others = iter([next(parzen.chunk_sums(split(points, 20), halves[1], h)) for h in (grid, [whole.bandwidth])])
    shared = parzen.score(split(points, 20), split(points, 20), halves[0], grid, gather=lambda sums: [sums, next(others)])
    assert shared.samples == 30
    assert shared.test_mean == pytest.approx(whole.test_mean, rel=1e-6)


def test_points_split_over_ranks_give_the_whole():
    points, samples = images(40, 1), images(100, 2)
    whole = parzen.log_likelihoods(split(points, 40), split(samples, 100), [0.15])
    parts = [parzen.log_likelihoods(split(p, 40), split(samples, 100), [0.15]) for p in np.split(points, 4)]
    assert_same_score(np.concatenate(parts, axis=1), whole)


def test_samples_among_the_points_stay_exact():
    # Distances of equal vectors round to something negative, which a narrow kernel would blow up.
    points = images(50, 1) + 100
    got = parzen.log_likelihoods(lambda: [points], lambda: [points], [1e-3])
    peak = -math.log(50) - 64 * math.log(1e-3 * math.sqrt(2 * math.pi))
    assert (got <= peak + 1e-6).all()


def test_far_points_have_finite_log_likelihood():
    got = parzen.log_likelihoods(lambda: [np.full((1, 64), 50, np.float32)], lambda: [images(10, 2)], [0.01])
    assert np.isfinite(got).all()
    assert got < -1e8


def test_score_chooses_on_validation_and_reports_on_test():
    valid, test, samples, grid = images(60, 1), images(50, 2), images(400, 3), np.linspace(0.05, 0.4, 8)
    result = parzen.score(split(valid, 20), split(test, 20), split(samples, 100), grid)
    on_valid = naive(valid, samples, grid).mean(1)
    best = int(on_valid.argmax())
    on_test = naive(test, samples, [grid[best]])[0]
    assert result.bandwidth == grid[best]
    assert not result.at_edge
    assert result.valid_mean == pytest.approx(on_valid[best], abs=1e-3)
    assert result.test_mean == pytest.approx(on_test.mean(), abs=1e-3)
    assert result.test_standard_error == pytest.approx(on_test.std(ddof=1) / math.sqrt(50), abs=1e-3)
    assert (result.samples, result.valid_points, result.test_points) == (400, 60, 50)
    np.testing.assert_allclose(result.valid_curve, on_valid, atol=2e-3)


def test_chunks_of_points_change_nothing(monkeypatch):
    valid, test, samples, grid = images(60, 1), images(50, 2), images(100, 3), [0.05, 0.1, 0.2, 0.3]
    scores = []
    for count in (1000, 20):  # points in a chunk
        monkeypatch.setattr(parzen, "POINT_BYTES", count * 64 * 4)
        scores.append(parzen.score(split(valid, 20), split(test, 20), split(samples, 100), grid))
    # Points are centred on the first chunk, so distances round differently.
    assert scores[1].test_mean == pytest.approx(scores[0].test_mean, rel=1e-6)
    assert scores[1].test_standard_error == pytest.approx(scores[0].test_standard_error, rel=1e-5)
    assert scores[1].valid_curve == pytest.approx(scores[0].valid_curve, rel=1e-6)
    assert (scores[1].bandwidth, scores[1].test_points) == (scores[0].bandwidth, 50)


def test_a_grid_that_is_too_narrow_warns():
    with pytest.warns(UserWarning, match="end of the grid"):
        result = parzen.score(lambda: [images(20, 1)], lambda: [images(20, 2)], lambda: [images(50, 3)], [0.5, 0.6])
    assert result.at_edge
    assert result.bandwidth == 0.5


@pytest.mark.parametrize(
    ("points", "samples", "message"),
    [
        (np.zeros((0, 3)), np.zeros((2, 3)), "no points"),
        (np.zeros((2, 3)), np.zeros((0, 3)), "no samples"),
        (np.zeros((2, 3)), np.zeros((2, 4)), "4 dimensions where 3"),
        (np.zeros((2, 3)), np.full((2, 3), np.nan), "NaN"),
        (np.full((2, 3), np.inf), np.zeros((2, 3)), "infinite"),
    ],
)
def test_bad_input_is_refused_in_one_line(points, samples, message):
    with pytest.raises(DataError, match=message) as caught:
        parzen.log_likelihoods(lambda: [points], lambda: [samples], [0.1])
    assert "\n" not in str(caught.value)


def test_memory_does_not_grow_with_the_samples():
    def peak(blocks):
        stream = (np.random.default_rng(i).random((1000, 32), dtype=np.float32) for i in range(blocks))
        tracemalloc.start()
        parzen.log_likelihoods(lambda: [images(100, 1, 32)], lambda: stream, [0.1])
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(2)
    assert peak(40) < 1.2 * peak(4)


def test_memory_does_not_grow_with_the_points(monkeypatch):
    monkeypatch.setattr(parzen, "POINT_BYTES", 100 * 32 * 4)
    monkeypatch.setattr(parzen, "KEPT", 1000)

    def peak(blocks):
        points = [lambda: (np.random.default_rng(i).random((100, 32), dtype=np.float32) for i in range(blocks))] * 2
        tracemalloc.start()
        parzen.score(*points, lambda: [images(100, 1, 32)], np.linspace(0.1, 1, 20))
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(2)
    assert peak(200) < 1.5 * peak(20)  # held, the log-likelihoods alone would make it ten times as much
