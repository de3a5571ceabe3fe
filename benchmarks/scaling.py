"""Cost of the pipeline on larger machines: unit costs measured here, the rest computed.

Run with `python -m benchmarks.scaling [--seconds 10]`. Measures what one core does with an image or a code in every stage of
presets/celeba128.yaml (CPU seconds of one thread, which other work on the machine disturbs little), the bytes that an image
and a code take on disk, and the floating-point operations of each step. Writes results/scaling.json and, between their markers,
the tables of scaling.md. `--from FILE` rewrites the tables from such results.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.autoencoders import ae
from pipeline.autoencoders.common.network import image_side
from pipeline.autoencoders.common.perceptual import CONVOLUTIONS
from pipeline.densities import LatentDensityEstimator
from pipeline.evaluation import parzen
from pipeline.preparation import prepare_shards
from pipeline.settings import NamedFile
from pipeline.sources.images import Settings as ImagesSettings
from pipeline.storage.batches import Batches
from pipeline.storage.codes import write_part
from pipeline.storage.shards import ShardReader, scale_pixels
from pipeline.system.files import read_json, write_json, write_text
from pipeline.training.trainable import Step

HERE = Path(__file__).parent
START, END = "<!-- measured and computed by benchmarks/scaling.py -->", "<!-- end -->"
DATASETS = {"CelebA": 202_599, "100 million": 100_000_000}
GPUS = (1, 8, 256)
PHOTO_PX = (178, 218)  # of an aligned CelebA file

# None of this was measured. GPU figures are those of NVIDIA's data sheet of the A100 80GB SXM.
ASSUMED: dict[str, tuple[float, str]] = {
    "gpu_flops": (312e12, "FLOP/s of a GPU at its peak, bfloat16"),
    "utilisation": (0.3, "share of the peak that convolutions reach"),
    "lde_utilisation": (0.05, "share of the peak that the LDE's narrow products reach"),
    "cores": (16, "CPU cores per GPU, as fast as the one measured"),
    "node_gpus": (8, "GPUs in a node"),
    "link": (250e9, "bytes/s of a GPU to its neighbours within a node"),
    "network": (25e9, "bytes/s of a node to others and to the store"),
    "store": (10e9, "bytes/s that the store of shards gives in all"),
    "samples": (10_000, "samples drawn and scored, as by default"),
    "large_epochs": (3, "epochs over 100 million images, for the autoencoder and for the LDE; CelebA takes the preset's"),
}


def preset() -> dict[str, Any]:
    """Network, density and data set of the preset."""
    tables = YAML(typ="safe").load((HERE.parent / "presets/celeba128.yaml").read_text())["tables"]
    return {
        "dataset": tables["datasets"]["celeba128"],
        "autoencoder": tables["autoencoders"]["celeba128-ae"],
        "density": tables["densities"]["celeba128-ae-lde"],
    }


def per_cpu_second(call: Callable[[], object], count: int, seconds: float) -> float:
    """Examples per second of one core: the fastest of the calls that fit in so many CPU seconds, at least two."""
    best, spent = math.inf, 0.0
    for number in itertools.count():
        started = time.process_time()
        call()
        took = time.process_time() - started
        if number:  # the first call warms up
            best = min(best, took)
        spent += took
        if number and spent > seconds:
            return count / best
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


def measure_training(row: dict[str, Any], weights: str, seconds: float) -> list[dict[str, Any]]:
    """Images per second and operations per image of a training step, by size of image, with and without perceptual loss."""
    found = []
    sizes = [("28x28", 1, 1, 7, 8), ("64x64", 3, 3, 4, 100), ("128x128", 3, row["blocks"], 4, row["latent_dim"])]
    for (name, channels, blocks, filter_side, dim), perceptual in itertools.product(sizes, (0.0, row["perceptual_weight"])):
        side, batch = image_side(blocks, filter_side), 4
        settings = ae.Settings(
            dataset="x", objective="ae", latent_dim=dim, blocks=blocks, perceptual_weight=perceptual, perceptual_weights=weights
        )
        objective = ae.build(settings, (channels, side, side), (0.0, 1.0)).train()
        optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4, fused=True)
        images = torch.rand(batch, channels, side, side)
        entry: dict[str, Any] = {"images": name, "channels": channels, "perceptual": perceptual > 0}
        entry["train_flops"] = flops(lambda o=objective, x=images: step(o, x, None), batch)
        entry["train_per_second"] = per_cpu_second(lambda o=objective, x=images, a=optimizer: step(o, x, a), batch, seconds)
        objective.eval()
        with torch.no_grad():
            codes = objective.encode(images)
            encode, decode = (lambda o=objective, x=images: o.encode(x)), (lambda o=objective, z=codes: o.decode(z))
            for stage, call in (("encode", encode), ("decode", decode)):
                entry[f"{stage}_flops"] = flops(call, batch)
                entry[f"{stage}_per_second"] = per_cpu_second(call, batch, seconds / 2)
        entry["parameters"] = sum(p.numel() for p in objective.parameters())
        found.append(entry)
    return found


def measure_data(row: dict[str, Any], folder: Path, count: int, dim: int, seconds: float) -> dict[str, float]:
    """Preparing, reading and shuffling of images, and what they and their codes take on disk."""
    write_photos(folder / "photos.zip", count)
    settings = ImagesSettings(
        source="images", root=str(folder / "photos.zip"), image_px=row["image_px"], channels=3, shard_examples=256
    )
    prepared = per_cpu_second(lambda: prepare_shards(settings, folder / "shards", processes=1), count, seconds)
    reader = ShardReader(folder / "shards")
    shards = reader.index.parts("train")
    examples = reader.load("train", 0)["examples"]

    def shuffle() -> None:
        batches = Batches(
            lambda _: {"examples": examples}, [len(examples)] * 4, 128, seed=0, window=2 * len(examples), workers=0
        )
        for batch in batches.epoch(0):
            scale_pixels(batch["examples"], (0.0, 1.0))

    codes = np.random.default_rng(0).standard_normal((4096, dim), np.float32)
    part = write_part(folder, "train", 0, codes, None)
    pixels = math.prod(reader.index.shape)
    return {
        "raw_bytes": (folder / "photos.zip").stat().st_size / count,
        "shard_bytes": sum(s.bytes for s in shards) / sum(s.count for s in shards),
        "code_bytes": part.bytes / len(codes),
        "sample_bytes": 4.0 * (pixels + dim),
        "prepare_per_second": prepared,
        "read_per_second": per_cpu_second(lambda: reader.load("train", 0), len(examples), seconds / 2),
        "shuffle_per_second": per_cpu_second(shuffle, 4 * len(examples), seconds / 2),
    }


def measure_density(row: dict[str, Any], dim: int, seconds: float) -> dict[str, float]:
    """A step, a score and a draw of the LDE."""
    density = LatentDensityEstimator(dim=dim, components=row["components"])
    optimizer = torch.optim.AdamW(density.parameters(), lr=1e-4, fused=True)
    codes = torch.randn(row["batch_size"], dim)

    def fit() -> None:
        density.zero_grad(set_to_none=True)
        density.loss(codes).backward()
        optimizer.step()

    found = {"fit_per_second": per_cpu_second(fit, len(codes), seconds)}
    density.eval()
    with torch.no_grad():
        found["score_per_second"] = per_cpu_second(lambda: density.log_prob(codes), len(codes), seconds / 2)
        draw = lambda: density.sample(1000, torch.Generator().manual_seed(0))  # noqa: E731
        found["draw_per_second"] = per_cpu_second(draw, 1000, seconds / 2)
    return found | {"parameters": density.parameter_count}


def measure(seconds: float, photos: int) -> dict[str, Any]:
    """All unit costs."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = preset()
    dim = rows["autoencoder"]["latent_dim"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        training = measure_training(rows["autoencoder"], vgg_weights(folder / "vgg.safetensors"), seconds)
        data = measure_data(rows["dataset"], folder, photos, dim, seconds)
    points = np.random.default_rng(0).random((512, 3 * rows["dataset"]["image_px"] ** 2), np.float32)
    score = lambda: parzen.log_likelihoods(lambda: [points], lambda: [points], [0.2])  # noqa: E731
    pairs = per_cpu_second(score, len(points) ** 2, seconds / 2)
    return {
        "torch": torch.__version__,
        "training": training,
        "data": data,
        "density": measure_density(rows["density"], dim, seconds),
        "parzen_pairs_per_second": pairs,
    }


def table(header: str, rows: list[list[Any]]) -> list[str]:
    """A Markdown table; the first column is text, the others numbers or text."""
    lines = [f"| {header} |", "|---" + "|---:" * header.count("|") + "|"]
    return [*lines, *(f"| {' | '.join(v if isinstance(v, str) else number(v) for v in row)} |" for row in rows), ""]


def number(value: float) -> str:
    """A number with three significant digits."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "-"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{round(value, 2 - math.floor(math.log10(abs(value)))):,.{digits}f}"


def size(value: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{number(value)} {unit}"
        value /= 1000
    return f"{number(value)} TB"


def hours_of_training(units: dict[str, Any], images: int, gpus: int) -> dict[str, float]:
    """Hours that each resource needs for one epoch of the autoencoder, all of them working at the same time."""
    a = {name: value for name, (value, _) in ASSUMED.items()}
    rows, network = preset(), units["training"][-1]
    nodes = math.ceil(gpus / a["node_gpus"])
    batch = rows["autoencoder"]["batch_size"]  # of each GPU
    steps = images / (batch * gpus)
    # A ring: each GPU passes on twice the gradients, but for its own share.
    gradients = 2 * 4 * network["parameters"] * (gpus - 1) / gpus
    link = a["link"] if nodes == 1 else a["network"] / a["node_gpus"]
    readers = gpus * (a["cores"] - 1)
    return {
        "GPU": images * network["train_flops"] / (gpus * a["gpu_flops"] * a["utilisation"]) / 3600,
        "reading (other cores)": images / (readers * units["data"]["read_per_second"]) / 3600,
        "shuffling (one core per GPU)": images / (gpus * units["data"]["shuffle_per_second"]) / 3600,
        "gradients (network)": steps * gradients / link / 3600,
        "shards (store, network)": images * units["data"]["shard_bytes"] / min(a["store"], nodes * a["network"]) / 3600,
    }


def gpu_hours(units: dict[str, Any], name: str) -> list[list[Any]]:
    """Rows: stage, GPU hours, CPU core hours, bytes read, bytes written."""
    a = {key: value for key, (value, _) in ASSUMED.items()}
    rows, network, data, density = preset(), units["training"][-1], units["data"], units["density"]
    images, large = DATASETS[name], name != "CelebA"
    speed, slow = a["gpu_flops"] * a["utilisation"] * 3600, a["gpu_flops"] * a["lde_utilisation"] * 3600
    epochs, fits = (a["large_epochs"] if large else rows[key]["epochs"] for key in ("autoencoder", "density"))
    shards, codes = images * data["shard_bytes"], images * data["code_bytes"]
    samples = a["samples"] * data["sample_bytes"]
    scored = network["encode_flops"] + network["decode_flops"]
    pairs = 2 * a["samples"] * 0.1 * images * 2 * 3 * rows["dataset"]["image_px"] ** 2  # a tenth validates, a tenth tests
    reads = 2 * 0.1 * images * data["shard_bytes"]
    passes = math.ceil(4 * reads / parzen.POINT_BYTES)  # over the samples: points are held as float32, so many bytes at a time
    handled = 1 / data["read_per_second"] + 1 / data["shuffle_per_second"]
    # Each weight is used at each position of a code; PyTorch doesn't count products that add to what is there.
    used = 2 * density["parameters"] * rows["autoencoder"]["latent_dim"]
    draws = a["samples"] * (used / slow + network["decode_flops"] / speed)
    return [
        ["prepare", 0.0, images / data["prepare_per_second"] / 3600, size(images * data["raw_bytes"]), size(shards)],
        [f"train, {epochs:g} epochs", epochs * images * network["train_flops"] / speed, epochs * images * handled / 3600,
         size(epochs * shards), size(4 * network["parameters"])],
        ["train, scores", images * scored / speed, images / data["read_per_second"] / 3600, size(shards), "0 B"],
        ["extract", images * network["encode_flops"] / speed, images / data["read_per_second"] / 3600,
         size(shards), size(codes)],
        [f"fit, {fits:g} epochs", fits * images * 3 * used / slow, 0.0,
         size(fits * codes), size(4 * density["parameters"])],
        ["sample", draws, 0.0, "0 B", size(samples)],
        ["evaluate, Parzen", pairs / speed, 0.0, size(reads + samples * passes), "0 B"],
    ]  # fmt: skip


def report(units: dict[str, Any]) -> str:
    """The tables."""
    data, density = units["data"], units["density"]
    lines = [f"PyTorch {units['torch']}, one thread. Operations count a multiply-add as two.", "", "**Measured**", ""]
    lines += table(
        "images | perceptual loss | train, images/s | GFLOP per image | encode, images/s | decode, images/s | parameters",
        [
            [f"{t['images']}, {t['channels']} channel{'s' * (t['channels'] > 1)}", "yes" if t["perceptual"] else "no",
             t["train_per_second"], t["train_flops"] / 1e9, t["encode_per_second"], t["decode_per_second"],
             f"{t['parameters']:,}"]
            for t in units["training"]
        ],
    )  # fmt: skip
    lines += table(
        "one core, at 128x128 | per second",
        [
            ["prepare: JPEG to shard, images", data["prepare_per_second"]],
            ["read a shard and check its digest, images", data["read_per_second"]],
            ["shuffle and scale, images", data["shuffle_per_second"]],
            ["fit: LDE, codes", density["fit_per_second"]],
            ["score: LDE, codes", density["score_per_second"]],
            ["sample: LDE, codes drawn", density["draw_per_second"]],
            ["Parzen, pairs of a sample and an image", units["parzen_pairs_per_second"]],
        ],
    )
    lines += table(
        "on disk | bytes",
        [
            ["raw JPEG (synthetic)", data["raw_bytes"]],
            ["image in a shard", data["shard_bytes"]],
            ["code", data["code_bytes"]],
            ["sample, image and code", data["sample_bytes"]],
        ],
    )
    lines += ["**Assumed**", "", *table("what | value", [[text, f"{value:g}"] for value, text in ASSUMED.values()])]
    for name, images in DATASETS.items():
        lines += [f"**{name}: {images:,} images at 128x128, with perceptual loss**", ""]
        lines += table("stage | GPU hours | core hours | read | written", gpu_hours(units, name))
        rows = []
        for gpus in GPUS:
            hours = hours_of_training(units, images, gpus)
            slowest = max(hours, key=lambda key: hours[key])
            rows.append([str(gpus), *hours.values(), slowest])
        lines += ["Hours of one epoch of `train`, if only this limited it:", ""]
        lines += table(f"GPUs | {' | '.join(hours)} | bottleneck", rows)
    return "\n".join(lines)


def main() -> None:
    """Measures, writes results/scaling.json and the tables of scaling.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="CPU seconds of each measurement, about")
    parser.add_argument("--photos", type=int, default=2000, help="synthetic photos that are prepared")
    parser.add_argument("--from", dest="results", type=Path, help="results of an earlier run, instead of measuring")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "scaling.json")
    parser.add_argument("--page", type=Path, default=HERE / "scaling.md")
    options = parser.parse_args()
    if options.results is not None:
        units = read_json(options.results)
    else:
        units = measure(options.seconds, options.photos)
        write_json(options.output, units)
    before, _, rest = options.page.read_text().partition(START)
    _, _, after = rest.partition(END)
    write_text(options.page, f"{before}{START}\n\n{report(units)}\n{END}{after}")


if __name__ == "__main__":
    main()
