"""A trained generator as a self-contained folder, as a registered model, and behind HTTP."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small
import torch
from mlflow.exceptions import MlflowException

from pipeline.autoencoders.common.network import Decoder
from pipeline.autoencoders.common.options import ConvolutionOptions
from pipeline.densities import LatentDensityEstimator, load_density
from pipeline.errors import DataError
from pipeline.sampling import draw
from pipeline.storage.columns import Column, from_codes, load_columns, save_columns
from stages.tracking.serving import generate, log_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("generator")
    torch.manual_seed(0)
    LatentDensityEstimator(3, components=2).save(folder / "density.safetensors")
    Decoder(ConvolutionOptions(blocks=1, latent_dim=3, base_channels=4), (1, 8, 8)).save(folder / "decoder.safetensors")
    return folder / "density.safetensors", folder / "decoder.safetensors"


def requests(*pairs: tuple[object, object]) -> pd.DataFrame:
    return pd.DataFrame(pairs, columns=["count", "seed"])


def test_a_request_gives_the_same_images_as_the_stage(generator: tuple[Path, Path]) -> None:
    density, decoder = load_density(generator[0]), Decoder.load(generator[1])
    answer = generate(density, decoder, requests((3, 7), (2, 8), (3, 7)))
    assert answer["request"].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert answer["shape"].tolist() == [[1, 8, 8]] * 8
    images = np.array(answer["sample"].tolist(), np.float32).reshape(8, 1, 8, 8)
    assert np.array_equal(images[:3], draw(density, decoder, 3, 7)[0])
    assert np.array_equal(images[:3], images[5:])
    assert images.min() >= 0
    assert images.max() <= 1


def test_without_a_decoder_the_codes_are_the_samples(generator: tuple[Path, Path]) -> None:
    density = load_density(generator[0])
    answer = generate(density, None, requests((4, 0)))
    assert np.array_equal(np.array(answer["sample"].tolist(), np.float32), draw(density, None, 4, 0)[0])
    assert answer["shape"].tolist() == [[3]] * 4


def test_samples_of_a_table_are_in_its_units(generator: tuple[Path, Path], tmp_path: Path) -> None:
    density = load_density(generator[0])
    columns = [Column(name="when", shift=1.7e9, scale=2.0), Column(name="one", constant=1.0)]
    columns += [Column(name="die", levels=(1.0, 2.0, 3.0)), Column(name="x")]
    save_columns(columns, tmp_path / "columns.json")
    assert load_columns(tmp_path / "columns.json") == tuple(columns)
    answer = generate(density, None, requests((4, 0)), load_columns(tmp_path / "columns.json"))
    rows = np.array(answer["sample"].tolist())
    assert answer["shape"].tolist() == [[4]] * 4
    assert np.array_equal(rows, from_codes(columns, draw(density, None, 4, 0)[1]))
    assert set(rows[:, 1]) == {1.0}
    assert set(rows[:, 2]) <= {1.0, 2.0, 3.0}
    for text in ("{", "[1]", '[{"name": "a", "scale": -1}]'):
        (tmp_path / "columns.json").write_text(text)
        with pytest.raises(DataError, match="columns"):
            load_columns(tmp_path / "columns.json")


NOT_WHOLE = [
    [],
    [(0, 0)],
    [(-1, 0)],
    [(1, -1)],
    [(2.5, 0)],
    [(1, 0.0)],
    [("2", 0)],
    [(None, 0)],
    [(True, 0)],
    [([1], 0)],
    [(1, 2**63)],
]


def test_the_seed_can_be_left_out(generator: tuple[Path, Path]) -> None:
    density = load_density(generator[0])
    without = [generate(density, None, pd.DataFrame({"count": [2]}))["sample"].tolist() for _ in range(2)]
    assert without[0] != without[1]
    null = generate(density, None, requests((2, None)))["sample"].tolist()
    assert null not in without


@pytest.mark.parametrize("pairs", NOT_WHOLE)
def test_impossible_requests_are_refused(generator: tuple[Path, Path], pairs: list[tuple[object, object]]) -> None:
    with pytest.raises(MlflowException, match="count must be a whole number, at least 1") as refused:
        generate(load_density(generator[0]), None, requests(*pairs))
    assert refused.value.get_http_status_code() == 400


@pytest.mark.parametrize("pairs", [[(62_501, 0)], [(40_000, 0), (40_000, 1)], [(2**70, 0)]])
def test_the_limit_is_of_values(generator: tuple[Path, Path], pairs: list[tuple[int, int]]) -> None:
    density, decoder = load_density(generator[0]), Decoder.load(generator[1])
    with pytest.raises(MlflowException, match="count must be at most 62500 in all, of 64 values each"):
        generate(density, decoder, requests(*pairs))


def test_export_makes_a_folder_that_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.write_raw(tmp_path)
    monkeypatch.chdir(tmp_path)
    for stage in small.STAGES:
        if stage[1].startswith("points") and stage[0] not in ("sample", "evaluate"):
            assert small.run(*stage).exit_code == 0
    result = small.run("export", "points-lde")
    folder = Path("data/exports/points-lde")
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, f"exported to {folder}")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "columns.json", "density.safetensors", "generator.json"]
    names: dict[str, object] = {}
    code = "\n".join(line.strip() for line in result.stdout.splitlines()[2:])  # as said
    exec(code, names)
    assert np.array_equal(names["samples"], draw(load_density(folder / "density.safetensors"), None, 16, 0)[0])
    (lines,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(folder)
    exec(lines, names)
    monkeypatch.chdir(tmp_path)
    assert names["scores"].log_prob.shape == (16,)
    assert small.run("export", "points-lde").exit_code == 0
    taken = small.run("export", "points-lde", "--to", "raw")
    assert taken.exit_code == 1
    assert taken.stderr == "error: export points-lde: raw exists and is no exported generator; name another folder\n"
    assert small.run("export", "blobs-lde").exit_code == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_registered_model_answers_over_http(
    generator: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = mlflow.MlflowClient(uri, registry_uri=uri)
    experiment = client.create_experiment("serving", artifact_location=(tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment)
    log_model(run.info.run_id, "blobs", str(generator[0]), str(generator[1]))
    assert [v.version for v in client.search_model_versions("name='blobs'")] in ([1], ["1"])
    stored = [p for p in (tmp_path / "artifacts").rglob("*") if p.is_file()]
    assert not [p for p in stored if p.suffix in (".pkl", ".pickle", ".pt", ".pth")]
    assert {"density.safetensors", "decoder.safetensors", "serving.py"} <= {p.name for p in stored}
    description = next(p for p in stored if p.name == "MLmodel").read_text()
    assert not re.search(r"(^|[\s'\"])(file:|/)", description), description
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["models", "serve", "-m", "models:/blobs/1", "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    server = subprocess.Popen([sys.executable, "-m", "mlflow", *command, "--workers", "1"], cwd=ROOT, env=environment)
    try:
        body = json.dumps({"dataframe_split": {"columns": ["count", "seed"], "data": [[2, 5]]}}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"})
        for _ in range(240):
            try:
                with urllib.request.urlopen(request, timeout=30) as response:
                    answer = json.load(response)["predictions"]
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, "the server has ended"
                time.sleep(0.5)
        images = np.array([row["sample"] for row in answer], np.float32).reshape(2, 1, 8, 8)
        for count, seed in ((2.5, 0), (-1, 0), (1, -1), (10**6, 0), ("x", 0)):
            body = json.dumps({"dataframe_split": {"columns": ["count", "seed"], "data": [[count, seed]]}}).encode()
            request.data = body
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=30)
            said = refused.value.read().decode()
            assert (refused.value.code, "count must be" in said) == (400, True)
            assert "stack_trace" not in said
            assert str(ROOT) not in said
        expected = draw(load_density(generator[0]), Decoder.load(generator[1]), 2, 5)[0]
        assert np.allclose(images, expected, atol=1e-6)
    finally:
        server.terminate()
        server.wait(30)
