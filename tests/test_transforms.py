"""Monotone maps of columns: inverses and log-determinants, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.densities import load_density
from pipeline.densities.common.transforms import TRANSFORMS, Transform, build_transform
from pipeline.densities.gmm import GaussianMixture
from pipeline.errors import DataError


def skewed(n: int, seed: int = 0) -> Tensor:
    """Positive codes: log-normal, uniform, with repeated values, and exponential."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return torch.stack([z[:, 0].exp(), torch.sigmoid(z[:, 1]) + 3, 1 + z[:, 2].round().abs(), z[:, 3].square() + 0.1], dim=1)


def fitted(kind: str, codes: Tensor) -> Transform:
    transform = build_transform(kind, codes.shape[1]).double()
    transform.fit(codes)
    return transform


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_a_map_increases_and_its_inverse_and_log_determinant_are_its_own(kind: str) -> None:
    transform = fitted(kind, skewed(400))
    z = torch.linspace(0.01, 60, 3001, dtype=torch.float64)[:, None].expand(-1, 4).contiguous()  # far into the tails too
    y = transform(z)
    assert (y.diff(dim=0) > 0).all()
    torch.testing.assert_close(transform.inverse(y), z, rtol=1e-8, atol=1e-8)
    z = z[::50].clone().requires_grad_()
    slopes = torch.autograd.grad(transform(z).sum(), z)[0]
    torch.testing.assert_close(transform.log_det(z), slopes.log().sum(dim=1), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", [kind for kind in TRANSFORMS if kind != "log"])
def test_a_map_is_onto_the_real_line(kind: str) -> None:
    transform = fitted(kind, skewed(400))
    y = torch.linspace(-12, 12, 200, dtype=torch.float64)[:, None].expand(-1, 4)
    z = transform.inverse(y)
    assert torch.isfinite(z).all()
    torch.testing.assert_close(transform(z), y, rtol=1e-6, atol=1e-6)


def test_the_power_is_the_most_likely_one() -> None:
    codes = skewed(1000)
    transform = fitted("power", codes)

    def likelihood() -> Tensor:  # of each column, if it is mapped to a Gaussian; its log-determinants are sums over columns
        columns = [torch.where(torch.arange(4) == i, codes, transform.centre) for i in range(4)]
        slopes = torch.stack([transform.log_det(column).mean() for column in columns])
        return slopes - transform(codes).std(dim=0).log()

    best, exponent = likelihood(), transform.exponent.clone()
    assert 0 <= exponent.min() <= 0.3 < exponent.max() <= 2
    for other in torch.linspace(0, 2, 81):
        transform.exponent.fill_(other)
        assert (likelihood() <= best + 1e-6).all()  # the grid is rounded another way


def test_log_refuses_columns_with_other_signs_and_gives_them_no_density() -> None:
    with pytest.raises(DataError, match=r"transform: log needs positive codes, but dimension 1 \(counted from 0\) has others"):
        build_transform("log", 2).fit(torch.tensor([[1.0, 0.0]]))
    assert build_transform("log", 1).log_det(torch.tensor([[-1.0], [2.0]])).tolist() == [-np.inf, pytest.approx(-np.log(2))]


@pytest.mark.parametrize("kind", [kind for kind in TRANSFORMS if kind != "log"])
def test_a_density_of_mapped_columns_integrates_to_one_and_is_saved_whole(tmp_path, kind: str) -> None:
    codes = skewed(500)[:, :1]
    density = GaussianMixture(1, components=[2]).double()
    density.transform = fitted(kind, codes)
    mapped = density.transform(codes)
    density.standardise(mapped.mean(0), mapped.std(0))
    density.estimate(lambda: codes.split(100), codes)
    grid = density.transform.inverse(torch.linspace(-40, 40, 40_001, dtype=torch.float64)[:, None])
    density.eval()
    assert torch.trapezoid(density.log_prob(grid).exp(), grid[:, 0]).item() == pytest.approx(1, abs=1e-3)
    samples = density.sample(4000, torch.Generator().manual_seed(0))
    assert samples.median().item() == pytest.approx(codes.median().item(), rel=0.1)
    density.save(tmp_path / "density.safetensors")
    loaded = load_density(tmp_path / "density.safetensors")
    assert torch.equal(loaded.log_prob(codes), density.log_prob(codes))
