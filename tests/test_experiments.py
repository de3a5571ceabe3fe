"""Figures and scores of the paper's experiments, by the stages themselves, on two domains of tiny images."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from pipeline.evaluation.interpolation import WEIGHTS, interpolation_pairs
from pipeline.evaluation.reconstruction import opened
from pipeline.settings import Params, read_params
from stages.arrays import load_arrays
from stages.workspace import TABLE_OF_STAGE

PARAMS = """\
datasets:
  shapes: {source: union, root: raw, sources: [images, images], roots: [blobs, bars], domains: [blobs, bars], image_px: 16,
    channels: 1}
controls:
  shapes: {dataset: shapes, kmeans_centroids: 20, kmeans_epochs: 1, pca_components: 2}
autoencoders:
  shapes-ae: &network {dataset: shapes, objective: ae, latent_dim: 2, blocks: 1, base_channels: 4, epochs: 3, batch_size: 32,
    learning_rate: 0.01, batch_norm_gain: ones}
  shapes-nested: {<<: *network, incremental: {mode: nested_dropout}}
  shapes-vae-0: {<<: *network, objective: vae, kl_weight: 0.0}
  shapes-vae-1: {<<: *network, objective: vae, kl_weight: 1.0}
densities:
  shapes-ae-lde: {codes: shapes-ae, dataset: shapes, family: lde, components: 2, epochs: 2, batch_size: 32, learning_rate: 0.01}
  shapes-vae-1-prior: {codes: shapes-vae-1, dataset: shapes, family: prior}
  shapes-ae-gmmn: {codes: shapes-ae, dataset: shapes, family: gmmn, epochs: 1, batch_size: 100}
sampling: {count: 60, shard_examples: 40}
evaluations:
  shapes:
    parzen: {bandwidth_start: 0.05, bandwidth_stop: 0.5, bandwidth_count: 5}
    quality: {network: classifier, samples: 50, classifier_epochs: 4}
    interpolation: {pairs: 40}
