"""Results that git keeps: lines of results.csv, settings, metrics, curves, and the tables made from the lines."""

from __future__ import annotations

import csv
import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from small import run

from pipeline.errors import PipelineError
from pipeline.settings import read_params
from stages.reporting.metrics import DETECTION
from stages.tools.findings import renewed
from stages.tools.record import COLUMNS, END, EXPERIMENTS, RECORDED, START, markdown_tables, read_lines

ROOT = Path(__file__).parents[1]
TABLES = {
    "datasets": {"mnist": {"source": "mnist", "root": "raw"}, "bsds": {"source": "bsds300", "root": "raw", "split": "rnade"}},
    "controls": {"mnist": {"dataset": "mnist"}},
    "autoencoders": {
        **{
            f"mnist-ae-s{i}": {"dataset": "mnist", "objective": "ae", "latent_dim": 2, "blocks": 1, "seed": i} for i in range(3)
        },
        "bsds": {"dataset": "bsds", "objective": "identity"},
    },
    "densities": {
        **{f"mnist-lde-s{i}": {"codes": f"mnist-ae-s{i}", "dataset": "mnist", "family": "lde", "seed": i} for i in range(3)},
        "bsds-lde": {"codes": "bsds", "dataset": "bsds", "family": "lde", "components": 10},
        **{f"bsds-two-s{i}": {"codes": "bsds", "dataset": "bsds", "family": "lde", "seed": i} for i in range(2)},
    },
    "sampling": {"count": 10_000},
    "evaluations": {
        "mnist": {"parzen": {"protocol": "gmmn"}, "quality": {"network": "classifier", "samples": 500}},
        "bsds": {},
    },
}
SCORES = (320.0, 326.0, 323.0)


