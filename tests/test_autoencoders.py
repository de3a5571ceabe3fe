"""The network of Figure 9, the settings, and the objectives `ae` and `identity`."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

from pipeline.autoencoders import ae, identity
from pipeline.autoencoders.common.incremental import IncrementalSettings
from pipeline.autoencoders.common.network import Autoencoder, Decoder, Encoder, filter_side, image_side
from pipeline.autoencoders.common.options import ConvolutionOptions
from pipeline.errors import DataError, SettingsError
from pipeline.settings import build
from pipeline.training.trainable import Step

# C, N, S, D, side, output: the table of experiments
PAPER = [
    pytest.param(1, 1, 7, 8, 28, "sigmoid", id="mnist"),
    pytest.param(1, 2, 6, 15, 48, "sigmoid", id="tfd"),
    pytest.param(3, 3, 4, 100, 64, "tanh", id="celeba64-shoes"),
    pytest.param(3, 4, 4, 200, 128, "tanh", id="celeba128"),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(channels=1, value_range=(0.0, 1.0), variational=False, generator=None, **changes) -> Autoencoder:
    options = ConvolutionOptions(**{"blocks": 1, "latent_dim": 3, "base_channels": 4} | changes)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return Autoencoder(options, (channels, 8, 8), value_range, variational=variational, generator=generator)


def row(**changes) -> dict:
    return {"dataset": "digits", "objective": "ae", "latent_dim": 4, "blocks": 1, "base_channels": 8} | changes


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    """64 real digits with shape (64, 1, 8, 8), in 0..1."""
    return torch.from_numpy(load_digits().images[:64].astype(np.float32) / 16)[:, None]


# Structure -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "blocks", "filter_side", "latent_dim", "side", "output"), PAPER)
def test_shapes_and_ranges_of_the_paper(channels, blocks, filter_side, latent_dim, side, output):
    with torch.device("meta"):
        options = ConvolutionOptions(blocks=blocks, filter_side=filter_side, latent_dim=latent_dim)
        encoder = Encoder(options, (channels, side, side))
        decoder = Decoder(options, (channels, side, side), output=output)
        codes = encoder(torch.empty(2, channels, side, side))
        assert codes.shape == (2, latent_dim)
        assert decoder(codes).shape == (2, channels, side, side)
    assert decoder.image_shape == (channels, side, side)
    assert decoder.value_range == ((0, 1) if output == "sigmoid" else (-1, 1))
    assert image_side(blocks, filter_side) == side


@pytest.mark.parametrize(("channels", "blocks", "filter_side", "latent_dim", "side", "output"), PAPER)
def test_parameter_counts(channels, blocks, filter_side, latent_dim, side, output):
    with torch.device("meta"):
        network = Autoencoder(ConvolutionOptions(blocks=blocks, latent_dim=latent_dim), (channels, side, side))
    widths = [64 * 2**n for n in range(blocks + 1)]
    inner = sum(16 * a * b for a, b in itertools.pairwise(widths))
    last = widths[-1] * filter_side**2 * latent_dim
    encoder = 16 * channels * 64 + 64 + inner + 3 * sum(widths[1:]) + last + latent_dim
    decoder = last + widths[-1] + inner + 3 * sum(widths[:-1]) + 16 * 64 * channels + channels
    assert sum(p.numel() for p in network.encoder.parameters()) == encoder
    assert sum(p.numel() for p in network.decoder.parameters()) == decoder


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_network_of_mnist_written_out(channels_last):
    options = ConvolutionOptions(blocks=1, latent_dim=8, channels_last=channels_last)
    network = Autoencoder(options, (1, 28, 28), generator=generator())
    encoder = nn.Sequential(
        nn.Conv2d(1, 64, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 128, 4, stride=2, padding=1),
        nn.BatchNorm2d(128),
        nn.LeakyReLU(0.2),
        nn.Conv2d(128, 8, 7),
    )
    decoder = nn.Sequential(
        nn.ConvTranspose2d(8, 128, 7),
        nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1),
        nn.BatchNorm2d(64),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(64, 1, 4, stride=2, padding=1),
        nn.Sigmoid(),
    )
    for ours, twin in ((network.encoder, encoder), (network.decoder, decoder)):
        twin.load_state_dict(dict(zip(twin.state_dict(), ours.state_dict().values(), strict=True)))
    images = torch.rand(5, 1, 28, 28, generator=generator())
    for mode in (True, False):
        for module in (network, encoder, decoder):
            module.train(mode)
        codes = network.encoder(images)
        torch.testing.assert_close(codes, encoder(images).flatten(1))
        torch.testing.assert_close(network.decoder(codes), decoder(codes[:, :, None, None]))
    torch.testing.assert_close(network(images), network.decoder(network.encoder(images)))  # the last mode is evaluation


def test_normalisation_after_the_first_layer_is_off_by_default():
    def norms(module):
        return sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())

    assert norms(small().decoder) == 1
    assert norms(small(input_normalisation=True).decoder) == 2


@pytest.mark.parametrize(
    ("blocks", "side", "expected"), [(1, 28, 7), (2, 48, 6), (3, 64, 4), (4, 128, 4), (0, 2, 1), (2, 28, None), (3, 8, None)]
)
def test_the_filter_side_follows_from_the_image_side(blocks, side, expected):
    assert filter_side(blocks, side) == expected


# Initial weights -----------------------------------------------------------------------------------------------------


def test_weights_are_orthogonal_biases_zero_gains_small():
    options = ConvolutionOptions(blocks=2, latent_dim=10, base_channels=16)
    network = Autoencoder(options, (3, 32, 32), generator=generator())
    gains = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            flat = (
                module.weight.detach().flatten(1).double()
            )  # rows: output channels, for a transposed convolution input channels
            gram = flat @ flat.T if len(flat) <= flat.shape[1] else flat.T @ flat
            torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-5, rtol=0)
            assert not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            gains.append(module.weight.detach())
            assert not module.bias.any()
    gains = torch.cat(gains)
    assert abs(gains.mean()) < 5 * 0.02 / len(gains) ** 0.5
    assert gains.std().item() == pytest.approx(0.02, rel=0.3)


def test_gains_of_one():
    for module in small(batch_norm_gain="ones").modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()


def test_weights_follow_from_the_generator_and_leave_pytorchs_own_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = small(generator=generator(3)).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again, other = small(generator=generator(3)).state_dict(), small(generator=generator(4)).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["encoder.head.weight"], other["encoder.head.weight"])


def test_channels_last_changes_memory_only():
    plain, last = small(channels_last=False), small(channels_last=True)
    weight = last.encoder.layers[2].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight, plain.encoder.layers[2].weight)
    images = torch.rand(2, 1, 8, 8, generator=generator())
    torch.testing.assert_close(plain(images), last(images))


# The second head -----------------------------------------------------------------------------------------------------


def test_the_second_head_starts_at_zero_and_needs_to_be_asked_for():
    encoder = small(variational=True).encoder
    images = torch.rand(3, 1, 8, 8, generator=generator())
    mean, log_variance = encoder.moments(images)
    torch.testing.assert_close(mean, encoder(images))
    assert log_variance.shape == (3, 3)
    assert not log_variance.any()
    with pytest.raises(TypeError, match="variational"):
        small().encoder.moments(images)


def test_log_variances_are_bounded_smoothly():
    encoder = small(variational=True).encoder
    images = torch.rand(3, 1, 8, 8, generator=generator())
    for bias, expected in ((1e6, 10.0), (-1e6, -10.0), (10.0, 10 * math.tanh(1.0)), (0.01, 0.01)):
        torch.nn.init.constant_(encoder.log_variance_head.bias, bias)
        torch.testing.assert_close(encoder.moments(images)[1], torch.full((3, 3), expected), rtol=1e-5, atol=1e-5)


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
def test_save_and_load(tmp_path, channels_last):
    network = small(channels_last=channels_last, variational=True, value_range=(-1.0, 1.0), channels=3)
    images = torch.rand(4, 3, 8, 8, generator=generator())
    network(images)  # moves the running statistics
    network.eval()
    network.encoder.save(tmp_path / "encoder.safetensors")
    network.decoder.save(tmp_path / "deep" / "decoder.safetensors")
    before = torch.get_rng_state()
    encoder, decoder = Encoder.load(tmp_path / "encoder.safetensors"), Decoder.load(tmp_path / "deep" / "decoder.safetensors")
    assert torch.equal(before, torch.get_rng_state())
    assert not encoder.training
    assert not decoder.training
    assert encoder.options == decoder.options == dataclasses.replace(network.encoder.options, filter_side=2)
    assert (encoder.image_shape, decoder.value_range) == ((3, 8, 8), (-1, 1))
    for ours, read in ((network.encoder.moments(images), encoder.moments(images)), (network(images), decoder(encoder(images)))):
        torch.testing.assert_close(read, ours, rtol=0, atol=0)


def test_as_many_blocks_as_fit():
    network = Autoencoder(ConvolutionOptions(latent_dim=3, base_channels=2), (1, 32, 32))
    assert (network.encoder.options.blocks, network.encoder.filter_side) == (2, 4)
    build(ae.Settings, {"dataset": "d", "objective": "ae", "latent_dim": 3}, "a").check_shape((3, 48, 48))


def test_equal_weights_give_equal_bytes(tmp_path):
    digests = set()
    for name in "abcdefgh":
        small().decoder.save(tmp_path / name)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_the_metadata_of_files_stays_as_it_was(tmp_path):
    network = small(variational=True, value_range=(-1.0, 1.0), channels=3)
    network.encoder.save(tmp_path / "encoder.safetensors")
    network.decoder.save(tmp_path / "decoder.safetensors")
    common = '"base_channels": 4, "batch_norm_gain": "paper", "blocks": 1, "channels": 3, "channels_last": true, "class": '
    for name, rest in (
        ("encoder", '"Encoder", "filter_side": 2, "latent_dim": 3, "variational": true'),
        ("decoder", '"Decoder", "filter_side": 2, "input_normalisation": false, "latent_dim": 3, "output": "tanh"'),
    ):
        with safe_open(tmp_path / f"{name}.safetensors", framework="pt") as file:
            assert file.metadata() == {"settings": "{" + common + rest + "}"}


@pytest.mark.parametrize("shape", [(1, 8, 12), (1, 9, 9), (1, 2, 2)])
def test_images_that_do_not_fit_the_network_are_refused(shape):
    with pytest.raises(SettingsError, match="don't fit 1 blocks"):
        Encoder(ConvolutionOptions(blocks=1, latent_dim=2), shape)


def test_a_batch_of_one_value_a_channel_is_refused_in_words():
    objective = ae.build(build(ae.Settings, row(batch_size=4), "a"), (1, 4, 4), (0.0, 1.0))
    with pytest.raises(SettingsError, match=r"^batch_size: a batch of one image for each process .* larger batch_size"):
        objective("model", {"images": torch.rand(1, 1, 4, 4)}, Step(0, 0.0, generator()))
    objective("model", {"images": torch.rand(2, 1, 4, 4)}, Step(0, 0.0, generator()))
    objective.eval()
    objective.encode(torch.rand(1, 1, 4, 4))
    build(ae.Settings, row(batch_size=1), "a").check_shape((1, 8, 8))


def test_bad_files_are_refused_by_name(tmp_path):
    path = tmp_path / "decoder.safetensors"
    with pytest.raises(DataError, match=r"decoder.safetensors is missing"):
        Decoder.load(path)
    small().decoder.save(path)
    with pytest.raises(DataError, match="holds Decoder; give the other file"):
        Encoder.load(path)
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"decoder.safetensors is no decoder"):
            Decoder.load(path)
    save_file({"layers.0.weight": torch.zeros(1)}, path)
    with pytest.raises(DataError, match="is no decoder"):
        Decoder.load(path)
    small().decoder.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({"layers.0.weight": torch.zeros(1)}, path, metadata)
    with pytest.raises(DataError, match="is no decoder") as error:
        Decoder.load(path)
    assert "\n" not in str(error.value)


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, (1, 28, 28)),
        ({"filter_side": 7}, (1, 28, 28)),
        ({"blocks": 4, "filter_side": 4}, (3, 128, 128)),
        ({"blocks": 0}, (1, 2, 2)),
    ],
)
def test_shapes_that_fit(changes, shape):
    build(ae.Settings, row(**changes), "autoencoders.a").check_shape(shape)


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        (
            {"blocks": 2, "filter_side": 7},
            (1, 28, 28),
            r"^filter_side: .*filter_side \* 2\^\(blocks \+ 1\) = 56 pixels.* 28x28",
        ),
        ({"blocks": 3}, (1, 28, 28), r"^blocks: with 3 blocks .* multiple of 2\^4 = 16 pixels.*'digits' are 28x28"),
        ({}, (3, 28, 32), "^dataset: images must be square, and these are 28x32"),
        ({}, (63,), "^dataset: 'digits' holds vectors.*'identity'"),
        ({}, (0,), "^dataset: 'digits' holds vectors"),
        ({"batch_size": 1}, (1, 4, 4), "^batch_size: .* single value .* larger batch_size"),
    ],
)
def test_shapes_that_do_not_fit(changes, shape, message):
    settings = build(ae.Settings, row(**changes), "autoencoders.a")
    with pytest.raises(SettingsError, match=message):
        settings.check_shape(shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_dim": 0}, r"autoencoders.a.latent_dim: must be at least 1"),
        ({"blocks": -1}, r"autoencoders.a.blocks"),
        ({"filter_side": 0}, r"autoencoders.a.filter_side"),
        ({"base_channels": 0}, r"autoencoders.a.base_channels"),
        ({"perceptual_weight": -0.1}, r"autoencoders.a.perceptual_weight:"),
        ({"perceptual_weight": 0.1}, r"autoencoders.a.perceptual_weights: missing"),
        ({"epochs": 0}, r"autoencoders.a.epochs"),
        ({"latnt_dim": 3}, r"autoencoders.a.latnt_dim: unknown key; did you mean 'latent_dim'"),
        ({"incremental": {"mode": "linear"}}, r"autoencoders.a.incremental.warm_up_epochs: missing"),
        (
            {"incremental": {"mode": "linear", "warm_up_epochs": 0}},
            r"autoencoders.a.incremental.warm_up_epochs: must be positive",
        ),
        (
            {"incremental": {"mode": "nested_dropout", "warm_up_epochs": 3}},
            r"autoencoders.a.incremental.warm_up_epochs: .*leave it out",
        ),
        ({"incremental": {"mode": "backwards"}}, r"autoencoders.a.incremental.mode"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(SettingsError, match=message):
        build(ae.Settings, row(**changes), "autoencoders.a")


# Objectives ----------------------------------------------------------------------------------------------------------


def test_identity():
    settings = build(identity.Settings, {"dataset": "grid", "objective": "identity"}, "autoencoders.grid")
    settings.check_shape((63,))
    settings.check_shape((0,))
    with pytest.raises(SettingsError, match=r"^dataset: 'grid' holds images"):
        settings.check_shape((1, 28, 28))
    objective = identity.build(settings, (2,), (-5.0, 5.0))
    vectors = torch.randn(3, 2, dtype=torch.float64, generator=generator())
    assert objective.encode(vectors).dtype == torch.float32
    assert torch.equal(objective.decode(objective.encode(vectors)), vectors.float())
    assert not objective.trained
    assert list(objective.parameters()) == []
    assert objective.latent_dim == 2
    assert identity.build(settings, (0,), (0.0, 0.0)).latent_dim is None


def test_the_loss_is_the_mean_squared_error_in_the_range_of_the_data(digits):
    for low, high in ((0.0, 1.0), (-1.0, 1.0)):
        objective = ae.build(build(ae.Settings, row(), "a"), (1, 8, 8), (low, high)).eval()
        images = low + (high - low) * digits
        reconstructions = objective.decode(objective.encode(images))
        assert low < reconstructions.min()
        assert reconstructions.max() < high
        losses = objective("model", {"images": images}, Step(0, 0.0, generator()))
        torch.testing.assert_close(losses["loss"], (reconstructions - images).square().mean())
        torch.testing.assert_close(losses["mse"], losses["loss"])


def test_other_ranges_are_refused():
    with pytest.raises(SettingsError, match=r"dataset: its pixels lie in 0..255"):
        ae.build(build(ae.Settings, row(), "a"), (1, 8, 8), (0.0, 255.0))


def test_the_seed_sets_the_weights():
    def weights(seed):
        return ae.build(build(ae.Settings, row(seed=seed), "a"), (1, 8, 8), (0.0, 1.0)).state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["encoder.head.weight"], other["encoder.head.weight"])


def test_closed_dimensions_are_zero_and_get_no_gradient(digits):
    settings = build(ae.Settings, row(incremental={"mode": "linear", "warm_up_epochs": 4}), "a")
    assert settings.incremental == IncrementalSettings(warm_up_epochs=4.0)
    objective = ae.build(settings, (1, 8, 8), (0.0, 1.0))
    step = Step(10, 1.5, generator())
    assert objective.open_dimensions(step) == 2
    objective("model", {"images": digits}, step)["loss"].backward()
    encoder, decoder = objective.encoder.head, objective.decoder.layers[0]
    assert encoder.weight.grad[:2].abs().sum() > 0
    assert decoder.weight.grad[:2].abs().sum() > 0
    for gradient in (encoder.weight.grad, encoder.bias.grad, decoder.weight.grad):
        assert not gradient[2:].any()
    # Validation sees the whole vector.
    objective.eval()
    whole = objective("model", {"images": digits}, step)["mse"]
    torch.testing.assert_close(whole, (objective.decode(objective.encode(digits)) - digits).square().mean())


def test_bfloat16_losses_are_float32(digits):
    objective = ae.build(build(ae.Settings, row(), "a"), (1, 8, 8), (0.0, 1.0))
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective("model", {"images": digits}, Step(0, 0.0, generator()))
    full = objective("model", {"images": digits}, Step(0, 0.0, generator()))
    assert losses["loss"].dtype == torch.float32
    torch.testing.assert_close(losses["loss"], full["loss"], rtol=0.02, atol=0)


@pytest.mark.parametrize(
    "incremental",
    [None, {"warm_up_epochs": 2}, {"mode": "stepwise", "warm_up_epochs": 2, "steps": 2}, {"mode": "nested_dropout"}],
    ids=["ae", "iae", "stepwise", "nested_dropout"],
)
def test_training_lowers_the_loss(digits, incremental):
    changes = {} if incremental is None else {"incremental": incremental}
    objective = ae.build(build(ae.Settings, row(**changes), "a"), (1, 8, 8), (0.0, 1.0))
    optimizer = torch.optim.Adam(objective.phase_parameters("model"), lr=5e-3, betas=(0.5, 0.999))

    def error():
        objective.eval()
        with torch.no_grad():
            return (objective.decode(objective.encode(digits)) - digits).square().mean().item()

    first = error()
    for index in range(60):
        objective.train()
        optimizer.zero_grad()
        objective("model", {"images": digits}, Step(index, index / 20, generator(index)))["loss"].backward()
        optimizer.step()
    assert error() < 0.5 * first
