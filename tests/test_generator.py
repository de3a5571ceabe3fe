"""A generator in Python: what it draws, encodes and scores is what the stages' own parts give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.autoencoders.common.network import Decoder, Encoder
from pipeline.autoencoders.common.options import ConvolutionOptions
from pipeline.densities import LatentDensityEstimator
from pipeline.errors import DataError, PipelineError
from pipeline.generator import Generator
from pipeline.sampling import draw
from pipeline.storage.shards import from_unit

OPTIONS = ConvolutionOptions(blocks=1, latent_dim=3, base_channels=4)


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(0)
    networks = Decoder(OPTIONS, (1, 8, 8), output="tanh"), Encoder(OPTIONS, (1, 8, 8))
    return Generator(LatentDensityEstimator(3, components=2).eval(), *(network.eval() for network in networks))


def test_it_draws_as_the_stage_does(generator: Generator) -> None:
    assert np.array_equal(generator.sample(5, seed=3), draw(generator.density, generator.decoder, 5, 3)[0])
    assert generator.sample(5).shape == (5, 1, 8, 8)
    assert not np.array_equal(generator.sample(5), generator.sample(5))


def test_codes_and_scores_are_those_of_its_parts(generator: Generator) -> None:
    images = generator.sample(300, seed=0)  # more than are in memory at once
    assert generator.encoder is not None
    with torch.no_grad():
        codes = generator.encoder(from_unit(torch.from_numpy(images), (-1.0, 1.0)))
        expected = generator.density.log_prob(codes).double().numpy()
    assert np.allclose(generator.encode(images), codes.numpy(), atol=1e-6)
    assert np.allclose(generator.log_prob(images), expected, atol=1e-4)
    scores = generator.score(images)
    assert np.allclose(scores.log_prob, expected, atol=1e-4)
    errors = np.square(generator.decode(codes.numpy()) - images).sum((1, 2, 3))
    assert np.allclose(scores.reconstruction_error, errors, rtol=1e-5)
    parts = generator.density, generator.decoder, generator.encoder
    relative = Generator(*parts, relative_error=True).score(images)
    assert np.allclose(relative.reconstruction_error, errors / (1 + np.square(images).sum((1, 2, 3))), rtol=1e-5)
    assert np.array_equal(relative.log_prob, scores.log_prob)
    grey = np.rint(images[:, 0] * 255).astype(np.uint8)  # (n, H, W)
    assert np.allclose(generator.encode(grey), generator.encode((grey / 255)[:, None]), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"), [("encode", np.zeros((2, 1, 9, 8))), ("decode", np.zeros((2, 4))), ("encode", np.zeros(3))]
)
def test_other_shapes_are_refused(generator: Generator, name: str, value: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"have shape .* expected"):
        getattr(generator, name)(value)


def test_it_is_loaded_from_a_folder(generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert generator.decoder is not None
    generator.density.save(tmp_path / "density.safetensors")
    generator.decoder.save(tmp_path / "decoder.safetensors")
    loaded = Generator.load(tmp_path)
    assert np.array_equal(loaded.sample(4, seed=1), generator.sample(4, seed=1))
    with pytest.raises(DataError, match="no encoder"):
        loaded.encode(loaded.sample(2))
    with pytest.raises(DataError, match="no encoder"):
        loaded.score(loaded.sample(2))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PipelineError, match="neither an exported folder nor a row"):
        Generator.load("nothing")
    with pytest.raises(DataError, match="of 4 numbers per code, the autoencoder of 3"):
        Generator(LatentDensityEstimator(4), generator.decoder)
