"""Two states of the project, or two rows, compared: settings, scores with paired differences, and samples side by side."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import PipelineError
from pipeline.settings import Params, flatten, read_params
from stages import workspace
from stages.reporting.metrics import METRICS, NETWORKS, Metric
from stages.reporting.states import DONE, states
from stages.run import one_line_errors
from stages.tools.rows import parse, plain
from stages.tools.settings import as_yaml

if TYPE_CHECKING:
    from stages.reporting.differences import Difference

__all__ = ["compare"]

WIDTH = 80
PICTURES = Path("reports/compare")
SHOWN = 10  # samples of each
NO_SETTING = "default"


@dataclass(frozen=True)
class State:
    """A state of the project.

    Attributes:
        label: Its name in tables.
        params: Its settings.
        read: Gives the bytes of a file by its path; None if it isn't there.
    """

    label: str
    params: Params
    read: Callable[[Path], bytes | None]

    def scores(self, row: str) -> dict[str, Any]:
        """Metrics of a row of `densities` and of its autoencoder; if they aren't there, the headline that git keeps."""
        found: dict[str, Any] = {}
        for stage, name in (("train", self.params.density(row).codes), ("evaluate", row)):
            data = self.read(workspace.metrics_file(stage, name))
            found |= json.loads(data) if data else {}
        if found:
            return found
        data = self.read(workspace.HEADLINE / f"{row}.json")
        return dict(json.loads(data)) if data else {}

    def points(self, row: str) -> dict[str, Any]:
        """Scores of single test points of a row and of its autoencoder, by metric."""
        from stages.arrays import PER_EXAMPLE

        return self._arrays("train", self.params.density(row).codes, PER_EXAMPLE) | self._arrays("evaluate", row, PER_EXAMPLE)

    def samples(self, row: str) -> Any:
        """The first samples, as images; None if there are none, or they aren't images."""
        images = self._arrays("sample", row, "samples").get("samples")
        return images[:SHOWN] if images is not None and images.ndim == 4 else None

    def _arrays(self, stage: str, row: str, name: str) -> dict[str, Any]:
        from safetensors.numpy import load

        data = self.read(workspace.arrays_folder(stage, row) / f"{name}.safetensors")
        return load(data) if data else {}


def _working_tree() -> State:
    return State("now", read_params(), lambda path: path.read_bytes() if path.is_file() else None)


def _at(revision: str) -> State:
    """The state of a commit or experiment, with what DVC's cache holds of its outputs.

    Raises:
        PipelineError: When there is no such revision, or it has no params.yaml.
    """
    from stages.reporting.history import files_at

    read = files_at(revision)
    settings = read(Path("params.yaml"))
    if settings is None:
        raise PipelineError(f"{revision} has no params.yaml")
    text = settings.decode(errors="replace")
    return State(revision, Params(plain(parse(text, f"params.yaml of {revision}")) or {}), read)


@click.command("compare")
@click.argument("revision", metavar="[REV]", default="HEAD")
@click.option("--rows", nargs=2, metavar="A B", help="Compare two rows of this state instead.")
def compare(revision: str, rows: tuple[str, str] | None) -> None:
    """Compare this state with that of a commit or experiment: settings, scores and samples.

    REV is a commit, a branch or an experiment of DVC; without it, the last commit. The ± of a difference is that of
    differences of the same test points, where both states scored the same points. Pictures of samples side by side are
    written to reports/compare.
    """
    with one_line_errors("compare"):
        now = _working_tree()
        if rows is not None:
            lines = _settings_of_rows(now, *rows)
            pairs = [(rows[0], rows[1])]
            before = now
        else:
            before = _at(revision)
            lines = _settings(before.params, now.params)
            pairs = [(row, row) for row in now.params.rows("densities") if row in before.params.rows("densities")]
            lines += _rows_of_one(before, now)
        click.echo("\n".join(map(_cut, lines)) if lines else "no setting differs")
        same, nowhere = [], []
        for first, second in pairs:
            if first == second and before.scores(first) == now.scores(second):
                same.append(first)
            elif not before.scores(first) or not now.scores(second):
                nowhere.append(first)
            else:
                click.echo("\n" + "\n".join(_table(before, first, now, second)))
        if same:
            click.echo("\n" + textwrap.fill(f"the same scores: {', '.join(same)}", WIDTH))
        for line in _remarks(before, now, nowhere):
            click.echo(textwrap.fill(line, WIDTH))


# Settings -------------------------------------------------------------------------------------------------------------


def _settings(before: Params, after: Params) -> list[str]:
    """One line per setting that differs, of rows that are in both."""
    lines: list[str] = []
    for table in after.tables:
        if table == "sampling":
            lines += _differences(before.tables[table], after.tables[table], table)
            continue
        for row in after.rows(table):
            if row in before.tables[table]:
                lines += _differences(before.tables[table][row], after.tables[table][row], f"{table}.{row}")
    return lines


