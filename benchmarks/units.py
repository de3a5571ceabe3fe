"""Unit costs: what one core does with an image or a code in every stage, and the bytes that they take.

CPU seconds of one thread, which other work on the machine disturbs little. Measured for the AE + LDE of presets/celeba128.yaml,
and for the small row that `benchmarks.simulate` plays and runs. Photos are synthetic, of the size of CelebA's files.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ruamel.yaml import YAML
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.autoencoders import ae
from pipeline.autoencoders.common.perceptual import CONVOLUTIONS
from pipeline.densities import LatentDensityEstimator
from pipeline.evaluation import parzen
from pipeline.evaluation.reconstruction import ReconstructionScore, opened
from pipeline.preparation import prepare_shards
from pipeline.settings import NamedFile
from pipeline.sources.images import Settings as ImagesSettings
from pipeline.storage.batches import Batches
from pipeline.storage.codes import write_part
from pipeline.storage.shards import ShardReader, scale_pixels
from pipeline.system.ranks import synchronise_batch_norm
from pipeline.training.trainable import Step

__all__ = ["SMALL", "Row", "flops", "measure", "preset", "vgg_weights", "write_photos"]

HERE = Path(__file__).parent
PHOTO_PX = (178, 218)  # of an aligned CelebA file
EXCHANGES = 30  # of which the fastest counts


@dataclass(frozen=True)
class Row:
    """What decides the costs of a row's stages.

    Attributes:
        image_px, channels: Size of an image.
        blocks, latent_dim: Of the autoencoder.
        perceptual: Whether it has a perceptual loss.
        components: Of the LDE.
        batch: Examples of a step.
        epochs, fit_epochs: Passes of training and of fitting.
        part_examples: Examples of a shard, and of a file of codes.
        splits: Shares of training, validation and test images.
        samples: Samples that are drawn and scored.
    """

    image_px: int
    channels: int
    blocks: int
    latent_dim: int
    perceptual: bool
    components: int
    batch: int
    epochs: int
    fit_epochs: int
    part_examples: int
    splits: tuple[float, float, float] = (0.8, 0.1, 0.1)
    samples: int = 10_000


SMALL = Row(
    image_px=28, channels=1, blocks=1, latent_dim=8, perceptual=False, components=10, batch=128, epochs=2, fit_epochs=12,
    part_examples=256, samples=2000,
)  # fmt: skip


def preset() -> Row:
    """The AE and the LDE of presets/celeba128.yaml."""
    tables = YAML(typ="safe").load((HERE.parent / "presets/celeba128.yaml").read_text())["tables"]
    dataset = tables["datasets"]["celeba128"]
    network, density = tables["autoencoders"]["celeba128-ae"], tables["densities"]["celeba128-ae-lde"]
    return Row(
        image_px=dataset["image_px"],
        channels=3,
        blocks=network["blocks"],
        latent_dim=network["latent_dim"],
        perceptual=network["perceptual_weight"] > 0,
        components=density["components"],
        batch=network["batch_size"],
        epochs=network["epochs"],
        fit_epochs=density["epochs"],
        part_examples=dataset["shard_examples"],
    )


def core_seconds(call: Callable[[], object], count: int, seconds: float) -> float:
    """Seconds of one core for each example: the fastest of the calls that fit in so many CPU seconds, at least two."""
    best, spent = math.inf, 0.0
    for number in itertools.count():
        started = time.process_time()
        call()
        took = time.process_time() - started
        if number:  # the first call warms up
            best = min(best, took)
        spent += took
        if number and spent > seconds:
            return best / count
    raise AssertionError


def flops(call: Callable[[], object], count: int) -> float:
    """Floating-point operations for each example, of matrix products and convolutions, a multiply-add counting as two."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / count


