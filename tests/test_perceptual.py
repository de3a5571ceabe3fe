"""The perceptual loss against torchvision's VGG19, with explicit random weights."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import VGG19_Weights, vgg19
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.functional import normalize

from pipeline.autoencoders import ae, vae
from pipeline.autoencoders.common import perceptual as module
from pipeline.autoencoders.common.perceptual import PerceptualLoss, vgg19_weights
from pipeline.errors import DataError, PipelineError, SettingsError
from pipeline.settings import NamedFile, build
from pipeline.training.trainable import Step


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def twin() -> nn.Sequential:
    """The convolutional part of torchvision's VGG19 up to relu3_1, with random weights."""
    with torch.device("meta"):
        features = vgg19().features[:12]
    features = features.to_empty(device="cpu")
    for parameter in features.parameters():
        nn.init.normal_(parameter, std=0.05, generator=generator(parameter.numel()))
    return features.eval()


@pytest.fixture(scope="module")
def weights(twin) -> dict[str, torch.Tensor]:
    return {f"features.{name}": tensor.clone() for name, tensor in twin.state_dict().items()}


@pytest.fixture
def weights_file(weights, tmp_path):
    save_file(weights, tmp_path / "vgg19.safetensors")
    return NamedFile.of(str(tmp_path / "vgg19.safetensors")).pinned()


def naive(twin, images, reconstructions):
    extractor = create_feature_extractor(twin, {"1": "relu1_1", "6": "relu2_1", "11": "relu3_1"})
    mean, std = VGG19_Weights.IMAGENET1K_V1.transforms().mean, VGG19_Weights.IMAGENET1K_V1.transforms().std
    first, second = (extractor(normalize(x, mean, std)) for x in (images, reconstructions))
    return 0.5 * sum((first[name] - second[name]).square().mean() for name in ("relu1_1", "relu2_1", "relu3_1"))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_loss_is_that_of_torchvisions_network(twin, weights, channels, value_range, channels_last):
    images, reconstructions = torch.rand(2, 3, channels, 16, 16, generator=generator())
    expected = naive(twin, images.expand(-1, 3, -1, -1), reconstructions.expand(-1, 3, -1, -1))
    low, high = value_range
    loss = PerceptualLoss(weights, value_range, channels_last=channels_last)
    torch.testing.assert_close(loss(low + (high - low) * images, low + (high - low) * reconstructions), expected)


def test_only_the_layers_needed_are_built(weights):
    loss = PerceptualLoss(weights, (0.0, 1.0))
    assert [(m.in_channels, m.out_channels) for m in loss.modules() if isinstance(m, nn.Conv2d)] == [
        (3, 64), (64, 64), (64, 128), (128, 128), (128, 256)
    ]  # fmt: skip
    assert not loss.training
    assert not any(p.requires_grad for p in loss.parameters())


def test_gradient_flows_to_the_reconstructions_alone(weights):
    loss = PerceptualLoss(weights, (0.0, 1.0))
    images, reconstructions = torch.rand(2, 2, 3, 8, 8, generator=generator())
    images.requires_grad_()
    reconstructions.requires_grad_()
    loss(images, reconstructions).backward()
    assert images.grad is None
    assert reconstructions.grad.any()


def test_mixed_precision_gives_a_float32_loss(weights):
    loss = PerceptualLoss(weights, (0.0, 1.0))
    images, reconstructions = torch.rand(2, 2, 3, 8, 8, generator=generator())
    full = loss(images, reconstructions)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(images, reconstructions)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, full, rtol=0.05, atol=0)


# In an objective ----------------------------------------------------------------------------------------------------


def settings(source: str, objective: str = "ae", **changes):
    row = {"dataset": "digits", "objective": objective, "latent_dim": 4, "blocks": 1, "base_channels": 8}
    row |= {"perceptual_weight": 0.1, "perceptual_weights": source, "batch_norm_gain": "ones"}
    return build({"ae": ae, "vae": vae}[objective].Settings, row | changes, "autoencoders.a")


def test_equation_5(twin, weights_file):
    objective = ae.build(settings(weights_file), (1, 8, 8), (0.0, 1.0)).eval()
    images = torch.rand(3, 1, 8, 8, generator=generator())
    reconstructions = objective.decode(objective.encode(images))
    losses = objective("model", {"images": images}, Step(0, 0.0, generator()))
    expected = naive(twin, images.expand(-1, 3, -1, -1), reconstructions.expand(-1, 3, -1, -1))
    torch.testing.assert_close(losses["perceptual"], expected)
    torch.testing.assert_close(losses["loss"], (images - reconstructions).square().mean() + 0.1 * expected)


def test_the_vae_sums_both_terms_over_pixels(weights_file):
    objective = vae.build(settings(weights_file, "vae"), (1, 8, 8), (0.0, 1.0)).eval()
    losses = objective("model", {"images": torch.rand(3, 1, 8, 8, generator=generator())}, Step(0, 0.0, generator()))
    torch.testing.assert_close(losses["loss"], 64 * (losses["mse"] + 0.1 * losses["perceptual"]) + losses["kl"])


