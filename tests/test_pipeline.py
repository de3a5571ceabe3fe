"""The whole pipeline by real `dvc` on a tiny copy of the project: what runs, what is cached, what an edit reruns."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from project import ROOT, Project

PARAMS = """\
datasets:
  digits: {source: digits5k, root: pipeline/sources/digits5k.py, shard_examples: 1000}
  grid: {source: grid, root: pipeline/sources/grid.py, train_count: 2000, valid_count: 500, test_count: 500}

controls:
  digits: {dataset: digits, kmeans_centroids: 50, kmeans_epochs: 1}

autoencoders:
  digits-ae: {dataset: digits, objective: ae, latent_dim: 4, blocks: 1, base_channels: 4, epochs: 1, batch_size: 500}
  digits-iae:  # opened one by one
    dataset: digits
    objective: ae
    latent_dim: 4
    blocks: 1
    base_channels: 4
    epochs: 1
    batch_size: 500
    incremental: {mode: linear, warm_up_epochs: 0.5}
  grid: {dataset: grid, objective: identity}

densities:
  digits-ae-lde: {codes: digits-ae, dataset: digits, family: lde, components: 3, epochs: 1}
  digits-iae-lde:
    codes: digits-iae
    dataset: digits
    family: lde
    components: 3
    epochs: 1
  grid-lde: {codes: grid, dataset: grid, family: lde, components: 3, epochs: 1}

sampling: {count: 200, shard_examples: 100}

evaluations:
  digits: {parzen: {bandwidth_count: 3}}
  grid: {}

