"""Images per second in training the network of Figure 9: a bare PyTorch loop, the objective `ae`, and the pipeline over shards.

Run with `python -m benchmarks.autoencoder [--experiments mnist celeba64-shoes] [--precisions float32 bfloat16]`. The bare loop
is a plain `nn.Sequential` on float batches that lie in memory; `pipeline` reads uint8 shards from disk, checks their digests,
shuffles, scales, and keeps its curve. All take turns, round after round, in every precision and memory format. So a
machine that slows down slows all of them. The fastest round of each counts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.autoencoders import ae
from pipeline.autoencoders.common.network import image_side
from pipeline.storage.batches import Batches
from pipeline.storage.parts import write_index
from pipeline.storage.shards import ShardIndex, ShardReader, ShardWriter, scale_pixels
from pipeline.system.files import write_json
from pipeline.system.ranks import Ranks
from pipeline.training.loop import train
from pipeline.training.trainable import Step

# C, N, S, D, batch size: batches are smaller for larger images, to limit a step to about one second on two cores.
EXPERIMENTS = {
    "mnist": (1, 1, 7, 8, 128),
    "tfd": (1, 2, 6, 15, 128),
    "celeba64-shoes": (3, 3, 4, 100, 64),
    "celeba128": (3, 4, 4, 200, 16),
}
CONTENDERS = ("bare", "objective", "pipeline")


def bare_network(channels: int, blocks: int, side: int, latent_dim: int) -> nn.Sequential:
    """A plain implementation of Figure 9."""
    widths = [64 * 2**n for n in range(blocks + 1)]
    layers: list[nn.Module] = [nn.Conv2d(channels, 64, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
    for a, b in itertools.pairwise(widths):
        layers += [nn.Conv2d(a, b, 4, 2, 1), nn.BatchNorm2d(b), nn.LeakyReLU(0.2, inplace=True)]
    layers += [nn.Conv2d(widths[-1], latent_dim, side), nn.ConvTranspose2d(latent_dim, widths[-1], side)]
    for a, b in itertools.pairwise(widths[::-1]):
        layers += [nn.ConvTranspose2d(a, b, 4, 2, 1), nn.BatchNorm2d(b), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(64, channels, 4, 2, 1), nn.Sigmoid())


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the pipeline uses."""
    return torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.5, 0.999), weight_decay=0.0, fused=True)


