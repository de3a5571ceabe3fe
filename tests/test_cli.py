"""The command line: it answers fast, and shows what it would do and the state of each row."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterable
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from ruamel.yaml import YAML

from pipeline.settings import read_params
from stages.__main__ import STAGES, TOOLS, cli
from stages.reporting.states import states
from stages.run import _place
from stages.workspace import TABLE_OF_STAGE

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "torch",
    "torchvision",
    "mlflow",
    "dvc",
    "numpy",
    "scipy",
    "pandas",
    "matplotlib",
    "sklearn",
    "zuko",
    "webdataset",
    "PIL",
)

PARAMS = """\
datasets:
  digits: {source: digits5k, root: pipeline/sources/digits5k.py}
  grid: {source: grid, root: pipeline/sources/grid.py}
  sevens: {source: digits5k, root: pipeline/sources/digits5k.py, classes: [7]}
controls:
  digits: {dataset: digits}
autoencoders:
  digits-ae: {dataset: digits, objective: ae, latent_dim: 8, blocks: 1}
  grid: {dataset: grid, objective: identity}
densities:
  digits-ae-lde: {codes: digits-ae, dataset: digits, family: lde}
  grid-lde: {codes: grid, dataset: grid, family: lde, learning_rate: 1e-4, components: 5}
sampling: {count: 50}
evaluations:
  digits: {parzen: {}}
  grid: {}
