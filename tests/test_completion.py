"""Missing values of tables: filled in by means with their spread, or drawn."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import small
import torch

from pipeline.completion import Incomplete, complete_rows
from pipeline.densities.gaussian import Gaussian
from pipeline.errors import DataError
from pipeline.settings import build
from pipeline.sources import vectors

MEAN, COVARIANCE = np.array([1.7e9, -5.0, 0.3]), np.array([[4.0, 3.0, 0.1], [3.0, 9.0, 0.0], [0.1, 0.0, 0.04]])
PARAMS = """\
datasets:
  mine: {source: vectors, root: whole.csv, columns: [a, b, c], labels: kind, drop_constant: true}
  blobs: {source: images, root: raw, image_px: 8}
autoencoders:
  mine: {dataset: mine, objective: identity}
densities:
  mine: {codes: mine, dataset: mine, family: gaussian}
  mine-lde: {codes: mine, dataset: mine, family: lde, components: 1, epochs: 1}
evaluations:
  mine: {}
"""


def table(rows: np.ndarray, kinds: str, spoiled: np.ndarray | None = None) -> str:
    """A table as text, in another order of columns than the row names them; missing values in several spellings."""
    lines = ["c,kind,a,b"]
    for i, (a, b, c) in enumerate(rows):
        cells = [repr(float(value)) for value in (c, a, b)]
        if spoiled is not None:
            gap = ("", "NaN", "NA", "?")[i % 4]
            cells = [gap if hole else cell for cell, hole in zip(cells, spoiled[i][[2, 0, 1]], strict=True)]
        lines.append(f"{cells[0]},{kinds[i % len(kinds)]},{cells[1]},{cells[2]}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a Gaussian of a table far from zero."""
    folder = tmp_path_factory.mktemp("fitted")
    rows = np.random.default_rng(0).multivariate_normal(MEAN, COVARIANCE, 3000)
    (folder / "whole.csv").write_text(table(rows, "xy"))
    (folder / "params.yaml").write_text(PARAMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TRACKING", "off")
        for stage, row in (("prepare", "mine"), ("train", "mine"), ("extract", "mine"), ("fit", "mine"), ("fit", "mine-lde")):
            done = small.run(stage, row)
            assert done.exit_code == 0, done.output
    return folder


def read(path: Path) -> tuple[list[str], list[list[str]]]:
    with open(path, newline="") as file:
        heading, *lines = csv.reader(file)
    return heading, lines


@pytest.fixture
def holes(fitted: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """Rows, and which of their values are missing in `holes.csv`."""
    monkeypatch.chdir(fitted)
    generator = np.random.default_rng(1)
    rows = generator.multivariate_normal(MEAN, COVARIANCE, 300)
    spoiled = generator.random((300, 3)) < [0.5, 0.3, 0.0]
    Path("holes.csv").write_text(table(rows, "uvw", spoiled))
    return rows, spoiled


def test_means_are_those_of_the_regression(holes: tuple[np.ndarray, np.ndarray]) -> None:
    rows, spoiled = holes
    done = small.run("complete", "mine", "holes.csv")
    assert done.exit_code == 0, done.output
    gaps = int(spoiled.any(axis=1).sum())
    assert (
        f"{spoiled.sum()} missing values in {gaps} of 300 rows became means of draws; table: data/completed/mine.csv"
        in done.output
    )
    heading, lines = read(Path("data/completed/mine.csv"))
    assert heading == ["kind", "a", "b", "c", "a spread", "b spread"]
    assert [line[0] for line in lines] == [*"uvw"] * 100
    found = np.array([[float(cell) for cell in line[1:4]] for line in lines])
    assert np.array_equal(found[~spoiled], rows[~spoiled])  # to the bit
    for line, row, gap, mean in zip(lines, rows, spoiled, found, strict=True):
        assert [cell == "" for cell in line[4:]] == (~gap[:2]).tolist()
        if not gap.any():
            continue
        gain = COVARIANCE[np.ix_(gap, ~gap)] @ np.linalg.inv(COVARIANCE[np.ix_(~gap, ~gap)])
        expected = MEAN[gap] + gain @ (row[~gap] - MEAN[~gap])
        spread = np.sqrt(np.diag(COVARIANCE[np.ix_(gap, gap)] - gain @ COVARIANCE[np.ix_(~gap, gap)]))
        assert (np.abs(mean[gap] - expected) < 0.5 * spread).all()  # the mean of 100 draws, of a fitted Gaussian
        np.testing.assert_allclose([float(cell) for cell in line[4:] if cell], spread, rtol=0.4)


def test_draws_are_rows_of_their_own(holes: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    rows, spoiled = holes
    outputs = [tmp_path / name for name in ("one.csv", "same.csv", "other.csv")]
    for output, seed in zip(outputs, (0, 0, 1), strict=True):
        done = small.run("complete", "mine", "holes.csv", "--draws", "3", "--seed", str(seed), "--output", str(output))
        assert done.exit_code == 0, done.output
    heading, lines = read(outputs[0])
    assert heading == ["row", "draw", "kind", "a", "b", "c"]
    assert [line[:2] for line in lines] == [[str(row), str(draw)] for row in range(300) for draw in range(3)]
    found = np.array([[float(cell) for cell in line[3:]] for line in lines]).reshape(300, 3, 3)
    kept = np.broadcast_to(~spoiled[:, None], found.shape)
    assert np.array_equal(found[kept], np.broadcast_to(rows[:, None], found.shape)[kept])
    assert (found.std(axis=1)[spoiled] > 0).all()
    assert abs(found[spoiled[:, 0], :, 0].mean() - MEAN[0]) < 0.5  # in the units of the table, not of the standardised codes
    assert outputs[0].read_bytes() == outputs[1].read_bytes() != outputs[2].read_bytes()


def test_words_for_what_can_t_be_completed(fitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fitted)
    Path("bad.csv").write_text("c,kind,a,b\n1,x,inf,2\n")
    Path("few.csv").write_text("a,b\n1,\n")
    Path("new.csv").write_text("a,b,c\n1,,2\n")  # without the labels
    for arguments, said in (
        (("mine", "absent.csv"), "absent.csv is missing"),
        (("mine", "bad.csv"), "bad.csv: row 0, column 'a' is infinite in float32"),
        (("mine", "few.csv"), "few.csv has no column 'c'; it has a, b"),
        (("mine-lde", "new.csv"), "the family 'lde' can't predict some dimensions from others"),
        (("none", "new.csv"), "'none' is no row of densities"),
    ):
        done = small.run("complete", *arguments, "--output", "bad-output.csv")
        assert done.exit_code == 1
        assert done.output.startswith(f"error: complete {arguments[0]}: ")
        assert said in done.output
        assert len(done.output.splitlines()) == 1
        assert not Path("bad-output.csv").exists()
    assert small.run("complete", "mine", "new.csv").exit_code == 0


def test_columns_go_by_their_names(fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fitted)
    outputs = []
    for name, text in (("fitted", "a,b,c\n1,,2\n"), ("reversed", "c,note,b,a\n2,x,,1\n")):
        (tmp_path / f"{name}.csv").write_text(text)
        outputs.append(tmp_path / f"{name}-completed.csv")
        done = small.run("complete", "mine", str(tmp_path / f"{name}.csv"), "--output", str(outputs[-1]))
        assert done.exit_code == 0, done.output
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert read(outputs[0])[0] == ["a", "b", "c", "b spread"]
    settings = build(vectors.Settings, {"source": "vectors", "root": "a.csv"}, "row")  # that names no columns
    table = Incomplete(tmp_path / "reversed.csv", settings, 3, ("a", "b", "c"))
    assert table.names == ("a", "b", "c")
    np.testing.assert_array_equal(next(table.blocks())[1], [[1, math.nan, 2]])


def test_vectors_with_missing_values_name_the_command(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(50, 2))
    rows[[3, 7, 9], [0, 1, 1]] = np.nan
    np.save(tmp_path / "rows.npy", rows)
    settings = build(vectors.Settings, {"source": "vectors", "root": "rows.npy"}, "datasets.mine")
    said = "row 3, column '0' is missing or not finite in float32, and so are 2 other values; .*stages complete ROW FILE`"
    with pytest.raises(DataError, match=said):
        vectors.open_source(settings, tmp_path / "rows.npy")
    table = Incomplete(tmp_path / "rows.npy", settings, 2)
    assert (table.count, table.names, table.copied) == (50, ("0", "1"), {})
    assert (table.missing.tolist(), table.incomplete_rows) == ([1, 2], 3)
    with pytest.raises(DataError, match="has 2 columns of numbers, and the density takes 3"):
        Incomplete(tmp_path / "rows.npy", settings, 3)


def test_context_columns_are_no_dimensions(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,kind,b,age,fold\n1,x,,30,f\n,y,2,40,g\n")
    values = {"source": "vectors", "root": "rows.csv", "categories": ["kind"], "numbers": ["age"], "groups": "fold"}
    table = Incomplete(tmp_path / "rows.csv", build(vectors.Settings, values, "row"), 2)
    assert table.names == ("a", "b")
    assert table.missing.tolist() == [1, 1]
    assert {name: list(column) for name, column in table.copied.items()} == {
        "fold": ["f", "g"],
        "kind": ["x", "y"],
        "age": ["30", "40"],
    }


def test_labels_are_copied_where_the_groups_are_not_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("note,a,kind,b\nn,1,x,\nm,,y,2\n")
    values = {"source": "vectors", "root": "rows.csv", "columns": ["a", "b"], "labels": "kind", "groups": "day"}
    table = Incomplete(tmp_path / "rows.csv", build(vectors.Settings, values, "row"), 2, ("a", "b"))
    assert table.missing.tolist() == [1, 1]
    assert {name: list(column) for name, column in table.copied.items()} == {"kind": ["x", "y"]}


def test_whole_rows_cost_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    density = Gaussian(2)
    rows = np.array([[0.1, 0.2], [math.nan, 1.0], [math.nan, math.nan]])
    seen = []
    monkeypatch.setattr(density, "sample", lambda n, generator, given: seen.append(given) or Gaussian(2).sample(n, given=given))
    drawn = complete_rows(density, rows, draws=4)
    assert drawn.shape == (4, 3, 2)
    assert torch.equal(torch.isnan(seen[0]), torch.tensor([[True, False], [True, True]]))
    assert (drawn[:, 0] == rows[0]).all()
