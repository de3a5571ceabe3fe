"""The objectives `vae`, `aae` and `rae`, and their priors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from pipeline.autoencoders import aae, ae, rae, vae
from pipeline.autoencoders.vae import kl_divergence
from pipeline.errors import SettingsError
from pipeline.priors import Prior
from pipeline.settings import Params, build
from pipeline.training.trainable import Step

MODULES = {"ae": ae, "vae": vae, "aae": aae, "rae": rae}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def step(index: int = 0, epoch: float = 0.0) -> Step:
    return Step(index, epoch, generator(index))


def objective(name: str, **changes):
    row = {"dataset": "digits", "objective": name, "latent_dim": 4, "blocks": 1, "base_channels": 8, "batch_norm_gain": "ones"}
    if name == "aae":
        row["discriminator_width"] = 32
    module = MODULES[name]
    return module.build(build(module.Settings, row | changes, "autoencoders.a"), (1, 8, 8), (0.0, 1.0))


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    """64 real digits with shape (64, 1, 8, 8), in 0..1."""
    return torch.from_numpy(load_digits().images[:64].astype(np.float32) / 16)[:, None]


def train(model, images, steps=80, lr=3e-3):
    optimizers = {p: torch.optim.Adam(model.phase_parameters(p), lr=lr, betas=(0.5, 0.999)) for p in model.phases}
    model.train()
    for index in range(steps):
        for phase, optimizer in optimizers.items():
            optimizer.zero_grad()
            model(phase, {"images": images}, step(index, index / 10))["loss"].backward()
            optimizer.step()
    return model.eval()


def error(model, images) -> float:
    with torch.no_grad():
        return (model.decode(model.encode(images)) - images).square().mean().item()


# All ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("incremental", [None, {"warm_up_epochs": 4}], ids=["whole", "incremental"])
@pytest.mark.parametrize("name", list(MODULES))
def test_training_lowers_the_error(digits, name, incremental):
    model = objective(name, **({} if incremental is None else {"incremental": incremental}))
    first = error(model.eval(), digits)
    assert error(train(model, digits), digits) < 0.5 * first


@pytest.mark.parametrize("name", list(MODULES))
def test_losses_follow_from_the_steps_generator(digits, name):
    model = objective(name)
    for phase in model.phases:
        torch.manual_seed(1)
        first = model(phase, {"images": digits}, step(5))
        torch.manual_seed(2)
        again = model(phase, {"images": digits}, step(5))
        assert all(value.ndim == 0 and torch.equal(value, again[key]) for key, value in first.items())


@pytest.mark.parametrize("name", list(MODULES))
def test_the_same_seed_gives_the_same_weights(name):
    states = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        states.append(objective(name, seed=3).state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_objectives_start_from_the_same_network():
    states = [objective(name).state_dict() for name in MODULES]
    shared = [k for k in states[0] if "log_variance" not in k]
    assert all(torch.equal(states[0][k], state[k]) for state in states[1:] for k in shared if k.startswith("encoder.layers"))


@pytest.mark.parametrize("name", list(MODULES))
def test_losses_are_float32_in_mixed_precision(digits, name):
    model = objective(name)
    for phase in model.phases:
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(phase, {"images": digits}, step())
            losses["loss"].backward()
        assert all(value.dtype == torch.float32 for value in losses.values())
        full = model(phase, {"images": digits}, step())
        torch.testing.assert_close(losses["loss"], full["loss"], rtol=0.03, atol=1e-3)


@pytest.mark.parametrize("name", list(MODULES))
def test_closed_dimensions_get_no_gradient_from_the_data(digits, name):
    changes = {"incremental": {"warm_up_epochs": 4}}
    if name == "rae":
        changes |= {"decoder_penalty": "gradient", "decoder_weight": 1.0}
    model = objective(name, **changes)
    for phase in model.phases:
        model.zero_grad()
        model(phase, {"images": digits}, step(0, 1.5))["loss"].backward()
        heads = [model.encoder.head, model.encoder.log_variance_head, model.decoder.layers[0]]
        for head in heads:
            if head is not None and head.weight.grad is not None:
                assert head.weight.grad[:2].any()
                assert not head.weight.grad[2:].any()
    assert model.open_dimensions(step(0, 1.5)) == 2


# VAE ----------------------------------------------------------------------------------------------------------------


def test_kl_divergence_is_that_of_torch():
    mean, log_variance = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator())
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(kl_divergence(mean, log_variance), expected)


def test_kl_divergence_is_the_mean_log_ratio_of_samples():
    mean, log_variance, n = torch.tensor([0.7, -0.3]).double(), torch.tensor([-1.0, 0.4]).double(), 200_000
    noise = torch.randn(n, 2, dtype=torch.float64, generator=generator())
    codes = mean + (0.5 * log_variance).exp() * noise
    posterior = -0.5 * noise.square() - 0.5 * log_variance - 0.5 * math.log(2 * math.pi)
    prior = Prior("normal", 2).log_prob(codes)
    ratios = posterior.sum(1) - prior
    assert abs(ratios.mean() - kl_divergence(mean, log_variance).sum()) < 5 * ratios.std() / n**0.5


def test_the_vae_loss_is_the_negative_evidence_lower_bound(digits):
    """With kl_weight 1 and a decoder with noise of variance 1/2, up to the constant d/2 log(pi)."""
    model = objective("vae").eval()
    nn.init.normal_(model.encoder.log_variance_head.weight, std=0.1)
    losses = model("model", {"images": digits}, step(7))
    mean, log_variance = model.encoder.moments(digits)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    codes = mean + posterior.stddev * torch.randn(mean.shape, generator=generator(7))
    likelihood = torch.distributions.Normal(model.decode(codes), 0.5**0.5).log_prob(digits).flatten(1).sum(1)
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    bound = (likelihood - divergence).mean() + 64 / 2 * math.log(math.pi)
    torch.testing.assert_close(losses["loss"], -bound)
    torch.testing.assert_close(losses["kl"], divergence.mean())


def test_codes_of_a_vae_are_posterior_means(digits):
    model = objective("vae").eval()
    torch.testing.assert_close(model.encode(digits), model.encoder.moments(digits)[0])


def test_a_heavier_kl_weight_brings_the_posterior_nearer_to_the_prior(digits):
    divergences = []
    for weight in (0.0, 0.1, 10.0):
        model = train(objective("vae", kl_weight=weight), digits)
        divergences.append(model("model", {"images": digits}, step())["kl"].item())
    assert divergences[0] > divergences[1] > divergences[2]


# AAE ----------------------------------------------------------------------------------------------------------------


def test_phases_move_their_own_parameters_alone(digits):
    model = objective("aae")
    parts = {"autoencoder": {"encoder", "decoder"}, "discriminator": {"discriminator"}, "generator": {"encoder"}}
    for phase, expected in parts.items():
        model.zero_grad(set_to_none=True)
        model(phase, {"images": digits}, step())["loss"].backward()
        touched = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
        assert touched == expected
        own = {id(p) for p in model.phase_parameters(phase)}
        assert own == {id(p) for name, p in model.named_parameters() if name.split(".")[0] in expected}


def test_adversarial_losses_are_binary_cross_entropies(digits):
    model = objective("aae").eval()
    codes = model.encode(digits)
    draws = Prior("normal", 4).sample(64, generator())
    coded, real = model.discriminator(codes), model.discriminator(draws)
    entropy = nn.functional.binary_cross_entropy_with_logits
    expected = 0.5 * (entropy(real, torch.ones_like(real)) + entropy(coded, torch.zeros_like(coded)))
    torch.testing.assert_close(model("discriminator", {"images": digits}, step())["loss"], expected)
    expected = entropy(coded, torch.ones_like(coded))
    torch.testing.assert_close(model("generator", {"images": digits}, step())["loss"], expected)


def test_adversarial_training_brings_codes_to_the_prior(digits):
    """Codes scaled up beforehand: without the game they stay wide."""
    spreads = {}
    for name in ("ae", "aae"):
        model = objective(name)
        with torch.no_grad():
            model.encoder.head.weight.mul_(20)
        spreads[name] = train(model, digits, steps=150, lr=2e-3).encode(digits).std().item()
    assert spreads["aae"] < 0.5 * spreads["ae"]


# Priors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["normal", "two_normals"])
def test_priors_are_densities(name):
    prior = Prior(name, 2)
    grid = torch.linspace(-10, 10, 401, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    assert (prior.log_prob(points).exp().sum() * 0.05**2).item() == pytest.approx(1, abs=1e-9)
    # Samples: the mean log-density is the negative entropy.
    logs = prior.log_prob(prior.sample(100_000, generator()))
    entropy = -(prior.log_prob(points).exp() * prior.log_prob(points)).sum() * 0.05**2
    assert abs(logs.mean() + entropy) < 5 * logs.std() / 100_000**0.5


def test_the_two_normals_lie_apart():
    draws = Prior("two_normals", 3).sample(10_000, generator())
    signs = draws.mean(1) > 0
    assert abs(signs.float().mean() - 0.5) < 0.03
    torch.testing.assert_close(draws[signs].mean(0), torch.full((3,), 3.0), atol=0.08, rtol=0)
    torch.testing.assert_close(draws[~signs].mean(0), torch.full((3,), -3.0), atol=0.08, rtol=0)
    torch.testing.assert_close(draws[signs].std(0), torch.ones(3), atol=0.05, rtol=0)


# RAE ----------------------------------------------------------------------------------------------------------------


def test_without_weights_the_rae_is_the_ae(digits):
    plain = objective("ae")("model", {"images": digits}, step())["loss"]
    weightless = objective("rae", code_weight=0.0, decoder_weight=0.0)("model", {"images": digits}, step())["loss"]
    assert torch.equal(plain, weightless)


def test_the_rae_loss_by_its_parts(digits):
    model = objective("rae", code_weight=0.3, decoder_weight=0.01).eval()
    losses = model("model", {"images": digits}, step())
    codes = model.encode(digits)
    parameters = torch.cat([p.flatten() for p in model.decoder.parameters()])
    torch.testing.assert_close(losses["code_norm"], 0.5 * codes.norm(dim=1).square().mean())
    torch.testing.assert_close(losses["decoder_penalty"], parameters.square().sum())
    torch.testing.assert_close(losses["loss"], losses["mse"] + 0.3 * losses["code_norm"] + 0.01 * losses["decoder_penalty"])


def test_the_jacobians_norm_is_estimated_without_bias(digits):
    model = objective("rae", decoder_penalty="gradient", channels_last=False).eval()
    nn.init.orthogonal_(model.decoder.layers[-1].weight, gain=3, generator=generator())
    images = digits[:2]
    codes = model.encode(images)
    jacobians = [torch.autograd.functional.jacobian(lambda z: model.decode(z[None])[0], code) for code in codes]
    expected = sum(j.square().sum() for j in jacobians) / 2 / 64
    estimates = torch.stack([model("model", {"images": images}, step(i))["decoder_penalty"].detach() for i in range(600)])
    assert abs(estimates.mean() - expected) < 5 * estimates.std() / len(estimates) ** 0.5
    assert estimates.std() > 0


def test_the_gradient_penalty_reaches_the_decoder_and_needs_no_gradient_in_validation(digits):
    model = objective("rae", decoder_penalty="gradient", decoder_weight=1.0)
    model("model", {"images": digits}, step())["decoder_penalty"].backward()
    assert model.decoder.layers[0].weight.grad.any()
    model.eval()
    with torch.no_grad():
        losses = model("model", {"images": digits}, step())
    torch.testing.assert_close(losses["loss"], losses["mse"] + 1e-4 * losses["code_norm"])


def test_code_weight_shortens_codes(digits):
    norms = [train(objective("rae", code_weight=w), digits).encode(digits).norm(dim=1).mean() for w in (0.0, 1e-2)]
    assert norms[1] < 0.7 * norms[0]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vae", {"kl_weight": -1.0}, r"autoencoders.a.kl_weight"),
        ("aae", {"prior": "three_normals"}, r"autoencoders.a.prior: expected one of normal, two_normals"),
        ("aae", {"discriminator_width": 0}, r"autoencoders.a.discriminator_width"),
        ("aae", {"discriminator_layers": 0}, r"autoencoders.a.discriminator_layers"),
        ("rae", {"code_weight": -1.0}, r"autoencoders.a.code_weight"),
        ("rae", {"decoder_weight": -1.0}, r"autoencoders.a.decoder_weight"),
    ],
)
def test_impossible_settings_are_refused(name, changes, message):
    with pytest.raises(SettingsError, match=message):
        objective(name, **changes)


@pytest.mark.parametrize(("objective", "held"), [("vae", "normal"), ("aae", "two_normals")])
def test_a_density_row_names_the_prior_that_its_codes_are_held_to(objective, held):
    keys = {"dataset": "d", "objective": objective, "latent_dim": 8, "blocks": 1} | (
        {"prior": held} if objective == "aae" else {}
    )

    def density(prior):
        tables = {
            "datasets": {"d": {"source": "digits5k", "root": "pipeline/sources/digits5k.py"}},
            "autoencoders": {"a": keys},
            "densities": {"p": {"codes": "a", "dataset": "d", "family": "prior", "prior": prior}},
        }
        return Params(tables).density("p")

    assert density(held).prior == held
    other = {"normal": "two_normals", "two_normals": "normal"}[held]
    with pytest.raises(SettingsError, match=f"^densities.p.prior: '{other}', but the codes of autoencoders.a are held to"):
        density(other)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_it_learns_by_the_absolute_error(name, digits):
    model = objective(name, pixel_loss="absolute")
    before = error(model.eval(), digits)
    assert error(train(model, digits), digits) < 0.6 * before


@pytest.mark.parametrize("pixel_loss", ["squared", "absolute"])
def test_the_pixel_loss_is_what_it_says(pixel_loss, digits):
    model = objective("ae", pixel_loss=pixel_loss)
    difference = model.decoder(model.encoder(digits)) - digits
    expected = difference.square() if pixel_loss == "squared" else difference.abs()
    losses = objective("ae", pixel_loss=pixel_loss)("model", {"images": digits}, step())
    torch.testing.assert_close(losses["loss"], expected.mean())
    torch.testing.assert_close(losses["mse"], difference.square().mean())