detections:
  sevens: {density: digits-ae-lde, family: lde, codes: digits-ae, dataset: digits, outliers: sevens}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with its own rows and the pipeline's code, in which nothing has run yet."""
    (tmp_path / "params.yaml").write_text(PARAMS)
    for name in ("pipeline", "stages", "dvc.yaml", "presets"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKING", "off")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


# Help ---------------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    code = f"""
import sys
from click.testing import CliRunner
from stages.__main__ import STAGES, TOOLS, cli
for command in [[], ["preset", "list"], ["preset", "show"], ["preset", "add"], *([c] for c in [*STAGES, *TOOLS])]:
    result = CliRunner().invoke(cli, [*command, "--help"])
    assert result.exit_code == 0 and "Usage: " in result.output, (command, result.output)
    assert not (loaded := [name for name in {HEAVY} if name in sys.modules]), (command, loaded)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_the_overview_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", "-m", "stages"]
    done = subprocess.run(command, cwd=ROOT, check=True, timeout=60, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "stages.tools.overview" in imported
    assert not imported & set(HEAVY)


@pytest.mark.parametrize("command", [*STAGES, *TOOLS])
def test_every_command_says_what_it_does(command):
    code, out, _ = run(command, "--help")
    assert code == 0
    first = out.splitlines()[2].strip()
    assert len(first) > 20
    assert first in run("--help")[1] or first[:30] in run("--help")[1]


def test_a_word_that_is_no_command():
    code, _, err = run("trian", "digits")
    assert code == 2
    assert "No such command 'trian'" in err
    assert run("train")[0] == 2


@pytest.mark.parametrize(("words", "start", "expected"), [
    ([], "ev", ["evaluate"]),
    (["prepare"], "", ["digits", "grid", "sevens"]),
    (["fit"], "grid", ["grid-lde"]),
    (["preset", "add"], "bsds", ["bsds300", "bsds300-cpu", "bsds300-one-order"]),
    (["preset"], "", ["list", "show", "add"]),
    (["fit"], "nothing", []),
])  # fmt: skip
def test_tab_completion(words, start, expected, project):
    found = ShellComplete(cli, {}, "stages", "_STAGES_COMPLETE").get_completions(words, start)
    assert sorted(item.value for item in found) == sorted(expected)


def test_tab_completion_without_params(project):
    (project / "params.yaml").write_text("{")
    assert ShellComplete(cli, {}, "stages", "_STAGES_COMPLETE").get_completions(["prepare"], "") == []


# Dry run ------------------------------------------------------------------------------------------------------------

READS = {
    ("prepare", "digits"): [],
    ("features", "digits"): ["data/shards/digits"],
    ("control", "digits"): ["data/shards/digits"],
    ("train", "digits-ae"): ["data/shards/digits"],
    ("extract", "digits-ae"): ["data/shards/digits", "data/autoencoders/digits-ae"],
    ("fit", "digits-ae-lde"): ["data/codes/digits-ae"],
    ("sample", "digits-ae-lde"): ["data/densities/digits-ae-lde/density.safetensors", "data/codes/digits-ae"],
    ("evaluate", "digits-ae-lde"): ["data/samples/digits-ae-lde", "data/codes/digits-ae", "data/shards/digits"],
    ("detect", "sevens"): [
        "data/shards/digits",
        "data/shards/sevens",
        "data/autoencoders/digits-ae",
        "data/densities/digits-ae-lde/density.safetensors",
    ],
}


def everything(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*") if "__pycache__" not in str(path)}


def test_each_stage_has_its_dry_run_here():
    assert {stage for stage, _ in READS} == set(TABLE_OF_STAGE)


@pytest.mark.parametrize(("stage", "row"), READS)
def test_a_dry_run_says_what_would_be_read_and_written(stage, row, project):
    before = everything(project)
    code, out, err = run(stage, row, "--dry-run")
    assert (code, err) == (0, "")
    lines = [line.strip() for line in out.splitlines()]
    assert lines[0] == f"{stage} {row}"
    for path in READS[stage, row]:
        assert f"reads {path} (missing)" in lines
    assert f"writes reports/metrics/{stage}/{row}.json" in lines
    assert f"writes reports/runs/{stage}/{row}.json" in lines
    assert sum(": " in line for line in lines) >= 3  # the settings, those left out of params.yaml included
    assert everything(project) == before


def test_a_dry_run_resolves_defaults(project):
    lines = [line.strip() for line in run("fit", "grid-lde", "--dry-run")[1].splitlines()]
    assert {
        "learning_rate: 0.0001  # default 0.0002",
        "components: 5  # default 30",
        "batch_size: 128",
        'family: "lde"',
    } <= set(lines)


@pytest.mark.parametrize(("stage", "row"), [pair for pair, paths in READS.items() if paths])
def test_a_stage_without_its_input_says_which_one(stage, row, project):
    code, out, err = run(stage, row)
    assert (code, out) == (1, "")
    assert err == f"error: {stage} {row}: {READS[stage, row][0]} is missing; run the stage that writes it, or `dvc repro`\n"
    assert not (project / "reports").exists()


# check --------------------------------------------------------------------------------------------------------------


def with_pipeline(project: Path, edit) -> None:
    document = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())
    document = edit(document) or document
    (project / "dvc.yaml").unlink()
    with (project / "dvc.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(document, file)


def test_check_passes(project):
    assert run("check") == (0, "params.yaml: 11 rows, no problem\n", "")


PLACE = "dvc.yaml: stages"
EDITS = [
    (lambda d: d["stages"].pop("fit"), f"{PLACE}.fit: missing; it runs over the rows of densities"),
    (lambda d: d["stages"].update(fit=None), f"{PLACE}.fit: missing"),
    (
        lambda d: d["stages"]["fit"].update(foreach="${sampling}"),
        f"{PLACE}.fit.foreach: expected ${{densities}}, got '${{sampling}}'",
    ),
    (
        lambda d: d["stages"]["fit"]["do"].update(cmd="fit.py"),
        f"{PLACE}.fit.cmd: expected 'python -m stages fit ${{key}}', got 'fit.py'",
    ),
    (lambda d: d["stages"]["fit"]["do"]["deps"].append("stages/gone.py"), f"{PLACE}.fit.deps: stages/gone.py is missing"),
    (lambda d: d["stages"]["fit"]["do"].update(deps=3), f"{PLACE}.fit.deps: expected a list"),
    (lambda d: d.update(stages=3), f"{PLACE}: expected a table of stages"),
    (lambda d: [1], f"{PLACE}: expected a table of stages"),
]


@pytest.mark.parametrize(("edit", "expected"), EDITS)
def test_check_compares_with_the_pipeline(edit, expected, project):
    with_pipeline(project, lambda d: value if isinstance(value := edit(d), list) else None)
    code, _, err = run("check")
    assert code == 1
    assert any(expected in line for line in err.splitlines()), err
    assert all(line.startswith("error: check: ") for line in err.splitlines())


def test_check_without_a_pipeline(project):
    (project / "dvc.yaml").unlink()
    assert "error: check: dvc.yaml is missing; run the command from the project's folder\n" in run("check")[2]
    (project / "dvc.yaml").write_text("stages: [")
    assert "dvc.yaml isn't valid YAML" in run("check")[2]


def test_check_says_what_to_put_where(project):
    (project / "params.yaml").write_text(PARAMS.replace("  grid: {source: grid, root: pipeline/sources/grid.py}", """\
  grid: {source: grid, root: pipeline/sources/grid.py}
  mnist: {source: mnist, root: data/raw/mnist}
  two: {source: union, root: data/raw, sources: [celeba, shoes], roots: [celeba, shoes]}
  mine: {source: images, root: data/raw/mine}
"""))  # fmt: skip
    (project / "data/raw/mine").mkdir(parents=True)
    code, _, err = run("check")
    lines = err.splitlines()
    assert (code, len(lines)) == (1, 3)
    assert lines[0].startswith("error: check: datasets.mnist.root: ")
    assert "data/raw/mnist" in lines[0]
    assert lines[1].startswith("error: check: datasets.two.root: ")
    assert "data/raw/celeba" in lines[1]
    assert lines[2].startswith("error: check: datasets.mine.root: ")


def test_check_gives_the_digest_of_a_file_that_a_setting_names(project):
    row = "{dataset: digits, objective: ae, latent_dim: 3, blocks: 1, perceptual_weights: WEIGHTS}"
    quality = "{quality: {network: vgg19, weights: WEIGHTS}}"

    def problems(source):
        tables = YAML(typ="safe", pure=True).load(PARAMS)
        tables["autoencoders"]["pinned"] = YAML(typ="safe").load(row.replace("WEIGHTS", source))
        tables["evaluations"]["digits"] = YAML(typ="safe").load(quality.replace("WEIGHTS", source))
        with open("params.yaml", "w") as file:
            YAML(typ="safe", pure=True).dump(tables, file)
        return [line.removeprefix("error: check: ") for line in run("check")[2].splitlines()]

    def value(content):
        return f"vgg19.pth@sha256:{hashlib.sha256(content).hexdigest()[:12]}"

    keys = ("autoencoders.pinned.perceptual_weights", "evaluations.digits.quality.weights")
    (project / "vgg19.pth").write_bytes(b"one")
    bare = f"write {value(b'one')} (the file's content), so that a replaced file reruns its rows"
    assert problems("vgg19.pth") == [f"{key}: {bare}" for key in keys]
    assert problems(value(b"one")) == []
    assert problems(f"vgg19.pth@sha256:{hashlib.sha256(b'one').hexdigest()}") == []
    (project / "vgg19.pth").write_bytes(b"two")
    digest = value(b"one").partition(":")[2]
    other = f"vgg19.pth isn't the file with the digest '{digest}'; write {value(b'two')}"
    assert problems(value(b"one")) == [f"{key}: {other}" for key in keys]
    assert len(problems(value(b"two")[:-1])) == len(problems("vgg19.pth@sha256:")) == 2
    assert problems("imagenet") == []
    for gone in ("gone.pth@sha256:0123456789ab", "gone.pth", "data/raw/gone"):
        missing = f"{gone.partition('@')[0]} is missing; put the file there, or correct the path"
        assert problems(gone) == [f"{key}: {missing}" for key in keys]


# Overview -----------------------------------------------------------------------------------------------------------


def lock_of(project: Path) -> dict:
    """A dvc.lock as DVC writes it after a run of everything, with digests made up."""
    pipeline = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
    params = YAML(typ="safe", pure=True).load((project / "params.yaml").read_text())

    def filled(text: str, key: str, item: dict) -> str:
        for name, value in ({"key": key} | {f"item.{k}": v for k, v in item.items()}).items():
            text = text.replace(f"${{{name}}}", str(value))
        return text

    def found(dotted: str) -> object:
        value: object = params
        for part in dotted.split("."):
            value = value[part]
        return value

    def digest(path: str) -> dict:
        return {"path": path, "hash": "md5", "md5": hashlib.md5(path.encode()).hexdigest(), "size": 3}

    lock = {}
    for stage, entry in pipeline.items():
        rows = params[entry["foreach"][2:-1]] if "foreach" in entry else {"": {}}
        body = entry.get("do", entry)
        for key, item in rows.items():
            outs = [filled(path, key, item) for path in body["outs"]]
            lock[f"{stage}@{key}" if key else stage] = {
                "cmd": filled(body["cmd"], key, item),
                "deps": [digest(filled(path, key, item)) for path in body["deps"]],
                "params": {"params.yaml": {name: found(name) for name in (filled(p, key, item) for p in body["params"])}},
                "outs": [digest(path) for path in outs],
            }
            for path in outs:
                (project / path).parent.mkdir(parents=True, exist_ok=True)
                (project / path).write_text("x")
    return lock


def write_lock(project: Path, lock: dict) -> None:
    with (project / "dvc.lock").open("w") as file:
        YAML(typ="safe", pure=True).dump({"schema": "2.0", "stages": lock}, file)


def by_state() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for (stage, row), state in states(read_params()).items():
        found.setdefault(state, set()).add(f"{stage} {row}".strip())
    return found


GRID_CHAIN = {"fit grid-lde", "sample grid-lde", "evaluate grid-lde"}


def test_the_states_of_rows(project):
    everything = {f"{stage} {row}" for stage, table in TABLE_OF_STAGE.items() for row in read_params().rows(table)} | {"report"}
    assert by_state() == {"not yet run": everything}
    lock = lock_of(project)
    write_lock(project, lock)
    assert by_state() == {"done": everything}

    # A row's settings: it and what comes after.
    (project / "params.yaml").write_text(PARAMS.replace("components: 5", "components: 6"))
    assert by_state() == {"settings changed": GRID_CHAIN | {"report"}, "done": everything - GRID_CHAIN - {"report"}}
    (project / "params.yaml").write_text(PARAMS.replace("blocks: 1", "blocks: 1, seed: 3"))
    found = by_state()
    assert found["settings changed"] == {"train digits-ae", "extract digits-ae", "report"}
    assert found["input changed"] == {"fit digits-ae-lde", "sample digits-ae-lde", "evaluate digits-ae-lde", "detect sevens"}
    (project / "params.yaml").write_text(PARAMS.replace("count: 50", "count: 60"))
    found = by_state()
    assert found["settings changed"] == {"sample digits-ae-lde", "sample grid-lde", "control digits", "report"}
    assert found["input changed"] == {"evaluate digits-ae-lde", "evaluate grid-lde"}

    # The same number written in another way.
    (project / "params.yaml").write_text(PARAMS.replace("1e-4", "0.0001"))
    assert by_state() == {"done": everything}

    # A new row; one taken out.
    (project / "params.yaml").write_text(
        PARAMS.replace("sampling:", "  new: {codes: grid, dataset: grid, family: lde}\nsampling:")
    )
    found = by_state()
    assert found["not yet run"] == {"fit new", "sample new", "evaluate new"}
    assert found["settings changed"] == {"report"}
    (project / "params.yaml").write_text("\n".join(line for line in PARAMS.splitlines() if "grid-lde" not in line))
    assert by_state() == {"done": everything - GRID_CHAIN - {"report"}, "settings changed": {"report"}}

    # An output that is gone is DVC's to bring back: nothing after it changes.
    (project / "params.yaml").write_text(PARAMS)
    (project / "data/codes/grid").unlink()
    assert by_state() == {"output missing": {"extract grid"}, "done": everything - {"extract grid"}}

    # A stage that has since written something else.
    lock["prepare@grid"]["outs"][0]["md5"] = "0" * 32
    write_lock(project, lock)
    assert {"train grid", "extract grid", *GRID_CHAIN, "report"} <= by_state()["input changed"]


@pytest.mark.parametrize("text", ["", "{", "[]", "stages: 3\n", b"\xff\x00", "schema: '2.0'\n"])
def test_a_lock_file_that_says_nothing(text, project):
    (project / "dvc.lock").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert set(by_state()) == {"not yet run"}


def test_without_a_command_stages_rows_and_states(project):
    write_lock(project, lock_of(project))
    (project / "params.yaml").write_text(PARAMS.replace("count: 50", "count: 60"))
    code, out, err = run()
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    unlisted = [c for c in (*STAGES, *TOOLS) if not any(line.startswith(f"{c} ") for line in lines)]
    assert not unlisted
    assert "digits-ae train, extract: done" in lines
    assert "grid-lde fit: done; sample: settings changed; evaluate: input changed" in lines
    assert lines[-1].endswith("`dvc repro` runs the rest")
    assert all(len(line) <= 128 for line in out.splitlines())


def test_under_dvc_a_stage_says_which_of_all_it_is(project, monkeypatch):
    params = read_params()
    number = len(states(params))
    assert _place(params, "fit", "grid-lde") == f"stage 1 of {number}"
    lock = lock_of(project)
    write_lock(project, lock)
    assert _place(params, "fit", "grid-lde") == ""  # done: it runs again for another reason
    del lock["report"], lock["evaluate@grid-lde"]
    write_lock(project, lock)
    assert _place(params, "evaluate", "grid-lde") == f"stage {number - 1} of {number}"


def test_the_overview_of_broken_params(project):
    (project / "params.yaml").write_text("densities: 3\n")
    code, out, err = run()
    assert code == 1
    assert "prepare" in out
    assert err.strip() == "error: densities: expected a table, got 3"


# doctor -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def healthy(project):
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    somebody = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *somebody, "commit", "-q", "--allow-empty", "-m", "x"], cwd=project, check=True)
    (project / ".dvc").mkdir()
    return project


def words(out: str) -> dict[str, str]:
    """Word by what was checked."""
    return {
        line[2:].split("  ")[0]: line[2:].split("  ", 1)[1].split()[0] for line in out.splitlines() if line.startswith("  ")
    }


def test_doctor_of_a_healthy_project(healthy):
    code, out, err = run("doctor")
    assert (code, err) == (0, ""), out
    found = words(out)
    for what in (
        "python",
        "torch",
        "dvc",
        "mlflow",
        "device",
        "cores",
        "params.yaml",
        "git",
        "tracking",
        "digits",
        "preset grid",
    ):
        assert found[what] in ("ok", "warn"), out
    assert found["preset own-codes"] == "missing"  # no fault: nobody asked for it
    assert set(found.values()) <= {"ok", "warn", "missing"}


def test_doctor_names_faults(healthy, monkeypatch):
    params = PARAMS.replace("root: pipeline/sources/grid.py", "root: data/raw/nowhere").replace("count: 50", "count: 0")
    (healthy / "params.yaml").write_text(params)
    monkeypatch.setenv("DEVICE", "cuda")
    monkeypatch.setenv("PROCESSES", "many")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (healthy / ".dvc").rmdir()
    code, out, err = run("doctor")
    found = words(out)
    assert code == 1
    assert found["dvc"] == "fault"
    assert {found[what] for what in ("device", "processes", "params.yaml", "grid")} == {"fault"}
    assert err.startswith("error: doctor: ")
    assert err.strip().endswith("faults, marked above")


def test_doctor_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("doctor")
    assert code == 1
    assert "params.yaml is missing" in out
    assert err.count("\n") == 1


class Server(http.server.BaseHTTPRequestHandler):
    """An MLflow server that has one experiment, in a state."""

    state = "active"

    def do_GET(self):
        name = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)["experiment_name"][0]
        experiment = {"experiment_id": "7", "name": name, "lifecycle_stage": self.state}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"experiment": experiment}).encode())

    def log_message(self, *_):
        """Says nothing."""


