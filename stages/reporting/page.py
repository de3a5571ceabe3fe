"""The report as text: one self-contained HTML page, and Markdown that links to the pictures."""

from __future__ import annotations

import base64
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.settings import Params, TrainingSettings, changed_defaults, flatten
from pipeline.storage.parts import SPLITS
from stages.reporting.cards import cards, verdict
from stages.reporting.explore import explorations, ordered_samples
from stages.reporting.graph import Graph, StageState
from stages.reporting.metrics import DETECTION, METRICS, NETWORKS, Metric
from stages.reporting.pictures import Picture, autoencoders_of, combined_pictures, densities_of, pictures
from stages.reporting.published import BENCHMARKS, PUBLISHED
from stages.reporting.scoreboard import (
    against,
    detections_of,
    duration,
    is_missing,
    plus_minus,
    read_metrics,
    remark,
    score_names,
)
from stages.workspace import git_state

if TYPE_CHECKING:
    import pandas as pd
    from jinja2 import Environment

__all__ = ["description", "page_head", "render"]

TEMPLATES = Path(__file__).parent / "templates"
# Of densities given a context, next to those of the same codes that are given none.
GIVEN_METRICS = [
    METRICS[name]
    for name in (
        *("code_log_likelihood", "test_conditional_log_likelihood", "kid", "class_kid", "class_accuracy"),
        *("class_calibration_error", "knn_class_accuracy", "knn_class_calibration_error"),
        *("logistic_class_accuracy", "logistic_class_calibration_error"),
    )
]
SHOWN_TOGETHER = ("open-dimensions", "reconstructions", "codes", "interpolations", "interpolation-log-likelihood")
SAMPLED_ROWS = 4  # rows of a data set whose samples can be sorted by likelihood
PACKAGES = ("torch", "torchvision", "numpy", "pandas", "scikit-learn", "webdataset", "dvc", "mlflow")


# Where and when ------------------------------------------------------------------------------------------------------


def page_head() -> dict[str, str]:
    """Commit, date, machine and versions."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    state = git_state()
    return {
        "commit": state["commit"],
        "dirty": state["dirty"],
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "machine": f"{os.cpu_count()} cores, {_processor()}, {platform.system()} {platform.machine()}",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }


def _processor() -> str:
    """The processor's name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or "unknown processor"


# What is shown of each row -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """A row with its pictures and all its metrics (stage, key, value)."""

    name: str
    summary: str
    pictures: list[Picture]
    metrics: list[tuple[str, str, str]]


@dataclass(frozen=True)
class _Section:
    """A data set with its rows."""

    name: str
    summary: str
    verdict: str
    densities: list[_Block]
    autoencoders: list[_Block]
    combined: list[Picture]
    given: list[tuple[str, list[str]]]
    controls: list[_Block]
    detections: list[_Block]


def _sections(params: Params, board: pd.DataFrame) -> Iterator[_Section]:
    lines = {line["row"]: line for line in board.to_dict("records")}
    for dataset in params.rows("datasets"):
        settings = params.dataset(dataset)
        drawn_as = settings.drawn_as if len(settings.shape) == 1 else None
        warning = _enlarged(dataset).removeprefix(". ")

        def warned(picture: Picture, warning: str = warning) -> Picture:
            return replace(picture, caption=f"{picture.caption} {warning}.") if warning else picture

        combined = [warned(picture) for picture in combined_pictures(dataset)]
        # A plot of all rows makes the plot of one row redundant.
        skip = [name for name in SHOWN_TOGETHER if any(p.path.stem == f"{dataset}-{name}" for p in combined)]

        def block(
            name: str,
            summary: str,
            *stages: str,
            drawn_as: str | None = drawn_as,
            skip: list[str] = skip,
            warned: Callable[[Picture], Picture] = warned,
        ) -> _Block:
            row_pictures = [warned(picture) for stage in stages for picture in pictures(stage, name, drawn_as, skip)]
            metrics = [(stage, key, _cell(value)) for stage in stages for key, value in read_metrics(stage, name).items()]
            return _Block(name, summary, row_pictures, metrics)

        yield _Section(
            name=dataset,
            summary=_dataset_summary(params, dataset),
            verdict=" ".join(verdict(params, board[board["dataset"] == dataset].to_dict("records"))[1]),
            densities=[
                block(name, _density_summary(params, name, lines[name]), "sample", "evaluate", "fit")
                for name in densities_of(params, dataset)
            ],
            autoencoders=[
                block(name, _autoencoder_summary(params, name), "train", "extract") for name in autoencoders_of(params, dataset)
            ],
            combined=combined,
            given=_given_context(params, dataset),
            controls=[
                block(
                    name,
                    "Images of the data set taken as samples, and its principal components",
                    "control",
                )
                for name in params.rows("controls")
                if params.control(name).dataset == dataset
            ],
            detections=[block(line["row"], _detection_summary(line), "detect") for line in detections_of(params, dataset)],
        )


