"""Scores of evaluated rows -> `reports/paper`: the results that git keeps, with the published ones."""

from __future__ import annotations

import csv
import io
import math
import re
import shutil
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pipeline.errors import PipelineError
from pipeline.settings import Params, read_params
from pipeline.settings.params import TABLES
from pipeline.system.files import atomic_folder, write_json, write_text
from stages import workspace
from stages.reporting.metrics import DETECTION, METRICS
from stages.run import one_line_errors

__all__ = [
    "COLUMNS",
    "EXPERIMENTS",
    "RECORDED",
    "Experiment",
    "Line",
    "markdown_tables",
    "read_lines",
    "scored_lines",
    "trials",
]

FOLDER = Path("reports/paper")
RESULTS, README, FINDINGS = "results.csv", "README.md", "findings.md"
COLUMNS = (
    "experiment",
    "row",
    "metric",
    "value",
    "error",
    "error_kind",
    "seeds",
    "samples",
    "protocol",
    "minutes",
    "cores",
    "commit",
)
START, END = "<!-- tables: python -m stages record --tables -->", "<!-- end of tables -->"


@dataclass(frozen=True)
class Experiment:
    """Rows whose scores share a table.

    Attributes:
        title: Its heading.
        benchmarks: Keys of `stages.reporting.published.BENCHMARKS` whose scores are listed below it.
        leading: One of `RECORDED`: the first column, by which rows are sorted.
    """

    title: str
    benchmarks: tuple[str, ...] = ()
    leading: str = "test_log_likelihood"


EXPERIMENTS: Mapping[str, Experiment] = {
    "mnist-parzen": Experiment("MNIST, Parzen window (Table 2)", ("mnist",)),
    "mnist-codes": Experiment(
        "MNIST, the codes of one autoencoder: two minutes of a core for each density", leading="code_log_likelihood"
    ),
    "mnist-labels": Experiment("MNIST, labels read from the codes of one small autoencoder, D = 8", leading="class_accuracy"),
    "bsds300": Experiment("BSDS300 (Table 1)", ("bsds300-rnade", "bsds300-maf")),
    "faces48-parzen": Experiment("Faces of 48x48 pixels, not those of TFD, Parzen window (Table 2)", ("tfd",)),
    "grid": Experiment("Grid density (Figure 5)"),
    "celeba64-shoes": Experiment(
        "CelebA and Shoes at 64x64, two domains in one latent space (section 4.2.2)", leading="interpolation_different_fall"
    ),
    "detection": Experiment("Outliers told from test examples of the data set that the density was fitted on", leading="auroc"),
}

# Metrics of results.csv, in the order of its lines and of the columns of tables.
RECORDED = tuple(name for name in METRICS if name not in ("parzen_test_log_likelihood", "density", "coverage"))


@dataclass(frozen=True)
class Line:
    """One line of results.csv: a score of a row, or the mean of its trials.

    Attributes:
        experiment: Key of `EXPERIMENTS`.
        row: Row of `densities` or `detections` without the number of the trial, or a control.
        metric: One of `RECORDED`; `test_log_likelihood` of images is that of the Parzen window.
        value: The score.
        error: The value after +-; empty if there is none.
        error_kind: What the error is.
        seeds: Number of trials.
        samples: Number of samples of the Parzen window or of the quality scores, or of test points or images scored.
        protocol: Name of the protocol; of the quality scores, the network whose features they are taken in.
        minutes: Of train, extract, fit, sample and evaluate together, mean of the trials.
        cores: Cores that the runs could use, and the GPU if there was one.
        commit: Commit of the code that ran.
    """

    experiment: str
    row: str
    metric: str
    value: str
    error: str
    error_kind: str
    seeds: str
    samples: str
    protocol: str
    minutes: str
    cores: str
    commit: str


