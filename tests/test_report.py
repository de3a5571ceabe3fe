"""Scoreboard, page and the pipeline's run, on a small made-up workspace and in a real browser."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from ruamel.yaml import YAML

from pipeline.errors import PipelineError
from pipeline.evaluation.exploration import exploration
from pipeline.settings import Params, read_params
from stages.arrays import PER_EXAMPLE, load_arrays, save_arrays
from stages.report import report
from stages.reporting.cards import verdict
from stages.reporting.explore import explorations
from stages.reporting.graph import Graph, stage_states
from stages.reporting.page import description, render
from stages.reporting.published import BENCHMARKS, PUBLISHED, benchmark_of, best_published, paper_value
from stages.reporting.scoreboard import COLUMNS, QUALITY, as_text, build_scoreboard, headline, plus_minus

HOSTILE = "<script>alert('x')</script>|`\"><img src=http://evil.example/x.png>"


def write(path: str, value: object) -> None:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(value if isinstance(value, str) else json.dumps(value))


def run_file(stage: str, row: str, finished: str = "2025-03-01T10:00:00+0000", **more: object) -> None:
    write(
        f"reports/runs/{stage}/{row}.json",
        {"run_id": f"id-{stage}-{row}", "seconds": 2.5, "peak_memory_mib": 100.0, "finished": finished, **more},
    )


def parzen(value: float, prefix: str = "", samples: int = 4000, protocol: str = "gmmn") -> dict[str, object]:
    scores = {
        "test_log_likelihood": value, "test_se": 5.0, "valid_log_likelihood": value, "bandwidth": 0.18, "bandwidth_at_edge": 0,
        "samples": samples, "valid_points": 500, "test_points": 500, "protocol": protocol,
    }  # fmt: skip
    return {f"{prefix}parzen_{key}": v for key, v in scores.items()}


def make_workspace(protocol: str = "gmmn", extra_row: bool = False) -> None:
    """Two autoencoders of digits, each with a density, two controls, and the grid density, in the current folder."""
    image = {"dataset": "digits", "objective": "ae", "latent_dim": 2, "blocks": 1}
    tables = {
        "datasets": {
            "digits": {"source": "digits5k", "root": "digits5k.py"},
            "grid": {"source": "grid", "root": HOSTILE},
        },
        "controls": {"digits": {"dataset": "digits"}},
        "autoencoders": {
            "digits-ae": image,
            "digits-iae": image | {"incremental": {"mode": "linear", "warm_up_epochs": 1}},
            "grid": {"dataset": "grid", "objective": "identity"},
        },
        "densities": {
            "digits-ae-lde": {"codes": "digits-ae", "dataset": "digits", "family": "lde", "components": 30},
            "digits-iae-lde": {"codes": "digits-iae", "dataset": "digits", "family": "lde", "components": 30},
            "grid-lde": {"codes": "grid", "dataset": "grid", "family": "lde", "components": 10},
        },
        "sampling": {"count": 10_000},
        "evaluations": {"digits": {"parzen": {"protocol": protocol}}, "grid": {}},
    }
    if extra_row:
        tables["densities"]["digits-more"] = {"codes": "digits-ae", "dataset": "digits", "family": "gaussian"}
    with open("params.yaml", "w") as file:
        YAML().dump(tables, file)
    for name in ("digits", "grid"):
        write(f"reports/metrics/prepare/{name}.json", {"train_examples": 4000, "valid_examples": 500, "test_examples": 500})
        run_file("prepare", name, digest="ab" * 32)
        write(f"reports/metrics/features/{name}.json", {})
        run_file("features", name)
    controls = parzen(224.0, "training_images_", 4000, protocol) | parzen(233.0, "kmeans_", 2000, protocol)
    write("reports/metrics/control/digits.json", controls)
    run_file("control", "digits")
    for name, errors in (("digits-ae", [0.1, 0.02]), ("digits-iae", [0.08, 0.021]), ("grid", [])):
        if errors:
            save_arrays("train", name, "open-dimensions", {"ks": np.arange(1, 3), "mse": np.array(errors)})
        write(f"reports/metrics/train/{name}.json", {"test_mse": errors[-1]} if errors else {})
        write(f"reports/metrics/extract/{name}.json", {"dimensions": 2})
        write(f"reports/curves/train/{name}.tsv", "step\tloss\topen_dimensions\n1\t0.2\t1\n2\t0.1\t2\n")
        run_file("train", name, finished="2025-03-01T12:00:00+0000", parameters=1000)
        run_file("extract", name)
    images = np.zeros((2, 1, 4, 4), np.uint8)
    save_arrays("train", "digits-ae", "reconstructions", {"inputs": images, "reconstructions": images})
    scores = {
        "digits-ae-lde": parzen(257.7, protocol=protocol),
        "digits-iae-lde": parzen(264.0, protocol=protocol),
        "grid-lde": {
            "test_log_likelihood": -3.3,
            "test_log_likelihood_se": 0.008,
            "test_scored": 10_000.0,
            "gap_to_truth": 0.2,
        },
    } | ({"digits-more": parzen(227.0)} if extra_row else {})
    for name, score in scores.items():
        write(f"reports/metrics/fit/{name}.json", {"parameters": 100, "test_log_likelihood": -1.0})
        write(f"reports/metrics/sample/{name}.json", {"samples": 10_000})
        write(f"reports/metrics/evaluate/{name}.json", score)
        write(f"reports/curves/fit/{name}.tsv", "step\tloss\tvalid_log_likelihood\n1\t2.0\t\n2\t1.5\t-3.0\n4\t1.4\t-2.5\n")
        for stage in ("fit", "sample", "evaluate"):
            run_file(stage, name)
        points = np.zeros((4, 2), np.float32)
        arrays = {"samples": points, "target": points} if name == "grid-lde" else {"samples": images}
        save_arrays("sample", name, "samples", arrays)


HEAD = {"commit": "0123456789abcdef", "dirty": "true", "date": "2025-03-01", "machine": "2 cores", "versions": "Python 3"}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKING", "off")
    monkeypatch.delenv("DVC_STAGE", raising=False)
    make_workspace()
    return tmp_path


def command(*arguments: str):
    return CliRunner().invoke(report, list(arguments))


# Scoreboard ----------------------------------------------------------------------------------------------------------


def test_scoreboard_holds_models_and_controls_in_order(workspace):
    board = build_scoreboard(read_params())
    assert list(board.columns) == list(COLUMNS)
    assert board["row"].tolist() == ["digits-iae-lde", "digits-ae-lde", "digits-kmeans", "digits-training-images", "grid-lde"]
    assert board["kind"].tolist() == ["model", "model", "control", "control", "model"]
    iae = board.set_index("row").loc["digits-iae-lde"]
    assert iae["objective"] == "ae, incremental (linear)"
    assert (iae["samples"], iae["components"], iae["latent_dim"]) == (4000, 30, 2)
    assert iae["seconds"] == 5 * 2.5
    assert (iae["autoencoder_parameters"], iae["density_parameters"]) == (1000, 100)
    assert iae["control_difference"] == pytest.approx(264.0 - 224.0)
    assert iae["best_control"] == "digits-training-images"
    assert "4,000 samples" in iae["protocol"]
    assert board.set_index("row").loc["grid-lde", "protocol"] == "mean log-density of 10,000 test vectors"
    assert "500 validation images" in iae["protocol"]


def test_against_control_takes_errors_into_account(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_workspace(extra_row=True)
    board = build_scoreboard(read_params()).set_index("row")
    # Errors of 5 each: 2 sqrt(50) = 14.1 nats.
    assert board.loc["digits-ae-lde", "against_control"] == "better"
    assert board.loc["digits-more", "against_control"] == "level"
    assert pd.isna(board.loc["grid-lde", "against_control"])
    scores = json.loads(Path("reports/metrics/evaluate/digits-more.json").read_text())
    write("reports/metrics/evaluate/digits-more.json", scores | {"parzen_test_log_likelihood": 200.0})
    assert build_scoreboard(read_params()).set_index("row").loc["digits-more", "against_control"] == "worse"


def test_a_change_since_the_last_commit_has_an_error(workspace, monkeypatch):
    files = {path: path.read_bytes() for path in Path("reports").rglob("*.json")}
    headline = {"parzen_test_log_likelihood": 255.0}  # as committed
    monkeypatch.setattr("stages.workspace.committed", lambda path: json.dumps(headline) if "iae" in path.name else None)
    monkeypatch.setattr("stages.reporting.history.files_at", lambda revision: files.get)
    board = build_scoreboard(read_params()).set_index("row")
    line = board.loc["digits-iae-lde"]
    assert line["since_commit"] == 264.0 - 255.0
    assert line["since_commit_error"] == pytest.approx(math.sqrt(2) * line["error"])  # without scores of single points
    assert pd.isna(board.loc["digits-ae-lde", "since_commit_error"])
    assert command().exit_code == 0
    assert f">+{plus_minus(9.0, line['since_commit_error'])}</td>" in Path("reports/index.html").read_text()


def test_detections_have_a_section_pictures_and_headlines(workspace):
    tables = YAML(typ="safe").load(Path("params.yaml").read_text())
    tables["datasets"]["sevens"] = {"source": "digits5k", "root": "digits5k.py", "classes": [7]}
    tables["detections"] = {
        "sevens-found": {
            "density": "digits-ae-lde", "family": "lde", "codes": "digits-ae", "dataset": "digits", "outliers": "sevens",
            "outlier_classes": [7],
        }
    }  # fmt: skip
    with open("params.yaml", "w") as file:
        YAML().dump(tables, file)
    write("reports/metrics/prepare/sevens.json", {f"{split}_examples": 10 for split in ("train", "valid", "test")})
    run_file("prepare", "sevens")
    scores = {"auroc": 0.9876, "average_precision": 0.9, "false_alarms_at_95": 0.05}
    scores |= {f"{key}_se": 0.001 for key in scores} | {"inliers_scored": 500, "outliers_scored": 50}
    write("reports/metrics/detect/sevens-found.json", scores)
    run_file("detect", "sevens-found")
    values = {"strangeness_edges": np.arange(4.0), "threshold": np.array([2.0])}
    values |= {f"strangeness_{kind}": np.array([0.5, 0.5, 0.0]) for kind in ("inliers", "outliers")}
    save_arrays("detect", "sevens-found", "scores", values, ["strangeness"])
    ends = np.array([0.0, 1.0])
    save_arrays("detect", "sevens-found", "roc", {"strangeness_alarms": ends, "strangeness_detected": ends}, ["strangeness"])
    images = {f"{i}_examples": np.zeros((2 + i, 1, 4, 4), np.uint8) for i in range(2)}
    save_arrays("detect", "sevens-found", "strangest", images, ["most ordinary inliers", "strangest inliers"])
    done = command()
    assert done.exit_code == 0, done.output
    page = Path("reports/index.html").read_text()
    assert "Outliers told from inliers" in page
    assert "sevens with label 7 told from the data set&#39;s own test examples by digits-ae-lde: AUROC 0.9876 ± 0.0010" in page
    names = ("scores", "roc", "strangest")
    assert all(Path(f"reports/figures/detect/sevens-found/{name}.png").is_file() for name in names)
    headline = json.loads(Path("reports/headline/sevens-found.json").read_text())
    assert headline == {"auroc": 0.9876, "average_precision": 0.9, "false_alarms_at_95": 0.05}


def test_likelihoods_of_different_codes_give_no_verdict_but_their_pictures_do(workspace):
    for name, kid in (("digits-ae-lde", 20.0), ("digits-iae-lde", 9.0)):
        scores = {"test_log_likelihood": -10.0 - kid, "test_log_likelihood_se": 0.1, "test_scored": 500.0}
        quality = {f"vgg19_{key}": kid if key == "kid" else 0.5 for key in QUALITY}
        write(f"reports/metrics/evaluate/{name}.json", scores | quality)
    tables = YAML(typ="safe").load(Path("params.yaml"))
    tables["evaluations"]["digits"] = {"quality": {"network": "vgg19", "weights": "w.safetensors", "samples": 100}}
    YAML().dump(tables, Path("params.yaml"))
    board = build_scoreboard(read_params())
    text = render("report.md", read_params(), board, [], HEAD).replace("\\", "")
    assert "- **digits**: digits-iae-lde: KID 9.00 ± 0.50 in the features of vgg19 (0 where" in text
    assert "its samples cover 50 % of the test images" in text
    assert "The next one, digits-ae-lde, is worse by more than chance (11.00 ± 0.71 in KID)." in text
    assert "digits: test log-likelihood of the codes (to compare densities of the same codes only)" in as_text(board)


def test_controls_of_another_number_of_samples_give_no_verdict(workspace):
    # 2,000 centroids score 233, above 4,000 training images.
    verdict = render("report.md", read_params(), build_scoreboard(read_params()), [], HEAD).replace("\\", "")
    assert "40.0 nats above the best control (digits-training-images)" in verdict
    controls = parzen(224.0, "training_images_", 2000) | parzen(233.0, "kmeans_", 2000)
    write("reports/metrics/control/digits.json", controls)
    board = build_scoreboard(read_params()).set_index("row")
    assert board[["against_control", "best_control", "control_difference"]].isna().all(axis=None)
    assert board.loc["digits-kmeans", "value"] == 233.0


def with_trials(scores: Mapping[str, dict[str, object]], codes: str, family: str = "lde") -> None:
    """Adds rows of densities with these scores."""
    tables = YAML(typ="safe").load(Path("params.yaml"))
    for name, score in scores.items():
        tables["densities"][name] = {"codes": codes, "dataset": codes.split("-")[0], "family": family}
        for stage, metrics in {"fit": {"parameters": 100}, "sample": {}, "evaluate": score}.items():
            write(f"reports/metrics/{stage}/{name}.json", metrics)
    YAML().dump(tables, Path("params.yaml"))


def test_trials_have_a_line_with_their_mean(workspace):
    with_trials({f"digits-lde-s{i}": parzen(value) for i, value in enumerate((300.0, 306.0, 303.0))}, "digits-ae")
    with_trials(
        {"digits-one-s0": parzen(250.0), "digits-mixed-s0": parzen(1.0), "digits-mixed-s1": parzen(2.0, "", 9)}, "digits-ae"
    )
    board = build_scoreboard(read_params())
    assert board["row"].tolist()[:4] == ["digits-lde-s1", "digits-lde", "digits-lde-s2", "digits-lde-s0"]
    line = board.set_index("row").loc["digits-lde"]
    assert (line["kind"], line["trials"], line["value"], line["samples"]) == ("mean", 3, 303.0, 4000)
    assert line["error"] == pytest.approx(3 / 3**0.5)
    assert line["test_mse"] == pytest.approx(0.02)
    assert line["protocol"].startswith("mean of 3 trials, ± standard error over 3 seeds; Parzen window over 4,000 samples")
    assert (line["against_control"], line["control_difference"]) == ("better", 303.0 - 224.0)
    assert set(board[board["kind"] == "mean"]["row"]) == {"digits-lde"}  # neither one trial nor two numbers of samples
    assert "digits-lde" not in headline(board)
    assert "digits-lde (mean of 3)" in as_text(board)
    assert "digits-lde (mean of 3)" in description(board).replace("\\", "")
    states = stage_states(read_params(), None)
    page = render("report.html", read_params(), board, states, HEAD)
    assert all(link[1:] in parse(page).ids for link in parse(page).links if link.startswith("#"))
    assert "<small>mean of 3</small>" in page
    assert "digits-lde (mean of 3) | 303.0 ± 1.7 |" in render("report.md", read_params(), board, states, HEAD).replace("\\", "")


def test_the_verdict_is_that_of_means_and_never_of_the_luckiest_trial(workspace):
    def verdict() -> str:
        text = render("report.md", read_params(), build_scoreboard(read_params()), [], HEAD).replace("\\", "")
        return next(line for line in text.splitlines() if line.startswith("- **digits**"))

    with_trials({f"digits-lde-s{i}": parzen(value) for i, value in enumerate((290.0, 310.0))}, "digits-ae")
    assert "digits-lde (mean of 2): 300 ± 10 nats" in verdict()
    assert "76.0 nats above the best control" in verdict()
    with_trials({"digits-alone": parzen(305.0)}, "digits-ae")  # below the best trial, above the mean
    assert "digits-alone: 305 ± 5 nats" in verdict()


def test_a_mean_has_the_error_over_its_trials_in_every_column(workspace):
    quality = {f"classifier_{key}": 0.5 for key in QUALITY}
    kids = (1.0, 3.0)
    with_trials(
        {f"digits-lde-s{i}": parzen(300.0 + i) | quality | {"classifier_kid": kid} for i, kid in enumerate(kids)}, "digits-ae"
    )
    tables = YAML(typ="safe").load(Path("params.yaml"))
    tables["evaluations"]["digits"]["quality"] = {"network": "classifier"}
    YAML().dump(tables, Path("params.yaml"))
    line = build_scoreboard(read_params()).set_index("row").loc["digits-lde"]
    assert (line["classifier_kid"], line["classifier_kid_se"]) == (2.0, pytest.approx(1.0))


def test_settings_are_resolved_once_a_row(workspace, monkeypatch):
    from pipeline.settings import params as module

    resolved: list[str] = []
    build = module.build
    monkeypatch.setattr(module, "build", lambda cls, values, where: resolved.append(where) or build(cls, values, where))
    params = read_params()
    states = stage_states(params, None)
    Graph(params, states)
    render("report.md", params, build_scoreboard(params), states, HEAD)
    assert len(resolved) == len(set(resolved))


def test_means_on_bsds300_have_two_standard_deviations(workspace):
    tables = YAML(typ="safe").load(Path("params.yaml"))
    tables["datasets"]["grid"] = {"source": "bsds300", "root": "raw"}
    YAML().dump(tables, Path("params.yaml"))
    scores = {"test_log_likelihood_se": 0.07, "test_scored": 1e6}
    with_trials({f"grid-two-s{i}": scores | {"test_log_likelihood": 156.0 + 2 * i} for i in range(3)}, "grid")
    line = build_scoreboard(read_params()).set_index("row").loc["grid-two"]
    assert (line["value"], line["error"]) == (158.0, 4.0)
    assert "± 2 standard deviations over 3 trials" in line["protocol"]


def test_a_removed_row_vanishes_though_its_files_stay(workspace):
    tables = YAML(typ="safe").load(Path("params.yaml"))
    del tables["densities"]["digits-ae-lde"]
    YAML().dump(tables, Path("params.yaml"))
    assert command().exit_code == 0
    assert [path.name for path in sorted(Path("reports/headline").iterdir())] == ["digits-iae-lde.json", "grid-lde.json"]
    for name in ("scoreboard.csv", "report.md", "index.html"):
        assert "digits-ae-lde" not in Path("reports", name).read_text(encoding="utf-8")


def test_missing_metrics_name_the_stage_and_leave_the_last_report(workspace):
    assert command().exit_code == 0
    before = Path("reports/index.html").read_bytes()
    Path("reports/metrics/evaluate/grid-lde.json").unlink()
    with pytest.raises(PipelineError, match="evaluate@grid-lde"):
        build_scoreboard(read_params())
    result = command()
    assert result.exit_code == 1
    assert "evaluate/grid-lde.json is missing" in result.output
    assert "Traceback" not in result.output
    assert Path("reports/index.html").read_bytes() == before


def test_headline_is_short_and_free_of_times(workspace):
    numbers = headline(build_scoreboard(read_params()))
    assert numbers["digits-ae-lde"] == {"parzen_test_log_likelihood": 257.7, "test_mse": 0.02}
    assert numbers["grid-lde"] == {"test_log_likelihood": -3.3, "gap_to_truth": 0.2}
    assert all(1 <= len(scores) <= 3 for scores in numbers.values())
    assert set(numbers) == {"digits-ae-lde", "digits-iae-lde", "grid-lde"}


def test_a_density_without_likelihood_is_shown(workspace):
    write("reports/metrics/evaluate/grid-lde.json", {"samples_in_dropped_box": 0.01, "mmd_squared": 0.002})
    board = build_scoreboard(read_params())
    assert headline(board)["grid-lde"] == {"samples_in_dropped_box": 0.01, "mmd_squared": 0.002}
    assert command().exit_code == 0
    assert "no likelihood" in Path("reports/index.html").read_text(encoding="utf-8")


def test_text_survives_the_csv(workspace):
    result = command()
    assert result.exit_code == 0
    board = build_scoreboard(read_params())
    assert "nats" not in result.output  # the scoreboard is printed once, by `--show`
    assert command("--show").output.rstrip() == as_text(board)
    assert max(map(len, as_text(board).splitlines())) <= 120


def test_show_without_a_report_says_what_to_run(workspace):
    result = command("--show")
    assert result.exit_code == 1
    assert "dvc repro" in result.output


def test_dry_run_writes_nothing(workspace):
    result = command("--dry-run")
    assert "reads reports/metrics/fit/grid-lde.json" in result.output
    assert "writes reports/index.html" in result.output
    assert not Path("reports/index.html").exists()


# Published scores ----------------------------------------------------------------------------------------------------


def compares(source: str, train: int, test: int, *window: object, **settings: object) -> str | None:
    counts = {"train_examples": train, "test_examples": test}
    return benchmark_of({"source": source, **settings}, "parzen" if window else "likelihood", counts, *window)


def test_published_scores_need_the_same_protocol():
    assert compares("mnist", 50_000, 10_000, 10_000, "gmmn") == compares("mnist", 55_000, 10_000, 10_000, "gmmn") == "mnist"
    assert compares("mnist", 50_000, 10_000, 4_000, "gmmn") is None
    assert compares("mnist", 50_000, 10_000, 10_000, "goodfellow") is None
    assert compares("mnist", 10_000, 10_000, 10_000, "gmmn") is None  # --quick
    assert compares("digits5k", 50_000, 10_000, 10_000, "gmmn") is None
    assert compares("bsds300", 1_000_000, 250_000, split="maf") == "bsds300-maf"
    assert compares("bsds300", 4_000_000, 1_000_000, split="rnade") == "bsds300-rnade"
    assert compares("bsds300", 50_000, 20_000, split="rnade") is None  # --quick
    assert compares("patches", 50_000, 1_000_000) is None
    assert benchmark_of({"source": "bsds300", "split": "maf"}, "likelihood", {}) is None


def test_stand_in_faces_are_not_the_toronto_face_database():
    assert compares("tfd", 98_058, 835, 10_000, "tfd-authors", train_on="unlabelled") == "tfd"
    assert compares("tfd", 98_058, 835, 10_000, "gmmn", train_on="unlabelled") is None
    assert compares("tfd", 12_000, 835, 10_000, "tfd-authors", train_on="unlabelled") is None
    assert compares("tfd", 100_983, 835, 10_000, "tfd-authors", train_on="all") is None


@pytest.mark.parametrize(("train", "best"), [(50_000, 345.0), (10_000, None)])
def test_the_board_looks_at_the_prepared_counts(train, best, workspace):
    tables = YAML(typ="safe").load(Path("params.yaml"))
    tables["datasets"]["digits"] = {"source": "mnist", "root": "raw"}
    YAML().dump(tables, Path("params.yaml"))
    write("reports/metrics/prepare/digits.json", {"train_examples": train, "valid_examples": 10_000, "test_examples": 10_000})
    write("reports/metrics/evaluate/digits-ae-lde.json", parzen(330.0, samples=10_000))
    line = build_scoreboard(read_params()).set_index("row").loc["digits-ae-lde"]
    assert line["best_published"] == best or (best is None and pd.isna(line["best_published"]))
    assert ("comparable to MNIST" in line["protocol"]) == (best is not None)


def row(objective: str, family: str, autoencoder: Mapping[str, object] | None = None, **density: object) -> tuple[dict, dict]:
    """Settings of an autoencoder and a density, with their defaults."""
    more = {"latent_dim": 8, "blocks": 1, **(autoencoder or {})} if objective != "identity" else {}
    source = "bsds300" if objective == "identity" else "mnist" if more["blocks"] == 1 else "tfd"
    tables = {
        "datasets": {"d": {"source": source, "root": "raw"}},
        "autoencoders": {"a": {"dataset": "d", "objective": objective, **more}},
        "densities": {"d": {"codes": "a", "dataset": "d", "family": family, **density}},
    }
    params = Params(tables)
    return asdict(params.autoencoder("a")), asdict(params.density("d"))


FACES = {"latent_dim": 15, "blocks": 2}
OPENED = {"incremental": {"mode": "linear", "warm_up_epochs": 4}}


@pytest.mark.parametrize(("benchmark", "settings", "value"), [
    ("mnist", row("ae", "lde"), 326),
    ("mnist", row("ae", "lde", OPENED), 326),
    ("tfd", row("ae", "lde", FACES), 2476),
    ("tfd", row("ae", "lde", FACES | OPENED), 2507),
    ("mnist", row("ae", "lde", standardise="none", epochs=3, batch_size=9), 326),  # how it is trained is free
    ("mnist", row("aae", "prior"), 340),
    ("tfd", row("aae", "prior", FACES), 2252),
    ("mnist", row("ae", "gmmn"), 282),
    ("tfd", row("ae", "gmmn", FACES), 2204),
    ("bsds300-rnade", row("identity", "lde"), 158.02),
    ("bsds300-rnade", row("identity", "lde", components=100, standardise="cholesky"), 157.03),
])  # fmt: skip
def test_paper_values_follow_the_method(benchmark, settings, value):
    assert paper_value(benchmark, *settings).value == value


@pytest.mark.parametrize(("benchmark", "settings"), [
    (None, row("ae", "lde")),
    ("mnist", row("ae", "lde", {"latent_dim": 12})),
    ("mnist", row("ae", "lde", {"base_channels": 32})),
    ("mnist", row("ae", "lde", FACES)),
    ("mnist", row("ae", "lde", {"incremental": {"mode": "nested_dropout"}})),
    ("mnist", row("ae", "lde", components=10)),
    ("mnist", row("ae", "lde", blocks="separate", width=96)),
    ("mnist", row("ae", "lde", layers=4)),
    ("mnist", row("ae", "lde", width=64)),
    ("mnist", row("ae", "lde", channel_cap=16)),
    ("mnist", row("ae", "lde", normalisation="batch")),
    ("mnist", row("ae", "gaussian")),
    ("mnist", row("vae", "lde")),
    ("mnist", row("vae", "prior")),
    ("mnist", row("aae", "lde")),
    ("mnist", row("aae", "prior", {"prior": "two_normals"}, prior="two_normals")),
    ("bsds300-rnade", row("identity", "lde", components=7)),
    ("bsds300-rnade", row("identity", "lde", patch_orders=4)),
    ("bsds300-maf", row("identity", "lde")),  # the paper's split is RNADE's
])  # fmt: skip
def test_other_networks_have_no_value_in_the_paper(benchmark, settings):
    assert paper_value(benchmark, *settings) is None


def test_the_best_published_score_is_that_of_the_benchmark():
    assert best_published("bsds300-maf").value == 160.01
    assert best_published(None) is None
    assert {p.benchmark for p in PUBLISHED} == set(BENCHMARKS)


# Page ----------------------------------------------------------------------------------------------------------------


class Addresses(HTMLParser):
    """Collects the attributes that make a browser fetch or go somewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster", "action", "background") or (name == "href" and tag != "a"):
                self.fetched.append(value)
            elif name == "href":
                self.links.append(value)
            elif name == "id":
                self.ids.append(value)
            assert not name.startswith("on"), (tag, name)


