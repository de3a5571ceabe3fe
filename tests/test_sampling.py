"""Samples and codes: no two equal shards, pixels in 0..1, images encoded in the range that they are trained in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.autoencoders.common.network import Autoencoder
from pipeline.autoencoders.common.options import ConvolutionOptions
from pipeline.densities.gaussian import Gaussian
from pipeline.errors import DataError
from pipeline.evaluation.interpolation import labelled_codes
from pipeline.extraction import extract_codes
from pipeline.sampling import range_remark, write_samples
from pipeline.settings import SamplingSettings
from pipeline.storage.codes import CodeIndex, CodeReader, write_part
from pipeline.storage.parts import SPLITS, write_index
from pipeline.storage.shards import ShardIndex, ShardReader, ShardWriter, from_unit, scale_pixels, to_unit
from pipeline.system.files import sha256_bytes
from pipeline.system.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
SAMPLING = SamplingSettings(count=60, shard_examples=25)


def autoencoder(value_range: tuple[float, float]) -> Autoencoder:
    options = ConvolutionOptions(latent_dim=3, blocks=1, base_channels=4)
    generator = torch.Generator().manual_seed(0)
    network = Autoencoder(options, (1, 8, 8), value_range, generator=generator).eval()
    torch.nn.init.constant_(network.decoder.layers[-1].bias, -1.0)  # dark images: neither range looks like the other
    return network


def shards(folder: Path, value_range: tuple[float, float] = (-1.0, 1.0)) -> Path:
    folder.mkdir()
    written = {}
    for i, split in enumerate(SPLITS):
        with ShardWriter(folder, split, 40) as writer:
            images = np.random.default_rng(i).integers(0, 256, (50, 1, 8, 8), dtype=np.uint8)
            writer.write(examples=images, labels=np.arange(50) % 3)
        written[split] = tuple(writer.shards)
    write_index(folder, ShardIndex(kind="images", shape=(1, 8, 8), dtype="uint8", value_range=value_range, **written))
    return folder


def code_folder(folder: Path, values: np.ndarray, labels: np.ndarray | None = None) -> CodeReader:
    folder.mkdir()
    parts = {split: (write_part(folder, split, 0, values, labels),) for split in SPLITS}
    dim = values.shape[1]
    write_index(folder, CodeIndex(dim=dim, mean=(0.0,) * dim, std=(1.0,) * dim, source_digest="", **parts))
    return CodeReader(folder)


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0)])
def test_samples_are_the_decoded_codes_in_the_unit_range(tmp_path: Path, value_range: tuple[float, float]) -> None:
    decoder = autoencoder(value_range).decoder
    index = write_samples(Gaussian(3).eval(), decoder, SAMPLING, tmp_path / "samples", ALONE)
    reader = ShardReader(tmp_path / "samples")
    drawn = reader.first("samples", 60)
    assert (index.value_range, index.kind, reader.counts("samples")) == ((0.0, 1.0), "images", [25, 25, 10])
    with torch.no_grad():
        decoded = decoder(torch.from_numpy(drawn["codes"])).numpy()
    low, high = value_range
    np.testing.assert_allclose(drawn["examples"], (decoded - low) / (high - low), atol=1e-6)
    assert 0 <= drawn["examples"].min() < 0.4


def test_no_two_shards_of_samples_are_alike(tmp_path: Path) -> None:
    write_samples(Gaussian(3).eval(), None, SAMPLING, tmp_path / "samples", ALONE)
    codes = ShardReader(tmp_path / "samples").first("samples", 60)["codes"]
    assert len(np.unique(codes, axis=0)) == 60
    assert abs(np.corrcoef(codes[:25].ravel(), codes[25:50].ravel())[0, 1]) < 0.5


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0)])
def test_codes_are_those_of_images_in_the_range_of_training(tmp_path: Path, value_range: tuple[float, float]) -> None:
    network = autoencoder(value_range)
    (tmp_path / "autoencoder").mkdir()
    for name in ("encoder", "decoder"):
        getattr(network, name).save(tmp_path / "autoencoder" / f"{name}.safetensors")
    folder = shards(tmp_path / "shards", value_range)
    extract_codes(folder, tmp_path / "autoencoder", tmp_path / "codes", ALONE)
    reader, codes = ShardReader(folder), CodeReader(tmp_path / "codes")
    for split in SPLITS:
        images = np.concatenate([reader.load(split, i)["examples"] for i in range(2)]).astype(np.float32) / 255
        low, high = value_range
        with torch.no_grad():
            expected = network.encoder(torch.from_numpy(low + (high - low) * images)).numpy()
        np.testing.assert_allclose(np.concatenate(list(codes.stream(split)())), expected, atol=1e-5)
    assert codes.index.value_range == value_range
    train = np.concatenate(list(codes.stream("train")()))
    np.testing.assert_allclose(codes.index.mean, train.mean(0), rtol=1e-4, atol=1e-6)


def test_the_first_examples_are_as_many_as_asked_for(tmp_path: Path) -> None:
    reader = ShardReader(shards(tmp_path / "shards"))
    whole = np.concatenate([block["examples"] for block in reader.blocks("test")])
    for count in (1, 40, 45, 50, 60):
        first = reader.first("test", count)
        assert np.array_equal(first["examples"], whole[:count])
        assert len(first["labels"]) == min(count, 50)


def test_samples_far_outside_the_data_are_remarked_on(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    codes = code_folder(tmp_path / "codes", values)
    density = Gaussian(3).eval()
    write_samples(density, None, SAMPLING, tmp_path / "samples", ALONE)
    assert range_remark(ShardReader(tmp_path / "samples"), codes) == ""
    density.standardise(torch.zeros(3), torch.tensor([1.0, 5.6e11, 1.0]))
    write_samples(density, None, SAMPLING, tmp_path / "far", ALONE)
    remark = range_remark(ShardReader(tmp_path / "far"), codes)
    assert remark.startswith("60 of 60 codes lie far outside")
    assert "e+12 in dimension 1 (counted from 0), where those lie in -3" in remark
    assert "\n" not in remark


def test_labels_that_tell_no_pairs_apart_are_left_out(tmp_path: Path) -> None:
    values = np.zeros((3, 2), np.float32)
    for number, (labels, kept) in enumerate([([0, 0, 0], False), ([0, 1, 2], False), ([0, 1, 1], True)]):
        codes = code_folder(tmp_path / str(number), values, np.array(labels))
        assert (labelled_codes(codes)[1] is not None) == kept


def test_unit_and_range_are_inverse() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    for bounds in ((0.0, 1.0), (-1.0, 1.0)):
        scaled = scale_pixels(pixels, bounds)
        torch.testing.assert_close(to_unit(scaled, bounds), scale_pixels(pixels, (0.0, 1.0)))
        torch.testing.assert_close(from_unit(to_unit(scaled, bounds), bounds), scaled)


# What is on disk stays readable: the bytes of earlier versions ---------------------------------------------------------


def test_the_bytes_of_shards_and_codes_stay(tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards")
    codes = code_folder(tmp_path / "codes", np.arange(12, dtype=np.float32).reshape(4, 3), np.arange(4))
    # An index holds the digests of all other files.
    digests = [sha256_bytes((path / "index.json").read_bytes())[:16] for path in (folder, codes.folder)]
    assert digests == ["8b5520795da76234", "ba9e0c3f739edd0a"]


@pytest.mark.parametrize("name", ["shards/test-000000.tar", "codes/test-000000.safetensors"])
def test_a_changed_byte_is_noticed(tmp_path: Path, name: str) -> None:
    shards(tmp_path / "shards")
    code_folder(tmp_path / "codes", np.zeros((4, 3), np.float32))
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    reader = ShardReader(path.parent) if path.suffix == ".tar" else CodeReader(path.parent)
    with pytest.raises(DataError, match=r"test-000000.* doesn't match the digest"):
        reader.load("test", 0)
