"""Real `dvc` in several clones and twice in one: a shared database, cache and remote."""

from __future__ import annotations

import hashlib
import sqlite3
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from project import Project

PARAMS = """\
datasets:
  grid: {source: grid, root: pipeline/sources/grid.py, train_count: 2000, valid_count: 500, test_count: 500}
controls: {}
autoencoders:
  grid: {dataset: grid, objective: identity}
densities:
  grid-lde: {codes: grid, dataset: grid, family: lde, components: 2, epochs: 1}
sampling: {count: 200, shard_examples: 100}
evaluations:
  grid: {}
detections: {}
"""
ROWS = ["prepare grid", "features grid", "train grid", "extract grid", "fit grid-lde", "sample grid-lde", "evaluate grid-lde"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a repository, from which others are cloned."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "origin").mkdir()
    Project(folder / "origin", PARAMS)
    return folder


def clone(home: Path, name: str, origin: str = "origin") -> Project:
    (home / name).mkdir()
    return Project(home / name, origin=home / origin)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=1000)
    assert process.returncode == 0, output[-6000:]
    return output


@pytest.fixture(scope="module")
def pair(home: Path) -> list[Project]:
    """Two clones that ran everything at the same time, with one database and one cache."""
    clones = [clone(home, name) for name in ("first", "second")]
    for project in clones:
        project.call("dvc", "config", "--local", "cache.dir", str(home / "cache"))
        project.environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{home / 'mlflow.db'}"
    for process in [project.start("dvc", "repro") for project in clones]:
        assert "Running stage" in finish(process)
    return clones


def test_two_clones_at_the_same_time_share_database_and_cache(home: Path, pair: list[Project]) -> None:
    first, second = pair
    assert first.metrics() == second.metrics()
    assert len(first.metrics()) == len(ROWS)
    for project in pair:
        assert "up to date" in project.call("dvc", "status")
        assert project.repro() == set()
    objects = [path for path in (home / "cache/files/md5").rglob("*") if path.is_file()]
    assert len(objects) > 20
    for path in objects:
        data = path.read_bytes()
        assert hashlib.md5(data).hexdigest() == path.parent.name + path.name.removesuffix(".dir"), f"{path} is torn"
    with sqlite3.connect(home / "mlflow.db") as database:
        runs = database.execute("select name, status from runs where name not like '%(cached)'").fetchall()
    # Both ran all stages, unless one of them found in the cache what the other had just put there.
    assert {status for _, status in runs} == {"FINISHED"}
    names = [name for name, _ in runs]
    assert names.count("pipeline") == 2
    assert all(1 <= names.count(row) <= 2 for row in ROWS)


def test_a_fresh_clone_takes_everything_from_the_remote(home: Path, pair: list[Project]) -> None:
    first = pair[0]
    first.call("dvc", "remote", "add", "-d", "store", str(home / "elsewhere"))
    first.call("dvc", "push")
    first.commit()
    fresh = clone(home, "fresh", "first")
    fresh.environment["TRACKING"] = "off"
    assert not list(fresh.folder.glob("data/shards/*"))
    fresh.call("dvc", "pull")
    assert fresh.repro() == set()
    assert fresh.metrics() == first.metrics()
    assert fresh.call("git", "status", "--porcelain") == ""


def test_the_second_run_in_a_clone_says_why_it_stops(home: Path, pair: list[Project]) -> None:
    project = pair[1]
    project.environment["TRACKING"] = "off"
    project.edit("components: 2", "components: 3")
    running = project.start("dvc", "repro")
    assert running.stdout is not None
    while not (line := running.stdout.readline()).startswith("Running stage 'fit"):
        assert line, "ended without a fit"
    refusal = ""
    # DVC holds its locks for short times; a second run that comes in between waits for its stage instead.
    while running.poll() is None and not refusal:
        second = project.start("dvc", "repro")
        output, _ = second.communicate(timeout=300)
        if second.returncode:
            refusal = output
        time.sleep(0.1)
    finish(running)
    print(refusal)
    assert "lock" in refusal or "busy" in refusal
    assert project.repro() == set()


OWN = """\
datasets:
  mine: {source: vectors, root: data/raw/mine.npy, valid_share: 0.2, test_share: 0.2}
controls: {}
autoencoders:
  mine: {dataset: mine, objective: identity}
densities: {}
sampling: {count: 200}
evaluations: {}
detections: {}
"""


def test_own_raw_data_are_added_queued_and_checked_out(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    project = Project(tmp_path / "own", OWN)
    project.environment["TRACKING"] = "off"
    raw = project.folder / "data/raw/mine.npy"
    np.save(raw, np.random.default_rng(0).normal(size=(500, 2)).astype(np.float32))
    data = raw.read_bytes()
    project.call("dvc", "add", "data/raw/mine.npy")
    project.commit()
    assert project.call("git", "ls-files", "data/raw").split() == ["data/raw/.gitignore", "data/raw/mine.npy.dvc"]
    project.call("dvc", "exp", "run", "--queue", "-S", "datasets.mine.valid_share=0.3")
    assert "Running stage 'extract@mine'" in project.call("dvc", "exp", "run", "--run-all")
    project.call("dvc", "checkout", code=255)  # nothing ran in this checkout; its raw file stays all the same
    assert raw.read_bytes() == data
    raw.unlink()
    project.call("dvc", "checkout", "data/raw/mine.npy.dvc")
    assert raw.read_bytes() == data
