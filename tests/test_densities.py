"""The protocol that all densities share, family by family."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from small import DENSITIES

from pipeline.densities import Density, gmmn, load_density
from pipeline.densities.auto import Mixture
from pipeline.densities.common import mixtures
from pipeline.densities.common.density import build_density
from pipeline.densities.gaussian import Gaussian
from pipeline.densities.gmm import GaussianMixture
from pipeline.densities.gmmn import MomentMatchingNetwork, squared_discrepancy
from pipeline.densities.made_mog import MadeMog
from pipeline.densities.naf import NeuralAutoregressiveFlow
from pipeline.densities.prior import PriorDensity
from pipeline.densities.realnvp import RealNVP
from pipeline.densities.rnade import Rnade
from pipeline.errors import DataError, PipelineError, SettingsError
from pipeline.settings import Params, implementation
from pipeline.settings.params import choices

AUTOREGRESSIVE = {
    "rnade": lambda dim: Rnade(dim, components=3, hidden=16),
    "made_mog": lambda dim: MadeMog(dim, components=3, hidden=[16, 16]),
}


def build(family: str, dim: int = 2, **settings) -> Density:
    row = {"codes": "points", "dataset": "points", "family": family, **DENSITIES[family], **settings}
    module = implementation("pipeline.densities", family, "family")
    from pipeline.settings import build as build_settings

    return build_density(build_settings(module.Settings, row, "densities.row"), dim)


def banana(n: int, seed: int = 0) -> torch.Tensor:
    """Points around a parabola, far from zero and in unequal units."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, n, generator=generator)
    return torch.stack([20 + 5 * x, 0.3 * (x.square() + 0.3 * noise)], dim=1)


def fit(density: Density, codes: torch.Tensor, steps: int = 150) -> list[float]:
    if isinstance(density, Mixture):  # as a contest leaves it
        members = [Gaussian(density.dim).to(density.shift), GaussianMixture(density.dim, components=[2]).to(density.shift)]
        for member in members:
            fit(member, codes)
        density._set(members, torch.tensor([0.25, 0.75]))
        return []
    if density.family != "prior":
        density.standardise(codes.mean(0), codes.std(0))
    if not density.trained_by_gradient:
        density.estimate(lambda: codes.split(100), codes[:200], seed=0)
        return []
    optimizer = torch.optim.Adam(density.parameters(), 5e-3)
    losses = []
    for step in range(steps):
        batch = codes[(100 * step) % len(codes) :][:100]
        optimizer.zero_grad()
        loss = density.loss(batch, torch.Generator().manual_seed(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    density.eval()
    return losses


@pytest.mark.parametrize("family", DENSITIES)
def test_fits_scores_samples_saves_and_loads(family, tmp_path):
    torch.manual_seed(0)
    codes = banana(1000)
    density = build(family)
    losses = fit(density, codes)
    assert not losses or np.mean(losses[-10:]) < 0.9 * np.mean(losses[:3])
    density.save(tmp_path / "density.safetensors")
    state = torch.get_rng_state()
    loaded = load_density(tmp_path / "density.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert type(loaded) is type(density)
    assert loaded.family == family
    assert not loaded.training
    assert loaded.parameter_count == density.parameter_count
    draws = [d.sample(50, torch.Generator().manual_seed(1)) for d in (density, loaded)]
    assert torch.equal(*draws)
    assert draws[0].shape == (50, 2)
    assert torch.isfinite(draws[0]).all()
    if density.has_log_prob:
        assert torch.equal(density(codes[:20]), loaded.log_prob(codes[:20]))
    else:
        with pytest.raises(PipelineError, match="'gmmn' has no likelihood; ask for a Parzen score"):
            loaded.log_prob(codes)
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "density.safetensors").read_bytes()
    if family != "prior":
        # The fitted families know where the codes lie.
        samples = loaded.sample(1000, torch.Generator().manual_seed(2))
        assert ((samples.mean(0) - codes.mean(0)).abs() < 0.4 * codes.std(0)).all()


@pytest.mark.parametrize("family", [f for f in DENSITIES if f not in ("gmmn", "realnvp")])
def test_one_dimension(family):
    torch.manual_seed(0)
    density = build(family, dim=1)
    fit(density, banana(200)[:, :1], steps=3)
    grid = torch.linspace(-80, 120, 20001)[:, None]
    with torch.no_grad():
        assert torch.trapezoid(density.log_prob(grid).exp(), grid[:, 0]).item() == pytest.approx(1, abs=2e-3)
    assert density.sample(5).shape == (5, 1)


@pytest.mark.parametrize("family", [f for f in DENSITIES if f not in ("gmmn", "naf")])
def test_density_integrates_to_one_and_samples_follow_it(family):
    torch.manual_seed(0)
    codes = banana(1000)
    density = build(family).double()
    if family == "prior":
        codes = torch.randn(1000, 2)
    fit(density, codes.double(), steps=30)
    generator = torch.Generator().manual_seed(0)
    samples = density.sample(20_000, generator)
    # Importance weights from a wide Student t.
    proposal = torch.distributions.StudentT(4, samples.mean(0), 1.5 * samples.std(0))
    z = proposal.sample((60_000,))
    with torch.no_grad():
        weights = (density.log_prob(z) - proposal.log_prob(z).sum(1)).exp()
    assert weights.mean().item() == pytest.approx(1, abs=0.04)
    mean = weights @ z / weights.sum()
    assert ((samples.mean(0) - mean).abs() < 0.05 * samples.std(0)).all()
    std = (weights @ (z - mean).square() / weights.sum()).sqrt()
    torch.testing.assert_close(samples.std(0), std, rtol=0.1, atol=0)


@pytest.mark.parametrize("family", AUTOREGRESSIVE)
def test_rivals_are_autoregressive(family):
    torch.manual_seed(0)
    for dim in (1, 2, 5, 9):
        density = AUTOREGRESSIVE[family](dim).double()
        z = torch.randn(4, dim, dtype=torch.float64)
        gradients = torch.autograd.functional.jacobian(lambda z: _each(density, z).sum(0), z).abs().sum(1)  # noqa: B023
        assert torch.equal(gradients > 0, torch.ones(dim, dim).tril().bool())


def _each(density: Density, z: torch.Tensor) -> torch.Tensor:
    """log p(z_i | z_<i), with shape (B, D): by the difference that cutting the tail off makes."""
    recorded = []
    original = mixtures.log_likelihood
    mixtures.log_likelihood = lambda outputs, x: recorded.append(original(outputs, x)) or recorded[-1]
    try:
        density._log_prob(z)
    finally:
        mixtures.log_likelihood = original
    return recorded[0] if recorded[0].shape == z.shape else recorded[0].T


def test_mixtures_equal_torch_distributions():
    torch.manual_seed(0)
    outputs = torch.randn(7, 5, 12, dtype=torch.float64, requires_grad=True)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    logits, means, log_scales = mixtures.unpack(outputs)
    expected = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=logits), torch.distributions.Normal(means, log_scales.exp())
    ).log_prob(x)
    torch.testing.assert_close(mixtures.log_likelihood(outputs, x), expected)
    assert torch.autograd.gradcheck(mixtures.log_likelihood, (outputs[:2], x[:2]))