def parse(text: str) -> Addresses:
    parser = Addresses()
    parser.feed(text)
    return parser


def test_page_holds_everything_in_itself(workspace):
    assert command().exit_code == 0
    text = Path("reports/index.html").read_text(encoding="utf-8")
    page = parse(text)
    assert page.fetched
    assert all(address.startswith("data:") for address in page.fetched)
    kinds = ("http://127.0.0.1:5000/#/runs/id-", "data:text/csv;base64,")
    assert all(link.startswith(kinds) or (link.startswith("#") and link[1:] in page.ids) for link in page.links)
    (saved,) = [link for link in page.links if link.startswith("data:")]
    assert base64.b64decode(saved.partition(",")[2]) == Path("reports/scoreboard.csv").read_bytes()
    assert len(page.ids) == len(set(page.ids))
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import", text)
    # Samples of three densities, a reconstruction, and plots of several rows together.
    combined = sorted(path.stem for path in Path("reports/combined").glob("*.png"))
    expected = ["open-dimensions", "opened-dimensions", "samples", "training-loss", "validation"]
    assert combined == [f"digits-{name}" for name in expected] + ["grid-training-loss", "grid-validation"]
    assert page.tags.count("img") == 4 + len(combined) + 2  # the cards


def test_pictures_of_enlarged_images_are_labelled_so(workspace):
    def label() -> int:
        assert command().exit_code == 0
        return Path("reports/report.md").read_text(encoding="utf-8").count("600 of its 5,000 images were enlarged")

    def smoke_tests() -> int:
        return Path("reports/report.md").read_text(encoding="utf-8").count("a smoke test, and no result")

    assert label() == 0
    path = Path("reports/metrics/prepare/digits.json")
    write(str(path), json.loads(path.read_text()) | {"enlarged_images": 600, "duplicates_train_test": 3})
    figures = [*Path("reports/combined").glob("digits-*.png"), *Path("reports/figures").glob("*/digits-*/*.png")]
    # The plot of all rows says what that of one row does.
    figures = len([path for path in figures if path.stem != "open-dimensions"])
    assert label() == 1 + figures  # in the section's first line, and below each picture
    assert "3 of the test images are among the training images too" in Path("reports/report.md").read_text(encoding="utf-8")
    assert smoke_tests() == 0
    write(str(path), json.loads(path.read_text()) | {"enlarged_images": 5000})
    assert command().exit_code == 0
    assert smoke_tests() == 1 + figures


