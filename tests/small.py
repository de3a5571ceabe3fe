"""A pipeline small enough to run as a whole in a test: 8x8 images of blobs, and vectors."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result

PARAMS = """\
datasets:
  blobs: {source: images, root: raw/blobs, image_px: 8, channels: 1, shard_examples: 40, valid_share: 0.2, test_share: 0.2}
  points: {source: vectors, root: raw/points.npy, shard_examples: 500, valid_share: 0.2, test_share: 0.2}
controls:
  blobs: {dataset: blobs, kmeans_centroids: 20, kmeans_epochs: 1}
autoencoders:
  blobs-ae: {dataset: blobs, objective: ae, latent_dim: 3, blocks: 1, base_channels: 4, epochs: 4, batch_size: 16,
    learning_rate: 0.01, schedule: cosine, ema_decay: 0.9, checkpoint_minutes: 0.0001}
  points: {dataset: points, objective: identity}
densities:
  blobs-lde: {codes: blobs-ae, dataset: blobs, family: lde, components: 2, epochs: 4, batch_size: 16, learning_rate: 0.01,
    checkpoint_minutes: 0.0001}
  points-lde: {codes: points, dataset: points, family: lde, components: 2, epochs: 1, batch_size: 128, learning_rate: 0.01}
sampling: {count: 60, shard_examples: 25}
evaluations:
  blobs: {parzen: {bandwidth_start: 0.05, bandwidth_stop: 0.5, bandwidth_count: 5}}
  points: {}
detections: {}
"""
STAGES = (
    ("prepare", "blobs"), ("features", "blobs"), ("control", "blobs"), ("train", "blobs-ae"), ("extract", "blobs-ae"),
    ("fit", "blobs-lde"), ("sample", "blobs-lde"), ("evaluate", "blobs-lde"), ("prepare", "points"), ("features", "points"),
    ("train", "points"), ("extract", "points"), ("fit", "points-lde"), ("sample", "points-lde"), ("evaluate", "points-lde"),
)  # fmt: skip
# Settings of every family, of a size for tests.
DENSITIES = {
    "lde": {"components": 3},
    "gmmn": {"hidden": [16, 16]},
    "gaussian": {},
    "gmm": {"components": [1, 3]},
    "boxes": {"components": 8, "steps": 50},
    "kde": {"bandwidths": [0.3], "sensitivity": [0.5]},
    "rnade": {"components": 3, "hidden": 16},
    "made_mog": {"components": 3, "hidden": [16, 16]},
    "maf": {"transforms": 2, "hidden": [16]},
    "realnvp": {"transforms": 2, "hidden": [16]},
    "nsf": {"transforms": 2, "hidden": [16]},
    "naf": {"transforms": 1, "hidden": [16], "signal": 4},
    "prior": {},
    "auto": {},
}


def write_raw(folder: Path, images: int = 200, points: int = 1000) -> None:
    """Writes params.yaml and the raw files."""
    from PIL import Image

    (folder / "raw/blobs").mkdir(parents=True)
    (folder / "params.yaml").write_text(PARAMS)
    generator = np.random.default_rng(0)
    grid = np.mgrid[0:8, 0:8]
    for i in range(images):
        centre = generator.uniform(1, 7, (2, 1, 1))
        pixels = 255 * np.exp(-((grid - centre) ** 2).sum(0) / 4)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"raw/blobs/{i:06d}.png")
    np.save(folder / "raw/points.npy", generator.normal(size=(points, 2)).astype(np.float32))


def run(*arguments: str) -> Result:
    """Runs a command of `python -m stages` in this process, in the working folder."""
    from stages.__main__ import cli

    return CliRunner().invoke(cli, list(arguments))


def files(folder: Path) -> dict[str, str]:
    """A digest of every file and link of a folder, by path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
