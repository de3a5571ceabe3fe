"""Families of densities by the same stages, with the same data and budget, compared in the scoreboard."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from small import run

from pipeline.system.files import read_json

TABLES = """\
datasets:
  grid: {source: grid, root: grid, train_count: 1500, valid_count: 300, test_count: 300}
autoencoders:
  grid: {dataset: grid, objective: identity}
densities:
"""
ROW = "  grid-{name}: {{codes: grid, dataset: grid, family: {family}, {settings}}}\n"
BUDGET = "epochs: 2, batch_size: 250, learning_rate: 0.002"
FAMILIES = {
    "lde": f"components: 10, {BUDGET}",
    "gmmn": f"hidden: [32], {BUDGET}",
    "gaussian": "ridge: 0.0",
    "gmm": "components: [5, 20]",
    "rnade": f"hidden: 32, {BUDGET}",
    "made_mog": f"hidden: [32], {BUDGET}",
    "maf": f"transforms: 2, hidden: [32], {BUDGET}",
    "naf": f"transforms: 1, hidden: [32], signal: 4, {BUDGET}",
}
REST = """\
sampling: {count: 300}
evaluations:
  grid: {parzen: {bandwidth_start: 0.05, bandwidth_stop: 5.0, bandwidth_count: 5, spacing: log}}
"""


def row_name(family: str) -> str:
    return family.replace("_", "-")


def test_families_are_fitted_scored_sampled_and_compared_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "".join(ROW.format(name=row_name(family), family=family, settings=text) for family, text in FAMILIES.items())
    Path("params.yaml").write_text(TABLES + rows + REST)
    for stage in ("prepare", "features", "train", "extract"):
        assert (result := run(stage, "grid")).exit_code == 0, result.output
    for family in map(row_name, FAMILIES):
        for stage in ("fit", "sample", "evaluate"):
            result = run(stage, f"grid-{family}")
            assert result.exit_code == 0, result.output
    result = run("report")
    assert result.exit_code == 0, result.output

    # Figure 5: a panel for each row, and a heat map for each that has a density.
    for name in ("grid-samples", "grid-log-density"):
        assert Path(f"reports/combined/grid-{name}.png").stat().st_size > 10_000
    board = pd.read_csv("reports/scoreboard.csv", index_col="row").loc[[f"grid-{row_name(family)}" for family in FAMILIES]]
    assert (board[["density_parameters", "seconds", "peak_memory_mib"]] > 0).all(axis=None)
    assert board["samples_in_dropped_box"].between(0, 1).all()
    assert board["mmd_squared"].between(-1, 1).all()
    assert board.loc["grid-gmm", "components"] in (5, 20)
    exact = board.drop("grid-gmmn")
    assert (exact["gap_to_truth"] > 0).all()
    assert (exact["score"] == "test log-likelihood").all()
    # A network without likelihood is scored by its samples, since that was asked for.
    assert "test_log_likelihood" not in read_json(Path("reports/metrics/evaluate/grid-gmmn.json"))
    scored = read_json(Path("reports/metrics/evaluate/grid-gmmn.json"))["parzen_test_log_likelihood"]
    assert board.loc["grid-gmmn", "value"] == pytest.approx(scored)
    assert board.loc["grid-gmmn", "protocol"].startswith("Parzen window over 300 samples, bandwidth from 0.05")
    assert "test vectors" in board.loc["grid-gmmn", "protocol"]
    # Mixtures with a component for every bar leave the one Gaussian behind.
    assert exact["value"].drop("grid-gaussian").max() > exact.loc["grid-gaussian", "value"] + 0.3