def test_curves_of_all_rows_lie_in_one_table(workspace):
    write("reports/curves/train/grid.tsv", "step\n")  # vectors are their own codes: nothing is trained
    assert command().exit_code == 0
    table = pd.read_csv("reports/combined/training-loss.tsv", sep="\t")
    assert table.to_dict("list") == {
        "dataset": ["digits"] * 4, "row": ["digits-ae"] * 2 + ["digits-iae"] * 2, "step": [1, 2] * 2, "loss": [0.2, 0.1] * 2,
    }  # fmt: skip
    validation = pd.read_csv("reports/combined/validation.tsv", sep="\t")
    assert validation[validation["row"] == "grid-lde"]["step"].tolist() == [2, 4]  # not where the loss alone was noted
    assert set(validation["dataset"]) == {"digits", "grid"}


def test_the_same_state_gives_the_same_page(workspace):
    params = read_params()
    board, states = build_scoreboard(params), stage_states(params, None)
    for template in ("report.html", "report.md"):
        texts = {render(template, params, board, states, HEAD) for _ in range(2)}
        assert len(texts) == 1
        assert "0123456789" in texts.pop()


def test_markup_is_escaped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKING", "off")
    make_workspace(protocol=HOSTILE)
    assert command().exit_code == 0
    page = parse(Path("reports/index.html").read_text(encoding="utf-8"))
    assert page.tags.count("script") == 1
    assert all(address.startswith("data:") for address in page.fetched)
    markdown = Path("reports/report.md").read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)<", markdown)
    tables = [line for line in markdown.splitlines() if line.startswith("| digits |")]
    assert tables
    head = next(line for line in markdown.splitlines() if line.startswith("| data set |"))
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {head.count("|")}


