"""The LDE: exactness, its naive twins, sampling."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from pipeline.densities import LatentDensityEstimator
from pipeline.densities.common.density import standard_normal, uniform
from pipeline.densities.common.orders import patch_orders, reordered
from pipeline.errors import DataError, PipelineError, SettingsError
from pipeline.sampling import write_samples
from pipeline.settings import SamplingSettings
from pipeline.system.devices import has_bfloat16
from pipeline.system.ranks import Ranks

VARIANTS = {
    "paper": {},
    "batch": {"normalisation": "batch"},
    "tanh-capped": {"activation": "tanh", "channel_cap": 24},
    "residual": {"blocks": "residual", "width": 12, "layers": 5, "dropout": 0.3},
    "residual-batch": {"blocks": "residual", "width": 12, "normalisation": "batch", "activation": "elu"},
    "gated": {"blocks": "gated", "width": 10, "min_log_scale": -3.0, "max_log_scale": 1.0},
    "positions": {"blocks": "residual", "width": 8, "layers": 4, "position_embedding": True},
    "separate": {"blocks": "separate", "width": 8, "dropout": 0.2},
    "attention": {"blocks": "attention", "width": 8, "heads": 2, "layers": 2, "dropout": 0.2},
}


def make(dim, components=3, seed=0, **arguments):
    """A float64 LDE in evaluation mode whose every parameter, statistic and scale is far from its default."""
    torch.manual_seed(seed)
    density = LatentDensityEstimator(dim, components=components, **arguments).double()
    with torch.no_grad():
        for value in density.parameters():
            value.add_(0.2 * torch.randn_like(value))
        for name, value in density.named_parameters():
            if name.endswith("head.weight"):
                value.mul_(0.3)
                value[2 * components :].mul_(0.1)  # is exponentiated: keep samples from running away
        for name, value in density.named_buffers():
            if name.endswith("running_var") or name == "scale":
                value.uniform_(0.5, 2)
            elif name.endswith("running_mean") or name == "shift":
                value.normal_()
    return density.eval()


def codes(n, dim, seed=1):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Twin(nn.Module):
    """The paper's network word for word: explicit padding, a mask channel, nn.Conv1d, nn.BatchNorm1d, composed loss."""

    def __init__(self, density: LatentDensityEstimator) -> None:
        super().__init__()
        self.dim, self.components = density.dim, density.options.components
        self.padding = 2 ** len(density.network.layers)
        self.stack = nn.Sequential()
        for layer in density.network.layers:
            _, filters, inputs = layer.weight.shape
            convolution = nn.Conv1d(inputs, filters, kernel_size=2, dilation=layer.dilation)
            convolution.weight.data = layer.weight.data.permute(1, 2, 0).clone()
            convolution.bias.data = layer.bias.data.clone()
            self.stack.append(convolution)
            if layer.norm is not None:
                norm = nn.BatchNorm1d(filters).double()
                norm.load_state_dict(layer.norm.state_dict())
                self.stack.append(norm)
            self.stack.append(nn.LeakyReLU(0.2))
        self.head = nn.Conv1d(density.network.head.in_features, density.network.head.out_features, kernel_size=1)
        self.head.weight.data = density.network.head.weight.data[:, :, None].clone()
        self.head.bias.data = density.network.head.bias.data.clone()
        self.shift, self.scale = density.shift.clone(), density.scale.clone()
        self.double().train(density.training)

    def conditionals(self, z):
        z = F.pad((z - self.shift) / self.scale, (self.padding, 0))[:, :-1]
        mask = torch.ones_like(z)
        mask[:, : self.padding] = 0
        outputs = self.head(self.stack(torch.stack([z, mask], dim=1)))  # (B, 3K, D)
        logits, means, log_scales = outputs.transpose(1, 2).chunk(3, dim=-1)
        return logits.softmax(-1), means, log_scales.exp()

    def log_prob(self, z):
        weights, means, scales = self.conditionals(z)
        each = torch.distributions.Normal(means, scales).log_prob(((z - self.shift) / self.scale)[..., None])
        return torch.logsumexp(weights.log() + each, dim=-1).sum(dim=1) - self.scale.log().sum()


