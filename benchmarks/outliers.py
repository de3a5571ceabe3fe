"""One-class problems: a class of MNIST or Fashion-MNIST told from the nine others, by this project and by common methods.

Run with `python -m benchmarks.outliers mnist [--classes 0 1 ..] [--epochs 20]`, with the raw files under `data/raw`. For each
class an autoencoder and an LDE are trained on its training images alone; the test images of the class are inliers, all others
outliers. In the same run, on the same images and the same codes: the reconstruction error of as many principal components as
the code has numbers, an isolation forest and a mixture of ten Gaussians. Results are added to
`benchmarks/results/outliers.json`, class by class.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture

from pipeline.detection import load_scorer
from pipeline.storage.shards import ShardReader
from pipeline.system.files import read_json, write_json

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "outliers.json"
SOURCES = {"mnist": ("mnist", "data/raw/mnist"), "fashion": ("fashion_mnist", "data/raw/fashion-mnist")}
OURS = ("joined", "log_likelihood", "reconstruction_error")
METHODS = {
    "joined": "both scores joined",
    "log_likelihood": "log-likelihood of the code",
    "reconstruction_error": "reconstruction error",
    "pca": "PCA, reconstruction error",
    "forest": "isolation forest on the codes",
    "gmm": "mixture of ten Gaussians on the codes",
}


def tables(source: str, root: str, label: int, dim: int, epochs: int) -> dict[str, Any]:
    """params.yaml of one class against the others."""
    whole = {"source": source, "root": root, "train_count": 50_000, "valid_count": 10_000}
    network = {"dataset": "class", "objective": "ae", "latent_dim": dim, "blocks": 1, "epochs": epochs, "batch_size": 64}
    network |= {"learning_rate": 0.002, "schedule": "cosine", "batch_norm_gain": "ones"}
    density = {"codes": "class", "dataset": "class", "family": "lde", "components": 10, "epochs": 40, "learning_rate": 0.002}
    detection = {"density": "class-lde", "family": "lde", "codes": "class", "dataset": "class", "outliers": "whole"}
    return {
        "datasets": {"class": whole | {"classes": [label]}, "whole": whole},
        "autoencoders": {"class": network},
        "densities": {"class-lde": density | {"schedule": "cosine"}},
        "controls": {},
        "sampling": {},
        "evaluations": {"class": {}},
        "detections": {"class": detection | {"outlier_classes": [other for other in range(10) if other != label]}},
    }


def measured(folder: Path, label: int, dim: int) -> dict[str, float]:
    """AUROC of each method, after the stages have run in a folder."""
    metrics = read_json(folder / "reports/metrics/detect/class.json")
    scores = {name: metrics["auroc" if name == "joined" else f"{name}_auroc"] for name in OURS}
    shards = {name: ShardReader(folder / f"data/shards/{name}") for name in ("class", "whole")}
    images, codes = {}, {}
    density, autoencoder = folder / "data/densities/class-lde/density.safetensors", folder / "data/autoencoders/class"
    scorer = load_scorer(density, autoencoder, shards["class"])
    blocks = list(shards["whole"].blocks("test"))
    labels = np.concatenate([block["labels"] for block in blocks])
    for name, pixels in (
        ("train", np.concatenate([block["examples"] for block in shards["class"].blocks("train")])),
        ("test", np.concatenate([block["examples"] for block in blocks])),
    ):
        images[name] = pixels.reshape(len(pixels), -1) / 255
        codes[name] = np.concatenate([scorer.codes(part).numpy() for part in np.array_split(pixels, 20)])
    outlier = labels != label
    pca = PCA(dim, random_state=0).fit(images["train"])
    rebuilt = pca.inverse_transform(pca.transform(images["test"]))
    scores["pca"] = roc_auc_score(outlier, np.square(rebuilt - images["test"]).sum(1))
    forest = IsolationForest(random_state=0).fit(codes["train"])
    scores["forest"] = roc_auc_score(outlier, -forest.score_samples(codes["test"]))
    mixture = GaussianMixture(10, reg_covar=1e-4, random_state=0).fit(codes["train"])
    scores["gmm"] = roc_auc_score(outlier, -mixture.score_samples(codes["test"]))
    return {name: round(float(value), 5) for name, value in scores.items()}


@contextlib.contextmanager
def workspace(name: str, label: int, dim: int, epochs: int) -> Iterator[Path]:
    """A folder in which all stages of a class have run."""
    source, root = SOURCES[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with (folder / "params.yaml").open("w") as file:
            YAML(typ="safe", pure=True).dump(tables(source, str((PROJECT / root).resolve()), label, dim, epochs), file)
        environment = os.environ | {"TRACKING": "off", "PYTHONPATH": str(PROJECT)}
        stages = (("prepare", "class"), ("prepare", "whole"), ("train", "class"), ("extract", "class"), ("fit", "class-lde"))
        for stage, row in (*stages, ("detect", "class")):
            command = [sys.executable, "-m", "stages", stage, row]
            subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        yield folder


def main() -> None:
    """Measures class by class, writes results/outliers.json, prints the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("--classes", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--dim", type=int, default=16, help="numbers in a code")
    parser.add_argument("--epochs", type=int, default=20, help="of each autoencoder")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    results: dict[str, Any] = read_json(options.output) if options.output.exists() else {}
    for label in options.classes:
        started = time.perf_counter()
        with workspace(options.name, label, options.dim, options.epochs) as folder:
            row = measured(folder, label, options.dim)
        row |= {"dim": options.dim, "epochs": options.epochs, "seconds": round(time.perf_counter() - started, 1)}
        results.setdefault(options.name, {})[str(label)] = row
        write_json(options.output, results)
        print(options.name, label, row, flush=True)
    rows = list(results[options.name].values())
    for method, title in METHODS.items():
        print(f"{np.mean([row[method] for row in rows]):.4f}  {title}, mean of {len(rows)} classes", flush=True)


if __name__ == "__main__":
    main()