def scoreboard_cells() -> dict[str, dict[str, str]]:
    """Row -> column -> cell, of the first table of report.md with a column for rows."""
    text = Path("reports/report.md").read_text(encoding="utf-8").replace("\\", "")
    table = text[text.index("| data set | row |") :].split("\n\n")[0].splitlines()
    head, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table if not line.startswith("|---"))
    return {row[1]: dict(zip(head, row, strict=True)) for row in rows}


def test_markdown_shows_every_column_that_a_row_fills(workspace):
    assert command().exit_code == 0
    cells = scoreboard_cells()
    assert [cells["grid-lde"][key] for key in ("gap to truth", "n", "seconds", "parameters, density")] == [
        "0.200",
        "–",
        "12",
        "100",
    ]
    assert [cells["digits-ae-lde"][key] for key in ("gap to truth", "n", "bandwidth")] == ["–", "4,000", "0.18"]
    assert cells["digits-ae-lde"]["parameters, autoencoder"] == "1,000"
    assert cells["digits-kmeans (control)"]["peak memory, MiB"] == "100"
    assert not {"± over images", "in dropped box", "MMD²"} & set(cells["grid-lde"])
    scores = {"test_log_likelihood": -3.3, "test_log_likelihood_se": 0.01, "test_scored": 1e4}
    more = {"test_log_likelihood_group_se": 3.9, "samples_in_dropped_box": 0.0123, "mmd_squared": 0.002}
    write("reports/metrics/evaluate/grid-lde.json", scores | more)
    assert command().exit_code == 0
    found = scoreboard_cells()["grid-lde"]
    assert [found[key] for key in ("± over images", "in dropped box", "MMD²")] == ["3.9", "1.23 %", "0.002"]
    assert "gap to truth" not in found


