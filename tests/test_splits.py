"""Every number that a stage reports comes from the one split that it may come from.

The splits of both data sets differ by construction: images in their brightness, vectors in where they lie, all in their number.
Each number is computed again, naively, from each split: it must be that of the right one and of no other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from ruamel.yaml import YAML
from sklearn.metrics import average_precision_score, roc_auc_score

from pipeline import fitting, preparation, scoring
from pipeline.autoencoders.common.network import Decoder, Encoder
from pipeline.densities import Density, load_density
from pipeline.evaluation import features, likelihood, quality
from pipeline.evaluation.controls import kmeans_centroids
from pipeline.evaluation.detection import Surprise
from pipeline.evaluation.interpolation import draw_pairs
from pipeline.evaluation.reconstruction import ssim
from pipeline.evaluation.two_sample import mmd_squared
from pipeline.settings import Params
from pipeline.sources.common.bars import DROPPED_BOX, log_density
from pipeline.sources.common.source import Block, Source
from pipeline.storage.codes import CodeReader
from pipeline.storage.shards import ShardReader
from pipeline.system.ranks import Ranks
from pipeline.system.streams import stream, stream_seed
from stages.arrays import load_arrays

SPLITS = ("train", "valid", "test")
PARAMS = """\
datasets:
  marks: {source: images, root: raw, image_px: 12, channels: 1, pixel_range: [-1, 1], shard_examples: 50,
    unreadable_share: 0.02}
  others: {source: images, root: raw, image_px: 12, channels: 1, shard_examples: 50, unreadable_share: 0.02}
  points: {source: vectors, root: raw, shard_examples: 70}
  grid: {source: grid, root: raw, train_count: 400, valid_count: 100, test_count: 200}
controls:
  marks: {dataset: marks, kmeans_centroids: 15, kmeans_epochs: 2, kmeans_batch_size: 40, pca_components: 3, seed: 3}
autoencoders:
  marks: {dataset: marks, objective: vae, latent_dim: 3, blocks: 1, base_channels: 4, epochs: 3, batch_size: 20,
    learning_rate: 0.01, batch_norm_gain: ones, kl_weight: 0.1}
  points: {dataset: points, objective: identity}
  grid: {dataset: grid, objective: identity}
densities:
  marks: {codes: marks, dataset: marks, family: lde, components: 2, epochs: 3, batch_size: 30, learning_rate: 0.01}
  marks-labels: {codes: marks, dataset: marks, family: gaussian, context: labels, pseudo_codes: [0.1, 40.0]}
  points: {codes: points, dataset: points, family: lde, components: 4, epochs: 12, batch_size: 50, learning_rate: 0.02}
  points-gmm: {codes: points, dataset: points, family: gmm, components: [1, 3, 4]}
  points-gmmn: {codes: points, dataset: points, family: gmmn, hidden: [8], noise_dim: 2, epochs: 3, batch_size: 100}
  grid: {codes: grid, dataset: grid, family: gaussian}
sampling: {count: 150, shard_examples: 40, seed: 5}
evaluations:
  marks:
    parzen: {bandwidth_start: 0.05, bandwidth_stop: 2.0, bandwidth_count: 60, spacing: log, validation_count: 40}
    quality: {network: classifier, samples: 110, classifier_examples: 100, classifier_epochs: 1, neighbours: 4, seed: 2}
    interpolation: {pairs: 40, seed: 1}
  points: {parzen: {bandwidth_start: 0.05, bandwidth_stop: 5.0, bandwidth_count: 15, spacing: log}}
  grid: {}
detections:
  marks-from-others: {density: marks, family: lde, codes: marks, dataset: marks, outliers: others, outlier_classes: [2],
    false_alarms: 0.15, seed: 4}