def write(path: str, value: object) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """Scores as the stages leave them: three trials on MNIST, a control, and BSDS300."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(TABLES))
    for i, score in enumerate(SCORES):
        write(f"reports/metrics/train/mnist-ae-s{i}.json", {"test_mse": 0.01 + i / 1000, "test_mse_se": 0.001})
        write(f"reports/metrics/fit/mnist-lde-s{i}.json", {"parameters": 10})
        write(f"reports/metrics/sample/mnist-lde-s{i}.json", {"samples": 4000})
        parzen = {"test_log_likelihood": score, "test_se": 2.0, "samples": 10_000, "protocol": "gmmn"}
        quality = {"kid": 0.1, "kid_se": 0.01, "precision": 0.9, "precision_se": 0.02}
        write(
            f"reports/metrics/evaluate/mnist-lde-s{i}.json",
            {"test_log_likelihood": -8.0, "test_log_likelihood_se": 0.1, "test_scored": 10_000}
            | {f"parzen_{k}": v for k, v in parzen.items()}
            | {f"classifier_{k}": v for k, v in quality.items()},
        )
        write(f"reports/curves/fit/mnist-lde-s{i}.tsv", "step\tloss\n1\t2.0\n")
        for stage, row in (("train", f"mnist-ae-s{i}"), ("fit", f"mnist-lde-s{i}"), ("evaluate", f"mnist-lde-s{i}")):
            write(f"reports/runs/{stage}/{row}.json", {"seconds": 60.0, "cores": 2, "commit": "0123456789abcdef"})
    control = {"test_log_likelihood": 240.0, "test_se": 3.0, "samples": 10_000, "protocol": "gmmn"}
    both = {f"{prefix}_parzen_{k}": v for prefix in ("training_images", "kmeans") for k, v in control.items()}
    write("reports/metrics/control/mnist.json", both)
    write("reports/metrics/train/bsds.json", {})
    write("reports/metrics/fit/bsds-lde.json", {"parameters": 10})
    write("reports/metrics/sample/bsds-lde.json", {"samples": 4000})
    scores = {"test_log_likelihood": 156.039, "test_log_likelihood_se": 0.07, "test_scored": 1e6}
    over_images = {"test_log_likelihood_group_se": 3.9, "test_groups": 100}
    write("reports/metrics/evaluate/bsds-lde.json", scores | over_images)
    for i in range(2):
        write(f"reports/metrics/fit/bsds-two-s{i}.json", {})
        write(f"reports/metrics/sample/bsds-two-s{i}.json", {"samples": 4000})
        write(f"reports/metrics/evaluate/bsds-two-s{i}.json", scores | over_images | {"test_log_likelihood": 157.0 + i})
    return tmp_path


def lines() -> list[dict[str, str]]:
    with open("reports/paper/results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_trials_become_a_mean_with_its_standard_error(workspace):
    done = run("record", "mnist-parzen", "mnist-lde")
    assert done.exit_code == 0, done.output
    found = {line["metric"]: line for line in lines()}
    assert list(next(iter(found.values()))) == list(COLUMNS)
    score = found["test_log_likelihood"]
    assert float(score["value"]) == pytest.approx(323.0)
    assert float(score["error"]) == pytest.approx(statistics.stdev(SCORES) / 3**0.5, rel=0.05)
    assert score["error_kind"] == "standard error over 3 seeds"
    assert (score["seeds"], score["samples"], score["protocol"]) == ("3", "10000", "gmmn")
    assert (score["minutes"], score["cores"], score["commit"]) == ("3", "2", "0123456")
    assert (found["kid"]["value"], found["kid"]["samples"], found["kid"]["protocol"]) == ("0.1", "500", "classifier")
    assert float(found["code_log_likelihood"]["value"]) == -8
    assert float(found["test_mse"]["value"]) == pytest.approx(0.011)
    assert "recall" not in found  # wasn't scored


def test_detections_are_recorded_with_the_data_sets_that_they_compare(workspace):
    row = {"density": "mnist-lde-s0", "family": "lde", "codes": "mnist-ae-s0", "dataset": "mnist", "outliers": "fashion"}
    fashion = {"source": "fashion_mnist", "root": "raw"}
    tables = TABLES | {"detections": {"found": row}, "datasets": TABLES["datasets"] | {"fashion": fashion}}
    Path("params.yaml").write_text(yaml.safe_dump(tables))
    scores = {"auroc": 0.99, "average_precision": 0.98, "false_alarms_at_95": 0.02}
    scores |= {f"{key}_se": 0.001 for key in scores} | {"inliers_scored": 100, "outliers_scored": 90}
    write("reports/metrics/detect/found.json", scores)
    write("reports/runs/detect/found.json", {"seconds": 60.0, "cores": 2, "commit": "0123456789abcdef"})
    done = run("record", "detection", "found")
    assert done.exit_code == 0, done.output
    found = {line["metric"]: line for line in lines()}
    assert set(found) == set(DETECTION)
    assert (found["auroc"]["value"], found["auroc"]["error"], found["auroc"]["samples"]) == ("0.99", "0.001", "90")
    assert found["false_alarms_at_95"]["samples"] == "100"
    assert {line["protocol"] for line in found.values()} == {"mnist against fashion"}
    assert found["auroc"]["minutes"] == "4"  # train, fit, evaluate and detect
    kept = read_params(workspace / "reports/paper/found/params.yaml")
    assert kept.rows("datasets") == ["mnist", "fashion"]
    assert (kept.rows("evaluations"), kept.rows("detections")) == (["mnist"], ["found"])
    assert "| `found` | 0.9900 ± 0.0010 |" in (workspace / "reports/paper/README.md").read_text()


def test_settings_metrics_and_curves_are_kept_so_that_it_can_be_repeated(workspace):
    run("record", "mnist-parzen", "mnist-lde")
    folder = workspace / "reports/paper/mnist-lde"
    kept = read_params(folder / "params.yaml")
    assert kept.rows("densities") == [f"mnist-lde-s{i}" for i in range(3)]
    assert kept.rows("autoencoders") == [f"mnist-ae-s{i}" for i in range(3)]
    assert kept.rows("datasets") == kept.rows("evaluations") == ["mnist"]
    assert list(kept.problems()) == []
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["evaluate mnist-lde-s1"]["parzen_test_log_likelihood"] == 326.0
    assert metrics["evaluate mnist-lde-s1"]["run"]["commit"] == "0123456789abcdef"
    assert (folder / "fit-mnist-lde-s2.tsv").read_text() == "step\tloss\n1\t2.0\n"


def test_a_single_row_has_the_error_over_its_test_points(workspace):
    assert run("record", "bsds300", "bsds-lde").exit_code == 0
    line, over_images = lines()
    assert (line["value"], line["error"], line["error_kind"]) == ("156.039", "0.07", "standard error over patches")
    assert (line["protocol"], line["samples"], line["seeds"]) == ("rnade-split", "1000000", "1")
    assert [over_images[key] for key in ("metric", "value", "error", "samples")] == [
        "test_log_likelihood_group_se", "3.9", "", "100",
    ]  # fmt: skip
    text = Path("reports/paper/README.md").read_text()
    assert "| row | test log-likelihood, nats | ± over images | seeds |" in text
    assert "| `bsds-lde` | 156.039 ± 0.070 | 3.9 | 1 | 1000000 |" in text


def test_trials_on_bsds300_have_two_standard_deviations_as_in_the_paper(workspace):
    assert run("record", "bsds300", "bsds-two").exit_code == 0
    line, over_images = lines()
    assert (line["value"], line["error"], line["error_kind"]) == ("157.5", "1.4", "2 standard deviations over 2 trials")
    assert (over_images["value"], over_images["error"], over_images["seeds"]) == ("3.9", "", "2")


def test_scores_in_the_features_of_two_networks_stand_in_two_columns(workspace):
    run("record", "mnist-parzen", "mnist-lde")
    first = read_lines(Path("reports/paper"))
    other = [replace(line, value="0.7", protocol="vgg19") for line in first if line.metric == "kid"]
    for kept in ([*first, *other], [*other, *first]):
        head, _, row = markdown_tables(kept).splitlines()[4:7]
        cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
        assert cells["KID (classifier)"].startswith("0.1")
        assert cells["KID (vgg19)"].startswith("0.7")
        assert "precision (vgg19)" not in cells
        assert "KID" not in cells


def test_an_experiment_is_sorted_by_its_leading_metric(workspace):
    run("record", "mnist-parzen", "mnist-lde")
    first = [replace(line, experiment="mnist-codes") for line in read_lines(Path("reports/paper"))]
    better = [replace(line, row="b", value="-1" if line.metric == "code_log_likelihood" else "0") for line in first]
    head, _, *rows = markdown_tables([*first, *better]).splitlines()[4:]
    assert head.startswith("| row | log-likelihood of the codes, nats | test log-likelihood, nats |")
    assert [row.split("`")[1] for row in rows] == ["b", "mnist-lde"]
    assert EXPERIMENTS["mnist-codes"].leading == "code_log_likelihood"


def test_two_domains_have_the_fall_of_interpolated_codes(workspace):
    domains = {"source": "union", "root": "raw", "sources": ["celeba", "shoes"], "roots": ["celeba", "shoes"], "image_px": 64}
    tables = {
        "datasets": {"pair": domains},
        "controls": {"pair": {"dataset": "pair"}},
        "autoencoders": {"pair-ae": {"dataset": "pair", "objective": "ae", "latent_dim": 9, "blocks": 3}},
        "densities": {"pair-lde": {"codes": "pair-ae", "dataset": "pair", "family": "lde"}},
        "sampling": {},
        "evaluations": {"pair": {"quality": {"network": "vgg19", "weights": "w.safetensors", "samples": 100}}},
    }
    Path("pair.yaml").write_text(yaml.safe_dump(tables))
    falls = {
        f"interpolation_{kind}_{key}": value
        for kind, fall in (("different", 29.4), ("same", -23.2))
        for key, value in (("fall", fall), ("fall_se", 0.5), ("pairs", 1000))
    }
    write("reports/metrics/train/pair-ae.json", {"test_mse": 0.005})
    write("reports/metrics/fit/pair-lde.json", {})
    write("reports/metrics/sample/pair-lde.json", {"samples": 200})
    write("reports/metrics/evaluate/pair-lde.json", {"test_log_likelihood": -340.0, "vgg19_kid": 17.0, **falls})
    write("reports/metrics/control/pair.json", {"training_images_vgg19_kid": 0.1})
    write("reports/runs/train/pair-ae.json", {"seconds": 60.0, "cores": 16, "gpu": "Fast Card", "commit": "0123456789"})
    done = run("record", "celeba64-shoes", "pair-lde", "pair", "--params", "pair.yaml")
    assert done.exit_code == 0, done.output
    found = {line["metric"]: line for line in lines() if line["row"] == "pair-lde"}
    fall = found["interpolation_different_fall"]
    assert (fall["value"], fall["error"], fall["error_kind"]) == ("29.4", "0.5", "standard error over pairs")
    assert (fall["samples"], fall["protocol"], fall["cores"]) == ("1000", "two-domains", "16 + Fast Card")
    assert found["code_log_likelihood"]["value"] == "-340"
    assert "test_log_likelihood" not in found  # which is that of images or patches
    head, _, *rows = Path("reports/paper/README.md").read_text().split("Protocol `two-domains`")[1].splitlines()[2:6]
    assert head.startswith("| row | fall across domains, nats |")
    assert [row.split("`")[1] for row in rows] == ["pair-lde", "pair-training-images"]  # one table


def test_every_row_stands_in_a_table(workspace):
    run("record", "mnist-parzen", "mnist-lde")
    lines_ = read_lines(Path("reports/paper"))
    other = [
        replace(line, row="other", protocol="images") for line in lines_ if line.metric in ("test_mse", "code_log_likelihood")
    ]
    features = [replace(line, row="features") for line in lines_ if line.metric == "kid"]
    both = [replace(line, row="both", protocol="images") for line in lines_ if line.metric == "test_mse"]
    both += [replace(line, row="both") for line in features]
    twice = [replace(line, protocol="goodfellow") for line in lines_ if line.metric == "test_log_likelihood"]
    text = markdown_tables([*lines_, *other, *features, *both, *twice])
    for row, tables in (("mnist-lde", 2), ("other", 1), ("features", 1), ("both", 1)):
        assert text.count(f"| `{row}` |") == tables, row


def test_a_control_gives_two_lines(workspace):
    assert run("record", "mnist-parzen", "mnist").exit_code == 0
    assert [line["row"] for line in lines()] == ["mnist-training-images", "mnist-kmeans"]
    assert {line["value"] for line in lines()} == {"240"}


def test_what_was_recorded_before_is_replaced_and_the_rest_stays(workspace):
    run("record", "mnist-parzen", "mnist-lde", "mnist")
    before = len(lines())
    write(
        "reports/metrics/evaluate/bsds-lde.json",
        {"test_log_likelihood": 150.0, "test_log_likelihood_se": 0.1, "test_scored": 9},
    )
    run("record", "bsds300", "bsds-lde")
    write(
        "reports/metrics/evaluate/bsds-lde.json",
        {"test_log_likelihood": 151.0, "test_log_likelihood_se": 0.1, "test_scored": 9},
    )
    run("record", "bsds300", "bsds-lde")
    assert len(lines()) == before + 1
    assert [line["value"] for line in lines() if line["metric"] == "test_log_likelihood" and line["row"] == "bsds-lde"] == [
        "151"
    ]


def test_tables_stand_beside_the_published_scores_and_prose_stays(workspace):
    write("reports/paper/README.md", f"# Mine\n\nBefore.\n\n{START}\nold\n{END}\n\nAfter.\n")
    run("record", "mnist-parzen", "mnist-lde", "mnist")
    text = (workspace / "reports/paper/README.md").read_text()
    assert text.startswith("# Mine\n\nBefore.\n")
    assert text.endswith("\n\nAfter.\n")
    assert "old" not in text
    ours, training = text.index("| `mnist-lde` | 323.0 ± 1.7 |"), text.index("| `mnist-training-images` | 240 ± 3 |")
    assert ours < training < text.index("| IAE + LDE (K = 30) | 326 ± 2 |")
    again = run("record", "--tables")
    assert again.exit_code == 0
    assert (workspace / "reports/paper/README.md").read_text() == text


@pytest.mark.parametrize(("arguments", "said"), [
    ((), "name an experiment and rows"),
    (("mnist-parzen",), "name an experiment and rows"),
    (("mnist-parzen", "mnist-lda"), "mnist-lda is neither a row"),
    (("mnist-parzen", "mnist-lde", "nothing"), "nothing is neither a row"),
])  # fmt: skip
def test_what_cannot_be_recorded(arguments, said, workspace):
    done = run("record", *arguments)
    assert done.exit_code == 1
    assert said in done.output
    assert "Traceback" not in done.output
    assert not Path("reports/paper").exists()


def test_a_row_that_was_not_scored(workspace):
    Path("reports/metrics/evaluate/mnist-lde-s1.json").unlink()
    done = run("record", "mnist-parzen", "mnist-lde")
    assert done.exit_code == 1
    assert "dvc repro evaluate@mnist-lde-s1" in done.output


def test_other_columns_are_refused(workspace):
    write("reports/paper/results.csv", "a,b\n1,2\n")
    done = run("record", "bsds300", "bsds-lde")
    assert done.exit_code == 1
    assert "expected the columns" in done.output
    assert Path("reports/paper/results.csv").read_text() == "a,b\n1,2\n"


def test_the_readme_holds_the_tables_of_its_lines():
    kept = read_lines(ROOT / "reports/paper")
    assert {line.metric for line in kept} <= set(RECORDED)
    assert {line.experiment for line in kept} <= set(EXPERIMENTS)
    assert all(line.samples.isdecimal() for line in kept)
    assert markdown_tables(kept) in (ROOT / "reports/paper/README.md").read_text()
    for table in re.findall(r"(?:^\|.*\n)+", markdown_tables(kept), flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


# The page of findings --------------------------------------------------------------------------------------------------

PAGE = """A claim.

