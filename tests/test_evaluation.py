"""Moments, controls and reconstruction scores: identities and naive twins."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.errors import DataError
from pipeline.evaluation import blocks, controls, moments, reconstruction


def split(array, rows):
    return lambda: iter(np.split(array, range(rows, len(array), rows)))


# Moments ------------------------------------------------------------------------------------------------------------


def test_moments_of_shares_merge_to_the_whole():
    values = 1e8 + np.random.default_rng(0).normal(size=1000)  # far from zero: a sum of squares would cancel
    first, second = moments.Moments(), moments.Moments()
    for block in np.split(values[:300], 3):
        first.update(block)
    second.update(values[300:])
    first.merge(second)
    first.merge(moments.Moments())
    result = first.result()
    assert result.number == 1000
    assert result.mean == pytest.approx(values.mean(), rel=1e-14)
    assert result.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(1000), rel=1e-9)


def test_errors_over_groups_are_those_of_group_means():
    generator = np.random.default_rng(0)
    groups = generator.integers(7, size=500)
    values = generator.normal(size=500) + 3 * groups
    means = np.array([values[groups == g].mean() for g in range(7)])
    whole = moments.grouped_mean_and_error(values, groups)
    assert whole.mean == pytest.approx(means.mean())
    assert whole.standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(7))
    parts = [moments.GroupedMoments() for _ in range(2)]
    parts[0].update(values[:200], groups[:200])
    parts[1].update(values[200:], groups[200:])
    parts[0].merge(parts[1])
    assert parts[0].groups() == pytest.approx(whole)
    assert parts[0].examples() == pytest.approx(moments.mean_and_error(values))


def test_no_value_and_one_value():
    assert math.isnan(moments.mean_and_error([]).mean)
    one = moments.mean_and_error([2.0])
    assert one.mean == 2
    assert math.isnan(one.standard_error)


# Controls -----------------------------------------------------------------------------------------------------------


def chosen(rows, block, count, seed=3):
    return np.concatenate(list(controls.training_samples(split(rows, block), count, seed)()))


def test_training_samples_are_distinct_and_do_not_depend_on_blocks():
    rows = np.arange(1000)
    some = chosen(rows, 7, 100)
    assert len(set(some.tolist())) == 100
    np.testing.assert_array_equal(some, chosen(rows, 256, 100))
    assert set(some) <= set(chosen(rows, 50, 200))
    assert set(some) != set(chosen(rows, 7, 100, seed=4))
    assert 350 < some.mean() < 650
    np.testing.assert_array_equal(chosen(rows, 300, 5000), rows)


def test_no_training_samples_are_refused():
    with pytest.raises(DataError, match="no training images"):
        controls.training_samples(lambda: [], 3, 0)


def test_rebatch_keeps_rows():
    rows = np.arange(100)
    batches = list(blocks.rebatch(split(rows, 7)(), 30))
    assert [len(b) for b in batches] == [30, 30, 30, 10]
    np.testing.assert_array_equal(np.concatenate(batches), rows)


def test_kmeans_finds_separated_clusters_and_is_deterministic():
    generator = np.random.default_rng(0)
    centres = 10 * np.eye(4, 6)
    rows = (centres[generator.integers(4, size=600)] + 0.1 * generator.normal(size=(600, 6))).astype(np.float32)
    found = controls.kmeans_centroids(split(rows, 50), 40, seed=0, batch_size=100, epochs=3)
    nearest = np.linalg.norm(found[:, None] - centres, axis=-1)
    assert found.dtype == np.float32
    assert nearest.min(1).max() < 0.5
    np.testing.assert_array_equal(found, controls.kmeans_centroids(split(rows, 33), 40, seed=0, batch_size=100, epochs=3))
    distortion = np.square(rows[:, None] - found).sum(-1).min(1).mean()
    at_random = np.square(rows[:, None] - chosen(rows, 50, 40, seed=0)).sum(-1).min(1).mean()
    assert distortion < at_random


def test_as_many_centroids_as_images_are_the_images():
    rows = np.random.default_rng(0).random((12, 1, 3, 3), dtype=np.float32)
    np.testing.assert_array_equal(controls.kmeans_centroids(split(rows, 5), 50, seed=0), rows)
    np.testing.assert_array_equal(controls.kmeans_centroids(split(rows, 5), 12, seed=0), rows)


# Reconstruction -----------------------------------------------------------------------------------------------------


def literal_ssim(a, b):
    """One channel, valid windows only, window by window."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11].astype(np.float64), b[i : i + 11, j : j + 11].astype(np.float64)
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * x * x).sum() - mx**2, (window * y * y).sum() - my**2
            covariance = (window * x * y).sum() - mx * my
            values.append((2 * mx * my + 1e-4) * (2 * covariance + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    return np.mean(values)


def test_ssim_equals_a_literal_one():
    generator = np.random.default_rng(0)
    a = generator.random((3, 1, 14, 16), dtype=np.float32)
    b = (0.7 * a + 0.3 * generator.random(a.shape, dtype=np.float32)).astype(np.float32)
    expected = [literal_ssim(x[0], y[0]) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(reconstruction.ssim(a, b), expected, atol=1e-4)
    np.testing.assert_allclose(reconstruction.ssim(a, a), 1, atol=1e-6)


def test_reconstruction_score_streams_and_merges():
    generator = np.random.default_rng(0)
    a, b = generator.random((10, 3, 16, 16)), generator.random((10, 3, 16, 16))
    whole, first, second = (reconstruction.ReconstructionScore() for _ in range(3))
    whole.update(a, b)
    first.update(a[:3], b[:3])
    second.update(a[3:], b[3:])
    first.merge(second)
    assert first.metrics("test") == pytest.approx(whole.metrics("test"), rel=1e-6)
    errors = np.square(a - b).mean((1, 2, 3))
    metrics = whole.metrics("test")
    assert metrics["test_mse"] == pytest.approx(errors.mean(), rel=1e-6)
    assert metrics["test_squared_error"] == pytest.approx(errors.mean() * 768, rel=1e-6)
    assert metrics["test_psnr"] == pytest.approx((-10 * np.log10(errors)).mean(), rel=1e-6)
    assert metrics["test_mse_se"] == pytest.approx(errors.std(ddof=1) / math.sqrt(10), rel=1e-5)


def test_small_images_and_vectors_have_no_ssim():
    score = reconstruction.ReconstructionScore()
    score.update(np.zeros((2, 1, 8, 8)), np.zeros((2, 1, 8, 8)))
    assert "test_ssim" not in score.metrics("test")
    with pytest.raises(DataError, match="shape"):
        score.update(np.zeros((2, 3)), np.zeros((2, 4)))


def test_open_dimensions_zero_what_is_closed():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6))[0]
    images = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    result = reconstruction.open_dimension_errors(split(images, 6)(), lambda x: x @ basis, lambda z: z @ basis.T, ks=range(7))
    codes = images @ basis.numpy()
    expected = [np.square(codes[:, k:]).sum(1).mean() for k in range(7)]
    np.testing.assert_allclose(result.squared_error, expected, atol=1e-5)
    np.testing.assert_allclose(result.mse, result.squared_error / 6)


def test_principal_components_are_near_the_exact_ones():
    generator = np.random.default_rng(0)
    images = (generator.normal(size=(3000, 20)) * np.linspace(3, 0.1, 20)) @ np.linalg.qr(generator.normal(size=(20, 20)))[
        0
    ] + 0.5
    pca = reconstruction.PrincipalComponents(5).fit(split(images, 128))
    result = pca.errors(split(images, 100)(), ks=range(1, 6))
    eigenvalues = np.linalg.eigvalsh(np.cov(images.T, bias=True))[::-1]
    expected = [eigenvalues[k:].sum() for k in range(1, 6)]
    np.testing.assert_allclose(result.squared_error, expected, rtol=0.01)
    assert (result.squared_error >= np.array(expected) * (1 - 1e-9)).all()


def test_too_few_images_for_the_components():
    with pytest.raises(DataError, match="at least as many images"):
        reconstruction.PrincipalComponents(5).fit(lambda: [np.zeros((3, 20))])
