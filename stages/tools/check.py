"""Errors in params.yaml and dvc.yaml, found before anything runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from pipeline.errors import PipelineError, SettingsError, printable
from pipeline.settings import Params, implementation, read_params
from stages.run import one_line_errors
from stages.workspace import TABLE_OF_STAGE

__all__ = ["check", "missing_data", "other_files", "pipeline_problems", "row_count", "unreadable_names"]

PIPELINE = Path("dvc.yaml")


@click.command("check")
@click.option("--params", "params_file", default="params.yaml", show_default=True, help="Settings file.")
def check(params_file: str) -> None:
    """Find errors in params.yaml and dvc.yaml, and missing raw data.

    Prints one line per problem, with row, key and remedy. Exit status 1 if there is any.
    """
    with one_line_errors("check"):
        params = read_params(params_file)
        problems = list(params.problems())
        problems += pipeline_problems(params)
        problems += missing_data(params)
        problems += other_files(params)
        problems += unreadable_names(params)
        for problem in problems:
            click.echo(printable(f"error: check: {problem}"), err=True)
        if problems:
            sys.exit(1)
        click.echo(f"{params_file}: {row_count(params)} rows, no problem")


def row_count(params: Params) -> int:
    """Rows of all tables."""
    return sum(len(rows) for table, rows in params.tables.items() if table != "sampling")


def missing_data(params: Params) -> Iterator[str]:
    """One line per data set whose raw files are missing, with what to put where."""
    for name in params.rows("datasets"):
        try:
            settings = params.dataset(name)
        except PipelineError:
            continue  # reported by Params.problems
        root = Path(settings.root)
        roots = [root, *(root / below for below in getattr(settings, "roots", ()))]
        missing = [path for path in roots if not _holds_something(path)]
        if not missing:
            continue
        remedy = f"{missing[0]} is {'empty' if missing[0].exists() else 'missing'}; data/raw/README.md says what to put there"
        try:
            # The source's own message is the most precise. It stops at the missing files.
            implementation("pipeline.sources", settings.source, f"datasets.{name}.source").open_source(settings, root)
        except PipelineError as error:
            remedy = str(error)
        except OSError:
            pass
        yield f"datasets.{name}.root: {remedy}"


def other_files(params: Params) -> Iterator[str]:
    """A line for each setting that names a file without its digest, or with another, giving the value to write."""
    for dotted, file in params.named_files().items():
        try:
            file.check(dotted)
        except PipelineError as error:
            yield str(error)


def unreadable_names(params: Params) -> Iterator[str]:
    """One line per data set with a file name that isn't UTF-8. DVC fails on such a name without printing it."""
    for name in params.rows("datasets"):
        try:
            root = params.dataset(name).root
        except PipelineError:
            continue  # reported by Params.problems
        for folder, folders, files in os.walk(root):
            for entry in [*folders, *files]:
                try:
                    entry.encode()
                except UnicodeEncodeError:
                    yield f"datasets.{name}.root: the name of {folder}/{entry} isn't UTF-8, which DVC can't add; rename it"
                    break
            else:
                continue
            break


def _holds_something(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def pipeline_problems(params: Params) -> Iterator[str]:
    """One line per disagreement between dvc.yaml and the tables of params.yaml."""
    try:
        stages = _read_pipeline().get("stages")
    except PipelineError as error:
        yield str(error)
        return
    if not isinstance(stages, Mapping):
        yield f"{PIPELINE}: stages: expected a table of stages"
        return
    for stage, table in TABLE_OF_STAGE.items():
        entry = stages.get(stage)
        if not isinstance(entry, Mapping):
            yield f"{PIPELINE}: stages.{stage}: missing; it runs over the rows of {table}"
            continue
        if entry.get("foreach") != f"${{{table}}}":
            yield f"{PIPELINE}: stages.{stage}.foreach: expected ${{{table}}}, got {entry.get('foreach')!r}"
    for table in params.absent:
        yield f"{table}: missing, and dvc.yaml reads it; write '{table}: {{}}' if it has no rows"
    for stage, entry in stages.items():
        body = entry.get("do", entry) if isinstance(entry, Mapping) else {}
        command = str(body.get("cmd", "") if isinstance(body, Mapping) else "")
        expected = f"python -m stages {stage}" + (" ${key}" if isinstance(entry, Mapping) and "foreach" in entry else "")
        if command != expected:
            yield f"{PIPELINE}: stages.{stage}.cmd: expected '{expected}', got '{command}'"
        dependencies = body.get("deps", []) if isinstance(body, Mapping) else []
        if not isinstance(dependencies, list):
            yield f"{PIPELINE}: stages.{stage}.deps: expected a list"
            continue
        for dependency in map(str, dependencies):
            # Only code must exist by now: a stage's outputs may not be written yet.
            if dependency.endswith(".py") and "$" not in dependency and not Path(dependency).exists():
                yield f"{PIPELINE}: stages.{stage}.deps: {dependency} is missing"


def _read_pipeline() -> Mapping[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        with PIPELINE.open(encoding="utf-8") as file:
            document = YAML(typ="safe", pure=True).load(file)
    except FileNotFoundError:
        raise SettingsError(f"{PIPELINE} is missing; run the command from the project's folder") from None
    except (YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise SettingsError(f"{PIPELINE} isn't valid YAML: {' '.join(str(error).split())}") from None
    return document if isinstance(document, Mapping) else {}