def _settings_of_rows(state: State, first: str, second: str) -> list[str]:
    for row in (first, second):
        state.params.density(row)
    densities = state.params.tables["densities"]
    lines = list(_differences(densities[first], densities[second], "densities"))
    codes = [str(densities[row]["codes"]) for row in (first, second)]
    autoencoders = state.params.tables["autoencoders"]
    return lines + list(_differences(autoencoders[codes[0]], autoencoders[codes[1]], "autoencoders"))


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], where: str) -> Iterator[str]:
    old, new = flatten(before), flatten(after)
    for key in dict.fromkeys([*old, *new]):
        if old.get(key, NO_SETTING) != new.get(key, NO_SETTING):
            yield f"{where}.{key}: {as_yaml(old.get(key, NO_SETTING))} -> {as_yaml(new.get(key, NO_SETTING))}"


def _rows_of_one(before: State, after: State) -> Iterator[str]:
    for table in after.params.tables:
        if table == "sampling":
            continue
        old, new = before.params.rows(table), after.params.rows(table)
        yield from (f"{table}.{row}: new row" for row in new if row not in old)
        yield from (f"{table}.{row}: only in {before.label}" for row in old if row not in new)


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."


# Scores ---------------------------------------------------------------------------------------------------------------


def _shown(scores: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Metric]]:
    """Metrics that both have, in the order of the table of metrics."""
    seen: dict[str, Metric] = {}
    for metric in METRICS.values():
        for network in NETWORKS if metric.in_features else ("",):
            key = metric.key.replace("NETWORK", network)
            if key not in seen and metric.better != "neither" and all(s.get(key) is not None for s in (scores, other)):
                seen[key] = metric
    yield from seen.items()


def _table(before: State, first: str, after: State, second: str) -> list[str]:
    """A row's scores in both states, one line per metric, at most 80 characters wide."""
    from stages.reporting.differences import difference

    old, new = before.scores(first), after.scores(second)
    old_points, new_points = before.points(first), after.points(second)
    heads = (first, before.label, after.label) if first == second else ("", "A", "B")
    lines = [] if first == second else [_cut(f"A: {first}"), _cut(f"B: {second}")]
    lines.append(f"{heads[0][:34]:34} {heads[1][-9:]:>9} {heads[2][-9:]:>9}  difference ± SE")
    images = "parzen_test_log_likelihood" in new or any(key.endswith("_kid") for key in new)
    for key, metric in _shown(old, new):
        found = difference(key, old, new, old_points, new_points)
        title = METRICS["code_log_likelihood"].title if key == "test_log_likelihood" and images else metric.title
        other_codes = title == METRICS["code_log_likelihood"].title and not _same_codes(before, first, after, second)
        text = "of other codes: not comparable" if other_codes else _said(found, metric)
        lines.append(f"  {title:32} {_number(old, key, found):>9} {_number(new, key, found):>9}  {text}".rstrip())
    folder = _draw(before, first, after, second)
    return lines + ([f"  samples side by side: {folder}"] if folder else [])


def _number(scores: Mapping[str, Any], key: str, found: Difference) -> str:
    """A score with the decimals of its difference's error."""
    from stages.reporting.scoreboard import plus_minus

    return plus_minus(float(scores[key]), found.error).partition(" ")[0]


def _said(found: Difference, metric: Metric) -> str:
    """The difference in words: `better` and `worse` where it is more than two standard errors."""
    from stages.reporting.scoreboard import plus_minus

    number = plus_minus(found.value, found.error) + ("" if found.paired or not found.error > 0 else " *")
    sign = "+" if found.value > 0 else ""
    if not found.error >= 0 or found.value == 0:
        return f"{sign}{number}"
    word = "level" if not found.sure else "better" if (found.value > 0) == (metric.better == "higher") else "worse"
    return f"{sign}{number} {word}"


def _same_codes(before: State, first: str, after: State, second: str) -> bool:
    """Whether two rows have the same codes, so that likelihoods of codes have the same units."""

    def key(state: State, row: str) -> tuple[Any, Any]:
        codes = state.params.density(row).codes
        return state.params.autoencoder(codes), state.params.dataset(state.params.density(row).dataset)

    return key(before, first) == key(after, second)


def _draw(before: State, first: str, after: State, second: str) -> Path | None:
    """A picture of the first samples of both, one row of images each."""
    samples = [before.samples(first), after.samples(second)]
    if samples[0] is None or samples[1] is None or samples[0].shape != samples[1].shape:
        return None
    from pipeline.figures import image_rows, save_figure

    labels = (before.label, after.label) if first == second else (first, second)
    path = PICTURES / f"{second}.png"
    save_figure(image_rows({label: images / 255 for label, images in zip(labels, samples, strict=True)}), path)
    return path


def _remarks(before: State, after: State, nowhere: list[str]) -> Iterator[str]:
    """What to do where a comparison is incomplete."""
    waiting = sum(state != DONE for state in states(after.params).values())
    if waiting:
        yield f"\n{waiting} stages are out of date: `dvc repro` runs them"
    if nowhere:
        yield f"\nno scores of {', '.join(nowhere)} in both states"
    both = [row for row in after.params.rows("densities") if row in before.params.rows("densities")]
    partly = [row for row in both if before.read(workspace.HEADLINE / f"{row}.json")]
    if any(before.read(workspace.metrics_file("evaluate", row)) is None for row in partly):
        yield (
            f"\nonly headline scores of {before.label} are here, without errors: the others were made elsewhere. `dvc pull` "
            "fetches them from a remote; or commit dvc.lock after `make repro`, and compare with that commit"
        )
