"""A generator in Python: what it draws, encodes and scores is what the stages' own parts give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.autoencoders.common.network import Decoder, Encoder
from pipeline.autoencoders.common.options import ConvolutionOptions
from pipeline.densities import LatentDensityEstimator
from pipeline.densities.gaussian import Gaussian
from pipeline.errors import DataError, PipelineError
from pipeline.generator import Generator
from pipeline.sampling import draw
from pipeline.storage.columns import Column
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


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.full((2, 1, 8, 8), 200.0), r"pixels are 200 to 200, expected numbers in 0\.\.1, or bytes \(uint8\) in 0\.\.255"),
        (np.full((2, 1, 8, 8), 200), "pixels are 200 to 200"),  # integers, but no bytes
        (np.full((2, 1, 8, 8), -0.5), r"pixels are -0\.5 to -0\.5"),
        (np.full((2, 1, 8, 8), np.nan), "pixels are nan to nan"),
        (np.zeros((2, 8, 8, 1)), r"have shape \(2, 8, 8, 1\), expected \(n, 1, 8, 8\); channels come first"),
        (np.zeros((1, 8, 8))[0], r"have shape \(8, 8\), expected \(n, 1, 8, 8\)"),
    ],
)
def test_images_that_would_get_wrong_scores_are_refused(generator: Generator, images: np.ndarray, message: str) -> None:
    for method in (generator.encode, generator.log_prob, generator.score):
        with pytest.raises(DataError, match=message):
            method(images)


def test_what_a_given_network_draws_outside_the_range_can_be_scored(generator: Generator) -> None:
    class Bright(torch.nn.Module):
        image_shape, value_range, latent_dim = (1, 8, 8), (0.0, 1.0), 3

        def forward(self, codes: torch.Tensor) -> torch.Tensor:
            return 3 * codes.mean(dim=1)[:, None, None, None].expand(-1, 1, 8, 8)

    bright = Generator(generator.density, Bright(), generator.encoder)  # type: ignore[arg-type]
    images = bright.sample(20, seed=0)
    assert (images.min(), images.max()) == (0, 1)
    assert np.isfinite(bright.score(images).log_prob).all()


def test_a_single_image_is_told_from_grey_ones() -> None:
    colour = Decoder(OPTIONS, (3, 8, 8), output="tanh"), Encoder(OPTIONS, (3, 8, 8))
    with pytest.raises(DataError, match=r"have shape \(3, 8, 8\), expected \(n, 3, 8, 8\); one image is a stack of one"):
        Generator(LatentDensityEstimator(3), *colour).encode(np.zeros((3, 8, 8)))


def test_columns_of_a_frame_are_found_by_their_names() -> None:
    names = ["age", "weight", "height"]
    generator = Generator(Gaussian(3), columns=[Column(name=name) for name in names])
    rows = pd.DataFrame(np.random.default_rng(0).normal(size=(4, 3)), columns=names)
    shuffled = rows[["height", "age", "weight"]].assign(ward="a")  # another column, of text
    assert np.array_equal(generator.log_prob(shuffled), generator.log_prob(rows.to_numpy()))
    assert np.array_equal(generator.score(shuffled).log_prob, generator.log_prob(rows))
    gaps = rows.mask(rows > 0)
    assert np.array_equal(generator.complete(gaps[names[::-1]], 2), generator.complete(gaps.to_numpy(), 2))
    with pytest.raises(DataError, match="no column 'weight'; expected age, weight, height"):
        generator.log_prob(rows.drop(columns="weight"))
    numbered = pd.DataFrame(rows.to_numpy())  # as pd.read_csv(header=None) names them
    assert np.array_equal(generator.log_prob(numbered), generator.log_prob(rows))


def test_values_that_are_missing_and_counts_that_are_none_are_refused(generator: Generator) -> None:
    table = Generator(Gaussian(2))
    for method in (table.log_prob, table.score):
        with pytest.raises(DataError, match=r"code 1 \(counted from 0\) holds nan in column 0"):
            method([[0.0, 0.0], [np.nan, 0.0]])
    with pytest.raises(DataError, match=r"row 0 .* holds inf in column 1"):
        Generator(Gaussian(2), columns=[Column(name="a"), Column(name="b")]).log_prob([[0.0, np.inf]])
    for count in (-1, 2.0, True):
        with pytest.raises(DataError, match="n must be a whole number, at least 0"):
            generator.sample(count)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="draws must be a whole number, at least 1, not 0"):
        table.complete([[np.nan, 0.0]], 0)
    assert generator.sample(int(np.int64(2))).shape == generator.sample(np.int64(2)).shape  # type: ignore[arg-type]


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
    Path("params.yaml").write_text("{}")
    Path("empty").mkdir()
    with pytest.raises(PipelineError, match=r"empty is no exported folder: it holds no density\.safetensors"):
        Generator.load("empty")
    with pytest.raises(DataError, match="of 4 numbers per code, the autoencoder of 3"):
        Generator(LatentDensityEstimator(4), generator.decoder)
