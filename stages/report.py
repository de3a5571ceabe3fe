"""metrics of all rows -> scoreboard, page, and the MLflow run of the pipeline's current state."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import PipelineError
from pipeline.settings import Params, flatten, read_params
from pipeline.system.files import atomic_file, atomic_folder, write_json, write_text
from stages.run import one_line_errors
from stages.workspace import HEADLINE

if TYPE_CHECKING:
    import pandas as pd

    from stages.reporting.graph import StageState
    from stages.tracking.client import Tracker

REPORTS, LOCK = Path("reports"), Path("dvc.lock")
SCOREBOARD = REPORTS / "scoreboard.csv"
MARKDOWN = REPORTS / "report.md"
PAGE = REPORTS / "index.html"
TEMPLATE_OF = {PAGE: "report.html", MARKDOWN: "report.md"}


@click.command("report")
@click.option("--params", "params_file", default="params.yaml", show_default=True, help="Settings file.")
@click.option("--dry-run", is_flag=True, help="Print what would be read and written, and stop.")
@click.option("--finished", is_flag=True, help="Show the rows that are done and leave the others out; nothing is tracked.")
@click.option("--show", is_flag=True, help="Print the scoreboard of the last report and build nothing.")
def report(params_file: str, dry_run: bool, finished: bool, show: bool) -> None:
    """Compare the scores of all rows in a table, a page, and the MLflow run of the pipeline's current state.

    Only rows of params.yaml are shown. Open reports/index.html in a browser.
    """
    with one_line_errors("report"):
        if show:
            _show()
            return
        params = read_params(params_file)
        if finished:
            params = _finished(params)
        if dry_run:
            _print_plan(params)
            return
        _report(params, whole=not finished)


def _finished(params: Params) -> Params:
    """The rows whose stages have all run, with those of all rows that they need; prints the names of the others.

    Raises:
        PipelineError: When no data set is done.
    """
    from stages import workspace

    tables: dict[str, Any] = {**params.tables}
    # Keys that name rows of the tables before, in the order in which the pipeline runs them.
    needs: dict[str, tuple[str, ...]] = {"datasets": (), "controls": ("dataset",), "autoencoders": ("dataset",)}
    needs |= {"densities": ("dataset", "codes"), "detections": ("density", "outliers")}
    table_of = {"dataset": "datasets", "outliers": "datasets", "codes": "autoencoders", "density": "densities"}
    left_out = []
    for table, keys in needs.items():
        rows = {}
        for row, values in params.tables[table].items():
            stages = [stage for stage, of in workspace.TABLE_OF_STAGE.items() if of == table]
            stages += ["features"] if table == "datasets" and row in params.rows("evaluations") else []
            done = all(workspace.metrics_file(stage, row).exists() for stage in stages)
            if done and all(values.get(key) in tables[table_of[key]] for key in keys):
                rows[row] = values
            else:
                left_out.append(row)
        tables[table] = rows
    tables["evaluations"] = {row: values for row, values in params.tables["evaluations"].items() if row in tables["datasets"]}
    if not tables["datasets"]:
        raise PipelineError("no row is done yet; `python -m stages` lists them")
    if left_out:
        print(f"report: without rows that aren't done: {', '.join(dict.fromkeys(left_out))}", flush=True)
    return Params(tables)


def _report(params: Params, whole: bool) -> None:
    from stages import workspace
    from stages.arrays import check_output, read_run
    from stages.reporting.graph import repro_started, stage_states
    from stages.reporting.page import page_head, render
    from stages.reporting.pictures import COMBINED, FIGURES, draw_combined, draw_row
    from stages.reporting.scoreboard import build_scoreboard, detection_headlines, headline, stages_and_rows
    from stages.tracking.client import Tracker

    missing = [path for stage, row in stages_and_rows(params) if not (path := workspace.metrics_file(stage, row)).exists()]
    if missing:
        left = f"{missing[0]} is missing" + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
        raise PipelineError(
            f"{left}; run `dvc repro` for all rows, or `python -m stages report --finished` for those that are done"
        )
    board = build_scoreboard(params)  # fails on damaged metrics before anything is written
    for stage, row in stages_and_rows(params):
        for path in read_run(stage, row).get("outputs", {}):
            check_output(stage, row, Path(path))
    names = {"dvc.stage": os.environ.get("DVC_STAGE", ""), "dvc.experiment": os.environ.get("DVC_EXP_NAME", "")}
    tags = {"stage": "report", **{key: value for key, value in names.items() if value}}
    # Settings as written, so that two states compared in the UI show what was changed.
    flat = flatten({table: rows for table, rows in params.tables.items() if table != "sampling"})
    flat |= flatten(asdict(params.sampling()), "sampling.")
    tracker = Tracker(" ".join(filter(None, ("pipeline", names["dvc.experiment"]))), tags, flat, off=not whole)
    try:
        states, head = stage_states(params, repro_started()), page_head()
        with atomic_folder(FIGURES) as folder:
            for stage, row in stages_and_rows(params):
                draw_row(params, stage, row, folder / stage / row)
        with atomic_folder(COMBINED) as folder:
            draw_combined(params, folder)
        texts = {path: render(template, params, board, states, head) for path, template in TEMPLATE_OF.items()}
        for path, text in texts.items():
            write_text(path, text)
        with atomic_file(SCOREBOARD) as temporary:
            board.to_csv(temporary, index=False, lineterminator="\n")
        # One file per row gives one line per row in `dvc metrics show`. One file for all would give one very wide line.
        if whole:  # git keeps those of all rows
            with atomic_folder(HEADLINE) as folder:
                for row, scores in (headline(board) | detection_headlines(params)).items():
                    write_json(folder / f"{row}.json", scores)
        if tracker.on:
            _track(tracker, params, board, states)
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish()
    print(f"report: open {PAGE} in a browser; `python -m stages report --show` prints the scoreboard", flush=True)


def _track(tracker: Tracker, params: Params, board: pd.DataFrame, states: list[StageState]) -> None:
    """Headline metrics, files and description of the pipeline's run, and the stages' runs below it."""
    from stages import workspace
    from stages.reporting.page import description
    from stages.reporting.pictures import COMBINED
    from stages.reporting.scoreboard import detection_headlines, headline, read_metrics

    headlines = headline(board) | detection_headlines(params)
    scores = {f"{row}.{name}": value for row, scores in headlines.items() for name, value in scores.items()}
    tracker.metrics(scores)
    tracker.view(scores)
    tracker.set_tags({"run.seconds": f"{sum(state.seconds or 0.0 for state in states):.6g}"})
    for path in (PAGE, MARKDOWN, SCOREBOARD):
        tracker.artifact(path)
    tracker.artifact(HEADLINE, "headline")
    tracker.artifact(COMBINED, "figures")
    for state in states:
        if state.stage == "prepare" and state.digest:
            tracker.dataset(state.row, state.digest, str(workspace.shards_folder(state.row)), "pipeline")
    tracker.describe(description(board))
    children = []
    for state in states:
        metrics = {k: v for k, v in read_metrics(state.stage, state.row).items() if isinstance(v, (int, float))}
        children.append({"stage": state.stage, "row": state.row, "run_id": state.run_id, "metrics": metrics})
    tracker.rows(_rows(params, board))
    tracker.pipeline(children)


def _rows(params: Params, board: pd.DataFrame) -> list[dict[str, Any]]:
    """Each model's run of `evaluate`, with its headline scores and settings under names short enough for a heading."""
    from stages.arrays import read_run
    from stages.reporting.metrics import NETWORKS
    from stages.reporting.scoreboard import PARZEN, is_missing

    rows = []
    for line in board[board["kind"] == "model"].to_dict("records"):
        density = params.density(line["row"])
        autoencoder = params.autoencoder(density.codes)
        scores = {"parzen" if line["score"] == PARZEN else "log_likelihood": line["value"]}
        for network in NETWORKS:
            scores |= {f"{score}_{network}": line[f"{network}_{score}"] for score in ("kid", "recall")}
        scores["mse"] = line["test_mse"]
        settings: dict[str, Any] = {"data": density.dataset, "autoencoder": density.codes, "objective": autoencoder.objective}
        settings |= {"latent_dim": getattr(autoencoder, "latent_dim", None), "family": density.family}
        settings |= {"components": getattr(density, "components", None)}
        rows.append(
            {
                "row": line["row"],
                "run_id": read_run("evaluate", line["row"]).get("run_id"),
                "scores": {name: float(value) for name, value in scores.items() if not is_missing(value)},
                "settings": {name: value for name, value in settings.items() if value is not None},
            }
        )
    return rows


def _show() -> None:
    import pandas as pd

    from stages.reporting.scoreboard import as_text
    from stages.workspace import uncommitted

    if not SCOREBOARD.exists():
        raise PipelineError(f"{SCOREBOARD} is missing; run `dvc repro report`")
    try:
        print(as_text(pd.read_csv(SCOREBOARD)))
    except (ValueError, KeyError) as error:
        raise PipelineError(f"{SCOREBOARD} can't be read ({error}); run `dvc repro -f -s report`") from None
    if uncommitted(LOCK, HEADLINE):
        print(f"\nCommit these scores, to compare later ones with them: git add {LOCK} {HEADLINE} && git commit -m results")


def _print_plan(params: Params) -> None:
    from stages import workspace
    from stages.reporting.pictures import COMBINED, FIGURES
    from stages.reporting.scoreboard import stages_and_rows

    click.echo("report")
    for stage, row in stages_and_rows(params):
        path = workspace.metrics_file(stage, row)
        click.echo(f"  reads {path}" + ("" if path.exists() else " (missing)"))
    for path in (PAGE, MARKDOWN, SCOREBOARD, HEADLINE, FIGURES, COMBINED):
        click.echo(f"  writes {path}")
