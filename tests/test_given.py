"""Densities of some dimensions given others: closed forms, quadrature, naive twins, and draws that follow them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from test_densities import banana, build, fit
from test_lde import codes as random_codes
from test_lde import make

from pipeline.densities import Density, LatentDensityEstimator, load_density
from pipeline.densities.auto import Mixture
from pipeline.densities.boxes import BoxMixture
from pipeline.densities.common import mixtures
from pipeline.densities.common.density import standard_normal, uniform
from pipeline.densities.common.transforms import build_transform
from pipeline.densities.gaussian import Gaussian
from pipeline.densities.gmm import GaussianMixture
from pipeline.densities.kde import KernelDensity
from pipeline.errors import DataError, PipelineError, SettingsError


def fitted(density: Density, transform: str = "none", cholesky: bool = False) -> Density:
    codes = banana(400).double()
    density = density.double()
    mean, scale = codes.mean(0), torch.linalg.cholesky(codes.T.cov()) if cholesky else codes.std(0)
    if transform != "none":
        density.transform = build_transform(transform, 2).double()
        density.transform.fit(codes)
        mean, scale = density.transform(codes).mean(0), density.transform(codes).std(0)
    density.standardise(mean, scale)
    density.estimate(lambda: [codes], codes)
    return density.eval()


def mixture() -> Mixture:
    members = [fitted(Gaussian(2)), fitted(GaussianMixture(2, components=[3]), transform="asinh")]
    return Mixture.of(members, [0.3, 0.7]).double()


CLOSED: dict[str, Callable[[], Density]] = {
    "gaussian": lambda: fitted(Gaussian(2)),
    "gaussian behind a matrix": lambda: fitted(Gaussian(2), cholesky=True),
    "full": lambda: fitted(GaussianMixture(2, components=[3])),
    "full behind a matrix": lambda: fitted(GaussianMixture(2, components=[3]), cholesky=True),
    "tied": lambda: fitted(GaussianMixture(2, components=[3], covariance="tied")),
    "diagonal": lambda: fitted(GaussianMixture(2, components=[3], covariance="diagonal")),
    "kernels": lambda: fitted(KernelDensity(2, bandwidths=[0.3], sensitivity=[0.5])),
    "boxes": lambda: fitted(BoxMixture(2, components=4, steps=200)),
    "kernels behind a matrix": lambda: fitted(KernelDensity(2, bandwidths=[0.3], sensitivity=[0.0]), cholesky=True),
    "behind a map": lambda: fitted(GaussianMixture(2, components=[3]), transform="power"),
    "auto": mixture,
}


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("observed", [0, 1])
def test_one_number_given_the_other_is_the_joint_over_its_integral(name: str, observed: int) -> None:
    density, z = CLOSED[name](), banana(5, seed=3).double()
    given = torch.arange(2) == observed
    grid = torch.linspace(-100, 200, 30_001, dtype=torch.float64)
    missing = 1 - observed
    with torch.no_grad():
        for row, value in zip(z, density.log_prob(z, given=given), strict=True):
            points = row.repeat(len(grid), 1)
            points[:, missing] = grid
            joint = density.log_prob(points)
            evidence = torch.logsumexp(joint, 0) + math.log(grid[1] - grid[0])
            assert value.item() == pytest.approx((density.log_prob(row[None]) - evidence).item(), abs=1e-6)
        # Draws have that distribution: their places in its cumulative form are uniform.
        values = torch.where(given, row, torch.nan)[None]
        draws = density.sample(2000, torch.Generator().manual_seed(0), given=values)
        assert draws.shape == (2000, 1, 2)
        assert (draws[:, 0, observed] == row[observed]).all()
        shares = (joint - evidence).exp() * (grid[1] - grid[0])
        cumulative = shares.cumsum(0) - shares / 2
        places = np.interp(draws[:, 0, missing], grid, cumulative)
        assert stats.kstest(places, "uniform").pvalue > 1e-3


def test_mixture_given_any_numbers_is_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(300, 4, generator=generator).double() @ torch.randn(4, 4, generator=generator).double()
    codes[:150] += 4
    density = GaussianMixture(4, components=[3]).double()
    density.standardise(codes.mean(0), codes.std(0))
    density.estimate(lambda: [codes], codes)
    z, given = codes[:40], torch.rand(40, 4, generator=generator) < 0.5
    given[0], given[1] = True, False
    weights, scale = density.log_weights.exp().numpy(), codes.std(0).numpy()
    means = (density.shift + density.means * density.scale).numpy()
    covariances = np.linalg.inv((density.whitening @ density.whitening.mT).numpy()) * np.outer(scale, scale)

    def marginal(row: np.ndarray, kept: np.ndarray) -> float:
        """By component: its weight times the density of the kept numbers."""
        if not kept.any():
            return 0.0
        return math.log(
            sum(
                w * stats.multivariate_normal(mean[kept], covariance[np.ix_(kept, kept)]).pdf(row[kept])
                for w, mean, covariance in zip(weights, means, covariances, strict=True)
            )
        )

    expected = [
        marginal(row, np.ones(4, bool)) - marginal(row, kept) for row, kept in zip(z.numpy(), given.numpy(), strict=True)
    ]
    value = density.log_prob(z, given=given)
    np.testing.assert_allclose(value.numpy(), expected, atol=1e-8)
    assert value[0] == 0
    torch.testing.assert_close(value[1], density.log_prob(z[1:2])[0])
    # The mean of draws is the mean of the mixture of regressions.
    row, kept = z[2].numpy(), np.array([True, False, True, False])
    logs, regressions = [], []
    for w, mean, covariance in zip(weights, means, covariances, strict=True):
        gain = covariance[np.ix_(~kept, kept)] @ np.linalg.inv(covariance[np.ix_(kept, kept)])
        regressions.append(mean[~kept] + gain @ (row[kept] - mean[kept]))
        logs.append(math.log(w) + stats.multivariate_normal(mean[kept], covariance[np.ix_(kept, kept)]).logpdf(row[kept]))
    wanted = np.exp(logs - np.logaddexp.reduce(logs)) @ np.array(regressions)
    values = torch.where(torch.from_numpy(kept), z[2], torch.nan).expand(2, 4)
    draws = density.sample(20_000, torch.Generator().manual_seed(1), given=values)[..., torch.from_numpy(~kept)]
    for found in (draws[:, 0], draws[:, 1]):
        np.testing.assert_allclose(found.mean(0), wanted, atol=0.04 * found.std(0).max().item())


def test_rows_don_t_depend_on_the_others_and_chunks_change_nothing() -> None:
    density, z = CLOSED["behind a map"](), banana(7, seed=1).double()
    given = torch.tensor([[True, False], [False, True], [True, True], [False, False]]).repeat(2, 1)[:7]
    with torch.no_grad():
        whole = density.log_prob(z, given=given)
        alone = torch.cat([density.log_prob(z[i : i + 1], given=given[i : i + 1]) for i in range(7)])
        density.chunk_examples = 3
        torch.testing.assert_close(density.log_prob(z, given=given), whole)
    torch.testing.assert_close(alone, whole)
    torch.testing.assert_close(density.log_prob(z, given=given), whole.detach())  # with a gradient in one part
    density.sample_chunk_examples = 4
    values = torch.where(given, z, torch.nan)
    draws = density.sample(6, torch.Generator().manual_seed(0), given=values)
    assert draws.shape == (6, 7, 2)
    assert (draws[:, given] == z[given]).all()
    assert torch.isfinite(draws).all()
    assert (draws.std(0)[~given] > 0).all()
    assert density.sample(2, given=values[:0]).shape == (2, 0, 2)


def test_an_infinite_number_has_no_density_and_nothing_follows_from_one() -> None:
    density, given = CLOSED["full"](), torch.tensor([True, False])
    assert density.log_prob(torch.tensor([[20.0, math.inf]]).double(), given=given).item() == -math.inf
    assert math.isnan(density.log_prob(torch.tensor([[20.0, math.nan]]).double(), given=given).item())
    for number in (math.inf, math.nan):
        with pytest.raises(DataError, match="observed numbers must be finite"):
            density.log_prob(torch.tensor([[number, 0.0]]).double(), given=given)
    with pytest.raises(DataError, match="observed numbers must be finite"):
        density.sample(1, given=torch.tensor([[math.inf, math.nan]]).double())


def test_words_for_wrong_input() -> None:
    density = CLOSED["gaussian"]()
    z = torch.zeros(3, 2).double()
    for given in (torch.ones(3, 2), torch.ones(3, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)):
        with pytest.raises(DataError, match=r"expected given as booleans with shape \(2,\) or \(3, 2\), got"):
            density.log_prob(z, given=given)
    with pytest.raises(DataError, match=r"expected codes with shape \(B, 2\), got \(2,\)"):
        density.sample(1, given=torch.zeros(2).double())


@pytest.mark.parametrize("family", ["lde", "maf", "nsf", "naf", "realnvp", "made_mog", "rnade", "prior", "gmmn"])
def test_families_that_can_t_say_so(family: str) -> None:
    density = build(family).eval()
    assert not density.has_given
    said = f"'{family}' can't predict some dimensions from others: fit a gaussian, a gmm, a kde, boxes, or an lde with"
    for ask in (
        lambda: density.log_prob(torch.zeros(1, 2), given=torch.tensor([True, False])),
        lambda: density.sample(1, given=torch.zeros(1, 2)),
    ):
        with pytest.raises(PipelineError, match=said):
            ask()


def test_a_contest_with_a_member_that_can_t_says_so() -> None:
    torch.manual_seed(0)
    other = build("rnade")
    fit(other, banana(100), steps=2)
    density = Mixture.of([Gaussian(2), other], [0.5, 0.5])
    with pytest.raises(PipelineError, match="'auto' can't predict some dimensions from others"):
        density.log_prob(torch.zeros(1, 2), given=torch.tensor([True, False]))


# The LDE in any order -------------------------------------------------------------------------------------------------

ANY = {"blocks": "attention", "width": 8, "heads": 2, "layers": 2, "orders": "any"}


def naive_terms(density: LatentDensityEstimator, z: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Log-densities (B, D) of standardised codes, each number given those before it in an order: attention word by word."""
    network, terms = density.network, []
    for place, asked in enumerate(order):
        rows = [network.start.expand(len(z), -1)]
        for dimension in order[:place]:
            hidden = z[:, dimension, None] * network.slopes[dimension] + network.offsets[dimension]
            rows.append(network.embed(torch.nn.functional.leaky_relu(hidden, 0.2)))
        x = torch.stack(rows, dim=1) + network.asked[torch.tensor(order[: place + 1])]  # (B, place + 1, C)
        for block in network.blocks:
            twin = torch.nn.MultiheadAttention(8, block.heads, batch_first=True).double()
            twin.in_proj_weight.data, twin.in_proj_bias.data = block.projections.flatten(0, 1), block.offsets
            twin.out_proj.weight.data, twin.out_proj.bias.data = block.mix.weight, block.mix.bias
            h = block.before_attention(x)
            x = x + twin(h, h, h, attn_mask=torch.ones(place + 1, place + 1).triu(1).bool(), need_weights=False)[0]
            x = x + block.back(torch.nn.functional.leaky_relu(block.into(block.before_layer(x)), 0.2))
        outputs = network.head(network.norm(x[:, -1]))
        terms.append(mixtures.log_likelihood(outputs, z[:, asked]))
    return torch.stack(terms, dim=1)


