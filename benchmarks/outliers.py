"""One-class problems: a class of MNIST or Fashion-MNIST told from the nine others, by this project and by common methods.

Run with `python -m benchmarks.outliers mnist fashion [--classes 0 1 ..] [--epochs 8] [--filters 16]`, with the raw files under
`data/raw/mnist` and `data/raw/fashion-mnist`. Results are added to `benchmarks/results/outliers.json`, class by class, and the
table is written again to `outliers.md`; a class that has a result with the same settings isn't run again.

For each class an autoencoder and then a density of its codes, `auto`, are fitted to the training images of the class alone,
less 1,000 validation images. The test images of the class are inliers, those of the nine other classes outliers. On the same
images, the same codes and in the same run: the reconstruction error of as many principal components as the code has numbers,
an isolation forest, and a mixture of ten Gaussians. Nothing is chosen on test images or outliers.

An AUROC is the probability that an outlier is stranger than an inlier. Its standard error (DeLong) is over test images; that of
a mean over classes is of the same classes with other test images. Everything has one thread, and all clocks count CPU seconds.

References:
    | Deep One-Class Classification (Ruff et al., 2018), for the protocol
    | https://proceedings.mlr.press/v80/ruff18a.html
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ruamel.yaml import YAML
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.mixture import GaussianMixture

import benchmarks.tables  # noqa: F401  sets the clock to CPU time
from benchmarks.recorded import Recorded
from pipeline.detection import calibrated, load_scorer, strange
from pipeline.evaluation.detection import detect
from pipeline.sources.common.archives import file_stamp
from pipeline.sources.common.idx import read_idx
from pipeline.storage.shards import ShardReader

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "outliers.json"
SOURCES = {"mnist": ("mnist", "data/raw/mnist"), "fashion": ("fashion_mnist", "data/raw/fashion-mnist")}
VALID = 1_000  # validation images of a class, about
STAGES = (("prepare", "one"), ("train", "one"), ("extract", "one"), ("fit", "one-auto"))
METHODS = {
    "joined": "log-likelihood and error joined",
    "joined_relative": "the same, relative error",
    "log_likelihood": "log-likelihood of the code",
    "reconstruction_error": "reconstruction error",
    "pca": "PCA, reconstruction error",
    "forest": "isolation forest on the codes",
    "gmm": "ten Gaussians on the codes",
}


def tables(source: str, root: str, label: int, options: argparse.Namespace) -> dict[str, Any]:
    """params.yaml of one class."""
    dataset = {"source": source, "root": root, "train_count": 60_000 - 10 * VALID, "valid_count": 10 * VALID}
    network = {"dataset": "one", "objective": "ae", "latent_dim": options.dim, "blocks": 1, "base_channels": options.filters}
    network |= {"epochs": options.epochs, "batch_size": 64, "learning_rate": 0.002, "schedule": "cosine"}
    density = {"codes": "one", "dataset": "one", "family": "auto", "max_minutes": options.seconds / 60}
    return {
        "datasets": {"one": dataset | {"classes": [label]}},
        "autoencoders": {"one": network | {"batch_norm_gain": "ones"}},
        "densities": {"one-auto": density},
        "controls": {},
        "sampling": {},
        "evaluations": {"one": {}},
        "detections": {},
    }


@contextlib.contextmanager
def workspace(name: str, label: int, options: argparse.Namespace) -> Iterator[None]:
    """The folder in which a class's stages have run, as the working folder."""
    from stages.__main__ import cli

    source, root = SOURCES[name]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with open("params.yaml", "w") as file:
            YAML(typ="safe", pure=True).dump(tables(source, str(PROJECT / root), label, options), file)
        for stage in STAGES:
            cli.main(list(stage), standalone_mode=False)
        yield


def test_images(name: str) -> tuple[np.ndarray, np.ndarray]:
    """All test images (N, 1, 28, 28), and their labels (N,)."""
    folder = PROJECT / SOURCES[name][1]
    images, labels = (next(folder.glob(f"t10k-{kind}-idx*")) for kind in ("images", "labels"))
    return read_idx(images, 3, file_stamp(images))[:, None], read_idx(labels, 1, file_stamp(labels)).astype(int)


