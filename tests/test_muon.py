"""Muon: orthogonalised momentum, against a singular value decomposition and torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.densities import LatentDensityEstimator
from pipeline.training.muon import Muon, orthogonalised

SHAPES = [(6, 6), (12, 5), (5, 12)]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_close_to_one_and_singular_vectors_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(4, *shape) * torch.tensor([1e-6, 1.0, 30.0, 1e4])[:, None, None]
    result = orthogonalised(matrices)
    assert result.shape == matrices.shape
    assert result.dtype == matrices.dtype
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.3
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    core = u.mT @ result @ v.mT  # diagonal where the vectors are the same
    assert torch.allclose(core, torch.diag_embed(core.diagonal(dim1=1, dim2=2)), atol=0.05)


def test_a_gradient_of_zeros_moves_nothing():
    assert torch.equal(orthogonalised(torch.zeros(2, 3, 3)), torch.zeros(2, 3, 3))


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_torch(shape):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    torch.manual_seed(1)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    settings = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = [Muon([ours], **settings), torch.optim.Muon([theirs], **settings, adjust_lr_fn="match_rms_adamw")]
    for _ in range(5):
        gradient = torch.randn(shape)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_a_stack_moves_as_its_matrices_do_one_by_one():
    torch.manual_seed(2)
    stack, single = nn.Parameter(torch.randn(2, 7, 4)), nn.Parameter(torch.randn(7, 4))
    alone = [nn.Parameter(value.clone()) for value in (*stack.detach(), single.detach())]
    together = Muon([stack, single, nn.Parameter(torch.randn(3, 3))], lr=0.1, weight_decay=0.01)  # the last has no gradient
    apart = [Muon([parameter], lr=0.1, weight_decay=0.01) for parameter in alone]
    for _ in range(3):
        gradients = torch.randn(3, 7, 4)
        stack.grad, single.grad = gradients[:2].clone(), gradients[2].clone()
        together.step()
        for parameter, gradient, optimizer in zip(alone, gradients, apart, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(torch.stack([*stack, single]), torch.stack(alone), atol=2e-3)


def test_a_closure_is_called_with_gradients():
    parameter = nn.Parameter(torch.eye(2))
    optimizer = Muon([parameter], lr=0.1)

    def closure() -> float:
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert not torch.equal(parameter, torch.eye(2))


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"Muon moves matrices, not a parameter with shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


def test_its_state_is_saved_and_restored():
    torch.manual_seed(3)
    gradients = torch.randn(4, 5, 5)
    results = []
    for cut in (None, 2):
        parameter = nn.Parameter(torch.ones(5, 5))
        optimizer = Muon([parameter], lr=0.1)
        for number, gradient in enumerate(gradients):
            if number == cut:
                state = optimizer.state_dict()
                parameter = nn.Parameter(parameter.detach().clone())
                optimizer = Muon([parameter], lr=0.1)
                optimizer.load_state_dict(state)
            parameter.grad = gradient.clone()
            optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({}, 2 * (16 * 32)),  # D = 3: two layers, the second alone between hidden ones
        ({"blocks": "residual", "width": 8, "layers": 3}, 2 * 2 * 64 + 3 * 64),
        ({"blocks": "gated", "width": 8, "layers": 3}, 2 * 2 * 128 + 3 * 64),
        ({"blocks": "separate", "width": 8, "layers": 3}, 2 * 6 * 64),
    ],
)
def test_the_lde_names_the_weights_between_its_hidden_layers(arguments, count):
    density = LatentDensityEstimator(3, components=2, **arguments)
    matrices = density.hidden_matrices()
    assert sum(value.numel() for value in matrices) == count
    assert {id(value) for value in matrices} <= {id(value) for value in density.parameters()}