def _given_context(params: Params, dataset: str) -> list[tuple[str, list[str]]]:
    """Rows that are conditioned and rows of the same codes that aren't, each with its cells under `GIVEN_METRICS`."""
    rows = densities_of(params, dataset)
    codes = {params.density(row).codes for row in rows if params.density(row).context_names}
    found = []
    for row in rows:
        settings, scored = params.density(row), read_metrics("evaluate", row)
        if settings.codes not in codes:
            continue
        cells = [", ".join(settings.context_names) or "–"]
        for metric in GIVEN_METRICS:
            networks = NETWORKS if metric.in_features else ("",)
            keys = [metric.key.replace("NETWORK", network) for network in networks]
            key = next((key for key in keys if scored.get(key) is not None), "")
            error = scored.get(f"{key}_se")
            shown = plus_minus(scored[key], error) if key and error is not None else metric.show(scored[key]) if key else "–"
            cells.append(shown)
        found.append((row, cells))
    return found


def _cell(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _dataset_summary(params: Params, name: str) -> str:
    counts, settings = read_metrics("prepare", name), params.dataset(name)
    what = f"Images of {'×'.join(map(str, settings.shape))}"
    if len(settings.shape) == 1:
        what = f"Vectors of {settings.shape[0]} numbers" if settings.shape[0] else "Vectors"
    uses = (("train", "to train"), ("valid", "to validate"), ("test", "to test"))
    splits = ", ".join(f"{counts[f'{split}_examples']:,} {use}" for split, use in uses if f"{split}_examples" in counts)
    return f"{what}: {splits} (source {settings.source}){_duplicates(counts)}{_enlarged(name)}"


def _duplicates(counts: Mapping[str, Any]) -> str:
    """Notes on images that are in two splits, which flatters a score; empty if there are none."""
    words = {"train": "training", "valid": "validation", "test": "test"}
    notes = []
    for earlier, later in (("train", "valid"), ("train", "test"), ("valid", "test")):
        number = counts.get(f"duplicates_{earlier}_{later}", 0)
        if number:
            notes.append(
                f"{number:,} of the {words[later]} images {'are' if number > 1 else 'is'} among the {words[earlier]} images too"
            )
    return "".join(f"; {text}" for text in notes)


def _enlarged(name: str) -> str:
    """Remark for each picture of a data set whose images were enlarged; empty if none was."""
    counts = read_metrics("prepare", name)
    if not counts.get("enlarged_images"):
        return ""
    total = sum(counts[f"{split}_examples"] for split in SPLITS)
    smoke_test = " (a smoke test, and no result)" if 2 * counts["enlarged_images"] > total else ""
    return f". {counts['enlarged_images']:,} of its {total:,} images were enlarged from fewer pixels{smoke_test}"


def _autoencoder_summary(params: Params, name: str) -> str:
    settings, metrics = params.autoencoder(name), read_metrics("train", name)
    if settings.objective == "identity":
        return "Vectors are their own codes"
    words = [f"Objective {settings.objective}", f"{read_metrics('extract', name).get('dimensions')} numbers per code"]
    incremental = getattr(settings, "incremental", None)
    if incremental:
        warm_up = incremental.warm_up_epochs  # nested dropout has none
        words += [f"incremental ({incremental.mode}" + (f", over {_epochs(warm_up)})" if warm_up is not None else ")")]
    if isinstance(settings, TrainingSettings):
        limit = f"{settings.max_minutes:g} minutes and " if settings.max_minutes else ""
        words += [f"{'at most ' if limit or settings.patience else ''}{limit}{_epochs(settings.epochs)}"]
    words += [f"test MSE {plus_minus(metrics['test_mse'], metrics.get('test_mse_se'))}"] if "test_mse" in metrics else []
    return ", ".join(words)


def _epochs(number: float) -> str:
    return f"{number:,g} epoch" + ("" if number == 1 else "s")


def _density_summary(params: Params, name: str, line: Mapping[Any, Any]) -> str:
    settings = params.density(name)
    family = "Contest of families (auto) on" if settings.family == "auto" else f"{settings.family.upper()} of"
    words = [f"{family} the codes of {settings.codes}"]
    words += [] if is_missing(line["components"]) else [f"K = {line['components']}"]
    words += [] if is_missing(line["density_parameters"]) else [f"{line['density_parameters']:,} parameters"]
    score = f"{line['score']} {plus_minus(line['value'], line['error'])} nats"
    return ", ".join([*words, "no likelihood" if is_missing(line["value"]) else score])


def _detection_summary(line: Mapping[str, Any]) -> str:
    classes = f" with label {', '.join(map(str, line['classes']))}" if line["classes"] else ""
    numbers = ", ".join(
        f"{METRICS[key].title} {plus_minus(line[METRICS[key].key], line.get(METRICS[key].error))}" for key in DETECTION
    )
    return (
        f"{line['outliers']}{classes} told from the data set's own test examples by {line['density']}: {numbers} "
        f"({line['inliers_scored']:,} inliers, {line['outliers_scored']:,} outliers)"
    )


def _settings(params: Params) -> list[tuple[str, list[tuple[str, str]]]]:
    """(table, [(line of YAML, default that its value differs from)]) with every default resolved."""

    def lines(settings: Any, indent: str) -> Iterator[tuple[str, str]]:
        defaults = changed_defaults(settings)
        above: tuple[str, ...] = ()
        for dotted, value in flatten(asdict(settings)).items():
            *path, key = dotted.split(".")
            for depth, part in enumerate(path):
                if tuple(path[: depth + 1]) != above[: depth + 1]:
                    yield f"{indent}{'  ' * depth}{part}:", ""
            above = tuple(path)
            default = f"default {json.dumps(defaults[dotted])}" if dotted in defaults else ""
            yield f"{indent}{'  ' * len(path)}{key}: {json.dumps(value)}", default

    def text(table: str) -> Iterator[tuple[str, str]]:
        if table == "sampling":
            yield from lines(params.sampling(), "  ")
            return
        for row in params.rows(table):
            yield f"  {row}:", ""
            yield from lines(params.row(table, row), "    ")

    return [(table, list(text(table))) for table in params.tables]


def _runs_address() -> str:
    """Where a tracked run is shown: on the tracking server, or where `make ui` shows it."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    server = re.sub(r"(://)[^/@]*@", r"\1", address.rstrip("/")) if address.startswith("http") else "http://127.0.0.1:5000"
    return f"{server}/#/runs/"


def _exploration(params: Params) -> dict[str, Any]:
    """What the page's script shows, by data set."""
    found = {}
    for dataset in params.rows("datasets"):
        shown = explorations(params, autoencoders_of(params, dataset))
        samples = {row: drawn for row in densities_of(params, dataset)[:SAMPLED_ROWS] if (drawn := ordered_samples(row))}
        if shown or samples:
            found[dataset] = shown | {"samples": samples}
    return found


# Templates -----------------------------------------------------------------------------------------------------------


def _markdown(value: Any) -> str:
    """Text escaped for Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", " ".join(str(value).split()))


def _initial(heading: str) -> str:
    """A heading with a capital."""
    return heading[:1].upper() + heading[1:]


def _quality_cell(line: Mapping[str, Any], metric: Metric, network: str) -> str:
    """A score in the features of a network, with its standard error where it has one."""
    value = line[metric.key.replace("NETWORK", network)]
    return plus_minus(value, line[metric.error.replace("NETWORK", network)]) if metric.error else metric.show(value)


def _filled(metrics: Sequence[Metric], lines: Sequence[Mapping[str, Any]], network: str) -> list[Metric]:
    """The metrics in a network's features that some line has."""
    return [metric for metric in metrics if any(_quality_cell(line, metric, network) for line in lines)]


def _environment(html: bool) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=html,  # noqa: S701 (Markdown is escaped by `finalize`)
        finalize=None if html else _markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"plus_minus": plus_minus, "duration": duration, "against": against, "remark": remark}
    environment.filters |= {"score_names": score_names, "initial": _initial, "cell": _quality_cell, "filled": _filled}
    environment.globals |= {"metrics": METRICS, "quality": [metric for metric in METRICS.values() if metric.in_features]}
    environment.globals["given_metrics"] = GIVEN_METRICS
    environment.tests["missing"] = is_missing
    return environment