"""
COMBINED = (
    "samples", "reconstructions", "codes", "trade-off", "open-dimensions", "interpolations", "interpolation-log-likelihood",
    "training-loss",
)  # fmt: skip


def run(*arguments: str) -> Result:
    from stages.__main__ import cli

    return CliRunner().invoke(cli, list(arguments))


def scores(stage: str, row: str) -> dict[str, float]:
    return json.loads(Path(f"reports/metrics/{stage}/{row}.json").read_text())


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """All stages over all rows, and the report."""
    folder = tmp_path_factory.mktemp("experiments")
    generator = np.random.default_rng(0)
    grid = np.mgrid[0:16, 0:16]
    for domain in ("blobs", "bars"):
        (folder / "raw" / domain).mkdir(parents=True)
        for i in range(150):
            centre = generator.uniform(3, 13, (2, 1, 1))
            squares = (grid - centre) ** 2
            pixels = 255 * np.exp(-(squares.sum(0) if domain == "blobs" else squares[0]) / 8)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"raw/{domain}/{i:03d}.png")
    (folder / "params.yaml").write_text(PARAMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        params = read_params()
        for stage, table in TABLE_OF_STAGE.items():
            for row in params.rows(table):
                result = run(stage, row)
                assert result.exit_code == 0, f"{stage} {row}: {result.output}{result.exception!r}"
        result = run("report")
        assert result.exit_code == 0, f"{result.output}{result.exception!r}"
        yield folder


@pytest.fixture(autouse=True)
def _inside(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


# Quality ------------------------------------------------------------------------------------------------------------


def test_quality_stands_beside_parzen_and_names_its_network():
    for row in ("shapes-ae-lde", "shapes-vae-1-prior", "shapes-ae-gmmn"):
        found = scores("evaluate", row)
        for key in ("kid", "kid_se", "fid", "precision", "precision_se", "recall", "recall_se", "density", "coverage"):
            assert math.isfinite(found[f"classifier_{key}"]), key
        assert found["classifier_samples"] == 50
        assert math.isfinite(found["parzen_test_log_likelihood"])
        assert found["nearest_training_rmse"] > 0
        assert Path(f"reports/figures/evaluate/{row}/nearest-training-images.png").is_file()


def test_training_images_score_as_the_reference():
    control = scores("control", "shapes")
    assert abs(control["training_images_classifier_kid"]) < 5 * control["training_images_classifier_kid_se"] + 1e-3
    assert control["training_images_classifier_recall"] > 0.5
    for row in ("shapes-ae-lde", "shapes-ae-gmmn"):
        assert control["training_images_classifier_fid"] < scores("evaluate", row)["classifier_fid"]


# Interpolation ------------------------------------------------------------------------------------------------------


def test_interpolation_scores_fall_by_label():
    found = scores("evaluate", "shapes-ae-lde")
    for kind in ("same", "different"):
        curve = load_arrays("evaluate", "shapes-ae-lde", "interpolation").values[f"{kind}_mean"]
        assert len(curve) == 11
        assert np.isfinite(curve).all()
        assert found[f"interpolation_{kind}_pairs"] == 40
        ends, middle = (curve[0] + curve[-1]) / 2, np.mean(curve[4:7])
        assert found[f"interpolation_{kind}_fall"] == pytest.approx(ends - middle, abs=1e-6)
    # A prior is a density too; GMMN has no likelihood, and images only.
    assert "interpolation_same_fall" in scores("evaluate", "shapes-vae-1-prior")
    assert not [key for key in scores("evaluate", "shapes-ae-gmmn") if key.startswith("interpolation")]


def test_interpolated_images_lie_between_the_same_originals_in_all_rows():
    rows = [load_arrays("evaluate", row, "interpolation") for row in ("shapes-ae-lde", "shapes-vae-1-prior", "shapes-ae-gmmn")]
    for arrays in rows:
        assert arrays.names == ["within blobs"] * 2 + ["within bars"] * 2 + ["across"] * 2
        assert arrays.values["images"].shape == (6, len(WEIGHTS), 1, 16, 16)
        assert arrays.values["images"].dtype == np.uint8
        assert np.array_equal(arrays.values["originals"], rows[0].values["originals"])
    # Decoded ends are reconstructions of the originals: nearer to their own than to others.
    images, originals = (rows[0].values[key].astype(float) / 255 for key in ("images", "originals"))
    own = np.square(images[:, 0] - originals[:, 0]).mean()
    others = np.square(images[:, 0] - np.roll(originals[:, 0], 1, axis=0)).mean()
    assert own < others


def test_pairs_are_the_same_whatever_the_codes():
    labels = np.random.default_rng(0).integers(0, 2, 50)
    pairs = interpolation_pairs(50, labels, ("a", "b"), seed=1)
    for name, (first, last) in pairs:
        want = {"within a": (0, 0), "within b": (1, 1), "across": (0, 1)}[name]
        assert (labels[first], labels[last]) == want
        assert first != last
    assert [name for name, _ in interpolation_pairs(50, None, (), seed=1)] == ["any two"] * 4
    many = interpolation_pairs(50, np.arange(50) % 10, (), seed=1)
    assert [name for name, _ in many] == ["same label"] * 2 + ["different labels"] * 2


# Autoencoders -------------------------------------------------------------------------------------------------------


def test_a_vae_records_its_divergence():
    loose, held = scores("train", "shapes-vae-0"), scores("train", "shapes-vae-1")
    assert loose["test_kl"] > held["test_kl"] > 0
    assert held["test_kl_se"] > 0
    assert "test_kl" not in scores("train", "shapes-ae")


def test_arrays_of_reconstructions_and_codes():
    arrays = load_arrays("train", "shapes-ae", "reconstructions").values
    assert arrays["inputs"].shape == arrays["reconstructions"].shape == (10, 1, 16, 16)
    assert arrays["codes"].shape == (len(arrays["labels"]), 2)
    assert load_arrays("train", "shapes-ae", "nothing") is None


def test_principal_components_stand_beside_the_autoencoders():
    components = load_arrays("control", "shapes", "open-dimensions").values
    assert components["ks"].tolist() == [1, 2]
    assert components["mse"][0] > components["mse"][1] > 0
    autoencoder = load_arrays("train", "shapes-ae", "open-dimensions").values
    assert autoencoder["mse"][-1] == pytest.approx(scores("train", "shapes-ae")["test_mse"])
    assert opened(8) == tuple(range(1, 9))
    assert opened(100)[0] == 1
    assert opened(100)[-1] == 100
    assert len(opened(100)) < 25


# Figures ------------------------------------------------------------------------------------------------------------


def test_every_figure_is_drawn_and_has_a_caption():
    from stages.reporting.pictures import combined_pictures, pictures

    drawn = {path.stem for path in Path("reports/combined").glob("*.png")}
    assert {f"shapes-{name}" for name in COMBINED} <= drawn
    shown = [*combined_pictures("shapes"), *pictures("sample", "shapes-ae-lde"), *pictures("evaluate", "shapes-ae-lde")]
    shown += [*pictures("train", "shapes-vae-1"), *pictures("control", "shapes")]
    assert all(picture.caption for picture in shown), [picture.title for picture in shown if not picture.caption]
    names = {picture.path.stem for picture in shown}
    assert {"truncated", "nearest-training-images", "interpolations", "interpolation-log-likelihood", "codes"} <= names


def test_report_gives_quality_in_the_table():
    import pandas as pd

    board = pd.read_csv("reports/scoreboard.csv").set_index("row")
    row = board.loc["shapes-ae-lde"]
    assert row["classifier_kid"] == pytest.approx(scores("evaluate", "shapes-ae-lde")["classifier_kid"])
    assert row["classifier_precision_se"] >= 0
    assert pd.isna(row["vgg19_kid"])
    assert board.loc["shapes-training-images", "classifier_kid"] == pytest.approx(
        scores("control", "shapes")["training_images_classifier_kid"]
    )
    assert pd.isna(board.loc["shapes-kmeans", "classifier_kid"])
    for page in ("report.md", "index.html"):
        text = Path("reports", page).read_text()
        assert "in the features of classifier" in text
        assert "in the features of vgg19" not in text
        assert "coverage" in text.lower()


# Settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quality", "message"),
    [
        ({"network": "vgg19"}, "quality.weights: missing; vgg19 needs a file"),
        ({"network": "classifier", "weights": "x"}, "quality.weights: the classifier is trained here"),
        ({"network": "resnet"}, "quality.network: expected one of classifier, vgg19, inception"),
        ({"network": "classifier", "samples": 3}, "quality.samples: must be at least 20"),
    ],
)
def test_bad_quality_is_refused(quality, message):
    params = Params({"datasets": {"d": {"source": "grid", "root": "x"}}, "evaluations": {"d": {"quality": quality}}})
    assert any(message in problem for problem in params.problems())
