"""Densities and networks as Python objects: pickled, copied, loaded; what torch.func and second derivatives don't support."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from small import DENSITIES

from pipeline.autoencoders import aae, ae, rae, vae
from pipeline.densities import Density
from pipeline.densities.common.density import build_density
from pipeline.errors import PipelineError
from pipeline.settings import build, implementation

OBJECTIVES = {"ae": ae, "aae": aae, "rae": rae, "vae": vae}
BY_HAND = {"lde", "rnade", "made_mog"}  # their gradients are computed by hand
LIKELY = [family for family in DENSITIES if family != "gmmn"]
Z = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))


def density(family: str, factor: bool = False, **options) -> Density:
    row = {"codes": "points", "dataset": "points", "family": family, **DENSITIES[family], **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = build_density(build(implementation("pipeline.densities", family, "family").Settings, row, "row"), 2)
    if factor and family != "prior":
        made.standardise(torch.tensor([1.0, -1.0]), torch.tensor([[2.0, 0.0], [0.5, 1.0]]))
    return made.eval()


def result(made: Density) -> torch.Tensor:
    return made.log_prob(Z) if made.has_log_prob else made.sample(4, torch.Generator().manual_seed(0))


# Users pickle models, as scikit-learn's joblib does. The bytes are made here; the product itself reads no pickle.
@pytest.mark.parametrize("family", DENSITIES)
def test_a_density_is_pickled_copied_and_saved(family: str) -> None:
    made = density(family, factor=True)
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    for other in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), torch.load(buffer, weights_only=False)):
        assert torch.equal(result(other), result(made))
        assert other.options == made.options


@pytest.mark.parametrize(
    "options",
    [{"activation": name} for name in ("leaky_relu", "relu", "elu", "tanh")]
    + [{"blocks": name, "width": 4} for name in ("residual", "gated", "separate")],
    ids=str,
)
def test_every_network_of_an_lde_is_pickled(options: dict) -> None:
    made = density("lde", **options)
    assert torch.equal(result(pickle.loads(pickle.dumps(made))), result(made))


@pytest.mark.parametrize("family", DENSITIES)
def test_a_state_dict_holds_the_factor_too(family: str) -> None:
    made, plain = density(family, factor=True), density(family)
    other = density(family)
    other.load_state_dict(made.state_dict())
    assert torch.equal(result(other), result(made))
    other.load_state_dict(plain.state_dict())
    assert torch.equal(result(other), result(plain))


def test_a_mixture_takes_the_number_of_gaussians_of_a_state_dict() -> None:
    made = density("gmm")
    made.estimate(lambda: [Z.repeat(20, 1)], Z)
    other = density("gmm")
    other.load_state_dict(made.state_dict())
    assert torch.equal(result(other), result(made))


@pytest.mark.parametrize("family", LIKELY)
@pytest.mark.parametrize("factor", [False, True])
def test_infinite_numbers_have_no_density(family: str, factor: bool) -> None:
    made = density(family, factor)
    z = torch.tensor([[math.inf, 0.0], [0.0, -math.inf], [math.inf, -math.inf], [0.3, -0.2]])
    with torch.no_grad():
        assert made.log_prob(z)[:3].tolist() == [-math.inf] * 3
        torch.testing.assert_close(made.log_prob(z)[3:], made.log_prob(z[3:]))
    made.log_prob(z)[3].backward() if any(p.requires_grad for p in made.parameters()) else None
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())
    assert made.log_prob(torch.tensor([[math.nan, math.inf]])).isnan().all()


@pytest.mark.parametrize("family", LIKELY)
def test_transformations_work_or_are_refused_in_words(family: str) -> None:
    made = density(family)
    each = torch.func.vmap(lambda z: made.log_prob(z[None])[0])
    if family in BY_HAND | {"naf"}:
        with pytest.raises(PipelineError, match=r"torch\.func"):
            each(Z)
    else:
        torch.testing.assert_close(each(Z), made.log_prob(Z))


@pytest.mark.parametrize("family", LIKELY)
def test_second_derivatives_are_right_or_refused_in_words(family: str) -> None:
    made = density(family).double()
    z = Z.double().requires_grad_()
    if family in BY_HAND:
        with pytest.raises(PipelineError, match="first derivatives only"):
            torch.autograd.grad(made.log_prob(z).sum(), z, create_graph=True)
        return

    def slope(x: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(made.log_prob(x).sum(), x, create_graph=True)
        return gradient[:, 0].sum()

    (second,) = torch.autograd.grad(slope(z), z)
    step = torch.zeros_like(z)
    step[:, 0] = 1e-5
    with torch.enable_grad():
        moved = [torch.autograd.grad(made.log_prob(x).sum(), x)[0] for x in (z + step, z - step)]
    torch.testing.assert_close(second[:, 0], (moved[0] - moved[1])[:, 0] / 2e-5, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_autoencoder_is_pickled_and_copied(objective: str) -> None:
    row = {"dataset": "d", "objective": objective, "latent_dim": 3, "blocks": 1, "base_channels": 4}
    module = OBJECTIVES[objective]
    made = module.build(build(module.Settings, row, "row"), (1, 8, 8), (0.0, 1.0)).eval()
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for other in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert torch.equal(other.decode(other.encode(images)), made.decode(made.encode(images)))