def write_photos(path: Path, count: int) -> None:
    """A zip of JPEGs as large as CelebA's, smooth with some noise, which makes them compress like photos."""
    from PIL import Image

    generator = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as file:
        for i in range(count):
            small = Image.fromarray(generator.integers(256, size=(12, 10, 3), dtype=np.uint8))
            photo = np.asarray(small.resize(PHOTO_PX, Image.Resampling.BICUBIC)).astype(np.float32)
            photo += generator.normal(scale=6, size=photo.shape)
            buffer = io.BytesIO()
            Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
            file.writestr(f"{i:06d}.jpg", buffer.getvalue())


def vgg_weights(path: Path) -> str:
    """Random weights of VGG19's shapes: they cost as much as the trained ones."""
    tensors = {f"features.{i}.weight": 0.02 * torch.randn(o, c, 3, 3) for i, (c, o) in CONVOLUTIONS.items()}
    save_file(tensors | {f"features.{i}.bias": torch.zeros(o) for i, (_, o) in CONVOLUTIONS.items()}, path)
    return NamedFile.of(str(path)).pinned()


def step(objective: nn.Module, images: torch.Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """One training step, without the update if there is no optimizer."""
    loss = objective("model", {"images": images}, Step(0, 0.0, torch.Generator()))["loss"]
    objective.zero_grad(set_to_none=True)
    loss.backward()
    if optimizer is not None:
        optimizer.step()


def measure_network(row: Row, processes: int, examples: int, seconds: float, folder: Path) -> dict[str, float]:
    """Training, encoding, decoding and scoring of one of several processes, with its share of a batch."""
    settings = ae.Settings(
        dataset="x",
        objective="ae",
        latent_dim=row.latent_dim,
        blocks=row.blocks,
        perceptual_weight=0.1 if row.perceptual else 0.0,
        perceptual_weights=vgg_weights(folder / "vgg.safetensors"),
    )
    shape = (row.channels, row.image_px, row.image_px)
    objective = ae.build(settings, shape, (0.0, 1.0)).train()
    images = torch.rand(examples, *shape)
    costs = {"train_flops": flops(lambda: step(objective, images, None), examples)}
    if processes > 1:
        synchronise_batch_norm(objective)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4, fused=True)
    costs["train"] = core_seconds(lambda: step(objective, images, optimizer), examples, seconds)
    objective.eval()
    with torch.no_grad():
        codes = objective.encode(images)
        decoded = objective.decode(codes)
        for name, call in (("encode", lambda: objective.encode(images)), ("decode", lambda: objective.decode(codes))):
            costs[f"{name}_flops"] = flops(call, examples)
            costs[name] = core_seconds(call, examples, seconds / 2)
    costs["compare"] = core_seconds(
        lambda: ReconstructionScore().update(images.numpy(), decoded.numpy()), examples, seconds / 2
    )
    parameters = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    return costs | {"parameters": parameters, "opened": len(opened(row.latent_dim))}


def measure_data(row: Row, count: int, seconds: float, folder: Path) -> dict[str, float]:
    """Preparing, reading and shuffling of images, and what they and their codes take on disk."""
    write_photos(folder / "photos.zip", count)
    settings = ImagesSettings(
        source="images",
        root=str(folder / "photos.zip"),
        image_px=row.image_px,
        channels=row.channels,
        shard_examples=row.part_examples,
    )
    costs = {
        "raw_bytes": (folder / "photos.zip").stat().st_size / count,
        "prepare": core_seconds(lambda: prepare_shards(settings, folder / "shards", processes=1), count, seconds),
    }
    reader = ShardReader(folder / "shards")
    shards = reader.index.parts("train")
    examples = reader.load("train", 0)["examples"]
    batch = min(row.batch, len(examples))

    def shuffle() -> None:
        batches = Batches(
            lambda _: {"examples": examples}, [len(examples)] * 4, batch, seed=0, window=2 * len(examples), workers=0
        )
        for arrays in batches.epoch(0):
            scale_pixels(arrays["examples"], (0.0, 1.0))

    codes = np.random.default_rng(0).standard_normal((4096, row.latent_dim), np.float32)
    return costs | {
        "shard_bytes": sum(s.bytes for s in shards) / sum(s.count for s in shards),
        "code_bytes": write_part(folder, "train", 0, codes, None).bytes / len(codes),
        "sample_bytes": 4.0 * (math.prod(reader.index.shape) + row.latent_dim),
        "read": core_seconds(lambda: reader.load("train", 0), len(examples), seconds / 2),
        "gather": core_seconds(shuffle, 4 * len(examples), seconds / 2),
    }


