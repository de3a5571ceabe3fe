"""What one GPU gives: training, fitting, sampling and scoring, against a bare loop or the code that a GPU user would write.

Run with `python -m benchmarks.gpu` on a machine with a GPU; it writes `results/gpu.json`. `--device cpu` runs the same code on
the CPU and writes nothing: a test does so at toy size.

- `train`: images per second of the pipeline over shards, at 28, 64 and 128 px, with and without perceptual loss, in float32 and
  bfloat16, against the objective alone on batches that already are on the device. Goal: at least 0.95 of it.
- `fit`: codes per second of the LDE at D = 8, 63 and 200 against the literal network of nn.Conv1d under `torch.compile`, and
  against zuko's MAF. Goal: at least twice the compiled literal network.
- `sample`: codes drawn per second. `parzen`: pairs of a sample and an image per second.

Contenders take turns, round after round, and the fastest round of each counts. The share of the peak is the rate of operations,
a multiply-add as two, divided by that of a product of two large matrices on the same device.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import lde
from benchmarks.units import flops, vgg_weights
from pipeline.autoencoders import ae
from pipeline.autoencoders.common.network import image_side
from pipeline.densities import LatentDensityEstimator
from pipeline.densities.maf import MaskedAutoregressiveFlow
from pipeline.evaluation import parzen
from pipeline.storage.batches import Batches
from pipeline.storage.parts import write_index
from pipeline.storage.shards import ShardIndex, ShardReader, ShardWriter, scale_pixels
from pipeline.system.files import write_json
from pipeline.system.ranks import Ranks
from pipeline.training.loop import train as train_model
from pipeline.training.trainable import Step

RESULTS = Path(__file__).parent / "results" / "gpu.json"
# Pixels: channels, blocks, filter side, length of the code.
IMAGES = {28: (1, 1, 7, 8), 64: (3, 3, 4, 100), 128: (3, 4, 4, 200)}
PERCEPTUAL_WEIGHT = 0.1


def write_shards(folder: Path, pixels: np.ndarray) -> ShardReader:
    """A data set of these images."""
    shards = {}
    for split, examples in (("train", pixels), ("valid", pixels[:1]), ("test", pixels[:1])):
        with ShardWriter(folder, split, shard_examples=1024) as writer:
            writer.write(examples=examples)
        shards[split] = tuple(writer.shards)
    write_index(folder, ShardIndex(kind="images", shape=pixels.shape[1:], dtype="uint8", value_range=(0.0, 1.0), **shards))
    return ShardReader(folder)


def train_contenders(
    px: int, perceptual: bool, precision: str, batch: int, steps: int, device: torch.device, folder: Path
) -> tuple[dict[str, Callable[[], None]], float]:
    """What is timed, each for `steps` steps, and the operations of a step."""
    channels, blocks, filter_side, dim = IMAGES[px]
    assert px == image_side(blocks, filter_side)
    settings = ae.Settings(
        dataset="x",
        objective="ae",
        latent_dim=dim,
        blocks=blocks,
        batch_size=batch,
        epochs=1,
        precision="bfloat16" if precision == "bfloat16" else "float32",
        channels_last=device.type == "cuda",
        perceptual_weight=PERCEPTUAL_WEIGHT if perceptual else 0.0,
        perceptual_weights=vgg_weights(folder / "vgg.safetensors"),
    )
    pixels = np.random.default_rng(0).integers(256, size=(steps * batch, channels, px, px), dtype=np.uint8)
    reader = write_shards(folder, pixels)
    memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
    ready = torch.from_numpy(scale_pixels(pixels[:batch], (0.0, 1.0))).to(device).contiguous(memory_format=memory_format)
    bare_objective, objective = (ae.build(settings, (channels, px, px), (0.0, 1.0)).to(device).train() for _ in range(2))
    optimizer = torch.optim.AdamW(bare_objective.parameters(), lr=1e-3, betas=(0.5, 0.999), weight_decay=0.0, fused=True)

    def step(update: bool = True) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = bare_objective("model", {"images": ready}, Step(0, 0.0, torch.Generator()))["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if update:
            optimizer.step()

    def bare() -> None:
        for _ in range(steps):
            step()

    def prepare(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        images = scale_pixels(torch.from_numpy(arrays["examples"]).to(device, non_blocking=True), (0.0, 1.0))
        return {"images": images.contiguous(memory_format=memory_format)}

    def pipeline() -> None:
        batches = Batches(lambda number: reader.load("train", number), reader.counts("train"), batch, seed=0)
        with contextlib.redirect_stderr(io.StringIO()):
            train_model(objective, batches, settings, Ranks(0, 1, device), prepare=prepare)

    return {"bare": bare, "pipeline": pipeline}, flops(lambda: step(update=False), 1)


def train(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Images per second."""
    rows = []
    for px, perceptual, precision in itertools.product(options.px, (False, True), options.precisions):
        with tempfile.TemporaryDirectory() as folder:
            calls, operations = train_contenders(px, perceptual, precision, options.batch, options.steps, device, Path(folder))
            seconds = lde.fastest(options.rounds, **calls)
        images = options.batch * options.steps
        rows.append(
            {
                "px": px,
                "perceptual": "yes" if perceptual else "no",
                "precision": precision,
                **{f"{name}, images/s": images / value for name, value in seconds.items()},
                "pipeline / bare": seconds["bare"] / seconds["pipeline"],
                "GFLOP/s": 1e-9 * operations * options.steps / seconds["pipeline"],
            }
        )
    return rows


