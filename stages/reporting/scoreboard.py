"""Metrics of all rows that params.yaml names -> one table of scores."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError
from pipeline.settings import Params
from pipeline.system.files import read_json
from stages import workspace
from stages.arrays import check_output, read_run
from stages.reporting.metrics import DETECTION, METRICS, NETWORKS
from stages.reporting.published import BENCHMARKS, benchmark_of, best_published, paper_value
from stages.workspace import CHAIN, TABLE_OF_STAGE

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "COLUMNS",
    "as_text",
    "build_scoreboard",
    "contenders",
    "detection_headlines",
    "detections_of",
    "duration",
    "error_over_trials",
    "headline",
    "plus_minus",
    "read_metrics",
    "read_run",
    "runs_of",
    "stages_and_rows",
]

# Scores in the features of a network: key without the network's name -> what it is.
QUALITY: Mapping[str, str] = {
    key.removeprefix("NETWORK_"): what
    for metric in METRICS.values()
    for key, what in ((metric.key, metric.meaning), (metric.error, f"its standard error over {metric.over}"))
    if key.startswith("NETWORK_")
}
GIVEN = ("test_conditional_log_likelihood", "class_accuracy", "class_calibration_error")  # of densities given a context
OF_THEIR_OWN = (
    "test_mse",
    "manifold_log_likelihood",
    "gap_to_truth",
    "samples_in_dropped_box",
    "mmd_squared",
    *GIVEN,
)  # columns named as their metrics

# Column of the scoreboard -> what it holds. Likelihoods are means over test points, in nats.
COLUMNS: Mapping[str, str] = {
    "row": "row of `densities`, the common name of its trials, or a control",
    "kind": "`model`; `mean` of trials; or `control`: images of the data set taken as samples",
    "trials": "number of trials that `mean` is over",
    "dataset": "row of `datasets`",
    "autoencoder": "row of `autoencoders`",
    "objective": "objective of the autoencoder, with the mode of incremental learning, if any",
    "latent_dim": "numbers in a code",
    "family": "family of the density",
    "components": "components K of its mixtures",
    "context": "columns that the density is conditioned on",
    "score": "what `value` is",
    "value": "the score, in nats; higher is better",
    "error": "its standard error over test points; for a `mean`, the error over trials that the protocol names",
    "group_error": "its standard error over the images that test patches come from",
    "against_control": "`better`, `worse`, or `level`: within 2 standard errors of the best control of as many samples",
    "since_commit": "the score less that of the last commit",
    "since_commit_error": "its standard error, over differences of the same test points where both scored the same",
    "best_control": "that control",
    "control_difference": "the score less that control's",
    "paper": "the paper's value for this method, if the protocol is the same",
    "paper_error": "the paper's value after +-",
    "best_published": "the highest published score under the same protocol",
    "best_published_error": "its value after +-",
    "best_published_method": "whose it is",
    "protocol": "how the score is measured",
    "samples": "number of samples n of the Parzen window",
    "test_points": "test points scored",
    "bandwidth": "chosen bandwidth h, in units of the pixel range 0..1",
    "bandwidth_at_edge": "whether h is an end of the grid; if so, a wider grid might score higher",
    **{f"{network}_{key}": f"{what}, in the features of {network}" for network in NETWORKS for key, what in QUALITY.items()},
    **{key: METRICS[key].meaning for key in OF_THEIR_OWN},
    "manifold_log_likelihood_se": "its standard error over codes",
    "autoencoder_parameters": "numbers trained in the autoencoder",
    "density_parameters": "numbers trained in the density",
    "seconds": "total of train, extract, fit, sample and evaluate, or of control, each in its last run",
    "peak_memory_mib": "peak memory of the largest of these processes",
}

COUNTS = ("trials", "latent_dim", "components", "samples", "test_points", "autoencoder_parameters", "density_parameters")
AVERAGED = (
    *("value", *OF_THEIR_OWN),
    *(f"{network}_{key}" for network in NETWORKS for key in QUALITY if not key.endswith("_se")),
)
PARZEN, LIKELIHOOD = METRICS["parzen_test_log_likelihood"].title, METRICS["test_log_likelihood"].title
GIVEN_CONTEXT = " given their contexts"
OF_CODES = f"{LIKELIHOOD} of the codes"  # of images without a Parzen score
CONTROLS = {"training_images": "training-images", "kmeans": "kmeans"}  # prefix of the metric -> end of the row's name


def stages_and_rows(params: Params) -> Iterator[tuple[str, str]]:
    """Every (stage, row) of the pipeline, in its order."""
    for stage, table in TABLE_OF_STAGE.items():
        for row in params.rows(table):
            yield stage, row


class Metrics(dict[str, Any]):
    """The metrics of a stage; a missing key raises an error that names the stage to run."""

    def __init__(self, values: Mapping[str, Any], problem: str) -> None:
        super().__init__(values)
        self.problem = problem

    def __missing__(self, key: str) -> Any:
        raise PipelineError(f"{key} is missing: {self.problem}")


def read_metrics(stage: str, row: str) -> Metrics:
    """The scores of a stage.

    Raises:
        PipelineError: When they are missing, can't be read or aren't what the stage wrote; names the stage to run.
    """
    path = workspace.metrics_file(stage, row)
    if not path.exists():
        raise PipelineError(f"{path} is missing; run `dvc repro {stage}@{row}`, or `dvc repro` for all")
    check_output(stage, row, path)
    problem = f"{path} is damaged; {workspace.rerun(stage, row)}"
    try:
        metrics = read_json(path)
    except PipelineError:
        raise PipelineError(problem) from None
    if not isinstance(metrics, dict):
        raise PipelineError(problem)
    for key, value in metrics.items():
        if not (value is None or (isinstance(value, (int, float)) and math.isfinite(value)) or key.endswith("protocol")):
            raise PipelineError(f"{key}: {problem}")
    return Metrics(metrics, problem)


def runs_of(params: Params, name: str) -> list[dict[str, Any]]:
    """What is known of the runs of each stage from the autoencoder to the scores of a row of `densities`."""
    codes = params.density(name).codes
    return [read_run(stage, codes if stage in ("train", "extract") else name) for stage in CHAIN]


def build_scoreboard(params: Params) -> pd.DataFrame:
    """One line per density and per mean of trials, two per control, sorted by value within each data set.

    Arguments:
        params: All tables. Only the rows that they name are read.

    Raises:
        PipelineError: When a row has no metrics; the message names the stage to run.
    """
    import pandas as pd

    for stage, row in stages_and_rows(params):
        read_metrics(stage, row)
    lines = [line for name in params.rows("controls") for line in _controls(params, name)]
    models = [_model(params, name) for name in params.rows("densities")]
    lines += [*_means(params, models), *models]
    for line in lines:
        _compare(line, [other for other in lines if other["kind"] == "control"])
        if line["kind"] == "model":
            line["since_commit"] = _since_commit(line)
    _add_errors_of_changes(lines)
    board = pd.DataFrame([{column: line.get(column) for column in COLUMNS} for line in lines], columns=list(COLUMNS))
    order = {name: i for i, name in enumerate(params.rows("datasets"))}
    board["_dataset"] = board["dataset"].map(order)
    for column in COUNTS:
        board[column] = board[column].astype("Int64")
    board["value"] = board["value"].astype(float)
    board = board.sort_values(["_dataset", "value"], ascending=[True, False], na_position="last", kind="stable")
    return board.drop(columns="_dataset").reset_index(drop=True)


def _model(params: Params, name: str) -> dict[str, Any]:
    density = params.density(name)
    autoencoder = params.autoencoder(density.codes)
    dataset = params.dataset(density.dataset)
    fitted, scored, trained = read_metrics("fit", name), read_metrics("evaluate", name), read_metrics("train", density.codes)
    incremental = getattr(autoencoder, "incremental", None)
    line: dict[str, Any] = {
        "row": name,
        "kind": "model",
        "dataset": density.dataset,
        "autoencoder": density.codes,
        "objective": autoencoder.objective + (f", incremental ({incremental.mode})" if incremental else ""),
        "latent_dim": read_metrics("extract", density.codes).get("dimensions"),
        "family": density.family,
        "components": fitted.get("components", getattr(density, "components", None)),
        "context": ", ".join(density.context_names) or None,
        **{key: (trained if key == "test_mse" else scored).get(key) for key in OF_THEIR_OWN},
        "manifold_log_likelihood_se": scored.get("manifold_log_likelihood_se"),
        "autoencoder_parameters": read_run("train", density.codes).get("parameters"),
        "density_parameters": fitted.get("parameters"),
    }
    line |= _cost(runs_of(params, name))
    images = len(dataset.shape) == 3
    # For vectors an exact log-likelihood takes precedence over a Parzen-window estimate.
    if "parzen_test_log_likelihood" in scored and (images or "test_log_likelihood" not in scored):
        line |= _parzen(params, density.dataset, scored, "")
    else:
        # With numbers in its context a density has no likelihood but that given the context.
        given = "test_log_likelihood" not in scored and "test_conditional_log_likelihood" in scored
        key = "test_conditional_log_likelihood" if given else "test_log_likelihood"
        points = scored.get("test_conditional_scored" if given else "test_scored")
        what = "codes, comparable between densities of the same codes only" if images else "vectors"
        line |= {
            "score": (OF_CODES if images else LIKELIHOOD) + GIVEN_CONTEXT * given,
            "value": scored.get(key),
            "error": scored.get(f"{key}_se"),
            "group_error": scored.get("test_log_likelihood_group_se"),
            "test_points": points,
            "protocol": f"mean log-density of {int(points):,} test {what}" + GIVEN_CONTEXT * given
            if points is not None
            else "no likelihood: samples only",
        }
    line |= _quality(params, density.dataset, scored, "")
    score = "parzen" if line["score"] == PARZEN else "likelihood"
    counts = read_metrics("prepare", density.dataset)
    benchmark = benchmark_of(asdict(dataset), score, counts, line.get("samples"), scored.get("parzen_protocol", ""))
    paper, best = paper_value(benchmark, asdict(autoencoder), asdict(density)), best_published(benchmark)
    if benchmark is not None:
        line["protocol"] += f"; comparable to {BENCHMARKS[benchmark].title}"
    if paper is not None:
        line |= {"paper": paper.value, "paper_error": paper.error}
    if best is not None:
        line |= {"best_published": best.value, "best_published_error": best.error}
        line |= {"best_published_method": f"{best.method} ({best.source})"}
    return line


def _means(params: Params, models: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The mean of rows NAME-s0, NAME-s1 .. with the error over them; columns in which they differ are empty."""
    trials: dict[str, list[dict[str, Any]]] = {}
    for line in models:
        if (match := re.fullmatch(r"(.+)-s\d+", line["row"])) and line["value"] is not None:
            trials.setdefault(match[1], []).append(line)
    for name, lines in trials.items():
        comparable = all(len({line.get(key) for line in lines}) == 1 for key in ("dataset", "score", "samples"))
        if len(lines) < 2 or not comparable or name in params.rows("densities"):
            continue
        shared = {key: value for key, value in lines[0].items() if all(line.get(key) == value for line in lines)}
        columns = {key: [line[key] for line in lines if line.get(key) is not None] for key in AVERAGED}
        means = {key: statistics.fmean(values) for key, values in columns.items() if len(values) == len(lines)}
        # The error of a mean is the error over trials, not the first trial's error over test points or subsets.
        errors = {
            f"{key}_se": statistics.stdev(columns[key]) / math.sqrt(len(lines)) for key in means if f"{key}_se" in COLUMNS
        }
        error, kind = error_over_trials([line["value"] for line in lines], params.dataset(lines[0]["dataset"]).source)
        protocol = f"mean of {len(lines)} trials, ± {kind}; {lines[0]['protocol']}"
        yield (
            shared | means | errors | {"row": name, "kind": "mean", "trials": len(lines), "error": error, "protocol": protocol}
        )