def test_doctor_asks_the_tracking_server(healthy, monkeypatch):
    monkeypatch.setenv("TRACKING", "on")
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "1")
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@{address}")
        assert f"ok       http://{address} answers" in run("doctor")[1]
        monkeypatch.setattr(Server, "state", "deleted")
        out = run("doctor")[1]
        assert words(out)["tracking"] == "warn"
        assert f"MLFLOW_TRACKING_URI=http://{address} mlflow experiments restore --experiment-id 7" in out
        assert "secret" not in out
        server.shutdown()
    code, out, _ = run("doctor")
    assert code == 0  # stages run without it
    assert f"http://{address}: can't be reached" in out
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{silent.getsockname()[1]}")
        out = run("doctor")[1]
        assert "doesn't answer like MLflow" in out
        assert "secret" not in out


def write_database(path: Path, version: str, tables: Iterable[str], rows: str = "") -> None:
    """A SQLite file with tables of these names, with the columns that the doctor reads."""
    path.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for table in tables:
            connection.execute(f"create table {table} (experiment_id, name, lifecycle_stage, version_num)")
        if version:
            connection.execute("create table alembic_version (version_num)")
            connection.execute("insert into alembic_version values (?)", (version,))
        connection.executescript(rows)
        connection.commit()


def test_doctor_opens_the_tracking_file_as_a_stage_does(healthy, monkeypatch):
    from mlflow.store.db.base_sql_model import Base
    from mlflow.store.db.utils import _get_latest_schema_revision

    monkeypatch.setenv("TRACKING", "on")
    database = healthy / "mlflow.db"

    def said(*contents: object) -> str:
        write_database(database, *contents)
        return " ".join(line for line in run("doctor")[1].splitlines() if line.startswith("  tracking"))

    first, latest, some, every = (
        "451aebb31d03",
        _get_latest_schema_revision(),
        ("experiments", "runs"),
        list(Base.metadata.tables),
    )
    assert f"is unfinished or outdated and holds no runs: `rm {database}`" in said("", some[:1])
    assert "holds no runs: `rm" in said(first, some)
    a_run = "insert into runs (name) values ('a')"
    assert f"an older MLflow: copy the file, then run `mlflow db upgrade sqlite:///{database}`" in said(first, some, a_run)
    assert "was made by a newer MLflow" in said("ffffffffffff", every)
    assert "tables of another program" in said("", ["songs"])
    assert said(latest, every, a_run).endswith(f"ok       sqlite:///{database}, 1 runs")
    gone = "insert into experiments values (3, 'latent-density-pipeline', 'deleted', null)"
    assert f"MLFLOW_TRACKING_URI=sqlite:///{database} mlflow experiments restore --experiment-id 3" in said(latest, every, gone)


