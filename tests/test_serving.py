"""A trained generator as a self-contained folder, as a registered model, and behind HTTP."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from PIL import Image

from pipeline.autoencoders.common.network import Decoder, Encoder
from pipeline.autoencoders.common.options import ConvolutionOptions
from pipeline.densities import LatentDensityEstimator, load_density
from pipeline.densities.common import context as contexts
from pipeline.densities.gaussian import Gaussian
from pipeline.errors import DataError, PipelineError
from pipeline.evaluation.detection import Calibration
from pipeline.generator import Generator
from pipeline.sampling import draw
from pipeline.serving import Limits, answer
from pipeline.storage.columns import Column, from_codes, load_columns, save_columns
from stages.tracking.serving import log_model, predicted

ROOT = Path(__file__).resolve().parents[1]


IMAGES = ConvolutionOptions(blocks=1, latent_dim=3, base_channels=4)


def labelled() -> contexts.Context:
    """Labels 3 and 7, which are called 3 and 7."""
    context = contexts.Context([contexts.Column(name="labels", levels=(3.0, 7.0), words=("3", "7"))], 2, complete=True)
    context.rows.copy_(torch.tensor([[3.0], [7.0]]))
    return context


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator of images as `export` writes it."""
    folder = tmp_path_factory.mktemp("generator")
    torch.manual_seed(0)
    LatentDensityEstimator(3, components=2, context=labelled()).save(folder / "density.safetensors")
    Decoder(IMAGES, (1, 8, 8)).save(folder / "decoder.safetensors")
    Encoder(IMAGES, (1, 8, 8)).save(folder / "encoder.safetensors")
    return folder


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    """The same, which knows how strange its own samples are."""
    found = Generator.load(folder)
    scores = found.score(found.sample(200, seed=1))
    own = {"log_likelihood": -scores.log_prob, "reconstruction_error": scores.reconstruction_error}
    found.calibration = Calibration(own)
    return found


@pytest.fixture(scope="module")
def rows() -> Generator:
    """A generator of rows: a time, a constant, a die, and a number that depends on the time."""
    columns = [Column(name="when", shift=1.7e9, scale=2.0), Column(name="one", constant=1.0)]
    columns += [Column(name="die", levels=(1.0, 2.0, 3.0)), Column(name="x")]
    density = Gaussian(3)
    covariance = torch.tensor([[1.0, 0.0, 0.9], [0.0, 1.0, 0.0], [0.9, 0.0, 1.0]])
    density.standardise(torch.tensor([0.0, 2.0, 0.0]), torch.linalg.cholesky(covariance))
    return Generator(density.eval(), columns=columns)


def test_a_request_gives_the_same_images_as_the_stage(generator: Generator) -> None:
    answers = answer(generator, [{"count": 3, "seed": 7}, {"count": 2, "seed": 8}, {"query": None, "count": 3, "seed": 7}])
    assert [row["request"] for row in answers] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert all(row["shape"] == [1, 8, 8] for row in answers)
    images = np.array([row["sample"] for row in answers], np.float32).reshape(8, 1, 8, 8)
    assert np.array_equal(images[:3], draw(generator.density, generator.decoder, 3, 7)[0])
    assert np.array_equal(images[:3], images[5:])
    assert images.min() >= 0
    assert images.max() <= 1
    assert {row["context"] for row in answers} == {"3", "7"}


def test_samples_of_a_label_as_png_files(generator: Generator) -> None:
    answers = answer(generator, [{"count": 20, "seed": 7, "label": 7, "format": "png"}])
    assert {row["context"] for row in answers} == {"7"}
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(row["png"])))) for row in answers]
    expected = draw(generator.density, generator.decoder, 20, 7, context=torch.tensor([7.0]))[0]
    assert np.array_equal(images, np.rint(255 * expected[:, 0]))
    assert np.array_equal(generator.sample(20, 7, label="7"), expected)
    assert answer(generator, [{"count": 1, "context": {"labels": "3"}}])[0]["context"] == "3"