def _controls(params: Params, name: str) -> Iterator[dict[str, Any]]:
    dataset = params.control(name).dataset
    scored = read_metrics("control", name)
    cost = _cost([read_run("control", name)])
    for prefix, label in CONTROLS.items():
        quality = _quality(params, dataset, scored, f"{prefix}_")
        line = {"row": f"{name}-{label}", "kind": "control", "dataset": dataset} | cost | quality
        if params.evaluation(dataset).parzen is None:
            if quality:
                yield line | {"protocol": "images of the data set, taken as samples"}
            continue
        if f"{prefix}_parzen_test_log_likelihood" not in scored:
            raise PipelineError(f"{workspace.metrics_file('control', name)} lacks scores; run `dvc repro -f control@{name}`")
        yield line | _parzen(params, dataset, scored, f"{prefix}_")


def _parzen(params: Params, dataset: str, scored: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    settings = params.evaluation(dataset).parzen
    keys = ("samples", "valid_points", "test_points", "protocol")
    samples, valid, test, name = (scored[f"{prefix}parzen_{key}"] for key in keys)
    grid, what = "", "images" if len(params.dataset(dataset).shape) == 3 else "vectors"
    if settings is not None and settings.bandwidth_count > 1:
        h = settings.bandwidths
        grid = f"bandwidth from {h[0]:g}, {h[1]:g} .. {h[-1]:g} by {valid:,} validation {what}, "
    return {
        "score": PARZEN,
        "value": scored[f"{prefix}parzen_test_log_likelihood"],
        "error": scored[f"{prefix}parzen_test_se"],
        "samples": samples,
        "test_points": test,
        "bandwidth": scored[f"{prefix}parzen_bandwidth"],
        "bandwidth_at_edge": bool(scored[f"{prefix}parzen_bandwidth_at_edge"]),
        "protocol": f"Parzen window over {samples:,} samples, {grid}mean over {test:,} test {what} ({name})",
    }


def _quality(params: Params, dataset: str, scored: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Quality in a feature space; empty if it isn't scored, as for centroids."""
    settings = params.evaluation(dataset).quality
    names = [] if settings is None else [f"{settings.network}_{key}" for key in QUALITY]
    return {name: scored[prefix + name] for name in names if prefix + name in scored}


def _cost(runs: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [run["seconds"] for run in runs if "seconds" in run]
    memory = [run["peak_memory_mib"] for run in runs if "peak_memory_mib" in run]
    return {"seconds": round(sum(seconds), 3) if seconds else None, "peak_memory_mib": max(memory, default=None)}


def _since_commit(line: Mapping[str, Any]) -> float | None:
    """How much the score has changed since the last commit, by the headline that git keeps."""
    text = workspace.committed(workspace.HEADLINE / f"{line['row']}.json")
    try:
        before = json.loads(text) if text else {}
    except ValueError:
        return None
    old = before.get(_scored_key(line)) if isinstance(before, dict) else None
    return float(line["value"]) - old if isinstance(old, (int, float)) and not is_missing(line["value"]) else None


def _add_errors_of_changes(lines: Iterable[dict[str, Any]]) -> None:
    """Adds the errors of changed scores, where DVC's cache has the scores of single test points at the last commit."""
    changed = [line for line in lines if line.get("since_commit")]
    if not changed:
        return
    from safetensors.numpy import load

    from stages.arrays import PER_EXAMPLE, load_arrays
    from stages.reporting.differences import difference
    from stages.reporting.history import files_at

    try:
        read = files_at("HEAD")
    except PipelineError:
        return
    for line in changed:
        metrics = read(workspace.metrics_file("evaluate", line["row"]))
        points = read(workspace.arrays_folder("evaluate", line["row"]) / f"{PER_EXAMPLE}.safetensors")
        now, key = load_arrays("evaluate", line["row"], PER_EXAMPLE), _scored_key(line)
        before = json.loads(metrics) if metrics else {}
        if before.get(key) is not None:
            scored = read_metrics("evaluate", line["row"])
            error = difference(key, before, scored, load(points) if points else {}, now.values if now is not None else {}).error
            line["since_commit_error"] = error if math.isfinite(error) else None


def _scored_key(line: Mapping[Any, Any]) -> str:
    """The metric that a line's value is."""
    if line["score"] == PARZEN:
        return "parzen_test_log_likelihood"
    return "test_conditional_log_likelihood" if line["score"].endswith(GIVEN_CONTEXT) else "test_log_likelihood"


def _compare(line: dict[str, Any], controls: list[dict[str, Any]]) -> None:
    """Compares a model, or the mean of its trials, with the best control of the same data set, score and number of samples."""
    rivals = [c for c in controls if all(c.get(key) == line.get(key) for key in ("dataset", "score", "samples"))]
    if line["kind"] == "control" or not rivals or line["value"] is None:
        return
    best = max(rivals, key=lambda c: float(c["value"]))
    difference = line["value"] - best["value"]
    error = math.hypot(line["error"] or 0.0, best["error"] or 0.0)
    word = "level" if abs(difference) <= 2 * error else "better" if difference > 0 else "worse"
    line |= {"control_difference": difference, "against_control": word, "best_control": best["row"]}


def error_over_trials(values: Sequence[float], source: str) -> tuple[float, str]:
    """The value after +- of a mean over trials, and its kind, by the convention of the paper's table of that data.

    Arguments:
        values: One score per trial, at least two.
        source: Source of the data set. `bsds300` gives 2 standard deviations of a trial, others the standard error of the mean.

    Example:
        >>> error_over_trials([155.0, 157.0, 159.0], "bsds300")
        (4.0, '2 standard deviations over 3 trials')
        >>> error_over_trials([325.0, 327.0], "mnist")
        (1.0, 'standard error over 2 seeds')
    """
    deviation = statistics.stdev(values)
    if source == "bsds300":
        return 2 * deviation, f"2 standard deviations over {len(values)} trials"
    return deviation / math.sqrt(len(values)), f"standard error over {len(values)} seeds"


def contenders(lines: Sequence[Mapping[Any, Any]]) -> list[Mapping[Any, Any]]:
    """The lines that may be called the best: means of trials, and models that aren't one of several trials.

    The best of several trials is the luckiest one, so their mean counts instead. Means come first; otherwise the order is kept.

    Example:
        >>> kinds = {"lde": "mean", "lde-s0": "model", "lde-s1": "model", "gmm": "model", "kmeans": "control"}
        >>> [line["row"] for line in contenders([{"row": row, "kind": kind} for row, kind in kinds.items()])]
        ['lde', 'gmm']
    """
    means = {line["row"] for line in lines if line["kind"] == "mean"}
    models = (line for line in lines if line["kind"] == "model" and re.sub(r"-s\d+$", "", line["row"]) not in means)
    return [line for line in lines if line["kind"] == "mean"] + list(models)


def headline(board: pd.DataFrame) -> dict[str, dict[str, float]]:
    """One to three numbers per model, named as in `reports/metrics`: its line in `dvc metrics show`."""
    numbers: dict[str, dict[str, float]] = {}
    for line in board[board["kind"] == "model"].to_dict("records"):
        chosen = {_scored_key(line): line["value"], "test_mse": line["test_mse"], "gap_to_truth": line["gap_to_truth"]}
        chosen |= {f"{network}_kid": line[f"{network}_kid"] for network in NETWORKS}
        if is_missing(line["value"]):
            chosen |= {key: line[key] for key in ("samples_in_dropped_box", "mmd_squared")}
        numbers[line["row"]] = {key: float(value) for key, value in chosen.items() if not is_missing(value)}
    return numbers


def detections_of(params: Params, dataset: str) -> list[dict[str, Any]]:
    """The rows of `detections` whose inliers are of a data set, with their metrics, in order."""
    rows = [(name, params.detection(name)) for name in params.rows("detections")]
    return [
        {"row": name, "density": row.density, "outliers": row.outliers, "classes": row.outlier_classes}
        | read_metrics("detect", name)
        for name, row in rows
        if row.dataset == dataset
    ]


def detection_headlines(params: Params) -> dict[str, dict[str, float]]:
    """The numbers of each row of `detections` that `dvc metrics show` shows."""
    every = {name: read_metrics("detect", name) for name in params.rows("detections")}
    return {name: {key: float(metrics[key]) for key in DETECTION} for name, metrics in every.items()}


# As text -------------------------------------------------------------------------------------------------------------


def is_missing(value: object) -> bool:
    """Whether a cell is empty."""
    return value is None or str(value) in ("nan", "<NA>", "None")


def plus_minus(value: float | None, error: float | None = None) -> str:
    """A score with the decimals that its error warrants.

    Example:
        >>> plus_minus(257.7335, 6.893), plus_minus(-3.32818, 0.00819), plus_minus(340, 2), plus_minus(None)
        ('257.7 ± 6.9', '-3.3282 ± 0.0082', '340 ± 2', '')
    """
    if value is None or is_missing(value):
        return ""
    if error is None or is_missing(error) or error <= 0:
        return f"{value:.5g}"
    if float(error).is_integer() and float(value).is_integer():
        return f"{value:.0f} ± {error:.0f}"
    decimals = min(max(1 - math.floor(math.log10(error)), 0), 6)
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def duration(seconds: float | None) -> str:
    """Seconds as text with units.

    Example:
        >>> duration(0.045), duration(7.26), duration(356.2), duration(7384), duration(None)
        ('< 0.1 s', '7.3 s', '5 min 56 s', '2 h 3 min', '')
    """
    if seconds is None or is_missing(seconds):
        return ""
    if seconds < 0.095:
        return "< 0.1 s"
    if seconds < 59.5:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def score_names(lines: Iterable[Mapping[str, Any]]) -> str:
    """Names of the scores of lines, with a warning if their units differ between autoencoders.

    Example:
        >>> score_names([{"score": PARZEN}, {"score": OF_CODES}])
        'Parzen test log-likelihood, test log-likelihood of the codes (to compare densities of the same codes only)'
    """
    names = dict.fromkeys(line["score"] for line in lines if not is_missing(line["score"]))
    return ", ".join(f"{n} (to compare densities of the same codes only)" if n == OF_CODES else n for n in names)


def remark(line: Mapping[str, Any]) -> str:
    """The kind of a line that isn't a row of `densities`.

    Example:
        >>> remark({"kind": "mean", "trials": 3}), remark({"kind": "control"}), remark({"kind": "model"})
        ('mean of 3', 'control', '')
    """
    return f"mean of {line['trials']:.0f}" if line["kind"] == "mean" else "control" if line["kind"] == "control" else ""


ARROWS = {"better": "▲", "worse": "▼", "level": "≈"}


def against(line: Mapping[str, Any]) -> str:
    """Comparison of a line with the best control: symbol, word and number."""
    word = line["against_control"]
    if is_missing(word):
        return ""
    return f"{ARROWS[word]} {word} ({line['control_difference']:+.1f})"


def as_text(board: pd.DataFrame) -> str:
    """The scoreboard as plain text, about 110 characters wide.

    Arguments:
        board: As made by `build_scoreboard`, or read from `reports/scoreboard.csv`.
    """
    heads = ("row", "score, nats (± SE)", "against best control", "paper", "n", "time")
    blocks: list[str] = []
    for dataset in board["dataset"].drop_duplicates():
        part = board[board["dataset"] == dataset]
        cells = [heads] + [
            (
                line["row"] + {"control": " *", "mean": f" ({remark(line)})"}.get(line["kind"], ""),
                plus_minus(line["value"], line["error"]) or "-",
                against(line),
                plus_minus(line["paper"], line["paper_error"]) or "-",
                "-" if is_missing(line["samples"]) else f"{line['samples']:,.0f}",
                duration(line["seconds"]),
            )
            for line in part.to_dict("records")
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
        rows = [
            "  ".join(c.ljust(w) if i in (0, 2) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in cells
        ]
        title = f"{dataset}: {score_names(part.to_dict('records'))}"
        blocks.append("\n".join([title, *(f"  {text.rstrip()}" for text in rows)]))
    if (board["kind"] == "control").any():
        blocks.append(
            "* control: images of the data set as samples, compared where n is the same. Level: within 2 standard errors."
        )
    return "\n\n".join(blocks)