@pytest.mark.parametrize("dim", range(1, 21))
def test_conditionals_depend_on_earlier_dimensions_only(dim):
    names = VARIANTS if dim in (1, 2, 8) else ["paper"]
    for name in names:
        density = make(dim, **VARIANTS[name])
        z = codes(3, dim)
        jacobian = torch.autograd.functional.jacobian(lambda z: torch.stack(density.conditionals(z)).sum(dim=1), z)  # noqa: B023
        reaches = jacobian.abs().amax(dim=(0, 2, 3)) > 0  # (D, D): conditional, dimension
        assert torch.equal(reaches, torch.ones(dim, dim).tril(-1).bool()), name


@pytest.mark.parametrize("name", VARIANTS)
def test_density_integrates_to_one(name):
    grid = torch.linspace(-60, 60, 8001, dtype=torch.float64)
    density = make(1, **VARIANTS[name])
    assert torch.trapezoid(density.log_prob(grid[:, None]).exp(), grid).item() == pytest.approx(1, abs=1e-4)
    # In two dimensions p(z_1) integrates to 1 and so does p(z_2 | z_1) for any z_1.
    density = make(2, **VARIANTS[name])
    points = 401 if name == "attention" else 801
    coarse = torch.linspace(-40, 40, points, dtype=torch.float64)
    with torch.no_grad():
        joint = density.log_prob(torch.cartesian_prod(coarse, coarse)).exp().view(points, points)
    assert torch.trapezoid(torch.trapezoid(joint, coarse), coarse).item() == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("normalisation", ["none", "batch"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3, 8, 13])
