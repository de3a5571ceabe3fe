"""Settings explained and changed, and states compared: paired errors, and the whole loop in a fresh clone with real DVC."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from project import Project

from pipeline.errors import PipelineError, SettingsError
from pipeline.settings import Params, changed_defaults, choices, implementation, read_params
from stages.__main__ import cli
from stages.reporting.differences import difference, error_key
from stages.reporting.history import files_at
from stages.reporting.metrics import METRICS
from stages.tools.rows import edit_row
from stages.tools.settings import ABSENT, CHOICES, PLAIN, as_markdown, keys_of

ROOT = Path(__file__).resolve().parent.parent
TEXT = """\
# About the file.
datasets:
  grid: {source: grid, root: pipeline/sources/grid.py, train_count: 300, valid_count: 100, test_count: 120}  # points
controls: {}
autoencoders:
  grid: {dataset: grid, objective: identity}
densities:
  # A first one.
  grid-gaussian: {codes: grid, dataset: grid, family: gaussian}
  # A second one.
  grid-gmm:
    codes: grid
    dataset: grid
    family: gmm
    components: [1]  # one Gaussian

# How many.
sampling: {count: 50}  # few
evaluations:
  grid: {}
detections: {}
"""


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, list(arguments))
    return result.exit_code, result.output


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params.yaml").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "params.yaml"


# Differences ----------------------------------------------------------------------------------------------------------


def test_errors_are_of_differences_of_the_same_points():
    generator = np.random.default_rng(0)
    hard = 100 * generator.normal(size=400)  # what makes a point hard for one makes it hard for the other
    a, b = hard + generator.normal(size=400), hard + 1 + generator.normal(size=400)
    key = "parzen_test_log_likelihood"
    scores = [{key: v.mean(), "parzen_test_se": v.std(ddof=1) / 20, "parzen_test_points": 400} for v in (a, b)]
    paired = difference(key, *scores, {key: a}, {key: b})
    assert paired.paired
    assert paired.value == pytest.approx((b - a).mean())
    assert paired.error == pytest.approx((b - a).std(ddof=1) / 20)
    assert paired.sure
    # Without the points: as if independent, which tells nothing.
    for points in (({}, {}), ({key: a[:-1]}, {key: b})):
        unpaired = difference(key, *scores, *points)
        assert not unpaired.paired
        assert unpaired.error == pytest.approx(np.hypot(*(s["parzen_test_se"] for s in scores)))
        assert not unpaired.sure
    # Only the first quarter was kept: the error is that of all points.
    kept = difference(key, *[s | {"parzen_test_points": 1600} for s in scores], {key: a}, {key: b})
    assert kept.error == pytest.approx(paired.error / 2)


def test_errors_over_groups_of_dependent_points():
    generator = np.random.default_rng(1)
    groups = np.repeat(np.arange(20), 50)
    a = generator.normal(size=1000)
    b = a + generator.normal(size=20)[groups]
    key = "test_log_likelihood"
    scores = [{key: v.mean(), "test_scored": 1000} for v in (a, b)]
    found = difference(key, *scores, {key: a, "groups": groups}, {key: b, "groups": groups})
    means = (b - a).reshape(20, 50).mean(1)
    assert found.error == pytest.approx(means.std(ddof=1) / np.sqrt(20))
    other = difference(key, *scores, {key: a, "groups": groups}, {key: b, "groups": groups[::-1]})
    assert not other.paired


def test_every_error_of_the_table_of_metrics_is_found():
    for metric in METRICS.values():
        key = metric.key.replace("NETWORK", "vgg19")
        assert error_key(key) == metric.error.replace("NETWORK", "vgg19")
    assert error_key("nothing") == ""


# Settings explained ---------------------------------------------------------------------------------------------------


def test_the_page_of_settings_is_current():
    page = (ROOT / "docs/settings.md").read_text()
    assert page == as_markdown(), "run `python -m stages settings --markdown > docs/settings.md`"


def test_every_setting_has_a_meaning_and_its_default():
    classes = [*PLAIN.values()]
    for key, package, _ in CHOICES.values():
        classes += [implementation(package, choice, key).Settings for choice in choices(package)]
    for cls in classes:
        keys = {key.name: key for key in keys_of(cls)}
        assert all(key.meaning and key.kind for key in keys.values()), cls
        for field in dataclasses.fields(cls):
            if field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                assert keys[field.name].default is ABSENT


def test_a_row_is_explained_with_what_differs(project):
    code, out = run("settings", "grid-gmm")
    assert code == 0
    assert "densities.grid-gmm: 1 of " in out
    assert "* components: [1]   (default " in out
    assert "  seed: 0\n" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "constant, steps, cosine" in run("settings", "gmm")[1]
    assert "  rows: grid-gaussian, grid-gmm" in run("settings")[1]
    code, out = run("settings", "grid-gmn")
    assert code == 1
    assert "did you mean 'grid-gmm'?" in out
    resolved = read_params().row("densities", "grid-gmm")
    assert set(changed_defaults(resolved)) == {"components"}


def test_a_dry_run_marks_what_is_no_default(project):
    out = run("fit", "grid-gmm", "--dry-run")[1]
    assert "  components: [1]  # default [10, 20, 50, 100, 200]" in out
    assert "  seed: 0\n" in out


# Settings changed -----------------------------------------------------------------------------------------------------


def test_a_value_is_changed_and_nothing_else(project):
    code, out = run("set", "grid-gmm", "components=[2, 3]", "ridge=[1e-4]")
    assert code == 0, out
    assert "densities.grid-gmm.components: [1] -> [2, 3]\n" in out
    assert "`dvc repro` runs 11 stages, as before" in out  # none has run yet
    new = "    components: [2, 3]  # one Gaussian\n    ridge: [0.0001]\n"
    after = TEXT.replace("    components: [1]  # one Gaussian\n", new)
    assert [line.split() for line in project.read_text().splitlines()] == [line.split() for line in after.splitlines()]
    assert read_params().density("grid-gmm").ridge == (1e-4,)


def test_a_copy_of_a_row_is_added(project):
    code, out = run("set", "densities.grid-gmm", "components=[4]", "--as", "grid-more")
    assert code == 0, out
    assert "fit, sample and evaluate of grid-more" in out
    text = project.read_text()
    assert text.startswith(TEXT[: TEXT.index("\n# How many")])
    assert text.endswith(TEXT[TEXT.index("\n# How many") :])
    assert read_params().density("grid-more").components == (4,)
    assert run("set", "grid-gmm", "components=[5]", "--as", "grid-more")[0] == 1
    assert project.read_text() == text


def test_sections_and_rows_of_several_tables(project):
    assert run("set", "sampling", "count=60")[0] == 0
    assert "sampling: {count: 60}  # few" in project.read_text()
    code, out = run("set", "grid", "test_count=130")  # of datasets alone
    assert code == 0
    assert "datasets.grid.test_count: 120 -> 130" in out
    assert "# points" in project.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["grid-gmm", "componets=[2]"], "densities.grid-gmm.componets: unknown key; did you mean 'components'?"),
        (["grid-gmm", "components=two"], "components: expected"),
        (["grid-gmm", "components"], "'components': expected KEY=VALUE"),
        (["grid-gmm", "components=[1"], "the value of components isn't valid YAML"),
        (["grid-gnn", "seed=1"], "no such row; rows: grid, grid-gaussian, grid-gmm"),
        (["grid", "dataset=x"], "autoencoders.grid.dataset: 'x' is no row of datasets"),
        (["grid-gmm", "seed=1", "--as", "A b"], "a row's name is made of a-z"),
    ],
)
def test_nothing_is_written_if_it_is_wrong(words, message, project):
    code, out = run("set", *words)
    assert code == 1
    assert message in out
    assert len(out.splitlines()) == 1
    assert project.read_text() == TEXT


def test_an_error_that_was_there_is_no_obstacle():
    text = TEXT.replace("family: gaussian", "family: gausian")
    after = edit_row(text, "densities.grid-gmm", {"seed": 3})
    assert list(Params({"datasets": {}}).problems()) == []
    assert "seed: 3" in after
    with pytest.raises(SettingsError, match="nothing was changed"):
        edit_row(text, "densities.grid-gmm", {"seed": -1})


# The loop -------------------------------------------------------------------------------------------------------------


def test_under_dvc_a_mistake_in_any_row_stops_a_stage(project, monkeypatch):
    project.write_text(TEXT.replace("components: [1]", "componets: [1]"))
    assert run("prepare", "grid", "--dry-run")[0] == 0  # by hand, a row is run in spite of others
    monkeypatch.setenv("DVC_STAGE", "prepare@grid")
    code, out = run("prepare", "grid")
    assert (code, out.count("\n")) == (1, 1)
    assert out.startswith("error: prepare grid: densities.grid-gmm.componets: unknown key; did you mean 'components'?")
    assert not Path("data").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_loop_in_a_fresh_clone(tmp_path: Path) -> None:
    """Scores of HEAD can be read where none of its outputs are; what runs is compared with them, and a typo stops at once."""
    (tmp_path / "origin").mkdir()
    origin = Project(tmp_path / "origin", TEXT)
    origin.environment["TRACKING"] = "off"
    origin.repro()
    origin.commit()
    shutil.rmtree(origin.folder / ".dvc/cache")  # as on another machine

    (tmp_path / "clone").mkdir()
    clone = Project(tmp_path / "clone", origin=origin.folder)
    clone.environment["TRACKING"] = "off"
    # As if that machine's last digits were others.
    headline = clone.folder / "reports/headline/grid-gmm.json"
    scores = json.loads(headline.read_text())
    headline.write_text(json.dumps({key: value - 0.5 for key, value in scores.items()}))
    clone.commit()

    # A typo in the last row stops the first stage that runs.
    clone.edit("family: gmm", "family: gmn")
    output = clone.call("dvc", "repro", code=255)
    assert "error: prepare grid: densities.grid-gmm.family: unknown 'gmn'" in output
    assert output.count("Running stage") == 1
    clone.edit("family: gmn", "family: gmm")

    output = clone.call("dvc", "repro")
    assert "score, nats" not in output  # the scoreboard is printed once, below
    shown = clone.call("python", "-m", "stages", "report", "--show")
    assert shown.rstrip().endswith("git add dvc.lock reports/headline && git commit -m results")
    difference = json.loads(clone.call("dvc", "metrics", "diff", "--json"))
    changes = difference["reports/headline/grid-gmm.json"]["test_log_likelihood"]
    assert changes["old"] == pytest.approx(scores["test_log_likelihood"] - 0.5)
    assert changes["new"] == pytest.approx(scores["test_log_likelihood"])
    board = (clone.folder / "reports/scoreboard.csv").read_text().splitlines()
    column = board[0].split(",").index("since_commit")
    assert float(next(line for line in board if line.startswith("grid-gmm,")).split(",")[column]) == pytest.approx(0.5)
    clone.commit()
    assert "git commit" not in clone.call("python", "-m", "stages", "report", "--show")

    said = clone.call("python", "-m", "stages", "set", "grid-gmm", "components=[3]")
    assert "`dvc repro` runs fit, sample and evaluate of grid-gmm; report\n" in said
    assert clone.repro() == {"fit@grid-gmm", "sample@grid-gmm", "evaluate@grid-gmm", "report"}
    board = list(csv.DictReader((clone.folder / "reports/scoreboard.csv").read_text().splitlines()))
    (line,) = [line for line in board if line["row"] == "grid-gmm"]
    assert 0 < float(line["since_commit_error"]) < float(line["error"])  # of the same points
    table = clone.call("python", "-m", "stages", "compare").splitlines()
    assert table[0] == "densities.grid-gmm.components: [1] -> [3]"
    (line,) = [line for line in table if line.lstrip().startswith("test log-likelihood")]
    assert line.endswith("better")
    assert "the same scores: grid-gaussian" in table
    assert max(map(len, table)) <= 80
    rows = clone.call("python", "-m", "stages", "compare", "--rows", "grid-gaussian", "grid-gmm")
    assert "densities.family: gaussian -> gmm" in rows
    assert "unknown Git revision 'nothing'" in clone.call("python", "-m", "stages", "compare", "nothing", code=1)
    # Undone, all comes from the cache, the headline that git keeps too.
    clone.call("git", "checkout", "-q", "params.yaml")
    assert clone.repro() == set()
    assert subprocess.run(["git", "diff", "--quiet"], cwd=clone.folder, check=False).returncode == 0


def test_rows_side_by_side_have_their_whole_names(project: Path) -> None:
    project.write_text(edit_row(TEXT, "densities.grid-gaussian", {"seed": 1}, "grid-gaussian-too"))
    Path("reports/metrics/evaluate").mkdir(parents=True)
    rows = ("grid-gaussian", "grid-gaussian-too")
    for number, row in enumerate(rows):
        Path(f"reports/metrics/evaluate/{row}.json").write_text(json.dumps({"test_log_likelihood": number}))
    code, output = run("compare", "--rows", *rows)
    lines = output.splitlines()
    start = lines.index("A: grid-gaussian")
    assert code == 0
    assert lines[start + 1] == "B: grid-gaussian-too"
    assert lines[start + 2].split() == ["A", "B", "difference", "±", "SE"]


def test_what_the_cache_of_a_fresh_clone_lacks_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dvc = f"{sys.executable} -m dvc"
    for command in ("git init -q", "git config user.email a@b.c", "git config user.name a", f"{dvc} init -q"):
        subprocess.run(command.split(), check=True)
    Path("arrays").mkdir()
    Path("arrays/scores").write_text("1")
    for command in (f"{dvc} add -q arrays", "git add .", "git commit -qm arrays"):
        subprocess.run(command.split(), check=True)
    Path(".dvc/cache").rename("elsewhere")
    assert files_at("HEAD")(Path("arrays/scores")) is None
    assert files_at("HEAD")(Path("nothing")) is None
    with pytest.raises(PipelineError, match="unknown Git revision 'nothing'"):
        files_at("nothing")
    Path("elsewhere").rename(".dvc/cache")
    assert files_at("HEAD")(Path("arrays/scores")) == b"1"
