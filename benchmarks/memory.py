"""Peak memory of every stage on some synthetic data, and on ten times as much: it must not grow with the number of examples.

Run with `python -m benchmarks.memory [--examples 5000] [--factor 10]`. Grey images of 32x32 pixels in a zip go through all
stages, vectors with 32 dimensions through those that treat them differently. Each stage is a separate process. The figure is
the largest resident set of it and its child processes. Shards and the shuffle are smaller than the smaller data set and
nothing is cached: both sizes fill every buffer. Exits with 1 if a stage grows by more than a fifth of the added data's size in
memory. The Parzen score may also hold its points, 256 MiB at a time.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from pipeline.system.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "memory.json"
PIXELS, DIMENSIONS = 32, 32
VECTORS = 16  # vectors for each image, since they are smaller
NOISE_MIB = 12  # what an allocator may keep or not, from run to run

PARAMS = """\
datasets:
  images: {{source: images, root: raw/images.zip, image_px: {pixels}, channels: 1, shard_examples: {shard}}}
  vectors: {{source: vectors, root: raw/vectors.npy, shard_examples: {vectors_shard}}}
controls:
  images: {{dataset: images, kmeans_centroids: 50, kmeans_batch_size: 500, kmeans_epochs: 1, pca_components: 4}}
autoencoders:
  images: {{dataset: images, objective: ae, latent_dim: 4, blocks: 2, base_channels: 4, epochs: 1, batch_size: 100,
    shuffle_examples: {window}}}
  vectors: {{dataset: vectors, objective: identity}}
densities:
  images-lde: {{codes: images, dataset: images, family: lde, components: 2, epochs: 1, batch_size: 500,
    shuffle_examples: {window}}}
  vectors-lde: {{codes: vectors, dataset: vectors, family: lde, components: 2, epochs: 1, batch_size: 2000,
    shuffle_examples: {window}}}
  vectors-gmm: {{codes: vectors, dataset: vectors, family: gmm, components: [2], max_examples: 2000}}
sampling: {{count: {count}, shard_examples: {shard}}}
evaluations:
  images: {{parzen: {{bandwidth_count: 5}}}}
  vectors: {{}}
detections: {{}}
"""
STAGES = (
    ("prepare", "images"), ("features", "images"), ("control", "images"), ("train", "images"), ("extract", "images"),
    ("fit", "images-lde"), ("sample", "images-lde"), ("evaluate", "images-lde"), ("prepare", "vectors"),
    ("features", "vectors"), ("train", "vectors"), ("extract", "vectors"), ("fit", "vectors-lde"), ("fit", "vectors-gmm"),
    ("sample", "vectors-lde"), ("evaluate", "vectors-lde"),
)  # fmt: skip


def write_raw(folder: Path, examples: int, base: int) -> None:
    """Writes params.yaml, with buffers for `base` examples, a zip of images and a file of vectors."""
    from PIL import Image

    (folder / "raw").mkdir(parents=True)
    sizes = {
        "shard": base // 20,
        "vectors_shard": VECTORS * base // 20,
        "window": base // 4,
        "count": examples // 10,
    }  # a tenth of the images is for the test
    (folder / "params.yaml").write_text(PARAMS.format(pixels=PIXELS, **sizes))
    generator = np.random.default_rng(0)
    grid = np.mgrid[0:PIXELS, 0:PIXELS]
    with zipfile.ZipFile(folder / "raw/images.zip", "w") as file:
        for i in range(examples):
            centre = generator.uniform(4, PIXELS - 4, (2, 1, 1))
            pixels = 255 * np.exp(-((grid - centre) ** 2).sum(0) / 30)
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG", compress_level=1)
            file.writestr(f"{i:08d}.png", buffer.getvalue())
    rows = np.lib.format.open_memmap(folder / "raw/vectors.npy", "w+", np.float32, (VECTORS * examples, DIMENSIONS))
    for start in range(0, len(rows), 10_000):
        part = rows[start : start + 10_000]
        part[:] = generator.standard_normal(part.shape, np.float32)
    rows.flush()


def peak_mib(folder: Path, stage: str, row: str) -> float:
    """Runs a stage and returns the largest resident set of its processes, in MiB."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRACKING": "off", "CACHE_MIB": "0"}
    with open(folder / "words", "w+") as words:
        process = subprocess.Popen(
            [sys.executable, "-m", "stages", stage, row], cwd=folder, env=environment, stdout=words, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            words.seek(0)
            raise SystemExit(f"{stage} {row} failed: {words.read()[-2000:]}")
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def added_mib(row: str, examples: int) -> float:
    """Size of so many examples as float32, in MiB."""
    return 4 * (VECTORS * DIMENSIONS if row.startswith("vectors") else PIXELS**2) * examples / 2**20


def main() -> None:
    """Measures, prints a table, writes results/memory.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=5000, help="images of the smaller data set")
    parser.add_argument("--factor", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="where the data go, for the time of the run")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows, grown = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folders = [Path(scratch) / name for name in ("once", "more")]
        for folder, examples in zip(folders, (options.examples, options.factor * options.examples), strict=True):
            write_raw(folder, examples, options.examples)
        print("| stage | row | peak, MiB | with more data | growth | data added |\n|---|---|---|---|---|---|")
        for stage, row in STAGES:
            once, more = (peak_mib(folder, stage, row) for folder in folders)
            added = added_mib(row, (options.factor - 1) * options.examples)
            print(f"| {stage} | {row} | {once:.0f} | {more:.0f} | {more - once:.1f} | {added:.0f} |", flush=True)
            values = {"peak_mib": once, "peak_mib_more": more, "growth_mib": more - once, "added_mib": added}
            rows.append({"stage": stage, "row": row} | {key: round(value, 1) for key, value in values.items()})
            points = added / 10 if (stage, row) == ("evaluate", "images-lde") else 0  # held twice while they are joined
            if more - once > added / 5 + 2 * points + NOISE_MIB:
                grown.append(f"{stage} {row}")
    write_json(options.output, {"examples": options.examples, "factor": options.factor, "rows": rows})
    if grown:
        raise SystemExit(f"memory grows with the number of examples: {', '.join(grown)}")


if __name__ == "__main__":
    main()