def test_markdown_links_lead_to_pictures(workspace):
    assert command().exit_code == 0
    text = Path("reports/report.md").read_text(encoding="utf-8")
    links = [link.replace("\\", "") for link in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)]
    assert len(links) == 11
    assert all(Path("reports", link).is_file() for link in links)
    assert "| digits | digits-iae-lde | 264 ± 5 | ▲ better (+40.0)" in text.replace("\\", "")


def test_stages_tell_ran_from_cached(workspace):
    params = read_params()
    eleven = 1740826800.0  # 2025-03-01 11:00 UTC
    states = {(s.stage, s.row): s for s in stage_states(params, eleven)}
    assert states["train", "digits-ae"].how == "ran"
    assert states["fit", "grid-lde"].how == "cached"
    assert {s.how for s in stage_states(params, None)} == {""}
    Path("reports/runs/fit/grid-lde.json").unlink()
    assert {s.how for s in stage_states(params, eleven) if s.row == "grid-lde" and s.stage == "fit"} == {""}


def test_graph_has_a_box_for_each_stage_and_none_overlap(workspace):
    params = read_params()
    states = stage_states(params, None)
    graph = Graph(params, states)
    assert len(graph.nodes) == len(states) + 1
    places = {(node.x, node.y) for node in graph.nodes}
    assert len(places) == len(graph.nodes)
    assert all(abs(a[1] - b[1]) > graph.node_height for a in places for b in places if a[0] == b[0] and a != b)
    assert all(x + graph.node_width <= graph.width and y + graph.node_height <= graph.height for x, y in places)


