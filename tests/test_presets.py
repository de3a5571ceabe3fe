"""Presets: each passes the settings' own checks, and adding one changes nothing else in params.yaml."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from pipeline.errors import SettingsError
from pipeline.settings import Params
from stages.__main__ import cli
from stages.tools.preset import load_preset, preset_names
from stages.tools.rows import add_rows

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _project(monkeypatch):
    monkeypatch.chdir(ROOT)


def parsed(text: str) -> dict:
    return YAML(typ="safe", pure=True).load(text)


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, ["preset", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def without(part: str, text: str) -> bool:
    """Whether `text` contains all lines of `part`, in their order."""
    lines = iter(text.splitlines())
    return all(line in lines for line in part.splitlines())


def expect_families(*names: str) -> None:
    """Presets are written for all families of the project; a checkout may not hold all of them yet."""
    families = {row.values["family"] for name in names for row in load_preset(name).rows if row.table == "densities"}
    if absent := sorted(f for f in families if not (ROOT / f"pipeline/densities/{f}.py").exists()):
        pytest.xfail(f"families that aren't there yet: {', '.join(absent)}")


# The presets themselves ---------------------------------------------------------------------------------------------


def test_the_papers_experiments_are_all_there():
    wanted = {"mnist", "tfd", "celeba128", "celeba64-shoes", "vae-tradeoff", "bsds300", "bsds300-cpu", "grid"}
    assert wanted <= set(NAMES)
    assert preset_names() == NAMES


@pytest.mark.parametrize("seeds", [None, 2])
@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
@pytest.mark.parametrize("name", NAMES)
def test_every_preset_passes_the_checks(name, quick, seeds):
    expect_families(name)
    rows = load_preset(name).chosen(quick, seeds)
    tables: dict = {}
    for row in rows:
        tables.setdefault(row.table, {})[row.name] = row.plain()
    assert list(Params(tables).problems()) == []

    before = (ROOT / "params.yaml").read_text()
    after, added, present = add_rows(before, rows)
    assert len(added) + len(present) == len(rows)
    assert without(before, after)
    assert add_rows(after, rows) == (after, [], rows)


@pytest.mark.parametrize("name", NAMES)
def test_quick_is_smaller(name):
    full, quick = ({row.dotted: row.plain() for row in load_preset(name).chosen(quick)} for quick in (False, True))
    assert full != quick
    for dotted, row in quick.items():
        if "epochs" in full[dotted]:
            assert row["epochs"] <= full[dotted]["epochs"]
            assert row["epochs"] < 100 or row.get("max_minutes")


def test_all_presets_fit_side_by_side():
    expect_families(*NAMES)
    text = (ROOT / "params.yaml").read_text()
    for name in NAMES:
        text, _, _ = add_rows(text, load_preset(name).chosen())
    assert list(Params(parsed(text)).problems()) == []


def test_the_papers_settings():
    """Settings of the paper's supplement: depth, latent length, schedule, warm-up."""
    rows = {row.dotted: row.plain() for name in NAMES for row in load_preset(name).rows}
    shapes = {"mnist": (8, 1), "tfd": (15, 2), "celeba64-shoes": (100, 3), "celeba128": (200, 4)}
    warm_up = {"mnist": 96, "tfd": 120, "celeba128": 100}
    for dataset, (latent_dim, blocks) in shapes.items():
        ae, iae = rows[f"autoencoders.{dataset}-ae"], rows[f"autoencoders.{dataset}-iae"]
        assert (ae["latent_dim"], ae["blocks"], ae["batch_size"], ae["learning_rate"]) == (latent_dim, blocks, 128, 1e-3)
        assert ae["milestones"] == [20, 50, 100]
        assert {key: value for key, value in iae.items() if key != "incremental"} == ae  # equal steps
        assert iae["incremental"]["warm_up_epochs"] == warm_up.get(dataset, 100)
        lde = rows[f"densities.{dataset}-ae-lde"]
        assert (lde["components"], lde["epochs"], lde["learning_rate"]) == (30, 200, 2e-4)
        assert lde["milestones"] == [15, 35, 60, 100]
    for components in (1, 10, 30, 100):
        lde = rows[f"densities.bsds300-lde-k{components}"]
        assert (lde["components"], lde["epochs"], lde["learning_rate"]) == (components, 250, 1e-4)
        assert lde["milestones"] == list(range(30, 250, 30))
    weights = [0, 0.001, 0.01, 0.1, 1]
    for name in ("mnist-vae2d", "celeba64-vae"):
        assert [row["kl_weight"] for dotted, row in rows.items() if dotted.startswith(f"autoencoders.{name}-")] == weights


