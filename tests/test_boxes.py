"""Mixtures of boxes: the formula, its limits and its integral; boxes that compete; the truth of a checkerboard."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from test_densities import banana

from pipeline.densities import load_density
from pipeline.densities.boxes import BoxMixture
from pipeline.errors import DataError


def boxes(sides: float = 1.0, edges: float = 0.1) -> BoxMixture:
    """Three boxes in the plane, in float64."""
    density = BoxMixture(2, components=3).double()
    centres = torch.tensor([[-2.0, 0.0], [2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    ones = torch.tensor([[1.0, 0.5], [0.5, 2.0], [1.0, 1.0]], dtype=torch.float64)
    density._set(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log(), centres, (sides * ones).log(), (edges * ones).log())
    return density.double().eval()


def checkerboard(n: int, seed: int) -> torch.Tensor:
    """Points of the 32 dark squares of an 8x8 board, whose sides are 1: the log-density is -log 32."""
    rows = np.random.default_rng(seed).uniform(-4, 4, (4 * n, 2))
    return torch.from_numpy(rows[np.floor(rows).sum(axis=1) % 2 == 0][:n].astype(np.float32))


def test_log_likelihood_is_that_of_uniform_distributions_convolved_with_logistic_ones() -> None:
    density, z = boxes(), banana(50).double() / 10
    weights, centres = density.log_weights.exp().numpy(), density.centres.numpy()
    sides, edges = density.log_sides.exp().numpy(), density.log_edges.exp().numpy()
    expected = np.zeros(len(z))
    for weight, c, h, s in zip(weights, centres, sides, edges, strict=True):
        upper, lower = (stats.logistic(c + sign * h, s).cdf(z.numpy()) for sign in (-1, 1))
        expected += weight * np.prod((upper - lower) / (2 * h), axis=1)
    np.testing.assert_allclose(density.log_prob(z).exp(), expected, rtol=1e-9)


def test_it_integrates_to_one() -> None:
    side = torch.linspace(-12, 14, 1301, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    assert boxes().log_prob(grid).exp().sum().item() * 0.02**2 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("sides", "edges", "expected"),
    [
        (1.0, 1e-4, lambda z: np.where(np.abs(z) < 1, 0.5, 0.0)),  # edges as sharp as a knife
        (1e-6, 0.5, lambda z: stats.logistic(scale=0.5).pdf(z)),  # no side at all
    ],
)
def test_limits_are_the_uniform_and_the_logistic_distribution(sides: float, edges: float, expected) -> None:  # type: ignore[no-untyped-def]
    density, one = BoxMixture(1, components=1).double(), torch.ones(1, 1)
    density._set(torch.zeros(1), 0 * one, (sides * one).log(), (edges * one).log())
    z = np.array([-3.0, -0.9, 0.0, 0.5, 1.5])
    found = density.double().eval().log_prob(torch.from_numpy(z)[:, None]).exp()
    np.testing.assert_allclose(found, expected(z), rtol=1e-6, atol=1e-12)


def test_far_from_all_boxes_nothing_is_lost() -> None:
    density = boxes().float()
    z = torch.tensor([[1e4, 0.0], [-1e4, 1e4]])
    torch.testing.assert_close(density.log_prob(z).double(), boxes().log_prob(z.double()), rtol=1e-4, atol=0)
    assert torch.isfinite(density.log_prob(z)).all()


def test_samples_have_the_distribution() -> None:
    density = boxes()
    drawn = density.sample(20_000, torch.Generator().manual_seed(0))
    for i in range(2):
        weights, centres = density.log_weights.exp().numpy(), density.centres[:, i].numpy()
        sides, edges = density.log_sides.exp()[:, i].numpy(), density.log_edges.exp()[:, i].numpy()

        def cumulative(x: np.ndarray, parts: tuple[np.ndarray, ...] = (weights, centres, sides, edges)) -> np.ndarray:
            """The integral of sigma is a softplus."""
            total = np.zeros_like(x)
            for weight, c, h, s in zip(*parts, strict=True):
                total += weight * s / (2 * h) * (np.logaddexp(0, (x - c + h) / s) - np.logaddexp(0, (x - c - h) / s))
            return total

        assert stats.kstest(drawn[:, i].numpy(), cumulative).pvalue > 0.01


def test_a_checkerboard_is_told_to_its_edges() -> None:
    density, codes = BoxMixture(2), checkerboard(5000, seed=0)
    density.standardise(codes.mean(0), codes.std(0))
    density.estimate(lambda: [codes[500:]], codes[:500])
    assert density.log_prob(checkerboard(2000, seed=1)).mean().item() > -math.log(32) - 0.1  # 100 Gaussians: -0.25
    assert density.chosen() == {"components": len(density.centres)}
    assert 30 <= len(density.centres) <= 36  # of 64 at the start


def test_boxes_compete_where_they_must_hold_codes() -> None:
    codes = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2000, 1)).astype(np.float32))
    counts = {}
    for least in (0.0, 60.0):
        density = BoxMixture(1, components=12, least_codes=least, steps=600)
        density.estimate(lambda: [codes], codes)
        counts[least] = len(density.centres)
    assert counts[0.0] == 12
    assert counts[60.0] <= 3


def test_the_best_on_validation_codes_is_kept_and_the_clock_ends_it() -> None:
    codes, scores = checkerboard(1000, seed=0), list[tuple[str, float]]()

    def proceed(name: str, value: float) -> bool:
        scores.append((name, value))
        return len(scores) < 4

    density = BoxMixture(2, steps=100)
    density.standardise(codes.mean(0), codes.std(0))
    density.estimate(lambda: [codes[300:]], codes[:300], proceed=proceed)
    assert [name.partition(" after ")[2] for name, _ in scores] == [f"{steps} steps" for steps in (10, 20, 30, 40)]
    found = density.eval().log_prob(codes[:300]).mean().item()
    assert found == pytest.approx(max(value for _, value in scores), abs=1e-4)


def test_equal_codes_and_fewer_codes_than_boxes_are_fitted() -> None:
    for codes in (torch.tensor([[0.0], [0.0], [1.0], [1.0]]).repeat(20, 1), torch.randn(5, 1)):
        density = BoxMixture(1, steps=50)
        density.estimate(lambda codes=codes: [codes], codes)
        assert torch.isfinite(density.log_prob(codes)).all()
    with pytest.raises(DataError, match="there are no training codes for boxes"):
        BoxMixture(1).estimate(lambda: [torch.zeros(0, 1)], torch.zeros(1, 1))


def test_a_file_holds_the_boxes_that_are_left(tmp_path: Path) -> None:
    density, z = boxes(), banana(20).double()
    density.save(tmp_path / "density")
    loaded = load_density(tmp_path / "density").double()
    torch.testing.assert_close(loaded.log_prob(z), density.log_prob(z), rtol=1e-5, atol=1e-5)
    assert loaded.parameter_count == 3 * 2 * 3 + 2