def test_vgg19_is_no_part_of_what_is_trained_or_saved(weights_file):
    objective = ae.build(settings(weights_file), (1, 8, 8), (0.0, 1.0))
    plain = ae.build(settings(weights_file, perceptual_weight=0.0), (1, 8, 8), (0.0, 1.0))
    assert objective.state_dict().keys() == plain.state_dict().keys()
    assert len(list(objective.parameters())) == len(list(plain.parameters())) == len(list(objective.phase_parameters("model")))
    assert not any(isinstance(m, PerceptualLoss) for m in objective.modules())
    images = torch.rand(3, 1, 8, 8, generator=generator())
    # A copy, as an average of weights makes one, has the loss too; and a step of training leaves VGG19 as it was.
    before = copy.deepcopy(objective._perceptual[0].state_dict())
    twin = copy.deepcopy(objective)
    losses = twin.train()("model", {"images": images}, Step(0, 0.0, generator()))
    losses["loss"].backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert "perceptual" in losses
    assert not twin._perceptual[0].training
    assert all(torch.equal(before[k], v) for k, v in twin._perceptual[0].state_dict().items())


def test_training_lowers_the_perceptual_loss(weights_file):
    objective = ae.build(settings(weights_file), (1, 8, 8), (0.0, 1.0))
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)
    images = torch.rand(8, 1, 8, 8, generator=generator()).round()
    losses = []
    for index in range(60):
        losses.append(objective("model", {"images": images}, Step(index, 0.0, generator())))
        optimizer.zero_grad()
        losses[-1]["loss"].backward()
        optimizer.step()
    assert losses[-1]["perceptual"] < 0.6 * losses[0]["perceptual"]


def test_a_file_is_read_only_under_the_digest_of_its_content(weights, weights_file):
    path, _, digest = weights_file.partition("@sha256:")
    assert len(digest) == 12
    save_file(weights | {"features.0.bias": torch.ones(64)}, path)
    replaced = NamedFile.of(path).pinned()
    assert replaced != weights_file
    bare = rf"^perceptual_weights: write {replaced} \(the file's content\)"
    other = rf"^perceptual_weights: {path} isn't the file with the digest '{digest}'; write {replaced}$"
    for source, expected in ((path, bare), (weights_file, other), (f"{replaced[:-1]}", f"; write {replaced}$")):
        with pytest.raises(SettingsError, match=expected):
            ae.build(settings(source), (1, 8, 8), (0.0, 1.0))
    ae.build(settings(replaced), (1, 8, 8), (0.0, 1.0))
    with pytest.raises(DataError, match=r"gone.pth is missing; put a state dict"):
        ae.build(settings("gone.pth@sha256:0123456789ab"), (1, 8, 8), (0.0, 1.0))


# Weights ------------------------------------------------------------------------------------------------------------


def test_weights_from_files(weights, tmp_path):
    whole = weights | {"classifier.0.weight": torch.zeros(3), "features.12.weight": torch.zeros(3)}
    save_file(whole, tmp_path / "a.safetensors")
    torch.save(whole, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        read = vgg19_weights(str(tmp_path / name), "perceptual_weights")
        assert read.keys() == weights.keys()
        assert all(torch.equal(read[k], weights[k]) for k in read)


def test_files_that_will_not_do_are_refused_by_name(weights, tmp_path):
    def refused(name, pattern):
        with pytest.raises(DataError, match=pattern) as error:
            vgg19_weights(str(tmp_path / name), "quality.weights")
        assert str(error.value).startswith("quality.weights: ")
        assert "\n" not in str(error.value)

    refused("none.safetensors", "none.safetensors is missing; .*imagenet")
    save_file({k: v for k, v in weights.items() if k != "features.7.bias"}, tmp_path / "part.safetensors")
    refused("part.safetensors", r"'features.7.bias' is missing, expected \(128,\)")
    save_file(weights | {"features.0.weight": torch.zeros(64, 1, 3, 3)}, tmp_path / "grey.safetensors")
    refused("grey.safetensors", r"'features.0.weight' is of shape \(64, 1, 3, 3\), expected \(64, 3, 3, 3\)")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "part.safetensors").read_bytes()[:1000])
    refused("cut.safetensors", "cut.safetensors can't be read")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    refused("junk.pth", r"junk.pth can't be read")
    torch.save(vgg19, tmp_path / "code.pth")  # a pickled function: weights_only refuses to run it
    refused("code.pth", r"code.pth can't be read")
    torch.save([1, 2], tmp_path / "list.pth")
    refused("list.pth", "'features.0.weight' is missing")


def test_official_weights_are_asked_for_never_made_up(weights, monkeypatch):
    asked = []

    def download(url, **options):
        asked.append((url, options))
        return weights

    monkeypatch.setattr(module.torch.hub, "load_state_dict_from_url", download)
    assert vgg19_weights("imagenet", "perceptual_weights").keys() == weights.keys()
    url, options = asked[0]
    assert url == VGG19_Weights.IMAGENET1K_V1.url
    assert options["check_hash"]
    assert options["weights_only"]

    def fail(url, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(module.torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(
        PipelineError,
        match=r"^quality.weights: can't download .* \(no route to host\); download https://.*the file's path",
    ):
        vgg19_weights("imagenet", "quality.weights")