def test_mixture_draws_are_inverse_cumulative_weights():
    outputs = torch.tensor([0.2, 0.5, 0.3]).log()
    outputs = torch.cat([outputs, torch.tensor([-10.0, 0.0, 10.0]), torch.full((3,), -20.0)]).expand(10_000, 9)
    levels = torch.linspace(0, 1, 10_001)[:-1]
    draws = mixtures.draw(outputs, levels, torch.randn(10_000))
    torch.testing.assert_close(
        draws.round().unique(return_counts=True)[1] / 1e4, torch.tensor([0.2, 0.5, 0.3]), atol=2e-4, rtol=0
    )
    assert (draws.diff() > -1).all()  # ascending with the level


def test_gaussian_is_the_closed_form():
    codes = banana(500).double()
    density = Gaussian(2).double()
    density.standardise(codes.mean(0), codes.std(0))
    density.estimate(lambda: codes.split(77), codes)
    mean, covariance = codes.mean(0).numpy(), np.cov(codes.numpy().T, ddof=0)
    expected = stats.multivariate_normal(mean, covariance).logpdf(codes.numpy())
    np.testing.assert_allclose(density.log_prob(codes).numpy(), expected, rtol=1e-9)
    # Mean log-likelihood at the maximum: -D/2 (1 + log 2 pi) - log det / 2.
    best = -(1 + math.log(2 * math.pi)) - 0.5 * np.linalg.slogdet(covariance)[1]
    assert density.log_prob(codes).mean().item() == pytest.approx(best)


def test_singular_covariance_is_refused():
    x = torch.randn(50, 1)
    density = Gaussian(2)
    with pytest.raises(DataError, match="singular covariance; set `ridge`"):
        density.estimate(lambda: [torch.cat([x, x], dim=1)], torch.zeros(0, 2))
    ridged = Gaussian(2, ridge=1e-3)
    ridged.estimate(lambda: [torch.cat([x, x], dim=1)], torch.zeros(0, 2))
    assert torch.isfinite(ridged.log_prob(torch.zeros(1, 2)))


