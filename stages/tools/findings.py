"""Tables of a page about recorded rows, each made again from their metrics by the comment above it."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.system.files import read_json
from stages.reporting.metrics import NETWORKS
from stages.reporting.scoreboard import plus_minus

__all__ = ["renewed"]

# A comment that says what a table shows, and the table, up to an empty line.
BLOCK = re.compile(r"(<!-- table: (?P<text>[^>]*?)\s*-->)\n(\|[^\n]*\n)*")
Trials = Mapping[str, Mapping[str, Any]]  # trial ("0", "1", .. or "") -> metrics
STAGES = ("control", "train", "fit", "evaluate")  # a later stage's score of the same name replaces an earlier one's


def renewed(text: str, folder: Path) -> str:
    r"""A page with its tables as the metrics have them now.

    Above each table is a comment `<!-- table: KIND; LABEL = ROW; .. -->`. A row is a folder of `reports/paper`, or
    one trial of it, as in `mnist-cpu-ae-lde-s0`. Kinds:

    - `open dimensions 1 2 8`: test MSE of reconstructions from the first k dimensions, mean over trials;
    - `scores`: means over trials with their standard errors, or of one trial with its own;
    - `differences`, with LABEL = ROW - ROW: means of differences of the same trials, with their standard errors. The last
      column is what the difference in squared error is worth in the second row's Parzen window of width h,
      :math:`-\Delta / (2 h^2)` nats.

    Arguments:
        text: The page, in Markdown.
        folder: The folder of results that `python -m stages record` writes.

    Raises:
        PipelineError: When a comment can't be read, or a row isn't recorded or lacks what a table shows.
    """

    def table(match: re.Match[str]) -> str:
        kind, *parts = [" ".join(part.split()) for part in match["text"].split(";")]
        words = kind.split()
        name, numbers = " ".join(word for word in words if not word.isdigit()), [word for word in words if word.isdigit()]
        rows = [part.partition("=") for part in parts if part]
        if name not in KINDS or not all(row for _, _, row in rows):
            raise PipelineError(f"<!-- table: {' '.join(match['text'].split())} -->: expected KIND; LABEL = ROW; ..")
        lines = list(KINDS[name](folder, {label.strip(): row.strip() for label, _, row in rows}, numbers))
        return f"{match[1]}\n" + "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], _ruler(lines[0]), *lines[1:]])

    return BLOCK.sub(table, text)


def _ruler(heads: Sequence[str]) -> list[str]:
    return ["---", *["--:"] * (len(heads) - 1)]


def _trials(folder: Path, row: str) -> Trials:
    """Metrics of all stages of each trial of a recorded row, or of one of its trials."""
    name, one = row, ""
    if not (folder / name).is_dir() and (match := re.fullmatch(r"(.+)-s(\d+)", name)):
        name, one = match[1], match[2]
    if not (path := folder / name / "metrics.json").exists():
        raise PipelineError(f"{path}: missing; `python -m stages record` writes it")
    trials: dict[str, dict[str, Any]] = {}
    recorded = read_json(path)
    for stage in STAGES:
        for key, metrics in recorded.items():
            if key.startswith(f"{stage} "):
                trial = re.fullmatch(r".+-s(\d+)", key)
                trials.setdefault(trial[1] if trial else "", {}).update(metrics)
    if one and one not in trials:
        raise PipelineError(f"{row}: its trials are {', '.join(f's{trial}' for trial in trials)}")
    return {one: trials[one]} if one else trials


def _score(metrics: Mapping[str, Any], key: str) -> float | None:
    if key == "kid":
        key = next((f"{network}_kid" for network in NETWORKS if f"{network}_kid" in metrics), "kid")
    return metrics.get(key)


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error over trials."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


# Kinds ----------------------------------------------------------------------------------------------------------------


def _open_dimensions(folder: Path, rows: Mapping[str, str], numbers: Sequence[str]) -> Iterator[list[str]]:
    yield ["test MSE", *[f"k = {k}" for k in numbers]]
    for label, row in rows.items():
        trials, cells = _trials(folder, row), []
        for k in numbers:
            keys = (f"test_mse_first_{k}", f"pca_test_mse_first_{k}")
            values = [metrics[key] for metrics in trials.values() for key in keys if key in metrics]
            if not values:
                raise PipelineError(f"{row}: its recorded metrics have no {keys[0]}")
            cells.append(f"{statistics.fmean(values):.4f}")
        yield [label, *cells]


# Heading, metric, its standard error in a single trial.
SCORES = (
    ("test MSE", "test_mse", "test_mse_se"),
    ("Parzen, nats", "parzen_test_log_likelihood", "parzen_test_se"),
    ("KID", "kid", "kid_se"),
    ("density, nats a code", "test_log_likelihood", "test_log_likelihood_se"),
)


def _scores(folder: Path, rows: Mapping[str, str], numbers: Sequence[str]) -> Iterator[list[str]]:
    yield ["", "row", "trials", *[heading for heading, _, _ in SCORES]]
    for label, row in rows.items():
        trials, cells = list(_trials(folder, row).values()), []
        for _, key, error_key in SCORES:
            values = [value for metrics in trials if (value := _score(metrics, key)) is not None]
            if not values:
                cells.append("")
                continue
            mean, error = _mean(values)
            if error is None:
                network = next((network for network in NETWORKS if f"{network}_kid" in trials[0]), "")
                error = trials[0].get(f"{network}_kid_se" if key == "kid" else error_key)
            cells.append(plus_minus(mean, error))
        yield [label, f"`{row}`", str(len(trials)), *cells]


def _differences(folder: Path, rows: Mapping[str, str], numbers: Sequence[str]) -> Iterator[list[str]]:
    heads = ["", "trials", "squared error", "test MSE, %", "KID", "KID, %", "density, nats a code"]
    yield [*heads, "Parzen, nats", "of it by squared error"]
    for label, pair in rows.items():
        first, minus, second = pair.partition(" - ")
        if not minus:
            raise PipelineError(f"differences are of two rows, LABEL = ROW - ROW, not of {pair}")
        ours, theirs = _trials(folder, first), _trials(folder, second)
        pairs = [(ours[trial], theirs[trial]) for trial in ours if trial in theirs]
        if not pairs:
            raise PipelineError(f"{pair}: no trial is recorded of both")
        width = statistics.fmean(b.get("parzen_bandwidth", math.nan) for _, b in pairs)
        squared, _ = _mean([a["test_squared_error"] - b["test_squared_error"] for a, b in pairs])
        cells = [
            _difference(pairs, "test_squared_error"),
            _difference(pairs, "test_mse", relative=True),
            _difference(pairs, "kid"),
            _difference(pairs, "kid", relative=True),
            _difference(pairs, "test_log_likelihood"),
            _difference(pairs, "parzen_test_log_likelihood"),
            "" if math.isnan(width) else f"{-squared / (2 * width**2):+.1f}",
        ]
        yield [label, str(len(pairs)), *cells]


def _difference(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], key: str, relative: bool = False) -> str:
    scores = [(a, b) for x, y in pairs if (a := _score(x, key)) is not None and (b := _score(y, key)) is not None]
    if not scores:
        return ""
    if relative:
        return f"{100 * (sum(a for a, _ in scores) / sum(b for _, b in scores) - 1):+.0f}"
    mean, error = _mean([a - b for a, b in scores])
    text = f"{mean:.3g}" if error is None else plus_minus(mean, error)
    return text if text.startswith("-") else f"+{text}"


KINDS: Mapping[str, Callable[[Path, Mapping[str, str], Sequence[str]], Iterator[list[str]]]] = {
    "open dimensions": _open_dimensions,
    "scores": _scores,
    "differences": _differences,
}