def test_scores_are_those_of_the_library(generator: Generator) -> None:
    images = np.rint(255 * generator.sample(5, seed=2)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(images[0, 0]).save(file, "PNG")
    examples = [base64.b64encode(file.getvalue()).decode(), *(images[1:] / 255).tolist()]
    answers = answer(generator, [{"query": "score", "example": example} for example in examples])
    scores, compared = generator.score(images), generator.strangeness(images)
    for name, values in (
        ("log_likelihood", scores.log_prob), ("reconstruction_error", scores.reconstruction_error),
        ("strangeness", compared.strangeness), ("p_value", compared.p_value), ("outlier", compared.p_value <= 0.01),
    ):  # fmt: skip
        assert np.allclose([row[name] for row in answers], values, atol=1e-4), name
    noise = np.random.default_rng(0).random(64).tolist()
    assert answer(generator, [{"query": "score", "example": noise, "false_alarms": 0.05}])[0]["outlier"]
    with pytest.raises(DataError, match="validation examples to calibrate on"):
        answer(generator, [{"query": "score", "example": noise, "false_alarms": 1e-6}])
    with pytest.raises(DataError, match="only rows of a table can be completed, not images"):
        answer(generator, [{"query": "complete", "example": noise}])
    plain = Generator(generator.density, generator.decoder, generator.encoder)
    assert set(answer(plain, [{"query": "score", "example": noise}])[0]) == {
        "request", "log_likelihood", "reconstruction_error",
    }  # fmt: skip


def test_samples_of_a_table_are_in_its_units(rows: Generator, tmp_path: Path) -> None:
    save_columns(rows.columns, tmp_path / "columns.json")
    assert load_columns(tmp_path / "columns.json") == rows.columns
    answers = answer(rows, [{"count": 4, "seed": 0}])
    values = np.array([row["sample"] for row in answers])
    assert [row["shape"] for row in answers] == [[4]] * 4
    assert np.array_equal(values, from_codes(rows.columns, draw(rows.density, None, 4, 0)[1]))
    assert set(values[:, 1]) == {1.0}
    assert set(values[:, 2]) <= {1.0, 2.0, 3.0}
    for text in ("{", "[1]", '[{"name": "a", "scale": -1}]'):
        (tmp_path / "columns.json").write_text(text)
        with pytest.raises(DataError, match="columns"):
            load_columns(tmp_path / "columns.json")


def test_rows_are_completed(rows: Generator) -> None:
    incomplete = [1.7e9 + 4, None, None, None]
    means, whole = answer(
        rows, [{"query": "complete", "example": example, "seed": 0} for example in (incomplete, [1.7e9, 1, 2, 0])]
    )
    assert means["sample"][:2] == [1.7e9 + 4, 1.0]
    assert means["sample"][2] in (1.0, 2.0, 3.0)  # and not in between, as the mean of draws is
    assert abs(means["sample"][3] - 0.9 * 2) < 0.2
    assert means["spread"][0] is None
    assert 0.3 < means["spread"][3] < 0.6  # sqrt(1 - 0.81) = 0.44
    assert (whole["sample"], whole["spread"]) == ([1.7e9, 1.0, 2.0, 0.0], [None] * 4)
    drawn = answer(rows, [{"query": "complete", "example": incomplete, "count": 3, "seed": 1}])
    assert np.array_equal([row["sample"] for row in drawn], rows.complete([[1.7e9 + 4, *[np.nan] * 3]], 3, seed=1)[:, 0])


def test_the_seed_can_be_left_out(generator: Generator) -> None:
    without = [answer(generator, [{"count": 2, "seed": None}]) for _ in range(2)]
    assert without[0][0]["sample"] != without[1][0]["sample"]
    mixed = predicted(generator, pd.DataFrame([{"count": 2, "seed": 5}, {"count": 1}]))  # pandas makes floats of 5 and null
    assert mixed["sample"][0] == answer(generator, [{"count": 2, "seed": 5}])[0]["sample"]


COUNT, SEED = "count must be a whole number, at least 1", "seed must be a whole number, at least 0 and at most 2^63 - 1"
FORMAT, EXAMPLE = "format must be numbers, or png", "example must be 1 x 8 x 8 numbers in 0..1, or an image file in base64"
REFUSED = [
    ({}, COUNT),
    ({"count": 0}, COUNT),
    ({"count": -1}, COUNT),
    ({"count": 2.5}, COUNT),
    ({"count": "2"}, COUNT),
    ({"count": True}, COUNT),
    ({"count": [1]}, COUNT),
    ({"count": 1, "seed": -1}, SEED),
    ({"count": 1, "seed": 0.0}, SEED),
    ({"count": 1, "seed": 2**63}, SEED),
    ({"count": 1, "format": "gif"}, FORMAT),
    ({"count": 1, "label": "4"}, "labels: no training code has '4'; known: 3, 7"),
    ({"count": 1, "label": [7]}, "label must be a word or a number"),
    ({"count": 1, "context": {"ward": "a"}}, "ward: no column of this density's context, which has labels"),
    ({"count": 1, "context": 7}, "context must map columns to words or numbers"),
    ({"count": 1, "context": {"labels": [7]}}, "context must map columns to words or numbers"),
    ({"count": 1, "example": [1]}, "'example' is no key of draw; known: count, seed, label, context, format"),
    ({"query": "delete"}, "query must be one of draw, score, complete, the same in all rows"),
    ({"query": ["draw"]}, "query must be one of draw, score, complete, the same in all rows"),
    ({"query": "score"}, EXAMPLE),
    ({"query": "score", "example": [0.5] * 63}, EXAMPLE),
    ({"query": "score", "example": [0.5] * 63 + [None]}, EXAMPLE),
    ({"query": "score", "example": [0.5] * 63 + [1.5]}, EXAMPLE),
    ({"query": "score", "example": [[0.5] * 32, [0.5] * 31]}, EXAMPLE),
    ({"query": "score", "example": {"a": 1}}, EXAMPLE),
    ({"query": "score", "example": "c3R1ZmY="}, "example is no image file in base64"),
    ({"query": "score", "example": "/etc/passwd"}, "example is no image file in base64"),
    ({"query": "score", "example": [0.5] * 64, "false_alarms": 2}, "false_alarms must be a share between 0 and 1"),
    ({"query": "complete", "example": [0.5] * 64}, "only rows of a table can be completed"),
]


@pytest.mark.parametrize(("request_", "said"), REFUSED)
def test_impossible_requests_are_refused(generator: Generator, request_: dict[str, object], said: str) -> None:
    with pytest.raises(PipelineError, match=re.escape(said)):
        answer(generator, [request_])
    with pytest.raises(PipelineError, match=re.escape(said)):
        answer(generator, [request_, request_])


@pytest.mark.parametrize("counts", [[62_501], [40_000, 40_000], [2**70]])
def test_the_limit_is_of_values(generator: Generator, counts: list[int]) -> None:
    with pytest.raises(DataError, match="count must be at most 62500 in all, of 64 values each"):
        answer(generator, [{"count": count} for count in counts])


def test_limits_are_configured(generator: Generator, rows: Generator) -> None:
    limits = Limits(values=12, examples=2)
    hole = [None, 1.0, 1.0, 0.0]
    for asked, given, said in (
        (generator, [{"count": 1}], "count must be at most 0 in all, of 64 values each"),
        (rows, [{"query": "complete", "example": hole, "count": 4}], "count must be at most 3 in all, of 4 values each"),
        (rows, [{"query": "score", "example": [0.0] * 4}] * 3, "there are 3 examples, and a request takes at most 2"),
    ):
        with pytest.raises(DataError, match=said):
            answer(asked, given, limits)


class Model:
    """What MLflow's server asks."""

    metadata = None

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def predict(self, requests: pd.DataFrame, params: object = None) -> pd.DataFrame:
        return predicted(self.generator, requests)


def over_http(generator: Generator, body: bytes) -> tuple[int, str]:
    """Status and body of what MLflow's server answers, without the network."""
    try:
        reply = scoring_server.invocations(body, "application/json", Model(generator), None)
    except MlflowException as error:
        return error.get_http_status_code(), error.serialize_as_json()
    return reply.status, reply.response


def test_what_the_server_says_is_one_line(generator: Generator, capsys: pytest.CaptureFixture[str]) -> None:
    def asked(**keys: object) -> tuple[int, str]:
        return over_http(generator, json.dumps({"dataframe_records": [keys]}).encode())

    status, text = asked(count=2, seed=5)
    assert status == 200
    assert np.allclose(json.loads(text)["predictions"][0]["sample"], generator.sample(2, 5)[0].ravel())
    for keys in ({"count": 0}, {"query": "score", "example": [1]}, {"query": "complete", "example": []}, {"nothing": 1}):
        status, text = asked(**keys)
        assert (status, "stack_trace" in text, str(ROOT) in text) == (400, False, False)
        assert "\n" not in json.loads(text)["message"]
    for body in (b"{", b"[1]", b"{}", b'{"dataframe_records": 5}', b'{"dataframe_split": {"data": [[1]]}}', b"\xff"):
        status, text = over_http(generator, body)
        assert (status, "stack_trace" in text, str(ROOT) in text) == (400, False, False), text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "draw", lambda *arguments: 1 / 0)
        status, text = asked(count=1)
    assert (status, json.loads(text)["message"]) == (500, "the server failed; its log says why")
    assert "ZeroDivisionError" in capsys.readouterr().err