@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal"])
def test_gaussian_mixture_is_the_closed_form(covariance, tmp_path):
    codes = banana(600).double()
    density = GaussianMixture(2, components=[4], covariance=covariance, starts=2).double()
    density.standardise(codes.mean(0), codes.std(0))
    density.estimate(lambda: codes.split(100), codes)
    whitening = torch.diag_embed(density.whitening) if covariance == "diagonal" else density.whitening
    precisions = (whitening @ whitening.mT).expand(4, 2, 2)
    total = torch.zeros(len(codes)).double()
    standardised = (codes - codes.mean(0)) / codes.std(0)
    for k in range(4):
        normal = stats.multivariate_normal(density.means[k].numpy(), torch.linalg.inv(precisions[k]).numpy())
        total += density.log_weights[k].exp() * torch.from_numpy(normal.pdf(standardised.numpy()))
    torch.testing.assert_close(density.log_prob(codes), total.log() - codes.std(0).log().sum())
    assert density.parameter_count == 11 + {"full": 12, "tied": 3, "diagonal": 8}[covariance]
    samples = density.sample(4000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(samples.T.cov(), codes.T.cov(), rtol=0.15, atol=0.5)
    density.save(tmp_path / "density")
    assert torch.equal(load_density(tmp_path / "density").log_prob(codes), density.log_prob(codes))


def test_gaussian_mixture_chooses_its_ridge_by_validation():
    codes = torch.randn(40, 10, generator=torch.Generator().manual_seed(0))
    density = GaussianMixture(10, components=[1, 2], ridge=[0.0, 0.1, 0.3, 30])
    values = {}
    density.estimate(lambda: [codes[:20]], codes[20:], proceed=lambda name, value: values.setdefault(name, value) == value)
    assert list(values)[:4] == [f"1 Gaussians of ridge {ridge:g}" for ridge in (0, 0.1, 0.3, 30)]
    best = max(values, key=values.get)
    assert density.eval().log_prob(codes[20:]).mean().item() == pytest.approx(values[best], abs=1e-3)
    assert best.endswith("ridge 0.3")
    # Two Gaussians start at the ridge that suited one, and don't go beyond a neighbour that is worse.
    assert [name.rpartition(" ")[2] for name in values if name.startswith("2 ")] == ["0.3", "30", "0.1"]


def test_a_ridge_that_suited_one_gaussian_is_lowered_for_two():
    # Wide tails: a large ridge suits one Gaussian, and blurs the narrow one of two.
    generator = torch.Generator().manual_seed(0)
    wide = torch.where(torch.rand(2000, 1, generator=generator) < 0.1, 30.0, 1.0)
    codes = wide * torch.randn(2000, 2, generator=generator)
    density = GaussianMixture(2, components=[1, 2], ridge=[1e-6, 1e-3, 1e-2, 0.1, 0.3])
    density.standardise(torch.zeros(2), codes.std() * torch.eye(2))
    values = {}
    density.estimate(lambda: [codes[:1000]], codes[1000:], proceed=lambda name, value: values.setdefault(name, value) == value)
    assert max((name for name in values if name.startswith("1 ")), key=values.get).endswith("ridge 0.1")
    assert max(values, key=values.get).startswith("2 Gaussians")
    truth = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor([0.9, 0.1])),
        torch.distributions.MultivariateNormal(torch.zeros(2, 2), torch.eye(2) * torch.tensor([1.0, 900.0])[:, None, None]),
    )
    assert density.log_prob(codes[1000:]).mean() > truth.log_prob(codes[1000:]).mean() - 0.05


