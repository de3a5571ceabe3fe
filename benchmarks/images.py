"""Samples of small sets of images: the preset `own-images` against stock autoencoders of pythae, at equal CPU seconds.

Run with `python -m benchmarks.images [--data fashion faces shoes] [--methods ours ..] [--seconds 40 200]`. Raw files are where
`data/raw/README.md` says; `--raw` names another folder. pythae isn't a dependency: its rows are left out where it can't be
imported. Results are added to `benchmarks/results/images.json`, and `--table` prints them.

All read the same shards: 10,000 images of Fashion-MNIST, or 3,000 photographs of 64x64 pixels. All have one thread
and the same CPU seconds, which cover what is learned: training of the autoencoder, with its own validations, and
fitting of the density. They don't cover reading, encoding, drawing and scoring, of any method. `autoencoder_seconds`
and `density_seconds` say what was used. 2,000 samples of each are compared with the test images in the same features,
those of the stage `features`: of a classifier of the labels, or of the orientation of photographs. The network hasn't
seen a sample. With `--split valid` they are compared with validation images, and nothing is written: settings of the
preset are chosen so. Standard errors are over samples and images, not over trainings: of the Frechet distance by 20
bootstrap draws.

`ours` is the row `mine-ae` of the preset with `mine-ae-auto`, and `before` a row as the presets of the paper have it: the
network of Figure 9 with 64 filters, the paper's gains, a code of 64 numbers and an LDE. `pythae AE` is its stock model: one
hidden layer of 512 numbers each way, a code of 16 numbers, batches of 64, Adam; at its trainer's rate of 1e-4, or at 1e-3.
`pythae conv` has its convolutional networks for images of 28x28 pixels instead. Peers have pythae's `GaussianMixtureSampler`,
10 Gaussians by scikit-learn, which takes little time, so that the autoencoder has nearly all of it; or with `+ MAF` its flow of
that name, trained for the density's share of the seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ruamel.yaml import YAML
from torch import Tensor, nn

from pipeline.evaluation.features import extract_features, read_features
from pipeline.evaluation.quality import fid, score
from pipeline.settings import read_params
from pipeline.storage.shards import ShardReader, scale_pixels
from pipeline.system.files import read_json, write_json

PROJECT = Path(__file__).resolve().parents[1]
RESULTS = PROJECT / "benchmarks" / "results" / "images.json"
SAMPLES = 2_000
DENSITY_SHARE = 0.15  # of the seconds, for a density that is trained
MIXTURE_SHARE = 0.03  # .. and for ten Gaussians, which takes about so long at 40 seconds and less at more
REDRAWN = 20  # bootstrap draws
# Network, learning rate and density of pythae's methods.
PEERS = {
    "pythae AE, rate 1e-4": ("mlp", 1e-4, "gmm"),
    "pythae AE, rate 1e-3": ("mlp", 1e-3, "gmm"),
    "pythae AE + MAF, rate 1e-3": ("mlp", 1e-3, "maf"),
    "pythae conv, rate 1e-3": ("conv", 1e-3, "gmm"),
}
METHODS = ("ours", "before", *PEERS)
PHOTOGRAPHS = {"image_px": 64, "train_limit": 3_000, "valid_limit": 300, "test_limit": 2_000, "split_seed": 0}
DATA: dict[str, dict[str, Any]] = {
    "fashion": {"source": "fashion_mnist", "root": "fashion-mnist", "train_count": 10_000, "valid_count": 1_000},
    "faces": {"source": "images", "root": "celeba/img_align_celeba.zip", "valid_share": 0.1, "test_share": 0.2} | PHOTOGRAPHS,
    "shoes": {"source": "images", "root": "shoes/ut-zap50k-images.zip", "fit": "pad", "test_share": 0.2} | PHOTOGRAPHS,
}


def _run(*arguments: str) -> None:
    """A stage, in this process."""
    from stages.__main__ import cli

    cli.main(list(arguments), standalone_mode=False)


def _write_params(data: str, raw: Path, **tables: Any) -> None:
    dataset = DATA[data] | {"root": str(raw / DATA[data]["root"])}
    params = {
        "datasets": {"mine": dataset},
        "controls": {},
        "autoencoders": {},
        "densities": {},
        "evaluations": {"mine": {"quality": {"network": "classifier", "samples": SAMPLES}}},
        "sampling": {"count": SAMPLES},
    }
    with open("params.yaml", "w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(params | tables, file)


def _pixels(split: str) -> np.ndarray:
    """Images of a split in 0..1 with shape (N, C, H, W)."""
    blocks = ShardReader("data/shards/mine").blocks(split)
    return np.concatenate([scale_pixels(block["examples"], (0.0, 1.0)) for block in blocks])


def _scores(images: np.ndarray, split: str) -> dict[str, float]:
    """Scores of samples in 0..1 with shape (n, C, H, W) against the images of a split, as `evaluate` has them."""
    settings = read_params().evaluation("mine").quality
    reader = ShardReader("data/shards/mine")
    assert settings is not None
    features = read_features(Path("data/features/mine"), settings, reader)
    real = features.values if split == "test" else extract_features(features.network, [_pixels(split)])
    fake = extract_features(features.network, [images])
    result = score(features.network.name, real, fake, settings.seed, settings.neighbours)
    random = np.random.default_rng(0)
    redrawn = [[random.choice(values, len(values)) for values in (real, fake)] for _ in range(REDRAWN)]
    return {
        "frechet_distance": result.fid,
        "frechet_distance_se": float(np.std([fid(*pair) for pair in redrawn], ddof=1)),
        "kid": result.kid.mean,
        "kid_se": result.kid.standard_error,
        "precision": result.manifolds.precision.mean,
        "recall": result.manifolds.recall.mean,
    }


# Ours -----------------------------------------------------------------------------------------------------------------


def _preset(method: str, seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows of an autoencoder and a density."""
    tables = YAML(typ="safe", pure=True).load(PROJECT / "presets" / "own-images.yaml")["tables"]
    minutes = {"autoencoder": (1 - DENSITY_SHARE) * seconds / 60, "density": DENSITY_SHARE * seconds / 60}
    autoencoder = tables["autoencoders"]["mine-ae"] | {"max_minutes": minutes["autoencoder"]}
    density = tables["densities"]["mine-ae-auto"] | {"codes": "row", "max_minutes": minutes["density"]}
    if method == "before":
        kept = ("dataset", "objective", "seed", "max_minutes")
        autoencoder = {key: autoencoder[key] for key in kept}
        autoencoder |= {"latent_dim": 64, "blocks": 3, "batch_size": 128, "learning_rate": 0.001, "schedule": "cosine"}
        density = {"dataset": "mine", "codes": "row", "family": "lde", "components": 30, "seed": 0}
        density |= {"learning_rate": 0.002, "schedule": "cosine", "max_minutes": minutes["density"], "epochs": 10_000}
        autoencoder["epochs"] = 10_000
    return autoencoder, density