def test_description_fits_a_tag(workspace):
    board = build_scoreboard(read_params())
    assert "digits-iae-lde" in description(board)
    many = pd.concat([board] * 100, ignore_index=True)
    text = description(many)
    assert len(text) <= 7_500
    assert "more lines" in text


# Rows that are done ----------------------------------------------------------------------------------------------------


def test_a_report_of_finished_rows_leaves_the_others_out(workspace, monkeypatch):
    assert command().exit_code == 0
    whole, headlines = Path("reports/index.html").read_text(), sorted(Path("reports/headline").iterdir())
    Path("reports/metrics/sample/digits-ae-lde.json").unlink()
    Path("reports/metrics/features/grid.json").unlink()
    assert "features/grid.json is missing, and 1 more; run `dvc repro` for all rows, or `python -m" in command().output
    monkeypatch.setattr("stages.tracking.client.Tracker", Recorder)
    result = command("--finished")
    assert result.exit_code == 0, result.output
    assert "report: without rows that aren't done: grid, digits-ae-lde, grid-lde\n" in result.output
    board = pd.read_csv("reports/scoreboard.csv")
    assert board["row"].tolist() == ["digits-iae-lde", "digits-kmeans", "digits-training-images"]
    page = Path("reports/index.html").read_text()
    assert "digits-iae-lde" in page
    assert "grid-lde" not in page
    assert len(page) < len(whole)
    assert sorted(Path("reports/headline").iterdir()) == headlines
    assert Recorder.last.off
    shutil.rmtree("reports/metrics")
    assert command("--finished").output == "error: report: no row is done yet; `python -m stages` lists them\n"


# Tracking ------------------------------------------------------------------------------------------------------------


class Recorder:
    """Replaces the tracker and keeps what it is sent."""

    def __init__(self, name, tags, params, off=False):
        Recorder.last = self
        self.name, self.tags, self.params, self.off, self.calls = name, tags, params, off, []

    def __getattr__(self, method):
        return lambda *arguments: self.calls.append((method, *arguments))


def test_pipeline_run_names_every_stage(workspace, monkeypatch):
    monkeypatch.setattr("stages.tracking.client.Tracker", Recorder)
    monkeypatch.setenv("DVC_EXP_NAME", "trial")
    assert command().exit_code == 0
    run = Recorder.last
    assert run.name == "pipeline trial"
    assert run.tags == {"stage": "report", "dvc.experiment": "trial"}
    assert run.params["densities.digits-iae-lde.components"] == 30
    assert run.params["sampling.count"] == 10_000
    calls = {call[0]: call for call in run.calls}
    assert run.calls[0][0] == "metrics"
    assert run.calls[0][1]["digits-iae-lde.parzen_test_log_likelihood"] == 264.0
    children = calls["pipeline"][1]
    assert len(children) == 2 + 2 + 1 + 2 * 3 + 3 * 3
    assert {"stage": "extract", "row": "grid", "run_id": "id-extract-grid", "metrics": {"dimensions": 2}} in children
    assert all(isinstance(v, (int, float)) for child in children for v in child["metrics"].values())
    (row,) = [row for row in calls["rows"][1] if row["run_id"] == "id-evaluate-digits-iae-lde"]
    assert (row["scores"]["parzen"], row["scores"]["mse"]) == (264.0, calls["metrics"][1]["digits-iae-lde.test_mse"])
    assert {"data": "digits", "objective": "ae", "latent_dim": 2, "family": "lde"}.items() <= row["settings"].items()
    assert len(calls["rows"][1]) == 3
    assert run.calls[-1] == ("finish",)


