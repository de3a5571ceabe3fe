"""The opening of the latent vector: its formula, its masks, and what it leads to."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch

from pipeline.autoencoders.common.incremental import IncrementalSettings, mask, open_dimensions


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("latent_dim", "warm_up"), [(8, 96), (15, 120), (200, 100), (1, 3), (5, 0.5)])
def test_the_linear_formula(latent_dim, warm_up):
    for i in range(300):
        t = Fraction(i, 2)
        expected = min(latent_dim, math.floor(latent_dim * t / Fraction(warm_up)) + 1)
        assert open_dimensions(float(t), latent_dim, warm_up) == expected


def test_one_dimension_is_open_at_first_and_all_from_the_end_of_the_warm_up_on():
    assert open_dimensions(0.0, 8, 96) == 1
    assert open_dimensions(84.0, 8, 96) == 8
    assert open_dimensions(1e9, 8, 96) == 8


def test_opening_never_closes_and_opens_one_at_a_time():
    counts = [open_dimensions(i / 16, 8, 96) for i in range(100 * 16)]
    assert {b - a for a, b in itertools.pairwise(counts)} == {0, 1}


@pytest.mark.parametrize("latent_dim", [1, 7, 8, 100])
def test_as_many_steps_as_dimensions_are_the_linear_case(latent_dim):
    for i in range(200):
        assert open_dimensions(i / 3, latent_dim, 50, steps=latent_dim) == open_dimensions(i / 3, latent_dim, 50)


def test_steps_are_equal_parts_rounded_up():
    assert [open_dimensions(t, 10, 4, steps=4) for t in (0, 1, 2, 3, 4)] == [3, 5, 8, 10, 10]
    assert open_dimensions(0, 10, 4, steps=1) == 10


def test_masks_are_ones_then_zeros():
    codes = torch.ones(5, 8, dtype=torch.float64)
    linear = mask(IncrementalSettings(warm_up_epochs=8.0), codes, 2.5, generator())
    assert linear.dtype == torch.float64
    assert linear.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]
    nested = mask(IncrementalSettings(mode="nested_dropout"), codes, 2.5, generator())
    assert nested.shape == (5, 8)
    assert (nested.diff(dim=1) <= 0).all()
    assert (nested[:, 0] == 1).all()


def test_closed_dimensions_get_no_gradient():
    codes = torch.randn(5, 8, generator=generator(), requires_grad=True)
    opened = mask(IncrementalSettings(mode="nested_dropout", cut_off="uniform"), codes, 0.0, generator(1))
    (codes * opened).square().sum().backward()
    torch.testing.assert_close(codes.grad, 2 * codes.detach() * opened)


@pytest.mark.parametrize("cut_off", ["uniform", "geometric"])
def test_cut_offs_follow_their_distribution(cut_off):
    n, latent_dim, rate = 100_000, 6, 0.3
    settings = IncrementalSettings(mode="nested_dropout", cut_off=cut_off, geometric_rate=rate)
    counts = mask(settings, torch.ones(n, latent_dim), 0.0, generator()).sum(1).long()
    shares = torch.bincount(counts, minlength=latent_dim + 1)[1:] / n
    if cut_off == "uniform":
        expected = torch.full((latent_dim,), 1 / latent_dim)
    else:
        expected = torch.tensor([rate * (1 - rate) ** k for k in range(latent_dim - 1)] + [(1 - rate) ** (latent_dim - 1)])
    assert (shares - expected).abs().max() < 5 * 0.5 / n**0.5


def test_cut_offs_follow_from_the_generator():
    settings = IncrementalSettings(mode="nested_dropout")
    codes = torch.ones(64, 8)
    assert torch.equal(mask(settings, codes, 0.0, generator(1)), mask(settings, codes, 0.0, generator(1)))
    assert not torch.equal(mask(settings, codes, 0.0, generator(1)), mask(settings, codes, 0.0, generator(2)))


def test_nested_dropout_of_a_linear_autoencoder_is_pca():
    """Rippel et al. (2014), theorem 1: with an orthonormal decoder the optimum is PCA, the components in order."""
    n, latent_dim = 512, 3
    scales = torch.tensor([3.0, 2.0, 1.2, 0.4, 0.2], dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=generator(3)))[0]
    data = torch.randn(n, 5, dtype=torch.float64, generator=generator(4)) * scales @ rotation.T
    data -= data.mean(0)
    components = torch.linalg.svd(data, full_matrices=False)[2][:latent_dim]  # (D, 5), in order
    basis = torch.randn(5, latent_dim, dtype=torch.float64, generator=generator(5), requires_grad=True)
    optimizer = torch.optim.Adam([basis], lr=0.03)
    settings = IncrementalSettings(mode="nested_dropout", cut_off="uniform")
    for index in range(400):
        orthonormal = torch.linalg.qr(basis)[0]
        codes = data @ orthonormal  # (n, D)
        opened = mask(settings, codes, 0.0, generator(index))
        loss = (data - (codes * opened) @ orthonormal.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    cosines = (components @ torch.linalg.qr(basis)[0]).abs()
    assert (cosines.diagonal() > 0.99).all()