def test_equals_literal_convolutions(dim, training, normalisation):
    density = make(dim, normalisation=normalisation).train(training)
    twin = Twin(density)
    ours, theirs = codes(6, dim).requires_grad_(), codes(6, dim).requires_grad_()
    weights = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)  # otherwise examples would cancel
    value, expected = density.log_prob(ours), twin.log_prob(theirs)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-8)
    (value @ weights).backward()
    (expected @ weights).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-8)
    layers = [(m.weight.grad.permute(2, 0, 1), m.bias.grad) for m in twin.stack if isinstance(m, nn.Conv1d)]
    for layer, (weight, bias) in zip(density.network.layers, layers, strict=True):
        torch.testing.assert_close(layer.weight.grad, weight, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(layer.bias.grad, bias, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(density.network.head.weight.grad, twin.head.weight.grad[:, :, 0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(density.network.head.bias.grad, twin.head.bias.grad, rtol=1e-8, atol=1e-8)
    norms = [m for m in twin.stack if isinstance(m, nn.BatchNorm1d)]
    for layer, norm in zip(density.network.layers if norms else [], norms, strict=True):
        torch.testing.assert_close(layer.norm.weight.grad, norm.weight.grad, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(layer.norm.bias.grad, norm.bias.grad, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(layer.norm.running_mean, norm.running_mean, rtol=0, atol=1e-8)
        torch.testing.assert_close(layer.norm.running_var, norm.running_var, rtol=0, atol=1e-8)


@pytest.mark.parametrize("components", [1, 2, 100])
def test_any_number_of_dimensions_and_components(components):
    for dim in (1, 2, 5, 33, 65):
        torch.manual_seed(dim)
        density = LatentDensityEstimator(dim, components=components).double().eval()
        z = codes(3, dim)
        torch.testing.assert_close(density.log_prob(z), Twin(density).log_prob(z), rtol=0, atol=1e-8)
        samples = density.sample(3, torch.Generator().manual_seed(0))
        assert samples.shape == (3, dim)
        assert torch.isfinite(density.log_prob(samples)).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients(name):
    density = make(6, **VARIANTS[name])
    z = codes(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(density.log_prob, (z,))
    parameters = tuple(p.detach().clone().requires_grad_() for p in density.parameters())
    names = [n for n, _ in density.named_parameters()]
    call = lambda *p: torch.func.functional_call(density, dict(zip(names, p, strict=True)), (z.detach(),))  # noqa: E731
    assert torch.autograd.gradcheck(call, parameters, fast_mode=True)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dim", [1, 2, 7, 16])
def test_samples_equal_naive_ancestral_sampling(dim, name):
    density = make(dim, **VARIANTS[name])
    density.sample_chunk_examples = 5
    samples = density.sample(12, torch.Generator().manual_seed(3))
    generator, expected = torch.Generator().manual_seed(3), []
    for n in (5, 5, 2):
        u, e = uniform((n, dim), samples, generator), standard_normal((n, dim), samples, generator)
        z = torch.zeros(n, dim, dtype=torch.float64)
        for i in range(dim):  # a whole forward pass for each dimension
            weights, means, scales = (parameter[:, i] for parameter in density.conditionals(z))
            component = torch.searchsorted(weights.cumsum(-1).contiguous(), u[:, i : i + 1].contiguous(), right=True)
            z[:, i] = (means.gather(1, component) + scales.gather(1, component) * e[:, i, None])[:, 0]
        expected.append(z)
    torch.testing.assert_close(samples, torch.cat(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("patch_orders", [1, 4])
def test_samples_follow_log_prob(patch_orders):
    density = make(3, seed=5, patch_orders=patch_orders).float()
    n = 40_000
    samples = density.sample(n, torch.Generator().manual_seed(0))
    # Importance weights from a wide Gaussian give the moments that log_prob implies, without drawing from it.
    proposal = torch.distributions.Normal(samples.mean(0), 2 * samples.std(0))
    torch.manual_seed(1)
    z = proposal.sample((4 * n,))
    with torch.no_grad():
        weights = (density.log_prob(z) - proposal.log_prob(z).sum(dim=1)).exp()
    assert weights.mean().item() == pytest.approx(1, abs=0.03)
    weights = weights / weights.sum()
    mean = weights @ z
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.05 * samples.std(0).max().item())
    covariance = (weights[:, None] * (z - mean)).T @ (z - mean)
    torch.testing.assert_close(samples.T.cov(), covariance, rtol=0, atol=0.06 * covariance.diagonal().max().item())
    # Two samples, ours and the proposal's resampled by weight: their energy distance lies within its spread under permutation.
    resampled = z[torch.multinomial(weights, 1000)]
    pooled = torch.cat([samples[:1000], resampled])
    signs = torch.cat([torch.ones(1000), -torch.ones(1000)]) / 1000
    signs = torch.stack([signs, *(signs[torch.randperm(2000)] for _ in range(100))])
    energies = -((signs @ torch.cdist(pooled, pooled)) * signs).sum(dim=1)
    assert energies[0] < energies[1:].max()


def test_standardisation_leaves_likelihoods_in_data_units():
    plain = make(4)
    plain.shift.zero_()
    plain.scale.fill_(1)
    scaled = make(4)
    mean, std = torch.tensor([1.0, -2.0, 3.0, 0.0]).double(), torch.tensor([0.1, 2.0, 30.0, 1.0]).double()
    scaled.standardise(mean, std)
    z = codes(10, 4)
    torch.testing.assert_close(scaled.log_prob(z * std + mean), plain.log_prob(z) - std.log().sum())
    torch.testing.assert_close(scaled.loss(z * std + mean), plain.loss(z))  # nats a dimension of standardised codes
    weights, means, scales = scaled.conditionals(z)
    each = torch.distributions.Normal(means, scales).log_prob(z[..., None])
    torch.testing.assert_close(torch.logsumexp(weights.log() + each, dim=-1).sum(dim=1), scaled.log_prob(z))


def test_cholesky_factor_leaves_likelihoods_in_data_units():
    plain, whitened = make(4), make(4)
    plain.shift.zero_()
    plain.scale.fill_(1)
    mean, factor = codes(1, 4)[0], torch.linalg.cholesky(torch.cov(codes(9, 4).T) + torch.eye(4, dtype=torch.float64))
    whitened.standardise(mean, factor)
    z = codes(10, 4)
    seen = mean + z @ factor.T
    torch.testing.assert_close(whitened.log_prob(seen), plain.log_prob(z) - torch.logdet(factor))
    weights, means, scales = whitened.conditionals(seen)
    each = torch.distributions.Normal(means, scales).log_prob(seen[..., None])
    torch.testing.assert_close(torch.logsumexp(weights.log() + each, dim=-1).sum(dim=1), whitened.log_prob(seen))
    drawn = [density.sample(5, torch.Generator().manual_seed(0)) for density in (plain, whitened)]
    torch.testing.assert_close(drawn[1], mean + drawn[0] @ factor.T)


def test_conditionals_depend_on_earlier_dimensions_only_behind_a_cholesky_factor():
    density = make(5)
    density.standardise(torch.zeros(5), torch.rand(5, 5, dtype=torch.float64).tril() + torch.eye(5, dtype=torch.float64))
    jacobian = torch.autograd.functional.jacobian(lambda z: density.conditionals(z)[1].sum(-1)[0], codes(1, 5))[:, 0]
    assert torch.equal(jacobian, jacobian.tril(-1))


@pytest.mark.parametrize(("dim", "count"), [(8, 2), (8, 4), (8, 8), (9, 8), (63, 8)])
def test_orders_of_a_patch_are_a_group_of_maps_that_keep_volume(dim, count):
    found = patch_orders(dim, count)
    maps = [torch.autograd.functional.jacobian(lambda z, o=o: reordered(z[None], o)[0], codes(1, dim)[0]) for o in found]
    assert len({tuple(map_.flatten().tolist()) for map_ in maps}) == count
    for map_ in maps:
        assert torch.linalg.det(map_).abs().item() == pytest.approx(1)
        assert sum(torch.allclose(map_ @ other, torch.eye(dim, dtype=torch.float64)) for other in maps) == 1


def test_density_is_averaged_over_orders_of_a_patch():
    density = make(3, patch_orders=8)
    z = codes(6, 3)
    first = make(3)
    each = torch.stack([first.log_prob(reordered(z, order)) for order in patch_orders(3, 8)])
    torch.testing.assert_close(density.log_prob(z), torch.logsumexp(each, dim=0) - math.log(8))
    torch.testing.assert_close(density.log_prob(reordered(z, density.orders[5])), density.log_prob(z))


def test_loss_is_that_of_each_patch_in_an_order_drawn_for_it():
    density, first, z = make(3, training_orders=8), make(3), codes(6, 3)
    each = torch.stack([first.log_prob(reordered(z, order)) for order in patch_orders(3, 8)])  # (8, 6)
    log_det = first.scale.log().sum()
    found = set()
    for seed in range(40):
        for i in range(len(z)):
            loss = density.loss(z[i : i + 1], torch.Generator().manual_seed(seed))
            order = (-loss * 3 - log_det - each[:, i]).abs().argmin()
            torch.testing.assert_close(-loss * 3 - log_det, each[order, i])
            found.add(int(order))
    assert found == set(range(8))
    torch.testing.assert_close(density.log_prob(z), first.log_prob(z))  # scoring keeps to patch_orders
    many = z[:1].expand(4000, -1)  # the mean of a batch: each patch of it has its own draw
    expected = -(each[:, 0].mean() + log_det) / 3
    assert density.loss(many, torch.Generator().manual_seed(0)).item() == pytest.approx(expected.item(), rel=0.02)


def test_samples_of_a_patch_come_in_all_orders():
    density = LatentDensityEstimator(3, components=1, patch_orders=8).double().eval()
    density.standardise(torch.tensor([9.0, 0.0, -9.0]), torch.tensor(0.01))  # pixels 9, 0, -9 and, in the last place, 0
    drawn = density.sample(4000, torch.Generator().manual_seed(0))
    assert abs(drawn.mean().item()) < 0.2
    places = drawn.round().long()
    assert (places == 9).sum(dim=0).tolist() == pytest.approx([1000] * 3, abs=120)
    assert torch.isfinite(density.log_prob(drawn)).all()
    assert density.log_prob(drawn).std() < 2  # each as likely as in the order that it was drawn in


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("components", {"components": 0}),
        ("activation", {"activation": "swish"}),
        ("blocks", {"blocks": "spiral"}),
        ("layers", {"layers": -1}),
        ("channel_cap", {"channel_cap": -4}),
        ("dropout", {"dropout": 1.0}),
        ("min_log_scale", {"min_log_scale": math.inf}),
        ("max_log_scale", {"max_log_scale": math.nan}),
        ("max_log_scale", {"min_log_scale": 1.0, "max_log_scale": 1.0}),
        ("width", {"blocks": "gated"}),
        ("normalisation", {"blocks": "separate", "width": 4, "normalisation": "batch"}),
        ("position_embedding", {"blocks": "separate", "width": 4, "position_embedding": True}),
        ("position_embedding", {"blocks": "attention", "width": 4, "position_embedding": True}),
        ("width", {"blocks": "attention"}),
        ("heads", {"blocks": "attention", "width": 6}),
        ("orders", {"orders": "any"}),
        ("orders", {"orders": "any", "blocks": "attention", "width": 4, "training_orders": 2}),
        ("averaged_orders", {"averaged_orders": 2}),
        ("scoring_precision", {"scoring_precision": "float16"}),
    ],
)
def test_settings_out_of_range_are_refused_by_name(key, values):
    with pytest.raises(SettingsError, match=rf"^lde\.{key}: "):
        LatentDensityEstimator(5, **values)


def test_orders_are_for_square_patches():
    for key in ("patch_orders", "training_orders"):
        with pytest.raises(SettingsError, match=f"{key} .*are for square patches.*, not 5 numbers"):
            LatentDensityEstimator(5, components=1, **{key: 2})
    with pytest.raises(SettingsError, match="patch_orders"):
        LatentDensityEstimator(63, components=1, patch_orders=3)


def test_no_floor_under_the_likelihood():
    density = LatentDensityEstimator(2, components=4)
    far = density.log_prob(torch.full((1, 2), 1e4))
    assert torch.isfinite(far).all()
    assert far.item() < -1e6


def test_chunks_change_nothing():
    density = make(9).eval()
    z = codes(70, 9)
    whole = density.log_prob(z)
    density.chunk_examples = 16
    with torch.no_grad():
        torch.testing.assert_close(density.log_prob(z), whole)


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_in_parts_equals_the_whole(name):
    density = make(9, **VARIANTS[name])
    z = codes(23, 9)
    results = []
    for chunk in (23, 5):
        density.zero_grad()
        density.chunk_examples = chunk
        loss = density.loss(z)
        (3 * loss).backward()
        results.append((loss.detach(), [p.grad.clone() for p in density.parameters()]))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0][0], -density.log_prob(z).mean().detach() / 9 - density.scale.log().mean())


def test_dropout_follows_the_generator():
    density = make(5, blocks="residual", width=8, dropout=0.5).train()
    z = codes(20, 5)
    losses = [density.loss(z, torch.Generator().manual_seed(seed)).item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    density.eval()
    assert (
        density.loss(z).item()
        == density.loss(z).item()
        == pytest.approx(-density.log_prob(z).mean().item() / 5 - density.scale.log().mean().item())
    )


@pytest.mark.parametrize(
    ("dim", "filters"), [(1, []), (2, [16]), (3, [16, 32]), (8, [16, 32, 64]), (63, [16, 32, 64, 128, 256, 512])]
)
def test_network_of_the_paper(dim, filters):
    density = LatentDensityEstimator(dim, components=30)
    assert [layer.filters for layer in density.network.layers] == filters
    assert [layer.dilation for layer in density.network.layers] == [2**n for n in range(len(filters))]
    assert density.network.head.out_features == 90


@pytest.mark.parametrize("name", VARIANTS)
def test_file_round_trip(name, tmp_path):
    density = make(5, **VARIANTS[name])
    density.save(tmp_path / "density.safetensors")
    loaded = LatentDensityEstimator.load(tmp_path / "density.safetensors")
    z = codes(4, 5)
    assert torch.equal(loaded.log_prob(z), density.log_prob(z))
    assert loaded.arguments() == density.arguments()
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "density.safetensors").read_bytes()


def test_file_holds_settings_type_and_factor(tmp_path):
    density = make(8, components=1, patch_orders=4, min_log_scale=-5.0)
    density.standardise(torch.zeros(8), torch.rand(8, 8, dtype=torch.float64).tril() + torch.eye(8, dtype=torch.float64))
    density.save(tmp_path / "density.safetensors")
    with safe_open(tmp_path / "density.safetensors", framework="pt") as file:
        metadata = json.loads(file.metadata()["density"])
    assert metadata["family"] == "lde"
    assert LatentDensityEstimator(**metadata["arguments"]).arguments() == density.arguments()
    loaded = LatentDensityEstimator.load(tmp_path / "density.safetensors")
    z = codes(4, 8)
    assert torch.equal(loaded.log_prob(z), density.log_prob(z))
    assert torch.equal(*(d.sample(3, torch.Generator().manual_seed(0)) for d in (loaded, density)))


@pytest.mark.parametrize("name", VARIANTS)
def test_products_by_either_library_are_those_of_float64(name, monkeypatch):
    """float32 by oneDNN with fused activations, and by MKL."""
    results = []
    for kind in ("double", "mkl", "onednn"):
        density = make(9, **VARIANTS[name])
        z = codes(20, 9)
        if kind != "double":
            density, z = density.float(), z.float()
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.densities.common.products._prefers_mkl", kind == "mkl")
            value = density.log_prob(z)
            value.sum().backward()
            samples = density.sample(5, torch.Generator().manual_seed(0)).double() if kind != "double" else None
        results.append(([p.grad.double() for p in density.parameters()], value.double(), samples))
    (exact, value, _), *others = results
    for gradients, other, _ in others:
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-4)
        for a, b in zip(gradients, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * (1 + b.abs().max().item()))
    torch.testing.assert_close(results[1][2], results[2][2], rtol=1e-3, atol=1e-3)


def test_mixed_precision_stays_near():
    density = LatentDensityEstimator(8, components=5)
    z = codes(50, 8).float()
    exact = density.loss(z)
    exact.backward()
    gradient = density.network.layers[1].weight.grad.clone()
    density.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rough = density.loss(z)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), abs=0.02)
    rough.backward()
    torch.testing.assert_close(density.network.layers[1].weight.grad, gradient, rtol=0, atol=0.05 * gradient.abs().max().item())


@pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="this processor has no bfloat16")
def test_rounded_scores_are_near_and_those_of_a_density():
    exact = make(2, blocks="residual", width=16).float()
    density = make(2, blocks="residual", width=16, scoring_precision="bfloat16").float()
    density.load_state_dict(exact.state_dict())
    z = codes(64, 2).float()
    with torch.no_grad():
        rounded, wanted = density.log_prob(z), exact.log_prob(z)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, wanted)
    assert torch.allclose(rounded, wanted, atol=0.1)
    assert torch.equal(density.log_prob(z), exact.log_prob(z))  # with a gradient nothing is rounded
    grid = torch.linspace(-60, 60, 200_001)
    with torch.no_grad():
        for first in (-0.7, 2.0):
            joint = density.log_prob(torch.stack([torch.full_like(grid, first), grid], dim=1)).double()
            weights, means, scales = (value[0, 0].double() for value in density.conditionals(torch.tensor([[first, 0.0]])))
            each = weights.log() - scales.log() - 0.5 * ((first - means) / scales) ** 2 - 0.5 * math.log(2 * math.pi)
            marginal = torch.trapezoid(joint.exp(), grid.double()).log()  # the second conditional integrates to one
            assert marginal.item() == pytest.approx(torch.logsumexp(each, 0).item(), abs=0.02)