@torch.no_grad()
def measured(images: np.ndarray, outlier: np.ndarray, dim: int) -> dict[str, Any]:
    """AUROC of each method with its standard error, in the folder of a class."""
    reader = ShardReader("data/shards/one")
    files = Path("data/densities/one-auto/density.safetensors"), Path("data/autoencoders/one")
    found: dict[str, np.ndarray] = {}
    for relative, name in ((True, "joined_relative"), (False, "joined")):
        scorer = load_scorer(*files, reader, relative_error=relative)
        calibration, _ = calibrated(scorer, reader, quiet=True)
        parts = [strange(scorer(part)) for part in np.array_split(images, 40)]
        found |= {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        found[name] = calibration.join(found)
    train = np.concatenate([block["examples"] for block in reader.blocks("train")])
    (codes, new_codes) = (
        np.concatenate([scorer.codes(part).numpy() for part in np.array_split(pixels, 40)]) for pixels in (train, images)
    )
    flat, new = (pixels.reshape(len(pixels), -1) / 255 for pixels in (train, images))
    pca = PCA(dim, random_state=0).fit(flat)
    found["pca"] = np.square(pca.inverse_transform(pca.transform(new)) - new).sum(1)
    found["forest"] = -IsolationForest(random_state=0).fit(codes).score_samples(new_codes)
    found["gmm"] = -GaussianMixture(10, reg_covar=1e-4, random_state=0).fit(codes).score_samples(new_codes)
    detections = {key: detect(found[key][~outlier], found[key][outlier], replicates=2) for key in METHODS}
    return {key: [round(value.auroc, 5), round(value.auroc_se, 5)] for key, value in detections.items()}


def markdown(runs: list[dict[str, Any]]) -> str:
    """A table of means for each set, and of each class."""
    lines = [
        "# One-class problems",
        "",
        "AUROC of a class of test images told from the nine others (higher is better); errors are of test images. Written by",
        "`python -m benchmarks.outliers`, which says what is compared and how.",
    ]
    for name in dict.fromkeys(run["set"] for run in runs):
        chosen = sorted((run for run in runs if run["set"] == name), key=lambda run: int(run["class"]))
        seconds = np.mean([run["cpu_seconds"] for run in chosen])
        lines += [
            "",
            f"## {name}: {len(chosen)} of 10 classes, {chosen[0]['epochs']} epochs, {chosen[0]['filters']} filters, "
            f"{chosen[0]['dim']} numbers per code, {seconds:.0f} CPU seconds per class",
            "",
            f"| class | {' | '.join(METHODS.values())} |",
            f"|---|{'--:|' * len(METHODS)}",
        ]
        rows = {str(run["class"]): run for run in chosen}
        means = {key: _mean([run[key] for run in chosen]) for key in METHODS}
        for title, values in {"**mean**": means, **rows}.items():
            best = max(values[key][0] for key in METHODS)
            cells = [f"{_bold(values[key][0], best)} ± {values[key][1]:.4f}" for key in METHODS]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _bold(value: float, best: float) -> str:
    return f"**{value:.4f}**" if value == best else f"{value:.4f}"


def _mean(pairs: list[list[float]]) -> tuple[float, float]:
    """Mean of values with errors, and its error; the errors are taken to be independent."""
    values, errors = np.array(pairs).T
    return float(values.mean()), math.sqrt(float(np.square(errors).sum())) / len(errors)


def main(arguments: list[str] | None = None) -> None:
    """Measures class by class, writes results/outliers.json and outliers.md, prints each result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", choices=SOURCES, nargs="+")
    parser.add_argument("--classes", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--dim", type=int, default=16, help="numbers in a code")
    parser.add_argument("--epochs", type=int, default=8, help="of each autoencoder")
    parser.add_argument("--filters", type=int, default=16, help="of its first layer")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each density, at most")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    os.environ |= {"TRACKING": "off", "DEVICE": "cpu"}
    torch.set_num_threads(1)
    recorded = Recorded(options.output, markdown, ("set", "class"))
    for label in options.classes:
        for name in options.names:
            key = {"set": name, "class": label} | {k: getattr(options, k) for k in ("dim", "epochs", "filters", "seconds")}
            if recorded.holds(key):
                continue
            started = time.process_time()
            images, labels = test_images(name)
            with workspace(name, label, options):
                found = measured(images, labels != label, options.dim)
            recorded.add(key | found | {"cpu_seconds": round(time.process_time() - started, 1)})


if __name__ == "__main__":
    main()