def _groups(board: pd.DataFrame) -> list[tuple[str, list[dict[Any, Any]]]]:
    return [(name, board[board["dataset"] == name].to_dict("records")) for name in board["dataset"].drop_duplicates()]


def render(template: str, params: Params, board: pd.DataFrame, states: Sequence[StageState], head: Mapping[str, str]) -> str:
    """The report as text: the same arguments and files give the same text.

    Arguments:
        template: Name of a file in `stages/reporting/templates`; `.html` is escaped as HTML, everything else as Markdown.
        params: All tables.
        board: As made by `build_scoreboard`.
        states: As made by `stage_states`.
        head: As made by `page_head`.
    """
    seconds = [(state.seconds, state.how) for state in states if state.seconds is not None]
    return (
        _environment(template.endswith(".html"))
        .get_template(template)
        .render(
            head=head,
            total=duration(sum(s for s, _ in seconds)),
            total_ran=duration(sum(s for s, how in seconds if how == "ran") or None),
            known_how=any(state.how for state in states),
            groups=_groups(board),
            networks=[network for network in NETWORKS if board[f"{network}_kid"].notna().any()],
            sections=list(_sections(params, board)),
            states=states,
            graph=Graph(params, states),
            settings=_settings(params),
            cards=list(cards(params, board)) if template.endswith(".html") else [],
            exploration=_exploration(params) if template.endswith(".html") else {},
            runs=_runs_address(),
            csv=base64.b64encode(board.to_csv(index=False, lineterminator="\n").encode()).decode(),
            benchmarks=[(b, [p for p in PUBLISHED if p.benchmark == key]) for key, b in BENCHMARKS.items()],
        )
    )


def description(board: pd.DataFrame, longest: int = 7_500) -> str:
    """The scoreboard in Markdown for the run's page in MLflow, whose tags hold at most 8,000 characters."""
    table = board
    while True:
        left_out = len(board) - len(table)
        text = _environment(False).get_template("description.md").render(groups=_groups(table), left_out=left_out)
        if len(text) <= longest or table.empty:
            return text
        table = table.iloc[: min(len(table) - 1, len(table) * longest // len(text))]