@click.command("record", epilog=f"EXPERIMENT is one of {', '.join(EXPERIMENTS)}.")
@click.argument("experiment", required=False, metavar="EXPERIMENT", type=click.Choice(list(EXPERIMENTS)))
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--tables", "only_tables", is_flag=True, help="Only rewrite the tables of README.md and findings.md.")
@click.option(
    "--into", "folder", type=click.Path(path_type=Path), default=FOLDER, show_default=True, help="Folder of the results."
)
@click.option("--params", "params_file", default="params.yaml", show_default=True, help="Settings file.")
def record(experiment: str | None, names: Sequence[str], only_tables: bool, folder: Path, params_file: str) -> None:
    """Save scores of evaluated rows in reports/paper, for git: results.csv, settings, metrics, curves, tables.

    NAME is a row of `densities`, `detections` or `controls`, or the common name of its trials NAME-s0, NAME-s1 .. For trials
    the mean is recorded with its standard error (on BSDS300 with 2 standard deviations over trials, as in the paper). A
    control gives two lines. Earlier lines of a row under the same protocol are replaced.
    """
    with one_line_errors("record"):
        if not only_tables:
            if experiment is None or not names:
                raise PipelineError("name an experiment and rows: python -m stages record EXPERIMENT NAME...")
            params = read_params(params_file)
            lines_of = {name: list(scored_lines(params, experiment, name)) for name in names}  # all, before anything is written
            for name, lines in lines_of.items():
                _keep(params, folder, name, lines)
                print(f"{folder / RESULTS}: {experiment} {name}: {len(lines)} lines", flush=True)
        _write_tables(folder)


# Scores -> lines ----------------------------------------------------------------------------------------------------


def trials(params: Params, name: str) -> tuple[str, list[str]]:
    """What a name means: the table that holds it, and the row itself or its trials NAME-s0, NAME-s1 ..

    Raises:
        PipelineError: When there is no such row.
    """
    for table in ("densities", "detections", "controls"):
        rows = params.rows(table)
        if named := [name] if name in rows else [row for row in rows if re.fullmatch(rf"{re.escape(name)}-s\d+", row)]:
            return table, named
    raise PipelineError(f"{name} is neither a row of densities, detections or controls nor the common name of trials")


def scored_lines(params: Params, experiment: str, name: str) -> Iterator[Line]:
    """The lines of results.csv of a row, of the mean of its trials, or of a control.

    Raises:
        PipelineError: When a row is unknown or hasn't been evaluated.
    """
    from stages.reporting.scoreboard import CONTROLS, read_metrics, read_run, runs_of

    table, rows = trials(params, name)
    if table == "detections":
        yield from _detection_lines(params, experiment, name, rows)
        return
    if table == "controls":
        dataset = params.control(rows[0]).dataset
        runs = [[read_run("control", row)] for row in rows]
        for prefix, label in CONTROLS.items():
            every = [read_metrics("control", row) for row in rows]
            control_scores = [
                {k.removeprefix(f"{prefix}_"): v for k, v in scores.items() if k.startswith(f"{prefix}_")} for scores in every
            ]
            yield from _lines(params, dataset, control_scores, runs, experiment, f"{name}-{label}")
        return
    scores_of: list[dict[str, Any]] = []
    runs = []
    for row in rows:
        density = params.density(row)
        trained = {
            key: value for key, value in read_metrics("train", density.codes).items() if key in ("test_mse", "test_mse_se")
        }
        scores_of.append(read_metrics("sample", row) | trained | read_metrics("evaluate", row))
        runs.append(runs_of(params, row))
    yield from _lines(params, params.density(rows[0]).dataset, scores_of, runs, experiment, name)