"""


class Told(Source):
    """Examples that are told, whose first validation image can't be read."""

    def __init__(self, kind: str, examples: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> None:
        self.kind, self.examples, self.labels = kind, examples, labels  # type: ignore[assignment]
        self.counts = {split: len(array) for split, array in examples.items()}
        if kind == "images":
            self.value_range, self.label_names = (-1.0, 1.0), ("left", "middle", "right")

    def read(self, split: str, start: int, stop: int) -> Block:
        block = Block(examples=self.examples[split][start:stop], labels=self.labels[split][start:stop])
        if self.kind == "vectors" or split != "valid" or start:
            return block
        return Block(examples=block.examples[1:], labels=block.labels[1:], unreadable=("one: why",), enlarged=4)


def draw_marks() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Noisy grey images 12x12 with a bright column at the left, in the middle or at the right."""
    generator = np.random.default_rng(0)
    images, labels = {}, {}
    for split, count, level in (("train", 120, 60), ("valid", 71, 110), ("test", 90, 160)):
        labels[split] = generator.integers(0, 3, count)
        pixels = generator.normal(level, 12, (count, 1, 12, 12))
        for i, label in enumerate(labels[split]):
            pixels[i, 0, :, 4 * label + 1] += 60
        images[split] = pixels.clip(0, 255).astype(np.uint8)
    # Images of one split that another one holds too: 1, 2 and 3 of them.
    images["valid"][-1:] = images["train"][:1]
    images["test"][-2:] = images["train"][1:3]
    images["test"][-5:-2] = images["valid"][5:8]
    return images, labels


def draw_points() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Points of the plane: four clusters to train on, two between them to validate, their centre to test."""
    generator = np.random.default_rng(1)
    centres = {"train": [(-2, -1.2), (-2, 1.2), (2, -1.2), (2, 1.2)], "valid": [(-2, 0), (2, 0)], "test": [(0, 0)]}
    points, labels = {}, {}
    for split, count, groups in (("train", 280, 4), ("valid", 100, 3), ("test", 160, 6)):
        chosen = np.array(centres[split])[generator.integers(0, len(centres[split]), count)]
        points[split] = (chosen + generator.normal(0, (0.3, 0.5), (count, 2))).astype(np.float32)
        labels[split] = generator.integers(0, groups, count)
    return points, labels


class World:
    """A workspace whose stages run when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.tables = YAML(typ="safe", pure=True).load(PARAMS)
        self.done: set[tuple[str, str]] = set()
        (folder / "params.yaml").write_text(PARAMS)

    def run(self, stage: str, row: str) -> None:
        if (stage, row) in self.done:
            return
        before = {"extract": "train", "sample": "fit", "evaluate": "sample"}
        if stage in before:
            self.run(before[stage], row)
            if stage == "evaluate":
                self.run("features", self.tables["densities"][row]["dataset"])
        elif stage == "control":
            self.run("features", self.tables["controls"][row]["dataset"])
        elif stage == "features":
            self.run("prepare", row)
        elif stage == "train":
            self.run("prepare", self.tables["autoencoders"][row]["dataset"])
        elif stage == "detect":
            self.run("fit", self.tables["detections"][row]["density"])
            self.run("prepare", self.tables["detections"][row]["outliers"])
        elif stage == "fit":
            self.run("extract", self.tables["densities"][row]["codes"])
        with torch.enable_grad():  # whatever the test that asks first has switched off
            result = small.run(stage, row)
        assert result.exit_code == 0, result.output
        self.done.add((stage, row))

    @cache  # noqa: B019
    def images(self, split: str) -> np.ndarray:
        """Images of a split, uint8, as the shards hold them."""
        self.run("prepare", "marks")
        return np.concatenate([b["examples"] for b in ShardReader("data/shards/marks").blocks(split)])

    def unit(self, split: str) -> np.ndarray:
        """The same in 0..1."""
        return (self.images(split) / 255).astype(np.float32)

    @cache  # noqa: B019
    def labels(self, dataset: str, split: str) -> np.ndarray:
        self.run("prepare", dataset)
        return np.concatenate([b["labels"] for b in ShardReader(f"data/shards/{dataset}").blocks(split)])

    @cache  # noqa: B019
    def codes(self, row: str, split: str) -> torch.Tensor:
        self.run("extract", row)
        return torch.from_numpy(np.concatenate([b["codes"] for b in CodeReader(f"data/codes/{row}").blocks(split)]))

    @cache  # noqa: B019
    def samples(self, row: str) -> tuple[np.ndarray, np.ndarray]:
        """Samples and their codes."""
        self.run("sample", row)
        blocks = list(ShardReader(f"data/samples/{row}").blocks("samples"))
        return np.concatenate([b["examples"] for b in blocks]), np.concatenate([b["codes"] for b in blocks])

    def density(self, row: str) -> Density:
        self.run("fit", row)
        return load_density(Path(f"data/densities/{row}/density.safetensors"))

    def network(self) -> tuple[Encoder, Decoder]:
        self.run("train", "marks")
        return Encoder.load("data/autoencoders/marks/encoder.safetensors"), Decoder.load(
            "data/autoencoders/marks/decoder.safetensors"
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("splits")
    (folder / "raw").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("os.cpu_count", lambda: 1)
        patch.setattr("pipeline.sources.images.open_source", lambda settings, root: Told("images", *draw_marks()))
        patch.setattr("pipeline.sources.vectors.open_source", lambda settings, root: Told("vectors", *draw_points()))
        yield World(folder)


class Scores:
    """The scores that a stage wrote; each must be asked for."""

    def __init__(self, world: World, stage: str, row: str) -> None:
        world.run(stage, row)
        self.stage, self.row = stage, row
        self.values = json.loads(Path(f"reports/metrics/{stage}/{row}.json").read_text())
        self.left = set(self.values)

    def take(self, key: str) -> Any:
        self.left.discard(key)
        return self.values[key]

    def curve(self, name: str, x: str, y: str, prefix: str) -> None:
        """Counts the values of an array that the stage left among its scores, as `PREFIX_x`."""
        arrays = load_arrays(self.stage, self.row, name)
        assert arrays is not None
        xs, ys = (arrays.values[key].tolist() for key in (x, y))
        values = {f"{prefix}_{value:g}": score for value, score in zip(xs, ys, strict=True)}
        self.values |= values
        self.left |= set(values)

    def equal(self, **expected: Any) -> None:
        """Scores that no split decides."""
        for key, value in expected.items():
            assert self.take(key) == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key

    def of(self, split: str, twin: Callable[[str], dict[str, float]]) -> None:
        """Scores that one split decides: `twin` computes them from any."""
        expected = {of: twin(of) for of in SPLITS}
        for key, value in expected[split].items():
            taken = self.take(key)
            assert taken == pytest.approx(value, rel=2e-4), key
            for other in SPLITS:
                assert other == split or expected[other][key] != pytest.approx(taken, rel=2e-3), f"{key} is that of {other} too"

    def complete(self) -> None:
        """A new score needs a check here."""
        assert not self.left


def mean_and_error(values: Any) -> tuple[float, float]:
    values = np.asarray(values, dtype=np.float64)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def parzen(points: np.ndarray, samples: np.ndarray, bandwidth: float) -> np.ndarray:
    """Log-likelihood of each point under a Gaussian around each sample."""
    points, samples = (a.reshape(len(a), -1).astype(np.float64) for a in (points, samples))
    squares = np.square(points[:, None] - samples[None]).sum(2)
    normaliser = math.log(len(samples)) + points.shape[1] * math.log(bandwidth * math.sqrt(2 * math.pi))
    return np.logaddexp.reduce(-squares / (2 * bandwidth**2), axis=1) - normaliser


def check_parzen(
    scores: Scores,
    prefix: str,
    samples: np.ndarray,
    blocks: Callable[[str], np.ndarray],
    bandwidths: tuple[float, ...],
    limit: int,
) -> None:
    def searched(split: str) -> tuple[float, float]:
        """The best mean log-likelihood of the first points, and its bandwidth."""
        return max((float(parzen(blocks(split)[:limit], samples, h).mean()), h) for h in bandwidths)

    scores.of("valid", lambda split: {f"{prefix}parzen_valid_log_likelihood": searched(split)[0]})
    bandwidth = searched("valid")[1]
    assert bandwidth != searched("test")[1]
    scores.equal(**{f"{prefix}parzen_bandwidth": bandwidth})

    def twin(split: str) -> dict[str, float]:
        mean, error = mean_and_error(parzen(blocks(split), samples, bandwidth))
        return {f"{prefix}parzen_test_log_likelihood": mean, f"{prefix}parzen_test_se": error}

    scores.of("test", twin)
    scores.of("test", lambda split: {f"{prefix}parzen_test_points": len(blocks(split))})
    scores.equal(**{
        f"{prefix}parzen_valid_points": min(limit, len(blocks("valid"))),
        f"{prefix}parzen_samples": len(samples),
        f"{prefix}parzen_bandwidth_at_edge": int(bandwidth in (bandwidths[0], bandwidths[-1])),
        f"{prefix}parzen_protocol": "gmmn",
    })  # fmt: skip


# Stage by stage -------------------------------------------------------------------------------------------------------


def test_prepare(world: World) -> None:
    scores = Scores(world, "prepare", "marks")
    scores.equal(train_examples=120, valid_examples=70, test_examples=90, unreadable_files=1, enlarged_images=4)
    scores.equal(duplicates_train_valid=1, duplicates_train_test=2, duplicates_valid_test=3)
    scores.complete()
    images, labels = draw_marks()
    for split in SPLITS:
        first = split == "valid"
        assert np.array_equal(world.images(split), images[split][first:])
        assert np.array_equal(world.labels("marks", split), labels[split][first:])
    vectors = Scores(world, "prepare", "points")
    vectors.equal(train_examples=280, valid_examples=100, test_examples=160, unreadable_files=0)
    vectors.equal(duplicates_train_valid=0, duplicates_train_test=0, duplicates_valid_test=0)
    vectors.complete()


def test_duplicates_are_counted_in_the_later_split(tmp_path: Path) -> None:
    duplicates = preparation._Duplicates(tmp_path)
    duplicates.add(0, np.array([[1], [1], [2]]))
    duplicates.add(1, np.array([[1], [3]]))
    duplicates.add(2, np.array([[3], [3], [3]]))
    counts, repeated = duplicates.counts()
    assert repeated == {"train": 1, "valid": 0, "test": 2}
    assert [counts[pair] for pair in ("train_valid", "train_test", "valid_test")] == [1, 0, 3]


def test_control(world: World) -> None:
    scores = Scores(world, "control", "marks")
    settings = world.tables["controls"]["marks"]
    bandwidths = parzen_bandwidths("marks")

    # More samples are asked for than there are training images: all of these are the control.
    check_parzen(scores, "training_images_", world.unit("train"), world.unit, bandwidths, 40)
    centroids = kmeans_centroids(lambda: [world.unit("train")], 15, settings["seed"], settings["kmeans_batch_size"], 2)
    check_parzen(scores, "kmeans_", centroids, world.unit, bandwidths, 40)

    chosen = np.sort(np.argsort(stream("control images", settings["seed"]).random(120))[:110])  # quality.samples
    check_quality(world, scores, "training_images_", world.unit("train")[chosen])

    def components(fitted: str, scored: str) -> list[float]:
        """Mean squared error of test images from the first principal components of training images."""
        flat = world.unit(fitted).reshape(-1, 144).astype(np.float64)
        centred = world.unit(scored).reshape(-1, 144) - flat.mean(0)
        directions = np.linalg.svd(flat - flat.mean(0), full_matrices=False)[2]
        return [float(np.square(centred - centred @ directions[:k].T @ directions[:k]).mean()) for k in (1, 2, 3)]

    scores.curve("open-dimensions", "ks", "mse", "pca_test_mse_first")
    keys = [f"pca_test_mse_first_{k}" for k in (1, 2, 3)]
    scores.of("test", lambda split: dict(zip(keys, components("train", split), strict=True)))
    scores.of("train", lambda split: dict(zip(keys, components(split, "test"), strict=True)))
    scores.complete()


def parzen_bandwidths(dataset: str) -> tuple[float, ...]:
    from pipeline.settings import read_params

    protocol = read_params().evaluation(dataset).parzen
    assert protocol is not None
    return protocol.bandwidths


# Shares of neighbours: batches of another length round features otherwise, which may move one neighbour over the border.
COUNTED = ("_precision", "_recall", "_density", "_coverage", "_se")


def check_quality(world: World, scores: Scores, prefix: str, samples: np.ndarray) -> None:
    """Samples against test images, in the features of a classifier that knows the training images."""

    @cache
    def network(split: str) -> features.FeatureNetwork:
        def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            blocks = ShardReader("data/shards/marks").blocks(split)
            for block, left in zip(blocks, (100, 50), strict=False):  # classifier_examples: two shards of 50
                yield (block["examples"] / 255).astype(np.float32)[:left], block["labels"][:left]

        return features.classifier_network(features.train_classifier(blocks, 3, 2, 1))

    def twin(trained: str, real: str) -> dict[str, float]:
        of_real, of_samples = (
            features.extract_features(network(trained), np.array_split(images, 3)) for images in (world.unit(real), samples)
        )
        score = quality.score("classifier", of_real, of_samples, seed=2, neighbours=4).metrics()
        return {f"{prefix}{key}": value for key, value in score.items() if key in ("classifier_kid", "classifier_fid")}

    scores.of("test", lambda split: twin("train", split))
    scores.of("train", lambda split: twin(split, "test"))
    whole = quality.score(
        "classifier", *(features.extract_features(network("train"), [images]) for images in (world.unit("test"), samples)), 2, 4
    )
    for key, value in whole.metrics().items():
        scores.equal(**{f"{prefix}{key}": pytest.approx(value, rel=2e-3, abs=3e-3 if key.endswith(COUNTED) else 1e-6)})
    scores.equal(**{f"{prefix}classifier_real_images": 90, f"{prefix}classifier_samples": 110})


@torch.no_grad()
def test_train(world: World) -> None:
    scores = Scores(world, "train", "marks")
    encoder, decoder = world.network()

    def errors(split: str, k: int = 3) -> np.ndarray:
        codes = encoder(torch.from_numpy(2 * world.unit(split) - 1))
        codes[:, k:] = 0
        return np.square((decoder(codes).numpy() + 1) / 2 - world.unit(split)).reshape(len(codes), -1).mean(1)

    def named(split: str, name: str, values: np.ndarray) -> dict[str, float]:
        mean, error = mean_and_error(values)
        return {f"{name}_{key}": value for key, value in ((split, mean), (f"{split}_se", error))}

    for split in SPLITS:

        def twin(of: str, key: str = split) -> dict[str, float]:
            images = torch.from_numpy(2 * world.unit(of) - 1)
            reconstructed = (decoder(encoder(images)).numpy() + 1) / 2
            mean, log_variance = (values.double().numpy() for values in encoder.moments(images))
            mse = errors(of)
            each = {
                "mse": mse,
                "psnr": -10 * np.log10(mse),
                "ssim": ssim(world.unit(of), reconstructed.astype(np.float32)),
                "kl": 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).sum(1),
            }
            found = {f"{key}_squared_error": 144 * float(mse.mean())}
            for name, values in each.items():
                found[f"{key}_{name}"], found[f"{key}_{name}_se"] = mean_and_error(values)
            return found

        scores.of(split, twin)
    scores.curve("open-dimensions", "ks", "mse", "test_mse_first")
    scores.of("test", lambda split: {f"test_mse_first_{k}": float(errors(split, k).mean()) for k in (1, 2, 3)})
    scores.complete()
    shown = load_arrays("train", "marks", "reconstructions")
    assert shown is not None
    assert np.array_equal(shown.values["inputs"], world.images("test")[:10])


@torch.no_grad()
def test_training_and_validation_images_scored_are_limited(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of shards of 50, 50 and 20 training images and of 49 and 21 validation images, the first of each; all test images."""
    encoder, decoder = world.network()
    whole = json.loads(Path("reports/metrics/train/marks.json").read_text())
    kept = Path("data/autoencoders/marks/encoder.safetensors").read_bytes()
    monkeypatch.setattr("stages.train.SCORED", 35)
    with torch.enable_grad():
        assert small.run("train", "marks").exit_code == 0
    limited = json.loads(Path("reports/metrics/train/marks.json").read_text())
    assert Path("data/autoencoders/marks/encoder.safetensors").read_bytes() == kept
    for split, count in (("train", 50), ("valid", 49)):
        images = world.unit(split)[:count]
        reconstructed = (decoder(encoder(torch.from_numpy(2 * images - 1))).numpy() + 1) / 2
        mean, error = mean_and_error(np.square(reconstructed - images).reshape(len(images), -1).mean(1))
        assert (limited[f"{split}_mse"], limited[f"{split}_mse_se"]) == (pytest.approx(mean, 1e-4), pytest.approx(error, 1e-4))
        assert limited[f"{split}_scored"] == count
        assert f"{split}_scored" not in whole
    assert {k: v for k, v in limited.items() if k.startswith("test")} == {
        k: v for k, v in whole.items() if k.startswith("test")
    }


@torch.no_grad()
def test_extract(world: World) -> None:
    scores = Scores(world, "extract", "marks")
    scores.equal(train_codes=120, valid_codes=70, test_codes=90, dimensions=3)
    scores.complete()
    encoder, _ = world.network()
    index = CodeReader("data/codes/marks").index
    for split in SPLITS:
        expected = encoder(torch.from_numpy(2 * world.unit(split) - 1))
        assert torch.allclose(world.codes("marks", split), expected, atol=1e-5)
        blocks = CodeReader("data/codes/marks").blocks(split)
        assert np.array_equal(np.concatenate([b["labels"] for b in blocks]), world.labels("marks", split))
        agree = np.allclose(index.mean, expected.mean(0), atol=1e-4), np.allclose(index.std, expected.std(0, False), atol=1e-4)
        assert agree == (split == "train",) * 2
    vectors = Scores(world, "extract", "points")
    vectors.equal(train_codes=280, valid_codes=100, test_codes=160, dimensions=2)
    vectors.complete()
    for split in SPLITS:
        assert np.array_equal(world.codes("points", split), draw_points()[0][split])


@torch.no_grad()
def check_likelihoods(world: World, scores: Scores, row: str, codes: str) -> Density:
    density = world.density(row)
    for split in SPLITS:

        def twin(of: str, key: str = split) -> dict[str, float]:
            mean, error = mean_and_error(density.log_prob(world.codes(codes, of)))
            per = {
                f"{key}_log_likelihood": mean,
                f"{key}_log_likelihood_se": error,
                f"{key}_scored": len(world.codes(codes, of)),
            }
            dim = density.dim
            return per | {
                f"{key}_log_likelihood_per_dimension": mean / dim,
                f"{key}_log_likelihood_per_dimension_se": error / dim,
            }

        scores.of(split, twin)
    scores.equal(parameters=density.parameter_count)
    return density


def curve(row: str, key: str) -> dict[float, float]:
    """A column of a fit's curve, by epoch."""
    header, *lines = Path(f"reports/curves/fit/{row}.tsv").read_text().splitlines()
    rows = [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]
    return {float(row["epoch"]): float(row[key]) for row in rows if row.get(key)}


@torch.no_grad()
@pytest.mark.parametrize("row", ["marks", "points"])
def test_fit(world: World, row: str) -> None:
    scores = Scores(world, "fit", row)
    density = check_likelihoods(world, scores, row, row)
    assert torch.allclose(density.shift, world.codes(row, "train").mean(0), atol=1e-4)
    assert torch.allclose(density.scale, world.codes(row, "train").std(0, correction=0), atol=1e-4)
    validations = curve(row, "valid_log_likelihood")
    assert len(validations) == world.tables["densities"][row]["epochs"]
    best = max(validations, key=lambda epoch: validations[epoch])
    # The weights that are kept are those of the best validation: they give validation codes that very likelihood.
    assert float(density.log_prob(world.codes(row, "valid")).double().mean()) == pytest.approx(validations[best], rel=1e-5)
    scores.equal(best_epoch=best)
    scores.complete()
    if row == "points":  # a choice was made
        assert 1 < best < len(validations)


def test_fit_of_a_mixture_chooses_on_validation_codes(world: World) -> None:
    from sklearn.mixture import GaussianMixture

    scores = Scores(world, "fit", "points-gmm")
    check_likelihoods(world, scores, "points-gmm", "points")
    train = world.codes("points", "train").double()
    scale = train.std(0, correction=0)
    fits = {k: GaussianMixture(k, random_state=0).fit((train - train.mean(0)) / scale) for k in (1, 3, 4)}

    def chosen(split: str) -> dict[str, float]:
        held_out = (world.codes("points", split).double() - train.mean(0)) / scale
        return {"components": max(fits, key=lambda k: fits[k].score(held_out))}

    assert [chosen(split)["components"] for split in SPLITS] == [4, 3, 1]
    scores.of("valid", chosen)
    scores.equal(best_epoch=1.0)
    assert curve("points-gmm", "valid_log_likelihood") == {1.0: pytest.approx(scores.values["valid_log_likelihood"])}
    scores.complete()


def test_fit_without_likelihood_chooses_on_validation_codes(world: World) -> None:
    scores = Scores(world, "fit", "points-gmmn")
    density = world.density("points-gmmn")
    validations = curve("points-gmmn", "valid_minus_squared_mmd")
    best = max(validations, key=lambda epoch: validations[epoch])

    def twin(split: str) -> dict[str, float]:
        return {"valid_minus_squared_mmd": -fitting.discrepancy(density, [world.codes("points", split).numpy()], 0)}

    scores.of("valid", twin)
    scores.equal(best_epoch=best, valid_minus_squared_mmd=validations[best], parameters=density.parameter_count)
    scores.complete()


@torch.no_grad()
def test_sample(world: World) -> None:
    scores = Scores(world, "sample", "marks")
    scores.equal(samples=150)
    scores.complete()
    images, codes = world.samples("marks")
    assert len(np.unique(codes, axis=0)) == 150  # no shard repeats another
    _, decoder = world.network()
    assert np.allclose(images, (decoder(torch.from_numpy(codes)).numpy().clip(-1, 1) + 1) / 2, atol=1e-5)
    assert images.min() < 0.45 < images.max()
    points, codes = world.samples("points")
    assert np.array_equal(points, codes)
    assert len(np.unique(points, axis=0)) == 150
    # They are drawn from the density: half of them at either side.
    assert np.abs((points > 0).mean(0) - 0.5).max() < 0.2


@torch.no_grad()
def check_test_likelihood(world: World, scores: Scores, row: str) -> None:
    density = world.density(row)

    def twin(split: str) -> dict[str, float]:
        codes = world.codes(row, split)
        mean, error = mean_and_error(density.log_prob(codes))
        found = {"test_log_likelihood": mean, "test_log_likelihood_se": error, "test_scored": len(codes)}
        found["test_log_likelihood_per_dimension"] = mean / density.dim
        if row == "points":  # whose labels are groups
            values, groups = density.log_prob(codes).double().numpy(), world.labels(row, split)
            found["test_groups"] = len(np.unique(groups))
            means = [values[groups == group].mean() for group in np.unique(groups)]
            found["test_log_likelihood_group_se"] = mean_and_error(means)[1]
        return found

    scores.of("test", twin)


def test_evaluate_images(world: World) -> None:
    scores = Scores(world, "evaluate", "marks")
    check_test_likelihood(world, scores, "marks")
    images, _ = world.samples("marks")
    check_parzen(scores, "", images[:120], world.unit, parzen_bandwidths("marks"), 40)  # as many as training images
    check_quality(world, scores, "", images[:110])

    def nearest(split: str) -> dict[str, float]:
        squares = np.square(images[:10, None].astype(np.float64) - world.unit(split)[None]).mean((2, 3, 4))
        return {"nearest_training_rmse": float(np.sqrt(squares.min(1)).mean())}

    scores.of("train", nearest)
    density = world.density("marks")
    scores.of("test", lambda split: manifold(world, split))
    for kind in ("same", "different"):
        scores.curve("interpolation", "curve_weights", f"{kind}_mean", f"interpolation_{kind}")

        @torch.no_grad()
        def twin(split: str, kind: str = kind) -> dict[str, float]:
            pairs = draw_pairs(world.labels("marks", split), 40, kind == "same", 1)
            first, last = (world.codes("marks", split)[pairs[:, i]] for i in (0, 1))
            lines = {a: density.log_prob((1 - a) * first + a * last).double().numpy() for a in np.arange(11) / 10}
            found = {f"interpolation_{kind}_{a:g}": float(values.mean()) for a, values in lines.items()}
            falls = (lines[0.0] + lines[1.0]) / 2 - (lines[0.4] + lines[0.5] + lines[0.6]) / 3
            found[f"interpolation_{kind}_fall"], found[f"interpolation_{kind}_fall_se"] = mean_and_error(falls)
            return found

        scores.of("test", twin)
        scores.equal(**{f"interpolation_{kind}_pairs": 40})
    scores.complete()
    shown = load_arrays("evaluate", "marks", "interpolation")
    assert shown is not None
    assert {image.tobytes() for image in world.images("test")} >= {
        image.tobytes() for image in shown.values["originals"].reshape(-1, 1, 12, 12)
    }


def manifold(world: World, split: str) -> dict[str, float]:
    """Log-likelihoods of decoded codes on the decoder's manifold, by whole Jacobians."""
    _, decoder = world.network()
    codes, density = world.codes("marks", split), world.density("marks")
    jacobians = torch.func.vmap(torch.func.jacrev(lambda z: decoder(z[None]).flatten() / 2))(codes).detach().double()
    volumes = torch.linalg.svdvals(jacobians).log().sum(1)
    with torch.no_grad():
        mean, error = mean_and_error(density.log_prob(codes).double() - volumes)
    return {"manifold_log_likelihood": mean, "manifold_log_likelihood_se": error, "manifold_scored": len(codes)}


def test_detect(world: World) -> None:
    scores = Scores(world, "detect", "marks-from-others")
    encoder, decoder = world.network()
    density = world.density("marks")

    @cache
    def singles(split: str, label: int | None = None) -> dict[str, np.ndarray]:
        """Scores of the examples of a split, perhaps of one label: larger is stranger."""
        chosen = slice(None) if label is None else world.labels("marks", split) == label
        images = torch.from_numpy(2 * world.unit(split)[chosen] - 1)
        with torch.no_grad():
            codes = encoder(images)
            errors = ((decoder(codes) - images) / 2).square().flatten(1).sum(1)
            return {
                "log_likelihood": -density.log_prob(codes).double().numpy(),
                "reconstruction_error": errors.double().numpy(),
            }

    def twin(calibrating: str = "valid", inliers: str = "test", outliers: str = "test") -> dict[str, float]:
        valid, kinds = singles(calibrating), (singles(inliers), singles(outliers, 2))
        ranks = {name: Surprise(values[::2]) for name, values in valid.items()}
        held = sum(rank(valid[name][1::2]) for name, rank in ranks.items())
        inlying, outlying = (sum(rank(kind[name]) for name, rank in ranks.items()) for kind in kinds)
        threshold = np.sort(held)[len(held) - int(0.15 * (len(held) + 1))]
        truth, joined = np.r_[np.zeros(len(inlying)), np.ones(len(outlying))], np.r_[inlying, outlying]
        return {
            "auroc": roc_auc_score(truth, joined),
            "average_precision": average_precision_score(truth, joined),
            "threshold": float(threshold),
            "threshold_false_alarms": float((inlying > threshold).mean()),
            "threshold_detected": float((outlying > threshold).mean()),
            "calibrating": len(held),
            "inliers_scored": len(inlying),
            "outliers_scored": len(outlying),
        } | {f"{name}_auroc": roc_auc_score(truth, np.r_[kinds[0][name], kinds[1][name]]) for name in ranks}

    shares = ("auroc", "average_precision", "threshold_false_alarms", "threshold_detected")

    def kept(found: dict[str, float], *keys: str) -> dict[str, float]:
        return {key: found[key] for key in keys}

    scores.of("valid", lambda split: kept(twin(calibrating=split), "threshold", "calibrating"))
    scores.of("test", lambda split: kept(twin(inliers=split), "auroc", "average_precision", "inliers_scored"))
    scores.of("test", lambda split: kept(twin(outliers=split), "auroc", "outliers_scored"))
    right = twin()
    scores.equal(**{key: pytest.approx(value, rel=2e-3) for key, value in right.items() if key.endswith("_auroc")})
    scores.equal(**{key: pytest.approx(right[key], rel=2e-3) for key in shares})
    for key in [key for key in scores.left if key.endswith("_se") or key.startswith("false_alarms")]:
        assert 0 <= scores.take(key) <= 1
    scores.complete()


@torch.no_grad()
def test_fit_given_labels(world: World) -> None:
    scores = Scores(world, "fit", "marks-labels")
    density = world.density("marks-labels")
    for split in SPLITS:

        def twin(of: str, key: str = f"{split}_conditional_log_likelihood") -> dict[str, float]:
            z, labels = world.codes("marks", of), torch.from_numpy(world.labels("marks", of))
            mean, error = mean_and_error(density.log_prob(z, labels))
            per = {f"{key}_per_dimension": mean / 3, f"{key}_per_dimension_se": error / 3}
            return {key: mean, f"{key}_se": error, **per}

        scores.of(split, twin)
        scores.equal(**{f"{split}_scored": len(world.labels("marks", split))})
    shares = np.bincount(world.labels("marks", "train")) / 120
    assert density.context is not None
    assert np.allclose(density.context.weights.numpy(), shares)
    # The number of pseudo-codes is that of the better fit of validation codes; training codes always want fewer.
    codes, likelihoods = CodeReader("data/codes/marks"), {}
    for number in (0.1, 40.0):
        row = world.tables["densities"]["marks-labels"] | {"pseudo_codes": [number]}
        other = fitting.fit_density(
            Params({**world.tables, "densities": {"row": row}}).density("row"), codes, Ranks(0, 1, torch.device("cpu"))
        )[0]
        for split in ("train", "valid"):
            labels = torch.from_numpy(world.labels("marks", split))
            likelihoods[split, number] = float(other.log_prob(world.codes("marks", split), labels).mean())
    assert likelihoods["train", 0.1] > likelihoods["train", 40.0]
    assert scores.take("pseudo_codes") == max((0.1, 40.0), key=lambda number: likelihoods["valid", number]) == 40.0
    scores.equal(parameters=3 * 9, best_epoch=1.0)
    scores.complete()


@torch.no_grad()
def test_evaluate_given_labels(world: World) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    from pipeline.evaluation.posterior import INVERSE_PENALTIES, NEIGHBOURS

    scores, shared = Scores(world, "evaluate", "marks-labels"), Scores(world, "evaluate", "marks").left
    density = world.density("marks-labels")
    shares = np.bincount(world.labels("marks", "train")) / 120

    def posterior(split: str) -> tuple[np.ndarray, np.ndarray]:
        z, labels = world.codes("marks", split), world.labels("marks", split)
        each = [density.log_prob(z, torch.full((len(z),), y)).double().numpy() + np.log(shares[y]) for y in range(3)]
        return np.stack(each, 1), labels

    def bayes(split: str) -> dict[str, float]:
        joint, labels = posterior(split)
        marginal = np.log(np.exp(joint).sum(1))
        right = joint[np.arange(len(joint)), labels]
        found = dict(zip(("test_log_likelihood", "test_log_likelihood_se"), mean_and_error(marginal), strict=True))
        names = ("test_conditional_log_likelihood", "test_conditional_log_likelihood_se")
        found |= dict(zip(names, mean_and_error(right - np.log(shares[labels])), strict=True))
        return found | dict(zip(("class_log_loss", "class_log_loss_se"), mean_and_error(marginal - right), strict=True))

    scores.of("test", bayes)
    joint, labels = posterior("test")
    scores.equal(class_accuracy=float((joint.argmax(1) == labels).mean()), class_scored=90.0, test_conditional_scored=90.0)
    assert scores.take("class_accuracy_se") == pytest.approx(mean_and_error(joint.argmax(1) == labels)[1])
    probability = np.exp(joint - np.log(np.exp(joint).sum(1))[:, None])
    gap = 0.0
    for i in range(15):
        inside = (probability.max(1) >= i / 15) & (probability.max(1) < (i + 1) / 15)
        gap += abs(float((joint.argmax(1) == labels)[inside].sum() - probability.max(1)[inside].sum())) / 90
    scores.equal(class_calibration_error=gap)

    def reference(kind: str, fitted: str, chosen: str, tested: str) -> dict[str, float]:
        mean, std = (world.codes("marks", fitted).double().mean(0), world.codes("marks", fitted).double().std(0, correction=0))
        z = {split: ((world.codes("marks", split).double() - mean) / std).numpy() for split in SPLITS}
        losses = {}
        for value in NEIGHBOURS if kind == "knn" else INVERSE_PENALTIES:
            model = KNeighborsClassifier(value) if kind == "knn" else LogisticRegression(C=value, max_iter=500)
            model.fit(z[fitted], world.labels("marks", fitted))
            for split in (chosen, tested):
                p = model.predict_proba(z[split])
                p = (p * value + 1 / 3) / (value + 1) if kind == "knn" else p
                losses[value, split] = mean_and_error(-np.log(p[np.arange(len(p)), world.labels("marks", split)]))
        best = min({value for value, _ in losses}, key=lambda value: losses[value, chosen][0])
        return {f"{kind}_class_log_loss": losses[best, tested][0], f"{kind}_class_log_loss_se": losses[best, tested][1]}

    for kind in ("knn", "logistic"):
        scores.of("test", lambda split, kind=kind: reference(kind, "train", "valid", split))  # type: ignore[misc]
        scores.of("train", lambda split, kind=kind: reference(kind, split, "valid", "test"))  # type: ignore[misc]
        for key in ("accuracy", "accuracy_se", "calibration_error"):
            assert 0 <= scores.take(f"{kind}_class_{key}") < 1.01

    images, _ = world.samples("marks-labels")
    drawn = np.concatenate([block["labels"] for block in ShardReader("data/samples/marks-labels").blocks("samples")])
    network = features.load_classifier(Path("data/features/marks/classifier.safetensors"))
    of_samples = network.features(torch.from_numpy(images[:110])).numpy()

    def kids(split: str) -> dict[str, float]:
        real = network.features(torch.from_numpy(world.unit(split))).numpy()
        each = [quality.kid(real[world.labels("marks", split) == y], of_samples[drawn[:110] == y], seed=2) for y in range(3)]
        found = {f"classifier_kid_of_{y}": score.mean for y, score in enumerate(each)}
        return found | {"classifier_class_kid": sum(score.mean for score in each) / 3}

    of_test, of_train = kids("test"), kids("train")  # of validation images there are too few
    scores.equal(**of_test)
    assert all(abs(of_train[key] / value - 1) > 1e-3 for key, value in of_test.items())
    for key in ("classifier_class_kid_se", *(f"classifier_kid_of_{y}_se" for y in range(3))):
        assert scores.take(key) > 0
    assert scores.left <= shared  # all else is computed as for the rows without a context
    assert np.abs(np.bincount(drawn, minlength=3) / 150 - shares).max() < 0.15


@torch.no_grad()
def test_draw_gives_the_label_asked_for(world: World) -> None:
    from PIL import Image
    from safetensors.numpy import load_file

    density, (_, decoder) = world.density("marks-labels"), world.network()
    draw = ("draw", "marks-labels", "--count", "12", "--seed", "3", "--output", "drawn")
    result = small.run(*draw, "--label", "right")
    assert result.exit_code == 0, result.output
    assert result.output == "12 samples of marks-labels, labels right: drawn\n"
    drawn = load_file("drawn/samples.safetensors")
    assert drawn["context"].tolist() == [[2.0]] * 12
    z = torch.from_numpy(drawn["codes"])
    assert torch.allclose((decoder(z) + 1) / 2, torch.from_numpy(drawn["samples"]), atol=1e-5)
    assert np.array_equal(np.asarray(Image.open("drawn/00011.png")), np.rint(drawn["samples"][11, 0].clip(0, 1) * 255))
    generator = torch.Generator().manual_seed(stream_seed("samples", 3, 0))
    assert torch.allclose(z, density.sample(12, generator, torch.full((12,), 2.0)), atol=1e-5)
    assert Path("drawn/samples.png").stat().st_size > 500
    # The same seed draws the same; without a label contexts are drawn first.
    before = small.files(Path("drawn"))
    assert small.run(*draw, "--label", "right").exit_code == 0
    assert small.files(Path("drawn")) == before
    assert small.run(*draw).exit_code == 0
    assert len(np.unique(load_file("drawn/samples.safetensors")["context"])) > 1
    for arguments, message in (
        ((*draw, "--label", "up"), "labels: no training code has 'up'; known: left, middle, right"),
        ((*draw, "--given", "age=3"), "age: no column of this density's context, which has labels"),
        ((*draw, "--given", "age"), "--given age: write COLUMN=VALUE"),
        (("draw", "marks", "--label", "left", "--output", "drawn"), "densities.marks isn't conditioned: leave out --label"),
        (("draw", "marks-labels", "--output", "data"), "data exists and holds no draw; name another folder"),
    ):
        world.run("fit", "marks")
        refused = small.run(*arguments)
        assert refused.exit_code == 1
        assert message in refused.output
        assert refused.output.count("\n") == 1
    arrays = load_arrays("sample", "marks-labels", "samples-by-class")
    assert arrays is not None
    assert list(arrays.names) == ["left", "middle", "right"]
    samples = ShardReader("data/samples/marks-labels")
    blocks = list(samples.blocks("samples"))
    images, labels = (np.concatenate([block[name] for block in blocks]) for name in ("examples", "labels"))
    first = images[labels == 1][:10]
    assert np.array_equal(arrays.values["samples"][1], np.rint(first.clip(0, 1).astype(np.float64) * 255).astype(np.uint8))
    assert samples.index.label_names == ("left", "middle", "right")


def test_evaluate_vectors(world: World) -> None:
    scores = Scores(world, "evaluate", "points")
    check_test_likelihood(world, scores, "points")
    samples, _ = world.samples("points")
    check_parzen(scores, "", samples, lambda split: world.codes("points", split).numpy(), parzen_bandwidths("points"), 10**6)
    scores.complete()


def test_evaluate_the_grid(world: World) -> None:
    scores = Scores(world, "evaluate", "grid")
    samples, _ = world.samples("grid")
    points = {split: world.codes("grid", split).numpy() for split in SPLITS}
    density = world.density("grid")

    @torch.no_grad()
    def twin(split: str) -> dict[str, float]:
        truth = float(log_density(points[split]).mean())
        model = float(density.log_prob(world.codes("grid", split)).double().mean())
        return {
            "test_scored": len(points[split]),
            "mmd_squared": mmd_squared(points[split], samples),
            "gap_to_truth": truth - model,
        }

    scores.of("test", twin)
    mean, error = mean_and_error(density.log_prob(world.codes("grid", "test")).detach())
    (left, right), (bottom, top) = DROPPED_BOX
    inside = (samples[:, 0] > left) & (samples[:, 0] < right) & (samples[:, 1] > bottom) & (samples[:, 1] < top)
    scores.equal(
        test_log_likelihood=mean,
        test_log_likelihood_se=error,
        test_log_likelihood_per_dimension=mean / 2,
        truth_test_log_likelihood=float(log_density(points["test"]).mean()),
        samples_in_dropped_box=float(inside.mean()),
        samples_in_dropped_box_se=mean_and_error(inside)[1],
    )
    scores.complete()
    shown = load_arrays("evaluate", "grid", "grid")
    assert shown is not None
    assert np.array_equal(shown.values["target"], points["train"])
    assert np.array_equal(shown.values["samples"], samples)


# What reads and shares the splits -------------------------------------------------------------------------------------


def test_training_reads_every_example(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autoencoders and densities are trained on all training examples and on no other."""
    from pipeline.storage.batches import Batches

    class Noted(Exception):
        pass

    seen: list[bytes] = []

    def note(self: Batches, epoch: int, skip: int = 0) -> Iterator[Any]:
        for number in range(len(self.counts)):
            part = self.load(number)
            seen.extend(row.tobytes() for row in part.get("examples", part.get("codes")))
        raise Noted
        yield

    world.run("extract", "marks")
    monkeypatch.setattr(Batches, "epoch", note)
    assert isinstance(small.run("train", "marks").exception, Noted)
    assert sorted(seen) == sorted(image.tobytes() for image in world.images("train"))
    seen.clear()
    assert isinstance(small.run("fit", "marks").exception, Noted)
    assert sorted(seen) == sorted(code.tobytes() for code in world.codes("marks", "train").numpy())


def test_images_to_train_on_are_in_the_range_of_the_data_set(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class Noted(Exception):
        pass

    def note(*arguments: Any, prepare: Callable[..., Any], **keywords: Any) -> None:
        pixels = np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3)
        assert torch.allclose(prepare({"examples": pixels})["images"].flatten(), torch.tensor([-1.0, -0.6, 1.0]))
        raise Noted

    world.run("prepare", "marks")
    monkeypatch.setattr("pipeline.training.loop.train", note)
    assert isinstance(small.run("train", "marks").exception, Noted)


@pytest.mark.parametrize("standardise", ["dimension", "scalar", "cholesky"])
def test_codes_are_standardised_by_training_codes(world: World, standardise: str) -> None:
    from pipeline.densities.gaussian import Settings

    world.run("extract", "points")
    settings = Settings(codes="points", dataset="points", family="gaussian", standardise=standardise)
    density, _ = fitting.fit_density(settings, CodeReader("data/codes/points"), Ranks(0, 1, torch.device("cpu")))
    codes = world.codes("points", "train").double()
    one = standardise == "scalar"
    mean, deviation = (codes.mean(), codes.std(correction=0)) if one else (codes.mean(0), codes.std(0, correction=0))
    scale: torch.Tensor = density.scale.double() if density.factor is None else density.factor.double()
    expected = torch.linalg.cholesky(torch.cov(codes.T, correction=0)) if standardise == "cholesky" else deviation.expand(2)
    assert torch.allclose(density.shift.double(), mean.expand(2), atol=1e-5)
    assert torch.allclose(scale, expected, atol=1e-5)


class Apart(Ranks):
    """A rank without its peers: its results are those of its own share."""

    def gather(self, value: Any) -> list[Any]:
        return [value]


def share(rank: int) -> Ranks:
    return Apart(rank, 2, torch.device("cpu"))


@pytest.mark.parametrize("scored", [
    lambda density, codes, ranks: likelihood.log_likelihood(density, codes.stream("test")(), ranks).number,
    lambda density, codes, ranks: likelihood.test_log_likelihood(density, codes, False, ranks).metrics["test_scored"],
])  # fmt: skip
def test_ranks_share_the_codes(world: World, scored: Callable[..., float]) -> None:
    density, codes = world.density("points"), CodeReader("data/codes/points")
    counts = [scored(density, codes, share(rank)) for rank in range(2)]
    assert min(counts) >= 60
    assert sum(counts) == 160


def test_ranks_share_the_samples(world: World) -> None:
    from pipeline.settings import ParzenSettings

    world.run("prepare", "points")
    reader = ShardReader("data/shards/points")
    samples = np.zeros((21, 2), np.float32)
    protocol = ParzenSettings(bandwidth_start=1.0, bandwidth_stop=1.0, bandwidth_count=1)
    counts = [
        scoring.parzen_score(lambda: iter([samples]), 21, reader, protocol, share(rank)).score.samples for rank in range(2)
    ]
    assert counts == [11, 10]
