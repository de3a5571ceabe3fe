"""Settings: whatever params.yaml contains, each problem gives one clear line, and never a traceback."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import random
import re
import types
import typing
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from pipeline.errors import SettingsError
from pipeline.settings import (
    ControlSettings,
    EvaluationSettings,
    Params,
    ParzenSettings,
    SamplingSettings,
    build,
    flatten,
    implementation,
    read_params,
)
from pipeline.settings.params import FORBIDDEN_KEYS, TABLES, choices
from stages.__main__ import cli

ROOT = Path(__file__).resolve().parents[1]

BASE: dict = {
    "datasets": {
        "digits": {"source": "digits5k", "root": "pipeline/sources/digits5k.py"},
        "grid": {"source": "grid", "root": "pipeline/sources/grid.py"},
        "sevens": {"source": "digits5k", "root": "pipeline/sources/digits5k.py", "classes": [7]},
    },
    "controls": {"digits": {"dataset": "digits", "kmeans_centroids": 10}},
    "autoencoders": {
        "digits-iae": {
            "dataset": "digits",
            "objective": "ae",
            "latent_dim": 8,
            "blocks": 1,
            "incremental": {"mode": "linear", "warm_up_epochs": 2},
        },
        "grid": {"dataset": "grid", "objective": "identity"},
    },
    "densities": {
        "digits-iae-lde": {"codes": "digits-iae", "dataset": "digits", "family": "lde", "components": 3},
        "grid-lde": {"codes": "grid", "dataset": "grid", "family": "lde"},
    },
    "sampling": {"count": 100},
    "evaluations": {"digits": {"parzen": {"protocol": "gmmn"}}, "grid": {}},
    "detections": {
        "sevens": {
            "density": "digits-iae-lde",
            "family": "lde",
            "codes": "digits-iae",
            "dataset": "digits",
            "outliers": "sevens",
            "outlier_classes": [7],
        }
    },
}


@pytest.fixture(autouse=True)
def _project(monkeypatch):
    monkeypatch.chdir(ROOT)


def with_value(dotted: str, value: object) -> dict:
    tables = copy.deepcopy(BASE)
    *path, last = dotted.split("/")
    target = tables
    for part in path:
        target = target[part]
    target[last] = value
    return tables


def written(tables: object, folder: Path) -> Path:
    path = folder / "params.yaml"
    yaml = YAML(typ="safe", pure=True)
    with path.open("w") as file:
        yaml.dump(tables, file)
    return path


def complaints(path: Path, *command: str) -> list[str]:
    """The lines with which a command rejects a params.yaml."""
    result = CliRunner().invoke(cli, [*(command or ("check",)), "--params", str(path)])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    assert lines, "an error without a message"
    assert all(line.startswith("error: ") and len(line) < 1000 for line in lines), lines
    return lines


def test_the_base_of_these_tests_has_no_problem(tmp_path):
    result = CliRunner().invoke(cli, ["check", "--params", str(written(BASE, tmp_path))])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.output.endswith("params.yaml: 11 rows, no problem\n")


def test_the_projects_own_params_have_no_problem():
    result = CliRunner().invoke(cli, ["check"])
    assert (result.exit_code, result.stderr) == (0, "")


# One fault at a time: the line names row, key and, if there is one, the remedy --------------------------------------

DEEP: dict = {}
for _ in range(60):
    DEEP = {"deeper": DEEP}

FAULTS = [
    # unknown keys, with a suggestion where one is near
    ("densities/grid-lde/componets", 5, r"densities\.grid-lde\.componets: unknown key; did you mean 'components'\?"),
    ("densities/grid-lde/xyzzy", 5, r"densities\.grid-lde\.xyzzy: unknown key; known keys: activation, "),
    ("autoencoders/digits-iae/latent_dims", 5, r"autoencoders\.digits-iae\.latent_dims: .* did you mean 'latent_dim'\?"),
    ("autoencoders/digits-iae/incremental/warm_up", 5, r"digits-iae\.incremental\.warm_up: .* 'warm_up_epochs'\?"),
    ("autoencoders/grid/latent_dim", 5, r"autoencoders\.grid\.latent_dim: unknown key"),
    ("datasets/digits/split_sed", 5, r"datasets\.digits\.split_sed: unknown key; did you mean 'split_seed'\?"),
    ("controls/digits/centroids", 5, r"controls\.digits\.centroids: unknown key"),
    ("evaluations/digits/parsen", {}, r"evaluations\.digits\.parsen: .* did you mean 'parzen'\?"),
    ("evaluations/digits/parzen/bandwidth", 1, r"evaluations\.digits\.parzen\.bandwidth: unknown key"),
    ("sampling/number", 5, r"sampling\.number: unknown key; known keys: count, "),
    ("density", {}, r"density: unknown table; did you mean 'densities'\?"),
    ("stages", {}, r"stages: unknown table; known tables: datasets, "),
    ("densities/grid-lde/3", 3, r"densities\.grid-lde\.3: unknown key"),
    # unknown implementations
    ("datasets/digits/source", "mnits", r"datasets\.digits\.source: unknown 'mnits'; did you mean 'mnist'\? known: "),
    ("autoencoders/digits-iae/objective", "vea", r"objective: unknown 'vea'; did you mean 'vae'\?"),
    ("densities/grid-lde/family", "ldf", r"family: unknown 'ldf'; did you mean 'lde'\?"),
    ("densities/grid-lde/family", "density", r"family: unknown 'density'"),  # a module, and no family
    ("densities/grid-lde/family", "__init__", r"family: unknown '__init__'"),
    ("densities/grid-lde/family", "../lde", r"family: unknown '\.\./lde'"),
    ("densities/grid-lde/family", "", r"family: unknown ''"),
    ("densities/grid-lde/family", None, r"family: missing or not a string"),
    # wrong types
    ("densities/grid-lde/components", "3", r"components: expected an integer, got '3'"),
    ("densities/grid-lde/components", 3.0, r"components: expected an integer, got 3\.0"),
    ("densities/grid-lde/components", True, r"components: expected an integer, got True"),
    ("densities/grid-lde/components", None, r"components: expected an integer, got None"),
    ("densities/grid-lde/components", [3], r"components: expected an integer, got \[3\]"),
    ("densities/grid-lde/components", 10**400, r"components: expected an integer"),
    ("densities/grid-lde/learning_rate", "fast", r"learning_rate: expected a number, got 'fast'"),
    ("densities/grid-lde/learning_rate", float("nan"), r"learning_rate: expected a number, got nan"),
    ("densities/grid-lde/learning_rate", float("inf"), r"learning_rate: expected a number, got inf"),
    ("densities/grid-lde/learning_rate", 10**400, r"learning_rate: expected a number"),
    ("densities/grid-lde/learning_rate", True, r"learning_rate: expected a number, got True"),
    ("densities/grid-lde/betas", 0.9, r"betas: expected a list of numbers, got 0\.9"),
    ("densities/grid-lde/betas", [0.9, "x"], r"betas\[1\]: expected a number, got 'x'"),
    ("densities/grid-lde/schedule", "linear", r"schedule: expected one of constant, steps, cosine, got 'linear'"),
    ("densities/grid-lde/milestones", [1.5], r"milestones\[0\]: expected an integer"),
    ("autoencoders/digits-iae/incremental", True, r"incremental: expected a table or null, got True"),
    ("autoencoders/digits-iae/channels_last", "yes", r"channels_last: expected true or false, got 'yes'"),
    ("evaluations/digits/parzen", 3, r"parzen: expected a table or null, got 3"),
    ("densities/grid-lde/components", "9" * 100_000, r"components: expected an integer, got '9+\.\.\.9+'"),
    ("densities/grid-lde/components", DEEP, r"components: expected an integer, got \{'deeper': "),
    # impossible values
    ("densities/grid-lde/components", 0, r"components: must be at least 1"),
    ("densities/grid-lde/components", -3, r"components: must be at least 1"),
    ("densities/grid-lde/epochs", 0, r"epochs: must be at least 1"),
    ("densities/grid-lde/learning_rate", -1e-3, r"learning_rate: must be positive"),
    ("densities/grid-lde/betas", [0.9], r"betas: must be two numbers in \[0, 1\)"),
    ("densities/grid-lde/betas", [0.9, 1.0], r"betas: must be two numbers in \[0, 1\)"),
    ("densities/grid-lde/seed", -1, r"seed: must be 0 or more"),
    ("autoencoders/digits-iae/latent_dim", 0, r"autoencoders\.digits-iae\.latent_dim: must be at least 1"),
    ("autoencoders/digits-iae/incremental/warm_up_epochs", 0, r"incremental\.warm_up_epochs: must be positive"),
    ("autoencoders/digits-iae/incremental", {"mode": "linear"}, r"warm_up_epochs: missing; 'linear' needs a number of epochs"),
    ("sampling/count", 0, r"sampling\.count: must be at least 1"),
    ("evaluations/digits/parzen/bandwidth_start", 0, r"parzen\.bandwidth_start: must be between 1e-6 and 1e6"),
    ("evaluations/digits/parzen/bandwidth_stop", 0.01, r"parzen\.bandwidth_stop: must be between bandwidth_start and 1e6"),
    ("evaluations/digits/parzen/bandwidth_start", 1e-300, r"parzen\.bandwidth_start: must be between 1e-6 and 1e6"),
    ("evaluations/digits/parzen/bandwidth_stop", 1e300, r"parzen\.bandwidth_stop: must be between bandwidth_start and 1e6"),
    ("datasets/digits/root", "", r"datasets\.digits\.root: is empty"),
    ("datasets/digits/root", "  ", r"datasets\.digits\.root: is empty"),
    ("datasets/digits/root", "~/photos", r"datasets\.digits\.root: DVC doesn't expand '~'"),
    ("datasets/digits/root", "a\0b", r"datasets\.digits\.root: no path holds a null character"),
    ("evaluations/digits/parzen/bandwidth_count", 10**9, r"parzen\.bandwidth_count: must lie in 1\.\.1000"),
    # rows that don't fit together
    ("autoencoders/digits-iae/blocks", 2, r"autoencoders\.digits-iae\.blocks: with 2 blocks .* multiple of .* 8 .* 28x28"),
    ("autoencoders/digits-iae/filter_side", 3, r"filter_side: .* = 12 pixels, .* are 28x28"),
    ("autoencoders/digits-iae/dataset", "grid", r"autoencoders\.digits-iae\.dataset: 'grid' holds vectors"),
    ("autoencoders/grid/dataset", "digits", r"autoencoders\.grid\.dataset: 'digits' holds images"),
    ("autoencoders/grid/dataset", "gird", r"autoencoders\.grid\.dataset: 'gird' is no row of datasets; rows: digits, grid"),
    (
        "densities/grid-lde/codes",
        "gird",
        r"densities\.grid-lde\.codes: 'gird' is no row of autoencoders; rows: digits-iae, grid",
    ),
    ("densities/grid-lde/dataset", "digits", r"grid-lde\.dataset: 'digits', but autoencoders\.grid\.dataset is 'grid'"),
    ("densities/grid-lde/dataset", "nowhere", r"grid-lde\.dataset: 'nowhere', but autoencoders\.grid\.dataset is 'grid'"),
    ("controls/digits/dataset", "grid", r"controls\.digits\.dataset: 'grid' holds vectors; controls are for images"),
    ("controls/digits/dataset", "nowhere", r"controls\.digits\.dataset: 'nowhere' is no row of datasets"),
    ("evaluations/digits/parzen", None, r"controls\.digits\.dataset: evaluations\.digits\.parzen is missing"),
    ("evaluations/nowhere", {}, r"evaluations\.nowhere: 'nowhere' is no row of datasets"),
    ("evaluations", {"digits": {"parzen": {}}}, r"densities\.grid-lde\.dataset: 'grid' is no row of evaluations; rows: digits"),
    ("detections/sevens/density", "lde", r"detections\.sevens\.density: 'lde' is no row of densities"),
    ("detections/sevens/density", "grid-lde", r"sevens\.codes: 'digits-iae', but densities\.grid-lde\.codes is 'grid'"),
    ("detections/sevens/family", "gmm", r"sevens\.family: 'gmm', but densities\.digits-iae-lde\.family is 'lde'"),
    ("detections/sevens/dataset", "grid", r"sevens\.dataset: 'grid', but densities\.digits-iae-lde\.dataset is 'digits'"),
    ("detections/sevens/outliers", "digits", r"detections\.sevens\.outliers: must be another data set than 'dataset'"),
    ("detections/sevens/outliers", "nowhere", r"detections\.sevens\.outliers: 'nowhere' is no row of datasets"),
    ("detections/sevens/outliers", "grid", r"outliers: examples of 'grid' have shape \(2,\), .* they can't be compared"),
    ("detections/sevens/outlier_classes", [-1], r"detections\.sevens\.outlier_classes: must be numbers from 0"),
    ("detections/sevens/false_alarms", 0.0, r"detections\.sevens\.false_alarms: must be between 0 and 1"),
    (
        "detections/again",
        {"density": "digits-iae-lde", "family": "lde", "codes": "digits-iae", "dataset": "digits", "outliers": "sevens"}
        | {"error": "relative"},
        r"detections\.sevens\.error: 'absolute', but detections\.again\.error is 'relative', of the same density",
    ),
    ("detections/sevens/threshold", 0.5, r"detections\.sevens\.threshold: unknown key"),
    ("detections/grid-lde", {"outliers": "grid"}, r"detections\.grid-lde\.density: missing; it must be a string"),
    ("datasets/sevens/classes", [7, 7], r"datasets\.sevens\.classes: names one twice"),
    ("datasets/sevens/classes", [10], r"datasets\.sevens\.classes: must be numbers from 0 to 9"),
    # names and shapes of rows
    ("densities/Grid_LDE", {}, r"densities\.Grid_LDE: a row's name"),
    ("densities/grid lde", {}, r"densities\.grid lde: a row's name"),
    ("densities/../../etc", {}, None),
    ("densities/-grid", {}, r"densities\.-grid: a row's name"),
    ("datasets/7", {}, r"datasets\.7\.source: missing or not a string"),
    ("datasets/a", None, r"datasets\.a: expected a table of settings, got None"),
    ("datasets/" + "a" * 101, {}, r"a row's name"),
    ("datasets/b", [], r"datasets\.b: expected a table of settings, got \[\]"),
    ("densities", None, r"densities: expected a table, got nothing; write 'densities: \{\}' if it has no rows"),
    ("densities", [], r"densities: expected a table, got \[\]"),
    ("densities", "lde", r"densities: expected a table, got 'lde'"),
    ("sampling", 7, r"sampling: expected a table, got 7"),
    ("densities/grid-lde", {}, r"densities\.grid-lde\.family: missing or not a string"),
    ("densities/grid-lde", {"family": "lde"}, r"densities\.grid-lde\.codes: missing; it must be a string"),
    ("datasets/digits", {"source": "digits5k"}, r"datasets\.digits\.root: missing; it must be a string"),
    # keys that DVC's run cache ignores
    ("densities/grid-lde/size", 5, r"densities: a key is named 'size', which DVC's run cache ignores"),
    ("sampling/nfiles", 5, r"sampling: a key is named 'nfiles'"),
    ("densities/grid-lde/network", {"layers": {"size": 5}}, r"a key is named 'size'"),
    ("densities/grid-lde/network", [{"a": [{"nfiles": 5}]}], r"a key is named 'nfiles'"),
    ("datasets/size", {"source": "grid", "root": "pipeline/sources/grid.py"}, r"a key is named 'size'"),
    # raw data
    ("datasets/grid/root", "data/raw/nowhere.py", r"datasets\.grid\.root: .*nowhere"),
]


@pytest.mark.parametrize(("dotted", "value", "expected"), FAULTS, ids=[f"{d[:50]}={str(v)[:20]}" for d, v, _ in FAULTS])
def test_a_fault_is_named(dotted, value, expected, tmp_path):
    if expected is None:
        tables = copy.deepcopy(BASE)
        tables["densities"][dotted.partition("/")[2]] = value
    else:
        tables = with_value(dotted, value)
    lines = complaints(written(tables, tmp_path))
    assert all(line.startswith("error: check: ") for line in lines)
    assert any(re.search(expected or r"a row's name", line) for line in lines), lines


def test_every_problem_has_its_line(tmp_path):
    tables = with_value("densities/grid-lde/components", 0)
    tables["autoencoders"]["digits-iae"]["blocks"] = 2
    tables["sampling"]["count"] = -1
    lines = complaints(written(tables, tmp_path))
    assert [line.split(": ")[2] for line in lines[:3]] == [
        "sampling.count",
        "autoencoders.digits-iae.blocks",
        "densities.grid-lde.components",
    ]
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize("table", TABLES)
def test_a_table_that_dvc_reads_has_to_be_there(table, tmp_path):
    tables = {name: rows for name, rows in BASE.items() if name != table}
    assert any(f"check: {table}: missing" in line for line in complaints(written(tables, tmp_path)))


# Files that aren't tables at all ------------------------------------------------------------------------------------

NINE = ", ".join(["*a"] * 9)
BOMB = "a: &a {x: 1}\n" + "".join(
    f"{c}: &{c} [{', '.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)

TEXTS = {
    "bracket": "datasets: {digits: [",
    "tab": "datasets:\n\tdigits: {}\n",
    "colon": "datasets: a: b\n",
    "duplicate": "datasets: {}\ndatasets: {}\n",
    "list": "- datasets\n- densities\n",
    "scalar": "datasets\n",
    "number": "3\n",
    "two documents": "datasets: {}\n---\ndensities: {}\n",
    "nul": "datasets: \0\n",
    "latin-1": b"datasets: {d: {root: \xe9}}\n",
    "utf-16": "datasets: {}\n".encode("utf-16"),
    "binary": bytes(range(256)),
    "python object": "datasets: !!python/object/apply:os.system ['touch hacked']\n",
    "unknown tag": "datasets: !mine {}\n",
    "unknown alias": "datasets: *nowhere\n",
    "refers to itself": "datasets: &d\n  grid: *d\n",
    "list in itself": "densities: {a: {betas: &b [*b]}}\n",
    "list as a key": "datasets: {? [a, b] : {}}\n",
    "table as a key": "datasets: {? {a: b} : {}}\n",
    "null as a key": "datasets: {~: {}}\n",
    "number as a key": "7: {}\n",
    "number as a row": "datasets: {7: {}}\n",
    "date": "datasets: {grid: {source: grid, root: 2020-01-01}}\n",
    "set": "datasets: !!set {grid}\n",
    "bytes": "datasets: {grid: {source: !!binary aGVsbG8=, root: x}}\n",
    "huge number": f"sampling: {{count: {'9' * 5000}}}\n",
    "huge exponent": "sampling: {count: 1e999999}\n",
    "hexadecimal": "sampling: {count: 0xffffffffffffffffffff}\n",
    "not a number": "densities: {a: {family: lde, codes: a, dataset: a, learning_rate: .nan}}\n",
    "deep list": "datasets: " + "[" * 800 + "]" * 800 + "\n",
    "deep table": "datasets: " + "{a: " * 800 + "1" + "}" * 800 + "\n",
    "deep blocks": "".join(f"{' ' * i}a:\n" for i in range(800)),
    "alias bomb": BOMB,
    "alias bomb in a table": "datasets:\n  grid:\n" + "".join(f"    {line}\n" for line in BOMB.splitlines()),
    "merge bomb": "a: &a {x: 1}\nb: &b {<<: [*a, *a], size: 2}\ndatasets: {c: *b}\n",
    "directive": "%YAML 9.9\n---\ndatasets: {}\n",
    "control characters": "datasets:\n  \x1b[31m: {}\n",
    "line separator in a key": 'densities: {"a\\nb": {}}\n',
    "long key": f"densities: {{a: {{family: lde, {'k' * 120}: 1}}}}\n",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_file_of_another_kind_is_refused(text, tmp_path, monkeypatch):
    path = tmp_path / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    complaints(path)
    assert not list(Path().glob("hacked"))
    assert complaints(path, "fit", "grid-lde")[0].startswith("error: fit grid-lde: ")


def test_a_file_name_that_dvc_cant_take_is_named(tmp_path):
    folder = tmp_path / "photos" / "caf\udce9"
    folder.mkdir(parents=True)
    (folder / "1.png").touch()
    tables = with_value("datasets/photos", {"source": "images", "root": str(tmp_path / "photos"), "image_px": 8})
    (line,) = complaints(written(tables, tmp_path))
    assert re.search(
        r"datasets\.photos\.root: the name of \S+/photos/caf\\xe9 isn't UTF-8, which DVC can't add; rename it", line
    )


def test_a_file_that_is_not_there(tmp_path):
    assert complaints(tmp_path / "params.yaml")[0].endswith("is missing; run the command from the project's folder")
    assert "can't be read" in complaints(tmp_path)[0]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "can't be read" in complaints(tmp_path / "loop")[0]


def test_a_stage_refuses_its_row_before_any_work(tmp_path):
    path = written(with_value("densities/grid-lde/componets", 3), tmp_path)
    for stage in ("fit", "sample", "evaluate"):
        assert complaints(path, stage, "grid-lde") == [
            f"error: {stage} grid-lde: densities.grid-lde.componets: unknown key; did you mean 'components'?"
        ]
    assert "'nowhere' is no row of densities" in complaints(path, "fit", "nowhere")[0]
    assert "is no row" in complaints(path, "prepare", "../../etc/passwd")[0]
    assert "is no row" in complaints(path, "train", "two\nlines")[0]


# Every key of every implementation ----------------------------------------------------------------------------------

PACKAGES = {
    "datasets": ("pipeline.sources", "source"),
    "autoencoders": ("pipeline.autoencoders", "objective"),
    "densities": ("pipeline.densities", "family"),
}
MORE = {"union": {"sources": ["celeba", "shoes"], "roots": ["celeba", "shoes"]}, "vectors": {"root": "mine.npy"}}
WRONG = {
    int: ["3", 1.5, True, None, [], {}, 10**30, float("nan")],
    float: ["x", True, None, [], {}, 10**400, float("nan"), float("-inf")],
    bool: [0, 1, "true", None, [], 1.0],
    str: [1, None, True, [], {}, 2.5],
}


def row_of(table: str, name: str) -> dict:
    if table == "datasets":
        return {"source": name, "root": "data/raw/x"} | MORE.get(name, {})
    if table == "autoencoders":
        its_own = {"identity": {"dataset": "grid"}, "onnx": {"encoder": "encoder.onnx"}}
        return {"dataset": "digits", "objective": name} | its_own.get(name, {"latent_dim": 8, "blocks": 1})
    return {"codes": "grid", "dataset": "grid", "family": name}


def wrong_values(kind: typing.Any) -> list:
    if typing.get_origin(kind) is typing.Literal:
        return ["nonsense", 1, True, [], {}, None]
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return [v for v in wrong_values(typing.get_args(kind)[0]) if v is not None]
    if typing.get_origin(kind) is tuple:
        return ["x", 1, None, {}, [{}], [None], [[]]]
    if dataclasses.is_dataclass(kind):
        return [1, "x", [], True, {"nonsense": 1}]
    return WRONG[kind]


@functools.cache
def keys_of(table: str, name: str) -> dict[str, typing.Any]:
    package, _ = PACKAGES[table]
    cls = implementation(package, name, "here").Settings
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


IMPLEMENTED = [(table, name) for table, (package, _) in PACKAGES.items() for name in choices(package)]


@pytest.mark.parametrize(("table", "name"), IMPLEMENTED)
def test_every_key_refuses_values_of_other_types(table, name):
    package, _ = PACKAGES[table]
    good = row_of(table, name)
    build(implementation(package, name, "here").Settings, good, "here")
    for key, kind in keys_of(table, name).items():
        for value in wrong_values(kind):
            params = Params(with_value(f"{table}/tried", good | {key: value}))
            found = [problem for problem in params.problems() if problem.startswith(f"{table}.tried.{key}")]
            assert len(found) == 1, (key, value, list(params.problems()))
            assert "\n" not in found[0]
            assert len(found[0]) < 300


@pytest.mark.parametrize(("table", "name"), IMPLEMENTED)
def test_every_key_is_refused_by_the_command_too(table, name, tmp_path):
    """One wrong value per key, all in rows of one file; each gets its own line."""
    tables = copy.deepcopy(BASE)
    expected = []
    choose = random.Random(f"{table} {name}")
    for number, (key, kind) in enumerate(keys_of(table, name).items()):
        tables[table][f"tried-{number}"] = row_of(table, name) | {
            key: choose.choice([v for v in wrong_values(kind) if v != []])
        }
        expected.append(f"error: check: {table}.tried-{number}.{key}")
    lines = [line for line in complaints(written(tables, tmp_path)) if ".tried-" in line and "is missing" not in line]
    for start in expected:
        assert sum(line.startswith(start) for line in lines) == 1, (start, lines)


@pytest.mark.parametrize("cls", [SamplingSettings, ParzenSettings, EvaluationSettings, ControlSettings])
def test_the_common_tables_refuse_values_of_other_types(cls):
    needed = {"dataset": "digits"} if cls is ControlSettings else {}
    for key, kind in typing.get_type_hints(cls).items():
        for value in wrong_values(kind):
            with pytest.raises(SettingsError, match=rf"^here\.{key}"):
                build(cls, needed | {key: value}, "here")


@pytest.mark.parametrize("package", ["pipeline.sources", "pipeline.autoencoders", "pipeline.densities"])
def test_numbers_that_nothing_could_hold_are_refused(package):
    required = {"source": "x", "root": "x", "dataset": "x", "objective": "x", "codes": "x", "family": "x"}
    required |= {"blocks": 1, "latent_dim": 2} if package == "pipeline.autoencoders" else {}
    for choice in choices(package):
        settings = implementation(package, choice, "row").Settings
        names = {f.name for f in dataclasses.fields(settings)}
        row: dict = {key: value for key, value in required.items() if key in names}
        row |= {"encoder": "x.onnx"} if choice == "onnx" else {}
        row |= {"sources": ["images", "shoes"], "roots": ["a", "b"]} if "sources" in names else {}
        for key in (f.name for f in dataclasses.fields(settings) if typing.get_type_hints(settings)[f.name] is int):
            if "seed" not in key:
                with pytest.raises(SettingsError, match=rf"^row\.{key}: "):
                    build(settings, row | {key: 2**62}, "row")


def test_a_number_may_be_written_in_any_way():
    for value in (1e-4, "1e-4", "0.0001", 1):
        density = Params(with_value("densities/grid-lde/learning_rate", value)).density("grid-lde")
        assert density.learning_rate == float(value)
        assert type(density.learning_rate) is float


def test_settings_are_frozen_and_flat():
    density = Params(BASE).density("grid-lde")
    with pytest.raises(dataclasses.FrozenInstanceError):
        density.components = 3
    assert flatten(dataclasses.asdict(Params(BASE).autoencoder("digits-iae")))["incremental.warm_up_epochs"] == 2.0


def test_parzen_grids():
    assert ParzenSettings().bandwidths == tuple(round(0.10 + 0.01 * i, 2) for i in range(20))
    goodfellow = ParzenSettings(bandwidth_start=0.1, bandwidth_stop=1.0, bandwidth_count=10, spacing="log").bandwidths
    assert goodfellow == pytest.approx([10 ** (-1 + i / 9) for i in range(10)])
    assert ParzenSettings(bandwidth_count=1).bandwidths == (0.10,)


# Keys that DVC's run cache drops (treeverse/dvc issue 10296) --------------------------------------------------------


def all_keys(value: object) -> set[str]:
    if isinstance(value, dict):
        return set(map(str, value)) | {key for inner in value.values() for key in all_keys(inner)}
    if isinstance(value, list):
        return {key for inner in value for key in all_keys(inner)}
    return set()


@pytest.mark.parametrize("path", [Path("params.yaml"), Path("dvc.yaml"), *sorted(Path("presets").glob("*.yaml"))], ids=str)
def test_no_file_has_a_forbidden_key(path):
    text = path.read_text()
    assert not set(FORBIDDEN_KEYS) & all_keys(YAML(typ="safe", pure=True).load(text))
    assert not re.search(rf"^\s*([\w.*-]+\.)?({'|'.join(FORBIDDEN_KEYS)})\s*:", text, re.MULTILINE)


def test_no_implementation_declares_a_forbidden_key():
    for table, name in IMPLEMENTED:
        for key, kind in keys_of(table, name).items():
            inner = [
                f.name
                for option in (kind, *typing.get_args(kind))
                if dataclasses.is_dataclass(option)
                for f in dataclasses.fields(option)
            ]
            assert not set(FORBIDDEN_KEYS) & {key, *inner}


# Fuzzing ------------------------------------------------------------------------------------------------------------

FUZZ = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["lde", "grid", "ae", "digits"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8
)
DOTTED = [f"{table}/{row}/{key}" for table in BASE if table != "sampling" for row in BASE[table] for key in BASE[table][row]]
DOTTED += [f"{table}/{row}" for table in BASE if table != "sampling" for row in BASE[table]] + list(BASE)


@FUZZ
@given(dotted=st.sampled_from(DOTTED), value=values)
def test_any_value_anywhere_is_taken_or_refused(dotted, value):
    try:
        problems = list(Params(with_value(dotted, value)).problems())
    except SettingsError as error:
        problems = [str(error)]
    assert all(problem and len(problem) < 1000 for problem in problems)


@FUZZ
@given(
    place=st.floats(0, 1),
    cut=st.integers(0, 12),
    text=st.text(max_size=6) | st.sampled_from([":", "\n", "  ", "{", "- ", "&a ", "*a", "!!"]),
)
def test_an_edit_anywhere_is_taken_or_refused(place, cut, text, tmp_path):
    original = (ROOT / "params.yaml").read_text()
    start = int(place * len(original))
    path = tmp_path / "params.yaml"
    path.write_text(original[:start] + text + original[start + cut :], encoding="utf-8", newline="")
    try:
        problems = list(read_params(path).problems())
    except SettingsError as error:
        problems = [str(error)]
    assert all(problem for problem in problems)


@FUZZ
@given(data=st.binary(max_size=40))
def test_any_bytes_are_taken_or_refused(data, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes(data)
    try:
        list(read_params(path).problems())
    except SettingsError as error:
        assert str(error)  # noqa: PT017


def test_params_that_are_a_pipe_are_refused(tmp_path):
    os.mkfifo(tmp_path / "params.yaml")
    with pytest.raises(SettingsError, match=r"params\.yaml can't be read: it isn't a regular file"):
        read_params(tmp_path / "params.yaml")
