"""Kernel density estimates and mixtures with pooled covariances: naive twins, limits, and choices by validation codes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture as Estimator
from sklearn.neighbors import KernelDensity as Twin
from test_densities import banana

from pipeline.densities import load_density
from pipeline.densities.common.pooled import PooledMixture
from pipeline.densities.gmm import GaussianMixture
from pipeline.densities.kde import KernelDensity
from pipeline.errors import DataError, SettingsError


def kernels(**options: object) -> KernelDensity:
    density = KernelDensity(2, **options).double()
    density.estimate(lambda: [banana(300).double()], banana(200, seed=1).double())
    return density.eval()


def test_kernels_of_one_width_are_those_of_scikit_learn() -> None:
    z = 3 * torch.randn(50, 2, dtype=torch.float64)
    expected = Twin(bandwidth=0.7).fit(banana(300).double().numpy()).score_samples(z.numpy())
    np.testing.assert_allclose(kernels(bandwidths=[0.7], sensitivity=[0.0]).log_prob(z), expected, rtol=1e-10)


def test_kernels_are_wider_where_codes_are_rare() -> None:
    points = banana(300).double()
    density = kernels(bandwidths=[0.5], sensitivity=[0.5])
    squares = (points[:, None] - points).square().sum(dim=2)
    pilot = torch.exp(-squares / (2 * 0.25)).mean(dim=1) / (2 * math.pi * 0.25)
    widths = 0.5 * (pilot / pilot.log().mean().exp()) ** -0.5
    torch.testing.assert_close(density.log_widths.exp(), widths)
    z = 3 * torch.randn(50, 2, dtype=torch.float64)
    each = torch.exp(-(z[:, None] - points).square().sum(dim=2) / (2 * widths**2)) / (2 * math.pi * widths**2)
    torch.testing.assert_close(density.log_prob(z), each.mean(dim=1).log())


def test_far_from_all_kernels_the_nearest_one_counts() -> None:
    density, far = kernels(bandwidths=[0.1], sensitivity=[0.0]), torch.tensor([[1e4, 0.0]], dtype=torch.float64)
    nearest = (far - density.points).square().sum(dim=1).min()
    expected = -nearest / (2 * 0.01) - math.log(300 * 2 * math.pi * 0.01)
    torch.testing.assert_close(density.log_prob(far)[0], expected, rtol=1e-9, atol=0)


def test_validation_codes_choose_the_width_in_either_direction() -> None:
    widths, valid = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2], banana(200, seed=1).double()
    every = {h: float(kernels(bandwidths=[h], sensitivity=[0.0]).log_prob(valid).mean()) for h in widths}
    best = max(every, key=lambda h: every[h])
    assert kernels(bandwidths=widths, sensitivity=[0.0]).chosen() == {"bandwidth": best, "sensitivity": 0.0}
    for part in (widths[widths.index(best) :], widths[: widths.index(best) + 1]):
        assert kernels(bandwidths=part, sensitivity=[0.0]).chosen()["bandwidth"] == best


def test_the_fit_ends_when_there_is_no_time() -> None:
    tried: list[str] = []
    density = KernelDensity(2).double()
    codes = banana(100).double()
    density.estimate(lambda: [codes], codes, proceed=lambda name, value: bool(tried.append(name)))
    assert tried == ["bandwidth 0.11"]
    assert density.chosen()["bandwidth"] == 0.11


def test_a_file_holds_all_kernels_and_their_samples_are_near_them(tmp_path: Path) -> None:
    density = kernels(bandwidths=[0.01], sensitivity=[0.0])
    density.save(tmp_path / "density")
    loaded, z = load_density(tmp_path / "density"), banana(20).double()
    assert torch.equal(loaded.double().log_prob(z), density.log_prob(z))
    assert loaded.parameter_count == 300 * 2 + 300
    samples = loaded.sample(500, torch.Generator().manual_seed(0))
    distances = torch.cdist(samples, density.points)
    assert distances.amin(dim=1).max() < 0.06
    assert len(distances.argmin(dim=1).unique()) > 200


def test_kernels_without_codes_to_choose_on_are_refused() -> None:
    with pytest.raises(DataError, match="a bandwidth is chosen on validation codes, and there are none"):
        KernelDensity(1).estimate(lambda: [torch.zeros(3, 1)], torch.zeros(0, 1))


def clusters() -> np.ndarray:
    generator = np.random.default_rng(0)
    wide = generator.normal(size=(60, 3)) * [3.0, 1.0, 0.3]
    return np.concatenate([wide, generator.normal([60.0, 0.0, 0.0], 1, (40, 3))])


def pooled(codes: float) -> PooledMixture:
    estimator = PooledMixture(2, random_state=0, reg_covar=0.01)
    estimator.pooled_codes = codes
    return estimator.fit(clusters())


def test_a_pooled_covariance_is_the_mean_of_all_and_counts_for_so_many_codes() -> None:
    estimator, rows = pooled(25.0), clusters()
    shares = estimator.predict_proba(rows).round()  # the clusters are far apart
    scatter = [np.cov(rows[shares[:, k] == 1].T, bias=True) + 0.01 * np.eye(3) for k in range(2)]
    counts = shares.sum(axis=0)
    mean = sum(n * s for n, s in zip(counts, scatter, strict=True)) / 100
    for n, s, covariance in zip(counts, scatter, estimator.covariances_, strict=True):
        np.testing.assert_allclose(covariance, (n * s + 25 * mean) / (n + 25), atol=1e-6)


@pytest.mark.parametrize(("codes", "kind"), [(1e-9, "full"), (1e12, "tied")])
def test_pooled_covariances_lie_between_full_and_tied(codes: float, kind: str) -> None:
    twin = Estimator(2, covariance_type=kind, random_state=0, reg_covar=0.01).fit(clusters())
    rows = clusters() + 0.1
    np.testing.assert_allclose(pooled(codes).score_samples(rows), twin.score_samples(rows), rtol=1e-3)


def test_a_row_takes_pooled_covariances() -> None:
    codes = torch.from_numpy(clusters())
    density = GaussianMixture(3, components=[2], pooled_codes=25.0, ridge=[0.01]).double()
    density.estimate(lambda: [codes], codes)
    expected = pooled(25.0).score_samples(clusters())
    np.testing.assert_allclose(density.log_prob(codes), expected, atol=1e-2)
    with pytest.raises(SettingsError, match="pooled_codes: is for `covariance: full` only"):
        GaussianMixture(3, covariance="tied", pooled_codes=1.0)


def test_one_number_of_gaussians_without_a_gain_is_passed_over_and_two_end_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    values, tried = {1: -2.0, 2: -3.0, 3: -1.0, 4: -1.5, 5: -1.1, 6: 9.0}, list[int]()
    fit = GaussianMixture._expectation_maximisation

    def valued(density: GaussianMixture, codes: np.ndarray, count: int, ridge: float, seed: int) -> Estimator:
        estimator = fit(density, codes, count, ridge, seed)
        tried.append(count)
        monkeypatch.setattr(estimator, "score", lambda held_out: values[count])
        return estimator

    monkeypatch.setattr(GaussianMixture, "_expectation_maximisation", valued)
    codes = torch.from_numpy(clusters())
    density = GaussianMixture(3, components=[1, 2, 3, 4, 5, 6], ridge=[0.01]).double()
    density.estimate(lambda: [codes], codes)
    assert tried == [1, 2, 3, 4, 5]
    assert density.components == 3