<!-- table: open dimensions 1 2; AE = ae; PCA = control -->
| old |

<!-- table: scores; AE = ae; first = ae-s0 -->

<!-- table: differences;
  IAE - AE = iae - ae
-->
| a | b |
| old | table |

Between | these | bars.
"""


@pytest.fixture
def recorded(tmp_path):
    """Two rows with trials of which one is common, and a control."""

    def row(name, trials):
        write(str(tmp_path / name / "metrics.json"), {f"{stage} {name}{trial}": m for (stage, trial), m in trials.items()})

    def trained(mse, first):
        return {"test_mse": mse, "test_squared_error": 100 * mse, "test_mse_first_1": first, "test_mse_first_2": mse}

    def evaluated(parzen, kid):
        return {"parzen_test_log_likelihood": parzen, "parzen_test_se": 2, "parzen_bandwidth": 0.5, "classifier_kid": kid,
                "classifier_kid_se": 0.01, "test_log_likelihood": -3.0}  # fmt: skip

    row("ae", {("train", "-s0"): trained(0.010, 0.3), ("evaluate", "-s0"): evaluated(300.0, 0.2),
               ("train", "-s1"): trained(0.012, 0.5), ("evaluate", "-s1"): evaluated(304.0, 0.4)})  # fmt: skip
    row("iae", {("train", "-s1"): trained(0.015, 0.1), ("evaluate", "-s1"): evaluated(310.0, 0.3),
                ("train", "-s2"): trained(0.090, 0.9), ("evaluate", "-s2"): evaluated(990.0, 0.9)})  # fmt: skip
    row("control", {("control", ""): {"pca_test_mse_first_1": 0.25, "pca_test_mse_first_2": 0.125}})
    return tmp_path


def test_tables_of_findings_are_means_and_differences_of_the_same_trials(recorded):
    text = renewed(PAGE, recorded)
    assert "| AE | 0.4000 | 0.0110 |\n| PCA | 0.2500 | 0.1250 |\n\n" in text
    assert "| AE | `ae` | 2 | 0.0110 ± 0.0010 | 302 ± 2 | 0.30 ± 0.10 | -3 |" in text
    assert "| first | `ae-s0` | 1 | 0.01 | 300 ± 2 | 0.200 ± 0.010 | -3 |" in text
    # Trial 1 alone is of both: 0.3 more squared error, which is 0.3 / (2 * 0.25) nats less in a window of 0.5.
    assert "| IAE - AE | 1 | +0.3 | +25 | -0.1 | -25 | +0 | +6 | -0.6 |" in text
    assert text.startswith("A claim.\n\n<!--")
    assert text.endswith("|\n\nBetween | these | bars.\n")
    assert "old" not in text
    assert renewed(text, recorded) == text


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("scores; AE = gone", "gone/metrics.json: missing"),
        ("averages; AE = ae", "averages; AE = ae -->: expected KIND; LABEL = ROW"),
        ("scores; ae", "expected KIND; LABEL = ROW"),
        ("open dimensions 3; AE = ae", "ae: its recorded metrics have no test_mse_first_3"),
        ("differences; AE = ae", "differences are of two rows"),
        ("differences; AE = ae-s0 - iae", "ae-s0 - iae: no trial is recorded of both"),
        ("scores; AE = ae-s7", "ae-s7: its trials are s0, s1"),
    ],
)
def test_a_table_that_cannot_be_made(block, said, recorded):
    with pytest.raises(PipelineError, match=re.escape(said)):
        renewed(f"<!-- table: {block} -->\n", recorded)


def test_every_decimal_of_the_findings_stands_in_a_table_made_by_record():
    folder = ROOT / "reports/paper"
    text = (folder / "findings.md").read_text()
    assert renewed(text, folder) == text
    cells = re.findall(r"\d+\.\d+", "\n".join(line for line in text.splitlines() if line.startswith("|")))
    prose = re.sub(r"<!--.*?-->|`[^`]*`", "", "\n".join(line for line in text.splitlines() if line[:1] != "|"), flags=re.DOTALL)
    numbers = re.findall(r"\d+\.\d+(?! *\.)", re.sub(r"section \d+\.\d+", "", prose))
    assert len(numbers) > 20
    for number in numbers:
        decimals = len(number.partition(".")[2])
        assert any(f"{float(cell):.{decimals}f}" == number for cell in cells if len(cell.partition(".")[2]) >= decimals), number
