"""The whole pipeline by real `dvc` on a tiny copy of the project: what runs, what is cached, what an edit reruns."""

from __future__ import annotations

import json
import shutil
import sqlite3

import pytest
from project import Project

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
    everything = {"prepare@digits", "prepare@grid", "control@digits", "report"}
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
    assert not {name for name in ran if name.startswith(("fit", "train", "extract", "prepare"))}
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


@pytest.mark.timeout(1500)
def test_experiments_metrics_and_plots(project: Project) -> None:
    if not (project.folder / "dvc.lock").exists():
        project.repro()
    project.commit()
    project.call("dvc", "exp", "run", "--name", "fewer", "-S", "densities.digits-iae-lde.components=2")
    assert "components: 2" in (project.folder / "params.yaml").read_text()
    assert "components" in project.call("dvc", "params", "diff")
    shown = project.call("dvc", "metrics", "show")
    assert "digits-iae-lde" in shown
    assert len(shown.splitlines()) < 30
    assert "digits-iae-lde" in project.call("dvc", "metrics", "diff")
    project.call("dvc", "plots", "show", "-o", "plots")
    page = (project.folder / "plots/index.html").read_text()
    assert "valid_log_likelihood" in page
    assert "samples.png" in page
    shutil.rmtree(project.folder / "plots")
    project.call("git", "checkout", "--", ".")
    assert project.repro() == set()


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