def ours(method: str, data: str, raw: Path, seconds: float) -> tuple[np.ndarray, dict[str, float]]:
    """Samples of rows of the preset, by the stages, and what they took."""
    autoencoder, density = _preset(method, seconds)
    _write_params(data, raw, autoencoders={"row": autoencoder}, densities={"row": density})
    for stage in ("train", "extract", "fit", "sample"):
        _run(stage, "row")
    trained, fitted = read_json("reports/runs/train/row.json"), read_json("reports/runs/fit/row.json")
    samples = ShardReader("data/samples/row")
    images = np.concatenate([block["examples"] for block in samples.blocks("samples")])
    return images, _used(trained["steps"], trained["training_seconds"], fitted["training_seconds"])


def _used(steps: int, autoencoder: float, density: float) -> dict[str, float]:
    return {"autoencoder_seconds": round(autoencoder, 1), "density_seconds": round(density, 1), "steps": steps}


# Peers ----------------------------------------------------------------------------------------------------------------


def pythae_network(kind: str, shape: tuple[int, ...]) -> Any:
    """An autoencoder of pythae with stock networks."""
    from pythae.models import AE, AEConfig
    from pythae.models.nn.benchmarks.mnist import Decoder_Conv_AE_MNIST, Encoder_Conv_AE_MNIST

    config = AEConfig(input_dim=shape, latent_dim=16)
    if kind == "mlp":
        return AE(config)
    return AE(config, encoder=Encoder_Conv_AE_MNIST(config), decoder=Decoder_Conv_AE_MNIST(config))


def _descend(model: nn.Module, data: Tensor, batch_size: int, rate: float, seconds: float) -> int:
    """Trains a model of pythae by Adam for some CPU seconds, and returns the number of steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    started, steps, generator = time.process_time(), 0, torch.Generator().manual_seed(0)
    model.train()
    while True:
        for chosen in torch.randperm(len(data), generator=generator).split(batch_size):
            optimizer.zero_grad()
            model({"data": data[chosen]}).loss.backward()
            optimizer.step()
            steps += 1
            if time.process_time() - started >= seconds:
                model.eval()
                return steps


def peer(kind: str, rate: float, density: str, seconds: float) -> tuple[np.ndarray, dict[str, float]]:
    """Samples of pythae's autoencoder with a density of its codes, and what they took."""
    images = torch.from_numpy(_pixels("train"))
    torch.manual_seed(0)
    model = pythae_network(kind, tuple(images.shape[1:]))
    share = MIXTURE_SHARE if density == "gmm" else DENSITY_SHARE
    started = time.process_time()
    steps = _descend(model, images, 64, rate, (1 - share) * seconds)
    trained = time.process_time() - started
    with torch.no_grad():
        codes = torch.cat([model.encoder(part).embedding for part in images.split(500)])
    started = time.process_time()
    draw = _mixture(codes) if density == "gmm" else _flow(codes, share * seconds)
    fitted = time.process_time() - started
    with torch.no_grad():
        decoded = torch.cat([model.decoder(part).reconstruction for part in draw().split(500)])
    return decoded.numpy().clip(0, 1), _used(steps, trained, fitted)