@pytest.mark.slow
def test_pipeline_run_in_mlflow(workspace, monkeypatch):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{workspace / 'mlflow.db'}"
    monkeypatch.setenv("TRACKING", "on")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("DVC_ROOT", str(workspace))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    assert command().exit_code == 0
    client = MlflowClient(uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (parent,) = [run for run in runs if run.info.run_name == "pipeline"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert parent.info.status == "FINISHED"
    assert len(children) == len(runs) - 1 == 20
    assert {run.data.tags["made_by_run_unknown_here"] for run in children} == {"true"}
    assert f"runs/{parent.info.run_id}/artifacts/index.html" in parent.data.tags["mlflow.note.content"]
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert names >= {"index.html", "report.md", "scoreboard.csv"}


def test_own_images_are_compared_with_training_images(workspace):
    tables = YAML(typ="safe").load(Path("params.yaml"))
    tables["evaluations"]["digits"] = {"quality": {"network": "classifier", "samples": 100}}
    YAML().dump(tables, Path("params.yaml"))
    scores = {f"classifier_{key}": 0.5 for key in QUALITY if "class" not in key}
    for row in ("digits-ae-lde", "digits-iae-lde"):
        file = Path(f"reports/metrics/evaluate/{row}.json")
        kept = {key: value for key, value in json.loads(file.read_text()).items() if "parzen" not in key}
        write(str(file), kept | {"test_log_likelihood": -5.0, "test_log_likelihood_se": 0.1, "test_scored": 500} | scores)
    write("reports/metrics/control/digits.json", {f"training_images_{key}": value for key, value in scores.items()})
    board = build_scoreboard(read_params())
    control = board[board["kind"] == "control"]
    assert list(control["row"]) == ["digits-training-images"]
    assert list(control["classifier_kid"]) == [0.5]
    assert "digits: test log-likelihood of the codes" in as_text(board)
    assert command().exit_code == 0
    text = Path("reports/index.html").read_text()
    assert "training images 0.5" in text
    assert "KID within classes" not in text.split("<h3>Samples and test images compared")[1].split("</table>")[0]
    assert "can be gamed" not in text


def test_an_autoencoder_that_time_ends_is_said_to_be(workspace):
    tables = YAML(typ="safe").load(Path("params.yaml"))
    tables["autoencoders"]["digits-ae"] |= {"max_minutes": 1.5, "epochs": 10_000}
    tables["autoencoders"]["digits-iae"]["epochs"] = 1
    YAML().dump(tables, Path("params.yaml"))
    assert command().exit_code == 0
    text = Path("reports/index.html").read_text()
    assert ", at most 1.5 minutes and 10,000 epochs, " in text
    assert ", incremental (linear, over 1 epoch), 1 epoch, " in text


# First screen and section Explore ------------------------------------------------------------------------------------


def test_a_verdict_speaks_of_score_controls_pictures_and_chance(workspace):
    scores = [
        json.loads(Path(f"reports/metrics/evaluate/{row}.json").read_text()) for row in ("digits-ae-lde", "digits-iae-lde")
    ]
    quality = {f"classifier_{key}": 0.5 for key in QUALITY}
    for row, score, kid in zip(("digits-ae-lde", "digits-iae-lde"), scores, (0.9, 0.7), strict=True):
        kids = {"classifier_kid": kid, "classifier_kid_se": 0.01, "classifier_recall": 0.2}
        write(f"reports/metrics/evaluate/{row}.json", score | quality | kids)
    control = json.loads(Path("reports/metrics/control/digits.json").read_text())
    real = quality | {"classifier_kid": 0.0, "classifier_kid_se": 0.01, "classifier_recall": 0.9}
    real = {f"training_images_{key}": value for key, value in real.items()}
    write("reports/metrics/control/digits.json", control | real)
    tables = YAML(typ="safe").load(Path("params.yaml"))
    tables["evaluations"]["digits"]["quality"] = {"network": "classifier", "samples": 100}
    YAML().dump(tables, Path("params.yaml"))

    def said() -> tuple[str, str]:
        board = build_scoreboard(read_params())
        tone, sentences = verdict(read_params(), board[board["dataset"] == "digits"].to_dict("records"))
        return tone, " ".join(sentences)

    tone, text = said()
    assert tone == "mixed"  # above the controls, and easily told from real images
    assert text.startswith("digits-iae-lde: 264 ± 5 nats (Parzen test log-likelihood).")
    assert "40.0 nats above the best control (digits-training-images)" in text
    assert (
        "further from test images than training images are, by more than chance: KID 0.700 ± 0.010, training images 0.0" in text
    )
    assert "cover 20 % of the test images (recall), training images 90 %" in text
    assert "The next one, digits-ae-lde, is level with it" in text  # 6.3 nats with errors of 5 each
    # A small classifier may find blurred samples close, so it doesn't make a result good.
    real["training_images_classifier_kid"] = 0.7
    write("reports/metrics/control/digits.json", control | real)
    tone, text = said()
    assert "are as close to test images as training images are, within the error: KID 0.700 ± 0.010, training" in text
    assert "look at the pictures, too" in text
    write("reports/metrics/control/digits.json", control)
    assert said()[0] == tone == "good"  # by its score alone
    write("reports/metrics/control/digits.json", control | real)
    points = np.random.default_rng(0).normal(200, 100, 500)
    for row, shift in (("digits-ae-lde", 0.0), ("digits-iae-lde", 6.3)):
        values = points + shift + np.random.default_rng(len(row)).normal(size=500)
        save_arrays("evaluate", row, PER_EXAMPLE, {"parzen_test_log_likelihood": values})
    text = said()[1]
    assert re.search(
        r"The next one, digits-ae-lde, is worse by more than chance \(6\.3\d* ± 0\.0\d+ nats, over the same test", text
    )


def explorable(row: str, dim: int = 3) -> None:
    """Arrays to explore of an autoencoder whose codes are the first pixels."""
    images = np.random.default_rng(0).random((30, 1, 6, 6), dtype=np.float32)

    def decode(codes: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(torch.nn.functional.pad(codes, (0, 36 - dim))).reshape(-1, 1, 6, 6)

    found = exploration(images, np.arange(30) % 4, lambda x: x.flatten(1)[:, :dim], decode)
    save_arrays("train", row, "exploration", found)


def test_what_can_be_explored_is_what_the_decoder_gives(workspace):
    explorable("digits-ae")
    values = load_arrays("train", "digits-ae", "exploration").values
    assert values["ks"].tolist() == [1, 2, 3]
    logits = lambda pixels: np.log(pixels / (255 - pixels.astype(float)))  # noqa: E731
    codes = logits(values["truncated"].reshape(3, 12, 36))  # (K, n, pixels)
    assert np.abs(codes[0, :, 1:]).max() < 0.01
    assert np.allclose(codes[2, :, :3], codes[1, :, :3], atol=0.02) == (np.abs(codes[2, :, 2]).max() < 0.02)
    changed = logits(values["changed"].reshape(3, 3, 9, 36))
    assert np.allclose(changed[:, 1, :, 1], values["values"][1], atol=0.02)
    between = logits(values["between"].reshape(15, 9, 36))
    assert np.allclose(between[0, 0], codes[2, 0], atol=0.02)  # pair (0, 1)
    assert np.allclose(between[0, 8], codes[2, 1], atol=0.02)
    assert np.allclose(between[14, 0], codes[2, 4], atol=0.02)  # the last pair, (4, 5)
    shown = explorations(read_params(), ["digits-ae", "digits-iae"])
    assert list(shown["rows"]) == ["digits-ae"]
    assert shown["rows"]["digits-ae"]["ends"] == 6
    assert explorations(read_params(), ["digits-ae"], most_bytes=100) == {}


# In a browser --------------------------------------------------------------------------------------------------------

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


class Browser:
    """Headless Chromium, driven by WebDriver over plain HTTP."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process = subprocess.Popen([DRIVER, f"--port={self.port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            try:
                self.call("GET", "/status")
                break
            except OSError:
                time.sleep(0.05)
        arguments = [
            "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", f"--user-data-dir={folder}",
        ]  # fmt: skip
        options = {
            "browserName": "chrome",
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            "goog:chromeOptions": {"binary": CHROMIUM, "args": arguments},
        }
        self.path = "/session/" + self.call("POST", "/session", {"capabilities": {"alwaysMatch": options}})["sessionId"]

    def call(self, method: str, path: str, body: object = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def devtools(self, name: str, **values: object):
        return self.call("POST", f"{self.path}/goog/cdp/execute", {"cmd": name, "params": values})

    def open(self, file: Path, width: int, dark: bool = False) -> None:
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        self.call("POST", f"{self.path}/url", {"url": file.as_uri()})

    def js(self, script: str):
        return self.call("POST", f"{self.path}/execute/sync", {"script": script, "args": []})

    def click(self, css: str) -> None:
        # At once: an element that still moves can't be clicked.
        self.js(f"document.querySelector({json.dumps(css)}).scrollIntoView({{behavior: 'instant', block: 'center'}})")
        element = self.call("POST", f"{self.path}/element", {"using": "css selector", "value": css})
        self.call("POST", f"{self.path}/element/{next(iter(element.values()))}/click", {})

    def log(self, kind: str) -> list[dict]:
        return self.call("POST", f"{self.path}/se/log", {"type": kind})

    def close(self) -> None:
        try:
            self.call("DELETE", self.path)
        finally:
            self.process.terminate()
            self.process.wait(timeout=20)


KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}  # codes of Windows, which browsers ask for


@pytest.fixture
def browser(tmp_path_factory):
    if not CHROMIUM or not DRIVER:
        pytest.skip("chromium and chromedriver aren't installed")
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


def test_page_in_a_browser(workspace, browser):
    for row in ("digits-ae", "digits-iae"):
        explorable(row)
    assert command().exit_code == 0
    page = (workspace / "reports/index.html").resolve()

    def rows() -> list[str]:
        return browser.js("return [...document.querySelectorAll('#scores tbody th[scope=row]')].map(e => e.dataset.value)")

    def sorted_by() -> list[str]:
        heads = "[...document.querySelectorAll('#scores th[aria-sort]')]"
        return browser.js(f"return {heads}.map(e => e.cellIndex + ' ' + e.getAttribute('aria-sort'))")

    digits = ["digits-iae-lde", "digits-ae-lde", "digits-kmeans", "digits-training-images"]
    browser.open(page, 1280)
    assert browser.js("return [...document.images].map(i => i.complete && i.naturalWidth > 0)") == [True] * 14
    assert rows() == [*digits, "grid-lde"]
    assert sorted_by() == ["1 descending"]
    browser.click("#scores thead th:nth-child(2) button")
    assert rows() == [*digits[::-1], "grid-lde"]
    assert sorted_by() == ["1 ascending"]
    browser.click("#scores thead th:nth-child(1) button")
    assert rows() == [*sorted(digits), "grid-lde"]
    assert sorted_by() == ["0 ascending"]
    browser.click("#scores thead th:nth-child(3) button")  # the controls have no such number and stay last
    assert rows()[:2] == digits[:2]
    assert sorted_by() == ["2 descending"]
    browser.click("#scores thead th:nth-child(3) button")
    assert rows()[:2] == digits[1::-1]
    assert browser.js("return document.getElementById('sorted').textContent") == "Sorted by Against best control, ascending"

    # A picture enlarges, and Escape closes it.
    browser.click(".enlarge")
    assert browser.js("return document.querySelector('#enlarged[open] img').naturalWidth > 0")
    browser.click("#enlarged form button")
    assert browser.js("return document.querySelector('#enlarged[open]')") is None
    # Sliders and the map redraw what they belong to.
    for name in ("truncated", "changed", "between", "map"):
        widget = f"document.querySelector('[data-widget={name}]')"
        browser.js(f"{widget}.scrollIntoView({{behavior: 'instant'}})")
        pixels = f"return [...{widget}.querySelectorAll('canvas')].map(c => c.toDataURL()).join()"
        said = f"return [...{widget}.querySelectorAll('output')].map(o => o.textContent).join()"
        for _ in range(200):
            if browser.js(said).strip(","):
                break
            time.sleep(0.05)
        before = browser.js(said), browser.js(pixels)
        focus = "canvas.map" if name == "map" else "label:last-of-type input"
        browser.js(f"{widget}.querySelector('{focus}').focus()")
        for key in ("ArrowLeft", "ArrowRight", "ArrowRight", "ArrowUp"):
            if (browser.js(said), browser.js(pixels)) == before:
                browser.devtools("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=KEYS[key])
                browser.devtools("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=KEYS[key])
        after = browser.js(said), browser.js(pixels)
        assert after[0] != before[0], name
        assert after[1] != before[1], name

    # A table that is wider than its box says so within the box.
    hint = "e => [parseFloat(getComputedStyle(e, '::after').left), e.clientWidth]"
    hints = browser.js(f"return [...document.querySelectorAll('.scroll.more')].map({hint})")
    assert hints
    assert all(left + 72 <= width for left, width in hints)

    light = browser.js("return getComputedStyle(document.body).backgroundColor")
    for width in (1280, 390):
        for dark in (False, True):
            browser.open(page, width, dark)
            # Tables scroll inside their own box, the page itself doesn't.
            assert browser.js("return document.documentElement.scrollWidth") <= width
            assert (browser.js("return getComputedStyle(document.body).backgroundColor") != light) == dark
    assert browser.log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith(("data:", "about:", "chrome"))} == {page.as_uri()}
