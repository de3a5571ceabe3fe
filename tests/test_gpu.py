"""What only a GPU can tell: the same numbers as on the CPU, the same bits twice, and a killed run that resumes there."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import DENSITIES

from pipeline.autoencoders import aae, ae, vae
from pipeline.densities import Density, LatentDensityEstimator, load_density
from pipeline.densities.gmmn import squared_discrepancy
from pipeline.errors import PipelineError
from pipeline.evaluation import parzen
from pipeline.fitting import fit_density
from pipeline.settings import build as build_settings
from pipeline.settings import implementation
from pipeline.storage.batches import Batches
from pipeline.storage.codes import CodeIndex, CodeReader, write_part
from pipeline.storage.parts import write_index
from pipeline.system.ranks import Ranks, join
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.loop import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]

GPU = Ranks(0, 1, torch.device("cuda", 0))
COMMON = {"codes": "codes", "dataset": "codes", "epochs": 3, "batch_size": 64, "learning_rate": 0.005}
LDE: dict[str, Any] = {**COMMON, "family": "lde", "components": 3, "training_orders": 8, "patch_orders": 8, "dropout": 0.1}
FAMILIES: dict[str, dict[str, Any]] = {
    **{family: settings for family, settings in DENSITIES.items() if family not in ("gmmn", "prior")},
    "lde-separate": {"family": "lde", "components": 3, "blocks": "separate", "width": 16},
    "lde-gated": {"family": "lde", "components": 3, "blocks": "gated", "width": 16, "position_embedding": True},
    "lde-rounded": {"family": "lde", "components": 3, "scoring_precision": "bfloat16"},
    "lde-muon": {"family": "lde", "components": 3, "blocks": "residual", "width": 16, "optimizer": "muon"},
}


@pytest.fixture(autouse=True, scope="module")
def _as_in_a_stage() -> None:
    """`join` also has the libraries choose the same kernels each time."""
    assert join().device.type == "cuda"


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> CodeReader:
    """Correlated numbers, as many as square patches of 3x3 pixels have."""
    folder = tmp_path_factory.mktemp("codes")
    vectors = (np.random.default_rng(0).normal(size=(1400, 9)).cumsum(axis=1) * 3 + 5).astype(np.float32)
    split = {"train": vectors[:1000], "valid": vectors[1000:1200], "test": vectors[1200:]}
    parts: Any = {name: (write_part(folder, name, 0, block, None),) for name, block in split.items()}
    mean, std = vectors[:1000].mean(0).tolist(), vectors[:1000].std(0).tolist()
    write_index(folder, CodeIndex(dim=9, mean=tuple(mean), std=tuple(std), source_digest="", **parts))
    return CodeReader(folder)


def settings_of(**row: Any) -> Any:
    module = implementation("pipeline.densities", row["family"], "family")
    return build_settings(module.Settings, row, "densities.row")


def fitted(codes: CodeReader, ranks: Ranks, checkpoint: Checkpoint | None = None, **row: Any) -> Density:
    return fit_density(settings_of(**{**LDE, **row}), codes, ranks, checkpoint=checkpoint)[0]


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(x.cpu(), y.cpu()), name


@pytest.mark.parametrize("name", FAMILIES)
def test_families_score_as_on_the_cpu(name: str, codes: CodeReader) -> None:
    row = {**COMMON, "family": name, "epochs": 1, **FAMILIES[name]}
    density, _ = fit_density(settings_of(**row), codes, GPU)
    z = torch.from_numpy(next(iter(codes.blocks("test")))["codes"])
    with torch.no_grad():
        there = density.log_prob(z.cuda()).cpu()
        here = density.cpu().log_prob(z)
    torch.testing.assert_close(there, here, rtol=1e-4, atol=0.3 if name == "lde-rounded" else 2e-3)


def test_the_discrepancy_and_its_gradient_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(1500, 8), torch.randn(1000, 8)
    results = []
    for device in ("cpu", "cuda"):
        samples = y.to(device).requires_grad_()
        value = squared_discrepancy(x.to(device), samples, (0.2, 1.0, 3.0))
        results.append((value.detach().cpu(), torch.autograd.grad(value, samples)[0].cpu()))
    for there, here in zip(*results, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-7)


def test_samples_are_those_of_the_cpu(codes: CodeReader) -> None:
    density = fitted(codes, GPU)
    there = density.sample(3000, torch.Generator().manual_seed(0)).cpu()
    here = density.cpu().sample(3000, torch.Generator().manual_seed(0))
    # Rounding may choose another component where a weight's edge is near the number drawn, but rarely.
    agreement = ((there - here).abs() < 0.01).all(dim=1).float().mean()
    assert agreement > 0.99


@pytest.mark.parametrize("dim", [1, 8, 63, 100])
def test_loss_and_gradient_are_those_of_the_cpu(dim: int) -> None:
    torch.manual_seed(0)
    density, z = LatentDensityEstimator(dim, components=10), torch.randn(300, dim)
    gradients = {}
    for device in ("cpu", "cuda"):
        density.to(device).zero_grad()
        loss = density.loss(z.to(device))
        loss.backward()
        gradients[device] = [loss.detach().cpu(), *(p.grad.cpu().clone() for p in density.parameters() if p.grad is not None)]
    for here, there in zip(gradients["cpu"], gradients["cuda"], strict=True):
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-5)


def test_parts_of_a_batch_sum_to_the_whole() -> None:
    torch.manual_seed(0)
    density, z = LatentDensityEstimator(8, components=5).cuda(), torch.randn(300, 8, device="cuda")
    whole = density.loss(z)
    whole.backward()
    in_parts = copy.deepcopy(density)  # with a recording of its own
    in_parts.zero_grad()
    in_parts.chunk_examples = 1  # 64 codes at once
    assert len(in_parts._chunks(z)) == 5
    summed = in_parts.loss(z)
    summed.backward()
    torch.testing.assert_close(summed, whole)
    for a, b in zip(in_parts.parameters(), density.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    with torch.no_grad():
        torch.testing.assert_close(in_parts.eval().log_prob(z).mean() / -8, whole)


def test_a_frozen_part_gets_no_gradient() -> None:
    torch.manual_seed(0)
    density, z = LatentDensityEstimator(8, components=5).cuda(), torch.randn(100, 8, device="cuda")
    density.network.head.requires_grad_(False)
    density.loss(z).backward()
    assert density.network.head.weight.grad is None
    other = torch.nn.Parameter(density.network.head.weight + 1, requires_grad=False)
    density.network.head.weight = other
    with torch.no_grad():
        expected = density.loss(z)
    torch.testing.assert_close(density.loss(z), expected)
    density.requires_grad_(False)
    torch.testing.assert_close(density.loss(z), expected)


def test_empty_batches() -> None:
    density = LatentDensityEstimator(8, components=5).cuda().eval()
    with torch.no_grad():
        assert density.log_prob(torch.empty(0, 8, device="cuda")).shape == (0,)


@pytest.mark.parametrize("dropout", [0.0, 0.1])  # recorded, and not
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("blocks", "optimizer"), [("plain", "adamw"), ("separate", "adamw"), ("residual", "muon")])
def test_the_same_seed_gives_the_same_bits(
    dropout: float, precision: str, blocks: str, optimizer: str, codes: CodeReader
) -> None:
    row = {"dropout": dropout, "precision": precision, "ema_decay": 0.99, "blocks": blocks, "width": 16, "optimizer": optimizer}
    same_weights(fitted(codes, GPU, **row), fitted(codes, GPU, **row))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_stopped_fit_goes_on_to_the_same_bits(
    dropout: float, codes: CodeReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = fitted(codes, GPU, dropout=dropout, ema_decay=0.99, validate_steps=5)
    checkpoint = Checkpoint(tmp_path / "checkpoints", {"run": "a"})
    loss, calls = LatentDensityEstimator.loss, iter(range(10**6))

    def stopping(self: Any, z: Any, generator: Any = None) -> Any:
        if next(calls) == 20:
            os.kill(os.getpid(), 15)
        return loss(self, z, generator)

    monkeypatch.setattr(LatentDensityEstimator, "loss", stopping)
    with pytest.raises(PipelineError, match="SIGTERM"):
        fitted(codes, GPU, checkpoint, dropout=dropout, ema_decay=0.99, validate_steps=5)
    monkeypatch.setattr(LatentDensityEstimator, "loss", loss)
    same_weights(fitted(codes, GPU, checkpoint, dropout=dropout, ema_decay=0.99, validate_steps=5), whole)
    assert "going on from the checkpoint" in capsys.readouterr().err


def test_a_recorded_loss_follows_weights_shapes_and_precision() -> None:
    torch.manual_seed(0)
    density = LatentDensityEstimator(8, components=5).cuda()
    twin = LatentDensityEstimator(8, components=5)
    for n, mixed in ((100, False), (100, False), (60, False), (60, True), (100, False)):
        with torch.no_grad():
            for parameter in density.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        twin.load_state_dict({name: value.cpu() for name, value in density.state_dict().items()})
        z = torch.randn(n, 8)
        density.zero_grad()
        twin.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            there = density.loss(z.cuda())
        here = twin.loss(z)
        (2 * there).backward()
        (2 * here).backward()
        tolerance = {"rtol": 0.05, "atol": 0.02} if mixed else {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(there.detach().cpu(), here.detach(), **tolerance)
        for a, b in zip(density.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad.cpu(), b.grad, **tolerance)
    moved = density.cpu()
    torch.testing.assert_close(moved.loss(z), twin.loss(z))
    again = copy.deepcopy(density).cuda()
    torch.testing.assert_close(again.loss(z.cuda()).cpu(), twin.loss(z), rtol=1e-3, atol=1e-5)


def test_files_written_on_a_gpu_are_read_on_a_cpu(codes: CodeReader, tmp_path: Path) -> None:
    density = fitted(codes, GPU)
    density.save(tmp_path / "density.safetensors")
    read = load_density(tmp_path / "density.safetensors")
    assert read.shift.device.type == "cpu"
    same_weights(density, read)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("objective", ["ae", "vae", "aae"])
def test_autoencoders_train_to_the_same_bits(objective: str, precision: str) -> None:
    module = {"ae": ae, "vae": vae, "aae": aae}[objective]
    row = {
        **{"dataset": "images", "objective": objective, "latent_dim": 4, "blocks": 1, "base_channels": 8, "epochs": 2},
        **{"batch_size": 50, "learning_rate": 0.002, "precision": precision, "batch_norm_gain": "ones"},
        **({"prior": "normal"} if objective == "aae" else {"incremental": {"mode": "linear", "warm_up_epochs": 1}}),
    }
    images = np.random.default_rng(0).random((200, 1, 28, 28)).astype(np.float32).round()

    def trained() -> torch.nn.Module:
        settings = build_settings(module.Settings, row, "autoencoders.row")
        model = module.build(settings, (1, 28, 28), (0.0, 1.0)).to(GPU.device)
        batches = Batches(lambda i: {"images": images}, [200], 50, seed=0)
        prepare = lambda arrays: {"images": torch.from_numpy(arrays["images"]).cuda()}  # noqa: E731
        record = train(model, batches, settings, GPU, prepare=prepare)
        assert np.isfinite(record.curve[-1]["loss"])
        return model

    same_weights(trained(), trained())


def test_parzen_windows_are_those_of_the_cpu() -> None:
    generator = np.random.default_rng(0)
    points, samples = (generator.random((n, 784)).astype(np.float32) for n in (600, 5000))
    here, there = (
        parzen.log_likelihoods(lambda: [points], lambda: [samples], [0.15, 0.3], device) for device in ("cpu", "cuda:0")
    )
    np.testing.assert_allclose(there, here, atol=0.01)


def test_the_command_line_picks_the_gpu() -> None:
    code = "from pipeline.system.ranks import join; print(join().device)"
    for wanted, device in (("auto", "cuda:0"), ("cuda", "cuda:0"), ("cpu", "cpu")):
        environment = {**os.environ, "DEVICE": wanted}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == device
