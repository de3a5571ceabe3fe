"""Seconds and peak memory of the Parzen score of samples in shards, as the stage `evaluate` computes it.

Run with `python -m benchmarks.parzen [--samples 1000000] [--points 10000] [--threads 2] [--folder DIR]`.

Samples, validation and test images of 28x28 pixels are written as shards (3.1 GB for a million samples). Each number of samples
is then scored in a separate process: first a tenth, then all, which shows the growth of peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from pipeline.evaluation.blocks import unit_blocks
from pipeline.scoring import parzen_score
from pipeline.settings import ParzenSettings
from pipeline.storage.parts import Part, write_index
from pipeline.storage.shards import ShardIndex, ShardReader, ShardWriter
from pipeline.system.files import write_json
from pipeline.system.ranks import join

RESULTS = Path(__file__).parent / "results" / "parzen.json"
SHAPE = (1, 28, 28)
SHARD_EXAMPLES = 4000


def write_split(folder: Path, split: str, count: int, seed: int, dtype: str) -> tuple[Part, ...]:
    """Writes images around a few prototypes; their distances spread like those of digits."""
    prototypes = np.random.default_rng(0).random((10, *SHAPE), dtype=np.float32) ** 4
    generator = np.random.default_rng(seed)
    with ShardWriter(folder, split, SHARD_EXAMPLES) as writer:
        for start in range(0, count, SHARD_EXAMPLES):
            n = min(SHARD_EXAMPLES, count - start)
            noise = generator.standard_normal((n, *SHAPE), dtype=np.float32) * 0.15
            images = (prototypes[generator.integers(10, size=n)] + noise).clip(0, 1)
            writer.write(examples=np.rint(images * 255).astype(np.uint8) if dtype == "uint8" else images)
    return tuple(writer.shards)


def write_shards(folder: Path, samples: int, points: int) -> None:
    """Writes `images`, a data set, and `samples`."""
    for name in ("images", "samples"):
        (folder / name).mkdir(parents=True)
    splits = {
        split: write_split(folder / "images", split, count, seed, "uint8")
        for seed, (split, count) in enumerate({"train": 100, "valid": points, "test": points}.items(), 1)
    }
    write_index(folder / "images", ShardIndex(kind="images", shape=SHAPE, dtype="uint8", value_range=(0.0, 1.0), **splits))
    drawn = write_split(folder / "samples", "samples", samples, 4, "float32")
    write_index(
        folder / "samples", ShardIndex(kind="images", shape=SHAPE, dtype="float32", value_range=(0.0, 1.0), samples=drawn)
    )


def score(folder: Path, samples: int, threads: int) -> dict[str, float]:
    """Scores the first so many samples, in this process."""
    torch.set_num_threads(threads)
    drawn, reader = ShardReader(folder / "samples"), ShardReader(folder / "images")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, worked = time.perf_counter(), time.process_time()
    blocks, settings = unit_blocks(drawn, "samples", samples), ParzenSettings(validation_count=0)
    result = parzen_score(blocks, samples, reader, settings, join()).score
    return {
        "samples": result.samples,
        "valid_points": result.valid_points,
        "test_points": result.test_points,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - worked,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_mib_before": before / 1024,
        "test_log_likelihood": result.test_mean,
        "bandwidth": result.bandwidth,
    }


def main() -> None:
    """Measures, prints one line per set, writes results/parzen.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--points", type=int, default=10_000, help="validation images, and as many test images")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where the shards go, for the time of the run")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(score(Path(options.child[0]), int(options.child[1]), options.threads)))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        write_shards(Path(scratch) / "shards", options.samples, options.points)
        for samples in (max(options.samples // 10, 1), options.samples):
            command = [sys.executable, "-m", "benchmarks.parzen", "--threads", str(options.threads)]
            command += ["--child", f"{scratch}/shards", str(samples)]
            row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            rows.append(row)
            print(
                f"{row['samples']:,} samples, {row['valid_points']:,} + {row['test_points']:,} points: {row['seconds']:.0f} s, "
                f"{row['cpu_seconds']:.0f} s of CPU, peak {row['peak_mib']:.0f} MiB",
                flush=True,
            )
    machine = {"threads": options.threads, "torch": torch.__version__, "load_average": round(os.getloadavg()[0], 2)}
    growth = rows[1]["peak_mib"] - rows[0]["peak_mib"]
    write_json(options.output, {"machine": machine, "growth_mib": growth, "rows": rows})


if __name__ == "__main__":
    main()