def _detection_lines(params: Params, experiment: str, name: str, rows: Sequence[str]) -> Iterator[Line]:
    from stages.reporting.scoreboard import error_over_trials, read_metrics, read_run, runs_of

    settings = params.detection(rows[0])
    scores = [read_metrics("detect", row) for row in rows]
    runs = [[*runs_of(params, params.detection(row).density), read_run("detect", row)] for row in rows]
    classes = f" {', '.join(map(str, settings.outlier_classes))}" if settings.outlier_classes else ""
    for metric in (METRICS[key] for key in DETECTION):
        values = [score[metric.key] for score in scores]
        error, kind = scores[0][metric.error], f"standard error over {metric.over}"
        if len(values) > 1:
            error, kind = error_over_trials(values, params.dataset(settings.dataset).source)
        yield Line(
            experiment, name, metric.key,
            value=f"{statistics.fmean(values):.6g}",
            error=f"{error:.2g}",
            error_kind=kind,
            seeds=str(len(values)),
            samples=str(scores[0][metric.count]),
            protocol=f"{settings.dataset} against {settings.outliers}{classes}",
            **_cost(runs),
        )  # fmt: skip


def _cost(runs: list[list[dict[str, Any]]]) -> dict[str, str]:
    """Minutes, cores and commits of the chains of all trials."""
    minutes = statistics.fmean(sum(run.get("seconds", 0.0) for run in chain) for chain in runs) / 60
    flat = [run for chain in runs for run in chain]
    cores = str(max((run["cores"] for run in flat if "cores" in run), default=""))
    cores += "".join(f" + {gpu}" for gpu in dict.fromkeys(run["gpu"] for run in flat if "gpu" in run))
    commits = list(dict.fromkeys(run["commit"][:7] for run in flat if "commit" in run))
    return {"minutes": f"{minutes:.3g}", "cores": cores, "commit": " ".join(commits)}


def _lines(
    params: Params, dataset: str, scores: list[dict[str, Any]], runs: list[list[dict[str, Any]]], experiment: str, row: str
) -> Iterator[Line]:
    from stages.reporting.scoreboard import error_over_trials

    evaluation, settings = params.evaluation(dataset), params.dataset(dataset)
    network = evaluation.quality.network if evaluation.quality is not None else ""
    images = METRICS["parzen_test_log_likelihood"].key in scores[0]
    split = getattr(settings, "split", "")
    decoded = images or "test_mse" in scores[0]  # then densities are those of codes
    if images:
        protocol = scores[0]["parzen_protocol"]
    elif decoded:
        protocol = "two-domains" if settings.source == "union" else "images"
    else:
        protocol = f"{split}-split" if split else f"{settings.source}-formula"
    for name in RECORDED:
        parzen = name == "test_log_likelihood" and images
        metric = METRICS["parzen_test_log_likelihood" if parzen else name]
        if (name == "test_log_likelihood" and decoded and not images) or (name == "code_log_likelihood" and not decoded):
            continue
        if metric.over == "pairs" and settings.source != "union":
            continue
        key, error_key = (k.replace("NETWORK", network) for k in (metric.key, metric.error))
        values = [s[key] for s in scores if s.get(key) is not None]
        if len(values) < len(scores):
            continue
        error = scores[0].get(error_key) if error_key else None
        over = "patches" if name == "test_log_likelihood" and settings.source == "bsds300" and not images else metric.over
        kind = f"standard error over {over}" if error is not None else ""
        over_images = name == "test_log_likelihood_group_se"
        if len(values) > 1 and not over_images:
            error, kind = error_over_trials(values, settings.source)
        if metric.in_features and evaluation.quality is not None:
            count = evaluation.quality.samples
        elif metric.count:
            count = scores[0][metric.count]
        else:
            count = scores[0].get("test_scored", scores[0].get("parzen_test_points", ""))
        yield Line(
            experiment, row, name,
            value=f"{statistics.fmean(values):.{2 if over_images else 6}g}",
            error="" if error is None else f"{error:.2g}",
            error_kind=kind,
            seeds=str(len(values)),
            samples=str(count and int(count)),  # metrics hold counts as 1000000.0
            protocol=network if metric.in_features else protocol,
            **_cost(runs),
        )  # fmt: skip


# Lines -> files -----------------------------------------------------------------------------------------------------