# Trials -------------------------------------------------------------------------------------------------------------


def test_trials_are_rows_with_seeds_of_their_own():
    rows = {row.dotted: row.plain() for row in load_preset("vae-tradeoff").chosen(seeds=3)}
    assert [rows[f"autoencoders.mnist-vae2d-1-s{i}"]["seed"] for i in range(3)] == [0, 1, 2]
    assert "autoencoders.mnist-vae2d-1" not in rows
    assert "datasets.mnist" in rows

    rows = {row.dotted: row.plain() for row in load_preset("celeba128").chosen(quick=True, seeds=2)}
    for i in range(2):
        lde = rows[f"densities.celeba128-ae-lde-s{i}"]
        assert (lde["codes"], lde["seed"], lde["dataset"]) == (f"celeba128-ae-s{i}", i, "celeba128")

    # What has no seed is shared by all trials.
    rows = {row.dotted: row.plain() for row in load_preset("own-codes").chosen(seeds=2)}
    assert "autoencoders.my-codes" in rows
    assert rows["densities.my-codes-auto-s1"]["codes"] == "my-codes"


# Adding -------------------------------------------------------------------------------------------------------------

TINY = """\
# head
datasets:
  # the grid
  grid:   # the one
    source: grid
    root: pipeline/sources/grid.py   # its module
    train_count: 100


# between
autoencoders:
  grid: {dataset: grid, objective: identity}
  # at the end of the table

densities: {}  # none yet

sampling: {count: 10}
evaluations: {grid: {}}
# tail
"""

PRESET = """\
description: one
tables:
  datasets:
    # of mine
    mine:
      source: grid
      root: pipeline/sources/grid.py
      half_length: 5.50  # longer
    # of yours
    yours:
      source: grid
      root: pipeline/sources/grid.py
  autoencoders:
    mine:
      dataset: mine
      objective: identity
  densities:
    # the paper's
    mine-lde:
      codes: mine
      dataset: mine
      family: lde
      learning_rate: 1e-4
      seed: 0
  evaluations:
    mine: {}
quick:
  datasets.mine.train_count: 10
  densities.*.epochs: 1
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "one.yaml").write_text(PRESET)
    (tmp_path / "pipeline").symlink_to(ROOT / "pipeline")
    (tmp_path / "params.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


ADDED = """\
# head
datasets:
  # the grid
  grid:   # the one
    source: grid
    root: pipeline/sources/grid.py   # its module
    train_count: 100
  # of mine
  mine:
    source: grid
    root: pipeline/sources/grid.py
    half_length: 5.50  # longer
  # of yours
  yours:
    source: grid
    root: pipeline/sources/grid.py


# between
autoencoders:
  grid: {dataset: grid, objective: identity}
  # at the end of the table
  mine:
    dataset: mine
    objective: identity

densities: # none yet
  # the paper's
  mine-lde:
    codes: mine
    dataset: mine
    family: lde
    learning_rate: 1e-4
    seed: 0

sampling: {count: 10}
evaluations:
  grid: {}
  mine: {}