def contenders(
    experiment: str, precision: str, channels_last: bool, steps: int, device: torch.device, folder: Path
) -> dict[str, Callable[[], None]]:
    """What is timed: each call takes `steps` steps."""
    channels, blocks, filter_side, latent_dim, batch = EXPERIMENTS[experiment]
    side = image_side(blocks, filter_side)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    pixels = np.random.default_rng(0).integers(256, size=(steps * batch, channels, side, side), dtype=np.uint8)
    shards = {}
    for split, examples in (("train", pixels), ("valid", pixels[:1]), ("test", pixels[:1])):
        with ShardWriter(folder, split, shard_examples=1024) as writer:
            writer.write(examples=examples)
        shards[split] = tuple(writer.shards)
    shape = (channels, side, side)
    index = ShardIndex(kind="images", shape=shape, dtype="uint8", value_range=(0.0, 1.0), **shards)
    write_index(folder, index)
    memory = [
        torch.from_numpy(scale_pixels(part, (0.0, 1.0))).to(device).contiguous(memory_format=memory_format)
        for part in np.split(pixels, steps)
    ]

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")

    network = bare_network(channels, blocks, filter_side, latent_dim).to(device).to(memory_format=memory_format)
    network_optimizer = optimizer(network)

    def bare() -> None:
        for images in memory:
            with autocast():
                reconstructions = network(images)
            loss = nn.functional.mse_loss(reconstructions.float(), images)
            network_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            network_optimizer.step()

    settings = ae.Settings(
        dataset="benchmark",
        objective="ae",
        latent_dim=latent_dim,
        blocks=blocks,
        channels_last=channels_last,
        precision="bfloat16" if precision == "bfloat16" else "float32",
        batch_size=batch,
        epochs=1,
    )
    objective = ae.build(settings, shape, (0.0, 1.0)).to(device)
    objective_optimizer = optimizer(objective)

    def objective_in_memory() -> None:
        for index, images in enumerate(memory):
            with autocast():
                losses = objective("model", {"images": images}, Step(index, 0.0, torch.Generator()))
            objective_optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            objective_optimizer.step()

    ranks = Ranks(0, 1, device)

    def prepare(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        images = torch.from_numpy(scale_pixels(arrays["examples"], (0.0, 1.0)))
        return {"images": images.contiguous(memory_format=memory_format).to(device)}

    def pipeline() -> None:
        reader = ShardReader(folder)
        batches = Batches(lambda number: reader.load("train", number), reader.counts("train"), batch, seed=0)
        with contextlib.redirect_stderr(io.StringIO()):
            train(objective, batches, settings, ranks, prepare=prepare)

    return {"bare": bare, "objective": objective_in_memory, "pipeline": pipeline}


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Time of one call, including work still queued on the GPU."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One row per experiment, precision and memory format."""
    device = torch.device(options.device)
    for experiment in options.experiments:
        batch = EXPERIMENTS[experiment][-1]
        with tempfile.TemporaryDirectory() as folder:
            runs: dict[tuple[str, bool, str], Callable[[], None]] = {}
            for precision, channels_last in itertools.product(options.precisions, (False, True)):
                shards = Path(folder) / f"{precision}-{channels_last}"
                shards.mkdir()
                made = contenders(experiment, precision, channels_last, options.steps, device, shards)
                runs |= {(precision, channels_last, name): run for name, run in made.items()}
            for run in runs.values():
                seconds(run, device)
            times: dict[tuple[str, bool, str], list[float]] = {key: [] for key in runs}
            for _ in range(options.rounds):
                for key, run in runs.items():
                    times[key].append(seconds(run, device))
        fastest = {key: min(values) for key, values in times.items()}
        for precision, channels_last in itertools.product(options.precisions, (False, True)):
            ours = {name: fastest[precision, channels_last, name] for name in CONTENDERS}
            row: dict[str, object] = {"experiment": experiment, "precision": precision, "channels_last": channels_last}
            row["batch_size"] = batch
            row |= {f"{name}_images_per_second": batch * options.steps / time for name, time in ours.items()}
            row |= {f"{name}_to_bare": ours["bare"] / ours[name] for name in CONTENDERS[1:]}
            yield row


def main() -> None:
    """Measures, prints a table, writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=16, help="steps in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "autoencoder.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = {
        "processor": torch.cuda.get_device_name() if options.device != "cpu" else _processor(),
        "threads": options.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print("| experiment | precision | channels last | bare, images/s | objective, images/s | pipeline, images/s | "
          "objective / bare | pipeline / bare | against float32, channels first |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    rows: list[dict[str, object]] = []
    first: dict[object, float] = {}
    for row in measure(options):
        speed = float(row["pipeline_images_per_second"])  # type: ignore[arg-type]
        row["against_first"] = speed / first.setdefault(row["experiment"], speed)
        rows.append(row)
        rates = " | ".join(f"{row[f'{name}_images_per_second']:,.0f}" for name in CONTENDERS)
        ratios = " | ".join(f"{row[f'{name}_to_bare']:.2f}" for name in CONTENDERS[1:])
        last = "yes" if row["channels_last"] else "no"
        print(
            f"| {row['experiment']} | {row['precision']} | {last} | {rates} | {ratios} | {row['against_first']:.2f} |",
            flush=True,
        )
    write_json(options.out, {"machine": machine, "steps": options.steps, "rounds": options.rounds, "rows": rows})


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