def test_gaussian_mixture_chooses_by_validation():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[-10.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    codes = centres.repeat(100, 1) + torch.randn(300, 2, generator=generator)
    density = GaussianMixture(2, components=[1, 3, 100])
    density.estimate(lambda: [codes], codes[::3] + 0.5)
    assert density.arguments()["components"] == [3]
    assert density.parameter_count == 3 * (1 + 2 + 3) - 1
    few = GaussianMixture(2, components=[3], max_examples=60)
    few.estimate(lambda: codes.split(7), codes, seed=2)
    torch.testing.assert_close(few.means[(few.means @ torch.tensor([1.0, 2.0])).argsort()], centres, atol=1, rtol=0)
    with pytest.raises(DataError, match="2 training codes are too few for a mixture of 3 Gaussians"):
        GaussianMixture(2, components=[3]).estimate(lambda: [codes[:2]], codes)


def test_priors():
    z = banana(20).double()
    expected = stats.multivariate_normal(np.zeros(2), np.eye(2)).logpdf(z.numpy())
    np.testing.assert_allclose(PriorDensity(2).double().log_prob(z).numpy(), expected)
    both = [stats.multivariate_normal(np.full(2, m), np.eye(2)).pdf(z.numpy() - 3) for m in (-3, 3)]
    np.testing.assert_allclose(PriorDensity(2, prior="two_normals").double().log_prob(z - 3).numpy(), np.log(0.5 * sum(both)))
    samples = PriorDensity(3, prior="two_normals").sample(4000, torch.Generator().manual_seed(0))
    sides = (samples > 0).sum(1)
    assert ((sides == 0) | (sides == 3)).float().mean() > 0.98
    with pytest.raises(PipelineError, match="fixed in the units of the codes"):
        PriorDensity(2).standardise(torch.zeros(2), torch.ones(2))
    with pytest.raises(SettingsError, match="standardise: must be 'none'"):
        build("prior", standardise="scalar")


@pytest.mark.parametrize(("dim", "residual"), [(1, False), (5, False), (5, True)])
def test_naf_bisects_each_column_once_and_finds_what_zuko_finds(dim, residual):
    torch.manual_seed(0)
    density = NeuralAutoregressiveFlow(dim, transforms=3, hidden=[16, 16], residual=residual, signal=4).double().eval()
    density.standardise(torch.arange(dim), torch.arange(dim) + 0.5)
    samples = density.sample(40, torch.Generator().manual_seed(1))
    noise = torch.randn(40, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        expected = density.shift + density.scale * density.flow().transform.inv(noise)
        torch.testing.assert_close(samples, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(density.log_prob(samples), density.log_prob(expected), rtol=0, atol=1e-10)
        back = density.flow().transform((samples - density.shift) / density.scale)
    torch.testing.assert_close(back, noise, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dim", [1, 2])
def test_naf_integrates_to_one(dim):
    """zuko's is reported to overestimate likelihoods (its issue 55): a trained one by quadrature."""
    torch.manual_seed(0)
    x = 3 * torch.randn(2000, 1)
    codes = torch.cat([x, x.sin() + 0.1 * torch.randn(2000, 1)], dim=1)[:, 2 - dim :]
    density = NeuralAutoregressiveFlow(dim, transforms=2, hidden=[16, 16], signal=4)
    losses = fit(density, codes, steps=60)
    assert losses[-1] < losses[0] - 0.05
    density, points = density.double(), (4001, 241)[dim - 1]
    grids = [
        torch.linspace(-12, 12, points).double() * std + mean for mean, std in zip(codes.mean(0), codes.std(0), strict=True)
    ]
    with torch.no_grad():
        mass = density.log_prob(torch.cartesian_prod(*grids).view(-1, dim)).exp().view([points] * dim)
    for grid in reversed(grids):
        mass = torch.trapezoid(mass, grid)
    assert mass.item() == pytest.approx(1, abs=5e-3)


def test_discrepancy_equals_its_sum(monkeypatch):
    torch.manual_seed(0)
    x, y = torch.randn(6, 3).double(), torch.randn(9, 3).double() + 1
    k = lambda a, b: sum(torch.exp(-torch.cdist(a, b).square() / (2 * h * h)) for h in (0.5, 2.0))  # noqa: E731
    expected = k(x, x).mean() - 2 * k(x, y).mean() + k(y, y).mean()
    torch.testing.assert_close(squared_discrepancy(x, y, (0.5, 2.0)), expected)
    monkeypatch.setattr(gmmn, "CHUNK_EXAMPLES", 4)
    with torch.no_grad():
        torch.testing.assert_close(squared_discrepancy(x, y, (0.5, 2.0)), expected)
    assert squared_discrepancy(x, x, (0.5, 2.0)).item() == pytest.approx(0, abs=1e-12)


def test_gradient_of_squared_discrepancy(monkeypatch):
    monkeypatch.setattr("pipeline.densities.gmmn.CHUNK_EXAMPLES", 4)
    x, y = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (7, 5))
    assert torch.autograd.gradcheck(lambda *both: squared_discrepancy(*both, (0.3, 2.0)), (x, y))
    assert torch.autograd.gradcheck(lambda y: squared_discrepancy(x.detach(), y, (0.3, 2.0)), (y,))


def test_gmmn_of_the_paper_and_its_sigmoid():
    density = MomentMatchingNetwork(2)
    widths = [m.out_features for m in density.network if isinstance(m, torch.nn.Linear)]
    assert widths == [64, 256, 256, 784, 2]
    assert density.network[0].in_features == 10
    density = MomentMatchingNetwork(2, output="sigmoid")
    density.network[-1].weight.data.zero_()
    density.network[-1].bias.data = torch.logit(torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(density.sample(1), torch.tensor([[-5.0, 5.0]]))


def test_chunks_change_nothing():
    for family in ("gmm", "rnade", "maf", "gaussian"):
        density = build(family, dim=3).eval()
        z = torch.randn(10, 3)
        with torch.no_grad():
            whole = density.log_prob(z)
            density.chunk_examples = 3
            torch.testing.assert_close(density.log_prob(z), whole)
    density.sample_chunk_examples = 4
    assert density.sample(10).shape == (10, 3)
    assert density.sample(0).shape == (0, 3)


def test_sampling_restores_the_mode():
    density = build("lde", normalisation="batch").train()
    before = {k: v.clone() for k, v in density.state_dict().items()}
    density.sample(5)
    assert density.training
    assert all(torch.equal(v, before[k]) for k, v in density.state_dict().items())


def test_words_for_wrong_input(tmp_path):
    density = build("gaussian", dim=3)
    with pytest.raises(DataError, match=r"expected codes with shape \(B, 3\), got \(5, 2\)"):
        density.log_prob(torch.zeros(5, 2))
    with pytest.raises(DataError, match="dimension 1, 2"):
        density.standardise(torch.zeros(3), torch.tensor([1.0, 0.0, math.nan]))
    with pytest.raises(DataError, match=r"a mean with shape \(2,\) and a scale with shape \(\) don't fit 3 dimensions"):
        density.standardise(torch.zeros(2), torch.tensor(1.0))
    with pytest.raises(PipelineError, match="trained by gradient"):
        build("lde").estimate(lambda: [torch.zeros(1, 2)], torch.zeros(1, 2))
    with pytest.raises(PipelineError, match="at least 1 dimension"):
        Gaussian(0)
    with pytest.raises(DataError, match="only one; choose another family"):
        RealNVP(1)
    with pytest.raises(DataError, match="missing; run the stage"):
        load_density(tmp_path / "none.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(DataError, match="isn't a saved density"):
        load_density(tmp_path / "torn.safetensors")
    density.save(tmp_path / "density.safetensors")
    with pytest.raises(DataError, match="family 'gaussian', which isn't a Rnade"):
        Rnade.load(tmp_path / "density.safetensors")
    liar = build("lde")
    for arguments in ({"layers": 1000}, {"dim": 10**9}, {"components": 10**30}, {"blocks": "spiral"}, {"colour": 1}):
        liar.arguments = lambda arguments=arguments: build("lde").arguments() | arguments
        liar.save(tmp_path / "liar.safetensors")
        with pytest.raises(DataError, match=r"liar.safetensors isn't a saved density"):
            load_density(tmp_path / "liar.safetensors")
    whole = (tmp_path / "density.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-4])
    with pytest.raises(DataError, match=r"cut.safetensors isn't a saved density"):
        load_density(tmp_path / "cut.safetensors")


def test_settings_name_the_row():
    def row(**values):
        tables = {
            "datasets": {"points": {"source": "grid", "root": "pipeline/sources/grid.py"}},
            "autoencoders": {"points": {"dataset": "points", "objective": "identity"}},
            "densities": {"points-d": {"codes": "points", "dataset": "points", **values}},
        }
        return Params(tables).density("points-d")

    assert row(family="nsf").family == "nsf"
    for values, message in [
        ({"family": "lde", "components": 0}, "densities.points-d.components: must be at least 1"),
        ({"family": "lde", "blocks": "residual"}, "densities.points-d.width: must be set for residual blocks"),
        ({"family": "gmm", "components": [5, 2]}, "densities.points-d.components: must ascend"),
        ({"family": "maff"}, "did you mean 'maf'"),
        ({"family": "common"}, "densities.points-d.family"),
        ({"family": "made-mog"}, "densities.points-d.family: 'made-mog' is written 'made_mog', like its file"),
        ({"family": "maf", "bins": 8}, "densities.points-d.bins: unknown key"),
        ({"family": "made_mog", "hidden": []}, "densities.points-d.hidden: must list"),
        ({"family": "rnade", "hiden": 3}, "did you mean 'hidden'"),
    ]:
        with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
            row(**values)


def test_package_imports_without_torch():
    code = "import sys, pipeline.densities; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert set(choices("pipeline.densities")) == set(DENSITIES)