def test_doctor_looks_into_the_tracking_file(healthy, monkeypatch):
    monkeypatch.setenv("TRACKING", "on")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "the first stage creates it" in run("doctor")[1]
    (healthy / "mlflow.db").write_text("this is no database, whatever its name says" * 100)
    assert words(run("doctor")[1])["tracking"] == "warn"
    for uri in ("sqlite:////no/such/folder/x.db", "http://", "http://host:port", "mysql://localhost:1/x", "databricks", "::"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        code, out, _ = run("doctor")
        assert code == 0
        assert words(out)["tracking"] == "warn", (uri, out)


def test_doctor_without_a_repository(healthy):
    shutil.rmtree(healthy / ".git")
    code, out, _ = run("doctor")
    assert code == 1
    assert "`git init`, and commit all files; or `dvc config --local core.no_scm true`" in out
    (healthy / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    code, out, _ = run("doctor")
    assert (code, words(out)["git"]) == (0, "warn")


def test_doctor_of_a_user_that_git_and_dvc_refuse(healthy, monkeypatch):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert f"`git config --global --add safe.directory {healthy}`" in run("doctor")[1]
    monkeypatch.delenv("GIT_TEST_ASSUME_DIFFERENT_OWNER")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    out = run("doctor")[1]
    assert "unknown, and `dvc exp run` commits: `git config user.name ..` and `git config user.email ..`" in out

    def nobody():
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nobody)
    code, out, _ = run("doctor")
    assert (code, words(out)["user"]) == (1, "fault")
    assert "`export LOGNAME=me HOME=/some/folder`" in out


def test_doctor_of_a_busy_machine_without_bfloat16(healthy, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    monkeypatch.setattr("pipeline.system.devices.has_bfloat16", lambda _: False)
    assert "bfloat16" not in words(run("doctor")[1])
    (healthy / "params.yaml").write_text(PARAMS.replace("components: 5", "components: 5, scoring_precision: bfloat16"))
    found = words(run("doctor")[1])
    assert (found["cores"], found["bfloat16"]) == ("warn", "warn")


def test_doctor_finds_damage_in_the_cache(healthy, monkeypatch):
    """Names of files in the cache are their digests; a folder is a list of files."""
    cache = healthy / "elsewhere"
    answer = subprocess.CompletedProcess([], 0, f"{cache}\n", "")
    plain = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **rest: answer if "dvc" in command else plain(command, **rest))

    def store(data: bytes, ending: str = "") -> tuple[str, Path]:
        digest = hashlib.md5(data).hexdigest()
        path = cache / "files/md5" / digest[:2] / (digest[2:] + ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return digest + ending, path

    (inner, inner_path), (alone, alone_path) = store(b"inner"), store(b"alone")
    listing, listing_path = store(
        json.dumps([{"md5": inner, "relpath": "x"}, {"md5": "0" * 32, "relpath": "gone"}]).encode(), ".dir"
    )
    outs = {
        "prepare@grid": [{"path": "a", "md5": listing}],
        "fit@grid-lde": [{"path": "b", "md5": alone}, {"path": "c", "md5": "1" * 32}],
    }
    write_lock(healthy, {stage: {"cmd": "", "outs": entries} for stage, entries in outs.items()})
    code, out, _ = run("doctor", "--cache")
    assert (code, words(out)["dvc cache"]) == (0, "ok")
    assert "3 of 3 files are whole" in out
    inner_path.write_bytes(b"Inner")
    alone_path.write_bytes(b"")
    code, out, _ = run("doctor", "--cache")
    assert code == 1
    assert f"`rm -f {inner_path} && dvc repro --force --single-item prepare@grid`" in out
    assert f"`rm -f {alone_path} && dvc repro --force --single-item fit@grid-lde`" in out
    listing_path.write_bytes(b"[")
    assert f"`rm -f {listing_path} && dvc repro" in run("doctor", "--cache")[1]
    assert "Cache" not in run("doctor")[1]


def test_doctor_without_space(healthy, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    code, out, _ = run("doctor")
    assert code == 1
    assert words(out)["disk"] == "fault"


# make ----------------------------------------------------------------------------------------------------------------


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    outer = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=outer, capture_output=True, text=True, timeout=60)


def test_make_help_lists_every_target():
    targets = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.M)[1].split()
    listed = make("help").stdout.splitlines()
    assert sorted(line.split()[0] for line in listed) == sorted(targets)
    assert all(len(line.split()) > 3 for line in listed)


def test_make_ui_names_a_taken_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = make("--old-file", ".venv/.installed", "--old-file", "install", "ui", f"PORT={port}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"Port {port} is taken: choose another one, as in `make ui PORT=5001`.\n")
    assert "http" not in done.stdout


def test_make_ui_says_which_addresses_need_a_report():
    lines = (ROOT / "Makefile").read_text().splitlines()
    (report,) = [number for number, line in enumerate(lines) if "After the first report" in line]
    views = [number for number, line in enumerate(lines) if "viewStateShareKey" in line]
    assert views == [report + 1, report + 2]


def test_every_pinned_version_has_hashes():
    pins = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text())
    assert len(pins) > 150
    for pin in pins:
        assert re.match(r"[\w.-]+==[\w.]+( ; [^\\]+)? \\\n    --hash=sha256:[0-9a-f]{64}", pin), pin


def test_an_install_without_cuda_leaves_out_cuda_and_nothing_else(tmp_path):
    shown = make("--dry-run", "--always-make", "install", "CPU=1", f"VENV={tmp_path}").stdout
    assert "--no-deps --index-url https://download.pytorch.org/whl/cpu" in shown
    command = next(line for line in shown.splitlines() if line.startswith("sed "))
    subprocess.run(["sh", "-c", command], cwd=ROOT, check=True, timeout=60)
    pins, kept = (
        re.split(r"\n(?=\S)", path.read_text().strip()) for path in (ROOT / "requirements.lock", tmp_path / "cpu.lock")
    )
    left_out = [pin for pin in pins if re.match(r"nvidia-|cuda-|triton=|torch=|torchvision=", pin)]
    assert len(left_out) > 15
    assert kept == [pin for pin in pins if pin not in left_out]


def test_the_module_runs_as_a_program():
    environment = {**os.environ, "_STAGES_COMPLETE": "bash_complete", "COMP_WORDS": "stages preset add tf", "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-m", "stages"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "plain,tfd\n"


# Scores -------------------------------------------------------------------------------------------------------------


def test_a_score_that_isnt_finite_is_null(project):
    from stages.run import Run

    scores = Run("fit", "grid-lde", read_params(), None)
    scores.metrics({"mean": 1.5, "error": float("nan"), "count": 3, "protocol": "gmmn"})
    assert scores.scores == {"mean": 1.5, "error": None, "count": 3, "protocol": "gmmn"}