def read_lines(folder: Path) -> list[Line]:
    """Lines of results.csv, in its order; none if there is no such file.

    Raises:
        PipelineError: When it has other columns.
    """
    path = folder / RESULTS
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise PipelineError(f"{path}: expected the columns {','.join(COLUMNS)}")
        return [Line(**line) for line in reader]


def _keep(params: Params, folder: Path, name: str, lines: Sequence[Line]) -> None:
    """Replaces a row's lines in results.csv and its folder of settings, metrics and curves."""
    replaced = {(line.experiment, line.row, line.metric, line.protocol) for line in lines}
    others = [x for x in read_lines(folder) if (x.experiment, x.row, x.metric, x.protocol) not in replaced]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    order = {experiment: i for i, experiment in enumerate(EXPERIMENTS)}
    ordered = sorted([*others, *lines], key=lambda line: order.get(line.experiment, len(order)))  # stable
    writer.writerows([getattr(line, column) for column in COLUMNS] for line in ordered)
    _keep_folder(params, folder / name, name)
    write_text(folder / RESULTS, text.getvalue())


def _keep_folder(params: Params, target: Path, name: str) -> None:
    from ruamel.yaml import YAML

    from stages.arrays import load_arrays
    from stages.reporting.scoreboard import read_metrics, read_run

    tables: dict[str, Any] = {table: [] for table in TABLES if table != "sampling"}
    table, rows = trials(params, name)
    tables[table] = rows
    others: list[str] = []  # data sets without rows of their own
    if table == "controls":
        datasets = [params.control(row).dataset for row in rows]
        stages = [("control", row) for row in rows]
    else:
        if table == "detections":
            others = [params.detection(row).outliers for row in rows]
            tables["densities"] = list(dict.fromkeys(params.detection(row).density for row in rows))
        datasets = [params.density(row).dataset for row in tables["densities"]]
        tables["autoencoders"] = list(dict.fromkeys(params.density(row).codes for row in tables["densities"]))
        stages = [("train", codes) for codes in tables["autoencoders"]]
        stages += [(stage, row) for row in tables["densities"] for stage in ("fit", "evaluate")]
        stages += [("detect", row) for row in tables["detections"]]
    tables["evaluations"] = list(dict.fromkeys(datasets))
    tables["datasets"] = list(dict.fromkeys([*datasets, *others]))
    chosen = {table: {row: params.tables[table][row] for row in rows} for table, rows in tables.items()}
    chosen["sampling"] = dict(params.tables["sampling"])
    with atomic_folder(target) as folder:
        header = f"# To repeat it, in the project's root: cp {FOLDER / name}/params.yaml params.yaml && dvc repro\n"
        text = io.StringIO(header)
        text.seek(0, io.SEEK_END)
        YAML().dump(chosen, text)
        (folder / "params.yaml").write_text(text.getvalue(), encoding="utf-8")
        scores = {f"{stage} {row}": read_metrics(stage, row) | {"run": _machine(read_run(stage, row))} for stage, row in stages}
        for stage, row in stages:
            if (arrays := load_arrays(stage, row, "open-dimensions")) is not None:
                scores[f"{stage} {row}"]["open_dimensions"] = {key: value.tolist() for key, value in arrays.values.items()}
        write_json(folder / "metrics.json", scores)
        for stage, row in stages:
            if (curve := workspace.curve_file(stage, row)).exists():
                shutil.copyfile(curve, folder / f"{stage}-{row}.tsv")


def _machine(run: Mapping[str, Any]) -> dict[str, Any]:
    keys = (
        "seconds",
        "training_seconds",
        "examples_seen",
        "validations",
        "cores",
        "gpu",
        "peak_memory_mib",
        "commit",
        "finished",
        "inputs",
    )
    return {key: run[key] for key in keys if key in run}


# Lines -> tables ----------------------------------------------------------------------------------------------------