def test_any_order_equals_literal_attention() -> None:
    density, z = make(4, **ANY, order=3, averaged_orders=3), random_codes(6, 4)
    given = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]]).bool()
    assert sorted(map(sorted, density.averaged_orders.tolist())) == [[0, 1, 2, 3]] * 3
    assert density.averaged_orders[0].tolist() == density.order.tolist()
    assert len({tuple(order) for order in density.averaged_orders.tolist()}) == 3
    standardised, log_scales = (z - density.shift) / density.scale, density.scale.log()
    with torch.no_grad():
        each = torch.stack([naive_terms(density, standardised, order.tolist()).sum(1) for order in density.averaged_orders])
        expected = torch.logsumexp(each, 0) - math.log(3) - log_scales.sum()
        torch.testing.assert_close(density.log_prob(z), expected, rtol=0, atol=1e-8)
        value = density.log_prob(z, given=given)
        for row, known, found in zip(standardised, given, value, strict=True):
            each = []
            for order in density.averaged_orders.tolist():
                order = [i for i in order if known[i]] + [i for i in order if not known[i]]
                each.append(naive_terms(density, row[None], order)[0, int(known.sum()) :].sum())
            expected = torch.logsumexp(torch.stack(each), 0) - math.log(3) - log_scales[~known].sum()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    assert value[3] == 0
    torch.testing.assert_close(value[2], density.log_prob(z)[2])


