"""`python -m stages score`: new examples against what a row was fitted on."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from PIL import Image

from pipeline.autoencoders.common.network import Decoder, Encoder
from pipeline.densities import load_density
from pipeline.detection import calibrated, fitted, load_scorer, strange
from pipeline.errors import DataError
from pipeline.evaluation.detection import detect
from pipeline.generator import Generator
from pipeline.serving import answer
from pipeline.storage.shards import ShardReader, scale_pixels
from pipeline.system.files import read_json

DENSITIES = {"blobs-lde": "blobs-ae", "points-lde": "points"}


@pytest.fixture(scope="module")
def fitted_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with two fitted rows."""
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TRACKING", "off")
        small.write_raw(folder, images=300)
        for row, codes in DENSITIES.items():
            for stage, name in (("prepare", codes.removesuffix("-ae")), ("train", codes), ("extract", codes), ("fit", row)):
                result = small.run(stage, name)
                assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(autouse=True)
def _workspace(fitted_rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fitted_rows)
    shutil.rmtree("new", ignore_errors=True)
    Path("new").mkdir()


def score(*arguments: str) -> tuple[str, list[dict[str, str]]]:
    result = small.run("score", *arguments, "--output", "new/scores.csv")
    assert result.exit_code == 0, result.output
    with Path("new/scores.csv").open(newline="") as file:
        return result.output, list(csv.DictReader(file))


def test_images_are_scored_by_what_they_are_made_of() -> None:
    shutil.copytree("raw/blobs", "new/images/blobs")
    for i in range(4):  # of the same size, of another and in colour
        Image.new("RGB", (8 + 4 * i, 8 + 4 * i), "white").save(f"new/images/white-{i}.png")
    Path("new/images/broken.png").write_bytes(b"x")
    output, lines = score("blobs-lde", "new/images", "--false-alarms", "0.05", "--manifold")
    assert len(lines) == 304
    assert "broken.png" in output
    by_name = {line["example"]: line for line in lines}
    assert all(by_name[f"white-{i}.png"]["outlier"] == "1" for i in range(4))
    assert Path("new/scores.png").is_file()

    line = by_name["blobs/000007.png"]
    pixels = np.asarray(Image.open("raw/blobs/000007.png"))[None, None]
    encoder, decoder = (
        kind.load(f"data/autoencoders/blobs-ae/{kind.__name__.lower()}.safetensors") for kind in (Encoder, Decoder)
    )
    with torch.no_grad():
        images = torch.from_numpy(scale_pixels(pixels, (0.0, 1.0)))
        codes = encoder(images)
        expected = load_density("data/densities/blobs-lde/density.safetensors").log_prob(codes).item()
        error = (decoder(codes) - images).square().sum().item()
    assert float(line["log_likelihood"]) == pytest.approx(expected, rel=1e-4)
    assert float(line["reconstruction_error"]) == pytest.approx(error, rel=1e-4)
    assert np.isfinite(float(line["manifold_log_likelihood"]))
    assert float(line["percentile"]) == pytest.approx(100 * (1 - float(line["p_value"])), rel=1e-4)
    assert (float(line["p_value"]) <= 0.05) == (line["outlier"] == "1")


def test_the_calibration_is_that_of_validation_examples() -> None:
    reader = ShardReader("data/shards/blobs")
    scorer = load_scorer(Path("data/densities/blobs-lde/density.safetensors"), Path("data/autoencoders/blobs-ae"), reader)
    calibration, scores = calibrated(scorer, reader, quiet=True)
    for split in ("train", "valid", "test"):
        naive = scorer(np.concatenate([block["examples"] for block in reader.blocks(split)]))
        same = len(naive["log_likelihood"]) == len(scores["log_likelihood"]) and np.allclose(
            naive["reconstruction_error"], scores["reconstruction_error"]
        )
        assert same == (split == "valid")
    assert calibration.joined == pytest.approx(np.sort(calibration.join({k: v[1::2] for k, v in strange(scores).items()})))


def test_errors_relative_to_the_image() -> None:
    reader = ShardReader("data/shards/blobs")
    files = Path("data/densities/blobs-lde/density.safetensors"), Path("data/autoencoders/blobs-ae")
    pixels = reader.first("test", 10)["examples"]
    absolute, relative = (load_scorer(*files, reader, relative_error=chosen)(pixels) for chosen in (False, True))
    energy = np.square(pixels / 255).sum((1, 2, 3))
    assert relative["reconstruction_error"] == pytest.approx(absolute["reconstruction_error"] / (1 + energy), rel=1e-5)
    assert np.array_equal(relative["log_likelihood"], absolute["log_likelihood"])
    _, lines = score("blobs-lde", "raw/blobs", "--relative-error", "--false-alarms", "0.05")
    by_name = {line["example"]: float(line["reconstruction_error"]) for line in lines}
    alone = load_scorer(*files, reader, relative_error=True)(np.asarray(Image.open("raw/blobs/000007.png"))[None, None])
    assert by_name["000007.png"] == pytest.approx(alone["reconstruction_error"][0], rel=1e-4)