def markdown_tables(lines: Iterable[Line]) -> str:
    """Markdown tables, one per experiment and protocol, each with the published scores below it."""
    from stages.reporting.published import BENCHMARKS, PUBLISHED
    from stages.reporting.scoreboard import plus_minus

    parts: list[str] = []
    lines = list(lines)
    for experiment in dict.fromkeys(line.experiment for line in lines):
        of = [line for line in lines if line.experiment == experiment]
        known = EXPERIMENTS.get(experiment, Experiment(experiment))
        parts.append(f"## {known.title}")
        headline = "test_log_likelihood" if any(line.metric == "test_log_likelihood" for line in of) else known.leading
        headed = {line.row for line in of if line.metric == headline}
        protocols = dict.fromkeys(line.protocol for line in of if line.metric == headline)
        # Rows without that score, such as GMMN's on vectors and controls, join the others if they can.
        protocols |= dict.fromkeys(
            line.protocol for line in of if line.row not in headed and not METRICS[line.metric].in_features
        )
        protocols = protocols or dict.fromkeys(line.protocol for line in of)
        own_protocol = {line.row for line in of if not METRICS[line.metric].in_features}
        for number, protocol in enumerate(protocols):
            here = [line for line in of if line.protocol == protocol or METRICS[line.metric].in_features]
            rows = dict.fromkeys(
                line.row
                for line in here
                if ((line.metric, line.protocol) == (headline, protocol))
                or (line.row not in headed and (line.protocol == protocol or (number == 0 and line.row not in own_protocol)))
            )
            columns = [c for m in RECORDED for c in dict.fromkeys(_column(line) for line in of if line.metric == m)]
            columns.sort(key=lambda column: column != METRICS[known.leading].heading)  # stable
            table = []
            for row in rows:
                own = {_column(line): line for line in here if line.row == row}
                first = min((own[c] for c in columns if c in own), key=lambda line: line.protocol != protocol)
                cells = [_cell(own.get(column)) for column in columns]
                score = float(own[columns[0]].value) if columns[0] in own else -math.inf
                table.append(
                    (score, [f"`{row}`", *cells, first.seeds, first.samples, first.minutes, first.cores, first.commit])
                )
            table.sort(key=lambda pair: -pair[0])
            heads = ["row", *columns, "seeds", "samples or test points", "minutes", "cores", "commit"]
            leading = [line for line in of if line.protocol == protocol and _column(line) == columns[0]]
            kinds = dict.fromkeys(line.error_kind for line in leading if line.error_kind)
            parts.append(f"Protocol `{protocol}`. Errors of the first column: {', '.join(kinds) or 'none'}.")
            parts.append(_table(heads, [cells for _, cells in table]))
        for name in known.benchmarks:
            published = sorted((p for p in PUBLISHED if p.benchmark == name), key=lambda p: -p.value)
            parts.append(f"Published, {BENCHMARKS[name].title}: {BENCHMARKS[name].protocol}.")
            rows_ = [[p.method, plus_minus(p.value, p.error), p.source] for p in published]
            parts.append(_table(["method", "test log-likelihood, nats", "source"], rows_))
    return "\n\n".join(parts)


def _column(line: Line) -> str:
    """Heading of a line's column; each feature network has its own columns."""
    heading = METRICS[line.metric].heading
    return f"{heading} ({line.protocol})" if METRICS[line.metric].in_features else heading


def _cell(line: Line | None) -> str:
    from stages.reporting.scoreboard import plus_minus

    return "" if line is None else plus_minus(float(line.value), float(line.error) if line.error else None)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    titles = [head.replace("|", "\\|") for head in heads]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [titles, ["---"] * len(heads), *rows])


def _write_tables(folder: Path) -> None:
    from stages.tools.findings import renewed

    path = folder / README
    text = path.read_text(encoding="utf-8") if path.exists() else f"# Results\n\n{START}\n{END}\n"
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise PipelineError(f"{path}: the lines '{START}' and '{END}' are missing; the tables go between them")
    write_text(path, f"{before}{START}\n\n{markdown_tables(read_lines(folder))}\n\n{END}{after}")
    if (path := folder / FINDINGS).exists():
        write_text(path, renewed(path.read_text(encoding="utf-8"), folder))