detections: {}
"""


def chain(*rows: str) -> set[str]:
    return {f"{stage}@{row}" for row in rows for stage in ("fit", "sample", "evaluate")}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("home") / "project"
    folder.mkdir()
    return Project(folder, PARAMS)


@pytest.mark.timeout(3000)
def test_edits_rerun_what_they_touch_and_nothing_else(project: Project) -> None:
    everything = {"prepare@digits", "prepare@grid", "features@digits", "features@grid", "control@digits", "report"}
    everything |= {f"{stage}@{row}" for stage in ("train", "extract") for row in ("digits-ae", "digits-iae", "grid")}
    everything |= chain("digits-ae-lde", "digits-iae-lde", "grid-lde")
    assert project.repro() == everything
    first = project.metrics()
    assert "digits-iae-lde" in project.report()
    project.commit()

    # A second time nothing runs, and nothing changes.
    assert project.repro() == set()
    assert "up to date" in project.call("dvc", "status")
    assert project.call("git", "status", "--porcelain") == ""

    # One key of one density.
    project.edit("    family: lde\n    components: 3\n", "    family: lde\n    components: 2\n")
    assert project.repro() == chain("digits-iae-lde") | {"report"}
    assert json.loads((project.folder / "reports/metrics/fit/digits-iae-lde.json").read_text()) != json.loads(
        first["fit/digits-iae-lde.json"]
    )

    # Undone, all of it comes from the cache.
    project.edit("    family: lde\n    components: 2\n", "    family: lde\n    components: 3\n")
    assert project.repro() == set()
    assert project.metrics() == first
    assert "up to date" in project.call("dvc", "status")

    # What follows is about what reruns; two pipeline runs are tracked by now, and a stage is quicker without.
    project.environment["TRACKING"] = "off"

    # A sample count refits nothing.
    project.edit("{count: 200", "{count: 150")
    ran = project.repro()
    assert not {name for name in ran if name.startswith(("fit", "train", "extract", "features", "prepare"))}
    assert {"sample@digits-ae-lde", "evaluate@digits-ae-lde", "control@digits", "report"} <= ran
    project.edit("{count: 150", "{count: 200")
    assert project.repro() == set()

    # The latent length of one autoencoder: its own chain, nothing of the other's.
    project.edit("    latent_dim: 4\n", "    latent_dim: 3\n")
    assert project.repro() == {"train@digits-iae", "extract@digits-iae", "report"} | chain("digits-iae-lde")
    project.edit("    latent_dim: 3\n", "    latent_dim: 4\n")
    assert project.repro() == set()

    # A new row runs only itself and the report; taken out, it is gone from the report.
    row = "  grid-gaussian: {codes: grid, dataset: grid, family: gaussian}\n"
    project.edit("\nsampling:", row + "\nsampling:")
    assert project.repro() == chain("grid-gaussian") | {"report"}
    assert "grid-gaussian" in project.report()
    project.edit(row, "")
    assert project.repro() <= {"report"}
    assert "grid-gaussian" not in project.report()


PAGES = [path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))]
# Indented blocks that hold no commands, by their first word: the graph, the tree, the citation; test_serving.py runs curl.
NO_COMMANDS = ("raw", "pipeline/", "@article{yoo2019density,", "curl")
# Commands that a test can't run as they are, and what it runs instead.
INSTEAD = {
    "make test": "make -n test",  # it would run itself
    "cp reports/paper/bsds300-lde-k10/params.yaml params.yaml":  # BSDS300 isn't here: whether its settings are still valid
        "python -m stages fit bsds300-lde-k10 --dry-run --params reports/paper/bsds300-lde-k10/params.yaml",
    "python -m stages record bsds300 bsds300-lde-k10": "python -m stages record grid grid-lde",
    "python -m stages complete my-codes-gmm holes.csv": "python -m stages complete --help",  # tests/test_completion.py runs it
    "python -m stages complete my-codes-gmm holes.csv --draws 10": "python -m stages complete --help",
    "python -m stages draw digits-iae-lde-labels --label 7 --count 64 --seed 1 --output data/exports/sevens":
        "python -m stages draw digits-iae-lde --count 4 --seed 1 --output data/exports/sevens",
    "python -m stages export digits-iae-lde --format onnx": "python -m stages export --help",  # tests/test_portable.py runs it
    "dvc remote add -d store s3://bucket/path": "dvc remote add -d store ../store",
    # tests/test_ranks.py trains with it.
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint first-machine:29500 -m stages train digits-iae":
        "torchrun --nproc-per-node 2 -m stages train digits-iae --dry-run",
}  # fmt: skip


def command_blocks() -> list[list[str]]:
    """The commands of the README and of docs/, block by block, without their comments."""
    text = re.sub(r"^```.*?^```$", "", "\n".join(PAGES), flags=re.DOTALL | re.MULTILINE)
    blocks = [block.strip("\n").splitlines() for block in re.findall(r"(?:^    .*\n)+", text, flags=re.MULTILINE)]
    blocks = [block for block in blocks if block[0].split()[0] not in NO_COMMANDS]
    blocks.append(re.findall(r"`(dvc plots diff HEAD)`", text))
    return [[re.split(r"\s+# ", line.strip())[0] for line in block] for block in blocks]


def serves(project: Project) -> None:
    """`make ui` on a free port: the page answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    command = ["make", "ui", f"PORT={port}"]
    with subprocess.Popen(
        command, cwd=project.folder, env=project.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as server:  # fmt: skip
        try:
            for _ in range(1500):  # five minutes, on a busy machine
                with contextlib.suppress(OSError), opener.open(f"http://127.0.0.1:{port}/", timeout=10) as answer:
                    assert b"MLflow" in answer.read()
                    return
                assert server.poll() is None
                time.sleep(0.2)
            raise AssertionError("no answer")
        finally:
            os.killpg(server.pid, signal.SIGTERM)


@pytest.mark.timeout(1500)
def test_the_commands_of_the_readme_and_docs(project: Project) -> None:
    if not (project.folder / "dvc.lock").exists():
        project.repro()
    project.environment["TRACKING"] = "off"
    for name in ("Makefile", "requirements.lock", "README.md"):
        shutil.copy(ROOT / name, project.folder / name)
    shutil.copytree(ROOT / "reports/paper", project.folder / "reports/paper")
    # The environment that `make install` would make.
    (project.folder / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (project.folder / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    (project.folder / ".venv/.installed").touch()
    home = Path(project.environment["HOME"])
    (home / "photos").mkdir()
    generator = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(generator.integers(256, size=(40, 50, 3), dtype=np.uint8)).save(home / f"photos/{i}.jpg")
    np.save(home / "codes.npy", generator.normal(size=(200, 3)).astype(np.float32))
    (project.folder / "data/raw").mkdir(exist_ok=True)
    project.commit()

    said: dict[str, str] = {}
    for block in command_blocks():
        rows_added = False
        for command in block:
            if command == "make ui":
                serves(project)
                continue
            if command == "dvc pull && dvc repro":
                project.commit()
                (home / "clone").mkdir()  # next to the store, whose address is relative
                clone = Project(home / "clone", origin=project.folder)
                assert "Running stage" not in clone.call("bash", "-c", command)
                continue
            rows_added |= command.startswith("python -m stages preset add")
            done = INSTEAD.get(command, command)
            if rows_added and done == "dvc repro":  # minutes: what would run
                names = project.call("bash", "-c", "python -m stages check && dvc stage list --name-only")
                assert re.search("evaluate@(mine-iae-auto|my-codes-auto)", names)
                continue
            said[command] = project.call("bash", "-c", done)
        project.call("git", "checkout", "--", "params.yaml")

    assert "make" not in said["make repro"].splitlines()[0]
    assert "digits-iae-lde" in said["python -m stages"]
    assert "components" in said["dvc params diff"]
    shown = said["dvc metrics show"].splitlines()
    rows = ("digits-ae-lde", "digits-iae-lde", "grid-lde")
    assert [line.split()[0] for line in shown[1:]] == [f"reports/headline/{row}.json" for row in rows]
    assert max(map(len, shown)) <= 128
    assert {line.split()[0] for line in said["dvc metrics diff"].splitlines()[1:]} == {"reports/headline/digits-iae-lde.json"}
    page = (project.folder / "dvc_plots/index.html").read_text()
    for column in ("loss", "open_dimensions", "valid_log_likelihood"):
        assert page.count(f'"{column}"') > 3
    assert "samples.png" in page
    table = project.call("dvc", "exp", "show", "--csv", *said_options("dvc exp show"))
    assert len(table.splitlines()[0].split(",")) <= 16, table
    shutil.rmtree(project.folder / "dvc_plots")
    project.call("git", "checkout", "--", ".")
    assert project.repro() == set()


def said_options(start: str) -> list[str]:
    """The options that a page gives to a command."""
    (command,) = [command for block in command_blocks() for command in block if command.startswith(start)]
    return shlex.split(command.removeprefix(start))


@pytest.mark.timeout(1500)
def test_every_stage_is_tracked_below_the_pipeline_run(project: Project) -> None:
    if not (project.folder / "dvc.lock").exists():
        project.repro()
    with sqlite3.connect(project.folder / "mlflow.db") as database:
        runs = dict(database.execute("select run_uuid, name from runs where lifecycle_stage = 'active'").fetchall())
        tags: dict[str, dict[str, str]] = {run: {} for run in runs}
        for key, value, run in database.execute("select key, value, run_uuid from tags"):
            tags[run][key] = value
        statuses = {row[0] for row in database.execute("select status from runs")}
        inputs = database.execute("select count(*) from inputs").fetchone()[0]
    assert statuses == {"FINISHED"}
    pipelines = [run for run, name in runs.items() if name == "pipeline"]
    assert pipelines
    for run in pipelines:
        children = {runs[r].removesuffix(" (cached)") for r, t in tags.items() if t.get("mlflow.parentRunId") == run}
        assert {"prepare digits", "train digits-iae", "fit grid-lde", "evaluate digits-ae-lde"} <= children
    assert inputs > 0
    assert all(t.get("mlflow.source.git.commit") for r, t in tags.items() if "(cached)" not in runs[r])


@pytest.mark.timeout(1500)
def test_clean_runs_give_the_same_bits(project: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The chain of one row, run twice from clean: shards, weights, codes, samples and metrics are the same bytes."""
    if not (project.folder / "dvc.lock").exists():
        project.repro()
    folder = tmp_path_factory.mktemp("again") / "project"
    folder.mkdir()
    again = Project(folder, PARAMS)
    again.environment["TRACKING"] = "off"
    again.call("dvc", "repro", "evaluate@digits-iae-lde")
    compared = 0
    for name in ("data/shards/digits", "data/autoencoders/digits-iae", "data/codes/digits-iae", "data/samples/digits-iae-lde"):
        for path in sorted((folder / name).iterdir()):
            assert path.read_bytes() == (project.folder / name / path.name).read_bytes(), path
            compared += 1
    for path in sorted((folder / "reports/metrics").rglob("*.json")):
        assert path.read_bytes() == (project.folder / path.relative_to(folder)).read_bytes(), path
        compared += 1
    assert compared > 15