# tail
"""


def test_rows_are_added_and_the_rest_stays_to_the_byte(project):
    code, out, err = run("add", "one")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "params.yaml: 5 rows added"
    assert "  datasets: mine, yours" in out.splitlines()
    assert (project / "params.yaml").read_text() == ADDED

    before = os.stat(project / "params.yaml")
    code, out, err = run("add", "one")
    assert (code, out.splitlines()[0], err) == (0, "params.yaml: 5 rows there already", "")
    assert os.stat(project / "params.yaml") == before  # not even written


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("last", ["\r\n", ""])
def test_line_ends_stay(mixed, last, project):
    assert run("add", "one")[0] == 0
    expected = (project / "params.yaml").read_text().splitlines()
    first, *rest = TINY.splitlines()
    text = first + ("\n" if mixed else "\r\n") + "\r\n".join(rest) + last
    (project / "params.yaml").write_bytes(text.encode())
    assert run("add", "one")[0] == 0
    lines = (project / "params.yaml").read_bytes().decode().split("\n")
    assert lines == [first + "\r" * (not mixed), *(f"{line}\r" for line in expected[1:]), ""]


def test_quick_and_trials_as_shown(project):
    code, shown, _ = run("show", "one", "--quick", "--seeds", "2")
    assert code == 0
    tables = parsed(shown)
    assert tables["datasets"]["mine"]["train_count"] == 10
    assert list(tables["densities"]) == ["mine-lde-s0", "mine-lde-s1"]
    common = {"codes": "mine", "dataset": "mine", "family": "lde", "learning_rate": 1e-4, "epochs": 1}
    assert tables["densities"]["mine-lde-s1"] == common | {"seed": 1}
    assert shown.count("# the paper's") == 1
    assert run("add", "one", "--quick", "--seeds", "2")[0] == 0
    after = parsed((project / "params.yaml").read_text())
    assert all(after[table][row] == values for table, rows in tables.items() for row, values in rows.items())


WAYS = ["", "# nothing yet\n", "datasets:\n", "datasets: {}\n", TINY.replace("\n  ", "\n    "), TINY.rstrip(), f"{TINY}\n\n"]


@pytest.mark.parametrize("text", WAYS)
def test_any_way_of_writing_the_tables(text):
    rows = load_preset("own-codes").chosen()
    after, added, _ = add_rows(text, rows)
    assert len(added) == len(rows)
    expected = parsed(text) or {}
    for row in rows:
        expected[row.table] = (expected.get(row.table) or {}) | {row.name: row.plain()}
    assert parsed(after) == expected


def test_a_row_with_other_settings_is_named_and_nothing_is_written(project):
    text = TINY.replace("  # the grid\n", "  mine: {source: grid, root: x, half_length: 5.5}\n")
    (project / "params.yaml").write_text(text)
    code, out, err = run("add", "one")
    assert (code, out) == (1, "")
    assert err.startswith(
        "error: preset add one: params.yaml has these rows with other settings; rename them, delete them, or pass --replace: "
    )
    assert "datasets.mine (root: x there, pipeline/sources/grid.py in the preset)" in err
    assert err.count("\n") == 1
    assert (project / "params.yaml").read_text() == text
    assert [p.name for p in project.iterdir() if p.name.startswith(".")] == []


def test_a_row_gets_other_settings_in_its_place(project):
    assert run("add", "one", "--quick")[0] == 0
    text = (project / "params.yaml").read_text()
    assert run("add", "one")[0] == 1
    code, out, _ = run("add", "one", "--replace")
    assert (code, out.splitlines()[0]) == (0, "params.yaml: 2 rows added or replaced")
    assert (project / "params.yaml").read_text() == ADDED
    assert run("add", "one", "--quick", "--replace")[0] == 0
    assert (project / "params.yaml").read_text() == text  # and back, with its order and comments

    (project / "params.yaml").write_text("datasets: {mine: {source: grid, root: pipeline/sources/grid.py}}\n")
    assert "can't be replaced in a table in braces" in run("add", "one", "--replace")[2]


def test_what_would_not_pass_the_check_is_not_written(project):
    (project / "presets" / "one.yaml").write_text(PRESET.replace("family: lde", "family: ldf"))
    code, out, err = run("add", "one")
    assert (code, out) == (1, "")
    assert "nothing was added, because params.yaml would not pass `check`: densities.mine-lde.family: unknown 'ldf'" in err
    assert (project / "params.yaml").read_text() == TINY


def test_a_file_that_can_not_be_written_stays(project, monkeypatch):

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "params.yaml")

    monkeypatch.setattr(os, "replace", full)
    code, _, err = run("add", "one")
    assert code == 1
    assert "no space left" in err
    assert (project / "params.yaml").read_text() == TINY


def test_a_linked_file_stays_a_link(project):
    (project / "real.yaml").write_text(TINY)
    (project / "params.yaml").unlink()
    (project / "params.yaml").symlink_to("real.yaml")
    assert run("add", "one")[0] == 0
    assert stat.S_ISLNK(os.lstat(project / "params.yaml").st_mode)
    assert (project / "real.yaml").read_text() == ADDED


# Presets and params that are wrong ----------------------------------------------------------------------------------

BAD_PRESETS = {
    "not yaml": "tables: {a: [\n",
    "list": "- a\n",
    "empty": "",
    "no description": "tables: {}\n",
    "unknown key": "description: x\ntables: {}\nrows: {}\n",
    "no tables": "description: x\n",
    "sampling": "description: x\ntables: {sampling: {count: 3}}\n",
    "unknown table": "description: x\ntables:\n  densitys:\n    a: {}\n",
    "rows in one line": "description: x\ntables:\n  datasets: {a: {}}\n",
    "row without settings": "description: x\ntables:\n  datasets:\n    a: 3\n",
    "bad name": "description: x\ntables:\n  datasets:\n    A_b: {}\n",
    "quick matches no row": PRESET.replace("datasets.mine.", "datasets.nobody."),
    "quick without a key": PRESET.replace("densities.*.epochs", "densities.*"),
    "quick without a table": PRESET.replace("densities.*.epochs", "densities.*.no.epochs"),
    "quick of another type": PRESET.replace("quick:\n", "quick: 3\nq:\n"),
    "forbidden": PRESET.replace("      seed: 0", "      size: 0"),
    "anchor loop": "description: x\ntables: &t\n  datasets: *t\n",
    "nothing utf-8": b"description: \xff\n",
}


@pytest.mark.parametrize("text", BAD_PRESETS.values(), ids=BAD_PRESETS)
def test_a_preset_that_is_written_wrongly(text, project):
    (project / "presets" / "bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    code, out, err = run("add", "bad", "--quick")
    assert (code, out) == (1, "")
    assert err.startswith("error: preset add bad: ")
    assert err.count("\n") == 1
    assert (project / "params.yaml").read_text() == TINY


@pytest.mark.parametrize(
    "text", ["a: [\n", "- a\n", "3\n", "datasets: 3\n", "{datasets: {}, densities: {}}\n", "a: 1\na: 2\n", b"\xff"]
)
def test_params_that_are_written_wrongly(text, project):
    content = text if isinstance(text, bytes) else text.encode()
    (project / "params.yaml").write_bytes(content)
    code, out, err = run("add", "one")
    assert (code, out) == (1, "")
    assert err.startswith("error: preset add one: ")
    assert err.count("\n") == 1
    assert (project / "params.yaml").read_bytes() == content


def test_names_that_are_no_presets(project):
    assert "no preset 'onne' in presets/; did you mean 'one'? known: one" in run("add", "onne")[2]
    for name in ("../params", "/etc/passwd", "", "README"):
        assert run("show", name)[0] == 1
    (project / "params.yaml").unlink()
    assert "params.yaml is missing; run the command from the project's folder" in run("add", "one")[2]
    (project / "presets" / "one.yaml").unlink()
    assert "run the command from the project's folder" in run("list")[2]
    for wrong in ("0", "-1", "x", "1000"):
        assert run("add", "one", "--seeds", wrong)[0] == 2
    with pytest.raises(SettingsError, match="no preset"):
        load_preset("one")


def test_the_list_names_each_in_a_line():
    code, out, _ = run("list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == NAMES
    assert all(len(line) <= 128 for line in out.splitlines())


def test_the_readme_speaks_of_each():
    text = (ROOT / "presets" / "README.md").read_text()
    assert all(f"| `{name}` |" in text for name in NAMES)


# Files that settings name -------------------------------------------------------------------------------------------

FILES = """\
description: rows that name files
tables:
  datasets:
    photos: {source: images, root: photos, image_px: 8}
  autoencoders:
    photos:
      dataset: photos
      objective: ae
      latent_dim: 3
      blocks: 1
      perceptual_weights: there.pth  # VGG19
  evaluations:
    photos:
      quality: {network: vgg19, weights: gone.pth}
"""


def test_a_file_that_is_there_gets_its_digest(project):
    (project / "presets/files.yaml").write_text(FILES)
    (project / "there.pth").write_bytes(b"one")
    assert run("add", "files")[0] == 0
    pinned = f"there.pth@sha256:{hashlib.sha256(b'one').hexdigest()[:12]}"
    text = (project / "params.yaml").read_text()
    assert re.search(f"perceptual_weights: {pinned} +# VGG19\n", text)
    assert parsed(text)["evaluations"]["photos"]["quality"]["weights"] == "gone.pth"
    assert run("add", "files")[1].startswith("params.yaml: 3 rows there already")

    (project / "there.pth").write_bytes(b"two")
    code, _, err = run("add", "files")
    assert (code, pinned in err) == (1, True)
    assert run("add", "files", "--replace")[0] == 0
    assert pinned not in (project / "params.yaml").read_text()