def fit(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Codes per second of a training step, and of drawing."""
    rows = []
    for dim in options.dims:
        codes = torch.randn(options.codes, dim, device=device)
        density = LatentDensityEstimator(dim, components=30).to(device)
        literal = lde.Literal(dim, 30).to(device)
        compiled = torch.compile(literal.loss) if options.compile else literal.loss
        flow = MaskedAutoregressiveFlow(dim).to(device)

        def steps(
            module: torch.nn.Module, loss: Callable[[torch.Tensor], torch.Tensor], codes: torch.Tensor = codes
        ) -> Callable[[], None]:
            optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

            def run() -> None:
                for _ in range(options.steps):
                    optimizer.zero_grad(set_to_none=True)
                    loss(codes).backward()
                    optimizer.step()

            return run

        contenders = {
            "LDE": steps(density, density.loss),
            "compiled literal": steps(literal, compiled),
            "MAF": steps(flow, flow.loss),
        }
        seconds = lde.fastest(options.rounds, **contenders)
        draw = lambda density=density: density.sample(options.codes, torch.Generator().manual_seed(0))  # noqa: E731
        drawn = lde.fastest(1, draw=draw)["draw"]
        seen = options.codes * options.steps
        rows.append(
            {
                "D": dim,
                **{f"{name}, codes/s": seen / value for name, value in seconds.items()},
                "LDE / literal": seconds["compiled literal"] / seconds["LDE"],
                "GFLOP/s": 6e-9 * lde.multiply_adds(density, options.codes) * options.steps / seconds["LDE"],
                "drawn, codes/s": options.codes / drawn,
            }
        )
    return rows


def score(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Pairs of a sample and an image per second."""
    points = np.random.default_rng(0).random((options.points, 28 * 28), np.float32)
    call = lambda: parzen.log_likelihoods(lambda: [points], lambda: [points], [0.2], str(device))  # noqa: E731
    seconds = lde.fastest(options.rounds, parzen=call)["parzen"]
    return [{"images": "28x28", "parzen, pairs/s": len(points) ** 2 / seconds}]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All tables, with the name of the device."""
    device = torch.device(options.device)
    lde.device = options.device
    lde.clock = options.clock
    tables = {"train": train(options, device), "fit": fit(options, device), "parzen": score(options, device)}
    peak = lde.matmul_rate(1) if options.peak else float("nan")
    for row in (*tables["train"], *tables["fit"]):
        row["share of the peak"] = row["GFLOP/s"] / peak
    name = torch.cuda.get_device_name() if device.type == "cuda" else lde.processor()
    return {"device": name, "torch": torch.__version__, "matmul_gflops": peak, **tables}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    found.add_argument("--px", type=int, nargs="+", default=list(IMAGES), choices=list(IMAGES))
    found.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    found.add_argument("--dims", type=int, nargs="+", default=[8, 63, 200])
    found.add_argument("--batch", type=int, default=128)
    found.add_argument("--codes", type=int, default=1024)
    found.add_argument("--points", type=int, default=10_000)
    found.add_argument("--steps", type=int, default=50)
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    found.add_argument("--no-compile", dest="compile", action="store_false", help="The literal network as it is.")
    found.add_argument("--no-peak", dest="peak", action="store_false", help="Without the product of large matrices.")
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the tables and, on a GPU, writes them."""
    options = parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this PyTorch sees no GPU: run it where there is one, or with --device cpu")
    found = measure(options)
    print(f"{found['device']}, PyTorch {found['torch']}")
    for title in ("train", "fit", "parzen"):
        lde.table(title, found[title])
    if options.device == "cuda":
        write_json(RESULTS, found)
    return found


if __name__ == "__main__":
    main()