@pytest.mark.parametrize("averaged", [1, 3])
def test_any_order_integrates_to_one_and_depends_on_what_is_given(averaged: int) -> None:
    grid = torch.linspace(-60, 60, 4001, dtype=torch.float64)
    with torch.no_grad():
        alone = make(1, **ANY, averaged_orders=averaged)
        assert torch.trapezoid(alone.log_prob(grid[:, None]).exp(), grid).item() == pytest.approx(1, abs=1e-4)
        density = make(2, **ANY, averaged_orders=averaged)
        coarse = torch.linspace(-40, 40, 401, dtype=torch.float64)
        joint = density.log_prob(torch.cartesian_prod(coarse, coarse)).exp().view(401, 401)
        assert torch.trapezoid(torch.trapezoid(joint, coarse), coarse).item() == pytest.approx(1, abs=5e-3)
        for observed in (0, 1):
            points = torch.full((len(grid), 2), 0.7, dtype=torch.float64)
            points[:, 1 - observed] = grid
            given = torch.arange(2) == observed
            density_of_missing = density.log_prob(points, given=given).exp()
            assert torch.trapezoid(density_of_missing, grid).item() == pytest.approx(1, abs=1e-4)
            values = torch.where(given, points[0], torch.nan)[None]
            draws = density.sample(3000, torch.Generator().manual_seed(1), given=values)[:, 0, 1 - observed]
            places = np.interp(draws, grid, density_of_missing.cumsum(0) * (grid[1] - grid[0]))
            assert stats.kstest(places, "uniform").pvalue > 1e-3
    density = make(5, **ANY, averaged_orders=averaged)
    given = torch.tensor([False, True, False, True, True])
    jacobian = torch.autograd.functional.jacobian(lambda z: density._observed_and_missing(z, given)[0], random_codes(1, 5))
    assert torch.equal(jacobian[0, 0] != 0, given)  # the observed ones alone
    jacobian = torch.autograd.functional.jacobian(lambda z: density.log_prob(z, given=given), random_codes(1, 5))
    assert (jacobian != 0).all()