def test_float64_is_never_rounded():
    exact, density = (make(9, blocks="residual", width=16, scoring_precision=name) for name in ("float32", "bfloat16"))
    with torch.no_grad():
        assert torch.equal(density.log_prob(codes(8, 9)), exact.log_prob(codes(8, 9)))


def test_without_bfloat16_nothing_is_rounded(monkeypatch):
    monkeypatch.setattr("pipeline.densities.lde.has_bfloat16", lambda device: False)
    exact, density = (make(2, scoring_precision=name).float() for name in ("float32", "bfloat16"))
    z = codes(8, 2).float()
    with torch.no_grad():
        assert torch.equal(density.log_prob(z), exact.log_prob(z))


def test_casts():
    density = make(6)
    z = codes(4, 6)
    exact = density.log_prob(z)
    with pytest.raises(DataError, match=r"torch.float64 are wider than this density in torch.float32"):
        density.float().log_prob(z)
    torch.testing.assert_close(density.log_prob(z.float()), exact.float(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(density.double().log_prob(z), exact, rtol=1e-4, atol=1e-3)  # its weights were rounded


def test_learns():
    torch.manual_seed(0)
    density = LatentDensityEstimator(2, components=5)
    first = torch.randn(4000)
    z = torch.stack([first, first.square() + 0.1 * torch.randn(4000)], dim=1)
    density.standardise(z.mean(0), z.std(0))
    optimizer = torch.optim.Adam(density.parameters(), 3e-3)
    for step in range(300):
        optimizer.zero_grad()
        density.loss(z[(step * 200) % 4000 :][:200]).backward()
        optimizer.step()
    truth = -0.5 * math.log(2 * math.pi * math.e) + -0.5 * math.log(2 * math.pi * math.e * 0.01)
    assert density.log_prob(z).mean().item() > truth - 0.25


@pytest.mark.parametrize(("ceiling", "said"), [(None, "max_log_scale: 2.0 or a lower"), (300.0, "with a lower learning_rate")])
def test_samples_that_run_away_name_the_remedy(ceiling, said, tmp_path):
    density = LatentDensityEstimator(3, components=1, max_log_scale=ceiling).eval()
    density.network.head.bias.data[2] = 200.0  # scales of e^200, beyond float32
    with pytest.raises(DataError, match=said):
        write_samples(density, None, SamplingSettings(count=10), tmp_path / "samples", Ranks(0, 1, torch.device("cpu")))
    assert list(tmp_path.iterdir()) == []


def test_a_random_order_is_a_density_of_reordered_dimensions():
    plain, ordered = (make(7, order=order) for order in (0, 5))
    ordered.network.load_state_dict(plain.network.state_dict())
    for density in (plain, ordered):
        density.standardise(torch.zeros(()), torch.ones(()))
    z, order = codes(6, 7), ordered.order
    assert sorted(order.tolist()) == list(range(7)) != order.tolist()
    torch.testing.assert_close(ordered.log_prob(z), plain.log_prob(z[:, order]))
    torch.testing.assert_close(ordered.loss(z), plain.loss(z[:, order]))
    samples = [density.sample(5, torch.Generator().manual_seed(0)) for density in (plain, ordered)]
    torch.testing.assert_close(samples[1][:, order], samples[0])
    with pytest.raises(PipelineError, match="in their own order"):
        ordered.conditionals(z)


def test_noise_on_codes_is_for_training_only():
    density = make(3, noise=0.5)
    z = codes(6, 3)
    assert torch.equal(density.eval().loss(z, torch.Generator()), density.loss(z, torch.Generator()))
    noisy = [density.train().loss(z, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert noisy[0] == noisy[1] != noisy[2]


@pytest.mark.parametrize(("floor", "ceiling"), [(None, 5.0), (-5.0, None), (-5.0, 5.0), (None, None)])
def test_log_scales_lie_between_floor_and_ceiling(floor: float | None, ceiling: float | None) -> None:
    density = LatentDensityEstimator(1, components=1, min_log_scale=floor, max_log_scale=ceiling)
    raw = torch.linspace(-20, 20, 41)
    outputs = torch.stack([torch.zeros_like(raw), raw, raw], dim=-1)  # logit, mean, log standard deviation
    logits, means, scales = density._bounded(outputs).unbind(-1)
    assert torch.equal(logits, outputs[:, 0])
    assert torch.equal(means, raw)
    assert (scales.diff() >= 0).all()
    for bound, ends in ((floor, scales[:1]), (ceiling, scales[-1:])):
        assert bound is None or torch.allclose(ends, torch.tensor(bound), atol=1e-4)
    if floor is None:
        assert scales[0] == pytest.approx(-20, abs=1e-3)
    if ceiling is None:
        assert scales[-1] == pytest.approx(20, abs=1e-3)