def _mixture(codes: Tensor) -> Callable[[], Tensor]:
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(10, random_state=0).fit(codes.numpy())
    return lambda: torch.from_numpy(mixture.sample(SAMPLES)[0].astype(np.float32))


def _flow(codes: Tensor, seconds: float) -> Callable[[], Tensor]:
    from pythae.models.normalizing_flows import MAF, MAFConfig, NFModel

    torch.manual_seed(0)
    dim = codes.shape[1]
    flow = MAF(MAFConfig(input_dim=(dim,)))
    prior = torch.distributions.MultivariateNormal(torch.zeros(dim), torch.eye(dim))
    _descend(NFModel(prior, flow), codes, 100, 1e-3, seconds)

    @torch.no_grad()
    def draw() -> Tensor:
        drawn: Tensor = flow.inverse(prior.sample((SAMPLES,))).out
        return drawn

    return draw


# The table ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _workspace(folder: Path) -> Iterator[None]:
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def measure(data: str, method: str, raw: Path, seconds: float, split: str) -> dict[str, Any]:
    """One row of the results, in the working folder, whose shards and features are there."""
    samples, used = peer(*PEERS[method], seconds) if method in PEERS else ours(method, data, raw, seconds)
    return _row(data, method, seconds, used | _scores(samples, split))


def _row(data: str, method: str, seconds: float, values: dict[str, float]) -> dict[str, Any]:
    return {"data": data, "method": method, "seconds": seconds} | {key: round(value, 5) for key, value in values.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """The results in Markdown, best Frechet distance first."""
    lines = ["| images | CPU s | method | Frechet distance | KID | precision | recall | CPU s used | steps |"]
    lines.append("|---|--:|---|--:|--:|--:|--:|--:|--:|")
    for row in sorted(rows, key=lambda row: (row["data"], row["seconds"], row["frechet_distance"])):
        distance = f"{row['frechet_distance']:.2f} ± {row['frechet_distance_se']:.2f}"
        kid = f"{row['kid']:.3f} ± {row['kid_se']:.3f}"
        start = f"| {row['data']} | {row['seconds']:.0f} | {row['method']} | {distance} | {kid} | "
        used = f"{row['autoencoder_seconds']:.1f} + {row['density_seconds']:.1f} | {row['steps']:,}" if row["seconds"] else "|"
        lines.append(f"{start}{row['precision']:.2f} | {row['recall']:.2f} | {used} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seconds", nargs="+", type=float, default=[200.0])
    parser.add_argument("--split", choices=("test", "valid"), default="test", help="real images that samples are compared with")
    parser.add_argument("--raw", type=Path, default=Path("data/raw"))
    parser.add_argument("--table", action="store_true", help="print the recorded results, and run nothing")
    options = parser.parse_args()
    rows = read_json(RESULTS)["rows"] if RESULTS.exists() else []
    if options.table:
        print(table(rows))
        return
    os.environ["TRACKING"] = "off"
    time.monotonic = time.process_time  # the clock that training with a time limit reads
    torch.set_num_threads(1)
    raw = options.raw.resolve()
    for data in options.data:
        with tempfile.TemporaryDirectory() as folder, _workspace(Path(folder)):
            _write_params(data, raw)
            _run("prepare", "mine")
            _run("features", "mine")
            fresh = [_row(data, "training images", 0.0, _scores(_pixels("train")[:SAMPLES], options.split))]
            for seconds, method in itertools.product(options.seconds, options.methods):
                if method.startswith("pythae conv") and data != "fashion":
                    continue
                try:
                    fresh.append(measure(data, method, raw, seconds, options.split))
                except ModuleNotFoundError as error:
                    print(f"{method} is left out: {error}")
                    continue
                print(fresh[-1], flush=True)
                kept = {(row["data"], row["method"], row["seconds"]): row for row in [*rows, *fresh]}
                rows = [kept[key] for key in sorted(kept)]
                machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}
                if options.split == "test":
                    write_json(RESULTS, {"machine": machine, "samples": SAMPLES, "rows": rows})


if __name__ == "__main__":
    main()