class Recorder:
    """Keeps what it is sent, and registers nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __getattr__(self, method: str) -> Any:
        return lambda *_, **values: self.calls.append((method, values))


def test_export_makes_a_folder_that_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.write_raw(tmp_path)
    monkeypatch.chdir(tmp_path)
    for stage in small.STAGES:
        if stage[1].startswith("points") and stage[0] not in ("sample", "evaluate"):
            assert small.run(*stage).exit_code == 0
    recorder = Recorder()
    monkeypatch.setattr("stages.tracking.client.Tracker", lambda *_: recorder)
    result = small.run("export", "points-lde")
    model = dict(recorder.calls)["model"]
    assert model["name"] == "points-lde"
    assert model["about"].startswith("Generator of the row `points-lde`")
    assert "\n- test log-likelihood -" in model["about"]
    assert model["about"].endswith('A request:\n\n    {"dataframe_records": [{"count": 4}]}')
    assert float(model["tags"]["test_log_likelihood"]) < 0
    folder = Path("data/exports/points-lde")
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, f"exported to {folder}")
    expected = ["README.md", "calibration.safetensors", "columns.json", "density.safetensors", "generator.json"]
    assert sorted(p.name for p in folder.iterdir()) == expected
    names: dict[str, object] = {}
    code = "\n".join(line.strip() for line in result.stdout.splitlines()[2:])  # as said
    exec(code, names)
    assert np.array_equal(names["samples"], draw(load_density(folder / "density.safetensors"), None, 16, 0)[0])
    (lines,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(folder)
    exec(lines, names)
    monkeypatch.chdir(tmp_path)
    assert names["scores"].log_prob.shape == names["p_values"].shape == (16,)
    assert small.run("score", "points-lde", "raw/points.npy", "--output", "scores.csv").exit_code == 0
    listed = pd.read_csv("scores.csv")[:256]
    compared = Generator.load(folder).strangeness(np.load("raw/points.npy")[:256])
    assert np.allclose(compared.strangeness, listed["strangeness"], rtol=1e-5, atol=1e-5)
    assert np.allclose(compared.p_value, listed["p_value"], rtol=1e-5)
    assert small.run("export", "points-lde").exit_code == 0
    taken = small.run("export", "points-lde", "--to", "raw")
    assert taken.exit_code == 1
    assert taken.stderr == "error: export points-lde: raw exists and is no exported generator; name another folder\n"
    assert small.run("export", "blobs-lde").exit_code == 1


def documented() -> list[str]:
    """The requests of docs/running.md."""
    return re.findall(r"^    (curl .*)$", (ROOT / "docs/running.md").read_text(), flags=re.MULTILINE)


def test_the_documented_requests_are_answered(generator: Generator, rows: Generator) -> None:
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    photo = base64.b64encode(file.getvalue()).decode()
    answers = []
    for command in documented():
        (body,) = re.findall(r"-d '(.*)'$", command.replace("'$(base64 -w 0 photo.png)'", photo))
        status, text = over_http(rows if "null" in body else generator, body.encode())
        assert status == 200, text
        answers.append(json.loads(text)["predictions"])
    assert [len(rows) for rows in answers] == [4, 4, 1, 1]
    assert [sorted(rows[0])[-1] for rows in answers] == ["shape", "request", "strangeness", "spread"]


@contextlib.contextmanager
def served(folder: Path, name: str, scratch: Path, **variables: str) -> Iterator[int]:
    """The port of a server of an exported generator."""
    import mlflow

    uri = f"sqlite:///{scratch}/mlflow.db"
    client = mlflow.MlflowClient(uri, registry_uri=uri)
    experiment = client.create_experiment(name, artifact_location=(scratch / "artifacts" / name).as_uri())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        address = log_model(client.create_run(experiment).info.run_id, name, str(folder))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["models", "serve", "-m", address, "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "mlflow", *command, "--workers", "1"]
    server = subprocess.Popen(command, cwd=ROOT, env=environment | variables)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=30)
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, "the server has ended"
                time.sleep(0.5)
        else:
            pytest.fail("the server hasn't answered within five minutes")
        yield port
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_registered_model_answers_over_http(
    folder: Path, generator: Generator, rows: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("photo.png")
    for name in ("images", "table"):
        shutil.copytree(folder, tmp_path / name)
    for name in ("decoder", "encoder"):
        (tmp_path / f"table/{name}.safetensors").unlink()
    rows.density.save(tmp_path / "table/density.safetensors")
    save_columns(rows.columns, tmp_path / "table/columns.json")

    def curl(command: str, port: int) -> tuple[int, str]:
        command = command.replace("127.0.0.1:5001", f"127.0.0.1:{port}")
        done = subprocess.run(
            ["bash", "-c", f"{command} --silent --noproxy '*' --write-out '\\n%{{http_code}}'"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        text, _, status = done.stdout.rpartition("\n")
        return int(status), text

    def asked(body: str, port: int) -> tuple[int, str]:
        start = documented()[0].partition(" -d ")[0]
        return curl(f"{start} -d {shlex.quote(body)}", port)

    with served(tmp_path / "images", "images", tmp_path) as port:
        for command in documented()[:3]:
            status, text = curl(command, port)
            assert status == 200, text
        stored = [p for p in (tmp_path / "artifacts").rglob("*") if p.is_file()]
        assert not [p for p in stored if p.suffix in (".pkl", ".pickle", ".pt", ".pth")]
        assert {"density.safetensors", "decoder.safetensors", "serving.py"} <= {p.name for p in stored}
        description = next(p for p in stored if p.name == "MLmodel").read_text()
        assert not re.search(r"(^|[\s'\"])(file:|/)", description), description
        body = {"dataframe_split": {"columns": ["count", "seed"], "data": [[2, 5]]}}
        status, text = asked(json.dumps(body), port)
        images = np.array([row["sample"] for row in json.loads(text)["predictions"]], np.float32).reshape(2, 1, 8, 8)
        assert np.allclose(images, generator.sample(2, 5), atol=1e-6)
        for keys, said in REFUSED:
            status, text = asked(json.dumps({"dataframe_records": [keys]}), port)
            assert (status, "stack_trace" in text, str(ROOT) in text) == (400, False, False), text
            if keys:  # without any, MLflow makes no row of it
                assert said in json.loads(text)["message"].replace('\\"', '"')
        for body in (
            "{",
            "[1]",
            "{}",
            "1",
            '{"dataframe_records": 5}',
            '{"dataframe_split": {"data": [[1]]}}',
            '{"inputs": "a"}',
        ):
            status, text = asked(body, port)
            assert (status, "stack_trace" in text, str(ROOT) in text) == (400, False, False), text
    with served(tmp_path / "table", "table", tmp_path, SERVING_MODEL_CONFIG='{"values": 4}') as port:
        status, text = curl(documented()[3], port)
        assert status == 200, text
        status, text = asked('{"dataframe_records": [{"count": 2}]}', port)
        assert (status, json.loads(text)["message"]) == (400, "count must be at most 1 in all, of 4 values each")


def test_a_request_of_unknown_keys_alone_is_told_the_known_ones() -> None:
    # MLflow leaves out keys that no query has, and with them the only row.
    with pytest.raises(DataError, match="no request; its keys are query, count, seed, label, context, format, example"):
        answer(Generator(LatentDensityEstimator(3)), [])
