"""`objective: onnx`: encoders and decoders of any make, as ONNX files."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import small
from ruamel.yaml import YAML

from pipeline.settings import NamedFile
from pipeline.storage.codes import CodeReader
from pipeline.storage.shards import ShardReader
from stages.arrays import load_arrays

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

PIXELS, DIM = 64, 3  # 8x8 images


def weights(rows: int, columns: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, columns)) / np.sqrt(rows)).astype(np.float32)


def write_network(path: str, taken: list, matrix: np.ndarray, *last: str) -> None:
    """A matrix product of flattened inputs, and perhaps an activation."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["y0"])]
    nodes += [helper.make_node(name, [f"y{i}"], [f"y{i + 1}"]) for i, name in enumerate(last)]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, taken)],
        [helper.make_tensor_value_info(f"y{len(last)}", TensorProto.FLOAT, [taken[0], matrix.shape[1]])],
        [numpy_helper.from_array(matrix, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    Path(path).write_bytes(model.SerializeToString())


def write_params(evaluation: dict | None = None, **row: object) -> None:
    tables = YAML(typ="safe", pure=True).load(small.PARAMS)
    tables["controls"], tables["detections"] = {}, {}
    tables["autoencoders"] = {"blobs-onnx": {"dataset": "blobs", "objective": "onnx", **row}}
    tables["densities"] = {"blobs-gaussian": {"codes": "blobs-onnx", "dataset": "blobs", "family": "gaussian"}}
    tables["evaluations"] = {"blobs": evaluation or {}}
    with open("params.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(tables, file)


def pinned(name: str) -> str:
    return NamedFile.of(name).pinned()


def run(*stages: tuple[str, str]) -> None:
    for stage, row in stages:
        result = small.run(stage, row)
        assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TRACKING", "off")
        small.write_raw(folder, images=300)
        run(("prepare", "blobs"))
        write_network("encoder.onnx", ["n", 1, 8, 8], weights(PIXELS, DIM, 0))
        write_network("single.onnx", [1, 1, 8, 8], weights(PIXELS, DIM, 0))
        write_network("decoder.onnx", ["n", DIM], weights(DIM, PIXELS, 1), "Sigmoid")
        write_network("unbounded.onnx", ["n", DIM], 9 * weights(DIM, PIXELS, 1))
        write_network("short.onnx", ["n", DIM], weights(DIM, PIXELS - 1, 1), "Sigmoid")
        write_network("large.onnx", ["n", 1, 9, 9], weights(81, DIM, 0))
        Path("broken.onnx").write_bytes(b"x" * 100)
    return folder


@pytest.fixture(autouse=True)
def _workspace(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(prepared)
    monkeypatch.setenv("TRACKING", "off")


CHAIN = (("train", "blobs-onnx"), ("extract", "blobs-onnx"), ("fit", "blobs-gaussian"), ("sample", "blobs-gaussian"))


def naive_codes(split: str, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    images = np.concatenate([block["examples"] for block in ShardReader("data/shards/blobs").blocks(split)])
    return (images.reshape(len(images), -1) / 255 - mean) / std @ weights(PIXELS, DIM, 0)


def codes(split: str) -> np.ndarray:
    return np.concatenate([block["codes"] for block in CodeReader("data/codes/blobs-onnx").blocks(split)])


@pytest.mark.parametrize("encoder", ["encoder.onnx", "single.onnx"])
def test_given_networks_encode_decode_and_score(encoder: str) -> None:
    parzen = {"parzen": {"bandwidth_start": 0.05, "bandwidth_stop": 0.5, "bandwidth_count": 5}}
    write_params(parzen, encoder=pinned(encoder), decoder=pinned("decoder.onnx"), pixel_mean=[0.5], pixel_std=[0.25])
    result = small.run("check")
    assert result.exit_code in (0, 1)
    assert "onnx" not in result.output  # dvc.yaml isn't here; the row has no problem
    run(*CHAIN, ("evaluate", "blobs-gaussian"))
    for split in ("train", "test"):
        assert codes(split) == pytest.approx(naive_codes(split, 0.5, 0.25), abs=1e-4)
    samples = ShardReader("data/samples/blobs-gaussian").first("samples", 10)
    decoded = 1 / (1 + np.exp(-samples["codes"] @ weights(DIM, PIXELS, 1)))
    assert samples["examples"].reshape(10, -1) == pytest.approx(decoded, abs=1e-4)
    scored = small.run("score", "blobs-gaussian", "raw/blobs", "--output", "scores.csv", "--false-alarms", "0.05")
    assert scored.exit_code == 0, scored.output
    assert "reconstruction_error" in Path("scores.csv").read_text().splitlines()[0]


def test_an_encoder_alone_shows_the_nearest_training_images() -> None:
    write_params(encoder=pinned("encoder.onnx"))
    run(*CHAIN, ("evaluate", "blobs-gaussian"))
    assert codes("valid") == pytest.approx(naive_codes("valid"), abs=1e-4)
    samples = ShardReader("data/samples/blobs-gaussian")
    assert samples.index.kind == "vectors"
    shown = load_arrays("evaluate", "blobs-gaussian", "nearest-by-code")
    assert shown is not None
    drawn, train = samples.first("samples", 60)["codes"], codes("train")
    scale = np.array(CodeReader("data/codes/blobs-onnx").index.std)
    squares = np.square((drawn[:, None] - train[None]) / scale).mean(2)
    images = np.concatenate([block["examples"] for block in ShardReader("data/shards/blobs").blocks("train")])
    assert np.array_equal(shown.values["images"], images[squares.argmin(1)])
    assert shown.values["distances"] == pytest.approx(np.sqrt(squares.min(1)), rel=1e-4)
    scored = small.run("score", "blobs-gaussian", "raw/blobs", "--output", "scores.csv", "--false-alarms", "0.05")
    assert scored.exit_code == 0, scored.output
    assert "reconstruction_error" not in Path("scores.csv").read_text()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"encoder": "encoder.onnx"}, "encoder: write encoder.onnx@sha256:"),
        ({"encoder": "encoder.onnx@sha256:000000000000"}, "encoder.onnx isn't the file with the digest"),
        ({"encoder": "PINNED:broken.onnx"}, "broken.onnx can't be run"),
        ({"encoder": "PINNED:large.onnx"}, "large.onnx takes ['n', 1, 9, 9], and was given [2, 1, 8, 8]"),
        ({"encoder": "encoder.pt"}, "encoder: must name a file that ends in .onnx"),
        ({"encoder": "gone.onnx@sha256:000000000000"}, "gone.onnx is missing"),
        ({"encoder": "PINNED:encoder.onnx", "decoder": "PINNED:unbounded.onnx"}, "decoder: it gives pixels in"),
        ({"encoder": "PINNED:encoder.onnx", "decoder": "PINNED:short.onnx"}, "doesn't have the images' shape [1, 8, 8]"),
        ({"encoder": "PINNED:encoder.onnx", "pixel_mean": [0.1, 0.2]}, "pixel_mean: has 2 numbers, and the images have 1"),
        ({"encoder": "PINNED:encoder.onnx", "pixel_std": [0.0]}, "pixel_std: must be positive"),
        ({}, "encoder: missing"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_networks_that_dont_fit_are_refused_in_a_line(row: dict, message: str) -> None:
    given = {
        key: pinned(value.removeprefix("PINNED:")) if str(value).startswith("PINNED:") else value for key, value in row.items()
    }
    write_params(**given)
    result = small.run("train", "blobs-onnx")
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert result.output.count("\n") == 1


def test_every_setting_matters() -> None:
    from test_settings_matter import check

    from pipeline.autoencoders.onnx import Settings

    write_network("other.onnx", ["n", 1, 8, 8], weights(PIXELS, DIM, 5))
    write_network("another.onnx", ["n", DIM], weights(DIM, PIXELS, 6), "Sigmoid")

    def look(row: dict) -> object:
        write_params(**{key: row[key] for key in row if key not in ("dataset", "objective")})
        run(*CHAIN[:2])
        return small.files(Path("data/autoencoders")), codes("test").tobytes()

    base = {"dataset": "blobs", "objective": "onnx", "encoder": pinned("encoder.onnx"), "decoder": pinned("decoder.onnx")}
    changes = {"encoder": pinned("other.onnx"), "decoder": pinned("another.onnx"), "pixel_mean": [0.5], "pixel_std": [0.5]}
    check(Settings, base, changes, {"dataset", "objective"}, look)


def test_samples_without_a_decoder_have_no_scores_of_images() -> None:
    write_params({"parzen": {}}, encoder=pinned("encoder.onnx"))
    assert "'blobs-onnx' has no decoder, so its samples can't be compared with images" in small.run("check").output


def test_without_onnxruntime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    write_params(encoder=pinned("encoder.onnx"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = small.run("train", "blobs-onnx")
    assert result.exit_code == 1
    assert "install it: pip install '.[onnx]'" in result.output