@pytest.mark.parametrize("averaged", [1, 3])
def test_draws_in_any_order_equal_naive_ancestral_sampling(averaged: int) -> None:
    density = make(5, **ANY, averaged_orders=averaged)
    z = random_codes(4, 5)
    given = torch.rand(4, 5, generator=torch.Generator().manual_seed(2)) < 0.5
    given[0], given[1] = False, True
    draws = density.sample(3, torch.Generator().manual_seed(3), given=torch.where(given, z, torch.nan))
    generator = torch.Generator().manual_seed(3)
    chosen = (uniform((12,), z, generator) * averaged).long()
    u, e = uniform((12, 5), z, generator), standard_normal((12, 5), z, generator)
    for number, expected in enumerate(draws.view(12, 5)):
        known, row = given[number % 4], (z[number % 4] - density.shift) / density.scale
        order = density.averaged_orders[chosen[number]].tolist()
        order = [i for i in order if known[i]] + [i for i in order if not known[i]]
        drawn = torch.where(known, row, 0)
        for place, dimension in enumerate(order):
            if known[dimension]:
                continue
            pairs = torch.stack([drawn[order], torch.tensor(order).double()], dim=1)[None]  # a whole pass for each number
            first, others = density.network(pairs)
            outputs = torch.cat([first, others[:, 0]])[place][None]
            drawn[dimension] = mixtures.draw(outputs, u[number, place][None], e[number, place][None])[0]
        torch.testing.assert_close(expected, drawn * density.scale + density.shift, rtol=0, atol=1e-8)
    samples = density.sample(2000, torch.Generator().manual_seed(4))
    assert samples.shape == (2000, 5)
    rows = density.sample(2000, torch.Generator().manual_seed(4), given=torch.full((1, 5), torch.nan).double())[:, 0]
    torch.testing.assert_close(rows, samples)  # nothing given is no condition