def test_detect_score_export_and_a_served_model_have_the_same_errors() -> None:
    """Those of the row's detection, relative to the image."""
    text = Path("params.yaml").read_text()
    shutil.copytree("raw/blobs", "new/raw/blobs")
    for path in list(Path("new/raw/blobs").iterdir())[:100]:
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    table = "{density: blobs-lde, family: lde, codes: blobs-ae, dataset: blobs, outliers: mixed"
    table += ", error: relative, false_alarms: 0.05}"
    mixed = "  mixed: {source: images, root: new/raw/blobs, image_px: 8, channels: 1, valid_share: 0.2, test_share: 0.4}\n"
    text = text.replace("datasets:\n", f"datasets:\n{mixed}")
    Path("params.yaml").write_text(text.replace("detections: {}", f"detections:\n  found: {table}"))
    try:
        for arguments in (("prepare", "mixed"), ("detect", "found"), ("export", "blobs-lde", "--to", "new/export")):
            assert small.run(*arguments).exit_code == 0
        _, lines = score("blobs-lde", "raw/blobs", "--false-alarms", "0.05")
        _, absolute = score("blobs-lde", "raw/blobs", "--absolute-error", "--false-alarms", "0.05")
        row = Generator.load("blobs-lde")
    finally:
        Path("params.yaml").write_text(text.replace(mixed, ""))
    listed = {key: [float(line[key]) for line in lines] for key in ("reconstruction_error", "strangeness")}
    pixels = np.stack([np.asarray(Image.open(Path("raw/blobs", line["example"])))[None] for line in lines])
    generator = Generator.load("new/export")
    scores, compared = generator.score(pixels), generator.strangeness(pixels)
    requests = [{"query": "score", "false_alarms": 0.05, "example": (image / 255).tolist()} for image in pixels]
    served = answer(generator, requests)
    for name, values in (
        ("reconstruction_error", scores.reconstruction_error), ("reconstruction_error", row.score(pixels).reconstruction_error),
        ("strangeness", compared.strangeness),
    ):  # fmt: skip
        assert np.allclose(values, listed[name], rtol=1e-4, atol=1e-6), name
        assert np.allclose([found[name] for found in served], listed[name], rtol=1e-4, atol=1e-6), name
        assert not np.allclose([float(line[name]) for line in absolute], listed[name], rtol=0.1), name

    kinds = [
        generator.strangeness(ShardReader(f"data/shards/{name}").first("test", 1000)["examples"]) for name in ("blobs", "mixed")
    ]
    measured = read_json(Path("reports/metrics/detect/found.json"))
    assert measured["auroc"] == pytest.approx(detect(*(kind.strangeness for kind in kinds)).auroc, abs=1e-4)


@pytest.mark.parametrize("ending", [".npy", ".csv"])
def test_vectors_come_with_the_dimensions_that_count(ending: str) -> None:
    points = np.array([[0.0, 0.0], [0.0, 9.0], [-8.0, 0.1]], np.float32)
    path = Path(f"new/points{ending}")
    np.save(path, points) if ending == ".npy" else path.write_text("a,b\n" + "".join(f"{x},{y}\n" for x, y in points))
    _, lines = score("points-lde", str(path))
    assert [line["outlier"] for line in lines] == ["0", "1", "1"]
    first, second = ("a", "b") if ending == ".csv" else ("0", "1")
    assert lines[1]["dimensions"].startswith(f"{second} +")
    assert lines[2]["dimensions"].startswith(f"{first} +")
    assert "reconstruction_error" not in lines[0]


def test_without_a_share_few_examples_have_the_least_that_they_allow() -> None:
    output, lines = score("blobs-lde", "raw/blobs")
    calibrating = ShardReader("data/shards/blobs").index.count("valid") // 2
    share = math.ceil(1000 / (calibrating + 1)) / 1000
    assert share > 0.01
    assert f"at most {100 * share:.3g} %" in output
    assert all((line["outlier"] == "1") == (float(line["p_value"]) <= share) for line in lines)
    output, _ = score("points-lde", "raw/points.npy")  # with enough of them
    assert "at most 1 %" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("blobs-lde", "new/gone"), "new/gone is missing"),
        (("blobs-lde", "new"), "holds no image"),
        (("points-lde", "new/wide.npy"), "has 3 columns of numbers, and the row takes vectors of 2"),
        (("points-lde", "new/nan.npy"), "row 1, column '0' is missing or not finite"),
        (("points-lde", "raw/points.npy", "--false-alarms", "0.0001"), "takes at least 9999 validation examples"),
        (("blobs", "raw/blobs"), "'blobs' is no row of densities"),
    ],
    ids=str,
)
def test_what_can_not_be_scored_is_refused_in_a_line(arguments: tuple[str, ...], message: str) -> None:
    np.save("new/wide.npy", np.zeros((4, 3), np.float32))
    np.save("new/nan.npy", np.array([[0.0, 0.0], [np.nan, 0.0]]))
    result = small.run("score", *arguments, "--output", "new/scores.csv")
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.count("\n") == 1
    assert not [path for path in Path("new").iterdir() if "scores" in path.name]


def test_examples_of_another_shape_are_fitted() -> None:
    colour = np.zeros((2, 3, 16, 16), np.uint8)
    colour[:, 0] = 255
    grey = fitted(colour, (1, 8, 8), "other")
    assert grey.shape == (2, 1, 8, 8)
    assert grey == pytest.approx(0.299, abs=1e-6)
    assert fitted(colour, (3, 16, 16), "other") is colour
    patches = fitted(np.zeros((2, 63), np.float32), (1, 28, 28), "patches", patches=True)
    assert patches.shape == (2, 1, 28, 28)
    assert patches == pytest.approx(0.5)
    with pytest.raises(DataError, match="'vectors' holds examples with shape"):
        fitted(np.zeros((2, 63), np.float32), (1, 28, 28), "vectors")