def measure_density(row: Row, examples: int, draws: int, seconds: float) -> dict[str, float]:
    """A step, a score and a draw of the LDE, of one process with its share of a batch."""
    density = LatentDensityEstimator(dim=row.latent_dim, components=row.components)
    optimizer = torch.optim.AdamW(density.parameters(), lr=1e-4, fused=True)
    codes = torch.randn(examples, row.latent_dim)

    def fit() -> None:
        density.zero_grad(set_to_none=True)
        density.loss(codes).backward()
        optimizer.step()

    costs = {"fit": core_seconds(fit, examples, seconds)}
    density.eval()
    with torch.no_grad():
        costs["log_prob"] = core_seconds(lambda: density.log_prob(codes), examples, seconds / 2)
        draw = lambda: density.sample(draws, torch.Generator().manual_seed(0))  # noqa: E731
        costs["draw"] = core_seconds(draw, draws, seconds / 2)
    return costs | {"density_parameters": density.parameter_count}


def measure_row(row: Row, processes: int, *, examples: int, photos: int, draws: int, seconds: float) -> dict[str, float]:
    """Core seconds of each stage for an image or a code, operations, and bytes; one of several processes measures its share."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch, group_of_one(Path(scratch)):
        points = np.random.default_rng(0).random((512, row.channels * row.image_px**2), np.float32)
        score = lambda: parzen.log_likelihoods(lambda: [points], lambda: [points], [0.2])  # noqa: E731
        return {
            **measure_data(row, photos, seconds, Path(scratch)),
            **measure_network(row, processes, examples, seconds, Path(scratch)),
            **measure_density(row, examples, draws, seconds),
            "pair": core_seconds(score, len(points) ** 2, seconds / 2),
        }


@contextmanager
def group_of_one(folder: Path) -> Iterator[None]:
    """A group that sums are taken over, as in training by several processes, but with nobody to wait for."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _exchange(rank: int, folder: str, length: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = []
    for numbers in (1, length):
        values, times = torch.zeros(numbers), []
        for _ in range(EXCHANGES):
            started = time.monotonic()
            dist.all_reduce(values)
            times.append(time.monotonic() - started)
        found.append(min(times))
    if rank == 0:
        np.save(f"{folder}/found.npy", found)
    dist.destroy_process_group()


def measure_exchange(length: int = 2**20) -> dict[str, float]:
    """Seconds that two processes of this machine need to sum one number, and bytes per second of many."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_exchange, (folder, length), nprocs=2, start_method="spawn")
        one, many = np.load(f"{folder}/found.npy").tolist()
    return {"latency": one, "bytes_per_second": 4 * length / max(many - one, 1e-9)}


def measure(row: Row, small: Row, seconds: float, photos: int) -> dict[str, Any]:
    """All unit costs: of the large row, and of the small one on one and on two processes."""
    torch.set_num_threads(1)
    data = np.random.default_rng(0).bytes(2**22)
    return {
        "torch": torch.__version__,
        "large": measure_row(row, 1, examples=min(row.batch, 8), photos=photos, draws=64, seconds=seconds),
        "small": {
            str(processes): measure_row(
                small, processes, examples=small.batch // processes, photos=photos, draws=small.samples // 4, seconds=seconds
            )
            for processes in (1, 2)
        },
        "exchange": measure_exchange(),
        "hash": core_seconds(lambda: hashlib.md5(data).digest(), len(data), seconds / 10),  # DVC's
    }