def test_loss_in_any_order_is_that_of_an_order_drawn_for_each_code() -> None:
    density, z = make(3, **ANY), random_codes(4, 3)
    orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    with torch.no_grad():
        each = torch.stack([naive_terms(density, (z - density.shift) / density.scale, order).sum(1) for order in orders])
    found = set()
    for seed in range(60):
        loss = density.loss(z[:1], torch.Generator().manual_seed(seed)).detach()
        number = int((each[:, 0] + 3 * loss).abs().argmin())
        torch.testing.assert_close(-3 * loss, each[number, 0])
        found.add(number)
    assert found == set(range(6))
    many = density.loss(z[:1].expand(4000, -1), torch.Generator().manual_seed(0))
    assert many.item() == pytest.approx(-each[:, 0].mean().item() / 3, rel=0.02)  # each code of a batch has an order of its own
    # In parts, and at once.
    gradients = []
    for chunk in (9, 2):
        density.zero_grad()
        density.chunk_examples = chunk
        density.loss(random_codes(9, 3), torch.Generator().manual_seed(0)).backward()
        gradients.append([parameter.grad.clone() for parameter in density.parameters()])
    torch.testing.assert_close(*gradients)


def test_any_order_is_saved_and_loaded(tmp_path) -> None:
    density, z = make(4, **ANY, averaged_orders=2), random_codes(3, 4)
    density.save(tmp_path / "density.safetensors")
    loaded = load_density(tmp_path / "density.safetensors")
    given = torch.tensor([True, False, True, False])
    assert torch.equal(loaded.log_prob(z, given=given), density.log_prob(z, given=given))
    with pytest.raises(PipelineError, match="in their own order"):
        loaded.conditionals(z)


def test_any_order_is_for_dimensions_that_are_kept_apart() -> None:
    with pytest.raises(SettingsError, match=r"standardise: `cholesky` mixes the dimensions, which `orders: any` keeps apart"):
        build("lde", **ANY, standardise="cholesky")
    density = make(2, **ANY)
    density.standardise(torch.zeros(2), torch.eye(2).double())
    assert not density.has_given


def test_any_order_learns_what_follows_from_what() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2000, 3, generator=generator) @ torch.tensor([[1.0, 0.8, -0.5], [0.0, 0.6, 0.9], [0.0, 0.0, 0.4]])
    density, truth = LatentDensityEstimator(3, **ANY, components=2), Gaussian(3)
    truth.estimate(lambda: [z], z)
    optimizer = torch.optim.Adam(density.parameters())
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 2e-2 * (1 - step / 300)
        optimizer.zero_grad()
        density.loss(z[(step * 200) % 2000 :][:200], generator).backward()
        optimizer.step()
    density.eval()
    for given in torch.tensor([[1, 0, 0], [0, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0]]).bool():
        gap = truth.log_prob(z, given=given) - density.log_prob(z, given=given)
        assert -0.05 < gap.mean().item() < 0.2, given
